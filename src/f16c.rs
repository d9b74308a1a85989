//! Conversions of f16 by the processor, a block at a time; the same bits as those by arithmetic.

use std::arch::x86_64::{
    _MM_FROUND_TO_NEAREST_INT, _mm_loadu_si128, _mm_storeu_si128, _mm256_cvtph_ps, _mm256_cvtps_ph, _mm256_loadu_ps,
    _mm256_storeu_ps,
};

use half::f16;

/// Exact. A signalling NaN becomes quiet.
///
/// # Safety
/// The processor has AVX and F16C.
#[target_feature(enable = "avx,f16c")]
#[inline]
pub(crate) unsafe fn widen<const N: usize>(block: &[f16; N]) -> [f32; N] {
    const { assert!(N.is_multiple_of(8)) };
    let mut wide = [0.0; N];
    for (wide, half) in wide.as_chunks_mut::<8>().0.iter_mut().zip(block.as_chunks::<8>().0) {
        // SAFETY: eight elements of each; neither access needs alignment.
        unsafe { _mm256_storeu_ps(wide.as_mut_ptr(), _mm256_cvtph_ps(_mm_loadu_si128(half.as_ptr().cast()))) };
    }
    wide
}

/// To nearest, ties to even.
///
/// # Safety
/// The processor has AVX and F16C.
#[target_feature(enable = "avx,f16c")]
#[inline]
pub(crate) unsafe fn narrow<const N: usize>(wide: &[f32; N]) -> [f16; N] {
    const { assert!(N.is_multiple_of(8)) };
    let mut block = [f16::ZERO; N];
    for (half, wide) in block.as_chunks_mut::<8>().0.iter_mut().zip(wide.as_chunks::<8>().0) {
        // SAFETY: as above.
        unsafe {
            let bits = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(_mm256_loadu_ps(wide.as_ptr()));
            _mm_storeu_si128(half.as_mut_ptr().cast(), bits);
        }
    }
    block
}
