//! Ranges of this rank's arena: memory that its peers reach.

use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use range_alloc::RangeAllocator;

use super::World;
use crate::error::{Error, Result};

/// The free list of an arena, in bytes; every range is whole pages.
pub(super) type Ranges = Mutex<RangeAllocator<usize>>;

/// A range of this rank's arena with its memory; zeroed when it is handed out. Dropping it gives the memory back.
#[derive(Debug)]
pub struct ArenaRange {
    world: World,
    offset_bytes: usize,
    len_bytes: usize,
    is_abandoned: AtomicBool,
}

impl World {
    /// Takes `len_bytes`, rounded up to pages, of this rank's arena.
    ///
    /// # Errors
    /// [`Error::NoSpace`] if the arena or the machine has too little left; [`Error::SizeOverflow`]; [`Error::Io`].
    pub fn reserve_arena(&self, len_bytes: usize) -> Result<ArenaRange> {
        let page = rustix::param::page_size();
        let whole = len_bytes.max(1).checked_next_multiple_of(page).ok_or_else(|| Error::SizeOverflow {
            what: "arena range",
            detail: format!("{len_bytes} bytes in pages of {page}"),
        })?;
        let arena = self.arena_segment(self.rank())?;
        let no_space = |have_bytes: usize| Error::NoSpace {
            what: "a registered buffer in the arena (WorldOptions::arena_bytes)",
            need_bytes: whole as u64,
            have_bytes: have_bytes as u64,
        };
        let mut ranges = self.core().ranges.lock().unwrap_or_else(PoisonError::into_inner);
        if whole > arena.len_bytes() {
            return Err(no_space(ranges.total_available())); // the allocator's own sums would wrap
        }
        let range = ranges.allocate_range(whole).map_err(|left| no_space(left.fragmented_free_length))?;
        if let Err(error) = arena.reserve("a registered buffer", range.start, whole) {
            ranges.free_range(range);
            return Err(error);
        }
        drop(ranges);
        let is_abandoned = AtomicBool::new(false);
        Ok(ArenaRange { world: self.clone(), offset_bytes: range.start, len_bytes: whole, is_abandoned })
    }

    /// Bytes of this rank's arena that are taken.
    pub fn arena_used_bytes(&self) -> usize {
        let ranges = self.core().ranges.lock().unwrap_or_else(PoisonError::into_inner);
        ranges.allocated_ranges().map(|range| range.len()).sum()
    }
}

impl ArenaRange {
    /// First byte, aligned to a page; valid for [`len_bytes`](ArenaRange::len_bytes) while the range lives.
    pub fn as_ptr(&self) -> NonNull<u8> {
        let base = self.world.core().arenas[self.world.rank() as usize].as_ptr();
        // SAFETY: the range was taken from this segment, so its offset lies inside.
        unsafe { base.add(self.offset_bytes) }
    }

    /// Length in bytes, whole pages.
    pub fn len_bytes(&self) -> usize {
        self.len_bytes
    }

    /// The membership whose arena it is.
    pub(crate) fn world(&self) -> &World {
        &self.world
    }

    /// Keeps the memory when the range is dropped: a peer may still use it, so nobody else may.
    pub(crate) fn abandon(&self) {
        // Relaxed: whoever drops the range comes after this by other means.
        self.is_abandoned.store(true, Ordering::Relaxed);
    }

    /// Where the range begins in the arena.
    pub fn offset_bytes(&self) -> usize {
        self.offset_bytes
    }
}

impl Drop for ArenaRange {
    fn drop(&mut self) {
        if *self.is_abandoned.get_mut() {
            return;
        }
        let core = self.world.core();
        let range = self.offset_bytes..self.offset_bytes + self.len_bytes;
        // Memory that cannot be given back would not read as zeroes when it is handed out again: keep it.
        match core.arenas[core.rank as usize].release(self.offset_bytes, self.len_bytes) {
            Ok(()) => core.ranges.lock().unwrap_or_else(PoisonError::into_inner).free_range(range),
            Err(error) => tracing::warn!(%error, "could not give back arena memory"),
        }
    }
}
