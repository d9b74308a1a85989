//! DAPI 6.19: events.

use std::collections::HashMap;
use std::ffi::c_uint;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};

use super::Out;
use crate::device;
use crate::event::Event;
use crate::status::{Result, Status, answer, refuse};
use crate::stream::Stream;

static EVENTS: LazyLock<Mutex<HashMap<u64, Arc<Event>>>> = LazyLock::new(Mutex::default);
static NEXT: AtomicU64 = AtomicU64::new(0x8000_0000);

fn events() -> MutexGuard<'static, HashMap<u64, Arc<Event>>> {
    EVENTS.lock().unwrap_or_else(PoisonError::into_inner)
}

fn event(handle: u64) -> Result<Arc<Event>> {
    device::check_initialized()?;
    let found = events().get(&handle).cloned();
    found.map_or_else(|| refuse(Status::INVALID_HANDLE, "no such event"), Ok)
}

#[unsafe(no_mangle)]
extern "C" fn cuEventCreate(out: Out<u64>, flags: c_uint) -> u32 {
    answer(|| {
        device::current()?;
        // BLOCKING_SYNC, DISABLE_TIMING, INTERPROCESS; the last only with the one before it.
        if flags > 7 || flags & 6 == 4 {
            return refuse(Status::INVALID_VALUE, "cuEventCreate with flags that are none");
        }
        let handle = NEXT.fetch_add(0x10, Ordering::Relaxed);
        events().insert(handle, Arc::new(Event::new(flags)));
        out.give(handle)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuEventDestroy_v2(handle: u64) -> u32 {
    answer(|| events().remove(&handle).map(drop).map_or_else(|| refuse(Status::INVALID_HANDLE, "no such event"), Ok))
}

#[unsafe(no_mangle)]
extern "C" fn cuEventRecord(handle: u64, stream: u64) -> u32 {
    answer(|| {
        let (event, stream) = (event(handle)?, Stream::of(stream)?);
        let recording = event.mark();
        // Also in a context that has failed: whoever waits goes on, and gets the error.
        stream.submit_always(move || event.complete(recording))
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamWaitEvent(stream: u64, handle: u64, flags: c_uint) -> u32 {
    answer(|| {
        let (event, stream) = (event(handle)?, Stream::of(stream)?);
        if flags > 1 {
            return Err(Status::INVALID_VALUE);
        }
        let recording = event.recording();
        stream.submit_always(move || event.wait(recording))
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuEventSynchronize(handle: u64) -> u32 {
    answer(|| {
        let event = event(handle)?;
        event.wait(event.recording());
        device::current().map(drop)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuEventQuery(handle: u64) -> u32 {
    answer(|| {
        let event = event(handle)?;
        device::current()?;
        if event.is_complete() { Ok(()) } else { Err(Status::NOT_READY) }
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuEventElapsedTime(ms: Out<f32>, start: u64, end: u64) -> u32 {
    answer(|| ms.give(event(start)?.elapsed_ms(&*event(end)?)?))
}
