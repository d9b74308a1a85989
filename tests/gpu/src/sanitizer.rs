//! The kernels under NVIDIA's own checker, where this machine has it; it also comes as a package:
//!
//! ```text
//! pip install --target X nvidia-cuda-sanitizer-api    then    CUDA_HOME=X/nvidia/cu13 ./run.sh
//! ```

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::Result;
use crate::part::{Part, Scale, follow};
use crate::record::{Check, Record, say};

/// What is run, the most telling first: what time cuts off is the end. Each kernel is in one of these parts.
pub const RUNS: [(&str, Part); 11] = [
    ("memcheck", Part::Threads),
    ("memcheck", Part::Norms),
    ("memcheck", Part::Optimizers),
    ("memcheck", Part::Casts),
    ("racecheck", Part::Threads),
    ("synccheck", Part::Threads),
    ("synccheck", Part::Norms),
    ("synccheck", Part::Optimizers),
    ("initcheck", Part::Norms),
    ("initcheck", Part::Casts),
    ("initcheck", Part::Optimizers),
];

/// What is not, and why.
const LEFT_OUT: [&str; 5] = [
    "racecheck over norms and optimizers: behind barriers of a part of a block, which norms have, it takes what __syncthreads \
     orders for a race (2025.3, in any kernel that has both)",
    "racecheck and synccheck over casts: their kernels have no shared memory and no barriers of their own",
    "initcheck over threads: the memory between ranks is zeroed when it is made, so that nothing could be found",
    "processes under any tool: their kernels are those of threads, and two checked processes take turns too slowly",
    "tensors of more than 2^31 elements under any tool: too slow",
];

/// Of all.
pub fn limit(scale: Scale) -> Duration {
    Duration::from_secs(if scale == Scale::Full { 140 } else { 60 })
}

/// Runs the short form of the comparisons under each tool, as many at a time as there are processors: a tool keeps one busy, and
/// the device hardly. A finding, or a comparison that fails, is a failure.
///
/// # Errors
/// None but this program's own path.
pub fn run(scale: Scale) -> Result<()> {
    let Some(sanitizer) = find() else {
        say(&Record::Skipped("compute-sanitizer is not in PATH, CUDA_HOME/bin or /usr/local/cuda/bin".to_owned()));
        return Ok(());
    };
    LEFT_OUT.iter().for_each(|what| say(&Record::Skipped((*what).to_owned())));
    let deadline = Instant::now() + limit(scale);
    let (next, processors) = (AtomicUsize::new(0), std::thread::available_parallelism()?.get());
    let work = || {
        while let Some((tool, part)) = RUNS.get(next.fetch_add(1, Ordering::Relaxed)) {
            one(&sanitizer, tool, *part, deadline);
        }
    };
    std::thread::scope(|scope| (0..processors.min(RUNS.len())).for_each(|_| drop(scope.spawn(work))));
    Ok(())
}

fn one(sanitizer: &Path, tool: &str, part: Part, deadline: Instant) {
    let (what, start) = (format!("{tool} over {}", part.name()), Instant::now());
    match under(sanitizer, tool, part, deadline) {
        Ok(false) => say(&Record::Skipped(format!("{what}: there was no time to end it; nothing was found"))),
        outcome => say(&Record::Check(Check {
            what,
            cases: u64::from(outcome.is_ok()),
            failure: outcome.err().map(|error| error.to_string()),
            is_cut_short: false,
            seconds: start.elapsed().as_secs_f64(),
        })),
    }
}

/// Runs the short form of `part` under `tool`, and says whether it came to its end by the deadline.
fn under(sanitizer: &Path, tool: &str, part: Part, deadline: Instant) -> Result<bool> {
    if Instant::now() >= deadline {
        return Ok(false);
    }
    let mut command = Command::new(sanitizer);
    // Calls that fail are errors of the library, or its way to ask what a device can do.
    command.args(["--tool", tool, "--error-exitcode", "9", "--report-api-errors", "no"]);
    command.arg(std::env::current_exe()?).args(["part", &part.name(), "--scale", &Scale::Short.name()]);
    command.process_group(0); // the checked process is a child of the checker's
    let (mut failures, mut told) = (Vec::new(), Vec::new());
    let ended = follow(&mut command, deadline, |line| match serde_json::from_str(line) {
        Ok(Record::Check(check)) => failures.extend(check.failure),
        Ok(_) => {}
        Err(_) => told.push(line.to_owned()),
    });
    told.retain(|line| line.contains("=====") && !line.contains("COMPUTE-SANITIZER"));
    let status = match ended {
        Ok(status) if status.success() && failures.is_empty() => return Ok(true),
        Ok(status) => status.to_string(),
        Err(_) if Instant::now() >= deadline && failures.is_empty() && told.is_empty() => return Ok(false),
        Err(error) => error.to_string(),
    };
    told.truncate(12);
    Err(format!("{status}: {} {}", failures.join("; "), told.join(" ")).into())
}

fn find() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let home = std::env::var_os("CUDA_HOME").map(|home| PathBuf::from(home).join("bin"));
    let folders = std::env::split_paths(&path).chain(home).chain([PathBuf::from("/usr/local/cuda/bin")]);
    folders.map(|folder| folder.join("compute-sanitizer")).find(|file| file.is_file())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    /// What comes of a sanitizer that does what `script` says.
    fn outcome(script: &str, limit: Duration) -> std::result::Result<bool, String> {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("compute-sanitizer");
        std::fs::write(&file, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o755)).unwrap();
        loop {
            let outcome =
                under(&file, "memcheck", Part::Norms, Instant::now() + limit).map_err(|error| error.to_string());
            // A process that another test starts at this moment still has the file open for writing.
            match outcome {
                Err(error) if error.contains("Text file busy") => std::thread::sleep(Duration::from_millis(10)),
                outcome => return outcome,
            }
        }
    }

    const BANNER: &str = "echo '========= COMPUTE-SANITIZER'";
    const LONG: Duration = Duration::from_secs(30);

    fn said(failure: &str) -> String {
        format!(
            r#"{BANNER}; echo '{{"check":{{"what":"w","cases":1,"failure":{failure},"is_cut_short":false,"seconds":1}}}}'"#
        )
    }

    #[test]
    fn what_ends_well_is_well_and_any_finding_is_a_failure() {
        assert_eq!(outcome(&said("null"), LONG), Ok(true));
        let differs = outcome(&said(r#""a bit differs""#), LONG).unwrap_err();
        assert!(differs.contains("a bit differs"), "{differs}");
        let finding = "echo '========= Invalid __global__ write of size 4 bytes'";
        let found = outcome(&format!("{}; {finding}; exit 9", said("null")), LONG).unwrap_err();
        assert!(found.contains("exit status: 9") && found.contains("__global__ write"), "{found}");
        assert!(!found.contains("COMPUTE-SANITIZER"), "{found}");
    }

    #[test]
    fn what_does_not_end_is_ended_with_all_its_processes() {
        let pid_file = tempfile::NamedTempFile::new().unwrap();
        let hang = format!("sleep 600 & echo $! > {}; wait", pid_file.path().display());
        let soon = Duration::from_secs(1);
        assert_eq!(outcome(&hang, soon), Ok(false));
        let pid = std::fs::read_to_string(pid_file.path()).unwrap();
        // Nobody may have waited for it yet.
        let is_gone = || {
            let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.trim()));
            stat.map_or(true, |stat| stat.contains(") Z "))
        };
        let start = Instant::now();
        while !is_gone() && start.elapsed() < LONG {
            std::thread::sleep(Duration::from_millis(10));
        }
        assert!(is_gone(), "process {pid} lives");
        let found_before = outcome(&format!("{BANNER}; echo '========= Race reported'; {hang}"), soon).unwrap_err();
        assert!(found_before.contains("Race reported"), "{found_before}");
        assert_eq!(outcome(&said("null"), Duration::ZERO), Ok(false), "not even begun");
    }
}
