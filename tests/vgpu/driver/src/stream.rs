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
use crate::races::{self, Actor, Clock};
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
    completed: Mutex<Completed>,
    changed: Condvar,
}

/// How many works, and what is known to have happened by then.
#[derive(Default)]
struct Completed {
    number: u64,
    clock: Clock,
}

impl Progress {
    fn completed(&self) -> MutexGuard<'_, Completed> {
        self.completed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns what is known then.
    fn wait(&self, number: u64) -> Clock {
        let completed = self.changed.wait_while(self.completed(), |completed| completed.number < number);
        completed.unwrap_or_else(PoisonError::into_inner).clock.clone()
    }
}

static STREAMS: LazyLock<Mutex<HashMap<u64, Arc<Stream>>>> = LazyLock::new(Mutex::default);
/// What destroyed streams still have to do: whoever waits for the device waits for that, too.
static LEFT: Mutex<Vec<Left>> = Mutex::new(Vec::new());
/// The rest of a destroyed stream's work.
#[derive(Clone)]
struct Left {
    device: usize,
    is_blocking: bool,
    progress: Arc<Progress>,
    submitted: u64,
}

static NEXT: AtomicU64 = AtomicU64::new(0x5000_0000);
/// Handles of the contexts' default streams in the table; never given out.
const DEFAULTS: u64 = 0x4000_0000;
/// `CU_STREAM_LEGACY`; a null handle is the same stream.
pub(crate) const LEGACY: u64 = 1;

fn streams() -> MutexGuard<'static, HashMap<u64, Arc<Stream>>> {
    STREAMS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Remembers a stream that is destroyed; those that are done by now become one, of which only what is known remains.
fn leave(new: Left) {
    let mut all = LEFT.lock().unwrap_or_else(PoisonError::into_inner);
    let is_alike = |left: &Left| (left.device, left.is_blocking) == (new.device, new.is_blocking);
    let mut clock = Clock::default();
    all.retain(|left| {
        let completed = left.progress.completed();
        let stays = !is_alike(left) || completed.number < left.submitted;
        if !stays {
            clock.join(&completed.clock);
        }
        stays
    });
    let progress = Progress { completed: Mutex::new(Completed { number: 0, clock }), ..Progress::default() };
    all.push(Left { progress: Arc::new(progress), submitted: 0, ..new.clone() });
    all.push(new);
}

/// What destroyed streams of a device have to do.
fn left(device: usize) -> Vec<Left> {
    let all = LEFT.lock().unwrap_or_else(PoisonError::into_inner);
    all.iter().filter(|left| left.device == device).cloned().collect()
}

impl Stream {
    fn start(handle: u64, device: usize, flags: u32, priority: i32) -> Result<Stream> {
        let (sender, works) = channel::<Queued>();
        let progress = Arc::<Progress>::default();
        let own = Arc::clone(&progress);
        let actor = Actor::new(&format!("on stream {handle:#x} of device {device}"), device);
        let worker = move || {
            races::play(Some(actor));
            for work in works {
                work();
                let mut completed = own.completed();
                completed.number += 1;
                completed.clock = races::clock();
                drop(completed);
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
        let (is_blocking, progress) = (stream.flags & NON_BLOCKING == 0, Arc::clone(&stream.progress));
        let left = Left { device: stream.device, is_blocking, progress, submitted: stream.submitted() };
        leave(left);
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
        let left = if is_default { left(self.device) } else { Vec::new() };
        let left = left.into_iter().filter(|left| left.is_blocking).map(|left| (left.progress, left.submitted));
        let others = streams();
        let others = others.iter().filter(|(handle, other)| {
            let blocking = other.device == self.device && other.flags & NON_BLOCKING == 0;
            blocking && (**handle == default) != is_default
        });
        others.map(|(_, other)| (Arc::clone(&other.progress), other.submitted())).chain(left).collect()
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
        let host = races::host_clock();
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        queue.0 += 1;
        let all = move || {
            predecessors.iter().for_each(|(progress, number)| races::learn(&progress.wait(*number)));
            races::begin(&[&host]);
            work();
        };
        // DAPI 6.1: "an unknown internal error"; the worker lives as long as the stream.
        queue.1.send(Box::new(all)).map_err(|_| Status::UNKNOWN)
    }

    /// Waits for everything given so far; then the context's error, if there is one.
    pub fn synchronize(&self) -> Result<()> {
        capture::check_not_captured(self, "cuStreamSynchronize")?;
        self.predecessors().iter().for_each(|(progress, number)| races::host_learns(&progress.wait(*number)));
        races::host_learns(&self.progress.wait(self.submitted()));
        device::check_sticky(self.device)
    }

    /// As [`synchronize`](Stream::synchronize), where a program cannot rely on it: the host learns nothing.
    pub fn drain(&self) -> Result<()> {
        capture::check_not_captured(self, "cuStreamSynchronize")?;
        self.predecessors().iter().for_each(|(progress, number)| drop(progress.wait(*number)));
        drop(self.progress.wait(self.submitted()));
        device::check_sticky(self.device)
    }

    pub fn is_idle(&self) -> Result<bool> {
        capture::check_not_captured(self, "cuStreamQuery")?;
        let submitted = self.submitted();
        let completed = self.progress.completed();
        let is_idle = completed.number >= submitted;
        if is_idle {
            races::host_learns(&completed.clock);
        }
        Ok(is_idle)
    }

    /// Waits for all streams of a device.
    pub fn synchronize_device(number: usize) -> Result<()> {
        Stream::drain_device(number).iter().for_each(races::host_learns);
        device::check_sticky(number)
    }

    /// As [`synchronize_device`](Stream::synchronize_device), where a program cannot rely on it. What is known then.
    pub fn drain_device(number: usize) -> Vec<Clock> {
        let all: Vec<_> = streams().values().filter(|stream| stream.device == number).cloned().collect();
        let left = left(number).into_iter().map(|left| left.progress.wait(left.submitted));
        all.iter().map(|stream| stream.progress.wait(stream.submitted())).chain(left).collect()
    }
}
