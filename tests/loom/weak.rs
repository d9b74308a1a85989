//! Atomics that leave out what they are told to, and the flag compiled against them.

#[path = "../../src/world/flag.rs"]
pub mod flag;

use std::cell::Cell;

/// What the operations of one thread leave out.
#[derive(Clone, Copy, PartialEq)]
pub enum Weakness {
    None,
    NoFence,
    NoRelease,
    NoAcquire,
    NoWake,
}

loom::thread_local! {
    static WEAKNESS: Cell<Weakness> = Cell::new(Weakness::None);
}

impl Weakness {
    pub fn of_this_thread(self) {
        WEAKNESS.with(|weakness| weakness.set(self));
    }

    fn is_set(self) -> bool {
        WEAKNESS.with(|weakness| weakness.get() == self)
    }
}

pub mod sync {
    pub use loom::sync::atomic::Ordering;

    use super::Weakness;

    fn weakened(order: Ordering) -> Ordering {
        match order {
            Ordering::Release if Weakness::NoRelease.is_set() => Ordering::Relaxed,
            Ordering::Acquire if Weakness::NoAcquire.is_set() => Ordering::Relaxed,
            order => order,
        }
    }

    pub fn fence(order: Ordering) {
        if !Weakness::NoFence.is_set() {
            loom::sync::atomic::fence(order);
        }
    }

    pub struct AtomicU32(loom::sync::atomic::AtomicU32);

    impl AtomicU32 {
        pub fn new(value: u32) -> Self {
            AtomicU32(loom::sync::atomic::AtomicU32::new(value))
        }

        pub fn load(&self, order: Ordering) -> u32 {
            self.0.load(weakened(order))
        }

        pub fn store(&self, value: u32, order: Ordering) {
            self.0.store(value, weakened(order));
        }

        pub fn fetch_add(&self, value: u32, order: Ordering) -> u32 {
            self.0.fetch_add(value, order)
        }

        pub fn fetch_sub(&self, value: u32, order: Ordering) -> u32 {
            self.0.fetch_sub(value, order)
        }

        pub fn compare_exchange_weak(
            &self,
            seen: u32,
            value: u32,
            order: Ordering,
            failure: Ordering,
        ) -> Result<u32, u32> {
            self.0.compare_exchange_weak(seen, value, weakened(order), failure)
        }
    }

    pub struct Futex(crate::sync::Futex);

    impl Futex {
        pub fn new() -> Self {
            Futex(crate::sync::Futex::new())
        }

        pub fn sleep(&self, word: &AtomicU32, seen: u32, slice: std::time::Duration) {
            self.0.sleep(&word.0, seen, slice);
        }

        pub fn wake(&self, word: &AtomicU32) {
            if !Weakness::NoWake.is_set() {
                self.0.wake(&word.0);
            }
        }

        pub fn relax() {
            crate::sync::Futex::relax();
        }
    }
}
