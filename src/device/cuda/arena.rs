//! The arena of a device: one allocation, from which registered buffers come, and which peers map.
//!
//! ```text
//! owner:  Arena::new --> export() --> Exported { descriptor | handle }      over the rendezvous' checked socket
//! peer:                               PeerArena::open(device, exported)     + Buffer::arena_offset_bytes = its address of the buffer
//! ```
//! A handle or descriptor covers the whole allocation, so what is sent for a buffer is its offset. Importers close before the
//! owner frees: CUDA leaves the other order undefined (Driver API, `cuIpcOpenMemHandle`), so teardown is collective.

use std::fmt;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::sys::{self, CUresult};
use range_alloc::RangeAllocator;

use super::bindings::{
    cuIpcCloseMemHandle, cuIpcGetMemHandle, cuIpcOpenMemHandle, cuMemAddressFree, cuMemAddressReserve, cuMemAlloc,
    cuMemCreate, cuMemExportToShareableHandle, cuMemFree, cuMemGetAddressRange, cuMemGetAllocationGranularity,
    cuMemImportFromShareableHandle, cuMemMap, cuMemRelease, cuMemSetAccess, cuMemUnmap,
};
use super::buffer::{Buffer, Memory};
use super::context::{Device, Uuid};
use crate::dtype::DType;
use crate::error::{Error, Result};

/// Buffers begin at multiples of this, as `cuMemAlloc` promises for allocations.
const ALIGN_BYTES: usize = 256;

/// How an arena's memory reaches other processes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sharing {
    /// Virtual memory management: a POSIX descriptor, which reaches only who is sent it over a checked socket.
    Descriptor,
    /// Legacy CUDA IPC: 64 bytes that whoever reads them can use; for devices and systems without the former.
    Handle,
}

/// What another process needs to map an arena. `Debug` does not show it.
pub struct Exported {
    /// The device that the memory is on.
    pub uuid: Uuid,
    /// Length of the memory.
    pub len_bytes: usize,
    /// The token itself.
    pub token: Token,
}

/// A right to map memory.
pub enum Token {
    /// [`Sharing::Descriptor`]
    Descriptor(OwnedFd),
    /// [`Sharing::Handle`]
    Handle([u8; 64]),
}

impl fmt::Debug for Exported {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Exported { uuid, len_bytes, .. } = self;
        f.debug_struct("Exported")
            .field("uuid", uuid)
            .field("len_bytes", len_bytes)
            .field("token", &format_args!("<redacted>"))
            .finish()
    }
}

/// Memory of a device that peers map. Clones are the same arena; it is freed when they and all buffers in it are gone: not
/// while a graph is being captured on the device, since freeing it waits for the device. It would end the capture, and keep the
/// memory for ever. Kernels that do not end within 10 s are no longer waited for; the memory is freed when they do.
#[derive(Clone)]
pub struct Arena(Arc<Core>);

struct Core {
    block: Block,
    len_bytes: usize,
    ranges: Mutex<RangeAllocator<usize>>,
}

/// Device memory by either way of sharing.
enum Block {
    Legacy { device: Device, address: sys::CUdeviceptr },
    Virtual(VirtualBlock),
}

impl Block {
    fn device(&self) -> &Device {
        match self {
            Block::Legacy { device, .. } => device,
            Block::Virtual(block) => &block.device,
        }
    }

    fn address(&self) -> sys::CUdeviceptr {
        match self {
            Block::Legacy { address, .. } => *address,
            Block::Virtual(block) => block.address,
        }
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        if let Block::Legacy { device, address } = self {
            let address = *address;
            device.free("an arena", (), move |device| {
                device.drain()?;
                // SAFETY: from `cuMemAlloc`, freed once; kernels that used it have ended, those of peers before they let go.
                device.check(unsafe { cuMemFree(address) })
            });
        }
    }
}

impl Arena {
    /// Allocates `len_bytes`, rounded up to what the device shares, and fills them with zeroes.
    ///
    /// # Errors
    /// [`Error::NoSpace`] with what the device has left; [`Error::SizeOverflow`]; what the driver says.
    pub fn new(device: &Device, len_bytes: usize, sharing: Sharing) -> Result<Arena> {
        device.bind()?;
        let (block, len_bytes) = match sharing {
            Sharing::Descriptor => {
                let whole = VirtualBlock::whole(device, len_bytes)?;
                let handle = VirtualBlock::create(device, whole)?;
                (Block::Virtual(VirtualBlock::map(device, handle, whole)?), whole)
            }
            Sharing::Handle => {
                // Whole blocks of 2 MiB: smaller allocations may share one, and a handle covers all of it (CUDA C++
                // Programming Guide, "Interprocess Communication").
                let whole = round_up(len_bytes, 2 << 20)?;
                let mut address = 0;
                // SAFETY: writes one address; the memory is zeroed below, before anybody has it.
                let made = unsafe { cuMemAlloc(&mut address, whole) };
                device.check_space("the arena on the device", whole, made)?;
                (Block::Legacy { device: device.clone(), address }, whole)
            }
        };
        // SAFETY: the whole of a fresh allocation.
        unsafe { device.zero(block.address(), len_bytes) }?;
        let ranges = Mutex::new(RangeAllocator::new(0..len_bytes));
        Ok(Arena(Arc::new(Core { block, len_bytes, ranges })))
    }

    /// Where the memory is.
    pub fn device(&self) -> &Device {
        self.0.block.device()
    }

    /// Length in bytes.
    pub fn len_bytes(&self) -> usize {
        self.0.len_bytes
    }

    /// Address of the first byte in this process.
    pub fn address(&self) -> u64 {
        self.0.block.address()
    }

    /// A registered buffer. What it holds is what was left there; a fresh arena holds zeroes.
    ///
    /// # Errors
    /// [`Error::NoSpace`] if the arena has too little left; [`Error::SizeOverflow`].
    ///
    /// # Synchronization
    /// A range is given out again as soon as its buffer, and all views of it, are gone: the device may not be done with it.
    /// Who drops a buffer of an arena, or a graph that keeps one, has whoever gets the next one ordered behind it, or waits.
    pub fn alloc(&self, dtype: DType, len_elems: usize) -> Result<Buffer> {
        let whole = round_up(dtype.bytes_of(len_elems)?.max(1), ALIGN_BYTES)?;
        let no_space = |have_bytes: usize| Error::NoSpace {
            what: "a registered buffer in the arena of the device",
            need_bytes: whole as u64,
            have_bytes: have_bytes as u64,
        };
        let mut ranges = self.0.ranges.lock().unwrap_or_else(PoisonError::into_inner);
        if whole > self.0.len_bytes {
            return Err(no_space(ranges.total_available())); // the allocator's own sums would wrap
        }
        let range = ranges.allocate_range(whole).map_err(|left| no_space(left.fragmented_free_length))?;
        drop(ranges);
        let registered = Registered { arena: Arc::clone(&self.0), offset_bytes: range.start, len_bytes: whole };
        Ok(Buffer::over(Arc::new(registered), dtype, len_elems))
    }

    /// What other processes need to map this memory.
    ///
    /// # Errors
    /// What the driver says.
    pub fn export(&self) -> Result<Exported> {
        let device = self.device();
        device.bind()?;
        let token = match &self.0.block {
            Block::Legacy { address, .. } => {
                let mut handle = sys::CUipcMemHandle { reserved: [0; 64] };
                // SAFETY: the base of an allocation that lives.
                device.check(unsafe { cuIpcGetMemHandle(&mut handle, *address) })?;
                Token::Handle(handle.reserved.map(|byte| byte as u8))
            }
            Block::Virtual(block) => Token::Descriptor(block.export()?),
        };
        Ok(Exported { uuid: device.uuid(), len_bytes: self.0.len_bytes, token })
    }
}

impl fmt::Debug for Arena {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Arena").field("device", &self.device().ordinal()).field("len_bytes", &self.0.len_bytes).finish()
    }
}

/// A range of an arena, given back when it is dropped.
struct Registered {
    arena: Arc<Core>,
    offset_bytes: usize,
    len_bytes: usize,
}

impl Memory for Registered {
    fn address(&self) -> sys::CUdeviceptr {
        self.arena.block.address() + self.offset_bytes as u64
    }

    fn device(&self) -> &Device {
        self.arena.block.device()
    }

    fn arena_offset_bytes(&self) -> Option<usize> {
        Some(self.offset_bytes)
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        let mut ranges = self.arena.ranges.lock().unwrap_or_else(PoisonError::into_inner);
        ranges.free_range(self.offset_bytes..self.offset_bytes + self.len_bytes);
    }
}

// ---- another process's arena -------------------------------------------------------------------------------------------

/// A peer's arena as this process's kernels reach it. Dropping it closes it, when the kernels of its device have ended, as an
/// [`Arena`] is freed; that must come before the owner frees.
pub struct PeerArena {
    /// Whose kernels use it.
    device: Device,
    address: sys::CUdeviceptr,
    len_bytes: usize,
    /// None once it was closed.
    memory: Option<PeerMemory>,
}

enum PeerMemory {
    /// In this very process: CUDA refuses to open an own handle, and needs none.
    Same(Arena),
    Opened,
    Virtual(VirtualBlock),
}

impl PeerArena {
    /// Maps the arena of another process for `device`, whose kernels are to reach it.
    ///
    /// # Errors
    /// What the driver says: that the owner has ended, or that the devices are no peers; [`Error::InvalidArgument`] if the
    /// memory is shorter than the owner says.
    pub fn open(device: &Device, exported: Exported) -> Result<PeerArena> {
        device.bind()?;
        let len_bytes = exported.len_bytes;
        let over = |address, memory| PeerArena { device: device.clone(), address, len_bytes, memory: Some(memory) };
        match exported.token {
            Token::Handle(bytes) => {
                let handle = sys::CUipcMemHandle { reserved: bytes.map(|byte| byte as std::ffi::c_char) };
                let flags = sys::CUipcMem_flags::CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS as u32;
                let mut address = 0;
                // SAFETY: the driver checks handles; the mapping is closed once, on drop.
                device.check(unsafe { cuIpcOpenMemHandle(&mut address, handle, flags) })?;
                let opened = over(address, PeerMemory::Opened);
                opened.check_len()?;
                Ok(opened)
            }
            Token::Descriptor(descriptor) => {
                let handle = VirtualBlock::import(device, &descriptor)?;
                let block = VirtualBlock::map(device, handle, len_bytes)?; // no more than there is: `cuMemMap` sees to that
                Ok(over(block.address, PeerMemory::Virtual(block)))
            }
        }
    }

    /// That a handle covers what its owner says.
    fn check_len(&self) -> Result<()> {
        let mut mapped_bytes = 0;
        // SAFETY: an address that the driver has just given; writes one integer.
        let asked = unsafe { cuMemGetAddressRange(std::ptr::null_mut(), &mut mapped_bytes, self.address) };
        // The manual does not say that it knows memory of other processes. Where it does not, the owner is believed.
        if !asked.is(CUresult::CUDA_SUCCESS) || mapped_bytes >= self.len_bytes {
            return Ok(());
        }
        Err(Error::InvalidArgument {
            argument: "length of a peer's arena",
            value: format!("{} bytes, of which {mapped_bytes} are there", self.len_bytes),
            accepted: "must be no more than there is",
        })
    }

    /// The arena of a rank in this process, by its own address, for the kernels of `device`.
    ///
    /// # Errors
    /// What the driver says: that the devices are no peers.
    pub fn of_this_process(device: &Device, arena: &Arena) -> Result<PeerArena> {
        match &arena.0.block {
            Block::Legacy { device: owner, .. } => device.enable_peer(owner)?,
            // Peer access that is enabled does not reach mappings (CUDA Driver API, `cuMemSetAccess`).
            Block::Virtual(block) => block.allow(device)?,
        }
        let (address, len_bytes, memory) = (arena.address(), arena.len_bytes(), PeerMemory::Same(arena.clone()));
        Ok(PeerArena { device: device.clone(), address, len_bytes, memory: Some(memory) })
    }

    /// The address at which kernels here find the `len_bytes` bytes at `offset_bytes` of the peer's arena.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if they do not lie in the arena: a peer's offset is not trusted.
    pub fn address(&self, offset_bytes: usize, len_bytes: usize) -> Result<u64> {
        if offset_bytes.checked_add(len_bytes).is_none_or(|end| end > self.len_bytes) {
            return Err(Error::InvalidArgument {
                argument: "offset in a peer's arena",
                value: format!("{len_bytes} bytes at {offset_bytes} of {}", self.len_bytes),
                accepted: "must lie in the arena",
            });
        }
        Ok(self.address + offset_bytes as u64)
    }

    /// Drops it, and tells whether it was closed by then: if not, the owner may not free.
    pub fn close(mut self) -> bool {
        self.let_go()
    }

    /// However the memory got here, nothing that gives it back waits for the kernels of this device: of an arena in this
    /// process, the owner's device is waited for alone.
    fn let_go(&mut self) -> bool {
        let (what, address) = ("a peer's memory", self.address);
        match self.memory.take() {
            None => true,
            Some(PeerMemory::Same(arena)) => self.device.free(what, arena, Device::drain),
            Some(PeerMemory::Opened) => self.device.free(what, (), move |device| {
                device.drain()?;
                // SAFETY: opened by `open` and closed once; what used it has ended.
                device.check(unsafe { cuIpcCloseMemHandle(address) })
            }),
            Some(PeerMemory::Virtual(mut block)) => block.release(),
        }
    }
}

impl Drop for PeerArena {
    fn drop(&mut self) {
        self.let_go();
    }
}

impl fmt::Debug for PeerArena {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match &self.memory {
            None => "closed",
            Some(PeerMemory::Same(_)) => "same process",
            Some(PeerMemory::Opened) => "handle",
            Some(PeerMemory::Virtual(_)) => "descriptor",
        };
        f.debug_struct("PeerArena").field("by", &kind).field("len_bytes", &self.len_bytes).finish()
    }
}

// ---- virtual memory management (CUDA Driver API, 6.14) -----------------------------------------------------------------

/// Physical memory, mapped at a range of its own.
struct VirtualBlock {
    device: Device,
    handle: sys::CUmemGenericAllocationHandle,
    address: sys::CUdeviceptr,
    len_bytes: usize,
    is_mapped: bool,
    is_released: bool,
}

const DESCRIPTOR: sys::CUmemAllocationHandleType =
    sys::CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;

fn location(device: &Device) -> sys::CUmemLocation {
    sys::CUmemLocation { type_: sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE, id: device.raw() }
}

fn properties(device: &Device) -> sys::CUmemAllocationProp {
    sys::CUmemAllocationProp {
        type_: sys::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED,
        requestedHandleTypes: DESCRIPTOR,
        location: location(device),
        win32HandleMetaData: std::ptr::null_mut(),
        allocFlags: sys::CUmemAllocationProp_st__bindgen_ty_1 {
            compressionType: 0,
            gpuDirectRDMACapable: 0,
            usage: 0,
            reserved: [0; 4],
        },
    }
}

impl VirtualBlock {
    /// `len_bytes` in whole granules.
    fn whole(device: &Device, len_bytes: usize) -> Result<usize> {
        let mut granule = 0;
        let option = sys::CUmemAllocationGranularity_flags::CU_MEM_ALLOC_GRANULARITY_RECOMMENDED;
        // SAFETY: both pointers are to live values.
        device.check(unsafe { cuMemGetAllocationGranularity(&mut granule, &properties(device), option) })?;
        round_up(len_bytes, granule.max(1))
    }

    fn create(device: &Device, len_bytes: usize) -> Result<sys::CUmemGenericAllocationHandle> {
        let mut handle = 0;
        // SAFETY: both pointers are to live values.
        let made = unsafe { cuMemCreate(&mut handle, len_bytes, &properties(device), 0) };
        device.check_space("the arena on the device", len_bytes, made)?;
        Ok(handle)
    }

    fn import(device: &Device, descriptor: &OwnedFd) -> Result<sys::CUmemGenericAllocationHandle> {
        let mut handle = 0;
        // The descriptor's number stands in place of the pointer.
        let number = std::ptr::without_provenance_mut(descriptor.as_raw_fd() as usize);
        // SAFETY: an open descriptor, of which the driver makes its own.
        device.check(unsafe { cuMemImportFromShareableHandle(&mut handle, number, DESCRIPTOR) })?;
        Ok(handle)
    }

    /// Maps the memory behind `handle`, which is released with the block or on failure.
    fn map(device: &Device, handle: sys::CUmemGenericAllocationHandle, len_bytes: usize) -> Result<VirtualBlock> {
        let device = device.clone();
        // From here on dropping undoes what was done.
        let mut block = VirtualBlock { device, handle, address: 0, len_bytes, is_mapped: false, is_released: false };
        // SAFETY: writes one address.
        let reserved = unsafe { cuMemAddressReserve(&mut block.address, len_bytes, 0, 0, 0) };
        block.device.check(reserved)?;
        // SAFETY: a range that was reserved just now, of the length of the memory.
        block.device.check(unsafe { cuMemMap(block.address, len_bytes, 0, handle, 0) })?;
        block.is_mapped = true;
        block.allow(&block.device)?;
        Ok(block)
    }

    /// Lets kernels of `device` in.
    fn allow(&self, device: &Device) -> Result<()> {
        let access = sys::CUmemAccessDesc {
            location: location(device),
            flags: sys::CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE,
        };
        // SAFETY: one description, of the whole range, which is mapped.
        device.check(unsafe { cuMemSetAccess(self.address, self.len_bytes, &access, 1) })
    }

    /// Gives all back, and tells whether that was done.
    fn release(&mut self) -> bool {
        if std::mem::replace(&mut self.is_released, true) {
            return true;
        }
        let VirtualBlock { handle, address, len_bytes, is_mapped, .. } = *self;
        self.device.free("an arena, or a peer's", (), move |device| {
            device.drain()?; // cuMemUnmap does not wait for kernels
            // SAFETY: undoes, once and in reverse, what `map` has done; what used it has ended.
            let answers = unsafe {
                [
                    is_mapped.then(|| cuMemUnmap(address, len_bytes)),
                    (address != 0).then(|| cuMemAddressFree(address, len_bytes)),
                    Some(cuMemRelease(handle)),
                ]
            };
            answers.into_iter().flatten().try_for_each(|answer| device.check(answer))
        })
    }

    fn export(&self) -> Result<OwnedFd> {
        let mut descriptor: std::ffi::c_int = -1;
        // SAFETY: for this kind of handle the driver writes one integer.
        let made = unsafe { cuMemExportToShareableHandle((&raw mut descriptor).cast(), self.handle, DESCRIPTOR, 0) };
        self.device.check(made)?;
        // SAFETY: the driver has opened it for the caller, who owns it.
        let descriptor = unsafe { OwnedFd::from_raw_fd(descriptor) };
        // The driver promises nothing of what programs that this one starts inherit.
        rustix::io::fcntl_setfd(&descriptor, rustix::io::FdFlags::CLOEXEC)
            .map_err(|errno| Error::io("closing a descriptor of memory on exec", errno))?;
        Ok(descriptor)
    }
}

impl Drop for VirtualBlock {
    fn drop(&mut self) {
        self.release();
    }
}

fn round_up(len_bytes: usize, multiple: usize) -> Result<usize> {
    len_bytes.max(1).checked_next_multiple_of(multiple).ok_or_else(|| Error::SizeOverflow {
        what: "memory of a device",
        detail: format!("{len_bytes} bytes in blocks of {multiple}"),
    })
}
