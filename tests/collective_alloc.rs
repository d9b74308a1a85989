//! Once warm, no operation allocates: not the rank that issues it, not the stream that runs it, not the monitor that
//! watches meanwhile. One test, because the counter sees every thread of the process.
#![cfg(not(loom))]

mod counting;
mod together;

use std::time::Duration;

use annulus::collective::{CollectiveOptions, Communicator};
use annulus::device::{Arena, Buffer, Event, Stream};
use annulus::schedule::Algorithm;
use annulus::telemetry::Timeline;
use annulus::world::{World, WorldOptions, launch};
use annulus::{DType, ReduceOp};
use together::Together;

const PATIENCE: Duration = Duration::from_secs(60);
const WARM_UP: usize = 20;
const STEPS: usize = 150;

/// One of everything, at a size that goes in one step and one that does not.
struct Steps {
    communicator: Communicator,
    stream: Stream,
    other: Stream,
    immediate: Stream,
    event: Event,
    pairs: Vec<Option<(Buffer, Buffer)>>,
    few: Vec<f32>,
    many: Vec<f32>,
}

impl Steps {
    fn new(world: &World, algorithm: Option<Algorithm>) -> Steps {
        let timeline = Timeline::new(world.rank(), 1 << 16).unwrap();
        let options = CollectiveOptions { algorithm, timeline, ..CollectiveOptions::default() };
        let arena = Arena::new(world);
        let ranks = world.world_size() as usize;
        let mut pairs = Vec::new();
        for shard in [33, 150_000] {
            let private = |len: usize| Buffer::zeroed(DType::BF16, len).unwrap();
            let registered = |len: usize| arena.alloc(DType::F32, len).unwrap();
            pairs.push(Some((private(shard), private(ranks * shard))));
            pairs.push(Some((registered(shard), registered(ranks * shard))));
        }
        Steps {
            communicator: Communicator::new(world, options).unwrap(),
            stream: Stream::new("communication").unwrap(),
            other: Stream::new("other").unwrap(),
            immediate: Stream::immediate("immediate"),
            event: Event::new(),
            pairs,
            few: vec![1.0; 20_000],
            many: vec![1.0; ranks * 20_000],
        }
    }

    fn step(&mut self) {
        let Steps { communicator, stream, other, immediate, event, pairs, few, many } = self;
        for stream in [&*stream, &*immediate] {
            for pair in pairs.iter_mut() {
                let (shard, whole) = pair.take().unwrap();
                // Two in flight, and one behind the other.
                let first = communicator.all_reduce(shard, ReduceOp::Sum, stream).unwrap();
                let second = communicator.all_reduce(whole, ReduceOp::Avg, stream).unwrap();
                other.wait(first.event()).unwrap();
                let (shard, whole) = (first.wait().unwrap(), second.wait().unwrap());
                let work = communicator.reduce_scatter(whole, shard, ReduceOp::Max, stream).unwrap();
                let (whole, shard) = work.wait().unwrap();
                let (shard, whole) = communicator.all_gather(shard, whole, stream).unwrap().wait().unwrap();
                let whole = communicator.reduce_scatter_in_place(whole, ReduceOp::Sum, stream).unwrap().wait().unwrap();
                let whole = communicator.all_gather_in_place(whole, stream).unwrap().wait().unwrap();
                let whole = communicator.broadcast(whole, 1, stream).unwrap().wait().unwrap();
                *pair = Some((shard, whole));
                stream.record(event).unwrap();
                other.wait(event).unwrap();
            }
            communicator.barrier(stream).unwrap().wait().unwrap();
        }
        communicator.all_reduce_slice(few, ReduceOp::Min).unwrap();
        communicator.all_reduce_slice(many, ReduceOp::Sum).unwrap();
        communicator.reduce_scatter_slice(many, few, ReduceOp::Avg).unwrap();
        communicator.all_gather_slice(few, many).unwrap();
        communicator.broadcast_slice(few, 0).unwrap();
        communicator.barrier_now().unwrap();
        let answer = stream.run(|| 42).unwrap();
        other.enqueue(move || assert_eq!(answer, 42)).unwrap();
        other.record(event).unwrap();
        event.synchronize(PATIENCE).unwrap();
        other.synchronize(PATIENCE).unwrap();
    }
}

/// Allocations, by any thread, while both ranks make [`STEPS`] steps.
fn allocations(algorithm: Option<Algorithm>) -> usize {
    let together = Together::new(2);
    let counted = launch::threads(2, |environment| {
        let world = World::join(environment, WorldOptions { timeout: PATIENCE, ..WorldOptions::default() }).unwrap();
        let mut steps = Steps::new(&world, algorithm);
        for _ in 0..WARM_UP {
            steps.step();
            // Streams go idle: a thread makes what it needs for waiting when it first waits. Monitors beat.
            std::thread::sleep(Duration::from_millis(4));
        }
        let counted = counting::allocations_of(&together, || {
            for step in 0..STEPS {
                steps.step();
                if step % 15 == 0 {
                    std::thread::sleep(Duration::from_millis(10));
                }
            }
        });
        drop(steps);
        world.teardown(PATIENCE).unwrap();
        counted
    });
    counted.unwrap()[0]
}

#[test]
fn nothing_allocates_once_warm() {
    // The counter counts: or it would see nothing here either.
    counting::start();
    drop(std::hint::black_box(vec![0u8; 100]));
    counting::stop();
    assert!(counting::allocations() >= 1);
    for algorithm in [None, Some(Algorithm::Ring)] {
        let counted = allocations(algorithm);
        let largest_bytes = counting::largest_bytes();
        assert_eq!(counted, 0, "{algorithm:?}: allocations, the largest of {largest_bytes} bytes");
    }
}
