//! How ranks meet: a star over rank 0, on one Unix socket, before there is shared memory.
//!
//! ```text
//!   rank r                                        rank 0
//!   connect, check the listener's user            accept, check the peer's user
//!                      <- Greeting { nonce }
//!   Hello { nonce, job, rank, .. } + arena, pidfd ->         (2 s; strangers are refused and closed)
//!                      <- Missing { ranks }                  (whenever somebody came)
//!                      <- Welcome { processes } + board, all arenas, all pidfds      (one rank at a time)
//!   map, check the board's header;  Ready ->
//! ```
//!
//! Rank 0 serves all connections from one loop, so a slow or hostile client keeps nobody waiting. The connections stay
//! open for the life of the world: their closing is a sign of death that works across PID namespaces, and descriptors travel
//! over them later (`descriptors`).
//! Cost: 3 messages a rank, about 0.1 ms each, after the last rank has come.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::net::SocketFlags;

use crate::error::{Error, Result};
use crate::world::board::{Board, MAX_RANKS};
use crate::world::frame::{
    FRAME_LIMIT_BYTES, Frame, Process, Received, from_hex, hex, poll_one, random_nonce, receive, send, until,
};
use crate::world::meeting::{Listening, NotConnected, Place, connect, same_user};
use crate::world::segment::Segment;

/// How long a client may take for its hello, and a rank to take a frame.
pub(crate) const PEER_LIMIT: Duration = Duration::from_secs(2);
/// Connections that have not said hello yet; further ones wait in the kernel's queue.
const STRANGERS_LIMIT: usize = 64;
/// Descriptors of a hello: the rank's arena and its pidfd.
const HELLO_FDS: usize = 2;
/// Pause between two looks for a rank 0 that is not there yet.
const RETRY_PAUSE: Duration = Duration::from_millis(10);
/// How much longer than rank 0 the others wait, so that rank 0's verdict, with its list of names, comes first.
const VERDICT_GRACE: Duration = Duration::from_secs(1);

const OPERATION: &str = "the rendezvous";

/// Who meets whom.
#[derive(Debug, Clone)]
pub(crate) struct Party {
    pub(crate) rank: u32,
    pub(crate) world_size: u32,
    pub(crate) place: Place,
    /// What all ranks of the job, and no others, know.
    pub(crate) job: String,
    pub(crate) timeout: Duration,
}

/// What a rank has when all have met.
#[derive(Debug)]
pub(crate) struct Met {
    pub(crate) board: Board,
    /// Of every rank, in rank order.
    pub(crate) arenas: Vec<Segment>,
    pub(crate) peers: Vec<Peer>,
}

/// What a rank holds of another to notice its death.
#[derive(Debug)]
pub(crate) struct Peer {
    pub(crate) rank: u32,
    pub(crate) pid: u32,
    /// Readable once the process has ended. None for ranks that are threads of this process.
    pub(crate) pidfd: Option<OwnedFd>,
    /// Rank 0 has one to everybody, everybody one to rank 0.
    pub(crate) socket: Option<Arc<OwnedFd>>,
}

/// Meets the other ranks. `arena` is this rank's; every rank receives everybody's.
///
/// # Errors
/// [`Error::RanksMissing`] at the deadline, [`Error::RendezvousRefused`], [`Error::PeerLost`] if a rank dies meanwhile,
/// [`Error::NoSpace`] and [`Error::Io`].
pub(crate) fn meet(party: &Party, arena: Segment) -> Result<Met> {
    let deadline = Instant::now().checked_add(party.timeout).unwrap_or_else(far_away);
    if party.world_size == 1 {
        let board = Board::create(1, random_nonce()?)?;
        return Ok(Met { board, arenas: vec![arena], peers: Vec::new() });
    }
    if party.rank == 0 { Server::open(party, deadline)?.run(arena) } else { join(party, arena, deadline) }
}

/// A deadline that does not come: what a timeout too large for the clock means.
fn far_away() -> Instant {
    Instant::now() + Duration::from_secs(60 * 60 * 24 * 365)
}

fn own_pidfd() -> Result<OwnedFd> {
    rustix::process::pidfd_open(rustix::process::getpid(), rustix::process::PidfdFlags::empty())
        .map_err(|errno| Error::io("pidfd_open of this process", errno))
}

fn refused(place: &Place, reason: String) -> Error {
    Error::RendezvousRefused { place: place.to_string(), reason }
}

// ---- rank 0 ------------------------------------------------------------------------------------------------------------

/// A rank that said hello.
struct Member {
    process: Process,
    socket: OwnedFd,
    arena: Segment,
    pidfd: OwnedFd,
}

/// A connection that has not said hello yet.
struct Stranger {
    socket: OwnedFd,
    deadline: Instant,
}

struct Server<'a> {
    party: &'a Party,
    /// Gone, with its name, once all have come.
    listening: Option<Listening>,
    nonce: [u8; 16],
    start: Instant,
    deadline: Instant,
    /// By rank; its own place stays empty.
    members: Vec<Option<Member>>,
    strangers: Vec<Stranger>,
    buffer: Vec<u8>,
}

impl<'a> Server<'a> {
    fn open(party: &'a Party, deadline: Instant) -> Result<Self> {
        Ok(Server {
            party,
            listening: Some(Listening::open(&party.place)?),
            nonce: random_nonce()?,
            start: Instant::now(),
            deadline,
            members: (0..party.world_size).map(|_| None).collect(),
            strangers: Vec::new(),
            buffer: vec![0; FRAME_LIMIT_BYTES + 1],
        })
    }

    fn missing(&self) -> Vec<u32> {
        (1..self.party.world_size).filter(|rank| self.members[*rank as usize].is_none()).collect()
    }

    fn run(mut self, arena: Segment) -> Result<Met> {
        let gathered = self.gather();
        // The name goes first: whatever comes next, nobody else is to come here.
        self.strangers.clear();
        self.listening = None;
        let handed_out = gathered
            .and_then(|()| Board::create(self.party.world_size, self.nonce))
            .and_then(|board| self.hand_out(&board, &arena).map(|()| board));
        match handed_out {
            Ok(board) => Ok(self.into_met(board, arena)),
            Err(error) => {
                self.tell_all(&verdict(&error));
                Err(error)
            }
        }
    }

    /// Serves connections until every rank has said hello.
    fn gather(&mut self) -> Result<()> {
        while !self.missing().is_empty() {
            let now = Instant::now();
            if now >= self.deadline {
                return Err(Error::RanksMissing {
                    rank: 0,
                    missing: self.missing(),
                    world_size: self.party.world_size,
                    waited_ms: self.start.elapsed().as_millis() as u64,
                    place: self.party.place.to_string(),
                });
            }
            let (listener_ready, ready) = self.poll()?;
            self.check_members(&ready)?;
            self.serve_strangers(&ready)?;
            if listener_ready {
                self.accept();
            }
        }
        Ok(())
    }

    /// Sleeps until something moves; which descriptors did, and whether the listener is one of them.
    fn poll(&self) -> Result<(bool, Vec<i32>)> {
        let sockets = self.strangers.iter().map(|stranger| stranger.socket.as_fd());
        let sockets = sockets.chain(self.members.iter().flatten().map(|member| member.socket.as_fd()));
        let mut polled: Vec<PollFd<'_>> =
            sockets.map(|socket| PollFd::from_borrowed_fd(socket, PollFlags::IN)).collect();
        let listener = self.listening.as_ref().filter(|_| self.strangers.len() < STRANGERS_LIMIT);
        if let Some(listener) = listener {
            polled.push(PollFd::from_borrowed_fd(listener.socket.as_fd(), PollFlags::IN));
        }
        let next = self.strangers.iter().map(|stranger| stranger.deadline).min();
        let wake = next.map_or(self.deadline, |next| next.min(self.deadline));
        match rustix::event::poll(&mut polled, Some(&until(wake))) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(Error::io("poll of the rendezvous", errno)),
        }
        let listener_ready = listener.is_some() && polled.pop().is_some_and(|polled| !polled.revents().is_empty());
        let ready = polled.iter().filter(|polled| !polled.revents().is_empty());
        Ok((listener_ready, ready.map(|polled| polled.as_fd().as_raw_fd()).collect()))
    }

    fn accept(&mut self) {
        let Some(listener) = self.listening.as_ref().map(|listening| listening.socket.clone()) else { return };
        while self.strangers.len() < STRANGERS_LIMIT {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let socket = match rustix::net::accept_with(&*listener, flags) {
                Ok(socket) => socket,
                Err(Errno::INTR) => continue,
                Err(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM) => {
                    // The connection stays queued; do not spin on it.
                    std::thread::sleep(RETRY_PAUSE);
                    return;
                }
                Err(_) => return,
            };
            if let Err(reason) = same_user(&socket) {
                tracing::warn!(reason, "rendezvous: connection refused");
                continue;
            }
            let deadline = Instant::now() + PEER_LIMIT;
            if send(socket.as_fd(), &Frame::Greeting { nonce: hex(&self.nonce) }, &[], deadline).is_ok() {
                self.strangers.push(Stranger { socket, deadline });
            }
        }
    }

    /// Members say nothing before they are welcomed; what moves is their end.
    fn check_members(&mut self, ready: &[i32]) -> Result<()> {
        for rank in 1..self.party.world_size {
            let Some(member) = &self.members[rank as usize] else { continue };
            if !ready.contains(&member.socket.as_raw_fd()) {
                continue;
            }
            match receive(member.socket.as_fd(), &mut self.buffer) {
                Received::Nothing => {}
                Received::Closed => {
                    return Err(Error::PeerLost { rank, pid: member.process.pid, operation: OPERATION.into() });
                }
                Received::Frame(frame, _) | Received::Full(frame, ..) => {
                    return Err(refused(&self.party.place, format!("rank {rank} sent {frame:?} after its hello")));
                }
                Received::Garbage(reason) => {
                    return Err(refused(&self.party.place, format!("rank {rank} sent {reason} after its hello")));
                }
            }
        }
        Ok(())
    }

    fn serve_strangers(&mut self, ready: &[i32]) -> Result<()> {
        let now = Instant::now();
        let mut index = 0;
        while index < self.strangers.len() {
            let stranger = &self.strangers[index];
            let received = if ready.contains(&stranger.socket.as_raw_fd()) {
                receive(stranger.socket.as_fd(), &mut self.buffer)
            } else {
                Received::Nothing
            };
            match received {
                Received::Nothing if now < stranger.deadline => index += 1,
                Received::Nothing => {
                    let stranger = self.strangers.swap_remove(index);
                    let _ = send(stranger.socket.as_fd(), &Frame::TooSlow, &[], now);
                }
                Received::Closed => drop(self.strangers.swap_remove(index)),
                Received::Garbage(reason) => {
                    let stranger = self.strangers.swap_remove(index);
                    refuse(&stranger.socket, reason);
                }
                Received::Full(frame, received, error) => {
                    let stranger = self.strangers.swap_remove(index);
                    match self.identify(&frame) {
                        // As many as there are in a hello, and more that there was no room for.
                        Ok(_) if received >= HELLO_FDS => refuse(&stranger.socket, wrong_count(received + 1)),
                        Ok(_) => {
                            refuse(&stranger.socket, format!("rank 0 gave up: {error}"));
                            return Err(error);
                        }
                        Err(reason) => refuse(&stranger.socket, reason),
                    }
                }
                Received::Frame(frame, fds) => {
                    let stranger = self.strangers.swap_remove(index);
                    match self.admit(&frame, fds) {
                        Ok((rank, process, arena, pidfd)) => {
                            let member = Member { process, socket: stranger.socket, arena, pidfd };
                            self.members[rank as usize] = Some(member);
                            self.tell_all(&Frame::Missing { ranks: self.missing() });
                        }
                        Err(reason) => refuse(&stranger.socket, reason),
                    }
                }
            }
        }
        Ok(())
    }

    /// The rank that a hello makes a member, or why it does not.
    fn admit(&self, frame: &Frame, fds: Vec<OwnedFd>) -> std::result::Result<(u32, Process, Segment, OwnedFd), String> {
        let (rank, process) = self.identify(frame)?;
        let [arena, pidfd] = <[OwnedFd; HELLO_FDS]>::try_from(fds).map_err(|fds| wrong_count(fds.len()))?;
        let arena = Segment::from_fd(arena).map_err(|error| error.to_string())?;
        Ok((rank, process, arena, pidfd))
    }

    /// The rank that says this hello, or why it is none that is awaited.
    fn identify(&self, frame: &Frame) -> std::result::Result<(u32, Process), String> {
        let &Frame::Hello { ref nonce, ref job, rank, world_size, process } = frame else {
            return Err("a hello was expected".into());
        };
        if from_hex(nonce) != Some(self.nonce) {
            return Err(format!("the hello answers another greeting (nonce {nonce:.32})"));
        }
        if *job != self.party.job {
            return Err(format!("the hello is for job {job:.200}; this is job {}", self.party.job));
        }
        if world_size != self.party.world_size {
            return Err(format!("rank {rank} expects {world_size} ranks, rank 0 expects {}", self.party.world_size));
        }
        if rank == 0 || rank >= world_size {
            return Err(format!("rank {rank} is not one of 1..{world_size}"));
        }
        if let Some(member) = &self.members[rank as usize] {
            return Err(format!("rank {rank} is here already (pid {})", member.process.pid));
        }
        Ok((rank, process))
    }

    /// Best effort: who does not take it is noticed by its silence.
    fn tell_all(&self, frame: &Frame) {
        for member in self.members.iter().flatten() {
            let _ = send(member.socket.as_fd(), frame, &[], Instant::now());
        }
    }

    fn into_met(mut self, board: Board, arena: Segment) -> Met {
        let mut arenas = vec![arena];
        let mut peers = Vec::new();
        for (rank, member) in (0..).zip(self.members.drain(..)) {
            let Some(Member { process, socket, mut arena, pidfd }) = member else { continue };
            arena.close_fd();
            arenas.push(arena);
            let pidfd = (process != Process::this()).then_some(pidfd);
            peers.push(Peer { rank, pid: process.pid, pidfd, socket: Some(Arc::new(socket)) });
        }
        Met { board, arenas, peers }
    }

    /// Hands everything to every rank, one after the other: that bounds the descriptors under way, which the kernel
    /// limits per user.
    fn hand_out(&mut self, board: &Board, arena: &Segment) -> Result<()> {
        let own_pidfd = own_pidfd()?;
        let processes: Vec<Process> = self
            .members
            .iter()
            .map(|member| member.as_ref().map_or(Process::this(), |member| member.process))
            .collect();
        let closed = || Error::io("handing out shared memory", Errno::BADF);
        let mut fds = vec![board.fd().ok_or_else(closed)?, arena.fd().ok_or_else(closed)?];
        for member in self.members.iter().flatten() {
            fds.push(member.arena.fd().ok_or_else(closed)?);
        }
        fds.push(own_pidfd.as_fd());
        fds.extend(self.members.iter().flatten().map(|member| member.pidfd.as_fd()));
        for (rank, member) in (0..).zip(&self.members) {
            let Some(member) = member else { continue };
            let lost = || Error::PeerLost { rank, pid: member.process.pid, operation: OPERATION.into() };
            let deadline = (Instant::now() + PEER_LIMIT).max(self.deadline);
            send(member.socket.as_fd(), &Frame::Welcome { processes: processes.clone() }, &fds, deadline)
                .map_err(|_| lost())?;
            match await_frame(member.socket.as_fd(), &mut self.buffer, deadline)? {
                Received::Frame(Frame::Ready, _) => {}
                Received::Frame(Frame::Refused { reason }, _) => return Err(Error::RankFailed { rank, reason }),
                Received::Frame(..) | Received::Garbage(_) | Received::Closed => return Err(lost()),
                Received::Full(.., error) => return Err(error),
                Received::Nothing => {
                    return Err(Error::RanksMissing {
                        rank: 0,
                        missing: vec![rank],
                        world_size: self.party.world_size,
                        waited_ms: self.start.elapsed().as_millis() as u64,
                        place: self.party.place.to_string(),
                    });
                }
            }
        }
        Ok(())
    }
}

fn wrong_count(received: usize) -> String {
    format!("a hello brings {HELLO_FDS} descriptors, this one brought {received} at least")
}

fn refuse(socket: &OwnedFd, reason: String) {
    tracing::warn!(reason, "rendezvous: client refused");
    let _ = send(socket.as_fd(), &Frame::Refused { reason }, &[], Instant::now());
}

/// What rank 0 tells the others when the job cannot start.
fn verdict(error: &Error) -> Frame {
    match error {
        Error::RanksMissing { missing, waited_ms, .. } => {
            Frame::GaveUp { ranks: missing.clone(), waited_ms: *waited_ms }
        }
        Error::PeerLost { rank, pid, .. } => Frame::Lost { rank: *rank, pid: *pid },
        other => Frame::Refused { reason: format!("rank 0 gave up: {other}") },
    }
}

fn await_frame(socket: BorrowedFd<'_>, buffer: &mut [u8], deadline: Instant) -> Result<Received> {
    loop {
        match receive(socket, buffer) {
            Received::Nothing if Instant::now() < deadline => poll_one(socket, PollFlags::IN, deadline)?,
            received => return Ok(received),
        }
    }
}

// ---- the other ranks ---------------------------------------------------------------------------------------------------

/// Meets rank 0 from any other rank.
fn join(party: &Party, arena: Segment, deadline: Instant) -> Result<Met> {
    let start = Instant::now();
    let mut buffer = vec![0; FRAME_LIMIT_BYTES + 1];
    let own_pidfd = own_pidfd()?;
    let arena_fd = arena.fd().ok_or_else(|| Error::io("handing over the arena", Errno::BADF))?;
    // Until rank 0 says more, it is the one that is missing.
    let mut missing = vec![0];
    loop {
        let given_up = |missing: &[u32], waited: Duration| Error::RanksMissing {
            rank: party.rank,
            missing: missing.to_vec(),
            world_size: party.world_size,
            waited_ms: waited.as_millis() as u64,
            place: party.place.to_string(),
        };
        if Instant::now() >= deadline {
            return Err(given_up(&missing, start.elapsed()));
        }
        let socket = match connect(&party.place) {
            Ok(socket) => socket,
            Err(NotConnected::NotYet) => {
                std::thread::sleep(RETRY_PAUSE.min(deadline.saturating_duration_since(Instant::now())));
                continue;
            }
            Err(NotConnected::Gone) => {
                return Err(Error::PeerLost { rank: 0, pid: 0, operation: OPERATION.into() });
            }
            Err(NotConnected::Failed(error)) => return Err(error),
        };
        same_user(&socket).map_err(|reason| refused(&party.place, reason))?;
        let mut greeted = None;
        let mut verdict_by = deadline;
        loop {
            match await_frame(socket.as_fd(), &mut buffer, verdict_by)? {
                Received::Nothing => return Err(given_up(&missing, start.elapsed())),
                Received::Closed if greeted.is_some() => {
                    return Err(Error::PeerLost { rank: 0, pid: 0, operation: OPERATION.into() });
                }
                // Not served yet, or served too late: once more.
                Received::Closed | Received::Frame(Frame::TooSlow, _) => {
                    std::thread::sleep(RETRY_PAUSE);
                    break;
                }
                Received::Garbage(reason) => return Err(refused(&party.place, format!("rank 0 sent {reason}"))),
                Received::Full(.., error) => {
                    let told = Frame::Refused { reason: error.to_string() };
                    let _ = send(socket.as_fd(), &told, &[], Instant::now() + PEER_LIMIT); // or it sees that this rank is gone
                    return Err(error);
                }
                Received::Frame(Frame::Greeting { nonce }, _) if greeted.is_none() => {
                    greeted = from_hex(&nonce);
                    let hello = Frame::Hello {
                        nonce,
                        job: party.job.clone(),
                        rank: party.rank,
                        world_size: party.world_size,
                        process: Process::this(),
                    };
                    let limit = Instant::now() + PEER_LIMIT;
                    if send(socket.as_fd(), &hello, &[arena_fd, own_pidfd.as_fd()], limit).is_err() {
                        break;
                    }
                    missing = Vec::new();
                    verdict_by = deadline.checked_add(VERDICT_GRACE).unwrap_or(deadline);
                }
                Received::Frame(Frame::Missing { ranks }, _) => missing = ranks,
                Received::Frame(Frame::GaveUp { ranks, waited_ms }, _) => {
                    return Err(given_up(&ranks, Duration::from_millis(waited_ms)));
                }
                Received::Frame(Frame::Refused { reason }, _) => return Err(refused(&party.place, reason)),
                Received::Frame(Frame::Lost { rank, pid }, _) => {
                    return Err(Error::PeerLost { rank, pid, operation: OPERATION.into() });
                }
                Received::Frame(Frame::Welcome { processes }, fds) => {
                    let met = greeted
                        .ok_or_else(|| refused(&party.place, "rank 0 did not greet".into()))
                        .and_then(|nonce| take_up(party, arena, nonce, &processes, fds));
                    let answer = match &met {
                        Ok(_) => Frame::Ready,
                        Err(error) => Frame::Refused { reason: error.to_string() },
                    };
                    let sent = send(socket.as_fd(), &answer, &[], Instant::now() + PEER_LIMIT);
                    let mut met = met?;
                    sent?;
                    // Rank 0 is the first of the peers.
                    if let Some(rank_0) = met.peers.first_mut() {
                        rank_0.socket = Some(Arc::new(socket));
                    }
                    return Ok(met);
                }
                Received::Frame(frame, _) => {
                    return Err(refused(&party.place, format!("rank 0 sent {frame:?} out of turn")));
                }
            }
        }
    }
}

/// Maps what came with the welcome.
fn take_up(party: &Party, arena: Segment, nonce: [u8; 16], processes: &[Process], fds: Vec<OwnedFd>) -> Result<Met> {
    let ranks = party.world_size as usize;
    if processes.len() != ranks || fds.len() != 1 + 2 * ranks || ranks > MAX_RANKS as usize {
        let counts = format!("the welcome brought {} processes and {} descriptors", processes.len(), fds.len());
        return Err(refused(&party.place, counts));
    }
    let mut fds = fds.into_iter();
    let mut next = || fds.next().ok_or_else(|| refused(&party.place, "the welcome is short of descriptors".into()));
    let board = Board::open(next()?, party.world_size, nonce)?;
    let mut arenas = Vec::with_capacity(ranks);
    for _ in 0..party.rank {
        arenas.push(peer_arena(next()?)?);
    }
    drop(next()?); // this rank's own, which is mapped already
    arenas.push(arena);
    for _ in party.rank + 1..party.world_size {
        arenas.push(peer_arena(next()?)?);
    }
    let mut peers = Vec::with_capacity(ranks - 1);
    for (rank, process) in (0..).zip(processes) {
        let pidfd = next()?;
        if rank != party.rank {
            let pidfd = (*process != Process::this()).then_some(pidfd);
            peers.push(Peer { rank, pid: process.pid, pidfd, socket: None });
        }
    }
    Ok(Met { board, arenas, peers })
}

fn peer_arena(fd: OwnedFd) -> Result<Segment> {
    let mut arena = Segment::from_fd(fd)?;
    arena.close_fd();
    Ok(arena)
}
