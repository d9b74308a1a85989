//! Events: points in a stream's order that others wait for.

use std::sync::Arc;
use std::time::Duration;

use crate::error::{Error, Result};
use crate::world::flag::{Flag, Pacing, reached};
use crate::world::sync::{AtomicU32, AtomicU64, Ordering};

/// Waits on events are about work of this very process, which may need the core: spin little.
#[cfg(not(loom))]
const PACING: Pacing = Pacing { spins: 200, yields: 8 };
#[cfg(loom)]
const PACING: Pacing = Pacing { spins: 0, yields: 0 };

/// Set in `abandoned` beside a generation.
const ABANDONED: u64 = 1 << 32;

/// A point in a stream's order, as a CUDA event is: recording marks the point, waiting waits for the point recorded
/// last *at the time of the call*. An event never recorded is complete. Clones are the same event.
///
/// A stream that fails does not get to its points: they are complete all the same, so that nobody waits in vain, but a wait
/// for one returns an error.
///
/// One stream records an event at a time: of two that do, the one that gets to its point first completes both points if
/// its own is the later one.
#[derive(Clone, Default)]
pub struct Event(Arc<Core>);

#[derive(Default)]
struct Core {
    /// How often the event was recorded; the recorder increments, waiters read.
    recorded: AtomicU32,
    /// How many of those points were reached, or will never be.
    completed: Flag,
    /// The last point that will never be reached, with [`ABANDONED`]; 0: all were or will be.
    abandoned: AtomicU64,
    /// Whether an operation, and not the user, marks the points.
    is_reserved: bool,
}

impl Event {
    /// An event that is complete until it is recorded.
    pub fn new() -> Event {
        Event::default()
    }

    /// An event that no stream may be asked to record, because the end of an operation hangs on it.
    pub(crate) fn reserved() -> Event {
        Event(Arc::new(Core { is_reserved: true, ..Core::default() }))
    }

    /// Whether the point recorded last was reached, or will never be. What the stream did before it is visible then.
    pub fn is_complete(&self) -> bool {
        self.is_complete_at(self.generation())
    }

    /// Blocks the calling thread until the point recorded last is reached.
    ///
    /// # Errors
    /// [`Error::TimedOut`] after `timeout`; [`Error::Stream`] if the stream has failed before it got there.
    pub fn synchronize(&self, timeout: Duration) -> Result<()> {
        self.wait_for(self.generation(), timeout)
    }

    /// Fails for an event that only an operation marks.
    pub(crate) fn check_recordable(&self) -> Result<()> {
        if !self.0.is_reserved {
            return Ok(());
        }
        Err(Error::InvalidArgument {
            argument: "event to record",
            value: "the event of an operation".into(),
            accepted: "must be one made by Event::new",
        })
    }

    /// Whether nobody else has this event, so that it may come to mean something else.
    pub(crate) fn is_unshared(&mut self) -> bool {
        Arc::get_mut(&mut self.0).is_some()
    }

    /// Begins a recording: the generation that the stream completes when it gets there.
    pub(crate) fn mark(&self) -> u32 {
        // Release: pairs with the acquire in `generation`, so whoever waits for this point sees it marked.
        self.0.recorded.fetch_add(1, Ordering::Release).wrapping_add(1)
    }

    /// The recording that a waiter who calls now waits for.
    pub(crate) fn generation(&self) -> u32 {
        // Acquire: pairs with the release in `mark`.
        self.0.recorded.load(Ordering::Acquire)
    }

    pub(crate) fn is_complete_at(&self, generation: u32) -> bool {
        reached(self.0.completed.seen(), generation)
    }

    /// The stream has got to the point marked as `generation`.
    pub(crate) fn complete(&self, generation: u32) {
        self.0.completed.advance(generation);
    }

    /// The stream will never get to the point marked as `generation`.
    pub(crate) fn abandon(&self, generation: u32) {
        // Relaxed: published by the flag.
        self.0.abandoned.store(ABANDONED | u64::from(generation), Ordering::Relaxed);
        self.0.completed.advance(generation);
    }

    /// Fails if the point, or a later one, was abandoned. For a point that is complete.
    pub(crate) fn check(&self, generation: u32) -> Result<()> {
        // Relaxed: the flag, which the caller has seen complete, published it.
        let abandoned = self.0.abandoned.load(Ordering::Relaxed);
        if abandoned == 0 || !reached(abandoned as u32, generation) {
            return Ok(());
        }
        let reason = "the stream that recorded it has failed before it got there".to_owned();
        Err(Error::Stream { stream: "of an event".into(), reason })
    }

    pub(crate) fn wait_for(&self, generation: u32, timeout: Duration) -> Result<()> {
        self.0.completed.wait(generation, PACING, |waited| {
            if waited < timeout {
                return Ok(());
            }
            // Written out: the model checker builds this file outside of the crate.
            let waited_ms = u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX);
            Err(Error::TimedOut { what: "the work before an event".to_owned(), waited_ms })
        })?;
        self.check(generation)
    }
}

impl std::fmt::Debug for Event {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Event").field("is_complete", &self.is_complete()).finish()
    }
}

/// A point on its way down a stream: reached when the stream gets there, abandoned when it is dropped on the way.
pub(super) struct Point {
    event: Event,
    generation: u32,
    is_reached: bool,
}

impl Point {
    /// Marks the point.
    pub(super) fn mark(event: &Event) -> Point {
        Point { event: event.clone(), generation: event.mark(), is_reached: false }
    }

    pub(super) fn reach(mut self) {
        self.is_reached = true;
        self.event.complete(self.generation);
    }
}

impl Drop for Point {
    fn drop(&mut self) {
        if !self.is_reached {
            self.event.abandon(self.generation);
        }
    }
}
