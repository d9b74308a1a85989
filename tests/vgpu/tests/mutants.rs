//! Tests of the tests: the kernels of a single device broken on purpose, one way at a time, must be caught. (Those of the
//! collective: `collective/mutants.rs`.)
//!
//! A mutant is an edit of the PTX that ships, of the instructions that one line of the source became.
//!
//! What catches each (the test prints the messages and fails if this table is not true): `race` is the race detector, `bounds`
//! an access outside of an allocation, `hang` a wait that nothing ends, `result` a comparison with the host. The last column is
//! the first catch with the race detector off: what a GPU might show.
//!
//! | mutant | caught by | without the race detector |
//! |---|---|---|
//! | norm: last block without order | race | - |
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

mod tensors;

use annulus::abi::{
    AccumulateArguments, CastArguments, CastTensor, CombineArguments, ELEMENTWISE_THREADS, NORM_THREADS, NormArguments,
    NormRecord, NormSlot, NormState, NormTensor, OptimizerArguments, OptimizerState, OptimizerTensor, SgdRule,
    StepSignal, norm_kind,
};
use annulus::ops::{self, NormSlots, Saturate, SgdOptions, Weights, grad_norm};
use annulus::{DType, NormType, kernels};
use annulus_vgpu::{Fault, Module, Options};
use bytemuck::Zeroable;
use tensors::{Device, FLOATS, Random, Tensor};

/// The table above.
const TABLE: &str = include_str!("mutants.rs");

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum By {
    Race,
    Bounds,
    /// A wait that nothing ends.
    Hang,
    /// A comparison with what the host computes.
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

enum Failure {
    Machine(Fault),
    Result(String),
}

type Check = fn(&Module, &Options) -> Result<(), Failure>;

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

struct Mutant {
    name: &'static str,
    ptx: &'static str,
    at: At,
    /// One instruction broken; none if it is not the one.
    edit: fn(&str) -> Option<String>,
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

// ---- breaking ----------------------------------------------------------------------------------------------------------

fn relax(text: &str) -> Option<String> {
    text.contains("atom.acq_rel").then(|| text.replace("acq_rel", "relaxed"))
}

fn without_barrier(text: &str) -> Option<String> {
    text.contains("bar.sync").then(String::new)
}

/// The register that an instruction writes.
fn target(text: &str) -> &str {
    text.split_whitespace().nth(1).unwrap().trim_end_matches(',')
}

fn one_more(text: &str) -> Option<String> {
    let register = target_of(text, "cvt.u32.u64")?;
    Some(format!("{text}\n\tadd.s32 {register}, {register}, 1;"))
}

fn one_fewer(text: &str) -> Option<String> {
    let register = target_of(text, "cvt.u32.u64")?;
    Some(format!("{text}\n\tadd.s32 {register}, {register}, -1;"))
}

fn target_of<'t>(text: &'t str, opcode: &str) -> Option<&'t str> {
    text.trim_start().starts_with(opcode).then(|| target(text))
}

fn half_a_chunk(text: &str) -> Option<String> {
    text.contains(", 32768;").then(|| text.replace("32768", "16384"))
}

fn subtract(text: &str) -> Option<String> {
    text.contains("add.f32")
        .then(|| text.replace("add.f32", "sub.f32"))
        .or_else(|| text.contains("add.rn.f32").then(|| text.replace("add.rn.f32", "sub.rn.f32")))
}

/// A comparison with 0 that is always true.
fn always_zero(text: &str) -> Option<String> {
    text.contains("setp.eq.s32").then(|| {
        let register = text.split_whitespace().nth(2).unwrap().trim_end_matches(',');
        text.replace(", 0;", &format!(", {register};"))
    })
}

// ---- what must hold ----------------------------------------------------------------------------------------------------

fn equal(actual: &Tensor, expected: &Tensor) -> Result<(), Failure> {
    let (actual, expected) = (actual.bits(), expected.bits());
    match (0..actual.len()).find(|i| actual[*i] != expected[*i]) {
        Some(i) => Err(Failure::Result(format!("element {i}: {:#x}, not {:#x}", actual[i], expected[i]))),
        None => Ok(()),
    }
}

fn random(dtype: DType, len_elems: usize) -> Tensor {
    let mut random = Random(len_elems as u64);
    Tensor::from_fn(dtype, len_elems, |_| random.spread(1.0, 20.0))
}

/// Four tensors of four types on two blocks, measured twice.
fn norm(module: &Module, options: &Options) -> Result<(), Failure> {
    let mut device = Device::new();
    let tensors = FLOATS.map(|dtype| random(dtype, 700));
    let table = tensors.each_ref().map(|tensor| NormTensor {
        gradient: device.tensor(tensor, 0),
        len_elems: 700,
        dtype: tensor.dtype() as u32,
        padding: 0,
    });
    let range = device.all_chunks(&[700; 4]);
    let (kind, p) = norm_kind(NormType::L2);
    let combine = CombineArguments {
        slots: device.place(&[NormSlot::zeroed(); 4]),
        state: device.place(&[NormState::zeroed()]),
        signal: device.place(&[StepSignal::zeroed()]),
        records: device.place(&[NormRecord::zeroed(); 4]),
        len_slots: 4,
        len_records: 4,
        max_norm: 1.0,
        kind,
        p,
        finishes: 1,
        skips: 1,
        ..CombineArguments::zeroed()
    };
    let arguments = NormArguments { tensors: device.place(&table), range, combine };
    let slices = tensors.each_ref().map(Tensor::slice);
    let expected = grad_norm(&slices, NormType::L2, &mut NormSlots::new(&[700; 4]).unwrap()).unwrap().total_norm;
    for _ in 0..2 {
        device.run(module, "measure_norm", 2, NORM_THREADS, &arguments, options).map_err(Failure::Machine)?;
        let signal: StepSignal = device.read(combine.signal);
        if signal.total_norm.to_bits() != expected.to_bits() {
            return Err(Failure::Result(format!("norm {:e}, not {expected:e}", signal.total_norm)));
        }
    }
    Ok(())
}

const LEN_ELEMS: usize = 32768 + 45;

/// A source and a target that begin somewhere, of two chunks on two blocks.
fn two_chunks(device: &mut Device, src: &Tensor, dst: &Tensor) -> CastTensor {
    CastTensor {
        src: device.tensor(src, 4),
        dst: device.tensor(dst, 6),
        len_elems: LEN_ELEMS as u64,
        first_index: 0,
        src_dtype: src.dtype() as u32,
        dst_dtype: dst.dtype() as u32,
    }
}

fn cast(module: &Module, options: &Options) -> Result<(), Failure> {
    let (mut device, src) = (Device::new(), random(DType::F32, LEN_ELEMS));
    let mut expected = Tensor::zeros(DType::BF16, LEN_ELEMS);
    let tensor = two_chunks(&mut device, &src, &expected);
    let (tensors, range) = (device.place(&[tensor]), device.all_chunks(&[LEN_ELEMS]));
    let arguments = CastArguments { tensors, range, ..CastArguments::zeroed() };
    device.run(module, "cast_tensors", 2, ELEMENTWISE_THREADS, &arguments, options).map_err(Failure::Machine)?;
    ops::cast(src.slice(), expected.slice_mut(), Saturate::No).unwrap();
    equal(&device.read_tensor(tensor.dst, DType::BF16, LEN_ELEMS), &expected)
}

fn accumulate(module: &Module, options: &Options) -> Result<(), Failure> {
    let (mut device, src, dst) = (Device::new(), random(DType::F32, LEN_ELEMS), random(DType::BF16, LEN_ELEMS));
    let tensor = two_chunks(&mut device, &src, &dst);
    let (tensors, range) = (device.place(&[tensor]), device.all_chunks(&[LEN_ELEMS]));
    let arguments = AccumulateArguments { tensors, range, factor: 1.0, ..AccumulateArguments::zeroed() };
    device.run(module, "accumulate_tensors", 2, ELEMENTWISE_THREADS, &arguments, options).map_err(Failure::Machine)?;
    let (terms, sums) = (src.values(), dst.values());
    let expected = Tensor::from_fn(DType::BF16, LEN_ELEMS, |i| f64::from(sums[i] as f32 + terms[i] as f32));
    equal(&device.read_tensor(tensor.dst, DType::BF16, LEN_ELEMS), &expected)
}

/// A step, and one that is skipped.
fn optimizer(module: &Module, options: &Options) -> Result<(), Failure> {
    let (mut device, gradient, weights) = (Device::new(), random(DType::F32, 301), random(DType::F32, 301));
    let sgd = SgdOptions { lr: 0.05, momentum: 0.0, nesterov: false, weight_decay: 0.0 };
    let tensor = OptimizerTensor {
        gradient: device.tensor(&gradient, 4),
        master: device.tensor(&weights, 8),
        len_elems: 301,
        ..OptimizerTensor::zeroed()
    };
    let rule = SgdRule { lr: sgd.lr, momentum: 0.0, weight_decay: 0.0, nesterov: 0, padding: 0 };
    let mut arguments = OptimizerArguments {
        tensors: device.place(&[tensor]),
        range: device.all_chunks(&[301]),
        rule: device.place(&[rule]),
        state: device.place(&[OptimizerState::zeroed()]),
        ..OptimizerArguments::zeroed()
    };
    let mut expected = weights.clone();
    let Tensor::F32(master) = &mut expected else { unreachable!() };
    let signal = ops::StepSignal::default();
    ops::sgd_step(&sgd, signal, Weights::Master { master, model: None }, gradient.slice(), &mut []).unwrap();
    for found_inf in [0, 1] {
        let signal = StepSignal { clip_coef: 1.0, grad_scale: 1.0, found_inf, ..StepSignal::zeroed() };
        arguments.signal = device.place(&[signal]);
        device.run(module, "step_sgd", 1, ELEMENTWISE_THREADS, &arguments, options).map_err(Failure::Machine)?;
        equal(&device.read_tensor(tensor.master, DType::F32, 301), &expected)?;
    }
    Ok(())
}

// ---- the mutants -------------------------------------------------------------------------------------------------------

const SIGNAL: &str = include_str!("../../../kernels/signal.cuh");
const COMBINE: &str = include_str!("../../../kernels/combine.cuh");
const NORM: &str = include_str!("../../../kernels/norm.cuh");
const ELEMENTWISE: &str = include_str!("../../../kernels/elementwise.cuh");
const ACCUMULATE: &str = include_str!("../../../kernels/accumulate.cu");
const OPTIMIZER: &str = include_str!("../../../kernels/optimizer.cu");

/// Where the length of a chunk, and its place, are computed.
const LENGTH: At = at("elementwise.cuh", ELEMENTWISE, "const uint32_t len_elems = static_cast<uint32_t>(min(");
const CHUNK: At = at("elementwise.cuh", ELEMENTWISE, "const uint64_t first = chunk * CHUNK_ELEMS;");

fn mutants() -> Vec<Mutant> {
    let mutant = |name, ptx, at, edit, check| Mutant { name, ptx, at, edit, check };
    vec![
        mutant(
            "norm: last block without order",
            kernels::NORM,
            at("signal.cuh", SIGNAL, "\"r\"(blocks - 1)"),
            relax,
            norm,
        ),
        mutant("norm: no barrier in a team", kernels::NORM, at("norm.cuh", NORM, "bar.sync %0"), without_barrier, norm),
        mutant(
            "norm: no barriers of the block",
            kernels::NORM,
            at("combine.cuh", COMBINE, "__syncthreads"),
            without_barrier,
            norm,
        ),
        mutant("cast: one element too many", kernels::CAST, LENGTH, one_more, cast),
        mutant("cast: one element too few", kernels::CAST, LENGTH, one_fewer, cast),
        mutant("cast: chunks overlap", kernels::CAST, CHUNK, half_a_chunk, cast),
        mutant("accumulate: one element too many", kernels::ACCUMULATE, LENGTH, one_more, accumulate),
        mutant("accumulate: chunks overlap", kernels::ACCUMULATE, CHUNK, half_a_chunk, accumulate),
        mutant(
            "accumulate: subtracts",
            kernels::ACCUMULATE,
            at("accumulate.cu", ACCUMULATE, "x[k] = sum[k] + x[k]"),
            subtract,
            accumulate,
        ),
        mutant(
            "optimizer: skip flag ignored",
            kernels::OPTIMIZER,
            at("optimizer.cu", OPTIMIZER, "signal->found_inf != 0"),
            always_zero,
            optimizer,
        ),
        mutant(
            "optimizer: no barrier behind the coefficients",
            kernels::OPTIMIZER,
            at("optimizer.cu", OPTIMIZER, "__syncthreads"),
            without_barrier,
            optimizer,
        ),
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
    let kernels: [(&str, Check); 4] = [
        (kernels::NORM, norm),
        (kernels::CAST, cast),
        (kernels::ACCUMULATE, accumulate),
        (kernels::OPTIMIZER, optimizer),
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
