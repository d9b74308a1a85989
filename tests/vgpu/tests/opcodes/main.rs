//! Every instruction that the kernels have, on values that are hard for it, against what PTX says of it, written down once more
//! in Rust. A kernel with an instruction that has no row here fails a test. (Instructions that no kernel has, and what is not
//! understood: `semantics.rs`. What orders memory: `races.rs`.)
//!
//! ```text
//! row:   name of the instruction     sources, each from a list of hard values     what must come out
//!        one block of one thread for every combination of sources                 (values.rs, row.rs)
//! ```
//! Source: PTX ISA 9.0, chapter 9.

mod conversions;
mod floats;
mod integers;
mod memory;
mod row;
mod threads;
mod values;

use std::collections::BTreeSet;

use annulus::kernels;
use row::Row;

fn rows() -> Vec<Row> {
    [integers::rows(), floats::rows(), conversions::rows(), memory::rows(), threads::rows()]
        .into_iter()
        .flatten()
        .collect()
}

/// The names of what one line of PTX has: the instruction with all its modifiers, with the form where one name has several,
/// its guard, and the special registers that it reads.
fn names_of(line: &str) -> Vec<String> {
    let line = line.trim();
    if line.is_empty() || line.starts_with(['.', '/', '{', '}', '(', ')']) || line.ends_with([':', ',']) {
        return Vec::new();
    }
    let mut names = Vec::new();
    let mut rest = line.trim_end_matches(';');
    if let Some(guarded) = rest.strip_prefix('@') {
        names.push(if guarded.starts_with('!') { "@!p" } else { "@p" }.to_owned());
        rest = guarded.split_once(char::is_whitespace).unwrap().1.trim();
    }
    let (code, operands) = rest.split_once(char::is_whitespace).unwrap_or((rest, ""));
    let operands = operands.trim();
    names.push(match code {
        "bar.sync" if operands.contains(',') => "bar.sync a, b".to_owned(),
        code if code.starts_with("mov.") && operands.starts_with('{') => format!("{code} {{..}}, a"),
        code if code.starts_with("mov.") && operands.contains('{') => format!("{code} d, {{..}}"),
        code => code.to_owned(),
    });
    let words = operands.split(|c: char| !(c.is_alphanumeric() || ".%_$".contains(c)));
    let is_numbered = |word: &str| word.trim_start_matches(|c: char| "%prsfd".contains(c)).parse::<u32>().is_ok();
    names.extend(words.filter(|word| word.starts_with('%') && !is_numbered(word)).map(str::to_owned));
    names
}

#[test]
fn names_tell_forms_guards_and_special_registers() {
    for (line, names) in [
        ("\tadd.s32 \t%r1, %r2, -1;", vec!["add.s32"]),
        ("\t@%p1 bra \t$L__BB0_3;", vec!["@p", "bra"]),
        ("@!%p1 ret;", vec!["@!p", "ret"]),
        ("mov.b64 %rd1, {%r1,%r2};", vec!["mov.b64 d, {..}"]),
        ("mov.b64 {%rs1, %rs2}, %rd1;", vec!["mov.b64 {..}, a"]),
        ("bar.sync %r5, 64;", vec!["bar.sync a, b"]),
        ("mov.u64 %rd31, %globaltimer;", vec!["mov.u64", "%globaltimer"]),
        ("mad.lo.s32 %r1, %ctaid.x, %ntid.x, %r3;", vec!["mad.lo.s32", "%ctaid.x", "%ntid.x"]),
        ("$L__BB0_3:", vec![]),
        ("\t.reg .pred \t%p<7>;", vec![]),
        (".visible .entry store_words(", vec![]),
    ] {
        assert_eq!(names_of(line), names, "{line}");
    }
}

#[test]
fn every_instruction_of_the_kernels_has_a_row() {
    let known: BTreeSet<&str> = rows().iter().map(|row| row.name).collect();
    let of_kernels: BTreeSet<String> =
        kernels::ALL.iter().flat_map(|(_, text)| text.lines().flat_map(names_of)).collect();
    assert!(of_kernels.len() > 150, "{} instructions are too few to be all", of_kernels.len());
    let missing: Vec<_> = of_kernels.iter().filter(|name| !known.contains(name.as_str())).collect();
    assert!(missing.is_empty(), "no row for {missing:?}");
}

/// What the rows say holds; a failure names the instruction, its sources and what came out.
#[track_caller]
fn check(rows: Vec<Row>) {
    rows.into_iter().for_each(|row| (row.check)());
}

#[test]
fn integers_and_their_predicates() {
    check(integers::rows());
}

#[test]
fn floats_and_their_predicates() {
    check(floats::rows());
}

#[test]
fn conversions_and_moves() {
    check(conversions::rows());
}

#[test]
fn loads_stores_and_atomics() {
    check(memory::rows());
}

#[test]
fn what_threads_do_together_and_where_they_go() {
    check(threads::rows());
}
