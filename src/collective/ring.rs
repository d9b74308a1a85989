//! Algorithm `Ring`: the schedule's steps through the slots of each rank's link to its successor.
//!
//! ```text
//!   k-th send of rank r     wait taken[r+1] >= k-2;  write slot k of r;     post sent[r] = k
//!   k-th receive of rank r  wait sent[r-1]  >= k;    use slot k of r-1;     post taken[r] = k
//! ```
//! A received partial is combined into this rank's own scratch and its slot given back before the next send, so two slots
//! at a time can never deadlock.

use super::area::{RESULT_BYTES, TERMS_BYTES};
use super::descriptor::Kind;
use super::executor::Run;
use super::partial::{self, Hop};
use crate::error::Result;
use crate::schedule::{Action, Phase, Schedule, Step, Transfer};

/// Bytes of one slot: several rounds in flight around the ring for large messages, staging that stays in cache.
const SLOT_BYTES: usize = 128 << 10;
const _: () = assert!(SLOT_BYTES <= TERMS_BYTES && SLOT_BYTES <= RESULT_BYTES);

struct Ring<'a> {
    run: &'a Run<'a>,
    schedule: Schedule,
    sent: u32,
    taken: u32,
}

/// # Safety
/// As for [`super::executor::execute`].
pub(super) unsafe fn run(run: &Run<'_>) -> Result<()> {
    let descriptor = &run.job.descriptor;
    let slot_elems = SLOT_BYTES / partial::size_bytes(run.dtype, descriptor.partials()).max(run.dtype.size_bytes());
    let schedule = descriptor.schedule(run.group.world_size(), slot_elems)?;
    let mine = run.group.area(run.group.rank);
    // Only this rank posts its flags, so they are its counters, too.
    let mut ring = Ring { run, schedule, sent: mine.ring_sent.seen(), taken: mine.ring_taken.seen() };
    // SAFETY: the caller's promises.
    unsafe {
        ring.place_own_input();
        for round in 0..schedule.rounds() {
            for step in schedule.steps(run.group.rank, round) {
                if let Some(send) = step.send {
                    ring.send(&step, send)?;
                }
                if let (Some(recv), Some(action)) = (step.recv, step.action) {
                    ring.receive(recv, action)?;
                }
            }
        }
    }
    Ok(())
}

impl Ring<'_> {
    /// Out of place, the own shard goes to its place first.
    ///
    /// # Safety
    /// As for [`run`].
    unsafe fn place_own_input(&self) {
        let (run, job) = (self.run, self.run.job);
        let own = self.schedule.shard(run.group.rank);
        // SAFETY: the destination holds the whole vector, the source the own shard (or, root, the whole vector).
        unsafe {
            match job.descriptor.kind() {
                Kind::AllGather => run.copy(job.src.ptr, run.at(job.dst.ptr, own.offset_elems), own.len_elems),
                Kind::Broadcast if own.len_elems > 0 => run.copy(job.src.ptr, job.dst.ptr, own.len_elems),
                _ => {}
            }
        }
    }

    /// # Safety
    /// As for [`run`].
    unsafe fn send(&mut self, step: &Step, send: Transfer) -> Result<()> {
        let (run, job) = (self.run, self.run.job);
        let (mine, next) = (run.group.area(run.group.rank), run.group.area(send.peer));
        self.sent = self.sent.wrapping_add(1);
        run.wait(&next.ring_taken, self.sent.wrapping_sub(2), send.peer, "ring: slot taken")?;
        let slot = mine.terms.place(self.sent, SLOT_BYTES);
        let types = (run.dtype, job.descriptor.partials());
        let len_elems = send.span.len_elems;
        // SAFETY: the successor has given the slot back; a slot and the scratch hold a chunk of partials.
        unsafe {
            match step.phase {
                Phase::ReduceScatter if step.index == 0 => {
                    let own = run.at(job.src.ptr, send.span.offset_elems);
                    partial::hop(Hop::Start, types, run.combine(), std::ptr::null(), own, slot, len_elems);
                }
                Phase::ReduceScatter => {
                    let bytes = len_elems * partial::size_bytes(types.0, types.1);
                    run.group.hand_over.copy(self.scratch(), slot, bytes);
                }
                Phase::AllGather | Phase::Broadcast => {
                    run.hand_over(run.at(job.dst.ptr, send.span.offset_elems), slot, len_elems);
                }
            }
        }
        mine.ring_sent.post(self.sent);
        Ok(())
    }

    /// # Safety
    /// As for [`run`].
    unsafe fn receive(&mut self, recv: Transfer, action: Action) -> Result<()> {
        let (run, job) = (self.run, self.run.job);
        let (mine, previous) = (run.group.area(run.group.rank), run.group.area(recv.peer));
        self.taken = self.taken.wrapping_add(1);
        run.wait(&previous.ring_sent, self.taken, recv.peer, "ring: chunk received")?;
        let slot = previous.terms.place(self.taken, SLOT_BYTES);
        let types = (run.dtype, job.descriptor.partials());
        let span = recv.span;
        let own = run.at(job.src.ptr, span.offset_elems);
        // SAFETY: the predecessor has posted the slot and does not write it before it sees it taken.
        unsafe {
            match action {
                Action::Reduce => {
                    partial::hop(Hop::Fold, types, run.combine(), slot, own, self.scratch(), span.len_elems);
                }
                Action::Finish => {
                    let shard = self.schedule.shard(run.group.rank);
                    let offset_elems = match job.descriptor.kind() {
                        Kind::ReduceScatter => span.offset_elems - shard.offset_elems,
                        _ => span.offset_elems,
                    };
                    let to = run.at(job.dst.ptr, offset_elems);
                    partial::hop(Hop::Finish, types, run.combine(), slot, own, to, span.len_elems);
                }
                Action::Copy | Action::Hold => run.copy(slot, run.at(job.dst.ptr, span.offset_elems), span.len_elems),
            }
        }
        mine.ring_taken.post(self.taken);
        Ok(())
    }

    /// This rank's partial between a receive and the send that passes it on.
    fn scratch(&self) -> *mut u8 {
        self.run.group.area(self.run.group.rank).result.place(0, SLOT_BYTES)
    }
}
