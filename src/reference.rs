//! The specification: every operation of the library once more, naive, on slices, short enough to believe.
//!
//! Executors and kernels are compared with these functions: bit for bit where the order of the arithmetic is part of the
//! contract (collectives in rank order, casts, stochastic rounding, the optimizers), else within a bound that the test
//! states (norms). Nothing here is fast, and nothing here shares code with what it specifies.
//!
//! What is computed in which precision:
//!
//! | operation | arithmetic |
//! |---|---|
//! | sums of f16, bf16, f32 | f32, in the order of the ranks, one rounding to the result's type at the end |
//! | sums of f64 | f64, in the order of the ranks |
//! | sums of integers | wrapping |
//! | norms | f64 |
//! | casts | exact value to the nearest representable one, ties to even |
//! | clip, AdamW, SGD | f32 per element with the fused multiply-adds written out; coefficients in f64, rounded once |

#![forbid(unsafe_code)]

use half::{bf16, f16};

use crate::dtype::{DType, Element, NormType, ReduceOp};
use crate::error::{Error, Result};

// ---- collectives ---------------------------------------------------------------------------------------------------

/// What every rank holds after an all-reduce: element `i` is `op` over `ranks[0][i], ranks[1][i], ..`, in that order.
///
/// # Errors
/// [`Error::LengthMismatch`] if the ranks' vectors differ in length, [`Error::InvalidArgument`] if there is no rank,
/// [`Error::Unsupported`] if `op` is not defined for `T`.
pub fn all_reduce<T: Element, S: AsRef<[T]>>(ranks: &[S], op: ReduceOp) -> Result<Vec<T>> {
    all_reduce_from(ranks, op, 0)
}

/// As [`all_reduce`], but the terms are added in the order `first, first + 1, ..`, wrapping at the world size.
///
/// A ring that sends f32 partial sums adds the elements of the shard of rank `owner` in the order that begins at
/// `owner + 1`.
///
/// # Errors
/// As [`all_reduce`].
pub fn all_reduce_from<T: Element, S: AsRef<[T]>>(ranks: &[S], op: ReduceOp, first: usize) -> Result<Vec<T>> {
    op.check(T::DTYPE)?;
    let len_elems = common_length(ranks)?;
    Ok((0..len_elems)
        .map(|i| {
            let terms: Vec<T> = (0..ranks.len()).map(|k| ranks[(first + k) % ranks.len()].as_ref()[i]).collect();
            reduce(&terms, op)
        })
        .collect())
}

/// What each rank holds after a reduce-scatter: the result of [`all_reduce`] cut into as many equal shards as ranks.
///
/// # Errors
/// As [`all_reduce`]; [`Error::InvalidArgument`] if the length is no multiple of the world size.
pub fn reduce_scatter<T: Element, S: AsRef<[T]>>(ranks: &[S], op: ReduceOp) -> Result<Vec<Vec<T>>> {
    let whole = all_reduce(ranks, op)?;
    if !whole.len().is_multiple_of(ranks.len()) {
        return Err(Error::InvalidArgument {
            argument: "ranks",
            value: format!("{} vectors of {} elements", ranks.len(), whole.len()),
            accepted: "the length must be a multiple of the number of ranks",
        });
    }
    let shard_elems = whole.len() / ranks.len();
    Ok((0..ranks.len()).map(|rank| whole[rank * shard_elems..(rank + 1) * shard_elems].to_vec()).collect())
}

/// What every rank holds after an all-gather: the ranks' vectors one after another.
///
/// # Errors
/// [`Error::LengthMismatch`] if the ranks' vectors differ in length, [`Error::InvalidArgument`] if there is no rank.
pub fn all_gather<T: Element, S: AsRef<[T]>>(ranks: &[S]) -> Result<Vec<T>> {
    common_length(ranks)?;
    Ok(ranks.iter().flat_map(|rank| rank.as_ref().iter().copied()).collect())
}

/// What every rank holds after a broadcast: the vector of rank `root`.
///
/// # Errors
/// [`Error::LengthMismatch`] if the ranks' vectors differ in length, [`Error::InvalidArgument`] if `root` is no rank.
pub fn broadcast<T: Element, S: AsRef<[T]>>(ranks: &[S], root: usize) -> Result<Vec<T>> {
    common_length(ranks)?;
    ranks.get(root).map(|rank| rank.as_ref().to_vec()).ok_or_else(|| Error::InvalidArgument {
        argument: "root",
        value: root.to_string(),
        accepted: "one of the ranks",
    })
}

/// One element of a reduction: `op` over the ranks' `terms`, from left to right. There is at least one term.
fn reduce<T: Element>(terms: &[T], op: ReduceOp) -> T {
    match T::DTYPE {
        // Widening to f64 is exact, so the casts to f32 are too.
        DType::F32 | DType::F16 | DType::BF16 => {
            let world_size = terms.len() as f32;
            let terms = terms.iter().map(|term| term.to_f64() as f32);
            let folded = match op {
                ReduceOp::Sum => fold(terms, |a, b| a + b),
                ReduceOp::Avg => fold(terms, |a, b| a + b) / world_size,
                ReduceOp::PremulSum(factor) => fold(terms.map(|term| term * factor as f32), |a, b| a + b),
                ReduceOp::Min => fold(terms, minimum),
                ReduceOp::Max => fold(terms, maximum),
            };
            match T::DTYPE {
                DType::F32 => bytemuck::cast(folded),
                DType::F16 => bytemuck::cast(f32_to_f16(folded, false)),
                _ => bytemuck::cast(f32_to_bf16(folded, false)),
            }
        }
        DType::F64 => {
            let world_size = terms.len() as f64;
            let terms = terms.iter().map(|term| term.to_f64());
            bytemuck::cast(match op {
                ReduceOp::Sum => fold(terms, |a, b| a + b),
                ReduceOp::Avg => fold(terms, |a, b| a + b) / world_size,
                ReduceOp::PremulSum(factor) => fold(terms.map(|term| term * factor), |a, b| a + b),
                ReduceOp::Min => fold(terms, minimum),
                ReduceOp::Max => fold(terms, maximum),
            })
        }
        DType::I32 => bytemuck::cast(reduce_integers(terms, op, i32::wrapping_add)),
        DType::I64 => bytemuck::cast(reduce_integers(terms, op, i64::wrapping_add)),
        DType::U8 => bytemuck::cast(reduce_integers(terms, op, u8::wrapping_add)),
    }
}

fn reduce_integers<T: Element, I: bytemuck::Pod + Ord>(terms: &[T], op: ReduceOp, add: fn(I, I) -> I) -> I {
    let terms = terms.iter().map(|term| bytemuck::cast::<T, I>(*term));
    match op {
        ReduceOp::Min => fold(terms, I::min),
        ReduceOp::Max => fold(terms, I::max),
        _ => fold(terms, add), // `check` has refused Avg and PremulSum
    }
}

/// Folds from the first term on, so that one term alone is itself (-0.0 stays -0.0).
fn fold<A: Copy + bytemuck::Zeroable>(mut terms: impl Iterator<Item = A>, f: impl Fn(A, A) -> A) -> A {
    let first = terms.next().unwrap_or(A::zeroed());
    terms.fold(first, f)
}

fn common_length<T: Element, S: AsRef<[T]>>(ranks: &[S]) -> Result<usize> {
    let Some(first) = ranks.first() else {
        return Err(Error::InvalidArgument {
            argument: "ranks",
            value: "no vector".to_owned(),
            accepted: "one vector for each rank",
        });
    };
    let expected_elems = first.as_ref().len();
    for (rank, vector) in ranks.iter().enumerate() {
        let actual_elems = vector.as_ref().len();
        if actual_elems != expected_elems {
            return Err(Error::LengthMismatch { what: format!("vector of rank {rank}"), expected_elems, actual_elems });
        }
    }
    Ok(expected_elems)
}

/// IEEE 754-2019 `minimum`: NaN if either is NaN, and -0.0 is less than +0.0. `F` is `f32` or `f64`.
pub fn minimum<F: Copy + Into<f64>>(a: F, b: F) -> F {
    let (x, y): (f64, f64) = (a.into(), b.into());
    if x.is_nan() || x < y || (x == y && x.is_sign_negative()) { a } else { b }
}

/// IEEE 754-2019 `maximum`: NaN if either is NaN, and +0.0 is greater than -0.0. `F` is `f32` or `f64`.
pub fn maximum<F: Copy + Into<f64>>(a: F, b: F) -> F {
    let (x, y): (f64, f64) = (a.into(), b.into());
    if x.is_nan() || x > y || (x == y && x.is_sign_positive()) { a } else { b }
}

// ---- norm and clip -------------------------------------------------------------------------------------------------

/// The norm of all `elements` together (every float dtype widens to f64 exactly), in f64. NaN if there is a NaN, else
/// infinite if there is an infinity. Elements are divided by the largest magnitude first, so nothing overflows.
pub fn norm(elements: &[f64], norm_type: NormType) -> f64 {
    if elements.iter().any(|x| x.is_nan()) {
        return f64::NAN;
    }
    let largest = elements.iter().fold(0.0, |largest: f64, x| largest.max(x.abs()));
    if largest == 0.0 || largest == f64::INFINITY {
        return largest;
    }
    let scaled = elements.iter().map(|x| x.abs() / largest);
    largest
        * match norm_type {
            NormType::L1 => scaled.sum::<f64>(),
            NormType::L2 => scaled.map(|x| x * x).sum::<f64>().sqrt(),
            NormType::Inf => 1.0,
            NormType::P(p) => scaled.map(|x| x.powf(p)).sum::<f64>().powf(1.0 / p),
        }
}

/// The factor that brings gradients of norm `total_norm` to `max_norm`: `max_norm / (total_norm + 1e-6)`, at most 1,
/// computed in f64 and rounded once. NaN if the norm is NaN, 0 if it is infinite.
pub fn clip_coef(total_norm: f64, max_norm: f64) -> f32 {
    let coef = max_norm / (total_norm + 1e-6);
    if coef > 1.0 { 1.0 } else { coef as f32 }
}

/// `x` limited to `[-limit, limit]`; NaN stays NaN.
pub fn clip_value(x: f32, limit: f32) -> f32 {
    if x > limit {
        limit
    } else if x < -limit {
        -limit
    } else {
        x
    }
}

// ---- casts ---------------------------------------------------------------------------------------------------------

/// `value` as f16: nearest, ties to even. NaN stays a quiet NaN of the same sign. With `saturate`, what would become an
/// infinity (infinities included) becomes the largest finite value.
pub fn f32_to_f16(value: f32, saturate: bool) -> f16 {
    f16::from_bits(nearest(value.into(), &HALF, saturate))
}

/// `value` as bf16; the rules are those of [`f32_to_f16`].
pub fn f32_to_bf16(value: f32, saturate: bool) -> bf16 {
    bf16::from_bits(nearest(value.into(), &BFLOAT, saturate))
}

/// `value` as f16, rounded once; the rules are those of [`f32_to_f16`].
pub fn f64_to_f16(value: f64, saturate: bool) -> f16 {
    f16::from_bits(nearest(value, &HALF, saturate))
}

/// `value` as bf16, rounded once; the rules are those of [`f32_to_f16`].
pub fn f64_to_bf16(value: f64, saturate: bool) -> bf16 {
    bf16::from_bits(nearest(value, &BFLOAT, saturate))
}

/// A 16-bit float type: how to read a magnitude, where infinity is, and what it would be worth as a number.
struct Format {
    to_f64: fn(u16) -> f64,
    infinity_bits: u16,
    /// The value after the largest finite one if the exponent went on: half of that last gap rounds to infinity.
    beyond: f64,
}

const HALF: Format =
    Format { to_f64: |bits| f16::from_bits(bits).to_f64(), infinity_bits: 0x7c00, beyond: 65536.0 /* 2^16 */ };
const BFLOAT: Format = Format {
    to_f64: |bits| bf16::from_bits(bits).to_f64(),
    infinity_bits: 0x7f80,
    beyond: 340282366920938463463374607431768211456.0, /* 2^128 */
};

impl Format {
    fn magnitude(&self, bits: u16) -> f64 {
        if bits == self.infinity_bits { self.beyond } else { (self.to_f64)(bits) }
    }

    /// The largest magnitude that is at most `x` (finite or not, not NaN), and its place in the gap to the next one,
    /// in `[0, 1)`.
    fn floor(&self, x: f64) -> (u16, f64) {
        if x >= self.beyond {
            return (self.infinity_bits, 0.0);
        }
        // Magnitudes are ordered as their bits.
        let (mut low, mut high) = (0, self.infinity_bits);
        while high - low > 1 {
            let middle = low + (high - low) / 2;
            if self.magnitude(middle) <= x {
                low = middle;
            } else {
                high = middle;
            }
        }
        let (below, above) = (self.magnitude(low), self.magnitude(high));
        (low, (x - below) / (above - below))
    }

    fn finish(&self, sign: u16, bits: u16, saturate: bool) -> u16 {
        sign | if saturate && bits == self.infinity_bits { bits - 1 } else { bits }
    }

    fn nan(&self, sign: u16) -> u16 {
        sign | self.infinity_bits | (if self.infinity_bits == 0x7c00 { 0x0200 } else { 0x0040 })
    }
}

fn nearest(value: f64, format: &Format, saturate: bool) -> u16 {
    let sign = if value.is_sign_negative() { 0x8000 } else { 0 };
    if value.is_nan() {
        return format.nan(sign);
    }
    let (below, place) = format.floor(value.abs());
    let up = place > 0.5 || (place == 0.5 && below % 2 == 1);
    format.finish(sign, below + u16::from(up), saturate)
}

/// Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", 2011).
pub fn philox4x32_10(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let ([mut c0, mut c1, mut c2, mut c3], [mut k0, mut k1]) = (counter, key);
    for _ in 0..10 {
        let product0 = u64::from(c0) * 0xd251_1f53;
        let product1 = u64::from(c2) * 0xcd9e_8d57;
        [c0, c1, c2, c3] =
            [(product1 >> 32) as u32 ^ c1 ^ k0, product1 as u32, (product0 >> 32) as u32 ^ c3 ^ k1, product0 as u32];
        k0 = k0.wrapping_add(0x9e37_79b9);
        k1 = k1.wrapping_add(0xbb67_ae85);
    }
    [c0, c1, c2, c3]
}

/// The 16 random bits that belong to (seed, step, global element index): one Philox block serves eight neighbours.
pub fn rounding_bits(seed: u64, step: u64, index: u64) -> u16 {
    let low_high = |x: u64| [x as u32, (x >> 32) as u32];
    let ([b0, b1], [s0, s1]) = (low_high(index / 8), low_high(step));
    let words = philox4x32_10([b0, b1, s0, s1], low_high(seed));
    (words[(index % 8 / 2) as usize] >> (index % 2 * 16)) as u16
}

/// `value` as f16, rounded away from zero with the probability (to 2^-16) that makes the mean exact; `random` comes from
/// [`rounding_bits`]. NaN and saturation as in [`f32_to_f16`].
pub fn f32_to_f16_stochastic(value: f32, random: u16, saturate: bool) -> f16 {
    f16::from_bits(stochastic(value, &HALF, random, saturate))
}

/// `value` as bf16; as [`f32_to_f16_stochastic`].
pub fn f32_to_bf16_stochastic(value: f32, random: u16, saturate: bool) -> bf16 {
    bf16::from_bits(stochastic(value, &BFLOAT, random, saturate))
}

fn stochastic(value: f32, format: &Format, random: u16, saturate: bool) -> u16 {
    let sign = if value.is_sign_negative() { 0x8000 } else { 0 };
    if value.is_nan() {
        return format.nan(sign);
    }
    let (below, place) = format.floor(f64::from(value).abs());
    let up = (place * 65536.0).floor() + f64::from(random) >= 65536.0;
    format.finish(sign, below + u16::from(up), saturate)
}

// ---- loss scaling --------------------------------------------------------------------------------------------------

/// One update of a dynamic loss scale after a step: what PyTorch's `GradScaler` does.
///
/// `(scale, good_steps)` becomes: after an overflow `(scale * 0.5, 0)`; after the 2,000th good step in a row
/// `(scale * 2, 0)`; else `(scale, good_steps + 1)`. A scale that would not be normal in f32,
/// or whose reciprocal would not, stays as it is.
pub fn scaler_update(scale: f32, good_steps: u32, found_inf: bool) -> (f32, u32) {
    let keep_normal = |next: f32| if next.is_normal() && (1.0 / next).is_normal() { next } else { scale };
    if found_inf {
        (keep_normal(scale * 0.5), 0)
    } else if good_steps + 1 == 2000 {
        (keep_normal(scale * 2.0), 0)
    } else {
        (scale, good_steps + 1)
    }
}

// ---- optimizers ----------------------------------------------------------------------------------------------------

/// One AdamW update of one element (Loshchilov & Hutter 2019, as PyTorch computes it).
///
/// `step` counts from 1. `factor` is `clip_coef / grad_scale`. Every coefficient is computed in f64 and rounded to f32
/// once; then, in f32, with `fma(a, b, c) = a * b + c` rounded once:
///
/// ```text
/// g      = grad * factor
/// m      = fma(1 - beta1, g - m, m)
/// v      = fma((1 - beta2) * g, g, beta2 * v)
/// denom  = fma(sqrt(v), 1 / sqrt(1 - beta2^step), eps)
/// weight = fma(-lr / (1 - beta1^step), m / denom, weight * (1 - lr * weight_decay))
/// ```
#[derive(Debug, Clone, Copy)]
pub struct AdamW {
    /// Learning rate.
    pub lr: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
}

impl AdamW {
    /// Updates one element in place: `weight`, first moment `m`, second moment `v`.
    pub fn update(&self, step: u64, factor: f32, grad: f32, weight: &mut f32, m: &mut f32, v: &mut f32) {
        let decay = (1.0 - self.lr * self.weight_decay) as f32;
        let step_size = (self.lr / (1.0 - power(self.beta1, step))) as f32;
        let correction = (1.0 / (1.0 - power(self.beta2, step)).sqrt()) as f32;
        let g = grad * factor;
        *m = ((1.0 - self.beta1) as f32).mul_add(g - *m, *m);
        *v = ((1.0 - self.beta2) as f32 * g).mul_add(g, self.beta2 as f32 * *v);
        let denom = v.sqrt().mul_add(correction, self.eps as f32);
        *weight = (-step_size).mul_add(*m / denom, *weight * decay);
    }
}

/// `base^exponent` by squaring, from the lowest bit of the exponent on: the same bits on every machine, which `powi` does
/// not promise.
pub fn power(mut base: f64, mut exponent: u64) -> f64 {
    let mut product = 1.0;
    while exponent > 0 {
        if exponent % 2 == 1 {
            product *= base;
        }
        base *= base;
        exponent /= 2;
    }
    product
}

/// One SGD update of one element with momentum, Nesterov's variant and weight decay, as PyTorch computes it.
///
/// In f32, coefficients rounded once from f64, `factor = clip_coef / grad_scale`:
///
/// ```text
/// g        = grad * factor
/// g        = fma(weight_decay, weight, g)                      if weight_decay != 0
/// velocity = fma(momentum, velocity, g)                        if momentum != 0 (velocity begins at 0)
/// update   = fma(momentum, velocity, g) if nesterov, velocity if momentum != 0, else g
/// weight   = fma(-lr, update, weight)
/// ```
#[derive(Debug, Clone, Copy)]
pub struct Sgd {
    /// Learning rate.
    pub lr: f64,
    /// Decay of the velocity; 0 for none.
    pub momentum: f64,
    /// Whether the update looks one step ahead.
    pub nesterov: bool,
    /// Added to the gradient, times the weight.
    pub weight_decay: f64,
}

impl Sgd {
    /// Updates one element in place.
    pub fn update(&self, factor: f32, grad: f32, weight: &mut f32, velocity: &mut f32) {
        let (lr, momentum, weight_decay) = (self.lr as f32, self.momentum as f32, self.weight_decay as f32);
        let mut g = grad * factor;
        if weight_decay != 0.0 {
            g = weight_decay.mul_add(*weight, g);
        }
        if momentum != 0.0 {
            *velocity = momentum.mul_add(*velocity, g);
            g = if self.nesterov { momentum.mul_add(*velocity, g) } else { *velocity };
        }
        *weight = (-lr).mul_add(g, *weight);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_of_halves_round_once_at_the_end() {
        // 256 + 1 is a tie in bf16 (spacing 2): rounding at every hop would lose both ones.
        let ranks = [[256.0], [1.0], [1.0]].map(|rank| rank.map(bf16::from_f32));
        assert_eq!(all_reduce(&ranks, ReduceOp::Sum).unwrap(), [bf16::from_f32(258.0)]);
    }

    #[test]
    fn order_of_the_ranks_is_the_order_of_the_sum() {
        let ranks = [[1e8f32], [1.0], [-1e8]];
        assert_eq!(all_reduce(&ranks, ReduceOp::Sum).unwrap(), [0.0]);
        assert_eq!(all_reduce_from(&ranks, ReduceOp::Sum, 2).unwrap(), [1.0]);
    }

    #[test]
    fn integers_wrap_and_are_exact_beyond_f64() {
        let ranks = [[i64::MAX], [2]];
        assert_eq!(all_reduce(&ranks, ReduceOp::Sum).unwrap(), [i64::MIN + 1]);
        assert_eq!(all_reduce(&ranks, ReduceOp::Max).unwrap(), [i64::MAX]);
        assert!(all_reduce(&ranks, ReduceOp::Avg).is_err());
    }

    #[test]
    fn average_divides_by_the_exact_count() {
        let ranks = [[1.0f32], [1.0], [1.0]];
        assert_eq!(all_reduce(&ranks, ReduceOp::Avg).unwrap(), [1.0]);
        assert_eq!(all_reduce(&ranks[..1], ReduceOp::PremulSum(0.5)).unwrap(), [0.5]);
    }

    #[test]
    fn extremes_propagate_nan_and_order_zeros() {
        let ranks = [[f32::NAN, 0.0, 1.0], [1.0, -0.0, f32::NAN]];
        let low = all_reduce(&ranks, ReduceOp::Min).unwrap();
        let high = all_reduce(&ranks, ReduceOp::Max).unwrap();
        assert!(low[0].is_nan() && low[2].is_nan() && high[0].is_nan() && high[2].is_nan());
        assert!(low[1].is_sign_negative() && high[1].is_sign_positive());
    }

    #[test]
    fn shards_and_gathers() {
        let ranks = [[1, 2, 3, 4], [10, 20, 30, 40]];
        assert_eq!(reduce_scatter(&ranks, ReduceOp::Sum).unwrap(), [[11, 22], [33, 44]]);
        assert_eq!(all_gather(&ranks).unwrap(), [1, 2, 3, 4, 10, 20, 30, 40]);
        assert_eq!(broadcast(&ranks, 1).unwrap(), ranks[1]);
        assert!(reduce_scatter(&[[1], [2]], ReduceOp::Sum).is_err());
        assert!(broadcast(&ranks, 2).is_err());
        assert!(all_gather(&[vec![1], vec![]]).is_err());
        assert!(all_gather::<u8, Vec<u8>>(&[]).is_err());
    }

    #[test]
    fn casts_agree_with_half_on_every_neighbourhood() {
        for bits in 0..=u16::MAX {
            for (wide, low, narrow) in [
                (f16::from_bits(bits).to_f32(), 13, (|x| f32_to_f16(x, false).to_bits()) as fn(f32) -> u16),
                (bf16::from_bits(bits).to_f32(), 16, |x| f32_to_bf16(x, false).to_bits()),
            ] {
                // The value itself, just above it, and on both sides of and at the middle of the gap above it.
                for offset in [0, 1, (1 << (low - 1)) - 1, 1 << (low - 1), (1 << (low - 1)) + 1] {
                    let x = f32::from_bits(wide.to_bits().wrapping_add(offset));
                    let expected = if low == 13 { f16::from_f32(x).to_bits() } else { bf16::from_f32(x).to_bits() };
                    if !x.is_nan() {
                        assert_eq!(narrow(x), expected, "{x:e}");
                    }
                }
            }
        }
    }

    #[test]
    fn saturation_and_single_rounding() {
        assert_eq!(f32_to_f16(65520.0, false), f16::INFINITY);
        assert_eq!(f32_to_f16(65519.9, false), f16::MAX);
        assert_eq!(f32_to_f16(f32::NEG_INFINITY, true), f16::MIN);
        assert_eq!(f32_to_bf16(f32::MAX, true), bf16::MAX);
        assert!(f32_to_f16(f32::NAN, true).is_nan());
        // A hair above a tie: through f32 it would become the tie.
        assert_eq!(f64_to_bf16(1.0 + 2f64.powi(-8) + 2f64.powi(-40), false), bf16::from_bits(0x3f81));
    }

    #[test]
    fn philox_known_answers() {
        // Random123's kat_vectors for philox4x32, 10 rounds.
        assert_eq!(philox4x32_10([0; 4], [0; 2]), [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]);
        assert_eq!(philox4x32_10([u32::MAX; 4], [u32::MAX; 2]), [0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd]);
        assert_eq!(
            philox4x32_10([0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344], [0xa4093822, 0x299f31d0]),
            [0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1]
        );
    }

    #[test]
    fn norms_do_not_overflow() {
        for norm_type in [NormType::L2, NormType::P(3.5)] {
            let norm = norm(&[3e300, 4e300], norm_type);
            assert!(norm.is_finite() && norm > 4e300);
        }
        assert_eq!(norm(&[3.0, -4.0], NormType::L2), 5.0);
        assert_eq!(norm(&[3.0, -4.0], NormType::L1), 7.0);
        assert_eq!(norm(&[3.0, -4.0], NormType::Inf), 4.0);
        assert_eq!(norm(&[], NormType::L2), 0.0);
        assert!(norm(&[f64::INFINITY, f64::NAN], NormType::Inf).is_nan());
    }
}
