//! Elements between memory and f32 lanes: one at a time without branches, so that loops over it vectorise at every level, or
//! sixteen by the processor's instructions.

use bytemuck::Pod;
use half::{bf16, f16};

use super::level::Level;

/// A float type whose arithmetic is done in f32.
pub(crate) trait Lane: Pod {
    /// The value; exact. NaN stays NaN; of f16 it is quiet.
    fn widen(self) -> f32;
    /// Nearest, ties to even; what is too large becomes infinite; NaN stays NaN, quiet, with its sign.
    fn narrow(value: f32) -> Self;
    /// As [`Lane::narrow`], but infinities, given or arising, become the largest finite value.
    fn narrow_saturating(value: f32) -> Self;
    /// Whether `widen_block` and `narrow_block` are more than loops over `widen` and `narrow`, which the compiler vectorises better
    /// where it sees them.
    #[inline(always)]
    fn has_blocks(_level: Level) -> bool {
        false
    }
    /// [`Lane::widen`] of each.
    #[inline(always)]
    fn widen_block(block: &[Self; BLOCK_ELEMS], _level: Level) -> [f32; BLOCK_ELEMS] {
        let mut wide = [0.0; BLOCK_ELEMS];
        for (wide, x) in wide.iter_mut().zip(block) {
            *wide = x.widen();
        }
        wide
    }
    /// [`Lane::narrow`] of each.
    #[inline(always)]
    fn narrow_block(wide: &[f32; BLOCK_ELEMS], _level: Level) -> [Self; BLOCK_ELEMS] {
        let mut block = [Self::zeroed(); BLOCK_ELEMS];
        for (x, wide) in block.iter_mut().zip(wide) {
            *x = Self::narrow(*wide);
        }
        block
    }
}

/// Elements that are converted together.
pub(crate) const BLOCK_ELEMS: usize = 16;

/// `dst = f(src)` in f32, as many as the shorter one has.
#[inline(always)]
pub(crate) fn map<S: Lane, D: Lane>(src: &[S], dst: &mut [D], level: Level, f: impl Fn(f32) -> f32) {
    if !S::has_blocks(level) && !D::has_blocks(level) {
        for (dst, src) in dst.iter_mut().zip(src) {
            *dst = D::narrow(f(src.widen()));
        }
        return;
    }
    let len = src.len().min(dst.len());
    let (src, src_tail) = src[..len].as_chunks();
    let (dst, dst_tail) = dst[..len].as_chunks_mut();
    for (dst, src) in dst.iter_mut().zip(src) {
        *dst = map_block(src, level, &f);
    }
    if src_tail.is_empty() {
        return;
    }
    let mut block = [S::zeroed(); BLOCK_ELEMS];
    block[..src_tail.len()].copy_from_slice(src_tail);
    dst_tail.copy_from_slice(&map_block::<S, D>(&block, level, &f)[..dst_tail.len()]);
}

/// `x = f(x)` in f32.
#[inline(always)]
pub(crate) fn map_in_place<T: Lane>(elements: &mut [T], level: Level, f: impl Fn(f32) -> f32) {
    if !T::has_blocks(level) {
        for x in elements {
            *x = T::narrow(f(x.widen()));
        }
        return;
    }
    let (blocks, tail) = elements.as_chunks_mut();
    for block in blocks {
        *block = map_block(block, level, &f);
    }
    if tail.is_empty() {
        return;
    }
    let mut block = [T::zeroed(); BLOCK_ELEMS];
    block[..tail.len()].copy_from_slice(tail);
    tail.copy_from_slice(&map_block::<T, T>(&block, level, &f)[..tail.len()]);
}

#[inline(always)]
fn map_block<S: Lane, D: Lane>(block: &[S; BLOCK_ELEMS], level: Level, f: impl Fn(f32) -> f32) -> [D; BLOCK_ELEMS] {
    let mut wide = S::widen_block(block, level);
    for x in &mut wide {
        *x = f(*x);
    }
    D::narrow_block(&wide, level)
}

impl Lane for f32 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }
    #[inline(always)]
    fn narrow(value: f32) -> f32 {
        value
    }
    #[inline(always)]
    fn narrow_saturating(value: f32) -> f32 {
        // Written so that NaN fails both comparisons.
        let value = if value > f32::MAX { f32::MAX } else { value };
        if value < f32::MIN { f32::MIN } else { value }
    }
}

impl Lane for bf16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
    #[inline(always)]
    fn narrow(value: f32) -> bf16 {
        let bits = value.to_bits();
        // Adding 0x7fff, or 0x8000 if the bit that stays last is odd, carries exactly when rounding goes up.
        let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
        bf16::from_bits(if is_nan(bits) { bits >> 16 | 0x0040 } else { rounded } as u16)
    }
    #[inline(always)]
    fn narrow_saturating(value: f32) -> bf16 {
        bf16::from_bits(finite(bf16::narrow(value).to_bits(), 0x7f80))
    }
}

impl Lane for f16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        let bits = u32::from(self.to_bits());
        let (sign, magnitude) = ((bits & 0x8000) << 16, bits & 0x7fff);
        // Exponent 31 (infinity, NaN) must become 255, all others gain the difference of the biases.
        let rebias = if magnitude >= 0x7c00 { (255 - 31) << 23 } else { (127 - 15) << 23 };
        let normal = (magnitude << 13) + rebias;
        // Subnormals are multiples of 2^-24. No operand is a subnormal f32: some processors take a hundred cycles for one, and
        // a library in the process may have told them to take it for 0.
        let subnormal = (magnitude as i32 as f32 * f32::from_bits((127 - 24) << 23)).to_bits();
        // Quiet, as the processors' own conversions make it.
        let quiet = if magnitude > 0x7c00 { 0x0040_0000 } else { 0 };
        f32::from_bits(sign | quiet | if magnitude < 0x0400 { subnormal } else { normal })
    }
    /// The processor's instructions: the arithmetic here is slower than memory.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    fn has_blocks(level: Level) -> bool {
        level >= Level::Avx2
    }
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    fn widen_block(block: &[f16; BLOCK_ELEMS], level: Level) -> [f32; BLOCK_ELEMS] {
        if Self::has_blocks(level) {
            // SAFETY: a level above `Portable` comes from `dispatch`, which has found its features.
            return unsafe { crate::f16c::widen(block) };
        }
        block.map(f16::widen)
    }
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    fn narrow_block(wide: &[f32; BLOCK_ELEMS], level: Level) -> [f16; BLOCK_ELEMS] {
        if Self::has_blocks(level) {
            // SAFETY: as above.
            return unsafe { crate::f16c::narrow(wide) };
        }
        wide.map(f16::narrow)
    }
    #[inline(always)]
    fn narrow(value: f32) -> f16 {
        let bits = value.to_bits();
        let (sign, magnitude) = ((bits >> 16) & 0x8000, bits & 0x7fff_ffff);
        // Normal results: rebias, then round as bf16 does; a carry out of the last binade gives the bits of infinity.
        let rebased = magnitude.wrapping_sub((127 - 15) << 23);
        let normal = rebased.wrapping_add(0x0fff + ((rebased >> 13) & 1)) >> 13;
        // Subnormal results (below 2^-14): in [0.5, 1) the last bit of an f32 is worth 2^-24, so the addition rounds.
        let subnormal = (f32::from_bits(magnitude) + 0.5).to_bits().wrapping_sub(0.5f32.to_bits());
        let finite = if magnitude < (127 - 14) << 23 { subnormal } else { normal };
        let finite_or_infinite = if magnitude >= (127 + 16) << 23 { 0x7c00 } else { finite };
        let nan = 0x7e00 | (magnitude >> 13 & 0x01ff);
        f16::from_bits((sign | if is_nan(bits) { nan } else { finite_or_infinite }) as u16)
    }
    #[inline(always)]
    fn narrow_saturating(value: f32) -> f16 {
        f16::from_bits(finite(f16::narrow(value).to_bits(), 0x7c00))
    }
}

#[inline(always)]
fn is_nan(bits: u32) -> bool {
    bits & 0x7fff_ffff > 0x7f80_0000
}

/// The 16-bit float with infinity replaced by its neighbour, the largest finite value.
#[inline(always)]
pub(crate) fn finite(bits: u16, infinity_bits: u16) -> u16 {
    bits - u16::from(bits & 0x7fff == infinity_bits)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference;

    #[test]
    fn every_16_bit_float_widens_exactly_and_comes_back() {
        for bits in 0..=u16::MAX {
            let (h, b) = (f16::from_bits(bits), bf16::from_bits(bits));
            if h.is_nan() {
                assert!(h.widen().is_nan() && f16::narrow(h.widen()).is_nan());
            } else {
                assert_eq!(h.widen().to_bits(), h.to_f32_const().to_bits());
                assert_eq!(f16::narrow(h.widen()).to_bits(), bits);
            }
            if b.is_nan() {
                assert!(b.widen().is_nan() && bf16::narrow(b.widen()).is_nan());
            } else {
                assert_eq!(b.widen().to_bits(), b.to_f32_const().to_bits());
                assert_eq!(bf16::narrow(b.widen()).to_bits(), bits);
            }
        }
    }

    #[test]
    fn narrowing_is_that_of_the_reference() {
        // 4,001 apart covers every exponent with every kind of low bits; the neighbours of each 16-bit float and of each
        // middle between two are added.
        let steps = (0..=u32::MAX).step_by(4001);
        let neighbours = (0..=u16::MAX).flat_map(|bits| {
            [f16::from_bits(bits).widen().to_bits(), u32::from(bits) << 16].into_iter().flat_map(|bits| {
                [0, 1, 0xfff, 0x1000, 0x1001, 0x7fff, 0x8000, 0x8001, u32::MAX].map(|add| bits.wrapping_add(add))
            })
        });
        for value in steps.chain(neighbours).map(f32::from_bits) {
            for (saturate, narrow_half, narrow_bfloat) in [
                (false, f16::narrow as fn(f32) -> f16, bf16::narrow as fn(f32) -> bf16),
                (true, f16::narrow_saturating, bf16::narrow_saturating),
            ] {
                let (half, bfloat) = (narrow_half(value), narrow_bfloat(value));
                if value.is_nan() {
                    assert!(half.is_nan() && half.to_bits() & 0x0200 != 0 && bfloat.is_nan());
                    assert!(bfloat.to_bits() & 0x0040 != 0 && half.is_sign_negative() == value.is_sign_negative());
                } else {
                    assert_eq!(half.to_bits(), reference::f32_to_f16(value, saturate).to_bits(), "{value:e}");
                    assert_eq!(bfloat.to_bits(), reference::f32_to_bf16(value, saturate).to_bits(), "{value:e}");
                }
            }
        }
        assert_eq!(f32::narrow_saturating(f32::NEG_INFINITY), f32::MIN);
        assert!(f32::narrow_saturating(f32::NAN).is_nan());
    }
}
