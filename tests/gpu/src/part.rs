//! The parts of the program, each run in a process of its own.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use clap::ValueEnum;
use rustix::process::{Pid, Signal, kill_process_group};

use crate::record::{Check, Record};
use crate::{Result, check, pytorch, sanitizer, shared, time};

/// What a process of the program does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Part {
    /// Norms, and norms fused with unscaling, against the host.
    Norms,
    /// Casts, scaling and clipping by value against the host.
    Casts,
    /// AdamW, SGD, gradient accumulation and the loss scale against the host.
    Optimizers,
    /// Tensors of more than 2^31 elements.
    Long,
    /// Collectives of ranks that are threads and share the device.
    Threads,
    /// Two processes on one device over IPC.
    Processes,
    /// Operations beside the card's copy.
    Operations,
    /// The same operations by PyTorch.
    #[value(name = "pytorch")]
    PyTorch,
    /// All-reduces of ranks that share the device, beside the card's copy.
    Collectives,
    /// What a step costs the processor.
    HostCost,
    /// Operations and collectives in small, under compute-sanitizer.
    Sanitizer,
}

/// How much of a part is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Scale {
    /// So little that a sanitizer or a virtual GPU gets through it.
    Short,
    /// A minute for all.
    Quick,
    /// Eight minutes for all.
    Full,
}

impl Scale {
    /// As it is written on the command line.
    pub fn name(self) -> String {
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
    }
}

impl Part {
    /// In the order in which they run: the sanitizer last, which takes long and stands in the way of nothing.
    pub const ALL: [Part; 11] = [
        Part::Norms,
        Part::Casts,
        Part::Optimizers,
        Part::Long,
        Part::Threads,
        Part::Processes,
        Part::Operations,
        Part::PyTorch,
        Part::Collectives,
        Part::HostCost,
        Part::Sanitizer,
    ];

    /// Whether it says how fast something is.
    pub fn is_timing(self) -> bool {
        matches!(self, Part::Operations | Part::Collectives | Part::HostCost | Part::PyTorch)
    }

    /// As it is written on the command line.
    pub fn name(self) -> String {
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
    }

    /// When its process is ended: later than its own limits would end it.
    fn limit(self, scale: Scale) -> Duration {
        Duration::from_secs(match self {
            Part::Sanitizer => sanitizer::limit(scale).as_secs() + 10,
            Part::Threads => 150,
            Part::Operations | Part::Casts | Part::Long | Part::PyTorch => 90,
            _ => 60,
        })
    }

    /// Does the work in this process; what is found goes to standard output.
    ///
    /// # Errors
    /// What keeps the part from starting.
    pub fn run(self, scale: Scale) -> Result<()> {
        match self {
            Part::Norms => check::norm::run(scale),
            Part::Casts => check::cast::run(scale),
            Part::Optimizers => check::update::run(scale),
            Part::Long => check::long::run(scale),
            Part::Threads => shared::threads::run(scale),
            Part::Processes => shared::processes::run(scale),
            Part::Sanitizer => sanitizer::run(scale),
            Part::Operations => time::operations(scale),
            Part::Collectives => shared::threads::time(scale),
            Part::HostCost => time::host_cost(scale),
            Part::PyTorch => pytorch::run(scale),
        }
    }

    /// Does it in a process of its own, and returns what that said, the last of which says if it came to its end.
    pub fn run_apart(self, scale: Scale, hear: impl FnMut(&Record)) -> Vec<Record> {
        let mut command = match std::env::current_exe() {
            Ok(own) => Command::new(own),
            Err(error) => return vec![failed(self.name(), error.to_string(), 0.0)],
        };
        command.args(["part", &self.name(), "--scale", &scale.name()]);
        listen(&self.name(), command, self.limit(scale), hear)
    }
}

fn failed(what: String, failure: String, seconds: f64) -> Record {
    Record::Check(Check { what, cases: 0, failure: Some(failure), is_cut_short: false, seconds })
}

/// Runs `command`, which says records on standard output; anything else it says there is passed on to standard error. A
/// failure to end well within `limit` becomes a record.
pub fn listen(what: &str, mut command: Command, limit: Duration, mut hear: impl FnMut(&Record)) -> Vec<Record> {
    let start = Instant::now();
    let mut records = Vec::new();
    let ended = follow(&mut command, start + limit, |line| {
        match serde_json::from_str::<Record>(line) {
            Ok(record) => {
                hear(&record);
                records.push(record);
            }
            Err(_) => eprintln!("{line}"),
        };
    });
    let failure = match ended {
        Ok(status) if status.success() => return records,
        Ok(status) => format!("its process ended with {status}"),
        Err(error) => error.to_string(),
    };
    let record = failed(what.to_owned(), failure, start.elapsed().as_secs_f64());
    hear(&record);
    records.push(record);
    records
}

/// Hands over each line of the process's output as it comes; kills it at the deadline.
///
/// # Errors
/// It cannot be started, or was killed.
pub fn follow(
    command: &mut Command,
    deadline: Instant,
    mut line: impl FnMut(&str),
) -> Result<std::process::ExitStatus> {
    let mut child = Ended(command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?);
    let output = child.0.stdout.take().ok_or("no standard output")?;
    let (sender, lines) = channel();
    // Ends with the process: its last line, or a receiver that is gone.
    std::thread::spawn(move || {
        for line in BufReader::new(output).lines().map_while(std::io::Result::ok) {
            if sender.send(line).is_err() {
                return;
            }
        }
    });
    loop {
        match lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(text) => line(&text),
            Err(RecvTimeoutError::Timeout) => return Err("its process did not end in time and was killed".into()),
            // Output is closed: the process is at its end.
            Err(RecvTimeoutError::Disconnected) => break,
        }
    }
    loop {
        if let Some(status) = child.0.try_wait()? {
            return Ok(status);
        }
        if Instant::now() >= deadline {
            return Err("its process closed its output, did not end in time and was killed".into());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A process that does not outlive its use; nor does what it has started, if it leads a group of its own.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        if !matches!(self.0.try_wait(), Ok(None)) {
            return; // its number may be another's by now
        }
        if let Some(group) = i32::try_from(self.0.id()).ok().and_then(Pid::from_raw) {
            // Fails where there is no such group.
            let _ = kill_process_group(group, Signal::KILL);
        }
        // Both fail only for a process that has ended meanwhile.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
