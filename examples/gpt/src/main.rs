//! The main job: trains a small GPT with several ranks. `annulus-gpt --help` says how.
//!
//! ```text
//! main ── not under a launcher? ──> starts itself once per rank, waits
//!      └─ a rank ──> train::run
//!                      settings, text,    what is learnt, checked before anything begins
//!                        plan
//!                      model, ops,        candle: the forward pass in segments, the backward pass segment by segment
//!                        kernels
//!                      adapter            candle's gradients into annulus's buckets, annulus's weights into candle
//!                      metrics, plot,     what the run leaves behind
//!                        report, folder
//! ```

mod adapter;
mod failure;
mod folder;
mod kernels;
mod metrics;
mod model;
mod ops;
mod plan;
mod plot;
mod report;
mod sample;
mod settings;
mod stop;
mod text;
mod train;

use std::io::IsTerminal;
use std::process::ExitCode;

use annulus::world::launch::{self, LaunchOptions};
use annulus::world::{Environment, Launcher};
use clap::Parser;

use failure::Failure;
use plan::Plan;
use settings::Cli;

/// Codes up to this one are a rank's own, which has said why; a rank that was killed has not.
const OWN_EXIT_CODES: i32 = 2;

fn main() -> ExitCode {
    let cli = Cli::parse();
    // Warnings of the library: a peer that is late, what ran when the job failed.
    let filter = tracing_subscriber::EnvFilter::try_from_env("ANNULUS_LOG").unwrap_or_else(|_| "warn".into());
    let colours = std::io::stderr().is_terminal();
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(colours).init();
    let environment = match Environment::detect() {
        Ok(environment) => environment,
        Err(error) => return fail(&Failure::Usage(error.to_string()), None),
    };
    let rank = environment.rank;
    match environment.launcher {
        Launcher::Single => match start_ranks(&cli) {
            Ok(code) => code,
            Err(error) => fail(&error, None),
        },
        _ => match run_rank(&cli, environment) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => fail(&error, Some(rank)),
        },
    }
}

/// Starts this program once per rank, or runs the only rank here.
fn start_ranks(cli: &Cli) -> Result<ExitCode, Failure> {
    let ranks = cli.ranks.unwrap_or(2);
    // What is wrong with the command line is said once, before there are ranks to say it each.
    let plan = Plan::new(cli, ranks)?;
    plan.check_run_dir()?;
    if ranks == 1 {
        return train_one_thread(plan, Environment::single()).map(|()| ExitCode::SUCCESS);
    }
    drop(plan);
    // Without a prefix the ranks write where this process does: rank 0 sees whether that is a terminal.
    let outcome = launch::spawn_self(ranks, &LaunchOptions { prefix: false, ..LaunchOptions::default() })?;
    if let Some(failure) = outcome.failure.filter(|_| outcome.code > OWN_EXIT_CODES) {
        eprintln!("annulus-gpt: {failure}; the other ranks were ended");
    }
    Ok(ExitCode::from(u8::try_from(outcome.code).unwrap_or(1)))
}

/// One rank of several.
fn run_rank(cli: &Cli, environment: Environment) -> Result<(), Failure> {
    if let Some(ranks) = cli.ranks.filter(|ranks| *ranks != environment.world_size) {
        return Err(Failure::Usage(format!(
            "--ranks {ranks}: but {} has started {}; leave --ranks out under a launcher",
            environment.launcher, environment.world_size
        )));
    }
    train_one_thread(Plan::new(cli, environment.world_size)?, environment)
}

/// A rank is a process on a core of its own: candle keeps to one thread.
fn train_one_thread(plan: Plan, environment: Environment) -> Result<(), Failure> {
    if std::env::var_os("RAYON_NUM_THREADS").is_none() {
        // SAFETY: no other thread runs yet: the rank has not joined its world and listens to no signals.
        unsafe { std::env::set_var("RAYON_NUM_THREADS", "1") };
    }
    keep_freed_memory();
    train::run(plan, environment)
}

/// candle allocates every tensor of every step anew. glibc would give large ones back to the kernel each time and have them zeroed
/// page by page again: a fifth of a step.
fn keep_freed_memory() {
    #[cfg(target_env = "gnu")]
    {
        const NEVER: i32 = 1 << 30;
        // SAFETY: mallopt sets a number of the allocator under its own lock; both parameters exist in every glibc.
        unsafe {
            libc::mallopt(libc::M_MMAP_THRESHOLD, NEVER);
            libc::mallopt(libc::M_TRIM_THRESHOLD, NEVER);
        }
    }
}

/// Says why, and which rank says so.
fn fail(error: &Failure, rank: Option<u32>) -> ExitCode {
    match rank {
        Some(rank) => eprintln!("annulus-gpt: rank {rank}: {error}"),
        None => eprintln!("annulus-gpt: {error}"),
    }
    ExitCode::from(error.exit_code())
}
