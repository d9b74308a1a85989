//! `annulus launch`: the ranks of one job as child processes.

use std::ffi::OsString;
use std::io::ErrorKind;
use std::process::ExitCode;
use std::time::Duration;

use annulus::world::launch::{self, LaunchOptions};
use annulus::{Error, Result};

/// Run a program as several ranks on this machine.
///
/// Every rank finds its number and the job's size in ANNULUS_RANK and ANNULUS_WORLD_SIZE (Environment::detect reads
/// them). Output is prefixed with the rank, signals are passed on, and when one rank fails the others are ended. Ctrl-C
/// asks the ranks to stop; a second one kills them. Nothing is left behind, even if this program is killed.
///
/// Exit code: 0 if every rank ended with 0; else that of the first rank that failed, or 128 + the signal that killed it;
/// 124 after --timeout; 2 for usage errors; 126 or 127 if the program cannot be run or found.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  annulus launch -n 4 -- target/release/train --epochs 3")]
pub(crate) struct Arguments {
    /// Number of ranks, 1 to 64.
    #[arg(short = 'n', long, value_name = "N")]
    ranks: u32,
    /// Let the ranks write straight to this terminal, without `[rank]` before every line.
    #[arg(long)]
    no_prefix: bool,
    /// End the job if it has not ended after this many seconds.
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    timeout: Option<Duration>,
    /// Seconds between a signal that ends the job and SIGKILL for ranks that are left.
    #[arg(long, value_name = "SECONDS", default_value = "30", value_parser = seconds)]
    grace: Duration,
    /// The program and its arguments.
    #[arg(required = true, last = true, value_name = "PROGRAM")]
    command: Vec<OsString>,
}

fn seconds(text: &str) -> std::result::Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| "must be a number of seconds".to_owned())?;
    Duration::try_from_secs_f64(seconds).map_err(|error| error.to_string())
}

pub(crate) fn run(arguments: Arguments) -> Result<ExitCode> {
    let options = LaunchOptions { prefix: !arguments.no_prefix, timeout: arguments.timeout, grace: arguments.grace };
    let outcome = match launch::processes(arguments.ranks, &arguments.command, &options) {
        // The shell's codes for a program that is not there, and one that cannot be run.
        Err(Error::Io { what, source }) if what.starts_with("starting ") => {
            eprintln!("annulus: {what}: {source}");
            return Ok(ExitCode::from(if source.kind() == ErrorKind::NotFound { 127 } else { 126 }));
        }
        other => other?,
    };
    if let Some(failure) = &outcome.failure {
        eprintln!("annulus: {failure}; what was left of the job was ended");
    }
    // Exit codes and 128 + signal fit a byte.
    Ok(ExitCode::from(u8::try_from(outcome.code).unwrap_or(1)))
}
