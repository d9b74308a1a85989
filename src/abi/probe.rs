//! `kernels/probe.cu`: does what one rank writes into a peer's memory arrive there?

use std::mem::{offset_of, size_of};

use bytemuck::{Pod, Zeroable};

/// Threads of the one block of `probe_peer`.
pub const PROBE_THREADS: u32 = 256;

/// The argument of `probe_peer`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Zeroable, Pod)]
#[repr(C)]
pub struct ProbeArguments {
    /// `[len_words]` u32 in the peer's memory, written.
    pub peer_inbox: u64,
    /// u32 in the peer's memory; this rank is its one writer.
    pub peer_flag: u64,
    /// `[len_words]` u32 in this rank's memory, which the peer writes.
    pub inbox: u64,
    /// u32 in this rank's memory; the peer is its one writer.
    pub flag: u64,
    /// u32; the host sets it to end the wait.
    pub abort: u64,
    /// [`ProbeReport`], written at the end.
    pub report: u64,
    /// Longest wait for the peer.
    pub timeout_ns: u64,
    /// Words to try; the same on both ranks.
    pub len_words: u64,
    /// This rank.
    pub rank: u32,
    /// The other.
    pub peer: u32,
    /// Larger by one than in the pair's probe before; the same on both ranks.
    pub generation: u32,
    /// Not read.
    pub padding: u32,
}

const _: () = assert!(size_of::<ProbeArguments>() == 80 && offset_of!(ProbeArguments, rank) == 64);

/// What `probe_peer` found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Zeroable, Pod)]
#[repr(C)]
pub struct ProbeReport {
    /// Code of a [`Verdict`](super::Verdict).
    pub verdict: u32,
    /// The flag's generation when the wait ended.
    pub seen: u32,
    /// Words that are not what the peer wrote; 0 unless the peer arrived.
    pub wrong_words: u32,
}

const _: () = assert!(size_of::<ProbeReport>() == 12);
