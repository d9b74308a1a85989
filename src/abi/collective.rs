//! `kernels/collective.cu`: the step table that a [`Schedule`] becomes, and all that the kernel is told.
//!
//! ```text
//!   Schedule::steps(rank)                          step table
//!   send x1 -> 1,  recv x0 from 3, reduce          send START x1 -> 1
//!   send x0 -> 1,  recv x3 from 3, reduce          recv x0 from 3, PARTIAL, send -> 1      a receive and the send after it
//!   send x3 -> 1,  recv x2 from 3, finish          recv x3 from 3, PARTIAL, send -> 1      of the same chunk are one entry
//!   send x2 -> 1,  recv x1 from 3, copy            recv x2 from 3, FINISH -> output, send -> 1
//! ```
//! `Hold` is no entry: the finish of `Direct` waits for all terms at once.

use std::mem::{offset_of, size_of};

use bytemuck::{Pod, Zeroable};

use crate::dtype::{DType, ReduceOp};
use crate::schedule::{Action, Algorithm, Blocks, Collective, Phase, Schedule};

/// Most ranks of one cooperative grid.
pub const MAX_RANKS_IN_GRID: usize = 8;
/// Most threads of a block; a block has a multiple of 32.
pub const MAX_COLLECTIVE_THREADS: u32 = 512;
/// Most entries of a step table.
pub const MAX_STEPS: usize = 192;
/// From one channel's flag to the next.
pub const FLAG_STRIDE_BYTES: usize = 64;
/// Numbers that a rank's kernels tell each peer's stream; one for each [`Awaited`].
pub const SIGNALS: usize = 3;
/// Stands for a peer where there is none.
pub const NOBODY: u8 = 0xff;
/// Stands for all peers, as those who receive a copy of the input, by [`Protocol::Words`].
pub const EVERYBODY: u8 = 0xfe;

/// How a chunk travels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Protocol {
    /// Elements, then a flag: large messages.
    Bulk = 0,
    /// 4 bytes of payload with 4 bytes of generation: small messages. Has slots of its own, zero at first.
    Words = 1,
}

/// One direction each way between this rank and a peer, on one protocol. An array over the ranks; the own entry is zero.
///
/// Slots, `[channel][slot]`, are `slot_bytes` apart and 16-byte aligned; flags, `[channel]`, are [`FLAG_STRIDE_BYTES`]
/// apart. All memory is zero at first. Every flag has one writer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Zeroable, Pod)]
#[repr(C)]
pub struct Link {
    /// Slots in the peer's memory; this rank writes.
    pub send_slots: u64,
    /// u32 flags in the peer's memory; this rank writes how many transfers it has sent.
    pub send_flags: u64,
    /// u32 flags in this rank's memory; the peer writes how many of those it has taken.
    pub credits: u64,
    /// Slots in this rank's memory; the peer writes.
    pub recv_slots: u64,
    /// u32 flags in this rank's memory; the peer writes how many transfers it has sent.
    pub recv_flags: u64,
    /// u32 flags in the peer's memory; this rank writes how many of those it has taken.
    pub give_back: u64,
    /// `[2]` u64 in this rank's memory; the peer writes its greetings. Common to both protocols.
    pub greeting: u64,
    /// `[2]` u64 in the peer's memory.
    pub peer_greeting: u64,
    /// `[channel]` [`Progress`] in this rank's memory, of the kernel alone.
    pub progress: u64,
}

const _: () = assert!(size_of::<Link>() == 72);

/// Transfers of one link and channel so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Zeroable, Pod)]
#[repr(C)]
pub struct Progress {
    /// Sent.
    pub sent: u32,
    /// Taken.
    pub taken: u32,
}

/// Where the owners' shards are: that of owner `o` is the blocks `b(o)..b(o + 1)` with
/// `b(o) = o * blocks_per_shard + min(o, extra_blocks)`, as far as the vector goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Zeroable, Pod)]
#[repr(C)]
pub struct Shards {
    /// Elements of the vector.
    pub len_elems: u64,
    /// Elements of a block.
    pub block_elems: u64,
    /// Blocks that every owner has.
    pub blocks_per_shard: u64,
    /// The number of leading owners that have one more.
    pub extra_blocks: u64,
}

/// What a step moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Source {
    /// The own input as it is.
    Input = 0,
    /// The own output as it is.
    Result = 1,
    /// What was received as it is.
    Received = 2,
    /// A partial sum of the own term.
    Start = 3,
    /// The received partial and the own term.
    Partial = 4,
    /// The received partial and the own term, finished.
    Finish = 5,
    /// The terms of all ranks in their order, finished.
    All = 6,
}

/// One entry of the step table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Zeroable, Pod)]
#[repr(C)]
pub struct Step {
    /// Who sends, or [`NOBODY`].
    pub recv_peer: u8,
    /// Who receives, or [`NOBODY`], or of a copy [`EVERYBODY`].
    pub send_peer: u8,
    /// The chunk, by its owner; 0 in a broadcast and in [`ONE_STEP`].
    pub chunk: u8,
    /// Code of a [`Source`].
    pub source: u8,
    /// 1: the own output gets it.
    pub to_output: u8,
    /// 0 reduce-scatter, 1 all-gather, 2 broadcast, [`ONE_STEP_PHASE`]; for fault records, as is `index`.
    pub phase: u8,
    /// Index of the schedule's step that receives, or else sends.
    pub index: u16,
}

const _: () = assert!(size_of::<Step>() == 8);

/// What a rank's kernels keep from one operation to the next. Zero at first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Zeroable, Pod)]
#[repr(C)]
pub struct RankState {
    /// Operations finished.
    pub operation: u32,
    /// Blocks of the running one that have ended.
    pub blocks: u32,
}

/// Why a block gave up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Reason {
    /// The deadline of a wait has passed.
    Late = 1,
    /// The host had set the abort word.
    Aborted = 2,
    /// A peer runs another operation: `expected` and `seen` are the descriptors' hashes.
    Mismatch = 3,
}

impl Reason {
    /// The reason with this code, if there is one; 0 is none.
    pub const fn from_code(code: u32) -> Option<Reason> {
        match code {
            1 => Some(Reason::Late),
            2 => Some(Reason::Aborted),
            3 => Some(Reason::Mismatch),
            _ => None,
        }
    }
}

/// What a block waited for when it gave up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Awaited {
    /// The peer's arrival at the operation.
    Greeting = 0,
    /// A chunk from the peer.
    Data = 1,
    /// A free slot at the peer.
    Credit = 2,
}

impl Awaited {
    /// What has this code, if anything has.
    pub const fn from_code(code: u32) -> Option<Awaited> {
        match code {
            0 => Some(Awaited::Greeting),
            1 => Some(Awaited::Data),
            2 => Some(Awaited::Credit),
            _ => None,
        }
    }
}

/// Written once by a block that gives up, in host-visible memory. Zero at first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Zeroable, Pod)]
#[repr(C)]
pub struct FaultRecord {
    /// Code of a [`Reason`], or 0: no fault. Written last (release): read it first (acquire).
    pub reason: u32,
    /// Which operation of this group on the device, from 1.
    pub operation: u32,
    /// Who gave up.
    pub rank: u32,
    /// Who was waited for.
    pub peer: u32,
    /// Code of an [`Awaited`].
    pub awaited: u32,
    /// As in [`Step`].
    pub phase: u32,
    /// As in [`Step`].
    pub index: u32,
    /// As in [`Step`].
    pub chunk: u32,
    /// Round of the schedule.
    pub round: u64,
    /// The generation that was waited for, or this rank's descriptor hash.
    pub expected: u32,
    /// The generation that was there, or the peer's descriptor hash.
    pub seen: u32,
}

const _: () = assert!(size_of::<FaultRecord>() == 48 && offset_of!(FaultRecord, round) == 32);

/// What the kernel is told of one rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Zeroable, Pod)]
#[repr(C)]
pub struct RankArguments {
    /// Where element 0 of the whole vector is in the input, or would be if the input is a shard.
    pub input: u64,
    /// Likewise in the output; the same as `input` in place.
    pub output: u64,
    /// Likewise of a copy of the finished chunks in `cast_dtype`; or 0.
    pub cast_output: u64,
    /// `[world_size]` [`Link`].
    pub links: u64,
    /// `[len_steps]` [`Step`].
    pub steps: u64,
    /// [`RankState`].
    pub state: u64,
    /// u32; the host sets it to end all waits.
    pub abort: u64,
    /// `[channels]` [`FaultRecord`].
    pub faults: u64,
    /// u32, host-visible: operations finished, written last; or 0.
    pub finished: u64,
    /// `[channels]` f64 of the kernel's own; or 0: no sum of squares.
    pub squares: u64,
    /// f64: the sum of squares of the elements that this rank finished, from the sums before they are narrowed.
    pub sum_squares: u64,
    /// u32 set to 1 if one of those is infinite or NaN; or 0.
    pub found_nonfinite: u64,
    /// `[world_size]` addresses of `[3]` u32 at the peers, in memory of the host, where their streams see how far this rank is:
    /// operations greeted, transfers sent, transfers taken (in the order of [`Awaited`]). Or 0: the kernel is the whole
    /// operation. Not with `squares`.
    pub signals: u64,
    /// Entries of the step table, at most [`MAX_STEPS`].
    pub len_steps: u32,
    /// This rank.
    pub rank: u32,
}

const _: () = assert!(size_of::<RankArguments>() == 112 && offset_of!(RankArguments, len_steps) == 104);

/// The argument of `collective_*`.
#[derive(Debug, Clone, Copy, PartialEq, Zeroable, Pod)]
#[repr(C)]
pub struct CollectiveArguments {
    /// Where the shards are.
    pub shards: Shards,
    /// Rounds of the schedule.
    pub rounds: u64,
    /// Elements of a shard that a round moves.
    pub round_elems: u64,
    /// Elements of a chunk that a channel moves; see [`piece_elems`].
    pub piece_elems: u64,
    /// From one slot to the next: at least [`slot_bytes`], a multiple of 16, and always the same for a link.
    pub slot_bytes: u64,
    /// Longest single wait.
    pub timeout_ns: u64,
    /// Factor of a premultiplied sum.
    pub factor: f64,
    /// The first round that is run; `rounds` is the one behind the last.
    pub first_round: u64,
    /// Ranks of the group.
    pub world_size: u32,
    /// Blocks per rank.
    pub channels: u32,
    /// Slots per link, direction and channel; at least 2, and always the same for a link.
    pub slots: u32,
    /// Code of a [`Protocol`].
    pub protocol: u32,
    /// Code of the reduction; see [`reduce_code`].
    pub op: u32,
    /// 1: a ring's partial sums of 16-bit floats travel in the element type.
    pub native_partials: u32,
    /// Hash of all that must be the same on every rank.
    pub descriptor: u32,
    /// Code of the float type of `cast_output`: f32, f16 or bf16.
    pub cast_dtype: u32,
    /// 1: the kernel begins the operation: it greets.
    pub opens: u32,
    /// 1: it ends the operation.
    pub closes: u32,
    /// The ranks in the grid: one, or several in a cooperative launch.
    pub ranks: [RankArguments; MAX_RANKS_IN_GRID],
}

const _: () = assert!(offset_of!(CollectiveArguments, ranks) == 128 && size_of::<CollectiveArguments>() == 1024);

/// Name of the entry for elements of `dtype`.
pub const fn collective_entry(dtype: DType) -> &'static str {
    match dtype {
        DType::F32 => "collective_f32",
        DType::F16 => "collective_f16",
        DType::BF16 => "collective_bf16",
        DType::F64 => "collective_f64",
        DType::I32 => "collective_i32",
        DType::I64 => "collective_i64",
        DType::U8 => "collective_u8",
    }
}

/// The kernel's code of a reduction.
pub const fn reduce_code(op: ReduceOp) -> u32 {
    match op {
        ReduceOp::Sum => 0,
        ReduceOp::Avg => 1,
        ReduceOp::Min => 2,
        ReduceOp::Max => 3,
        ReduceOp::PremulSum(_) => 4,
    }
}

/// Elements that each of `channels` blocks moves of the largest chunk, which has `chunk_elems`: equal parts in whole packs of
/// any element type.
pub fn piece_elems(chunk_elems: u64, channels: u32) -> u64 {
    chunk_elems.div_ceil(channels.max(1).into()).next_multiple_of(16).max(16)
}

/// What a slot must hold for pieces of `piece_elems`: a piece may begin up to 15 elements into it, and `wire_bytes` is the
/// size of an element, or of an f32 where partial sums travel as such. `None` if it does not fit 64 bits.
pub fn slot_bytes(piece_elems: u64, wire_bytes: usize, protocol: Protocol) -> Option<u64> {
    let bytes = piece_elems.checked_add(16)?.checked_mul(wire_bytes as u64)?;
    match protocol {
        Protocol::Bulk => Some(bytes),
        Protocol::Words => bytes.checked_mul(2),
    }
}

/// The shards of `schedule`. Of a broadcast there is one, which step tables call chunk 0.
pub fn shards(schedule: &Schedule) -> Shards {
    if let Collective::Broadcast { .. } = schedule.collective() {
        return one_shard(schedule.len_elems());
    }
    let Blocks { block_elems, per_shard, extra } = schedule.blocks();
    Shards {
        len_elems: schedule.len_elems() as u64,
        block_elems: block_elems as u64,
        blocks_per_shard: per_shard as u64,
        extra_blocks: extra as u64,
    }
}

/// The vector as a whole, which is chunk 0.
pub fn one_shard(len_elems: usize) -> Shards {
    Shards { len_elems: len_elems as u64, block_elems: len_elems as u64, blocks_per_shard: 1, extra_blocks: 0 }
}

/// Phase of the steps of [`ONE_STEP`].
pub const ONE_STEP_PHASE: u32 = 3;

/// The step table for an all-reduce of [`one_shard`] that goes to every rank at once: each sends its whole vector to
/// all others and adds all of them in rank order, so that the bits are those of [`Algorithm::Direct`]. One trip over the links
/// instead of two, for `N - 1` times the vector instead of `2 (N - 1) / N` times. Each link has one transfer a round. By [`Protocol::Words`].
pub const ONE_STEP: [Step; 2] = {
    let send = Step {
        recv_peer: NOBODY,
        send_peer: EVERYBODY,
        chunk: 0,
        source: Source::Input as u8,
        to_output: 0,
        phase: ONE_STEP_PHASE as u8,
        index: 0,
    };
    [send, Step { send_peer: NOBODY, source: Source::All as u8, to_output: 1, ..send }]
};

/// The step table of `rank`: what it does in every round of `schedule`. Empty if there is no such rank or no round.
pub fn steps(schedule: &Schedule, rank: u32) -> Vec<Step> {
    let (collective, algorithm) = (schedule.collective(), schedule.algorithm());
    let reduces = matches!(collective, Collective::AllReduce | Collective::ReduceScatter);
    let is_broadcast = matches!(collective, Collective::Broadcast { .. });
    let mut table: Vec<Step> = Vec::new();
    // Moving the own data is no step of the schedule: the first send of the own chunk does it, or an entry of its own.
    let mut own_to_place = match collective {
        Collective::AllGather => true,
        Collective::Broadcast { root } => rank == root,
        _ => false,
    };
    for step in schedule.steps(rank, 0) {
        let entry = |chunk: u32, source: Source| Step {
            recv_peer: NOBODY,
            send_peer: NOBODY,
            chunk: if is_broadcast { 0 } else { chunk as u8 },
            source: source as u8,
            to_output: 0,
            phase: step.phase as u8,
            index: step.index as u16,
        };
        if let Some(send) = step.send {
            let peer = send.peer as u8;
            match table.last_mut() {
                Some(last) if last.recv_peer != NOBODY && (is_broadcast || u32::from(last.chunk) == send.chunk) => {
                    last.send_peer = peer;
                }
                _ => {
                    let source = match (step.phase, algorithm) {
                        (Phase::ReduceScatter, Algorithm::Ring) => Source::Start,
                        (Phase::AllGather, _) if reduces => Source::Result,
                        _ => Source::Input,
                    };
                    let to_output = u8::from(std::mem::take(&mut own_to_place));
                    table.push(Step { send_peer: peer, to_output, ..entry(send.chunk, source) });
                }
            }
        }
        let source = match step.action {
            None | Some(Action::Hold) => continue,
            Some(Action::Copy) => Source::Received,
            Some(Action::Reduce) => Source::Partial,
            Some(Action::Finish) if algorithm == Algorithm::Ring && step.recv.is_some() => Source::Finish,
            Some(Action::Finish) => Source::All,
        };
        let (recv_peer, chunk) = step.recv.map_or((NOBODY, rank), |recv| (recv.peer as u8, recv.chunk));
        table.push(Step { recv_peer, to_output: u8::from(source != Source::Partial), ..entry(chunk, source) });
    }
    if own_to_place && rank < schedule.world_size() && schedule.rounds() > 0 {
        let phase = if collective == Collective::AllGather { Phase::AllGather } else { Phase::Broadcast };
        table.push(Step {
            recv_peer: NOBODY,
            send_peer: NOBODY,
            chunk: if is_broadcast { 0 } else { rank as u8 },
            source: Source::Input as u8,
            to_output: 1,
            phase: phase as u8,
            index: 0,
        });
    }
    table
}
