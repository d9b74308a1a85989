//! Ranks as real processes: the test executable runs itself again in a role.
//!
//! A test file names its roles in one test called `role`, which does nothing unless it is run as one. What a role wants
//! the test to know it says in lines that begin with `>> `.

#![allow(dead_code, reason = "every test file uses a part of it")]

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use annulus::world::WorldOptions;
use rustix::process::{Pid, Signal, kill_process};

/// No wait of a test is longer.
pub const PATIENCE: Duration = Duration::from_secs(30);

const ROLE: &str = "ANNULUS_TEST_ROLE";

/// Options with test-sized deadlines.
pub fn options() -> WorldOptions {
    WorldOptions { init_timeout: PATIENCE, timeout: PATIENCE, ..WorldOptions::default() }
}

/// Runs the role this process was started for, if any, and ends the process.
pub fn play(roles: &[(&str, fn())]) {
    let Ok(role) = std::env::var(ROLE) else { return };
    let (_, body) = roles.iter().find(|(name, _)| *name == role).expect("a role of this test file");
    body();
    std::process::exit(0);
}

/// Tells the test something.
pub fn say(what: impl std::fmt::Display) {
    println!(">> {what}");
}

/// The command line that runs this executable in its role; the role itself is a variable.
pub fn command_line() -> Vec<OsString> {
    let own = std::env::current_exe().unwrap().into_os_string();
    [own, "role".into(), "--exact".into(), "--nocapture".into(), "--quiet".into()].to_vec()
}

/// This executable in `role`, with no launcher's variables and its own temporary folder.
pub fn command(role: &str, tmpdir: &Path) -> Command {
    let line = command_line();
    // A shell cannot trap what was ignored when it started: tests behind nohup or in a background job.
    let mut command = Command::new("env");
    command.arg("--default-signal=HUP,INT,QUIT,TERM,USR1,USR2").arg(&line[0]);
    command.args(&line[1..]).env(ROLE, role).env("TMPDIR", tmpdir).env("RUST_BACKTRACE", "0");
    for name in ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "ANNULUS_RANK", "ANNULUS_WORLD_SIZE"]
    {
        command.env_remove(name);
    }
    command
}

/// Rank `rank` of `world_size` under torchrun's variables.
pub fn torch_rank(role: &str, tmpdir: &Path, rank: u32, world_size: u32) -> Command {
    let mut command = command(role, tmpdir);
    command.env("RANK", rank.to_string()).env("WORLD_SIZE", world_size.to_string());
    command.env("MASTER_ADDR", "localhost").env("MASTER_PORT", "29500");
    command
}

/// A started process whose lines are read as they come. Killed when it is dropped.
pub struct Process {
    pub child: Child,
    lines: Receiver<(Instant, String)>,
    /// Everything that was read, for the message of a failed test.
    heard: Vec<String>,
}

impl Process {
    /// Starts `command`; stdout and stderr are read together.
    pub fn start(mut command: Command) -> Process {
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let (send, lines) = channel();
        let streams: [Box<dyn std::io::Read + Send>; 2] =
            [Box::new(child.stdout.take().unwrap()), Box::new(child.stderr.take().unwrap())];
        for stream in streams {
            let send = send.clone();
            std::thread::spawn(move || {
                for line in BufReader::new(stream).split(b'\n').map_while(Result::ok) {
                    if send.send((Instant::now(), String::from_utf8_lossy(&line).into_owned())).is_err() {
                        return;
                    }
                }
            });
        }
        Process { child, lines, heard: Vec::new() }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn signal(&self, signal: Signal) {
        signal_pid(self.pid(), signal);
    }

    /// The next line that contains `what`, and when it came.
    pub fn expect(&mut self, what: &str) -> (Instant, String) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok((when, line)) => {
                    self.heard.push(line.clone());
                    if line.contains(what) {
                        return (when, line);
                    }
                }
                Err(RecvTimeoutError::Timeout) => panic!("no {what:?} within {PATIENCE:?}; heard {:#?}", self.heard),
                Err(RecvTimeoutError::Disconnected) => panic!("ended without {what:?}; heard {:#?}", self.heard),
            }
        }
    }

    /// Waits for the end: exit code (128 + signal), and all lines that were not expected before.
    pub fn finish(mut self) -> (i32, Vec<String>) {
        use std::os::unix::process::ExitStatusExt;
        let deadline = Instant::now() + PATIENCE;
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(Instant::now() < deadline, "still running after {PATIENCE:?}; heard {:#?}", self.heard);
            std::thread::sleep(Duration::from_millis(2));
        };
        let mut lines = Vec::new();
        while let Ok((_, line)) = self.lines.recv_timeout(Duration::from_secs(2)) {
            lines.push(line);
        }
        (status.code().unwrap_or_else(|| 128 + status.signal().unwrap()), lines)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub fn signal_pid(pid: u32, signal: Signal) {
    let pid = Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    let _ = kill_process(pid, signal);
}

/// Whether the process is there and not a zombie.
pub fn is_alive(pid: u32) -> bool {
    let Ok(stat) = std::fs::read_to_string(format!("/proc/{pid}/stat")) else { return false };
    !matches!(stat.rsplit_once(") "), Some((_, rest)) if rest.starts_with(['Z', 'X']))
}

/// Waits until `done`, at most [`PATIENCE`].
pub fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "{what}: not within {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Everything under `folder`, for the check that nothing is.
pub fn names_in(folder: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    let mut names = Vec::new();
    for entry in entries.flatten() {
        names.push(entry.path().display().to_string());
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            names.extend(names_in(&entry.path()));
        }
    }
    names
}

/// Whether the long form of the fault tests was asked for.
pub fn long() -> bool {
    std::env::var_os("ANNULUS_FAULTS").is_some_and(|form| form == "long")
}

/// Says why the test that calls it does nothing. To stderr itself: what is printed is shown for tests that fail, only.
pub fn skip(reason: &str) {
    let test = std::thread::current().name().unwrap_or("a test").to_owned();
    let _ = writeln!(std::io::stderr(), "skipped {test}: {reason}");
}
