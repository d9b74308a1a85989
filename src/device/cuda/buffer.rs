//! Buffers on a device, and pinned memory of the host.

use std::any::Any;
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cudarc::driver::sys::{self, CUresult};

use super::bindings::{
    cuMemAlloc, cuMemFree, cuMemFreeHost, cuMemHostAlloc, cuMemcpyDtoDAsync, cuMemcpyDtoHAsync, cuMemcpyHtoD,
    cuMemcpyHtoDAsync, cuMemsetD8Async, cuStreamQuery,
};
use super::context::Device;
use super::stream::Stream;
use super::wait::until_ready;
use crate::dtype::{DType, Element};
use crate::error::{Error, Result};

/// Where a buffer's bytes are; kept alive by the buffer.
pub(super) trait Memory: Send + Sync {
    fn address(&self) -> sys::CUdeviceptr;
    fn device(&self) -> &Device;
    /// For memory that peers reach: its offset in the arena.
    fn arena_offset_bytes(&self) -> Option<usize>;
}

/// `len_elems` elements of one type on a device. Not `Clone`: who holds the buffer may write it.
///
/// *Private* buffers are allocations of their own, freed as an [`Arena`](super::Arena) is, and also while a graph is being
/// captured; *registered* ones lie in an arena, where peers reach them. Either way the address is a multiple of 256 bytes.
pub struct Buffer {
    memory: Arc<dyn Memory>,
    dtype: DType,
    len_elems: usize,
}

/// An allocation of this process alone.
struct Private {
    device: Device,
    address: sys::CUdeviceptr,
}

impl Memory for Private {
    fn address(&self) -> sys::CUdeviceptr {
        self.address
    }

    fn device(&self) -> &Device {
        &self.device
    }

    fn arena_offset_bytes(&self) -> Option<usize> {
        None
    }
}

impl Drop for Private {
    fn drop(&mut self) {
        let address = self.address;
        self.device.free("a buffer", (), move |device| {
            // SAFETY: from `cuMemAlloc`, freed once; kernels that use it are waited for, as the module `free` says.
            device.check(unsafe { cuMemFree(address) })
        });
    }
}

/// Memory that somebody else allocated.
struct Foreign {
    device: Device,
    address: sys::CUdeviceptr,
    _owner: Box<dyn Any + Send + Sync>,
}

impl Memory for Foreign {
    fn address(&self) -> sys::CUdeviceptr {
        self.address
    }

    fn device(&self) -> &Device {
        &self.device
    }

    fn arena_offset_bytes(&self) -> Option<usize> {
        None
    }
}

impl Buffer {
    /// A private buffer of zeroes. The host waits until they are written.
    ///
    /// # Errors
    /// [`Error::SizeOverflow`]; [`Error::NoSpace`] with what the device has left; what the driver says.
    pub fn zeroed(device: &Device, dtype: DType, len_elems: usize) -> Result<Buffer> {
        let len_bytes = dtype.bytes_of(len_elems)?.max(1); // the driver refuses to allocate nothing
        device.bind()?;
        let mut address = 0;
        // SAFETY: writes one address; the memory is zeroed below, before anybody has it.
        let made = unsafe { cuMemAlloc(&mut address, len_bytes) };
        device.check_space("a buffer on the device", len_bytes, made)?;
        let buffer = Buffer::over(Arc::new(Private { device: device.clone(), address }), dtype, len_elems);
        // SAFETY: the whole of a fresh allocation.
        unsafe { device.zero(address, len_bytes) }?;
        Ok(buffer)
    }

    /// A private buffer of these elements. The host waits until they are there.
    ///
    /// # Errors
    /// As [`Buffer::zeroed`].
    pub fn filled<T: Element>(device: &Device, elements: &[T]) -> Result<Buffer> {
        let buffer = Buffer::zeroed(device, T::DTYPE, elements.len())?;
        // SAFETY: as many elements as the buffer has.
        device.check(unsafe { cuMemcpyHtoD(buffer.address(), elements.as_ptr().cast(), size_of_val(elements)) })?;
        device.settle()?;
        Ok(buffer)
    }

    /// What keeps the bytes allocated.
    pub(super) fn into_memory(self) -> Arc<dyn Memory> {
        self.memory
    }

    pub(super) fn over(memory: Arc<dyn Memory>, dtype: DType, len_elems: usize) -> Buffer {
        Buffer { memory, dtype, len_elems }
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Number of elements.
    pub fn len_elems(&self) -> usize {
        self.len_elems
    }

    /// Whether the buffer has no elements.
    pub fn is_empty(&self) -> bool {
        self.len_elems == 0
    }

    /// Size in bytes.
    pub fn len_bytes(&self) -> usize {
        self.len_elems * self.dtype.size_bytes() // checked when the buffer was made
    }

    /// Where it is.
    pub fn device(&self) -> &Device {
        self.memory.device()
    }

    /// Address of the first element, for kernels' arguments. The memory lives as long as the buffer.
    pub fn address(&self) -> u64 {
        self.memory.address()
    }

    /// Whether peers reach the memory.
    pub fn is_registered(&self) -> bool {
        self.arena_offset_bytes().is_some()
    }

    /// Of a registered buffer, its offset in the arena: what a peer adds to its own address of the arena.
    pub fn arena_offset_bytes(&self) -> Option<usize> {
        self.memory.arena_offset_bytes()
    }

    /// Copies `elements` into the buffer in the order of `stream`. They may be changed when the call returns: the driver
    /// has taken them by then (CUDA Driver API, 2, "API synchronization behavior", for pageable memory). For more than 64 KiB it
    /// waits, as long as that takes, until the stream has come there; [`Staging`](super::Staging) is for who does not.
    ///
    /// # Errors
    /// [`Error::DTypeMismatch`], [`Error::LengthMismatch`]; [`Error::InvalidArgument`] for a stream of another device;
    /// [`Error::Capture`], since a graph would copy from wherever the elements once were; what the driver says.
    pub fn write<T: Element>(&mut self, elements: &[T], stream: &Stream) -> Result<()> {
        self.view().write(elements, stream)
    }

    /// Waits for everything enqueued on `stream` and copies the buffer to the host.
    ///
    /// # Errors
    /// [`Error::DTypeMismatch`]; [`Error::InvalidArgument`] for a stream of another device; [`Error::TimedOut`] after `timeout`;
    /// what the device failed with.
    pub fn read<T: Element>(&self, stream: &Stream, timeout: Duration) -> Result<Vec<T>> {
        let mut elements = vec![T::zeroed(); self.len_elems];
        self.view().read(&mut elements, stream, timeout)?;
        Ok(elements)
    }

    /// Memory of somebody else as a private buffer: a tensor of the trainer's own library, for one. `owner` is what keeps
    /// it allocated. It is dropped, by whichever thread, with the last of the buffer, its views, and the graphs that use it: the
    /// device may not have come to what was enqueued on them.
    ///
    /// # Errors
    /// [`Error::SizeOverflow`]; [`Error::InvalidArgument`] if `address` is not aligned for `dtype`.
    ///
    /// # Safety
    /// - `address` is of at least `len_elems` elements of `dtype` that kernels of `device` reach, as long as `owner` lives, and
    ///   then until what was enqueued on them has run: dropping `owner` waits for that, or has the memory used again only in
    ///   that order, as the caching allocators of autograd libraries do for streams that they are told of.
    /// - Who else uses the memory is ordered, by streams and events, with what this crate enqueues on it.
    pub unsafe fn foreign(
        device: &Device,
        address: u64,
        dtype: DType,
        len_elems: usize,
        owner: Box<dyn Any + Send + Sync>,
    ) -> Result<Buffer> {
        dtype.bytes_of(len_elems)?;
        if !address.is_multiple_of(dtype.size_bytes() as u64) {
            return Err(Error::InvalidArgument {
                argument: "address of foreign memory",
                value: format!("{address:#x}"),
                accepted: "must be a multiple of the element's size",
            });
        }
        let foreign = Foreign { device: device.clone(), address, _owner: owner };
        Ok(Buffer::over(Arc::new(foreign), dtype, len_elems))
    }

    /// All of it, to hand to operations that are enqueued.
    pub fn view(&self) -> View {
        View { memory: Arc::clone(&self.memory), dtype: self.dtype, offset_elems: 0, len_elems: self.len_elems }
    }
}

impl std::fmt::Debug for Buffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Buffer")
            .field("device", &self.device().ordinal())
            .field("dtype", &self.dtype)
            .field("len_elems", &self.len_elems)
            .field("is_registered", &self.is_registered())
            .finish()
    }
}

/// Part of a buffer, as operations that are enqueued take it: it keeps the memory allocated, and shares it. Two operations
/// on one memory are ordered by their stream or by events; without that its contents are anything, as always on a device.
#[derive(Clone)]
pub struct View {
    memory: Arc<dyn Memory>,
    dtype: DType,
    offset_elems: usize,
    len_elems: usize,
}

impl View {
    /// Elements `offset_elems .. offset_elems + len_elems` of it.
    ///
    /// # Errors
    /// [`Error::LengthMismatch`] if there are fewer.
    pub fn slice(&self, offset_elems: usize, len_elems: usize) -> Result<View> {
        let end_elems = offset_elems.saturating_add(len_elems);
        if end_elems > self.len_elems {
            return Err(Error::LengthMismatch {
                what: format!("{len_elems} elements from {offset_elems} on, of a view of a buffer on the device"),
                expected_elems: self.len_elems,
                actual_elems: end_elems,
            });
        }
        Ok(View { offset_elems: self.offset_elems + offset_elems, len_elems, ..self.clone() })
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Number of elements.
    pub fn len_elems(&self) -> usize {
        self.len_elems
    }

    /// Whether it has no elements.
    pub fn is_empty(&self) -> bool {
        self.len_elems == 0
    }

    /// Size in bytes.
    pub fn len_bytes(&self) -> usize {
        self.len_elems * self.dtype.size_bytes() // part of a buffer, whose size was checked
    }

    /// Where it is.
    pub fn device(&self) -> &Device {
        self.memory.device()
    }

    /// Address of the first element, for kernels' arguments. The memory lives as long as the view.
    pub fn address(&self) -> u64 {
        self.memory.address() + (self.offset_elems * self.dtype.size_bytes()) as u64
    }

    /// Of registered memory, the first element's offset in the arena.
    pub fn arena_offset_bytes(&self) -> Option<usize> {
        Some(self.memory.arena_offset_bytes()? + self.offset_elems * self.dtype.size_bytes())
    }

    /// As [`Buffer::write`].
    ///
    /// # Errors
    /// As [`Buffer::write`].
    pub fn write<T: Element>(&self, elements: &[T], stream: &Stream) -> Result<()> {
        self.check::<T>(elements.len())?;
        self.check_stream(stream)?;
        let access = stream.access()?;
        access.check_eager("cuMemcpyHtoDAsync")?;
        let from = elements.as_ptr().cast();
        // SAFETY: the memory has room for exactly these elements, and stays allocated until they are there: private memory is
        // freed behind the copy, an arena outlives its ranges, and of foreign memory its caller has promised it.
        stream.device().check(unsafe { cuMemcpyHtoDAsync(self.address(), from, self.len_bytes(), access.raw()) })
    }

    /// Waits for everything enqueued on `stream` and copies all elements to `elements`.
    ///
    /// # Errors
    /// As [`Buffer::read`]; [`Error::LengthMismatch`].
    pub fn read<T: Element>(&self, elements: &mut [T], stream: &Stream, timeout: Duration) -> Result<()> {
        self.check::<T>(elements.len())?;
        self.check_stream(stream)?;
        let (device, start) = (stream.device(), Instant::now());
        loop {
            // First with a deadline: the copy's own wait has none, as the elements are borrowed until they are there.
            stream.synchronize(timeout.saturating_sub(start.elapsed()))?;
            let access = stream.access()?;
            access.check_eager("cuMemcpyDtoHAsync")?;
            // SAFETY: the stream lives.
            let ask = || unsafe { cuStreamQuery(access.raw()) };
            if !ask().is(CUresult::CUDA_SUCCESS) {
                continue; // another thread has enqueued since
            }
            let to = elements.as_mut_ptr().cast();
            // SAFETY: as many elements as the view has, not touched before the copy has ended.
            let copied = unsafe { cuMemcpyDtoHAsync(to, self.address(), self.len_bytes(), access.raw()) };
            // Nothing is before the copy on the stream, nor gets there as long as `access` is held.
            let arrived = until_ready(device, stream.name(), Duration::MAX, ask);
            return device.check(copied).and(arrived);
        }
    }

    /// Copies `src` in the order of `stream`, on the device.
    ///
    /// # Errors
    /// [`Error::DTypeMismatch`], [`Error::LengthMismatch`]; [`Error::InvalidArgument`] for a view or a stream of another
    /// device; what the driver says.
    pub fn copy_from(&self, src: &View, stream: &Stream) -> Result<()> {
        self.check_like(src.dtype, src.len_elems)?;
        self.check_stream(stream)?;
        src.check_stream(stream)?;
        if self.is_empty() {
            return Ok(());
        }
        let access = stream.access()?;
        access.keep(self);
        access.keep(src);
        // SAFETY: both are of this many bytes, and live as long as a graph that copies them.
        let copied = unsafe { cuMemcpyDtoDAsync(self.address(), src.address(), self.len_bytes(), access.raw()) };
        stream.device().check(copied)
    }

    /// Makes all bytes zero in the order of `stream`.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a stream of another device; what the driver says.
    pub fn zero(&self, stream: &Stream) -> Result<()> {
        self.check_stream(stream)?;
        if self.is_empty() {
            return Ok(());
        }
        let access = stream.access()?;
        access.keep(self);
        // SAFETY: the whole of the view, which lives as long as a graph that zeroes it.
        stream.device().check(unsafe { cuMemsetD8Async(self.address(), 0, self.len_bytes(), access.raw()) })
    }

    /// Freeing the memory waits for its own device, and not for another one's streams.
    pub(super) fn check_stream(&self, stream: &Stream) -> Result<()> {
        if self.device().is_same(stream.device()) {
            return Ok(());
        }
        Err(Error::InvalidArgument {
            argument: "stream",
            value: format!("{}, of device {}", stream.name(), stream.device().ordinal()),
            accepted: "must be of the device that the memory is on",
        })
    }

    fn check<T: Element>(&self, len_elems: usize) -> Result<()> {
        self.check_like(T::DTYPE, len_elems)
    }

    pub(super) fn check_like(&self, dtype: DType, len_elems: usize) -> Result<()> {
        if dtype != self.dtype {
            return Err(Error::DTypeMismatch {
                what: "buffer on the device".into(),
                expected: self.dtype,
                actual: dtype,
            });
        }
        if len_elems != self.len_elems {
            return Err(Error::LengthMismatch {
                what: "buffer on the device".into(),
                expected_elems: self.len_elems,
                actual_elems: len_elems,
            });
        }
        Ok(())
    }
}

impl std::fmt::Debug for View {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("View")
            .field("device", &self.device().ordinal())
            .field("dtype", &self.dtype)
            .field("len_elems", &self.len_elems)
            .finish()
    }
}

/// Zeroed memory of the host that devices reach directly, at the same address: for records that kernels write and the host
/// reads while they run.
pub struct Pinned {
    device: Device,
    memory: NonNull<u8>,
    len_bytes: usize,
}

// SAFETY: plain memory; who shares it accesses it by atomics or after the device's work, as `as_ptr` says.
unsafe impl Send for Pinned {}
// SAFETY: as for Send.
unsafe impl Sync for Pinned {}

impl Pinned {
    /// Allocates `len_bytes` of zeroes, reachable from every device of the process.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for 0 bytes; [`Error::NoSpace`]; what the driver says.
    pub fn zeroed(device: &Device, len_bytes: usize) -> Result<Pinned> {
        if len_bytes == 0 {
            return Err(Error::InvalidArgument {
                argument: "len_bytes of pinned memory",
                value: "0".into(),
                accepted: "must not be 0",
            });
        }
        device.bind()?;
        let flags = sys::CU_MEMHOSTALLOC_PORTABLE | sys::CU_MEMHOSTALLOC_DEVICEMAP;
        let no_space =
            |have_bytes: u64| Error::NoSpace { what: "pinned host memory", need_bytes: len_bytes as u64, have_bytes };
        let mut memory = std::ptr::null_mut();
        // SAFETY: writes one address; the memory is zeroed below, before anybody has it.
        let made = unsafe { cuMemHostAlloc(&mut memory, len_bytes, flags) };
        if made.is(CUresult::CUDA_ERROR_OUT_OF_MEMORY) {
            return Err(no_space(crate::world::memory::available_bytes()));
        }
        device.check(made)?;
        let memory = NonNull::new(memory.cast::<u8>()).ok_or_else(|| no_space(0))?;
        // SAFETY: `len_bytes` fresh bytes.
        unsafe { memory.as_ptr().write_bytes(0, len_bytes) };
        Ok(Pinned { device: device.clone(), memory, len_bytes })
    }

    /// First byte, page-aligned. What a kernel writes while the host looks is read by atomics.
    pub fn as_ptr(&self) -> NonNull<u8> {
        self.memory
    }

    /// The address for kernels' arguments: with unified addressing, which every 64-bit Linux driver has, the same.
    pub fn address(&self) -> u64 {
        self.memory.as_ptr().expose_provenance() as u64
    }

    /// Length in bytes.
    pub fn len_bytes(&self) -> usize {
        self.len_bytes
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let place = self.memory.as_ptr().expose_provenance();
        self.device.free("pinned memory", (), move |device| {
            // SAFETY: from `cuMemHostAlloc`, freed once; kernels that use it are waited for, as the module `free` says.
            device.check(unsafe { cuMemFreeHost(std::ptr::with_exposed_provenance_mut(place)) })
        });
    }
}

impl std::fmt::Debug for Pinned {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pinned").field("len_bytes", &self.len_bytes).finish()
    }
}
