//! Ranks as child processes, and one loop that looks after them.
//!
//! ```text
//!   poll: pidfd of every rank | its stdout and stderr | signals | room in our own stdout and stderr
//! ```
//!
//! Nothing outlives the job: every rank leads a process group, which is killed when the rank ends; the kernel kills a
//! rank whose launcher dies (PR_SET_PDEATHSIG), and a rank behind a shell notices by the lifeline, a pipe whose other end
//! only the launcher has. Sockets have no name and shared memory has none, so there is nothing else to leave.

use std::ffi::OsString;
use std::io::ErrorKind;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::io::{Errno, FdFlags};
use rustix::pipe::PipeFlags;
use rustix::process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions};

use super::output::{Sink, Source};
use super::signals::Signals;
use super::{LaunchOptions, Outcome, check_world_size};
use crate::error::{Error, Result};
use crate::world::environment::variable;
use crate::world::frame::{hex, random_nonce, until};
use crate::world::meeting::Nameless;

/// Between SIGTERM and SIGKILL for the ranks that are left when one has failed; their job cannot go on.
const FAILURE_GRACE: Duration = Duration::from_secs(5);
/// How long output is still passed on once every rank has ended.
const OUTPUT_GRACE: Duration = Duration::from_secs(2);
/// Exit code of a job that ran out of its time, as timeout(1) has it.
const TIMED_OUT: i32 = 124;

/// One rank's process.
#[derive(Debug)]
struct Rank {
    rank: u32,
    pid: Pid,
    pidfd: OwnedFd,
    running: bool,
}

/// The ranks that were started. Whatever happens, none is left when this is gone.
#[derive(Debug, Default)]
struct Ranks(Vec<Rank>);

impl Drop for Ranks {
    fn drop(&mut self) {
        for rank in self.0.iter_mut().filter(|rank| rank.running) {
            rank.signal_group(Signal::KILL);
            rank.reap();
        }
    }
}

impl Rank {
    /// To the rank and whatever it started in its group. The leader is not reaped yet, so the number is still its own.
    fn signal_group(&self, signal: Signal) {
        let _ = rustix::process::kill_process_group(self.pid, signal);
    }

    /// How the process ended; it must have. Takes the rest of its group along.
    fn reap(&mut self) -> End {
        let wait = |options| rustix::process::waitid(WaitId::PidFd(self.pidfd.as_fd()), options);
        // Seen first without reaping: while the dead leader is there, its number cannot be somebody else's.
        while matches!(wait(WaitIdOptions::EXITED | WaitIdOptions::NOWAIT), Err(Errno::INTR)) {}
        self.signal_group(Signal::KILL);
        self.running = false;
        let status = loop {
            match wait(WaitIdOptions::EXITED) {
                Err(Errno::INTR) => {}
                status => break status,
            }
        };
        let (code, signal, how) = match status {
            Ok(Some(status)) => match (status.exit_status(), status.terminating_signal()) {
                (Some(code), _) => (code, None, format!("ended with exit code {code}")),
                (_, Some(signal)) => {
                    (128 + signal, Signal::from_named_raw(signal), format!("was killed by {}", signal_name(signal)))
                }
                (None, None) => (1, None, "ended".into()),
            },
            other => (1, None, format!("cannot be waited for ({other:?})")),
        };
        let how = format!("rank {} (pid {}) {how}", self.rank, self.pid.as_raw_nonzero());
        End { rank: self.rank, code, signal, how }
    }
}

fn signal_name(number: i32) -> String {
    let name = match Signal::from_named_raw(number) {
        Some(Signal::ABORT) => "SIGABRT",
        Some(Signal::BUS) => "SIGBUS",
        Some(Signal::FPE) => "SIGFPE",
        Some(Signal::HUP) => "SIGHUP",
        Some(Signal::ILL) => "SIGILL",
        Some(Signal::INT) => "SIGINT",
        Some(Signal::KILL) => "SIGKILL",
        Some(Signal::PIPE) => "SIGPIPE",
        Some(Signal::QUIT) => "SIGQUIT",
        Some(Signal::SEGV) => "SIGSEGV",
        Some(Signal::TERM) => "SIGTERM",
        _ => return format!("signal {number}"),
    };
    name.to_owned()
}

/// What makes the job end before its time.
#[derive(Debug)]
struct Ending {
    /// When the ranks that are left are killed.
    kill_at: Instant,
    /// Whether that has happened.
    has_killed: bool,
    /// Whether it is only known that a rank ended with an error of its own: perhaps because it saw another one die before
    /// the launcher did. A process closes its sockets, which its peers notice, before it is gone.
    may_be_consequence: bool,
}

/// How a rank ended.
struct End {
    rank: u32,
    /// In a shell's numbers.
    code: i32,
    /// The signal that ended it.
    signal: Option<Signal>,
    how: String,
}

/// Starts `command` (program, arguments) as `world_size` ranks and returns when all have ended. `name` is what the ranks
/// see as their own name, if not the program's path.
///
/// # Errors
/// [`Error::InvalidArgument`] for a world size outside 1..=64 or an empty command; [`Error::Io`] if a rank cannot be
/// started.
pub(super) fn supervise(
    world_size: u32,
    command: &[OsString],
    name: Option<OsString>,
    options: &LaunchOptions,
) -> Result<Outcome> {
    check_world_size(world_size)?;
    let (program, arguments) = command.split_first().ok_or(Error::InvalidArgument {
        argument: "command",
        value: "nothing".into(),
        accepted: "must name a program",
    })?;
    let mut job = Job::start(world_size, options, &mut || {
        let mut command = Command::new(program);
        command.args(arguments);
        if let Some(name) = &name {
            command.arg0(name);
        }
        command
    })?;
    job.run()
}

struct Job<'a> {
    options: &'a LaunchOptions,
    start: Instant,
    ranks: Ranks,
    sources: Vec<Source>,
    sinks: [Sink; 2],
    signals: Signals,
    ending: Option<Ending>,
    outcome: Outcome,
    interrupts: u32,
    /// Held for its end: when the launcher is gone, so is this, and the ranks see it.
    _lifeline: OwnedFd,
}

impl<'a> Job<'a> {
    fn start(world_size: u32, options: &'a LaunchOptions, command: &mut dyn FnMut() -> Command) -> Result<Job<'a>> {
        // Before the first rank: a signal that comes while they start must reach those that are there.
        let signals = Signals::catch()?;
        let meeting = Nameless::bind()?;
        let job = hex(&random_nonce()?);
        let (lifeline, lifeline_end) =
            rustix::pipe::pipe_with(PipeFlags::CLOEXEC).map_err(|errno| Error::io("the lifeline's pipe", errno))?;
        let own = |fd: BorrowedFd<'_>| {
            rustix::io::fcntl_dupfd_cloexec(fd, 3).map_err(|errno| Error::io("copying an output descriptor", errno))
        };
        let sinks = [Sink::new(own(rustix::stdio::stdout())?), Sink::new(own(rustix::stdio::stderr())?)];
        let mut ranks = Ranks::default();
        let mut sources = Vec::new();
        let width = (world_size - 1).to_string().len();
        for rank in 0..world_size {
            let mut inherited =
                vec![(variable::CONNECT_FD, meeting.inode.as_raw_fd()), (variable::LIFELINE_FD, lifeline.as_raw_fd())];
            if rank == 0 {
                inherited.push((variable::LISTEN_FD, meeting.listener.as_raw_fd()));
            }
            let mut command = command();
            for name in variable::OF_OTHER_LAUNCHERS.iter().chain(&[variable::LISTEN_FD]) {
                command.env_remove(name);
            }
            command.env(variable::RANK, rank.to_string());
            command.env(variable::WORLD_SIZE, world_size.to_string());
            command.env(variable::JOB, &job);
            for (name, fd) in &inherited {
                command.env(name, fd.to_string());
            }
            // A rank is not in the terminal's foreground group: reading the terminal would stop it.
            let reads = rank == 0 && !rustix::termios::isatty(rustix::stdio::stdin());
            command.stdin(if reads { Stdio::inherit() } else { Stdio::null() });
            if options.prefix {
                command.stdout(Stdio::piped()).stderr(Stdio::piped());
            }
            command.process_group(0);
            bind_to_launcher(&mut command, inherited.iter().map(|(_, fd)| *fd).collect());

            let mut child = command
                .spawn()
                .map_err(|error| Error::io(format!("starting {}", command.get_program().to_string_lossy()), error))?;
            let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
            let pid = pid.ok_or_else(|| Error::io("the process id of a rank", Errno::RANGE))?;
            let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::empty()).map_err(|errno| {
                // Not in the list of ranks yet, so it is ended here.
                let _ = child.kill().and_then(|()| child.wait());
                Error::io("pidfd_open of a rank", errno)
            })?;
            ranks.0.push(Rank { rank, pid, pidfd, running: true });
            let streams = [child.stdout.take().map(OwnedFd::from), child.stderr.take().map(OwnedFd::from)];
            for (sink, stream) in streams.into_iter().enumerate() {
                sources.extend(stream.map(|fd| Source::new(fd, sink, rank, width)));
            }
        }
        let outcome = Outcome { code: 0, failure: None };
        let (start, ending) = (Instant::now(), None);
        Ok(Job {
            options,
            start,
            ranks,
            sources,
            sinks,
            signals,
            ending,
            outcome,
            interrupts: 0,
            _lifeline: lifeline_end,
        })
    }

    fn run(&mut self) -> Result<Outcome> {
        while self.ranks.0.iter().any(|rank| rank.running) {
            let now = Instant::now();
            if let Some(ending) = self.ending.as_mut().filter(|ending| now >= ending.kill_at) {
                ending.has_killed = true;
                self.signal_all(Signal::KILL);
            }
            if let (None, Some(timeout)) = (&self.ending, self.options.timeout)
                && self.start.elapsed() >= timeout
            {
                self.fail(TIMED_OUT, format!("the job did not end within {} s", timeout.as_secs_f64()), false);
            }
            self.turn(self.next_deadline())?;
        }
        let last = Instant::now() + OUTPUT_GRACE;
        while Instant::now() < last && (self.sources.iter().any(|source| source.fd.is_some()) || self.has_output()) {
            self.turn(last)?;
        }
        for source in &mut self.sources {
            source.finish(&mut self.sinks[source.sink]);
        }
        while Instant::now() < last && self.has_output() {
            self.turn(last)?;
        }
        Ok(self.outcome.clone())
    }

    fn has_output(&self) -> bool {
        self.sinks.iter().any(Sink::has_work)
    }

    fn next_deadline(&self) -> Instant {
        let far = Instant::now() + Duration::from_secs(3600);
        match (&self.ending, self.options.timeout.and_then(|timeout| self.start.checked_add(timeout))) {
            // Killed once already: look again soon.
            (Some(ending), _) => ending.kill_at.max(Instant::now() + Duration::from_millis(100)),
            (None, Some(end)) => end.min(far),
            (None, None) => far,
        }
    }

    /// Sleeps until something moves and deals with it.
    fn turn(&mut self, deadline: Instant) -> Result<()> {
        enum What {
            Signal,
            Rank(usize),
            Source(usize),
            Sink(usize),
        }
        let mut polled = vec![(What::Signal, PollFd::from_borrowed_fd(self.signals.as_fd(), PollFlags::IN))];
        for (index, rank) in self.ranks.0.iter().enumerate().filter(|(_, rank)| rank.running) {
            polled.push((What::Rank(index), PollFd::from_borrowed_fd(rank.pidfd.as_fd(), PollFlags::IN)));
        }
        for (index, source) in self.sources.iter().enumerate() {
            if let Some(fd) = source.fd.as_ref().filter(|_| self.sinks[source.sink].has_room()) {
                polled.push((What::Source(index), PollFd::from_borrowed_fd(fd.as_fd(), PollFlags::IN)));
            }
        }
        for (index, sink) in self.sinks.iter().enumerate().filter(|(_, sink)| sink.has_work()) {
            polled.push((What::Sink(index), PollFd::from_borrowed_fd(sink.as_fd(), PollFlags::OUT)));
        }
        let (what, mut fds): (Vec<What>, Vec<PollFd<'_>>) = polled.into_iter().unzip();
        match rustix::event::poll(&mut fds, Some(&until(deadline))) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(Error::io("poll of the ranks", errno)),
        }
        let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        let mut ended = Vec::new();
        for (what, _) in what.into_iter().zip(ready).filter(|(_, ready)| *ready) {
            match what {
                What::Signal => self.forward(),
                What::Rank(index) => ended.push(index),
                What::Source(index) => {
                    let source = &mut self.sources[index];
                    source.read_some(&mut self.sinks[source.sink]);
                }
                What::Sink(index) => {
                    self.sinks[index].write_some();
                    if self.sinks[index].is_closed() {
                        // The ranks' next write fails as it would without a launcher.
                        self.sources
                            .iter_mut()
                            .filter(|source| source.sink == index)
                            .for_each(|source| source.fd = None);
                    }
                }
            }
        }
        self.bury(&ended);
        Ok(())
    }

    /// Notes how ranks ended; the first that failed ends the job.
    fn bury(&mut self, ended: &[usize]) {
        let mut ends: Vec<End> = ended.iter().map(|index| self.ranks.0[*index].reap()).collect();
        // Of several that ended together a killed one is the cause, and the others' errors are its consequence.
        ends.sort_by_key(|end| (end.signal.is_none(), end.rank));
        for End { code, signal, how, .. } in ends.into_iter().filter(|end| end.code != 0) {
            match &mut self.ending {
                None => self.fail(code, how, signal.is_none()),
                // Killed, and not by the launcher: what the rank before it reported was the consequence.
                Some(Ending { may_be_consequence, has_killed, .. })
                    if *may_be_consequence
                        && signal.is_some_and(|by| by != Signal::TERM && !(*has_killed && by == Signal::KILL)) =>
                {
                    *may_be_consequence = false;
                    self.outcome = Outcome { code, failure: Some(how) };
                }
                // A rank that ends as it was asked to, by a signal or an error of its own, gives the code; the failure
                // that was the cause stays if there was one.
                Some(_) if self.outcome.code == 0 => self.outcome.code = code,
                Some(_) => {}
            }
        }
    }

    fn fail(&mut self, code: i32, failure: String, may_be_consequence: bool) {
        self.outcome = Outcome { code, failure: Some(failure) };
        let kill_at = Instant::now() + FAILURE_GRACE.min(self.options.grace);
        self.ending = Some(Ending { kill_at, has_killed: false, may_be_consequence });
        self.signal_all(Signal::TERM);
    }

    fn signal_all(&self, signal: Signal) {
        for rank in self.ranks.0.iter().filter(|rank| rank.running) {
            rank.signal_group(signal);
        }
    }

    fn forward(&mut self) {
        for signal in self.signals.take() {
            match signal {
                Signal::TSTP => {
                    self.signal_all(Signal::STOP);
                    let _ = rustix::process::kill_process(rustix::process::getpid(), Signal::STOP);
                    // Continued.
                    self.signal_all(Signal::CONT);
                }
                Signal::USR1 | Signal::USR2 => self.signal_all(signal),
                ending => {
                    self.interrupts += u32::from(ending == Signal::INT);
                    // A second Ctrl-C means it.
                    self.signal_all(if self.interrupts > 1 { Signal::KILL } else { ending });
                    let kill_at = Instant::now() + self.options.grace;
                    let before = self.ending.take().map_or(kill_at, |ending| ending.kill_at.min(kill_at));
                    // From here on ranks die of what the user has sent.
                    self.ending = Some(Ending { kill_at: before, has_killed: false, may_be_consequence: false });
                }
            }
        }
    }
}

/// Makes the child die with the launcher and hands it the descriptors.
fn bind_to_launcher(command: &mut Command, inherited: Vec<i32>) {
    let launcher = rustix::process::getpid();
    let prepare = move || {
        rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
        // The launcher may have died before the line above: then nobody would kill us.
        if rustix::process::getppid() != Some(launcher) {
            return Err(std::io::Error::from(ErrorKind::BrokenPipe));
        }
        for fd in &inherited {
            // SAFETY: these are descriptors that the launcher keeps open until every rank is started; the forked child
            // has copies of them, and this only lets them pass the exec.
            let fd = unsafe { BorrowedFd::borrow_raw(*fd) };
            rustix::io::fcntl_setfd(fd, FdFlags::empty())?;
        }
        Ok(())
    };
    // SAFETY: between fork and exec the closure makes system calls only; it neither allocates nor locks (the error is a
    // plain code).
    unsafe { command.pre_exec(prepare) };
}
