//! DAPI 6.13: copies and fills.
//!
//! When a copy reads and writes is as DAPI 2, "API synchronization behavior", says: from pageable host memory the bytes are
//! taken before the call returns; into pageable host memory they have arrived when it returns; anything else is done in the
//! stream's order, so a buffer that is changed too early is copied changed.

use std::sync::Arc;

use crate::allocations::{self, Allocation};
use crate::device;
use crate::mapping::Mapping;
use crate::status::{Result, Status, answer};
use crate::stream::Stream;

/// Bytes copied at a time.
const CHUNK_BYTES: usize = 64 << 10;

/// One side of a copy.
struct Side {
    mapping: Arc<Mapping>,
    offset_bytes: usize,
    /// Ordinary host memory.
    pageable: bool,
}

impl Side {
    /// Memory of a device, or of the host by an address of the device.
    fn device(address: u64, len_bytes: usize) -> Result<Side> {
        let (Allocation { mapping, .. }, offset_bytes) = allocations::range(address, len_bytes)?;
        Ok(Side { mapping, offset_bytes, pageable: false })
    }

    /// Memory of the host; pinned if CUDA knows it.
    fn host(address: u64, len_bytes: usize) -> Result<Side> {
        let table = allocations::table();
        if let Some((allocation, offset_bytes)) = allocations::find(&table, address, len_bytes) {
            return Ok(Side { mapping: Arc::clone(&allocation.mapping), offset_bytes, pageable: false });
        }
        // SAFETY: the driver API asks its caller for so many bytes until the copy is done, and pageable memory is not
        // touched after the call.
        let mapping = unsafe { Mapping::borrowed(address, len_bytes) }.ok_or(Status::INVALID_VALUE)?;
        Ok(Side { mapping: Arc::new(mapping), offset_bytes: 0, pageable: true })
    }
}

fn copy_now(to: &Side, from: &Side, len_bytes: usize) {
    let mut chunk = vec![0; CHUNK_BYTES.min(len_bytes)];
    for start in (0..len_bytes).step_by(CHUNK_BYTES) {
        let chunk = &mut chunk[..CHUNK_BYTES.min(len_bytes - start)];
        from.mapping.read(from.offset_bytes + start, chunk);
        to.mapping.write(to.offset_bytes + start, chunk);
    }
}

fn copy(to: Side, from: Side, len_bytes: usize, stream: u64, wait: bool) -> Result<()> {
    let stream = Stream::of(stream)?;
    let wait = wait || to.pageable;
    if from.pageable {
        let mut bytes = vec![0; len_bytes];
        from.mapping.read(from.offset_bytes, &mut bytes);
        stream.submit(move || to.mapping.write(to.offset_bytes, &bytes))?;
    } else {
        stream.submit(move || copy_now(&to, &from, len_bytes))?;
    }
    if wait { stream.synchronize() } else { Ok(()) }
}

/// A copy of nothing is nothing, whatever its addresses are.
fn copy_call(len_bytes: usize, stream: u64, wait: bool, sides: impl FnOnce() -> Result<(Side, Side)>) -> u32 {
    answer(|| {
        device::current()?;
        if len_bytes == 0 {
            return Ok(());
        }
        let (to, from) = sides()?;
        copy(to, from, len_bytes, stream, wait)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemcpyHtoD_v2(to: u64, from: u64, len_bytes: usize) -> u32 {
    copy_call(len_bytes, 0, true, || Ok((Side::device(to, len_bytes)?, Side::host(from, len_bytes)?)))
}

#[unsafe(no_mangle)]
extern "C" fn cuMemcpyHtoDAsync_v2(to: u64, from: u64, len_bytes: usize, stream: u64) -> u32 {
    copy_call(len_bytes, stream, false, || Ok((Side::device(to, len_bytes)?, Side::host(from, len_bytes)?)))
}

#[unsafe(no_mangle)]
extern "C" fn cuMemcpyDtoH_v2(to: u64, from: u64, len_bytes: usize) -> u32 {
    copy_call(len_bytes, 0, true, || Ok((Side::host(to, len_bytes)?, Side::device(from, len_bytes)?)))
}

#[unsafe(no_mangle)]
extern "C" fn cuMemcpyDtoHAsync_v2(to: u64, from: u64, len_bytes: usize, stream: u64) -> u32 {
    copy_call(len_bytes, stream, false, || Ok((Side::host(to, len_bytes)?, Side::device(from, len_bytes)?)))
}

#[unsafe(no_mangle)]
extern "C" fn cuMemcpyDtoD_v2(to: u64, from: u64, len_bytes: usize) -> u32 {
    copy_call(len_bytes, 0, false, || Ok((Side::device(to, len_bytes)?, Side::device(from, len_bytes)?)))
}

#[unsafe(no_mangle)]
extern "C" fn cuMemcpyDtoDAsync_v2(to: u64, from: u64, len_bytes: usize, stream: u64) -> u32 {
    copy_call(len_bytes, stream, false, || Ok((Side::device(to, len_bytes)?, Side::device(from, len_bytes)?)))
}

/// Any two places.
#[unsafe(no_mangle)]
extern "C" fn cuMemcpyAsync(to: u64, from: u64, len_bytes: usize, stream: u64) -> u32 {
    copy_call(len_bytes, stream, false, || Ok((Side::device(to, len_bytes)?, Side::device(from, len_bytes)?)))
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
    copy_call(len_bytes, stream, false, || {
        device::device_of(to_context)?;
        device::device_of(from_context)?;
        Ok((Side::device(to, len_bytes)?, Side::device(from, len_bytes)?))
    })
}

fn fill(to: u64, byte: u8, len_bytes: usize, stream: u64) -> u32 {
    answer(|| {
        device::current()?;
        if len_bytes == 0 {
            return Ok(());
        }
        let (allocation, offset) = allocations::range(to, len_bytes)?;
        Stream::of(stream)?.submit(move || allocation.mapping.fill(offset, len_bytes, byte))
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemsetD8_v2(to: u64, byte: u8, len_bytes: usize) -> u32 {
    fill(to, byte, len_bytes, 0)
}

#[unsafe(no_mangle)]
extern "C" fn cuMemsetD8Async(to: u64, byte: u8, len_bytes: usize, stream: u64) -> u32 {
    fill(to, byte, len_bytes, stream)
}
