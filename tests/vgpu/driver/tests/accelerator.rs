//! What a strategy says where there is no device to train on, and where there is none any more.

#[allow(dead_code, reason = "a part of it is enough")]
#[path = "../../../strategy/model.rs"]
mod model;
mod support;

use std::time::{Duration, Instant};

use annulus::strategy::{
    Accelerator, Ddp, GradSink, Module, Optimizer, Parameter, Precision, Sgd, SingleDevice, Strategy, StrategyOptions,
};
use annulus::world::{Environment, launch};
use annulus::{Error, Result};
use model::{Loss, Mlp, TIMEOUT, ddp, everywhere, samples};
use support::{Peer, as_peer, listen, on_virtual_gpu, say, without_driver};

/// Set where the precision scales losses.
const SCALES_LOSS: &str = "TEST_SCALES_LOSS";
/// Longer than any rank needs to be told.
const SOON: Duration = Duration::from_secs(10);

fn on(accelerator: Accelerator) -> StrategyOptions {
    let mut options = StrategyOptions { accelerator, ..model::options() };
    // Interpreted kernels keep the cores busy, and the monitors with them from beating.
    options.world.heartbeat_limit = None;
    options
}

/// What `Accelerator::Cuda` gives, alone and on every one of three ranks.
fn refusals(accelerator: Accelerator) -> Vec<Error> {
    let single = SingleDevice::setup_environment(Environment::single(), on(accelerator)).err();
    let ranks = launch::threads(3, |environment| Ddp::setup_environment(environment, on(accelerator)).err()).unwrap();
    ranks.into_iter().chain([single]).map(|refused| refused.expect("there is no device")).collect()
}

/// One step of plain descent on all samples.
fn step(strategy: &mut Box<dyn Strategy>, model: &mut Mlp, optimizer: &mut Optimizer) -> Result<()> {
    let data = samples(12);
    strategy.backward(&Loss::of(&data), model)?;
    strategy.optimizer_step(optimizer)?;
    strategy.synchronize()
}

/// `Accelerator::Auto` trains where `place` says.
fn auto_trains(place: impl Fn(&dyn Strategy) -> String + Sync) {
    everywhere(&on(Accelerator::Auto), |strategy| {
        assert_eq!(strategy.root_device().to_string(), place(&**strategy));
        let mut model = Mlp::set_up(strategy);
        let mut optimizer = strategy.setup_optimizer(&model, Sgd::new(0.05).into()).unwrap();
        let before = model.loss(&samples(12));
        for _ in 0..3 {
            step(strategy, &mut model, &mut optimizer).unwrap();
        }
        assert!(model.loss(&samples(12)) < 0.9 * before);
    });
}

fn on_the_host(_: &dyn Strategy) -> String {
    "host".to_owned()
}

#[test]
fn without_a_driver_cuda_is_refused_and_auto_takes_the_host() {
    without_driver("without_a_driver_cuda_is_refused_and_auto_takes_the_host", || {
        for refused in refusals(Accelerator::Cuda(None)) {
            assert!(matches!(refused, Error::DriverAbsent), "{refused:?}");
        }
        auto_trains(on_the_host);
    });
}

#[test]
fn with_an_old_driver_cuda_is_refused_and_auto_takes_the_host() {
    let variables = [("ANNULUS_VGPU_DRIVER_VERSION", "12010"), ("ANNULUS_VGPU_DEVICES", "3")];
    on_virtual_gpu("with_an_old_driver_cuda_is_refused_and_auto_takes_the_host", &variables, || {
        for refused in refusals(Accelerator::Cuda(None)) {
            assert!(matches!(refused, Error::DriverTooOld { found: 12_010, oldest: 12_020 }), "{refused:?}");
        }
        auto_trains(on_the_host);
    });
}

#[test]
fn without_a_device_cuda_is_refused_and_auto_takes_the_host() {
    on_virtual_gpu(
        "without_a_device_cuda_is_refused_and_auto_takes_the_host",
        &[("ANNULUS_VGPU_DEVICES", "0")],
        || {
            for refused in refusals(Accelerator::Cuda(None)) {
                assert!(matches!(refused, Error::NoDevice), "{refused:?}");
            }
            auto_trains(on_the_host);
        },
    );
}

#[test]
fn auto_takes_devices_where_every_rank_has_one() {
    on_virtual_gpu("auto_takes_devices_where_every_rank_has_one", &[("ANNULUS_VGPU_DEVICES", "2")], || {
        auto_trains(|strategy| match strategy.world_size() {
            3 => "host".to_owned(),
            _ => format!("cuda:{}", strategy.rank()),
        });
    });
}

/// One rank asks for a device that is not there: it is told so, and the others that it has failed.
#[test]
fn a_device_that_one_rank_lacks_is_refused_on_every_rank() {
    let variables = [("ANNULUS_VGPU_DEVICES", "3")];
    on_virtual_gpu("a_device_that_one_rank_lacks_is_refused_on_every_rank", &variables, || {
        launch::threads(3, |environment| {
            let rank = environment.rank;
            let ordinal = if rank == 1 { 7 } else { rank };
            let refused = Ddp::setup_environment(environment, on(Accelerator::Cuda(Some(ordinal)))).err().unwrap();
            match rank {
                1 => assert!(matches!(refused, Error::InvalidArgument { .. }), "{refused:?}"),
                _ => assert!(matches!(refused, Error::RankFailed { rank: 1, .. }), "{refused:?}"),
            }
            assert!(refused.to_string().contains("7 of 3"), "{refused}");
        })
        .unwrap();
    });
}

// ---- a device that is lost between two steps -----------------------------------------------------------------------------

/// A strategy after its first step.
struct Trainer {
    strategy: Box<dyn Strategy>,
    model: Mlp,
    optimizer: Optimizer,
}

impl Trainer {
    fn after_one_step(mut strategy: Box<dyn Strategy>) -> Trainer {
        let model = Mlp::set_up(&mut strategy);
        let optimizer = strategy.setup_optimizer(&model, Sgd::new(0.05).into()).unwrap();
        let mut trainer = Trainer { strategy, model, optimizer };
        trainer.step().unwrap();
        trainer
    }

    /// Reads no weights: what is lost is found by the step.
    fn step(&mut self) -> Result<()> {
        let Trainer { strategy, model, optimizer } = self;
        let mut parameters: Vec<Parameter> = Vec::new();
        model.parameters(&mut |parameter| parameters.push(parameter.clone()));
        let body = &mut |sink: &mut GradSink<'_>| {
            parameters.iter().rev().try_for_each(|parameter| sink.write(parameter, &vec![0.1; parameter.len_elems()]))
        };
        strategy.run_backward(&*model, body)?;
        strategy.optimizer_step(optimizer)?;
        strategy.synchronize()
    }

    /// The next step, which fails soon, as does any other; and the end, which comes soon all the same.
    fn fails(mut self) -> Error {
        let start = Instant::now();
        let error = self.step().unwrap_err();
        assert!(self.step().is_err());
        let torn_down = self.strategy.teardown(TIMEOUT);
        drop((self.model, self.optimizer));
        assert!(torn_down.is_err(), "a job that has failed has not ended well");
        assert!(start.elapsed() < SOON, "{:?}: {error}", start.elapsed());
        error
    }
}

/// Whether it says that `failed` has, in the step or before it began.
fn is_failure_of(failed: u32, error: &Error) -> bool {
    match error {
        Error::Poisoned { cause } => is_failure_of(failed, cause),
        Error::RankFailed { rank, .. } => *rank == failed,
        _ => false,
    }
}

fn lose_all_devices() {
    std::fs::write(std::env::var("ANNULUS_VGPU_LOST").unwrap(), "").unwrap();
}

/// Runs `body` where devices can be lost.
fn where_devices_get_lost(test: &str, variables: &[(&str, &str)], body: impl FnOnce()) {
    let folder = tempfile::tempdir().unwrap();
    let lost = folder.path().join("lost");
    let fixed = [("ANNULUS_VGPU_DEVICES", "2"), ("ANNULUS_VGPU_LOST", lost.to_str().unwrap())];
    on_virtual_gpu(test, &[&fixed, variables].concat(), body);
}

#[test]
fn a_lost_device_is_told_by_the_next_step() {
    where_devices_get_lost("a_lost_device_is_told_by_the_next_step", &[], || {
        let options = on(Accelerator::Cuda(None));
        let strategy = SingleDevice::setup_environment(Environment::single(), options).unwrap();
        let trainer = Trainer::after_one_step(Box::new(strategy));
        lose_all_devices();
        let error = trainer.fails();
        assert!(matches!(error, Error::DeviceLost { device: 0, .. }), "{error:?}");
    });
}

#[test]
fn ranks_that_lose_their_devices_are_told_by_the_next_step() {
    where_devices_get_lost("ranks_that_lose_their_devices_are_told_by_the_next_step", &[], || {
        let errors = ddp(2, on(Accelerator::Cuda(None)), |strategy| {
            let mut trainer = Trainer::after_one_step(Box::new(strategy));
            trainer.strategy.barrier("both have stepped").unwrap();
            lose_all_devices();
            trainer.fails()
        });
        for (rank, error) in (0..).zip(errors) {
            let is_own = matches!(error, Error::DeviceLost { device, .. } if device == rank);
            // Who comes second may find the job failed already.
            assert!(is_own || is_failure_of(1 - rank, &error), "rank {rank}: {error:?}");
        }
    });
}

fn ddp_of_this_process() -> Trainer {
    let mut options = on(Accelerator::Cuda(None));
    if std::env::var_os(SCALES_LOSS).is_some() {
        options.precision = Precision::F16Mixed;
    }
    let strategy = Ddp::setup_environment(Environment::detect().unwrap(), options).unwrap();
    Trainer::after_one_step(Box::new(strategy))
}

/// Rank 1 of 2, whose device gets lost.
#[test]
fn process_that_loses_its_device() {
    as_peer("process_that_loses_its_device", || {
        let trainer = ddp_of_this_process();
        say("stepped");
        assert_eq!(listen(), "lose it");
        lose_all_devices();
        let error = trainer.fails();
        assert!(matches!(error, Error::DeviceLost { device: 1, .. }), "{error:?}");
    });
}

fn is_told_of_a_peers_device(test: &str, more: &[(&str, &str)]) {
    let folder = tempfile::tempdir().unwrap();
    let theirs = folder.path().join("theirs");
    let variables = [
        ("RANK", "0"),
        ("WORLD_SIZE", "2"),
        ("MASTER_ADDR", "localhost"),
        ("MASTER_PORT", "29500"),
        ("TMPDIR", folder.path().to_str().unwrap()),
        ("TEST_THEIRS", theirs.to_str().unwrap()),
    ];
    where_devices_get_lost(test, &[&variables, more].concat(), || {
        let theirs = std::env::var("TEST_THEIRS").unwrap();
        let variables = [("RANK", "1"), ("ANNULUS_VGPU_LOST", theirs.as_str())];
        let mut peer = Peer::start("process_that_loses_its_device", &variables);
        let trainer = ddp_of_this_process();
        assert_eq!(peer.hear(), "stepped");
        peer.tell("lose it");
        let error = trainer.fails();
        assert!(is_failure_of(1, &error) && error.to_string().contains("lost"), "{error:?}");
        peer.finish();
    });
}

#[test]
fn a_process_whose_peer_loses_its_device_is_told_so() {
    is_told_of_a_peers_device("a_process_whose_peer_loses_its_device_is_told_so", &[]);
}

/// Then the first that a backward does is to copy the loss scale, which fails before any gradient has come.
#[test]
fn a_process_whose_peer_loses_its_device_is_told_so_where_losses_are_scaled() {
    let test = "a_process_whose_peer_loses_its_device_is_told_so_where_losses_are_scaled";
    is_told_of_a_peers_device(test, &[(SCALES_LOSS, "1")]);
}
