//! DAPI 6.18, 6.21: streams and their memory operations.

use std::ffi::{c_int, c_uint, c_void};

use super::Out;
use crate::capture;
use crate::device;
use crate::launch;
use crate::races;
use crate::status::{Status, answer, refuse};
use crate::stream::{NON_BLOCKING, Stream};

#[unsafe(no_mangle)]
extern "C" fn cuStreamCreate(out: Out<u64>, flags: c_uint) -> u32 {
    cuStreamCreateWithPriority(out, flags, 0)
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamCreateWithPriority(out: Out<u64>, flags: c_uint, priority: c_int) -> u32 {
    answer(|| {
        let number = device::current()?;
        // DAPI 6.18, `cuStreamCreate`: valid values are CU_STREAM_DEFAULT and CU_STREAM_NON_BLOCKING.
        if flags & !NON_BLOCKING != 0 {
            return refuse(Status::INVALID_VALUE, "a stream with flags that are none");
        }
        out.give(Stream::create(number, flags, priority)?)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamGetPriority(stream: u64, priority: Out<c_int>) -> u32 {
    answer(|| priority.give(Stream::of(stream)?.priority))
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamGetFlags(stream: u64, flags: Out<c_uint>) -> u32 {
    answer(|| {
        let stream = Stream::of(stream)?;
        capture::check_not_captured(&stream, "cuStreamGetFlags")?;
        flags.give(stream.flags)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamSynchronize(stream: u64) -> u32 {
    answer(|| {
        let stream = Stream::of(stream)?;
        capture::check_unsafe("cuStreamSynchronize")?;
        stream.synchronize()
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamQuery(stream: u64) -> u32 {
    answer(|| {
        let stream = Stream::of(stream)?;
        capture::check_unsafe("cuStreamQuery")?;
        // DAPI 6.18: success "if all operations in the stream .. have completed, or CUDA_ERROR_NOT_READY if not".
        if stream.is_idle()? { Ok(()) } else { Err(Status::NOT_READY) }
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamDestroy_v2(stream: u64) -> u32 {
    answer(|| Stream::destroy(stream))
}

#[unsafe(no_mangle)]
extern "C" fn cuLaunchHostFunc(stream: u64, function: Option<extern "C" fn(*mut c_void)>, data: usize) -> u32 {
    answer(|| {
        // Stricter than CUDA, whose reference says nothing of a null function: calling it would end the process.
        let function = function.ok_or(Status::INVALID_VALUE)?;
        Stream::of(stream)?.submit(move || {
            // It may tell the host what it knows, and be told.
            races::host_learns(&races::clock());
            function(std::ptr::with_exposed_provenance_mut(data));
            races::learn(&races::host_clock());
        })
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamWaitValue32_v2(stream: u64, address: u64, value: u32, flags: c_uint) -> u32 {
    answer(|| launch::wait_value(&*Stream::of(stream)?, address, value, flags))
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamWriteValue32_v2(stream: u64, address: u64, value: u32, flags: c_uint) -> u32 {
    answer(|| launch::write_value(&*Stream::of(stream)?, address, value, flags))
}
