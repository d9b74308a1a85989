//! `kernels/accumulate.cu` against the reference, bit for bit.

mod tensors;

use std::sync::LazyLock;

use annulus::abi::{
    AccumulateArguments, CHUNK_ELEMS, CastTensor, ChunkRange, ChunkRef, ELEMENTWISE_THREADS, MAX_STAGED, StagedTensor,
};
use annulus::{DType, kernels, reference};
use annulus_vgpu::{Module, Options, Report};
use bytemuck::Zeroable;
use tensors::{ALIGNED, Device, Place, Tensor, fast, hard};

static MODULE: LazyLock<Module> = LazyLock::new(|| Module::parse(kernels::ACCUMULATE).unwrap());

/// Elements before those that there is memory of: whole chunks, around 2^31 and 2^32.
const FAR: [u64; 3] = [1 << 31, 1 << 32, (1 << 32) + (1 << 31)];

const SINGLES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

#[derive(Debug, Clone, Copy, PartialEq)]
enum Kernel {
    Stage,
    Accumulate,
}

impl Kernel {
    const BOTH: [Kernel; 2] = [Kernel::Stage, Kernel::Accumulate];

    fn name(self) -> &'static str {
        match self {
            Kernel::Stage => "stage_tensors",
            Kernel::Accumulate => "accumulate_tensors",
        }
    }

    /// What is left in `dst`.
    fn expected(self, src: &Tensor, dst: &Tensor, factor: f32) -> Tensor {
        let pairs = src.values().into_iter().zip(dst.values());
        let sums = pairs.map(|(src, dst)| {
            let product = src as f32 * factor;
            if self == Kernel::Accumulate { dst as f32 + product } else { product }
        });
        match dst.dtype() {
            DType::F16 => Tensor::F16(sums.map(|x| reference::f32_to_f16(x, false)).collect()),
            DType::BF16 => Tensor::BF16(sums.map(|x| reference::f32_to_bf16(x, false)).collect()),
            _ => Tensor::F32(sums.collect()),
        }
    }
}

/// Whether the tensors come in a table or in the argument.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Listed {
    InTable,
    InArgument,
}

/// Runs `kernel` on pairs of a source and a target, each an allocation of its own; the targets afterwards.
fn run(
    kernel: Kernel,
    pairs: &[(Tensor, Tensor, Place)],
    factor: f32,
    listed: Listed,
    blocks: u32,
    options: &Options,
) -> (Vec<Tensor>, Report) {
    let mut device = Device::new();
    let entry = |(src, dst, place): &(Tensor, Tensor, Place)| CastTensor {
        src: device.tensor(src, place.src_offset_bytes),
        dst: device.tensor(dst, place.dst_offset_bytes),
        len_elems: src.len_elems() as u64,
        first_index: 0,
        src_dtype: src.dtype() as u32,
        dst_dtype: dst.dtype() as u32,
    };
    let entries: Vec<CastTensor> = pairs.iter().map(entry).collect();
    let lens: Vec<usize> = pairs.iter().map(|(src, ..)| src.len_elems()).collect();
    let range = device.all_chunks(&lens);
    let mut arguments = AccumulateArguments { range, factor, ..AccumulateArguments::zeroed() };
    match listed {
        Listed::InTable => arguments.tensors = device.place(&entries),
        Listed::InArgument => {
            arguments.range.chunks = 0;
            let mut first_chunk = 0;
            for entry in entries.iter().filter(|entry| entry.len_elems > 0) {
                arguments.staged[arguments.len_staged as usize] = staged(entry, first_chunk);
                arguments.len_staged += 1;
                first_chunk += entry.len_elems.div_ceil(CHUNK_ELEMS as u64) as u32;
            }
        }
    }
    let report = device.run(&MODULE, kernel.name(), blocks, ELEMENTWISE_THREADS, &arguments, options);
    let report = report.unwrap_or_else(|fault| panic!("{kernel:?}: {fault}"));
    let targets = entries.iter().zip(pairs);
    let read = |(entry, (_, dst, _)): (&CastTensor, &(Tensor, Tensor, Place))| {
        device.read_tensor(entry.dst, dst.dtype(), dst.len_elems())
    };
    (targets.map(read).collect(), report)
}

/// The tensor as the argument of a launch names it.
fn staged(tensor: &CastTensor, first_chunk: u32) -> StagedTensor {
    StagedTensor {
        src: tensor.src,
        dst: tensor.dst,
        len_elems: tensor.len_elems,
        first_chunk,
        src_dtype: tensor.src_dtype as u16,
        dst_dtype: tensor.dst_dtype as u16,
    }
}

/// As [`run`], with every result compared. Bounds are checked by the machine: no tensor has a byte to spare.
#[track_caller]
fn check(
    kernel: Kernel,
    pairs: &[(Tensor, Tensor, Place)],
    factor: f32,
    listed: Listed,
    blocks: u32,
    options: &Options,
) -> Report {
    let (actual, report) = run(kernel, pairs, factor, listed, blocks, options);
    for (actual, (src, dst, place)) in actual.iter().zip(pairs) {
        let (bits, expected) = (actual.bits(), kernel.expected(src, dst, factor).bits());
        let wrong = (0..bits.len()).find(|i| bits[*i] != expected[*i]);
        if let Some(i) = wrong {
            panic!(
                "{kernel:?} {} to {}, {} elements, {place:?}, times {factor}, element {i}: {:e}, {:e}: {:#x}, not {:#x}",
                src.dtype(),
                dst.dtype(),
                src.len_elems(),
                src.values()[i],
                dst.values()[i],
                bits[i],
                expected[i]
            );
        }
    }
    report
}

/// A source and what it meets, of numbers of every kind.
fn pair(src: DType, dst: DType, len_elems: usize, seed: u64, place: Place) -> (Tensor, Tensor, Place) {
    (hard(src, len_elems, seed), hard(dst, len_elems, seed + 1000), place)
}

#[test]
fn every_pair_of_dtypes_rounds_as_the_reference() {
    for kernel in Kernel::BOTH {
        for src in SINGLES {
            for dst in SINGLES {
                for factor in [1.0, 0.25, 1.0 / 3.0, -2.0, 0.0] {
                    let pairs = [pair(src, dst, 3001, 1, ALIGNED)];
                    check(kernel, &pairs, factor, Listed::InArgument, 2, &fast());
                }
            }
        }
    }
}

#[test]
fn a_first_contribution_of_factor_one_keeps_every_bit_that_the_type_has() {
    for dtype in SINGLES {
        // Negative zeroes, subnormals and infinities included; of NaN its being one.
        let (src, dst) = (hard(dtype, 2000, 11), Tensor::zeros(dtype, 2000));
        let expected = src.bits();
        let (actual, _) = run(Kernel::Stage, &[(src, dst, ALIGNED)], 1.0, Listed::InArgument, 1, &fast());
        assert_eq!(actual[0].bits(), expected, "{dtype}");
    }
}

/// Sizes 0 and 1, odd ones and primes, around a group and a block's row of them; all under the race detector.
#[test]
fn every_length_is_written_whole_and_no_further() {
    for kernel in Kernel::BOTH {
        for (src, dst) in [(DType::F32, DType::F32), (DType::BF16, DType::F32), (DType::F32, DType::F16)] {
            for len_elems in [0, 1, 2, 7, 8, 9, 31, 257, 2053] {
                for listed in [Listed::InTable, Listed::InArgument] {
                    let pairs = [pair(src, dst, len_elems, 2, ALIGNED)];
                    check(kernel, &pairs, 0.5, listed, 2, &Options::default());
                }
            }
        }
    }
}

#[test]
fn every_alignment_reads_and_writes_its_own_elements_only() {
    for kernel in Kernel::BOTH {
        for (src, dst) in [(DType::F32, DType::F32), (DType::BF16, DType::F32), (DType::F32, DType::BF16)] {
            let (src_bytes, dst_bytes) = (src.size_bytes() as u64, dst.size_bytes() as u64);
            for src_offset in 0..16 / src_bytes {
                for dst_offset in 0..16 / dst_bytes {
                    let place =
                        Place { src_offset_bytes: src_offset * src_bytes, dst_offset_bytes: dst_offset * dst_bytes };
                    check(kernel, &[pair(src, dst, 5, 3, place)], 2.0, Listed::InArgument, 1, &Options::default());
                    check(kernel, &[pair(src, dst, 2048 + 21, 4, place)], 1.0, Listed::InArgument, 1, &fast());
                }
            }
        }
    }
}

/// Several tensors of all types in one launch, empty ones between, and blocks that meet inside a group of 16 bytes.
#[test]
fn a_list_is_one_launch_without_races() {
    let odd = Place { src_offset_bytes: 4, dst_offset_bytes: 12 };
    let pairs = || {
        [
            pair(DType::F32, DType::F32, 32768 + 9, 5, Place { src_offset_bytes: 8, dst_offset_bytes: 4 }),
            pair(DType::F16, DType::F32, 0, 6, ALIGNED),
            pair(DType::F16, DType::BF16, 127, 7, Place { src_offset_bytes: 2, dst_offset_bytes: 6 }),
            pair(DType::F32, DType::BF16, 1, 8, odd),
            pair(DType::BF16, DType::F32, 1009, 9, odd),
        ]
    };
    for kernel in Kernel::BOTH {
        for listed in [Listed::InTable, Listed::InArgument] {
            check(kernel, &pairs(), 0.125, listed, 3, &Options::default());
        }
    }
}

/// As many tensors as an argument holds, of one to three chunks: each chunk finds its own.
#[test]
fn an_argument_is_searched_to_its_last_tensor() {
    let far = |i: usize| if i % 21 == 20 { 32768 * (i / 21) } else { 0 };
    let pairs: Vec<_> =
        (0..MAX_STAGED).map(|i| pair(DType::BF16, DType::F32, 1 + i + far(i), i as u64, ALIGNED)).collect();
    for kernel in Kernel::BOTH {
        check(kernel, &pairs, 1.0, Listed::InArgument, 5, &fast());
        check(kernel, &pairs[..1], 1.0, Listed::InArgument, 2, &fast());
        check(kernel, &pairs[..2], 1.0, Listed::InArgument, 2, &fast());
    }
}

#[test]
fn what_is_in_place_is_scaled_once() {
    for kernel in Kernel::BOTH {
        let src = hard(DType::F32, 1100, 10);
        let mut device = Device::new();
        let at = device.tensor(&src, 4);
        let dtype = DType::F32 as u32;
        let tensor =
            CastTensor { src: at, dst: at, len_elems: 1100, first_index: 0, src_dtype: dtype, dst_dtype: dtype };
        let range = ChunkRange { chunks: 0, first_chunk: 0, len_chunks: 1 };
        let mut arguments = AccumulateArguments { range, factor: 0.75, len_staged: 1, ..AccumulateArguments::zeroed() };
        arguments.staged[0] = staged(&tensor, 0);
        device.run(&MODULE, kernel.name(), 1, ELEMENTWISE_THREADS, &arguments, &Options::default()).unwrap();
        let actual = device.read_tensor(at, DType::F32, 1100);
        assert_eq!(actual.bits(), kernel.expected(&src, &src, 0.75).bits(), "{kernel:?}");
    }
}

/// Tensors of which only what lies behind `first_elem` exists.
#[test]
fn chunks_beyond_the_31st_bit_are_added_at_their_own_addresses() {
    let (src, dst) = (hard(DType::BF16, 700, 12), hard(DType::F32, 700, 13));
    for (kernel, first_elem) in Kernel::BOTH.into_iter().flat_map(|kernel| FAR.map(|first| (kernel, first))) {
        let mut device = Device::new();
        let (src_at, dst_at) = (device.tensor(&src, 0), device.tensor(&dst, 0));
        // What lies before is never reached, so its address may wrap.
        let begin = |address: u64, dtype: DType| address.wrapping_sub(first_elem * dtype.size_bytes() as u64);
        let tensor = CastTensor {
            src: begin(src_at, DType::BF16),
            dst: begin(dst_at, DType::F32),
            len_elems: first_elem + 700,
            first_index: 0,
            src_dtype: DType::BF16 as u32,
            dst_dtype: DType::F32 as u32,
        };
        let chunks = device.place(&[ChunkRef { tensor: 0, index: (first_elem / 32768) as u32 }]);
        let range = ChunkRange { chunks, first_chunk: 0, len_chunks: 1 };
        let tensors = device.place(&[tensor]);
        let arguments = AccumulateArguments { tensors, range, factor: 0.5, ..AccumulateArguments::zeroed() };
        device.run(&MODULE, kernel.name(), 1, ELEMENTWISE_THREADS, &arguments, &fast()).unwrap();
        let actual = device.read_tensor(dst_at, DType::F32, 700);
        assert_eq!(actual.bits(), kernel.expected(&src, &dst, 0.5).bits(), "{kernel:?} behind {first_elem}");
    }
}

#[test]
fn every_byte_moves_once_in_few_instructions() {
    for (src, dst, most) in
        [(DType::F32, DType::F32, 9.5), (DType::BF16, DType::F32, 14.5), (DType::F32, DType::BF16, 16.5)]
    {
        let len_elems = 32768;
        let numbers = |dtype| Tensor::from_fn(dtype, len_elems, |i| i as f64);
        let pairs = [(numbers(src), numbers(dst), ALIGNED)];
        let report = check(Kernel::Accumulate, &pairs, 1.0, Listed::InArgument, 1, &fast());
        let [src_bytes, dst_bytes] = [src, dst].map(|dtype| (len_elems * dtype.size_bytes()) as u64);
        let per_element = report.instructions as f64 / len_elems as f64;
        println!("{src} onto {dst}: {per_element:.2} instructions an element, {report:?}");
        assert!(report.loaded_bytes <= src_bytes + dst_bytes + 256 * 48, "{report:?}");
        assert_eq!(report.stored_bytes, dst_bytes);
        assert!(per_element <= most, "{src} onto {dst}: {per_element}");
    }
}
