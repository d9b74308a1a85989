//! One loop, compiled for several instruction sets, the best one picked at run time.
//!
//! All of them give the same bits: only IEEE additions, multiplications, divisions, comparisons and exact conversions
//! are used, element by element, and never contracted.

/// What every processor of the architecture has.
pub(super) const PORTABLE: u8 = 0;
/// AVX2 and F16C.
#[cfg(target_arch = "x86_64")]
pub(super) const AVX2: u8 = 1;
/// AVX-512 F, BW, VL, DQ.
#[cfg(target_arch = "x86_64")]
pub(super) const AVX512: u8 = 2;

/// A loop whose body is inlined into a function of each instruction set.
pub(super) trait Loop {
    /// # Safety
    /// The loop's own promises, and the processor has the instructions of `LEVEL`.
    unsafe fn run<const LEVEL: u8>(self);
}

/// Runs `body` with the widest instructions this processor has.
///
/// # Safety
/// The loop's own promises.
pub(super) unsafe fn run<L: Loop>(body: L) {
    // SAFETY: the caller's promises; the level was detected on this processor.
    unsafe {
        match level() {
            #[cfg(target_arch = "x86_64")]
            AVX512 => run_avx512(body),
            #[cfg(target_arch = "x86_64")]
            AVX2 => run_avx2(body),
            _ => body.run::<PORTABLE>(),
        }
    }
}

/// The best level here. The standard library caches the detection.
pub(super) fn level() -> u8 {
    #[cfg(target_arch = "x86_64")]
    {
        let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("f16c");
        if avx2
            && is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512dq")
        {
            return AVX512;
        }
        if avx2 {
            return AVX2;
        }
    }
    PORTABLE
}

/// # Safety
/// As for [`Loop::run`] at this level.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,f16c")]
unsafe fn run_avx512<L: Loop>(body: L) {
    // SAFETY: the caller's promises.
    unsafe { body.run::<AVX512>() }
}

/// # Safety
/// As for [`Loop::run`] at this level.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,f16c")]
unsafe fn run_avx2<L: Loop>(body: L) {
    // SAFETY: the caller's promises.
    unsafe { body.run::<AVX2>() }
}
