//! Nothing allocates after setup: neither a training step nor a collective, on no thread. One test, because the counter
//! sees the whole process.

mod counting;
mod together;

use std::time::Duration;

use annulus::collective::Communicator;
use annulus::device::{Arena, Buffer, Stream};
use annulus::strategy::{
    AdamW, Ddp, GradSink, Init, Module, Nonfinite, Parameter, Precision, SingleDevice, Strategy, StrategyOptions,
};
use annulus::telemetry::Timeline;
use annulus::world::{Environment, World, WorldOptions, launch};
use annulus::{DType, NormType, ReduceOp};
use together::Together;

const TIMEOUT: Duration = Duration::from_secs(60);
const WARM_UP: usize = 12;
const STEPS: usize = 60;

/// Runs `step` on every rank, a few times to warm up and then [`STEPS`] times; the allocations of the latter.
fn allocations_of(barrier: &Together, mut step: impl FnMut()) -> usize {
    for _ in 0..WARM_UP {
        step();
        // Streams go idle: a thread makes what it needs for waiting when it first waits.
        std::thread::sleep(Duration::from_millis(3));
    }
    counting::allocations_of(barrier, || (0..STEPS).for_each(|_| step()))
}

struct Layers(Vec<Parameter>);

impl Module for Layers {
    fn parameters(&self, visit: &mut dyn FnMut(&Parameter)) {
        self.0.iter().for_each(visit);
    }
}

/// A training step with all that happens in one; its own data is allocated before.
fn training_allocations(mut strategy: impl Strategy, barrier: &Together) -> usize {
    let init = strategy.module_init_context(Init::Default);
    let layers = (0..8).map(|i| init.parameter(&format!("layer{i}"), &[50, 40 + i], |w| w.fill(0.5)).unwrap());
    let model = Layers(layers.collect());
    let (mut model, mut optimizer) = strategy.setup_module_and_optimizers(model, AdamW::new(1e-3)).unwrap();
    let gradients: Vec<Vec<f32>> = model.0.iter().map(|p| vec![0.01; p.len_elems()]).collect();
    let mut norms = 0.0;
    let mut counter = 0_u32;
    allocations_of(barrier, || {
        counter += 1;
        let loss = |model: &mut Layers, sink: &mut GradSink<'_>| {
            for (parameter, gradient) in model.0.iter().zip(&gradients).rev() {
                assert_eq!(parameter.read()?.as_bytes().len(), parameter.len_elems() * parameter.dtype().size_bytes());
                sink.write(parameter, gradient)?;
            }
            Ok(())
        };
        {
            let _guard = strategy.no_backward_sync(&model, true).unwrap();
            strategy.backward(&loss, &mut model).unwrap();
        }
        strategy.backward(&loss, &mut model).unwrap();
        let norm =
            strategy.clip_gradients_norm(&model, &mut optimizer, 1.0, NormType::L2, Nonfinite::SkipStep).unwrap();
        strategy.clip_gradients_value(&model, &mut optimizer, 0.5).unwrap();
        strategy.optimizer_step(&mut optimizer).unwrap();
        norms += norm.get(TIMEOUT).unwrap();
        let mut metric = f64::from(counter);
        strategy.all_reduce(&mut metric, None, None).unwrap();
        assert_eq!(metric, f64::from(counter));
    })
}

fn collective_allocations(environment: Environment, barrier: &Together) -> usize {
    let world = World::join(environment, WorldOptions::default()).unwrap();
    let mut communicator = Communicator::new(&world, Default::default()).unwrap();
    let stream = Stream::new("collective").unwrap();
    let arena = Arena::new(&world);
    let len = 10_000 * communicator.world_size() as usize;
    let mut registered = Some(arena.alloc(DType::F32, len).unwrap());
    let mut private = Some(Buffer::zeroed(DType::BF16, len).unwrap());
    let mut slice = vec![1.0_f32; 1000];
    let allocations = allocations_of(barrier, || {
        let work = communicator.all_reduce(registered.take().unwrap(), ReduceOp::Avg, &stream).unwrap();
        let other = communicator.all_reduce(private.take().unwrap(), ReduceOp::Sum, &stream).unwrap();
        registered = Some(work.wait().unwrap());
        private = Some(other.wait().unwrap());
        let work = communicator.reduce_scatter_in_place(registered.take().unwrap(), ReduceOp::Sum, &stream).unwrap();
        let work = communicator.all_gather_in_place(work.wait().unwrap(), &stream).unwrap();
        let work = communicator.broadcast(work.wait().unwrap(), 0, &stream).unwrap();
        registered = Some(work.wait().unwrap());
        communicator.all_reduce_slice(&mut slice, ReduceOp::Max).unwrap();
        communicator.barrier_now().unwrap();
    });
    drop((registered, private, communicator));
    world.teardown(TIMEOUT).unwrap();
    allocations
}

#[test]
fn nothing_allocates_after_setup() {
    // The counter counts.
    let barrier = Together::new(1);
    assert_eq!(allocations_of(&barrier, || drop(std::hint::black_box(Box::new(1)))), STEPS);

    for world_size in [1, 2, 3] {
        let barrier = Together::new(world_size);
        let counts = launch::threads(world_size, |environment| collective_allocations(environment, &barrier)).unwrap();
        assert_eq!(
            counts[0],
            0,
            "collectives on {world_size} ranks; the largest of {} bytes",
            counting::largest_bytes()
        );
    }
    for precision in Precision::ALL {
        let options = |rank| {
            let timeline = Timeline::new(rank, 100_000).unwrap();
            let (first_bucket_bytes, bucket_bytes) = (4 << 10, 20 << 10);
            StrategyOptions { precision, first_bucket_bytes, bucket_bytes, timeline, ..Default::default() }
        };
        let barrier = Together::new(1);
        let single = SingleDevice::setup_environment(Environment::single(), options(0)).unwrap();
        let count = training_allocations(single, &barrier);
        assert_eq!(count, 0, "{precision} on one device; the largest of {} bytes", counting::largest_bytes());
        for world_size in [1, 3] {
            let barrier = Together::new(world_size);
            let counts = launch::threads(world_size, |environment| {
                let options = options(environment.rank);
                training_allocations(Ddp::setup_environment(environment, options).unwrap(), &barrier)
            });
            assert_eq!(
                counts.unwrap()[0],
                0,
                "{precision} on {world_size} ranks; the largest of {} bytes",
                counting::largest_bytes()
            );
        }
    }
}
