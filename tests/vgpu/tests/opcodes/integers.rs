//! Integers, bits, and predicates of them.

use std::num::NonZeroU32;

use crate::row::{Row, row};
use crate::values::{Count, Selector};

pub fn rows() -> Vec<Row> {
    [arithmetic(), extrema(), bits(), comparisons(), selections()].into_iter().flatten().collect()
}

/// The low bits of the exact result.
fn arithmetic() -> Vec<Row> {
    vec![
        row("add.s32", |(a, b): (i32, i32)| (i64::from(a) + i64::from(b)) as i32),
        row("add.s64", |(a, b): (i64, i64)| (i128::from(a) + i128::from(b)) as i64),
        row("sub.s16", |(a, b): (i16, i16)| (i64::from(a) - i64::from(b)) as i16),
        row("sub.s32", |(a, b): (i32, i32)| (i64::from(a) - i64::from(b)) as i32),
        row("sub.s64", |(a, b): (i64, i64)| (i128::from(a) - i128::from(b)) as i64),
        row("neg.s64", |(a,): (i64,)| (-i128::from(a)) as i64),
        row("mul.lo.s32", |(a, b): (i32, i32)| (i64::from(a) * i64::from(b)) as i32),
        row("mul.lo.s64", |(a, b): (i64, i64)| (i128::from(a) * i128::from(b)) as i64),
        row("mul.wide.u16", |(a, b): (u16, u16)| u32::from(a) * u32::from(b)),
        row("mul.wide.s32", |(a, b): (i32, i32)| i64::from(a) * i64::from(b)),
        row("mul.wide.u32", |(a, b): (u32, u32)| u64::from(a) * u64::from(b)),
        row("mad.lo.s32", |(a, b, c): (i32, i32, i32)| (i128::from(a) * i128::from(b) + i128::from(c)) as i32),
        row("div.u32", |(a, b): (u32, NonZeroU32)| (0..32).rev().fold((0, 0u64), |r, i| divide(r, a >> i & 1, b)).0),
        row("rem.u32", |(a, b): (u32, NonZeroU32)| {
            (0..32).rev().fold((0, 0u64), |r, i| divide(r, a >> i & 1, b)).1 as u32
        }),
    ]
}

/// Long division by one more digit: (quotient, remainder).
fn divide((quotient, remainder): (u32, u64), digit: u32, divisor: NonZeroU32) -> (u32, u64) {
    let (remainder, divisor) = (remainder << 1 | u64::from(digit), u64::from(divisor.get()));
    if remainder >= divisor { (quotient << 1 | 1, remainder - divisor) } else { (quotient << 1, remainder) }
}

fn extrema() -> Vec<Row> {
    vec![
        row("min.u32", |(a, b): (u32, u32)| if a < b { a } else { b }),
        row("min.s32", |(a, b): (i32, i32)| if a < b { a } else { b }),
        row("min.u64", |(a, b): (u64, u64)| if a < b { a } else { b }),
        row("min.s64", |(a, b): (i64, i64)| if a < b { a } else { b }),
        row("max.u32", |(a, b): (u32, u32)| if a > b { a } else { b }),
        row("max.s32", |(a, b): (i32, i32)| if a > b { a } else { b }),
        row("max.u64", |(a, b): (u64, u64)| if a > b { a } else { b }),
        row("max.s64", |(a, b): (i64, i64)| if a > b { a } else { b }),
    ]
}

fn bits() -> Vec<Row> {
    vec![
        row("and.b16", |(a, b): (u16, u16)| a & b),
        row("and.b32", |(a, b): (u32, u32)| a & b),
        row("and.b64", |(a, b): (u64, u64)| a & b),
        row("and.pred", |(a, b): (bool, bool)| a && b),
        row("or.b16", |(a, b): (u16, u16)| a | b),
        row("or.b32", |(a, b): (u32, u32)| a | b),
        row("or.b64", |(a, b): (u64, u64)| a | b),
        row("or.pred", |(a, b): (bool, bool)| a || b),
        row("xor.b32", |(a, b): (u32, u32)| (a | b) - (a & b)),
        row("xor.b64", |(a, b): (u64, u64)| (a | b) - (a & b)),
        row("xor.pred", |(a, b): (bool, bool)| a != b),
        row("not.b32", |(a,): (u32,)| u32::MAX - a),
        row("not.pred", |(a,): (bool,)| !a),
        // Counts above the width are as the width.
        row("shl.b32", |(a, Count(n)): (u32, Count)| if n < 32 { a << n } else { 0 }),
        row("shl.b64", |(a, Count(n)): (u64, Count)| if n < 64 { a << n } else { 0 }),
        row("shr.u32", |(a, Count(n)): (u32, Count)| if n < 32 { a >> n } else { 0 }),
        row("shr.u64", |(a, Count(n)): (u64, Count)| if n < 64 { a >> n } else { 0 }),
        // Wrapped: of a count its low five bits.
        row("shf.r.wrap.b32", |(a, b, Count(n)): (u32, u32, Count)| {
            ((u64::from(b) << 32 | u64::from(a)) >> (n % 32)) as u32
        }),
        row("prmt.b32", |(a, b, Selector(s)): (u32, u32, Selector)| permuted(a, b, s)),
        row("bfi.b64", |(a, b, Count(at), Count(len)): (u64, u64, Count, Count)| inserted(a, b, at % 256, len % 256)),
    ]
}

fn permuted(a: u32, b: u32, selector: u32) -> u32 {
    let [a, b] = [a, b].map(u32::to_le_bytes);
    let bytes = [a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3]];
    u32::from_le_bytes([0, 4, 8, 12].map(|shift| {
        let nibble = selector >> shift & 15;
        match (bytes[nibble as usize % 8], nibble < 8) {
            (byte, true) => byte,
            (byte, false) if byte >= 0x80 => 0xff,
            _ => 0,
        }
    }))
}

/// `b` with the low `len` bits of `a` from bit `at` on, as many as there is room for.
fn inserted(a: u64, b: u64, at: u32, len: u32) -> u64 {
    let field = (at..(at + len).min(64)).fold(0, |field, bit| field | 1 << bit);
    let moved = if at < 64 { a << at } else { 0 };
    b & !field | moved & field
}

fn comparisons() -> Vec<Row> {
    vec![
        row("setp.eq.b32", |(a, b): (u32, u32)| a == b),
        row("setp.eq.b64", |(a, b): (u64, u64)| a == b),
        row("setp.eq.s16", |(a, b): (i16, i16)| a == b),
        row("setp.eq.s32", |(a, b): (i32, i32)| a == b),
        row("setp.eq.s64", |(a, b): (i64, i64)| a == b),
        row("setp.ne.s16", |(a, b): (i16, i16)| a != b),
        row("setp.ne.s32", |(a, b): (i32, i32)| a != b),
        row("setp.ne.s64", |(a, b): (i64, i64)| a != b),
        row("setp.ge.s32", |(a, b): (i32, i32)| a >= b),
        row("setp.ge.u32", |(a, b): (u32, u32)| a >= b),
        row("setp.ge.u64", |(a, b): (u64, u64)| a >= b),
        row("setp.gt.s32", |(a, b): (i32, i32)| a > b),
        row("setp.gt.u32", |(a, b): (u32, u32)| a > b),
        row("setp.gt.u64", |(a, b): (u64, u64)| a > b),
        row("setp.le.s32", |(a, b): (i32, i32)| a <= b),
        row("setp.le.u64", |(a, b): (u64, u64)| a <= b),
        row("setp.lt.s32", |(a, b): (i32, i32)| a < b),
        row("setp.lt.u16", |(a, b): (u16, u16)| a < b),
        row("setp.lt.u32", |(a, b): (u32, u32)| a < b),
        row("setp.lt.u64", |(a, b): (u64, u64)| a < b),
    ]
}

fn selections() -> Vec<Row> {
    vec![
        row("selp.b16", |(a, b, p): (u16, u16, bool)| if p { a } else { b }),
        row("selp.b32", |(a, b, p): (u32, u32, bool)| if p { a } else { b }),
        row("selp.b64", |(a, b, p): (u64, u64, bool)| if p { a } else { b }),
        row("selp.u16", |(a, b, p): (u16, u16, bool)| if p { a } else { b }),
        row("selp.u32", |(a, b, p): (u32, u32, bool)| if p { a } else { b }),
        row("selp.u64", |(a, b, p): (u64, u64, bool)| if p { a } else { b }),
        row("selp.f32", |(a, b, p): (f32, f32, bool)| if p { a } else { b }),
        row("selp.f64", |(a, b, p): (f64, f64, bool)| if p { a } else { b }),
    ]
}
