//! Giving back what kernels use, for which the driver waits until whatever runs on the device has ended: with a deadline,
//! which the driver's own waits lack.

use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread::Builder;
use std::time::Duration;

use super::context::Device;

/// The longest that a drop waits.
const PATIENCE: Duration = Duration::from_secs(10);

impl Device {
    /// Runs `free` with the context current, on a thread of its own: beyond [`PATIENCE`] that is left behind, and frees when
    /// the device's work ends, if it ever does. Not run at all, as there is nothing left to free, if the context is gone.
    pub(super) fn free(&self, what: &'static str, free: impl FnOnce() + Send + 'static) {
        let (device, (ended, end)) = (self.clone(), channel::<()>());
        let work = move || {
            if device.bind().is_ok() {
                free();
            }
            drop((device, ended)); // in this order: who goes on finds the device as it is without this memory
        };
        let ordinal = self.ordinal();
        if let Err(error) = Builder::new().name("annulus-free".into()).spawn(work) {
            tracing::warn!(device = ordinal, what, %error, "memory is kept for ever: no thread could be started to free it");
        } else if end.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Timeout) {
            let waited_ms = PATIENCE.as_millis() as u64;
            tracing::warn!(device = ordinal, what, waited_ms, "memory is kept until the device's work ends");
        }
    }
}
