//! Streams: one worker thread each, which does in order what it is given.
//!
//! The legacy default stream (handle 0 or 1) of a context waits for all work given before to streams that were not made
//! with `CU_STREAM_NON_BLOCKING`, and their later work waits for its (DAPI 3, "Stream synchronization behavior").

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Condvar, LazyLock, Mutex, MutexGuard, PoisonError};

use crate::capture;
use crate::device;
use crate::status::{Result, Status, refuse};

pub(crate) const NON_BLOCKING: u32 = 1;

/// Something that a stream does; a graph does it again and again.
pub(crate) type Work = Arc<dyn Fn() + Send + Sync>;
/// Something that it does once.
type Queued = Box<dyn FnOnce() + Send>;

pub(crate) struct Stream {
    pub handle: u64,
    pub device: usize,
    pub flags: u32,
    pub priority: i32,
    queue: Mutex<(u64, Sender<Queued>)>,
    progress: Arc<Progress>,
}

/// How much of a stream's work is done.
#[derive(Default)]
struct Progress {
    completed: Mutex<u64>,
    changed: Condvar,
}

impl Progress {
    fn completed(&self) -> MutexGuard<'_, u64> {
        self.completed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait(&self, number: u64) {
        let _completed = self.changed.wait_while(self.completed(), |completed| *completed < number);
    }
}

static STREAMS: LazyLock<Mutex<HashMap<u64, Arc<Stream>>>> = LazyLock::new(Mutex::default);
static NEXT: AtomicU64 = AtomicU64::new(0x5000_0000);
/// Handles of the contexts' default streams in the table; never given out.
const DEFAULTS: u64 = 0x4000_0000;
/// `CU_STREAM_LEGACY`; a null handle is the same stream.
pub(crate) const LEGACY: u64 = 1;

fn streams() -> MutexGuard<'static, HashMap<u64, Arc<Stream>>> {
    STREAMS.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Stream {
    fn start(handle: u64, device: usize, flags: u32, priority: i32) -> Result<Stream> {
        let (sender, works) = channel::<Queued>();
        let progress = Arc::<Progress>::default();
        let own = Arc::clone(&progress);
        let worker = move || {
            for work in works {
                work();
                *own.completed() += 1;
                own.changed.notify_all();
            }
        };
        // DAPI 6.1, CUDA_ERROR_OPERATING_SYSTEM: "an OS call failed".
        std::thread::Builder::new().name("vgpu-stream".into()).spawn(worker).map_err(|_| Status::OPERATING_SYSTEM)?;
        Ok(Stream { handle, device, flags, priority, queue: Mutex::new((0, sender)), progress })
    }

    pub fn create(device: usize, flags: u32, priority: i32) -> Result<u64> {
        // DAPI 6.18, `cuStreamCreateWithPriority`: priorities outside the range are clamped.
        let priority = priority.clamp(device::GREATEST_PRIORITY, device::LEAST_PRIORITY);
        let handle = NEXT.fetch_add(0x10, Ordering::Relaxed);
        let stream = Arc::new(Stream::start(handle, device, flags, priority)?);
        streams().insert(handle, stream);
        Ok(handle)
    }

    /// The stream of a handle; the current context's default stream for 0 and `CU_STREAM_LEGACY`. DAPI 6.1:
    /// CUDA_ERROR_INVALID_HANDLE for "a resource handle passed to the API call" that is "not valid".
    pub fn of(handle: u64) -> Result<Arc<Stream>> {
        let number = device::current()?;
        let mut streams = streams();
        if handle > LEGACY {
            let stream = streams.get(&handle).cloned();
            return stream.map_or_else(|| refuse(Status::INVALID_HANDLE, "no such stream"), Ok);
        }
        capture::check_legacy(number)?;
        let handle = DEFAULTS + number as u64;
        match streams.entry(handle) {
            std::collections::hash_map::Entry::Occupied(entry) => Ok(Arc::clone(entry.get())),
            std::collections::hash_map::Entry::Vacant(entry) => {
                Ok(Arc::clone(entry.insert(Arc::new(Stream::start(handle, number, 0, device::LEAST_PRIORITY)?))))
            }
        }
    }

    /// DAPI 6.18, `cuStreamDestroy`: returns at once; what was given to the stream is still done. CUDA_ERROR_INVALID_HANDLE is
    /// among its codes.
    pub fn destroy(handle: u64) -> Result<()> {
        let Some(stream) = streams().remove(&handle) else {
            return refuse(Status::INVALID_HANDLE, "no such stream");
        };
        capture::leave(&stream);
        Ok(())
    }

    /// Whether it is the legacy default stream of its context.
    pub fn is_default(&self) -> bool {
        self.handle == DEFAULTS + self.device as u64
    }

    /// What must be done before work given to this stream now: other streams' progress and how far.
    fn predecessors(&self) -> Vec<(Arc<Progress>, u64)> {
        if self.flags & NON_BLOCKING != 0 {
            return Vec::new();
        }
        let is_default = self.is_default();
        let default = DEFAULTS + self.device as u64;
        let others = streams();
        let others = others.iter().filter(|(handle, other)| {
            let blocking = other.device == self.device && other.flags & NON_BLOCKING == 0;
            blocking && (**handle == default) != is_default
        });
        others.map(|(_, other)| (Arc::clone(&other.progress), other.submitted())).collect()
    }

    fn submitted(&self) -> u64 {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner).0
    }

    /// Appends `work`, or captures it. It is left out if the context has failed by then.
    pub fn submit(&self, work: impl Fn() + Send + Sync + 'static) -> Result<()> {
        let number = self.device;
        let work: Work = Arc::new(move || {
            if device::check_sticky(number).is_ok() {
                work();
            }
        });
        if capture::add(self, &work)? { Ok(()) } else { self.submit_always(move || work()) }
    }

    /// Appends `work` that is done whatever happens, and is never captured: for whoever waits for it.
    pub fn submit_always(&self, work: impl FnOnce() + Send + 'static) -> Result<()> {
        let predecessors = self.predecessors();
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        queue.0 += 1;
        let all = move || {
            predecessors.iter().for_each(|(progress, number)| progress.wait(*number));
            work();
        };
        // DAPI 6.1: "an unknown internal error"; the worker lives as long as the stream.
        queue.1.send(Box::new(all)).map_err(|_| Status::UNKNOWN)
    }

    /// Waits for everything given so far; then the context's error, if there is one.
    pub fn synchronize(&self) -> Result<()> {
        capture::check_question(self)?;
        self.predecessors().iter().for_each(|(progress, number)| progress.wait(*number));
        self.progress.wait(self.submitted());
        device::check_sticky(self.device)
    }

    pub fn is_idle(&self) -> Result<bool> {
        capture::check_question(self)?;
        Ok(*self.progress.completed() >= self.submitted())
    }

    /// Waits for all streams of a device.
    pub fn synchronize_device(number: usize) -> Result<()> {
        let all: Vec<_> = streams().values().filter(|stream| stream.device == number).cloned().collect();
        all.iter().for_each(|stream| stream.progress.wait(stream.submitted()));
        device::check_sticky(number)
    }
}
