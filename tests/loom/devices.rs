//! What streams and operations do with flags: events, promises and their reuse.

use std::sync::Arc as StdArc;
use std::time::Duration;

use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicBool, Ordering};
use loom::thread;

use crate::bounded_model;
use crate::error::Error;
use crate::event::{Event, Point};
use crate::work::{Pool, Work};

/// A cell that the protocol under test protects.
struct Payload(UnsafeCell<u32>);

// SAFETY: the protocol under test is what makes sharing sound; loom reports an access that races.
unsafe impl Sync for Payload {}
// SAFETY: as above.
unsafe impl Send for Payload {}

fn payload() -> Arc<Payload> {
    Arc::new(Payload(UnsafeCell::new(0)))
}

impl Payload {
    fn set(&self, value: u32) {
        // SAFETY: of the model: nobody else is there yet.
        self.0.with_mut(|at| unsafe { *at = value });
    }

    fn get(&self) -> u32 {
        // SAFETY: of the model: the writer is done.
        self.0.with(|at| unsafe { *at })
    }
}

fn failure() -> Error {
    Error::RankFailed { rank: 1, reason: "on purpose".into() }
}

/// Waiting for a point is seeing what the stream did before it.
#[test]
fn an_event_publishes_what_came_before_its_point() {
    loom::model(|| {
        let (event, payload) = (Event::new(), payload());
        let (point, written) = (Point::mark(&event), Arc::clone(&payload));
        let stream = thread::spawn(move || {
            written.set(7);
            point.reach();
        });
        event.synchronize(Duration::MAX).unwrap();
        assert_eq!(payload.get(), 7);
        stream.join().unwrap();
    });
}

/// A point that is dropped on its way ends the wait with an error, always.
#[test]
fn an_abandoned_point_is_an_error_for_whoever_waits() {
    loom::model(|| {
        let event = Event::new();
        let point = Point::mark(&event);
        let stream = thread::spawn(move || drop(point));
        assert!(event.synchronize(Duration::MAX).is_err());
        stream.join().unwrap();
    });
}

/// Two points of one event, completed out of order by two streams: nobody waits in vain.
#[test]
fn points_of_two_streams_are_both_waited_for() {
    bounded_model(|| {
        let event = Event::new();
        let streams: Vec<_> = (0..2)
            .map(|_| {
                let point = Point::mark(&event);
                thread::spawn(move || point.reach())
            })
            .collect();
        event.synchronize(Duration::MAX).unwrap();
        for stream in streams {
            stream.join().unwrap();
        }
        assert!(event.is_complete());
    });
}

/// The buffers come back when the operation is done with them, and not before.
#[test]
fn work_that_went_well_publishes_its_result() {
    loom::model(|| {
        let (completion, mut promise) = Pool::new().take();
        let (work, payload) = (Work::in_flight((), completion, Duration::MAX), payload());
        let written = Arc::clone(&payload);
        let stream = thread::spawn(move || {
            written.set(7);
            promise.settle(Ok(()));
        });
        work.wait().unwrap();
        assert_eq!(payload.get(), 7);
        stream.join().unwrap();
    });
}

/// An operation that failed, or was dropped unrun, never reports success.
#[test]
fn work_that_went_wrong_says_so() {
    for is_run in [true, false] {
        loom::model(move || {
            let (completion, mut promise) = Pool::new().take();
            let work = Work::in_flight((), completion, Duration::MAX);
            let stream = thread::spawn(move || {
                if is_run {
                    promise.settle(Err(failure()));
                }
            });
            let error = work.wait().unwrap_err();
            assert_eq!(matches!(error, Error::RankFailed { .. }), is_run);
            stream.join().unwrap();
        });
    }
}

/// One completion used again: the second operation's end is its own, whatever the first one's was.
#[test]
fn a_completion_used_again_tells_nothing_of_its_past() {
    bounded_model(|| {
        let mut pool = Pool::new();
        for result in [Err(failure()), Ok(())] {
            let (completion, mut promise) = pool.take();
            let work = Work::in_flight((), completion, Duration::MAX);
            let went_well = result.is_ok();
            let stream = thread::spawn(move || promise.settle(result));
            assert_eq!(work.wait().is_ok(), went_well);
            // Without the join the promise may still hold the completion, and another is made.
            if !went_well {
                stream.join().unwrap();
            }
        }
    });
}

/// An event that somebody still has is not used again.
#[test]
fn a_completion_whose_event_is_out_is_not_used_again() {
    loom::model(|| {
        let mut pool = Pool::new();
        let (completion, promise) = pool.take();
        let work = Work::in_flight((), completion, Duration::MAX);
        let kept = work.event().clone();
        drop(promise);
        assert!(work.wait().is_err());
        let (second, unfulfilled) = pool.take();
        assert!(kept.is_complete(), "it tells of the first operation");
        drop((second, unfulfilled));
    });
}

/// The negative control: a promise that completes before it says how it ended reports success.
#[test]
#[should_panic(expected = "success is reported")]
fn a_promise_that_completes_too_early_is_found() {
    loom::model(|| {
        let (event, has_failed) = (Event::new(), StdArc::new(AtomicBool::new(false)));
        let (point, failed) = (Point::mark(&event), StdArc::clone(&has_failed));
        let stream = thread::spawn(move || {
            point.reach();
            failed.store(true, Ordering::Relaxed);
        });
        event.synchronize(Duration::MAX).unwrap();
        assert!(has_failed.load(Ordering::Relaxed), "success is reported");
        stream.join().unwrap();
    });
}
