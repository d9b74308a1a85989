//! `kernels/unscale.cu` against the host backend, bit for bit: what is written and what is measured of it.

mod tensors;

use std::sync::LazyLock;

use annulus::abi::{
    ChunkRef, CombineArguments, NORM_THREADS, NormSlot, NormState, StepSignal, UnscaleArguments, UnscaleTensor,
    norm_kind,
};
use annulus::ops::NormSlots;
use annulus::{DType, NormType, kernels};
use annulus_vgpu::{Module, Options, Report};
use bytemuck::Zeroable;
use tensors::{Device, Random, Tensor, fast};

static MODULE: LazyLock<Module> = LazyLock::new(|| Module::parse(kernels::UNSCALE).unwrap());

const PAIRS: [(DType, DType); 10] = [
    (DType::F32, DType::F32),
    (DType::F32, DType::F16),
    (DType::F32, DType::BF16),
    (DType::F16, DType::F32),
    (DType::F16, DType::F16),
    (DType::F16, DType::BF16),
    (DType::BF16, DType::F32),
    (DType::BF16, DType::F16),
    (DType::BF16, DType::BF16),
    (DType::F64, DType::F64),
];
const TYPES: [NormType; 3] = [NormType::L1, NormType::L2, NormType::Inf];

/// One list of gradients; a tensor is its source, the dtype it becomes, and how far both lie behind 16 bytes.
struct Case {
    tensors: Vec<(Tensor, DType, [u64; 2])>,
    norm_type: NormType,
    scale: f32,
    in_place: bool,
    /// Elements of each tensor before those that there is memory of: whole chunks.
    first_elem: u64,
}

#[track_caller]
fn check(case: &Case, blocks: u32, options: &Options) -> Report {
    let Case { tensors, norm_type, scale, in_place, first_elem } = case;
    let mut device = Device::new();
    let place = |device: &mut Device, tensor: &Tensor, offset_bytes| device.tensor(tensor, offset_bytes);
    let table: Vec<UnscaleTensor> = tensors
        .iter()
        .map(|(src, to, [src_offset, dst_offset])| {
            let address = place(&mut device, src, *src_offset);
            UnscaleTensor {
                src: address,
                dst: if *in_place {
                    address
                } else {
                    place(&mut device, &Tensor::zeros(*to, src.len_elems()), *dst_offset)
                },
                len_elems: src.len_elems() as u64,
                src_dtype: src.dtype() as u32,
                dst_dtype: *to as u32,
            }
        })
        .collect();
    let lens: Vec<usize> = tensors.iter().map(|(src, ..)| src.len_elems()).collect();
    let mut range = device.all_chunks(&lens);
    let mut listed = table.clone();
    if *first_elem > 0 {
        // Each piece is shorter than a chunk. What lies before it is never reached, so its address may wrap.
        let index = (first_elem / 32768) as u32;
        let chunks: Vec<ChunkRef> = (0..lens.len() as u32).map(|tensor| ChunkRef { tensor, index }).collect();
        range.chunks = device.place(&chunks);
        for (entry, (src, to, _)) in listed.iter_mut().zip(tensors) {
            entry.src = entry.src.wrapping_sub(first_elem * src.dtype().size_bytes() as u64);
            entry.dst = entry.dst.wrapping_sub(first_elem * to.size_bytes() as u64);
            entry.len_elems += first_elem;
        }
    }
    let (kind, p) = norm_kind(*norm_type);
    let combine = CombineArguments {
        slots: device.place(&vec![NormSlot::zeroed(); range.len_chunks as usize]),
        state: device.place(&[NormState::zeroed()]),
        signal: device.place(&[StepSignal::zeroed()]),
        len_slots: range.len_chunks,
        max_norm: 1.0,
        kind,
        p,
        finishes: 1,
        skips: 1,
        ..CombineArguments::zeroed()
    };
    let arguments = UnscaleArguments { tensors: device.place(&listed), range, combine, scale: device.place(&[*scale]) };
    let report = device
        .run(&MODULE, "unscale_norm", blocks, NORM_THREADS, &arguments, options)
        .unwrap_or_else(|fault| panic!("{fault}"));

    let mut slots = NormSlots::new(&lens).unwrap();
    slots.begin(*norm_type).unwrap();
    for (number, ((src, to, offsets), entry)) in tensors.iter().zip(&table).enumerate() {
        let mut expected = Tensor::zeros(*to, src.len_elems());
        let inv_scale = (1.0 / f64::from(*scale)) as f32;
        slots.unscale_at(number, 0, src.slice(), expected.slice_mut(), inv_scale).unwrap();
        let actual = device.read_tensor(entry.dst, *to, src.len_elems());
        assert_eq!(actual.bits(), expected.bits(), "{} to {to}, offsets {offsets:?}", src.dtype());
    }
    let expected = slots.combine().unwrap();
    let signal: StepSignal = device.read(arguments.combine.signal);
    let what = format!("{norm_type:?}, {:?}", tensors.iter().map(|(t, to, o)| (t.dtype(), to, o)).collect::<Vec<_>>());
    assert_eq!(signal.nonfinite != 0, expected.nonfinite, "{what}");
    assert_eq!(signal.grad_scale, 1.0, "{what}");
    if expected.total_norm.is_nan() {
        assert!(signal.total_norm.is_nan(), "{what}");
    } else {
        assert_eq!(signal.total_norm.to_bits(), expected.total_norm.to_bits(), "{what}");
    }
    report
}

fn gradient(dtype: DType, len_elems: usize, seed: u64) -> Tensor {
    let mut random = Random(seed);
    Tensor::from_fn(dtype, len_elems, |_| random.spread(3000.0, 20.0))
}

#[test]
fn every_pair_of_dtypes_has_the_bits_of_the_host() {
    for (from, to) in PAIRS {
        for norm_type in TYPES {
            for len_elems in [0, 1, 131, 2048, 4500] {
                let tensors = vec![(gradient(from, len_elems, 1), to, [0, 0]), (gradient(from, 70, 2), to, [0, 0])];
                check(&Case { tensors, norm_type, scale: 1024.0, in_place: false, first_elem: 0 }, 2, &fast());
            }
        }
    }
}

#[test]
fn every_alignment_touches_its_own_elements_only_and_may_be_in_place() {
    for (from, to) in PAIRS {
        let (src_bytes, dst_bytes) = (from.size_bytes() as u64, to.size_bytes() as u64);
        for offsets in [[src_bytes, 0], [0, dst_bytes], [16 - src_bytes, 16 - dst_bytes]] {
            let tensors = vec![(gradient(from, 2048 + 90, 3), to, offsets)];
            check(&Case { tensors, norm_type: NormType::L2, scale: 3.0, in_place: false, first_elem: 0 }, 1, &fast());
        }
        if from == to {
            for offset in [0, src_bytes] {
                // In the second run f32 squares overflow, so the elements that were written are read again.
                for largest in [1.0, 1e25] {
                    let len_elems = if offset == 0 { 4200 } else { 300 };
                    let mut random = Random(4);
                    let tensor = Tensor::from_fn(from, len_elems, |_| random.spread(largest, 3.0));
                    let case = Case {
                        tensors: vec![(tensor, to, [offset, 0])],
                        norm_type: NormType::L2,
                        scale: 2.0,
                        in_place: true,
                        first_elem: 0,
                    };
                    check(&case, 1, &Options::default());
                }
            }
        }
    }
}

#[test]
fn what_is_lost_or_arises_in_the_cast_is_what_is_measured() {
    let hard = [0.0, -0.0, f64::NAN, f64::INFINITY, 1e-45, 6e-8, 65520.0, -1e38, 1.0, 3e-5];
    for (from, to) in [(DType::F32, DType::F16), (DType::F32, DType::BF16), (DType::BF16, DType::F16)] {
        for bad in hard {
            for norm_type in TYPES {
                let tensor = Tensor::from_fn(from, 200, |i| if i == 150 { bad } else { 0.25 });
                check(
                    &Case {
                        tensors: vec![(tensor, to, [0, 0])],
                        norm_type,
                        scale: 0.5,
                        in_place: false,
                        first_elem: 0,
                    },
                    1,
                    &fast(),
                );
            }
        }
    }
}

#[test]
fn every_byte_moves_once() {
    for (from, to) in [(DType::F32, DType::BF16), (DType::BF16, DType::BF16), (DType::F16, DType::F32)] {
        let len_elems = 32768;
        let tensors = vec![(gradient(from, len_elems, 1), to, [0, 0])];
        let report = check(
            &Case { tensors, norm_type: NormType::L2, scale: 1024.0, in_place: false, first_elem: 0 },
            1,
            &fast(),
        );
        let per_element = report.instructions as f64 / len_elems as f64;
        println!("{from} to {to}: {per_element:.2} instructions an element, {report:?}");
        // Tables, structs and slots.
        assert!(report.loaded_bytes <= (len_elems * from.size_bytes()) as u64 + 256 * 64, "{report:?}");
        assert!(report.stored_bytes <= (len_elems * to.size_bytes()) as u64 + 256, "{report:?}");
        assert!(per_element <= 22.0, "{per_element}");
    }
}

#[test]
fn chunks_beyond_the_31st_bit_are_unscaled_at_their_own_addresses() {
    for first_elem in [1 << 31, 1 << 32, (1 << 32) + (1 << 31)] {
        for (from, to) in [(DType::F32, DType::BF16), (DType::BF16, DType::F32)] {
            let tensors = vec![(gradient(from, 700, 3), to, [0, 0]), (gradient(from, 31, 4), to, [0, 0])];
            let case = Case { tensors, norm_type: NormType::L2, scale: 8.0, in_place: false, first_elem };
            check(&case, 2, &fast());
        }
    }
}
