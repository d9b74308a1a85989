//! Reductions of 16-bit floats with AVX-512: what `combine.rs` does, with the conversions in registers.
//!
//! The portable blocks of `combine.rs` go through the stack where the types differ in width: at 64 KiB they take 2.4 times
//! as long as f32 of the same bytes. Here 32 elements are one register of 16-bit words, and two of f32 in between:
//!
//! ```text
//!   bf16:  word pairs | odd, even |  --shift left 16-->  even as f32     one instruction each way, no shuffle: a bf16 is
//!                                    --mask the upper->  odd as f32      the upper half of its f32
//!   f16:   words | upper half, lower half |  --vcvtph2ps-->  each as f32
//! ```
//! The bits are the same (payloads of NaN aside). No `map` over registers: it is compiled without the instruction set, is
//! not inlined, and passes them through memory.

use std::arch::x86_64::{
    __m512, __m512i, _CMP_EQ_OQ, _CMP_GT_OQ, _CMP_LT_OQ, _CMP_UNORD_Q, _MM_FROUND_TO_NEAREST_INT, _mm512_add_epi32,
    _mm512_add_ps, _mm512_and_epi32, _mm512_castps_si512, _mm512_castsi256_si512, _mm512_castsi512_ps,
    _mm512_castsi512_si256, _mm512_cmp_ps_mask, _mm512_cvtph_ps, _mm512_cvtps_ph, _mm512_div_ps,
    _mm512_extracti64x4_epi64, _mm512_fpclass_ps_mask, _mm512_inserti64x4, _mm512_loadu_si512, _mm512_mask_blend_epi32,
    _mm512_mask_blend_ps, _mm512_mul_ps, _mm512_or_epi32, _mm512_permutexvar_epi16, _mm512_set1_epi32, _mm512_set1_ps,
    _mm512_slli_epi32, _mm512_srli_epi32, _mm512_storeu_si512, _mm512_ternarylogic_epi32,
};

use super::combine::Combine;
use super::half_blocks::{ADD, BF16_NATIVE, F16, MAX, MIN, half_blocks};
use crate::dtype::ReduceOp;

half_blocks!(
    "avx512f,avx512bw,avx512dq",
    32,
    _mm512_loadu_si512,
    _mm512_storeu_si512,
    _mm512_set1_ps,
    _mm512_mul_ps,
    _mm512_div_ps
);

/// A term: 32 elements in f32, in the order of [`unpack`].
type Wide = [__m512; 2];

#[target_feature(enable = "avx512f,avx512bw,avx512dq")]
#[inline]
fn fold<const OP: u8>(a: __m512, b: __m512) -> __m512 {
    if OP == ADD {
        return _mm512_add_ps(a, b);
    }
    let (prefer_a, equal) = match OP {
        MIN => (_mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b), or_ps(a, b)), // -0.0 wins
        _ => (_mm512_cmp_ps_mask::<_CMP_GT_OQ>(a, b), and_ps(a, b)),  // +0.0 wins
    };
    let chosen = _mm512_mask_blend_ps(prefer_a, b, a);
    let ordered = _mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_EQ_OQ>(a, b), chosen, equal);
    // A NaN in `b` was chosen above, because nothing compares with it.
    _mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_UNORD_Q>(a, a), ordered, a)
}

/// Even and odd elements of bf16, lower and upper half of f16.
#[target_feature(enable = "avx512f,avx512bw,avx512dq")]
#[inline]
fn unpack<const FORMAT: u8>(words: __m512i) -> Wide {
    if FORMAT == F16 {
        let (lower, upper) = (_mm512_castsi512_si256(words), _mm512_extracti64x4_epi64::<1>(words));
        return [_mm512_cvtph_ps(lower), _mm512_cvtph_ps(upper)];
    }
    let (even, odd) = (_mm512_slli_epi32::<16>(words), _mm512_and_epi32(words, upper_words()));
    [_mm512_castsi512_ps(even), _mm512_castsi512_ps(odd)]
}

/// Nearest, ties to even.
#[target_feature(enable = "avx512f,avx512bw,avx512dq")]
#[inline]
fn pack<const FORMAT: u8>(wide: Wide) -> __m512i {
    if FORMAT == F16 {
        let lower = _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(wide[0]);
        let upper = _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(wide[1]);
        return _mm512_inserti64x4::<1>(_mm512_castsi256_si512(lower), upper);
    }
    if FORMAT == BF16_NATIVE && !has_special(wide) {
        return interleave(native_bf16(wide[1], wide[0]));
    }
    let (even, odd) = (round_to_bf16(wide[0]), round_to_bf16(wide[1]));
    and_or(odd, upper_words(), _mm512_srli_epi32::<16>(even))
}

/// Whether a lane is a NaN or subnormal, of which the instruction keeps the payload or makes zero.
#[target_feature(enable = "avx512f,avx512bw,avx512dq")]
#[inline]
fn has_special(wide: Wide) -> bool {
    const QUIET_NAN: i32 = 0x01;
    const SUBNORMAL: i32 = 0x20;
    const SIGNALLING_NAN: i32 = 0x80;
    const SPECIAL: i32 = QUIET_NAN | SUBNORMAL | SIGNALLING_NAN;
    // One branch for both.
    _mm512_fpclass_ps_mask::<SPECIAL>(wide[0]) | _mm512_fpclass_ps_mask::<SPECIAL>(wide[1]) != 0
}

/// 16 words of `lower`, then 16 of `upper`. Only on processors with AVX-512 BF16. By name, because a function with that
/// feature would not be inlined here.
#[target_feature(enable = "avx512f,avx512bw,avx512dq")]
#[inline]
fn native_bf16(upper: __m512, lower: __m512) -> __m512i {
    let words;
    // SAFETY: the instruction reads and writes registers only; the caller of `reduce_blocks` has looked for it.
    unsafe {
        std::arch::asm!("vcvtne2ps2bf16 {}, {}, {}", lateout(zmm_reg) words, in(zmm_reg) upper, in(zmm_reg) lower,
            options(pure, nomem, nostack, preserves_flags));
    }
    words
}

/// Even words from the lower half, odd ones from the upper.
#[target_feature(enable = "avx512f,avx512bw,avx512dq")]
#[inline]
fn interleave(halves: __m512i) -> __m512i {
    const fn order() -> [u16; WORDS] {
        let mut order = [0; WORDS];
        let mut i = 0;
        while i < WORDS {
            order[i] = (i / 2 + i % 2 * WORDS / 2) as u16;
            i += 1;
        }
        order
    }
    const ORDER: [u16; WORDS] = order();
    // SAFETY: 64 bytes are read from 64 bytes.
    let order = unsafe { _mm512_loadu_si512(ORDER.as_ptr().cast()) };
    _mm512_permutexvar_epi16(order, halves)
}

/// A bf16 in the upper half of each lane; the lower half is anything.
#[target_feature(enable = "avx512f,avx512bw,avx512dq")]
#[inline]
fn round_to_bf16(wide: __m512) -> __m512i {
    let bits = _mm512_castps_si512(wide);
    let odd = _mm512_and_epi32(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
    let rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    let nan = and_or(bits, _mm512_set1_epi32(i32::MIN), _mm512_set1_epi32(0x7fc0_0000));
    _mm512_mask_blend_epi32(_mm512_cmp_ps_mask::<_CMP_UNORD_Q>(wide, wide), rounded, nan)
}

/// `a & b | c`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq")]
#[inline]
fn and_or(a: __m512i, b: __m512i, c: __m512i) -> __m512i {
    _mm512_ternarylogic_epi32::<0b1110_1010>(a, b, c)
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq")]
#[inline]
fn upper_words() -> __m512i {
    _mm512_set1_epi32(0xffff_0000_u32.cast_signed())
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq")]
#[inline]
fn or_ps(a: __m512, b: __m512) -> __m512 {
    _mm512_castsi512_ps(_mm512_or_epi32(_mm512_castps_si512(a), _mm512_castps_si512(b)))
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq")]
#[inline]
fn and_ps(a: __m512, b: __m512) -> __m512 {
    _mm512_castsi512_ps(_mm512_and_epi32(_mm512_castps_si512(a), _mm512_castps_si512(b)))
}
