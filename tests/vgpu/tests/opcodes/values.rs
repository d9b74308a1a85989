//! What instructions are tried on: of each type the values at which it goes wrong.

use std::num::NonZeroU32;

/// What a register of a type can hold.
pub trait Value: Copy + 'static {
    /// As registers are declared, and as they are loaded and stored.
    const DECLARED: &'static str;
    const MOVED: &'static str;

    fn hard() -> Vec<Self>;

    fn to_bits(self) -> u64;

    /// Whether the low bits of `bits` are this value.
    fn is_in(self, bits: u64) -> bool;
}

macro_rules! integer {
    ($($ty:ty as $unsigned:ty, $declared:literal, $moved:literal;)*) => {$(
        impl Value for $ty {
            const DECLARED: &'static str = $declared;
            const MOVED: &'static str = $moved;

            fn hard() -> Vec<$ty> {
                // Neighbours of zero, of powers of two and of both ends, and bytes that are all different.
                let mut values = vec![0x0123_4567_89ab_cdef_u64 as $ty, 0xfedc_ba98_7654_3210_u64 as $ty, 7, 33];
                for near in [0, 32, 0xff, <$unsigned>::MAX as u64 >> 1, <$unsigned>::MAX as u64 >> 16] {
                    values.extend([near, near.wrapping_add(1), near.wrapping_sub(1)].map(|value| value as $ty));
                }
                values.sort_unstable();
                values.dedup();
                values
            }

            fn to_bits(self) -> u64 {
                (self as $unsigned).into()
            }

            fn is_in(self, bits: u64) -> bool {
                bits as $unsigned == self as $unsigned
            }
        }
    )*};
}

integer! {
    u16 as u16, ".b16", "u16";
    i16 as u16, ".b16", "u16";
    u32 as u32, ".b32", "u32";
    i32 as u32, ".b32", "u32";
    u64 as u64, ".b64", "u64";
    i64 as u64, ".b64", "u64";
}

macro_rules! float {
    ($($ty:ident, $bits:ty, $declared:literal;)*) => {$(
        impl Value for $ty {
            const DECLARED: &'static str = concat!(".", $declared);
            const MOVED: &'static str = $declared;

            fn hard() -> Vec<$ty> {
                let ulp = $ty::EPSILON;
                let least = $ty::from_bits(1);
                let largest_subnormal = $ty::MIN_POSITIVE.next_down();
                let positive = [
                    0.0, 1.0, 1.0 + ulp, 1.0 - ulp / 2.0, ulp / 2.0, ulp, 0.1, 1.5, 2.5, 3.0, 7.0, 1e4, 3e9, 1e19, 1e-20,
                    least, 3.0 * least, largest_subnormal, $ty::MIN_POSITIVE, $ty::MAX.sqrt(), $ty::MAX, $ty::INFINITY,
                ];
                let nans = [$ty::NAN, -$ty::NAN, $ty::from_bits($ty::NAN.to_bits() | 0x1234)];
                positive.into_iter().flat_map(|value| [value, -value]).chain(nans).collect()
            }

            fn to_bits(self) -> u64 {
                $ty::to_bits(self).into()
            }

            /// Any NaN is as good as another here; which one arithmetic gives, `semantics.rs` says.
            fn is_in(self, bits: u64) -> bool {
                let other = $ty::from_bits(bits as $bits);
                self.is_nan() && other.is_nan() || $ty::to_bits(self) == bits as $bits
            }
        }
    )*};
}

float! {
    f32, u32, "f32";
    f64, u64, "f64";
}

impl Value for bool {
    const DECLARED: &'static str = ".pred";
    const MOVED: &'static str = "pred";

    fn hard() -> Vec<bool> {
        vec![false, true]
    }

    fn to_bits(self) -> u64 {
        self.into()
    }

    fn is_in(self, bits: u64) -> bool {
        bits as u32 == u32::from(self)
    }
}

macro_rules! listed {
    ($(#[$doc:meta] $name:ident($ty:ty), $values:expr;)*) => {$(
        #[$doc]
        #[derive(Clone, Copy)]
        pub struct $name(pub $ty);

        impl Value for $name {
            const DECLARED: &'static str = <$ty>::DECLARED;
            const MOVED: &'static str = <$ty>::MOVED;

            fn hard() -> Vec<$name> {
                $values.into_iter().map($name).collect()
            }

            fn to_bits(self) -> u64 {
                Value::to_bits(self.0)
            }

            fn is_in(self, bits: u64) -> bool {
                self.0.is_in(bits)
            }
        }
    )*};
}

listed! {
    /// How far to shift, or how long a field is: up to the width, over it, and far over it.
    Count(u32), [0, 1, 8, 16, 31, 32, 33, 63, 64, 65, 127, 128, 255, 256, 0x7fff_ffff, u32::MAX];
    /// Four nibbles that choose bytes, or the signs of bytes.
    Selector(u32), [0x3210, 0x7654, 0x5410, 0x7632, 0x0000, 0x8888, 0xfedc, 0x4f08, 0xabcd_1357];
    /// 16 bits that are a float: ordinary, subnormal, ends, infinities, NaN, either zero.
    Half(u16), [0, 1, 2, 0x3ff, 0x400, 0x401, 0x3bff, 0x3c00, 0x3c01, 0x7bff, 0x7c00, 0x7c01, 0x7e00, 0x7fff, 0x7f80,
        0x8000, 0x8001, 0x83ff, 0xb555, 0xfbff, 0xfc00, 0xffff];
    /// An f32 that is, or is next to, something that a float of 16 bits rounds on.
    Wide(f32), wide();
    /// A whole number that f64 holds, so that integers can say what products and sums of it are; and what is no number.
    Whole(f64), [0.0, -0.0, 1.0, -1.0, 3.0, 94_906_267.0, 134_217_729.0, -134_217_727.0, 9_007_199_254_740_991.0,
        -9_007_199_254_740_991.0, 9_007_199_254_740_992.0, f64::INFINITY, f64::NEG_INFINITY, f64::NAN];
    /// An f32 at which a conversion to an integer of 32 bits rounds or saturates.
    Fraction(f32), [0.0, -0.0, 0.5, -0.5, 0.999, -0.999, 1.0, -1.9, 2.5, 8_388_607.5, 2_147_483_520.0, 2_147_483_648.0,
        -2_147_483_648.0, -2_147_483_904.0, 1e20, -1e20, 1e-45, f32::INFINITY, f32::NEG_INFINITY, f32::NAN];
}

fn wide() -> Vec<f32> {
    let mut values = f32::hard();
    let near = |bits: u32| [bits - 1, bits, bits + 1].map(f32::from_bits);
    // Ties of bf16 and f16 on an even and an odd neighbour, where each overflows, and the subnormals of f16 with their ties.
    for tie in [0x3f80_8000, 0x3f81_8000, 0x3f80_1000, 0x3f80_3000, 0x7f7f_8000, 0xff7f_8000] {
        values.extend(near(tie));
    }
    for value in [65504.0f32, 65520.0, -65520.0, 2f32.powi(-14), 2f32.powi(-24), 2f32.powi(-25), 3.0 * 2f32.powi(-25)] {
        values.extend(near(value.to_bits()));
    }
    values
}

/// A divisor.
impl Value for NonZeroU32 {
    const DECLARED: &'static str = u32::DECLARED;
    const MOVED: &'static str = u32::MOVED;

    fn hard() -> Vec<NonZeroU32> {
        u32::hard().into_iter().filter_map(NonZeroU32::new).collect()
    }

    fn to_bits(self) -> u64 {
        self.get().into()
    }

    fn is_in(self, bits: u64) -> bool {
        self.get().is_in(bits)
    }
}
