//! Giving back what kernels use, for which the driver waits until whatever runs on the device has ended: with a deadline,
//! which the driver's own waits lack.

use std::mem::ManuallyDrop;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread::Builder;
use std::time::Duration;

use super::context::Device;

/// The longest that a drop waits.
const PATIENCE: Duration = Duration::from_secs(10);

impl Device {
    /// Runs `free` with the context current, on a thread of its own: beyond [`PATIENCE`] that is left behind, and frees when
    /// the device's work ends, if it ever does; until one has ended, later calls do not wait. Not run at all, as there is
    /// nothing left to free, if the context is gone.
    pub(super) fn free(&self, what: &'static str, free: impl FnOnce() + Send + 'static) {
        let (device, (ended, end)) = (self.clone(), channel::<()>());
        // Without a thread it is leaked, with all that it owns: the device may still use that.
        let free = ManuallyDrop::new(free);
        let work = move || {
            let free = ManuallyDrop::into_inner(free);
            if device.bind().is_ok() {
                free();
                device.frees_nothing().store(false, Ordering::Relaxed); // a hint: it publishes nothing
            }
            drop((device, ended)); // in this order: who goes on finds the device as it is without this memory
        };
        let ordinal = self.ordinal();
        if let Err(error) = Builder::new().name("annulus-free".into()).spawn(work) {
            return tracing::warn!(
                device = ordinal,
                what,
                %error,
                "memory is kept for ever: no thread could be started to free it"
            );
        }
        let patience = if self.frees_nothing().load(Ordering::Relaxed) { Duration::ZERO } else { PATIENCE };
        if end.recv_timeout(patience) == Err(RecvTimeoutError::Timeout) {
            self.frees_nothing().store(true, Ordering::Relaxed);
            let waited_ms = patience.as_millis() as u64;
            tracing::warn!(device = ordinal, what, waited_ms, "memory is kept until the device's work ends");
        }
    }
}
