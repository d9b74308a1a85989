//! The turn of a stream: a lock with a deadline that knows its holder.
//!
//! A mutex of the standard library will not do: a thread that asks for a lock it holds waits for ever, and so does one
//! behind a holder that never comes back. Here the first is found out and the second has a deadline.

use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Nobody's mark: no thread local lies at address 0.
const FREE: usize = 0;

pub(super) struct Turn {
    /// The mark of the thread that runs something, or [`FREE`].
    holder: AtomicUsize,
    /// Threads in `take_slowly`.
    waiting: AtomicU32,
    gate: Mutex<()>,
    given_back: Condvar,
}

/// The turn, held by this thread until dropped.
pub(super) struct Held<'a> {
    turn: &'a Turn,
}

/// What tells this thread from every other that lives.
fn this_thread() -> usize {
    thread_local!(static MARK: u8 = const { 0 });
    MARK.with(|mark| std::ptr::from_ref(mark).addr())
}

impl Turn {
    pub(super) const fn new() -> Turn {
        Turn {
            holder: AtomicUsize::new(FREE),
            waiting: AtomicU32::new(0),
            gate: Mutex::new(()),
            given_back: Condvar::new(),
        }
    }

    /// Whether the calling thread holds the turn, that is: is inside work of the stream.
    pub(super) fn is_mine(&self) -> bool {
        // Relaxed: only this thread stores its own mark.
        self.holder.load(Ordering::Relaxed) == this_thread()
    }

    /// Takes the turn, or none after `timeout`. A thread that holds it already gets none, after `timeout`.
    pub(super) fn take(&self, timeout: Duration) -> Option<Held<'_>> {
        self.try_take().or_else(|| self.take_slowly(timeout))
    }

    fn try_take(&self) -> Option<Held<'_>> {
        // Acquire: pairs with the release in `drop`. SeqCst: see there.
        let taken = self.holder.compare_exchange(FREE, this_thread(), Ordering::SeqCst, Ordering::SeqCst);
        taken.ok().map(|_| Held { turn: self })
    }

    #[cold]
    fn take_slowly(&self, timeout: Duration) -> Option<Held<'_>> {
        let start = Instant::now();
        let mut gate = self.gate.lock().unwrap_or_else(PoisonError::into_inner);
        self.waiting.fetch_add(1, Ordering::SeqCst);
        let held = loop {
            if let Some(held) = self.try_take() {
                break Some(held);
            }
            let Some(left) = timeout.checked_sub(start.elapsed()) else { break None };
            gate = self.given_back.wait_timeout(gate, left).unwrap_or_else(PoisonError::into_inner).0;
        };
        self.waiting.fetch_sub(1, Ordering::Relaxed);
        held
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        // Release: pairs with the acquire in `try_take`. SeqCst, here and there and on `waiting`: either this thread sees
        // who waits, or who waits sees the turn free. A waiter holds the gate from its look until it sleeps.
        self.turn.holder.swap(FREE, Ordering::SeqCst);
        if self.turn.waiting.load(Ordering::SeqCst) != 0 {
            drop(self.turn.gate.lock().unwrap_or_else(PoisonError::into_inner));
            self.turn.given_back.notify_all();
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn one_thread_holds_it_and_others_wait_until_a_deadline() {
        let turn = Turn::new();
        let held = turn.take(Duration::ZERO).unwrap();
        assert!(turn.is_mine() && turn.take(Duration::from_millis(5)).is_none());
        std::thread::scope(|scope| {
            let refused = scope.spawn(|| (turn.is_mine(), turn.take(Duration::from_millis(20)).is_none()));
            assert_eq!(refused.join().unwrap(), (false, true));
            let patient: Vec<_> =
                (0..3).map(|_| scope.spawn(|| turn.take(Duration::from_secs(20)).is_some())).collect();
            std::thread::sleep(Duration::from_millis(20));
            drop(held);
            assert!(patient.into_iter().all(|waiter| waiter.join().unwrap()));
        });
        assert!(!turn.is_mine());
    }

    #[test]
    fn holders_never_overlap() {
        let (turn, mut count) = (Turn::new(), 0_u32);
        let count = std::sync::atomic::AtomicPtr::new(&raw mut count);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..5_000 {
                        let _held = turn.take(Duration::from_secs(20)).unwrap();
                        // SAFETY: the turn makes this the only access.
                        unsafe { *count.load(Ordering::Relaxed) += 1 };
                    }
                });
            }
        });
        // SAFETY: all threads have ended.
        assert_eq!(unsafe { *count.into_inner() }, 20_000);
    }
}
