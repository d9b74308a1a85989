//! Gradient buckets: where gradients are collected, and how a full one starts its reduction while backward goes on.
//!
//! ```text
//! parameters    p0  p1  p2 … p8  p9          in the order of forward
//! buckets       [ p9 ][ p8 p7 p6 ][ p5 … ]   backwards: the first one small, so that communication begins early
//!                 0        1          2
//! ```
//! Buckets are reduced in the order of their numbers on every rank, whatever the order in which they become full, so
//! that ranks whose backward takes different turns still agree.

use std::sync::{Arc, Mutex};

use super::cuda::DeviceGradients;
use super::gate::{Gate, lock};
use super::module::Parameter;
use super::place::Place as Memory;
use super::storage::Storage;
use crate::collective::Work;
use crate::device::{Buffer, Stream};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::ops::{Slice, SliceMut};

/// Gradients begin at multiples of this, so that no two share a cache line and vectors load aligned.
const ALIGN_BYTES: usize = 64;

/// Where in the buckets a parameter's gradient is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    pub bucket: usize,
    pub offset_elems: usize,
    pub len_elems: usize,
}

/// Divides gradients of `lens_elems` elements among buckets. Returns the places, in the order of `lens_elems`, and the buckets'
/// lengths in elements.
pub(crate) fn plan(
    lens_elems: &[usize],
    dtype: DType,
    first_bucket_bytes: usize,
    bucket_bytes: usize,
) -> Result<(Vec<Place>, Vec<usize>)> {
    let align_elems = ALIGN_BYTES / dtype.size_bytes();
    let mut places = vec![Place { bucket: 0, offset_elems: 0, len_elems: 0 }; lens_elems.len()];
    let mut buckets: Vec<usize> = Vec::new();
    for (index, &len_elems) in lens_elems.iter().enumerate().rev() {
        let limit_bytes = if buckets.len() <= 1 { first_bucket_bytes } else { bucket_bytes };
        let padded_elems = len_elems.checked_next_multiple_of(align_elems);
        let fits = |used_elems: &usize| {
            let end_bytes = padded_elems.and_then(|len| len.checked_add(*used_elems)).map(|end| dtype.bytes_of(end));
            matches!(end_bytes, Some(Ok(end_bytes)) if end_bytes <= limit_bytes)
        };
        if !buckets.last().is_some_and(fits) {
            buckets.push(0);
        }
        let bucket = buckets.len() - 1;
        places[index] = Place { bucket, offset_elems: buckets[bucket], len_elems };
        let end_elems = padded_elems.and_then(|len| len.checked_add(buckets[bucket]));
        buckets[bucket] = end_elems.ok_or_else(|| Error::SizeOverflow {
            what: "gradient bucket",
            detail: format!("{} + {len_elems} elements", buckets[bucket]),
        })?;
    }
    Ok((places, buckets))
}

/// One bucket on the host. Shared between the thread that fills and launches it, and the closures of the compute stream.
#[derive(Debug)]
pub(crate) struct Bucket {
    state: Mutex<State>,
}

#[derive(Debug)]
enum State {
    Here(Buffer),
    /// The reduction owns the memory.
    Reducing(Work<Buffer>),
    /// The reduction failed; its error is the strategy's failure.
    Lost,
}

fn lost() -> Error {
    Error::Stream {
        stream: "of gradients".to_owned(),
        reason: "a gradient bucket was lost with a failed reduction".to_owned(),
    }
}

impl Bucket {
    fn new(buffer: Buffer) -> Arc<Bucket> {
        Arc::new(Bucket { state: Mutex::new(State::Here(buffer)) })
    }

    /// Runs `f` on the bucket's memory. If a reduction was started it must have ended in the order of the calling stream, or
    /// this waits for it.
    pub fn with<R>(&self, f: impl FnOnce(&mut Buffer) -> Result<R>) -> Result<R> {
        let mut state = lock(&self.state);
        if matches!(*state, State::Reducing(_))
            && let State::Reducing(work) = std::mem::replace(&mut *state, State::Lost)
        {
            *state = State::Here(work.wait()?);
        }
        match &mut *state {
            State::Here(buffer) => f(buffer),
            State::Reducing(_) | State::Lost => Err(lost()),
        }
    }

    /// Hands the memory to `launch`, which starts the reduction.
    pub fn launch(&self, launch: impl FnOnce(Buffer) -> Result<Work<Buffer>>) -> Result<()> {
        let mut state = lock(&self.state);
        let buffer = match std::mem::replace(&mut *state, State::Lost) {
            State::Here(buffer) => buffer,
            State::Reducing(work) => work.wait()?,
            State::Lost => return Err(lost()),
        };
        *state = State::Reducing(launch(buffer)?);
        Ok(())
    }

    /// Orders `stream` behind the reduction in flight, if there is one.
    pub fn join(&self, stream: &Stream) -> Result<()> {
        match &*lock(&self.state) {
            State::Reducing(work) => stream.wait(work.event()),
            State::Here(_) | State::Lost => Ok(()),
        }
    }

    /// Whether no reduction is in flight any more.
    pub fn is_reduced(&self) -> bool {
        match &*lock(&self.state) {
            State::Reducing(work) => work.is_complete(),
            State::Here(_) | State::Lost => true,
        }
    }
}

/// A parameter's gradient on the host.
#[derive(Debug, Clone)]
pub(crate) struct Gradient {
    pub bucket: Arc<Bucket>,
    pub offset_elems: usize,
    pub len_elems: usize,
}

impl Gradient {
    /// Runs `f` on the gradient, to read; waits as [`Bucket::with`].
    pub fn read<R>(&self, f: impl FnOnce(Slice<'_>) -> Result<R>) -> Result<R> {
        self.bucket.with(|buffer| f(slice(buffer, self.offset_elems, self.len_elems)?))
    }

    /// Runs `f` on the gradient, to write; waits as [`Bucket::with`].
    pub fn write<R>(&self, f: impl FnOnce(SliceMut<'_>) -> Result<R>) -> Result<R> {
        self.bucket.with(|buffer| f(slice_mut(buffer, self.offset_elems, self.len_elems)?))
    }
}

fn outside(expected_elems: usize, offset_elems: usize, len_elems: usize) -> Error {
    Error::LengthMismatch {
        what: format!("{len_elems} elements from {offset_elems} on"),
        expected_elems,
        actual_elems: offset_elems.saturating_add(len_elems),
    }
}

macro_rules! typed {
    ($buffer:ident, $offset:ident, $len:ident, $view:ident, $get:ident, $slice:ident) => {{
        let range = $offset..$offset.saturating_add($len);
        let whole_elems = $buffer.len_elems();
        let error = || outside(whole_elems, $offset, $len);
        Ok(match $buffer.dtype() {
            DType::F32 => $slice::F32($buffer.$view()?.$get(range).ok_or_else(error)?),
            DType::F16 => $slice::F16($buffer.$view()?.$get(range).ok_or_else(error)?),
            DType::BF16 => $slice::BF16($buffer.$view()?.$get(range).ok_or_else(error)?),
            DType::F64 => $slice::F64($buffer.$view()?.$get(range).ok_or_else(error)?),
            dtype => return Err(Error::Unsupported { op: "gradients and weights".to_owned(), dtype }),
        })
    }};
}

/// Part of a buffer of floats.
pub(crate) fn slice(buffer: &Buffer, offset_elems: usize, len_elems: usize) -> Result<Slice<'_>> {
    typed!(buffer, offset_elems, len_elems, as_slice, get, Slice)
}

/// Part of a buffer of floats, to write.
pub(crate) fn slice_mut(buffer: &mut Buffer, offset_elems: usize, len_elems: usize) -> Result<SliceMut<'_>> {
    typed!(buffer, offset_elems, len_elems, as_mut_slice, get_mut, SliceMut)
}

/// The memory of gradients.
#[derive(Debug)]
pub(crate) enum Buckets {
    Host {
        buckets: Vec<Arc<Bucket>>,
        /// In the order of the parameters.
        gradients: Vec<Gradient>,
    },
    Device(Box<DeviceGradients>),
}

/// The gradients of one module: their places, and how far the current backward has come.
#[derive(Debug)]
pub(crate) struct Gradients {
    pub parameters: Vec<Parameter>,
    pub memory: Buckets,
    places: Vec<Place>,
    bucket_bytes: Vec<usize>,
    /// Whether the next contribution replaces what is there: nothing was accumulated since the last step.
    fresh: Vec<bool>,
    /// Whether the current backward will contribute no more.
    ready: Vec<bool>,
    /// Parameters of each bucket that are not ready.
    missing: Vec<usize>,
    parameters_in: Vec<usize>,
    /// Buckets launched in the current backward.
    launched: usize,
    /// Gradients were accumulated that no reduction has seen.
    pub unreduced: bool,
    /// The loss scale that is in the gradients.
    pub loss_scale: f32,
    /// A reduction was started that the compute stream is not ordered behind yet.
    pub unjoined: bool,
    /// Backwards begun so far: tells whether a measurement is of the gradients as they are now.
    pub backwards: u64,
}

impl Gradients {
    pub fn new(
        parameters: Vec<Parameter>,
        memory: &Memory,
        dtype: DType,
        first_bucket_bytes: usize,
        bucket_bytes: usize,
    ) -> Result<Gradients> {
        let lens_elems: Vec<usize> = parameters.iter().map(Parameter::len_elems).collect();
        let (places, bucket_elems) = plan(&lens_elems, dtype, first_bucket_bytes, bucket_bytes)?;
        let storages = bucket_elems.iter().map(|len| memory.alloc(dtype, *len)).collect::<Result<Vec<_>>>()?;
        let mut buckets = Vec::new();
        let mut on_device = Vec::new();
        for storage in storages {
            match storage {
                Storage::Host(buffer) => buckets.push(Bucket::new(buffer)),
                Storage::Device(memory) => on_device.push(memory),
            }
        }
        let gradient = |place: &Place| Gradient {
            bucket: Arc::clone(&buckets[place.bucket]),
            offset_elems: place.offset_elems,
            len_elems: place.len_elems,
        };
        let memory = match on_device.is_empty() {
            true => Buckets::Host { gradients: places.iter().map(gradient).collect(), buckets },
            false => Buckets::Device(Box::new(DeviceGradients::new(on_device, &places)?)),
        };
        let mut parameters_in = vec![0; bucket_elems.len()];
        places.iter().for_each(|place| parameters_in[place.bucket] += 1);
        let count = parameters.len();
        Ok(Gradients {
            parameters,
            memory,
            places,
            bucket_bytes: bucket_elems.iter().map(|len| len * dtype.size_bytes()).collect(),
            fresh: vec![true; count],
            ready: vec![false; count],
            missing: parameters_in.clone(),
            parameters_in,
            launched: 0,
            unreduced: false,
            loss_scale: 1.0,
            unjoined: false,
            backwards: 0,
        })
    }

    /// The buckets on the host; none if they are on a device.
    pub fn host_buckets(&self) -> &[Arc<Bucket>] {
        match &self.memory {
            Buckets::Host { buckets, .. } => buckets,
            Buckets::Device(_) => &[],
        }
    }

    /// The gradients on the host, in the order of the parameters; none if they are on a device.
    pub fn host_gradients(&self) -> &[Gradient] {
        match &self.memory {
            Buckets::Host { gradients, .. } => gradients,
            Buckets::Device(_) => &[],
        }
    }

    /// Number of buckets.
    pub fn len_buckets(&self) -> usize {
        self.bucket_bytes.len()
    }

    /// Bytes of a bucket.
    pub fn bucket_bytes(&self, bucket: usize) -> usize {
        self.bucket_bytes[bucket]
    }

    /// Whether a gradient that a step will use was accumulated since the last step. Parameters without an optimizer do not
    /// count, unless there is no optimizer at all: nothing ever uses theirs up.
    pub fn has_any(&self) -> bool {
        let has_optimizers = self.parameters.iter().any(Parameter::is_claimed);
        let counts = |parameter: &Parameter| !has_optimizers || parameter.is_claimed();
        self.parameters.iter().zip(&self.fresh).any(|(parameter, fresh)| counts(parameter) && !fresh)
    }

    /// Whether this parameter's gradient holds something.
    pub fn has(&self, parameter: usize) -> bool {
        !self.fresh[parameter]
    }

    /// A backward begins.
    pub fn begin(&mut self) {
        if !self.has_any() {
            self.fresh.fill(true);
        }
        self.backwards += 1;
        self.ready.fill(false);
        self.missing.copy_from_slice(&self.parameters_in);
        self.launched = 0;
    }

    /// Which parameter of module `number` gets a gradient of `len_elems` elements, if it may.
    pub fn expect(&self, number: usize, gate: &Gate, parameter: &Parameter, len_elems: usize) -> Result<usize> {
        let slot = parameter.slot().filter(|slot| slot.module == number && parameter.gate().is_same(gate));
        let index = slot.map(|slot| slot.parameter).ok_or_else(|| Error::InvalidArgument {
            argument: "parameter",
            value: format!("{:?}", parameter.name()),
            accepted: "a parameter of the module that backward was called with",
        })?;
        if self.ready[index] {
            return Err(self.second(index));
        }
        if len_elems != parameter.len_elems() {
            return Err(Error::LengthMismatch {
                what: format!("gradient of parameter {:?}", parameter.name()),
                expected_elems: parameter.len_elems(),
                actual_elems: len_elems,
            });
        }
        Ok(index)
    }

    /// That a parameter has two final gradients.
    pub fn second(&self, parameter: usize) -> Error {
        Error::InvalidArgument {
            argument: "gradient",
            value: format!("a second one of parameter {:?}", self.parameters[parameter].name()),
            accepted: "one final gradient for each parameter and backward; contributions before it go through add",
        }
    }

    /// The bucket that a parameter's gradient is in.
    pub fn bucket_of(&self, parameter: usize) -> usize {
        self.places[parameter].bucket
    }

    /// The current backward has contributed to this parameter.
    pub fn touch(&mut self, parameter: usize) {
        self.fresh[parameter] = false;
    }

    /// Nothing more comes for this parameter.
    pub fn set_ready(&mut self, parameter: usize) {
        if !std::mem::replace(&mut self.ready[parameter], true) {
            self.missing[self.places[parameter].bucket] -= 1;
        }
    }

    /// The next bucket to launch, if it is full.
    pub fn take_full(&mut self) -> Option<usize> {
        let next = self.launched;
        (self.missing.get(next) == Some(&0)).then(|| {
            self.launched += 1;
            next
        })
    }

    /// Buckets launched in the current backward.
    pub fn launched(&self) -> usize {
        self.launched
    }

    /// The gradients of these parameters were used, or thrown away: the next contribution replaces them.
    pub fn discard(&mut self, parameters: impl IntoIterator<Item = usize>) {
        parameters.into_iter().for_each(|parameter| self.fresh[parameter] = true);
        if !self.has_any() {
            self.unreduced = false;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_fill_backwards_and_the_first_is_small() {
        // Parameters of 16 f32 elements: 64 bytes each.
        let (places, buckets) = plan(&[16; 10], DType::F32, 128, 256).unwrap();
        let of: Vec<usize> = places.iter().map(|place| place.bucket).collect();
        assert_eq!(of, [2, 2, 2, 2, 1, 1, 1, 1, 0, 0]);
        assert_eq!(buckets, [32, 64, 64]);
        assert_eq!((places[9].offset_elems, places[8].offset_elems), (0, 16));
    }

    #[test]
    fn a_large_parameter_has_a_bucket_of_its_own() {
        let (places, buckets) = plan(&[3, 1000, 0, 5], DType::BF16, 64, 256).unwrap();
        assert_eq!(places[3], Place { bucket: 0, offset_elems: 0, len_elems: 5 });
        assert_eq!(places[2], Place { bucket: 0, offset_elems: 32, len_elems: 0 });
        assert_eq!(places[1], Place { bucket: 1, offset_elems: 0, len_elems: 1000 });
        assert_eq!(places[0].bucket, 2);
        assert_eq!(buckets, [32, 1024, 32]);
        assert!(plan(&[usize::MAX, usize::MAX], DType::F32, 64, 256).is_err());
    }
}
