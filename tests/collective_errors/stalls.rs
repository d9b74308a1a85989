//! A rank that never comes, and what works afterwards: nothing.

use std::time::{Duration, Instant};

use annulus::collective::{CollectiveOptions, Communicator};
use annulus::device::{Buffer, Stream};
use annulus::world::World;
use annulus::{DType, Error, ReduceOp, Result};

use super::together::Together;
use super::{PATIENCE, cause, communicator, ranks};

const DEADLINE: Duration = Duration::from_millis(600);

fn impatient(world: &World) -> Communicator {
    Communicator::new(world, CollectiveOptions { timeout: Some(DEADLINE), ..CollectiveOptions::default() }).unwrap()
}

/// Every way to call for a collective, by name.
const CALLS: [&str; 14] = [
    "all_reduce",
    "all_reduce_into",
    "reduce_scatter",
    "reduce_scatter_in_place",
    "all_gather",
    "all_gather_in_place",
    "broadcast",
    "barrier",
    "all_reduce_slice",
    "reduce_scatter_slice",
    "all_gather_slice",
    "broadcast_slice",
    "barrier_now",
    "split",
];

/// Calls one of them, with little data, and waits for its end.
fn call(name: &str, communicator: &mut Communicator, stream: &Stream) -> Result<()> {
    let all = 8 * communicator.world_size() as usize;
    let (one, whole) = (Buffer::zeroed(DType::F32, 8)?, Buffer::zeroed(DType::F32, all)?);
    let (mut few, mut many) = ([1.0f32; 8], vec![1.0f32; all]);
    let op = ReduceOp::Sum;
    match name {
        "all_reduce" => communicator.all_reduce(one, op, stream)?.wait().map(drop),
        "all_reduce_into" => {
            communicator.all_reduce_into(one, Buffer::zeroed(DType::F32, 8)?, op, stream)?.wait().map(drop)
        }
        "reduce_scatter" => communicator.reduce_scatter(whole, one, op, stream)?.wait().map(drop),
        "reduce_scatter_in_place" => communicator.reduce_scatter_in_place(whole, op, stream)?.wait().map(drop),
        "all_gather" => communicator.all_gather(one, whole, stream)?.wait().map(drop),
        "all_gather_in_place" => communicator.all_gather_in_place(whole, stream)?.wait().map(drop),
        "broadcast" => communicator.broadcast(one, 0, stream)?.wait().map(drop),
        "barrier" => communicator.barrier(stream)?.wait(),
        "all_reduce_slice" => communicator.all_reduce_slice(&mut few, op),
        "reduce_scatter_slice" => communicator.reduce_scatter_slice(&many, &mut few, op),
        "all_gather_slice" => communicator.all_gather_slice(&few, &mut many),
        "broadcast_slice" => communicator.broadcast_slice(&mut few, 0),
        "barrier_now" => communicator.barrier_now(),
        "split" => communicator.split(Some(0), 0).map(drop),
        other => panic!("no call {other}"),
    }
}

/// The name of the operation that a call begins with.
fn operation(call: &str) -> &str {
    match call {
        "split" => "all_gather",
        call => ["all_reduce", "reduce_scatter", "all_gather", "broadcast", "barrier"]
            .into_iter()
            .find(|name| call.starts_with(name))
            .unwrap(),
    }
}

/// The last rank sleeps until the others have given up.
fn absent(world_size: u32, name: &str, stream: fn() -> Stream) {
    let late = world_size - 1;
    let told = ranks(world_size, PATIENCE, |world, everybody| {
        let (mut communicator, stream) = (impatient(world), stream());
        communicator.barrier(&stream).unwrap().wait().unwrap();
        everybody.wait();
        let start = Instant::now();
        if world.rank() == late {
            while world.fault().is_none() && start.elapsed() < PATIENCE {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        let error = call(name, &mut communicator, &stream).unwrap_err();
        (error, start.elapsed())
    });
    for (rank, (error, after)) in told.into_iter().enumerate() {
        let what = format!("{name} on rank {rank} of {world_size}: {error:?} after {after:?}");
        assert_eq!(rank as u32 == late, matches!(error, Error::Poisoned { .. }), "{what}");
        let Error::PeerStalled { rank: named, operation: op, sequence, place, waited_ms, expected, seen } =
            cause(error)
        else {
            panic!("{what}")
        };
        assert_eq!((named, sequence, place.as_str()), (late, 2, "arriving"), "{what}");
        assert!(op.starts_with(operation(name)), "{what}");
        assert_eq!(expected, seen + 1, "{what}");
        assert!(
            (DEADLINE.as_millis() as u64..5_000).contains(&waited_ms) && after >= DEADLINE && after < PATIENCE / 4,
            "{what}"
        );
    }
}

#[test]
fn p04_who_never_comes_is_named_with_operation_sequence_and_place() {
    for (index, name) in CALLS.into_iter().enumerate() {
        let streams: [fn() -> Stream; 2] =
            [|| Stream::new("communication").unwrap(), || Stream::immediate("immediate")];
        absent(2 + index as u32 % 3, name, streams[index % 2]);
    }
}

#[test]
fn p04_who_comes_late_but_in_time_is_no_error() {
    let sums = ranks(3, PATIENCE, |world, _| {
        let mut communicator = communicator(world);
        std::thread::sleep(Duration::from_millis(100 * u64::from(world.rank())));
        let mut value = [1.0f32];
        communicator.all_reduce_slice(&mut value, ReduceOp::Sum).unwrap();
        value[0]
    });
    assert_eq!(sums, [3.0; 3]);
}

/// Stops the job by an absent rank, with operations in flight behind the one that fails.
fn poisoned(world: &World, everybody: &Together, check: impl FnOnce(&mut [Communicator; 2], &Stream)) {
    let mut whole = impatient(world);
    let part = whole.split(Some(world.rank() / 2), 0).unwrap().unwrap();
    let stream = Stream::new("communication").unwrap();
    everybody.wait();
    if world.rank() != 0 {
        let first = whole.all_reduce(Buffer::zeroed(DType::F32, 100_000).unwrap(), ReduceOp::Sum, &stream).unwrap();
        let second = whole.barrier(&stream).unwrap();
        let (first, second) = (first.wait().unwrap_err(), second.wait().unwrap_err());
        assert!(matches!(cause(first), Error::PeerStalled { rank: 0, .. }));
        assert!(matches!(cause(second), Error::PeerStalled { rank: 0, .. }), "what was queued behind does not run");
    }
    everybody.wait();
    check(&mut [whole, part], &stream);
}

#[test]
fn p05_after_an_error_every_call_says_poisoned_at_once() {
    ranks(3, PATIENCE, |world, everybody| {
        poisoned(world, everybody, |communicators, stream| {
            for stream in [stream, &Stream::immediate("immediate")] {
                for communicator in communicators.iter_mut() {
                    for name in CALLS {
                        let what = format!("{name} on rank {}", world.rank());
                        // The best of a few: the test does not have the machine to itself.
                        let fastest = (0..5).map(|_| {
                            let start = Instant::now();
                            let error = call(name, communicator, stream).expect_err(&what);
                            let took = start.elapsed();
                            assert!(matches!(error, Error::Poisoned { .. }), "{what}: {error:?}");
                            assert!(matches!(cause(error), Error::PeerStalled { rank: 0, .. }), "{what}");
                            took
                        });
                        let fastest = fastest.min().unwrap();
                        assert!(fastest <= Duration::from_millis(1), "{what} took {fastest:?}");
                    }
                }
            }
            // What could not be anyway is poisoned, too.
            let [whole, _] = communicators;
            let ints = Buffer::zeroed(DType::I32, 5).unwrap();
            assert!(matches!(whole.all_reduce(ints, ReduceOp::Avg, stream), Err(Error::Poisoned { .. })));
            assert!(matches!(whole.broadcast_slice(&mut [0u8], 99), Err(Error::Poisoned { .. })));
            let start = Instant::now();
            assert!(Communicator::new(world, CollectiveOptions::default()).is_err());
            assert!(world.barrier("after", PATIENCE).is_err());
            assert!(start.elapsed() < PATIENCE / 4);
        });
    });
}

/// A registered buffer that a failed operation had is not handed out again: a peer may still write there.
#[test]
fn p05_memory_of_a_failed_operation_is_never_used_again() {
    ranks(2, PATIENCE, |world, everybody| {
        let mut communicator = impatient(world);
        let stream = Stream::new("communication").unwrap();
        let arena = annulus::device::Arena::new(world);
        let spare = arena.alloc(DType::F32, 10_000).unwrap();
        let lost = arena.alloc(DType::F32, 10_000).unwrap();
        let lost_at = lost.as_slice::<f32>().unwrap().as_ptr();
        let used = arena.used_bytes();
        everybody.wait();
        if world.rank() == 0 {
            let work = communicator.all_reduce(lost, ReduceOp::Sum, &stream).unwrap();
            assert!(matches!(work.wait(), Err(Error::PeerStalled { rank: 1, .. })));
            assert_eq!(arena.used_bytes(), used);
            let next = arena.alloc(DType::F32, 10_000).unwrap();
            assert_ne!(next.as_slice::<f32>().unwrap().as_ptr(), lost_at);
        }
        everybody.wait();
        drop(spare);
        assert!(arena.used_bytes() < used + 40_000, "other buffers are given back");
    });
}
