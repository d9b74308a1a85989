//! What ranks tell each other on the host: the operations they issued, how far they are in one that runs by steps, and that
//! they have left. It lies at the begin of each rank's part of the group's area.

use std::mem::offset_of;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use super::geometry::PAGE_BYTES;
use crate::abi::collective::SIGNALS;
use crate::collective::descriptor::Descriptor;
use crate::world::flag::reached;
use crate::world::{GROUP_AREA_BYTES, MAX_RANKS, Region};

/// Operations that are remembered. A stream takes about as many launches before the host waits.
const REMEMBERED: usize = 1024;
const WORDS: usize = size_of::<Descriptor>() / 8;

#[repr(C, align(4096))]
pub(super) struct Page {
    /// Of the first rank's page only: ranks that have unmapped all memory of others.
    pub(super) closed: AtomicU32,
    /// Likewise: ranks that use the area no longer.
    pub(super) departed: AtomicU32,
    issued: [[AtomicU64; WORDS]; REMEMBERED],
    /// Of each peer; written by its kernels.
    signals: [Signals; MAX_RANKS as usize],
}

/// How far a peer is: `tell` in `kernels/collective.cu`.
#[repr(C, align(64))]
struct Signals([AtomicU32; SIGNALS]);

const _: () = assert!(size_of::<Page>() <= PAGE_BYTES && size_of::<Descriptor>().is_multiple_of(8));

impl Page {
    /// The page of `rank` in a group's area.
    ///
    /// # Safety
    /// The region is a group's area, reserved, of a world of more than `rank` ranks, and mapped as long as the result is
    /// used.
    pub(super) unsafe fn of<'a>(region: Region, rank: u32) -> &'a Page {
        // SAFETY: areas are page-aligned and zeroed at first; a page is atomics, so any bytes are valid.
        unsafe { region.ptr.add(rank as usize * GROUP_AREA_BYTES).cast::<Page>().as_ref() }
    }

    /// Remembers an operation. By the page's rank.
    pub(super) fn remember(&self, descriptor: &Descriptor) {
        let cell = &self.issued[descriptor.sequence as usize % REMEMBERED];
        let words: [u64; WORDS] = bytemuck::cast(*descriptor);
        // Relaxed: a reader knows by the hash whether it has read a whole one.
        cell.iter().zip(words).for_each(|(cell, word)| cell.store(word, Ordering::Relaxed));
    }

    /// The operation of this hash that was issued last.
    pub(super) fn find(&self, hash: u32) -> Option<Descriptor> {
        let all = self.issued.iter().map(read).filter(|descriptor| descriptor.sequence > 0);
        all.filter(|descriptor| descriptor.hash() == hash).max_by_key(|descriptor| descriptor.sequence)
    }

    /// The operation with this sequence number, as far as 32 bits tell.
    pub(super) fn at(&self, sequence: u32) -> Option<Descriptor> {
        let found = read(&self.issued[sequence as usize % REMEMBERED]);
        (found.sequence > 0 && found.sequence as u32 == sequence).then_some(found)
    }

    // ---- how far peers are ---------------------------------------------------------------------------------------------

    /// Where in a page `peer` tells how far it is; `awaited` is the code of an [`Awaited`](crate::abi::collective::Awaited).
    pub(super) const fn signal_offset_bytes(peer: u32, awaited: u32) -> usize {
        offset_of!(Page, signals) + peer as usize * size_of::<Signals>() + awaited as usize * size_of::<AtomicU32>()
    }

    /// What `peer` has told.
    pub(super) fn signal(&self, peer: u32, awaited: u32) -> u32 {
        // Acquire: what the peer's kernels did comes before, for kernels launched behind this load.
        self.signals[peer as usize].0[awaited as usize].load(Ordering::Acquire)
    }

    /// Tells how far `peer` is, as its kernels do.
    #[cfg(test)]
    pub(super) fn count(&self, peer: u32, awaited: u32, count: u32) {
        self.signals[peer as usize].0[awaited as usize].store(count, Ordering::Release);
    }

    /// Ends the waits of this rank's stream for `expected`.
    pub(super) fn release(&self, peer: u32, awaited: u32, expected: u32) {
        let signal = &self.signals[peer as usize].0[awaited as usize];
        if !reached(signal.load(Ordering::Relaxed), expected) {
            // Release: the abort word was set before.
            signal.store(expected, Ordering::Release);
        }
    }
}

fn read(cell: &[AtomicU64; WORDS]) -> Descriptor {
    bytemuck::cast::<[u64; WORDS], _>(std::array::from_fn(|word| cell[word].load(Ordering::Relaxed)))
}
