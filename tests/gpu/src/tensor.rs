//! Tensors of any float dtype on the host, with values that are hard on kernels.

use annulus::dtype::Element;
use annulus::ops::{Slice, SliceMut};
use annulus::{DType, reference};
use half::{bf16, f16};

/// Every float dtype.
pub const FLOATS: [DType; 4] = [DType::F32, DType::F16, DType::BF16, DType::F64];
/// Those whose arithmetic is f32.
pub const SINGLES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

/// Elements on the host.
#[derive(Debug, Clone)]
pub struct Tensor {
    dtype: DType,
    len_elems: usize,
    /// Backs elements of any dtype with their alignment.
    words: Vec<u64>,
}

/// Calls `$body` with `$type` as the element type of a float dtype.
#[macro_export]
macro_rules! with_float {
    ($dtype:expr, $type:ident => $body:expr) => {
        match $dtype {
            annulus::DType::F32 => {
                type $type = f32;
                $body
            }
            annulus::DType::F16 => {
                type $type = half::f16;
                $body
            }
            annulus::DType::BF16 => {
                type $type = half::bf16;
                $body
            }
            annulus::DType::F64 => {
                type $type = f64;
                $body
            }
            other => unreachable!("{other} is no float"),
        }
    };
}

/// What a tensor holds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Values {
    /// Of either sign, 20 binades below 1.
    Ordinary,
    /// Over the whole range of the dtype: denormals, both zeroes, the largest.
    Wide,
    /// Ordinary, but for one element.
    With(usize, f64),
}

impl Tensor {
    /// Zeroes.
    pub fn zeros(dtype: DType, len_elems: usize) -> Tensor {
        Tensor { dtype, len_elems, words: vec![0; (len_elems * dtype.size_bytes()).div_ceil(8)] }
    }

    /// `value(i)` rounded once to `dtype`.
    pub fn from_fn(dtype: DType, len_elems: usize, mut value: impl FnMut(usize) -> f64) -> Tensor {
        let mut tensor = Tensor::zeros(dtype, len_elems);
        match tensor.slice_mut() {
            SliceMut::F32(elements) => elements.iter_mut().enumerate().for_each(|(i, x)| *x = value(i) as f32),
            SliceMut::F64(elements) => elements.iter_mut().enumerate().for_each(|(i, x)| *x = value(i)),
            SliceMut::F16(elements) => {
                elements.iter_mut().enumerate().for_each(|(i, x)| *x = reference::f64_to_f16(value(i), false));
            }
            SliceMut::BF16(elements) => {
                elements.iter_mut().enumerate().for_each(|(i, x)| *x = reference::f64_to_bf16(value(i), false));
            }
        }
        tensor
    }

    /// Some `values`, the same for the same seed.
    pub fn of(dtype: DType, len_elems: usize, values: Values, seed: u64) -> Tensor {
        let mut random = Random(seed);
        match values {
            Values::Ordinary => Tensor::from_fn(dtype, len_elems, |_| random.spread(1.0, 20.0)),
            Values::With(at, value) => {
                Tensor::from_fn(dtype, len_elems, |i| if i == at { value } else { random.spread(1.0, 20.0) })
            }
            Values::Wide => {
                let (largest, octaves) = match dtype {
                    DType::F16 => (60_000.0, 42.0),
                    DType::F64 => (1e300, 2120.0),
                    _ => (3e38, 280.0),
                };
                Tensor::from_fn(dtype, len_elems, |i| match i % 97 {
                    11 => 0.0,
                    12 => -0.0,
                    _ => random.spread(largest, octaves),
                })
            }
        }
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Number of elements.
    pub fn len_elems(&self) -> usize {
        self.len_elems
    }

    /// The elements as bytes.
    pub fn bytes(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.words)[..self.len_elems * self.dtype.size_bytes()]
    }

    /// The elements, of which `T` is the type.
    pub fn elements<T: Element>(&self) -> &[T] {
        &bytemuck::cast_slice(&self.words)[..self.len_elems]
    }

    /// As [`Tensor::elements`].
    pub fn elements_mut<T: Element>(&mut self) -> &mut [T] {
        &mut bytemuck::cast_slice_mut(&mut self.words)[..self.len_elems]
    }

    /// For the operations of the host.
    pub fn slice(&self) -> Slice<'_> {
        match self.dtype {
            DType::F16 => Slice::F16(self.elements::<f16>()),
            DType::BF16 => Slice::BF16(self.elements::<bf16>()),
            DType::F64 => Slice::F64(self.elements::<f64>()),
            _ => Slice::F32(self.elements::<f32>()),
        }
    }

    /// For the operations of the host.
    pub fn slice_mut(&mut self) -> SliceMut<'_> {
        match self.dtype {
            DType::F16 => SliceMut::F16(self.elements_mut::<f16>()),
            DType::BF16 => SliceMut::BF16(self.elements_mut::<bf16>()),
            DType::F64 => SliceMut::F64(self.elements_mut::<f64>()),
            _ => SliceMut::F32(self.elements_mut::<f32>()),
        }
    }

    /// The first element whose bits differ from `other`'s, in words; NaNs are alike, as a GPU's arithmetic keeps no payload.
    pub fn difference(&self, other: &Tensor) -> Option<String> {
        if (self.dtype, self.len_elems) != (other.dtype, other.len_elems) {
            return Some(format!("{} {} against {} {}", self.len_elems, self.dtype, other.len_elems, other.dtype));
        }
        with_float!(self.dtype, T => first_difference(self.elements::<T>(), other.elements::<T>()))
    }
}

fn first_difference<T: Element>(left: &[T], right: &[T]) -> Option<String> {
    let bits = |x: &T| bytemuck::bytes_of(x).to_vec();
    let differ = |(_, (a, b)): &(usize, (&T, &T))| {
        let (x, y) = (a.to_f64(), b.to_f64());
        !(x.is_nan() && y.is_nan()) && (x != y || x.is_sign_negative() != y.is_sign_negative() || bits(a) != bits(b))
    };
    let found = left.iter().zip(right).enumerate().find(differ);
    found.map(|(at, (a, b))| format!("element {at} is {:e}, on the host {:e}", a.to_f64(), b.to_f64()))
}

/// A stream of random numbers (SplitMix64, Steele, Lea, Flood 2014).
#[derive(Debug)]
pub struct Random(pub u64);

impl Random {
    fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    /// Of either sign, over `octaves` binades below `largest`.
    fn spread(&mut self, largest: f64, octaves: f64) -> f64 {
        let unit = (self.bits() >> 11) as f64 * 2f64.powi(-53);
        // In two factors, as one power may lie below the least double.
        let half = (-octaves * unit / 2.0).exp2();
        let magnitude = largest * half * half;
        if self.bits() & 1 == 0 { magnitude } else { -magnitude }
    }
}
