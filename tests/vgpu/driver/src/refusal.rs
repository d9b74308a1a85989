//! Calls that are refused because a test says so, where no test can make a driver refuse them.

use std::sync::{Mutex, PoisonError};

use crate::settings::SETTINGS;
use crate::status::{Result, Status};

/// Calls count one after another.
static TURN: Mutex<()> = Mutex::new(());

/// Refuses a call of the function `name` if the file that `ANNULUS_VGPU_REFUSE` names says so: "NAME 3" is the third one from
/// now on. Then the file is gone.
pub(crate) fn check(name: &str) -> Result<()> {
    let Some(path) = &SETTINGS.refuse else { return Ok(()) };
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let Ok(text) = std::fs::read_to_string(path) else { return Ok(()) };
    let wanted = text.trim().split_once(' ').and_then(|(wanted, count)| Some((wanted, count.parse::<u32>().ok()?)));
    let Some((wanted, count)) = wanted else {
        eprintln!("virtual GPU: {}: {text:?} is not understood", path.display());
        std::process::abort()
    };
    if wanted != name {
        return Ok(());
    }
    let left = count.saturating_sub(1);
    let changed = if left == 0 { std::fs::remove_file(path) } else { std::fs::write(path, format!("{name} {left}")) };
    if let Err(error) = changed {
        eprintln!("virtual GPU: {}: {error}", path.display());
        std::process::abort()
    }
    // DAPI 6.1, CUDA_ERROR_OUT_OF_MEMORY: no "memory or other resources to perform the requested operation", which any call
    // may meet.
    if left == 0 { Err(Status::OUT_OF_MEMORY) } else { Ok(()) }
}
