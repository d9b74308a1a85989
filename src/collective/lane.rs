//! What one element type does in a reduction: widen, combine, scale, narrow; on small arrays the compiler keeps in
//! vector registers.

use half::{bf16, f16};

#[cfg(target_arch = "x86_64")]
use super::simd::AVX2;
use crate::dtype::Element;

/// Elements handled at once: four 512-bit registers of f32, so that several loads are in flight.
pub(super) const WIDTH: usize = 64;

/// An element type of a collective.
pub(super) trait Lane: Element {
    /// The type sums are kept in: f32 for 16-bit floats, the type itself otherwise.
    type Acc: Element;

    fn widen<const LEVEL: u8>(from: &[Self; WIDTH]) -> [Self::Acc; WIDTH];
    fn narrow<const LEVEL: u8>(from: &[Self::Acc; WIDTH]) -> [Self; WIDTH];

    fn add(a: Self::Acc, b: Self::Acc) -> Self::Acc;
    /// IEEE 754-2019 `minimum`: NaN if either is, -0.0 below +0.0.
    fn min(a: Self::Acc, b: Self::Acc) -> Self::Acc;
    /// IEEE 754-2019 `maximum`: NaN if either is, +0.0 above -0.0.
    fn max(a: Self::Acc, b: Self::Acc) -> Self::Acc;
    /// `a * factor`, the factor rounded to the accumulator type first. Not reached for integers.
    fn scale(a: Self::Acc, factor: f64) -> Self::Acc;
    /// `a / count` in the accumulator type. Not reached for integers.
    fn divide(a: Self::Acc, count: u32) -> Self::Acc;
}

macro_rules! float_arithmetic {
    ($acc:ty) => {
        #[inline(always)]
        fn add(a: $acc, b: $acc) -> $acc {
            a + b
        }
        #[inline(always)]
        fn min(a: $acc, b: $acc) -> $acc {
            let equal = <$acc>::from_bits(a.to_bits() | b.to_bits()); // -0.0 wins
            let smaller = if a < b { a } else { b };
            let ordered = if a == b { equal } else { smaller };
            if a.is_nan() { a } else { ordered }
        }
        #[inline(always)]
        fn max(a: $acc, b: $acc) -> $acc {
            let equal = <$acc>::from_bits(a.to_bits() & b.to_bits()); // +0.0 wins
            let larger = if a > b { a } else { b };
            let ordered = if a == b { equal } else { larger };
            if a.is_nan() { a } else { ordered }
        }
        #[inline(always)]
        fn scale(a: $acc, factor: f64) -> $acc {
            a * factor as $acc
        }
        #[inline(always)]
        fn divide(a: $acc, count: u32) -> $acc {
            a / count as $acc
        }
    };
}

macro_rules! same_type {
    () => {
        #[inline(always)]
        fn widen<const LEVEL: u8>(from: &[Self; WIDTH]) -> [Self; WIDTH] {
            *from
        }
        #[inline(always)]
        fn narrow<const LEVEL: u8>(from: &[Self; WIDTH]) -> [Self; WIDTH] {
            *from
        }
    };
}

impl Lane for f32 {
    type Acc = f32;
    same_type!();
    float_arithmetic!(f32);
}

impl Lane for f64 {
    type Acc = f64;
    same_type!();
    float_arithmetic!(f64);
}

macro_rules! integer {
    ($type:ty) => {
        impl Lane for $type {
            type Acc = $type;
            same_type!();
            #[inline(always)]
            fn add(a: $type, b: $type) -> $type {
                a.wrapping_add(b)
            }
            #[inline(always)]
            fn min(a: $type, b: $type) -> $type {
                Ord::min(a, b)
            }
            #[inline(always)]
            fn max(a: $type, b: $type) -> $type {
                Ord::max(a, b)
            }
            #[inline(always)]
            fn scale(a: $type, _factor: f64) -> $type {
                a
            }
            #[inline(always)]
            fn divide(a: $type, _count: u32) -> $type {
                a
            }
        }
    };
}

integer!(i32);
integer!(i64);
integer!(u8);

impl Lane for bf16 {
    type Acc = f32;
    float_arithmetic!(f32);

    #[inline(always)]
    fn widen<const LEVEL: u8>(from: &[bf16; WIDTH]) -> [f32; WIDTH] {
        std::array::from_fn(|i| f32::from_bits(u32::from(from[i].to_bits()) << 16))
    }

    /// Nearest, ties to even, by integer addition: the carry runs into the exponent as it should. NaN becomes the quiet
    /// NaN of its sign.
    #[inline(always)]
    fn narrow<const LEVEL: u8>(from: &[f32; WIDTH]) -> [bf16; WIDTH] {
        std::array::from_fn(|i| {
            let bits = from[i].to_bits();
            let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
            let nan = (bits >> 16 & 0x8000) | 0x7fc0;
            bf16::from_bits(if bits & 0x7fff_ffff > 0x7f80_0000 { nan } else { rounded } as u16)
        })
    }
}

impl Lane for f16 {
    type Acc = f32;
    float_arithmetic!(f32);

    #[inline(always)]
    fn widen<const LEVEL: u8>(from: &[f16; WIDTH]) -> [f32; WIDTH] {
        #[cfg(target_arch = "x86_64")]
        if LEVEL >= AVX2 {
            // SAFETY: the caller runs at this level only where the processor has F16C.
            return unsafe { crate::f16c::widen(from) };
        }
        std::array::from_fn(|i| from[i].to_f32_const())
    }

    #[inline(always)]
    fn narrow<const LEVEL: u8>(from: &[f32; WIDTH]) -> [f16; WIDTH] {
        #[cfg(target_arch = "x86_64")]
        if LEVEL >= AVX2 {
            // SAFETY: the caller runs at this level only where the processor has F16C.
            return unsafe { crate::f16c::narrow(from) };
        }
        std::array::from_fn(|i| f16::from_f32_const(from[i]))
    }
}
