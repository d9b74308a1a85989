//! Rows of the contract about state dicts and checkpoints.

use std::path::Path;

use annulus::strategy::checkpoint::Checkpoint;
use annulus::strategy::{
    AdamW, DataLoader, Filter, Init, LoaderState, Module, Optimizer, Precision, Rng, Sgd, State, StateMut, Strategy,
    StrategyOptions,
};
use annulus::{DType, Error, NormType};

use crate::model::{Loss, Mlp, Sample, TIMEOUT, WORLDS, bits, ddp, everywhere, options, run_in, samples, times};
use crate::rows::One;

#[test]
fn row_module_state_dict() {
    for precision in Precision::ALL {
        everywhere(&StrategyOptions { precision, ..options() }, |strategy| {
            let model = Mlp::set_up(strategy);
            let dict = strategy.get_module_state_dict(&model).unwrap();
            let names: Vec<_> = dict.tensors.keys().map(String::as_str).collect();
            assert_eq!(names, ["hidden.bias", "hidden.weight", "idle", "output.bias", "output.weight", "seen"]);
            let init = strategy.module_init_context(Init::Default);
            let other = Mlp::new(&init, 77).unwrap();
            assert_ne!(bits(&other.weights()), bits(&model.weights()));
            assert!(strategy.load_module_state_dict(&other, &dict, true).unwrap().is_empty());
            assert_eq!(bits(&other.weights()), bits(&model.weights()));
            assert_eq!(strategy.get_module_state_dict(&other).unwrap(), dict);
        });
    }
}

#[test]
fn row_load_module_state_dict_is_strict() {
    everywhere(&options(), |strategy| {
        let model = Mlp::set_up(strategy);
        let init = strategy.module_init_context(Init::Default);
        let target = Mlp::new(&init, 77).unwrap();
        let before = bits(&target.weights());
        let mut dict = strategy.get_module_state_dict(&model).unwrap();
        let idle = dict.tensors.remove("idle").unwrap();
        dict.tensors.insert("extra".into(), annulus::strategy::Tensor::zeroed(&[1], DType::F32).unwrap());
        let error = strategy.load_module_state_dict(&target, &dict, true).unwrap_err();
        let Error::Keys { missing, unexpected, .. } = &error else { panic!("{error}") };
        assert_eq!((missing.as_slice(), unexpected.as_slice()), (&["idle".to_owned()][..], &["extra".to_owned()][..]));
        assert_eq!(bits(&target.weights()), before);
        // Shape and dtype are never negotiable, and nothing is written before all of them are checked.
        for (shape, dtype) in [(vec![3], DType::F32), (vec![2], DType::F64)] {
            dict.tensors.insert("idle".into(), annulus::strategy::Tensor::zeroed(&shape, dtype).unwrap());
            let error = strategy.load_module_state_dict(&target, &dict, false).unwrap_err();
            assert!(matches!(error, Error::ShapeMismatch { .. } | Error::DTypeMismatch { .. }), "{error}");
            assert!(error.to_string().contains("idle"));
            assert_eq!(bits(&target.weights()), before);
        }
        dict.tensors.remove("idle");
        assert_eq!(strategy.load_module_state_dict(&target, &dict, false).unwrap(), ["idle"]);
        assert_eq!(bits(&target.weights())[2..], bits(&model.weights())[2..]);
        assert_eq!(bits(&target.weights())[..2], before[..2]);
        dict.tensors.insert("idle".into(), idle);
        let reading = target.idle.read().unwrap();
        assert!(matches!(strategy.load_module_state_dict(&target, &dict, false), Err(Error::Borrowed { .. })));
        drop(reading);
    });
}

#[test]
fn row_optimizer_state() {
    let data = samples(6);
    everywhere(&options(), |strategy| {
        let mut model = Mlp::set_up(strategy);
        let mut optimizer = strategy.setup_optimizer(&model, AdamW::new(0.01).into()).unwrap();
        for _ in 0..3 {
            strategy.backward(&Loss::of(&data), &mut model).unwrap();
            strategy.optimizer_step(&mut optimizer).unwrap();
        }
        optimizer.set_learning_rate(0.02).unwrap();
        let dict = strategy.get_optimizer_state(&optimizer).unwrap();
        assert_eq!(dict.tensors.len(), 10);
        assert_eq!(dict.tensors["exp_avg_sq.hidden.weight"].shape(), [40, 6]);
        assert!(dict.tensors["exp_avg.hidden.weight"].as_slice::<f32>().unwrap().iter().any(|m| *m != 0.0));

        let other = Mlp::set_up(strategy);
        let mut fresh = strategy.setup_optimizer(&other, AdamW::new(0.5).into()).unwrap();
        strategy.load_optimizer_state(&mut fresh, &dict).unwrap();
        assert_eq!((fresh.steps().unwrap(), fresh.learning_rate()), (3, 0.02));
        assert_eq!(strategy.get_optimizer_state(&fresh).unwrap(), dict);
        // Another rule's state, or other parameters', is refused.
        let third = Mlp::set_up(strategy);
        let mut sgd = strategy.setup_optimizer(&third, Sgd::new(0.5).momentum(0.9).into()).unwrap();
        assert!(strategy.load_optimizer_state(&mut sgd, &dict).is_err());
        let momentum = strategy.get_optimizer_state(&sgd).unwrap();
        assert_eq!(momentum.tensors.keys().next().unwrap(), "momentum_buffer.hidden.bias");
        assert!(strategy.load_optimizer_state(&mut fresh, &momentum).is_err());
    });
}

/// A path that all ranks agree on, and that is gone afterwards.
fn shared_path(strategy: &mut Box<dyn Strategy>) -> (Option<tempfile::TempDir>, std::path::PathBuf) {
    let folder = strategy.is_global_zero().then(|| tempfile::tempdir().unwrap());
    let path = folder.as_ref().map(|folder| folder.path().join("step.safetensors")).unwrap_or_default();
    (folder, strategy.broadcast_value(path, 0).unwrap())
}

#[test]
fn row_save_and_load_checkpoint() {
    let data = samples(6);
    everywhere(&options(), |strategy| {
        let (folder, path) = shared_path(strategy);
        let mut model = Mlp::set_up(strategy);
        let mut optimizer = strategy.setup_optimizer(&model, AdamW::new(0.01).into()).unwrap();
        strategy.backward(&Loss::of(&data), &mut model).unwrap();
        strategy.optimizer_step(&mut optimizer).unwrap();
        let mut rng = Rng::for_stream(9, u64::from(strategy.rank()));
        rng.next_u64();
        model.seen.write(|seen: &mut [f32]| seen[0] = 11.0).unwrap();
        let state = State::new()
            .module("model", &model)
            .optimizer("optimizer", &optimizer)
            .value("epoch", &7_u64)
            .per_rank("rng", &rng);
        strategy.save_checkpoint(&path, &state, None).unwrap();

        let mut other = Mlp::set_up(strategy);
        let mut fresh = strategy.setup_optimizer(&other, AdamW::new(0.5).into()).unwrap();
        let (mut epoch, mut restored) = (0_u64, Rng::new(0));
        let mut state = StateMut::new()
            .module("model", &other)
            .optimizer("optimizer", &mut fresh)
            .value("epoch", &mut epoch)
            .per_rank("rng", &mut restored);
        let report = strategy.load_checkpoint(&path, Some(&mut state), true).unwrap();
        drop(state);
        assert!(report.remaining.is_empty() && report.missing.is_empty(), "{report:?}");
        assert_eq!((epoch, restored), (7, rng), "every rank its own generator");
        assert_eq!(bits(&other.weights()), bits(&model.weights()));
        assert_eq!(other.seen.read(|seen: &[f32]| seen[0]).unwrap(), 11.0);
        assert_eq!(strategy.get_optimizer_state(&fresh).unwrap(), strategy.get_optimizer_state(&optimizer).unwrap());
        // And goes on alike.
        for (model, optimizer) in [(&mut model, &mut optimizer), (&mut other, &mut fresh)] {
            strategy.backward(&Loss::of(&data), model).unwrap();
            strategy.clip_gradients_norm(model, optimizer, 1.0, NormType::L2, Default::default()).unwrap();
            strategy.optimizer_step(optimizer).unwrap();
        }
        assert_eq!(bits(&other.weights()), bits(&model.weights()));
        strategy.barrier("before the folder is removed").unwrap();
        drop(folder);
    });
}

#[test]
fn row_load_checkpoint_reports_what_remains_and_what_is_missing() {
    everywhere(&options(), |strategy| {
        let (_folder, path) = shared_path(strategy);
        let model = Mlp::set_up(strategy);
        let optimizer = strategy.setup_optimizer(&model, AdamW::new(0.01).into()).unwrap();
        let state = State::new().module("model", &model).optimizer("optimizer", &optimizer).value("epoch", &7_u64);
        strategy.save_checkpoint(&path, &state, None).unwrap();

        // Without a state: everything remains, to be read.
        let report = strategy.load_checkpoint(&path, None, true).unwrap();
        assert_eq!(report.remaining, ["epoch", "model", "optimizer"]);
        assert_eq!(report.checkpoint.value::<u64>("epoch").unwrap(), Some(7));
        assert_eq!(report.checkpoint.tensor("model.idle").unwrap().unwrap().shape(), [2]);

        let mut epoch = 0_u64;
        let mut state = StateMut::new().value("epoch", &mut epoch);
        let report = strategy.load_checkpoint(&path, Some(&mut state), true).unwrap();
        drop(state);
        assert_eq!((epoch, report.remaining.as_slice()), (7, &["model".to_owned(), "optimizer".to_owned()][..]));

        // A key that is not there: an error when strict, before anything is restored; else reported.
        let (mut epoch, mut step) = (0_u64, 5_u64);
        for strict in [true, false] {
            let mut state = StateMut::new().value("epoch", &mut epoch).value("step", &mut step);
            let loaded = strategy.load_checkpoint(&path, Some(&mut state), strict);
            drop(state);
            match strict {
                true => {
                    assert!(matches!(&loaded, Err(Error::Keys { missing, .. }) if missing == &["step"]), "{loaded:?}");
                    assert_eq!(epoch, 0);
                }
                false => assert_eq!((loaded.unwrap().missing, epoch, step), (vec!["step".to_owned()], 7, 5)),
            }
        }

        // Another model, another type.
        let init = strategy.module_init_context(Init::Default);
        let small = One(init.parameter("idle", &[2], |values| values.fill(5.0)).unwrap());
        let mut state = StateMut::new().module("model", &small);
        let error = strategy.load_checkpoint(&path, Some(&mut state), true).unwrap_err();
        assert!(matches!(&error, Error::Keys { unexpected, .. } if unexpected.len() == 5), "{error}");
        let report = strategy.load_checkpoint(&path, Some(&mut state), false).unwrap();
        assert!(report.missing.is_empty());
        let wrong = One(init.parameter("idle", &[3], |_| ()).unwrap());
        let mut state = StateMut::new().module("model", &wrong);
        assert!(matches!(strategy.load_checkpoint(&path, Some(&mut state), false), Err(Error::ShapeMismatch { .. })));
        let mut text = String::new();
        let mut state = StateMut::new().value("epoch", &mut text);
        assert!(matches!(strategy.load_checkpoint(&path, Some(&mut state), true), Err(Error::Checkpoint { .. })));
        strategy.barrier("before the folder is removed").unwrap();
    });
}

#[test]
fn row_save_checkpoint_filters_tensors() {
    everywhere(&options(), |strategy| {
        let (_folder, path) = shared_path(strategy);
        let model = Mlp::set_up(strategy);
        let optimizer = strategy.setup_optimizer(&model, AdamW::new(0.01).into()).unwrap();
        let state = State::new().module("model", &model).optimizer("optimizer", &optimizer).value("epoch", &1);
        let filter = Filter::new()
            .key("model", |name, tensor| name.starts_with("hidden") && tensor.shape.len() == 1)
            .key("optimizer", |_, _| false);
        strategy.save_checkpoint(&path, &state, Some(&filter)).unwrap();
        let report = strategy.load_checkpoint(&path, None, true).unwrap();
        assert_eq!(report.remaining, ["epoch", "model"], "a key of which nothing is kept is absent");
        let kept: Vec<_> = report.checkpoint.tensors("").map(|(name, ..)| name.to_owned()).collect();
        assert_eq!(kept, ["model.hidden.bias"]);
        for unknown in ["modell", "epoch"] {
            let filter = Filter::new().key(unknown, |_, _| true);
            let error = strategy.save_checkpoint(&path, &state, Some(&filter)).unwrap_err();
            assert!(error.to_string().contains(unknown), "{error}");
        }
        for bad in ["", "a.b", "annulus", "quo\"te"] {
            let state = State::new().value(bad, &1);
            assert!(matches!(strategy.save_checkpoint(&path, &state, None), Err(Error::InvalidArgument { .. })));
        }
        let twice = State::new().value("epoch", &1).value("epoch", &2);
        assert!(strategy.save_checkpoint(&path, &twice, None).is_err());
        strategy.barrier("before the folder is removed").unwrap();
    });
}

#[test]
fn a_rank_that_cannot_save_or_load_is_an_error_on_all() {
    ddp(3, options(), |strategy| {
        let mut strategy: Box<dyn Strategy> = Box::new(strategy);
        let (_folder, path) = shared_path(&mut strategy);
        let model = Mlp::set_up(&mut strategy);
        let state = State::new().module("model", &model);
        // Rank 0 writes, and cannot.
        let nowhere = path.join("no/folder");
        let error = strategy.save_checkpoint(&nowhere, &state, None).unwrap_err();
        match strategy.rank() {
            0 => assert!(matches!(error, Error::Io { .. }), "{error}"),
            _ => assert!(matches!(error, Error::RankFailed { rank: 0, .. }), "{error}"),
        }
        strategy.save_checkpoint(&path, &state, None).unwrap();
        // Rank 2 finds another file than the others: nobody changes anything.
        let before = bits(&model.weights());
        let mine = if strategy.rank() == 2 { Path::new("/dev/null") } else { &path };
        let mut target = StateMut::new().module("model", &model);
        let error = strategy.load_checkpoint(mine, Some(&mut target), true).unwrap_err();
        assert_eq!(matches!(error, Error::RankFailed { rank: 2, .. }), strategy.rank() != 2, "{error}");
        assert_eq!(bits(&model.weights()), before);
        // A file that is whole, but not the others'.
        let other = path.with_extension("other");
        let only = State::new().module("model", &model).value("who", &1);
        strategy.save_checkpoint(&other, &only, None).unwrap();
        let mine = if strategy.rank() == 2 { &other } else { &path };
        let error = strategy.load_checkpoint(mine, Some(&mut target), true).unwrap_err();
        assert!(matches!(error, Error::Disagreement { peer: 2, .. }), "{error}");
        strategy.load_checkpoint(&path, Some(&mut target), true).unwrap();
        strategy.barrier("before the folder is removed").unwrap();
        strategy.teardown(TIMEOUT).unwrap();
    });
}

#[test]
fn ranks_that_save_different_keys_are_told_before_the_old_file_goes() {
    ddp(2, options(), |strategy| {
        let mut strategy: Box<dyn Strategy> = Box::new(strategy);
        let (_folder, path) = shared_path(&mut strategy);
        let model = Mlp::set_up(&mut strategy);
        strategy.save_checkpoint(&path, &State::new().module("model", &model).value("epoch", &1), None).unwrap();
        let mut state = State::new().module("model", &model).value("epoch", &2);
        if strategy.rank() == 0 {
            state = state.per_rank("rng", &Rng::new(1));
        }
        let error = strategy.save_checkpoint(&path, &state, None).unwrap_err();
        assert!(matches!(&error, Error::Disagreement { mine, .. } if mine.contains("rng")), "{error}");
        let report = strategy.load_checkpoint(&path, None, true).unwrap();
        assert_eq!(report.checkpoint.value::<u32>("epoch").unwrap(), Some(1));
        strategy.barrier("before the folder is removed").unwrap();
        strategy.teardown(TIMEOUT).unwrap();
    });
}

// ---- resuming ------------------------------------------------------------------------------------------------------

/// A run that can be stopped after any batch and resumed.
struct Run {
    model: Mlp,
    optimizer: Optimizer,
    rng: Rng,
    done: usize,
}

/// Batches of a whole run, and samples that they are drawn from: a few epochs.
fn steps() -> usize {
    times(26, 8)
}

fn len_samples() -> usize {
    times(37, 9)
}

impl Run {
    fn new(strategy: &mut Box<dyn Strategy>) -> Run {
        let model = Mlp::set_up(strategy);
        let optimizer = strategy.setup_optimizer(&model, AdamW::new(5e-3).weight_decay(0.1).into()).unwrap();
        Run { model, optimizer, rng: Rng::for_stream(3, u64::from(strategy.rank())), done: 0 }
    }

    /// Trains until [`steps`] batches are done, or saves and stops after `stop`. Data order, noise and learning rate all depend
    /// on what a checkpoint must hold.
    fn train(&mut self, strategy: &mut Box<dyn Strategy>, from: Option<&Path>, stop: Option<(usize, &Path)>) {
        let data: Vec<Sample> = samples(len_samples());
        let loader = strategy.process_dataloader(DataLoader::new(data, 2).shuffle(true).seed(8)).unwrap();
        if let Some(path) = from {
            let mut loader_state: LoaderState = loader.state();
            let mut state = StateMut::new()
                .module("model", &self.model)
                .optimizer("optimizer", &mut self.optimizer)
                .per_rank("rng", &mut self.rng)
                .value("loader", &mut loader_state)
                .value("done", &mut self.done);
            strategy.load_checkpoint(path, Some(&mut state), true).unwrap();
            drop(state);
            loader.resume(loader_state).unwrap();
        }
        for epoch in loader.state().epoch.. {
            for mut batch in loader.epoch(epoch) {
                batch.iter_mut().for_each(|sample| sample.input[0] += 0.01 * self.rng.normal() as f32);
                strategy.backward(&Loss::of(&batch), &mut self.model).unwrap();
                strategy
                    .clip_gradients_norm(&self.model, &mut self.optimizer, 0.5, NormType::L2, Default::default())
                    .unwrap();
                strategy.optimizer_step(&mut self.optimizer).unwrap();
                let rate = self.optimizer.learning_rate();
                self.optimizer.set_learning_rate(rate * 0.98).unwrap();
                self.done += 1;
                if let Some((after, path)) = stop
                    && self.done == after
                {
                    let state = State::new()
                        .module("model", &self.model)
                        .optimizer("optimizer", &self.optimizer)
                        .per_rank("rng", &self.rng)
                        .value("loader", &loader.state())
                        .value("done", &self.done);
                    strategy.save_checkpoint(path, &state, None).unwrap();
                    return;
                }
                if self.done == steps() {
                    return;
                }
            }
        }
    }
}

#[test]
fn a_resumed_run_repeats_an_uninterrupted_one_bit_for_bit() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run.safetensors");
    for precision in [Precision::F32True, Precision::F16Mixed, Precision::Bf16True] {
        let options = StrategyOptions { precision, stochastic_rounding: true, seed: 5, ..options() };
        for world in WORLDS {
            // Each part of a run is a job of its own.
            let job = |from: Option<&Path>, stop: Option<(usize, &Path)>| {
                run_in(world, &options, |strategy| {
                    let mut run = Run::new(strategy);
                    run.train(strategy, from, stop);
                    let module = strategy.get_module_state_dict(&run.model).unwrap();
                    let optimizer = strategy.get_optimizer_state(&run.optimizer).unwrap();
                    (bits(&run.model.weights()), module, optimizer, run.rng)
                })
            };
            let whole = job(None, None);
            // In the first epoch, at its end (batches of 2), and later.
            let per_epoch = len_samples().div_ceil(world.unwrap_or(1) as usize).div_ceil(2);
            for stop in [3, per_epoch, per_epoch + 1] {
                job(None, Some((stop, &path)));
                let resumed = job(Some(&path), None);
                assert!(resumed == whole, "{precision}, {world:?}, stopped after {stop}");
            }
        }
    }
}

#[test]
fn the_loss_scaler_is_in_the_checkpoint() {
    let scaler = annulus::ops::GradScaler::new(256.0, 2.0, 0.5, 2).unwrap();
    let options = StrategyOptions { precision: Precision::F16Mixed, scaler, ..options() };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("scaled");
    let scale_of = |strategy: &mut Box<dyn Strategy>, model: &mut Mlp| {
        let scale = std::cell::Cell::new(0.0);
        let loss = |_: &mut Mlp, sink: &mut annulus::strategy::GradSink<'_>| {
            scale.set(sink.loss_scale()?);
            Ok(())
        };
        strategy.backward(&loss, model).unwrap();
        scale.get()
    };
    ddp(2, options.clone(), |strategy| {
        let mut strategy: Box<dyn Strategy> = Box::new(strategy);
        let mut model = Mlp::set_up(&mut strategy);
        let mut optimizer = strategy.setup_optimizer(&model, Sgd::new(0.1).into()).unwrap();
        for _ in 0..3 {
            scale_of(&mut strategy, &mut model);
            strategy.optimizer_step(&mut optimizer).unwrap();
        }
        strategy.save_checkpoint(&path, &State::new().module("model", &model), None).unwrap();
        strategy.teardown(TIMEOUT).unwrap();
    });
    let own: serde_json::Value = Checkpoint::open(&path).unwrap().value("annulus").unwrap().unwrap();
    assert_eq!((&own["precision"], &own["world_size"]), (&"F16Mixed".into(), &2.into()));
    ddp(1, options, |strategy| {
        let mut strategy: Box<dyn Strategy> = Box::new(strategy);
        let mut model = Mlp::set_up(&mut strategy);
        let mut optimizer = strategy.setup_optimizer(&model, Sgd::new(0.1).into()).unwrap();
        let mut state = StateMut::new().module("model", &model);
        strategy.load_checkpoint(&path, Some(&mut state), true).unwrap();
        drop(state);
        // 512 after two good steps; the third counts towards the next doubling.
        assert_eq!(scale_of(&mut strategy, &mut model), 512.0);
        strategy.optimizer_step(&mut optimizer).unwrap();
        assert_eq!(scale_of(&mut strategy, &mut model), 1024.0);
    });
}

#[test]
fn a_damaged_checkpoint_changes_nothing() {
    everywhere(&options(), |strategy| {
        let (_folder, path) = shared_path(strategy);
        let model = Mlp::set_up(strategy);
        strategy.save_checkpoint(&path, &State::new().module("model", &model), None).unwrap();
        if strategy.is_global_zero() {
            // The last byte of the data: in the last tensor.
            let mut bytes = std::fs::read(&path).unwrap();
            *bytes.last_mut().unwrap() ^= 1;
            std::fs::write(&path, bytes).unwrap();
        }
        strategy.barrier("damaged").unwrap();
        let init = strategy.module_init_context(Init::Default);
        let target = Mlp::new(&init, 77).unwrap();
        let before = bits(&target.weights());
        let mut state = StateMut::new().module("model", &target);
        let error = strategy.load_checkpoint(&path, Some(&mut state), false).unwrap_err();
        assert!(matches!(&error, Error::Checkpoint { item, .. } if item.starts_with("model.")), "{error}");
        assert_eq!(bits(&target.weights()), before);
        let mut names = Vec::new();
        target.parameters(&mut |parameter| names.push(parameter.name().to_owned()));
        assert_eq!(names.len(), 5);
        strategy.barrier("before the folder is removed").unwrap();
    });
}
