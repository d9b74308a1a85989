//! Copies into shared memory that other ranks read next.
//!
//! ```text
//!   plain store       the line is recalled from the core that read it last, changed, and fetched from here by its next reader
//!   streamed store    the line is written to memory, whole, the reader's copy dropped; its next reader fetches it from there
//! ```
//! Which is faster depends on where the ranks run. 64 KiB, written and read, on two cores of a Zen 3 EPYC: 6.3 us plain and 12
//! streamed while the two share a third-level cache (a line crosses in 50 ns), 25 plain and 10 streamed while they do not
//! (250 ns, and stores become visible in order, so few recalls are under way at a time). Nobody says which it is, and on a
//! virtual machine it changes within seconds. So it is tried out: once in a while one half of a copy goes either way, and what
//! is found holds until the next trial.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Instant;

/// From here on copies may be streamed: below, the first fetch from memory is most of the time.
const STREAM_BYTES: usize = 4 << 10;
/// What a line costs its reader more if it comes from memory and not from the writer's cache: 3 to 5 ns, measured as above.
/// Streaming is worth it when it saves the writer more: it saves 8 to 25 ns a line where lines are slow, and 2 where not.
const READER_LINE_NS: u128 = 5;
/// Copies from one trial to the next.
const TRIAL_EVERY: u32 = 64;
/// Lines are only streamed whole.
const LINE_BYTES: usize = 64;
/// What is made and then copied at a time: it stays in the first-level cache, with two terms as long.
const TILE_BYTES: usize = 8 << 10;

/// One rank's copies into its staging.
#[derive(Default)]
pub(super) struct HandOver {
    // Relaxed, both: they are this rank's own, and whatever they say, the copy is right.
    copies: AtomicU32,
    streams: AtomicBool,
}

impl HandOver {
    /// Copies `len_bytes` from `from` to `to`, after `make(offset, len)` has made each part of `from`, in order. Every store
    /// is visible to whoever sees what the caller publishes next.
    ///
    /// # Safety
    /// Both are valid for `len_bytes` and disjoint, `from` once `make` has been called for the part; nobody else accesses
    /// them.
    pub(super) unsafe fn copy(
        &self,
        from: *const u8,
        to: *mut u8,
        len_bytes: usize,
        mut make: impl FnMut(usize, usize),
    ) {
        let may_stream = len_bytes >= STREAM_BYTES && cfg!(target_arch = "x86_64");
        // SAFETY: the caller's promises, of every part.
        let mut part = |streams: bool, begin: usize, end: usize| unsafe {
            for at in (begin..end).step_by(TILE_BYTES) {
                let len = (end - at).min(TILE_BYTES);
                make(at, len);
                if streams {
                    stream(from.add(at), to.add(at), len);
                } else {
                    std::ptr::copy_nonoverlapping(from.add(at), to.add(at), len);
                }
            }
            if streams {
                fence_streamed();
            }
        };
        if !may_stream {
            return part(false, 0, len_bytes);
        }
        let copies = self.copies.load(Ordering::Relaxed);
        self.copies.store(copies.wrapping_add(1), Ordering::Relaxed);
        if !copies.is_multiple_of(TRIAL_EVERY) {
            return part(self.streams.load(Ordering::Relaxed), 0, len_bytes);
        }
        let half = len_bytes / 2 / LINE_BYTES * LINE_BYTES; // whole elements
        let start = Instant::now();
        part(false, 0, half);
        let plain = start.elapsed();
        part(true, half, len_bytes);
        let saved = plain.saturating_sub(start.elapsed() - plain);
        let is_worth_it = saved.as_nanos() > (half / LINE_BYTES) as u128 * READER_LINE_NS;
        self.streams.store(is_worth_it, Ordering::Relaxed);
    }
}

/// # Safety
/// Both are valid for `len_bytes` and disjoint, and nobody else accesses them until [`fence_streamed`] is behind this.
#[cfg(target_arch = "x86_64")]
unsafe fn stream(from: *const u8, to: *mut u8, len_bytes: usize) {
    use std::arch::x86_64::{__m128i, _mm_loadu_si128, _mm_stream_si128};
    let head = to.align_offset(LINE_BYTES).min(len_bytes);
    let lines = (len_bytes - head) / LINE_BYTES;
    let tail = head + lines * LINE_BYTES;
    // SAFETY: head, lines and tail are `len_bytes` together; `to + head` is aligned to a line. SSE2 is part of x86-64.
    unsafe {
        std::ptr::copy_nonoverlapping(from, to, head);
        for line in 0..lines {
            let at = head + line * LINE_BYTES;
            let (from, to) = (from.add(at).cast::<__m128i>(), to.add(at).cast::<__m128i>());
            let parts = [0, 1, 2, 3].map(|part| _mm_loadu_si128(from.add(part)));
            for (part, value) in parts.into_iter().enumerate() {
                _mm_stream_si128(to.add(part), value);
            }
        }
        std::ptr::copy_nonoverlapping(from.add(tail), to.add(tail), len_bytes - tail);
    }
}

/// No release orders streamed stores: this comes between them and the flag that tells of them.
#[cfg(target_arch = "x86_64")]
fn fence_streamed() {
    // SAFETY: SSE is part of x86-64.
    unsafe { std::arch::x86_64::_mm_sfence() }
}

/// # Safety
/// Both are valid for `len_bytes` and disjoint, and nobody else accesses them.
#[cfg(not(target_arch = "x86_64"))]
unsafe fn stream(from: *const u8, to: *mut u8, len_bytes: usize) {
    // SAFETY: the caller's promises.
    unsafe { std::ptr::copy_nonoverlapping(from, to, len_bytes) }
}

#[cfg(not(target_arch = "x86_64"))]
fn fence_streamed() {}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn every_byte_arrives_and_no_other_is_touched_wherever_it_begins_and_whichever_way_it_goes() {
        for len_bytes in [0, 1, 63, 64, 65, STREAM_BYTES - 1, STREAM_BYTES, STREAM_BYTES + 77, 3 * TILE_BYTES + 129] {
            for (skew_from, skew_to) in [(0, 0), (1, 0), (0, 1), (4, 60), (63, 33)] {
                // A trial, and either way.
                for (copies, streams) in [(0, false), (1, false), (1, true)] {
                    let hand_over = HandOver { copies: AtomicU32::new(copies), streams: AtomicBool::new(streams) };
                    let mut from = vec![0_u8; skew_from + len_bytes];
                    let mut to = vec![0xaa_u8; skew_to + len_bytes + 64];
                    let source = from.as_mut_ptr();
                    let mut made = 0;
                    // SAFETY: both are long enough and this thread's own; `make` writes inside of `from`.
                    unsafe {
                        hand_over.copy(source.add(skew_from), to.as_mut_ptr().add(skew_to), len_bytes, |at, len| {
                            assert_eq!(at, made);
                            for byte in at..at + len {
                                source.add(skew_from + byte).write((byte % 251) as u8);
                            }
                            made += len;
                        });
                    }
                    assert_eq!(made, len_bytes);
                    let (before, rest) = to.split_at(skew_to);
                    let (copied, behind) = rest.split_at(len_bytes);
                    assert!(copied.iter().enumerate().all(|(byte, value)| *value == (byte % 251) as u8), "{len_bytes}");
                    assert!(before.iter().chain(behind).all(|byte| *byte == 0xaa), "{len_bytes} {skew_from} {skew_to}");
                }
            }
        }
    }
}
