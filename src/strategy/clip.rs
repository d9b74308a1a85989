//! Clipping, and what is done about gradients that are not finite.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::cuda::DeviceNorm;
use super::gate::lock;
use crate::device::Event;
use crate::error::{Error, Result};

/// What happens when a gradient is NaN or infinite. Reduced gradients are the same on every rank, and so is the decision.
///
/// With a loss scaler (`F16Mixed`) the step is skipped and the scale shrinks under every policy; `ErrorDeferred` and
/// `ErrorNow` report it only when the scale was 1 or less, because before that it is how the scaler finds its range.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Nonfinite {
    /// The coefficient becomes NaN (or 0 for an infinite norm) and the step is made with it: what PyTorch does by default.
    Propagate,
    /// The step is skipped: no weight and no moment changes.
    #[default]
    SkipStep,
    /// The step is skipped, and the next call of `backward`, `clip_gradients_norm`, `save_checkpoint` or `teardown` returns
    /// [`Error::Nonfinite`] naming the first bad tensor. Nothing waits on the host for it before that call.
    ErrorDeferred,
    /// The call waits for the norm and returns [`Error::Nonfinite`]; the gradients are thrown away.
    ErrorNow,
}

/// Where a norm appears when the compute stream gets to it.
#[derive(Debug, Default)]
pub(crate) struct NormSlot {
    pub measured: Event,
    pub result: Mutex<Option<Result<f64>>>,
    /// What the policy says is to be reported.
    pub nonfinite: Mutex<Option<Error>>,
    /// Of a norm that a device measures, where to look for it.
    pub device: Mutex<Option<DeviceNorm>>,
}

impl NormSlot {
    fn device(&self) -> Option<DeviceNorm> {
        lock(&self.device).clone()
    }

    /// Waits on the host for this number alone.
    pub fn wait(&self, timeout: Duration) -> Result<()> {
        match self.device() {
            Some(norm) => norm.wait(timeout),
            None => self.measured.synchronize(timeout),
        }
    }

    /// What is to be reported of a norm that was waited for.
    pub fn take_nonfinite(&self) -> Option<Error> {
        match self.device() {
            Some(norm) => norm.nonfinite(),
            None => lock(&self.nonfinite).take(),
        }
    }
}

/// The total norm of the gradients before clipping, once it is known.
///
/// Nothing waits for it unless asked; training goes on with the coefficient that the compute stream keeps.
#[derive(Debug, Clone)]
pub struct NormHandle {
    slot: Arc<NormSlot>,
}

impl NormHandle {
    pub(crate) fn new(slot: Arc<NormSlot>) -> NormHandle {
        NormHandle { slot }
    }

    /// The norm: of the averaged, unscaled gradients, the same bits on every rank. NaN or infinite if a gradient is.
    ///
    /// # Synchronization
    /// Waits on the host for this number, and for nothing that was enqueued after it.
    ///
    /// # Errors
    /// [`Error::TimedOut`] after `timeout`; the error of the reduction.
    pub fn get(&self, timeout: Duration) -> Result<f64> {
        self.slot.wait(timeout)?;
        self.poll()?.ok_or_else(not_measured)
    }

    /// The norm if it is known already.
    ///
    /// # Errors
    /// The error of the reduction.
    pub fn poll(&self) -> Result<Option<f64>> {
        if let Some(norm) = self.slot.device() {
            return norm.poll();
        }
        if !self.slot.measured.is_complete() {
            return Ok(None);
        }
        lock(&self.slot.result).clone().unwrap_or_else(|| Err(not_measured())).map(Some)
    }
}

fn not_measured() -> Error {
    Error::Stream { stream: "compute".to_owned(), reason: "the norm was not measured".to_owned() }
}
