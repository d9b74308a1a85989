//! Rows of the contract about backward, accumulation, clipping and steps.

use std::time::{Duration, Instant};

use annulus::strategy::{
    Accelerator, AdamW, Backward, GradSink, Init, Module, Nonfinite, Optimizer, Parameter, Piece, Sgd, SingleDevice,
    Strategy, StrategyOptions, UpdateRule,
};
use annulus::telemetry::Timeline;
use annulus::world::Environment;
use annulus::{Error, NormType, Result, reference};

use crate::model::{Loss, Mlp, Sample, TIMEOUT, bits, ddp, everywhere, options, samples, times};

/// Every parameter's reduced gradient, one after another.
fn gradients(strategy: &mut Box<dyn Strategy>, model: &Mlp) -> Vec<f32> {
    let mut handles = Vec::new();
    model.parameters(&mut |parameter| handles.push(parameter.clone()));
    let mut all = Vec::new();
    for parameter in handles {
        let mut gradient = vec![f32::NAN; parameter.len_elems()];
        strategy.read_gradient(&parameter, &mut gradient).unwrap();
        all.extend(gradient);
    }
    all
}

/// This rank's share of `data`.
fn share<'d>(strategy: &impl Strategy, data: &'d [Sample]) -> &'d [Sample] {
    let len = data.len() / strategy.world_size() as usize;
    &data[strategy.rank() as usize * len..][..len]
}

fn assert_close(a: &[f32], b: &[f32], tolerance: f32) {
    assert_eq!(a.len(), b.len());
    for (i, (a, b)) in a.iter().zip(b).enumerate() {
        assert!((a - b).abs() <= tolerance * (1.0 + a.abs().max(b.abs())), "element {i}: {a} and {b}");
    }
}

/// The gradients of the whole of `data` on one rank.
fn reference_gradients(data: &[Sample]) -> Vec<f32> {
    let result = std::sync::Mutex::new(Vec::new());
    ddp(1, options(), |strategy| {
        let mut strategy: Box<dyn Strategy> = Box::new(strategy);
        let mut model = Mlp::set_up(&mut strategy);
        strategy.backward(&Loss::of(data), &mut model).unwrap();
        *result.lock().unwrap() = gradients(&mut strategy, &model);
    });
    result.into_inner().unwrap()
}

#[test]
fn row_backward_averages_over_ranks() {
    let data = samples(12);
    let expected = reference_gradients(&data);
    everywhere(&options(), |strategy| {
        let mut model = Mlp::set_up(strategy);
        strategy.backward(&Loss::of(share(strategy, &data)), &mut model).unwrap();
        let mine = gradients(strategy, &model);
        assert_close(&mine, &expected, 1e-6);
        assert_eq!(mine[..2], [0.0, 0.0], "the parameter that nothing used");
        let text = format!("{:?}", bits(&mine));
        strategy.check_agreement("the gradients' bits", &text).unwrap();
    });
}

#[test]
fn row_backward_accumulates_until_a_step() {
    let data = samples(6);
    everywhere(&options(), |strategy| {
        let mut model = Mlp::set_up(strategy);
        let mut optimizer = strategy.setup_optimizer(&model, Sgd::new(0.0).into()).unwrap();
        strategy.backward(&Loss::of(share(strategy, &data)), &mut model).unwrap();
        let once = gradients(strategy, &model);
        strategy.backward(&Loss::of(share(strategy, &data)), &mut model).unwrap();
        let twice: Vec<f32> = once.iter().map(|g| 2.0 * g).collect();
        assert_close(&gradients(strategy, &model), &twice, 1e-6);
        strategy.optimizer_step(&mut optimizer).unwrap();
        strategy.backward(&Loss::of(share(strategy, &data)), &mut model).unwrap();
        assert_eq!(bits(&gradients(strategy, &model)), bits(&once), "a step uses gradients up");
        strategy.zero_gradients(&mut optimizer).unwrap();
        strategy.backward(&Loss::of(share(strategy, &data)), &mut model).unwrap();
        assert_eq!(bits(&gradients(strategy, &model)), bits(&once));
    });
}

#[test]
fn row_backward_refuses_gradients_that_do_not_fit() {
    everywhere(&options(), |strategy| {
        let init = strategy.module_init_context(Init::Default);
        let stranger = init.parameter("stranger", &[3], |_| ()).unwrap();
        let mut model = Mlp::set_up(strategy);
        type Attempt<'a> = &'a dyn Fn(&Mlp, &mut GradSink<'_>) -> Result<()>;
        let attempts: [Attempt<'_>; 4] = [
            &|model, sink| sink.write(&model.output.1, &[0.0_f32; 2]),
            &|_, sink| sink.write(&stranger, &[0.0_f32; 3]),
            &|model, sink| {
                sink.write(&model.idle, &[0.0_f32; 2])?;
                sink.write(&model.idle, &[0.0_f32; 2])
            },
            &|model, sink| {
                sink.write(&model.idle, &[0.0_f32; 2])?;
                sink.add(&model.idle, &[0.0_f32; 2])
            },
        ];
        for attempt in attempts {
            let loss = |model: &mut Mlp, sink: &mut GradSink<'_>| {
                let error = attempt(model, sink).unwrap_err();
                assert!(matches!(error, Error::InvalidArgument { .. } | Error::LengthMismatch { .. }), "{error}");
                Ok(())
            };
            strategy.backward(&loss, &mut model).unwrap();
        }
        let mut unknown = crate::rows::One(stranger.clone());
        let nothing = |_: &mut crate::rows::One, _: &mut GradSink<'_>| Ok(());
        assert!(strategy.backward(&nothing, &mut unknown).is_err(), "a module that was not set up");
    });
}

#[test]
fn row_backward_reduces_buckets_while_it_goes_on() {
    // A loss that, after the gradient that fills the first bucket, does not go on before that bucket has been reduced.
    struct Waiting;
    impl Backward<Mlp> for Waiting {
        fn backward(&self, model: &mut Mlp, sink: &mut GradSink<'_>) -> Result<()> {
            let progress = sink.buckets();
            assert!(progress.total >= 3, "{progress:?}");
            assert_eq!((progress.launched, progress.reduced), (0, 0));
            sink.write(&model.output.1, &[1.0_f32; 3])?;
            assert_eq!(sink.buckets().launched, 1);
            let start = Instant::now();
            while sink.buckets().reduced == 0 {
                assert!(start.elapsed() < Duration::from_secs(30), "bucket 0 is not reduced before backward ends");
                std::thread::yield_now();
            }
            // The next ones become full in the wrong order; they start in the right one.
            sink.write(&model.hidden.0, &[1.0_f32; 240])?;
            assert_eq!(sink.buckets().launched, 1, "bucket 1 comes first");
            sink.write(&model.output.0, &[1.0_f32; 120])?;
            assert!(sink.buckets().launched >= 2);
            Ok(())
        }
    }
    let timeline = Timeline::new(0, 10_000).unwrap();
    ddp(3, StrategyOptions { timeline: timeline.clone(), ..options() }, |strategy| {
        let mut strategy: Box<dyn Strategy> = Box::new(strategy);
        let mut model = Mlp::set_up(&mut strategy);
        for _ in 0..3 {
            strategy.backward(&Waiting, &mut model).unwrap();
        }
        strategy.synchronize().unwrap();
        let statistics = strategy.statistics();
        assert_eq!(statistics.backwards, 3);
        assert!(statistics.reduced_bytes > 0 && statistics.reduction_ns > 0);
        strategy.teardown(TIMEOUT).unwrap();
    });
    // The timeline shows it: there is a reduction within each backward.
    let mut text = Vec::new();
    timeline.write_json(&mut text).unwrap();
    let trace: serde_json::Value = serde_json::from_slice(&text).unwrap();
    let spans = |name: &str| -> Vec<(f64, f64)> {
        let events = trace["traceEvents"].as_array().unwrap().iter();
        let of_name = events.filter(|event| event["ph"] == "X" && event["name"] == name);
        of_name.map(|event| (event["ts"].as_f64().unwrap(), event["dur"].as_f64().unwrap())).collect()
    };
    let backwards = spans("backward");
    assert_eq!(backwards.len(), 9);
    // A device has a clock of its own, which a virtual one reads late on a busy machine; in us.
    let slack = times(0, 50_000) as f64;
    for (start, length) in backwards {
        let is_within = |at: f64, takes: f64| at + slack >= start && at + takes <= start + length + slack;
        let within = spans("all_reduce").iter().any(|(at, takes)| is_within(*at, *takes));
        assert!(within, "no reduction within the backward at {start}");
    }
}

#[test]
fn ranks_whose_backward_takes_different_turns_agree() {
    // Rank 0 writes front to back, the others back to front; one rank leaves a parameter out.
    ddp(3, options(), |strategy| {
        let mut strategy: Box<dyn Strategy> = Box::new(strategy);
        let mut model = Mlp::set_up(&mut strategy);
        let rank = strategy.rank();
        let loss = |model: &mut Mlp, sink: &mut GradSink<'_>| {
            let mut handles: Vec<Parameter> = Vec::new();
            model.parameters(&mut |parameter| handles.push(parameter.clone()));
            if rank != 0 {
                handles.reverse();
            }
            for parameter in handles.iter().filter(|parameter| rank != 2 || parameter.name() != "idle") {
                sink.write(parameter, &vec![1.0 + rank as f32; parameter.len_elems()])?;
            }
            Ok(())
        };
        strategy.backward(&loss, &mut model).unwrap();
        let all = gradients(&mut strategy, &model);
        assert_eq!(all[..2], [1.0, 1.0], "(1 + 2 + 0) / 3");
        assert!(all[2..].iter().all(|g| *g == 2.0), "(1 + 2 + 3) / 3");
        strategy.teardown(TIMEOUT).unwrap();
    });
}

#[test]
fn row_no_backward_sync_accumulates_one_large_batch() {
    let data = samples(24);
    let expected = reference_gradients(&data);
    everywhere(&options(), |strategy| {
        let mut model = Mlp::set_up(strategy);
        let mut optimizer = strategy.setup_optimizer(&model, Sgd::new(0.1).into()).unwrap();
        let mine = share(strategy, &data);
        let micro: Vec<&[Sample]> = mine.chunks(mine.len() / 4).collect();
        let reduced_before = strategy.statistics().reduced_bytes;
        {
            let _outer = strategy.no_backward_sync(&model, true).unwrap();
            {
                // Nested guards give back what they found; a disabled one changes nothing.
                let _inner = strategy.no_backward_sync(&model, true).unwrap();
                let _off = strategy.no_backward_sync(&model, false).unwrap();
                strategy.backward(&Loss { batch: micro[0], micro_batches: 4.0 }, &mut model).unwrap();
            }
            for batch in &micro[1..3] {
                strategy.backward(&Loss { batch, micro_batches: 4.0 }, &mut model).unwrap();
            }
        }
        strategy.synchronize().unwrap();
        assert_eq!(strategy.statistics().reduced_bytes, reduced_before, "nothing was reduced yet");
        strategy.backward(&Loss { batch: micro[3], micro_batches: 4.0 }, &mut model).unwrap();
        assert_close(&gradients(strategy, &model), &expected, 1e-6);
        strategy.optimizer_step(&mut optimizer).unwrap();
        let text = format!("{:?}", bits(&model.weights()));
        strategy.check_agreement("the weights' bits", &text).unwrap();
    });
}

#[test]
fn no_backward_sync_is_of_one_module_until_its_last_guard_goes() {
    let data = samples(6);
    ddp(2, options(), |strategy| {
        let mut strategy: Box<dyn Strategy> = Box::new(strategy);
        let (mut held_back, mut other) = (Mlp::set_up(&mut strategy), Mlp::set_up(&mut strategy));
        let is_reduced = |strategy: &mut Box<dyn Strategy>, model: &mut Mlp| {
            let seen = std::cell::Cell::new(false);
            let loss = |model: &mut Mlp, sink: &mut GradSink<'_>| {
                seen.set(sink.is_synchronizing());
                Backward::backward(&Loss::of(&data), model, sink)
            };
            strategy.backward(&loss, model).unwrap();
            seen.get()
        };
        let first = strategy.no_backward_sync(&held_back, true).unwrap();
        let second = strategy.no_backward_sync(&held_back, true).unwrap();
        assert!(!is_reduced(&mut strategy, &mut held_back));
        assert!(is_reduced(&mut strategy, &mut other), "the guard is of another module");
        // Not in the order of a stack.
        drop(first);
        assert!(!is_reduced(&mut strategy, &mut held_back), "the second guard lives");
        drop(second);
        assert!(is_reduced(&mut strategy, &mut held_back));
        strategy.teardown(TIMEOUT).unwrap();
    });
}

#[test]
fn row_no_backward_sync_forgotten_is_an_error() {
    let data = samples(6);
    ddp(2, options(), |strategy| {
        let mut strategy: Box<dyn Strategy> = Box::new(strategy);
        let mut model = Mlp::set_up(&mut strategy);
        let mut optimizer = strategy.setup_optimizer(&model, Sgd::new(0.1).into()).unwrap();
        let before = bits(&model.weights());
        let guard = strategy.no_backward_sync(&model, true).unwrap();
        strategy.backward(&Loss::of(&data), &mut model).unwrap();
        drop(guard);
        assert!(matches!(strategy.optimizer_step(&mut optimizer), Err(Error::InvalidArgument { .. })));
        let clip = strategy.clip_gradients_norm(&model, &mut optimizer, 1.0, NormType::L2, Nonfinite::SkipStep);
        assert!(matches!(clip, Err(Error::InvalidArgument { .. })));
        assert_eq!(bits(&model.weights()), before);
        strategy.backward(&Loss::of(&data), &mut model).unwrap();
        strategy.optimizer_step(&mut optimizer).unwrap();
        strategy.teardown(TIMEOUT).unwrap();
    });
}

#[test]
fn row_optimizer_step_needs_gradients_and_unread_weights() {
    let data = samples(6);
    everywhere(&options(), |strategy| {
        let mut model = Mlp::set_up(strategy);
        let mut optimizer = strategy.setup_optimizer(&model, Sgd::new(0.1).into()).unwrap();
        assert!(matches!(strategy.optimizer_step(&mut optimizer), Err(Error::InvalidArgument { .. })));
        strategy.backward(&Loss::of(&data), &mut model).unwrap();
        let reading = model.hidden.0.read().unwrap();
        let error = strategy.optimizer_step(&mut optimizer).unwrap_err();
        assert!(matches!(&error, Error::Borrowed { name, .. } if name == "hidden.weight"), "{error}");
        drop(reading);
        strategy.optimizer_step(&mut optimizer).unwrap();
        assert!(matches!(strategy.optimizer_step(&mut optimizer), Err(Error::InvalidArgument { .. })), "used up");
        assert_eq!((optimizer.steps().unwrap(), optimizer.skipped_steps().unwrap()), (1, 0));
    });
}

#[test]
fn row_optimizer_step_is_that_of_the_specification() {
    let data = samples(6);
    everywhere(&options(), |strategy| {
        let mut model = Mlp::set_up(strategy);
        let rule = AdamW::new(0.01).betas(0.8, 0.9).eps(1e-6).weight_decay(0.1);
        let spec = rule.without_decay(|parameter| parameter.shape().len() < 2);
        let mut optimizer = strategy.setup_optimizer(&model, spec).unwrap();
        let mut weights = model.weights();
        let (mut m, mut v) = (vec![0.0; weights.len()], vec![0.0; weights.len()]);
        let mut is_matrix = Vec::new();
        model.parameters(&mut |p| is_matrix.extend(vec![p.shape().len() == 2; p.len_elems()]));
        for step in 1..=5 {
            strategy.backward(&Loss::of(share(strategy, &data)), &mut model).unwrap();
            let gradient = gradients(strategy, &model);
            if step == 4 {
                optimizer.set_learning_rate(0.005).unwrap();
            }
            strategy.optimizer_step(&mut optimizer).unwrap();
            for i in 0..weights.len() {
                let rule = reference::AdamW {
                    lr: if step >= 4 { 0.005 } else { 0.01 },
                    beta1: 0.8,
                    beta2: 0.9,
                    eps: 1e-6,
                    weight_decay: if is_matrix[i] { 0.1 } else { 0.0 },
                };
                rule.update(step, 1.0, gradient[i], &mut weights[i], &mut m[i], &mut v[i]);
            }
            assert_eq!(bits(&model.weights()), bits(&weights), "step {step}");
        }
    });
}

/// A rule whose arithmetic gives up.
#[derive(Debug)]
struct Panicking;

impl UpdateRule for Panicking {
    fn name(&self) -> &'static str {
        "panicking"
    }
    fn learning_rate(&self) -> f64 {
        0.1
    }
    fn state_names(&self) -> &'static [&'static str] {
        &[]
    }
    fn check(&self, _learning_rate: f64) -> Result<()> {
        Ok(())
    }
    fn update(&self, piece: Piece<'_>) -> Result<()> {
        assert!(piece.gradient.len_elems() != 40, "a bias of 40 elements");
        Ok(())
    }
}

#[test]
fn a_panic_on_the_compute_stream_is_an_error_and_not_a_hang() {
    // On a device there is no kernel of such a rule, which is an error earlier.
    let options = StrategyOptions { accelerator: Accelerator::Host, ..options() };
    let single = SingleDevice::setup_environment(Environment::single(), options).unwrap();
    let mut strategy: Box<dyn Strategy> = Box::new(single);
    let mut model = Mlp::set_up(&mut strategy);
    let mut optimizer = strategy.setup_optimizer(&model, Panicking.into()).unwrap();
    let data = samples(2);
    strategy.backward(&Loss::of(&data), &mut model).unwrap();
    strategy.optimizer_step(&mut optimizer).unwrap();
    let error = model.idle.read().map(|_| ()).unwrap_err();
    assert!(error.to_string().contains("a bias of 40 elements"), "{error}");
    assert!(strategy.backward(&Loss::of(&data), &mut model).is_err());
    assert!(strategy.teardown(TIMEOUT).is_err());
}

#[test]
fn several_optimizers_step_by_turns() {
    let data = samples(6);
    everywhere(&options(), |strategy| {
        let init = strategy.module_init_context(Init::Default);
        let of = |part: &'static str| move |parameter: &Parameter| parameter.name().starts_with(part);
        let optimizers = vec![Sgd::new(0.1).only(of("hidden")), Sgd::new(0.1).only(of("output"))];
        let model = Mlp::new(&init, 5).unwrap();
        let (mut model, mut optimizers) = strategy.setup_module_and_optimizers(model, optimizers).unwrap();
        strategy.backward(&Loss::of(&data), &mut model).unwrap();
        let before = model.weights();
        strategy.optimizer_step(&mut optimizers[1]).unwrap();
        let after = model.weights();
        assert_eq!(before[..2 + 280], after[..2 + 280], "idle and hidden are as they were");
        assert_ne!(before[2 + 280..], after[2 + 280..]);
        strategy.optimizer_step(&mut optimizers[0]).unwrap();
        assert_ne!(before[2..2 + 280], model.weights()[2..2 + 280]);
    });
}

pub fn clip(strategy: &mut Box<dyn Strategy>, model: &Mlp, optimizer: &mut Optimizer, max: f64, p: NormType) -> f64 {
    let handle = strategy.clip_gradients_norm(model, optimizer, max, p, Nonfinite::Propagate).unwrap();
    let norm = handle.get(TIMEOUT).unwrap();
    assert_eq!(handle.poll().unwrap().map(f64::to_bits), Some(norm.to_bits()));
    norm
}

#[test]
fn row_clip_gradients_norm() {
    let data = samples(12);
    everywhere(&options(), |strategy| {
        let mut model = Mlp::set_up(strategy);
        let mut optimizer = strategy.setup_optimizer(&model, Sgd::new(1.0).into()).unwrap();
        for norm_type in [NormType::L1, NormType::L2, NormType::Inf, NormType::P(3.5)] {
            strategy.backward(&Loss::of(share(strategy, &data)), &mut model).unwrap();
            let gradient = gradients(strategy, &model);
            let elements: Vec<f64> = gradient.iter().map(|g| f64::from(*g)).collect();
            let expected = reference::norm(&elements, norm_type);
            let norm = clip(strategy, &model, &mut optimizer, 0.25 * expected, norm_type);
            assert!((norm - expected).abs() <= 1e-6 * expected, "{norm_type:?}: {norm} and {expected}");
            strategy.check_agreement("the norm's bits", &format!("{:x}", norm.to_bits())).unwrap();
            // The step is made with the clipped gradients, exactly.
            let coef = reference::clip_coef(norm, 0.25 * expected);
            assert!(coef < 0.26);
            let before = model.weights();
            strategy.optimizer_step(&mut optimizer).unwrap();
            let wanted: Vec<f32> =
                before.iter().zip(&gradient).map(|(w, g)| (-1.0_f32).mul_add(g * coef, *w)).collect();
            assert_eq!(bits(&model.weights()), bits(&wanted));
        }
        // A norm below the limit changes nothing, and a clip does not outlive its step.
        strategy.backward(&Loss::of(share(strategy, &data)), &mut model).unwrap();
        let gradient = gradients(strategy, &model);
        clip(strategy, &model, &mut optimizer, 1e-3, NormType::L2);
        clip(strategy, &model, &mut optimizer, 1e9, NormType::L2);
        let before = model.weights();
        strategy.optimizer_step(&mut optimizer).unwrap();
        let wanted: Vec<f32> = before.iter().zip(&gradient).map(|(w, g)| (-1.0_f32).mul_add(*g, *w)).collect();
        assert_eq!(bits(&model.weights()), bits(&wanted));

        strategy.backward(&Loss::of(&data), &mut model).unwrap();
        for bad in [-1.0, f64::NAN] {
            let clipped = strategy.clip_gradients_norm(&model, &mut optimizer, bad, NormType::L2, Nonfinite::SkipStep);
            assert!(matches!(clipped, Err(Error::InvalidArgument { .. })));
        }
        let clipped = strategy.clip_gradients_norm(&model, &mut optimizer, 1.0, NormType::P(0.0), Nonfinite::SkipStep);
        assert!(clipped.is_err());
    });
}

#[test]
fn a_clip_before_the_last_backward_is_an_error() {
    let data = samples(6);
    everywhere(&options(), |strategy| {
        let mut model = Mlp::set_up(strategy);
        let mut optimizer = strategy.setup_optimizer(&model, Sgd::new(0.1).into()).unwrap();
        strategy.backward(&Loss::of(&data), &mut model).unwrap();
        clip(strategy, &model, &mut optimizer, 1e-3, NormType::L2);
        strategy.backward(&Loss::of(&data), &mut model).unwrap();
        let before = bits(&model.weights());
        assert!(matches!(strategy.optimizer_step(&mut optimizer), Err(Error::InvalidArgument { .. })));
        assert!(matches!(
            strategy.clip_gradients_value(&model, &mut optimizer, 1.0),
            Err(Error::InvalidArgument { .. })
        ));
        assert_eq!(bits(&model.weights()), before);
        // Clipped again, the step is that of both backwards.
        let gradient = gradients(strategy, &model);
        clip(strategy, &model, &mut optimizer, 1e9, NormType::L2);
        let before = model.weights();
        strategy.optimizer_step(&mut optimizer).unwrap();
        let wanted: Vec<f32> = before.iter().zip(&gradient).map(|(w, g)| (-0.1_f32).mul_add(*g, *w)).collect();
        assert_close(&model.weights(), &wanted, 1e-6);
    });
}

#[test]
fn row_clip_gradients_norm_does_not_depend_on_buckets() {
    let data = samples(12);
    let norms: Vec<f64> = [(64, 512), (1, 1), (1 << 20, 25 << 20)]
        .into_iter()
        .map(|(first_bucket_bytes, bucket_bytes)| {
            let options = StrategyOptions { first_bucket_bytes, bucket_bytes, ..options() };
            let norms = ddp(2, options, |strategy| {
                let mut strategy: Box<dyn Strategy> = Box::new(strategy);
                let mut model = Mlp::set_up(&mut strategy);
                let mut optimizer = strategy.setup_optimizer(&model, Sgd::new(1.0).into()).unwrap();
                strategy.backward(&Loss::of(share(&strategy, &data)), &mut model).unwrap();
                let norm = clip(&mut strategy, &model, &mut optimizer, 1.0, NormType::L2);
                strategy.teardown(TIMEOUT).unwrap();
                norm
            });
            assert_eq!(norms[0].to_bits(), norms[1].to_bits());
            norms[0]
        })
        .collect();
    assert!(norms.iter().all(|norm| norm.to_bits() == norms[0].to_bits()), "{norms:?}");
}

#[test]
fn row_clip_gradients_value() {
    let data = samples(12);
    everywhere(&options(), |strategy| {
        let mut model = Mlp::set_up(strategy);
        let mut optimizer = strategy.setup_optimizer(&model, Sgd::new(1.0).into()).unwrap();
        strategy.backward(&Loss::of(share(strategy, &data)), &mut model).unwrap();
        let gradient = gradients(strategy, &model);
        let limit = 0.5 * gradient.iter().fold(0.0_f32, |max, g| max.max(g.abs()));
        strategy.clip_gradients_value(&model, &mut optimizer, limit).unwrap();
        let clipped: Vec<f32> = gradient.iter().map(|g| g.clamp(-limit, limit)).collect();
        assert_eq!(bits(&gradients(strategy, &model)), bits(&clipped));
        assert_ne!(bits(&gradient), bits(&clipped));
        for bad in [-1.0, f32::NAN] {
            assert!(strategy.clip_gradients_value(&model, &mut optimizer, bad).is_err());
        }
        strategy.optimizer_step(&mut optimizer).unwrap();

        // NaN is kept.
        let nan = |model: &mut Mlp, sink: &mut GradSink<'_>| sink.write(&model.idle, &[f32::NAN, 100.0]);
        strategy.backward(&nan, &mut model).unwrap();
        strategy.clip_gradients_value(&model, &mut optimizer, 1.0).unwrap();
        let gradient = gradients(strategy, &model);
        assert!(gradient[0].is_nan() && gradient[1] == 1.0);
        strategy.optimizer_step(&mut optimizer).unwrap();

        // After clipping by norm, the limit holds for what the step sees: 0.2 and 0.5 of the four.
        let loss = |model: &mut Mlp, sink: &mut GradSink<'_>| sink.write(&model.idle, &[3.0_f32, 4.0]);
        let mut fresh = Mlp::set_up(strategy);
        let mut optimizer = strategy.setup_optimizer(&fresh, Sgd::new(1.0).into()).unwrap();
        strategy.backward(&loss, &mut fresh).unwrap();
        clip(strategy, &fresh, &mut optimizer, 1.0, NormType::L2);
        strategy.clip_gradients_value(&fresh, &mut optimizer, 0.7).unwrap();
        let before = fresh.weights();
        strategy.optimizer_step(&mut optimizer).unwrap();
        let moved: Vec<f32> = before.iter().zip(fresh.weights()).map(|(a, b)| a - b).collect();
        assert_close(&moved[..2], &[0.6, 0.7], 1e-5);
    });
}
