//! Precisions: what is rounded where, and the loss scaler.

use annulus::ops::GradScaler;
use annulus::strategy::{AdamW, GradSink, Nonfinite, Precision, Sgd, Strategy, StrategyOptions};
use annulus::{DType, NormType};
use half::{bf16, f16};

use crate::model::{Loss, Mlp, TIMEOUT, bits, ddp, everywhere, options, samples, times};

fn with(precision: Precision) -> StrategyOptions {
    StrategyOptions { precision, ..options() }
}

#[test]
fn every_precision_learns_and_keeps_ranks_identical() {
    let data = samples(48);
    for precision in Precision::ALL {
        for stochastic_rounding in [false, true] {
            let options = StrategyOptions { stochastic_rounding, ..with(precision) };
            ddp(2, options, |strategy| {
                let mut strategy: Box<dyn Strategy> = Box::new(strategy);
                let mut model = Mlp::set_up(&mut strategy);
                let mut optimizer = strategy.setup_optimizer(&model, AdamW::new(1e-2).into()).unwrap();
                let first = model.loss(&data);
                let half = &data[24 * strategy.rank() as usize..][..24];
                for _ in 0..times(60, 8) {
                    strategy.backward(&Loss::of(half), &mut model).unwrap();
                    strategy
                        .clip_gradients_norm(&model, &mut optimizer, 1.0, NormType::L2, Nonfinite::SkipStep)
                        .unwrap();
                    strategy.optimizer_step(&mut optimizer).unwrap();
                }
                let last = model.loss(&data);
                assert!(last < times(1, 2) as f64 * 0.5 * first, "{precision}: {first} to {last}");
                let text = format!("{:?}", bits(&model.weights()));
                strategy.check_agreement("the weights' bits", &text).unwrap();
                strategy.teardown(TIMEOUT).unwrap();
            });
        }
    }
}

#[test]
fn mixed_precisions_keep_master_weights() {
    for precision in [Precision::Bf16Mixed, Precision::F16Mixed] {
        everywhere(&with(precision), |strategy| {
            let mut model = Mlp::set_up(strategy);
            let mut optimizer = strategy.setup_optimizer(&model, Sgd::new(1.0).into()).unwrap();
            // Steps of 2^-14, far below the gaps of 16-bit weights around 0.3, add up in the master weights.
            let steps = times(64, 16);
            for _ in 0..steps {
                let loss = |model: &mut Mlp, sink: &mut GradSink<'_>| {
                    sink.write(&model.hidden.0, &[2.0_f32.powi(-14) * sink.loss_scale()?; 240])
                };
                strategy.backward(&loss, &mut model).unwrap();
                strategy.optimizer_step(&mut optimizer).unwrap();
            }
            let master = strategy.get_module_state_dict(&model).unwrap();
            let master = master.tensors["hidden.weight"].as_slice::<f32>().unwrap().to_vec();
            let init = strategy.module_init_context(annulus::strategy::Init::Default);
            let untrained = Mlp::new(&init, 100).unwrap();
            let start = strategy.get_module_state_dict(&untrained).unwrap();
            let start = start.tensors["hidden.weight"].as_slice::<f32>().unwrap();
            for (after, before) in master.iter().zip(start) {
                assert!((before - after - steps as f32 * 2.0_f32.powi(-14)).abs() < 1e-6, "{before} to {after}");
            }
            // And the model's are the master weights, rounded to nearest.
            let reading = model.hidden.0.read().unwrap();
            for (i, master) in master.iter().enumerate() {
                match precision {
                    Precision::Bf16Mixed => {
                        assert_eq!(reading.as_slice::<bf16>().unwrap()[i], bf16::from_f32(*master));
                    }
                    _ => assert_eq!(reading.as_slice::<f16>().unwrap()[i], f16::from_f32(*master)),
                }
            }
            assert!(reading.as_slice::<f32>().is_err());
        });
    }
}

#[test]
fn types_of_weights_buffers_and_gradients() {
    for precision in Precision::ALL {
        assert_eq!(precision.name().parse::<Precision>().unwrap(), precision);
        let (model_dtype, buffer_dtype, saved) = match precision {
            Precision::F32True => (DType::F32, DType::F32, DType::F32),
            Precision::Bf16Mixed => (DType::BF16, DType::F32, DType::F32),
            Precision::F16Mixed => (DType::F16, DType::F32, DType::F32),
            Precision::Bf16True => (DType::BF16, DType::BF16, DType::BF16),
            Precision::F16True => (DType::F16, DType::F16, DType::F16),
        };
        everywhere(&with(precision), |strategy| {
            let mut model = Mlp::set_up(strategy);
            assert_eq!((model.idle.dtype(), model.seen.dtype()), (model_dtype, buffer_dtype));
            assert_eq!(strategy.get_module_state_dict(&model).unwrap().tensors["idle"].dtype(), saved);
            // A gradient that only f32 holds exactly shows the type of the buckets.
            let exact = 1.0 + 2.0_f32.powi(-20);
            let loss =
                |model: &mut Mlp, sink: &mut GradSink<'_>| sink.write(&model.idle, &[exact * sink.loss_scale()?, 0.0]);
            strategy.backward(&loss, &mut model).unwrap();
            let mut gradient = [0.0; 2];
            strategy.read_gradient(&model.idle, &mut gradient).unwrap();
            let kept = precision.gradient_dtype() == DType::F32;
            assert_eq!(gradient[0], if kept { exact } else { 1.0 }, "{precision}");
        });
    }
    assert!("64-true".parse::<Precision>().is_err());
    // The option to send fewer bytes.
    let options = StrategyOptions { gradient_dtype: Some(DType::BF16), ..with(Precision::F32True) };
    ddp(2, options, |strategy| {
        let mut strategy: Box<dyn Strategy> = Box::new(strategy);
        let mut model = Mlp::set_up(&mut strategy);
        let loss = |model: &mut Mlp, sink: &mut GradSink<'_>| sink.write(&model.idle, &[1.001_f32, 0.0]);
        strategy.backward(&loss, &mut model).unwrap();
        let mut gradient = [0.0; 2];
        strategy.read_gradient(&model.idle, &mut gradient).unwrap();
        assert_eq!(gradient[0], 1.0);
        strategy.teardown(TIMEOUT).unwrap();
    });
}

#[test]
fn gradients_may_be_written_in_16_bits() {
    everywhere(&options(), |strategy| {
        let mut model = Mlp::set_up(strategy);
        let loss = |model: &mut Mlp, sink: &mut GradSink<'_>| {
            sink.add(&model.idle, &[bf16::from_f32(1.5), bf16::from_f32(-2.0)])?;
            sink.write(&model.idle, &[f16::from_f32(0.25), f16::from_f32(1.0)])
        };
        strategy.backward(&loss, &mut model).unwrap();
        let mut gradient = [0.0; 2];
        strategy.read_gradient(&model.idle, &mut gradient).unwrap();
        assert_eq!(gradient, [1.75, -1.0]);
    });
}

#[test]
fn loss_scaler_skips_shrinks_and_grows() {
    let scaler = GradScaler::new(1024.0, 2.0, 0.5, 3).unwrap();
    everywhere(&StrategyOptions { scaler, ..with(Precision::F16Mixed) }, |strategy| {
        let mut model = Mlp::set_up(strategy);
        let mut optimizer = strategy.setup_optimizer(&model, Sgd::new(0.1).into()).unwrap();
        let rank = strategy.rank();
        let mut scales = Vec::new();
        for (step, overflows) in [false, false, true, false, false, false, false].into_iter().enumerate() {
            let before = bits(&model.weights());
            let scale = std::cell::Cell::new(0.0);
            let loss = |model: &mut Mlp, sink: &mut GradSink<'_>| {
                scale.set(sink.loss_scale()?);
                let value = if overflows && rank == 0 { f32::INFINITY } else { sink.loss_scale()? };
                sink.write(&model.idle, &[value, 0.0])
            };
            strategy.backward(&loss, &mut model).unwrap();
            let mut gradient = [0.0; 2];
            strategy.read_gradient(&model.idle, &mut gradient).unwrap();
            assert_eq!(gradient[0], if overflows { f32::INFINITY } else { 1.0 }, "unscaled");
            // With and without clipping: the scaler looks for itself.
            if step % 2 == 0 {
                let norm = strategy.clip_gradients_norm(&model, &mut optimizer, 9.0, NormType::L2, Nonfinite::ErrorNow);
                let norm = norm.unwrap().get(TIMEOUT).unwrap();
                assert_eq!(norm, if overflows { f64::INFINITY } else { 1.0 }, "of the unscaled gradients");
            }
            strategy.optimizer_step(&mut optimizer).unwrap();
            assert_eq!(bits(&model.weights()) == before, overflows);
            scales.push(scale.get());
        }
        // Halved after the overflow in step 3, doubled after three good ones.
        assert_eq!(scales, [1024.0, 1024.0, 1024.0, 512.0, 512.0, 512.0, 1024.0]);
        assert_eq!(optimizer.skipped_steps().unwrap(), 1);
    });
}

#[test]
fn clipping_by_value_does_not_hide_an_overflow_from_the_scaler() {
    let scaler = GradScaler::new(1024.0, 2.0, 0.5, 1000).unwrap();
    everywhere(&StrategyOptions { scaler, ..with(Precision::F16Mixed) }, |strategy| {
        let mut model = Mlp::set_up(strategy);
        let mut optimizer = strategy.setup_optimizer(&model, Sgd::new(0.1).into()).unwrap();
        for (skipped, clips_norm_too) in [(1, false), (2, true)] {
            let before = bits(&model.weights());
            let loss = |model: &mut Mlp, sink: &mut GradSink<'_>| sink.write(&model.idle, &[f32::INFINITY, 1.0]);
            strategy.backward(&loss, &mut model).unwrap();
            strategy.clip_gradients_value(&model, &mut optimizer, 1.0).unwrap();
            if clips_norm_too {
                strategy.clip_gradients_norm(&model, &mut optimizer, 1.0, NormType::L2, Nonfinite::SkipStep).unwrap();
            }
            strategy.optimizer_step(&mut optimizer).unwrap();
            assert_eq!(bits(&model.weights()), before);
            assert_eq!(optimizer.skipped_steps().unwrap(), skipped);
        }
        // Both made the scale smaller, and the next good step is made.
        let loss = |model: &mut Mlp, sink: &mut GradSink<'_>| {
            assert_eq!(sink.loss_scale()?, 256.0);
            sink.write(&model.idle, &[sink.loss_scale()?, 0.0])
        };
        strategy.backward(&loss, &mut model).unwrap();
        strategy.clip_gradients_value(&model, &mut optimizer, 0.5).unwrap();
        strategy.optimizer_step(&mut optimizer).unwrap();
        assert_eq!(optimizer.steps().unwrap(), 1);
    });
}

#[test]
fn loss_scale_stays_while_gradients_accumulate() {
    let scaler = GradScaler::new(8.0, 2.0, 0.5, 1).unwrap();
    everywhere(&StrategyOptions { scaler, ..with(Precision::F16Mixed) }, |strategy| {
        let model = Mlp::set_up(strategy);
        let mut model = model;
        let part = |name: &'static str| move |p: &annulus::strategy::Parameter| p.name().starts_with(name);
        let spec = |name| annulus::strategy::UpdateRule::only(Sgd::new(0.1), part(name));
        let mut first = strategy.setup_optimizer(&model, spec("hidden")).unwrap();
        let mut second = strategy.setup_optimizer(&model, spec("output")).unwrap();
        let data = samples(4);
        let scale_of = |strategy: &mut Box<dyn Strategy>, model: &mut Mlp| {
            let scale = std::cell::Cell::new(0.0);
            let loss = |model: &mut Mlp, sink: &mut GradSink<'_>| {
                scale.set(sink.loss_scale()?);
                annulus::strategy::Backward::backward(&Loss::of(&data), model, sink)
            };
            strategy.backward(&loss, model).unwrap();
            scale.get()
        };
        assert_eq!(scale_of(strategy, &mut model), 8.0);
        strategy.optimizer_step(&mut first).unwrap(); // the scale is 16 from here on
        assert_eq!(scale_of(strategy, &mut model), 8.0, "the second optimizer's gradients have it already");
        strategy.optimizer_step(&mut first).unwrap();
        strategy.optimizer_step(&mut second).unwrap();
        // Three steps in all, each of which doubled it. `idle`, whose gradient no step uses, holds nothing up.
        assert_eq!(scale_of(strategy, &mut model), 64.0);
    });
}
