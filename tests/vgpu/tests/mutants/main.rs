//! Tests of the tests: the kernels of a single device broken on purpose, one way at a time, must be caught. (Those of the
//! collective: `collective/mutants.rs`.)
//!
//! A mutant is an edit of the PTX that ships, of the instructions that one line of the source became.
//!
//! What catches each (the test prints the messages and fails if this table is not true): `race` is the race detector, `bounds`
//! an access outside of an allocation, `hang` a wait that nothing ends, `result` a comparison with what must come out. The last
//! column is the first catch with the race detector off: what a GPU might show.
//!
//! | mutant | caught by | without the race detector |
//! |---|---|---|
//! | norm: last block without order | race | - |
//! | norm: counter not reset for the second launch | result | result |
//! | norm: no barrier in a team | race | result |
//! | norm: no barriers of the block | race | hang |
//! | cast: one element too many | bounds | bounds |
//! | cast: one element too few | result | result |
//! | cast: chunks overlap | race | - |
//! | accumulate: one element too many | bounds | bounds |
//! | accumulate: chunks overlap | race | result |
//! | accumulate: subtracts | result | result |
//! | optimizer: skip flag ignored | result | result |
//! | optimizer: no barrier behind the coefficients | race | bounds |
//! | unscale: multiplies by the scale | result | result |
//! | unscale: reads one element too many | bounds | bounds |
//! | unscale: writes one element too many | bounds | bounds |
//! | unscale: no barrier in a team | race | result |
//! | probe: relaxed post | race | - |
//! | probe: relaxed wait | race | - |
//! | probe: no barriers | race | result |
//! | probe: words not compared | result | result |
//! | probe: abort word not looked at | hang | hang |
//! | probe: no deadline | hang | hang |
//! | scaler: skipped step counts as good | result | result |
//! | scaler: good steps not counted | result | result |
//! | scaler: every thread | race | result |
//! | store: every thread | race | - |
//! | store: one word too many | bounds | bounds |
//! | store: one word too few | result | result |

mod checks;
mod edits;
#[path = "../tensors/mod.rs"]
mod tensors;

use annulus::kernels;
use annulus_vgpu::{Fault, Module, Options};
use checks::{Check, Failure, accumulate, cast, norm, optimizer, probe, scaler, store, unscale};
use edits::*;

/// The table above.
const TABLE: &str = include_str!("main.rs");

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum By {
    Race,
    Bounds,
    /// A wait that nothing ends.
    Hang,
    /// A comparison with what must come out.
    Result,
    Nothing,
}

impl By {
    const fn name(self) -> &'static str {
        match self {
            By::Race => "race",
            By::Bounds => "bounds",
            By::Hang => "hang",
            By::Result => "result",
            By::Nothing => "-",
        }
    }
}

/// Where in the sources the broken instructions come from.
#[derive(Clone, Copy)]
struct At {
    file: &'static str,
    source: &'static str,
    /// What the line says. Several lines may.
    line: &'static str,
}

const fn at(file: &'static str, source: &'static str, line: &'static str) -> At {
    At { file, source, line }
}

type Edit = fn(&str) -> Option<String>;

struct Mutant {
    name: &'static str,
    ptx: &'static str,
    at: At,
    /// One instruction broken; none if it is not the one.
    edit: Edit,
    check: Check,
}

impl Mutant {
    fn module(&self) -> Module {
        let At { file, source, line } = self.at;
        let named = |text: &str| text.starts_with(".file") && text.contains(&format!("\"kernels/{file}\""));
        let declared = self.ptx.lines().find(|text| named(text));
        let declared = declared.unwrap_or_else(|| panic!("{}: nothing of {file} in the kernel", self.name));
        let number = declared.split_whitespace().nth(1).unwrap();
        let numbered = source.lines().zip(1..).filter(|(text, _)| text.contains(line));
        let places: Vec<String> = numbered.map(|(_, row): (&str, u32)| format!(".loc {number} {row} ")).collect();
        assert!(!places.is_empty(), "{}: no line of {file} says {line}", self.name);
        let (mut is_there, mut count) = (false, 0);
        let edited = self.ptx.lines().map(|text| {
            let words = text.split_whitespace().collect::<Vec<_>>().join(" ");
            if words.starts_with(".loc") {
                is_there = places.iter().any(|place| words.starts_with(place));
            }
            match (self.edit)(text).filter(|_| is_there) {
                Some(broken) => {
                    count += 1;
                    broken
                }
                None => text.to_owned(),
            }
        });
        let text = edited.collect::<Vec<_>>().join("\n");
        assert!(count > 0, "{}: no such instruction", self.name);
        Module::parse(&text).unwrap()
    }
}

// ---- the mutants -------------------------------------------------------------------------------------------------------

const SIGNAL: &str = include_str!("../../../../kernels/signal.cuh");
const COMBINE: &str = include_str!("../../../../kernels/combine.cuh");
const NORM: &str = include_str!("../../../../kernels/norm.cuh");
const PACK: &str = include_str!("../../../../kernels/pack.cuh");
const ELEMENTWISE: &str = include_str!("../../../../kernels/elementwise.cuh");
const ACCUMULATE: &str = include_str!("../../../../kernels/accumulate.cu");
const OPTIMIZER: &str = include_str!("../../../../kernels/optimizer.cu");
const PROBE: &str = include_str!("../../../../kernels/probe.cu");
const SCALER: &str = include_str!("../../../../kernels/scaler.cu");
const STORE: &str = include_str!("../../../../kernels/store.cu");
const UNSCALE: &str = include_str!("../../../../kernels/unscale.cu");

/// Where the last block is found.
const LAST: At = at("signal.cuh", SIGNAL, "\"r\"(blocks - 1)");
/// Where a team's threads wait for each other.
const TEAM: At = at("norm.cuh", NORM, "bar.sync %0");
/// Where the length of a chunk, and its place, are computed.
const LENGTH: At = at("elementwise.cuh", ELEMENTWISE, "const uint32_t len_elems = static_cast<uint32_t>(min(");
const CHUNK: At = at("elementwise.cuh", ELEMENTWISE, "const uint64_t first = chunk * CHUNK_ELEMS;");

fn mutants() -> Vec<Mutant> {
    [of_norm(), of_tensors(), of_unscale(), of_probe(), of_words()].into_iter().flatten().collect()
}

fn of_norm() -> Vec<Mutant> {
    let mutant = |name, at, edit: Edit| Mutant { name, ptx: kernels::NORM, at, edit, check: norm };
    vec![
        mutant("norm: last block without order", LAST, relax),
        mutant("norm: counter not reset for the second launch", LAST, unbounded),
        mutant("norm: no barrier in a team", TEAM, without_barrier),
        mutant("norm: no barriers of the block", at("combine.cuh", COMBINE, "__syncthreads"), without_barrier),
    ]
}

fn of_tensors() -> Vec<Mutant> {
    let cast = |name, at, edit: Edit| Mutant { name, ptx: kernels::CAST, at, edit, check: cast };
    let accumulate = |name, at, edit: Edit| Mutant { name, ptx: kernels::ACCUMULATE, at, edit, check: accumulate };
    let optimizer = |name, line, edit: Edit| {
        let at = at("optimizer.cu", OPTIMIZER, line);
        Mutant { name, ptx: kernels::OPTIMIZER, at, edit, check: optimizer }
    };
    vec![
        cast("cast: one element too many", LENGTH, one_more),
        cast("cast: one element too few", LENGTH, one_fewer),
        cast("cast: chunks overlap", CHUNK, half_a_chunk),
        accumulate("accumulate: one element too many", LENGTH, one_more),
        accumulate("accumulate: chunks overlap", CHUNK, half_a_chunk),
        accumulate("accumulate: subtracts", at("accumulate.cu", ACCUMULATE, "x[k] = sum[k] + x[k]"), subtract),
        optimizer("optimizer: skip flag ignored", "signal->found_inf != 0", always_zero),
        optimizer("optimizer: no barrier behind the coefficients", "__syncthreads", without_barrier),
    ]
}

fn of_unscale() -> Vec<Mutant> {
    let mutant = |name, at, edit: Edit| Mutant { name, ptx: kernels::UNSCALE, at, edit, check: unscale };
    let unscaled = |line| at("unscale.cu", UNSCALE, line);
    vec![
        mutant(
            "unscale: multiplies by the scale",
            unscaled("const float inv_scale = static_cast<float>(1.0"),
            as_it_is,
        ),
        mutant("unscale: reads one element too many", unscaled("if (address + i * BYTES < end)"), past_the_end),
        mutant("unscale: writes one element too many", at("pack.cuh", PACK, "BYTES < span.end)"), past_the_end),
        mutant("unscale: no barrier in a team", TEAM, without_barrier),
    ]
}

fn of_probe() -> Vec<Mutant> {
    let mutant = |name, at, edit: Edit| Mutant { name, ptx: kernels::PROBE, at, edit, check: probe };
    let signal = |line| at("signal.cuh", SIGNAL, line);
    let probe = |line| at("probe.cu", PROBE, line);
    vec![
        mutant("probe: relaxed post", signal("st.release.sys"), relax),
        mutant("probe: relaxed wait", signal("ld.acquire.sys"), relax),
        mutant("probe: no barriers", probe("__syncthreads"), without_barrier),
        mutant("probe: words not compared", probe("wrong += arguments.inbox[i] != pattern("), always_equal),
        mutant("probe: abort word not looked at", signal("if (peek(patience.abort) != 0)"), always_zero),
        mutant("probe: no deadline", signal("now_ns() - begin_ns > patience.timeout_ns"), never_late),
    ]
}

/// Kernels of one thread.
fn of_words() -> Vec<Mutant> {
    let scaler = |name, line, edit: Edit| Mutant {
        name,
        ptx: kernels::SCALER,
        at: at("scaler.cu", SCALER, line),
        edit,
        check: scaler,
    };
    let store = |name, line, edit: Edit| Mutant {
        name,
        ptx: kernels::STORE,
        at: at("store.cu", STORE, line),
        edit,
        check: store,
    };
    vec![
        scaler("scaler: skipped step counts as good", "arguments.signal->found_inf != 0", always_zero),
        scaler("scaler: good steps not counted", "scaler->good_steps + 1", uncounted),
        scaler("scaler: every thread", "if (threadIdx.x != 0", every_thread),
        store("store: every thread", "if (threadIdx.x != 0", every_thread),
        store("store: one word too many", "if (i < arguments.len_words)", with_one_less),
        store("store: one word too few", "if (i < arguments.len_words)", with_one_more),
    ]
}

/// What catches the module first, and its words.
fn first_catch(module: &Module, check: Check, detect_races: bool) -> (By, String) {
    for seed in 1..4 {
        let options = Options { seed, detect_races, budget_instructions: 100_000_000, ..Options::default() };
        match check(module, &options) {
            Ok(()) => {}
            Err(Failure::Result(words)) => return (By::Result, words),
            Err(Failure::Machine(fault @ Fault::Race { .. })) => return (By::Race, fault.to_string()),
            Err(Failure::Machine(fault @ Fault::OutOfBounds { .. })) => return (By::Bounds, fault.to_string()),
            Err(Failure::Machine(fault @ (Fault::Hang { .. } | Fault::Deadlock { .. }))) => {
                return (By::Hang, fault.to_string());
            }
            Err(Failure::Machine(fault)) => panic!("{fault}"),
        }
    }
    (By::Nothing, String::new())
}

#[test]
fn what_is_not_broken_passes() {
    let kernels: [(&str, Check); 8] = [
        (kernels::NORM, norm),
        (kernels::CAST, cast),
        (kernels::ACCUMULATE, accumulate),
        (kernels::OPTIMIZER, optimizer),
        (kernels::UNSCALE, unscale),
        (kernels::PROBE, probe),
        (kernels::SCALER, scaler),
        (kernels::STORE, store),
    ];
    for (ptx, check) in kernels {
        let caught = first_catch(&Module::parse(ptx).unwrap(), check, true);
        assert_eq!(caught, (By::Nothing, String::new()));
    }
}

#[test]
fn every_mutant_is_caught() {
    let mut wrong = Vec::new();
    for mutant in mutants() {
        let module = mutant.module();
        let (by, words) = first_catch(&module, mutant.check, true);
        let (alone, _) = first_catch(&module, mutant.check, false);
        println!("{:<46} {:<6} {:<6} {}", mutant.name, by.name(), alone.name(), words.lines().next().unwrap_or(""));
        let row = format!("//! | {} | {} | {} |\n", mutant.name, by.name(), alone.name());
        if by == By::Nothing || !TABLE.contains(&row) {
            wrong.push((mutant.name, by, alone));
        }
    }
    assert!(wrong.is_empty(), "not as the table says: {wrong:?}");
}

#[test]
fn every_source_of_kernels_has_mutants() {
    let mutants = mutants();
    for (source, _) in kernels::ALL.iter().filter(|(source, _)| *source != "collective") {
        let is_of = |mutant: &Mutant| mutant.name.split(':').next() == Some(source);
        assert!(mutants.iter().any(is_of), "{source}.cu is broken nowhere");
    }
}
