//! Operands and variable declarations.

use super::{Parsed, opcode};
use crate::ptx::{Operand, Special};

/// What a declared name stands for.
#[derive(Debug, Clone)]
pub(super) enum Name {
    Register(usize),
    /// Offset in parameter, shared or local memory.
    Offset(u64),
    DynamicShared,
}

/// A declared piece of memory.
pub(super) struct Variable {
    pub name: String,
    pub len_bytes: usize,
    pub align_bytes: usize,
}

/// `[.param] [.align n] .type [.ptr ..] name[count]`.
pub(super) fn variable(text: &str) -> Parsed<Variable> {
    let malformed = || format!("malformed declaration `{text}`");
    let (mut element_bytes, mut align_bytes) = (None, 1usize);
    let (mut name, mut count) = ("", 1usize);
    let mut words = text.split_whitespace();
    while let Some(word) = words.next() {
        match word.strip_prefix('.') {
            Some("param" | "ptr" | "global") => {}
            Some("align") => align_bytes = words.next().and_then(|n| n.parse().ok()).ok_or_else(malformed)?,
            Some(ty) => element_bytes = Some(opcode::ty(ty).ok_or_else(malformed)?.bytes),
            None => match word.split_once('[') {
                Some((stem, length)) => {
                    name = stem;
                    count = length.trim_end_matches(']').parse().map_err(|_| malformed())?;
                }
                None => name = word,
            },
        }
    }
    let element_bytes = element_bytes.ok_or_else(malformed)?;
    let len_bytes = element_bytes.checked_mul(count).ok_or_else(malformed)?;
    // `.param .u64 .ptr .align 1 name` speaks of what is pointed to, so the element's own alignment stands.
    let align_bytes = align_bytes.max(element_bytes);
    if name.is_empty() || !align_bytes.is_power_of_two() {
        return Err(malformed());
    }
    Ok(Variable { name: name.to_owned(), len_bytes, align_bytes })
}

/// Cuts at commas outside brackets and braces; `d|p` of a shuffle becomes a vector.
pub(super) fn split(text: &str) -> Vec<String> {
    let (mut parts, mut depth) = (vec![String::new()], 0);
    for c in text.chars() {
        match c {
            '{' | '[' => depth += 1,
            '}' | ']' => depth -= 1,
            _ => {}
        }
        match parts.last_mut() {
            Some(part) if c != ',' || depth > 0 => part.push(c),
            _ => parts.push(String::new()),
        }
    }
    parts.into_iter().map(|part| part.trim().to_owned()).filter(|part| !part.is_empty()).collect()
}

pub(super) fn read(text: &str, names: &impl Fn(&str) -> Option<Name>) -> Parsed<Operand> {
    let text = text.trim();
    if let Some(inner) = text.strip_prefix('{').and_then(|text| text.strip_suffix('}')) {
        let elements = split(inner);
        return Ok(Operand::Vector(elements.iter().map(|element| read(element, names)).collect::<Parsed<_>>()?));
    }
    if let Some((value, predicate)) = text.split_once('|') {
        return Ok(Operand::Vector(vec![read(value, names)?, read(predicate, names)?]));
    }
    if let Some(inner) = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')) {
        let (base, offset) = match inner.split_once('+') {
            Some((base, offset)) => (base, immediate(offset.trim())? as i64),
            None => (inner, 0),
        };
        return Ok(Operand::Address { base: Box::new(read(base, names)?), offset });
    }
    match names(text) {
        Some(Name::Register(number)) => return Ok(Operand::Register(number)),
        Some(Name::Offset(offset)) => return Ok(Operand::Immediate(offset)),
        Some(Name::DynamicShared) => return Ok(Operand::DynamicShared),
        None => {}
    }
    match text {
        "_" => Ok(Operand::Sink),
        "WARP_SZ" => Ok(Operand::Immediate(32)),
        _ if text.starts_with('%') => special(text).map(Operand::Special),
        _ => immediate(text).map(Operand::Immediate),
    }
}

fn special(text: &str) -> Parsed<Special> {
    let unknown = || format!("unknown register `{text}`");
    match text {
        "%laneid" => return Ok(Special::LaneId),
        "%warpid" => return Ok(Special::WarpId),
        "%clock" | "%clock64" | "%globaltimer" => return Ok(Special::Time),
        _ => {}
    }
    let (register, axis) = text.split_once('.').ok_or_else(unknown)?;
    let axis = ["x", "y", "z"].iter().position(|name| *name == axis).ok_or_else(unknown)?;
    match register {
        "%tid" => Ok(Special::Tid(axis)),
        "%ntid" => Ok(Special::Ntid(axis)),
        "%ctaid" => Ok(Special::Ctaid(axis)),
        "%nctaid" => Ok(Special::Nctaid(axis)),
        _ => Err(unknown()),
    }
}

/// A literal's bits: `0f3F800000`, `0d3FF0000000000000`, `-1`, `0x1f`, `7U`.
fn immediate(text: &str) -> Parsed<u64> {
    let unknown = |_| format!("unknown operand `{text}`");
    let lower = text.to_ascii_lowercase();
    if let Some(bits) = lower.strip_prefix("0f").or(lower.strip_prefix("0d")) {
        return u64::from_str_radix(bits, 16).map_err(unknown);
    }
    let (negative, digits) = lower.strip_prefix('-').map_or((false, lower.as_str()), |digits| (true, digits));
    let digits = digits.trim_end_matches('u');
    let magnitude = match digits.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => digits.parse(),
    };
    let magnitude = magnitude.map_err(unknown)?;
    Ok(if negative { magnitude.wrapping_neg() } else { magnitude })
}
