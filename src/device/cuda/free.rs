//! Giving back what kernels use, which waits until whatever runs on the device has ended: with a deadline, which the driver's
//! own waits lack.
//!
//! What comes and goes with the work, private buffers and pinned memory, is freed by calls that wait for the device by
//! themselves: every driver's do, as programs rely on, though the manual says no more than that `cuMemFree` "may perform
//! implicit synchronization". To ask for that wait, by [`Device::drain`], would rest on the manual alone, and end a capture on
//! any thread. All else is unmapped behind one.

use std::collections::BTreeSet;
use std::mem::ManuallyDrop;
use std::sync::mpsc::channel;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::Builder;
use std::time::Duration;

use cudarc::driver::sys::CUstreamCaptureMode;

use super::bindings::{cuCtxSynchronize, cuThreadExchangeStreamCaptureMode};
use super::context::{Device, Uuid};
use crate::error::{Error, Result};

/// The longest that a drop waits.
const PATIENCE: Duration = Duration::from_secs(10);

/// Devices on which a freeing was given up waiting for, and none has ended since.
static STUCK: Mutex<BTreeSet<Uuid>> = Mutex::new(BTreeSet::new());

fn stuck() -> MutexGuard<'static, BTreeSet<Uuid>> {
    STUCK.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Device {
    /// Runs `free` with the context current, on a thread of its own: beyond [`PATIENCE`] that is left behind, and frees when
    /// the device's work ends, if it ever does; until one has ended, later calls do not wait. Not run at all, as there is
    /// nothing left to free, if the context is gone. Whether it was freed by now; `owned` is dropped with it, and kept for
    /// ever where `free` fails.
    pub(super) fn free<T: Send + 'static>(
        &self,
        what: &'static str,
        owned: T,
        free: impl FnOnce(&Device) -> Result<()> + Send + 'static,
    ) -> bool {
        let (device, (ended, end)) = (self.clone(), channel());
        // Without a thread it is leaked, with all that it owns: the device may still use that.
        let work = ManuallyDrop::new((owned, free));
        let work = move || {
            let (owned, free) = ManuallyDrop::into_inner(work);
            let freed = free_now(&device, free);
            match &freed {
                Ok(()) => drop(owned),
                Err(error) => {
                    std::mem::forget(owned);
                    tell(&device, what, error);
                }
            }
            let uuid = device.uuid();
            drop(device); // who goes on finds it as it is without this memory
            let mut stuck = stuck(); // until it is said: who gives up at this moment must hear it
            stuck.remove(&uuid);
            let _ = ended.send(freed.is_ok()); // nobody waits any more: it took too long
        };
        let (ordinal, uuid) = (self.ordinal(), self.uuid());
        if let Err(error) = Builder::new().name("annulus-free".into()).spawn(work) {
            tracing::warn!(
                device = ordinal,
                what,
                %error,
                "memory is kept for ever: no thread could be started to free it"
            );
            return false;
        }
        let patience = if stuck().contains(&uuid) { Duration::ZERO } else { PATIENCE };
        if let Ok(was_freed) = end.recv_timeout(patience) {
            return was_freed;
        }
        let mut stuck = stuck();
        if let Ok(was_freed) = end.try_recv() {
            return was_freed;
        }
        stuck.insert(uuid);
        let waited_ms = patience.as_millis() as u64;
        tracing::warn!(device = ordinal, what, waited_ms, "memory is kept until the device's work ends");
        false
    }

    /// Waits until whatever was enqueued on the device has run, for what the driver would let go of at once. One that has
    /// failed runs nothing. The context is current.
    ///
    /// # Errors
    /// [`Error::Capture`] if a graph is being captured on it: it cannot be asked then.
    pub(super) fn drain(&self) -> Result<()> {
        // SAFETY: needs a context that is current.
        match self.check(unsafe { cuCtxSynchronize() }) {
            Err(error @ Error::Capture { .. }) => Err(error),
            _ => Ok(()),
        }
    }
}

fn free_now(device: &Device, free: impl FnOnce(&Device) -> Result<()>) -> Result<()> {
    // This thread captures nothing.
    harmless(|| if device.bind().is_ok() { free(device) } else { Ok(()) })
}

/// Runs `work`, calls that the driver names potentially unsafe, so that no capture prohibits them and is ended by that: one of
/// this thread would be, and one in global mode of any. Only for what nothing captured can miss. To wait for the whole device
/// ends its captures all the same.
pub(super) fn harmless<T>(work: impl FnOnce() -> T) -> T {
    let mut mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED as u32;
    // SAFETY: reads a mode, and writes the one before.
    let exchange = |mode: &mut u32| unsafe { cuThreadExchangeStreamCaptureMode(mode) };
    let _ = exchange(&mut mode);
    let done = work();
    let _ = exchange(&mut mode);
    done
}

/// Says why memory is kept. After a fault it is all the same, and said by whoever found it.
fn tell(device: &Device, what: &'static str, error: &Error) {
    let device = device.ordinal();
    match error {
        Error::DeviceLost { .. } | Error::KernelFault { .. } => {
            tracing::debug!(device, what, %error, "memory is kept for ever");
        }
        _ => tracing::warn!(device, what, %error, "memory is kept for ever"),
    }
}
