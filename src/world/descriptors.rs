//! Descriptors after the rendezvous: every rank gives one, every rank receives all. For what shared memory cannot hold, such
//! as a right to memory of a device.
//!
//! ```text
//!   every rank   one round of the control plane: all are in this call, which is the same at all of them
//!   rank r       Descriptors { sequence } + its own                 -> rank 0
//!   rank 0       Descriptors { sequence } + all, in rank order      -> every rank, one after the other
//! ```
//!
//! They travel over the sockets of the rendezvous, whose other ends' users were checked when they were connected: nothing is
//! bound, listened on or connected anew. A rank sends again only in its next call, whose round rank 0 enters when it is done
//! with this one, so no socket ever holds more than one frame.
//! Cost: 2 messages a rank; N descriptors under way at a time, because the kernel limits them per user.

use std::io::ErrorKind;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use rustix::io::Errno;

use crate::error::{Error, Result};
use crate::world::control::{Call, Kind, Rounds};
use crate::world::frame::{FRAME_LIMIT_BYTES, Frame, Received, no_descriptor_left, poll_one, receive, send};
use crate::world::rendezvous::PEER_LIMIT;
use crate::world::{Core, World};

/// How often a rank that waits for a frame looks whether the job has failed.
const LOOK: Duration = Duration::from_millis(10);

impl World {
    /// Gives `own` to every rank: the duplicates that this rank receives, in rank order, its own among them, are closed on
    /// exec. Ranks that are threads of one process receive duplicates, too.
    ///
    /// # Errors
    /// [`Error::PeerLost`] if a rank dies or leaves instead; [`Error::RankFailed`] naming one that sends something else, or
    /// does not take what it is sent within 2 s, or has too few descriptors left (`ulimit -n`), which is [`Error::Io`] on that
    /// rank itself; else as [`barrier`](World::barrier). Each of them is the job's fault.
    pub fn exchange_descriptors(&self, own: impl AsFd, timeout: Duration) -> Result<Vec<OwnedFd>> {
        let call = Call { kind: Kind::Descriptors, root: 0, name: "" };
        self.core().control_call(call, timeout, |order, rounds| {
            rounds.exchange(order, &[], 0, |_, _, _| Ok(()))?;
            let mut star = Star { rounds, buffer: vec![0; FRAME_LIMIT_BYTES + 1] };
            star.pass(own.as_fd()).map_err(|error| {
                // Of a peer in the words of all; of this rank in its own.
                if matches!(error, Error::Io { .. }) { self.fail(error) } else { self.raise(error) }
            })
        })
    }
}

/// One exchange as one rank sees it.
struct Star<'a, 'b> {
    rounds: &'a mut Rounds<'b>,
    /// What a frame is read into.
    buffer: Vec<u8>,
}

impl Star<'_, '_> {
    fn pass(&mut self, own: BorrowedFd<'_>) -> Result<Vec<OwnedFd>> {
        let Core { rank, world_size, .. } = *self.rounds.core;
        if rank != 0 {
            self.give(0, &[own])?;
            return self.take(0, world_size as usize);
        }
        let own = own.try_clone_to_owned().map_err(|error| match Errno::from_io_error(&error) {
            Some(Errno::MFILE) => no_descriptor_left("duplicating a descriptor"),
            _ => Error::io("duplicating a descriptor", error),
        })?;
        let mut all = vec![own];
        for peer in 1..world_size {
            all.append(&mut self.take(peer, 1)?);
        }
        let borrowed: Vec<BorrowedFd<'_>> = all.iter().map(AsFd::as_fd).collect();
        (1..world_size).try_for_each(|peer| self.give(peer, &borrowed))?;
        Ok(all)
    }

    fn socket(&self, peer: u32) -> Result<BorrowedFd<'_>> {
        let socket = self.rounds.core.sockets.get(peer as usize).and_then(Option::as_ref);
        socket.map(|socket| socket.as_fd()).ok_or_else(|| self.lost(peer))
    }

    fn lost(&self, peer: u32) -> Error {
        self.rounds.core.lost(peer, self.rounds.call.describe())
    }

    fn failed(&self, peer: u32, reason: String) -> Error {
        Error::RankFailed { rank: peer, reason: format!("{}: {reason}", self.rounds.call.describe()) }
    }

    fn give(&self, peer: u32, fds: &[BorrowedFd<'_>]) -> Result<()> {
        let frame = Frame::Descriptors { sequence: self.rounds.sequence };
        let sent = send(self.socket(peer)?, &frame, fds, Instant::now() + PEER_LIMIT);
        sent.map_err(|error| match &error {
            // It has closed its end; nobody does but by dying or leaving.
            Error::Io { source, .. } if matches!(source.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset) => {
                self.lost(peer)
            }
            _ => self.failed(peer, format!("it does not take descriptors: {error}")),
        })
    }

    /// The `len` descriptors that `peer` sends.
    fn take(&mut self, peer: u32, len: usize) -> Result<Vec<OwnedFd>> {
        let expected = Frame::Descriptors { sequence: self.rounds.sequence };
        loop {
            let mut buffer = std::mem::take(&mut self.buffer);
            let received = receive(self.socket(peer)?, &mut buffer);
            self.buffer = buffer;
            match received {
                Received::Frame(frame, fds) if frame == expected && fds.len() == len => return Ok(fds),
                Received::Frame(frame, fds) => {
                    let count = fds.len();
                    return Err(self.failed(peer, format!("it sent {frame:?} with {count} descriptors, not {len}")));
                }
                Received::Garbage(reason) => return Err(self.failed(peer, format!("it sent {reason}"))),
                Received::Full(.., error) => return Err(error),
                Received::Closed => return Err(self.lost(peer)),
                Received::Nothing => {
                    self.rounds.go_on(|| vec![peer])?;
                    poll_one(self.socket(peer)?, PollFlags::IN, Instant::now() + LOOK)?;
                }
            }
        }
    }
}
