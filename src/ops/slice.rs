//! Borrowed tensors of any float dtype, flat.

use half::{bf16, f16};

use crate::dtype::DType;

/// A tensor that is read: its elements in order, whatever its shape.
#[derive(Debug, Clone, Copy)]
pub enum Slice<'a> {
    /// f32 elements.
    F32(&'a [f32]),
    /// f16 elements.
    F16(&'a [f16]),
    /// bf16 elements.
    BF16(&'a [bf16]),
    /// f64 elements.
    F64(&'a [f64]),
}

/// A tensor that is written, or updated in place.
#[derive(Debug)]
pub enum SliceMut<'a> {
    /// f32 elements.
    F32(&'a mut [f32]),
    /// f16 elements.
    F16(&'a mut [f16]),
    /// bf16 elements.
    BF16(&'a mut [bf16]),
    /// f64 elements.
    F64(&'a mut [f64]),
}

macro_rules! on_slice {
    ($slice:expr, $elements:ident => $body:expr) => {
        match $slice {
            Self::F32($elements) => $body,
            Self::F16($elements) => $body,
            Self::BF16($elements) => $body,
            Self::F64($elements) => $body,
        }
    };
}

impl Slice<'_> {
    /// Number of elements.
    pub const fn len_elems(&self) -> usize {
        on_slice!(self, elements => elements.len())
    }

    /// Element type.
    pub const fn dtype(&self) -> DType {
        match self {
            Slice::F32(_) => DType::F32,
            Slice::F16(_) => DType::F16,
            Slice::BF16(_) => DType::BF16,
            Slice::F64(_) => DType::F64,
        }
    }
}

impl SliceMut<'_> {
    /// Number of elements.
    pub const fn len_elems(&self) -> usize {
        on_slice!(self, elements => elements.len())
    }

    /// Element type.
    pub const fn dtype(&self) -> DType {
        self.as_slice().dtype()
    }

    /// The same tensor, for reading.
    pub const fn as_slice(&self) -> Slice<'_> {
        match self {
            SliceMut::F32(elements) => Slice::F32(elements),
            SliceMut::F16(elements) => Slice::F16(elements),
            SliceMut::BF16(elements) => Slice::BF16(elements),
            SliceMut::F64(elements) => Slice::F64(elements),
        }
    }

    /// The same tensor, to pass on without giving it away.
    pub const fn reborrow(&mut self) -> SliceMut<'_> {
        match self {
            SliceMut::F32(elements) => SliceMut::F32(elements),
            SliceMut::F16(elements) => SliceMut::F16(elements),
            SliceMut::BF16(elements) => SliceMut::BF16(elements),
            SliceMut::F64(elements) => SliceMut::F64(elements),
        }
    }
}

macro_rules! from_elements {
    ($($element:ty => $variant:ident),*) => {$(
        impl<'a> From<&'a [$element]> for Slice<'a> {
            fn from(elements: &'a [$element]) -> Self {
                Slice::$variant(elements)
            }
        }
        impl<'a> From<&'a mut [$element]> for SliceMut<'a> {
            fn from(elements: &'a mut [$element]) -> Self {
                SliceMut::$variant(elements)
            }
        }
    )*};
}

from_elements!(f32 => F32, f16 => F16, bf16 => BF16, f64 => F64);
