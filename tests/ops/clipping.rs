//! Clip coefficient, scaling in place and clipping by value against the reference.

use annulus::ops::{clip_coef, clip_value, scale_in_place};
use annulus::{DType, reference};

use crate::inputs::*;

#[test]
fn the_coefficient_is_the_reference_and_never_above_one() {
    for total_norm in [0.0, 1e-9, 0.5, 0.999_999, 1.0, 1.5, 1e19, 1e300, f64::INFINITY] {
        for max_norm in [0.0, 1e-3, 1.0, 1e30, f64::INFINITY] {
            let coef = clip_coef(total_norm, max_norm);
            let expected = reference::clip_coef(total_norm, max_norm);
            assert!(coef == expected || coef.is_nan() && expected.is_nan());
            assert!(coef.is_nan() || coef <= 1.0);
        }
    }
    assert_eq!(clip_coef(0.5, 1.0), 1.0);
    assert_eq!(clip_coef(2.0, 1.0), (1.0 / 2.000001f64) as f32);
    assert_eq!(clip_coef(f64::INFINITY, 1.0), 0.0);
    assert!(clip_coef(f64::NAN, 1.0).is_nan());
    assert!(annulus::ops::clip::check_max_norm(-1.0).is_err() && annulus::ops::clip::check_max_norm(f64::NAN).is_err());
    assert!(annulus::ops::clip::check_max_norm(0.0).is_ok());
}

#[test]
fn scaling_rounds_once() {
    for dtype in FLOATS {
        for (len, start) in LENS.into_iter().flat_map(|len| [(len, 0), (len, 3)]) {
            for coef in [0.3f32, 0.0, f32::NAN] {
                let before = Tensor::from_f32(dtype, &wild(3, len + start));
                let values = before.to_f64();
                let scaled = values[start..].iter().map(|x| match dtype {
                    DType::F64 => x * f64::from(coef),
                    _ => f64::from(*x as f32 * coef),
                });
                let expected = Tensor::from_f64(dtype, scaled);
                let bits = at_every_level(|| {
                    let mut tensor = before.clone();
                    scale_in_place(tensor.slice_mut_from(start), coef);
                    tensor.bits()
                });
                let mut tensor = before.clone();
                scale_in_place(tensor.slice_mut_from(start), coef);
                assert_eq!(tensor.bits(), bits);
                assert_same(&tensor.to_f64()[start..], &expected.to_f64(), dtype.name());
                assert_same(&tensor.to_f64()[..start], &before.to_f64()[..start], "before the slice");
            }
        }
    }
}

#[test]
fn a_coefficient_of_one_changes_no_bit() {
    // Not even the payload of a signalling NaN, which a multiplication would.
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        let mut tensor = match dtype {
            DType::F32 => Tensor::F32([0x7f80_0001, 0xffff_1234, 1].map(f32::from_bits).to_vec()),
            DType::F16 => Tensor::F16([0x7c01, 0xffff, 1].map(half::f16::from_bits).to_vec()),
            _ => Tensor::BF16([0x7f81, 0xffff, 1].map(half::bf16::from_bits).to_vec()),
        };
        let before = tensor.bytes().to_vec();
        scale_in_place(tensor.slice_mut(), 1.0);
        assert_eq!(tensor.bytes(), before);
    }
}

#[test]
fn values_are_limited_and_nan_kept() {
    for dtype in FLOATS {
        for len in LENS {
            for limit in [0.0f32, 0.1, 1.0, 1e30, f32::INFINITY] {
                let before = Tensor::from_f32(dtype, &wild(4, len));
                let rounded = Tensor::from_f32(dtype, &[limit]).to_f64()[0];
                let expected: Vec<f64> = before
                    .to_f64()
                    .iter()
                    .map(|x| match dtype {
                        DType::F64 => {
                            if x.is_nan() {
                                *x
                            } else {
                                x.clamp(-rounded, rounded)
                            }
                        }
                        _ => f64::from(reference::clip_value(*x as f32, rounded as f32)),
                    })
                    .collect();
                let bits = at_every_level(|| {
                    let mut tensor = before.clone();
                    clip_value(tensor.slice_mut(), limit).unwrap();
                    tensor.bits()
                });
                let mut tensor = before.clone();
                clip_value(tensor.slice_mut(), limit).unwrap();
                assert_eq!(tensor.bits(), bits);
                assert_same(&tensor.to_f64(), &expected, &format!("{dtype}, limit {limit}"));
            }
        }
    }
    let mut tensor = Tensor::F32(vec![5.0]);
    assert!(clip_value(tensor.slice_mut(), -1.0).is_err() && clip_value(tensor.slice_mut(), f32::NAN).is_err());
    assert_eq!(tensor.to_f64(), [5.0]);
}
