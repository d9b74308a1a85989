//! What only a strategy on a device has: the bits of the host, gradients that are on the device already, no waiting.

use annulus::device::cuda::{Buffer, Driver, Priority, Stream};
use annulus::strategy::{
    Accelerator, AdamW, BucketProgress, GradSink, GradientSource, Module, Nonfinite, OptimizerSpec, Parameter, Piece,
    Precision, Sgd, StepClip, Strategy, StrategyOptions, UpdateRule,
};
use annulus::{DType, Error, NormType, ReduceOp};

use crate::model::{Loss, Mlp, Sample, TIMEOUT, WORLDS, bits, ddp, everywhere, options, run_in, samples};

fn on(accelerator: Accelerator, precision: Precision) -> StrategyOptions {
    StrategyOptions { accelerator, precision, ..options() }
}

/// A few steps with all that a step has; the norms and, at the end, weights and moments.
fn train(strategy: &mut Box<dyn Strategy>, rule: OptimizerSpec, data: &[Sample]) -> (Vec<u64>, Vec<u32>) {
    let mut model = Mlp::set_up(strategy);
    let mut optimizer = strategy.setup_optimizer(&model, rule).unwrap();
    let mut norms = Vec::new();
    for (step, norm_type) in
        [NormType::L2, NormType::L1, NormType::Inf, NormType::P(3.5), NormType::L2].iter().enumerate()
    {
        let share = data.len() / strategy.world_size() as usize;
        let mine = &data[share * strategy.rank() as usize..][..share];
        let (first, second) = mine.split_at(share / 2);
        let guard = strategy.no_backward_sync(&model, true).unwrap();
        strategy.backward(&Loss { batch: first, micro_batches: 2.0 }, &mut model).unwrap();
        drop(guard);
        strategy.backward(&Loss { batch: second, micro_batches: 2.0 }, &mut model).unwrap();
        if step == 3 {
            strategy.clip_gradients_value(&model, &mut optimizer, 0.01).unwrap();
        }
        let norm = strategy.clip_gradients_norm(&model, &mut optimizer, 0.05, *norm_type, Nonfinite::SkipStep).unwrap();
        optimizer.set_learning_rate(1e-2 / (step + 1) as f64).unwrap();
        strategy.optimizer_step(&mut optimizer).unwrap();
        norms.push(norm.get(TIMEOUT).unwrap().to_bits());
    }
    let mut state = bits(&model.weights());
    for tensor in strategy.get_optimizer_state(&optimizer).unwrap().tensors.values() {
        state.extend(bits(tensor.as_slice().unwrap()));
    }
    for tensor in strategy.get_module_state_dict(&model).unwrap().tensors.values().filter(|t| t.dtype() == DType::F32) {
        state.extend(bits(tensor.as_slice().unwrap()));
    }
    (norms, state)
}

#[test]
fn a_device_gives_the_bits_of_the_host() {
    let data = samples(24);
    for precision in Precision::ALL {
        for (world_size, rules) in [(1, 1), (2, 2), (3, 1)] {
            for rule in 0..rules {
                let run = |accelerator| {
                    ddp(world_size, on(accelerator, precision), |strategy| {
                        let mut strategy: Box<dyn Strategy> = Box::new(strategy);
                        let name = strategy.root_device().to_string();
                        assert_eq!(name == "host", accelerator == Accelerator::Host, "{name}");
                        let rule: OptimizerSpec = match rule {
                            0 => AdamW::new(1e-2).into(),
                            _ => Sgd::new(1e-2).momentum(0.9).nesterov(true).into(),
                        };
                        let result = train(&mut strategy, rule, &data);
                        strategy.teardown(TIMEOUT).unwrap();
                        result
                    })
                };
                let (host, device) = (run(Accelerator::Host), run(Accelerator::Cuda(None)));
                assert_eq!(host, device, "{precision} on {world_size} ranks, rule {rule}");
            }
        }
    }
}

/// All ranks on device 0, by request: they launch together. A step cannot be a graph then, which is said before anything is
/// done.
#[test]
fn ranks_that_share_a_device_give_the_bits_of_the_host() {
    let data = samples(24);
    for world_size in [2, 3] {
        let run = |accelerator| {
            ddp(world_size, on(accelerator, Precision::Bf16Mixed), |strategy| {
                let mut strategy: Box<dyn Strategy> = Box::new(strategy);
                let result = train(&mut strategy, AdamW::new(1e-2).into(), &data);
                if accelerator != Accelerator::Host {
                    let model = Mlp::set_up(&mut strategy);
                    let mut optimizer = strategy.setup_optimizer(&model, AdamW::new(1e-2).into()).unwrap();
                    let clip = StepClip { max_norm: 0.5, norm_type: NormType::L2, nonfinite: Nonfinite::SkipStep };
                    let refused = strategy.capture_step(&model, &mut optimizer, &[], clip).unwrap_err();
                    assert!(matches!(refused, Error::Capture { .. }), "{refused:?}");
                    strategy.barrier("nothing was done").unwrap();
                }
                strategy.teardown(TIMEOUT).unwrap();
                result
            })
        };
        assert_eq!(run(Accelerator::Host), run(Accelerator::Cuda(Some(0))), "{world_size} ranks");
    }
}

#[test]
fn gradients_on_the_device_are_taken_where_they_are() {
    everywhere(&on(Accelerator::Cuda(None), Precision::F32True), |strategy| {
        let model = Mlp::set_up(strategy);
        let mut optimizer = strategy.setup_optimizer(&model, Sgd::new(1.0).into()).unwrap();
        let before = model.weights();
        let device = Driver::open().unwrap().device(strategy.local_rank()).unwrap();
        let mut handles: Vec<Parameter> = Vec::new();
        model.parameters(&mut |parameter| handles.push(parameter.clone()));
        // Two micro-batches of one tensor each and every rank its own numbers: exact in any order.
        let theirs = Stream::new(&device, "the trainer's", Priority::Normal).unwrap();
        let values = |parameter: &Parameter| (0..parameter.len_elems()).map(|i| (i % 7) as f32 - 3.0);
        let scale = 1.0 + strategy.rank() as f32;
        let gradients: Vec<Buffer> = handles
            .iter()
            .map(|parameter| {
                let mut buffer = Buffer::zeroed(&device, DType::F32, parameter.len_elems()).unwrap();
                buffer.write(&values(parameter).map(|x| scale * x).collect::<Vec<_>>(), &theirs).unwrap();
                buffer
            })
            .collect();
        let ready = annulus::device::cuda::Event::new(&device).unwrap();
        theirs.record(&ready).unwrap();
        let body = &mut |sink: &mut GradSink<'_>| {
            handles.iter().zip(&gradients).rev().try_for_each(|(parameter, gradient)| {
                sink.add_device(parameter, &gradient.view(), Some(&ready))?;
                sink.write_device(parameter, &gradient.view(), Some(&ready))
            })
        };
        strategy.run_backward(&model, body).unwrap();
        strategy.optimizer_step(&mut optimizer).unwrap();
        let mean = (1..=strategy.world_size()).sum::<u32>() as f32 / strategy.world_size() as f32;
        let expected: Vec<f32> = handles.iter().flat_map(|p| values(p).collect::<Vec<_>>()).collect();
        for ((after, before), gradient) in model.weights().iter().zip(&before).zip(&expected) {
            assert_eq!(*after, before - 2.0 * mean * gradient);
        }
    });
}

#[test]
fn gradients_that_come_together_are_checked_first_and_launched_by_bucket() {
    let buckets = StrategyOptions {
        first_bucket_bytes: 64,
        bucket_bytes: 256,
        ..on(Accelerator::Cuda(None), Precision::F32True)
    };
    everywhere(&buckets, |strategy| {
        let model = Mlp::set_up(strategy);
        let mut optimizer = strategy.setup_optimizer(&model, Sgd::new(1.0).into()).unwrap();
        let device = Driver::open().unwrap().device(strategy.local_rank()).unwrap();
        let mut sources = Vec::new();
        model.parameters(&mut |parameter| {
            let gradient = Buffer::filled(&device, &vec![1.0f32; parameter.len_elems()]).unwrap().view();
            sources.push(GradientSource { parameter: parameter.clone(), gradient });
        });
        let (before, ranks) = (model.weights(), strategy.world_size());
        strategy
            .run_backward(&model, &mut |sink: &mut GradSink<'_>| {
                let twice = [sources[0].clone(), sources[1].clone(), sources[0].clone()];
                let short = GradientSource { gradient: sources[0].gradient.slice(0, 1)?, ..sources[0].clone() };
                for (refused, word) in
                    [(&twice[..], "second one"), (&[sources[1].clone(), short], "expected 2 elements")]
                {
                    let error = sink.write_device_all(refused, None).unwrap_err().to_string();
                    assert!(error.contains(word), "{error}");
                }
                assert!(sink.buckets().total > 2, "{:?}", sink.buckets());
                sink.write_device_all(&sources, None)?;
                let BucketProgress { total, launched, .. } = sink.buckets();
                assert!(ranks == 1 || launched == total, "{launched} of {total}");
                Ok(())
            })
            .unwrap();
        strategy.optimizer_step(&mut optimizer).unwrap();
        for (after, before) in model.weights().iter().zip(&before) {
            assert_eq!(*after, before - 1.0, "taken once");
        }
    });
}

#[test]
fn a_rule_without_a_kernel_is_refused_at_setup() {
    #[derive(Debug)]
    struct OfMine;
    impl UpdateRule for OfMine {
        fn name(&self) -> &'static str {
            "mine"
        }
        fn learning_rate(&self) -> f64 {
            0.1
        }
        fn state_names(&self) -> &'static [&'static str] {
            &[]
        }
        fn check(&self, _: f64) -> annulus::Result<()> {
            Ok(())
        }
        fn update(&self, _: Piece<'_>) -> annulus::Result<()> {
            Ok(())
        }
    }
    everywhere(&on(Accelerator::Cuda(None), Precision::F32True), |strategy| {
        let model = Mlp::set_up(strategy);
        let error = strategy.setup_optimizer(&model, OfMine.into()).unwrap_err().to_string();
        assert!(error.contains("mine"), "{error}");
    });
}

/// Weights and norms of five steps with gradients in the trainer's memory, one of them not finite.
fn five_steps(strategy: &mut Box<dyn Strategy>, is_captured: bool) -> (Vec<u32>, Vec<u64>) {
    let device = Driver::open().unwrap().device(strategy.local_rank()).unwrap();
    let theirs = Stream::new(&device, "the trainer's", Priority::Normal).unwrap();
    let clip = StepClip { max_norm: 0.5, norm_type: NormType::L2, nonfinite: Nonfinite::SkipStep };
    let rank = strategy.rank() as usize;
    let model = Mlp::set_up(strategy);
    let mut optimizer = strategy.setup_optimizer(&model, AdamW::new(1e-2).into()).unwrap();
    let (mut sources, mut buffers) = (Vec::new(), Vec::new());
    // All but the idle parameter, whose gradient is then zero.
    model.parameters(&mut |parameter| {
        if parameter.name() != "idle" {
            let buffer = Buffer::zeroed(&device, DType::F32, parameter.len_elems()).unwrap();
            sources.push(GradientSource { parameter: parameter.clone(), gradient: buffer.view() });
            buffers.push(buffer);
        }
    });
    let mut step = is_captured.then(|| strategy.capture_step(&model, &mut optimizer, &sources, clip).unwrap());
    let mut norms = Vec::new();
    for number in 0..5_usize {
        for (at, buffer) in buffers.iter_mut().enumerate() {
            let bad = number == 3 && at == 1 && rank == 0;
            let value = |i: usize| if bad { f32::NAN } else { ((i * 7 + at + number + rank) % 11) as f32 };
            buffer.write(&(0..buffer.len_elems()).map(value).collect::<Vec<_>>(), &theirs).unwrap();
        }
        theirs.synchronize(TIMEOUT).unwrap();
        optimizer.set_learning_rate(1e-2 / (1 + number) as f64).unwrap();
        let norm = match &mut step {
            Some(step) => strategy.replay_step(step, &mut optimizer).unwrap(),
            None => {
                let body = &mut |sink: &mut GradSink<'_>| {
                    // Neither how they are handed over nor in which order changes a bit.
                    match number % 3 {
                        0 => sources.iter().rev().try_for_each(|s| sink.write_device(&s.parameter, &s.gradient, None)),
                        1 => sink.write_device_all(&sources, None),
                        _ => sources.chunks(2).rev().try_for_each(|some| sink.write_device_all(some, None)),
                    }
                };
                strategy.run_backward(&model, body).unwrap();
                let StepClip { max_norm, norm_type, nonfinite } = clip;
                let norm = strategy.clip_gradients_norm(&model, &mut optimizer, max_norm, norm_type, nonfinite);
                strategy.optimizer_step(&mut optimizer).unwrap();
                norm.unwrap()
            }
        };
        norms.push(norm.get(TIMEOUT).unwrap().to_bits());
        // Not before the step has read what is written over next.
        strategy.synchronize().unwrap();
    }
    assert_eq!((optimizer.steps().unwrap(), optimizer.skipped_steps().unwrap()), (4, 1));
    // Eager work goes on behind the replays.
    let mut mean = strategy.alloc(&[3], DType::F32).unwrap();
    mean.write(&[rank as f32; 3]).unwrap();
    strategy.all_reduce(&mut mean, None, Some(ReduceOp::Max)).unwrap();
    assert_eq!(mean.to_vec::<f32>().unwrap(), [(strategy.world_size() - 1) as f32; 3]);
    (bits(&model.weights()), norms)
}

#[test]
fn a_captured_step_gives_the_bits_of_an_eager_one() {
    for precision in [Precision::F32True, Precision::F16Mixed] {
        for world in WORLDS {
            let run = |is_captured| {
                run_in(world, &on(Accelerator::Cuda(None), precision), |strategy| five_steps(strategy, is_captured))
            };
            assert_eq!(run(false), run(true), "{precision}, {world:?}");
        }
    }
}
