//! Casts against the reference: equal everywhere, at every level.

use annulus::ops::{RoundingKey, Saturate, Slice, SliceMut, cast, cast_stochastic};
use annulus::{DType, Error, reference};
use half::{bf16, f16};

use crate::inputs::*;

fn expected_cast(value: f64, dtype: DType, saturate: bool) -> f64 {
    match dtype {
        DType::F16 => reference::f64_to_f16(value, saturate).to_f64(),
        DType::BF16 => reference::f64_to_bf16(value, saturate).to_f64(),
        DType::F64 if saturate && value.is_infinite() => f64::MAX.copysign(value),
        DType::F64 => value,
        _ => {
            let narrow = value as f32;
            f64::from(if saturate && narrow.is_infinite() { f32::MAX.copysign(narrow) } else { narrow })
        }
    }
}

/// Every pair of dtypes, lengths and starts, wild values.
#[test]
fn every_pair_is_the_reference() {
    for src_dtype in FLOATS {
        for dst_dtype in FLOATS {
            for (len, start) in LENS.into_iter().flat_map(|len| [(len, 0), (len, 1), (len, 5)]) {
                let src = Tensor::from_f32(src_dtype, &wild(1, len + start));
                for saturate in [Saturate::No, Saturate::Yes] {
                    let bytes = at_every_level(|| {
                        let mut dst = Tensor::from_f32(dst_dtype, &vec![9.0; len + start + 1]);
                        let range = match &mut dst {
                            Tensor::F32(x) => SliceMut::F32(&mut x[1..=len]),
                            Tensor::F16(x) => SliceMut::F16(&mut x[1..=len]),
                            Tensor::BF16(x) => SliceMut::BF16(&mut x[1..=len]),
                            Tensor::F64(x) => SliceMut::F64(&mut x[1..=len]),
                        };
                        cast(src.slice_from(start), range, saturate).unwrap();
                        // Nothing beside the range is written.
                        let values = dst.to_f64();
                        assert!(values[0] == 9.0 && values[len + 1..].iter().all(|x| *x == 9.0));
                        dst.bytes().to_vec()
                    });
                    let size = dst_dtype.size_bytes();
                    let actual: Vec<f64> = match dst_dtype {
                        DType::F16 => {
                            bytemuck::pod_collect_to_vec::<u8, f16>(&bytes).iter().map(|x| x.to_f64()).collect()
                        }
                        DType::BF16 => {
                            bytemuck::pod_collect_to_vec::<u8, bf16>(&bytes).iter().map(|x| x.to_f64()).collect()
                        }
                        DType::F64 => bytemuck::pod_collect_to_vec::<u8, f64>(&bytes),
                        _ => bytemuck::pod_collect_to_vec::<u8, f32>(&bytes).iter().map(|x| f64::from(*x)).collect(),
                    };
                    assert_eq!(actual.len() * size, bytes.len());
                    let expected: Vec<f64> = src.to_f64()[start..]
                        .iter()
                        .map(|x| expected_cast(*x, dst_dtype, saturate == Saturate::Yes))
                        .collect();
                    assert_same(
                        &actual[1..=len],
                        &expected,
                        &format!("{src_dtype} -> {dst_dtype}, {len} from {start}"),
                    );
                }
            }
        }
    }
}

#[test]
fn every_16_bit_float_survives_the_way_through_f32() {
    let halves: Vec<f16> = (0..=u16::MAX).map(f16::from_bits).collect();
    let bfloats: Vec<bf16> = (0..=u16::MAX).map(bf16::from_bits).collect();
    at_every_level(|| {
        let mut wide = vec![0f32; 1 << 16];
        let mut back = vec![f16::ZERO; 1 << 16];
        cast(Slice::F16(&halves), SliceMut::F32(&mut wide), Saturate::No).unwrap();
        cast(Slice::F32(&wide), SliceMut::F16(&mut back), Saturate::No).unwrap();
        for (half, back) in halves.iter().zip(&back) {
            assert!(half.to_bits() == back.to_bits() || half.is_nan() && back.is_nan());
        }
        let mut back = vec![bf16::ZERO; 1 << 16];
        cast(Slice::BF16(&bfloats), SliceMut::F32(&mut wide), Saturate::No).unwrap();
        cast(Slice::F32(&wide), SliceMut::BF16(&mut back), Saturate::No).unwrap();
        for (bfloat, back) in bfloats.iter().zip(&back) {
            assert!(bfloat.to_bits() == back.to_bits() || bfloat.is_nan() && back.is_nan());
        }
    });
}

/// NaN's bits, too, and whatever stands beside it: conversions of the processor take the place of arithmetic at some levels.
#[test]
fn every_16_bit_float_has_the_same_bits_at_every_level() {
    for len in [1 << 16, (1 << 16) - 3, 13] {
        let halves: Vec<f16> = (0..len).map(|bits| f16::from_bits(bits as u16)).collect();
        let wide = at_every_level(|| {
            let (mut wide, mut same, mut bfloats) = (vec![0f32; len], vec![f16::ZERO; len], vec![bf16::ZERO; len]);
            cast(Slice::F16(&halves), SliceMut::F32(&mut wide), Saturate::No).unwrap();
            cast(Slice::F16(&halves), SliceMut::F16(&mut same), Saturate::No).unwrap();
            cast(Slice::F16(&halves), SliceMut::BF16(&mut bfloats), Saturate::No).unwrap();
            let bits = |halves: &[f16]| halves.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            let bfloats: Vec<u16> = bfloats.iter().map(|x| x.to_bits()).collect();
            (wide.iter().map(|x| x.to_bits()).collect::<Vec<_>>(), bits(&same), bfloats)
        });
        for (half, (bits, same)) in halves.iter().zip(wide.0.iter().zip(&wide.1)) {
            let quiet_bits = if half.is_nan() { half.to_bits() | 0x0200 } else { half.to_bits() };
            assert_eq!(*bits, f16::from_bits(quiet_bits).to_f32_const().to_bits(), "{half:?}");
            assert_eq!(*same, quiet_bits);
        }
        // Every f16 beside its neighbours in f32, and NaN with payloads above, in and below what stays.
        let near = wide.0.iter().flat_map(|bits| [0, 1, 0x0fff, 0x1000, 0x1001].map(|add| bits.wrapping_add(add)));
        let near: Vec<f32> = near.chain([0x7f80_0001, 0xff80_2000, 0x7fbf_ffff]).map(f32::from_bits).collect();
        at_every_level(|| {
            let mut narrow = vec![f16::ZERO; near.len()];
            cast(Slice::F32(&near), SliceMut::F16(&mut narrow), Saturate::No).unwrap();
            narrow.iter().map(|x| x.to_bits()).collect::<Vec<_>>()
        });
    }
}

#[test]
fn nan_stays_nan_and_quiet_with_its_sign() {
    // A NaN whose payload is only in the bits that are cut off.
    for bits in [0x7f80_0001u32, 0xff80_0001, 0x7fc0_0000, 0x7fff_ffff, 0xffbf_ffff] {
        for saturate in [Saturate::No, Saturate::Yes] {
            let src = [f32::from_bits(bits); 33];
            at_every_level(|| {
                let (mut half, mut bfloat, mut random) = ([f16::ZERO; 33], [bf16::ZERO; 33], [bf16::ZERO; 33]);
                cast(Slice::F32(&src), SliceMut::F16(&mut half), saturate).unwrap();
                cast(Slice::F32(&src), SliceMut::BF16(&mut bfloat), saturate).unwrap();
                let key = RoundingKey { seed: 0, step: 0 };
                cast_stochastic(Slice::F32(&src), SliceMut::BF16(&mut random), key, 0, saturate).unwrap();
                assert!(
                    half.iter().all(|x| x.to_bits() & 0x7e00 == 0x7e00 && x.to_bits() >> 15 == (bits >> 31) as u16)
                );
                for x in bfloat.iter().chain(&random) {
                    assert!(x.to_bits() & 0x7fc0 == 0x7fc0 && x.to_bits() >> 15 == (bits >> 31) as u16);
                }
            });
        }
    }
}

#[test]
fn doubles_round_once() {
    // Just above and just below ties of each type: through f32 they would become the ties.
    let src: Vec<f64> = (0..2000)
        .flat_map(|i| {
            let tie = f64::from(f16::from_bits(i * 13)) + f64::from(f16::from_bits(i * 13 + 1));
            let bfloat_tie = (bf16::from_bits(i * 16).to_f64() + bf16::from_bits(i * 16 + 1).to_f64()) / 2.0;
            [tie / 2.0, bfloat_tie].into_iter().flat_map(|tie| [tie, tie * (1.0 + 1e-12), tie * (1.0 - 1e-12), -tie])
        })
        .collect();
    for dtype in [DType::F16, DType::BF16] {
        let mut dst = Tensor::from_f32(dtype, &vec![0.0; src.len()]);
        cast(Slice::F64(&src), dst.slice_mut(), Saturate::No).unwrap();
        let expected: Vec<f64> = src.iter().map(|x| expected_cast(*x, dtype, false)).collect();
        assert_same(&dst.to_f64(), &expected, dtype.name());
    }
}

#[test]
fn stochastic_rounding_is_the_reference() {
    let key = RoundingKey { seed: 0x0123_4567_89ab_cdef, step: 77 };
    for (len, first_index) in
        [(0, 0), (1, 0), (127, 1), (128, 0), (129, 0), (1000, 12_345), (300, (1 << 35) - 37), (4099, 7)]
    {
        let src = wild(2, len);
        for saturate in [Saturate::No, Saturate::Yes] {
            let (halves, bfloats) = at_every_level(|| {
                let (mut halves, mut bfloats) = (vec![f16::ZERO; len], vec![bf16::ZERO; len]);
                cast_stochastic(Slice::F32(&src), SliceMut::F16(&mut halves), key, first_index, saturate).unwrap();
                cast_stochastic(Slice::F32(&src), SliceMut::BF16(&mut bfloats), key, first_index, saturate).unwrap();
                (bytemuck::cast_vec::<_, u16>(halves), bytemuck::cast_vec::<_, u16>(bfloats))
            });
            for (i, value) in src.iter().enumerate() {
                let random = reference::rounding_bits(key.seed, key.step, first_index + i as u64);
                let (half, bfloat) = (f16::from_bits(halves[i]), bf16::from_bits(bfloats[i]));
                let saturate = saturate == Saturate::Yes;
                let expected = reference::f32_to_f16_stochastic(*value, random, saturate);
                assert!(
                    half.to_bits() == expected.to_bits() || half.is_nan() && expected.is_nan(),
                    "{value:e} {random}"
                );
                let expected = reference::f32_to_bf16_stochastic(*value, random, saturate);
                assert!(
                    bfloat.to_bits() == expected.to_bits() || bfloat.is_nan() && expected.is_nan(),
                    "{value:e} {random}"
                );
            }
        }
    }
}

#[test]
fn stochastic_rounding_of_shards_is_that_of_the_whole() {
    let key = RoundingKey { seed: 5, step: 6 };
    let src = uniforms(3, 1000);
    let mut whole = vec![bf16::ZERO; 1000];
    cast_stochastic(Slice::F32(&src), SliceMut::BF16(&mut whole), key, 100, Saturate::No).unwrap();
    for border in [1, 8, 63, 500, 999] {
        let mut parts = vec![bf16::ZERO; 1000];
        let (left, right) = parts.split_at_mut(border);
        cast_stochastic(Slice::F32(&src[border..]), right.into(), key, 100 + border as u64, Saturate::No).unwrap();
        cast_stochastic(Slice::F32(&src[..border]), left.into(), key, 100, Saturate::No).unwrap();
        assert_eq!(parts, whole);
    }
}

#[test]
fn stochastic_rounding_is_right_on_average_and_differs_between_steps() {
    const LEN: usize = 1 << 16;
    for value in [1.001f32, -2.71, 1e-6, 300.3] {
        let src = vec![value; LEN];
        let mut previous = Vec::new();
        for step in 0..3 {
            let (mut halves, mut bfloats) = (vec![f16::ZERO; LEN], vec![bf16::ZERO; LEN]);
            let key = RoundingKey { seed: 1, step };
            cast_stochastic(Slice::F32(&src), SliceMut::F16(&mut halves), key, 0, Saturate::No).unwrap();
            cast_stochastic(Slice::F32(&src), SliceMut::BF16(&mut bfloats), key, 0, Saturate::No).unwrap();
            let check = |values: Vec<f64>| {
                let gap =
                    values.iter().fold(f64::MIN, |a, b| a.max(*b)) - values.iter().fold(f64::MAX, |a, b| a.min(*b));
                let mean = values.iter().sum::<f64>() / LEN as f64;
                // Six standard deviations of the mean of LEN coin flips.
                assert!((mean - f64::from(value)).abs() <= gap * 0.5 * 6.0 / 256.0, "{value}: {mean}, gap {gap:e}");
            };
            check(halves.iter().map(|x| x.to_f64()).collect());
            check(bfloats.iter().map(|x| x.to_f64()).collect());
            assert_ne!(bfloats, previous);
            previous = bfloats;
        }
    }
}

#[test]
fn wrong_arguments_are_refused() {
    let key = RoundingKey { seed: 0, step: 0 };
    let refused = cast(Slice::F32(&[0.0; 3]), SliceMut::BF16(&mut [bf16::ZERO; 2]), Saturate::No);
    assert!(matches!(refused, Err(Error::LengthMismatch { expected_elems: 3, actual_elems: 2, .. })));
    let refused = cast_stochastic(Slice::F32(&[0.0; 3]), SliceMut::F32(&mut [0.0; 3]), key, 0, Saturate::No);
    assert!(matches!(refused, Err(Error::Unsupported { dtype: DType::F32, .. })));
    let refused = cast_stochastic(Slice::F64(&[0.0; 3]), SliceMut::BF16(&mut [bf16::ZERO; 3]), key, 0, Saturate::No);
    assert!(matches!(refused, Err(Error::Unsupported { dtype: DType::F64, .. })));
    let refused =
        cast_stochastic(Slice::F32(&[0.0; 3]), SliceMut::BF16(&mut [bf16::ZERO; 3]), key, u64::MAX, Saturate::No);
    assert!(matches!(refused, Err(Error::SizeOverflow { .. })));
}
