//! Events on a device.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use cudarc::driver::sys::{self, CUresult};

use super::bindings::{Answer, cuEventCreate, cuEventDestroy, cuEventQuery};
use super::context::Device;
use super::graph::Capture;
use super::wait::until_ready;
use crate::error::{Error, Result};

/// A point in a stream's order: recording marks it, waiting waits for the point recorded last at the time of the call. An
/// event never recorded is complete. Clones are the same event. It measures no time, which would cost some.
#[derive(Clone)]
pub struct Event(Arc<Core>);

struct Core {
    device: Device,
    event: sys::CUevent,
    /// The capture that it was recorded in last. Locked while it is recorded, or a stream is told to wait for it.
    capture: Mutex<Option<Capture>>,
}

// SAFETY: the driver's functions on events may be called from any thread; the handle is only passed to them.
unsafe impl Send for Core {}
// SAFETY: as for Send.
unsafe impl Sync for Core {}

impl Event {
    /// An event that is complete until it is recorded, on a stream of `device`; any device's stream may wait for it.
    ///
    /// # Errors
    /// What the driver says.
    pub fn new(device: &Device) -> Result<Event> {
        device.bind()?;
        let mut event = std::ptr::null_mut();
        // SAFETY: writes one handle.
        device.check(unsafe { cuEventCreate(&mut event, sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32) })?;
        Ok(Event(Arc::new(Core { device: device.clone(), event, capture: Mutex::new(None) })))
    }

    /// Whether the point recorded last was reached, or will never be. In a capture, which does nothing, there is no point to
    /// reach, and asking in vain makes the capture fail.
    pub fn is_complete(&self) -> bool {
        self.0.device.bind().is_err() || !self.ask().is(CUresult::CUDA_ERROR_NOT_READY)
    }

    /// Whether the driver says that the point recorded last was reached: what was enqueued before is over, which an answer
    /// like that to a question in a capture does not tell.
    pub(super) fn was_reached(&self) -> bool {
        self.0.device.bind().is_ok() && self.ask().is(CUresult::CUDA_SUCCESS)
    }

    /// Blocks the calling thread until the point recorded last is reached.
    ///
    /// # Errors
    /// [`Error::TimedOut`](crate::Error::TimedOut) after `timeout`; [`Error::Capture`](crate::Error::Capture) if it was recorded
    /// in one; what the device failed with.
    pub fn synchronize(&self, timeout: Duration) -> Result<()> {
        // Whoever records it or waits for it at this moment may be kept by the driver; this wait has a deadline.
        if let Ok(slot) = self.0.capture.try_lock() {
            check_recording(&self.0.device, slot.as_ref(), "cuEventQuery")?;
        }
        self.0.device.bind()?;
        until_ready(&self.0.device, "of an event", timeout, || self.ask())
    }

    fn ask(&self) -> Answer {
        // SAFETY: the event lives as long as `self`, and its context is current.
        unsafe { cuEventQuery(self.0.event) }
    }

    pub(super) fn device(&self) -> &Device {
        &self.0.device
    }

    pub(super) fn slot(&self) -> MutexGuard<'_, Option<Capture>> {
        self.0.capture.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn raw(&self) -> sys::CUevent {
        self.0.event
    }
}

/// Refuses `operation` of an event recorded last in `capture`, if that is over: the driver's own answer, which is
/// CUDA_ERROR_INVALID_VALUE, does not say why, and ends a capture that asks.
pub(super) fn check_recording(device: &Device, capture: Option<&Capture>, operation: &'static str) -> Result<()> {
    if capture.is_some_and(|capture| !capture.is_open()) {
        let reason = "the event was recorded last in a capture that is over".to_owned();
        return Err(Error::Capture { device: device.ordinal(), operation, reason });
    }
    Ok(())
}

impl Drop for Core {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: the last owner; the driver keeps an event alive for streams that still wait for it.
            let _ = unsafe { cuEventDestroy(self.event) };
        }
    }
}

impl std::fmt::Debug for Event {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Event").field("device", &self.0.device.ordinal()).finish_non_exhaustive()
    }
}
