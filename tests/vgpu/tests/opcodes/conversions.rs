//! Conversions and moves.

use crate::row::{Row, row, row_by};
use crate::values::{Fraction, Half, Wide};

pub fn rows() -> Vec<Row> {
    [of_floats(), of_integers(), moves(), packs()].into_iter().flatten().collect()
}

fn of_floats() -> Vec<Row> {
    vec![
        row("cvt.f32.f16", |(Half(bits),): (Half,)| of_f16(bits)),
        row("cvt.f64.f32", |(a,): (f32,)| of_f32(a)),
        row("cvt.rn.f32.f64", |(a,): (f64,)| nearest(a)),
        row("cvt.rn.f16.f32", |(Wide(a),): (Wide,)| to_f16(a)),
        row("cvt.rn.bf16.f32", |(Wide(a),): (Wide,)| to_bf16(a)),
        // The first source is the upper half.
        row("cvt.rn.f16x2.f32", |(Wide(a), Wide(b)): (Wide, Wide)| u32::from(to_f16(a)) << 16 | u32::from(to_f16(b))),
        row("cvt.rn.bf16x2.f32", |(Wide(a), Wide(b)): (Wide, Wide)| {
            u32::from(to_bf16(a)) << 16 | u32::from(to_bf16(b))
        }),
        row("cvt.rzi.s32.f32", |(Fraction(a),): (Fraction,)| toward_zero(a)),
        row("cvt.rn.f32.u32", |(a,): (u32,)| nearest(of_halves(a))),
        row("cvt.rn.f64.u32", |(a,): (u32,)| of_halves(a)),
    ]
}

fn of_f16(bits: u16) -> f32 {
    let (exponent, fraction) = (i32::from(bits >> 10 & 31), f32::from(bits & 0x3ff));
    let magnitude = match exponent {
        0 => fraction * 2f32.powi(-24),
        31 if fraction == 0.0 => f32::INFINITY,
        31 => f32::NAN,
        _ => (1024.0 + fraction) * 2f32.powi(exponent - 25),
    };
    if bits >> 15 == 1 { -magnitude } else { magnitude }
}

/// NaN is 0x7fff. What is at least halfway from the largest number to the next power of two is infinite.
fn to_f16(value: f32) -> u16 {
    let sign = (value.to_bits() >> 31 << 15) as u16;
    let magnitude = f64::from(value).abs();
    if value.is_nan() {
        return 0x7fff;
    }
    if magnitude >= 65520.0 {
        return sign | 0x7c00;
    }
    // In units of the last place; the carry out of the fraction goes into the exponent by itself.
    let exponent = (-14..16).rev().find(|exponent| magnitude >= 2f64.powi(*exponent)).unwrap_or(-14);
    let units = (magnitude * 2f64.powi(10 - exponent)).round_ties_even() as u16;
    sign | ((((exponent + 14) as u16) << 10) + units)
}

fn to_bf16(value: f32) -> u16 {
    if value.is_nan() {
        return 0x7fff;
    }
    let (upper, lower) = ((value.to_bits() >> 16) as u16, value.to_bits() & 0xffff);
    let rounds_up = lower > 0x8000 || (lower == 0x8000 && upper & 1 == 1);
    upper + u16::from(rounds_up)
}

/// f32 to f64, which is exact, by its parts.
fn of_f32(value: f32) -> f64 {
    let (exponent, fraction) = ((value.to_bits() >> 23 & 0xff) as i32, f64::from(value.to_bits() & 0x7f_ffff));
    let magnitude = match exponent {
        0 => fraction * 2f64.powi(-149),
        255 if fraction == 0.0 => f64::INFINITY,
        255 => f64::NAN,
        _ => (8_388_608.0 + fraction) * 2f64.powi(exponent - 150),
    };
    if value.is_sign_negative() { -magnitude } else { magnitude }
}

/// f64 to f32 in units of its last place. What is at least halfway from the largest number to the next power of two is infinite.
fn nearest(value: f64) -> f32 {
    let (magnitude, exponent) = (value.abs(), (value.to_bits() >> 52 & 0x7ff) as i32 - 1023);
    if value.is_nan() {
        return f32::NAN;
    }
    if magnitude >= (2.0 - 2f64.powi(-24)) * 2f64.powi(127) {
        return if value > 0.0 { f32::INFINITY } else { f32::NEG_INFINITY };
    }
    let unit = 2f64.powi(exponent.max(-126) - 23);
    let exact = (magnitude / unit).round_ties_even() * unit;
    exact.copysign(value) as f32
}

fn toward_zero(value: f32) -> i32 {
    match of_f32(value) {
        value if value.is_nan() => 0,
        value if value >= 2_147_483_647.0 => i32::MAX,
        value if value <= -2_147_483_648.0 => i32::MIN,
        value => (value - value % 1.0) as i32,
    }
}

/// Exact.
fn of_halves(value: u32) -> f64 {
    f64::from((value >> 16) as u16) * 65536.0 + f64::from(value as u16)
}

/// The low bits, or the value in more bits.
fn of_integers() -> Vec<Row> {
    vec![
        row("cvt.u16.u32", |(a,): (u32,)| (a % 65536) as u16),
        row("cvt.u16.u64", |(a,): (u64,)| (a % 65536) as u16),
        row("cvt.u32.u64", |(a,): (u64,)| (a % (1 << 32)) as u32),
        row("cvt.u32.u16", |(a,): (u16,)| u32::from(a)),
        row("cvt.u64.u16", |(a,): (u16,)| u64::from(a)),
        row("cvt.u64.u32", |(a,): (u32,)| u64::from(a)),
        row("cvt.s64.s32", |(a,): (i32,)| i64::from(a)),
        // Of a wider register the low byte.
        row("cvt.s32.s8", |(a,): (u32,)| (a % 256) as i32 - if a & 0x80 == 0 { 0 } else { 256 }),
    ]
}

fn moves() -> Vec<Row> {
    vec![
        row("mov.b32", |(a,): (u32,)| a),
        row("mov.b64", |(a,): (u64,)| a),
        row("mov.f32", |(a,): (f32,)| a),
        row("mov.f64", |(a,): (f64,)| a),
        row("mov.pred", |(a,): (bool,)| a),
        row("mov.u16", |(a,): (u16,)| a),
        row("mov.u32", |(a,): (u32,)| a),
        row("mov.u64", |(a,): (u64,)| a),
        // Between types the bits stay.
        row("mov.b32", |(a,): (f32,)| a.to_bits()),
        row("mov.b64", |(a,): (f64,)| a.to_bits()),
        // Literals: -1 of a predicate is true, floats are written as bits.
        row_by("mov.pred", "mov.pred %d, -1;", |(_,): (bool,)| true),
        row_by("mov.pred", "mov.pred %d, 0;", |(_,): (bool,)| false),
        row_by("mov.f32", "mov.f32 %d, 0fBF800001;", |(_,): (bool,)| f32::from_bits(0xbf80_0001)),
        row_by("mov.f64", "mov.f64 %d, 0d8000000000000000;", |(_,): (bool,)| -0.0f64),
        row_by("mov.u32", "mov.u32 %d, -2;", |(_,): (bool,)| u32::MAX - 1),
        row_by("mov.b64", "mov.b64 %d, 0x8000000000000001;", |(_,): (bool,)| (1u64 << 63) + 1),
    ]
}

/// The first of a brace is the lowest part.
fn packs() -> Vec<Row> {
    vec![
        row_by("mov.b32 d, {..}", "mov.b32 %d, {%a, %b};", |(a, b): (u16, u16)| u32::from(b) << 16 | u32::from(a)),
        row_by("mov.b64 d, {..}", "mov.b64 %d, {%a, %b};", |(a, b): (u32, u32)| u64::from(b) << 32 | u64::from(a)),
        row_by("mov.b32 {..}, a", "mov.b32 {%d, %h}, %a;", |(a,): (u32,)| a as u16),
        row_by("mov.b32 {..}, a", "mov.b32 {%h, %d}, %a;", |(a,): (u32,)| (a >> 16) as u16),
        row_by("mov.b64 {..}, a", "mov.b64 {%d, %r}, %a;", |(a,): (u64,)| a as u32),
        row_by("mov.b64 {..}, a", "mov.b64 {%r, %d}, %a;", |(a,): (u64,)| (a >> 32) as u32),
    ]
}
