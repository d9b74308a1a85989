//! The shared memory of one communicator: one area per rank, written by its owner, read by all.
//!
//! ```text
//!   area of rank r (GROUP_AREA_BYTES)
//!   ├─ call[2]        descriptor and buffer offsets of an operation, then its `arrived` flag    parity of the generation
//!   ├─ done           operations over mapped memory that this rank has finished
//!   ├─ sent, reduced, gathered                     rounds of the staged direct algorithm
//!   ├─ ring_sent, ring_taken                       steps of the ring: what I put in, what I took from my predecessor
//!   ├─ mailbox[2]     payload of one-step operations                                            parity of the generation
//!   ├─ terms[2]       this rank's terms for the other owners                                    parity of the round
//!   └─ result[2]      the finished chunk of this owner                                          parity of the round
//! ```
//!
//! Why two of each are enough:
//! - *call, mailbox*: a rank writes generation g+2 only after it saw everybody arrive at g+1, and arrives at g+1 only after
//!   it has read everything of g.
//! - *terms*: round g+2 is written after all have posted `reduced` g; *result*: after all have posted `gathered` g.
//!
//! All zeroes is the initial state: generation, round and step 0 are complete.

use std::cell::UnsafeCell;
use std::sync::atomic::AtomicU32;

use super::descriptor::Descriptor;
use crate::world::GROUP_AREA_BYTES;
use crate::world::flag::Flag;

/// Largest payload of a one-step operation, per rank.
pub(super) const MAILBOX_BYTES: usize = 64 << 10;
/// Room for the terms of one round, all owners together.
pub(super) const TERMS_BYTES: usize = 512 << 10;
/// Room for the finished chunk of one round.
pub(super) const RESULT_BYTES: usize = 512 << 10;

/// "This buffer is private": no offset in an arena.
pub(super) const PRIVATE: u64 = u64::MAX;

/// One rank's announcement of an operation.
#[derive(Clone, Copy, PartialEq, Eq, bytemuck::Zeroable, bytemuck::Pod)]
#[repr(C, align(8))]
pub(super) struct Call {
    pub(super) descriptor: Descriptor,
    /// Where the rank's input and output begin in its arena, or [`PRIVATE`].
    pub(super) src_offset_bytes: u64,
    pub(super) dst_offset_bytes: u64,
}

/// A cache line with a call on it.
#[repr(C, align(64))]
pub(super) struct CallCell(pub(super) UnsafeCell<Call>);

#[repr(C, align(4096))]
pub(super) struct Area {
    pub(super) call: [CallCell; 2],
    /// Generation of the last call written; published by its rank, waited for by all.
    pub(super) arrived: Flag,
    pub(super) done: Flag,
    pub(super) sent: Flag,
    pub(super) reduced: Flag,
    pub(super) gathered: Flag,
    pub(super) ring_sent: Flag,
    pub(super) ring_taken: Flag,
    /// Of the first member's area only: members that have dropped their communicator.
    pub(super) departed: AtomicU32,
    pub(super) mailbox: [Staging<MAILBOX_BYTES>; 2],
    pub(super) terms: [Staging<TERMS_BYTES>; 2],
    pub(super) result: [Staging<RESULT_BYTES>; 2],
}

const _: () = assert!(size_of::<Area>() <= GROUP_AREA_BYTES);

/// Bytes that one rank writes and others read, in turns that flags arrange.
#[repr(C, align(4096))]
pub(super) struct Staging<const BYTES: usize>(UnsafeCell<[u8; BYTES]>);

impl<const BYTES: usize> Staging<BYTES> {
    pub(super) fn as_ptr(&self) -> *mut u8 {
        self.0.get().cast()
    }
}
