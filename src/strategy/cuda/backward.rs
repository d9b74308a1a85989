//! Backward on a device: gradients into buckets, full buckets into reduction, all of it enqueued.

use std::cmp::Reverse;

use super::backend::DeviceBackend;
use super::memory::DeviceMemory;
use super::stage::{Stage, take_device};
use super::watch::Part;
use crate::device::cuda::{Event, Stream, View};
use crate::dtype::{DType, ReduceOp};
use crate::error::{Error, Result};
use crate::ops::Slice;
use crate::strategy::bucket::{Buckets, Gradients, Place};
use crate::strategy::gate::Gate;
use crate::strategy::gradient::{BucketProgress, GradSink, Receiver};
use crate::strategy::module::Parameter;
use crate::strategy::statistics::Counters;

/// The gradients of one module on the device.
#[derive(Debug)]
pub(crate) struct DeviceGradients {
    buckets: Vec<View>,
    /// In the order of the parameters.
    pub(super) gradients: Vec<View>,
    /// Of each bucket, the end of its last reduction.
    reduced: Vec<Event>,
    pub(super) stage: Stage,
    /// f32: the loss scale that is in the gradients. A copy, because the step moves the scaler's.
    pub(super) loss_scale: DeviceMemory,
    /// Of gradients that come together, what they are sorted by; empty between calls.
    arrivals: Vec<Arrival>,
}

/// A final gradient that came with others, in the order in which they are taken.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Arrival {
    bucket: usize,
    replaces: bool,
    /// Of the parameter: the last first, as they follow one another in a bucket, and as a backward pass mostly finishes them.
    index: Reverse<usize>,
    /// Among those that came.
    at: usize,
}

/// Where a parameter's gradient is: f32, f16 or bf16 elements on the strategy's device.
#[derive(Debug, Clone)]
pub struct GradientSource {
    /// Whose.
    pub parameter: Parameter,
    /// `[parameter.len_elems()]`
    pub gradient: View,
}

impl DeviceGradients {
    pub fn new(buckets: Vec<DeviceMemory>, places: &[Place]) -> Result<DeviceGradients> {
        let Some(place) = buckets.first().map(|bucket| bucket.place().clone()) else { return Err(no_gradients()) };
        let buckets: Vec<View> = buckets.iter().map(DeviceMemory::view).collect();
        let gradient = |place: &Place| buckets[place.bucket].slice(place.offset_elems, place.len_elems);
        let gradients = places.iter().map(gradient).collect::<Result<Vec<_>>>()?;
        let loss_scale = place.alloc(DType::F32, 1)?;
        loss_scale.view().write(&[1.0_f32], &place.compute)?;
        Ok(DeviceGradients {
            reduced: buckets.iter().map(|_| Event::new(&place.device)).collect::<Result<_>>()?,
            stage: Stage::new(&place, &gradients),
            loss_scale,
            arrivals: Vec::with_capacity(gradients.len()),
            gradients,
            buckets,
        })
    }
}

/// A backward that is going on.
pub(crate) struct DeviceBackward<'r> {
    number: usize,
    gradients: &'r mut Gradients,
    backend: &'r mut DeviceBackend,
    /// Whether full buckets are reduced.
    reduces: bool,
    /// Whether gradients are complete after this backward.
    synchronize: bool,
    gate: &'r Gate,
}

impl DeviceBackend {
    pub fn begin_backward<'r>(
        &'r mut self,
        number: usize,
        gradients: &'r mut Gradients,
        reduces: bool,
        synchronize: bool,
        gate: &'r Gate,
    ) -> Result<DeviceBackward<'r>> {
        if gradients.unjoined {
            // What is accumulated now is added to what those reductions leave behind.
            self.join()?;
            gradients.unjoined = false;
        }
        if !gradients.has_any()
            && let Some(scaler) = &self.scaler
        {
            on_device(&mut gradients.memory)?.loss_scale.view().copy_from(scaler.scale(), &self.place.compute)?;
        }
        gradients.begin();
        Ok(DeviceBackward { number, gradients, backend: self, reduces, synchronize, gate })
    }
}

impl DeviceBackward<'_> {
    /// A gradient, as `stage` brings it to its place, has arrived.
    fn take(
        &mut self,
        parameter: &Parameter,
        len_elems: usize,
        is_last: bool,
        stage: impl FnOnce(&mut Stage, &DeviceBackend, &View, bool) -> Result<()>,
    ) -> Result<()> {
        self.gate.check()?;
        let index = self.gradients.expect(self.number, self.gate, parameter, len_elems)?;
        let replaces = !self.gradients.has(index);
        let on = on_device(&mut self.gradients.memory)?;
        stage(&mut on.stage, self.backend, &on.gradients[index], replaces)?;
        self.gradients.touch(index);
        if is_last {
            self.gradients.set_ready(index);
            self.launch_full()?;
        }
        Ok(())
    }

    /// Final gradients have arrived, which are brought to their places bucket by bucket.
    fn take_all(&mut self, given: &[GradientSource], order: &mut Vec<Arrival>) -> Result<()> {
        self.gate.check()?;
        for (at, source) in given.iter().enumerate() {
            let GradientSource { parameter, gradient } = source;
            let index = self.gradients.expect(self.number, self.gate, parameter, gradient.len_elems())?;
            let (bucket, replaces) = (self.gradients.bucket_of(index), !self.gradients.has(index));
            order.push(Arrival { bucket, replaces, index: Reverse(index), at });
        }
        order.sort_unstable();
        if let Some(twice) = order.windows(2).find(|pair| pair[0].index == pair[1].index) {
            return Err(self.gradients.second(twice[0].index.0));
        }
        for arrived in order.chunk_by(|one, other| (one.bucket, one.replaces) == (other.bucket, other.replaces)) {
            let gradients = &on_device(&mut self.gradients.memory)?.gradients;
            let pair = |arrival: &Arrival| (&given[arrival.at].gradient, &gradients[arrival.index.0]);
            take_device(self.backend, arrived.iter().map(pair), arrived[0].replaces)?;
            for arrival in arrived {
                self.gradients.touch(arrival.index.0);
                self.gradients.set_ready(arrival.index.0);
            }
            self.launch_full()?;
        }
        Ok(())
    }

    /// Starts the reductions whose turn has come.
    fn launch_full(&mut self) -> Result<()> {
        if !self.reduces {
            return Ok(());
        }
        while let Some(bucket) = self.gradients.take_full() {
            let size_bytes = self.gradients.bucket_bytes(bucket) as u64;
            let DeviceBackend { place, communication, communicator, filled, watch, tracks, counters, .. } =
                &mut *self.backend;
            let on = on_device(&mut self.gradients.memory)?;
            // The whole overlap: what fills the next bucket goes on while this one is reduced behind the event.
            place.compute.record(filled)?;
            communication.wait(filled)?;
            let (name, track, index) = ("all_reduce", tracks[1], bucket as u32);
            let part = Part { name, index, size_bytes, track, total: |counters| &counters.reduction_ns };
            watch.get_mut().time(communication, part, || {
                communicator.all_reduce(&on.buckets[bucket], ReduceOp::Avg, communication)
            })?;
            Counters::add(&counters.reduced_bytes, size_bytes);
            communication.record(&on.reduced[bucket])?;
            self.gradients.unjoined = true;
        }
        Ok(())
    }

    /// No gradient comes any more.
    pub fn finish(&mut self) -> Result<()> {
        for index in 0..self.gradients.parameters.len() {
            // As on the host: a parameter that was not used has a gradient of zero.
            if self.synchronize && !self.gradients.has(index) {
                on_device(&mut self.gradients.memory)?.gradients[index].zero(self.backend.compute())?;
                self.gradients.touch(index);
            }
            self.gradients.set_ready(index);
            self.launch_full()?;
        }
        Ok(())
    }
}

impl Receiver for DeviceBackward<'_> {
    fn receive(&mut self, parameter: &Parameter, gradient: Slice<'_>, is_last: bool) -> Result<()> {
        self.take(parameter, gradient.len_elems(), is_last, |stage, backend, to, replaces| {
            stage.take_host(backend, gradient, to, replaces)
        })
    }

    fn loss_scale(&self) -> Result<f32> {
        match (&self.backend.scaler, &self.gradients.memory) {
            (Some(_), Buckets::Device(on)) => {
                let mut scale = [0.0_f32];
                on.loss_scale.view().read(&mut scale, self.backend.compute(), self.backend.place.timeout)?;
                Ok(scale[0])
            }
            _ => Ok(1.0),
        }
    }

    fn is_synchronizing(&self) -> bool {
        self.synchronize
    }

    fn buckets(&self) -> BucketProgress {
        let launched = self.gradients.launched();
        let reduced = match &self.gradients.memory {
            Buckets::Device(on) if self.reduces => {
                on.reduced[..launched].iter().filter(|event| event.is_complete()).count()
            }
            _ => 0,
        };
        BucketProgress { total: self.gradients.len_buckets(), launched, reduced }
    }

    fn on_device(&mut self) -> Option<&mut dyn DeviceReceiver> {
        Some(self)
    }
}

/// Where a strategy takes gradients that are on its device.
pub(crate) trait DeviceReceiver {
    fn receive_view(
        &mut self,
        parameter: &Parameter,
        gradient: &View,
        ready: Option<&Event>,
        is_last: bool,
    ) -> Result<()>;
    fn receive_views(&mut self, gradients: &[GradientSource], ready: Option<&Event>) -> Result<()>;
    fn loss_scale(&mut self) -> Result<View>;
    fn compute(&self) -> &Stream;
}

impl DeviceReceiver for DeviceBackward<'_> {
    fn receive_view(
        &mut self,
        parameter: &Parameter,
        gradient: &View,
        ready: Option<&Event>,
        is_last: bool,
    ) -> Result<()> {
        if let Some(ready) = ready {
            self.backend.compute().wait(ready)?;
        }
        self.take(parameter, gradient.len_elems(), is_last, |_, backend, to, replaces| {
            take_device(backend, std::iter::once((gradient, to)), replaces)
        })
    }

    fn receive_views(&mut self, gradients: &[GradientSource], ready: Option<&Event>) -> Result<()> {
        if let Some(ready) = ready {
            self.backend.compute().wait(ready)?;
        }
        // Its memory is used again.
        let mut order = std::mem::take(&mut on_device(&mut self.gradients.memory)?.arrivals);
        let taken = self.take_all(gradients, &mut order);
        order.clear();
        on_device(&mut self.gradients.memory)?.arrivals = order;
        taken
    }

    fn loss_scale(&mut self) -> Result<View> {
        Ok(on_device(&mut self.gradients.memory)?.loss_scale.view())
    }

    fn compute(&self) -> &Stream {
        self.backend.compute()
    }
}

/// The seam for trainers whose gradients are on the strategy's device, in memory of its own
/// ([`Buffer::foreign`](crate::device::cuda::Buffer::foreign)) or theirs. Nothing here waits on the host, and nothing is
/// allocated when a gradient comes from where it came from before.
impl GradSink<'_> {
    /// As [`write`](GradSink::write), of f32, f16 or bf16 elements on the device. They are read in the order of the
    /// [compute stream](GradSink::device_stream), behind the point that `ready` has recorded.
    ///
    /// # Errors
    /// As [`write`](GradSink::write); [`Error::InvalidArgument`] if the strategy is not on that device.
    pub fn write_device(&mut self, parameter: &Parameter, gradient: &View, ready: Option<&Event>) -> Result<()> {
        self.device_receiver()?.receive_view(parameter, gradient, ready, true)
    }

    /// As [`write_device`](GradSink::write_device) of each, at the cost of one launch for each bucket that they are in (and each 64
    /// of its gradients) instead of one for each gradient: for backward passes that finish several gradients at a time, or all.
    /// They are taken bucket by bucket, whatever their order here, so the first buckets are reduced while the next are filled.
    ///
    /// # Errors
    /// As [`write_device`](GradSink::write_device). Those that a parameter, a length or a second gradient is to blame for come before
    /// anything is taken; with others, those of the buckets before have been.
    pub fn write_device_all(&mut self, gradients: &[GradientSource], ready: Option<&Event>) -> Result<()> {
        self.device_receiver()?.receive_views(gradients, ready)
    }

    /// As [`add`](GradSink::add), of elements on the device.
    ///
    /// # Errors
    /// As [`write_device`](GradSink::write_device).
    pub fn add_device(&mut self, parameter: &Parameter, gradient: &View, ready: Option<&Event>) -> Result<()> {
        self.device_receiver()?.receive_view(parameter, gradient, ready, false)
    }

    /// One f32 on the device: what [`loss_scale`](GradSink::loss_scale) tells the host.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if the strategy is not on a device.
    pub fn device_loss_scale(&mut self) -> Result<View> {
        self.device_receiver()?.loss_scale()
    }

    /// The stream in whose order gradients are read; on the host there is none.
    pub fn device_stream(&mut self) -> Option<Stream> {
        self.receiver.on_device().map(|receiver| receiver.compute().clone())
    }

    fn device_receiver(&mut self) -> Result<&mut dyn DeviceReceiver> {
        self.receiver.on_device().ok_or_else(|| Error::InvalidArgument {
            argument: "gradient",
            value: "on a device".to_owned(),
            accepted: "this strategy is on the host; set it up with Accelerator::Cuda",
        })
    }
}

pub(super) fn on_device(memory: &mut Buckets) -> Result<&mut DeviceGradients> {
    match memory {
        Buckets::Device(on) => Ok(on),
        Buckets::Host { .. } => Err(no_gradients()),
    }
}

fn no_gradients() -> Error {
    Error::InvalidArgument {
        argument: "module",
        value: "no gradients on the device".to_owned(),
        accepted: "a module that was set up with a strategy on a device",
    }
}
