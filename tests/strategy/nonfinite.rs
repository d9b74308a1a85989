//! Gradients that are not finite, under each policy.

use annulus::strategy::{
    AdamW, Backward, GradSink, Init, Module, Nonfinite, Optimizer, Parameter, Sgd, Strategy, StrategyOptions,
};
use annulus::{DType, Error, NormType, Result};

use crate::gradients::clip;
use crate::model::{HIDDEN, INPUTS, Loss, Mlp, TIMEOUT, bits, ddp, everywhere, options, samples, times};

/// Where `hidden.bias[2]` is among all weights: behind `idle` and `hidden.weight`.
const BAD_WEIGHT: usize = 2 + HIDDEN * INPUTS + 2;

/// A gradient of 1 everywhere but for `bad` on the last rank, in the third element of one parameter.
struct Poisoned {
    bad: f32,
    is_last: bool,
}

impl Backward<Mlp> for Poisoned {
    fn backward(&self, model: &mut Mlp, sink: &mut GradSink<'_>) -> Result<()> {
        let mut handles: Vec<Parameter> = Vec::new();
        model.parameters(&mut |parameter| handles.push(parameter.clone()));
        for parameter in handles.iter().rev() {
            let mut gradient = vec![sink.loss_scale()?; parameter.len_elems()];
            if self.is_last && parameter.name() == "hidden.bias" {
                gradient[2] = self.bad;
            }
            sink.write(parameter, &gradient)?;
        }
        Ok(())
    }
}

fn poisoned(strategy: &impl Strategy, bad: f32) -> Poisoned {
    Poisoned { bad, is_last: strategy.rank() == strategy.world_size() - 1 }
}

fn state_bits(strategy: &mut Box<dyn Strategy>, model: &Mlp, optimizer: &Optimizer) -> Vec<u32> {
    let mut all = bits(&model.weights());
    for tensor in strategy.get_optimizer_state(optimizer).unwrap().tensors.values() {
        all.extend(bits(tensor.as_slice().unwrap()));
    }
    all
}

#[test]
fn p14_skip_step_changes_no_weight_and_no_moment() {
    everywhere(&options(), |strategy| {
        let mut model = Mlp::set_up(strategy);
        let mut optimizer = strategy.setup_optimizer(&model, AdamW::new(0.1).into()).unwrap();
        let data = samples(6);
        strategy.backward(&Loss::of(&data), &mut model).unwrap();
        strategy.optimizer_step(&mut optimizer).unwrap();
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let before = state_bits(strategy, &model, &optimizer);
            let loss = poisoned(strategy, bad);
            strategy.backward(&loss, &mut model).unwrap();
            let norm = strategy.clip_gradients_norm(&model, &mut optimizer, 1.0, NormType::L2, Nonfinite::SkipStep);
            strategy.optimizer_step(&mut optimizer).unwrap();
            assert!(!norm.unwrap().get(TIMEOUT).unwrap().is_finite());
            assert_eq!(state_bits(strategy, &model, &optimizer), before);
        }
        assert_eq!((optimizer.steps().unwrap(), optimizer.skipped_steps().unwrap()), (1, 3));
        // The next good step is made.
        let before = state_bits(strategy, &model, &optimizer);
        strategy.backward(&Loss::of(&data), &mut model).unwrap();
        clip(strategy, &model, &mut optimizer, 1.0, NormType::L2);
        strategy.optimizer_step(&mut optimizer).unwrap();
        let after = state_bits(strategy, &model, &optimizer);
        assert_ne!(after, before);
        assert!(after.iter().all(|bits| f32::from_bits(*bits).is_finite()));
        assert_eq!(optimizer.steps().unwrap(), 2);
    });
}

#[test]
fn p14_propagate_lets_it_through() {
    everywhere(&options(), |strategy| {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut model = Mlp::set_up(strategy);
            let mut optimizer = strategy.setup_optimizer(&model, Sgd::new(0.1).into()).unwrap();
            let before = model.weights();
            let loss = poisoned(strategy, bad);
            strategy.backward(&loss, &mut model).unwrap();
            let norm = clip(strategy, &model, &mut optimizer, 1.0, NormType::L2);
            strategy.optimizer_step(&mut optimizer).unwrap();
            let after = model.weights();
            if bad.is_nan() {
                assert!(norm.is_nan() && after.iter().all(|w| w.is_nan()), "the coefficient is NaN");
            } else {
                // The coefficient is 0, and 0 times infinity is NaN: that one weight is gone, the others stay.
                let mut expected = before;
                expected[BAD_WEIGHT] = f32::NAN;
                assert_eq!(norm, f64::INFINITY);
                let is_same = |(a, e): (&f32, &f32)| a.to_bits() == e.to_bits() || (a.is_nan() && e.is_nan());
                assert!(after.iter().zip(&expected).all(is_same), "{bad}: {after:?}");
            }
            assert_eq!((optimizer.steps().unwrap(), optimizer.skipped_steps().unwrap()), (1, 0));
        }
    });
}

#[test]
fn p14_error_deferred_names_the_tensor_at_the_next_call() {
    everywhere(&options(), |strategy| {
        let mut model = Mlp::set_up(strategy);
        let mut optimizer = strategy.setup_optimizer(&model, AdamW::new(0.1).into()).unwrap();
        let before = state_bits(strategy, &model, &optimizer);
        let loss = poisoned(strategy, f32::INFINITY);
        strategy.backward(&loss, &mut model).unwrap();
        strategy.clip_gradients_norm(&model, &mut optimizer, 1.0, NormType::L2, Nonfinite::ErrorDeferred).unwrap();
        strategy.optimizer_step(&mut optimizer).unwrap();
        let error = strategy.backward(&loss, &mut model).unwrap_err();
        let Error::Nonfinite { tensor, step, total_norm } = &error else { panic!("{error}") };
        assert_eq!((tensor.as_str(), *step, *total_norm), ("hidden.bias", 1, f64::INFINITY));
        assert_eq!(state_bits(strategy, &model, &optimizer), before, "the step was skipped");
        // It is told once, and training can go on.
        let data = samples(6);
        strategy.backward(&Loss::of(&data), &mut model).unwrap();
        strategy.clip_gradients_norm(&model, &mut optimizer, 1.0, NormType::L2, Nonfinite::ErrorDeferred).unwrap();
        strategy.optimizer_step(&mut optimizer).unwrap();
        strategy.backward(&Loss::of(&data), &mut model).unwrap();
        assert_ne!(state_bits(strategy, &model, &optimizer), before);
    });
}

#[test]
fn p14_error_deferred_of_the_last_step_is_told_by_teardown() {
    let errors = ddp(2, options(), |strategy| {
        let mut strategy: Box<dyn Strategy> = Box::new(strategy);
        let mut model = Mlp::set_up(&mut strategy);
        let mut optimizer = strategy.setup_optimizer(&model, AdamW::new(0.1).into()).unwrap();
        let loss = poisoned(&strategy, f32::NAN);
        strategy.backward(&loss, &mut model).unwrap();
        strategy.clip_gradients_norm(&model, &mut optimizer, 1.0, NormType::L2, Nonfinite::ErrorDeferred).unwrap();
        strategy.optimizer_step(&mut optimizer).unwrap();
        strategy.teardown(TIMEOUT)
    });
    for error in errors {
        assert!(matches!(&error, Err(Error::Nonfinite { tensor, .. }) if tensor == "hidden.bias"), "{error:?}");
    }
}

#[test]
fn p14_error_now_fails_at_once() {
    everywhere(&options(), |strategy| {
        for (bad, norm_type) in [
            (f32::NAN, NormType::Inf),
            (f32::INFINITY, NormType::Inf),
            (f32::NEG_INFINITY, NormType::L2),
            (f32::INFINITY, NormType::L1),
        ] {
            let mut model = Mlp::set_up(strategy);
            let mut optimizer = strategy.setup_optimizer(&model, AdamW::new(0.1).into()).unwrap();
            let before = state_bits(strategy, &model, &optimizer);
            let loss = poisoned(strategy, bad);
            strategy.backward(&loss, &mut model).unwrap();
            let clipped = strategy.clip_gradients_norm(&model, &mut optimizer, 1.0, norm_type, Nonfinite::ErrorNow);
            let error = clipped.map(|_| ()).unwrap_err();
            let Error::Nonfinite { tensor, total_norm, .. } = &error else { panic!("{error}") };
            assert_eq!((tensor.as_str(), total_norm.is_nan()), ("hidden.bias", bad.is_nan()));
            assert!(strategy.optimizer_step(&mut optimizer).is_err(), "the gradients are gone");
            assert_eq!(state_bits(strategy, &model, &optimizer), before);
            let data = samples(6);
            strategy.backward(&Loss::of(&data), &mut model).unwrap();
            strategy.clip_gradients_norm(&model, &mut optimizer, 1.0, NormType::L2, Nonfinite::ErrorNow).unwrap();
            strategy.optimizer_step(&mut optimizer).unwrap();
            assert!(model.weights().iter().all(|w| w.is_finite()));
        }
    });
}

#[test]
fn p14_every_position_is_seen_on_all_ranks() {
    // One parameter of every small length, the bad element everywhere in it, on the last rank alone.
    let long = times(300, 19);
    for (len, dtype) in [(1, DType::F32), (long.min(67), DType::F32), (long.min(67), DType::BF16), (long, DType::F16)] {
        let options = StrategyOptions { gradient_dtype: Some(dtype), ..options() };
        ddp(2, options, |mut strategy| {
            let init = strategy.module_init_context(Init::Default);
            let model = crate::rows::One(init.parameter("w", &[len], |_| ()).unwrap());
            let (mut model, mut optimizer) = strategy.setup_module_and_optimizers(model, Sgd::new(0.1)).unwrap();
            let is_last = strategy.rank() == strategy.world_size() - 1;
            let mut skipped = 0;
            for (bad, at) in [f32::NAN, f32::INFINITY].into_iter().flat_map(|bad| (0..len).map(move |at| (bad, at))) {
                let loss = |model: &mut crate::rows::One, sink: &mut GradSink<'_>| {
                    let mut gradient = vec![1.0_f32; len];
                    if is_last {
                        gradient[at] = bad;
                    }
                    sink.write(&model.0, &gradient)
                };
                strategy.backward(&loss, &mut model).unwrap();
                strategy.clip_gradients_norm(&model, &mut optimizer, 1.0, NormType::L2, Nonfinite::SkipStep).unwrap();
                strategy.optimizer_step(&mut optimizer).unwrap();
                skipped += 1;
                assert_eq!(optimizer.skipped_steps().unwrap(), skipped, "{bad} at {at} of {len} x {dtype}");
            }
            assert_eq!(optimizer.steps().unwrap(), 0);
            strategy.teardown(TIMEOUT).unwrap();
        });
    }
}
