//! Signals of the launcher, made into something a poll loop can wait for.

use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::process::Signal;
use signal_hook::SigId;

use crate::error::{Error, Result};

/// What is passed on to the ranks. SIGTSTP stops the ranks and then the launcher.
const FORWARDED: [Signal; 7] =
    [Signal::INT, Signal::TERM, Signal::HUP, Signal::QUIT, Signal::USR1, Signal::USR2, Signal::TSTP];

/// Set by the handlers; one for each of [`FORWARDED`].
static ARRIVED: [AtomicBool; FORWARDED.len()] = [const { AtomicBool::new(false) }; FORWARDED.len()];

/// Handlers for the life of this value. Afterwards the signals do nothing.
#[derive(Debug)]
pub(super) struct Signals {
    wake: UnixStream,
    handlers: Vec<SigId>,
}

impl Signals {
    /// Takes over the forwarded signals, but for those this process was started to ignore (nohup).
    ///
    /// # Errors
    /// [`Error::Io`] if a handler cannot be installed.
    pub(super) fn catch() -> Result<Signals> {
        let failed = |error| Error::io("catching signals", error);
        let (wake, write) = UnixStream::pair().map_err(failed)?;
        wake.set_nonblocking(true).map_err(failed)?;
        let ignored = ignored_mask();
        let mut signals = Signals { wake, handlers: Vec::new() };
        for (signal, arrived) in FORWARDED.iter().zip(&ARRIVED) {
            let number = signal.as_raw();
            if ignored >> (number - 1) & 1 == 1 {
                continue;
            }
            // The flag before the wake-up: handlers run in the order they were registered.
            signals.handlers.push(signal_hook::flag::register(number, arrived).map_err(failed)?);
            let write = write.try_clone().map_err(failed)?;
            signals.handlers.push(signal_hook::low_level::pipe::register(number, write).map_err(failed)?);
        }
        Ok(signals)
    }

    /// Readable when a signal has arrived.
    pub(super) fn as_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    /// The signals that arrived since the last call.
    pub(super) fn take(&mut self) -> Vec<Signal> {
        let mut bytes = [0; 64];
        while matches!(self.wake.read(&mut bytes), Ok(1..)) {}
        let arrived = FORWARDED.iter().zip(&ARRIVED).filter(|(_, arrived)| arrived.swap(false, Ordering::SeqCst));
        arrived.map(|(signal, _)| *signal).collect()
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        for handler in self.handlers.drain(..) {
            signal_hook::low_level::unregister(handler);
        }
    }
}

/// Bit n-1 for every signal n this process ignores.
fn ignored_mask() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0)
}
