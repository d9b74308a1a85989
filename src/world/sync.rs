//! The atomics and the futex the flag protocol is written against: the machine's, or loom's under `--cfg loom`.

#[cfg(not(loom))]
pub(crate) use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence};

#[cfg(loom)]
pub(crate) use loom::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence};

/// Where waiters sleep. On the machine: a shared futex on the word itself, so it needs no memory of its own.
#[cfg(not(loom))]
pub(crate) struct Futex;

#[cfg(not(loom))]
impl Futex {
    pub(crate) const fn new() -> Self {
        Futex
    }

    /// Sleeps while `word` holds `seen`, at most `slice`. May wake early; the caller tests its condition again.
    pub(crate) fn sleep(&self, word: &AtomicU32, seen: u32, slice: std::time::Duration) {
        use rustix::thread::futex;
        let timeout = futex::Timespec { tv_sec: slice.as_secs() as i64, tv_nsec: i64::from(slice.subsec_nanos()) as _ };
        // Every outcome (woken, value changed, timed out, interrupted) sends the caller back to its test.
        // No PRIVATE flag: the word lies in memory that several processes map.
        let _ = futex::wait(word, futex::Flags::empty(), seen, Some(&timeout));
    }

    /// Wakes everybody who sleeps on `word`.
    pub(crate) fn wake(&self, word: &AtomicU32) {
        let _ = rustix::thread::futex::wake(word, rustix::thread::futex::Flags::empty(), i32::MAX as u32);
    }

    /// Gives the core to another runnable thread.
    pub(crate) fn relax() {
        rustix::thread::sched_yield();
    }
}

/// loom's stand-in: the kernel compares and sleeps under one lock, as futex(2) does. It has no time-out, so a lost
/// wake-up shows as a deadlock.
#[cfg(loom)]
pub(crate) struct Futex {
    lock: loom::sync::Mutex<()>,
    sleepers: loom::sync::Condvar,
}

#[cfg(loom)]
impl Futex {
    pub(crate) fn new() -> Self {
        Futex { lock: loom::sync::Mutex::new(()), sleepers: loom::sync::Condvar::new() }
    }

    pub(crate) fn sleep(&self, word: &AtomicU32, seen: u32, _slice: std::time::Duration) {
        let guard = self.lock.lock().unwrap();
        if word.load(Ordering::Relaxed) == seen {
            drop(self.sleepers.wait(guard).unwrap());
        }
    }

    pub(crate) fn wake(&self, _word: &AtomicU32) {
        drop(self.lock.lock().unwrap());
        self.sleepers.notify_all();
    }

    pub(crate) fn relax() {
        loom::thread::yield_now();
    }
}
