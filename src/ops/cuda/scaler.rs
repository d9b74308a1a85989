//! The dynamic loss scale, on the device.

use std::time::Duration;

use super::cell::Cell;
use super::combine::Signal;
use crate::abi::{LossScaler, ScalerArguments};
use crate::device::cuda::{Kernels, Shape, Stream, View};
use crate::error::Result;
use crate::ops::GradScaler;

/// A [`GradScaler`] that kernels read and move.
pub struct LossScale {
    scaler: Cell<LossScaler>,
    scale: View,
}

impl LossScale {
    /// Places `scaler` on the device. The host waits until it is there.
    ///
    /// # Errors
    /// As [`GradScaler::check`]; as [`Buffer::zeroed`](crate::device::cuda::Buffer::zeroed).
    pub fn new(kernels: &Kernels, scaler: &GradScaler) -> Result<LossScale> {
        scaler.check()?;
        let scaler = Cell::new(kernels, &scaler.to_device())?;
        let scale = scaler.view().slice(0, 1)?;
        Ok(LossScale { scaler, scale })
    }

    /// `[1]` f32: what the loss is multiplied with, and what [`Measure::grad_scale`](super::Measure::grad_scale) takes out
    /// of the norm.
    pub fn scale(&self) -> &View {
        &self.scale
    }

    /// Notes the outcome of a step, in the order of `stream`: after the optimizer, and before the next loss is scaled.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`](crate::Error::InvalidArgument) for a stream or signal of another device; what the driver
    /// says.
    pub fn update(&self, stream: &Stream, signal: &Signal) -> Result<()> {
        stream.keep(&(self.scaler.view(), signal.clone()));
        let signal = signal.address_on(self.scaler.kernels().device())?;
        let arguments = ScalerArguments { scaler: self.scaler.address(), signal };
        let shape = Shape { blocks: 1, threads: 32, shared_bytes: 0, cooperative: false };
        // SAFETY: the kernel's own argument; both structs are of this device, and freeing them waits for the kernel.
        unsafe { self.scaler.kernels().launch("update_scaler", shape, stream, &arguments) }
    }

    /// Waits for everything enqueued on `stream` and reads the state.
    ///
    /// # Errors
    /// [`Error::TimedOut`](crate::Error::TimedOut) after `timeout`; what the device failed with.
    pub fn read(&self, stream: &Stream, timeout: Duration) -> Result<GradScaler> {
        Ok(GradScaler::from_device(self.scaler.read(stream, timeout)?))
    }

    /// Replaces the state in the order of `stream`: for one that was read from a checkpoint.
    ///
    /// # Errors
    /// As [`GradScaler::check`]; what the driver says.
    pub fn set(&self, stream: &Stream, scaler: &GradScaler) -> Result<()> {
        scaler.check()?;
        self.scaler.store(stream, &scaler.to_device())
    }
}
