//! Waiting on the host with a deadline: the driver's own waits have none.

use std::time::{Duration, Instant};

use cudarc::driver::sys::CUresult;

use super::bindings::Answer;
use super::context::Device;
use crate::error::{Error, Result};

/// How long it looks without a pause: a small kernel is done by then.
const EAGER: Duration = Duration::from_micros(200);
const FIRST_PAUSE: Duration = Duration::from_micros(20);
const LONGEST_PAUSE: Duration = Duration::from_millis(1);

/// Asks until the answer is no longer "not ready".
///
/// # Errors
/// [`Error::TimedOut`] after `timeout`; what the driver answers.
pub(super) fn until_ready(device: &Device, stream: &str, timeout: Duration, ask: impl Fn() -> Answer) -> Result<()> {
    let start = Instant::now();
    let mut pause = FIRST_PAUSE;
    loop {
        let answer = ask();
        if !answer.is(CUresult::CUDA_ERROR_NOT_READY) {
            return device.check(answer);
        }
        let waited = start.elapsed();
        if waited >= timeout {
            return Err(Error::timed_out(format_args!("the work of stream {stream}"), timeout));
        }
        if waited < EAGER {
            std::thread::yield_now();
        } else {
            std::thread::sleep(pause.min(timeout.saturating_sub(waited)));
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }
}
