//! Inputs that repeat, and the comparisons all tests use.

use annulus::ops::{Level, Slice, SliceMut};
use annulus::reference::philox4x32_10;
use annulus::{DType, Element};
use half::{bf16, f16};

/// Lengths around every border that the kernels have: vectors, lanes (32), blocks (128), tiles (1,024), runs (2,048), chunks (32,768).
pub const LENS: [usize; 20] =
    [0, 1, 2, 7, 8, 15, 31, 63, 64, 65, 127, 129, 1021, 1024, 1025, 2047, 2049, 4099, 32_768, 40_009];

pub const FLOATS: [DType; 4] = [DType::F32, DType::F16, DType::BF16, DType::F64];

/// Values at which float code goes wrong.
pub const SPECIALS: [f32; 20] = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    f32::MIN_POSITIVE,
    -f32::MIN_POSITIVE / 2.0,
    1e-45,
    6e-8,
    -2.9e-8,
    6.1e-5,
    65504.0,
    65519.99,
    65520.0,
    -65536.0,
    3.39e38,
    f32::MAX,
    f32::MIN,
    f32::INFINITY,
    f32::NEG_INFINITY,
    f32::NAN,
];

/// Uniform in `[-1, 1)`, the `index`-th of the stream `seed`.
pub fn uniform(seed: u64, index: usize) -> f32 {
    let words = philox4x32_10([index as u32, (index as u64 >> 32) as u32, 0, 0], [seed as u32, (seed >> 32) as u32]);
    (words[0] >> 8) as f32 * (2.0 / 16_777_216.0) - 1.0
}

pub fn uniforms(seed: u64, len: usize) -> Vec<f32> {
    (0..len).map(|index| uniform(seed, index)).collect()
}

/// Numbers of every exponent with the special values strewn in.
pub fn wild(seed: u64, len: usize) -> Vec<f32> {
    (0..len)
        .map(|index| {
            let [word, choice, ..] = philox4x32_10([index as u32, 1, 0, 0], [seed as u32, 7]);
            if choice % 8 == 0 { SPECIALS[word as usize % SPECIALS.len()] } else { f32::from_bits(word) }
        })
        .collect()
}

/// A tensor of any float dtype that owns its elements.
#[derive(Debug, Clone)]
pub enum Tensor {
    F32(Vec<f32>),
    F16(Vec<f16>),
    BF16(Vec<bf16>),
    F64(Vec<f64>),
}

macro_rules! on_tensor {
    ($tensor:expr, $elements:ident => $body:expr) => {
        match $tensor {
            Tensor::F32($elements) => $body,
            Tensor::F16($elements) => $body,
            Tensor::BF16($elements) => $body,
            Tensor::F64($elements) => $body,
        }
    };
}

impl Tensor {
    /// The values rounded to `dtype` by the reference.
    pub fn from_f64(dtype: DType, values: impl Iterator<Item = f64>) -> Tensor {
        match dtype {
            DType::F16 => Tensor::F16(values.map(|x| annulus::reference::f64_to_f16(x, false)).collect()),
            DType::BF16 => Tensor::BF16(values.map(|x| annulus::reference::f64_to_bf16(x, false)).collect()),
            DType::F64 => Tensor::F64(values.collect()),
            _ => Tensor::F32(values.map(|x| x as f32).collect()),
        }
    }

    pub fn from_f32(dtype: DType, values: &[f32]) -> Tensor {
        Tensor::from_f64(dtype, values.iter().map(|x| f64::from(*x)))
    }

    pub fn to_f64(&self) -> Vec<f64> {
        on_tensor!(self, elements => elements.iter().map(|x| x.to_f64()).collect())
    }

    pub fn slice(&self) -> Slice<'_> {
        on_tensor!(self, elements => elements.as_slice().into())
    }

    pub fn slice_from(&self, start: usize) -> Slice<'_> {
        on_tensor!(self, elements => elements[start..].into())
    }

    pub fn slice_mut(&mut self) -> SliceMut<'_> {
        on_tensor!(self, elements => elements.as_mut_slice().into())
    }

    pub fn slice_mut_from(&mut self, start: usize) -> SliceMut<'_> {
        on_tensor!(self, elements => (&mut elements[start..]).into())
    }

    /// What must not differ between levels: the bits, but for the payload of a NaN, which Rust leaves open.
    pub fn bits(&self) -> Vec<u64> {
        self.to_f64().into_iter().map(|x| if x.is_nan() { u64::MAX } else { x.to_bits() }).collect()
    }

    pub fn bytes(&self) -> &[u8] {
        on_tensor!(self, elements => bytemuck::cast_slice(elements))
    }
}

/// Equal as numbers and in the sign of zeros; NaN equals NaN.
#[track_caller]
pub fn assert_same(actual: &[f64], expected: &[f64], what: &str) {
    assert_eq!(actual.len(), expected.len(), "{what}");
    for (index, (a, e)) in actual.iter().zip(expected).enumerate() {
        assert!(
            a.to_bits() == e.to_bits() || a.is_nan() && e.is_nan(),
            "{what}: element {index} is {a:e}, expected {e:e}"
        );
    }
}

/// Runs `f` at every level that this CPU has and checks that all give the same.
#[track_caller]
pub fn at_every_level<R: PartialEq + std::fmt::Debug>(f: impl Fn() -> R) -> R {
    let mut results = Level::ALL.into_iter().filter_map(|level| level.with(&f).map(|result| (level, result)));
    let (_, first) = results.next().expect("the portable level is always there");
    for (level, result) in results {
        assert_eq!(result, first, "{level:?} differs from the portable level");
    }
    first
}
