//! CUDA graphs: work that is enqueued once, and from then on with a single call.
//!
//! ```text
//! let mut graph = stream.capture(|| { .. enqueue a step on `stream` .. Ok(()) })?;
//! loop { .. new numbers in device memory ..; graph.launch(&stream)?; }
//! ```
//! Other streams take part by events: what waits for an event recorded in the capture joins it, and must be waited for by
//! `stream` before the end. Whatever is not enqueued work fails inside: allocating, reading, synchronizing, even with another
//! stream, events recorded before.

use std::any::Any;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::ThreadId;

use cudarc::driver::sys;

use super::bindings::{
    cuGraphDestroy, cuGraphExecDestroy, cuGraphInstantiate, cuGraphLaunch, cuStreamBeginCapture, cuStreamEndCapture,
};
use super::context::{Device, Uuid};
use super::free::harmless;
use super::stream::Stream;
use crate::error::{Error, Result};

/// Enqueued work with its order, captured by [`Stream::capture`]. Every launch does all of it again: same kernels, same
/// arguments, same addresses. It keeps the memory and the kernels that the work uses.
pub struct Graph {
    device: Device,
    executable: sys::CUgraphExec,
    kept: Kept,
}

type Kept = Vec<Box<dyn Any + Send + Sync>>;

// SAFETY: the driver's functions on executable graphs may be called from any thread, one at a time (CUDA Driver API, 4,
// "Graph object thread safety"): those that are called here take the graph exclusively.
unsafe impl Send for Graph {}
// SAFETY: nothing can be done with a shared reference.
unsafe impl Sync for Graph {}

impl Graph {
    /// Enqueues the whole work on `stream`: after what was enqueued there before, and after the launch before this one. Where
    /// collectives are in it, their communicator is told first, by
    /// [`before_launch`](crate::collective::cuda::Communicator::before_launch).
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a stream of another device; [`Error::Capture`] if it captures; what the driver says.
    pub fn launch(&mut self, stream: &Stream) -> Result<()> {
        if !stream.device().is_same(&self.device) {
            return Err(Error::InvalidArgument {
                argument: "stream",
                value: stream.name().to_owned(),
                accepted: "must be of the device that the graph was captured on",
            });
        }
        let access = stream.access()?;
        access.check_eager("cuGraphLaunch")?;
        // SAFETY: both live; what the work uses is kept by the graph.
        self.device.check(unsafe { cuGraphLaunch(self.executable, access.raw()) })
    }

    /// How many times the work has had it keep `owner`.
    pub(crate) fn count_kept(&self, owner: &Arc<dyn Any + Send + Sync>) -> usize {
        let is_owner = |kept: &&Box<dyn Any + Send + Sync>| {
            kept.downcast_ref::<Arc<dyn Any + Send + Sync>>().is_some_and(|kept| Arc::ptr_eq(kept, owner))
        };
        self.kept.iter().filter(is_owner).count()
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: instantiated by `capture`, destroyed once; the driver lets a launch in flight end first.
            let _ = harmless(|| unsafe { cuGraphExecDestroy(self.executable) });
        }
    }
}

impl std::fmt::Debug for Graph {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Graph").field("device", &self.device.ordinal()).finish_non_exhaustive()
    }
}

// ---- capture -----------------------------------------------------------------------------------------------------------

/// A capture, as the streams and events in it know it.
#[derive(Clone)]
pub(crate) struct Capture(Arc<State>);

struct State {
    /// The thread that captures. Work of others is refused: it could not be kept alive without a race.
    thread: ThreadId,
    /// What the graph will keep; none when the capture has ended.
    kept: Mutex<Option<Kept>>,
}

impl Capture {
    fn new() -> Capture {
        Capture(Arc::new(State { thread: std::thread::current().id(), kept: Mutex::new(Some(Vec::new())) }))
    }

    fn kept(&self) -> MutexGuard<'_, Option<Kept>> {
        self.0.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn is_open(&self) -> bool {
        self.kept().is_some()
    }

    pub(super) fn is_of_this_thread(&self) -> bool {
        self.0.thread == std::thread::current().id()
    }

    pub(crate) fn keep<T: Clone + Any + Send + Sync>(&self, owner: &T) {
        if let Some(kept) = &mut *self.kept() {
            kept.push(Box::new(owner.clone()));
        }
    }

    fn end(&self) -> Kept {
        self.kept().take().unwrap_or_default()
    }
}

impl Stream {
    /// Runs `work`, which enqueues on this stream, and on streams that join by events, without any of it being done; instead
    /// returns it as a graph. Meanwhile this thread alone may enqueue on those streams.
    ///
    /// # Errors
    /// That of `work`; [`Error::Capture`] for what a capture refuses, or if a stream has joined that this one does not wait
    /// for; what the driver says. In each case there is no graph, nothing was done, and the streams can be used again.
    pub fn capture(&self, work: impl FnOnce() -> Result<()>) -> Result<Graph> {
        let device = self.device();
        let mut open = Open::begin(self)?;
        work()?;
        let (graph, kept) = open.end()?;
        // Kernels keep the priority of the stream they were captured on.
        let flags = sys::CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_USE_NODE_PRIORITY;
        let mut executable = std::ptr::null_mut();
        // SAFETY: writes one handle; a graph that was captured just now, and is destroyed once: what was instantiated from it
        // lives on.
        let make =
            || unsafe { (cuGraphInstantiate(&mut executable, graph, u64::from(flags.0)), cuGraphDestroy(graph)) };
        let (made, destroyed) = harmless(make); // this thread may capture on another stream
        device.check(made)?;
        let graph = Graph { device: device.clone(), executable, kept };
        device.check(destroyed)?;
        Ok(graph)
    }

    /// Has the graph that is being captured on this stream, if one is, keep a clone of `owner`: for who enqueues work that
    /// uses memory, before enqueueing it.
    pub fn keep<T: Clone + Any + Send + Sync>(&self, owner: &T) {
        if let Some(capture) = self.open_capture() {
            capture.keep(owner);
        }
    }
}

/// A capture that has begun. It is ended in every case, also when the work fails or panics: the stream would be unusable.
struct Open<'s> {
    stream: &'s Stream,
    capture: Capture,
    is_ended: bool,
    _entry: Entry,
}

impl<'s> Open<'s> {
    fn begin(stream: &'s Stream) -> Result<Open<'s>> {
        let mut access = stream.access()?;
        access.check_eager("cuStreamBeginCapture")?;
        let (capture, entry) = (Capture::new(), Entry::add(stream.device().uuid()));
        // Other threads go on as they like; this one is held to what a graph can repeat.
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream lives, in the current context.
        stream.device().check(unsafe { cuStreamBeginCapture(access.raw(), mode) })?;
        access.join(&capture);
        Ok(Open { stream, capture, is_ended: false, _entry: entry })
    }

    fn end(&mut self) -> Result<(sys::CUgraph, Kept)> {
        self.is_ended = true;
        let device = self.stream.device();
        let graph = self.stream.access().and_then(|access| {
            let mut graph = std::ptr::null_mut();
            // SAFETY: writes one handle; the stream lives, in the current context; its capture began on this thread.
            device.check(unsafe { cuStreamEndCapture(access.raw(), &mut graph) })?;
            Ok(graph)
        });
        // Last: until then work of other threads is refused.
        let kept = self.capture.end();
        match graph? {
            graph if graph.is_null() => Err(Error::Capture {
                device: device.ordinal(),
                operation: "cuStreamEndCapture",
                reason: "the driver gave no graph".to_owned(),
            }),
            graph => Ok((graph, kept)),
        }
    }
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        if !self.is_ended
            && let Ok((graph, _)) = self.end()
        {
            // SAFETY: captured just now, and used by nobody.
            let _ = harmless(|| unsafe { cuGraphDestroy(graph) });
        }
    }
}

// ---- which captures are open -------------------------------------------------------------------------------------------

/// Of this process: on which device, by which thread.
static OPEN: Mutex<Vec<(Uuid, ThreadId)>> = Mutex::new(Vec::new());

fn all_open() -> MutexGuard<'static, Vec<(Uuid, ThreadId)>> {
    OPEN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One of [`OPEN`], as long as it lives.
struct Entry(Uuid, ThreadId);

impl Entry {
    fn add(device: Uuid) -> Entry {
        let thread = std::thread::current().id();
        all_open().push((device, thread));
        Entry(device, thread)
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        let mut open = all_open();
        if let Some(at) = open.iter().position(|entry| *entry == (self.0, self.1)) {
            open.swap_remove(at);
        }
    }
}

/// Whether the calling thread captures, on whichever device: it may do little else then.
pub(crate) fn captures_here() -> bool {
    let own = std::thread::current().id();
    all_open().iter().any(|(_, thread)| *thread == own)
}

impl Device {
    /// Whether a thread captures on one of its streams. To wait for all that it does would end that.
    pub(crate) fn is_captured(&self) -> bool {
        all_open().iter().any(|(device, _)| *device == self.uuid())
    }
}
