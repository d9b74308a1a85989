//! Collectives in graphs: their place in the order, and what is told of them; and communicators that are dropped beside
//! captures, or where a stream hangs.

#[path = "support/linger.rs"]
mod linger;
#[path = "support/ranks.rs"]
mod ranks;
mod support;
#[path = "../../../together/mod.rs"]
mod together;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use annulus::collective::cuda::Options;
use annulus::device::cuda::{Event, Pinned, Priority, Stream};
use annulus::world::launch;
use annulus::{Error, ReduceOp};
use linger::{linger, release};
use ranks::{Framed, PATIENCE, Rank};
use support::on_virtual_gpu;
use together::Together;

const ONE: &[(&str, &str)] = &[("ANNULUS_VGPU_DEVICES", "1")];
const TWO: &[(&str, &str)] = &[("ANNULUS_VGPU_DEVICES", "2")];
/// Time for what must not happen.
const A_WHILE: Duration = Duration::from_millis(300);

fn stream(rank: &Rank, name: &str) -> Stream {
    Stream::new(rank.kernels.device(), name, Priority::Normal).unwrap()
}

/// The words of a kernel that lingers.
fn area(rank: &Rank) -> Pinned {
    Pinned::zeroed(rank.kernels.device(), 6 * size_of::<u32>()).unwrap()
}

/// 1 on rank 0 and 3 on rank 1: their sum and then the greatest is 4, and the other way round it is 6.
fn one_and_three(rank: &Rank) -> Framed {
    let buffer = rank.framed(&[[1.0f32, 3.0][rank.number()]; 100], 0);
    rank.stream.synchronize(PATIENCE).unwrap();
    buffer
}

// ---- the order ---------------------------------------------------------------------------------------------------------

#[test]
fn what_is_issued_behind_a_launch_runs_behind_it() {
    on_virtual_gpu("what_is_issued_behind_a_launch_runs_behind_it", TWO, || {
        launch::threads(2, |environment| {
            let rank = Rank::join(environment);
            let (slow, area) = (stream(&rank, "slow"), area(&rank));
            let mut communicator = rank.communicator(Options::default());
            let buffer = one_and_three(&rank);
            let sum = || communicator.all_reduce(&buffer.view, ReduceOp::Sum, &rank.stream);
            let mut graph = rank.stream.capture(sum).unwrap();
            linger(&rank.kernels, &slow, area.address(), PATIENCE);
            communicator.before_launch(&graph, &slow).unwrap();
            graph.launch(&slow).unwrap();
            communicator.all_reduce(&buffer.view, ReduceOp::Max, &rank.stream).unwrap();
            std::thread::sleep(A_WHILE);
            release(&area);
            communicator.synchronize(PATIENCE).unwrap();
            buffer.check(&rank, &[4.0f32; 100], "a sum in a graph, and then the greatest");
        })
        .unwrap();
    });
}

#[test]
fn a_capture_leaves_the_order_of_what_is_issued_as_it_is() {
    on_virtual_gpu("a_capture_leaves_the_order_of_what_is_issued_as_it_is", TWO, || {
        launch::threads(2, |environment| {
            let rank = Rank::join(environment);
            let [first, second, last] = ["first", "second", "last"].map(|name| stream(&rank, name));
            let (join, area) = (Event::new(rank.kernels.device()).unwrap(), area(&rank));
            let mut communicator = rank.communicator(Options::default());
            let buffer = one_and_three(&rank);
            linger(&rank.kernels, &rank.stream, area.address(), PATIENCE);
            communicator.all_reduce(&buffer.view, ReduceOp::Max, &rank.stream).unwrap();
            // On two streams of a capture, neither of which has been used before.
            let mut graph = first
                .capture(|| {
                    communicator.barrier(&first)?;
                    communicator.barrier(&second)?;
                    second.record(&join)?;
                    first.wait(&join)
                })
                .unwrap();
            communicator.all_reduce(&buffer.view, ReduceOp::Sum, &last).unwrap();
            for _ in 0..2 {
                communicator.before_launch(&graph, &second).unwrap();
                graph.launch(&second).unwrap();
            }
            std::thread::sleep(A_WHILE);
            release(&area);
            communicator.synchronize(PATIENCE).unwrap();
            buffer.check(&rank, &[6.0f32; 100], "the greatest, and then a sum");
        })
        .unwrap();
    });
}

// ---- a peer that leaves ------------------------------------------------------------------------------------------------

/// Rank 1 leaves in peace when a graph was launched so many times without a word. Rank 0 is told nothing, for nothing waits;
/// unless it goes on to launch the graph, and says so.
fn a_peer_leaves(test: &str, launches: usize, goes_on: bool) {
    on_virtual_gpu(test, TWO, || {
        let has_left = AtomicBool::new(false);
        launch::threads(2, |environment| {
            let rank = Rank::join(environment);
            let mut communicator = rank.communicator(Options::default());
            let mut graph = rank.stream.capture(|| communicator.barrier(&rank.stream)).unwrap();
            (0..launches).for_each(|_| graph.launch(&rank.stream).unwrap());
            rank.stream.synchronize(PATIENCE).unwrap();
            if rank.number() == 1 {
                drop((graph, communicator, rank));
                return has_left.store(true, Ordering::Release);
            }
            while !has_left.load(Ordering::Acquire) {
                std::thread::sleep(Duration::from_millis(5));
            }
            std::thread::sleep(Duration::from_secs(2)); // more than the beats after which a kernel is stuck
            assert!(rank.world.fault().is_none(), "{:?}", rank.world.fault());
            if goes_on {
                communicator.before_launch(&graph, &rank.stream).unwrap();
                graph.launch(&rank.stream).unwrap();
                let start = Instant::now();
                let error = communicator.synchronize(PATIENCE).unwrap_err();
                assert!(matches!(error, Error::PeerLost { rank: 1, .. }), "{error:?}");
                assert!(start.elapsed() < PATIENCE / 4, "{:?}", start.elapsed());
            }
        })
        .unwrap();
    });
}

#[test]
fn a_peer_that_leaves_is_lost_to_a_graph_that_is_launched_and_not_to_one_that_is_not() {
    a_peer_leaves("a_peer_that_leaves_is_lost_to_a_graph_that_is_launched_and_not_to_one_that_is_not", 0, true);
}

#[test]
fn a_peer_that_leaves_is_not_lost_to_a_graph_that_has_run() {
    a_peer_leaves("a_peer_that_leaves_is_not_lost_to_a_graph_that_has_run", 2, false);
}

// ---- dropping ----------------------------------------------------------------------------------------------------------

/// One that waits for a late peer meanwhile, and can still be told that the job has failed.
#[test]
fn a_capture_on_its_stream_does_not_make_a_drop_stop_waiting() {
    on_virtual_gpu("a_capture_on_its_stream_does_not_make_a_drop_stop_waiting", TWO, || {
        let seen = Together::new(2);
        launch::threads(2, |environment| {
            let rank = Rank::join(environment);
            let mut communicator = rank.communicator(Options::default());
            if rank.number() == 1 {
                seen.wait();
                return;
            }
            communicator.barrier(&rank.stream).unwrap();
            std::thread::scope(|scope| {
                scope.spawn(|| drop(communicator));
                std::thread::sleep(A_WHILE);
                let captured = rank.stream.capture(|| {
                    std::thread::sleep(A_WHILE);
                    Ok(())
                });
                captured.unwrap();
                rank.world.raise(Error::RankFailed { rank: 0, reason: "the test says so".to_owned() });
                rank.stream.synchronize(PATIENCE / 12).unwrap();
            });
            seen.wait();
        })
        .unwrap();
    });
}

#[test]
fn dropping_in_the_capture_of_another_stream_frees_nothing() {
    on_virtual_gpu("dropping_in_the_capture_of_another_stream_frees_nothing", ONE, || {
        launch::threads(1, |environment| {
            let rank = Rank::join(environment);
            let free_bytes = || rank.kernels.device().memory_bytes().unwrap().0;
            let [idle, mut used] = [(); 2].map(|()| rank.communicator(Options::default()));
            used.barrier(&rank.stream).unwrap();
            used.synchronize(PATIENCE).unwrap();
            let before = free_bytes();
            let other = stream(&rank, "other");
            let captured = other.capture(|| {
                drop((idle, used));
                Ok(())
            });
            captured.unwrap();
            assert_eq!(free_bytes(), before);
        })
        .unwrap();
    });
}

#[test]
fn dropping_lets_the_capture_of_another_thread_end_first() {
    on_virtual_gpu("dropping_lets_the_capture_of_another_thread_end_first", ONE, || {
        launch::threads(1, |environment| {
            let rank = Rank::join(environment);
            let free_bytes = || rank.kernels.device().memory_bytes().unwrap().0;
            let begin = free_bytes();
            let communicator = rank.communicator(Options::default());
            let before = free_bytes();
            std::thread::scope(|scope| {
                let captured = stream(&rank, "other").capture(|| {
                    scope.spawn(|| drop(communicator));
                    std::thread::sleep(A_WHILE);
                    assert_eq!(free_bytes(), before);
                    Ok(())
                });
                captured.unwrap();
            });
            assert_eq!(free_bytes(), begin);
        })
        .unwrap();
    });
}

#[test]
fn a_stream_that_hangs_is_waited_for_by_one_of_its_communicators() {
    on_virtual_gpu("a_stream_that_hangs_is_waited_for_by_one_of_its_communicators", ONE, || {
        launch::threads(1, |environment| {
            let rank = Rank::join(environment);
            let area = area(&rank);
            let options = Options { timeout: Some(Duration::from_secs(1)), ..Options::default() };
            let [mut first, mut second] = [(); 2].map(|()| rank.communicator(options.clone()));
            linger(&rank.kernels, &rank.stream, area.address(), PATIENCE);
            first.barrier(&rank.stream).unwrap();
            second.barrier(&rank.stream).unwrap();
            drop(first);
            let fault = rank.world.fault();
            let told =
                fault.as_ref().is_some_and(|fault| fault.to_string().contains("the work of stream test did not end"));
            assert!(told, "{fault:?}");
            let start = Instant::now();
            drop(second);
            // 5 s for the kernels to end once they are told to, and not another 6 s before that.
            assert!(start.elapsed() < Duration::from_secs(8), "{:?}", start.elapsed());
            release(&area);
            rank.stream.synchronize(PATIENCE).unwrap();
        })
        .unwrap();
    });
}
