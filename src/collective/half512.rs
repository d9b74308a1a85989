//! Reductions of 16-bit floats with AVX-512: what `combine.rs` does, with the conversions in registers.
//!
//! The portable blocks of `combine.rs` go through the stack where the types differ in width: at 64 KiB they take 2.4 times
//! as long as f32 of the same bytes. Here 32 elements are two registers from the loads to the stores. The bits are the
//! same (payloads of NaN aside).

use std::arch::x86_64::{
    __m256i, __m512, __m512i, _CMP_EQ_OQ, _CMP_GT_OQ, _CMP_LT_OQ, _CMP_UNORD_Q, _MM_FROUND_TO_NEAREST_INT,
    _mm256_loadu_si256, _mm256_storeu_si256, _mm512_add_epi32, _mm512_add_ps, _mm512_and_epi32, _mm512_castps_si512,
    _mm512_castsi512_ps, _mm512_cmp_ps_mask, _mm512_cvtepi32_epi16, _mm512_cvtepu16_epi32, _mm512_cvtph_ps,
    _mm512_cvtps_ph, _mm512_div_ps, _mm512_mask_blend_epi32, _mm512_mask_blend_ps, _mm512_mul_ps, _mm512_or_epi32,
    _mm512_set1_epi32, _mm512_set1_ps, _mm512_slli_epi32, _mm512_srli_epi32,
};

use super::combine::Combine;
use crate::dtype::ReduceOp;

/// Elements of a register of f32, and of a block.
const LANES: usize = 16;
pub(super) const BLOCK: usize = 2 * LANES;

pub(super) const BF16: u8 = 0;
pub(super) const F16: u8 = 1;

const ADD: u8 = 0;
const MIN: u8 = 1;
const MAX: u8 = 2;

/// Reduces the leading whole blocks of `terms` into `dests` and returns how many elements that were.
///
/// # Safety
/// As for [`super::combine::combine`], with elements of `FORMAT`; the processor has AVX-512 F and BW.
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) unsafe fn reduce_blocks<const FORMAT: u8>(
    how: Combine,
    terms: &[*const u8],
    dests: &[*mut u8],
    len_elems: usize,
) -> usize {
    let (one, count) = (1.0, how.world_size as f32);
    // SAFETY: the caller's promises.
    unsafe {
        match how.op {
            ReduceOp::Sum => blocks::<FORMAT, ADD, false, false>(terms, dests, len_elems, one),
            ReduceOp::Avg => blocks::<FORMAT, ADD, false, true>(terms, dests, len_elems, count),
            ReduceOp::PremulSum(factor) => blocks::<FORMAT, ADD, true, false>(terms, dests, len_elems, factor as f32),
            ReduceOp::Min => blocks::<FORMAT, MIN, false, false>(terms, dests, len_elems, one),
            ReduceOp::Max => blocks::<FORMAT, MAX, false, false>(terms, dests, len_elems, one),
        }
    }
}

/// # Safety
/// As for [`reduce_blocks`]. `number` is the factor if `SCALE`, the divisor if `DIVIDE`.
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn blocks<const FORMAT: u8, const OP: u8, const SCALE: bool, const DIVIDE: bool>(
    terms: &[*const u8],
    dests: &[*mut u8],
    len_elems: usize,
    number: f32,
) -> usize {
    let Some((first, others)) = terms.split_first() else { return 0 };
    let number = _mm512_set1_ps(number);
    let whole = len_elems / BLOCK * BLOCK;
    for at in (0..whole).step_by(BLOCK) {
        let mut acc = [_mm512_set1_ps(0.0); 2];
        for (half, acc) in acc.iter_mut().enumerate() {
            let offset_bytes = 2 * (at + half * LANES);
            // SAFETY: `at + BLOCK <= len_elems` elements are inside every term.
            unsafe {
                let load = |term: &*const u8| {
                    let wide = widen::<FORMAT>(_mm256_loadu_si256(term.add(offset_bytes).cast()));
                    if SCALE { _mm512_mul_ps(wide, number) } else { wide }
                };
                *acc = load(first);
                for term in others {
                    *acc = fold::<OP>(*acc, load(term));
                }
            }
            if DIVIDE {
                *acc = _mm512_div_ps(*acc, number);
            }
        }
        for (half, acc) in acc.iter().enumerate() {
            let result = narrow::<FORMAT>(*acc);
            for dest in dests {
                // SAFETY: as above, for every destination; every term of the block was read.
                unsafe { _mm256_storeu_si256(dest.add(2 * (at + half * LANES)).cast(), result) };
            }
        }
    }
    whole
}

#[target_feature(enable = "avx512f,avx512bw")]
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

#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
fn widen<const FORMAT: u8>(half: __m256i) -> __m512 {
    if FORMAT == F16 {
        return _mm512_cvtph_ps(half);
    }
    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(half)))
}

/// Nearest, ties to even.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
fn narrow<const FORMAT: u8>(wide: __m512) -> __m256i {
    if FORMAT == F16 {
        return _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(wide);
    }
    let bits = _mm512_castps_si512(wide);
    let upper = _mm512_srli_epi32::<16>(bits);
    let odd = _mm512_and_epi32(upper, _mm512_set1_epi32(1));
    let rounded: __m512i =
        _mm512_srli_epi32::<16>(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))));
    let nan = _mm512_or_epi32(_mm512_and_epi32(upper, _mm512_set1_epi32(0x8000)), _mm512_set1_epi32(0x7fc0));
    let is_nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(wide, wide);
    _mm512_cvtepi32_epi16(_mm512_mask_blend_epi32(is_nan, rounded, nan))
}

#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
fn or_ps(a: __m512, b: __m512) -> __m512 {
    _mm512_castsi512_ps(_mm512_or_epi32(_mm512_castps_si512(a), _mm512_castps_si512(b)))
}

#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
fn and_ps(a: __m512, b: __m512) -> __m512 {
    _mm512_castsi512_ps(_mm512_and_epi32(_mm512_castps_si512(a), _mm512_castps_si512(b)))
}
