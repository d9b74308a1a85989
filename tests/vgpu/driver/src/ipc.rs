//! Legacy IPC: 64-byte handles by which other processes map an allocation.
//!
//! A handle names the exporting process and its descriptor of the memfd; the importer opens it through /proc, so nothing
//! with a name is left behind when a process dies. The descriptor's inode is checked: numbers are used again.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use rustix::fs::{Mode, OFlags};

use crate::allocations::{self, Allocation, Kind};
use crate::device;
use crate::mapping::Mapping;
use crate::status::{Result, Status, refuse};

/// `CUipcMemHandle`
pub(crate) type Handle = [u8; 64];

const MAGIC: u64 = u64::from_le_bytes(*b"vgpu-ipc");
/// DAPI 6.1, `CUipcMem_flags`; `cuIpcOpenMemHandle` takes no other value.
const LAZY_ENABLE_PEER_ACCESS: u32 = 1;

/// Open handles, how often each is open, and at which address.
static OPEN: LazyLock<Mutex<HashMap<Handle, (u64, u32)>>> = LazyLock::new(Mutex::default);

/// DAPI 6.13, `cuIpcGetMemHandle`: "dptr: Base pointer to previously allocated device memory"; CUDA_ERROR_INVALID_VALUE is
/// among its codes. Stricter than CUDA, which was seen to take a pointer into the middle.
pub(crate) fn export(address: u64) -> Result<Handle> {
    device::current()?;
    let table = allocations::table();
    let Some(allocation) = table.get(&address) else {
        return refuse(Status::INVALID_VALUE, "cuIpcGetMemHandle of an address where no allocation begins");
    };
    if allocation.kind != Kind::Device {
        // Pool memory is shared through its pool, VMM memory through cuMemExportToShareableHandle (DAPI 6.14, 6.15); UCX
        // issue 7110 shows the code for pool memory.
        return refuse(Status::INVALID_VALUE, &format!("cuIpcGetMemHandle of {:?} memory", allocation.kind));
    }
    let (Some(memory), Some(descriptor)) = (allocation.mapping.memory(), allocation.mapping.descriptor()) else {
        return Err(Status::INVALID_VALUE);
    };
    // DAPI 6.1, CUDA_ERROR_OPERATING_SYSTEM: "an OS call failed"; so below.
    let inode = rustix::fs::fstat(memory).map_err(|_| Status::OPERATING_SYSTEM)?.st_ino;
    let process = u64::from(std::process::id());
    let fields = [
        MAGIC,
        process,
        u64::try_from(descriptor).map_err(|_| Status::INVALID_VALUE)?,
        inode,
        allocation.len_bytes as u64,
        allocation.device as u64,
    ];
    let mut handle = [0; 64];
    for (place, field) in handle.chunks_exact_mut(8).zip(fields) {
        place.copy_from_slice(&field.to_le_bytes());
    }
    Ok(handle)
}

/// DAPI 6.13, `cuIpcOpenMemHandle`: a handle that is open already gives the same pointer and counts once more.
pub(crate) fn open(handle: Handle, flags: u32) -> Result<u64> {
    let current = device::current()?;
    // "Must be specified as CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS"; INVALID_VALUE, INVALID_CONTEXT, INVALID_HANDLE and MAP_FAILED
    // are the function's codes.
    if flags != LAZY_ENABLE_PEER_ACCESS {
        return refuse(Status::INVALID_VALUE, "cuIpcOpenMemHandle without CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS");
    }
    let [magic, process, descriptor, inode, len_bytes, number] = fields(&handle);
    if magic != MAGIC {
        return refuse(Status::INVALID_VALUE, "cuIpcOpenMemHandle of something that is no handle");
    }
    if process == u64::from(std::process::id()) {
        // "CUipcMemHandles .. may only be opened by one CUcontext per CUdevice per other process": mscclpp pull request 593
        // had to give the exporter its raw pointer.
        return refuse(Status::INVALID_CONTEXT, "cuIpcOpenMemHandle in the process that made the handle");
    }
    let exporter = usize::try_from(number).map_err(|_| Status::INVALID_VALUE)?;
    // "as if the user called cuCtxEnablePeerAccess", whose code this is.
    if exporter != current && !device::can_access_peer(current as i32, exporter as i32)? {
        return refuse(Status::PEER_ACCESS_UNSUPPORTED, "cuIpcOpenMemHandle of a device that is no peer");
    }
    let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((address, count)) = open.get_mut(&handle) {
        *count += 1;
        return Ok(*address);
    }
    let path = format!("/proc/{process}/fd/{descriptor}");
    // Seen where all memory around was freed, too; stricter where other allocations in the same 2 MiB keep it. Also seen then:
    // CUDA_ERROR_NOT_PERMITTED.
    if !std::path::Path::new(&format!("/proc/{process}")).exists() {
        return refuse(Status::INVALID_HANDLE, "the process that made an IPC handle has ended");
    }
    let memory = rustix::fs::open(path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).ok();
    let is_same = |memory: &_| rustix::fs::fstat(memory).is_ok_and(|found| found.st_ino == inode);
    let Some(memory) = memory.filter(is_same) else {
        return refuse(Status::INVALID_VALUE, "the memory of an IPC handle was freed");
    };
    let len_bytes = usize::try_from(len_bytes).map_err(|_| Status::INVALID_VALUE)?;
    let mapping = Mapping::of_memory(memory, len_bytes).map_err(|_| Status::MAP_FAILED)?;
    mapping.announce().map_err(|_| Status::OPERATING_SYSTEM)?;
    let address = mapping.address();
    let allocation = Allocation { mapping: Arc::new(mapping), len_bytes, kind: Kind::Imported, device: exporter };
    allocations::change(|table| Ok(table.insert(address, allocation)))?;
    open.insert(handle, (address, 1));
    Ok(address)
}

/// DAPI 6.13, `cuIpcCloseMemHandle`: unmaps with the last close. "dptr: Device pointer returned by cuIpcOpenMemHandle";
/// CUDA_ERROR_INVALID_VALUE is among its codes.
pub(crate) fn close(address: u64) -> Result<()> {
    device::current()?;
    let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
    let Some((handle, (_, count))) = open.iter_mut().find(|(_, (at, _))| *at == address) else {
        return refuse(Status::INVALID_VALUE, "cuIpcCloseMemHandle of an address that is not open");
    };
    *count -= 1;
    if *count == 0 {
        let handle = *handle;
        open.remove(&handle);
        let closed = allocations::remove(address, "cuIpcCloseMemHandle", |kind| kind == Kind::Imported)?;
        // A kernel in flight may keep the mapping for longer, and reaches it no more.
        closed.mapping.forgo().map_err(|_| Status::OPERATING_SYSTEM)?;
    }
    Ok(())
}

fn fields<const N: usize>(handle: &Handle) -> [u64; N] {
    std::array::from_fn(|i| u64::from_le_bytes(std::array::from_fn(|byte| handle[8 * i + byte])))
}
