//! Operations by steps: between processes that share a device, and, by request, between devices; and what each rank is told
//! when something goes wrong.

#[allow(dead_code, reason = "a part of it is enough")]
#[path = "../../../strategy/model.rs"]
mod model;
#[path = "support/operations.rs"]
mod operations;
#[path = "support/ranks.rs"]
mod ranks;
mod support;
#[path = "../../../together/mod.rs"]
mod together;
#[path = "support/trouble.rs"]
mod trouble;

use std::time::{Duration, Instant};

use annulus::collective::cuda::{Communicator, Options, Transport, Way};
use annulus::device::cuda::{Driver, Priority, Stream};
use annulus::schedule::{Algorithm, Collective};
use annulus::strategy::{Accelerator, AdamW, Ddp, Nonfinite, Strategy, StrategyOptions};
use annulus::world::{Environment, launch};
use annulus::{Error, NormType, ReduceOp};
use half::bf16;
use model::{Loss, Mlp, TIMEOUT, bits, ddp, samples};
use operations::{every_operation, reduced};
use ranks::{PATIENCE, Rank, inputs};
use support::{Peer, as_peer, listen, on_virtual_gpu, say};
use together::Together;
use trouble::{a_mismatch_changes_nothing, fails_as_it_runs, is_no_part_of_a_graph, is_poisoned_and_usable};

const TWO: &[(&str, &str)] = &[("ANNULUS_VGPU_DEVICES", "2")];
const THREE: &[(&str, &str)] = &[("ANNULUS_VGPU_DEVICES", "3")];
const ALGORITHMS: [Algorithm; 2] = [Algorithm::Direct, Algorithm::Ring];

fn stepped(algorithm: Algorithm) -> Options {
    Options { algorithm: Some(algorithm), way: Some(Way::Stepped), ..Options::default() }
}

// ---- bits --------------------------------------------------------------------------------------------------------------

#[test]
fn steps_on_three_devices_give_the_bits_of_the_reference() {
    on_virtual_gpu("steps_on_three_devices_give_the_bits_of_the_reference", THREE, || {
        launch::threads(3, |environment| {
            let rank = Rank::join(environment);
            for algorithm in ALGORITHMS {
                let mut communicator = rank.communicator(stepped(algorithm));
                assert_eq!(communicator.way(), Way::Stepped);
                every_operation::<f32>(&rank, &mut communicator, algorithm, 35);
                every_operation::<bf16>(&rank, &mut communicator, algorithm, 35);
                every_operation::<i64>(&rank, &mut communicator, algorithm, 7);
            }
        })
        .unwrap();
    });
}

/// No kernel waits for another one: they may run one after another. Kernels that wait come to their deadline then.
#[test]
fn steps_need_no_two_kernels_at_a_time() {
    let variables = [TWO[0], ("ANNULUS_VGPU_PEERS", "none"), ("ANNULUS_VGPU_ONE_AT_A_TIME", "true")];
    on_virtual_gpu("steps_need_no_two_kernels_at_a_time", &variables, || {
        launch::threads(2, |environment| {
            let rank = Rank::join(environment);
            for algorithm in ALGORITHMS {
                let mut communicator = rank.communicator(stepped(algorithm));
                every_operation::<f32>(&rank, &mut communicator, algorithm, 35);
            }
        })
        .unwrap();
        let seen = Together::new(2);
        launch::threads(2, |environment| {
            let rank = Rank::join(environment);
            let options = Options { timeout: Some(Duration::from_millis(200)), ..Options::default() };
            let mut communicator = rank.communicator(options);
            let buffer = rank.framed(&[1.0f32; 100], 0);
            let issued = communicator.all_reduce(&buffer.view, ReduceOp::Sum, &rank.stream);
            let outcome = issued.and_then(|()| communicator.synchronize(PATIENCE));
            seen.wait();
            assert!(matches!(outcome, Err(Error::PeerStalled { .. })), "{outcome:?}");
        })
        .unwrap();
    });
}

/// One rank alone has nobody to wait for, and runs as ever.
#[test]
fn one_rank_has_no_steps() {
    on_virtual_gpu("one_rank_has_no_steps", TWO, || {
        launch::threads(1, |environment| {
            let rank = Rank::join(environment);
            let mut communicator = rank.communicator(stepped(Algorithm::Direct));
            assert_eq!(communicator.way(), Way::Persistent);
            every_operation::<f32>(&rank, &mut communicator, Algorithm::Direct, 35);
        })
        .unwrap();
    });
}

/// Several channels, of which short vectors leave some out, and several rounds; on two streams in one order; with slots in
/// device memory and in memory of the host.
#[test]
fn long_vectors_take_several_channels_and_rounds() {
    for peers in ["all", "none"] {
        let variables = [TWO[0], ("ANNULUS_VGPU_PEERS", peers)];
        on_virtual_gpu("long_vectors_take_several_channels_and_rounds", &variables, || {
            let is_near = std::env::var("ANNULUS_VGPU_PEERS").unwrap() == "all";
            launch::threads(2, |environment| {
                let rank = Rank::join(environment);
                let second = Stream::new(rank.kernels.device(), "second", Priority::Normal).unwrap();
                for algorithm in ALGORITHMS {
                    let mut communicator = rank.communicator(stepped(algorithm));
                    let by_device = communicator.transport(1 - rank.world.rank()) == Some(Transport::Device);
                    assert_eq!(by_device, is_near);
                    for len_elems in [0, 1, 100_003, 5, 70_001] {
                        let terms = inputs::<f32>(2, len_elems);
                        let buffer = rank.framed(&terms[rank.number()], 0);
                        let stream = if len_elems % 2 == 0 { &rank.stream } else { &second };
                        stream.synchronize(PATIENCE).and_then(|()| rank.stream.synchronize(PATIENCE)).unwrap();
                        communicator.all_reduce(&buffer.view, ReduceOp::Sum, stream).unwrap();
                        communicator.synchronize(PATIENCE).unwrap();
                        let expected = reduced(&terms, ReduceOp::Sum, algorithm, Collective::AllReduce);
                        buffer.check(&rank, &expected, &format!("{len_elems} elements by {algorithm:?}"));
                    }
                }
            })
            .unwrap();
        });
    }
}

// ---- what goes wrong ---------------------------------------------------------------------------------------------------

/// The second operation: the first one's waits are over. Another one is enqueued behind it.
#[test]
fn a_rank_that_stalls_is_named_and_all_streams_come_to_their_end() {
    on_virtual_gpu("a_rank_that_stalls_is_named_and_all_streams_come_to_their_end", THREE, || {
        let seen = Together::new(3);
        launch::threads(3, |environment| {
            let rank = Rank::join(environment);
            let options = Options { timeout: Some(Duration::from_millis(700)), ..stepped(Algorithm::Ring) };
            let mut communicator = rank.communicator(options);
            communicator.barrier(&rank.stream).unwrap();
            communicator.synchronize(PATIENCE).unwrap();
            let buffer = rank.framed(&[1.0f32; 100], 0);
            if rank.number() != 1 {
                communicator.all_reduce(&buffer.view, ReduceOp::Sum, &rank.stream).unwrap();
                communicator.barrier(&rank.stream).unwrap();
                let error = communicator.synchronize(PATIENCE).unwrap_err();
                assert!(matches!(error, Error::PeerStalled { rank: 1, sequence: 2, .. }), "{error:?}");
                let text = error.to_string();
                assert!(text.contains("all_reduce(100 x f32, sum, ring)") && text.contains("arriving"), "{error}");
                buffer.check(&rank, &[1.0f32; 100], "a buffer whose operation failed");
            }
            seen.wait();
            is_poisoned_and_usable(&rank, &mut communicator);
        })
        .unwrap();
    });
}

#[test]
fn a_mismatch_is_told_on_every_rank_and_changes_nothing() {
    on_virtual_gpu("a_mismatch_is_told_on_every_rank_and_changes_nothing", THREE, || {
        for algorithm in ALGORITHMS {
            let quoted = ["all_reduce(100 x f32, sum", "all_reduce(200 x f32, sum"];
            a_mismatch_changes_nothing(Rank::join, &stepped(algorithm), fails_as_it_runs, quoted);
        }
    });
}

/// On every rank alike, and the job goes on.
#[test]
fn steps_are_refused_where_streams_cannot_wait_for_memory() {
    let variables = [TWO[0], ("ANNULUS_VGPU_MEMORY_OPERATIONS", "none")];
    on_virtual_gpu("steps_are_refused_where_streams_cannot_wait_for_memory", &variables, || {
        launch::threads(2, |environment| {
            let rank = Rank::join(environment);
            let refused = Communicator::new(&rank.world, &rank.kernels, stepped(Algorithm::Direct)).unwrap_err();
            assert!(matches!(refused, Error::InvalidArgument { argument: "way", .. }), "{refused:?}");
            let first = Driver::open().unwrap().device(0).unwrap().uuid().to_string();
            let told = refused.to_string();
            assert!(told.contains(&first) && told.contains("CAN_USE_64_BIT_STREAM_MEM_OPS is 0"), "{told}");
            let mut communicator = rank.communicator(Options::default());
            every_operation::<f32>(&rank, &mut communicator, Algorithm::Direct, 7);
        })
        .unwrap();
    });
}

#[test]
fn steps_are_no_part_of_a_graph() {
    on_virtual_gpu("steps_are_no_part_of_a_graph", TWO, || {
        launch::threads(2, |environment| {
            let rank = Rank::join(environment);
            is_no_part_of_a_graph(&rank, &mut rank.communicator(stepped(Algorithm::Direct)));
        })
        .unwrap();
    });
}

// ---- processes ---------------------------------------------------------------------------------------------------------

fn every_algorithm(rank: &Rank) {
    for algorithm in ALGORITHMS {
        let mut communicator = rank.communicator(Options { algorithm: Some(algorithm), ..Options::default() });
        assert_eq!(communicator.way(), Way::Stepped);
        assert_eq!(communicator.transport(1 - rank.world.rank()), Some(Transport::Device));
        every_operation::<f32>(rank, &mut communicator, algorithm, 67);
        every_operation::<bf16>(rank, &mut communicator, algorithm, 67);
    }
}

/// Rank 1 of 2, on the same device.
#[test]
fn second_process() {
    as_peer("second_process", || {
        let rank = Rank::on(0, Environment::detect().unwrap());
        every_algorithm(&rank);
        let mut communicator = rank.communicator(Options::default());
        say("done");
        if listen() == "differ" {
            let buffer = rank.framed(&[2.0f32; 100], 0);
            let issued = communicator.all_reduce(&buffer.view, ReduceOp::Max, &rank.stream);
            let error = issued.and_then(|()| communicator.synchronize(PATIENCE)).unwrap_err();
            assert!(matches!(error, Error::Mismatch { rank: 1, peer: 0, .. }), "{error:?}");
            buffer.check(&rank, &[2.0f32; 100], "a buffer of a mismatched call");
        }
    });
}

fn between_processes(test: &str, body: impl FnOnce(Rank, Peer)) {
    beside(test, "second_process", |peer| body(Rank::on(0, Environment::detect().unwrap()), peer));
}

/// Runs `body` as rank 0 of 2 on one device, and the test `role` as the other.
fn beside(test: &str, role: &str, body: impl FnOnce(Peer)) {
    let folder = tempfile::tempdir().unwrap();
    let variables = [
        ("ANNULUS_VGPU_DEVICES", "1"),
        ("RANK", "0"),
        ("WORLD_SIZE", "2"),
        ("MASTER_ADDR", "localhost"),
        ("MASTER_PORT", "29500"),
        ("TMPDIR", folder.path().to_str().unwrap()),
    ];
    on_virtual_gpu(test, &variables, || {
        body(Peer::start(role, &[("RANK", "1")]));
    });
}

#[test]
fn processes_on_one_device_give_the_bits_of_the_reference() {
    between_processes("processes_on_one_device_give_the_bits_of_the_reference", |rank, mut peer| {
        every_algorithm(&rank);
        let communicator = rank.communicator(Options::default());
        assert_eq!(peer.hear(), "done");
        peer.tell("leave");
        drop(communicator);
        peer.finish();
    });
}

#[test]
fn processes_that_differ_are_told_so() {
    between_processes("processes_that_differ_are_told_so", |rank, mut peer| {
        every_algorithm(&rank);
        let mut communicator = rank.communicator(Options::default());
        assert_eq!(peer.hear(), "done");
        peer.tell("differ");
        let buffer = rank.framed(&[1.0f32; 100], 0);
        let issued = communicator.all_reduce(&buffer.view, ReduceOp::Sum, &rank.stream);
        let error = issued.and_then(|()| communicator.synchronize(PATIENCE)).unwrap_err();
        assert!(matches!(error, Error::Mismatch { rank: 0, peer: 1, .. }), "{error:?}");
        buffer.check(&rank, &[1.0f32; 100], "a buffer of a mismatched call");
        drop(communicator);
        peer.finish();
    });
}

#[test]
fn a_process_that_is_killed_is_lost_within_a_second() {
    between_processes("a_process_that_is_killed_is_lost_within_a_second", |rank, mut peer| {
        every_algorithm(&rank);
        let mut communicator = rank.communicator(Options::default());
        assert_eq!(peer.hear(), "done");
        let buffer = rank.framed(&[1.0f32; 100], 0);
        communicator.all_reduce(&buffer.view, ReduceOp::Sum, &rank.stream).unwrap();
        peer.kill();
        let killed = Instant::now();
        let error = communicator.synchronize(PATIENCE).unwrap_err();
        assert!(matches!(error, Error::PeerLost { rank: 1, .. }), "{error:?}");
        assert!(killed.elapsed() < Duration::from_secs(1), "{:?}", killed.elapsed());
        buffer.check(&rank, &[1.0f32; 100], "a buffer whose operation failed");
        is_poisoned_and_usable(&rank, &mut communicator);
    });
}

/// Weights after a few steps of training.
fn train(strategy: Ddp) -> Vec<u32> {
    let mut strategy: Box<dyn Strategy> = Box::new(strategy);
    let data = samples(8);
    let mine = &data[4 * strategy.rank() as usize..][..4];
    let mut model = Mlp::set_up(&mut strategy);
    let mut optimizer = strategy.setup_optimizer(&model, AdamW::new(1e-2).into()).unwrap();
    for _ in 0..3 {
        strategy.backward(&Loss { batch: mine, micro_batches: 1.0 }, &mut model).unwrap();
        let clipped = strategy.clip_gradients_norm(&model, &mut optimizer, 0.05, NormType::L2, Nonfinite::SkipStep);
        strategy.optimizer_step(&mut optimizer).unwrap();
        clipped.unwrap().get(TIMEOUT).unwrap();
    }
    let weights = bits(&model.weights());
    strategy.teardown(TIMEOUT).unwrap();
    weights
}

fn on(accelerator: Accelerator) -> StrategyOptions {
    let mut options = StrategyOptions { accelerator, ..model::options() };
    options.world.heartbeat_limit = None;
    options
}

fn train_on_the_device() -> Vec<u32> {
    let options = on(Accelerator::Cuda(None));
    train(Ddp::setup_environment(Environment::detect().unwrap(), options).unwrap())
}

#[test]
fn second_trainer() {
    as_peer("second_trainer", || say(format!("{:?}", train_on_the_device())));
}

#[test]
fn processes_that_share_a_device_train_to_the_bits_of_the_host() {
    beside("processes_that_share_a_device_train_to_the_bits_of_the_host", "second_trainer", |mut peer| {
        let weights = train_on_the_device();
        assert_eq!(peer.hear(), format!("{weights:?}"));
        peer.finish();
        assert_eq!(ddp(2, on(Accelerator::Host), train), [weights.clone(), weights]);
    });
}
