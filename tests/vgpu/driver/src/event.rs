//! Events: points in the order of a stream.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use crate::status::{Result, Status, refuse};

/// DAPI 6.1, `CUevent_flags`.
const DISABLE_TIMING: u32 = 2;

#[derive(Debug, Default)]
pub(crate) struct Event {
    flags: u32,
    state: Mutex<State>,
    reached: Condvar,
}

/// A recording in a capture: which one, and the nodes of its graph that it stands for (CUDA Programming Guide, 4.2.2.1.2.1:
/// "A captured event represents a set of nodes in a capture graph").
#[derive(Debug, Clone)]
pub(crate) struct Captured {
    pub capture: u64,
    pub after: Vec<usize>,
}

#[derive(Debug, Default, Clone)]
struct State {
    /// If the last recording was one.
    captured: Option<Captured>,
    recorded: u64,
    completed: u64,
    /// When the point completed last was reached.
    at: Option<Instant>,
}

impl Event {
    pub fn new(flags: u32) -> Event {
        Event { flags, ..Event::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins a recording; the stream completes it with [`Event::complete`].
    pub fn mark(&self) -> u64 {
        let mut state = self.state();
        state.captured = None;
        state.recorded += 1;
        state.recorded
    }

    /// Records it in a capture.
    pub fn capture(&self, captured: Captured) {
        self.state().captured = Some(captured);
    }

    pub fn captured(&self) -> Option<Captured> {
        self.state().captured.clone()
    }

    pub fn complete(&self, recording: u64) {
        let mut state = self.state();
        state.completed = state.completed.max(recording);
        state.at = Some(Instant::now());
        self.reached.notify_all();
    }

    /// The recording that whoever waits now waits for.
    pub fn recording(&self) -> u64 {
        self.state().recorded
    }

    pub fn wait(&self, recording: u64) {
        let state = self.state();
        let _state = self.reached.wait_while(state, |state| state.completed < recording);
    }

    /// DAPI 6.19, `cuEventRecord`: before the first recording "an event represents an empty set of work", so it is complete.
    pub fn is_complete(&self) -> bool {
        let state = self.state();
        state.completed >= state.recorded
    }

    /// DAPI 6.19, `cuEventElapsedTime`: CUDA_ERROR_INVALID_HANDLE for events without timing or never recorded,
    /// CUDA_ERROR_NOT_READY until both are complete.
    pub fn elapsed_ms(&self, end: &Event) -> Result<f32> {
        if (self.flags | end.flags) & DISABLE_TIMING != 0 {
            return refuse(Status::INVALID_HANDLE, "the time between events made with CU_EVENT_DISABLE_TIMING");
        }
        let (start, end) = (self.state().clone(), end.state().clone());
        if start.recorded == 0 || end.recorded == 0 {
            return refuse(Status::INVALID_HANDLE, "the time between events that were not both recorded");
        }
        match (start.at, end.at) {
            (Some(from), Some(to)) if start.completed == start.recorded && end.completed == end.recorded => {
                Ok(to.saturating_duration_since(from).as_secs_f32() * 1e3)
            }
            _ => Err(Status::NOT_READY),
        }
    }
}
