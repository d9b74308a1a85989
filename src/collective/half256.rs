//! Reductions of 16-bit floats with AVX2 and F16C, for processors without AVX-512: `half512.rs` with registers of half the
//! width, and blends by masks that are vectors. The bits are the same.

use std::arch::x86_64::{
    __m256, __m256i, _CMP_EQ_OQ, _CMP_GT_OQ, _CMP_LT_OQ, _CMP_UNORD_Q, _MM_FROUND_TO_NEAREST_INT, _mm256_add_epi32,
    _mm256_add_ps, _mm256_and_ps, _mm256_and_si256, _mm256_blend_epi16, _mm256_blendv_ps, _mm256_castps_si256,
    _mm256_castsi256_ps, _mm256_castsi256_si128, _mm256_cmp_ps, _mm256_cvtph_ps, _mm256_cvtps_ph, _mm256_div_ps,
    _mm256_extracti128_si256, _mm256_loadu_si256, _mm256_movemask_ps, _mm256_mul_ps, _mm256_or_ps, _mm256_or_si256,
    _mm256_set_m128i, _mm256_set1_epi32, _mm256_set1_ps, _mm256_slli_epi32, _mm256_srli_epi32, _mm256_storeu_si256,
};

use super::combine::Combine;
use super::half_blocks::{ADD, F16, MAX, MIN, half_blocks};
use crate::dtype::ReduceOp;

half_blocks!("avx2,f16c", 16, _mm256_loadu_si256, _mm256_storeu_si256, _mm256_set1_ps, _mm256_mul_ps, _mm256_div_ps);

/// A term: 16 elements in f32, in the order of [`unpack`].
type Wide = [__m256; 2];

#[target_feature(enable = "avx2,f16c")]
#[inline]
fn fold<const OP: u8>(a: __m256, b: __m256) -> __m256 {
    if OP == ADD {
        return _mm256_add_ps(a, b);
    }
    let (prefer_a, equal) = match OP {
        MIN => (_mm256_cmp_ps::<_CMP_LT_OQ>(a, b), _mm256_or_ps(a, b)), // -0.0 wins
        _ => (_mm256_cmp_ps::<_CMP_GT_OQ>(a, b), _mm256_and_ps(a, b)),  // +0.0 wins
    };
    let chosen = _mm256_blendv_ps(b, a, prefer_a);
    let ordered = _mm256_blendv_ps(chosen, equal, _mm256_cmp_ps::<_CMP_EQ_OQ>(a, b));
    // A NaN in `b` was chosen above, because nothing compares with it.
    _mm256_blendv_ps(ordered, a, _mm256_cmp_ps::<_CMP_UNORD_Q>(a, a))
}

/// Even and odd elements of bf16, lower and upper half of f16.
#[target_feature(enable = "avx2,f16c")]
#[inline]
fn unpack<const FORMAT: u8>(words: __m256i) -> Wide {
    if FORMAT == F16 {
        let (lower, upper) = (_mm256_castsi256_si128(words), _mm256_extracti128_si256::<1>(words));
        return [_mm256_cvtph_ps(lower), _mm256_cvtph_ps(upper)];
    }
    let upper_words = _mm256_set1_epi32(0xffff_0000_u32.cast_signed());
    let (even, odd) = (_mm256_slli_epi32::<16>(words), _mm256_and_si256(words, upper_words));
    [_mm256_castsi256_ps(even), _mm256_castsi256_ps(odd)]
}

/// Nearest, ties to even.
#[target_feature(enable = "avx2,f16c")]
#[inline]
fn pack<const FORMAT: u8>(wide: Wide) -> __m256i {
    if FORMAT == F16 {
        let lower = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(wide[0]);
        let upper = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(wide[1]);
        return _mm256_set_m128i(upper, lower);
    }
    let (mut even, mut odd) = (round_to_bf16(wide[0]), round_to_bf16(wide[1]));
    // Rare: so a branch for both rather than a blend for each.
    if _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_UNORD_Q>(wide[0], wide[1])) != 0 {
        (even, odd) = (with_quiet_nans(even, wide[0]), with_quiet_nans(odd, wide[1]));
    }
    const ODD_WORDS: i32 = 0b1010_1010;
    _mm256_blend_epi16::<ODD_WORDS>(_mm256_srli_epi32::<16>(even), odd)
}

/// A bf16 in the upper half of each lane that is no NaN; the lower half is anything.
#[target_feature(enable = "avx2,f16c")]
#[inline]
fn round_to_bf16(wide: __m256) -> __m256i {
    let bits = _mm256_castps_si256(wide);
    let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
    _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)))
}

/// `rounded` where `wide` is no NaN, else the quiet NaN of its sign.
#[target_feature(enable = "avx2,f16c")]
#[inline]
fn with_quiet_nans(rounded: __m256i, wide: __m256) -> __m256i {
    let sign = _mm256_and_si256(_mm256_castps_si256(wide), _mm256_set1_epi32(i32::MIN));
    let nan = _mm256_castsi256_ps(_mm256_or_si256(sign, _mm256_set1_epi32(0x7fc0_0000)));
    let is_nan = _mm256_cmp_ps::<_CMP_UNORD_Q>(wide, wide);
    _mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(rounded), nan, is_nan))
}
