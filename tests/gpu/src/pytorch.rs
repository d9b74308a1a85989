//! The same work by PyTorch, where this machine has it.

use std::process::Command;
use std::time::{Duration, Instant};

use annulus::device::cuda::Driver;

use crate::Result;
use crate::part::{Scale, follow};
use crate::record::{Record, say};
use crate::time::model;

/// The peer.
pub const SCRIPT: &str = include_str!("pytorch.py");

/// Runs the script over the tensors that [`operations`](crate::time::operations) times.
///
/// # Errors
/// The script's.
pub fn run(scale: Scale) -> Result<()> {
    let lens = model::that_fits(&Driver::open()?.device(0)?, scale)?;
    let has_torch = "import sys, torch; sys.exit(not torch.cuda.is_available())";
    let mut probe = Command::new("python3");
    let answer = follow(probe.args(["-c", has_torch]), Instant::now() + Duration::from_secs(30), |_| {});
    if !answer.is_ok_and(|status| status.success()) {
        say(&Record::Skipped("python3 with a PyTorch that sees the card is not there".to_owned()));
        return Ok(());
    }
    let rounds = if scale == Scale::Full { "21" } else { "7" };
    let mut script = Command::new("python3");
    script.args(["-c", SCRIPT, rounds]).args(lens.iter().map(usize::to_string));
    let limit = Duration::from_secs(if scale == Scale::Full { 55 } else { 25 });
    // What is said is already a record.
    let status = follow(&mut script, Instant::now() + limit, |line| println!("{line}"))?;
    if status.success() { Ok(()) } else { Err(format!("PyTorch's script ended with {status}").into()) }
}
