//! `cvt`. Source: PTX ISA 9.0, 9.7.9.22.

use half::{bf16, f16};

use super::arith::{from_f32, integer, unsigned};
use crate::ptx::{Kind, Round, Type};

const CANONICAL_NAN_16: u16 = 0x7fff;

pub(super) fn convert(round: Round, saturate: bool, to: Type, from: Type, value: u64, second: u64) -> u64 {
    if to.lanes == 2 {
        // The first source becomes the upper half.
        return u64::from(narrow(value, to, saturate)) << 16 | u64::from(narrow(second, to, saturate));
    }
    match (to.is_float(), from.is_float()) {
        (false, false) => {
            let value = integer(value, from);
            if saturate { clamp(value, to) } else { value as u64 }
        }
        (true, false) => {
            let value = integer(value, from);
            if to.bytes == 4 { (value as f32).to_bits().into() } else { (value as f64).to_bits() }
        }
        (false, true) => to_integer(round, to, from, widen(value, from)),
        (true, true) if to.bytes == 2 => narrow(value, to, saturate).into(),
        (true, true) => {
            let value = rounded(round, widen(value, from));
            if to.bytes == 4 { from_f32(value as f32) } else { value.to_bits() }
        }
    }
}

/// Exact.
fn widen(value: u64, from: Type) -> f64 {
    match (from.kind, from.bytes) {
        (Kind::Brain, _) => bf16::from_bits(value as u16).to_f64(),
        (_, 2) => f16::from_bits(value as u16).to_f64(),
        (_, 4) => f32::from_bits(value as u32).into(),
        _ => f64::from_bits(value),
    }
}

fn rounded(round: Round, value: f64) -> f64 {
    match round {
        Round::Nearest => value,
        Round::IntegerNearest => value.round_ties_even(),
        Round::IntegerZero => value.trunc(),
        Round::IntegerDown => value.floor(),
        Round::IntegerUp => value.ceil(),
    }
}

/// Out of range clamps, with or without `.sat`. NaN is 0 unless a 64-bit type takes part.
fn to_integer(round: Round, to: Type, from: Type, value: f64) -> u64 {
    if value.is_nan() {
        return if to.bytes == 8 || from.bytes == 8 { 1 << (to.bytes * 8 - 1) } else { 0 };
    }
    clamp(rounded(round, value) as i128, to)
}

fn clamp(value: i128, to: Type) -> u64 {
    let bits = to.bytes * 8;
    let (least, most) =
        if to.is_signed() { (-(1i128 << (bits - 1)), (1i128 << (bits - 1)) - 1) } else { (0, (1 << bits) - 1) };
    value.clamp(least, most) as u64
}

/// f32 to f16 or bf16, to nearest, ties to even; with `.satfinite` the largest finite value instead of an infinity.
fn narrow(value: u64, to: Type, saturate: bool) -> u16 {
    let value = f32::from_bits(unsigned(value, 4) as u32);
    if value.is_nan() {
        return CANONICAL_NAN_16;
    }
    let (bits, infinity) = match to.kind {
        Kind::Brain => (bf16::from_f32(value).to_bits(), bf16::INFINITY.to_bits()),
        _ => (f16::from_f32(value).to_bits(), f16::INFINITY.to_bits()),
    };
    if saturate && bits & 0x7fff == infinity { bits - 1 } else { bits }
}
