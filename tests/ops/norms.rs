//! Norms against the f64 reference.
//!
//! Bound: 2 units of 2^-24 relative to the result, which is proved at the kernel, and some for f64.

use annulus::ops::{NormSlots, Slice, SliceMut, cast, grad_norm, scale_in_place};
use annulus::{DType, Error, NormType, reference};
use proptest::prelude::*;

use crate::inputs::*;

const NORM_TYPES: [NormType; 10] = [
    NormType::L1,
    NormType::L2,
    NormType::Inf,
    NormType::P(0.5),
    NormType::P(3.0),
    NormType::P(4.0),
    NormType::P(5.0),
    NormType::P(6.0),
    NormType::P(3.5),
    NormType::P(20.0),
];
const BOUND: f64 = 2.001 / 16_777_216.0;

fn norm_of(tensors: &[Slice<'_>], norm_type: NormType) -> annulus::ops::NormResult {
    let lens: Vec<usize> = tensors.iter().map(Slice::len_elems).collect();
    grad_norm(tensors, norm_type, &mut NormSlots::new(&lens).unwrap()).unwrap()
}

/// Comparable, with NaN.
fn key(result: annulus::ops::NormResult) -> (u64, Option<usize>) {
    assert_eq!(result.nonfinite, result.first_nonfinite.is_some());
    (result.total_norm.to_bits(), result.first_nonfinite)
}

#[track_caller]
fn assert_norm(tensors: &[Tensor], norm_type: NormType) {
    let slices: Vec<Slice<'_>> = tensors.iter().map(Tensor::slice).collect();
    let (bits, _) = at_every_level(|| key(norm_of(&slices, norm_type)));
    let elements: Vec<f64> = tensors.iter().flat_map(Tensor::to_f64).collect();
    let (actual, expected) = (f64::from_bits(bits), reference::norm(&elements, norm_type));
    if norm_type == NormType::Inf {
        assert_eq!(actual, expected);
    }
    assert!(
        actual == expected || (actual / expected - 1.0).abs() <= BOUND,
        "{norm_type:?}: {actual:e}, expected {expected:e}"
    );
}

#[test]
fn every_dtype_and_length() {
    for dtype in FLOATS {
        for len in LENS {
            for norm_type in NORM_TYPES {
                assert_norm(&[Tensor::from_f32(dtype, &uniforms(1, len))], norm_type);
            }
        }
    }
}

#[test]
fn a_list_of_mixed_dtypes() {
    let tensors: Vec<Tensor> = [(DType::F32, 4099), (DType::BF16, 0), (DType::F64, 33_000), (DType::F16, 70_001)]
        .into_iter()
        .enumerate()
        .map(|(seed, (dtype, len))| Tensor::from_f32(dtype, &uniforms(seed as u64, len)))
        .collect();
    for norm_type in NORM_TYPES {
        assert_norm(&tensors, norm_type);
    }
    assert_eq!(norm_of(&[], NormType::L2).total_norm, 0.0);
}

#[test]
fn magnitudes_whose_squares_leave_f32() {
    for dtype in FLOATS {
        for scale in [1e-45, 1e-40, 1e-38, 1e-24, 1e-19, 1e-15, 1e4, 1e15, 1.9e19, 1e25, 3e38] {
            let values: Vec<f32> = uniforms(2, 5000).into_iter().map(|x| x * scale).collect();
            let tensor = Tensor::from_f32(dtype, &values);
            if tensor.to_f64().iter().all(|x| x.is_finite()) {
                for norm_type in NORM_TYPES {
                    assert_norm(std::slice::from_ref(&tensor), norm_type);
                }
            }
        }
    }
    // One huge element among ordinary ones, and huge and tiny tensors together.
    let mut values = uniforms(3, 3000);
    values[1234] = 1e30;
    let tiny = uniforms(4, 3000).iter().map(|x| x * 1e-30).collect::<Vec<_>>();
    for norm_type in NORM_TYPES {
        assert_norm(&[Tensor::F32(values.clone()), Tensor::F32(tiny.clone())], norm_type);
        assert_norm(&[Tensor::F32(tiny.clone())], norm_type);
    }
    assert!(norm_of(&[Slice::F32(&[f32::MAX; 100])], NormType::L2).total_norm > 3e39);
}

#[test]
fn f64_magnitudes_whose_squares_leave_f64() {
    for scale in [1e-320, 1e-300, 1e-200, 1e-150, 1e150, 1e200, 1e303] {
        let huge = Tensor::F64(uniforms(5, 40_000).iter().map(|x| f64::from(*x) * scale).collect());
        for norm_type in
            [NormType::L1, NormType::L2, NormType::Inf, NormType::P(3.0), NormType::P(6.0), NormType::P(3.5)]
        {
            assert_norm(std::slice::from_ref(&huge), norm_type);
            assert_norm(&[Tensor::F32(uniforms(6, 100)), huge.clone(), Tensor::F32(vec![0.0; 5])], norm_type);
            assert_norm(&[huge.clone(), Tensor::F32(vec![0.0; 5])], norm_type);
        }
    }
}

#[test]
fn error_is_far_below_the_rounding_of_one_tensor_norm() {
    // Equal terms round alike: what summing in f32 would lose shows here.
    for (value, norm_type) in [(0.1f32, NormType::L1), (0.1, NormType::L2), (0.7, NormType::P(3.0))] {
        assert_norm(&[Tensor::F32(vec![value; (1 << 20) + 77])], norm_type);
    }
}

/// Every position of a tensor that has all lanes, tails and two runs, at every level.
#[test]
fn p14_one_nonfinite_element_at_any_position() {
    const LEN: usize = 4099;
    for dtype in FLOATS {
        let clean = Tensor::from_f32(dtype, &uniforms(7, LEN));
        let before = Tensor::from_f32(dtype, &uniforms(8, 3));
        let lens = [before.slice().len_elems(), LEN];
        let mut slots = NormSlots::new(&lens).unwrap();
        for norm_type in [NormType::L1, NormType::L2, NormType::Inf, NormType::P(3.0)] {
            // The slow norm and the slow level see every seventh position; 7 and 64 are coprime, so every lane too.
            let stride = if matches!(norm_type, NormType::P(_)) { 7 } else { 1 };
            for position in (0..LEN).step_by(stride) {
                for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
                    let mut tensor = clean.clone();
                    match &mut tensor {
                        Tensor::F32(x) => x[position] = bad as f32,
                        Tensor::F16(x) => x[position] = half::f16::from_f64(bad),
                        Tensor::BF16(x) => x[position] = half::bf16::from_f64(bad),
                        Tensor::F64(x) => x[position] = bad,
                    }
                    let result = grad_norm(&[before.slice(), tensor.slice()], norm_type, &mut slots).unwrap();
                    assert_eq!(result.first_nonfinite, Some(1), "{bad} at {position} of {dtype}, {norm_type:?}");
                    assert_eq!(result.total_norm.is_nan(), bad.is_nan());
                    assert_eq!(result.total_norm == f64::INFINITY, bad.is_infinite());
                }
            }
        }
    }
}

#[test]
fn p14_nonfinite_in_lengths_up_to_two_blocks_at_every_level() {
    for len in 1..=130 {
        for position in 0..len {
            for bad in [f32::NAN, f32::NEG_INFINITY] {
                let mut values = uniforms(9, len);
                values[position] = bad;
                let (_, first) = at_every_level(|| key(norm_of(&[Slice::F32(&values)], NormType::L2)));
                assert_eq!(first, Some(0));
            }
        }
    }
}

#[test]
fn nan_outweighs_infinity_and_the_first_bad_tensor_is_named() {
    let (good, infinite, nan) = ([1.0f32; 70_000], [f32::INFINITY; 2], [f32::NAN; 2]);
    for norm_type in NORM_TYPES {
        let tensors = [Slice::F32(&[]), Slice::F32(&good), Slice::F32(&[]), Slice::F32(&infinite), Slice::F32(&nan)];
        let result = norm_of(&tensors, norm_type);
        assert!(result.total_norm.is_nan());
        assert_eq!(result.first_nonfinite, Some(3));
        // A scaled slot beside an infinity.
        let result = norm_of(&[Slice::F64(&[1e300; 3]), Slice::F32(&infinite)], norm_type);
        assert_eq!((result.total_norm, result.first_nonfinite), (f64::INFINITY, Some(1)));
    }
}

#[test]
fn bits_do_not_depend_on_order_pieces_or_alignment() {
    let lens = [100_003, 5, 0, 65_536, 32_769];
    let tensors: Vec<Vec<f32>> = lens.iter().enumerate().map(|(seed, len)| uniforms(seed as u64, *len)).collect();
    let slices: Vec<Slice<'_>> = tensors.iter().map(|tensor| tensor.as_slice().into()).collect();
    for norm_type in NORM_TYPES {
        let expected = key(norm_of(&slices, norm_type));
        // Backwards, as buckets come, long tensors in pieces.
        let mut slots = NormSlots::new(&lens).unwrap();
        slots.begin(norm_type).unwrap();
        for (tensor, values) in tensors.iter().enumerate().rev() {
            for (index, piece) in values.chunks(2 * NormSlots::CHUNK_ELEMS).enumerate().rev() {
                slots.measure_at(tensor, index * 2 * NormSlots::CHUNK_ELEMS, piece.into()).unwrap();
            }
        }
        assert_eq!(key(slots.combine().unwrap()), expected);
        // The same elements at every alignment.
        for shift in 1..20 {
            let shifted: Vec<Vec<f32>> =
                tensors.iter().map(|tensor| [vec![f32::NAN; shift], tensor.clone()].concat()).collect();
            let slices: Vec<Slice<'_>> = shifted.iter().map(|tensor| tensor[shift..].into()).collect();
            assert_eq!(key(norm_of(&slices, norm_type)), expected);
        }
    }
}

#[test]
fn measured_again_replaces_and_unmeasured_is_refused() {
    let mut slots = NormSlots::new(&[3, 0, 40_000]).unwrap();
    slots.begin(NormType::L1).unwrap();
    slots.measure(0, Slice::F32(&[f32::NAN; 3])).unwrap();
    slots.measure(0, Slice::F32(&[1.0; 3])).unwrap();
    let refused = slots.combine().unwrap_err().to_string();
    assert!(refused.contains("tensor 2 (40000 elements) not measured from element 0 on"), "{refused}");
    slots.measure_at(2, 0, Slice::F32(&[1.0; 32_768])).unwrap();
    assert!(slots.combine().unwrap_err().to_string().contains("from element 32768 on"));
    slots.skip(2).unwrap();
    assert_eq!(slots.combine().unwrap().total_norm, 3.0);
    slots.begin(NormType::L1).unwrap();
    assert!(slots.combine().is_err(), "begin forgets");
}

#[test]
fn wrong_arguments_are_named() {
    let mut slots = NormSlots::new(&[3, 70_000]).unwrap();
    assert!(matches!(slots.measure(0, Slice::F32(&[0.0; 4])), Err(Error::LengthMismatch { expected_elems: 3, .. })));
    assert!(slots.measure(2, Slice::F32(&[])).unwrap_err().to_string().contains("2 of 2"));
    assert!(slots.measure_at(1, 5, Slice::F32(&[0.0; 5])).is_err());
    assert!(slots.measure_at(1, 0, Slice::F32(&[0.0; 5])).is_err());
    assert!(slots.measure_at(1, usize::MAX, Slice::F32(&[0.0; 5])).is_err());
    assert!(slots.measure_at(1, 65_536, Slice::F32(&[0.0; 4464])).is_ok());
    assert!(slots.begin(NormType::P(f64::NAN)).is_err());
    assert!(slots.begin(NormType::P(0.0)).is_err());
    assert!(grad_norm(&[Slice::F32(&[0.0; 3])], NormType::L2, &mut slots).is_err());
    assert!(matches!(NormSlots::new(&[usize::MAX; 5000]), Err(Error::SizeOverflow { .. })));
    assert!(matches!(NormSlots::new(&[usize::MAX]), Err(Error::Io { .. })));
    let refused = slots.unscale_at(0, 0, Slice::F64(&[1.0; 3]), SliceMut::F32(&mut [0.0; 3]), 1.0);
    assert!(matches!(refused, Err(Error::Unsupported { dtype: DType::F32, .. })));
    assert!(slots.unscale_at(0, 0, Slice::F32(&[1.0; 3]), SliceMut::F32(&mut [0.0; 2]), 1.0).is_err());
}

#[test]
fn fused_unscaling_is_scaling_then_measuring() {
    const LEN: usize = 70_001;
    for norm_type in [NormType::L1, NormType::L2, NormType::Inf, NormType::P(3.0)] {
        for src_dtype in FLOATS {
            for dst_dtype in FLOATS {
                if (src_dtype == DType::F64) != (dst_dtype == DType::F64) {
                    continue;
                }
                let scaled: Vec<f32> = uniforms(10, LEN).iter().map(|x| x * 30_000.0).collect();
                let src = Tensor::from_f32(src_dtype, &scaled);
                let inv_scale = 1.0 / 1000.0f32;
                // In f32, one rounding to the destination.
                let expected = match src_dtype {
                    DType::F64 => Tensor::F64(src.to_f64().iter().map(|x| x * f64::from(inv_scale)).collect()),
                    _ => {
                        let products: Vec<f32> = src.to_f64().iter().map(|x| *x as f32 * inv_scale).collect();
                        Tensor::from_f32(dst_dtype, &products)
                    }
                };
                let expected_norm = key(norm_of(&[expected.slice()], norm_type));
                let (bytes, fused) = at_every_level(|| {
                    let mut dst = Tensor::from_f32(dst_dtype, &vec![0.0; LEN]);
                    let mut slots = NormSlots::new(&[LEN]).unwrap();
                    slots.begin(norm_type).unwrap();
                    slots.unscale_at(0, 0, src.slice(), dst.slice_mut(), inv_scale).unwrap();
                    (dst.bytes().to_vec(), key(slots.combine().unwrap()))
                });
                assert_eq!(bytes, expected.bytes());
                assert_eq!(fused, expected_norm);
                if src_dtype == dst_dtype {
                    let mut in_place = src.clone();
                    let mut slots = NormSlots::new(&[LEN]).unwrap();
                    slots.begin(norm_type).unwrap();
                    slots.unscale_in_place(0, in_place.slice_mut(), inv_scale).unwrap();
                    assert_eq!(in_place.bytes(), expected.bytes());
                    assert_eq!(key(slots.combine().unwrap()), expected_norm);
                }
            }
        }
    }
}

#[test]
fn unscaling_reports_what_overflows_on_the_way() {
    // Finite before, infinite as f16.
    let mut slots = NormSlots::new(&[2]).unwrap();
    slots.begin(NormType::L2).unwrap();
    let mut dst = [half::f16::ZERO; 2];
    slots.unscale_at(0, 0, Slice::F32(&[1.0, 70_000.0]), SliceMut::F16(&mut dst), 1.0).unwrap();
    assert_eq!(slots.combine().unwrap().first_nonfinite, Some(0));
}

#[test]
fn clipped_gradients_have_the_norm_asked_for() {
    for dtype in FLOATS {
        let mut tensor = Tensor::from_f32(dtype, &uniforms(11, 50_000));
        let total = norm_of(&[tensor.slice()], NormType::L2).total_norm;
        scale_in_place(tensor.slice_mut(), annulus::ops::clip_coef(total, 1.0));
        let clipped = norm_of(&[tensor.slice()], NormType::L2).total_norm;
        assert!((clipped - 1.0).abs() < if dtype.is_half() { 1e-3 } else { 1e-5 }, "{dtype}: {clipped}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Any bits whatever: agreement with the reference, at every level, and with the cast tensor's norm.
    #[test]
    fn any_bits(seed in any::<u64>(), len in 0usize..5000, exponent in -140i32..127, start in 0usize..17) {
        let scale = 2f64.powi(exponent);
        let values: Vec<f32> = uniforms(seed, len + start).iter().map(|x| (f64::from(*x) * scale) as f32).collect();
        let tensor = Tensor::F32(values);
        for norm_type in NORM_TYPES {
            let (bits, first) = at_every_level(|| key(norm_of(&[tensor.slice_from(start)], norm_type)));
            let expected = reference::norm(&tensor.to_f64()[start..], norm_type);
            let actual = f64::from_bits(bits);
            prop_assert!(first.is_none());
            prop_assert!(actual == expected || (actual / expected - 1.0).abs() <= BOUND, "{:?} {} {}", norm_type, actual, expected);
        }
        // The same numbers as f64 have the same norm to the same bound.
        let mut wide = vec![0.0f64; len];
        cast(tensor.slice_from(start), wide.as_mut_slice().into(), Default::default()).unwrap();
        let (narrow, wide) = (norm_of(&[tensor.slice_from(start)], NormType::L2), norm_of(&[Slice::F64(&wide)], NormType::L2));
        prop_assert!(narrow.total_norm == wide.total_norm || (narrow.total_norm / wide.total_norm - 1.0).abs() <= BOUND);
    }
}
