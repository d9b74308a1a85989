//! What must hold of the kernels: short runs in which whatever the mutants break shows.

use annulus::abi::{
    AccumulateArguments, CastArguments, CastTensor, CombineArguments, ELEMENTWISE_THREADS, LossScaler, NORM_THREADS,
    NormArguments, NormRecord, NormSlot, NormState, NormTensor, OptimizerArguments, OptimizerState, OptimizerTensor,
    PROBE_THREADS, ProbeArguments, ProbeReport, STORE_WORDS, ScalerArguments, SgdRule, StepSignal, StoreArguments,
    UnscaleArguments, UnscaleTensor, Verdict, norm_kind,
};
use annulus::ops::{self, GradScaler, NormSlots, Saturate, SgdOptions, Weights, grad_norm};
use annulus::{DType, NormType};
use annulus_vgpu::{Arguments, Fault, Launch, Module, Options, run};
use bytemuck::{Pod, Zeroable};

use crate::tensors::{Device, FLOATS, Random, Tensor};

pub enum Failure {
    Machine(Fault),
    Result(String),
}

pub type Check = fn(&Module, &Options) -> Result<(), Failure>;

/// Threads of a kernel that one warp runs.
const WARP_THREADS: u32 = 32;

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

/// What the last block needs, and where it leaves the norm.
fn combining(device: &mut Device, len_slots: u64) -> CombineArguments {
    let (kind, p) = norm_kind(NormType::L2);
    CombineArguments {
        slots: device.place(&vec![NormSlot::zeroed(); len_slots as usize]),
        state: device.place(&[NormState::zeroed()]),
        signal: device.place(&[StepSignal::zeroed()]),
        records: device.place(&[NormRecord::zeroed(); 4]),
        len_slots,
        len_records: 4,
        max_norm: 1.0,
        kind,
        p,
        finishes: 1,
        skips: 1,
        ..CombineArguments::zeroed()
    }
}

/// The norm that the last launch has left, which the next one must write anew.
fn take_norm(device: &mut Device, combine: &CombineArguments, expected: f64) -> Result<(), Failure> {
    let signal: StepSignal = device.read(combine.signal);
    device.memory.write(combine.signal, size_of::<StepSignal>()).unwrap().fill(0);
    match signal.total_norm.to_bits() == expected.to_bits() {
        true => Ok(()),
        false => Err(Failure::Result(format!("norm {:e}, not {expected:e}", signal.total_norm))),
    }
}

/// Four tensors of four types on two blocks, measured twice.
pub fn norm(module: &Module, options: &Options) -> Result<(), Failure> {
    let mut device = Device::new();
    let tensors = FLOATS.map(|dtype| random(dtype, 700));
    let table = tensors.each_ref().map(|tensor| NormTensor {
        gradient: device.tensor(tensor, 0),
        len_elems: 700,
        dtype: tensor.dtype() as u32,
        padding: 0,
    });
    let range = device.all_chunks(&[700; 4]);
    let combine = combining(&mut device, 4);
    let arguments = NormArguments { tensors: device.place(&table), range, combine };
    let slices = tensors.each_ref().map(Tensor::slice);
    let expected = grad_norm(&slices, NormType::L2, &mut NormSlots::new(&[700; 4]).unwrap()).unwrap().total_norm;
    for _ in 0..2 {
        device.run(module, "measure_norm", 2, NORM_THREADS, &arguments, options).map_err(Failure::Machine)?;
        take_norm(&mut device, &combine, expected)?;
    }
    Ok(())
}

/// A tensor that becomes narrower and one that becomes wider, with ends within 16 bytes, on two blocks.
pub fn unscale(module: &Module, options: &Options) -> Result<(), Failure> {
    let mut device = Device::new();
    let pairs = [(DType::F32, DType::BF16), (DType::F16, DType::F32)];
    let sources = pairs.map(|(from, _)| random(from, 701));
    let table = [0, 1].map(|i| UnscaleTensor {
        src: device.tensor(&sources[i], 0),
        dst: device.tensor(&Tensor::zeros(pairs[i].1, 701), 0),
        len_elems: 701,
        src_dtype: pairs[i].0 as u32,
        dst_dtype: pairs[i].1 as u32,
    });
    let range = device.all_chunks(&[701; 2]);
    let combine = combining(&mut device, 2);
    let arguments =
        UnscaleArguments { tensors: device.place(&table), range, combine, scale: device.place(&[1024.0f32]) };
    let mut slots = NormSlots::new(&[701; 2]).unwrap();
    slots.begin(NormType::L2).unwrap();
    let expected = [0, 1].map(|i| {
        let mut expected = Tensor::zeros(pairs[i].1, 701);
        slots.unscale_at(i, 0, sources[i].slice(), expected.slice_mut(), 1.0 / 1024.0).unwrap();
        expected
    });
    device.run(module, "unscale_norm", 2, NORM_THREADS, &arguments, options).map_err(Failure::Machine)?;
    for (entry, expected) in table.iter().zip(&expected) {
        equal(&device.read_tensor(entry.dst, expected.dtype(), 701), expected)?;
    }
    take_norm(&mut device, &combine, slots.combine().unwrap().total_norm)
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

pub fn cast(module: &Module, options: &Options) -> Result<(), Failure> {
    let (mut device, src) = (Device::new(), random(DType::F32, LEN_ELEMS));
    let mut expected = Tensor::zeros(DType::BF16, LEN_ELEMS);
    let tensor = two_chunks(&mut device, &src, &expected);
    let (tensors, range) = (device.place(&[tensor]), device.all_chunks(&[LEN_ELEMS]));
    let arguments = CastArguments { tensors, range, ..CastArguments::zeroed() };
    device.run(module, "cast_tensors", 2, ELEMENTWISE_THREADS, &arguments, options).map_err(Failure::Machine)?;
    ops::cast(src.slice(), expected.slice_mut(), Saturate::No).unwrap();
    equal(&device.read_tensor(tensor.dst, DType::BF16, LEN_ELEMS), &expected)
}

pub fn accumulate(module: &Module, options: &Options) -> Result<(), Failure> {
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
pub fn optimizer(module: &Module, options: &Options) -> Result<(), Failure> {
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

/// Steps of both kinds, with the host's scaler beside the device's.
pub fn scaler(module: &Module, options: &Options) -> Result<(), Failure> {
    let (mut device, mut host) = (Device::new(), GradScaler::new(1024.0, 2.0, 0.5, 2).unwrap());
    let scaler = device.place(&[LossScaler {
        scale: host.scale(),
        growth_factor: 2.0,
        backoff_factor: 0.5,
        growth_interval: 2,
        good_steps: 0,
        enabled: 1,
    }]);
    for found_inf in [0, 0, 0, 1, 0, 0] {
        let signal = device.place(&[StepSignal { found_inf, ..StepSignal::zeroed() }]);
        let arguments = ScalerArguments { scaler, signal };
        device.run(module, "update_scaler", 1, WARP_THREADS, &arguments, options).map_err(Failure::Machine)?;
        host.update(found_inf != 0);
        let actual: LossScaler = device.read(scaler);
        if (actual.scale, actual.good_steps) != (host.scale(), host.good_steps()) {
            return Err(Failure::Result(format!("{actual:?}, not {host:?}")));
        }
    }
    Ok(())
}

/// As many words as are said, at the places of the first.
pub fn store(module: &Module, options: &Options) -> Result<(), Failure> {
    let words = [1, 2, 3, 4, 5].map(|i| 0x0123_4567_89ab_cdefu64.wrapping_mul(i));
    for len_words in 0..=STORE_WORDS {
        let mut device = Device::new();
        let target = device.place(&vec![0u64; len_words]);
        let arguments = StoreArguments { target, words, len_words: len_words as u32, padding: 0 };
        device.run(module, "store_words", 1, WARP_THREADS, &arguments, options).map_err(Failure::Machine)?;
        let actual: Vec<u64> = (0..len_words as u64).map(|i| device.read(target + 8 * i)).collect();
        if actual != words[..len_words] {
            return Err(Failure::Result(format!("{actual:x?} of {len_words} words")));
        }
    }
    Ok(())
}

/// What one rank of a pair has: what the peer writes, and the report.
#[derive(Clone, Copy)]
struct Inbox {
    words: u64,
    flag: u64,
    abort: u64,
    report: u64,
}

const PROBE_WORDS: u64 = 300;
/// In the virtual GPU a nanosecond is an instruction.
const PROBE_TIMEOUT_NS: u64 = 200_000;

fn probe_of(ranks: [Inbox; 2], rank: usize) -> ProbeArguments {
    let (mine, peer) = (ranks[rank], ranks[1 - rank]);
    ProbeArguments {
        peer_inbox: peer.words,
        peer_flag: peer.flag,
        inbox: mine.words,
        flag: mine.flag,
        abort: mine.abort,
        report: mine.report,
        timeout_ns: PROBE_TIMEOUT_NS,
        len_words: PROBE_WORDS,
        rank: rank as u32,
        peer: 1 - rank as u32,
        generation: 1,
        ..ProbeArguments::zeroed()
    }
}

/// A sound link, one that loses words, a peer that does not come, and one that is given up for another reason.
pub fn probe(module: &Module, options: &Options) -> Result<(), Failure> {
    let options = Options { budget_instructions: 3_000_000, ..options.clone() };
    let clean = ProbeReport { verdict: Verdict::Arrived as u32, seen: 1, wrong_words: 0 };
    let late = ProbeReport { verdict: Verdict::Late as u32, seen: 0, wrong_words: 0 };
    let trial = |aborts: u32, change: fn(ProbeArguments) -> ProbeArguments, expected: &[ProbeReport]| {
        let mut device = Device::new();
        let ranks = [0, 1].map(|_| Inbox {
            words: device.place(&[0u32; PROBE_WORDS as usize]),
            flag: device.place(&[0u32]),
            abort: device.place(&[aborts]),
            report: device.place(&[ProbeReport::zeroed()]),
        });
        let kernel = module.kernel("probe_peer").unwrap();
        let launches: Vec<Launch<'_>> = (0..expected.len())
            .map(|rank| {
                let arguments = probe_of(ranks, rank);
                let arguments = words_of(&if rank == 0 { change(arguments) } else { arguments });
                Launch { device: rank, ..Launch::new(kernel, 1, PROBE_THREADS, arguments) }
            })
            .collect();
        run(&launches, &mut device.memory, &options).map_err(Failure::Machine)?;
        for (rank, expected) in ranks.iter().zip(expected) {
            let actual: ProbeReport = device.read(rank.report);
            if actual != *expected {
                return Err(Failure::Result(format!("{actual:?}, not {expected:?}")));
            }
        }
        Ok(())
    };
    trial(0, |whole| whole, &[clean, clean])?;
    trial(0, |lossy| ProbeArguments { len_words: 256, ..lossy }, &[clean, ProbeReport { wrong_words: 44, ..clean }])?;
    trial(0, |alone| alone, &[late])?;
    let aborted = ProbeReport { verdict: Verdict::Aborted as u32, ..late };
    trial(1, |patient| ProbeArguments { timeout_ns: u64::MAX, ..patient }, &[aborted])
}

fn words_of<A: Pod>(arguments: &A) -> Arguments {
    let words: &[u64] = bytemuck::cast_slice(std::slice::from_ref(arguments));
    words.iter().fold(Arguments::new(), |arguments, word| arguments.u64(*word))
}
