//! AdamW and SGD: bit for bit as the reference says, at every level, and near the textbook in f64.

use annulus::ops::{
    AdamWOptions, Rounding, RoundingKey, SgdOptions, Slice, SliceMut, StepSignal, Weights, adamw_step, sgd_step,
};
use annulus::{DType, Error, reference};
use half::{bf16, f16};

use crate::inputs::*;

const OPTIONS: AdamWOptions = AdamWOptions { lr: 3e-3, beta1: 0.9, beta2: 0.99, eps: 1e-8, weight_decay: 0.1 };
const SIGNAL: StepSignal = StepSignal { clip_coef: 0.37, grad_scale: 1024.0, found_inf: false };

fn adamw_reference(options: AdamWOptions) -> reference::AdamW {
    let AdamWOptions { lr, beta1, beta2, eps, weight_decay } = options;
    reference::AdamW { lr, beta1, beta2, eps, weight_decay }
}

fn sgd_reference(options: SgdOptions) -> reference::Sgd {
    let SgdOptions { lr, momentum, nesterov, weight_decay } = options;
    reference::Sgd { lr, momentum, nesterov, weight_decay }
}

fn gradients(dtype: DType, step: u64, len: usize) -> Tensor {
    let values: Vec<f32> = uniforms(100 + step, len).iter().map(|x| x * 900.0).collect();
    Tensor::from_f32(dtype, &values)
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

/// Weights and moments after three steps, with every gradient dtype and every kind of weights.
#[test]
fn adamw_is_the_reference_bit_for_bit() {
    let rule = adamw_reference(OPTIONS);
    for grad_dtype in [DType::F32, DType::F16, DType::BF16] {
        for model_dtype in [DType::F32, DType::F16, DType::BF16] {
            for len in LENS {
                let (master, m, v, model) = at_every_level(|| {
                    let (mut master, mut m, mut v) = (uniforms(1, len), vec![0.0; len], vec![0.0; len]);
                    let mut model = Tensor::from_f32(model_dtype, &vec![0.0; len]);
                    for step in 1..=3 {
                        let gradient = gradients(grad_dtype, step, len);
                        let model = (model_dtype != DType::F32).then(|| model.slice_mut());
                        let weights = Weights::Master { master: &mut master, model };
                        adamw_step(&OPTIONS, step, SIGNAL, weights, gradient.slice(), &mut m, &mut v).unwrap();
                    }
                    (bits(&master), bits(&m), bits(&v), model.bytes().to_vec())
                });
                let (mut w, mut em, mut ev) = (uniforms(1, len), vec![0f32; len], vec![0f32; len]);
                for step in 1..=3 {
                    let gradient = gradients(grad_dtype, step, len).to_f64();
                    for i in 0..len {
                        rule.update(step, SIGNAL.factor(), gradient[i] as f32, &mut w[i], &mut em[i], &mut ev[i]);
                    }
                }
                assert_eq!((master, m, v), (bits(&w), bits(&em), bits(&ev)), "{grad_dtype}, {len}");
                if model_dtype != DType::F32 {
                    assert_eq!(model, Tensor::from_f32(model_dtype, &w).bytes());
                }
            }
        }
    }
}

#[test]
fn adamw_without_master_rounds_as_asked() {
    let rule = adamw_reference(OPTIONS);
    let key = RoundingKey { seed: 3, step: 9 };
    for len in LENS {
        for rounding in [Rounding::Nearest, Rounding::Stochastic { key, first_index: 1_000_003 }] {
            let gradient = gradients(DType::BF16, 1, len);
            let start: Vec<bf16> = uniforms(2, len).iter().map(|x| reference::f32_to_bf16(*x, false)).collect();
            let start_half: Vec<f16> = uniforms(2, len).iter().map(|x| reference::f32_to_f16(*x, false)).collect();
            let (bfloats, halves, m) = at_every_level(|| {
                let (mut bfloats, mut m, mut v) = (start.clone(), vec![0.0; len], vec![0.0; len]);
                let weights = Weights::Model { model: SliceMut::BF16(&mut bfloats), rounding };
                adamw_step(&OPTIONS, 1, SIGNAL, weights, gradient.slice(), &mut m, &mut v).unwrap();
                let (mut halves, mut m2, mut v2) = (start_half.clone(), vec![0.0; len], vec![0.0; len]);
                let weights = Weights::Model { model: SliceMut::F16(&mut halves), rounding };
                adamw_step(&OPTIONS, 1, SIGNAL, weights, gradient.slice(), &mut m2, &mut v2).unwrap();
                (bfloats, halves, bits(&m))
            });
            for i in 0..len {
                let g = gradient.to_f64()[i] as f32;
                let (mut w, mut em, mut ev) = (start[i].to_f32(), 0.0, 0.0);
                rule.update(1, SIGNAL.factor(), g, &mut w, &mut em, &mut ev);
                let (mut w_half, mut em2, mut ev2) = (start_half[i].to_f32(), 0.0, 0.0);
                rule.update(1, SIGNAL.factor(), g, &mut w_half, &mut em2, &mut ev2);
                let random = reference::rounding_bits(key.seed, key.step, 1_000_003 + i as u64);
                let (expected, expected_half) = match rounding {
                    Rounding::Nearest => (reference::f32_to_bf16(w, false), reference::f32_to_f16(w_half, false)),
                    Rounding::Stochastic { .. } => (
                        reference::f32_to_bf16_stochastic(w, random, false),
                        reference::f32_to_f16_stochastic(w_half, random, false),
                    ),
                };
                assert_eq!((bfloats[i], halves[i], m[i]), (expected, expected_half, em.to_bits()), "{i} of {len}");
            }
        }
    }
}

#[test]
fn sgd_is_the_reference_bit_for_bit() {
    for (momentum, nesterov, weight_decay) in
        [(0.0, false, 0.0), (0.0, false, 0.1), (0.9, false, 0.0), (0.9, false, 0.1), (0.9, true, 0.0), (0.9, true, 0.1)]
    {
        let options = SgdOptions { lr: 0.05, momentum, nesterov, weight_decay };
        let rule = sgd_reference(options);
        for len in LENS {
            let velocity_len = if momentum == 0.0 { 0 } else { len };
            let (master, velocity) = at_every_level(|| {
                let (mut master, mut velocity) = (uniforms(1, len), vec![0.0; velocity_len]);
                for step in 1..=3 {
                    let gradient = gradients(DType::F32, step, len);
                    let weights = Weights::Master { master: &mut master, model: None };
                    sgd_step(&options, SIGNAL, weights, gradient.slice(), &mut velocity).unwrap();
                }
                (bits(&master), bits(&velocity))
            });
            let (mut w, mut u) = (uniforms(1, len), vec![0f32; len]);
            for step in 1..=3 {
                let gradient = gradients(DType::F32, step, len).to_f64();
                for i in 0..len {
                    rule.update(SIGNAL.factor(), gradient[i] as f32, &mut w[i], &mut u[i]);
                }
            }
            assert_eq!(master, bits(&w));
            assert_eq!(velocity, bits(&u[..velocity_len]));
        }
    }
}

/// The textbook in f64, written apart from the reference's f32 arithmetic: 200 steps stay within 1e-5 of it.
#[test]
fn adamw_follows_the_textbook() {
    let (mut master, mut m, mut v) = (uniforms(1, 64), vec![0.0; 64], vec![0.0; 64]);
    let (mut w64, mut m64, mut v64) = (Tensor::F32(master.clone()).to_f64(), [0f64; 64], [0f64; 64]);
    let AdamWOptions { lr, beta1, beta2, eps, weight_decay } = OPTIONS;
    for step in 1..=200 {
        let gradient = uniforms(step, 64);
        let weights = Weights::Master { master: &mut master, model: None };
        adamw_step(&OPTIONS, step, StepSignal::default(), weights, Slice::F32(&gradient), &mut m, &mut v).unwrap();
        for i in 0..64 {
            let g = f64::from(gradient[i]);
            w64[i] -= lr * weight_decay * w64[i];
            m64[i] = beta1 * m64[i] + (1.0 - beta1) * g;
            v64[i] = beta2 * v64[i] + (1.0 - beta2) * g * g;
            let m_hat = m64[i] / (1.0 - beta1.powi(step as i32));
            let v_hat = v64[i] / (1.0 - beta2.powi(step as i32));
            w64[i] -= lr * m_hat / (v_hat.sqrt() + eps);
            assert!((f64::from(master[i]) - w64[i]).abs() < 1e-5, "step {step}: {} {}", master[i], w64[i]);
        }
    }
}

#[test]
fn a_skipped_step_changes_nothing() {
    let skip = StepSignal { found_inf: true, ..SIGNAL };
    let nan = vec![f32::NAN; 3000];
    let (mut master, mut m, mut v) = (uniforms(1, 3000), uniforms(2, 3000), uniforms(3, 3000));
    let mut model = Tensor::from_f32(DType::BF16, &uniforms(4, 3000));
    let before = (bits(&master), bits(&m), bits(&v), model.bytes().to_vec());
    let weights = Weights::Master { master: &mut master, model: Some(model.slice_mut()) };
    adamw_step(&OPTIONS, 1, skip, weights, Slice::F32(&nan), &mut m, &mut v).unwrap();
    let options = SgdOptions { momentum: 0.9, ..SgdOptions::default() };
    let weights = Weights::Master { master: &mut master, model: Some(model.slice_mut()) };
    sgd_step(&options, skip, weights, Slice::F32(&nan), &mut m).unwrap();
    let rounding = Rounding::Stochastic { key: RoundingKey { seed: 0, step: 0 }, first_index: 0 };
    let weights = Weights::Model { model: model.slice_mut(), rounding };
    adamw_step(&OPTIONS, 1, skip, weights, Slice::F32(&nan), &mut m, &mut v).unwrap();
    assert_eq!((bits(&master), bits(&m), bits(&v), model.bytes().to_vec()), before);
}

#[test]
fn nan_gradients_reach_the_weights_when_the_step_is_not_skipped() {
    let (mut master, mut m, mut v) = (vec![1.0; 100], vec![0.0; 100], vec![0.0; 100]);
    let mut gradient = vec![1.0; 100];
    gradient[77] = f32::NAN;
    let weights = Weights::Master { master: &mut master, model: None };
    adamw_step(&OPTIONS, 1, StepSignal::default(), weights, Slice::F32(&gradient), &mut m, &mut v).unwrap();
    assert!(master.iter().enumerate().all(|(i, w)| w.is_nan() == (i == 77)));
}

#[test]
fn wrong_arguments_write_nothing() {
    let signal = StepSignal::default();
    let gradient = [1f32; 8];
    let try_step = |options: AdamWOptions, step, len_m: usize, len_g: usize, model: Option<SliceMut<'_>>| {
        let (mut master, mut m, mut v) = (vec![1.0; 8], vec![0.0; len_m], vec![0.0; 8]);
        let weights = Weights::Master { master: &mut master, model };
        let result = adamw_step(&options, step, signal, weights, Slice::F32(&gradient[..len_g]), &mut m, &mut v);
        if result.is_err() {
            assert!(master.iter().all(|w| *w == 1.0) && m.iter().chain(&v).all(|x| *x == 0.0));
        }
        result
    };
    try_step(OPTIONS, 1, 8, 8, None).unwrap();
    assert!(matches!(try_step(OPTIONS, 1, 7, 8, None), Err(Error::LengthMismatch { actual_elems: 7, .. })));
    assert!(matches!(try_step(OPTIONS, 1, 8, 7, None), Err(Error::LengthMismatch { actual_elems: 7, .. })));
    assert!(try_step(OPTIONS, 0, 8, 8, None).is_err());
    assert!(try_step(AdamWOptions { lr: f64::NAN, ..OPTIONS }, 1, 8, 8, None).is_err());
    assert!(try_step(AdamWOptions { beta2: 1.0, ..OPTIONS }, 1, 8, 8, None).is_err());
    assert!(try_step(OPTIONS, 1, 8, 8, Some(SliceMut::BF16(&mut [bf16::ZERO; 7]))).is_err());
    let unsupported = try_step(OPTIONS, 1, 8, 8, Some(SliceMut::F32(&mut [0.0; 8])));
    assert!(matches!(unsupported, Err(Error::Unsupported { dtype: DType::F32, .. })));
    let nesterov = SgdOptions { nesterov: true, ..SgdOptions::default() };
    assert!(nesterov.check().is_err());
    let mut master = [1f32; 2];
    let weights = Weights::Master { master: &mut master, model: None };
    let wide = sgd_step(&SgdOptions::default(), signal, weights, Slice::F64(&[1.0; 2]), &mut []);
    assert!(matches!(wide, Err(Error::Unsupported { dtype: DType::F64, .. })));
    let weights = Weights::Master { master: &mut master, model: None };
    let options = SgdOptions { momentum: 0.9, ..SgdOptions::default() };
    assert!(sgd_step(&options, signal, weights, Slice::F32(&[1.0; 2]), &mut []).is_err());
    assert_eq!(master, [1.0; 2]);
}
