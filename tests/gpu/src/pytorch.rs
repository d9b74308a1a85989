//! The same work by PyTorch, where this machine has it.

use std::process::Command;
use std::time::{Duration, Instant};

use annulus::device::cuda::Driver;

use crate::Result;
use crate::part::{Scale, follow, listen};
use crate::record::{Record, say};
use crate::time::model;

/// The peer.
pub const SCRIPT: &str = include_str!("pytorch.py");

/// Times it over the tensors that [`operations`](crate::time::operations) times.
///
/// # Errors
/// No device; one that is too small.
pub fn run(scale: Scale) -> Result<()> {
    let lens = model::that_fits(&Driver::open()?.device(0)?, scale)?;
    let (rounds, limit_s) = if scale == Scale::Full { (21, 55) } else { (7, 25) };
    ask(&lens, rounds, Duration::from_secs(limit_s), say);
    Ok(())
}

/// What PyTorch's versions take over tensors of such lengths, the median of so many rounds each; a reason where it is not there.
pub fn ask(lens: &[usize], rounds: usize, limit: Duration, mut hear: impl FnMut(&Record)) -> Vec<Record> {
    let has_torch = "import sys, torch; sys.exit(not torch.cuda.is_available())";
    let mut probe = Command::new("python3");
    let answer = follow(probe.args(["-c", has_torch]), Instant::now() + Duration::from_secs(30), |_| {});
    if !answer.is_ok_and(|status| status.success()) {
        let skipped = Record::Skipped("python3 with a PyTorch that sees the card is not there".to_owned());
        hear(&skipped);
        return vec![skipped];
    }
    let mut script = Command::new("python3");
    script.args(["-c", SCRIPT, &rounds.to_string()]).args(lens.iter().map(usize::to_string));
    listen("PyTorch's script", script, limit, hear)
}
