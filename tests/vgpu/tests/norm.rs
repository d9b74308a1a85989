//! `kernels/norm.cu` against the host backend, bit for bit, and against the reference within the bound that it states.

mod tensors;

use std::sync::LazyLock;

use annulus::abi::{
    CombineArguments, NORM_THREADS, NormArguments, NormRecord, NormSlot, NormState, NormTensor, StepSignal, norm_kind,
};
use annulus::ops::{NormSlots, clip_coef, grad_norm};
use annulus::{DType, NormType, kernels, reference};
use annulus_vgpu::{Module, Options, Report};
use bytemuck::Zeroable;
use tensors::{Device, FLOATS, Random, Tensor, fast};

const TYPES: [NormType; 8] = [
    NormType::L1,
    NormType::L2,
    NormType::Inf,
    NormType::P(3.0),
    NormType::P(4.0),
    NormType::P(5.0),
    NormType::P(6.0),
    NormType::P(3.5),
];
const MAX_NORM: f64 = 1.0;

static MODULE: LazyLock<Module> = LazyLock::new(|| Module::parse(kernels::NORM).unwrap());

/// One list of gradients on a device, ready to be measured any number of times.
struct Gradients {
    device: Device,
    arguments: NormArguments,
}

impl Gradients {
    fn new(tensors: &[(Tensor, u64)], norm_type: NormType) -> Gradients {
        let mut device = Device::new();
        let table: Vec<NormTensor> = tensors
            .iter()
            .map(|(tensor, offset_bytes)| NormTensor {
                gradient: device.tensor(tensor, *offset_bytes),
                len_elems: tensor.len_elems() as u64,
                dtype: tensor.dtype() as u32,
                padding: 0,
            })
            .collect();
        let lens: Vec<usize> = tensors.iter().map(|(tensor, _)| tensor.len_elems()).collect();
        let range = device.all_chunks(&lens);
        let (kind, p) = norm_kind(norm_type);
        let combine = CombineArguments {
            slots: device.place(&vec![NormSlot::zeroed(); range.len_chunks as usize]),
            state: device.place(&[NormState::zeroed()]),
            signal: device.place(&[StepSignal::zeroed()]),
            records: device.place(&[NormRecord::zeroed(); 4]),
            len_slots: range.len_chunks,
            len_records: 4,
            max_norm: MAX_NORM,
            kind,
            p,
            finishes: 1,
            skips: 1,
            ..CombineArguments::zeroed()
        };
        let arguments = NormArguments { tensors: device.place(&table), range, combine };
        Gradients { device, arguments }
    }

    fn measure(&mut self, blocks: u32, options: &Options) -> (StepSignal, Report) {
        let CombineArguments { kind, p, .. } = self.arguments.combine;
        let kernel = match kind {
            3 if [3.0, 4.0, 5.0, 6.0].contains(&p) => "measure_norm_products",
            3 => "measure_norm_p",
            _ => "measure_norm",
        };
        let report = self
            .device
            .run(&MODULE, kernel, blocks, NORM_THREADS, &self.arguments, options)
            .unwrap_or_else(|fault| panic!("{fault}"));
        (self.device.read(self.arguments.combine.signal), report)
    }
}

/// What the host says of the same tensors.
fn host(tensors: &[(Tensor, u64)], norm_type: NormType) -> annulus::ops::NormResult {
    let lens: Vec<usize> = tensors.iter().map(|(tensor, _)| tensor.len_elems()).collect();
    let slices: Vec<_> = tensors.iter().map(|(tensor, _)| tensor.slice()).collect();
    grad_norm(&slices, norm_type, &mut NormSlots::new(&lens).unwrap()).unwrap()
}

#[track_caller]
fn check(tensors: &[(Tensor, u64)], norm_type: NormType, blocks: u32, options: &Options) -> Report {
    let (signal, report) = Gradients::new(tensors, norm_type).measure(blocks, options);
    let expected = host(tensors, norm_type);
    let what = format!(
        "{norm_type:?} of {:?}",
        tensors.iter().map(|(t, o)| (t.dtype(), t.len_elems(), o)).collect::<Vec<_>>()
    );
    if expected.total_norm.is_nan() {
        assert!(signal.total_norm.is_nan(), "{what}: {signal:?}");
    } else {
        let (actual, expected) = (signal.total_norm, expected.total_norm);
        assert_eq!(actual.to_bits(), expected.to_bits(), "{what}: {actual:e}, host {expected:e}");
    }
    assert_eq!(signal.nonfinite != 0, expected.nonfinite, "{what}");
    assert_eq!(signal.found_inf, signal.nonfinite, "{what}");
    assert_eq!(signal.first_nonfinite == u64::MAX, expected.first_nonfinite.is_none(), "{what}");
    let expected_coef = if expected.nonfinite { 1.0 } else { clip_coef(expected.total_norm, MAX_NORM) };
    assert_eq!(signal.clip_coef.to_bits(), expected_coef.to_bits(), "{what}");
    let values: Vec<f64> = tensors.iter().flat_map(|(tensor, _)| tensor.values()).collect();
    let exact = reference::norm(&values, norm_type);
    if exact.is_finite() && exact != 0.0 {
        let error = (signal.total_norm / exact - 1.0).abs();
        assert!(error <= 2f64.powi(-23), "{what}: off by {error:e}");
    }
    report
}

fn ordinary(dtype: DType, len_elems: usize, seed: u64) -> Tensor {
    let mut random = Random(seed);
    Tensor::from_fn(dtype, len_elems, |_| random.spread(1.0, 20.0))
}

#[test]
fn every_dtype_and_length_has_the_bits_of_the_host() {
    for dtype in FLOATS {
        for (i, len_elems) in [0, 1, 2, 31, 129, 2047, 2048, 4099].into_iter().enumerate() {
            for norm_type in TYPES {
                let options = if len_elems < 200 { Options::default() } else { fast() };
                check(&[(ordinary(dtype, len_elems, i as u64), 0)], norm_type, 1, &options);
            }
        }
    }
}

#[test]
fn every_alignment_and_end_is_read_and_nothing_beside_it() {
    for dtype in FLOATS {
        let size_bytes = dtype.size_bytes() as u64;
        for offset_bytes in (size_bytes..16).step_by(dtype.size_bytes()) {
            let tensor = ordinary(dtype, 2048 + 77, offset_bytes);
            check(&[(tensor, offset_bytes)], NormType::L2, 1, &fast());
        }
        check(&[(ordinary(dtype, 5, 5), size_bytes)], NormType::L1, 1, &Options::default());
        check(&[(ordinary(dtype, 300, 5), size_bytes)], NormType::P(3.0), 1, &fast());
    }
}

/// Several chunks, all dtypes, empty tensors between.
fn mixed() -> Vec<(Tensor, u64)> {
    let lens =
        [(DType::BF16, 32768 * 2 + 33), (DType::F32, 0), (DType::F16, 32768), (DType::F64, 1531), (DType::F32, 40_003)];
    lens.iter().enumerate().map(|(i, (dtype, len))| (ordinary(*dtype, *len, i as u64), [0, 4, 2, 8, 0][i])).collect()
}

#[test]
fn the_grid_does_not_change_the_bits() {
    let tensors = mixed();
    let mut seen = Vec::new();
    for blocks in [1, 2, 5] {
        let mut gradients = Gradients::new(&tensors, NormType::L2);
        seen.push(gradients.measure(blocks, &fast()).0);
    }
    assert_eq!(seen[0].total_norm.to_bits(), host(&tensors, NormType::L2).total_norm.to_bits());
    assert!(seen.iter().all(|signal| signal == &seen[0]), "{seen:?}");
}

#[test]
fn blocks_race_for_nothing_but_the_counter() {
    let tensors: Vec<_> = FLOATS.map(|dtype| (ordinary(dtype, 700, 9), 0)).into();
    for (norm_type, seed) in [(NormType::L2, 1), (NormType::L2, 2), (NormType::P(1.5), 3), (NormType::P(3.0), 4)] {
        check(&tensors, norm_type, 2, &Options { seed, ..Options::default() });
    }
}

#[test]
fn a_nan_or_an_infinity_is_seen_wherever_it_stands() {
    for (dtype, norm_type) in [(DType::F32, NormType::L2), (DType::BF16, NormType::Inf), (DType::F16, NormType::L1)] {
        for at in [0, 1, 127, 128, 2047, 2048, 4100] {
            for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
                let tensor = Tensor::from_fn(dtype, 4101, |i| if i == at { bad } else { 1.0 });
                check(&[(ordinary(dtype, 3, 1), 0), (tensor, 0)], norm_type, 1, &fast());
            }
        }
    }
    for (dtype, norm_type) in [
        (DType::F64, NormType::L2),
        (DType::F64, NormType::Inf),
        (DType::F32, NormType::P(3.5)),
        (DType::BF16, NormType::P(3.0)),
        (DType::F64, NormType::P(5.0)),
    ] {
        for bad in [f64::NAN, f64::INFINITY] {
            let tensor = Tensor::from_fn(dtype, 300, |i| if i == 299 { bad } else { 1.0 });
            check(&[(tensor, 0)], norm_type, 1, &fast());
        }
    }
}

#[test]
fn values_at_the_ends_of_the_range_are_neither_lost_nor_infinite() {
    for norm_type in TYPES {
        for (dtype, largest) in [
            (DType::F32, 3e38),
            (DType::F32, 1e-25),
            (DType::F32, 1e-44),
            (DType::BF16, 1e30),
            (DType::F16, 1e-7),
            (DType::F64, 1e200),
            (DType::F64, 1e-200),
        ] {
            let mut random = Random(7);
            let tensor = Tensor::from_fn(dtype, 2300, |_| random.spread(largest, 3.0));
            // The second tensor's scale differs, and the third has no term at all.
            let tensors = [(tensor, 0), (ordinary(dtype, 40, 3), 0), (Tensor::zeros(dtype, 2100), 0)];
            check(&tensors, norm_type, 1, &fast());
        }
    }
    check(&[(Tensor::from_fn(DType::F32, 100, |_| -0.0), 0)], NormType::L2, 1, &fast());
    // Beside tiny terms a slot without any must not count: its ratio of scales is infinite.
    let tiny = [(Tensor::from_fn(DType::F64, 9, |_| 1e-200), 0), (Tensor::zeros(DType::F32, 9), 0)];
    check(&tiny, NormType::L2, 1, &fast());
}

#[test]
fn launches_by_bucket_finish_once_and_can_be_replayed() {
    let tensors = mixed();
    let mut gradients = Gradients::new(&tensors, NormType::L2);
    let all = gradients.arguments.range.len_chunks;
    let expected = host(&tensors, NormType::L2).total_norm;
    for step in 1..=5u32 {
        for (first_chunk, len_chunks, finishes) in [(0, 2, 0), (2, all - 2, 0), (0, 0, 1)] {
            gradients.arguments.range =
                annulus::abi::ChunkRange { first_chunk, len_chunks, ..gradients.arguments.range };
            gradients.arguments.combine.finishes = finishes;
            gradients.measure(1 + step % 2, &fast());
        }
        let combine = gradients.arguments.combine;
        let record: NormRecord =
            gradients.device.read(combine.records + u64::from(step % 4) * size_of::<NormRecord>() as u64);
        assert_eq!(record.generation, step);
        assert_eq!(record.signal.total_norm.to_bits(), expected.to_bits());
        let state: NormState = gradients.device.read(combine.state);
        assert_eq!(state, NormState { arrivals: 0, generation: step });
    }
}

#[test]
fn the_loss_scale_is_taken_out_of_the_norm() {
    let tensors = [(ordinary(DType::F32, 500, 3), 0)];
    let mut gradients = Gradients::new(&tensors, NormType::L2);
    gradients.arguments.combine.grad_scale = gradients.device.place(&[1024f32]);
    let (signal, _) = gradients.measure(1, &fast());
    let total_norm = host(&tensors, NormType::L2).total_norm / 1024.0;
    assert_eq!(signal.total_norm.to_bits(), total_norm.to_bits());
    assert_eq!((signal.grad_scale, signal.clip_coef), (1024.0, clip_coef(total_norm, MAX_NORM)));

    let tensors = [(Tensor::from_fn(DType::F32, 9, |_| f64::INFINITY), 0)];
    let mut gradients = Gradients::new(&tensors, NormType::L2);
    gradients.arguments.combine.skips = 0;
    let (signal, _) = gradients.measure(1, &fast());
    // Propagated, as PyTorch does: the step is made with it.
    assert_eq!((signal.found_inf, signal.nonfinite, signal.clip_coef), (0, 1, 0.0));
}

/// Gradients of which only the chunks around element 2^31 and the last one exist in memory.
#[test]
fn elements_beyond_the_31st_bit_are_reached_by_their_own_addresses() {
    for norm_type in TYPES {
        reaches_its_own_addresses(norm_type);
    }
}

#[track_caller]
fn reaches_its_own_addresses(norm_type: NormType) {
    const LEN_ELEMS: u64 = (1 << 32) + 1000;
    let base = 0x10_0000_0000;
    let tensor = NormTensor { gradient: base, len_elems: LEN_ELEMS, dtype: DType::BF16 as u32, padding: 0 };
    let pieces = [((1u64 << 31) - 32768, 2 * 32768), (1 << 32, 1000)];
    let tensors = pieces.map(|(_, len_elems)| (ordinary(DType::BF16, len_elems, len_elems as u64), 0));
    let mut gradients = Gradients::new(&tensors, norm_type);
    for ((first, _), (piece, _)) in pieces.iter().zip(&tensors) {
        gradients.device.memory.alloc_at(base + 2 * first, piece.bytes());
    }
    let chunks = pieces.iter().flat_map(|(first, len_elems)| {
        let first = (first / 32768) as u32;
        (first..first + (*len_elems as u32).div_ceil(32768)).map(|index| annulus::abi::ChunkRef { tensor: 0, index })
    });
    gradients.arguments.range.chunks = gradients.device.place(&chunks.collect::<Vec<_>>());
    gradients.arguments.tensors = gradients.device.place(&[tensor]);
    let (signal, _) = gradients.measure(2, &fast());
    assert_eq!(signal.total_norm.to_bits(), host(&tensors, norm_type).total_norm.to_bits(), "{norm_type:?}");
}

/// Bytes of the tables, of the arguments' structs and of the final walk, for one chunk.
const BOOKKEEPING_BYTES: u64 = 256 * 64;

#[test]
fn every_byte_is_loaded_once_in_few_instructions() {
    for (dtype, most_instructions_per_element) in
        [(DType::BF16, 11.5), (DType::F16, 14.0), (DType::F32, 14.0), (DType::F64, 22.0)]
    {
        let len_elems = 32768;
        let report = check(&[(ordinary(dtype, len_elems, 1), 0)], NormType::L2, 1, &fast());
        let minimum_bytes = (len_elems * dtype.size_bytes()) as u64;
        assert!(report.loaded_bytes <= minimum_bytes + BOOKKEEPING_BYTES, "{dtype}: {report:?}");
        assert!(report.stored_bytes <= 256, "{dtype}: {report:?}");
        let per_element = report.instructions as f64 / len_elems as f64;
        println!(
            "{dtype}: {per_element:.2} instructions an element, {} bytes beside",
            report.loaded_bytes - minimum_bytes
        );
        assert!(per_element <= most_instructions_per_element, "{dtype}: {per_element}");
    }
}
