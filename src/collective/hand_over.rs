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

use crate::streamed::{self, LINE_BYTES};

/// From here on copies may be streamed: below, the first fetch from memory is most of the time.
const STREAM_BYTES: usize = 4 << 10;
/// What a line costs its reader more if it comes from memory and not from the writer's cache: 3 to 5 ns, measured as above.
/// Streaming is worth it when it saves the writer more: it saves 8 to 25 ns a line where lines are slow, and 2 where not.
const READER_LINE_NS: u128 = 5;
/// Copies from one trial to the next.
const TRIAL_EVERY: u32 = 64;
/// What is made and then streamed at a time: it stays in the first-level cache, with two terms as long.
const TILE_BYTES: usize = 8 << 10;

/// One rank's copies into its staging.
#[derive(Default)]
pub(super) struct HandOver {
    // Relaxed, both: they are this rank's own, and whatever they say, the copy is right.
    copies: AtomicU32,
    streams: AtomicBool,
}

impl HandOver {
    /// Copies `len_bytes` from `from` to `to`. Every store is visible to whoever sees what the caller publishes next.
    ///
    /// # Safety
    /// Both are valid for `len_bytes` and disjoint; nobody else accesses them.
    pub(super) unsafe fn copy(&self, from: *const u8, to: *mut u8, len_bytes: usize) {
        // SAFETY: parts lie in `len_bytes`; the caller's promises.
        self.by_parts(len_bytes, |at, len, streams| unsafe {
            if streams {
                streamed::copy(from.add(at), to.add(at), len);
            } else {
                std::ptr::copy_nonoverlapping(from.add(at), to.add(at), len);
            }
        });
    }

    /// Lets `make(offset, len, places)` write a part to each of `places`, part after part, until `own` and `to` both have all
    /// `len_bytes`. As [`copy`](HandOver::copy) else.
    ///
    /// # Safety
    /// Both are valid for `len_bytes` and disjoint; nobody else accesses them but `make`, which writes `len` bytes to each place.
    pub(super) unsafe fn make(
        &self,
        own: *mut u8,
        to: *mut u8,
        len_bytes: usize,
        mut make: impl FnMut(usize, usize, &[*mut u8]),
    ) {
        self.by_parts(len_bytes, |begin, len, streams| {
            let place = |of: *mut u8, at: usize| of.wrapping_add(at);
            if !streams {
                return make(begin, len, &[place(own, begin), place(to, begin)]);
            }
            for at in (begin..begin + len).step_by(TILE_BYTES) {
                let len = (begin + len - at).min(TILE_BYTES);
                make(at, len, &[place(own, at)]);
                // SAFETY: the part lies in `len_bytes`; the caller's promises.
                unsafe { streamed::copy(place(own, at), place(to, at), len) };
            }
        });
    }

    /// Calls `part(offset, len, streams)` for all of `len_bytes`, at once or, in a trial, in two halves.
    fn by_parts(&self, len_bytes: usize, mut part: impl FnMut(usize, usize, bool)) {
        let may_stream = len_bytes >= STREAM_BYTES && cfg!(target_arch = "x86_64");
        if !may_stream {
            return part(0, len_bytes, false);
        }
        let copies = self.copies.load(Ordering::Relaxed);
        self.copies.store(copies.wrapping_add(1), Ordering::Relaxed);
        if !copies.is_multiple_of(TRIAL_EVERY) {
            let streams = self.streams.load(Ordering::Relaxed);
            part(0, len_bytes, streams);
            if streams {
                streamed::fence();
            }
            return;
        }
        let half = len_bytes / 2 / LINE_BYTES * LINE_BYTES; // whole elements
        let start = Instant::now();
        part(0, half, false);
        let plain = start.elapsed();
        part(half, len_bytes - half, true);
        streamed::fence();
        let saved = plain.saturating_sub(start.elapsed() - plain);
        let is_worth_it = saved.as_nanos() > (half / LINE_BYTES) as u128 * READER_LINE_NS;
        self.streams.store(is_worth_it, Ordering::Relaxed);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn every_byte_arrives_and_no_other_is_touched_wherever_it_begins_and_whichever_way_it_goes() {
        for len_bytes in [0, 1, 63, 64, 65, STREAM_BYTES - 1, STREAM_BYTES, STREAM_BYTES + 77, 3 * TILE_BYTES + 129] {
            for (skew_from, skew_to) in [(0, 0), (1, 0), (0, 1), (4, 60), (63, 33)] {
                // A trial, and either way.
                for (copies, streams, makes) in
                    [(0, false), (1, false), (1, true)].into_iter().flat_map(|(c, s)| [(c, s, false), (c, s, true)])
                {
                    let hand_over = HandOver { copies: AtomicU32::new(copies), streams: AtomicBool::new(streams) };
                    let mut from = vec![0_u8; skew_from + len_bytes];
                    let mut to = vec![0xaa_u8; skew_to + len_bytes + 64];
                    let value = |byte: usize| (byte % 251) as u8;
                    (0..len_bytes).for_each(|byte| from[skew_from + byte] = value(byte));
                    // SAFETY: both are long enough and this thread's own; what is made lies in them.
                    unsafe {
                        let (source, target) = (from.as_mut_ptr().add(skew_from), to.as_mut_ptr().add(skew_to));
                        if makes {
                            source.write_bytes(0, len_bytes);
                            let mut made = 0;
                            hand_over.make(source, target, len_bytes, |at, len, places| {
                                assert_eq!(at, made);
                                made += len;
                                for byte in 0..len {
                                    places.iter().for_each(|place| place.add(byte).write(value(at + byte)));
                                }
                            });
                            assert_eq!(made, len_bytes);
                        } else {
                            hand_over.copy(source, target, len_bytes);
                        }
                    }
                    let own = &from[skew_from..];
                    let (before, rest) = to.split_at(skew_to);
                    let (copied, behind) = rest.split_at(len_bytes);
                    let is_right = |bytes: &[u8]| bytes.iter().enumerate().all(|(byte, found)| *found == value(byte));
                    assert!(is_right(copied) && is_right(own), "{len_bytes} {skew_from} {skew_to}");
                    assert!(before.iter().chain(behind).all(|byte| *byte == 0xaa), "{len_bytes} {skew_from} {skew_to}");
                }
            }
        }
    }
}
