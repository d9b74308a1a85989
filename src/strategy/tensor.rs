//! A buffer with a shape: what collectives, batches and state dicts are made of.

use std::fmt;

use half::{bf16, f16};

use super::cuda::DeviceMemory;
use super::storage::{OnHost, Storage};
use crate::device::Buffer;
use crate::dtype::{DType, Element};
use crate::error::{Error, Result};

#[cfg(not(target_endian = "little"))]
compile_error!("checkpoints hold little-endian elements and are read and written as they are in memory");

/// A dense row-major tensor.
///
/// It is storage with a shape, not a tensor of an autograd library: it knows no arithmetic. Its elements are on the host, or
/// on the device of the strategy that made it or moved it there.
pub struct Tensor {
    shape: Vec<usize>,
    storage: Storage,
}

impl Tensor {
    /// A private tensor of zeroes on the host. `Strategy::alloc` makes one that peers reach directly.
    ///
    /// # Errors
    /// [`Error::SizeOverflow`] if the product of the dimensions wraps, [`Error::NoSpace`] if there is no memory.
    pub fn zeroed(shape: &[usize], dtype: DType) -> Result<Tensor> {
        Ok(Tensor { shape: shape.to_vec(), storage: Buffer::zeroed(dtype, len_elems(shape)?)?.into() })
    }

    /// A private copy of `elements` on the host, row-major.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] if the shape does not hold that many, and as [`zeroed`](Tensor::zeroed).
    pub fn from_slice<T: Element>(shape: &[usize], elements: &[T]) -> Result<Tensor> {
        Tensor::from_buffer(shape, Buffer::from_slice(elements)?)
    }

    /// Gives `buffer` a shape.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] if the shape does not hold as many elements as the buffer.
    pub fn from_buffer(shape: &[usize], buffer: Buffer) -> Result<Tensor> {
        Tensor::over(shape, buffer.into())
    }

    /// Gives `storage` a shape.
    pub(crate) fn over(shape: &[usize], storage: Storage) -> Result<Tensor> {
        if len_elems(shape)? != storage.len_elems() {
            return Err(Error::ShapeMismatch {
                what: format!("tensor over a buffer of {} elements", storage.len_elems()),
                expected: vec![storage.len_elems()],
                actual: shape.to_vec(),
            });
        }
        Ok(Tensor { shape: shape.to_vec(), storage })
    }

    /// The same tensor over `storage`, which holds as many elements.
    pub(crate) fn moved_to(self, storage: Storage) -> Tensor {
        debug_assert_eq!(self.len_elems(), storage.len_elems());
        Tensor { storage, ..self }
    }

    /// The dimensions, slowest first. Empty for a scalar.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.storage.dtype()
    }

    /// Number of elements.
    pub fn len_elems(&self) -> usize {
        self.storage.len_elems()
    }

    /// The elements, row-major.
    ///
    /// # Errors
    /// [`Error::DTypeMismatch`] if `T` is not the element type; [`Error::InvalidArgument`] for a tensor on a device.
    pub fn as_slice<T: Element>(&self) -> Result<&[T]> {
        self.storage.host("as_slice")?.as_slice()
    }

    /// The elements, to write.
    ///
    /// # Errors
    /// As [`as_slice`](Tensor::as_slice).
    pub fn as_mut_slice<T: Element>(&mut self) -> Result<&mut [T]> {
        self.storage.host_mut("as_mut_slice")?.as_mut_slice()
    }

    /// The elements' memory, if it is on the host.
    pub fn buffer(&self) -> Option<&Buffer> {
        self.storage.host("buffer").ok()
    }

    /// A copy of the elements, row-major, wherever they are.
    ///
    /// # Errors
    /// [`Error::DTypeMismatch`] if `T` is not the element type; what the device failed with.
    ///
    /// # Synchronization
    /// As [`to_host`](Tensor::to_host).
    pub fn to_vec<T: Element>(&self) -> Result<Vec<T>> {
        Ok(self.on_host()?.as_slice()?.to_vec())
    }

    /// Overwrites the elements, row-major, wherever they are.
    ///
    /// # Errors
    /// [`Error::DTypeMismatch`], [`Error::LengthMismatch`]; what the driver says.
    ///
    /// # Synchronization
    /// On a device in the order of the strategy's compute stream; `elements` may be changed when the call returns.
    pub fn write<T: Element>(&mut self, elements: &[T]) -> Result<()> {
        if elements.len() != self.len_elems() {
            return Err(Error::LengthMismatch {
                what: "tensor".to_owned(),
                expected_elems: self.len_elems(),
                actual_elems: elements.len(),
            });
        }
        self.storage.overwrite(|buffer| {
            buffer.as_mut_slice::<T>()?.copy_from_slice(elements);
            Ok(())
        })
    }

    /// A copy on the host.
    ///
    /// # Errors
    /// [`Error::NoSpace`]; what the device failed with.
    ///
    /// # Synchronization
    /// For a tensor on a device, waits for everything that was enqueued there.
    pub fn to_host(&self) -> Result<Tensor> {
        let mut copy = Tensor::zeroed(&self.shape, self.dtype())?;
        let from = self.storage.on_host()?;
        bytes_mut(copy.storage.host_mut("to_host")?).copy_from_slice(bytes(&from));
        Ok(copy)
    }

    /// The elements on the device, as operations that are enqueued take them; `None` for a tensor on the host.
    #[cfg(all(feature = "cuda", not(loom)))]
    pub fn device_view(&self) -> Option<crate::device::cuda::View> {
        self.device_memory().map(DeviceMemory::view)
    }

    pub(crate) fn device_memory(&self) -> Option<&DeviceMemory> {
        match &self.storage {
            Storage::Host(_) => None,
            Storage::Device(memory) => Some(memory),
        }
    }

    pub(crate) fn storage_mut(&mut self) -> &mut Storage {
        &mut self.storage
    }

    pub(crate) fn on_host(&self) -> Result<OnHost<'_>> {
        self.storage.on_host()
    }
}

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tensor({} {:?})", self.dtype(), self.shape)
    }
}

/// Two tensors are equal if they have the same type, shape and bits; so NaN equals itself and 0.0 is not -0.0. Elements on a
/// device are copied for it, and are equal to nothing if they cannot be.
impl PartialEq for Tensor {
    fn eq(&self, other: &Tensor) -> bool {
        self.shape == other.shape
            && self.dtype() == other.dtype()
            && matches!((self.on_host(), other.on_host()), (Ok(a), Ok(b)) if bytes(&a) == bytes(&b))
    }
}

/// Elements of a tensor of this shape.
pub(crate) fn len_elems(shape: &[usize]) -> Result<usize> {
    shape
        .iter()
        .try_fold(1_usize, |product, dim| product.checked_mul(*dim))
        .ok_or_else(|| Error::SizeOverflow { what: "number of elements", detail: format!("shape {shape:?}") })
}

/// Runs `$body` with `$T` as the Rust type of elements of type `$dtype`.
macro_rules! with_element {
    ($dtype:expr, $T:ident => $body:expr) => {
        match $dtype {
            $crate::dtype::DType::F32 => {
                type $T = f32;
                $body
            }
            $crate::dtype::DType::F16 => {
                type $T = half::f16;
                $body
            }
            $crate::dtype::DType::BF16 => {
                type $T = half::bf16;
                $body
            }
            $crate::dtype::DType::F64 => {
                type $T = f64;
                $body
            }
            $crate::dtype::DType::I32 => {
                type $T = i32;
                $body
            }
            $crate::dtype::DType::I64 => {
                type $T = i64;
                $body
            }
            $crate::dtype::DType::U8 => {
                type $T = u8;
                $body
            }
        }
    };
}
pub(crate) use with_element;

/// The bytes of a buffer.
pub(crate) fn bytes(buffer: &Buffer) -> &[u8] {
    // The arm taken is that of the buffer's own type, so there is always a slice.
    with_element!(buffer.dtype(), T => bytemuck::cast_slice(buffer.as_slice::<T>().unwrap_or(&[])))
}

/// The bytes of a buffer, to write.
pub(crate) fn bytes_mut(buffer: &mut Buffer) -> &mut [u8] {
    with_element!(buffer.dtype(), T => bytemuck::cast_slice_mut(buffer.as_mut_slice::<T>().unwrap_or(&mut [])))
}

/// Copies `source` into `target` element by element, converting through f32 (nearest, ties to even): how a parameter of any
/// float type is filled.
pub(crate) fn fill_from_f32(target: &mut Buffer, source: &[f32]) -> Result<()> {
    if target.len_elems() != source.len() {
        return Err(Error::LengthMismatch {
            what: "initial values".to_owned(),
            expected_elems: target.len_elems(),
            actual_elems: source.len(),
        });
    }
    match target.dtype() {
        DType::F32 => target.as_mut_slice::<f32>()?.copy_from_slice(source),
        DType::BF16 => {
            target.as_mut_slice::<bf16>()?.iter_mut().zip(source).for_each(|(to, from)| *to = bf16::from_f32(*from));
        }
        DType::F16 => {
            target.as_mut_slice::<f16>()?.iter_mut().zip(source).for_each(|(to, from)| *to = f16::from_f32(*from));
        }
        DType::F64 => {
            target.as_mut_slice::<f64>()?.iter_mut().zip(source).for_each(|(to, from)| *to = f64::from(*from));
        }
        dtype => return Err(Error::Unsupported { op: "filling from f32".to_owned(), dtype }),
    }
    Ok(())
}
