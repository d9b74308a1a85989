//! DAPI 6.13: copies and fills.
//!
//! When a copy reads and writes is as DAPI 2, "API synchronization behavior", says: from pageable host memory the bytes are
//! taken before the call returns, many of them when the stream has come there; into pageable host memory they have arrived
//! when it returns; anything else is done in the stream's order, so a buffer that is changed too early is copied changed. A
//! captured copy reads and writes whenever its graph runs, pageable memory, too.

use crate::allocations::{self, Allocation};
use crate::capture;
use crate::device;
use crate::mapping::Mapping;
use crate::races;
use crate::status::{Result, Status, answer};
use crate::stream::{LEGACY, Stream};

/// So much of pageable memory is taken at once: a copy "of a memory block of 64 KB or less" is asynchronous (CUDA C++ Programming
/// Guide 12.2, "Concurrent Execution between Host and Device"). For more "the driver may synchronize with the stream", as it
/// was seen to do for 4 MiB.
const TAKEN_BYTES: usize = 64 << 10;

/// Bytes copied at a time.
const CHUNK_BYTES: usize = 64 << 10;

/// One side of a copy: where it begins.
#[derive(Clone, Copy)]
enum Side {
    /// Memory that CUDA knows.
    Known(u64),
    /// Ordinary host memory.
    Pageable(u64),
}

impl Side {
    /// Memory of a device, or of the host by an address of the device.
    fn device(address: u64, len_bytes: usize) -> Result<Side> {
        allocations::range(address, len_bytes).map(|_| Side::Known(address))
    }

    /// Memory of the host; pinned if CUDA knows it.
    fn host(address: u64, len_bytes: usize) -> Result<Side> {
        match allocations::find(&allocations::table(), address, len_bytes) {
            Some(_) => Ok(Side::Known(address)),
            // DAPI 6.13: the code that copies have for an address.
            None if address == 0 => Err(Status::INVALID_VALUE),
            None => Ok(Side::Pageable(address)),
        }
    }

    fn is_pageable(self) -> bool {
        matches!(self, Side::Pageable(_))
    }

    /// Hands the memory, and the offset of the side in it, to `work`; not if it was freed since the call.
    fn with<T>(self, device: usize, len_bytes: usize, work: impl FnOnce(&Mapping, usize) -> T) -> Option<T> {
        match self {
            Side::Known(address) => {
                let (Allocation { mapping, .. }, offset_bytes) = allocations::range_now(device, address, len_bytes)?;
                Some(work(&mapping, offset_bytes))
            }
            Side::Pageable(address) => {
                // SAFETY: the driver API asks its caller for so many bytes until the copy is done, and of a captured copy
                // as long as its graph is launched.
                let mapping = unsafe { Mapping::borrowed(address, len_bytes) }?;
                Some(work(&mapping, 0))
            }
        }
    }
}

fn copy_now(device: usize, to: Side, from: Side, len_bytes: usize) {
    let mut chunk = vec![0; CHUNK_BYTES.min(len_bytes)];
    let _ = from.with(device, len_bytes, |from, from_offset| {
        to.with(device, len_bytes, |to, to_offset| {
            races::access(from, from_offset, len_bytes, false, "a copy");
            races::access(to, to_offset, len_bytes, true, "a copy");
            for start in (0..len_bytes).step_by(CHUNK_BYTES) {
                let chunk = &mut chunk[..CHUNK_BYTES.min(len_bytes - start)];
                from.read(from_offset + start, chunk);
                to.write(to_offset + start, chunk);
            }
        })
    }); // none: freed, which the context says from now on
}

fn copy(to: Side, from: Side, len_bytes: usize, stream: u64, wait: bool) -> Result<()> {
    let stream = Stream::of(stream)?;
    let device = stream.device;
    let is_captured = capture::is_capturing(&stream);
    let taken = from.is_pageable() && !is_captured;
    if taken && len_bytes > TAKEN_BYTES {
        stream.drain()?;
    }
    if let Some(bytes) = taken.then(|| read(from, device, len_bytes)).flatten() {
        stream.submit(move || {
            let _ = to.with(device, len_bytes, |to, offset| {
                races::access(to, offset, len_bytes, true, "a copy");
                to.write(offset, &bytes);
            }); // none: as in `copy_now`
        })?;
    } else {
        stream.submit(move || copy_now(device, to, from, len_bytes))?;
    }
    if !is_captured && (wait || to.is_pageable()) { stream.synchronize() } else { Ok(()) }
}

fn read(from: Side, device: usize, len_bytes: usize) -> Option<Vec<u8>> {
    from.with(device, len_bytes, |from, offset| {
        let mut bytes = vec![0; len_bytes];
        from.read(offset, &mut bytes);
        bytes
    })
}

/// How a copy or a fill is called.
enum Call {
    /// In the legacy default stream; `waits`: until it is done.
    Synchronous { waits: bool },
    /// In this stream.
    Async(u64),
}

/// A copy of nothing is nothing, whatever its addresses are.
fn copy_call(len_bytes: usize, call: Call, sides: impl FnOnce() -> Result<(Side, Side)>) -> Result<()> {
    device::current()?;
    if len_bytes == 0 {
        return Ok(());
    }
    let (to, from) = sides()?;
    match call {
        Call::Synchronous { waits } => copy(to, from, len_bytes, LEGACY, waits),
        Call::Async(stream) => copy(to, from, len_bytes, stream, false),
    }
}

#[unsafe(no_mangle)]
extern "C" fn cuMemcpyHtoD_v2(to: u64, from: u64, len_bytes: usize) -> u32 {
    answer(|| {
        copy_call(len_bytes, Call::Synchronous { waits: true }, || {
            Ok((Side::device(to, len_bytes)?, Side::host(from, len_bytes)?))
        })
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemcpyHtoDAsync_v2(to: u64, from: u64, len_bytes: usize, stream: u64) -> u32 {
    answer(|| {
        copy_call(len_bytes, Call::Async(stream), || Ok((Side::device(to, len_bytes)?, Side::host(from, len_bytes)?)))
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemcpyDtoH_v2(to: u64, from: u64, len_bytes: usize) -> u32 {
    answer(|| {
        copy_call(len_bytes, Call::Synchronous { waits: true }, || {
            Ok((Side::host(to, len_bytes)?, Side::device(from, len_bytes)?))
        })
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemcpyDtoHAsync_v2(to: u64, from: u64, len_bytes: usize, stream: u64) -> u32 {
    answer(|| {
        copy_call(len_bytes, Call::Async(stream), || Ok((Side::host(to, len_bytes)?, Side::device(from, len_bytes)?)))
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemcpyDtoD_v2(to: u64, from: u64, len_bytes: usize) -> u32 {
    answer(|| {
        copy_call(len_bytes, Call::Synchronous { waits: false }, || {
            Ok((Side::device(to, len_bytes)?, Side::device(from, len_bytes)?))
        })
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemcpyDtoDAsync_v2(to: u64, from: u64, len_bytes: usize, stream: u64) -> u32 {
    answer(|| {
        copy_call(len_bytes, Call::Async(stream), || Ok((Side::device(to, len_bytes)?, Side::device(from, len_bytes)?)))
    })
}

/// Any two places.
#[unsafe(no_mangle)]
extern "C" fn cuMemcpyAsync(to: u64, from: u64, len_bytes: usize, stream: u64) -> u32 {
    answer(|| {
        copy_call(len_bytes, Call::Async(stream), || Ok((Side::device(to, len_bytes)?, Side::device(from, len_bytes)?)))
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemcpyPeerAsync(
    to: u64,
    to_context: u64,
    from: u64,
    from_context: u64,
    len_bytes: usize,
    stream: u64,
) -> u32 {
    answer(|| {
        copy_call(len_bytes, Call::Async(stream), || {
            device::device_of(to_context)?;
            device::device_of(from_context)?;
            Ok((Side::device(to, len_bytes)?, Side::device(from, len_bytes)?))
        })
    })
}

fn fill(to: u64, byte: u8, len_bytes: usize, call: &Call) -> Result<()> {
    device::current()?;
    if len_bytes == 0 {
        return Ok(());
    }
    let to = Side::device(to, len_bytes)?;
    let stream = match call {
        Call::Synchronous { .. } => LEGACY,
        Call::Async(stream) => *stream,
    };
    let stream = Stream::of(stream)?;
    let device = stream.device;
    stream.submit(move || {
        let _ = to.with(device, len_bytes, |to, offset| {
            races::access(to, offset, len_bytes, true, "a fill");
            to.fill(offset, len_bytes, byte);
        }); // none: as in `copy_now`
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemsetD8_v2(to: u64, byte: u8, len_bytes: usize) -> u32 {
    answer(|| fill(to, byte, len_bytes, &Call::Synchronous { waits: false }))
}

#[unsafe(no_mangle)]
extern "C" fn cuMemsetD8Async(to: u64, byte: u8, len_bytes: usize, stream: u64) -> u32 {
    answer(|| fill(to, byte, len_bytes, &Call::Async(stream)))
}
