//! Post and wait.

use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::thread;

use crate::bounded_model;
use crate::flag::{Flag, Pacing};
use crate::weak::{self, Weakness};

const NO_PATIENCE: Pacing = Pacing { spins: 0, yields: 0 };

struct Link {
    flag: Flag,
    credit: Flag,
    slot: UnsafeCell<u32>,
}

// SAFETY: the protocol under test is what makes sharing the slot sound; loom reports an access that races.
unsafe impl Sync for Link {}
// SAFETY: as above.
unsafe impl Send for Link {}

fn link() -> Arc<Link> {
    Arc::new(Link { flag: Flag::new(), credit: Flag::new(), slot: UnsafeCell::new(0) })
}

/// A waiter that parks is always woken (loom's futex has no time-out: a lost wake-up is a deadlock), and sees the
/// payload.
#[test]
fn a_post_is_never_missed_and_publishes_the_payload() {
    loom::model(|| {
        let link = link();
        let poster = Arc::clone(&link);
        let thread = thread::spawn(move || {
            // SAFETY: the waiter reads only after generation 1.
            poster.slot.with_mut(|slot| unsafe { *slot = 7 });
            poster.flag.post(1);
        });
        link.flag.wait(1, NO_PATIENCE, |_| Ok(())).unwrap();
        // SAFETY: generation 1 was seen, so the poster is done with the slot.
        assert_eq!(link.slot.with(|slot| unsafe { *slot }), 7);
        thread.join().unwrap();
    });
}

/// Two waiters on one flag are both woken.
#[test]
fn every_waiter_is_woken() {
    bounded_model(|| {
        let link = link();
        let waiters: Vec<_> = (0..2)
            .map(|_| {
                let link = Arc::clone(&link);
                thread::spawn(move || link.flag.wait(1, NO_PATIENCE, |_| Ok(())).unwrap())
            })
            .collect();
        link.flag.post(1);
        for waiter in waiters {
            waiter.join().unwrap();
        }
    });
}

/// Two posters of one flag: it never goes back, and who waits for the later generation is woken.
#[test]
fn an_advance_never_goes_back() {
    bounded_model(|| {
        let link = link();
        let posters: Vec<_> = (1..=2)
            .map(|generation| {
                let link = Arc::clone(&link);
                thread::spawn(move || link.flag.advance(generation))
            })
            .collect();
        link.flag.wait(2, NO_PATIENCE, |_| Ok(())).unwrap();
        for poster in posters {
            poster.join().unwrap();
        }
        assert_eq!(link.flag.seen(), 2);
    });
}

/// One slot used twice: the sender waits for the credit before it overwrites.
#[test]
fn a_slot_is_overwritten_only_after_its_credit() {
    bounded_model(|| {
        let link = link();
        let sender = Arc::clone(&link);
        let thread = thread::spawn(move || {
            for generation in 1..=2 {
                sender.credit.wait(generation - 1, NO_PATIENCE, |_| Ok(())).unwrap();
                // SAFETY: the receiver has given the slot back.
                sender.slot.with_mut(|slot| unsafe { *slot = generation });
                sender.flag.post(generation);
            }
        });
        for generation in 1..=2 {
            link.flag.wait(generation, NO_PATIENCE, |_| Ok(())).unwrap();
            // SAFETY: the sender does not touch the slot until the credit.
            assert_eq!(link.slot.with(|slot| unsafe { *slot }), generation);
            link.credit.post(generation);
        }
        thread.join().unwrap();
    });
}

/// The negative control: without the credit wait loom must find the race.
#[test]
#[should_panic]
fn without_the_credit_loom_finds_the_race() {
    bounded_model(|| {
        let link = link();
        let sender = Arc::clone(&link);
        let thread = thread::spawn(move || {
            for generation in 1..=2 {
                // SAFETY: none; this is the bug that must be seen.
                sender.slot.with_mut(|slot| unsafe { *slot = generation });
                sender.flag.post(generation);
            }
        });
        link.flag.wait(1, NO_PATIENCE, |_| Ok(())).unwrap();
        // SAFETY: none; this is the bug that must be seen.
        link.slot.with(|slot| unsafe { *slot });
        thread.join().unwrap();
    });
}

/// The flag's own source, compiled against `weak::sync`: a post and a wait by threads with these weaknesses.
fn post_and_wait(posters: Weakness, waiters: Weakness) {
    struct Weak {
        flag: weak::flag::Flag,
        slot: UnsafeCell<u32>,
    }
    // SAFETY: as for `Link`.
    unsafe impl Sync for Weak {}
    // SAFETY: as for `Link`.
    unsafe impl Send for Weak {}
    loom::model(move || {
        let link = Arc::new(Weak { flag: weak::flag::Flag::new(), slot: UnsafeCell::new(0) });
        let poster = Arc::clone(&link);
        let thread = thread::spawn(move || {
            posters.of_this_thread();
            // SAFETY: the waiter reads only after generation 1.
            poster.slot.with_mut(|slot| unsafe { *slot = 7 });
            poster.flag.post(1);
        });
        waiters.of_this_thread();
        link.flag.wait(1, weak::flag::Pacing { spins: 0, yields: 0 }, |_| Ok(())).unwrap();
        // SAFETY: generation 1 was seen, so the poster is done with the slot.
        assert_eq!(link.slot.with(|slot| unsafe { *slot }), 7);
        thread.join().unwrap();
    });
}

#[test]
fn with_all_orderings_the_weak_flag_is_the_flag() {
    post_and_wait(Weakness::None, Weakness::None);
}

#[test]
#[should_panic(expected = "deadlock")]
fn without_the_posters_fence_loom_finds_the_lost_wake_up() {
    post_and_wait(Weakness::NoFence, Weakness::None);
}

#[test]
#[should_panic(expected = "deadlock")]
fn without_the_waiters_fence_loom_finds_the_lost_wake_up() {
    post_and_wait(Weakness::None, Weakness::NoFence);
}

#[test]
#[should_panic(expected = "Causality violation")]
fn without_the_release_loom_finds_the_race() {
    post_and_wait(Weakness::NoRelease, Weakness::None);
}

#[test]
#[should_panic(expected = "Causality violation")]
fn without_the_acquire_loom_finds_the_race() {
    post_and_wait(Weakness::None, Weakness::NoAcquire);
}

#[test]
#[should_panic(expected = "deadlock")]
fn without_the_wake_loom_finds_the_sleeper() {
    post_and_wait(Weakness::NoWake, Weakness::None);
}
