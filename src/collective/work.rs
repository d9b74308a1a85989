//! An operation in flight and the buffers it owns.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use crate::device::Event;
use crate::error::{Error, Result};
use crate::world::sync::{AtomicBool, Ordering};

/// Completions kept for reuse: more operations than this in flight at once allocate.
#[cfg(not(loom))]
const POOL: usize = 64;
#[cfg(loom)]
const POOL: usize = 1;

/// An operation that was issued. It owns its buffers until [`wait`](Work::wait) gives them back, because a peer may read
/// and write them meanwhile: a borrow could be ended early by `mem::forget`. Dropping the handle does not cancel the
/// operation and does not block; the memory lives until the operation has ended.
#[must_use = "the buffers come back by wait()"]
#[derive(Debug)]
pub struct Work<B> {
    buffers: B,
    state: State,
    timeout: Duration,
}

#[derive(Debug)]
enum State {
    /// It ran before it was handed out.
    Ended(Option<Box<Error>>),
    InFlight(Arc<Completion>),
}

/// The event of what has ended.
static ENDED: OnceLock<Event> = OnceLock::new();

impl<B> Work<B> {
    pub(super) fn in_flight(buffers: B, completion: Arc<Completion>, timeout: Duration) -> Work<B> {
        Work { buffers, state: State::InFlight(completion), timeout }
    }

    pub(super) fn ended(buffers: B, result: Result<()>) -> Work<B> {
        Work { buffers, state: State::Ended(result.err().map(Box::new)), timeout: Duration::ZERO }
    }

    /// Completes when the operation has ended, well or not. `stream.wait(work.event())` orders a stream behind it without
    /// blocking the host. A stream cannot be asked to record it.
    pub fn event(&self) -> &Event {
        match &self.state {
            State::Ended(_) => ENDED.get_or_init(Event::reserved),
            State::InFlight(completion) => &completion.event,
        }
    }

    /// Whether the operation has ended, well or not.
    pub fn is_complete(&self) -> bool {
        match &self.state {
            State::Ended(_) => true,
            State::InFlight(completion) => completion.event.is_complete(),
        }
    }

    /// Blocks until the operation has ended and returns its buffers.
    ///
    /// # Errors
    /// What ended the operation: [`Error::PeerLost`], [`Error::PeerStopped`], [`Error::PeerStalled`],
    /// [`Error::Mismatch`], [`Error::RankFailed`] or [`Error::Poisoned`]; [`Error::TimedOut`] if the stream was held up for so
    /// long that the operation did not even begin. The buffers are lost then: a peer may still read and write them.
    pub fn wait(self) -> Result<B> {
        let error = match self.state {
            State::Ended(error) => error.map(|error| *error),
            State::InFlight(completion) => {
                completion.event.synchronize(self.timeout)?;
                completion.error()
            }
        };
        match error {
            None => Ok(self.buffers),
            Some(error) => Err(error),
        }
    }
}

/// How an operation ended; shared by its [`Work`] and its task.
#[derive(Debug)]
pub(super) struct Completion {
    event: Event,
    /// Looked at before `error`, so that success takes no lock.
    has_failed: AtomicBool,
    error: Mutex<Option<Error>>,
}

impl Default for Completion {
    fn default() -> Self {
        Completion { event: Event::reserved(), has_failed: AtomicBool::new(false), error: Mutex::new(None) }
    }
}

impl Completion {
    /// Why the operation failed. For one whose event was seen complete.
    fn error(&self) -> Option<Error> {
        // Relaxed: published by the event, which completes after it was stored.
        if !self.has_failed.load(Ordering::Relaxed) {
            return None;
        }
        self.error.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// The obligation to complete, held by the task and fulfilled when it is dropped. Dropped unsettled it completes with an
/// error.
pub(super) struct Promise {
    completion: Arc<Completion>,
    generation: u32,
    is_settled: bool,
}

impl Promise {
    /// Says how the operation ended; the event completes when the promise is dropped.
    pub(super) fn settle(&mut self, result: Result<()>) {
        if let Err(error) = result {
            *self.completion.error.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
            // Relaxed: the event publishes it.
            self.completion.has_failed.store(true, Ordering::Relaxed);
        }
        self.is_settled = true;
    }

    pub(super) fn is_settled(&self) -> bool {
        self.is_settled
    }
}

impl Drop for Promise {
    fn drop(&mut self) {
        if !self.is_settled {
            let reason = "the operation was not run".to_owned();
            self.settle(Err(Error::Stream { stream: "of a collective".into(), reason }));
        }
        self.completion.event.complete(self.generation);
    }
}

/// Completions that are used again and again.
pub(super) struct Pool {
    completions: Vec<Arc<Completion>>,
}

impl Pool {
    pub(super) fn new() -> Pool {
        Pool { completions: (0..POOL).map(|_| Arc::default()).collect() }
    }

    /// A completion that nobody else holds, nor its event, and the promise to complete it.
    pub(super) fn take(&mut self) -> (Arc<Completion>, Promise) {
        let is_idle = |completion: &mut Arc<Completion>| {
            Arc::get_mut(completion).is_some_and(|completion| completion.event.is_unshared())
        };
        let idle = self.completions.iter_mut().position(is_idle);
        let completion = idle.map_or_else(Arc::default, |index| Arc::clone(&self.completions[index]));
        // Relaxed: this thread is alone with it.
        completion.has_failed.store(false, Ordering::Relaxed);
        let generation = completion.event.mark();
        (Arc::clone(&completion), Promise { completion, generation, is_settled: false })
    }
}
