//! Operations on register values. Values are 64-bit patterns of which an operation of `ty` reads the low bytes.
//!
//! f32 results that are NaN are 0x7fffffff, as on the hardware. Where PTX leaves a result undefined, the answer is an error.

use crate::ptx::{Compare, Compute, Half, Kind, Test, Type};

const CANONICAL_NAN_F32: u32 = 0x7fff_ffff;

/// The low `bytes` of `value`, zero-extended.
pub(super) fn unsigned(value: u64, bytes: usize) -> u64 {
    if bytes == 8 { value } else { value & ((1 << (bytes * 8)) - 1) }
}

/// The low `bytes` of `value`, sign-extended.
pub(super) fn signed(value: u64, bytes: usize) -> i64 {
    let unused_bits = 64 - bytes * 8;
    ((value << unused_bits) as i64) >> unused_bits
}

/// The integer that `value` is, in a type that holds both signed and unsigned.
pub(super) fn integer(value: u64, ty: Type) -> i128 {
    if ty.is_signed() { signed(value, ty.bytes).into() } else { unsigned(value, ty.bytes).into() }
}

pub(super) fn from_f32(value: f32) -> u64 {
    if value.is_nan() { CANONICAL_NAN_F32.into() } else { value.to_bits().into() }
}

fn f32_of(value: u64) -> f32 {
    f32::from_bits(value as u32)
}

/// `operands` without the destination.
pub(super) fn compute(op: Compute, ty: Type, operands: [u64; 4]) -> Result<u64, &'static str> {
    match (ty.is_float(), ty.bytes) {
        (true, 4) => {
            let [a, b, c, _] = operands.map(f32_of);
            Ok(match op {
                // The sign operations are on bits: NaN keeps its payload.
                Compute::Neg => operands[0] ^ 0x8000_0000,
                Compute::Abs => operands[0] & 0x7fff_ffff,
                _ => from_f32(match op {
                    Compute::Add => a + b,
                    Compute::Sub => a - b,
                    Compute::Mul(_) => a * b,
                    Compute::Div => a / b,
                    Compute::Fma => a.mul_add(b, c),
                    Compute::Sqrt => a.sqrt(),
                    Compute::Rcp => 1.0 / a,
                    Compute::Min(nan) => extremum(a.into(), b.into(), nan, false) as f32,
                    Compute::Max(nan) => extremum(a.into(), b.into(), nan, true) as f32,
                    _ => return Err("no such f32 operation"),
                }),
            })
        }
        (true, _) => {
            let [a, b, c, _] = operands.map(f64::from_bits);
            Ok(match op {
                Compute::Add => a + b,
                Compute::Sub => a - b,
                Compute::Mul(_) => a * b,
                Compute::Div => a / b,
                Compute::Fma => a.mul_add(b, c),
                Compute::Neg => -a,
                Compute::Abs => a.abs(),
                Compute::Sqrt => a.sqrt(),
                Compute::Rcp => 1.0 / a,
                Compute::Min(nan) => extremum(a, b, nan, false),
                Compute::Max(nan) => extremum(a, b, nan, true),
                _ => return Err("no such f64 operation"),
            }
            .to_bits())
        }
        (false, _) => integers(op, ty, operands),
    }
}

/// One NaN gives the other operand unless `.NaN` was written; -0 is less than +0.
fn extremum(a: f64, b: f64, propagate: bool, maximum: bool) -> f64 {
    match (a.is_nan(), b.is_nan()) {
        (true, true) => f64::NAN,
        (true, false) | (false, true) if propagate => f64::NAN,
        (true, false) => b,
        (false, true) => a,
        (false, false) => {
            let a_is_less = a < b || (a == b && a.is_sign_negative());
            if a_is_less == maximum { b } else { a }
        }
    }
}

fn integers(op: Compute, ty: Type, operands: [u64; 4]) -> Result<u64, &'static str> {
    let bits = ty.bytes as u32 * 8;
    let [a, b, c, _] = operands.map(|operand| unsigned(operand, ty.bytes));
    let (x, y) = (integer(a, ty), integer(b, ty));
    let product = x.wrapping_mul(y);
    // Shift counts are 32-bit registers whatever the type.
    let count = operands[1] as u32;
    Ok(match op {
        Compute::Add => a.wrapping_add(b),
        Compute::Sub => a.wrapping_sub(b),
        Compute::Mul(half) => half_of(product, half, bits),
        Compute::Mad(Half::Wide) => (product as u64).wrapping_add(operands[2]),
        Compute::Mad(half) => half_of(product, half, bits).wrapping_add(c),
        Compute::Div | Compute::Rem if y == 0 => return Err("division by zero: PTX leaves the result unspecified"),
        Compute::Div => (x / y) as u64,
        Compute::Rem => (x % y) as u64,
        Compute::Neg => a.wrapping_neg(),
        Compute::Abs => x.unsigned_abs() as u64,
        Compute::Min(_) => x.min(y) as u64,
        Compute::Max(_) => x.max(y) as u64,
        Compute::And => a & b,
        Compute::Or => a | b,
        Compute::Xor => a ^ b,
        // Of a predicate only the lowest bit counts.
        Compute::Not if ty.kind == Kind::Predicate => a ^ 1,
        Compute::Not => !a,
        Compute::Shl => a.checked_shl(count).filter(|_| count < bits).unwrap_or(0),
        Compute::Shr => (x >> count.min(bits)) as u64,
        Compute::Popc => a.count_ones().into(),
        Compute::Clz => (a.leading_zeros() - (64 - bits)).into(),
        Compute::Brev => a.reverse_bits() >> (64 - bits),
        Compute::Prmt => permute(a, b, c),
        Compute::Lop3 => logic(a, b, c, operands[3]),
        Compute::Bfe => extract(a, operands[1], operands[2], ty),
        Compute::Bfi => {
            let (position, len) = (operands[2] as u32 & 0xff, operands[3] as u32 & 0xff);
            let ones = 1u128.checked_shl(len.min(64)).unwrap_or(0).wrapping_sub(1);
            let field = ones.checked_shl(position).unwrap_or(0) as u64;
            (b & !field) | (u128::from(a).checked_shl(position).unwrap_or(0) as u64 & field)
        }
        Compute::ShfLeft(wrap) => ((b << 32 | a) << funnel(operands[2], wrap)) >> 32,
        Compute::ShfRight(wrap) => (b << 32 | a) >> funnel(operands[2], wrap),
        Compute::Fma | Compute::Sqrt | Compute::Rcp => return Err("no such integer operation"),
    })
}

fn half_of(product: i128, half: Half, bits: u32) -> u64 {
    match half {
        Half::Low | Half::Wide => product as u64,
        Half::High => (product >> bits) as u64,
    }
}

fn funnel(count: u64, wrap: bool) -> u32 {
    let count = count as u32;
    if wrap { count & 31 } else { count.min(32) }
}

/// `prmt.b32` in its default mode: each selector nibble picks a byte of `b:a`, or spreads its sign.
fn permute(a: u64, b: u64, selector: u64) -> u64 {
    let bytes = (b << 32 | a).to_le_bytes();
    (0..4).fold(0, |result, i| {
        let nibble = (selector >> (i * 4)) & 0xf;
        let byte = bytes[(nibble & 7) as usize];
        let byte = if nibble & 8 == 0 { byte } else { ((byte as i8) >> 7) as u8 };
        result | u64::from(byte) << (i * 8)
    })
}

fn logic(a: u64, b: u64, c: u64, table: u64) -> u64 {
    (0..8).filter(|row| table >> row & 1 == 1).fold(0, |result, row| {
        let pick = |value: u64, bit: u64| if row >> bit & 1 == 1 { value } else { !value };
        result | (pick(a, 2) & pick(b, 1) & pick(c, 0))
    })
}

fn extract(a: u64, position: u64, len: u64, ty: Type) -> u64 {
    let (position, len, bits) = (position as u32 & 0xff, len as u32 & 0xff, ty.bytes as u32 * 8);
    if len == 0 {
        return 0;
    }
    // Beyond the most significant bit a signed field goes on with the sign.
    let wide = integer(a, ty) >> position.min(127);
    let len = len.min(if ty.is_signed() { 127 } else { bits });
    let field = wide & ((1i128 << len) - 1);
    let extended = if ty.is_signed() { field << (128 - len) >> (128 - len) } else { field };
    extended as u64
}

pub(super) fn test(test: Test, ty: Type, a: u64, b: u64) -> bool {
    let order = if ty.is_float() {
        let wide = |value| if ty.bytes == 4 { f64::from(f32_of(value)) } else { f64::from_bits(value) };
        wide(a).partial_cmp(&wide(b))
    } else {
        let unsigned = matches!(test, Test::Compare { unsigned: true, .. });
        let kind = if unsigned { Kind::Unsigned } else { ty.kind };
        let ty = Type { kind, ..ty };
        Some(integer(a, ty).cmp(&integer(b, ty)))
    };
    match test {
        Test::IsNan { expected } => order.is_none() == expected,
        Test::Compare { compare, unordered, .. } => order.map_or(unordered, |order| match compare {
            Compare::Eq => order.is_eq(),
            // An ordered `ne` of a NaN is false.
            Compare::Ne => order.is_ne(),
            Compare::Lt => order.is_lt(),
            Compare::Le => order.is_le(),
            Compare::Gt => order.is_gt(),
            Compare::Ge => order.is_ge(),
        }),
    }
}
