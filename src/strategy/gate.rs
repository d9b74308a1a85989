//! What the host and the stream closures of one strategy share: the step in flight, and the first thing that went wrong.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::cuda::DeviceEvent;
use crate::device::Event;
use crate::error::{Error, Result};

/// Locks a mutex that only guards plain data: a panic in another holder leaves nothing half done that matters, because it
/// makes the strategy unusable.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Weights are read behind this gate: it opens when the optimizer step in flight has ended.
#[derive(Debug, Clone)]
pub(crate) struct Gate(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    /// Recorded on the compute stream after each optimizer step.
    step_done: Event,
    /// Likewise, on a device's compute stream.
    device_step_done: Option<DeviceEvent>,
    /// The first error of a stream closure. Every later call reports it.
    failure: Mutex<Option<Error>>,
    /// Deadline of the host's waits.
    timeout: Duration,
}

impl Gate {
    pub fn new(timeout: Duration) -> Gate {
        Gate::with(timeout, None)
    }

    /// Of a strategy on a device, which records `step_done`.
    pub fn of_device(timeout: Duration, step_done: DeviceEvent) -> Gate {
        Gate::with(timeout, Some(step_done))
    }

    fn with(timeout: Duration, device_step_done: Option<DeviceEvent>) -> Gate {
        Gate(Arc::new(Inner { step_done: Event::new(), device_step_done, failure: Mutex::new(None), timeout }))
    }

    pub fn step_done(&self) -> &Event {
        &self.0.step_done
    }

    pub fn timeout(&self) -> Duration {
        self.0.timeout
    }

    pub fn is_same(&self, other: &Gate) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// Waits for the step in flight.
    pub fn wait(&self) -> Result<()> {
        self.check()?;
        self.0.step_done.synchronize(self.0.timeout)?;
        if let Some(done) = &self.0.device_step_done {
            done.synchronize(self.0.timeout).map_err(|error| match error {
                late @ Error::TimedOut { .. } => late, // the step may still end well
                error => self.fail(error),
            })?;
        }
        self.check()
    }

    /// The error that made the strategy unusable, if there was one.
    pub fn check(&self) -> Result<()> {
        match &*lock(&self.0.failure) {
            None => Ok(()),
            Some(Error::Poisoned { cause }) => Err(Error::Poisoned { cause: cause.clone() }),
            Some(cause) => Err(Error::Poisoned { cause: Box::new(cause.clone()) }),
        }
    }

    /// Runs `work` of a stream unless something went wrong before. What goes wrong in it makes the strategy unusable: also a
    /// panic, because nobody would be told of one on a stream.
    pub fn guard<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<T> {
        self.check()?;
        let done = catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
            let text = panic.downcast_ref::<&str>().copied();
            let text = text.or(panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message");
            Err(Error::Stream { stream: "compute".to_owned(), reason: format!("a panic: {text}") })
        });
        done.map_err(|error| self.fail(error))
    }

    /// Makes the strategy unusable; the first error stays.
    pub fn fail(&self, error: Error) -> Error {
        lock(&self.0.failure).get_or_insert(error).clone()
    }
}
