//! The device's own time between two points of a stream.

use std::time::Duration;

use cudarc::driver::sys::{self, CUresult};

use super::bindings::{cuEventCreate, cuEventDestroy, cuEventElapsedTime, cuEventQuery, cuEventRecord};
use super::context::Device;
use super::stream::Stream;
use super::wait::until_ready;
use crate::error::Result;

/// A pair of events that carry the device's clock: for measurements, as recording one costs more than an
/// [`Event`](super::Event). It can be used again; what is read is what was recorded last.
pub struct Timer {
    device: Device,
    start: sys::CUevent,
    stop: sys::CUevent,
}

// SAFETY: the driver's functions on events may be called from any thread; the handles are only passed to them.
unsafe impl Send for Timer {}
// SAFETY: as for Send.
unsafe impl Sync for Timer {}

impl Timer {
    /// A timer on `device` that has measured nothing.
    ///
    /// # Errors
    /// What the driver says.
    pub fn new(device: &Device) -> Result<Timer> {
        device.bind()?;
        let event = || {
            let mut event = std::ptr::null_mut();
            // SAFETY: writes one handle.
            device.check(unsafe { cuEventCreate(&mut event, sys::CUevent_flags::CU_EVENT_DEFAULT as u32) })?;
            Ok(event)
        };
        let start = event()?;
        match event() {
            Ok(stop) => Ok(Timer { device: device.clone(), start, stop }),
            Err(error) => {
                // SAFETY: made above, and known to nobody.
                let _ = unsafe { cuEventDestroy(start) };
                Err(error)
            }
        }
    }

    /// Time counts from when everything enqueued before has run.
    ///
    /// # Errors
    /// [`Error::Capture`](crate::Error::Capture) if the stream captures; what the driver says, as of a stream of another
    /// device.
    pub fn start(&self, stream: &Stream) -> Result<()> {
        self.record(self.start, stream)
    }

    /// Time counts until everything enqueued before has run.
    ///
    /// # Errors
    /// As [`Timer::start`].
    pub fn stop(&self, stream: &Stream) -> Result<()> {
        self.record(self.stop, stream)
    }

    fn record(&self, event: sys::CUevent, stream: &Stream) -> Result<()> {
        let access = stream.access()?;
        access.check_eager("cuEventRecord of a timer")?;
        // SAFETY: both live.
        self.device.check(unsafe { cuEventRecord(event, access.raw()) })
    }

    /// Waits for the second point, and says how long after the first it was reached; to about 0.5 us.
    ///
    /// # Errors
    /// [`Error::TimedOut`](crate::Error::TimedOut) after `timeout`; [`Error::Cuda`](crate::Error::Cuda) if either point was never
    /// recorded; what the device failed with.
    pub fn elapsed(&self, timeout: Duration) -> Result<Duration> {
        self.device.bind()?;
        // SAFETY: the event lives as long as `self`, and its context is current.
        let ask = || unsafe { cuEventQuery(self.stop) };
        until_ready(&self.device, "of a timer", timeout, ask)?;
        self.between(self.start, self.stop)
    }

    /// As [`elapsed`](Timer::elapsed), if the second point was reached by now.
    ///
    /// # Errors
    /// As [`elapsed`](Timer::elapsed), but for the deadline.
    pub fn poll(&self) -> Result<Option<Duration>> {
        self.device.bind()?;
        // SAFETY: as in `elapsed`.
        let asked = unsafe { cuEventQuery(self.stop) };
        if asked.is(CUresult::CUDA_ERROR_NOT_READY) {
            return Ok(None);
        }
        self.device.check(asked)?;
        self.between(self.start, self.stop).map(Some)
    }

    /// As [`poll`](Timer::poll) by one call of the driver instead of two, for who asks often. What the device failed with is told
    /// of that call.
    ///
    /// # Errors
    /// As [`poll`](Timer::poll).
    pub(crate) fn took(&self) -> Result<Option<Duration>> {
        self.device.bind()?;
        let mut ms = 0.0;
        // Not ready unless both are (CUDA Driver API, 6.19).
        // SAFETY: both events live, and `ms` is written.
        let asked = unsafe { cuEventElapsedTime(&mut ms, self.start, self.stop) };
        if asked.is(CUresult::CUDA_ERROR_NOT_READY) {
            return Ok(None);
        }
        self.device.check(asked).map(|()| Some(duration(ms)))
    }

    /// How long after the start of `base`, an earlier one, this one started. The longer that is, the coarser: to a
    /// sixteen-millionth.
    ///
    /// # Errors
    /// [`Error::Cuda`](crate::Error::Cuda) if either was not reached yet; what the device failed with.
    pub fn start_since(&self, base: &Timer) -> Result<Duration> {
        self.device.bind()?;
        self.between(base.start, self.start)
    }

    /// From one event to a later one. The context is current.
    fn between(&self, start: sys::CUevent, stop: sys::CUevent) -> Result<Duration> {
        let mut ms = 0.0;
        // SAFETY: both events live, and `ms` is written.
        self.device.check(unsafe { cuEventElapsedTime(&mut ms, start, stop) })?;
        Ok(duration(ms))
    }
}

fn duration(ms: f32) -> Duration {
    Duration::try_from_secs_f64(f64::from(ms.max(0.0)) / 1e3).unwrap_or(Duration::MAX) // whatever the driver says
}

impl Drop for Timer {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            for event in [self.start, self.stop] {
                // SAFETY: made by `new`, destroyed once; the driver keeps what is still to be recorded.
                let _ = unsafe { cuEventDestroy(event) };
            }
        }
    }
}

impl std::fmt::Debug for Timer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Timer").field("device", &self.device.ordinal()).finish_non_exhaustive()
    }
}
