//! From the chunks' sums to a norm, whatever kernel measures them: the memory between launches, and the order of calls.

use std::ops::Range;
use std::sync::Arc;

use bytemuck::Zeroable;

use super::cell::Cell;
use super::record::{LEN_RECORDS, Ring, Ticket};
use super::table::{Table, check_device};
use crate::abi::{CombineArguments, NormSlot, NormState, StepSignal, norm_kind};
use crate::device::cuda::{Buffer, Device, Stream, View};
use crate::dtype::{DType, NormType};
use crate::error::{Error, Result};
use crate::ops::clip;

/// What skips the optimizer's step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Skip {
    /// Nothing: a NaN or an infinity reaches the weights, as PyTorch lets it.
    Never,
    /// A NaN or an infinity in the gradients.
    Nonfinite,
    /// That, or one that was found when the same gradients were measured before: clipping by value may have hidden it.
    NonfiniteOrBefore,
}

/// What is measured, and what follows from it.
#[derive(Debug, Clone, Copy)]
pub struct Measure<'a> {
    /// Which norm.
    pub norm_type: NormType,
    /// Bound of the norm of the unscaled gradients; infinite for none.
    pub max_norm: f64,
    /// `[1]` f32: the loss scale that is in the gradients.
    pub grad_scale: Option<&'a View>,
    /// What skips the step.
    pub skip: Skip,
}

impl Measure<'_> {
    pub(super) fn check(&self, device: &Device) -> Result<()> {
        self.norm_type.check()?;
        clip::check_max_norm(self.max_norm)?;
        self.grad_scale.map_or(Ok(()), |scale| check_scale(device, scale))
    }
}

/// Fails unless `scale` is `[1]` f32 on `device`.
pub(super) fn check_scale(device: &Device, scale: &View) -> Result<()> {
    check_device("loss scale", device, scale)?;
    if scale.dtype() != DType::F32 {
        let (expected, actual) = (DType::F32, scale.dtype());
        return Err(Error::DTypeMismatch { what: "loss scale".into(), expected, actual });
    }
    if scale.len_elems() != 1 {
        let actual_elems = scale.len_elems();
        return Err(Error::LengthMismatch { what: "loss scale".into(), expected_elems: 1, actual_elems });
    }
    Ok(())
}

/// What a measurement leaves on the device for the kernels that clip, update and scale: clip coefficient, loss scale,
/// whether to skip.
#[derive(Clone)]
pub struct Signal(View);

impl Signal {
    /// Where it is, for a kernel of `device`.
    pub(super) fn address_on(&self, device: &Device) -> Result<u64> {
        check_device("signal", device, &self.0)?;
        Ok(self.0.address())
    }
}

/// Slots, state, signal and records of one norm.
pub(super) struct Combine {
    slots: Buffer,
    state: Cell<NormState>,
    signal: Cell<StepSignal>,
    shared_signal: Signal,
    ring: Arc<Ring>,
    len_slots: u64,
    /// The number of the norm that was finished last, as the device counts them.
    generation: u32,
    /// The norm that is being measured, and of which tensors it has been.
    norm_type: Option<NormType>,
    is_measured: Vec<bool>,
}

impl Combine {
    pub fn new(table: &Table) -> Result<Combine> {
        let kernels = table.kernels();
        let len_slots = table.range().len_chunks;
        let slots = vec![NormSlot::zeroed(); len_slots as usize]; // as many as the table has chunks in memory
        let signal = StepSignal { clip_coef: 1.0, grad_scale: 1.0, first_nonfinite: u64::MAX, ..Zeroable::zeroed() };
        let signal = Cell::new(kernels, &signal)?;
        Ok(Combine {
            slots: Buffer::filled::<u8>(kernels.device(), bytemuck::cast_slice(&slots))?,
            state: Cell::new(kernels, &NormState::zeroed())?,
            shared_signal: Signal(signal.view()),
            signal,
            ring: Arc::new(Ring::new(kernels, Arc::clone(table.first_chunks()))?),
            len_slots,
            generation: 0,
            norm_type: None,
            is_measured: vec![false; table.len_tensors()],
        })
    }

    pub fn signal(&self) -> &Signal {
        &self.shared_signal
    }

    /// Has a graph that is being captured on `stream` keep what a measurement uses besides the tensors.
    pub fn keep(&self, stream: &Stream, how: &Measure<'_>) {
        stream.keep(&(self.slots.view(), self.state.view(), self.signal.view(), how.grad_scale.cloned()));
        stream.keep(&self.ring);
    }

    /// The arguments of a launch that measures, and combines if it `finishes`.
    pub fn arguments(&self, how: &Measure<'_>, finishes: bool) -> CombineArguments {
        let (kind, p) = norm_kind(how.norm_type);
        CombineArguments {
            slots: self.slots.address(),
            state: self.state.address(),
            signal: self.signal.address(),
            records: self.ring.address(),
            grad_scale: how.grad_scale.map_or(0, View::address),
            max_norm: how.max_norm,
            p,
            len_slots: self.len_slots,
            len_records: LEN_RECORDS,
            kind,
            finishes: finishes.into(),
            skips: match how.skip {
                Skip::Never => 0,
                Skip::Nonfinite => 1,
                Skip::NonfiniteOrBefore => 2,
            },
        }
    }

    /// Fails unless some `tensors` can be measured next, and combined with the rest if the launch `finishes`.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for another norm than the one begun, or a first tensor that is left out.
    pub fn check_next(&self, norm_type: NormType, tensors: &Range<usize>, finishes: bool) -> Result<()> {
        if let Some(begun) = self.norm_type.filter(|begun| *begun != norm_type) {
            return Err(Error::InvalidArgument {
                argument: "norm_type",
                value: format!("{norm_type:?}"),
                accepted: match begun {
                    NormType::L1 => "must be L1, as that of the tensors measured before",
                    NormType::L2 => "must be L2, as that of the tensors measured before",
                    NormType::Inf => "must be Inf, as that of the tensors measured before",
                    NormType::P(_) => "must be that P, as that of the tensors measured before",
                },
            });
        }
        let is_left_out = |tensor: usize| !self.is_measured[tensor] && !tensors.contains(&tensor);
        match (0..self.is_measured.len()).find(|tensor| finishes && is_left_out(*tensor)) {
            None => Ok(()),
            Some(tensor) => Err(Error::InvalidArgument {
                argument: "gradient norm",
                value: format!("tensor {tensor} not measured"),
                accepted: "every tensor must be measured before the norm is finished",
            }),
        }
    }

    /// Notes that a launch that does not finish was enqueued.
    pub fn note_part(&mut self, norm_type: NormType, tensors: Range<usize>) {
        self.norm_type = Some(norm_type);
        self.is_measured[tensors].fill(true);
    }

    /// Notes that a launch that finishes was enqueued, or replayed.
    pub fn note_finish(&mut self) -> Ticket {
        self.norm_type = None;
        self.is_measured.fill(false);
        self.generation = self.generation.wrapping_add(1);
        Ticket::new(&self.ring, self.generation)
    }

    /// Takes back the number of a norm that was captured and not run.
    pub fn take_back(&mut self, ticket: Ticket) {
        if ticket.generation() == self.generation {
            self.generation = self.generation.wrapping_sub(1);
        }
    }
}
