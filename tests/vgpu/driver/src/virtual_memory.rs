//! Virtual memory management (DAPI 6.14): physical memory, address ranges, and mappings of one at the other.

use std::collections::{BTreeMap, HashMap};
use std::os::fd::{BorrowedFd, IntoRawFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use crate::allocations::{self, Allocation, Kind};
use crate::device;
use crate::mapping::{Mapping, device_of, new_memory, reserve};
use crate::status::{Result, Status, refuse};

/// Sizes and addresses are multiples of this: what `cuMemGetAllocationGranularity` tells.
pub(crate) const GRANULARITY_BYTES: usize = 2 << 20;

/// Physical memory; alive while a handle or a mapping refers to it.
struct Physical {
    memory: OwnedFd,
    len_bytes: usize,
    device: usize,
    exportable: bool,
    /// Charged to this process.
    owned: bool,
}

impl Drop for Physical {
    fn drop(&mut self) {
        if self.owned {
            device::give_back(self.device, self.len_bytes);
        }
    }
}

#[derive(Default)]
struct State {
    handles: HashMap<u64, Arc<Physical>>,
    /// Reserved ranges: length by address.
    reserved: BTreeMap<u64, usize>,
    /// What is mapped, by address.
    mapped: BTreeMap<u64, (usize, Arc<Physical>)>,
}

static STATE: LazyLock<Mutex<State>> = LazyLock::new(Mutex::default);
static NEXT: AtomicU64 = AtomicU64::new(0x6000_0000);

fn with<T>(work: impl FnOnce(&mut State) -> Result<T>) -> Result<T> {
    work(&mut STATE.lock().unwrap_or_else(PoisonError::into_inner))
}

fn is_granular(len_bytes: usize) -> bool {
    len_bytes != 0 && len_bytes.is_multiple_of(GRANULARITY_BYTES)
}

/// `cuMemCreate`: the size "must be a multiple of" what `cuMemGetAllocationGranularity` gives.
pub(crate) fn create(len_bytes: usize, number: usize, exportable: bool) -> Result<u64> {
    if !is_granular(len_bytes) {
        return refuse(Status::INVALID_VALUE, "cuMemCreate of a size that is no multiple of the granularity");
    }
    device::charge(number, len_bytes)?;
    let Ok(memory) = new_memory(len_bytes, number) else {
        device::give_back(number, len_bytes);
        return Err(Status::OUT_OF_MEMORY);
    };
    keep(Physical { memory, len_bytes, device: number, exportable, owned: true })
}

fn keep(physical: Physical) -> Result<u64> {
    let handle = NEXT.fetch_add(0x10, Ordering::Relaxed);
    with(|state| Ok(state.handles.insert(handle, Arc::new(physical))))?;
    Ok(handle)
}

/// `cuMemRelease`: memory that is mapped lives on. Stricter than CUDA: "If handle is not a valid handle the behavior
/// is undefined." Here it is CUDA_ERROR_INVALID_VALUE, so that it is noticed; so is one to export or to map.
pub(crate) fn release(handle: u64) -> Result<()> {
    let released = with(|state| Ok(state.handles.remove(&handle)))?;
    released.map(drop).map_or_else(|| refuse(Status::INVALID_VALUE, "cuMemRelease of no handle"), Ok)
}

/// `cuMemExportToShareableHandle` to a POSIX descriptor: CUDA_ERROR_INVALID_VALUE unless that was "requested via cuMemCreate"
/// (DAPI 6.5, CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED).
pub(crate) fn export(handle: u64) -> Result<i32> {
    with(|state| {
        let physical = state.handles.get(&handle).ok_or(Status::INVALID_VALUE)?;
        if !physical.exportable {
            return refuse(
                Status::INVALID_VALUE,
                "export of memory made without CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR",
            );
        }
        // Inherited by programs that this one starts: the manual does not say that it is not, though it was seen.
        Ok(rustix::io::dup(&physical.memory).map_err(|_| Status::OPERATING_SYSTEM)?.into_raw_fd())
    })
}

/// `cuMemImportFromShareableHandle`; the caller keeps its descriptor. CUDA_ERROR_UNKNOWN was seen for one that is no handle.
pub(crate) fn import(descriptor: BorrowedFd<'_>) -> Result<u64> {
    let memory = descriptor.try_clone_to_owned().map_err(|_| Status::UNKNOWN)?;
    let len_bytes = rustix::fs::fstat(&memory).map_err(|_| Status::UNKNOWN)?.st_size;
    let len_bytes = usize::try_from(len_bytes).map_err(|_| Status::UNKNOWN)?;
    let Some(number) = device_of(descriptor).filter(|_| is_granular(len_bytes)) else {
        return refuse(Status::UNKNOWN, "cuMemImportFromShareableHandle of a descriptor that is no such handle");
    };
    keep(Physical { memory, len_bytes, device: number, exportable: true, owned: false })
}

/// `cuMemAddressReserve`: "the alignment must be a power of two or zero". Stricter than CUDA, which wants the size to be a
/// "multiple of the host page size": nothing can be mapped into a smaller range (`cuMemMap`).
pub(crate) fn reserve_addresses(len_bytes: usize, align_bytes: usize) -> Result<u64> {
    if !is_granular(len_bytes) || !(align_bytes == 0 || align_bytes.is_power_of_two()) {
        return refuse(Status::INVALID_VALUE, "cuMemAddressReserve of a size that is no multiple of the granularity");
    }
    let address = reserve(len_bytes, align_bytes.max(GRANULARITY_BYTES)).map_err(|_| Status::OUT_OF_MEMORY)?;
    with(|state| Ok(state.reserved.insert(address, len_bytes)))?;
    Ok(address)
}

/// `cuMemAddressFree`: "The size must match what was given to memAddressReserve and the ptr given must match". Stricter than
/// CUDA, whose reference says nothing of a range with memory mapped in it.
pub(crate) fn free_addresses(address: u64, len_bytes: usize) -> Result<()> {
    with(|state| {
        if state.reserved.get(&address) != Some(&len_bytes) {
            return refuse(Status::INVALID_VALUE, "cuMemAddressFree of a range that is no reservation");
        }
        if state.mapped.range(address..address + len_bytes as u64).next().is_some() {
            return refuse(Status::INVALID_VALUE, "cuMemAddressFree of a range with memory mapped in it");
        }
        state.reserved.remove(&address);
        Ok(())
    })
}

/// `cuMemMap`: memory from the beginning of a handle's ("offset .. currently must be zero"), no more than it has, "a multiple"
/// of the granularity, at one, into a reservation, where it is "not currently mapped".
pub(crate) fn map(address: u64, len_bytes: usize, offset_bytes: usize, handle: u64) -> Result<()> {
    with(|state| {
        let physical = state.handles.get(&handle).cloned().ok_or(Status::INVALID_VALUE)?;
        let end = address.checked_add(len_bytes as u64).ok_or(Status::INVALID_VALUE)?;
        let inside = state.reserved.range(..=address).next_back();
        let inside = inside.is_some_and(|(start, reserved)| end <= start + *reserved as u64);
        let is_granular = is_granular(len_bytes) && address.is_multiple_of(GRANULARITY_BYTES as u64);
        if !inside || !is_granular || offset_bytes != 0 || len_bytes > physical.len_bytes {
            return refuse(Status::INVALID_VALUE, "cuMemMap outside the reservation, or of more than the memory");
        }
        let before = state.mapped.range(..end).next_back();
        if before.is_some_and(|(start, (mapped, _))| start + *mapped as u64 > address) {
            return refuse(Status::INVALID_VALUE, "cuMemMap over memory that is mapped");
        }
        // DAPI 6.1: "an OS call failed"; "a map or register operation has failed".
        let memory = physical.memory.try_clone().map_err(|_| Status::OPERATING_SYSTEM)?;
        // SAFETY: checked just above, under the lock: reserved, and nothing mapped there.
        let mapping = unsafe { Mapping::at(address, memory, 0, len_bytes) }.map_err(|_| Status::MAP_FAILED)?;
        let (mapping, kind) = (Arc::new(mapping), Kind::Virtual { access: 0 });
        let allocation = Allocation { mapping, len_bytes, kind, device: physical.device };
        allocations::change(|table| Ok(table.insert(address, allocation)))?;
        state.mapped.insert(address, (len_bytes, physical));
        Ok(())
    })
}

/// `cuMemUnmap`: "The range must be the entire contiguous address range that was mapped to."
pub(crate) fn unmap(address: u64, len_bytes: usize) -> Result<()> {
    with(|state| {
        if state.mapped.get(&address).is_none_or(|(mapped, _)| *mapped != len_bytes) {
            return refuse(Status::INVALID_VALUE, "cuMemUnmap of something else than one mapping");
        }
        allocations::remove(address, "cuMemUnmap", |kind| matches!(kind, Kind::Virtual { .. }))?;
        state.mapped.remove(&address);
        Ok(())
    })
}

/// `cuMemSetAccess`: until then nobody may touch a mapping. "The range must be a fully mapped address range"; stricter than
/// CUDA, which takes several mappings in a row: one, as annulus makes them.
pub(crate) fn set_access(address: u64, len_bytes: usize, number: usize, allowed: bool) -> Result<()> {
    allocations::change(|table| {
        let allocation = table.get_mut(&address).filter(|allocation| allocation.len_bytes == len_bytes);
        let Some(Allocation { kind: Kind::Virtual { access }, device: owner, .. }) = allocation else {
            return refuse(Status::INVALID_VALUE, "cuMemSetAccess of something else than one mapping");
        };
        if number != *owner && !device::can_access_peer(number as i32, *owner as i32)? {
            // Among the function's codes; PyTorch issue 174030 shows it.
            return refuse(Status::INVALID_DEVICE, "cuMemSetAccess for a device that is no peer of the memory's");
        }
        *access = if allowed { *access | 1 << number } else { *access & !(1 << number) };
        Ok(())
    })
}
