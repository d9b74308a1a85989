//! The device's own time between two points of a stream.

use std::time::Duration;

use cudarc::driver::{result, sys};

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
        let event = || device.check("cuEventCreate", result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT));
        let start = event()?;
        match event() {
            Ok(stop) => Ok(Timer { device: device.clone(), start, stop }),
            Err(error) => {
                // SAFETY: made above, and known to nobody.
                let _ = unsafe { result::event::destroy(start) };
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
        access.check_eager("cuEventRecord")?;
        // SAFETY: both live.
        self.device.check("cuEventRecord", unsafe { result::event::record(event, access.raw()) })
    }

    /// Waits for the second point, and says how long after the first it was reached; to about 0.5 us.
    ///
    /// # Errors
    /// [`Error::Stream`](crate::Error::Stream) after `timeout`; [`Error::Cuda`](crate::Error::Cuda) if either point was never
    /// recorded; what the device failed with.
    pub fn elapsed(&self, timeout: Duration) -> Result<Duration> {
        self.device.bind()?;
        // SAFETY: the event lives as long as `self`, and its context is current.
        let ask = || unsafe { result::event::query(self.stop) };
        until_ready(&self.device, "of a timer", "cuEventQuery", timeout, ask)?;
        let ms = self.device.check("cuEventElapsedTime", self.ask_ms())?;
        Ok(Duration::from_secs_f64(f64::from(ms.max(0.0)) / 1e3))
    }
}

impl Timer {
    /// By its first name: cudarc, built for CUDA 13, calls the second, which drivers before CUDA 12.8 lack.
    fn ask_ms(&self) -> std::result::Result<f32, result::DriverError> {
        type Elapsed = unsafe extern "C" fn(*mut f32, sys::CUevent, sys::CUevent) -> sys::CUresult;
        let mut ms = 0.0;
        // SAFETY: the library is present: a device exists. The name is documented with this type.
        let elapsed = unsafe { sys::culib().get::<Elapsed>(b"cuEventElapsedTime\0") };
        let elapsed = elapsed.map_err(|_| result::DriverError(sys::CUresult::CUDA_ERROR_NOT_FOUND))?;
        // SAFETY: both events live; writes one f32.
        unsafe { elapsed(&mut ms, self.start, self.stop) }.result()?;
        Ok(ms)
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            for event in [self.start, self.stop] {
                // SAFETY: made by `new`, destroyed once; the driver keeps what is still to be recorded.
                let _ = unsafe { result::event::destroy(event) };
            }
        }
    }
}

impl std::fmt::Debug for Timer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Timer").field("device", &self.device.ordinal()).finish_non_exhaustive()
    }
}
