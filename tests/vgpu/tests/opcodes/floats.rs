//! f32 and f64, and predicates of them.
//!
//! What f32 must give is computed in f64, which has more than twice its bits: a second rounding changes nothing (Figueroa, "When
//! is double rounding innocuous?", 1995). What f64 must give is computed in integers where they reach.

use crate::row::{Row, row};
use crate::values::Whole;

pub fn rows() -> Vec<Row> {
    [of_f32(), of_f64(), whole_numbers(), extrema(), signs(), comparisons()].into_iter().flatten().collect()
}

fn of_f32() -> Vec<Row> {
    vec![
        row("add.rn.f32", |(a, b): (f32, f32)| (f64::from(a) + f64::from(b)) as f32),
        row("sub.rn.f32", |(a, b): (f32, f32)| (f64::from(a) - f64::from(b)) as f32),
        row("mul.rn.f32", |(a, b): (f32, f32)| (f64::from(a) * f64::from(b)) as f32),
        row("div.rn.f32", |(a, b): (f32, f32)| (f64::from(a) / f64::from(b)) as f32),
        row("sqrt.rn.f32", |(a,): (f32,)| f64::from(a).sqrt() as f32),
        row("rcp.rn.f32", |(a,): (f32,)| (1.0 / f64::from(a)) as f32),
        row("fma.rn.f32", |(a, b, c): (f32, f32, f32)| fused(a, b, c)),
    ]
}

/// The product is exact in f64. The sum is rounded to odd there (Boldo and Melquiond, "Emulation of FMA and correctly rounded
/// sums", 2008), so that rounding it again is as rounding once.
fn fused(a: f32, b: f32, c: f32) -> f32 {
    let (product, c) = (f64::from(a) * f64::from(b), f64::from(c));
    let sum = product + c;
    if !sum.is_finite() {
        return sum as f32;
    }
    let virtual_c = sum - product;
    let lost = (product - (sum - virtual_c)) + (c - virtual_c);
    let is_even = sum.to_bits() & 1 == 0;
    (if lost == 0.0 || !is_even {
        sum
    } else if lost > 0.0 {
        sum.next_up()
    } else {
        sum.next_down()
    }) as f32
}

fn of_f64() -> Vec<Row> {
    vec![
        row("add.rn.f64", |(a, b): (f64, f64)| a + b),
        row("sub.rn.f64", |(a, b): (f64, f64)| a - b),
        row("mul.rn.f64", |(a, b): (f64, f64)| a * b),
        row("div.rn.f64", |(a, b): (f64, f64)| a / b),
        row("sqrt.rn.f64", |(a,): (f64,)| a.sqrt()),
        row("rcp.rn.f64", |(a,): (f64,)| 1.0 / a),
    ]
}

fn whole_numbers() -> Vec<Row> {
    /// The exact integer rounded once, or what the operation makes of what is no number, or of zeros.
    fn rounded(of: &[f64], exact: impl Fn(&[i128]) -> i128, plain: f64) -> f64 {
        if of.iter().any(|value| !value.is_finite()) {
            return plain;
        }
        let integers: Vec<i128> = of.iter().map(|value| *value as i128).collect();
        match exact(&integers) {
            0 => plain,
            exact => exact as f64,
        }
    }
    vec![
        row("add.rn.f64", |(Whole(a), Whole(b)): (Whole, Whole)| rounded(&[a, b], |i| i[0] + i[1], a + b)),
        row("sub.rn.f64", |(Whole(a), Whole(b)): (Whole, Whole)| rounded(&[a, b], |i| i[0] - i[1], a - b)),
        row("mul.rn.f64", |(Whole(a), Whole(b)): (Whole, Whole)| rounded(&[a, b], |i| i[0] * i[1], a * b)),
        row("fma.rn.f64", |(Whole(a), Whole(b), Whole(c)): (Whole, Whole, Whole)| {
            rounded(&[a, b, c], |i| i[0] * i[1] + i[2], a * b + c)
        }),
    ]
}

/// A place in the order of f64 in which -0 is below +0: bits, those of negative numbers turned around.
fn place(x: f64) -> i64 {
    let bits = x.to_bits() as i64;
    if bits < 0 { i64::MIN.wrapping_sub(bits) - 1 } else { bits }
}

/// One NaN is as if it were not there.
fn least(a: f64, b: f64) -> f64 {
    if b.is_nan() || (!a.is_nan() && place(a) < place(b)) { a } else { b }
}

fn most(a: f64, b: f64) -> f64 {
    -least(-a, -b)
}

fn extrema() -> Vec<Row> {
    /// With `.NaN` one NaN is enough.
    fn unless_nan(a: f32, b: f32, of: fn(f64, f64) -> f64) -> f32 {
        if a.is_nan() || b.is_nan() { f32::NAN } else { of(a.into(), b.into()) as f32 }
    }
    vec![
        row("min.f64", |(a, b): (f64, f64)| least(a, b)),
        row("max.f64", |(a, b): (f64, f64)| most(a, b)),
        row("min.NaN.f32", |(a, b): (f32, f32)| unless_nan(a, b, least)),
        row("max.NaN.f32", |(a, b): (f32, f32)| unless_nan(a, b, most)),
    ]
}

fn signs() -> Vec<Row> {
    vec![
        row("neg.f32", |(a,): (f32,)| f32::from_bits(a.to_bits() ^ 1 << 31)),
        row("neg.f64", |(a,): (f64,)| f64::from_bits(a.to_bits() ^ 1 << 63)),
        row("abs.f32", |(a,): (f32,)| f32::from_bits(a.to_bits() & (u32::MAX >> 1))),
        row("abs.f64", |(a,): (f64,)| f64::from_bits(a.to_bits() & (u64::MAX >> 1))),
    ]
}

/// Comparisons that end in `u` are true of NaN.
fn comparisons() -> Vec<Row> {
    vec![
        row("setp.eq.f32", |(a, b): (f32, f32)| a == b),
        row("setp.eq.f64", |(a, b): (f64, f64)| a == b),
        row("setp.gt.f32", |(a, b): (f32, f32)| a > b),
        row("setp.gt.f64", |(a, b): (f64, f64)| a > b),
        row("setp.lt.f32", |(a, b): (f32, f32)| a < b),
        row("setp.lt.f64", |(a, b): (f64, f64)| a < b),
        row("setp.geu.f64", |(a, b): (f64, f64)| a.is_nan() || b.is_nan() || a >= b),
        row("setp.leu.f32", |(a, b): (f32, f32)| a.is_nan() || b.is_nan() || a <= b),
        row("setp.ltu.f64", |(a, b): (f64, f64)| a.is_nan() || b.is_nan() || a < b),
        row("setp.neu.f32", |(a, b): (f32, f32)| a.is_nan() || b.is_nan() || a != b),
        row("setp.nan.f32", |(a, b): (f32, f32)| a.is_nan() || b.is_nan()),
        row("setp.nan.f64", |(a, b): (f64, f64)| a.is_nan() || b.is_nan()),
        row("setp.num.f32", |(a, b): (f32, f32)| !a.is_nan() && !b.is_nan()),
    ]
}
