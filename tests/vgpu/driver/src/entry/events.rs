//! DAPI 6.19: events.

use std::ffi::c_uint;
use std::sync::Arc;

use super::Out;
use crate::capture;
use crate::device;
use crate::event::Event;
use crate::handles::Handles;
use crate::races;
use crate::refusal;
use crate::status::{Result, Status, answer, refuse};
use crate::stream::Stream;

/// DAPI 6.19: the functions of events have CUDA_ERROR_INVALID_HANDLE for a handle.
static EVENTS: Handles<Event> = Handles::new("event", 0x8000_0000, Status::INVALID_HANDLE);

fn event(handle: u64) -> Result<Arc<Event>> {
    device::check_initialized()?;
    EVENTS.get(handle)
}

#[unsafe(no_mangle)]
extern "C" fn cuEventCreate(out: Out<u64>, flags: c_uint) -> u32 {
    answer(|| {
        device::current()?;
        // BLOCKING_SYNC, DISABLE_TIMING, INTERPROCESS, which "must be specified along with CU_EVENT_DISABLE_TIMING";
        // INVALID_VALUE is among the codes.
        if flags > 7 || flags & 6 == 4 {
            return refuse(Status::INVALID_VALUE, "cuEventCreate with flags that are none");
        }
        out.give(EVENTS.insert(Event::new(flags)))
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuEventDestroy_v2(handle: u64) -> u32 {
    answer(|| EVENTS.remove(handle))
}

#[unsafe(no_mangle)]
extern "C" fn cuEventRecord(handle: u64, stream: u64) -> u32 {
    answer(|| {
        let (event, stream) = (event(handle)?, Stream::of(stream)?);
        if capture::record(&stream, &event)? {
            return Ok(());
        }
        let (_, recording) = event.mark();
        // Also in a context that has failed: whoever waits goes on, and gets the error.
        stream.submit_always(move || recording.complete())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamWaitEvent(stream: u64, handle: u64, flags: c_uint) -> u32 {
    answer(|| {
        let (event, stream) = (event(handle)?, Stream::of(stream)?);
        // CU_EVENT_WAIT_EXTERNAL: "This flag is invalid outside of stream capture", seen to be CUDA_ERROR_ILLEGAL_STATE. Within
        // one it is refused, too, which is stricter than CUDA: graphs here have no nodes of events.
        if flags != 0 {
            let status = if capture::is_capturing(&stream) { Status::NOT_SUPPORTED } else { Status::ILLEGAL_STATE };
            return refuse(status, "cuStreamWaitEvent with flags");
        }
        if refusal::drops_wait(stream.device) {
            return Ok(());
        }
        if capture::wait(&stream, &event)? {
            return Ok(());
        }
        let Some(recording) = event.recording() else { return Ok(()) };
        stream.submit_always(move || races::learn(&recording.wait()))
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuEventSynchronize(handle: u64) -> u32 {
    answer(|| {
        let event = event(handle)?;
        capture::check_event(&event, true)?;
        capture::check_unsafe("cuEventSynchronize")?;
        if let Some(recording) = event.recording() {
            races::host_learns(&recording.wait());
        }
        device::current().map(drop)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuEventQuery(handle: u64) -> u32 {
    answer(|| {
        let event = event(handle)?;
        device::current()?;
        capture::check_event(&event, true)?;
        capture::check_unsafe("cuEventQuery")?;
        // DAPI 6.19: "if any captured work is incomplete".
        if event.is_complete() { Ok(()) } else { Err(Status::NOT_READY) }
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuEventElapsedTime(ms: Out<f32>, start: u64, end: u64) -> u32 {
    answer(|| elapsed(&ms, start, end))
}

/// Of CUDA 12.8; what cudarc calls.
#[unsafe(no_mangle)]
extern "C" fn cuEventElapsedTime_v2(ms: Out<f32>, start: u64, end: u64) -> u32 {
    answer(|| elapsed(&ms, start, end))
}

fn elapsed(ms: &Out<f32>, start: u64, end: u64) -> Result<()> {
    let (start, end) = (event(start)?, event(end)?);
    capture::check_event(&start, false)?;
    capture::check_event(&end, false)?;
    ms.give(start.elapsed_ms(&end)?)
}
