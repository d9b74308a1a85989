//! Which rank moves which chunk when, as pure data: no device, no thread, no clock, and no heap but in [`ring_order`].
//!
//! The host executor, the CUDA step table and the model checker all read the same [`Schedule`], so a collective is
//! proved once and interpreted three times. A `Schedule` is a handful of numbers (`Copy`); every [`Step`] is computed
//! when it is asked for.
//!
//! # Shards, rounds, chunks
//! The vector is cut into one *shard* per rank; the rank is the shard's *owner*. A *round* moves at most `round_elems`
//! elements of every shard (so a staging slot of [`Schedule::slot_elems`] elements is enough for any length); that
//! piece is the *chunk*, and it is named by its owner.
//!
//! ```text
//!             shard 0              shard 1              shard 2            world_size = 3
//!      ├────────┼───────┤   ├────────┼───────┤   ├────────┼─────┤
//! round    0        1           0        1           0       1             last chunks may be short or empty
//! ```
//!
//! A transfer of an empty chunk is listed like any other: the number of steps, and so every generation counter, depends
//! on the lengths only through the number of rounds, and is the same on every rank. No byte need move for it.
//!
//! # Algorithms
//! Steps of a round (`N` ranks) and elements that all ranks together put on the wire for a vector of `S` elements (each
//! rank its `1/N` part when `N` divides `S`, so an all-reduce costs every rank `2(N-1)/N * S`):
//!
//! | collective     | `Ring` steps | `Direct` steps | elements on the wire, all ranks |
//! |----------------|--------------|----------------|---------------------------------|
//! | all-reduce     | 2(N-1)       | 2(N-1)         | 2(N-1) S                        |
//! | reduce-scatter | N-1          | N-1            | (N-1) S                         |
//! | all-gather     | N-1          | N-1            | (N-1) S                         |
//! | broadcast      | N-1          | N-1            | (N-1) S (`Direct`: all of it from the root) |
//!
//! `2(N-1)/N * S` is the least that any all-reduce can send (Patarasuk & Yuan, "Bandwidth optimal all-reduce algorithms
//! for clusters of workstations", J. Parallel Distrib. Comput. 69, 2009). The two algorithms differ in who talks to
//! whom, and in the order of the additions:
//!
//! **Ring** talks to neighbours only. The partial sum of chunk `c` starts at rank `c+1` and travels once around to its
//! owner `c`, gaining one term per hop; then the finished chunk travels once around.
//! ```text
//!   reduce-scatter, N = 4: rank r sends chunk r-1-s in step s          all-gather: rank r sends chunk r-s
//!                s=0       s=1       s=2                                    s=3       s=4       s=5
//!   chunk 0:   1 ──▶ 2   2 ──▶ 3   3 ──▶ 0 (finish: x1+x2+x3+x0)          0 ──▶ 1   1 ──▶ 2   2 ──▶ 3
//!   chunk 1:   2 ──▶ 3   3 ──▶ 0   0 ──▶ 1                                1 ──▶ 2   2 ──▶ 3   3 ──▶ 0
//!   chunk 2:   3 ──▶ 0   0 ──▶ 1   1 ──▶ 2                                2 ──▶ 3   3 ──▶ 0   0 ──▶ 1
//!   chunk 3:   0 ──▶ 1   1 ──▶ 2   2 ──▶ 3                                3 ──▶ 0   0 ──▶ 1   1 ──▶ 2
//! ```
//! **Direct** (staged) sends every term straight to its owner, one peer per pass: in pass `p` the ranks form one
//! permutation, so each has one stream out and one in. The owner holds the terms where they arrived and adds all `N` in
//! rank order `0..N-1` at the end: its bits depend neither on lengths nor on rounds.
//! ```text
//!   N = 4                  pass 1              pass 2              pass 3
//!   reduce-scatter      r ──x[r+1]──▶ r+1   r ──x[r+2]──▶ r+2   r ──x[r+3]──▶ r+3   finish: x0+x1+x2+x3 at each owner
//!   all-gather          r ──sum[r]──▶ r+1   r ──sum[r]──▶ r+2   r ──sum[r]──▶ r+3
//! ```
//!
//! # Running it
//! `tests/schedule` executes plans symbolically; `tests/protocol_model` explores all interleavings of small worlds.
//!
//! A rank runs its steps in order, and in each step **sends before it receives**. A link (sender, receiver) carries its
//! transfers in the order of the steps; the k-th send of one side is the k-th receive of the other. With `slots`
//! staging slots per link the sender of transfer `k` waits until the receiver has given back transfer `k - slots`.
//!
//! Nothing can block for ever. A receive of step `t` needs the send of step `t`; a send of step `t` needs only receives
//! of earlier steps. That argument assumes that a slot is given back before the next send. An executor that reduces
//! straight from its own slot into the next rank's (and so gives back only after that send) needs **two slots per
//! link**: with one, every rank waits for its successor's slot while it holds its own. [`Action::Hold`] keeps one slot
//! of each link until [`Action::Finish`].
//!
//! Moving a rank's own data is no step: an out-of-place all-gather or broadcast copies its own shard first. A world of
//! one has the usual rounds; its reduction is a single `Finish` without a transfer, so that scaling (average,
//! premultiplied sum) runs the same code.
#![forbid(unsafe_code)]

mod direct;
mod order;
mod ring;

pub use order::ring_order;

use crate::error::{Error, Result};

/// Largest world a schedule can be made for.
pub const MAX_WORLD_SIZE: u32 = 64;

/// Who talks to whom; see the [module](self) for pictures and costs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Algorithm {
    /// Neighbours only; partial sums travel. Patarasuk & Yuan 2009.
    Ring,
    /// Every term straight to its owner, one peer per pass; the owner adds in rank order.
    Direct,
}

/// What a schedule achieves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Collective {
    /// Every rank ends with the reduction of the whole vector.
    AllReduce,
    /// Every rank ends with the reduction of its own shard.
    ReduceScatter,
    /// Every rank ends with all shards.
    AllGather,
    /// Every rank ends with the root's vector.
    Broadcast {
        /// The rank whose vector it is.
        root: u32,
    },
}

/// The part of the collective that a step belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Phase {
    /// Terms or partial sums travel towards the owners.
    ReduceScatter,
    /// Finished chunks travel from the owners.
    AllGather,
    /// The root's chunks travel.
    Broadcast,
}

/// What the receiver does with what it received in this step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Action {
    /// Store it: it is final.
    Copy,
    /// Add the own term to it (received first, own second); the sum is what the next step of the round sends. `Ring`
    /// only.
    Reduce,
    /// Leave it in its slot until `Finish`. `Direct` only.
    Hold,
    /// The owner's last: make the final value of its chunk and scale it. `Ring`: received + own. `Direct`: all `N`
    /// terms in rank order `0..N-1`, the held ones and the own one in its place. World of one: the own term. Always
    /// concerns [`Schedule::chunk`]`(round, rank)`.
    Finish,
}

/// A piece of the whole vector.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Span {
    /// First element.
    pub offset_elems: usize,
    /// Number of elements; may be 0.
    pub len_elems: usize,
}

impl Span {
    /// One past the last element.
    pub const fn end_elems(self) -> usize {
        self.offset_elems + self.len_elems
    }

    /// Whether there is nothing in it.
    pub const fn is_empty(self) -> bool {
        self.len_elems == 0
    }
}

/// How a vector is cut into shards: of whole blocks, of which the first shards have one more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Blocks {
    /// Elements of a block; the vector's last one may be shorter.
    pub block_elems: usize,
    /// Blocks of every shard.
    pub per_shard: usize,
    /// Leading shards that have one more.
    pub extra: usize,
}

/// One chunk on its way between this rank and `peer`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Transfer {
    /// The other rank.
    pub peer: u32,
    /// The chunk, by its owner (`Broadcast`: the root).
    pub chunk: u32,
    /// Where the chunk lies in the whole vector.
    pub span: Span,
}

/// What one rank does at one place of a round: first the send, then the receive with its action.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Step {
    /// Part of the collective.
    pub phase: Phase,
    /// Number of the step in its round, the same on both sides of a transfer. Steps in which a rank has nothing to do
    /// (`Broadcast`) are left out, so the indices of one rank ascend but need not be contiguous.
    pub index: u32,
    /// What to send, if anything.
    pub send: Option<Transfer>,
    /// What to receive, if anything.
    pub recv: Option<Transfer>,
    /// What to do after receiving. `Some` exactly when `recv` is, but for the lone `Finish` of a world of one.
    pub action: Option<Action>,
}

/// The plan of one collective over one vector.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Schedule {
    collective: Collective,
    algorithm: Algorithm,
    world_size: u32,
    len_elems: usize,
    round_elems: usize,
    /// Shard boundaries are multiples of this.
    block_elems: usize,
    /// Blocks in every shard, and the number of leading shards that have one more.
    blocks_per_shard: usize,
    shards_with_extra_block: usize,
}

impl Schedule {
    /// Plans `collective` over a vector of `len_elems` elements.
    ///
    /// - `world_size`: 1..=[`MAX_WORLD_SIZE`].
    /// - `len_elems`: the whole vector; for reduce-scatter and all-gather `world_size` equal shards. 0 is a plan
    ///   without rounds.
    /// - `round_elems`: the largest piece of a shard moved in one round, at least 1. Make it a multiple of
    ///   `align_elems` if chunks are to be aligned, too.
    /// - `align_elems`: shard boundaries of an all-reduce fall on multiples of it (cache lines, vector packs), at
    ///   least 1. Shards differ by at most one such block.
    ///
    /// # Errors
    /// `InvalidArgument` names the argument outside these ranges, a root that is no rank, or a length that
    /// reduce-scatter and all-gather cannot cut into equal shards. `SizeOverflow`: some rank would send more than
    /// `usize::MAX` elements.
    pub fn new(
        collective: Collective,
        algorithm: Algorithm,
        world_size: u32,
        len_elems: usize,
        round_elems: usize,
        align_elems: usize,
    ) -> Result<Self> {
        let refuse = |argument, value: String, accepted| Err(Error::InvalidArgument { argument, value, accepted });
        if !(1..=MAX_WORLD_SIZE).contains(&world_size) {
            return refuse("world_size", world_size.to_string(), "a world has 1..=64 ranks");
        }
        if round_elems == 0 {
            return refuse("round_elems", round_elems.to_string(), "a round moves at least 1 element");
        }
        if align_elems == 0 {
            return refuse("align_elems", align_elems.to_string(), "the alignment is at least 1 element");
        }
        let shards = world_size as usize;
        let block_elems = match collective {
            Collective::AllReduce => align_elems,
            Collective::ReduceScatter | Collective::AllGather if !len_elems.is_multiple_of(shards) => {
                return refuse("len_elems", len_elems.to_string(), "it must be a multiple of the world size");
            }
            Collective::ReduceScatter | Collective::AllGather => 1,
            Collective::Broadcast { root } if root >= world_size => {
                return refuse("root", root.to_string(), "the root is a rank below the world size");
            }
            Collective::Broadcast { .. } => 1,
        };
        let blocks = len_elems.div_ceil(block_elems);
        let schedule = Self {
            collective,
            algorithm,
            world_size,
            len_elems,
            round_elems,
            block_elems,
            blocks_per_shard: blocks / shards,
            shards_with_extra_block: blocks % shards,
        };
        // Nobody sends more than 2 * 63 times the vector; a small operation has no time for 64 products of u128.
        let may_overflow = len_elems > usize::MAX / 128;
        for rank in (0..world_size).take_while(|_| may_overflow) {
            if usize::try_from(schedule.wire_elems_sent_wide(rank)).is_err() {
                return Err(Error::SizeOverflow {
                    what: "the elements that one rank sends",
                    detail: format!("{collective:?} by {algorithm:?} of {len_elems} elements over {world_size} ranks"),
                });
            }
        }
        Ok(schedule)
    }

    /// What is planned.
    pub const fn collective(&self) -> Collective {
        self.collective
    }

    /// How.
    pub const fn algorithm(&self) -> Algorithm {
        self.algorithm
    }

    /// Number of ranks.
    pub const fn world_size(&self) -> u32 {
        self.world_size
    }

    /// Length of the whole vector.
    pub const fn len_elems(&self) -> usize {
        self.len_elems
    }

    /// The whole shard of `owner`; of a broadcast the root owns everything. Empty if `owner` is no rank.
    pub fn shard(&self, owner: u32) -> Span {
        let (begin, end) = match self.collective {
            Collective::Broadcast { root } if owner == root => (0, self.len_elems),
            Collective::Broadcast { root } if owner < root => (0, 0),
            Collective::Broadcast { .. } => (self.len_elems, self.len_elems),
            _ if owner >= self.world_size => (self.len_elems, self.len_elems),
            _ => (self.shard_begin(owner as usize), self.shard_begin(owner as usize + 1)),
        };
        Span { offset_elems: begin, len_elems: end - begin }
    }

    /// The blocks that shards are made of; of a broadcast, whose root owns everything, without meaning.
    pub const fn blocks(&self) -> Blocks {
        Blocks { block_elems: self.block_elems, per_shard: self.blocks_per_shard, extra: self.shards_with_extra_block }
    }

    /// Number of rounds; 0 for an empty vector.
    pub fn rounds(&self) -> u64 {
        self.largest_shard_elems().div_ceil(self.round_elems) as u64
    }

    /// Elements of the largest chunk: what one staging slot must hold.
    pub fn slot_elems(&self) -> usize {
        self.largest_shard_elems().min(self.round_elems)
    }

    /// The piece of `owner`'s shard that `round` moves. Empty, at the end of the shard, when the shard has no such
    /// piece.
    pub fn chunk(&self, round: u64, owner: u32) -> Span {
        let shard = self.shard(owner);
        // A product that does not fit lies beyond every shard.
        let begin = usize::try_from(round)
            .ok()
            .and_then(|round| round.checked_mul(self.round_elems))
            .map_or(shard.len_elems, |begin| begin.min(shard.len_elems));
        Span { offset_elems: shard.offset_elems + begin, len_elems: (shard.len_elems - begin).min(self.round_elems) }
    }

    /// The steps of `rank` in `round`, in the order to run them. None if there is no such rank or round.
    pub fn steps(&self, rank: u32, round: u64) -> Steps {
        let range = if rank < self.world_size && round < self.rounds() { self.busy_steps(rank) } else { 0..0 };
        Steps { schedule: *self, rank, round, range }
    }

    /// Elements that `rank` sends over all rounds, by formula; it equals the sum over the steps. 0 if it is no rank.
    pub fn wire_elems_sent(&self, rank: u32) -> usize {
        // `new` made sure that it fits.
        usize::try_from(self.wire_elems_sent_wide(rank)).unwrap_or(usize::MAX)
    }

    /// First element of shard `owner`, where `owner == world_size` is the end of the vector.
    fn shard_begin(&self, owner: usize) -> usize {
        let block = owner * self.blocks_per_shard + owner.min(self.shards_with_extra_block);
        // Only the end of the last block can exceed the vector, and only that product can exceed usize.
        block.saturating_mul(self.block_elems).min(self.len_elems)
    }

    fn largest_shard_elems(&self) -> usize {
        match self.collective {
            Collective::Broadcast { .. } => self.len_elems,
            // Extra blocks go to the first shards, a short last block to the last shard that has any.
            _ => self.shard(0).len_elems,
        }
    }

    /// Indices of the steps in which `rank` does something.
    fn busy_steps(&self, rank: u32) -> std::ops::Range<u32> {
        let world_size = self.world_size;
        match (self.collective, self.algorithm) {
            (Collective::AllReduce | Collective::ReduceScatter, _) if world_size == 1 => 0..1,
            (Collective::AllReduce, _) => 0..2 * (world_size - 1),
            (Collective::ReduceScatter | Collective::AllGather, _) => 0..world_size - 1,
            (Collective::Broadcast { root }, Algorithm::Ring) => ring::broadcast_steps(rank, root, world_size),
            (Collective::Broadcast { root }, Algorithm::Direct) => direct::broadcast_steps(rank, root, world_size),
        }
    }

    fn step(&self, rank: u32, round: u64, index: u32) -> Step {
        let world_size = self.world_size;
        let (phase, exchange) = match self.collective {
            Collective::Broadcast { root } => {
                let exchange = match self.algorithm {
                    Algorithm::Ring => ring::broadcast(rank, root, index, world_size),
                    Algorithm::Direct => direct::broadcast(rank, root, index, world_size),
                };
                (Phase::Broadcast, exchange)
            }
            Collective::AllReduce | Collective::ReduceScatter if world_size == 1 => {
                (Phase::ReduceScatter, Exchange { send: None, recv: None, action: Some(Action::Finish) })
            }
            Collective::AllReduce if index >= world_size - 1 => self.all_gather(rank, index - (world_size - 1)),
            Collective::AllGather => self.all_gather(rank, index),
            Collective::AllReduce | Collective::ReduceScatter => {
                let exchange = match self.algorithm {
                    Algorithm::Ring => ring::reduce_scatter(rank, index, world_size),
                    Algorithm::Direct => direct::reduce_scatter(rank, index, world_size),
                };
                (Phase::ReduceScatter, exchange)
            }
        };
        let transfer = |hop: Hop| Transfer { peer: hop.peer, chunk: hop.chunk, span: self.chunk(round, hop.chunk) };
        Step {
            phase,
            index,
            send: exchange.send.map(transfer),
            recv: exchange.recv.map(transfer),
            action: exchange.action,
        }
    }

    fn all_gather(&self, rank: u32, step: u32) -> (Phase, Exchange) {
        let exchange = match self.algorithm {
            Algorithm::Ring => ring::all_gather(rank, step, self.world_size),
            Algorithm::Direct => direct::all_gather(rank, step, self.world_size),
        };
        (Phase::AllGather, exchange)
    }

    /// [`Self::wire_elems_sent`] before it is known to fit: at most `64 * usize::MAX`.
    fn wire_elems_sent_wide(&self, rank: u32) -> u128 {
        if rank >= self.world_size {
            return 0;
        }
        let (all, peers) = (self.len_elems as u128, u128::from(self.world_size - 1));
        let shard = |owner: u32| self.shard(owner).len_elems as u128;
        // Reduce-scatter: everything but the own shard, by either algorithm.
        let scattered = all - shard(rank);
        let gathered = match self.algorithm {
            // Everything but what the next rank owns.
            Algorithm::Ring => all - shard(clockwise(rank, 1, self.world_size)),
            Algorithm::Direct => peers * shard(rank),
        };
        match self.collective {
            Collective::AllReduce => scattered + gathered,
            Collective::ReduceScatter => scattered,
            Collective::AllGather => gathered,
            Collective::Broadcast { root } => match self.algorithm {
                // The last of the chain is the rank before the root.
                Algorithm::Ring if clockwise(rank, 1, self.world_size) == root => 0,
                Algorithm::Ring => all,
                Algorithm::Direct if rank == root => peers * all,
                Algorithm::Direct => 0,
            },
        }
    }
}

/// The steps of one rank in one round; made by [`Schedule::steps`].
#[derive(Debug, Clone)]
pub struct Steps {
    schedule: Schedule,
    rank: u32,
    round: u64,
    range: std::ops::Range<u32>,
}

impl Iterator for Steps {
    type Item = Step;

    fn next(&mut self) -> Option<Step> {
        let index = self.range.next()?;
        Some(self.schedule.step(self.rank, self.round, index))
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        self.range.size_hint()
    }
}

impl ExactSizeIterator for Steps {}

/// A step before rounds: peers and chunks, no elements. What [`ring`] and [`direct`] know.
struct Exchange {
    send: Option<Hop>,
    recv: Option<Hop>,
    action: Option<Action>,
}

struct Hop {
    peer: u32,
    chunk: u32,
}

/// The rank `distance` places after `rank`.
const fn clockwise(rank: u32, distance: u32, world_size: u32) -> u32 {
    (rank + distance) % world_size
}

/// The rank `distance` places before `rank`; `distance <= 2 * world_size`.
const fn counterclockwise(rank: u32, distance: u32, world_size: u32) -> u32 {
    (rank + 2 * world_size - distance) % world_size
}
