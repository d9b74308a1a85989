//! Private buffers, algorithm `Direct`: round by round through the staging of each rank's area.
//!
//! ```text
//!   round g (of the communicator's life)                                       waits before it
//!   terms g     <- own terms of the others' chunks;   post sent g              all reduced g-2   (they have read terms g-2)
//!   chunk       <- sum over ranks 0..N-1 of my chunk  (others' terms g)        all sent g
//!   result g    <- chunk;                             post reduced g           all gathered g-2  (they have read result g-2)
//!   own buffer  <- others' chunks (result g);         post gathered g          all reduced g
//! ```
//! The three are staggered: while round g is summed, the terms of round g+1 have been sent and the results of round g-1
//! are taken after it; so every wait is for something a peer did one stage ago. Every operation posts all three flags
//! for every round, whichever phases it has; so their rounds never part.

use super::area::{Area, RESULT_BYTES, TERMS_BYTES};
use super::descriptor::Kind;
use super::executor::{PerRank, Run};
use crate::error::Result;
use crate::schedule::{Action, Phase, Schedule, Span, Step};
use crate::world::flag::Flag;

/// Bytes of a vector per round. Measured from 32 KiB to 1 MiB (with twice the room) with 2 to 8 ranks and buffers of 1 to 64 MiB: smaller rounds pay
/// for their meetings, larger ones leave the second-level cache (1 MiB here).
const ROUND_BYTES: usize = 512 << 10;

struct Staged<'a> {
    run: &'a Run<'a>,
    schedule: Schedule,
    /// Elements between two owners' terms in a slot.
    slot_elems: usize,
    /// Round of the communicator before this operation's first.
    base: u32,
}

/// # Safety
/// As for [`super::executor::execute`].
pub(super) unsafe fn run(run: &Run<'_>) -> Result<()> {
    let world_size = run.group.world_size();
    let round_bytes = match run.job.descriptor.kind() {
        Kind::Broadcast => RESULT_BYTES,
        _ => (ROUND_BYTES.min(TERMS_BYTES) / world_size as usize).min(RESULT_BYTES),
    };
    // Whole cache lines, so that chunks stay aligned.
    let round_elems = (round_bytes / 64 * 64 / run.dtype.size_bytes()).max(1);
    let schedule = run.job.descriptor.schedule(world_size, round_elems)?;
    // Only this rank posts its flags, so they are its counters, too.
    let base = run.group.area(run.group.rank).gathered.seen();
    let staged = Staged { run, schedule, slot_elems: schedule.slot_elems(), base };
    // SAFETY: the caller's promises.
    unsafe { staged.run() }
}

impl Staged<'_> {
    /// # Safety
    /// As for [`run`].
    unsafe fn run(&self) -> Result<()> {
        let rounds = self.schedule.rounds();
        // SAFETY: the caller's promises, for every round.
        unsafe {
            self.place_own_input();
            for stage in 0..rounds + 2 {
                if stage < rounds {
                    self.send(stage)?;
                }
                if (1..=rounds).contains(&stage) {
                    self.finish(stage - 1)?;
                }
                if stage >= 2 {
                    self.gather(stage - 2)?;
                }
            }
        }
        Ok(())
    }

    /// Moving a rank's own data is no step: out of place, the own shard goes to its place first.
    ///
    /// # Safety
    /// As for [`run`].
    unsafe fn place_own_input(&self) {
        let (run, job) = (self.run, self.run.job);
        let own = self.schedule.shard(run.group.rank);
        let to = run.at(job.dst.ptr, own.offset_elems);
        // SAFETY: the destination holds the whole vector, the source the own shard (or, root, the whole vector).
        unsafe {
            match job.descriptor.kind() {
                Kind::AllGather => run.copy(job.src.ptr, to, own.len_elems),
                Kind::Broadcast if own.len_elems > 0 => run.copy(job.src.ptr, job.dst.ptr, own.len_elems),
                _ => {}
            }
        }
    }

    /// The flags' value for `round` of this operation.
    fn generation(&self, round: u64) -> u32 {
        self.base.wrapping_add(round as u32).wrapping_add(1)
    }

    /// Puts this rank's terms for the other owners into its slot.
    ///
    /// # Safety
    /// As for [`run`].
    unsafe fn send(&self, round: u64) -> Result<()> {
        let (run, mine, generation) = (self.run, self.area(self.run.group.rank), self.generation(round));
        let mut credited = false;
        for step in self.steps(round, Phase::ReduceScatter) {
            let Some(send) = step.send else { continue };
            if !credited {
                self.wait_all(|area| &area.reduced, generation.wrapping_sub(2), "staging: terms taken")?;
                credited = true;
            }
            let slot = run.at(self.terms(mine, generation), self.place_of(run.group.rank, send.chunk));
            // SAFETY: everybody has read the terms of two rounds ago; owner `chunk` has its own place in the slot, which
            // holds the chunks of all but the sender.
            unsafe { run.hand_over(run.at(run.job.src.ptr, send.span.offset_elems), slot, send.span.len_elems) };
        }
        mine.sent.post(generation);
        Ok(())
    }

    /// Makes the final value of this rank's chunk, for itself and, if others need it, in its result slot.
    ///
    /// # Safety
    /// As for [`run`].
    unsafe fn finish(&self, round: u64) -> Result<()> {
        let (run, job, generation) = (self.run, self.run.job, self.generation(round));
        let mine = self.area(run.group.rank);
        let chunk = self.schedule.chunk(round, run.group.rank);
        let result = self.result(mine, generation);
        let kind = job.descriptor.kind();
        let has_result =
            kind == Kind::AllReduce || kind == Kind::AllGather || (kind == Kind::Broadcast && chunk.len_elems > 0);
        if has_result {
            self.wait_all(|area| &area.gathered, generation.wrapping_sub(2), "staging: results taken")?;
        }
        // SAFETY: the result slot was read by all (waited for above) and holds a chunk; terms are final once sent.
        unsafe {
            if self.steps(round, Phase::ReduceScatter).any(|step| step.action == Some(Action::Finish)) {
                self.wait_all(|area| &area.sent, generation, "reduce_scatter")?;
                let own = run.at(job.src.ptr, chunk.offset_elems).cast_const();
                let mut terms = PerRank::new(own, run.group.world_size());
                for peer in run.group.peers() {
                    let slot = self.terms(self.area(peer), generation);
                    terms.set(peer, run.at(slot, self.place_of(peer, run.group.rank)).cast_const());
                }
                if kind == Kind::AllReduce {
                    let (dst, element_bytes) = (run.at(job.dst.ptr, chunk.offset_elems), run.dtype.size_bytes());
                    run.group.hand_over.make(dst, result, chunk.len_elems * element_bytes, |at, len, places| {
                        let part = Span { offset_elems: at / element_bytes, len_elems: len / element_bytes };
                        run.reduce(&terms, part, places);
                    });
                } else {
                    let whole = Span { offset_elems: 0, len_elems: chunk.len_elems };
                    let in_shard = chunk.offset_elems - self.schedule.shard(run.group.rank).offset_elems;
                    run.reduce(&terms, whole, &[run.at(job.dst.ptr, in_shard)]);
                }
            } else if has_result {
                run.hand_over(run.at(job.dst.ptr, chunk.offset_elems), result, chunk.len_elems);
            }
        }
        mine.reduced.post(generation);
        Ok(())
    }

    /// Takes the others' finished chunks.
    ///
    /// # Safety
    /// As for [`run`].
    unsafe fn gather(&self, round: u64) -> Result<()> {
        let (run, generation) = (self.run, self.generation(round));
        for step in self.schedule.steps(run.group.rank, round) {
            let (Some(recv), Some(Action::Copy)) = (step.recv, step.action) else { continue };
            run.wait(&self.area(recv.peer).reduced, generation, recv.peer, "all_gather")?;
            let slot = self.result(self.area(recv.peer), generation);
            // SAFETY: the chunk is final once its owner has posted `reduced`, until this rank posts `gathered`.
            unsafe { run.copy(slot, run.at(run.job.dst.ptr, recv.span.offset_elems), recv.span.len_elems) };
        }
        self.area(run.group.rank).gathered.post(generation);
        Ok(())
    }

    fn steps(&self, round: u64, phase: Phase) -> impl Iterator<Item = Step> {
        self.schedule.steps(self.run.group.rank, round).filter(move |step| step.phase == phase)
    }

    /// Where in the terms of `sender` those of `owner` begin: the sender's own have no place.
    fn place_of(&self, sender: u32, owner: u32) -> usize {
        debug_assert_ne!(sender, owner);
        let world_size = self.run.group.world_size();
        ((owner + world_size - sender - 1) % world_size) as usize * self.slot_elems
    }

    /// Where `area`'s rank has its terms of a round, [`slot_elems`](Staged::slot_elems) for each other owner.
    fn terms(&self, area: &Area, generation: u32) -> *mut u8 {
        let slot_bytes = self.slot_elems * self.run.dtype.size_bytes();
        area.terms.place(generation, slot_bytes * (self.run.group.world_size() as usize - 1))
    }

    /// Where `area`'s rank has its finished chunk of a round.
    fn result(&self, area: &Area, generation: u32) -> *mut u8 {
        area.result.place(generation, self.slot_elems * self.run.dtype.size_bytes())
    }

    fn area(&self, rank: u32) -> &Area {
        self.run.group.area(rank)
    }

    fn wait_all<'s>(&'s self, flag: impl Fn(&'s Area) -> &'s Flag, generation: u32, place: &'static str) -> Result<()> {
        self.run.group.peers().try_for_each(|peer| self.run.wait(flag(self.area(peer)), generation, peer, place))
    }
}
