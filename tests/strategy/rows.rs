//! Rows of the contract about environment, data, modules and optimizers.

use std::collections::BTreeMap;
use std::time::Duration;

use annulus::device::{Buffer, Uninit};
use annulus::strategy::{
    AdamW, DataLoader, Ddp, Device, Init, Last, Module, OptimizerSpec, Parameter, Precision, Sgd, SingleDevice,
    Strategy, StrategyOptions, Tensor, ToDevice, UpdateRule, setup,
};
use annulus::world::{Environment, launch};
use annulus::{DType, Error, NormType, Result};
use half::bf16;

use crate::model::{Loss, Mlp, TIMEOUT, bits, ddp, everywhere, options, samples, widened};

#[test]
fn row_constructor_validates_options_once() {
    let with = |change: fn(&mut StrategyOptions)| {
        let mut options = options();
        change(&mut options);
        SingleDevice::setup_environment(Environment::single(), options).map(|_| ())
    };
    assert!(with(|_| ()).is_ok());
    assert!(matches!(with(|o| o.bucket_bytes = 0), Err(Error::InvalidArgument { .. })));
    assert!(matches!(with(|o| o.first_bucket_bytes = 0), Err(Error::InvalidArgument { .. })));
    assert!(matches!(with(|o| o.gradient_dtype = Some(DType::I32)), Err(Error::Unsupported { .. })));
    assert!(matches!(with(|o| o.gradient_dtype = Some(DType::F64)), Err(Error::Unsupported { .. })));
    let beat = |o: &mut StrategyOptions| o.world.heartbeat_limit = Some(Duration::from_millis(1));
    assert!(matches!(with(beat), Err(Error::InvalidArgument { .. })));
}

#[test]
fn row_setup_environment_returns_a_live_strategy() {
    let ranks = ddp(3, options(), |mut strategy| {
        // Ready at once: the first call may be a collective.
        let mut sum = 1_i32;
        strategy.all_reduce(&mut sum, None, Some(annulus::ReduceOp::Sum)).unwrap();
        let rank = strategy.rank();
        strategy.teardown(TIMEOUT).unwrap();
        (rank, sum)
    });
    assert_eq!(ranks, [(0, 3), (1, 3), (2, 3)]);
    let refused = launch::threads(2, |environment| {
        SingleDevice::setup_environment(environment, options()).map(|_| ()).unwrap_err().to_string()
    });
    assert!(refused.unwrap()[0].contains("2 ranks"));
    // The choice by environment.
    assert_eq!(setup(Environment::single(), options()).unwrap().world_size(), 1);
    let sizes = launch::threads(2, |environment| setup(environment, options()).unwrap().world_size()).unwrap();
    assert_eq!(sizes, [2, 2]);
}

#[test]
fn row_setup_environment_refuses_ranks_whose_options_differ() {
    let errors = launch::threads(3, |environment| {
        let options = StrategyOptions { seed: u64::from(environment.rank / 2), ..options() };
        Ddp::setup_environment(environment, options).map(|_| ()).unwrap_err().to_string()
    });
    for error in errors.unwrap() {
        assert!(error.contains("\"seed 0\"") && error.contains("rank 2") && error.contains("\"seed 1\""), "{error}");
    }
}

#[test]
fn row_root_device_and_ranks() {
    everywhere(&options(), |strategy| {
        let device = strategy.root_device().to_string();
        assert!(device == "host" || device == format!("cuda:{}", strategy.local_rank()), "{device}");
        assert!(strategy.rank() < strategy.world_size());
        assert_eq!(strategy.local_rank(), strategy.rank());
        assert_eq!(strategy.node_rank(), 0);
        assert_eq!(strategy.is_global_zero(), strategy.rank() == 0);
        assert_eq!(strategy.precision(), Precision::F32True);
    });
}

#[test]
fn row_process_dataloader_shards_by_rank() {
    everywhere(&options(), |strategy| {
        let data: Vec<u32> = (0..23).collect();
        for (last, per_rank) in [(Last::Pad, 23_usize.div_ceil(strategy.world_size() as usize)), (Last::Drop, 0)] {
            let loader = DataLoader::new(data.clone(), 3).shuffle(true).last(last);
            let loader = strategy.process_dataloader(loader).unwrap();
            let mine: Vec<u32> = loader.epoch(1).flatten().collect();
            match last {
                Last::Pad => assert_eq!(mine.len(), per_rank),
                Last::Drop => assert_eq!(mine.len() % 3, 0),
            }
            // Together the ranks see every sample once, but for the padding and what was dropped.
            let text = serde_json::to_vec(&mine).unwrap();
            let all = strategy.all_gather_bytes(&text).unwrap();
            let mut all: Vec<u32> = all.iter().flat_map(|t| serde_json::from_slice::<Vec<u32>>(t).unwrap()).collect();
            let given = all.len();
            all.sort_unstable();
            all.dedup();
            match last {
                Last::Pad => assert_eq!(all, data),
                Last::Drop => assert_eq!(all.len(), given),
            }
            let other: Vec<u32> = loader.epoch(2).flatten().collect();
            assert_ne!(mine, other, "epochs have orders of their own");
            loader.set_epoch(1);
            assert_eq!(loader.epoch(1).flatten().collect::<Vec<_>>(), mine);
        }
        let stream = strategy.process_dataloader(DataLoader::iterable(|epoch| epoch..epoch + 10, 2)).unwrap();
        let batches = stream.epoch(5).count();
        assert_eq!(batches, 10_usize.div_ceil(strategy.world_size() as usize).div_ceil(2));
        assert!(strategy.process_dataloader(DataLoader::new(data, 0)).is_err());
    });
}

#[test]
fn row_process_dataloader_refuses_ranks_that_differ() {
    let errors = ddp(2, options(), |mut strategy| {
        let data = vec![0_u8; 10 + strategy.rank() as usize];
        strategy.process_dataloader(DataLoader::new(data, 2)).unwrap_err().to_string()
    });
    for error in errors {
        assert!(error.contains("rank 0") && error.contains("rank 1") && error.contains("Some(11)"), "{error}");
    }
}

#[test]
fn row_module_init_context() {
    everywhere(&options(), |strategy| {
        let init = strategy.module_init_context(Init::Default).within("a").within("b");
        let parameter =
            init.parameter("w", &[2, 3], |values| values.copy_from_slice(&[1., 2., 3., 4., 5., 6.])).unwrap();
        assert_eq!((parameter.name(), parameter.shape(), parameter.dtype()), ("a.b.w", &[2, 3][..], DType::F32));
        assert_eq!(widened(&parameter), [1., 2., 3., 4., 5., 6.]);
        let buffer = init.buffer("n", &[], |values| values.fill(7.0)).unwrap();
        assert_eq!(buffer.read(|values: &[f32]| values.to_vec()).unwrap(), [7.0]);
        buffer.write(|values: &mut [f32]| values[0] += 1.0).unwrap();
        assert_eq!(buffer.read(|values: &[f32]| values[0]).unwrap(), 8.0);

        let zeroed = strategy.module_init_context(Init::Zeroed);
        assert_eq!(widened(&zeroed.parameter("z", &[4], |_| panic!("not called")).unwrap()), [0.0; 4]);
        // SAFETY: setup_module and load_module_state_dict below write every value before one is read.
        let token = unsafe { Uninit::assume_overwritten() };
        let uninit = strategy.module_init_context(Init::Uninit(token));
        let raw = uninit.parameter("raw", &[4], |_| panic!("not called")).unwrap();
        let other = strategy.module_init_context(Init::Default).parameter("raw", &[4], |v| v.fill(2.0)).unwrap();
        let dict = strategy.get_module_state_dict(&One(other)).unwrap();
        strategy.load_module_state_dict(&One(raw.clone()), &dict, true).unwrap();
        assert_eq!(widened(&raw), [2.0; 4]);
        assert!(matches!(init.parameter("huge", &[usize::MAX, 2], |_| ()), Err(Error::SizeOverflow { .. })));
    });
}

/// A module of one parameter.
pub struct One(pub Parameter);

impl Module for One {
    fn parameters(&self, visit: &mut dyn FnMut(&Parameter)) {
        visit(&self.0);
    }
}

#[test]
fn row_tensor_init_context_allocates_in_the_arena() {
    everywhere(&options(), |strategy| {
        let tensor = strategy.alloc(&[2, 5], DType::BF16).unwrap();
        assert_eq!((tensor.shape(), tensor.dtype(), tensor.len_elems()), (&[2, 5][..], DType::BF16, 10));
        assert!(tensor.buffer().is_none_or(Buffer::is_registered));
        assert!(matches!(strategy.alloc(&[usize::MAX, 8], DType::F64), Err(Error::SizeOverflow { .. })));
        // More than the arena has.
        assert!(matches!(strategy.alloc(&[1 << 50], DType::U8), Err(Error::NoSpace { .. })));
    });
}

#[test]
fn row_setup_module_makes_ranks_identical() {
    for precision in Precision::ALL {
        everywhere(&StrategyOptions { precision, ..options() }, |strategy| {
            let init = strategy.module_init_context(Init::Default);
            let model = Mlp::new(&init, 100 + u64::from(strategy.rank())).unwrap();
            let before = bits(&model.weights());
            strategy.setup_module(&model).unwrap();
            let after = bits(&model.weights());
            assert_eq!(strategy.rank() == 0, before == after, "rank 0's weights, and they were different");
            let from_first = Mlp::new(&init, 100).unwrap();
            assert_eq!(after, bits(&from_first.weights()));
            let dict = |model: &Mlp, strategy: &mut Box<dyn Strategy>| strategy.get_module_state_dict(model).unwrap();
            assert_eq!(dict(&model, strategy), dict(&from_first, strategy), "master weights and buffers, too");
        });
    }
}

#[test]
fn row_setup_module_twice_is_an_error() {
    everywhere(&options(), |strategy| {
        let model = Mlp::set_up(strategy);
        assert!(matches!(strategy.setup_module(&model), Err(Error::AlreadySetUp { .. })));
        // Not one whose parameter is part of another module, either; and a failed setup changes nothing.
        let init = strategy.module_init_context(Init::Default);
        let fresh = One(init.parameter("fresh", &[1], |_| ()).unwrap());
        let mixed = vec![One(fresh.0.clone()), One(model.idle.clone())];
        assert!(matches!(strategy.setup_module(&mixed), Err(Error::AlreadySetUp { .. })));
        strategy.setup_module(&fresh).unwrap();
        let twins = || One(init.parameter("same", &[1], |_| ()).unwrap());
        assert!(matches!(strategy.setup_module(&vec![twins(), twins()]), Err(Error::InvalidArgument { .. })));
        assert!(matches!(strategy.setup_module(&Vec::<One>::new()), Err(Error::InvalidArgument { .. })));
        let mut stranger = SingleDevice::setup_environment(Environment::single(), options()).unwrap();
        let foreign = One(stranger.module_init_context(Init::Default).parameter("w", &[1], |_| ()).unwrap());
        assert!(matches!(strategy.setup_module(&foreign), Err(Error::InvalidArgument { .. })));
    });
}

#[test]
fn row_setup_module_refuses_ranks_that_differ() {
    let errors = ddp(3, options(), |mut strategy| {
        let shape = [4 + usize::from(strategy.rank() == 2)];
        let init = strategy.module_init_context(Init::Default);
        let model =
            vec![One(init.parameter("a", &[1], |_| ()).unwrap()), One(init.parameter("b", &shape, |_| ()).unwrap())];
        strategy.setup_module(&model).unwrap_err().to_string()
    });
    for error in errors {
        assert!(error.contains("parameter b f32 [4]") && error.contains("rank 2") && error.contains("[5]"), "{error}");
    }
}

#[test]
fn row_setup_optimizer_binds_parameters_once() {
    everywhere(&options(), |strategy| {
        let init = strategy.module_init_context(Init::Default);
        let model = Mlp::new(&init, 1).unwrap();
        assert!(strategy.setup_optimizer(&model, Sgd::new(0.1).into()).is_err(), "the module comes first");
        strategy.setup_module(&model).unwrap();
        let bias = |parameter: &Parameter| parameter.name().ends_with("bias");
        let optimizer = strategy.setup_optimizer(&model, AdamW::new(0.1).only(bias)).unwrap();
        let names: Vec<_> = optimizer.parameters().map(Parameter::name).collect();
        assert_eq!(names, ["hidden.bias", "output.bias"]);
        assert!(matches!(strategy.setup_optimizer(&model, Sgd::new(0.1).into()), Err(Error::AlreadySetUp { .. })));
        let rest = strategy.setup_optimizer(&model, Sgd::new(0.1).only(move |p| !bias(p))).unwrap();
        assert_eq!((rest.rule_name(), rest.parameters().count()), ("sgd", 3));
        assert!(strategy.setup_optimizer(&model, Sgd::new(0.1).only(|_| false)).is_err());
        for bad in [f64::NAN, -1.0, f64::INFINITY] {
            let model = Mlp::set_up(strategy);
            assert!(matches!(
                strategy.setup_optimizer(&model, AdamW::new(bad).into()),
                Err(Error::InvalidArgument { .. })
            ));
            // The failure left the parameters free.
            let mut optimizer = strategy.setup_optimizer(&model, AdamW::new(0.1).into()).unwrap();
            assert!(optimizer.set_learning_rate(bad).is_err());
            assert_eq!(optimizer.learning_rate(), 0.1);
        }
    });
}

#[test]
fn row_setup_optimizer_refuses_ranks_that_differ() {
    let optimizers: [fn(u32) -> OptimizerSpec; 11] = [
        |rank| AdamW::new(0.1 + f64::from(rank)).into(),
        |rank| AdamW::new(0.1).betas(0.9 - 0.1 * f64::from(rank), 0.999).into(),
        |rank| AdamW::new(0.1).betas(0.9, 0.999 - 0.1 * f64::from(rank)).into(),
        |rank| AdamW::new(0.1).eps(1e-8 + 1e-9 * f64::from(rank)).into(),
        |rank| AdamW::new(0.1).weight_decay(0.1 * f64::from(rank)).into(),
        |rank| Sgd::new(0.1).momentum(0.5 + 0.1 * f64::from(rank)).into(),
        |rank| Sgd::new(0.1).momentum(0.5).nesterov(rank == 1).into(),
        |rank| Sgd::new(0.1).weight_decay(0.1 * f64::from(rank)).into(),
        |rank| if rank == 0 { Sgd::new(0.1).into() } else { AdamW::new(0.1).into() },
        |rank| AdamW::new(0.1).without_decay(move |parameter| rank == 1 && parameter.name() == "idle"),
        |rank| AdamW::new(0.1).only(move |parameter| rank == 0 || parameter.name() != "idle"),
    ];
    for optimizer in optimizers {
        let errors = ddp(2, options(), |strategy| {
            let mut strategy: Box<dyn Strategy> = Box::new(strategy);
            let model = Mlp::set_up(&mut strategy);
            let error = strategy.setup_optimizer(&model, optimizer(strategy.rank())).unwrap_err();
            // The failure left the parameters free.
            strategy.setup_optimizer(&model, optimizer(0)).unwrap();
            error
        });
        assert!(errors.iter().all(|error| matches!(error, Error::Disagreement { .. })), "{errors:?}");
    }
}

#[test]
fn row_setup_module_and_optimizers_keeps_the_order() {
    everywhere(&options(), |strategy| {
        let init = strategy.module_init_context(Init::Default);
        let of = |part: &'static str| move |parameter: &Parameter| parameter.name().starts_with(part);
        let optimizers =
            (AdamW::new(0.1).only(of("hidden")), Sgd::new(0.2).only(of("output")), Sgd::new(0.3).only(of("idle")));
        let (_, (a, b, c)) = strategy.setup_module_and_optimizers(Mlp::new(&init, 1).unwrap(), optimizers).unwrap();
        assert_eq!([a, b, c].map(|o| (o.rule_name(), o.learning_rate())), [("adamw", 0.1), ("sgd", 0.2), ("sgd", 0.3)]);
        let (_, one) = strategy.setup_module_and_optimizers(Mlp::new(&init, 1).unwrap(), AdamW::new(0.1)).unwrap();
        assert_eq!(one.parameters().count(), 5);
        let list = vec![Sgd::new(0.1).only(of("hidden")), Sgd::new(0.2).only(of("output"))];
        let (_, list) = strategy.setup_module_and_optimizers(Mlp::new(&init, 1).unwrap(), list).unwrap();
        assert_eq!(list.len(), 2);
        let (_, ()) = strategy.setup_module_and_optimizers(Mlp::new(&init, 1).unwrap(), ()).unwrap();
    });
}

/// A batch of a type of the trainer's own.
struct Pairs {
    inputs: Tensor,
    targets: Vec<Tensor>,
    weight: f32,
}

impl ToDevice for Pairs {
    fn to_device(self, device: &Device) -> Result<Self> {
        let (inputs, targets) = (self.inputs.to_device(device)?, self.targets.to_device(device)?);
        Ok(Pairs { inputs, targets, weight: self.weight })
    }
}

#[test]
fn row_module_and_batch_to_device() {
    everywhere(&options(), |strategy| {
        let model = Mlp::set_up(strategy);
        let before = bits(&model.weights());
        strategy.module_to_device(&model).unwrap();
        assert_eq!(bits(&model.weights()), before);
        let on_host = |x: f32| Tensor::from_slice(&[3, 1], &[x, -x, f32::INFINITY]).unwrap();
        let mut there = strategy.alloc(&[3, 1], DType::F32).unwrap();
        there.write(&[5.0, -5.0, f32::INFINITY]).unwrap();
        let empty = Tensor::zeroed(&[0, 4], DType::I64).unwrap();
        let half = Tensor::from_slice(&[2], &[bf16::ONE, bf16::NEG_ONE]).unwrap();
        let batch = (
            vec![Some(on_host(1.0)), None, Some(there)],
            BTreeMap::from([("empty", empty), ("half", half)]),
            Pairs { inputs: on_host(2.0), targets: vec![on_host(3.0), on_host(4.0)], weight: 0.5 },
            "name",
        );
        let (list, map, pairs, name) = strategy.batch_to_device(batch).unwrap();
        // What came back is where the strategy computes, and says what it said.
        let is_on_host = strategy.root_device().to_string() == "host";
        let holds = |tensor: &Tensor, x: f32| {
            assert_eq!((tensor.shape(), tensor.buffer().is_some()), (&[3, 1][..], is_on_host));
            assert_eq!(tensor.to_vec::<f32>().unwrap(), [x, -x, f32::INFINITY]);
        };
        assert!(list.len() == 3 && list[1].is_none());
        holds(list[0].as_ref().unwrap(), 1.0);
        holds(list[2].as_ref().unwrap(), 5.0);
        holds(&pairs.inputs, 2.0);
        assert_eq!(pairs.targets.len(), 2);
        holds(&pairs.targets[0], 3.0);
        holds(&pairs.targets[1], 4.0);
        assert_eq!((map.len(), map["empty"].shape(), map["empty"].dtype()), (2, &[0, 4][..], DType::I64));
        assert_eq!(map["half"].to_vec::<bf16>().unwrap(), [bf16::ONE, bf16::NEG_ONE]);
        assert_eq!(map["half"].buffer().is_some(), is_on_host);
        assert_eq!((pairs.weight, name), (0.5, "name"));
    });
}

#[test]
fn row_teardown_reports_and_drop_does_not_block() {
    everywhere(&options(), |strategy| {
        let mut model = Mlp::set_up(strategy);
        let data = samples(4);
        strategy.backward(&Loss::of(&data), &mut model).unwrap();
        // Reductions are in flight; `everywhere` tears down.
    });
    // A rank that does not come is named.
    let errors = ddp(2, options(), |strategy| match strategy.rank() {
        0 => Some(strategy.teardown(Duration::from_millis(300)).unwrap_err()),
        _ => {
            std::thread::sleep(Duration::from_secs(2));
            None
        }
    });
    assert!(matches!(&errors[0], Some(Error::BarrierTimeout { absent, .. }) if absent == &[1]), "{errors:?}");
    // And a strategy that is dropped keeps nobody.
    let start = std::time::Instant::now();
    ddp(2, options(), |mut strategy: Ddp| {
        let init = strategy.module_init_context(Init::Default);
        let (mut model, _) = strategy.setup_module_and_optimizers(Mlp::new(&init, 1).unwrap(), Sgd::new(0.1)).unwrap();
        if strategy.rank() == 0 {
            // Its reductions wait for a rank that never comes.
            let data = samples(4);
            let backward = strategy.backward(&Loss::of(&data), &mut model);
            // The other rank may have left before the last of them was issued.
            assert!(backward.as_ref().err().is_none_or(is_rank_1_lost), "{backward:?}");
        }
    });
    assert!(start.elapsed() < Duration::from_secs(20));
}

/// Told by the call that found it, or by a later one.
fn is_rank_1_lost(error: &Error) -> bool {
    match error {
        Error::PeerLost { rank: 1, .. } => true,
        Error::Poisoned { cause } => matches!(**cause, Error::PeerLost { rank: 1, .. }),
        _ => false,
    }
}

#[test]
fn a_lost_rank_is_an_error_and_every_later_call_fails() {
    let outcomes = ddp(2, options(), |strategy| {
        let mut strategy: Box<dyn Strategy> = Box::new(strategy);
        let model = Mlp::set_up(&mut strategy);
        let mut optimizer = strategy.setup_optimizer(&model, Sgd::new(0.1).into()).unwrap();
        let mut model = model;
        if strategy.rank() == 1 {
            return None; // leaves
        }
        let data = samples(4);
        let step = |strategy: &mut Box<dyn Strategy>, model: &mut Mlp, optimizer: &mut _| {
            strategy.backward(&Loss::of(&data), model)?;
            strategy.clip_gradients_norm(model, optimizer, 1.0, NormType::L2, Default::default())?.get(TIMEOUT)?;
            strategy.optimizer_step(optimizer)?;
            strategy.synchronize()
        };
        let first = step(&mut strategy, &mut model, &mut optimizer).unwrap_err();
        let start = std::time::Instant::now();
        let later = [
            strategy.backward(&Loss::of(&data), &mut model).unwrap_err(),
            strategy.optimizer_step(&mut optimizer).unwrap_err(),
            strategy.all_reduce(&mut 1.0_f32, None, None).unwrap_err(),
            strategy.barrier("after").unwrap_err(),
            strategy.get_module_state_dict(&model).map(|_| ()).unwrap_err(),
            model.idle.read().map(|_| ()).unwrap_err(),
        ];
        Some((first, later, start.elapsed()))
    });
    let (first, later, time) = outcomes[0].as_ref().unwrap();
    assert!(is_rank_1_lost(first), "{first}");
    assert!(later.iter().all(is_rank_1_lost), "{later:?}");
    assert!(*time < Duration::from_secs(1));
}

#[test]
fn a_failed_backward_stops_every_rank() {
    let errors = ddp(2, options(), |strategy| {
        let mut strategy: Box<dyn Strategy> = Box::new(strategy);
        let mut model = Mlp::set_up(&mut strategy);
        let data = samples(4);
        let rank = strategy.rank();
        let failing = |model: &mut Mlp, gradients: &mut annulus::strategy::GradSink<'_>| match rank {
            1 => Err(Error::Backward { reason: "out of ideas".into() }),
            _ => annulus::strategy::Backward::backward(&Loss::of(&data), model, gradients),
        };
        strategy.backward(&failing, &mut model).and_then(|()| strategy.synchronize()).and_then(|()| {
            let mut gradient = [0.0; 2];
            strategy.read_gradient(&model.idle, &mut gradient)
        })
    });
    assert!(matches!(errors[1], Err(Error::Backward { .. })), "{errors:?}");
    let told = errors[0].as_ref().unwrap_err().to_string();
    assert!(told.contains("rank 1") && told.contains("out of ideas"), "{told}");
}
