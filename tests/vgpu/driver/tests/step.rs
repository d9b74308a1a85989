//! What a whole training step costs the host: it waits for nothing unless the caller reads a number, and once everything has
//! been made neither the driver nor the heap is asked for memory. Eager and captured; batches included.

#[path = "../../../counting/mod.rs"]
mod counting;
#[path = "support/held.rs"]
mod held;
#[path = "support/linger.rs"]
mod linger;
#[path = "support/raw.rs"]
mod raw;
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
use held::{Hold, Streams};
use linger::{linger, release};
use support::on_virtual_gpu;
use together::Together;

const PATIENCE: Duration = Duration::from_secs(60);
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
    let elements: Vec<f32> = (0..len_elems).map(|i| 0.01 * ((i * 3 + number) % 7) as f32 - 0.02).collect();
    Tensor::from_slice(&[1, len_elems], &elements).unwrap()
}

/// Who does not get on while steps are enqueued.
enum Held<'h> {
    /// The compute stream, and with it reductions, which wait for what it fills.
    Compute,
    /// All streams of a strategy, each by itself.
    All(&'h Streams),
    /// The other rank: it enqueues nothing before this one has enqueued all. So the communication stream waits for it.
    Peer(&'h Together),
}

struct Layers(Vec<Parameter>);

impl Module for Layers {
    fn parameters(&self, visit: &mut dyn FnMut(&Parameter)) {
        self.0.iter().for_each(visit);
    }
}

/// A rank in training: its gradients are where a trainer would have left them; the first one's are elements of the batch.
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
        let first = batch.device_view().unwrap().slice(0, sources[0].gradient.len_elems()).unwrap();
        if let Some(captured) = captured {
            sources[0].gradient.copy_from(&first, compute.as_ref().unwrap()).unwrap();
            return strategy.replay_step(captured, optimizer).unwrap();
        }
        let body = &mut |sink: &mut GradSink<'_>| {
            let compute = compute.insert(sink.device_stream().unwrap());
            sources[0].gradient.copy_from(&first, compute)?;
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
        let batches: Vec<Tensor> = (0..STEPS).map(batch).collect();
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

    /// Whole steps while `held` does not get on: every call returns all the same. Their norms.
    fn run_ahead(&mut self, held: &Held<'_>) -> Vec<u64> {
        let compute = self.compute.clone().unwrap();
        let kernels = Kernels::load(compute.device()).unwrap();
        let area = Pinned::zeroed(compute.device(), 24).unwrap();
        let hold = Hold::new(compute.device());
        let event = Event::new(compute.device()).unwrap();
        let batches: Vec<Tensor> = (0..AHEAD).map(batch).collect();
        let is_behind = matches!(held, Held::Peer(_)) && self.strategy.rank() != 0;
        match held {
            Held::Compute => linger(&kernels, &compute, area.address(), PATIENCE),
            Held::All(Streams { compute, copies, communication }) => {
                [compute, copies, communication].into_iter().for_each(|stream| hold.stop(*stream));
            }
            Held::Peer(barrier) if is_behind => drop(barrier.wait()),
            Held::Peer(_) => {}
        }
        let norms: Vec<NormHandle> = batches.into_iter().map(|batch| self.step(batch)).collect();
        compute.record(&event).unwrap();
        if !is_behind {
            // Who reads a number waits for it.
            let early = norms[0].get(Duration::from_millis(50));
            assert!(matches!(early, Err(Error::TimedOut { .. })), "{early:?}");
            assert!(!event.is_complete(), "a step has waited for the device");
        }
        match held {
            Held::Compute => release(&area),
            Held::All(_) => hold.let_go(),
            Held::Peer(barrier) if !is_behind => drop(barrier.wait()),
            Held::Peer(_) => {}
        }
        let norms = norms.iter().map(|norm| norm.get(PATIENCE).unwrap().to_bits()).collect();
        self.strategy.synchronize().unwrap();
        norms
    }

    /// The same steps on a device that gets on. Their norms.
    fn run_beside(&mut self) -> Vec<u64> {
        (0..AHEAD).map(|number| self.step(batch(number)).get(PATIENCE).unwrap().to_bits()).collect()
    }

    /// All weights, as bits.
    fn weights(&self) -> Vec<u32> {
        let widened = |parameter: &Parameter| {
            let mut values = vec![f32::NAN; parameter.len_elems()];
            parameter.read().unwrap().copy_to_f32(&mut values).unwrap();
            values
        };
        self.model.0.iter().flat_map(widened).map(f32::to_bits).collect()
    }
}

/// Names of all calls of the driver so far.
fn calls() -> Vec<String> {
    let text = std::fs::read_to_string(std::env::var("ANNULUS_VGPU_CALLS").unwrap()).unwrap();
    text.lines().map(str::to_owned).collect()
}

/// Norms of steps that are made one after another, or as one of two things is `held` and then the other; and the weights then.
fn train<S: Strategy>(
    strategy: S,
    is_captured: bool,
    held: Option<[Held<'_>; 2]>,
    barrier: &Together,
    what: &str,
) -> ([Vec<u64>; 2], Vec<u32>) {
    let mut trainer = Trainer::new(strategy, is_captured);
    // The host is as far ahead here as it will ever be: more is in use at a time than in the steady state.
    for _ in 0..2 {
        if held.is_some() {
            trainer.run_ahead(&Held::Compute)
        } else {
            trainer.run_beside()
        };
    }
    let (calls, allocations) = trainer.steady(barrier);
    let norms = match held {
        Some(held) => {
            let others: Vec<&String> = calls.iter().filter(|call| !ALLOWED.contains(&call.as_str())).collect();
            assert!(others.is_empty(), "{what}: the driver was also asked for {others:?}");
            assert!(calls.contains(if is_captured { "cuGraphLaunch" } else { "cuLaunchKernel" }), "{what}: {calls:?}");
            let largest_bytes = counting::largest_bytes();
            assert_eq!(allocations, 0, "{what}: allocations on the heap, the largest of {largest_bytes} bytes");
            held.map(|held| trainer.run_ahead(&held))
        }
        None => [(); 2].map(|()| trainer.run_beside()),
    };
    let weights = trainer.weights();
    barrier.wait();
    trainer.strategy.teardown(PATIENCE).unwrap();
    (norms, weights)
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
            let of_one = |is_held: bool| {
                let (streams, barrier) = (Streams::of_the_next_strategy(), Together::new(1));
                let single = SingleDevice::setup_environment(Environment::single(), options(0, precision)).unwrap();
                let held = is_held.then_some([Held::Compute, Held::All(&streams)]);
                train(single, is_captured, held, &barrier, &format!("{precision}, one device"))
            };
            assert_eq!(of_one(true), of_one(false), "{precision}: steps that were held and steps that were not");
            let of_two = |is_held: bool| {
                let barrier = Together::new(2);
                let ranks = launch::threads(2, |environment| {
                    let options = options(environment.rank, precision);
                    let ddp = Ddp::setup_environment(environment, options).unwrap();
                    let held = is_held.then_some([Held::Compute, Held::Peer(&barrier)]);
                    train(ddp, is_captured, held, &barrier, &format!("{precision}, two ranks"))
                });
                ranks.unwrap()
            };
            assert_eq!(of_two(true), of_two(false), "{precision}: ranks that were held and ranks that were not");
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
