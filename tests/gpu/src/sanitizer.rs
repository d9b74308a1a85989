//! The kernels under NVIDIA's own checker, where this machine has it.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use crate::Result;
use crate::part::{Part, Scale, follow};
use crate::record::{Record, check, say};

const TOOLS: [&str; 3] = ["memcheck", "racecheck", "initcheck"];
const PARTS: [Part; 3] = [Part::Norms, Part::Casts, Part::Optimizers];
const LIMIT: Duration = Duration::from_secs(140);

/// Runs the short form of the comparisons under each tool. A finding, or a comparison that fails, is a failure.
///
/// # Errors
/// None but this program's own path.
pub fn run() -> Result<()> {
    let Some(sanitizer) = find() else {
        say(&Record::Skipped("compute-sanitizer is not in PATH, CUDA_HOME/bin or /usr/local/cuda/bin".to_owned()));
        return Ok(());
    };
    let deadline = Instant::now() + LIMIT;
    for (tool, part) in TOOLS.iter().flat_map(|tool| PARTS.map(|part| (tool, part))) {
        let what = format!("{tool} over {}", part.name());
        let outcome = under(&sanitizer, tool, part, deadline);
        if Instant::now() >= deadline {
            say(&Record::Skipped(format!("{what}: there was no time")));
            continue;
        }
        check(what, LIMIT, |tally| {
            outcome?;
            tally.agreed();
            Ok(())
        });
    }
    Ok(())
}

/// The short form of `part` under `tool`.
fn under(sanitizer: &Path, tool: &str, part: Part, deadline: Instant) -> Result<()> {
    let mut command = Command::new(sanitizer);
    command.args(["--tool", tool, "--error-exitcode", "9"]).arg(std::env::current_exe()?);
    command.args(["part", &part.name(), "--scale", &Scale::Short.name()]);
    let (mut failures, mut told) = (Vec::new(), Vec::new());
    let status = follow(&mut command, deadline, |line| match serde_json::from_str(line) {
        Ok(Record::Check(check)) => failures.extend(check.failure),
        Ok(_) => {}
        Err(_) => told.push(line.to_owned()),
    })?;
    if status.success() && failures.is_empty() {
        return Ok(());
    }
    let told: Vec<String> = told.into_iter().filter(|line| line.contains("=====")).take(12).collect();
    Err(format!("{status}: {} {}", failures.join("; "), told.join(" ")).into())
}

fn find() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let home = std::env::var_os("CUDA_HOME").map(|home| PathBuf::from(home).join("bin"));
    let folders = std::env::split_paths(&path).chain(home).chain([PathBuf::from("/usr/local/cuda/bin")]);
    folders.map(|folder| folder.join("compute-sanitizer")).find(|file| file.is_file())
}
