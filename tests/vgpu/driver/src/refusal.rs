//! Calls that are refused because a test says so, where no test can make a driver refuse them; and one that does nothing, to
//! show that its absence is noticed.

use std::path::Path;
use std::sync::{Mutex, PoisonError};

use crate::settings::SETTINGS;
use crate::status::{Result, Status};

/// Calls count one after another.
static TURN: Mutex<()> = Mutex::new(());

/// Refuses a call of the function `name` if the file that `ANNULUS_VGPU_REFUSE` names says so: "NAME 3" is the third one from
/// now on. Then the file is gone.
pub(crate) fn check(name: &str) -> Result<()> {
    let is_refused = SETTINGS.refuse.as_ref().is_some_and(|path| counts_down(path, name));
    // DAPI 6.1, CUDA_ERROR_OUT_OF_MEMORY: no "memory or other resources to perform the requested operation", which any call
    // may meet.
    if is_refused { Err(Status::OUT_OF_MEMORY) } else { Ok(()) }
}

/// Whether this `cuStreamWaitEvent`, of a stream of the device, is the one to forget that the file names which
/// `ANNULUS_VGPU_DROP_WAIT` names: "0 3" is the third of device 0 from now on. Then the file is gone.
pub(crate) fn drops_wait(device: usize) -> bool {
    SETTINGS.drop_wait.as_ref().is_some_and(|path| counts_down(path, &device.to_string()))
}

/// Counts one of `name` off in a file of a name and a number; whether it is the last.
fn counts_down(path: &Path, name: &str) -> bool {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let Ok(text) = std::fs::read_to_string(path) else { return false };
    let wanted = text.trim().split_once(' ').and_then(|(wanted, count)| Some((wanted, count.parse::<u32>().ok()?)));
    let Some((wanted, count)) = wanted else {
        eprintln!("virtual GPU: {}: {text:?} is not understood", path.display());
        std::process::abort()
    };
    if wanted != name {
        return false;
    }
    let left = count.saturating_sub(1);
    let changed = if left == 0 { std::fs::remove_file(path) } else { std::fs::write(path, format!("{name} {left}")) };
    if let Err(error) = changed {
        eprintln!("virtual GPU: {}: {error}", path.display());
        std::process::abort()
    }
    left == 0
}
