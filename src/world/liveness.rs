//! Who is still alive: one thread per rank that beats, watches the other ranks, and raises the job's fault.
//!
//! | sign | says | after |
//! | --- | --- | --- |
//! | pidfd readable | the process has ended | 0.3-0.4 ms idle, 8 ms under 6 busy loops on 2 cores |
//! | socket closed | the same, also across PID namespaces; and a world dropped by a thread | the same |
//! | heartbeat unchanged, and /proc calls the process stopped | it is stopped | the limit (500 ms) + one beat |
//! | heartbeat unchanged, whatever /proc says | it is frozen, or gets neither processor nor memory | 10 limits |
//! | lifeline closed | our launcher is gone, and nobody else would end this rank: it kills itself | the first figure |
//!
//! Beats are 50 ms apart; 16 busy processes on 2 cores stretched them to 64 ms at most, compilers and 64 MiB reductions
//! beside each other to more than 500, which is why the kernel is asked before anybody is accused. Silence is counted in this
//! thread's own waking time: a pause of this thread adds two beats at most, however long it was, and one longer than
//! the limit starts all counts afresh. So a suspended machine, or a stopped job that goes on, accuses nobody.
//!
//! Cost: 20 wake-ups a second and N loads each.

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, epoll};

use crate::error::{Error, Result};
use crate::world::board::RankState;
use crate::world::frame::until;
use crate::world::rendezvous::Peer;
use crate::world::{Core, IDLE};

/// Time between two beats.
const BEAT: Duration = Duration::from_millis(50);
/// Most silence that one look can add.
const CREDIT_LIMIT: Duration = Duration::from_millis(100);

/// Limits of silence after which a process counts as lost although the kernel does not call it stopped.
const STARVED_LIMITS: u32 = 10;

/// The running thread.
#[derive(Debug)]
pub(crate) struct Monitor {
    thread: Option<JoinHandle<()>>,
    /// Written to end the thread.
    stop: Arc<OwnedFd>,
}

impl Monitor {
    /// Starts beating and watching.
    ///
    /// # Errors
    /// [`Error::Io`] if there is no descriptor or thread left.
    pub(crate) fn start(core: Arc<Core>, peers: Vec<Peer>, lifeline: Option<Arc<OwnedFd>>) -> Result<Monitor> {
        // The first beat is not the thread's, which may begin late: whoever has joined can be missed.
        core.board.beat(core.rank);
        let stop = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|errno| Error::io("eventfd", errno))?;
        let stop = Arc::new(stop);
        let epoll = watched(&stop, &peers, lifeline.as_deref()).map_err(|errno| Error::io("epoll", errno))?;
        let watch = Watch {
            epoll,
            beats: vec![Beats::default(); peers.len()],
            peers,
            last_look: Instant::now(),
            _lifeline: lifeline,
            core,
        };
        let thread = std::thread::Builder::new()
            .name("annulus-monitor".into())
            .stack_size(256 << 10)
            .spawn(move || watch.run())
            .map_err(|error| Error::io("starting the monitor thread", error))?;
        Ok(Monitor { thread: Some(thread), stop })
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        // The thread sleeps in poll at most one beat and takes no lock, so the join is short.
        let _ = rustix::io::write(&*self.stop, &1_u64.to_ne_bytes());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// What was heard of one peer.
#[derive(Debug, Clone, Copy, Default)]
struct Beats {
    last: u64,
    silent: Duration,
}

struct Watch {
    core: Arc<Core>,
    peers: Vec<Peer>,
    beats: Vec<Beats>,
    last_look: Instant,
    /// Waits for all descriptors at once, without a list made anew for every beat.
    epoll: OwnedFd,
    /// Kept open while it is watched.
    _lifeline: Option<Arc<OwnedFd>>,
}

/// What an event belongs to, if it is not the index of a peer.
const STOP: u64 = u64::MAX;
const LIFELINE: u64 = u64::MAX - 1;

/// An epoll of everything that can end a sleep before its time.
fn watched(stop: &OwnedFd, peers: &[Peer], lifeline: Option<&OwnedFd>) -> rustix::io::Result<OwnedFd> {
    let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    epoll::add(&epoll, stop, epoll::EventData::new_u64(STOP), epoll::EventFlags::IN)?;
    if let Some(lifeline) = lifeline {
        // A hang-up is always told.
        epoll::add(&epoll, lifeline, epoll::EventData::new_u64(LIFELINE), epoll::EventFlags::empty())?;
    }
    for (index, peer) in peers.iter().enumerate() {
        let of_peer = || epoll::EventData::new_u64(index as u64);
        if let Some(pidfd) = &peer.pidfd {
            epoll::add(&epoll, pidfd, of_peer(), epoll::EventFlags::IN)?;
        }
        if let Some(socket) = &peer.socket {
            // Of the hang-up alone: frames are for who waits for them.
            epoll::add(&epoll, socket, of_peer(), epoll::EventFlags::empty())?;
        }
    }
    Ok(epoll)
}

impl Watch {
    fn run(mut self) {
        let mut next_beat = Instant::now();
        loop {
            if Instant::now() >= next_beat {
                self.core.board.beat(self.core.rank);
                self.listen();
                self.core.visit_outposts();
                next_beat = Instant::now() + BEAT;
            }
            match self.look(next_beat) {
                Look::Stop => return,
                Look::Quiet => {}
                Look::Ended(index) => self.bury(index),
                Look::Orphaned => {
                    tracing::error!(rank = self.core.rank, "the launcher is gone: this rank ends");
                    let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
                }
            }
        }
    }

    /// Sleeps until the next beat or until a peer ends.
    fn look(&mut self, next_beat: Instant) -> Look {
        let mut events = [epoll::Event { flags: epoll::EventFlags::empty(), data: epoll::EventData::new_u64(0) }; 4];
        let Ok(count) = epoll::wait(&self.epoll, &mut events[..], Some(&until(next_beat))) else { return Look::Quiet };
        let ready = events[..count].iter().map(|event| event.data.u64());
        // The stop comes first: whoever leaves does not bury those who leave with it.
        match ready.max() {
            None => Look::Quiet,
            Some(STOP) => Look::Stop,
            Some(LIFELINE) => Look::Orphaned,
            Some(index) => Look::Ended(index as usize),
        }
    }

    /// A peer's process has ended, or it has closed its socket.
    fn bury(&mut self, index: usize) {
        let peer = &mut self.peers[index];
        // Said expressly, because a duplicate elsewhere would keep it ready for ever. It cannot fail: it was added.
        if let Some(pidfd) = peer.pidfd.take() {
            let _ = epoll::delete(&self.epoll, pidfd);
        }
        if let Some(socket) = peer.socket.take() {
            let _ = epoll::delete(&self.epoll, socket);
        }
        if self.core.board.state(peer.rank) != RankState::Left {
            let lost = Error::PeerLost { rank: peer.rank, pid: peer.pid, operation: IDLE.into() };
            self.core.raise(lost);
        }
    }

    /// Counts the silence of every peer, once a beat.
    fn listen(&mut self) {
        let gap = self.last_look.elapsed();
        self.last_look = Instant::now();
        let Some(limit) = self.core.options.heartbeat_limit else { return };
        for (peer, beats) in self.peers.iter().zip(&mut self.beats) {
            let now = self.core.board.beats(peer.rank);
            if now != beats.last || gap > limit {
                *beats = Beats { last: now, silent: Duration::ZERO };
                continue;
            }
            if now == 0 {
                continue; // has not begun: the deadline of the rendezvous counts, not this one
            }
            beats.silent += gap.min(CREDIT_LIMIT);
            let is_lost = beats.silent > limit && (is_stopped(peer) || beats.silent > limit * STARVED_LIMITS);
            if is_lost && self.core.board.state(peer.rank) == RankState::Joined {
                self.core.raise(Error::PeerStopped {
                    rank: peer.rank,
                    pid: peer.pid,
                    silent_ms: beats.silent.as_millis() as u64,
                    limit_ms: limit.as_millis() as u64,
                    operation: IDLE.into(),
                });
                beats.silent = Duration::ZERO;
            }
        }
    }
}

/// Whether the kernel says that the peer's process is stopped, by a signal or by a debugger. Where it cannot be asked, as
/// across PID namespaces, silence is all there is, and means yes.
fn is_stopped(peer: &Peer) -> bool {
    let Some(pidfd) = &peer.pidfd else { return false }; // a thread of this process, which is running
    let read = |path: String| std::fs::read_to_string(path).ok();
    let state = || {
        // The descriptor knows the number that the process has in this /proc.
        let info = read(format!("/proc/self/fdinfo/{}", pidfd.as_raw_fd()))?;
        let pid = info.lines().find_map(|line| line.strip_prefix("Pid:"))?.trim();
        read(format!("/proc/{pid}/stat"))?.rsplit_once(") ")?.1.chars().next()
    };
    matches!(state(), None | Some('T' | 't'))
}

enum Look {
    Quiet,
    Stop,
    Ended(usize),
    Orphaned,
}

#[cfg(all(test, not(loom)))]
mod tests {
    use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};

    use super::*;

    /// A process that only gets no processor must not be accused; one that is stopped must.
    #[test]
    fn p02_the_kernel_tells_a_stopped_process_from_a_slow_one() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let pid = Pid::from_child(&child);
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).unwrap();
        let peer = Peer { rank: 1, pid: child.id(), pidfd: Some(pidfd), socket: None };
        let start = Instant::now();
        for (signal, expected) in [(Signal::CONT, false), (Signal::STOP, true), (Signal::CONT, false)] {
            kill_process(pid, signal).unwrap();
            while is_stopped(&peer) != expected {
                assert!(start.elapsed() < Duration::from_secs(30), "after {signal:?}");
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(is_stopped(&peer), "who cannot be asked about is judged by silence alone");
        assert!(!is_stopped(&Peer { pidfd: None, ..peer }), "this process is running");
    }
}
