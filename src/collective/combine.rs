//! The arithmetic of a reduction: N terms in, the same result out to M places, in one pass.
//!
//! ```text
//!   for each element:  acc = widen(term[0]);  acc = acc op widen(term[k])  for k = 1..N, in this order
//!                      avg: acc = acc / world_size
//!                      narrow(acc) -> every destination
//! ```
//! Departures of the code below: it walks blocks of [`WIDTH`] elements held in registers; it is compiled for several
//! instruction sets and picks one at run time. Every term is read and every destination written once, which is the
//! least a sum in place of N buffers can move: a destination may be one of the terms (the block is read before it is
//! written).

use std::marker::PhantomData;

use half::{bf16, f16};

use super::lane::{Lane, WIDTH};
use super::simd::{self, Loop};
#[cfg(target_arch = "x86_64")]
use super::{half_blocks, half256, half512};
use crate::dtype::{DType, ReduceOp};
#[cfg(target_arch = "x86_64")]
use crate::schedule::MAX_WORLD_SIZE;

/// How a reduction begins and ends besides adding.
#[derive(Clone, Copy)]
pub(super) struct Combine {
    pub(super) op: ReduceOp,
    /// Divisor of `Avg`.
    pub(super) world_size: u32,
}

/// Reduces `terms` element by element, in their order, into every one of `dests`.
///
/// # Safety
/// - each term is readable and each destination writable for `len_elems` elements of `dtype`, aligned to its size;
/// - a destination is either one of the terms, at the same address, or disjoint from all of them;
/// - nobody else accesses any of them during the call.
pub(super) unsafe fn combine(dtype: DType, how: Combine, terms: &[*const u8], dests: &[*mut u8], len_elems: usize) {
    // SAFETY: the caller's promises; the type is the one of `dtype`.
    unsafe {
        match dtype {
            DType::F32 => reduce::<f32>(how, terms, dests, len_elems),
            DType::F16 => reduce_half::<f16>(how, terms, dests, len_elems),
            DType::BF16 => reduce_half::<bf16>(how, terms, dests, len_elems),
            DType::F64 => reduce::<f64>(how, terms, dests, len_elems),
            DType::I32 => reduce::<i32>(how, terms, dests, len_elems),
            DType::I64 => reduce::<i64>(how, terms, dests, len_elems),
            DType::U8 => reduce::<u8>(how, terms, dests, len_elems),
        }
    }
}

/// # Safety
/// As for [`combine`], with elements of type `T`, f16 or bf16.
unsafe fn reduce_half<T: Lane>(how: Combine, terms: &[*const u8], dests: &[*mut u8], len_elems: usize) {
    #[cfg(target_arch = "x86_64")]
    if terms.len() <= MAX_WORLD_SIZE as usize {
        // SAFETY: the caller's promises; what remains is behind the whole blocks.
        unsafe {
            let done = reduce_half_blocks::<T>(how, terms, dests, len_elems);
            let mut rest_terms = [std::ptr::null(); MAX_WORLD_SIZE as usize];
            for (rest, term) in rest_terms.iter_mut().zip(terms) {
                *rest = term.add(2 * done);
            }
            let mut rest_dests = [std::ptr::null_mut(); MAX_WORLD_SIZE as usize];
            for (rest, dest) in rest_dests.iter_mut().zip(dests) {
                *rest = dest.add(2 * done);
            }
            return reduce::<T>(how, &rest_terms[..terms.len()], &rest_dests[..dests.len()], len_elems - done);
        }
    }
    // SAFETY: the caller's promises.
    unsafe { reduce::<T>(how, terms, dests, len_elems) }
}

/// The leading blocks, as far as there are instructions for them; returns how many elements they have.
///
/// # Safety
/// As for [`reduce_half`].
#[cfg(target_arch = "x86_64")]
unsafe fn reduce_half_blocks<T: Lane>(how: Combine, terms: &[*const u8], dests: &[*mut u8], len_elems: usize) -> usize {
    let is_f16 = T::DTYPE == DType::F16;
    // SAFETY: the caller's promises; the level was detected.
    unsafe {
        match simd::level() {
            simd::AVX512 if len_elems < half512::BLOCK => 0,
            simd::AVX512 if is_f16 => half512::reduce_blocks::<{ half_blocks::F16 }>(how, terms, dests, len_elems),
            simd::AVX512 if is_x86_feature_detected!("avx512bf16") => {
                half512::reduce_blocks::<{ half_blocks::BF16_NATIVE }>(how, terms, dests, len_elems)
            }
            simd::AVX512 => half512::reduce_blocks::<{ half_blocks::BF16 }>(how, terms, dests, len_elems),
            simd::AVX2 if len_elems < half256::BLOCK => 0,
            simd::AVX2 if is_f16 => half256::reduce_blocks::<{ half_blocks::F16 }>(how, terms, dests, len_elems),
            simd::AVX2 => half256::reduce_blocks::<{ half_blocks::BF16 }>(how, terms, dests, len_elems),
            _ => 0,
        }
    }
}

struct Reduce<'a, T> {
    how: Combine,
    terms: &'a [*const u8],
    dests: &'a [*mut u8],
    len_elems: usize,
    element: PhantomData<T>,
}

/// # Safety
/// As for [`combine`], with elements of type `T`.
unsafe fn reduce<T: Lane>(how: Combine, terms: &[*const u8], dests: &[*mut u8], len_elems: usize) {
    // SAFETY: the caller's promises.
    unsafe { simd::run(Reduce::<T> { how, terms, dests, len_elems, element: PhantomData }) }
}

impl<T: Lane> Loop for Reduce<'_, T> {
    #[inline(always)]
    unsafe fn run<const LEVEL: u8>(self) {
        let Reduce { how, terms, dests, len_elems, .. } = self;
        let same = |acc| acc;
        // SAFETY: the caller's promises.
        unsafe {
            match how.op {
                ReduceOp::Sum => blocks::<T, LEVEL>(terms, dests, len_elems, same, T::add, same),
                ReduceOp::Avg => {
                    blocks::<T, LEVEL>(terms, dests, len_elems, same, T::add, |acc| T::divide(acc, how.world_size))
                }
                ReduceOp::Min => blocks::<T, LEVEL>(terms, dests, len_elems, same, T::min, same),
                ReduceOp::Max => blocks::<T, LEVEL>(terms, dests, len_elems, same, T::max, same),
                ReduceOp::PremulSum(factor) => {
                    blocks::<T, LEVEL>(terms, dests, len_elems, |acc| T::scale(acc, factor), T::add, same)
                }
            }
        }
    }
}

/// # Safety
/// As for [`combine`], and the processor has the instructions of `LEVEL`.
#[inline(always)]
unsafe fn blocks<T: Lane, const LEVEL: u8>(
    terms: &[*const u8],
    dests: &[*mut u8],
    len_elems: usize,
    before: impl Fn(T::Acc) -> T::Acc,
    fold: impl Fn(T::Acc, T::Acc) -> T::Acc,
    after: impl Fn(T::Acc) -> T::Acc,
) {
    let whole = len_elems / WIDTH * WIDTH;
    // SAFETY: the caller's promises; whole blocks and the rest are `len_elems` together.
    unsafe {
        for at in (0..whole).step_by(WIDTH) {
            block::<T, LEVEL>(terms, dests, at, WIDTH, &before, &fold, &after);
        }
        if whole < len_elems {
            block::<T, LEVEL>(terms, dests, whole, len_elems - whole, &before, &fold, &after);
        }
    }
}

/// `valid` elements from `at` on. A function of its own, and no closure: it must be compiled for the level, twice, once with
/// `valid` a constant; then no block passes through the stack.
///
/// # Safety
/// As for [`blocks`], with `at + valid <= len_elems`.
#[inline(always)]
unsafe fn block<T: Lane, const LEVEL: u8>(
    terms: &[*const u8],
    dests: &[*mut u8],
    at: usize,
    valid: usize,
    before: &impl Fn(T::Acc) -> T::Acc,
    fold: &impl Fn(T::Acc, T::Acc) -> T::Acc,
    after: &impl Fn(T::Acc) -> T::Acc,
) {
    let Some((first, others)) = terms.split_first() else { return };
    // SAFETY: the elements are inside every term and destination; a destination that is also a term is written after every
    // term of the block was read.
    unsafe {
        let mut acc = T::widen::<LEVEL>(&load(first.cast::<T>().add(at), valid));
        for acc in &mut acc {
            *acc = before(*acc);
        }
        for term in others {
            let term = T::widen::<LEVEL>(&load(term.cast::<T>().add(at), valid));
            for (acc, term) in acc.iter_mut().zip(term) {
                *acc = fold(*acc, before(term));
            }
        }
        for acc in &mut acc {
            *acc = after(*acc);
        }
        let result = T::narrow::<LEVEL>(&acc);
        for dest in dests {
            store(dest.cast::<T>().add(at), &result, valid);
        }
    }
}

/// # Safety
/// `from` is readable for `valid <= WIDTH` elements.
#[inline(always)]
pub(super) unsafe fn load<T: Lane>(from: *const T, valid: usize) -> [T; WIDTH] {
    // SAFETY: the caller's promise; a short block is filled with zeroes, whose results are not stored.
    unsafe {
        if valid == WIDTH {
            return from.cast::<[T; WIDTH]>().read_unaligned();
        }
        let mut block = [T::zeroed(); WIDTH];
        std::ptr::copy_nonoverlapping(from, block.as_mut_ptr(), valid);
        block
    }
}

/// # Safety
/// `to` is writable for `valid <= WIDTH` elements.
#[inline(always)]
pub(super) unsafe fn store<T: Lane>(to: *mut T, block: &[T; WIDTH], valid: usize) {
    // SAFETY: the caller's promise.
    unsafe {
        if valid == WIDTH {
            to.cast::<[T; WIDTH]>().write_unaligned(*block);
        } else {
            std::ptr::copy_nonoverlapping(block.as_ptr(), to, valid);
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    /// Every 16-bit pattern beside one far from it, in the last block and in the rest behind the blocks, too.
    fn halves_match_the_portable_loop<T: Lane>(is_nan: impl Fn(T) -> bool) {
        let a: Vec<u16> = (0..=u16::MAX).chain(0..37).collect();
        let b: Vec<u16> = a.iter().map(|bits| bits.wrapping_mul(40_503).wrapping_add(11)).collect();
        let close: Vec<u16> = a.iter().map(|bits| bits ^ 0x8001).collect(); // differences that cancel: subnormal results
        for op in [ReduceOp::Sum, ReduceOp::Avg, ReduceOp::Min, ReduceOp::Max, ReduceOp::PremulSum(0.3)] {
            for terms in [&[&a][..], &[&a, &b], &[&a, &close], &[&a, &b, &close]] {
                let how = Combine { op, world_size: terms.len() as u32 };
                let pointers: Vec<*const u8> = terms.iter().map(|term| term.as_ptr().cast()).collect();
                let [mut fast, mut portable] = [vec![0_u16; a.len()], vec![0_u16; a.len()]];
                // SAFETY: all are as long as `a`, aligned, and this thread's own; the destinations are disjoint from the
                // terms.
                unsafe {
                    combine(T::DTYPE, how, &pointers, &[fast.as_mut_ptr().cast()], a.len());
                    reduce::<T>(how, &pointers, &[portable.as_mut_ptr().cast()], a.len());
                }
                let value = |bits: u16| bytemuck::cast::<u16, [u8; 2]>(bits);
                let nan = |bits: u16| is_nan(bytemuck::pod_read_unaligned(&value(bits)));
                #[cfg(target_arch = "x86_64")]
                if simd::level() >= simd::AVX2 {
                    let mut narrower = vec![0_u16; a.len()];
                    // SAFETY: as above; the processor has the level's instructions.
                    let done = unsafe {
                        let dests = [narrower.as_mut_ptr().cast()];
                        match T::DTYPE {
                            DType::F16 => {
                                half256::reduce_blocks::<{ half_blocks::F16 }>(how, &pointers, &dests, a.len())
                            }
                            _ => half256::reduce_blocks::<{ half_blocks::BF16 }>(how, &pointers, &dests, a.len()),
                        }
                    };
                    assert_eq!(done, a.len() / half256::BLOCK * half256::BLOCK);
                    // Which of two NaNs a sum keeps is the compiler's order of operands.
                    let same = |i: &usize| narrower[*i] == fast[*i] || nan(narrower[*i]) && nan(fast[*i]);
                    assert_eq!((0..done).find(|i| !same(i)), None, "{op:?} over {}", terms.len());
                }
                for (i, (fast, portable)) in fast.iter().zip(&portable).enumerate() {
                    let same = fast == portable || nan(*fast) && nan(*portable);
                    assert!(same, "{op:?} over {} at {i} ({:#06x}): {fast:#06x}, {portable:#06x}", terms.len(), a[i]);
                }
            }
        }
    }

    #[test]
    fn bf16_matches_the_portable_loop() {
        halves_match_the_portable_loop::<bf16>(bf16::is_nan);
    }

    #[test]
    fn f16_matches_the_portable_loop() {
        halves_match_the_portable_loop::<f16>(f16::is_nan);
    }

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn both_ways_of_rounding_to_bf16_agree() {
        if simd::level() < simd::AVX512 || !is_x86_feature_detected!("avx512bf16") {
            eprintln!("skipped: this processor has no AVX-512 BF16");
            return;
        }
        let a: Vec<u16> = (0..=u16::MAX).collect();
        let b: Vec<u16> = a.iter().map(|bits| bits.wrapping_mul(40_503).wrapping_add(11)).collect();
        let terms: [*const u8; 2] = [a.as_ptr().cast(), b.as_ptr().cast()];
        let how = Combine { op: ReduceOp::Sum, world_size: 2 };
        let [mut native, mut integer] = [vec![0_u16; a.len()], vec![0_u16; a.len()]];
        // SAFETY: as in `halves_match_the_portable_loop`; the processor's features were tested.
        unsafe {
            half512::reduce_blocks::<{ half_blocks::BF16_NATIVE }>(how, &terms, &[native.as_mut_ptr().cast()], a.len());
            half512::reduce_blocks::<{ half_blocks::BF16 }>(how, &terms, &[integer.as_mut_ptr().cast()], a.len());
        }
        assert_eq!(native, integer);
    }
}
