//! A communicator's end: its kernels first, and then its memory.

use std::time::{Duration, Instant};

use super::Communicator;
use crate::device::cuda::{Stream, captures_here};
use crate::error::{Error, Result};
use crate::world::Outpost;

/// What the host waits beyond the kernels' own deadline.
const GRACE: Duration = Duration::from_secs(5);
/// Between two looks at a stream.
const PAUSE: Duration = Duration::from_millis(1);

/// Whether `stream` has come to its end, if that can be asked. That of a device that has failed has: it runs nothing.
fn has_run(stream: &Stream) -> Result<bool> {
    match stream.has_run() {
        Err(error @ Error::Capture { .. }) => Err(error),
        other => Ok(other.unwrap_or(true)),
    }
}

impl Communicator {
    /// Ends all waits of the operations on `last`, again and again: where they run by steps, peers may still count. Whether
    /// the stream came to its end.
    pub(super) fn abort(&self, last: &Stream) -> bool {
        let start = Instant::now();
        while start.elapsed() < GRACE {
            self.records.abort();
            if has_run(last).unwrap_or(false) {
                return true;
            }
            std::thread::sleep(PAUSE);
        }
        false
    }

    /// Whether all operations have ended, no later than they may.
    fn settle(&self) -> bool {
        let Some(last) = &self.last else { return true };
        let (start, patience) = (Instant::now(), self.timeout.saturating_add(GRACE));
        while self.world.fault().is_none() {
            let ran = has_run(last);
            if let Ok(true) = ran {
                return true;
            }
            if start.elapsed() >= patience {
                // Told to all: whoever leaves after this need not find it out by waiting.
                if ran.is_ok() {
                    self.world.raise(Error::timed_out(format_args!("the work of stream {}", last.name()), patience));
                }
                break;
            }
            std::thread::sleep(PAUSE);
        }
        self.abort(last)
    }

    /// Whether no thread captures on the device any more, after a while.
    fn outlasts_captures(&self) -> bool {
        let start = Instant::now();
        while self.device.is_captured() && start.elapsed() < GRACE {
            std::thread::sleep(PAUSE);
        }
        !self.device.is_captured()
    }

    /// Keeps for ever what kernels may still use. To free it would be to wait for them.
    fn abandon(&mut self) {
        std::mem::forget((self.held.take(), self.watch.take(), self.kernels.clone()));
    }
}

impl Drop for Communicator {
    /// Waits, no longer than an operation may take, for the kernels in flight; then unmaps what belongs to others, and frees
    /// the own staging when nobody has it mapped any more. Not in a capture, of whichever stream: to wait would end it. One of
    /// another thread on the device is waited for, for 5 s; what is left then is kept for ever.
    fn drop(&mut self) {
        if captures_here() || !self.settle() || !self.outlasts_captures() {
            tracing::warn!(rank = self.rank(), "a communicator's memory is kept for ever");
            return self.abandon();
        }
        drop(self.watch.take()); // before the area, at which it looks
    }
}
