//! The shared memory of one communicator: one area per rank, written by its owner, read by all.
//!
//! ```text
//!   area of rank r (GROUP_AREA_BYTES)
//!   ├─ call[2]        descriptor and buffer offsets of an operation, then its `arrived` flag    parity of the generation
//!   ├─ done           operations over mapped memory that this rank has finished
//!   ├─ sent, reduced, gathered                     rounds of the staged direct algorithm
//!   ├─ ring_sent, ring_taken                       steps of the ring: what I put in, what I took from my predecessor
//!   ├─ mailbox        payload of one-step operations                                            turn: how many there were
//!   ├─ terms          this rank's terms for the other owners                                    turn: the round, or the ring's step
//!   └─ result         the finished chunk of this owner                                          turn: the round
//! ```
//!
//! Why two turns at a time are enough:
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
pub(super) const MAILBOX_BYTES: usize = 1 << 20;
/// Room for the terms of one round, all other owners together.
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
    pub(super) mailbox: Staging<MAILBOX_BYTES>,
    pub(super) terms: Staging<TERMS_BYTES>,
    pub(super) result: Staging<RESULT_BYTES>,
}

const _: () = assert!(size_of::<Area>() <= GROUP_AREA_BYTES);

/// Bytes that one rank writes and others read, in turns that flags arrange: turn t+2 is written when all have read t.
///
/// Even turns have one half, odd turns the other, and within its half a turn takes the next place. A line that its reader
/// still has in a cache of its own must be recalled from there before it is written again, one trip between the cores for
/// each line; when the places are more than these caches hold, it lies in the cache that the cores share. Two ranks of a Zen 4
/// EPYC (1 MiB of second-level cache) hand each other 16, 64 and 256 KiB in 2.4, 9.0 and 29 us in two places, and in 1.0, 3.4 and
/// 13 over 2 MiB; over 1 MiB in 1.6, 5.6 and 17.
#[repr(C, align(4096))]
pub(super) struct Staging<const HALF_BYTES: usize>(UnsafeCell<[[u8; HALF_BYTES]; 2]>);

/// What is shorter stays at the first place of its half: there are too few lines to gain anything, and a page more to find.
const ROTATED_FROM_BYTES: usize = 8 << 10;

impl<const HALF_BYTES: usize> Staging<HALF_BYTES> {
    /// Where the `len_bytes` of `turn` are, at most `HALF_BYTES`; on a cache line. The same for all who call it with the same.
    pub(super) fn place(&self, turn: u32, len_bytes: usize) -> *mut u8 {
        debug_assert!(len_bytes <= HALF_BYTES);
        let half = self.0.get().cast::<u8>().wrapping_add(turn as usize % 2 * HALF_BYTES);
        if len_bytes < ROTATED_FROM_BYTES {
            return half;
        }
        let stride = len_bytes.next_multiple_of(64);
        half.wrapping_add((turn / 2) as usize % (HALF_BYTES / stride).max(1) * stride)
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn turns_lie_inside_and_no_two_that_follow_each_other_overlap() {
        const HALF: usize = 64 << 10;
        let staging = Box::new(Staging::<HALF>(UnsafeCell::new([[0; HALF]; 2])));
        let base = staging.0.get().addr();
        let place = |turn, len: usize| staging.place(turn, len).addr() - base;
        // Lengths change from one operation to the next, and turns pass the end of their circle.
        let lens = [0, 1, 63, 8 << 10, (8 << 10) + 1, 20_000, HALF / 2, HALF - 64, HALF];
        for turn in (0..40).chain(u32::MAX - 40..=u32::MAX) {
            for (len, next_len) in lens.iter().flat_map(|len| lens.map(|next| (*len, next))) {
                let (begin, next) = (place(turn, len), place(turn.wrapping_add(1), next_len));
                assert!(begin + len <= 2 * HALF && begin % 64 == 0, "turn {turn}, {len} bytes");
                assert!(begin + len <= next || next + next_len <= begin, "turn {turn}, {len} and {next_len} bytes");
            }
        }
        let places: std::collections::BTreeSet<usize> = (0..64).map(|turn| place(turn, 8 << 10)).collect();
        assert_eq!(places.len(), 2 * HALF / (8 << 10), "all of it is used");
    }
}
