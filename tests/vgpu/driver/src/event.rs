//! Events: points in the order of a stream.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use crate::races::{self, Clock};
use crate::status::{Result, Status, refuse};

/// DAPI 6.1, `CUevent_flags`.
const DISABLE_TIMING: u32 = 2;

#[derive(Debug, Default)]
pub(crate) struct Event {
    flags: u32,
    state: Mutex<State>,
}

/// One point in the order of a stream.
#[derive(Debug, Default)]
pub(crate) struct Recording {
    reached: Mutex<Option<Reached>>,
    changed: Condvar,
}

/// When it was reached, and what is known to have happened by then.
#[derive(Debug, Clone)]
struct Reached {
    at: Instant,
    clock: Clock,
}

impl Recording {
    fn reached(&self) -> MutexGuard<'_, Option<Reached>> {
        self.reached.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// By the stream, which has come there.
    pub fn complete(&self) {
        *self.reached() = Some(Reached { at: Instant::now(), clock: races::clock() });
        self.changed.notify_all();
    }

    /// Waits until it is reached, and returns what is known then.
    pub fn wait(&self) -> Clock {
        let reached = self.changed.wait_while(self.reached(), |reached| reached.is_none());
        reached
            .unwrap_or_else(PoisonError::into_inner)
            .as_ref()
            .map(|reached| reached.clock.clone())
            .unwrap_or_default()
    }
}

/// A recording in a capture: which one, and the nodes of its graph that it stands for (CUDA Programming Guide, 4.2.2.1.2.1:
/// "A captured event represents a set of nodes in a capture graph").
#[derive(Debug, Clone)]
pub(crate) struct Captured {
    pub capture: u64,
    pub after: Vec<usize>,
}

#[derive(Debug, Default)]
struct State {
    /// If the last recording was one.
    captured: Option<Captured>,
    latest: Option<Arc<Recording>>,
}

impl Event {
    pub fn new(flags: u32) -> Event {
        Event { flags, ..Event::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins a recording, which the stream completes; the one before it comes with it.
    pub fn mark(&self) -> (Option<Arc<Recording>>, Arc<Recording>) {
        let (mut state, new) = (self.state(), Arc::<Recording>::default());
        state.captured = None;
        (state.latest.replace(Arc::clone(&new)), new)
    }

    /// Records it in a capture.
    pub fn capture(&self, captured: Captured) {
        self.state().captured = Some(captured);
    }

    pub fn captured(&self) -> Option<Captured> {
        self.state().captured.clone()
    }

    /// The recording that whoever waits now waits for. DAPI 6.19, `cuEventRecord`: before the first one "an event represents
    /// an empty set of work", so there is nothing to wait for.
    pub fn recording(&self) -> Option<Arc<Recording>> {
        self.state().latest.clone()
    }

    /// Whether the latest recording is complete, if there is any; the host knows then.
    pub fn is_complete(&self) -> bool {
        self.recording().is_none_or(|recording| {
            let reached = recording.reached().clone();
            reached.map(|reached| races::host_learns(&reached.clock)).is_some()
        })
    }

    /// DAPI 6.19, `cuEventElapsedTime`: CUDA_ERROR_INVALID_HANDLE for events without timing or never recorded,
    /// CUDA_ERROR_NOT_READY until both are complete.
    pub fn elapsed_ms(&self, end: &Event) -> Result<f32> {
        if (self.flags | end.flags) & DISABLE_TIMING != 0 {
            return refuse(Status::INVALID_HANDLE, "the time between events made with CU_EVENT_DISABLE_TIMING");
        }
        let (Some(start), Some(end)) = (self.recording(), end.recording()) else {
            return refuse(Status::INVALID_HANDLE, "the time between events that were not both recorded");
        };
        let start = start.reached().clone(); // one after the other: both may be the same
        let end = end.reached().clone();
        match (start, end) {
            (Some(start), Some(end)) => {
                races::host_learns(&start.clock);
                races::host_learns(&end.clock);
                Ok(end.at.saturating_duration_since(start.at).as_secs_f32() * 1e3)
            }
            _ => Err(Status::NOT_READY),
        }
    }
}
