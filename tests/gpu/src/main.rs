//! Runs everything that this device can say about annulus, and writes `annulus-gpu.json` and `annulus-gpu.md`.

use std::path::PathBuf;
use std::process::ExitCode;

use annulus_gpu::card::Card;
use annulus_gpu::part::{Part, Scale};
use annulus_gpu::record::Record;
use annulus_gpu::report::Report;
use annulus_gpu::{Result, pack, shared};
use clap::{Parser, Subcommand};

/// Verifies and times annulus on the GPU of this machine. Needs no arguments: every check and every timing is in here.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: Option<Subcommands>,
    /// A minute instead of eight.
    #[arg(long)]
    quick: bool,
    /// Only these parts.
    #[arg(long, value_enum)]
    only: Vec<Part>,
    /// How much of each part; for tests.
    #[arg(long, value_enum, hide = true)]
    scale: Option<Scale>,
    /// Folder for annulus-gpu.json and annulus-gpu.md.
    #[arg(long, default_value = ".")]
    folder: PathBuf,
}

#[derive(Subcommand)]
enum Subcommands {
    /// Does one part in this process; findings are lines of JSON on standard output.
    Part {
        #[arg(value_enum)]
        part: Part,
        #[arg(long, value_enum, default_value = "full")]
        scale: Scale,
    },
    /// Is one of the ranks that a part has started.
    #[command(hide = true)]
    Rank {
        #[arg(long, value_enum, default_value = "full")]
        scale: Scale,
    },
    /// Copies this program, which is all there is, and a script into a folder that runs on another machine.
    Pack {
        /// The folder; made if it is not there.
        folder: PathBuf,
    },
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let done = match &arguments.command {
        Some(Subcommands::Part { part, scale }) => part.run(*scale).map(|()| true),
        Some(Subcommands::Rank { scale }) => shared::processes::rank(*scale).map(|()| true),
        Some(Subcommands::Pack { folder }) => pack::pack(folder).map(|()| true),
        None => run_all(&arguments),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("annulus-gpu: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Whether everything that was compared agreed.
fn run_all(arguments: &Arguments) -> Result<bool> {
    let scale = arguments.scale.unwrap_or(if arguments.quick { Scale::Quick } else { Scale::Full });
    let card = Card::look()?;
    println!("{} ({} device(s)), CUDA {}, {}", card.name, card.devices, card.cuda, card.date);
    let mut report = Report::new(card);
    let wanted = |part: &Part| arguments.only.is_empty() || arguments.only.contains(part);
    for part in Part::ALL.into_iter().filter(wanted) {
        println!("-- {}", part.name());
        if part.is_timing() && report.card().is_virtual() {
            let reason =
                format!("{}: durations on a virtual GPU are those of an interpreter, and not reported", part.name());
            println!("   {reason}");
            report.add(part, vec![Record::Skipped(reason)]);
            continue;
        }
        let records = part.run_apart(scale, |record| println!("   {}", annulus_gpu::report::line(record)));
        report.add(part, records);
        // Whoever ends a run that takes too long has what was found by then.
        report.write(&arguments.folder)?;
    }
    report.look_again();
    report.write(&arguments.folder)?;
    println!("{}", report.verdict());
    Ok(report.is_correct())
}
