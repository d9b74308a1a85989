//! `kernels/cast.cu` against the host backend and the reference, bit for bit.

mod tensors;

use std::sync::LazyLock;

use annulus::abi::{
    CastArguments, CastTensor, ChunkRange, ChunkRef, ClampArguments, ELEMENTWISE_THREADS, RoundingKey, ScaleArguments,
    StepSignal,
};
use annulus::ops::{self, Saturate};
use annulus::{DType, kernels, reference};
use annulus_vgpu::{Module, Options, Report};
use bytemuck::{NoUninit, Zeroable};
use tensors::{ALIGNED, Device, FLOATS, Place, Tensor, fast, hard};

static MODULE: LazyLock<Module> = LazyLock::new(|| Module::parse(kernels::CAST).unwrap());

/// A list of one tensor: its table, its chunks, and where the result is.
struct Work {
    device: Device,
    table: u64,
    range: ChunkRange,
    dst: u64,
}

fn work(src: &Tensor, dst: &Tensor, place: Place, first_index: u64) -> Work {
    let mut device = Device::new();
    let tensor = CastTensor {
        src: device.tensor(src, place.src_offset_bytes),
        dst: device.tensor(dst, place.dst_offset_bytes),
        len_elems: src.len_elems() as u64,
        first_index,
        src_dtype: src.dtype() as u32,
        dst_dtype: dst.dtype() as u32,
    };
    let range = device.all_chunks(&[src.len_elems()]);
    Work { table: device.place(&[tensor]), dst: tensor.dst, device, range }
}

/// Elements before those that there is memory of: whole chunks, around 2^31 and 2^32.
const FAR: [u64; 3] = [1 << 31, 1 << 32, (1 << 32) + (1 << 31)];

/// Tensors of which only what lies behind `first_elem` exists, which is less than a chunk.
fn work_behind(first_elem: u64, src: &Tensor, dst: &Tensor) -> Work {
    let mut work = work(src, dst, ALIGNED, 0);
    let near: CastTensor = work.device.read(work.table);
    // What lies before is never reached, so its address may wrap.
    let begin = |address: u64, dtype: DType| address.wrapping_sub(first_elem * dtype.size_bytes() as u64);
    let tensor = CastTensor {
        src: begin(near.src, src.dtype()),
        dst: begin(near.dst, dst.dtype()),
        len_elems: first_elem + near.len_elems,
        ..near
    };
    work.table = work.device.place(&[tensor]);
    work.range.chunks = work.device.place(&[ChunkRef { tensor: 0, index: (first_elem / 32768) as u32 }]);
    work
}

impl Work {
    #[track_caller]
    fn run<A: NoUninit>(&mut self, kernel: &str, blocks: u32, arguments: &A, options: &Options) -> Report {
        let run = self.device.run(&MODULE, kernel, blocks, ELEMENTWISE_THREADS, arguments, options);
        run.unwrap_or_else(|fault| panic!("{fault}"))
    }
}

fn cast_on_device(src: &Tensor, to: DType, saturates: bool, place: Place, options: &Options) -> (Tensor, Report) {
    let mut work = work(src, &Tensor::zeros(to, src.len_elems()), place, 0);
    let arguments = CastArguments {
        tensors: work.table,
        range: work.range,
        key: RoundingKey::zeroed(),
        saturates: saturates.into(),
        padding: 0,
    };
    let report = work.run("cast_tensors", 2, &arguments, options);
    (work.device.read_tensor(work.dst, to, src.len_elems()), report)
}

/// NaN must be a quiet one of the source's sign.
#[track_caller]
fn compare(src: &Tensor, actual: &Tensor, expected: &Tensor, what: &str) {
    let (from, to) = (src.values(), actual.values());
    let (bits, expected_bits) = (actual.bits(), expected.bits());
    for i in 0..src.len_elems() {
        assert_eq!(bits[i], expected_bits[i], "{what}, element {i}: {:e}", from[i]);
        assert!(!from[i].is_nan() || from[i].is_sign_negative() == to[i].is_sign_negative(), "{what}, element {i}");
    }
}

#[track_caller]
fn check_cast(src: &Tensor, to: DType, saturates: bool, place: Place, options: &Options) -> Report {
    let (actual, report) = cast_on_device(src, to, saturates, place, options);
    let mut expected = Tensor::zeros(to, src.len_elems());
    let saturate = if saturates { Saturate::Yes } else { Saturate::No };
    ops::cast(src.slice(), expected.slice_mut(), saturate).unwrap();
    let what = format!(
        "{} to {to}, {} elements, offsets {} {}",
        src.dtype(),
        src.len_elems(),
        place.src_offset_bytes,
        place.dst_offset_bytes
    );
    compare(src, &actual, &expected, &what);
    report
}

#[test]
fn every_pair_of_dtypes_rounds_as_the_host() {
    for from in FLOATS {
        for to in FLOATS {
            for saturates in [false, true] {
                check_cast(&hard(from, 5000, 1), to, saturates, ALIGNED, &fast());
            }
        }
    }
}

#[test]
fn nan_is_the_quiet_one_of_the_reference() {
    let src = Tensor::F32(vec![f32::NAN, -f32::NAN, f32::from_bits(0x7f80_0001), f32::from_bits(0xffff_ffff)]);
    let Tensor::F32(values) = &src else { unreachable!() };
    for (to, narrow) in [
        (DType::F16, (|x| reference::f32_to_f16(x, false).to_bits()) as fn(f32) -> u16),
        (DType::BF16, |x| reference::f32_to_bf16(x, false).to_bits()),
    ] {
        let (actual, _) = cast_on_device(&src, to, false, ALIGNED, &fast());
        let expected: Vec<u8> = values.iter().flat_map(|x| narrow(*x).to_le_bytes()).collect();
        assert_eq!(actual.bytes(), expected, "{to}");
    }
}

#[test]
fn every_16_bit_float_becomes_what_it_is() {
    for from in [DType::F16, DType::BF16] {
        let bytes: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
        check_cast(&Tensor::from_bytes(from, &bytes), DType::F32, false, ALIGNED, &fast());
    }
}

#[test]
fn every_length_and_alignment_touches_its_own_elements_only() {
    for (from, to) in
        [(DType::F32, DType::BF16), (DType::BF16, DType::F32), (DType::F16, DType::BF16), (DType::F32, DType::F32)]
    {
        let (src_bytes, dst_bytes) = (from.size_bytes() as u64, to.size_bytes() as u64);
        for len_elems in [0, 1, 7, 8, 9, 31, 257] {
            check_cast(&hard(from, len_elems, 2), to, false, ALIGNED, &Options::default());
        }
        for src_offset in 0..16 / src_bytes {
            for dst_offset in [0, 1, 16 / dst_bytes - 1] {
                let place =
                    Place { src_offset_bytes: src_offset * src_bytes, dst_offset_bytes: dst_offset * dst_bytes };
                check_cast(&hard(from, 2 * 2048 + 21, 3), to, false, place, &fast());
                check_cast(&hard(from, 5, 4), to, false, place, &Options::default());
            }
        }
    }
    // Across the border of two chunks, with groups that begin in one and end in the other.
    let place = Place { src_offset_bytes: 4, dst_offset_bytes: 6 };
    check_cast(&hard(DType::F32, 32768 + 50, 5), DType::F16, false, place, &fast());
}

#[test]
fn stochastic_rounding_depends_on_seed_step_and_global_index_alone() {
    for to in [DType::F16, DType::BF16] {
        for (first_index, len_elems, place) in [
            (0, 4000, ALIGNED),
            (5, 77, Place { src_offset_bytes: 4, dst_offset_bytes: 2 }),
            (3, 2060, Place { src_offset_bytes: 0, dst_offset_bytes: 14 }),
            ((1 << 33) - 2, 40, ALIGNED),
        ] {
            for saturates in [false, true] {
                let src = hard(DType::F32, len_elems, first_index);
                let mut work = work(&src, &Tensor::zeros(to, len_elems), place, first_index);
                let key = RoundingKey { seed: 0x0123_4567_89ab_cdef, step: 0x1_0000_0007 };
                let arguments = CastArguments {
                    tensors: work.table,
                    range: work.range,
                    key,
                    saturates: saturates.into(),
                    padding: 0,
                };
                work.run("cast_stochastic", 1, &arguments, &fast());
                let actual = work.device.read_tensor(work.dst, to, len_elems);
                let Tensor::F32(values) = &src else { unreachable!() };
                let expected = values.iter().enumerate().map(|(i, value)| {
                    let random = reference::rounding_bits(key.seed, key.step, first_index + i as u64);
                    match to {
                        DType::F16 => reference::f32_to_f16_stochastic(*value, random, saturates).to_bits(),
                        _ => reference::f32_to_bf16_stochastic(*value, random, saturates).to_bits(),
                    }
                });
                let bytes: Vec<u8> = expected.flat_map(u16::to_le_bytes).collect();
                compare(&src, &actual, &Tensor::from_bytes(to, &bytes), "stochastic");
            }
        }
    }
}

fn signal(clip_coef: f32, grad_scale: f32) -> StepSignal {
    StepSignal { clip_coef, grad_scale, ..StepSignal::zeroed() }
}

#[test]
fn scaling_by_the_coefficient_rounds_as_the_host_and_a_coefficient_of_one_touches_nothing() {
    for dtype in FLOATS {
        for (coef, offset) in [(0.37f32, 0), (0.0, 1), (1.0, 1)] {
            let src = hard(dtype, 2100, 6);
            let place = Place { src_offset_bytes: 0, dst_offset_bytes: offset * dtype.size_bytes() as u64 };
            let mut work = work(&src, &src, place, 0);
            let signal = work.device.place(&[signal(coef, 1.0)]);
            let arguments = ScaleArguments { tensors: work.table, range: work.range, signal };
            let report = work.run("scale_tensors", 2, &arguments, &fast());
            let mut expected = src.clone();
            ops::scale_in_place(expected.slice_mut(), coef);
            let actual = work.device.read_tensor(work.dst, dtype, 2100);
            assert_eq!(actual.bits(), expected.bits(), "{dtype} times {coef}");
            if coef == 1.0 {
                assert_eq!((report.loaded_bytes, report.stored_bytes), (2 * 256 * 4, 0), "one coefficient a thread");
                assert_eq!(actual.bytes(), src.bytes());
            }
        }
    }
}

#[test]
fn clipping_by_value_keeps_nan_and_signs() {
    for dtype in FLOATS {
        for (limit, coef, grad_scale) in [(0.3f32, None, 1.0), (1e-3, Some(0.5f32), 1024.0f32), (0.0, None, 1.0)] {
            let src = hard(dtype, 1100, 7);
            let mut work = work(&src, &src, ALIGNED, 0);
            let signal = coef.map_or(0, |coef| work.device.place(&[signal(coef, grad_scale)]));
            let arguments = ClampArguments { tensors: work.table, range: work.range, signal, limit: limit.into() };
            work.run("clamp_tensors", 1, &arguments, &fast());
            let mut expected = src.clone();
            let host_limit = (f64::from(limit) * f64::from(grad_scale) / f64::from(coef.unwrap_or(1.0))) as f32;
            ops::clip_value(expected.slice_mut(), host_limit).unwrap();
            let actual = work.device.read_tensor(work.dst, dtype, 1100);
            assert_eq!(actual.bits(), expected.bits(), "{dtype} within {limit}");
        }
    }
}

#[test]
fn blocks_write_apart_also_where_groups_cross_chunks() {
    // Two chunks whose border lies inside a group of 16 bytes, on two blocks, under the race detector.
    let src = hard(DType::F32, 32768 + 9, 8);
    let mut work = work(
        &src,
        &Tensor::zeros(DType::BF16, src.len_elems()),
        Place { src_offset_bytes: 8, dst_offset_bytes: 10 },
        0,
    );
    let arguments = CastArguments { tensors: work.table, range: work.range, ..CastArguments::zeroed() };
    work.run("cast_tensors", 2, &arguments, &Options::default());
}

#[test]
fn chunks_beyond_the_31st_bit_are_cast_at_their_own_addresses() {
    for first_elem in FAR {
        for (from, to) in [(DType::F32, DType::F16), (DType::BF16, DType::F32)] {
            let (src, mut expected) = (hard(from, 700, 9), Tensor::zeros(to, 700));
            let mut work = work_behind(first_elem, &src, &expected);
            let arguments = CastArguments { tensors: work.table, range: work.range, ..CastArguments::zeroed() };
            work.run("cast_tensors", 1, &arguments, &fast());
            ops::cast(src.slice(), expected.slice_mut(), Saturate::No).unwrap();
            compare(&src, &work.device.read_tensor(work.dst, to, 700), &expected, &format!("behind {first_elem}"));
        }
    }
}

#[test]
fn elements_beyond_the_31st_bit_are_rounded_with_bits_of_their_own() {
    for first_elem in FAR {
        let src = hard(DType::F32, 700, 10);
        let mut work = work_behind(first_elem, &src, &Tensor::zeros(DType::BF16, 700));
        let key = RoundingKey { seed: 77, step: 3 };
        let arguments = CastArguments { tensors: work.table, range: work.range, key, ..CastArguments::zeroed() };
        work.run("cast_stochastic", 1, &arguments, &fast());
        let Tensor::F32(values) = &src else { unreachable!() };
        let rounded = values.iter().zip(first_elem..).map(|(value, index)| {
            reference::f32_to_bf16_stochastic(*value, reference::rounding_bits(key.seed, key.step, index), false)
        });
        let expected = Tensor::BF16(rounded.collect());
        let actual = work.device.read_tensor(work.dst, DType::BF16, 700);
        compare(&src, &actual, &expected, &format!("behind {first_elem}"));
    }
}

#[test]
fn chunks_beyond_the_31st_bit_are_scaled_and_clamped_at_their_own_addresses() {
    for (first_elem, dtype) in FAR.into_iter().flat_map(|first_elem| FLOATS.map(|dtype| (first_elem, dtype))) {
        let src = hard(dtype, 700, 11);
        let mut work = work_behind(first_elem, &src, &src);
        let signal = work.device.place(&[signal(0.37, 1.0)]);
        let arguments = ScaleArguments { tensors: work.table, range: work.range, signal };
        work.run("scale_tensors", 1, &arguments, &fast());
        let mut expected = src.clone();
        ops::scale_in_place(expected.slice_mut(), 0.37);
        let scaled = work.device.read_tensor(work.dst, dtype, 700);
        assert_eq!(scaled.bits(), expected.bits(), "{dtype} scaled behind {first_elem}");

        let arguments = ClampArguments { tensors: work.table, range: work.range, signal: 0, limit: 0.25 };
        work.run("clamp_tensors", 1, &arguments, &fast());
        ops::clip_value(expected.slice_mut(), 0.25).unwrap();
        let clamped = work.device.read_tensor(work.dst, dtype, 700);
        assert_eq!(clamped.bits(), expected.bits(), "{dtype} clamped behind {first_elem}");
    }
}

#[test]
fn every_byte_moves_once_in_few_instructions() {
    for (from, to, most) in [
        (DType::F32, DType::BF16, 10.5),
        (DType::BF16, DType::F32, 7.0),
        (DType::F32, DType::F16, 10.5),
        (DType::F16, DType::F32, 12.5),
    ] {
        let len_elems = 32768;
        let src = Tensor::from_fn(from, len_elems, |i| i as f64);
        let report = check_cast(&src, to, false, ALIGNED, &fast());
        // Each thread reads the chunk's and the tensor's entry.
        let bookkeeping_bytes = 256 * 48;
        let per_element = report.instructions as f64 / len_elems as f64;
        println!("{from} to {to}: {per_element:.2} instructions an element, {report:?}");
        assert!(report.loaded_bytes <= (len_elems * from.size_bytes()) as u64 + bookkeeping_bytes, "{report:?}");
        assert_eq!(report.stored_bytes, (len_elems * to.size_bytes()) as u64);
        assert!(per_element <= most, "{from} to {to}: {per_element}");
    }
}
