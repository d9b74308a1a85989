//! DAPI 6.13: memory of the device and of the host.

use std::ffi::c_uint;
use std::sync::Arc;

use super::Out;
use crate::allocations::{self, Allocation, Kind};
use crate::capture;
use crate::device;
use crate::mapping::Mapping;
use crate::races;
use crate::settings::SETTINGS;
use crate::status::{Result, Status, answer, refuse};
use crate::stream::Stream;

#[unsafe(no_mangle)]
extern "C" fn cuMemGetInfo_v2(free: Out<usize>, total: Out<usize>) -> u32 {
    answer(|| {
        let number = device::current()?;
        free.give(device::free_bytes(number))?;
        total.give(SETTINGS.memory_bytes)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemAlloc_v2(address: Out<u64>, len_bytes: usize) -> u32 {
    answer(|| {
        let number = device::current()?;
        capture::check_unsafe("cuMemAlloc")?;
        address.give(allocations::allocate(len_bytes, Kind::Device, number)?)
    })
}

/// Waits for the device first: a kernel in flight may use the memory, and CUDA gives no promise that it may be freed under it.
/// Nothing is freed of a null pointer, which was seen.
#[unsafe(no_mangle)]
extern "C" fn cuMemFree_v2(address: u64) -> u32 {
    answer(|| {
        let number = device::current()?;
        capture::check_unsafe("cuMemFree")?;
        if address == 0 {
            return Ok(());
        }
        let _ = Stream::synchronize_device(number); // its error comes back from the next call
        allocations::remove(address, "cuMemFree", |kind| matches!(kind, Kind::Device | Kind::Pool)).map(drop)
    })
}

/// DAPI 6.15. The memory is there at once, which a stream-ordered program cannot tell.
#[unsafe(no_mangle)]
extern "C" fn cuMemAllocAsync(address: Out<u64>, len_bytes: usize, stream: u64) -> u32 {
    answer(|| {
        let stream = Stream::of(stream)?;
        check_no_node(&stream)?;
        capture::check_unsafe("cuMemAllocAsync")?;
        let allocated = allocations::allocate(len_bytes, Kind::Pool, stream.device)?;
        let (allocation, _) = allocations::range(allocated, len_bytes)?;
        // Nobody may use it before the stream has come there.
        stream.submit_always(move || races::access(&allocation.mapping, 0, len_bytes, true, "cuMemAllocAsync"))?;
        address.give(allocated)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemFreeAsync(address: u64, stream: u64) -> u32 {
    answer(|| {
        // DAPI 6.15: INVALID_VALUE is among its codes.
        allocations::range(address, 1)?;
        let stream = Stream::of(stream)?;
        check_no_node(&stream)?;
        capture::check_unsafe("cuMemFreeAsync")?;
        stream.submit_always(move || {
            // Refused aloud; there is nobody to return it to.
            let _ = allocations::remove(address, "cuMemFreeAsync", |kind| kind == Kind::Pool);
        })
    })
}

/// Stricter than CUDA: captured, both become nodes of the graph (DAPI 6.15), which this driver does not have.
fn check_no_node(stream: &Stream) -> Result<()> {
    if capture::is_capturing(stream) {
        return refuse(Status::NOT_SUPPORTED, "memory of a pool in a capture");
    }
    Ok(())
}

#[unsafe(no_mangle)]
extern "C" fn cuMemGetAddressRange_v2(base: Out<u64>, len_bytes: Out<usize>, address: u64) -> u32 {
    answer(|| {
        device::current()?;
        // DAPI 6.13, `cuMemGetAddressRange`: among its codes.
        let (allocation, _) = allocations::range(address, 1).map_err(|_| Status::NOT_FOUND)?;
        base.give_if_wanted(allocation.mapping.address());
        len_bytes.give_if_wanted(allocation.len_bytes);
        Ok(())
    })
}

// ---- host memory -------------------------------------------------------------------------------------------------------

#[unsafe(no_mangle)]
extern "C" fn cuMemHostAlloc(address: Out<u64>, len_bytes: usize, _flags: c_uint) -> u32 {
    answer(|| {
        let number = device::current()?;
        capture::check_unsafe("cuMemHostAlloc")?;
        address.give(allocations::allocate(len_bytes, Kind::Pinned, number)?)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemFreeHost(address: u64) -> u32 {
    answer(|| {
        let number = device::current()?;
        capture::check_unsafe("cuMemFreeHost")?;
        let _ = Stream::synchronize_device(number);
        allocations::remove(address, "cuMemFreeHost", |kind| kind == Kind::Pinned).map(drop)
    })
}

/// "Passes back the device pointer .. corresponding to the mapped, pinned host buffer": one address space, so the same.
/// CUDA_ERROR_INVALID_VALUE is its code for anything else, and for flags: "For now, it must be set to 0."
#[unsafe(no_mangle)]
extern "C" fn cuMemHostGetDevicePointer_v2(out: Out<u64>, host: u64, flags: c_uint) -> u32 {
    answer(|| {
        device::current()?;
        let (allocation, _) = allocations::range(host, 1)?;
        if flags != 0 || !allocation.kind.is_host() {
            return refuse(Status::INVALID_VALUE, "cuMemHostGetDevicePointer of memory that is not pinned");
        }
        out.give(host)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemHostRegister_v2(address: u64, len_bytes: usize, flags: c_uint) -> u32 {
    answer(|| {
        let number = device::current()?;
        capture::check_unsafe("cuMemHostRegister")?;
        // "Using this flag .. with a device that does not have this attribute set": READ_ONLY, and READ_ONLY_HOST_REGISTER.
        if flags & 8 != 0 {
            return refuse(Status::NOT_SUPPORTED, "cuMemHostRegister of memory as read-only");
        }
        // Among the function's codes; it names the flags 1, 2, 4 and 8.
        if len_bytes == 0 || flags > 7 {
            return refuse(Status::INVALID_VALUE, "cuMemHostRegister of nothing, or with flags that are none");
        }
        // SAFETY: the driver API asks its caller to keep the memory until cuMemHostUnregister, which drops the mapping.
        let mapping = unsafe { Mapping::registered(address, len_bytes) }.ok_or(Status::INVALID_VALUE)?;
        let (mapping, kind) = (Arc::new(mapping), Kind::Registered);
        allocations::change(|table| {
            let end = address.checked_add(len_bytes as u64).ok_or(Status::INVALID_VALUE)?;
            let before = table.range(..end).next_back();
            // DAPI 6.1: "the memory range passed to cuMemHostRegister() has already been registered".
            if before.is_some_and(|(start, before)| start + before.len_bytes as u64 > address) {
                return refuse(Status::HOST_MEMORY_ALREADY_REGISTERED, "cuMemHostRegister over registered memory");
            }
            table.insert(address, Allocation { mapping, len_bytes, kind, device: number });
            Ok(())
        })
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemHostUnregister(address: u64) -> u32 {
    answer(|| {
        let number = device::current()?;
        capture::check_unsafe("cuMemHostUnregister")?;
        let _ = Stream::synchronize_device(number);
        let removed = allocations::remove(address, "cuMemHostUnregister", |kind| kind == Kind::Registered);
        // DAPI 6.1: the pointer "does not correspond to any currently registered memory region". Seen: CUDA_ERROR_INVALID_VALUE
        // if it does, and is not its beginning.
        removed.map(drop).map_err(|_| match allocations::find(&allocations::table(), address, 1) {
            Some(_) => Status::INVALID_VALUE,
            None => Status::HOST_MEMORY_NOT_REGISTERED,
        })
    })
}

/// The attributes that tell where an address is: CONTEXT (1), MEMORY_TYPE (2), DEVICE_ORDINAL (9), RANGE_START_ADDR (11),
/// RANGE_SIZE (12). CUDA_ERROR_INVALID_VALUE for an address that "was not allocated by, mapped by, or registered with a
/// CUcontext". Stricter than CUDA, which knows other attributes: nobody here asks for them.
#[unsafe(no_mangle)]
extern "C" fn cuPointerGetAttribute(data: *mut u8, attribute: u32, address: u64) -> u32 {
    answer(|| {
        device::check_initialized()?;
        let table = allocations::table();
        let (allocation, _) = allocations::find(&table, address, 1).ok_or(Status::INVALID_VALUE)?;
        match attribute {
            1 => Out(data.cast()).give(device::context_of(allocation.device)),
            2 => Out(data.cast()).give(if allocation.kind.is_host() { 1u32 } else { 2 }),
            9 => Out(data.cast()).give(allocation.device as i32),
            11 => Out(data.cast()).give(allocation.mapping.address()),
            12 => Out(data.cast()).give(allocation.len_bytes),
            _ => Err(Status::NOT_SUPPORTED),
        }
    })
}
