//! `x^p` in f64 from additions, multiplications and divisions alone.
//!
//! The system's `pow` may differ in the last bit from machine to machine, and within one machine with the instructions
//! its library chooses; ranks must agree on a norm bit for bit. This one has fewer good digits (about 14 for the exponents
//! that occur), and an f32 result needs 8.

use std::f64::consts::{FRAC_1_SQRT_2, LN_2, LOG2_E};

/// `x^p` for finite `x >= 0` and finite `p > 0`; values below the normal range of f64 count as 0.
#[inline(always)]
pub(crate) fn power(x: f64, p: f64) -> f64 {
    let result = exp2(p * log2(x));
    if x < f64::MIN_POSITIVE { 0.0 } else { result }
}

/// Exponents whose powers are products in f64: those of every f32 fit it, the least denormal's (2^-149)^6 as well as the sixth
/// power of 2^128 summed over a chunk.
#[cfg(all(feature = "cuda", not(loom)))]
pub(crate) fn is_product(p: f64) -> bool {
    [3.0, 4.0, 5.0, 6.0].contains(&p)
}

const TWO_52: f64 = 4503599627370496.0;

/// `artanh(sqrt(y)) / sqrt(y)` as a series in `y`: `1/(2k + 1)`. With `y <= 0.0295` what is left out is below 2^-62.
const ARTANH: [[f64; 4]; 3] = [
    [1.0, 1.0 / 3.0, 1.0 / 5.0, 1.0 / 7.0],
    [1.0 / 9.0, 1.0 / 11.0, 1.0 / 13.0, 1.0 / 15.0],
    [1.0 / 17.0, 1.0 / 19.0, 1.0 / 21.0, 1.0 / 23.0],
];

/// `exp(y)` as a series: `1/k!`. With `|y| <= 0.3466` what is left out is below 2^-57.
const EXP: [[f64; 4]; 4] = [
    [1.0, 1.0, 1.0 / 2.0, 1.0 / 6.0],
    [1.0 / 24.0, 1.0 / 120.0, 1.0 / 720.0, 1.0 / 5040.0],
    [1.0 / 40320.0, 1.0 / 362880.0, 1.0 / 3628800.0, 1.0 / 39916800.0],
    [1.0 / 479001600.0, 1.0 / 6227020800.0, 0.0, 0.0],
];

/// A polynomial, four coefficients at a time, the lowest first: a third of Horner's latency.
#[inline(always)]
fn polynomial<const N: usize>(x: f64, coefficients: &[[f64; 4]; N]) -> f64 {
    let x2 = x * x;
    let x4 = x2 * x2;
    let mut sum = 0.0;
    for [a, b, c, d] in coefficients.iter().rev() {
        sum = sum * x4 + ((a + b * x) + (c + d * x) * x2);
    }
    sum
}

/// Base-2 logarithm of a normal positive number: `ln m = 2 artanh((m - 1) / (m + 1))` for `m` in `[sqrt(1/2), sqrt(2))`.
#[inline(always)]
fn log2(x: f64) -> f64 {
    let bits = x.to_bits();
    // The exponent of `x / m` is what remains above the bits of sqrt(1/2).
    let above = bits.wrapping_sub(FRAC_1_SQRT_2.to_bits());
    let m = f64::from_bits(bits.wrapping_sub(above & 0xfff0_0000_0000_0000));
    // As a number, by way of the low bits of 2^52: converting 64-bit integers does not vectorise everywhere.
    let biased = (above >> 52).wrapping_add(2048) & 0xfff;
    let exponent = f64::from_bits(biased | TWO_52.to_bits()) - (TWO_52 + 2048.0);
    let s = (m - 1.0) / (m + 1.0);
    exponent + 2.0 * s * polynomial(s * s, &ARTANH) * LOG2_E
}

/// `2^t`: the exact power of the nearest integer times the series of the rest; 0 below 2^-1022, infinite from 2^1024 on.
#[inline(always)]
fn exp2(t: f64) -> f64 {
    let t = t.clamp(-1023.0, 1024.0);
    // Adding 1.5 * 2^52 leaves the nearest integer in the low bits.
    let shifted = t + (1.5 * TWO_52);
    let rest = (t - (shifted - (1.5 * TWO_52))) * LN_2;
    // Exponents -1023 and 1024 make 0 and infinity: the fields 0 and 2047 with an empty mantissa.
    polynomial(rest, &EXP) * f64::from_bits(shifted.to_bits().wrapping_add(1023) << 52)
}

#[cfg(test)]
mod tests {
    use super::power;

    #[test]
    fn powers_are_good_to_twelve_digits() {
        let mut worst: f64 = 0.0;
        for i in 1..4000 {
            let x = f64::from(i) * 0.00071 + 1e-9;
            for p in [0.1, 0.5, 1.0, 2.0, 3.0, 3.5, 7.0, 20.0] {
                worst = worst.max((power(x, p) / x.powf(p) - 1.0).abs());
            }
        }
        assert!(worst < 1e-13, "{worst:e}");
        assert_eq!(power(0.0, 3.5), 0.0);
        assert_eq!(power(1.0, 3.5), 1.0);
        assert_eq!(power(f64::MIN_POSITIVE / 4.0, 1.0), 0.0);
        assert_eq!(power(0.5, 2000.0), 0.0);
        assert_eq!(power(2.0, 2000.0), f64::INFINITY);
        assert!((power(1e300, 1.0) / 1e300 - 1.0).abs() < 1e-12);
    }
}
