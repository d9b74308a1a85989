//! DAPI 6.2 to 6.5: errors' names, initialization, version, devices.

use std::ffi::{c_char, c_int, c_uint};

use super::Out;
use crate::device::{self, BLOCKS_PER_MULTIPROCESSOR, MULTIPROCESSORS, SHARED_BYTES_PER_BLOCK};
use crate::device::{SHARED_BYTES_PER_BLOCK_OPTIN, SHARED_BYTES_PER_MULTIPROCESSOR};
use crate::device::{THREADS_PER_BLOCK, THREADS_PER_MULTIPROCESSOR};
use crate::settings::SETTINGS;
use crate::status::{Result, Status, answer};

#[unsafe(no_mangle)]
extern "C" fn cuInit(flags: c_uint) -> u32 {
    // DAPI 6.3: "Currently, the Flags parameter must be 0."
    answer(|| if flags == 0 { device::initialize() } else { Err(Status::INVALID_VALUE) })
}

#[unsafe(no_mangle)]
extern "C" fn cuDriverGetVersion(version: Out<c_int>) -> u32 {
    answer(|| version.give(SETTINGS.driver_version))
}

/// DAPI 6.2: "If the error code is not recognized, CUDA_ERROR_INVALID_VALUE will be returned"; [`cuGetErrorString`] likewise.
#[unsafe(no_mangle)]
extern "C" fn cuGetErrorName(code: u32, name: Out<*const c_char>) -> u32 {
    answer(|| name.give(Status::describe(code).ok_or(Status::INVALID_VALUE)?.0.as_ptr()))
}

#[unsafe(no_mangle)]
extern "C" fn cuGetErrorString(code: u32, text: Out<*const c_char>) -> u32 {
    answer(|| text.give(Status::describe(code).ok_or(Status::INVALID_VALUE)?.1.as_ptr()))
}

#[unsafe(no_mangle)]
extern "C" fn cuDeviceGetCount(count: Out<c_int>) -> u32 {
    answer(|| {
        device::check_initialized()?;
        count.give(SETTINGS.devices as c_int)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuDeviceGet(out: Out<c_int>, ordinal: c_int) -> u32 {
    answer(|| device::device(ordinal).and_then(|_| out.give(ordinal)))
}

#[unsafe(no_mangle)]
extern "C" fn cuDeviceGetName(name: *mut c_char, len_bytes: c_int, number: c_int) -> u32 {
    answer(|| {
        device::device(number)?;
        copy_text("annulus virtual GPU", name, len_bytes)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuDeviceGetPCIBusId(text: *mut c_char, len_bytes: c_int, number: c_int) -> u32 {
    answer(|| {
        device::device(number)?;
        copy_text(&format!("0000:{number:02X}:00.0"), text, len_bytes)
    })
}

/// Stricter than CUDA, whose reference only says that `len` is the "maximum length of string": what does not fit is refused.
fn copy_text(text: &str, to: *mut c_char, len_bytes: c_int) -> Result<()> {
    if usize::try_from(len_bytes).unwrap_or(0) <= text.len() {
        return Err(Status::INVALID_VALUE);
    }
    let bytes = text.bytes().chain([0]).enumerate();
    bytes.into_iter().try_for_each(|(i, byte)| Out(to.wrapping_add(i)).give(byte as c_char))
}

/// The same machine gives the same identifiers in every process.
fn uuid(number: c_int, out: &Out<[u8; 16]>) -> Result<()> {
    device::device(number)?;
    let mut uuid = *b"annulus-vgpu-000";
    uuid[12..].copy_from_slice(&(number as u32).to_be_bytes());
    out.give(uuid)
}

#[unsafe(no_mangle)]
extern "C" fn cuDeviceGetUuid(out: Out<[u8; 16]>, number: c_int) -> u32 {
    answer(|| uuid(number, &out))
}

#[unsafe(no_mangle)]
extern "C" fn cuDeviceGetUuid_v2(out: Out<[u8; 16]>, number: c_int) -> u32 {
    answer(|| uuid(number, &out))
}

#[unsafe(no_mangle)]
extern "C" fn cuDeviceTotalMem_v2(bytes: Out<usize>, number: c_int) -> u32 {
    answer(|| device::device(number).and_then(|_| bytes.give(SETTINGS.memory_bytes)))
}

/// `CUdevice_attribute`; what is not named here is 0, as for a feature that a device lacks.
#[unsafe(no_mangle)]
extern "C" fn cuDeviceGetAttribute(value: Out<c_int>, attribute: u32, number: c_int) -> u32 {
    answer(|| {
        device::device(number)?;
        value.give(match attribute {
            1 => THREADS_PER_BLOCK as c_int,           // MAX_THREADS_PER_BLOCK
            2 | 3 => 1024,                             // MAX_BLOCK_DIM_X, _Y
            4 => 64,                                   // MAX_BLOCK_DIM_Z
            5 => c_int::MAX,                           // MAX_GRID_DIM_X
            6 | 7 => 65_535,                           // MAX_GRID_DIM_Y, _Z
            8 => SHARED_BYTES_PER_BLOCK as c_int,      // MAX_SHARED_MEMORY_PER_BLOCK
            10 => 32,                                  // WARP_SIZE
            12 | 82 => 65_536,                         // MAX_REGISTERS_PER_BLOCK, _PER_MULTIPROCESSOR
            16 => MULTIPROCESSORS as c_int,            // MULTIPROCESSOR_COUNT
            19 | 31 | 40 | 41 => 1, // host mapping, concurrent kernels, a copy engine, one address space
            33 => number,           // PCI_BUS_ID
            39 => THREADS_PER_MULTIPROCESSOR as c_int, // MAX_THREADS_PER_MULTIPROCESSOR
            75 => 9,                // COMPUTE_CAPABILITY_MAJOR
            78 | 95 | 102 | 115 => 1, // priorities, cooperative, VMM, pools
            103 => SETTINGS.shares_descriptors.into(), // HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED
            // Stream memory operations of 64 bits, and their NOR. 92 to 94 are of their first version: off by default.
            122 | 123 => SETTINGS.orders_by_memory.into(),
            97 => SHARED_BYTES_PER_BLOCK_OPTIN as c_int, // MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
            81 => SHARED_BYTES_PER_MULTIPROCESSOR as c_int, // MAX_SHARED_MEMORY_PER_MULTIPROCESSOR
            106 => BLOCKS_PER_MULTIPROCESSOR as c_int,   // MAX_BLOCKS_PER_MULTIPROCESSOR
            _ => 0,
        })
    })
}
