//! Ways to break one instruction. Each gives the broken text, or none if the instruction is not the one.

fn opcode(text: &str) -> &str {
    text.split_whitespace().next().unwrap_or("")
}

/// Operand `at`, counted from the target.
fn operand(text: &str, at: usize) -> &str {
    text.trim().trim_end_matches(';').split_whitespace().nth(1 + at).unwrap().trim_end_matches(',')
}

/// The instruction with another last operand.
fn with_last(text: &str, operand: &str) -> String {
    format!("{}, {operand};", text.rsplit_once(',').unwrap().0)
}

// ---- order -------------------------------------------------------------------------------------------------------------

pub fn relax(text: &str) -> Option<String> {
    let order = ["acq_rel", "acquire", "release"].into_iter().find(|order| opcode(text).contains(order))?;
    Some(text.replace(order, "relaxed"))
}

pub fn without_barrier(text: &str) -> Option<String> {
    text.contains("bar.sync").then(String::new)
}

/// A counter that goes on where it should begin again.
pub fn unbounded(text: &str) -> Option<String> {
    opcode(text).contains(".inc.").then(|| with_last(text, "-1"))
}

// ---- numbers -----------------------------------------------------------------------------------------------------------

pub fn one_more(text: &str) -> Option<String> {
    changed_by(text, 1)
}

pub fn one_fewer(text: &str) -> Option<String> {
    changed_by(text, -1)
}

fn changed_by(text: &str, change: i32) -> Option<String> {
    (opcode(text) == "cvt.u32.u64").then(|| {
        let register = operand(text, 0);
        format!("{text}\n\tadd.s32 {register}, {register}, {change};")
    })
}

pub fn half_a_chunk(text: &str) -> Option<String> {
    text.contains(", 32768;").then(|| text.replace("32768", "16384"))
}

pub fn subtract(text: &str) -> Option<String> {
    ["add.f32", "add.rn.f32"].contains(&opcode(text)).then(|| text.replace("add", "sub"))
}

/// The number itself in place of its reciprocal.
pub fn as_it_is(text: &str) -> Option<String> {
    (opcode(text) == "rcp.rn.f32").then(|| text.replace("rcp.rn.f32", "mov.f32"))
}

/// What counts by one no longer counts.
pub fn uncounted(text: &str) -> Option<String> {
    (opcode(text) == "add.s32" && operand(text, 2) == "1").then(|| with_last(text, "0"))
}

// ---- conditions --------------------------------------------------------------------------------------------------------

/// What is compared with 0 counts as 0.
pub fn always_zero(text: &str) -> Option<String> {
    let compares = ["setp.eq.s32", "setp.ne.s32"].contains(&opcode(text)) && operand(text, 2) == "0";
    compares.then(|| with_last(text, operand(text, 1)))
}

/// As [`always_zero`], where the code goes on only for 0: thread 0, by its number.
pub fn every_thread(text: &str) -> Option<String> {
    (opcode(text) == "setp.ne.s32").then(|| always_zero(text)).flatten()
}

/// What differs counts as equal.
pub fn always_equal(text: &str) -> Option<String> {
    (opcode(text) == "setp.ne.s32").then(|| with_last(text, operand(text, 1)))
}

/// No time is too long.
pub fn never_late(text: &str) -> Option<String> {
    (opcode(text) == "setp.le.u64").then(|| with_last(text, operand(text, 1)))
}

/// What lies at the end is not yet behind it.
pub fn past_the_end(text: &str) -> Option<String> {
    (opcode(text) == "setp.ge.u64").then(|| text.replace("setp.ge", "setp.gt"))
}

/// A length that is tested against a number passes with one less.
pub fn with_one_less(text: &str) -> Option<String> {
    bound_changed_by(text, -1)
}

/// It needs one more.
pub fn with_one_more(text: &str) -> Option<String> {
    bound_changed_by(text, 1)
}

fn bound_changed_by(text: &str, change: i32) -> Option<String> {
    if opcode(text) != "setp.lt.u32" {
        return None;
    }
    let bound: i32 = operand(text, 2).parse().ok()?;
    Some(with_last(text, &(bound + change).to_string()))
}
