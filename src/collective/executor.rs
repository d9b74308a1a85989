//! Runs one operation of one rank on the host: agree, then move.
//!
//! ```text
//!   write call[g%2] (and, if the payload is small, the mailbox);  post arrived g
//!   for every peer: wait arrived g; its descriptor differs? error on every rank, no payload was moved
//!   alone     a group of one: the same arithmetic, nobody to meet
//!   one step  small payload: read everybody's mailbox                                       (no second meeting)
//!   mapped    all buffers lie in arenas: read and write them where they are; post done g; wait for everybody's done g
//!   staged    through slots in the ranks' areas, round by round                             (`staged.rs`, `ring.rs`)
//! ```
//! *Mapped*, for a reduction: the owner of a shard reads all N terms and writes the result to all N destinations while
//! it is in registers. Every byte of every buffer is read once and written once, the least there is; the meeting before
//! makes the inputs final, the one after makes the outputs so.
//!
//! Every wait looks at the fault cell and at the operation's deadline; the first error poisons the whole world.

use std::cell::Cell;
use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use super::area::{Area, Call, MAILBOX_BYTES, PRIVATE};
use super::combine::{Combine, combine};
use super::descriptor::{Descriptor, Kind};
use super::hand_over::HandOver;
use crate::dtype::{DType, ReduceOp};
use crate::error::{Error, Result};
use crate::schedule::{Algorithm, MAX_WORLD_SIZE, Span};
use crate::world::flag::{Flag, Pacing, reached};
use crate::world::{Region, World};

/// Payload up to which one step beats two meetings over mapped memory with two ranks, and payload up to which it beats
/// staging. With more ranks it is the payloads of all together that count, because every rank reads everybody's whole
/// (see BENCHMARKS.md).
const ONE_STEP_MAPPED_BYTES: usize = 2 << 10;
const ONE_STEP_STAGED_BYTES: usize = 256 << 10;
const ONE_STEP_MAPPED_ALL_BYTES: usize = 32 << 10;
const ONE_STEP_STAGED_ALL_BYTES: usize = 128 << 10;
const _: () = assert!(ONE_STEP_STAGED_BYTES <= MAILBOX_BYTES && ONE_STEP_STAGED_ALL_BYTES / 3 <= MAILBOX_BYTES);

/// Copies from here on do not go through libc, whose large copies bypass the cache: 16 against 29 GB/s (read + write) at
/// 256 MiB on the machine of BENCHMARKS.md.
const LIBC_COPY_BYTES: usize = 1 << 20;

/// What is moved between two looks at the fault cell: with first touches of its pages, a millisecond. 64 MiB of four ranks on two
/// cores in one piece took so long that one loss in thirty was told after 50 ms.
const PIECE_BYTES: usize = 1 << 20;

/// Where one side of an operation begins.
#[derive(Clone, Copy)]
pub(super) struct Operand {
    pub(super) ptr: *mut u8,
    /// Offset in this rank's arena; `None` for private memory.
    pub(super) arena_offset_bytes: Option<usize>,
}

// SAFETY: an operand is an address; the `Work` that owns the buffers, and the task that keeps their memory alive, argue
// who may use it.
unsafe impl Send for Operand {}

impl Operand {
    pub(super) const NONE: Operand = Operand { ptr: std::ptr::null_mut(), arena_offset_bytes: None };
}

/// An operation with its buffers, ready to run. `src` and `dst` are the same in place.
#[derive(Clone, Copy)]
pub(super) struct Job {
    pub(super) descriptor: Descriptor,
    pub(super) src: Operand,
    pub(super) dst: Operand,
}

/// What an executor needs to know of its group; made once.
pub(super) struct Group {
    pub(super) world: World,
    pub(super) index: u32,
    /// This rank's number in the group, and the group's members as ranks of the world.
    pub(super) rank: u32,
    pub(super) members: Vec<u32>,
    pub(super) region: Region,
    pub(super) hand_over: HandOver,
    /// One-step operations so far, of every rank as many. Relaxed: this rank's alone.
    pub(super) one_steps: AtomicU32,
    pub(super) pacing: Pacing,
    pub(super) timeout: Duration,
    pub(super) warn_after: Duration,
}

impl Group {
    pub(super) fn world_size(&self) -> u32 {
        self.members.len() as u32
    }

    /// The area of group rank `rank`.
    pub(super) fn area(&self, rank: u32) -> &Area {
        // SAFETY: the region holds one area per rank of the world, page-aligned, zeroed and reserved when the group was
        // made, and is mapped as long as `world` lives; an `Area` is valid for all bytes and changed only through its
        // atomics and cells. `rank` is below the group's size at every call.
        unsafe { self.region.ptr.cast::<Area>().add(rank as usize).as_ref() }
    }

    /// The mailboxes' turn in the next operation, or in this one, if it is of one step. Not the generation: operations between
    /// that use no mailbox, such as barriers, would leave every other place unused.
    fn mailbox_turn(&self) -> u32 {
        self.one_steps.load(Ordering::Relaxed)
    }

    pub(super) fn peers(&self) -> impl Iterator<Item = u32> {
        let (rank, world_size) = (self.rank, self.world_size());
        // Each rank begins with its successor, so that not all look at one line at once.
        (1..world_size).map(move |distance| (rank + distance) % world_size)
    }
}

/// A list on the stack, one entry per rank; entries beyond the group's size are not even initialised (64 calls are 3.5
/// KiB, and a small operation takes less than a microsecond).
pub(super) struct PerRank<T> {
    items: [MaybeUninit<T>; MAX_WORLD_SIZE as usize],
    len: usize,
}

impl<T: Copy> PerRank<T> {
    pub(super) fn new(fill: T, len: u32) -> PerRank<T> {
        let (mut items, len) = ([const { MaybeUninit::uninit() }; MAX_WORLD_SIZE as usize], len as usize);
        items[..len].fill(MaybeUninit::new(fill));
        PerRank { items, len }
    }

    pub(super) fn as_slice(&self) -> &[T] {
        // SAFETY: the first `len` entries were initialised by `new`.
        unsafe { std::slice::from_raw_parts(self.items.as_ptr().cast(), self.len) }
    }

    pub(super) fn set(&mut self, rank: u32, value: T) {
        self.items[..self.len][rank as usize] = MaybeUninit::new(value);
    }

    pub(super) fn get(&self, rank: u32) -> T {
        self.as_slice()[rank as usize]
    }
}

/// One operation while it runs.
pub(super) struct Run<'a> {
    pub(super) group: &'a Group,
    pub(super) job: &'a Job,
    pub(super) dtype: DType,
    warned: Cell<bool>,
}

/// Runs `job`. After [`Error::Mismatch`] nobody has touched its operands, and nobody will.
///
/// # Safety
/// - the operands are valid for what the descriptor says, and stay so until this returns; with an arena offset, until
///   every rank has returned from the operation (after an error but `Mismatch`: for ever);
/// - nobody else accesses them meanwhile, but peers by this very operation;
/// - operations of one group run one after another.
pub(super) unsafe fn execute(group: &Group, job: &Job) -> Result<()> {
    let run = Run { group, job, dtype: job.descriptor.dtype(), warned: Cell::new(false) };
    // SAFETY: the caller's promises.
    unsafe { run.execute() }
}

impl Run<'_> {
    /// # Safety
    /// As for [`execute`].
    unsafe fn execute(&self) -> Result<()> {
        let group = self.group;
        if let Some(fault) = group.world.fault() {
            return Err(self.in_this_operation(fault));
        }
        // SAFETY: the caller's promises.
        let result = unsafe { if group.world_size() == 1 { self.alone() } else { self.together() } };
        result.inspect_err(|error| {
            // Most are raised where they arise, in the words of all ranks. None may leave the others to wait.
            if group.world.fault().is_none() {
                group.world.raise(error.clone());
            }
        })
    }

    /// A group of one meets nobody.
    ///
    /// # Safety
    /// As for [`execute`].
    unsafe fn alone(&self) -> Result<()> {
        let operands = |operand: Operand| PerRank::new(operand.ptr, 1);
        // SAFETY: the caller's promises; the operands are those of all ranks.
        unsafe { self.mapped(&operands(self.job.src), &operands(self.job.dst)) }
    }

    /// # Safety
    /// As for [`execute`].
    unsafe fn together(&self) -> Result<()> {
        let group = self.group;
        let mine = group.area(group.rank);
        // Only this rank posts its flags, so they are its counters, too.
        let generation = mine.arrived.seen().wrapping_add(1);
        // SAFETY: the caller's promises.
        unsafe {
            let calls = self.meet(generation)?;
            if self.job.descriptor.kind() == Kind::Barrier {
                Ok(())
            } else if calls.as_slice().iter().all(|call| self.is_in_mailbox(call)) {
                self.one_step()?;
                group.one_steps.store(group.mailbox_turn().wrapping_add(1), Ordering::Relaxed);
                Ok(())
            } else if self.job.descriptor.algorithm() == Algorithm::Ring {
                super::ring::run(self)
            } else if let Some((srcs, dsts)) = self.mapped_operands(&calls)? {
                self.mapped(&srcs, &dsts)?;
                // A count of its own: had it to catch up with `arrived`, it might be half a circle behind.
                let finished = mine.done.seen().wrapping_add(1);
                mine.done.post(finished);
                group.peers().try_for_each(|peer| self.wait(&group.area(peer).done, finished, peer, "finishing"))
            } else {
                super::staged::run(self)
            }
        }
    }

    /// Whether the rank of this call has put its payload into its mailbox. A function of the call alone, so every rank
    /// knows of every other, and all take the same path.
    fn is_in_mailbox(&self, call: &Call) -> bool {
        let is_mapped = call.src_offset_bytes != PRIVATE && call.dst_offset_bytes != PRIVATE;
        let limit = match (self.group.world_size(), is_mapped) {
            (..=2, true) => ONE_STEP_MAPPED_BYTES,
            (..=2, false) => ONE_STEP_STAGED_BYTES,
            (world_size, true) => ONE_STEP_MAPPED_ALL_BYTES / world_size as usize,
            (world_size, false) => ONE_STEP_STAGED_ALL_BYTES / world_size as usize,
        };
        self.payload_bytes().is_some_and(|payload| payload <= limit)
    }

    /// Announces the operation and waits until everybody has announced the same.
    ///
    /// # Safety
    /// As for [`execute`].
    unsafe fn meet(&self, generation: u32) -> Result<PerRank<Call>> {
        let (group, job) = (self.group, self.job);
        let (mine, parity) = (group.area(group.rank), generation as usize % 2);
        let offset = |operand: Operand| operand.arena_offset_bytes.map_or(PRIVATE, |offset| offset as u64);
        let call =
            Call { descriptor: job.descriptor, src_offset_bytes: offset(job.src), dst_offset_bytes: offset(job.dst) };
        // SAFETY: this rank writes its own cell of generation g; peers have read that of g-2, because they arrived at g-1 and
        // this rank saw that; and so they have read the mailbox of two turns ago. They read these after `arrived` is posted.
        unsafe {
            mine.call[parity].0.get().write(call);
            if self.is_in_mailbox(&call) && self.contributes() {
                let bytes = self.payload_bytes().unwrap_or(0);
                group.hand_over.copy(job.src.ptr, mine.mailbox.place(group.mailbox_turn(), bytes), bytes);
            }
        }
        mine.arrived.post(generation);
        let mut calls = PerRank::new(call, group.world_size());
        for peer in group.peers() {
            let arrived = self.wait(&group.area(peer).arrived, generation, peer, "arriving");
            // A peer that waits here for another hears of a mismatch before it has seen it.
            arrived.map_err(|error| self.mismatch(generation).unwrap_or(error))?;
            let theirs = self.call_of(peer, generation);
            if theirs.descriptor != job.descriptor {
                return Err(self.mismatch_with(peer, &theirs));
            }
            calls.set(peer, theirs);
        }
        Ok(calls)
    }

    /// What `peer`, which has arrived, has announced.
    fn call_of(&self, peer: u32, generation: u32) -> Call {
        // SAFETY: the peer has posted generation g and does not write this cell before this rank arrives at g+1.
        unsafe { self.group.area(peer).call[generation as usize % 2].0.get().read() }
    }

    /// The error if somebody has announced another operation. Then nobody gets beyond the meeting: everybody differs from
    /// this rank or from that one.
    fn mismatch(&self, generation: u32) -> Option<Error> {
        let has_arrived = |peer: &u32| reached(self.group.area(*peer).arrived.seen(), generation);
        let calls = self.group.peers().filter(has_arrived).map(|peer| (peer, self.call_of(peer, generation)));
        let mut others = calls.filter(|(_, call)| call.descriptor != self.job.descriptor);
        others.next().map(|(peer, call)| self.mismatch_with(peer, &call))
    }

    fn mismatch_with(&self, peer: u32, theirs: &Call) -> Error {
        let (group, mine) = (self.group, &self.job.descriptor);
        let error = mine.mismatch(group.members[group.rank as usize], group.members[peer as usize], &theirs.descriptor);
        group.world.raise(error.clone());
        error
    }

    /// Small operations: everybody's payload is in its mailbox.
    ///
    /// # Safety
    /// As for [`execute`], after [`meet`](Run::meet) with mailboxes.
    unsafe fn one_step(&self) -> Result<()> {
        let (group, descriptor, turn) = (self.group, &self.job.descriptor, self.group.mailbox_turn());
        let bytes = self.payload_bytes().unwrap_or(0);
        let mut inputs = PerRank::new(self.job.src.ptr.cast_const(), group.world_size());
        for peer in group.peers() {
            inputs.set(peer, group.area(peer).mailbox.place(turn, bytes).cast_const());
        }
        let len_elems = descriptor.len_elems as usize;
        // SAFETY: peers' mailboxes are final until this rank arrives at g+1; the rest is the caller's promise.
        unsafe {
            match descriptor.kind() {
                Kind::AllReduce => self.reduce(&inputs, Span { offset_elems: 0, len_elems }, &[self.job.dst.ptr]),
                Kind::ReduceScatter => {
                    let shard = descriptor.schedule(group.world_size(), usize::MAX)?.shard(group.rank);
                    self.reduce(&inputs, shard, &[self.job.dst.ptr]);
                }
                Kind::AllGather => {
                    let schedule = descriptor.schedule(group.world_size(), usize::MAX)?;
                    for rank in 0..group.world_size() {
                        let shard = schedule.shard(rank);
                        self.copy(inputs.get(rank), self.at(self.job.dst.ptr, shard.offset_elems), shard.len_elems);
                    }
                }
                Kind::Broadcast => self.copy(inputs.get(descriptor.root), self.job.dst.ptr, len_elems),
                Kind::Barrier => {}
            }
        }
        Ok(())
    }

    /// The operation over memory that every rank reaches: what this rank contributes to it.
    ///
    /// # Safety
    /// As for [`execute`]; `srcs` and `dsts` are the mapped operands of all ranks, all of which have arrived.
    unsafe fn mapped(&self, srcs: &PerRank<*mut u8>, dsts: &PerRank<*mut u8>) -> Result<()> {
        let (group, descriptor) = (self.group, &self.job.descriptor);
        let schedule = descriptor.schedule(group.world_size(), usize::MAX)?;
        let mine = schedule.shard(group.rank);
        let mut inputs = PerRank::new(std::ptr::null(), group.world_size());
        for rank in 0..group.world_size() {
            inputs.set(rank, srcs.get(rank).cast_const());
        }
        // SAFETY: all ranks have arrived, so all inputs are final; ranks write disjoint shards (all-reduce) or their own
        // output only; nobody leaves before all are done.
        unsafe {
            match descriptor.kind() {
                Kind::AllReduce => {
                    let mut outputs = PerRank::new(std::ptr::null_mut(), group.world_size());
                    self.by_pieces(mine, |piece| {
                        for rank in 0..group.world_size() {
                            outputs.set(rank, self.at(dsts.get(rank), piece.offset_elems));
                        }
                        self.reduce(&inputs, piece, outputs.as_slice());
                    })
                }
                Kind::ReduceScatter => self.by_pieces(mine, |piece| {
                    let in_shard = piece.offset_elems - mine.offset_elems;
                    self.reduce(&inputs, piece, &[self.at(self.job.dst.ptr, in_shard)]);
                }),
                Kind::AllGather => std::iter::once(group.rank).chain(group.peers()).try_for_each(|owner| {
                    let shard = schedule.shard(owner);
                    self.by_pieces(shard, |piece| {
                        let from = inputs.get(owner).cast_mut();
                        let from = self.at(from, piece.offset_elems - shard.offset_elems);
                        self.copy(from, self.at(self.job.dst.ptr, piece.offset_elems), piece.len_elems);
                    })
                }),
                Kind::Broadcast => {
                    let whole = Span { offset_elems: 0, len_elems: descriptor.len_elems as usize };
                    self.by_pieces(whole, |piece| {
                        let from = self.at(inputs.get(descriptor.root).cast_mut(), piece.offset_elems);
                        self.copy(from, self.at(self.job.dst.ptr, piece.offset_elems), piece.len_elems);
                    })
                }
                Kind::Barrier => Ok(()),
            }
        }
    }

    /// Calls `move_piece` for one piece of `span` after the other, unless somebody fails.
    fn by_pieces(&self, span: Span, mut move_piece: impl FnMut(Span)) -> Result<()> {
        let piece_elems = PIECE_BYTES / self.dtype.size_bytes();
        for at in (0..span.len_elems).step_by(piece_elems) {
            if at > 0
                && let Some(fault) = self.group.world.fault()
            {
                return Err(self.in_this_operation(fault));
            }
            let len_elems = piece_elems.min(span.len_elems - at);
            move_piece(Span { offset_elems: span.offset_elems + at, len_elems });
        }
        Ok(())
    }

    /// Everybody's operands in this process's address space, if all of them can be reached.
    fn mapped_operands(&self, calls: &PerRank<Call>) -> Result<Option<(PerRank<*mut u8>, PerRank<*mut u8>)>> {
        let (group, job) = (self.group, self.job);
        let mut srcs = PerRank::new(job.src.ptr, group.world_size());
        let mut dsts = PerRank::new(job.dst.ptr, group.world_size());
        if calls.as_slice().iter().any(|call| call.src_offset_bytes == PRIVATE || call.dst_offset_bytes == PRIVATE) {
            return Ok(None);
        }
        let (src_bytes, dst_bytes) = self.operand_bytes();
        for peer in group.peers() {
            let call = calls.get(peer);
            srcs.set(peer, self.in_arena(peer, call.src_offset_bytes, src_bytes)?);
            dsts.set(peer, self.in_arena(peer, call.dst_offset_bytes, dst_bytes)?);
        }
        Ok(Some((srcs, dsts)))
    }

    /// A range of a peer's arena, which must lie inside it and hold elements: the peer may say anything.
    fn in_arena(&self, peer: u32, offset_bytes: u64, len_bytes: usize) -> Result<*mut u8> {
        let rank = self.group.members[peer as usize];
        let arena = self.group.world.arena_segment(rank)?;
        let is_inside = |offset: &usize| offset.checked_add(len_bytes).is_some_and(|end| end <= arena.len_bytes());
        let is_aligned = |offset: &usize| offset & (self.dtype.size_bytes() - 1) == 0; // sizes are powers of two
        let inside = usize::try_from(offset_bytes).ok().filter(|offset| is_inside(offset) && is_aligned(offset));
        let Some(offset) = inside else {
            return Err(self.group.world.raise(Error::InvalidArgument {
                argument: "a peer's buffer",
                value: format!("{len_bytes} bytes from {offset_bytes} in the arena of rank {rank}"),
                accepted: "must lie inside that arena, aligned for its elements",
            }));
        };
        // SAFETY: the offset lies inside the mapping (checked above).
        Ok(unsafe { arena.as_ptr().add(offset).as_ptr() })
    }

    /// Reduces the same `span` of every input into `dests`, which point at its first element.
    ///
    /// # Safety
    /// As for [`combine`].
    pub(super) unsafe fn reduce(&self, inputs: &PerRank<*const u8>, span: Span, dests: &[*mut u8]) {
        let mut terms = PerRank::new(std::ptr::null(), self.group.world_size());
        for rank in 0..self.group.world_size() {
            terms.set(rank, self.at(inputs.get(rank).cast_mut(), span.offset_elems).cast_const());
        }
        let how = self.combine();
        // SAFETY: the caller's promise.
        unsafe { combine(self.dtype, how, terms.as_slice(), dests, span.len_elems) }
    }

    pub(super) fn combine(&self) -> Combine {
        Combine { op: self.job.descriptor.op(), world_size: self.group.world_size() }
    }

    /// Copies elements unless they are in place already.
    ///
    /// # Safety
    /// Both are valid for `len_elems` elements; they are the same or disjoint.
    pub(super) unsafe fn copy(&self, from: *const u8, to: *mut u8, len_elems: usize) {
        let len_bytes = len_elems * self.dtype.size_bytes(); // checked when the buffers were made
        if std::ptr::eq(from, to) {
            return;
        }
        // SAFETY: the caller's promise.
        unsafe {
            if len_bytes < LIBC_COPY_BYTES {
                std::ptr::copy_nonoverlapping(from, to, len_bytes);
            } else {
                // The loop that adds, with one term.
                let how = Combine { op: ReduceOp::Sum, world_size: 1 };
                combine(DType::U8, how, &[from], &[to], len_bytes);
            }
        }
    }

    /// As [`copy`](Run::copy), into memory that other ranks read next.
    ///
    /// # Safety
    /// As for [`copy`](Run::copy), and they are disjoint.
    pub(super) unsafe fn hand_over(&self, from: *const u8, to: *mut u8, len_elems: usize) {
        // SAFETY: the caller's promise. The size was checked when the buffers were made.
        unsafe { self.group.hand_over.copy(from, to, len_elems * self.dtype.size_bytes()) }
    }

    /// Address of element `offset_elems`.
    pub(super) fn at(&self, base: *mut u8, offset_elems: usize) -> *mut u8 {
        base.wrapping_add(offset_elems * self.dtype.size_bytes())
    }

    /// Bytes this rank hands to the others, if that is counted in a mailbox.
    fn payload_bytes(&self) -> Option<usize> {
        let whole = (self.job.descriptor.len_elems as usize).checked_mul(self.dtype.size_bytes())?;
        Some(match self.job.descriptor.kind() {
            Kind::AllGather => whole / self.group.world_size() as usize,
            _ => whole,
        })
    }

    fn contributes(&self) -> bool {
        self.job.descriptor.kind() != Kind::Broadcast || self.job.descriptor.root == self.group.rank
    }

    /// Bytes of one rank's input and output.
    fn operand_bytes(&self) -> (usize, usize) {
        let whole = self.job.descriptor.len_elems as usize * self.dtype.size_bytes();
        let shard = whole / self.group.world_size() as usize;
        match self.job.descriptor.kind() {
            Kind::ReduceScatter => (whole, shard),
            Kind::AllGather => (shard, whole),
            _ => (whole, whole),
        }
    }

    /// Waits for `peer` to post `generation`.
    pub(super) fn wait(&self, flag: &Flag, generation: u32, peer: u32, place: &'static str) -> Result<()> {
        flag.wait(generation, self.group.pacing, |waited| self.may_go_on(flag, generation, peer, place, waited))
    }

    /// Looked at by every wait: has somebody failed, has this one lasted too long?
    #[cold]
    fn may_go_on(&self, flag: &Flag, generation: u32, peer: u32, place: &'static str, waited: Duration) -> Result<()> {
        let (group, rank) = (self.group, self.group.members[peer as usize]);
        if let Some(fault) = group.world.fault_of(rank) {
            // A peer that came first and left afterwards is none.
            if reached(flag.seen(), generation) {
                return Ok(());
            }
            return Err(self.in_this_operation(group.world.raise(fault)));
        }
        if waited >= group.timeout {
            return Err(group.world.raise(Error::PeerStalled {
                rank,
                operation: self.job.descriptor.to_string(),
                sequence: self.job.descriptor.sequence,
                place: place.to_owned(),
                waited_ms: waited.as_millis() as u64,
                expected: generation,
                seen: flag.seen(),
            }));
        }
        if waited >= group.warn_after && !self.warned.replace(true) {
            tracing::warn!(
                rank = group.members[group.rank as usize],
                waiting_for = rank,
                operation = %self.job.descriptor,
                place,
                waited_ms = waited.as_millis() as u64,
                timeout_ms = group.timeout.as_millis() as u64,
                "a peer has not come yet"
            );
        }
        Ok(())
    }

    /// A lost or stopped peer was noticed by the monitor, which does not know what this rank was doing.
    fn in_this_operation(&self, fault: Error) -> Error {
        let doing = self.job.descriptor.to_string();
        match fault {
            Error::PeerLost { rank, pid, .. } => Error::PeerLost { rank, pid, operation: doing },
            Error::PeerStopped { rank, pid, silent_ms, limit_ms, .. } => {
                Error::PeerStopped { rank, pid, silent_ms, limit_ms, operation: doing }
            }
            // That of another operation; one of this operation would say that no payload was moved.
            mismatch @ Error::Mismatch { .. } => Error::Poisoned { cause: Box::new(mismatch) },
            other => other,
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::super::{CollectiveOptions, Communicator};
    use super::*;
    use crate::device::{Arena, Stream};
    use crate::world::{WorldOptions, launch};

    /// A peer that announces a buffer where none can be ends the job, and nothing is read there.
    #[test]
    fn offsets_that_a_peer_makes_up_are_refused() {
        const LEN_ELEMS: usize = 70_000;
        for offset_bytes in [1, 2, PRIVATE - 1, PRIVATE - 7, 1 << 62] {
            let errors = launch::threads(2, |environment| {
                let world = World::join(environment, WorldOptions::default()).unwrap();
                let mut communicator = Communicator::new(&world, CollectiveOptions::default()).unwrap();
                let buffer = Arena::new(&world).alloc(DType::F32, LEN_ELEMS).unwrap();
                if world.rank() == 0 {
                    let stream = Stream::immediate("immediate");
                    return communicator.all_reduce(buffer, ReduceOp::Sum, &stream).unwrap().wait().map(drop);
                }
                let how = (None, Default::default());
                let descriptor = Descriptor::new(1, Kind::AllReduce, DType::F32, LEN_ELEMS, ReduceOp::Sum, 0, how);
                let group = std::sync::Arc::clone(&communicator.group);
                let mine = group.area(1);
                let forged = Call { descriptor, src_offset_bytes: offset_bytes, dst_offset_bytes: offset_bytes };
                // SAFETY: rank 0 reads the cell of generation 1 after `arrived` is posted.
                unsafe { mine.call[1].0.get().write(forged) };
                mine.arrived.post(1);
                while world.fault().is_none() {
                    std::thread::yield_now();
                }
                Ok(())
            });
            let error = errors.unwrap().swap_remove(0).unwrap_err().to_string();
            assert!(error.contains("in the arena of rank 1"), "{offset_bytes}: {error}");
        }
    }

    /// Every path, with counters that begin just before they wrap, or half a circle apart from each other.
    #[test]
    fn counters_may_wrap_and_may_stand_anywhere_to_each_other() {
        const LEN_ELEMS: usize = 70_000;
        for (arrived, others) in [(u32::MAX - 5, u32::MAX - 5), (u32::MAX / 2 + 3, 0), (0, u32::MAX / 2 + 3)] {
            for algorithm in [None, Some(Algorithm::Ring)] {
                launch::threads(2, |environment| {
                    let world = World::join(environment, WorldOptions::default()).unwrap();
                    let options = CollectiveOptions { algorithm, ..CollectiveOptions::default() };
                    let mut communicator = Communicator::new(&world, options).unwrap();
                    let group = std::sync::Arc::clone(&communicator.group);
                    let (mine, peer) = (group.area(world.rank()), group.area(1 - world.rank()));
                    mine.arrived.post(arrived);
                    for flag in
                        [&mine.done, &mine.sent, &mine.reduced, &mine.gathered, &mine.ring_sent, &mine.ring_taken]
                    {
                        flag.post(others);
                    }
                    world.barrier("set", world.options().timeout).unwrap();
                    let stream = Stream::immediate("immediate");
                    let mut registered = Arena::new(&world).alloc(DType::F32, LEN_ELEMS).unwrap();
                    for _ in 0..12 {
                        let (mut private, mut small) = (vec![1.0f32; LEN_ELEMS], [1i32]);
                        registered.as_mut_slice::<f32>().unwrap().fill(1.0);
                        communicator.all_reduce_slice(&mut private, ReduceOp::Sum).unwrap();
                        communicator.all_reduce_slice(&mut small, ReduceOp::Sum).unwrap();
                        registered =
                            communicator.all_reduce(registered, ReduceOp::Sum, &stream).unwrap().wait().unwrap();
                        assert!(reached(peer.done.seen(), mine.done.seen()), "the peer may still be writing");
                        let registered = registered.as_slice::<f32>().unwrap();
                        assert!(private.iter().chain(registered).all(|sum| *sum == 2.0) && small == [2]);
                    }
                    drop((communicator, group));
                    world.teardown(WorldOptions::default().timeout).unwrap();
                })
                .unwrap();
            }
        }
    }
}
