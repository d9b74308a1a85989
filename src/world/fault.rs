//! The fault cell: the first error of the job, in shared memory, told by every rank as the same typed [`Error`].
//!
//! ```text
//!   NONE --CAS by the first rank--> WRITING(rank) --its fields are stored--> SET(rank)   and never changes again
//!                                                 --by anybody, late-------> LEFT(rank)  nor does this
//! ```
//!
//! A rank may die between the two steps. Whoever finds `WRITING` for longer than a moment therefore ends it with `LEFT`, which
//! blames that rank and says all there is to say in one word: a writer that was only stopped stores into fields that nobody
//! reads any more.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::error::Error;

const NONE: u64 = 0;
/// Low byte of `state`; the writer's rank stands above it.
const WRITING: u64 = 1;
const SET: u64 = 2;
const LEFT: u64 = 3;
/// Storing the fields takes microseconds; a writer that was merely descheduled is given this long.
const WRITING_LIMIT: Duration = Duration::from_millis(20);

const TEXT_BYTES: usize = 512;
const NUMBERS: usize = 6;

/// The shared cell. All zeroes is "no fault".
#[repr(C, align(128))]
pub(crate) struct FaultCell {
    /// NONE, or WRITING, SET or LEFT | rank << 8. Release when it becomes SET; acquire before the fields are read.
    state: AtomicU64,
    kind: AtomicU64,
    numbers: [AtomicU64; NUMBERS],
    texts: [Text; 2],
}

const _: () = assert!(std::mem::offset_of!(FaultCell, texts) == 64 && size_of::<FaultCell>() == 1152);

/// Up to [`TEXT_BYTES`] of UTF-8.
#[repr(C)]
struct Text {
    len_bytes: AtomicU64,
    words: [AtomicU64; TEXT_BYTES / 8],
}

impl Text {
    fn store(&self, text: &str) {
        let mut bytes = [0_u8; TEXT_BYTES];
        let len = floor_char_boundary(text, TEXT_BYTES);
        bytes[..len].copy_from_slice(&text.as_bytes()[..len]);
        for (word, bytes) in self.words.iter().zip(bytes.as_chunks::<8>().0) {
            // Relaxed: published by the release of `state`.
            word.store(u64::from_le_bytes(*bytes), Ordering::Relaxed);
        }
        self.len_bytes.store(len as u64, Ordering::Relaxed);
    }

    fn load(&self) -> String {
        let len = (self.len_bytes.load(Ordering::Relaxed) as usize).min(TEXT_BYTES);
        let bytes: Vec<u8> =
            self.words.iter().flat_map(|word| word.load(Ordering::Relaxed).to_le_bytes()).take(len).collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

/// Longest prefix of `text` of at most `limit_bytes` that ends at a character.
fn floor_char_boundary(text: &str, limit_bytes: usize) -> usize {
    (0..=limit_bytes.min(text.len())).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0)
}

impl FaultCell {
    /// Whether a fault stands or is being written. One relaxed load: this is asked in every wait loop.
    pub(crate) fn is_set(&self) -> bool {
        self.state.load(Ordering::Relaxed) != NONE
    }

    /// The fault, as `reader` tells it.
    pub(crate) fn get(&self, reader: u32) -> Option<Error> {
        let start = Instant::now();
        loop {
            // Acquire: pairs with the release in `write`.
            let state = self.state.load(Ordering::Acquire);
            match state & 0xff {
                NONE => return None,
                SET => return Some(self.decode(reader)),
                LEFT => {
                    let reason = "it ended or was stopped while reporting an error".into();
                    return Some(Error::RankFailed { rank: (state >> 8) as u32, reason });
                }
                _ if start.elapsed() < WRITING_LIMIT => std::thread::yield_now(),
                // Whoever comes first, the writer or another reader: the next look finds what stands.
                _ => drop(self.step(state, state & !0xff | LEFT)),
            }
        }
    }

    /// Records `error` unless one is recorded already.
    pub(crate) fn raise(&self, writer: u32, error: &Error) {
        if self.is_set() {
            return;
        }
        // Before the cell is claimed: others wait for what happens between.
        let encoded = encode(writer, error);
        if self.claim(writer) {
            self.write(writer, encoded);
        }
    }

    fn claim(&self, writer: u32) -> bool {
        self.step(NONE, WRITING | u64::from(writer) << 8)
    }

    fn write(&self, writer: u32, (kind, numbers, texts): Encoded) {
        self.kind.store(kind as u64, Ordering::Relaxed);
        for (cell, number) in self.numbers.iter().zip(numbers) {
            cell.store(number, Ordering::Relaxed);
        }
        for (cell, text) in self.texts.iter().zip(texts) {
            cell.store(&text);
        }
        // A writer that was stopped for long may have lost the cell by now.
        self.step(WRITING | u64::from(writer) << 8, SET | u64::from(writer) << 8);
    }

    /// Release: pairs with the acquire in `get`.
    fn step(&self, from: u64, to: u64) -> bool {
        self.state.compare_exchange(from, to, Ordering::Release, Ordering::Relaxed).is_ok()
    }

    fn decode(&self, reader: u32) -> Error {
        let n: [u64; NUMBERS] = std::array::from_fn(|index| self.numbers[index].load(Ordering::Relaxed));
        let [first, second] = [self.texts[0].load(), self.texts[1].load()];
        decode(self.kind.load(Ordering::Relaxed), n, first, second, reader)
    }
}

#[derive(Debug, Clone, Copy)]
#[repr(u64)]
enum Kind {
    PeerLost = 1,
    PeerStopped = 2,
    PeerStalled = 3,
    BarrierTimeout = 4,
    Mismatch = 5,
    RankFailed = 6,
}

type Encoded = (Kind, [u64; NUMBERS], [String; 2]);

fn encode(writer: u32, error: &Error) -> Encoded {
    let none = String::new;
    match error {
        Error::PeerLost { rank, pid, operation } => {
            (Kind::PeerLost, [u64::from(*rank), u64::from(*pid), 0, 0, 0, 0], [operation.clone(), none()])
        }
        Error::PeerStopped { rank, pid, silent_ms, limit_ms, operation } => (
            Kind::PeerStopped,
            [u64::from(*rank), u64::from(*pid), *silent_ms, *limit_ms, 0, 0],
            [operation.clone(), none()],
        ),
        Error::PeerStalled { rank, operation, sequence, place, waited_ms, expected, seen } => (
            Kind::PeerStalled,
            [u64::from(*rank), *sequence, *waited_ms, u64::from(*expected), u64::from(*seen), 0],
            [operation.clone(), place.clone()],
        ),
        Error::BarrierTimeout { name, absent, waited_ms } => {
            let mask = absent.iter().fold(0, |mask, rank| mask | 1_u64.checked_shl(*rank).unwrap_or(0));
            (Kind::BarrierTimeout, [mask, *waited_ms, 0, 0, 0, 0], [name.clone(), none()])
        }
        Error::Mismatch { sequence, rank, mine, peer, theirs } => {
            (Kind::Mismatch, [*sequence, u64::from(*rank), u64::from(*peer), 0, 0, 0], [mine.clone(), theirs.clone()])
        }
        Error::Poisoned { cause } => encode(writer, cause),
        Error::RankFailed { rank, reason } => {
            (Kind::RankFailed, [u64::from(*rank), 0, 0, 0, 0, 0], [reason.clone(), none()])
        }
        other => (Kind::RankFailed, [u64::from(writer), 0, 0, 0, 0, 0], [other.to_string(), none()]),
    }
}

fn decode(kind: u64, n: [u64; NUMBERS], first: String, second: String, reader: u32) -> Error {
    // Truncation: these were u32 when they were stored; a peer's garbage stays garbage.
    let [a, b, c] = [n[0] as u32, n[1] as u32, n[2] as u32];
    match kind {
        kind if kind == Kind::PeerLost as u64 => Error::PeerLost { rank: a, pid: b, operation: first },
        kind if kind == Kind::PeerStopped as u64 => {
            Error::PeerStopped { rank: a, pid: b, silent_ms: n[2], limit_ms: n[3], operation: first }
        }
        kind if kind == Kind::PeerStalled as u64 => Error::PeerStalled {
            rank: a,
            operation: first,
            sequence: n[1],
            place: second,
            waited_ms: n[2],
            expected: n[3] as u32,
            seen: n[4] as u32,
        },
        kind if kind == Kind::BarrierTimeout as u64 => Error::BarrierTimeout {
            name: first,
            absent: (0..64).filter(|rank| n[0] >> rank & 1 == 1).collect(),
            waited_ms: n[1],
        },
        // The two ranks of a mismatch each tell it from their own side.
        kind if kind == Kind::Mismatch as u64 && reader == c => {
            Error::Mismatch { sequence: n[0], rank: c, mine: second, peer: b, theirs: first }
        }
        kind if kind == Kind::Mismatch as u64 => {
            Error::Mismatch { sequence: n[0], rank: b, mine: first, peer: c, theirs: second }
        }
        _ => Error::RankFailed { rank: a, reason: first },
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    fn cell() -> Box<FaultCell> {
        let zero = |_| AtomicU64::new(0);
        let text = |_| Text { len_bytes: zero(0), words: std::array::from_fn(zero) };
        let (numbers, texts) = (std::array::from_fn(zero), std::array::from_fn(text));
        Box::new(FaultCell { state: zero(0), kind: zero(0), numbers, texts })
    }

    #[test]
    fn every_kind_comes_back_as_it_went_in() {
        let errors = [
            Error::PeerLost { rank: 3, pid: 4_000_000_000, operation: "all_reduce".into() },
            Error::PeerStopped { rank: 1, pid: 9, silent_ms: 612, limit_ms: 500, operation: "barrier \"x\"".into() },
            Error::PeerStalled {
                rank: 2,
                operation: "all_gather f32".into(),
                sequence: u64::MAX,
                place: "all-gather step 3".into(),
                waited_ms: 5000,
                expected: u32::MAX,
                seen: 40,
            },
            Error::BarrierTimeout { name: "epoch".into(), absent: vec![0, 5, 63], waited_ms: 10 },
            Error::Mismatch { sequence: 4, rank: 0, mine: "a".into(), peer: 1, theirs: "b".into() },
            Error::RankFailed { rank: 7, reason: "disk".into() },
        ];
        for error in errors {
            let cell = cell();
            assert!(cell.get(0).is_none() && !cell.is_set());
            cell.raise(0, &error);
            assert_eq!(format!("{:?}", cell.get(0).unwrap()), format!("{error:?}"));
        }
    }

    #[test]
    fn a_mismatch_is_told_from_the_readers_side() {
        let cell = cell();
        cell.raise(2, &Error::Mismatch { sequence: 4, rank: 2, mine: "sum".into(), peer: 1, theirs: "max".into() });
        let Some(Error::Mismatch { rank: 1, mine, peer: 2, theirs, .. }) = cell.get(1) else { panic!() };
        assert_eq!((mine.as_str(), theirs.as_str()), ("max", "sum"));
        assert!(matches!(cell.get(0), Some(Error::Mismatch { rank: 2, peer: 1, .. })));
    }

    #[test]
    fn the_first_error_stays() {
        let cell = cell();
        cell.raise(0, &Error::RankFailed { rank: 0, reason: "first".into() });
        cell.raise(1, &Error::RankFailed { rank: 1, reason: "second".into() });
        assert!(matches!(cell.get(1), Some(Error::RankFailed { rank: 0, .. })));
    }

    #[test]
    fn other_errors_keep_their_text_and_name_the_rank() {
        let cell = cell();
        let long = "é".repeat(600);
        cell.raise(5, &Error::Stream { stream: "comm".into(), reason: long });
        let Some(Error::RankFailed { rank: 5, reason }) = cell.get(0) else { panic!() };
        assert!(reason.starts_with("stream comm: é") && reason.len() <= TEXT_BYTES && !reason.contains('\u{fffd}'));
    }

    #[test]
    fn a_writer_that_died_half_way_is_reported_itself() {
        let cell = cell();
        assert!(cell.claim(6));
        assert!(cell.is_set());
        let blamed = |reader| matches!(cell.get(reader), Some(Error::RankFailed { rank: 6, reason }) if reason.starts_with("it"));
        assert!(blamed(1));
        cell.write(6, encode(6, &Error::RankFailed { rank: 0, reason: "late".into() }));
        assert!(blamed(1) && blamed(6), "what was told once stays");
        assert_eq!(cell.state.load(Ordering::Relaxed), LEFT | 6 << 8, "the late writer did not take the cell back");
    }

    /// A thread of the writer's own rank may be the one that finds it late.
    #[test]
    fn a_writer_that_is_late_does_not_change_what_its_own_rank_told() {
        let cell = cell();
        assert!(cell.claim(0));
        let told = format!("{:?}", cell.get(0));
        cell.write(0, encode(0, &Error::PeerLost { rank: 3, pid: 1, operation: "late".into() }));
        assert_eq!(format!("{:?}", cell.get(0)), told);
    }

    #[test]
    fn racing_writers_leave_one_whole_error() {
        for _ in 0..50 {
            let cell = cell();
            std::thread::scope(|scope| {
                for rank in 0..4_u32 {
                    let cell = &cell;
                    scope.spawn(move || {
                        cell.raise(rank, &Error::RankFailed { rank, reason: format!("of {rank}") });
                        let Some(Error::RankFailed { rank, reason }) = cell.get(9) else { panic!() };
                        assert_eq!(reason, format!("of {rank}"));
                    });
                }
            });
        }
    }
}
