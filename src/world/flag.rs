//! The flag: one generation number that one rank advances and any rank waits for, across threads and processes.
//!
//! ```text
//!   poster                                   waiter
//!   write payload                            spin, then yield, while generation < wanted
//!   generation <- g        (release)         parked += 1
//!   ------- full fence -------               ------- full fence -------
//!   parked == 0 ? done : wake all            generation < wanted ? sleep 10 ms at most : done   (acquire)
//!                                            parked -= 1
//! ```
//!
//! The two full fences are the store-load edge of Dekker's algorithm: either the poster sees the waiter and wakes it, or
//! the waiter sees the new generation and does not sleep. `tests/loom` checks it. Generations are compared on the
//! circle, so they may wrap.

use std::time::{Duration, Instant};

use super::sync::{AtomicU32, Futex, Ordering, fence};
use crate::error::Result;

/// Longest sleep between two looks at the fault word and the deadline.
pub const PARK_SLICE: Duration = Duration::from_millis(10);

/// Longest time of giving the core away before sleeping. Beside busy processes one yield costs a time slice of each, and
/// a wait that yielded 256 times heard of a killed peer after 1.3 s (8 busy loops on 2 cores); so it was 0.26 s.
const YIELD_LIMIT: Duration = Duration::from_millis(1);

/// Whether `seen` has reached `wanted`, on the circle of u32: true for the 2^31 generations from `wanted` on.
pub const fn reached(seen: u32, wanted: u32) -> bool {
    seen.wrapping_sub(wanted) < 1 << 31
}

/// How long a wait burns its core before it sleeps.
///
/// On 2 virtual Zen 5 cores a look with its pause takes about 50 ns, a hand-over of a line between cores 45-190 ns and a
/// yield that finds nobody else about 400 ns. So a peer that is about to post is caught by a few looks; longer spinning
/// only steals the core from whoever is to come, who may be the peer (measured with both cores busy: 300 looks cost every
/// small operation 20 us, 2,000 looks 110 us). Where there are more ranks than cores the core is given away at once.
#[derive(Debug, Clone, Copy)]
pub struct Pacing {
    /// Looks with a pause between them.
    pub spins: u32,
    /// Looks with the core given away between them.
    pub yields: u32,
}

impl Pacing {
    /// The pacing for `local_world_size` ranks on this machine.
    pub fn for_ranks(local_world_size: u32) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        if local_world_size as usize <= cores {
            Pacing { spins: 40, yields: 256 }
        } else {
            Pacing { spins: 4, yields: 256 }
        }
    }
}

/// A generation in shared memory, alone on its cache line. All zeroes is a valid flag at generation 0.
#[repr(C, align(64))]
pub struct Flag {
    /// Written by the one poster, monotonic on the circle.
    generation: AtomicU32,
    /// How many waiters sleep or are about to; written by waiters, read by the poster.
    parked: AtomicU32,
    futex: Futex,
}

impl Default for Flag {
    fn default() -> Self {
        Self::new()
    }
}

impl Flag {
    /// A flag at generation 0.
    pub fn new() -> Self {
        Flag { generation: AtomicU32::new(0), parked: AtomicU32::new(0), futex: Futex::new() }
    }

    /// The generation posted last. Everything written before that post is visible afterwards.
    pub fn seen(&self) -> u32 {
        // Acquire: pairs with the release in `post`.
        self.generation.load(Ordering::Acquire)
    }

    /// Publishes everything this thread wrote before, under `generation`. Only the flag's owner posts.
    pub fn post(&self, generation: u32) {
        // Release: pairs with the acquire in `seen`.
        self.generation.store(generation, Ordering::Release);
        self.wake_parked();
    }

    /// As [`post`](Flag::post), for a flag that several threads post: the generation never goes back. A post that comes too
    /// late publishes nothing.
    pub(crate) fn advance(&self, generation: u32) {
        let mut seen = self.generation.load(Ordering::Relaxed);
        while !reached(seen, generation) {
            // Release: pairs with the acquire in `seen`.
            let posted = self.generation.compare_exchange_weak(seen, generation, Ordering::Release, Ordering::Relaxed);
            match posted {
                Ok(_) => return self.wake_parked(),
                Err(now) => seen = now,
            }
        }
    }

    /// Called after the generation was stored.
    fn wake_parked(&self) {
        // Orders that store before the load below; partner: the fence in `park`.
        fence(Ordering::SeqCst);
        if self.parked.load(Ordering::Relaxed) != 0 {
            self.futex.wake(&self.generation);
        }
    }

    /// Waits until `generation` is reached. `proceed` is called with the time waited so far about every 10 ms (and
    /// between yields); an error from it ends the wait and is returned.
    ///
    /// # Errors
    /// Whatever `proceed` returns.
    pub fn wait(&self, generation: u32, pacing: Pacing, mut proceed: impl FnMut(Duration) -> Result<()>) -> Result<()> {
        for _ in 0..pacing.spins {
            if reached(self.seen(), generation) {
                return Ok(());
            }
            std::hint::spin_loop();
        }
        self.wait_slowly(generation, pacing, &mut proceed)
    }

    #[cold]
    fn wait_slowly(
        &self,
        generation: u32,
        pacing: Pacing,
        proceed: &mut dyn FnMut(Duration) -> Result<()>,
    ) -> Result<()> {
        let start = Instant::now();
        for round in 0..pacing.yields {
            if reached(self.seen(), generation) {
                return Ok(());
            }
            let waited = start.elapsed();
            if waited > YIELD_LIMIT {
                break;
            }
            if round % 32 == 31 {
                proceed(waited)?;
            }
            Futex::relax();
        }
        while !reached(self.seen(), generation) {
            proceed(start.elapsed())?;
            self.park(generation);
        }
        Ok(())
    }

    /// Sleeps until the flag moves, at most [`PARK_SLICE`].
    pub fn park(&self, generation: u32) {
        self.parked.fetch_add(1, Ordering::Relaxed);
        // Orders the increment before the look below; partner: the fence in `wake_parked`.
        fence(Ordering::SeqCst);
        let seen = self.seen();
        if !reached(seen, generation) {
            self.futex.sleep(&self.generation, seen, PARK_SLICE);
        }
        self.parked.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::error::Error;

    #[test]
    fn reached_compares_on_the_circle() {
        assert!(reached(5, 5) && reached(6, 5) && !reached(4, 5));
        assert!(reached(2, u32::MAX - 1), "a wrapped generation is later");
        assert!(!reached(u32::MAX - 1, 2));
    }

    #[test]
    fn a_flag_is_one_cache_line() {
        assert_eq!((size_of::<Flag>(), align_of::<Flag>()), (64, 64));
    }

    #[test]
    fn a_parked_waiter_wakes_on_post() {
        let flag = Flag::new();
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| flag.wait(1, Pacing { spins: 0, yields: 0 }, |_| Ok(())));
            std::thread::sleep(Duration::from_millis(30));
            flag.post(1);
            assert!(waiter.join().unwrap().is_ok());
        });
    }

    #[test]
    fn a_wait_ends_with_the_callers_error() {
        let flag = Flag::new();
        let given_up = flag.wait(1, Pacing { spins: 1, yields: 1 }, |waited| {
            if waited < Duration::from_millis(25) {
                return Ok(());
            }
            Err(Error::BarrierTimeout { name: "test".into(), absent: vec![1], waited_ms: waited.as_millis() as u64 })
        });
        assert!(matches!(given_up, Err(Error::BarrierTimeout { waited_ms: 25.., .. })), "{given_up:?}");
    }
}
