//! Element types, reductions and norm types: the words every layer shares.

#![forbid(unsafe_code)]

use std::fmt;

use bytemuck::Pod;
use half::{bf16, f16};

use crate::error::{Error, Result};

/// Type of one element of a buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum DType {
    /// IEEE 754 binary32.
    F32 = 0,
    /// IEEE 754 binary16.
    F16 = 1,
    /// The upper half of a binary32.
    BF16 = 2,
    /// IEEE 754 binary64.
    F64 = 3,
    /// Two's complement, 32 bits.
    I32 = 4,
    /// Two's complement, 64 bits.
    I64 = 5,
    /// Unsigned byte.
    U8 = 6,
}

impl DType {
    /// Every element type, in the order of their codes.
    pub const ALL: [DType; 7] = [DType::F32, DType::F16, DType::BF16, DType::F64, DType::I32, DType::I64, DType::U8];

    /// Size of one element.
    pub const fn size_bytes(self) -> usize {
        match self {
            DType::U8 => 1,
            DType::F16 | DType::BF16 => 2,
            DType::F32 | DType::I32 => 4,
            DType::F64 | DType::I64 => 8,
        }
    }

    /// Whether the type is a floating-point type.
    pub const fn is_float(self) -> bool {
        matches!(self, DType::F32 | DType::F16 | DType::BF16 | DType::F64)
    }

    /// Whether sums of this type are accumulated in a wider one (f32).
    pub const fn is_half(self) -> bool {
        matches!(self, DType::F16 | DType::BF16)
    }

    /// The name as written in tables, checkpoints and on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            DType::F32 => "f32",
            DType::F16 => "f16",
            DType::BF16 => "bf16",
            DType::F64 => "f64",
            DType::I32 => "i32",
            DType::I64 => "i64",
            DType::U8 => "u8",
        }
    }

    /// The type with this code, if there is one.
    pub fn from_code(code: u8) -> Option<DType> {
        DType::ALL.get(usize::from(code)).copied()
    }

    /// Bytes of `len_elems` elements.
    ///
    /// # Errors
    /// [`Error::SizeOverflow`] if the product does not fit `isize`, the limit of one allocation.
    pub fn bytes_of(self, len_elems: usize) -> Result<usize> {
        len_elems.checked_mul(self.size_bytes()).filter(|bytes| isize::try_from(*bytes).is_ok()).ok_or_else(|| {
            Error::SizeOverflow { what: "buffer size", detail: format!("{len_elems} elements of {self}") }
        })
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for DType {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        DType::ALL.into_iter().find(|dtype| dtype.name() == name).ok_or_else(|| Error::InvalidArgument {
            argument: "dtype",
            value: name.to_owned(),
            accepted: "one of f32, f16, bf16, f64, i32, i64, u8",
        })
    }
}

mod sealed {
    pub trait Sealed {}
}

/// A Rust type that can be an element of a buffer. Sealed: the set is the one of [`DType`].
pub trait Element: Pod + Send + Sync + PartialEq + PartialOrd + fmt::Debug + sealed::Sealed {
    /// The code of this type.
    const DTYPE: DType;

    /// Widens to `f64` (exact but for `i64` beyond 2^53).
    fn to_f64(self) -> f64;

    /// Rounds from `f64`: to nearest, ties to even, for floats; truncates and saturates for integers. Meant for inputs
    /// and references; 16-bit floats by the conversion of `half`, which may round twice.
    fn from_f64(value: f64) -> Self;
}

macro_rules! element {
    ($($type:ty, $dtype:ident, $to:expr, $from:expr;)*) => {$(
        impl sealed::Sealed for $type {}
        impl Element for $type {
            const DTYPE: DType = DType::$dtype;
            fn to_f64(self) -> f64 {
                $to(self)
            }
            fn from_f64(value: f64) -> Self {
                $from(value)
            }
        }
    )*};
}

element! {
    f32, F32, f64::from, |value: f64| value as f32;
    f16, F16, f16::to_f64, f16::from_f64;
    bf16, BF16, bf16::to_f64, bf16::from_f64;
    f64, F64, |value| value, |value| value;
    i32, I32, f64::from, |value: f64| value as i32;
    i64, I64, |value: i64| value as f64, |value: f64| value as i64;
    u8, U8, f64::from, |value: f64| value as u8;
}

/// How a reduction combines the ranks' elements.
///
/// 16-bit floats are accumulated in f32 and rounded once at the end. NaN, infinities and -0.0 follow IEEE 754; `Min` and
/// `Max` propagate NaN.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum ReduceOp {
    /// Sum over the ranks. Integers wrap.
    Sum,
    /// Sum divided by the exact number of ranks, in f32 (f64 for f64). Not defined for integers.
    Avg,
    /// Smallest element.
    Min,
    /// Largest element.
    Max,
    /// Each rank's element is multiplied by the factor (f32; f64 for f64) before it is added. Not defined for integers.
    /// Every rank passes the same factor.
    PremulSum(f64),
}

impl ReduceOp {
    /// Lower-case name, as in the bench table.
    pub const fn name(self) -> &'static str {
        match self {
            ReduceOp::Sum => "sum",
            ReduceOp::Avg => "avg",
            ReduceOp::Min => "min",
            ReduceOp::Max => "max",
            ReduceOp::PremulSum(_) => "premulsum",
        }
    }

    /// Fails unless the reduction is defined for `dtype`.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for `Avg` and `PremulSum` of integers.
    pub fn check(self, dtype: DType) -> Result<()> {
        match self {
            ReduceOp::Avg | ReduceOp::PremulSum(_) if !dtype.is_float() => {
                Err(Error::Unsupported { op: format!("reduction {}", self.name()), dtype })
            }
            _ => Ok(()),
        }
    }
}

impl fmt::Display for ReduceOp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ReduceOp::PremulSum(factor) => write!(f, "premulsum({factor})"),
            op => f.write_str(op.name()),
        }
    }
}

/// Which norm of the gradients is taken.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum NormType {
    /// Sum of absolute values.
    L1,
    /// Root of the sum of squares.
    L2,
    /// Largest absolute value; NaN if any element is NaN.
    Inf,
    /// `(sum |g|^p)^(1/p)`, `p` finite and positive.
    P(f64),
}

impl NormType {
    /// Fails unless the norm is defined.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if `P(p)` is not finite and positive.
    pub fn check(self) -> Result<()> {
        match self {
            NormType::P(p) if !(p.is_finite() && p > 0.0) => Err(Error::InvalidArgument {
                argument: "norm_type",
                value: format!("P({p})"),
                accepted: "p must be finite and positive; the maximum norm is NormType::Inf",
            }),
            _ => Ok(()),
        }
    }
}
