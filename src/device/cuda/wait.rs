//! Waiting on the host with a deadline: the driver's own waits have none.

use std::time::{Duration, Instant};

use cudarc::driver::sys::CUresult;

use super::bindings::Answer;
use super::context::Device;
use crate::error::{Error, Result};

/// Looks without a pause: a small kernel is done within them.
const EAGER_LOOKS: u32 = 200;
const FIRST_PAUSE: Duration = Duration::from_micros(20);
const LONGEST_PAUSE: Duration = Duration::from_millis(1);

/// Asks until the answer is no longer "not ready".
///
/// # Errors
/// [`Error::TimedOut`] after `timeout`; what the driver answers.
pub(super) fn until_ready(device: &Device, stream: &str, timeout: Duration, ask: impl Fn() -> Answer) -> Result<()> {
    let start = Instant::now();
    let (mut looks, mut pause) = (0, FIRST_PAUSE);
    loop {
        let answer = ask();
        if !answer.is(CUresult::CUDA_ERROR_NOT_READY) {
            return device.check(answer);
        }
        if start.elapsed() >= timeout {
            return Err(Error::timed_out(format_args!("the work of stream {stream}"), timeout));
        }
        looks += 1;
        if looks <= EAGER_LOOKS {
            std::hint::spin_loop();
        } else {
            std::thread::sleep(pause.min(timeout.saturating_sub(start.elapsed())));
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }
}
