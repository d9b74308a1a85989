//! The control plane: barrier, broadcast of bytes and values, gather of bytes, boolean decisions. Small, host only, for
//! what is said between training steps; gradients do not travel here. (Descriptors: `descriptors`.)
//!
//! Every call is one or more rounds, and every round is the same exchange over one mailbox a rank:
//!
//! ```text
//!   generation += 1
//!   own mailbox, slot generation % 2  <-  { kind, root, name, lengths, up to 16 KiB }      then post(generation)
//!   for every peer: wait until its flag reaches the generation, compare what it called, read its slot
//! ```
//!
//! Two slots suffice: a rank writes generation g+1 into the slot of g-1 only after it saw every peer post g, and a peer
//! posts g only after it has read all of g-1. Because each round carries what was called, ranks that call different
//! things all learn it in the same round, before anything of it is used.
//!
//! Cost: one round a call, N posts and N(N-1) reads of a header; a broadcast of B bytes takes ceil(B / 16 KiB) rounds.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{MutexGuard, TryLockError};
use std::time::{Duration, Instant};

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::{Error, Result};
use crate::telemetry::now_ns;
use crate::world::board::RankState;
use crate::world::flag::{Flag, Pacing, reached};
use crate::world::recorder::Record;
use crate::world::{Core, IDLE, World};

const SLOT_BYTES: usize = 16 << 10;
const NAME_BYTES: usize = 64;
/// Most bytes one rank may give to [`World::all_gather_bytes`].
pub const GATHER_LIMIT_BYTES: usize = 16 << 20;

/// One rank's side of the exchange; written by that rank, read by all.
#[repr(C, align(128))]
pub(crate) struct Mailbox {
    flag: Flag,
    slots: [Slot; 2],
}

/// What a rank called, and its bytes. Relaxed throughout: published by `flag.post`, read after `flag.wait`.
#[repr(C, align(64))]
struct Slot {
    kind: AtomicU64,
    root: AtomicU64,
    /// Length of the whole contribution.
    total_bytes: AtomicU64,
    name: [AtomicU64; NAME_BYTES / 8],
    payload: [AtomicU64; SLOT_BYTES / 8],
}

#[cfg(not(loom))]
const _: () = assert!(std::mem::offset_of!(Mailbox, slots) == 64 && std::mem::offset_of!(Slot, payload) == 88);
#[cfg(not(loom))]
const _: () = assert!(size_of::<Mailbox>() == (64 + 2 * size_of::<Slot>()).next_multiple_of(128));

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
pub(super) enum Kind {
    Barrier = 1,
    Broadcast = 2,
    AllGather = 3,
    Decision = 4,
    Descriptors = 5,
}

/// One control call as it is told to the peers.
#[derive(Clone, Copy)]
pub(super) struct Call<'a> {
    pub(super) kind: Kind,
    pub(super) root: u32,
    pub(super) name: &'a str,
}

/// This rank's place in the order of control calls.
#[derive(Debug, Default)]
pub(crate) struct Order {
    generation: u32,
    sequence: u64,
}

fn store_bytes(words: &[AtomicU64], bytes: &[u8]) {
    for (word, chunk) in words.iter().zip(bytes.chunks(8)) {
        let mut padded = [0; 8];
        padded[..chunk.len()].copy_from_slice(chunk);
        word.store(u64::from_le_bytes(padded), Ordering::Relaxed);
    }
}

fn load_bytes(words: &[AtomicU64], len_bytes: usize, into: &mut Vec<u8>) {
    let end = into.len() + len_bytes;
    for word in &words[..len_bytes.div_ceil(8)] {
        into.extend_from_slice(&word.load(Ordering::Relaxed).to_le_bytes());
    }
    into.truncate(end);
}

/// `name` as it fits a slot: at most [`NAME_BYTES`], zero padded.
fn fixed_name(name: &str) -> [u8; NAME_BYTES] {
    let mut fixed = [0; NAME_BYTES];
    for (to, from) in fixed.iter_mut().zip(name.bytes()) {
        *to = from;
    }
    fixed
}

fn describe(kind: u64, root: u64, name: &[u8]) -> String {
    let name = String::from_utf8_lossy(name);
    let name = name.trim_end_matches('\0');
    match kind {
        kind if kind == Kind::Barrier as u64 => format!("barrier {name:?}"),
        kind if kind == Kind::Broadcast as u64 => format!("broadcast of {name} from rank {root}"),
        kind if kind == Kind::AllGather as u64 => format!("all_gather of {name}"),
        kind if kind == Kind::Decision as u64 => format!("reduce_boolean ({name})"),
        kind if kind == Kind::Descriptors as u64 => "exchange_descriptors".into(),
        other => format!("unknown control call {other}"),
    }
}

impl Call<'_> {
    pub(super) fn describe(&self) -> String {
        describe(self.kind as u64, u64::from(self.root), &fixed_name(self.name))
    }
}

/// What the rounds of one call share.
pub(super) struct Rounds<'a> {
    pub(super) core: &'a Core,
    pub(super) call: Call<'a>,
    pub(super) sequence: u64,
    start: Instant,
    timeout: Duration,
    warned: bool,
}

impl Rounds<'_> {
    /// One exchange: gives `chunk` of `total_bytes`, then `take(rank, total_bytes, payload words)` for every rank.
    pub(super) fn exchange(
        &mut self,
        order: &mut Order,
        chunk: &[u8],
        total_bytes: usize,
        mut take: impl FnMut(u32, u64, &[AtomicU64]) -> Result<()>,
    ) -> Result<()> {
        let core = self.core;
        order.generation = order.generation.wrapping_add(1);
        let (generation, parity) = (order.generation, (order.generation & 1) as usize);
        let name = fixed_name(self.call.name);

        let mailbox = core.board.mailbox(core.rank);
        let slot = &mailbox.slots[parity];
        slot.kind.store(self.call.kind as u64, Ordering::Relaxed);
        slot.root.store(u64::from(self.call.root), Ordering::Relaxed);
        slot.total_bytes.store(total_bytes as u64, Ordering::Relaxed);
        store_bytes(&slot.name, &name);
        store_bytes(&slot.payload, chunk);
        mailbox.flag.post(generation);

        // Nothing here is worth a busy core, and beside busy processes every yield delays the look at the fault.
        let pacing = Pacing { spins: core.pacing.spins, yields: core.pacing.yields.min(16) };
        for peer in (0..core.world_size).filter(|peer| *peer != core.rank) {
            core.board.mailbox(peer).flag.wait(generation, pacing, |_| self.proceed(peer, generation))?;
        }
        for peer in 0..core.world_size {
            let slot = &core.board.mailbox(peer).slots[parity];
            let (kind, root) = (slot.kind.load(Ordering::Relaxed), slot.root.load(Ordering::Relaxed));
            let mut theirs = Vec::with_capacity(NAME_BYTES);
            load_bytes(&slot.name, NAME_BYTES, &mut theirs);
            if (kind, root, theirs.as_slice()) != (self.call.kind as u64, u64::from(self.call.root), &name[..]) {
                return Err(core.raise(Error::Mismatch {
                    sequence: self.sequence,
                    rank: core.rank,
                    mine: self.call.describe(),
                    peer,
                    theirs: describe(kind, root, &theirs),
                }));
            }
        }
        for rank in 0..core.world_size {
            let slot = &core.board.mailbox(rank).slots[parity];
            take(rank, slot.total_bytes.load(Ordering::Relaxed), &slot.payload)?;
        }
        Ok(())
    }

    /// Asked while `peer` is waited for: gives up for a fault, for a peer that has left, and at the deadline.
    fn proceed(&mut self, peer: u32, generation: u32) -> Result<()> {
        let core = self.core;
        if let Some(fault) = core.fault() {
            return Err(fault);
        }
        // The flag is looked at after the state: a peer may have come first and left afterwards.
        if core.board.state(peer) == RankState::Left && !reached(core.board.mailbox(peer).flag.seen(), generation) {
            return Err(core.raise(core.lost(peer, self.call.describe())));
        }
        let is_absent = |rank: &u32| !reached(core.board.mailbox(*rank).flag.seen(), generation);
        self.go_on(|| (0..core.world_size).filter(is_absent).collect())
    }

    /// Gives up for a fault, and at the deadline if anybody is absent; warns once in good time before.
    pub(super) fn go_on(&mut self, absent: impl FnOnce() -> Vec<u32>) -> Result<()> {
        let core = self.core;
        if let Some(fault) = core.fault() {
            return Err(fault);
        }
        let waited = self.start.elapsed();
        if waited < self.timeout && (self.warned || waited < core.options.warn_after) {
            return Ok(());
        }
        let absent = absent();
        if absent.is_empty() {
            return Ok(());
        }
        if waited >= self.timeout {
            let name = match self.call.kind {
                Kind::Barrier => self.call.name.to_owned(),
                _ => self.call.describe(),
            };
            return Err(core.raise(Error::BarrierTimeout { name, absent, waited_ms: waited.as_millis() as u64 }));
        }
        self.warned = true;
        tracing::warn!(
            rank = core.rank,
            ?absent,
            waited_ms = waited.as_millis() as u64,
            "still waiting in {}",
            self.call.describe()
        );
        Ok(())
    }
}

impl Core {
    /// Waits until no other thread of this rank is in a control call.
    fn take_turn(&self, call: &Call<'_>, start: Instant, timeout: Duration) -> Result<MutexGuard<'_, Order>> {
        loop {
            match self.order.try_lock() {
                Ok(order) => return Ok(order),
                // A panic in a control call leaves the order as it was told to the peers, so it is kept.
                Err(TryLockError::Poisoned(order)) => return Ok(order.into_inner()),
                Err(TryLockError::WouldBlock) => {}
            }
            if let Some(fault) = self.fault() {
                return Err(fault);
            }
            let waited = start.elapsed();
            if waited >= timeout {
                // Another thread is in a call of this rank: nothing was told to the peers yet, so nothing is poisoned.
                let (name, absent) = (call.describe(), vec![self.rank]);
                return Err(Error::BarrierTimeout { name, absent, waited_ms: waited.as_millis() as u64 });
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Runs `body` as one control call: in order, refused after a fault, in the flight recorder.
    pub(super) fn control_call<R>(
        &self,
        call: Call<'_>,
        timeout: Duration,
        body: impl FnOnce(&mut Order, &mut Rounds<'_>) -> Result<R>,
    ) -> Result<R> {
        let start = Instant::now();
        let mut order = self.take_turn(&call, start, timeout)?;
        if let Some(mut fault) = self.fault() {
            // Noticed before this call began, so by nobody's operation.
            if let Error::PeerLost { operation, .. } | Error::PeerStopped { operation, .. } = &mut fault
                && operation == IDLE
            {
                *operation = call.describe();
            }
            return Err(fault);
        }
        order.sequence += 1;
        let sequence = order.sequence;
        let ring = self.board.recorder(self.rank);
        let slot = ring.start(&Record::control(&call.describe(), sequence, timeout), now_ns());
        let mut rounds = Rounds { core: self, call, sequence, start, timeout, warned: false };
        let result = body(&mut order, &mut rounds);
        match &result {
            Ok(_) => ring.end(slot, now_ns()),
            // Half-way out of it this rank would leave the others waiting for the rounds that are left.
            Err(error) if self.fault().is_none() => drop(self.raise(error.clone())),
            Err(_) => {}
        }
        result
    }

    pub(crate) fn barrier(&self, name: &str, timeout: Duration) -> Result<()> {
        let call = Call { kind: Kind::Barrier, root: 0, name };
        self.control_call(call, timeout, |order, rounds| rounds.exchange(order, &[], 0, |_, _, _| Ok(())))
    }

    fn broadcast(&self, root: u32, what: &str, bytes: &[u8], timeout: Duration) -> Result<Vec<u8>> {
        self.check_rank("root", root)?;
        let given = if root == self.rank { bytes } else { &[] };
        let mut received = Vec::new();
        let call = Call { kind: Kind::Broadcast, root, name: what };
        self.control_call(call, timeout, |order, rounds| {
            loop {
                let chunk = &given[received.len().min(given.len())..];
                let chunk = &chunk[..chunk.len().min(SLOT_BYTES)];
                let mut all_there = false;
                rounds.exchange(order, chunk, given.len(), |rank, total_bytes, payload| {
                    if rank != root {
                        return Ok(());
                    }
                    let left = usize::try_from(total_bytes).unwrap_or(usize::MAX).saturating_sub(received.len());
                    reserve(&mut received, left)?;
                    load_bytes(payload, left.min(SLOT_BYTES), &mut received);
                    all_there = left <= SLOT_BYTES;
                    Ok(())
                })?;
                if all_there {
                    return Ok(());
                }
            }
        })?;
        Ok(received)
    }
}

/// Room for `len_bytes` more, or the error that says how much was asked for.
fn reserve(bytes: &mut Vec<u8>, len_bytes: usize) -> Result<()> {
    bytes.try_reserve_exact(len_bytes).map_err(|_| Error::NoSpace {
        what: "a value that a peer sends",
        need_bytes: len_bytes as u64,
        have_bytes: crate::world::memory::available_bytes(),
    })
}

impl World {
    /// Waits until every rank has called `barrier` with this name (its first 64 bytes count).
    ///
    /// # Errors
    /// [`Error::BarrierTimeout`] listing the absent ranks after `timeout`; [`Error::Mismatch`] if a rank calls something
    /// else at this place; the job's fault if there is one.
    ///
    /// # Synchronization
    /// What a rank wrote to shared memory before the call is visible to every rank after it. Streams are not waited for.
    pub fn barrier(&self, name: &str, timeout: Duration) -> Result<()> {
        self.core().barrier(name, timeout)
    }

    /// Gives `bytes` of rank `root` to every rank; what other ranks pass is ignored. Any length.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a root that does not exist; [`Error::NoSpace`]; else as
    /// [`barrier`](World::barrier).
    pub fn broadcast_bytes(&self, root: u32, bytes: &[u8], timeout: Duration) -> Result<Vec<u8>> {
        self.core().broadcast(root, "bytes", bytes, timeout)
    }

    /// Gives the value of rank `root` to every rank. The root passes `Some`; what others pass is ignored. The value
    /// travels as JSON, so floats must be finite.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if the root has no value; [`Error::RankFailed`], on every rank, if the value cannot
    /// be written by the root or read by a receiver; else as [`broadcast_bytes`](World::broadcast_bytes).
    pub fn broadcast_value<T>(&self, root: u32, value: Option<T>, timeout: Duration) -> Result<T>
    where
        T: Serialize + DeserializeOwned,
    {
        let core = self.core();
        let failed = |what: &str, error: serde_json::Error| {
            let reason = format!("a {} {what}: {error}", std::any::type_name::<T>());
            core.raise(Error::RankFailed { rank: core.rank, reason })
        };
        if root != core.rank {
            let bytes = core.broadcast(root, "a value", &[], timeout)?;
            return serde_json::from_slice(&bytes).map_err(|error| failed("cannot be read from the broadcast", error));
        }
        let value = value.ok_or(Error::InvalidArgument {
            argument: "value",
            value: "None on the root".into(),
            accepted: "the root of a broadcast must pass a value",
        })?;
        let bytes = serde_json::to_vec(&value).map_err(|error| failed("cannot be written for a broadcast", error))?;
        core.broadcast(root, "a value", &bytes, timeout)?;
        Ok(value)
    }

    /// Every rank's `bytes`, in rank order, on every rank. Lengths may differ and may be 0.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if this rank gives more than [`GATHER_LIMIT_BYTES`]; [`Error::NoSpace`]; else as
    /// [`barrier`](World::barrier).
    pub fn all_gather_bytes(&self, bytes: &[u8], timeout: Duration) -> Result<Vec<Vec<u8>>> {
        let core = self.core();
        if bytes.len() > GATHER_LIMIT_BYTES {
            return Err(Error::InvalidArgument {
                argument: "bytes",
                value: format!("{} bytes", bytes.len()),
                accepted: "a rank may give 16 MiB at most to all_gather_bytes",
            });
        }
        let mut gathered = vec![Vec::new(); core.world_size as usize];
        let call = Call { kind: Kind::AllGather, root: 0, name: "bytes" };
        core.control_call(call, timeout, |order, rounds| {
            let mut given = 0;
            loop {
                let chunk = &bytes[given..bytes.len().min(given + SLOT_BYTES)];
                let mut all_there = true;
                rounds.exchange(order, chunk, bytes.len(), |rank, total_bytes, payload| {
                    let received = &mut gathered[rank as usize];
                    let total_bytes = usize::try_from(total_bytes).unwrap_or(usize::MAX).min(GATHER_LIMIT_BYTES);
                    let left = total_bytes.saturating_sub(received.len());
                    reserve(received, left)?;
                    load_bytes(payload, left.min(SLOT_BYTES), received);
                    all_there &= left <= SLOT_BYTES;
                    Ok(())
                })?;
                given = bytes.len().min(given + SLOT_BYTES);
                if all_there {
                    return Ok(());
                }
            }
        })?;
        Ok(gathered)
    }

    /// Whether `decision` is true on all ranks (`all`), or on any of them.
    ///
    /// # Errors
    /// As [`barrier`](World::barrier); ranks that disagree about `all` are a [`Error::Mismatch`].
    pub fn reduce_boolean(&self, decision: bool, all: bool, timeout: Duration) -> Result<bool> {
        let call = Call { kind: Kind::Decision, root: 0, name: if all { "all" } else { "any" } };
        let mut agreed = all;
        self.core().control_call(call, timeout, |order, rounds| {
            rounds.exchange(order, &[u8::from(decision)], 1, |_, _, payload| {
                let theirs = payload[0].load(Ordering::Relaxed) & 1 == 1;
                agreed = if all { agreed && theirs } else { agreed || theirs };
                Ok(())
            })
        })?;
        Ok(agreed)
    }
}
