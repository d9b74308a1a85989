//! The annulus program: one file per subcommand.

mod bench;
mod completions;
mod gpus;
mod info;
mod launch;
mod machine;

use std::io::IsTerminal;
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

/// Data-parallel training without NCCL: launch ranks, measure collectives, see what this machine offers.
#[derive(Debug, Parser)]
#[command(name = "annulus", version, max_term_width = 110, arg_required_else_help = true)]
#[command(
    after_help = "ANNULUS_LOG=info (or debug, or a filter such as annulus::world=debug) has more written to stderr than warnings."
)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Launch(launch::Arguments),
    Bench(bench::Arguments),
    Info(info::Arguments),
    Completions(completions::Arguments),
}

/// Usage and environment errors, as clap has it.
const USAGE_ERROR: u8 = 2;

fn main() -> ExitCode {
    let filter = tracing_subscriber::EnvFilter::try_from_env("ANNULUS_LOG").unwrap_or_else(|_| "warn".into());
    let colours = std::io::stderr().is_terminal();
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(colours).init();
    let result = match Arguments::parse().command {
        Command::Launch(arguments) => launch::run(arguments),
        Command::Bench(arguments) => bench::run(&arguments),
        Command::Info(arguments) => Ok(info::run(&arguments)),
        Command::Completions(arguments) => Ok(completions::run(&arguments, Arguments::command())),
    };
    result.unwrap_or_else(|error| {
        eprintln!("annulus: {error}");
        ExitCode::from(USAGE_ERROR)
    })
}
