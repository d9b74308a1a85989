//! Buffers: memory of one element type with one owner.

use std::ptr::NonNull;
use std::sync::Arc;

use crate::dtype::{DType, Element};
use crate::error::{Error, Result};
use crate::world::World;
use crate::world::memory::available_bytes;

/// Alignment of every buffer: a cache line, so that neighbours never share one and vectors load aligned.
pub const ALIGN_BYTES: usize = 64;

/// From this size on it is worth 0.1 ms to ask how much memory there is.
const ASK_FIRST_BYTES: usize = 64 << 20;

#[derive(Clone, Copy, bytemuck::Zeroable, bytemuck::Pod)]
#[repr(C, align(64))]
struct Line([u8; ALIGN_BYTES]);

/// Where a buffer's bytes are. Kept alive by the buffer and by every operation in flight on it.
pub(crate) trait Memory: Send + Sync {
    /// First byte; aligned to [`ALIGN_BYTES`].
    fn as_ptr(&self) -> NonNull<u8>;
    /// Length in bytes.
    fn len_bytes(&self) -> usize;
    /// For memory that peers reach: the membership whose arena it lies in, and its offset there.
    fn registration(&self) -> Option<(&World, usize)>;
    /// Never to be used again, not even by a later owner: a peer may still read and write it.
    fn abandon(&self);
}

/// Memory of this process alone.
struct Private {
    lines: Box<[std::cell::UnsafeCell<Line>]>,
}

// SAFETY: the cells are only reached through the one `Buffer` that owns them or the one operation it was moved into.
unsafe impl Sync for Private {}

impl Memory for Private {
    fn as_ptr(&self) -> NonNull<u8> {
        // A boxed slice is never at address 0; an empty one dangles, aligned.
        NonNull::new(self.lines.as_ptr().cast_mut().cast()).unwrap_or(NonNull::<Line>::dangling().cast())
    }

    fn len_bytes(&self) -> usize {
        self.lines.len() * ALIGN_BYTES
    }

    fn registration(&self) -> Option<(&World, usize)> {
        None
    }

    fn abandon(&self) {} // no peer reaches it
}

/// `len_elems` elements of one type, aligned to 64 bytes. Not `Clone`: who holds the buffer may write it, and an
/// operation in flight takes the buffer and gives it back when it is done.
///
/// *Private* buffers are ordinary memory; *registered* ones lie in the rank's [`Arena`](super::Arena), where peers
/// reach them directly, and collectives on them move each byte once less.
pub struct Buffer {
    memory: Arc<dyn Memory>,
    dtype: DType,
    len_elems: usize,
}

impl Buffer {
    /// A private buffer of zeroes.
    ///
    /// # Errors
    /// [`Error::SizeOverflow`] if the size does not fit the address space, [`Error::NoSpace`] if there is no memory.
    pub fn zeroed(dtype: DType, len_elems: usize) -> Result<Buffer> {
        let len_bytes = dtype.bytes_of(len_elems)?;
        let no_space = |have_bytes| {
            let need_bytes = len_bytes as u64;
            Error::NoSpace { what: "a private buffer", need_bytes, have_bytes }
        };
        if len_bytes >= ASK_FIRST_BYTES {
            // The allocator gives out more than there is, and who then writes the zeroes is killed.
            let have_bytes = available_bytes();
            if len_bytes as u64 > have_bytes {
                return Err(no_space(have_bytes));
            }
        }
        let lines: Box<[Line]> = bytemuck::allocation::try_zeroed_slice_box(len_bytes.div_ceil(ALIGN_BYTES))
            .map_err(|()| no_space(available_bytes()))?;
        let raw = Box::into_raw(lines) as *mut [std::cell::UnsafeCell<Line>];
        // SAFETY: UnsafeCell<Line> has the layout of Line, and the box was just given up.
        let lines = unsafe { Box::from_raw(raw) };
        Ok(Buffer { memory: Arc::new(Private { lines }), dtype, len_elems })
    }

    /// A private copy of `elements`.
    ///
    /// # Errors
    /// As [`zeroed`](Buffer::zeroed).
    pub fn from_slice<T: Element>(elements: &[T]) -> Result<Buffer> {
        let mut buffer = Buffer::zeroed(T::DTYPE, elements.len())?;
        buffer.as_mut_slice::<T>()?.copy_from_slice(elements);
        Ok(buffer)
    }

    /// Over memory of another kind; `dtype.bytes_of(len_elems)` bytes of it.
    pub(crate) fn over(memory: Arc<dyn Memory>, dtype: DType, len_elems: usize) -> Result<Buffer> {
        let need = dtype.bytes_of(len_elems)?;
        if need > memory.len_bytes() {
            return Err(Error::NoSpace {
                what: "a buffer in its memory",
                need_bytes: need as u64,
                have_bytes: memory.len_bytes() as u64,
            });
        }
        Ok(Buffer { memory, dtype, len_elems })
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

    /// Whether peers reach the memory directly.
    pub fn is_registered(&self) -> bool {
        self.memory.registration().is_some()
    }

    /// The elements.
    ///
    /// # Errors
    /// [`Error::DTypeMismatch`] if `T` is not the buffer's element type.
    pub fn as_slice<T: Element>(&self) -> Result<&[T]> {
        self.check::<T>()?;
        // SAFETY: the memory is valid, aligned and initialised for `len_elems` of T (checked at creation and above), and
        // nobody writes it while the buffer is borrowed: operations own the buffer they write.
        Ok(unsafe { std::slice::from_raw_parts(self.memory.as_ptr().as_ptr().cast::<T>(), self.len_elems) })
    }

    /// The elements, to write.
    ///
    /// # Errors
    /// [`Error::DTypeMismatch`] if `T` is not the buffer's element type.
    pub fn as_mut_slice<T: Element>(&mut self) -> Result<&mut [T]> {
        self.check::<T>()?;
        // SAFETY: as in `as_slice`; the exclusive borrow of the only owner makes it the only access.
        Ok(unsafe { std::slice::from_raw_parts_mut(self.memory.as_ptr().as_ptr().cast::<T>(), self.len_elems) })
    }

    pub(crate) fn memory(&self) -> &Arc<dyn Memory> {
        &self.memory
    }

    fn check<T: Element>(&self) -> Result<()> {
        if T::DTYPE == self.dtype {
            return Ok(());
        }
        Err(Error::DTypeMismatch { what: "buffer".into(), expected: self.dtype, actual: T::DTYPE })
    }
}

impl std::fmt::Debug for Buffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Buffer")
            .field("dtype", &self.dtype)
            .field("len_elems", &self.len_elems)
            .field("is_registered", &self.is_registered())
            .finish()
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_is_zeroed_aligned_and_typed() {
        for len_elems in [0, 1, 17, 4099] {
            let mut buffer = Buffer::zeroed(DType::F32, len_elems).unwrap();
            assert_eq!(buffer.as_slice::<f32>().unwrap().as_ptr() as usize % ALIGN_BYTES, 0);
            assert!(buffer.as_slice::<f32>().unwrap().iter().all(|value| *value == 0.0));
            assert!(matches!(buffer.as_mut_slice::<i32>(), Err(Error::DTypeMismatch { .. })));
            assert_eq!(buffer.len_bytes(), 4 * len_elems);
        }
        assert_eq!(Buffer::from_slice(&[1u8, 2, 3]).unwrap().as_slice::<u8>().unwrap(), [1, 2, 3]);
    }

    #[test]
    fn sizes_that_cannot_be_are_errors() {
        assert!(matches!(Buffer::zeroed(DType::F64, usize::MAX / 4), Err(Error::SizeOverflow { .. })));
        assert!(matches!(Buffer::zeroed(DType::U8, isize::MAX as usize - 100), Err(Error::NoSpace { .. })));
    }
}
