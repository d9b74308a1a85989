//! DAPI 6.13, 6.14: memory that other processes map: legacy handles and virtual memory management.

use std::ffi::{c_int, c_uint, c_ulonglong, c_void};
use std::os::fd::BorrowedFd;

use super::{In, Out};
use crate::capture;
use crate::device;
use crate::ipc;
use crate::settings::SETTINGS;
use crate::status::{Result, Status, answer, refuse};
use crate::virtual_memory::{self, GRANULARITY_BYTES};

#[unsafe(no_mangle)]
extern "C" fn cuIpcGetMemHandle(handle: Out<ipc::Handle>, address: u64) -> u32 {
    answer(|| handle.give(ipc::export(address)?))
}

/// `CUipcMemHandle` by value: C passes a struct of this size in memory, as Rust does one that is `repr(C)`.
#[repr(C)]
struct HandleByValue(ipc::Handle);

#[unsafe(no_mangle)]
extern "C" fn cuIpcOpenMemHandle_v2(address: Out<u64>, handle: HandleByValue, flags: c_uint) -> u32 {
    answer(|| {
        capture::check_unsafe("cuIpcOpenMemHandle")?;
        address.give(ipc::open(handle.0, flags)?)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuIpcCloseMemHandle(address: u64) -> u32 {
    answer(|| {
        capture::check_unsafe("cuIpcCloseMemHandle")?;
        ipc::close(address)
    })
}

// ---- virtual memory management -----------------------------------------------------------------------------------------

const POSIX_FILE_DESCRIPTOR: u32 = 1;
const LOCATION_DEVICE: u32 = 1;
const ACCESS_READ_WRITE: u32 = 3;

/// `CUmemLocation`
#[derive(Clone, Copy)]
#[repr(C)]
struct Location {
    kind: u32,
    id: c_int,
}

impl Location {
    /// Stricter than CUDA, which also has memory of the host: here such memory is all of devices.
    fn device(self) -> Result<usize> {
        if self.kind != LOCATION_DEVICE {
            return refuse(Status::INVALID_VALUE, "a memory location that is no device");
        }
        device::device(self.id)?;
        usize::try_from(self.id).map_err(|_| Status::INVALID_DEVICE)
    }
}

/// `CUmemAllocationProp`
#[derive(Clone, Copy)]
#[repr(C)]
struct Properties {
    kind: u32,
    handle_types: u32,
    location: Location,
    _windows: *const c_void,
    _flags: [u8; 8],
}

/// `CUmemAccessDesc`
#[derive(Clone, Copy)]
#[repr(C)]
struct Access {
    location: Location,
    flags: u32,
}

#[unsafe(no_mangle)]
extern "C" fn cuMemGetAllocationGranularity(bytes: Out<usize>, properties: In<Properties>, _option: u32) -> u32 {
    answer(|| {
        device::check_initialized()?;
        properties.get()?.location.device()?;
        bytes.give(GRANULARITY_BYTES)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemCreate(handle: Out<u64>, len_bytes: usize, properties: In<Properties>, flags: c_ulonglong) -> u32 {
    answer(|| {
        let Properties { kind, handle_types, location, .. } = properties.get()?;
        // DAPI 6.1, `CUmemAllocationType`: there is no other type. DAPI 6.14: "flags for future use, must be zero now".
        if kind != 1 || flags != 0 {
            return refuse(Status::INVALID_VALUE, "cuMemCreate of memory that is not CU_MEM_ALLOCATION_TYPE_PINNED");
        }
        let exportable = handle_types & POSIX_FILE_DESCRIPTOR != 0;
        if exportable && !SETTINGS.shares_descriptors {
            // DAPI 6.14, `cuMemCreate`: among its codes.
            return refuse(Status::NOT_SUPPORTED, "cuMemCreate of memory to share by a descriptor");
        }
        handle.give(virtual_memory::create(len_bytes, location.device()?, exportable)?)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemRelease(handle: u64) -> u32 {
    answer(|| virtual_memory::release(handle))
}

#[unsafe(no_mangle)]
extern "C" fn cuMemExportToShareableHandle(out: Out<c_int>, handle: u64, kind: u32, flags: c_ulonglong) -> u32 {
    answer(|| {
        // Other kinds are for other systems than Linux; of flags: "Reserved, must be zero".
        if kind != POSIX_FILE_DESCRIPTOR || flags != 0 {
            return Err(Status::INVALID_VALUE);
        }
        out.give(virtual_memory::export(handle)?)
    })
}

/// The descriptor's number is passed in place of the pointer.
#[unsafe(no_mangle)]
extern "C" fn cuMemImportFromShareableHandle(handle: Out<u64>, descriptor: usize, kind: u32) -> u32 {
    answer(|| {
        device::current()?;
        let descriptor = c_int::try_from(descriptor).ok().filter(|descriptor| *descriptor >= 0);
        // Among the function's codes.
        let (Some(descriptor), POSIX_FILE_DESCRIPTOR) = (descriptor, kind) else {
            return Err(Status::INVALID_VALUE);
        };
        // SAFETY: the driver API asks its caller for an open descriptor; it is only used during the call.
        let descriptor = unsafe { BorrowedFd::borrow_raw(descriptor) };
        handle.give(virtual_memory::import(descriptor)?)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemAddressReserve(
    address: Out<u64>,
    len_bytes: usize,
    align_bytes: usize,
    _wish: u64,
    flags: c_ulonglong,
) -> u32 {
    answer(|| {
        device::check_initialized()?;
        // "Currently unused, must be zero".
        if flags != 0 {
            return Err(Status::INVALID_VALUE);
        }
        address.give(virtual_memory::reserve_addresses(len_bytes, align_bytes)?)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemAddressFree(address: u64, len_bytes: usize) -> u32 {
    answer(|| virtual_memory::free_addresses(address, len_bytes))
}

#[unsafe(no_mangle)]
extern "C" fn cuMemMap(address: u64, len_bytes: usize, offset: usize, handle: u64, flags: c_ulonglong) -> u32 {
    answer(|| {
        // "flags for future use, must be zero now".
        if flags == 0 { virtual_memory::map(address, len_bytes, offset, handle) } else { Err(Status::INVALID_VALUE) }
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemUnmap(address: u64, len_bytes: usize) -> u32 {
    answer(|| virtual_memory::unmap(address, len_bytes))
}

#[unsafe(no_mangle)]
extern "C" fn cuMemSetAccess(address: u64, len_bytes: usize, accesses: In<Access>, count: usize) -> u32 {
    answer(|| {
        for index in 0..count {
            let Access { location, flags } = accesses.at(index)?;
            virtual_memory::set_access(address, len_bytes, location.device()?, flags == ACCESS_READ_WRITE)?;
        }
        Ok(())
    })
}
