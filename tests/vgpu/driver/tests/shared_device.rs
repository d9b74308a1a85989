//! Ranks that share a device: as threads, in one cooperative grid; and what each is told when something goes wrong.

#[path = "../../../counting/mod.rs"]
mod counting;
#[path = "support/linger.rs"]
mod linger;
#[path = "support/operations.rs"]
mod operations;
#[path = "support/ranks.rs"]
mod ranks;
mod support;
#[path = "../../../together/mod.rs"]
mod together;
#[path = "support/trouble.rs"]
mod trouble;

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use annulus::collective::cuda::{Communicator, Options, Transport, Way};
use annulus::device::cuda::{Driver, Pinned, Priority, Stream, View};
use annulus::schedule::{Algorithm, Collective};
use annulus::world::{Environment, launch};
use annulus::{Error, ReduceOp, reference};
use half::bf16;
use linger::{linger, release};
use operations::{every_dtype, every_operation, reduced, ring};
use ranks::{PATIENCE, Rank, inputs};
use support::on_virtual_gpu;
use together::Together;
use trouble::{a_mismatch_changes_nothing, is_no_part_of_a_graph, is_poisoned, is_poisoned_and_usable};

const ONE: &[(&str, &str)] = &[("ANNULUS_VGPU_DEVICES", "1")];
const TWO: &[(&str, &str)] = &[("ANNULUS_VGPU_DEVICES", "2")];

// ---- bits --------------------------------------------------------------------------------------------------------------

#[test]
fn two_and_three_ranks_on_one_device_give_the_bits_of_the_reference() {
    on_virtual_gpu("two_and_three_ranks_on_one_device_give_the_bits_of_the_reference", ONE, || {
        for (world_size, len_elems) in [(2, 131), (3, 35)] {
            launch::threads(world_size, |environment| {
                let rank = Rank::on(0, environment);
                every_dtype(&rank, &Options::default(), len_elems);
                every_dtype(&rank, &ring(), len_elems);
            })
            .unwrap();
        }
    });
}

/// Two grids of two ranks each, which wait for each other; with and without memory that the other device reaches.
#[test]
fn four_ranks_on_two_devices_give_the_bits_of_the_reference() {
    for peers in ["all", "none"] {
        let variables = [TWO[0], ("ANNULUS_VGPU_PEERS", peers)];
        on_virtual_gpu("four_ranks_on_two_devices_give_the_bits_of_the_reference", &variables, || {
            let peers = std::env::var("ANNULUS_VGPU_PEERS").unwrap();
            launch::threads(4, |environment| {
                let rank = Rank::on(environment.rank % 2, environment);
                for options in [Options::default(), ring()] {
                    let algorithm = options.algorithm.unwrap_or(Algorithm::Direct);
                    let mut communicator = rank.communicator(options);
                    assert_eq!(communicator.way(), Way::Cooperative);
                    for peer in (0..4).filter(|peer| *peer != rank.world.rank()) {
                        let is_near = peer % 2 == rank.world.rank() % 2 || peers == "all";
                        let by_device = communicator.transport(peer) == Some(Transport::Device);
                        assert_eq!(by_device, is_near, "rank {} to {peer}", rank.number());
                    }
                    every_operation::<f32>(&rank, &mut communicator, algorithm, 65);
                    every_operation::<bf16>(&rank, &mut communicator, algorithm, 7);
                }
            })
            .unwrap();
        });
    }
}

/// As many as a grid holds, of which one device has the smaller part.
#[test]
fn ten_ranks_are_eight_on_one_device_and_two_on_another() {
    on_virtual_gpu("ten_ranks_are_eight_on_one_device_and_two_on_another", TWO, || {
        launch::threads(10, |environment| {
            let device = u32::from(environment.rank >= 8);
            let rank = Rank::on(device, environment);
            every_operation::<f32>(&rank, &mut rank.communicator(Options::default()), Algorithm::Direct, 17);
        })
        .unwrap();
    });
}

#[test]
fn long_vectors_take_several_rounds_and_streams_one_order() {
    on_virtual_gpu("long_vectors_take_several_rounds_and_streams_one_order", ONE, || {
        launch::threads(2, |environment| {
            let rank = Rank::on(0, environment);
            let second = Stream::new(rank.kernels.device(), "second", Priority::Normal).unwrap();
            let mut communicator = rank.communicator(Options::default());
            for len_elems in [0, 1, 16_385, 100_003] {
                let terms = inputs::<f32>(2, len_elems);
                let buffer = rank.framed(&terms[rank.number()], 0);
                communicator.all_reduce(&buffer.view, ReduceOp::Avg, &rank.stream).unwrap();
                communicator.all_reduce(&buffer.view, ReduceOp::Sum, &second).unwrap();
                communicator.synchronize(PATIENCE).unwrap();
                let average = reduced(&terms, ReduceOp::Avg, Algorithm::Direct, Collective::AllReduce);
                let expected = reference::all_reduce(&[average.clone(), average], ReduceOp::Sum).unwrap();
                buffer.check(&rank, &expected, &format!("{len_elems} elements twice"));
            }
        })
        .unwrap();
    });
}

/// A collective in its steady state asks the driver to enqueue and to look, and the heap for nothing.
fn a_steady_state(test: &str, devices: &str, way: Way) {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("calls");
    let variables = [("ANNULUS_VGPU_DEVICES", devices), ("ANNULUS_VGPU_CALLS", file.to_str().unwrap())];
    let launches = if way == Way::Cooperative { "cuLaunchCooperativeKernel" } else { "cuLaunchKernel" };
    let allowed = [
        launches,
        "cuCtxSetCurrent",
        "cuEventRecord",
        "cuStreamQuery",
        "cuStreamWaitEvent",
        "cuStreamWaitValue32_v2",
        "cuStreamWriteValue32_v2",
    ];
    on_virtual_gpu(test, &variables, || {
        let calls = || std::fs::read_to_string(std::env::var("ANNULUS_VGPU_CALLS").unwrap()).unwrap();
        let (together, devices) = (Together::new(2), Driver::open().unwrap().len_devices());
        launch::threads(2, |environment| {
            let rank = Rank::on(environment.rank % devices, environment);
            let second = Stream::new(rank.kernels.device(), "second", Priority::Normal).unwrap();
            for algorithm in [Algorithm::Direct, Algorithm::Ring] {
                let options = Options { algorithm: Some(algorithm), way: Some(way), ..Options::default() };
                let mut communicator = rank.communicator(options);
                let buffer = rank.framed(&[1.0f32; 100], 0);
                let shard = buffer.view.slice(50 * rank.number(), 50).unwrap();
                let mut step = || {
                    communicator.reduce_scatter(&buffer.view, &shard, ReduceOp::Avg, &rank.stream).unwrap();
                    communicator.all_gather(&shard, &buffer.view, &second).unwrap();
                    communicator.all_reduce(&buffer.view, ReduceOp::Max, &rank.stream).unwrap();
                    communicator.broadcast(&buffer.view, 1, &rank.stream).unwrap();
                    communicator.barrier(&rank.stream).unwrap();
                    communicator.synchronize(PATIENCE).unwrap();
                };
                (0..10).for_each(|_| step());
                together.wait();
                let before = calls().len();
                let allocations = counting::allocations_of(&together, || (0..10).for_each(|_| step()));
                assert_eq!(allocations, 0, "{algorithm:?}: the largest of {} bytes", counting::largest_bytes());
                let calls: BTreeSet<String> = calls()[before..].lines().map(str::to_owned).collect();
                assert!(calls.iter().all(|call| allowed.contains(&call.as_str())), "{algorithm:?}: {calls:?}");
                assert!(calls.contains(launches), "{algorithm:?}: {calls:?}");
                together.wait();
            }
        })
        .unwrap();
    });
}

#[test]
fn a_cooperative_collective_allocates_nothing() {
    a_steady_state("a_cooperative_collective_allocates_nothing", "1", Way::Cooperative);
}

#[test]
fn a_collective_by_steps_allocates_nothing() {
    a_steady_state("a_collective_by_steps_allocates_nothing", "2", Way::Stepped);
}

/// Of the 16 blocks of the device, each takes one for each rank.
#[test]
fn no_more_communicators_are_made_than_fit_on_the_device_together() {
    on_virtual_gpu("no_more_communicators_are_made_than_fit_on_the_device_together", ONE, || {
        launch::threads(2, |environment| {
            let rank = Rank::on(0, environment);
            let second = Stream::new(rank.kernels.device(), "second", Priority::Normal).unwrap();
            let another = |way| Communicator::new(&rank.world, &rank.kernels, Options { way, ..Options::default() });
            let mut all = Vec::new();
            let refused = loop {
                match another(None) {
                    Ok(communicator) => all.push((communicator, rank.framed(&[1.0f32; 100], 0))),
                    Err(refused) => break refused,
                }
            };
            assert!(matches!(refused, Error::InvalidArgument { .. }), "{refused:?}");
            assert!(refused.to_string().contains("16 of the 16 blocks"), "{refused}");
            assert_eq!(all.len(), 8);
            // Kernels that do not wait take none.
            drop(another(Some(Way::Stepped)).unwrap());
            // All at once, on streams of either priority.
            for (index, (communicator, buffer)) in all.iter_mut().enumerate() {
                let stream = if index % 2 == 0 { &rank.stream } else { &second };
                communicator.all_reduce(&buffer.view, ReduceOp::Sum, stream).unwrap();
            }
            for (communicator, buffer) in &mut all {
                communicator.synchronize(PATIENCE).unwrap();
                buffer.check(&rank, &[2.0f32; 100], "a sum beside others");
            }
            all.pop();
            rank.world.barrier("of the test", PATIENCE).unwrap();
            all.push((another(None).unwrap(), rank.framed(&[1.0f32; 1], 0)));
            assert!(another(None).is_err() && rank.world.fault().is_none());
        })
        .unwrap();
    });
}

// ---- what goes wrong ---------------------------------------------------------------------------------------------------

fn soon(way: Option<Way>) -> Options {
    Options { timeout: Some(Duration::from_millis(700)), way, ..Options::default() }
}

/// Why a call failed: a rank that is late finds that the job has failed already.
fn cause(error: Error) -> Error {
    match error {
        Error::Poisoned { cause } => *cause,
        error => error,
    }
}

#[test]
fn a_rank_that_does_not_issue_is_named() {
    on_virtual_gpu("a_rank_that_does_not_issue_is_named", ONE, || {
        let seen = Together::new(3);
        launch::threads(3, |environment| {
            let rank = Rank::on(0, environment);
            let mut communicator = rank.communicator(soon(None));
            let buffer = rank.framed(&[1.0f32; 100], 0);
            if rank.number() != 1 {
                let error = cause(communicator.all_reduce(&buffer.view, ReduceOp::Sum, &rank.stream).unwrap_err());
                assert!(matches!(error, Error::PeerStalled { rank: 1, sequence: 1, .. }), "{error:?}");
                assert!(error.to_string().contains("all_reduce(100 x f32, sum)"), "{error}");
                buffer.check(&rank, &[1.0f32; 100], "a buffer whose operation failed");
            }
            seen.wait();
            is_poisoned_and_usable(&rank, &mut communicator);
        })
        .unwrap();
    });
}

/// The grid of device 0 runs and waits for a rank of device 1, where only one of two has issued.
#[test]
fn a_grid_that_waits_for_another_device_ends_with_the_job() {
    on_virtual_gpu("a_grid_that_waits_for_another_device_ends_with_the_job", TWO, || {
        let seen = Together::new(4);
        launch::threads(4, |environment| {
            let rank = Rank::on(environment.rank % 2, environment);
            let mut communicator = rank.communicator(soon(None));
            let buffer = rank.framed(&[1.0f32; 100], 0);
            if rank.number() != 3 {
                let issued = communicator.all_reduce(&buffer.view, ReduceOp::Sum, &rank.stream);
                let error = cause(issued.and_then(|()| communicator.synchronize(PATIENCE)).unwrap_err());
                // The grid may be the first to lose patience: with either of the two that it misses.
                assert!(matches!(error, Error::PeerStalled { rank: 1 | 3, sequence: 1, .. }), "{error:?}");
                buffer.check(&rank, &[1.0f32; 100], "a buffer whose operation failed");
            }
            seen.wait();
            is_poisoned_and_usable(&rank, &mut communicator);
        })
        .unwrap();
    });
}

#[test]
fn a_rank_that_leaves_is_lost_to_those_who_wait_for_it() {
    on_virtual_gpu("a_rank_that_leaves_is_lost_to_those_who_wait_for_it", ONE, || {
        launch::threads(2, |environment| {
            let rank = Rank::on(0, environment);
            let mut communicator = rank.communicator(Options::default());
            communicator.barrier(&rank.stream).unwrap();
            communicator.synchronize(PATIENCE).unwrap();
            if rank.number() == 1 {
                return;
            }
            let start = Instant::now();
            let error = communicator.barrier(&rank.stream).unwrap_err();
            assert!(matches!(error, Error::PeerLost { rank: 1, .. }), "{error:?}");
            // It waits a moment for us to let go of its memory, and leaves then.
            assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
            is_poisoned_and_usable(&rank, &mut communicator);
        })
        .unwrap();
    });
}

/// The driver launches the grid of two ranks, and then refuses what would put a rank behind it. The grid runs once both ranks
/// have released their streams, which is `released` after the operation was issued.
fn a_grid_that_a_rank_is_not_behind(test: &str, refused: &str, released: Duration) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("refused");
    on_virtual_gpu(test, &[ONE[0], ("ANNULUS_VGPU_REFUSE", path.to_str().unwrap())], || {
        let path = std::env::var("ANNULUS_VGPU_REFUSE").unwrap();
        let (together, failed) = (Together::new(2), AtomicU32::new(u32::MAX));
        launch::threads(2, |environment| {
            let rank = Rank::on(0, environment);
            let mut communicator = rank.communicator(Options::default());
            let area = Pinned::zeroed(rank.kernels.device(), 6 * size_of::<u32>()).unwrap();
            let buffer = rank.framed(&[1.0f32; 100], 0);
            rank.stream.synchronize(PATIENCE).unwrap();
            linger(&rank.kernels, &rank.stream, area.address(), PATIENCE);
            if together.wait() {
                std::fs::write(&path, refused).unwrap();
            }
            together.wait();
            let (start, area) = (Instant::now(), &area);
            std::thread::scope(|scope| {
                scope.spawn(move || {
                    std::thread::sleep(released);
                    release(area);
                });
                let issued = communicator.all_reduce(&buffer.view, ReduceOp::Sum, &rank.stream);
                let error = issued.and_then(|()| communicator.synchronize(PATIENCE)).unwrap_err();
                // Nobody gets the buffer back before the grid has ended, if that is soon.
                let waited = start.elapsed();
                assert!(waited >= released.min(Duration::from_secs(5)), "{waited:?}: {error:?}");
                if let Error::Cuda { .. } = error {
                    failed.store(rank.world.rank(), Ordering::Relaxed);
                }
                is_poisoned(&rank, &mut communicator);
                drop(communicator);
            });
            // A grid that runs later than that finds all that it uses.
            rank.stream.synchronize(PATIENCE).unwrap();
            together.wait();
            let fault = rank.world.fault().unwrap();
            let failed = failed.load(Ordering::Relaxed);
            assert!(matches!(fault, Error::RankFailed { rank, .. } if rank == failed), "{failed}: {fault:?}");
        })
        .unwrap();
    });
}

#[test]
fn a_grid_whose_end_cannot_be_recorded_has_ended_when_its_ranks_are_told() {
    let name = "a_grid_whose_end_cannot_be_recorded_has_ended_when_its_ranks_are_told";
    // Behind the arrivals of both ranks.
    a_grid_that_a_rank_is_not_behind(name, "cuEventRecord 3", Duration::from_millis(300));
}

#[test]
fn a_grid_whose_end_a_rank_cannot_wait_for_has_ended_when_the_rank_is_told() {
    let name = "a_grid_whose_end_a_rank_cannot_wait_for_has_ended_when_the_rank_is_told";
    // The grid's stream waits for both ranks.
    a_grid_that_a_rank_is_not_behind(name, "cuStreamWaitEvent 3", Duration::from_millis(300));
}

#[test]
fn a_grid_that_outlives_its_communicators_finds_their_memory() {
    let name = "a_grid_that_outlives_its_communicators_finds_their_memory";
    a_grid_that_a_rank_is_not_behind(name, "cuEventRecord 3", Duration::from_secs(12));
}

#[test]
fn a_mismatch_on_a_device_or_between_devices_changes_nothing() {
    on_virtual_gpu("a_mismatch_on_a_device_or_between_devices_changes_nothing", TWO, || {
        let fails = |communicator: &mut Communicator, view: &View, stream: &Stream| {
            let issued = communicator.all_reduce(view, ReduceOp::Sum, stream);
            cause(issued.and_then(|()| communicator.synchronize(PATIENCE)).unwrap_err())
        };
        // Rank 2 differs. It is alone on its device, or shares it with rank 0.
        for devices in [1, 2, 3] {
            let join = |environment: Environment| {
                let device = if devices == 3 { u32::from(environment.rank == 2) } else { environment.rank % devices };
                Rank::on(device, environment)
            };
            let quoted = ["all_reduce(100 x f32, sum)", "all_reduce(200 x f32, sum)"];
            a_mismatch_changes_nothing(join, &Options::default(), fails, quoted);
        }
    });
}

#[test]
fn what_cannot_be_is_refused_on_every_rank_and_poisons_nothing() {
    on_virtual_gpu("what_cannot_be_is_refused_on_every_rank_and_poisons_nothing", ONE, || {
        launch::threads(9, |environment| {
            let rank = Rank::on(0, environment);
            for way in [None, Some(Way::Cooperative), Some(Way::Persistent)] {
                let options = Options { way, ..Options::default() };
                let refused = Communicator::new(&rank.world, &rank.kernels, options);
                assert!(matches!(refused, Err(Error::InvalidArgument { .. })), "{way:?}: {refused:?}");
            }
            assert_eq!(rank.world.fault().map(|fault| fault.to_string()), None);
        })
        .unwrap();
        launch::threads(2, |environment| {
            let rank = Rank::on(0, environment);
            is_no_part_of_a_graph(&rank, &mut rank.communicator(Options::default()));
        })
        .unwrap();
    });
}
