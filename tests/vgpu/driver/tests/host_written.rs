//! What a step waits for whose gradients and batches come from the host. They go by way of pinned blocks, eight of each kind:
//! while eight copies are in flight, the next one waits until the first has run. A gradient is copied on the compute stream,
//! behind all steps before it; a batch on a stream of its own. Nothing else is waited for, and nothing is allocated any more
//! once eight have been in flight.

#[path = "../../../counting/mod.rs"]
mod counting;
#[path = "support/held.rs"]
mod held;
#[path = "support/raw.rs"]
mod raw;
mod support;
#[allow(dead_code, reason = "for the counter alone")]
#[path = "../../../together/mod.rs"]
mod together;

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use annulus::NormType;
use annulus::device::cuda::Driver;
use annulus::strategy::{
    Accelerator, AdamW, GradSink, Init, Module, Nonfinite, NormHandle, Optimizer, Parameter, SingleDevice, Strategy,
    StrategyOptions, Tensor,
};
use annulus::world::Environment;
use held::{Hold, Streams};
use support::on_virtual_gpu;

const PATIENCE: Duration = Duration::from_secs(60);
/// In flight before the next copy waits.
const IN_FLIGHT: usize = 8;
const LAYERS: usize = 3;
const LEN_ELEMS: usize = 50;
/// Long enough for a host that does not wait to get on.
const A_WHILE: Duration = Duration::from_millis(300);

/// What enqueues, and looks.
const ENQUEUE: &[&str] = &[
    "cuCtxSetCurrent",
    "cuEventElapsedTime",
    "cuEventQuery",
    "cuEventRecord",
    "cuLaunchKernel",
    "cuMemcpyHtoDAsync_v2",
    "cuStreamWaitEvent",
];

struct Layers(Vec<Parameter>);

impl Module for Layers {
    fn parameters(&self, visit: &mut dyn FnMut(&Parameter)) {
        self.0.iter().for_each(visit);
    }
}

struct Trainer {
    strategy: SingleDevice,
    model: Layers,
    optimizer: Optimizer,
    streams: Streams,
}

impl Trainer {
    fn new() -> Trainer {
        let streams = Streams::of_the_next_strategy();
        let mut options = StrategyOptions { accelerator: Accelerator::Cuda(None), ..StrategyOptions::default() };
        options.world.heartbeat_limit = None;
        let mut strategy = SingleDevice::setup_environment(Environment::single(), options).unwrap();
        let init = strategy.module_init_context(Init::Default);
        let layer = |i: usize| init.parameter(&format!("layer{i}"), &[LEN_ELEMS], |w| w.fill(0.5)).unwrap();
        let (model, optimizer) =
            strategy.setup_module_and_optimizers(Layers((0..LAYERS).map(layer).collect()), AdamW::new(1e-3)).unwrap();
        Trainer { strategy, model, optimizer, streams }
    }

    /// A step whose gradients the host writes; each is counted when it was taken.
    fn step(&mut self, written: &AtomicUsize) -> NormHandle {
        let Trainer { strategy, model, optimizer, .. } = self;
        let body = &mut |sink: &mut GradSink<'_>| {
            model.0.iter().rev().try_for_each(|parameter| {
                sink.write(parameter, &[0.01f32; LEN_ELEMS])?;
                written.fetch_add(1, Ordering::SeqCst);
                Ok(())
            })
        };
        strategy.run_backward(model, body).unwrap();
        let norm = strategy.clip_gradients_norm(model, optimizer, 0.05, NormType::L2, Nonfinite::SkipStep).unwrap();
        strategy.optimizer_step(optimizer).unwrap();
        norm
    }

    fn move_batch(&mut self, batch: Tensor, moved: &AtomicUsize) {
        assert!(self.strategy.batch_to_device(batch).unwrap().device_view().is_some());
        moved.fetch_add(1, Ordering::SeqCst);
    }

    /// Has `copy` called until it waits, as `stream` is held, and then lets go. Calls of the driver up to there, and in the wait.
    fn until_it_waits(
        &mut self,
        stream: fn(&Streams) -> u64,
        mut copy: impl FnMut(&mut Trainer, &AtomicUsize),
    ) -> [Vec<String>; 2] {
        self.strategy.synchronize().unwrap();
        let hold = Hold::new(&Driver::open().unwrap().device(0).unwrap());
        hold.stop(stream(&self.streams));
        let (copied, start) = (AtomicUsize::new(0), calls().len());
        let times = std::thread::scope(|scope| {
            let watch = scope.spawn(|| {
                let begun = Instant::now();
                while copied.load(Ordering::SeqCst) < IN_FLIGHT && begun.elapsed() < PATIENCE / 2 {
                    std::thread::sleep(Duration::from_millis(1));
                }
                std::thread::sleep(A_WHILE);
                let waits = calls().len();
                std::thread::sleep(A_WHILE);
                let times = (copied.load(Ordering::SeqCst), waits, calls().len());
                hold.let_go();
                times
            });
            while copied.load(Ordering::SeqCst) <= IN_FLIGHT {
                copy(self, &copied);
            }
            watch.join().unwrap()
        });
        self.strategy.synchronize().unwrap();
        let (in_flight, waits, end) = times;
        assert_eq!(in_flight, IN_FLIGHT, "copies before one waited");
        let calls = calls();
        [&calls[start..waits], &calls[waits..end]].map(<[String]>::to_vec)
    }
}

/// Names of all calls of the driver so far.
fn calls() -> Vec<String> {
    let text = std::fs::read_to_string(std::env::var("ANNULUS_VGPU_CALLS").unwrap()).unwrap();
    text.lines().map(str::to_owned).collect()
}

fn batch() -> Tensor {
    Tensor::from_slice(&[LEN_ELEMS], &[1.0f32; LEN_ELEMS]).unwrap()
}

/// A step without a batch.
fn step(trainer: &mut Trainer, written: &AtomicUsize) {
    trainer.step(written);
}

/// A batch without a step.
fn copy(trainer: &mut Trainer, moved: &AtomicUsize) {
    trainer.move_batch(batch(), moved);
}

fn only_enqueues(calls: &[String]) {
    let others: BTreeSet<&String> = calls.iter().filter(|call| !ENQUEUE.contains(&call.as_str())).collect();
    assert!(others.is_empty(), "also {others:?}");
}

/// A ninth copy waits by asking for an event; before it nothing does.
fn check([before, waiting]: [Vec<String>; 2]) {
    only_enqueues(&before);
    assert_eq!(BTreeSet::from_iter(&waiting), BTreeSet::from([&"cuEventQuery".to_owned()]));
}

fn with_calls(test: &str, body: impl FnOnce()) {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("calls");
    on_virtual_gpu(test, &[("ANNULUS_VGPU_CALLS", file.to_str().unwrap())], body);
}

/// The third one of the third step: steps that write three each are not yet three ahead.
#[test]
fn the_ninth_gradient_in_flight_waits_for_the_first() {
    with_calls("the_ninth_gradient_in_flight_waits_for_the_first", || {
        let mut trainer = Trainer::new();
        // The first time blocks are allocated.
        let _ = trainer.until_it_waits(|streams| streams.compute, step);
        check(trainer.until_it_waits(|streams| streams.compute, step));
    });
}

#[test]
fn the_ninth_batch_in_flight_waits_for_the_first() {
    with_calls("the_ninth_batch_in_flight_waits_for_the_first", || {
        let mut trainer = Trainer::new();
        let _ = trainer.until_it_waits(|streams| streams.copies, copy);
        check(trainer.until_it_waits(|streams| streams.copies, copy));
    });
}

/// Where the device keeps up, once eight of each kind have been in flight: nothing is waited for, and nothing allocated.
#[test]
fn a_step_on_a_device_that_keeps_up_only_enqueues() {
    with_calls("a_step_on_a_device_that_keeps_up_only_enqueues", || {
        let mut trainer = Trainer::new();
        let _ = trainer.until_it_waits(|streams| streams.compute, step);
        let _ = trainer.until_it_waits(|streams| streams.copies, copy);
        let (start, batches) = (calls().len(), [(); 6].map(|()| batch()));
        counting::start();
        let count = AtomicUsize::new(0);
        for batch in batches {
            trainer.move_batch(batch, &count);
            assert!(trainer.step(&count).get(PATIENCE).unwrap() > 0.0);
        }
        counting::stop();
        only_enqueues(&calls()[start..]);
        assert_eq!(counting::allocations(), 0, "on the heap, the largest of {} bytes", counting::largest_bytes());
    });
}
