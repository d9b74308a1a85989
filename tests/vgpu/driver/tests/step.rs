//! What a whole training step costs the host: it waits for nothing unless the caller reads a number, and once everything has
//! been made neither the driver nor the heap is asked for memory. Eager and captured; batches included.

#[path = "../../../counting/mod.rs"]
mod counting;
#[path = "support/linger.rs"]
mod linger;
mod support;
#[path = "../../../together/mod.rs"]
mod together;

use std::collections::BTreeSet;
use std::time::Duration;

use annulus::device::cuda::{Buffer, Driver, Event, Kernels, Pinned, Priority, Stream};
use annulus::strategy::{
    Accelerator, AdamW, CapturedStep, Ddp, GradSink, GradientSource, Init, Module, Nonfinite, NormHandle, Optimizer,
    Parameter, Precision, SingleDevice, StepClip, Strategy, StrategyOptions, Tensor,
};
use annulus::telemetry::Timeline;
use annulus::world::{Environment, launch};
use annulus::{DType, Error, NormType};
use support::on_virtual_gpu;
use together::Together;

const PATIENCE: Duration = Duration::from_secs(60);
const WARM_UP: usize = 6;
const STEPS: usize = 8;
/// Steps that are enqueued on a device that does not get on.
const AHEAD: usize = 3;

/// What a step in its steady state may ask of the driver: to enqueue, and to look.
const ALLOWED: &[&str] = &[
    "cuCtxSetCurrent",
    "cuEventElapsedTime",
    "cuEventQuery",
    "cuEventRecord",
    "cuGraphLaunch",
    "cuLaunchKernel",
    "cuMemcpyDtoDAsync_v2",
    "cuMemcpyHtoDAsync_v2",
    "cuMemsetD8Async",
    "cuStreamWaitEvent",
];

/// Of 90 to 100 elements, which share blocks of memory.
fn batch(number: usize) -> Tensor {
    let len_elems = 90 + number % 10;
    Tensor::from_slice(&[1, len_elems], &vec![1.0f32; len_elems]).unwrap()
}

struct Layers(Vec<Parameter>);

impl Module for Layers {
    fn parameters(&self, visit: &mut dyn FnMut(&Parameter)) {
        self.0.iter().for_each(visit);
    }
}

/// A rank in training: its gradients are where a trainer would have left them.
struct Trainer<S: Strategy> {
    strategy: S,
    model: Layers,
    optimizer: Optimizer,
    sources: Vec<GradientSource>,
    captured: Option<CapturedStep>,
    clip: StepClip,
    /// The stream that steps are enqueued on, once one was.
    compute: Option<Stream>,
}

impl<S: Strategy> Trainer<S> {
    fn new(mut strategy: S, is_captured: bool) -> Self {
        let init = strategy.module_init_context(Init::Default);
        let layers = (0..4).map(|i| init.parameter(&format!("layer{i}"), &[10, 5 + i], |w| w.fill(0.5)).unwrap());
        let model = Layers(layers.collect());
        let (model, optimizer) = strategy.setup_module_and_optimizers(model, AdamW::new(1e-3)).unwrap();
        let device = Driver::open().unwrap().device(strategy.local_rank()).unwrap();
        let source = |parameter: &Parameter| {
            let gradient = Buffer::filled(&device, &vec![0.01f32; parameter.len_elems()]).unwrap();
            GradientSource { parameter: parameter.clone(), gradient: gradient.view() }
        };
        let sources: Vec<GradientSource> = model.0.iter().map(source).collect();
        let clip = StepClip { max_norm: 0.05, norm_type: NormType::L2, nonfinite: Nonfinite::SkipStep };
        let mut trainer = Trainer { strategy, model, optimizer, sources, captured: None, clip, compute: None };
        trainer.step(batch(1)).get(PATIENCE).unwrap();
        if is_captured {
            let Trainer { strategy, model, optimizer, sources, captured, .. } = &mut trainer;
            *captured = Some(strategy.capture_step(model, optimizer, sources, clip).unwrap());
        }
        trainer
    }

    /// All that happens in a step: a batch, two micro-batches, reductions, clipping, the optimizer and the loss scale.
    fn step(&mut self, batch: Tensor) -> NormHandle {
        let Trainer { strategy, model, optimizer, sources, captured, clip, compute } = self;
        let batch = strategy.batch_to_device(batch).unwrap();
        assert!(batch.device_view().is_some());
        if let Some(captured) = captured {
            return strategy.replay_step(captured, optimizer).unwrap();
        }
        let body = &mut |sink: &mut GradSink<'_>| {
            *compute = sink.device_stream();
            sources.iter().rev().try_for_each(|s| sink.write_device(&s.parameter, &s.gradient, None))
        };
        {
            let _guard = strategy.no_backward_sync(model, true).unwrap();
            strategy.run_backward(model, body).unwrap();
        }
        strategy.run_backward(model, body).unwrap();
        let StepClip { max_norm, norm_type, nonfinite } = *clip;
        let norm = strategy.clip_gradients_norm(model, optimizer, max_norm, norm_type, nonfinite).unwrap();
        strategy.clip_gradients_value(model, optimizer, 0.5).unwrap();
        strategy.optimizer_step(optimizer).unwrap();
        norm
    }

    /// Steps in their steady state; what the driver was asked for meanwhile, and how often the heap. The caller reads a number
    /// behind each step: so the device is never further behind than in training that logs one.
    fn steady(&mut self, barrier: &Together) -> (BTreeSet<String>, usize) {
        let mut batches: Vec<Tensor> = (0..WARM_UP + STEPS).map(batch).collect();
        for batch in batches.split_off(STEPS) {
            self.step(batch).get(PATIENCE).unwrap();
        }
        self.strategy.synchronize().unwrap();
        barrier.wait();
        let calls_before = calls().len();
        if barrier.wait() {
            counting::start();
        }
        barrier.wait();
        for batch in batches {
            let norm = self.step(batch);
            assert!(norm.get(PATIENCE).unwrap() > 0.0);
        }
        barrier.wait();
        counting::stop();
        barrier.wait();
        let calls = calls().split_off(calls_before).into_iter().collect();
        barrier.wait();
        (calls, counting::allocations())
    }

    /// Whole steps on a device that does not get on: every call returns all the same.
    fn run_ahead(&mut self) {
        let compute = self.compute.clone().unwrap();
        let kernels = Kernels::load(compute.device()).unwrap();
        let area = Pinned::zeroed(compute.device(), 24).unwrap();
        let event = Event::new(compute.device()).unwrap();
        let batches: Vec<Tensor> = (0..AHEAD).map(batch).collect();
        linger::linger(&kernels, &compute, area.address(), PATIENCE);
        compute.record(&event).unwrap();
        let norms: Vec<NormHandle> = batches.into_iter().map(|batch| self.step(batch)).collect();
        assert!(!event.is_complete(), "a step has waited for the device");
        // Who reads a number waits for it.
        let early = norms[0].get(Duration::from_millis(50));
        assert!(matches!(early, Err(Error::TimedOut { .. })), "{early:?}");
        linger::release(&area);
        assert!(norms[AHEAD - 1].get(PATIENCE).unwrap() > 0.0);
        self.strategy.synchronize().unwrap();
    }
}

/// Names of all calls of the driver so far.
fn calls() -> Vec<String> {
    let text = std::fs::read_to_string(std::env::var("ANNULUS_VGPU_CALLS").unwrap()).unwrap();
    text.lines().map(str::to_owned).collect()
}

fn check<S: Strategy>(strategy: S, is_captured: bool, barrier: &Together, what: &str) {
    let mut trainer = Trainer::new(strategy, is_captured);
    let (calls, allocations) = trainer.steady(barrier);
    let others: Vec<&String> = calls.iter().filter(|call| !ALLOWED.contains(&call.as_str())).collect();
    assert!(others.is_empty(), "{what}: the driver was also asked for {others:?}");
    assert!(calls.contains(if is_captured { "cuGraphLaunch" } else { "cuLaunchKernel" }), "{what}: {calls:?}");
    assert_eq!(allocations, 0, "{what}: allocations on the heap, the largest of {} bytes", counting::largest_bytes());
    trainer.run_ahead();
    barrier.wait();
    trainer.strategy.teardown(PATIENCE).unwrap();
}

fn options(rank: u32, precision: Precision) -> StrategyOptions {
    let timeline = Timeline::new(rank, 100_000).unwrap();
    let (first_bucket_bytes, bucket_bytes, accelerator) = (64, 512, Accelerator::Cuda(None));
    let mut options =
        StrategyOptions { accelerator, precision, first_bucket_bytes, bucket_bytes, timeline, ..Default::default() };
    options.world.timeout = PATIENCE;
    options.world.heartbeat_limit = None;
    options
}

fn on_devices(test: &str, is_captured: bool) {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("calls");
    let variables = [("ANNULUS_VGPU_DEVICES", "2"), ("ANNULUS_VGPU_CALLS", file.to_str().unwrap())];
    on_virtual_gpu(test, &variables, || {
        for precision in [Precision::F32True, Precision::F16Mixed] {
            let single = SingleDevice::setup_environment(Environment::single(), options(0, precision)).unwrap();
            check(single, is_captured, &Together::new(1), &format!("{precision}, one device"));
            let barrier = Together::new(2);
            launch::threads(2, |environment| {
                let options = options(environment.rank, precision);
                let ddp = Ddp::setup_environment(environment, options).unwrap();
                check(ddp, is_captured, &barrier, &format!("{precision}, two ranks"));
            })
            .unwrap();
        }
    });
}

#[test]
fn an_eager_step_neither_waits_nor_allocates() {
    on_devices("an_eager_step_neither_waits_nor_allocates", false);
}

#[test]
fn a_replayed_step_neither_waits_nor_allocates() {
    on_devices("a_replayed_step_neither_waits_nor_allocates", true);
}

/// Every bucket and phase of steps on two ranks: in the timeline as the device took its time for it, and as a range in which a
/// profiler sees it enqueued.
#[test]
fn every_bucket_and_phase_is_in_the_timeline_and_a_range_of_a_profiler() {
    let folder = tempfile::tempdir().unwrap();
    let (log, injection) = (folder.path().join("nvtx"), support::library("annulus_vgpu_nvml"));
    let variables = [
        ("ANNULUS_VGPU_DEVICES", "2"),
        ("ANNULUS_VGPU_NVTX_LOG", log.to_str().unwrap()),
        ("NVTX_INJECTION64_PATH", injection.to_str().unwrap()),
    ];
    on_virtual_gpu("every_bucket_and_phase_is_in_the_timeline_and_a_range_of_a_profiler", &variables, || {
        let spans = launch::threads(2, |environment| {
            let options = options(environment.rank, Precision::F32True);
            let timeline = options.timeline.clone();
            let mut trainer = Trainer::new(Ddp::setup_environment(environment, options).unwrap(), true);
            trainer.step(batch(0)).get(PATIENCE).unwrap();
            trainer.strategy.synchronize().unwrap();
            let mut json = Vec::new();
            timeline.write_json(&mut json).unwrap();
            trainer.strategy.teardown(PATIENCE).unwrap();
            String::from_utf8(json).unwrap()
        });
        let heard = std::fs::read_to_string(std::env::var("ANNULUS_VGPU_NVTX_LOG").unwrap()).unwrap();
        let ranges: BTreeSet<&str> = heard.lines().filter_map(|line| line.trim().strip_prefix("push ")).collect();
        // One eager step, whose four tensors of 200 to 320 bytes are three buckets, and one that is replayed.
        let phases = ["wait for reduction 0", "norm 0", "optimizer step 0", "captured step 1"];
        let buckets = (0..3).map(|bucket| format!("all_reduce {bucket}"));
        for part in phases.iter().map(|phase| (*phase).to_owned()).chain(buckets) {
            assert!(ranges.contains(part.as_str()), "{part}: {ranges:?}");
            let (name, index) = part.rsplit_once(' ').unwrap();
            for spans in spans.as_ref().unwrap() {
                let events: serde_json::Value = serde_json::from_str(spans).unwrap();
                let events = events["traceEvents"].as_array().unwrap();
                let is_it = |event: &&serde_json::Value| {
                    event["ph"] == "X" && event["name"] == name && event["args"]["index"].as_u64() == index.parse().ok()
                };
                assert!(events.iter().any(|event| is_it(&event)), "{part}: {spans}");
            }
        }
        assert!(ranges.contains("batch to device 0") && ranges.iter().any(|range| range.starts_with("backward ")));
    });
}

/// The counters count: what a step must not do is seen when the caller does it.
#[test]
fn what_is_counted_is_seen() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("calls");
    on_virtual_gpu("what_is_counted_is_seen", &[("ANNULUS_VGPU_CALLS", file.to_str().unwrap())], || {
        counting::start();
        let device = Driver::open().unwrap().device(0).unwrap();
        let stream = Stream::new(&device, "test", Priority::Normal).unwrap();
        let buffer = Buffer::zeroed(&device, DType::F32, 4).unwrap();
        buffer.read::<f32>(&stream, PATIENCE).unwrap();
        drop(buffer);
        counting::stop();
        let calls = calls();
        for call in ["cuMemAlloc_v2", "cuStreamQuery", "cuMemcpyDtoHAsync_v2", "cuMemFree_v2"] {
            assert!(calls.iter().any(|one| one == call) && !ALLOWED.contains(&call), "{call}: {calls:?}");
        }
        assert!(counting::allocations() > 0);
    });
}
