//! Every event that a training step waits for is needed, and its absence is noticed: a step is made again and again, each time
//! with a driver that forgets the next of its waits, and each time the driver must tell of a race. Eager, and in a graph.

#[path = "support/linger.rs"]
mod linger;
mod support;
#[path = "../../../together/mod.rs"]
mod together;

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use annulus::device::cuda::{Buffer, Driver, Kernels, Pinned, Pool, Priority, Stream, View};
use annulus::strategy::{
    Accelerator, AdamW, Ddp, GradSink, GradientSource, Init, Module, Nonfinite, Optimizer, Parameter, StepClip,
    Strategy, StrategyOptions, Tensor,
};
use annulus::world::{Environment, launch};
use annulus::{DType, NormType};
use linger::{linger, release};
use together::Together;

/// Set in the process that runs a test: where the file is that names a wait.
const WAIT: &str = "ANNULUS_VGPU_DROP_WAIT";
const PATIENCE: Duration = Duration::from_secs(60);
const CLIP: StepClip = StepClip { max_norm: 0.05, norm_type: NormType::L2, nonfinite: Nonfinite::SkipStep };

struct Layers(Vec<Parameter>);

impl Module for Layers {
    fn parameters(&self, visit: &mut dyn FnMut(&Parameter)) {
        self.0.iter().for_each(visit);
    }
}

/// A rank in training, whose gradients come from its batch.
struct Trainer {
    strategy: Ddp,
    model: Layers,
    optimizer: Optimizer,
    sources: Vec<GradientSource>,
    /// Kept, so that every batch gets new memory: memory that a batch had before is waited for, if the host does not know that it
    /// is free.
    batches: Vec<Tensor>,
}

impl Trainer {
    fn new(environment: Environment) -> Trainer {
        let (first_bucket_bytes, bucket_bytes, accelerator) = (64, 512, Accelerator::Cuda(None));
        let mut options =
            StrategyOptions { accelerator, first_bucket_bytes, bucket_bytes, ..StrategyOptions::default() };
        options.world.timeout = PATIENCE;
        options.world.heartbeat_limit = None;
        let mut strategy = Ddp::setup_environment(environment, options).unwrap();
        let init = strategy.module_init_context(Init::Default);
        let layers = (0..4).map(|i| init.parameter(&format!("layer{i}"), &[10, 5 + i], |w| w.fill(0.5)).unwrap());
        let model = Layers(layers.collect());
        let (model, optimizer) = strategy.setup_module_and_optimizers(model, AdamW::new(1e-3)).unwrap();
        let device = Driver::open().unwrap().device(strategy.local_rank()).unwrap();
        let source = |parameter: &Parameter| {
            let gradient = Buffer::zeroed(&device, DType::F32, parameter.len_elems()).unwrap();
            GradientSource { parameter: parameter.clone(), gradient: gradient.view() }
        };
        let sources = model.0.iter().map(source).collect();
        let mut trainer = Trainer { strategy, model, optimizer, sources, batches: Vec::new() };
        for _ in 0..2 {
            trainer.step();
        }
        trainer
    }

    /// Two micro-batches, of which the second is reduced, a norm, and the optimizer's step; then the host knows of everything.
    fn step(&mut self) {
        let Trainer { strategy, model, optimizer, sources, batches } = self;
        // Of two ranks that do not add up their gradients, the weights go different ways.
        let batch = Tensor::from_slice(&[100], &[if strategy.rank() == 0 { 0.01f32 } else { -0.02 }; 100]).unwrap();
        let batch = strategy.batch_to_device(batch).unwrap();
        let input = batch.device_view().unwrap();
        let body = &mut |sink: &mut GradSink<'_>| {
            let compute = sink.device_stream().unwrap();
            sources.iter().rev().try_for_each(|source| {
                source.gradient.copy_from(&input.slice(0, source.gradient.len_elems())?, &compute)?;
                sink.write_device(&source.parameter, &source.gradient, None)
            })
        };
        {
            let _guard = strategy.no_backward_sync(model, true).unwrap();
            strategy.run_backward(model, body).unwrap();
        }
        strategy.run_backward(model, body).unwrap();
        let StepClip { max_norm, norm_type, nonfinite } = CLIP;
        strategy.clip_gradients_norm(model, optimizer, max_norm, norm_type, nonfinite).unwrap();
        strategy.optimizer_step(optimizer).unwrap();
        strategy.synchronize().unwrap();
        batches.push(batch);
    }

    /// A step as a graph, once; the weights then.
    fn captured_step(&mut self) -> annulus::Result<Vec<u32>> {
        let Trainer { strategy, model, optimizer, sources, .. } = self;
        let mut captured = strategy.capture_step(model, optimizer, sources, CLIP)?;
        strategy.replay_step(&mut captured, optimizer)?;
        strategy.synchronize()?;
        let mut bits = Vec::new();
        model.parameters(&mut |parameter| {
            let mut weights = vec![f32::NAN; parameter.len_elems()];
            parameter.read().unwrap().copy_to_f32(&mut weights).unwrap();
            bits.extend(weights.iter().map(|weight| weight.to_bits()));
        });
        Ok(bits)
    }
}

fn file() -> PathBuf {
    std::env::var_os(WAIT).unwrap().into()
}

/// Runs this test in a process with the driver, which tells of races and goes on or ends; what it says.
fn run(test: &str, races: &str, variables: &[(&str, String)]) -> String {
    let folder = tempfile::tempdir().unwrap();
    let library = support::library("annulus_vgpu_driver");
    std::os::unix::fs::symlink(library, folder.path().join("libcuda.so")).unwrap();
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args([test, "--exact", "--nocapture", "--quiet", "--test-threads=1"]);
    command.env("LD_LIBRARY_PATH", folder.path()).env(WAIT, folder.path().join("wait"));
    command.env("ANNULUS_VGPU_DEVICES", "2").env("ANNULUS_VGPU_RACES", races).envs(variables.iter().cloned());
    let output = command.output().unwrap();
    String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned()
}

/// Begins what is said of a step that lacks a wait of rank 0.
const STEP: &str = "== a step without wait ";
/// Ends what is said: there was no such wait.
const END: &str = "== all waits were there";

#[test]
fn every_wait_of_a_step_is_needed() {
    if std::env::var_os(WAIT).is_none() {
        let text = run("every_wait_of_a_step_is_needed", "tell", &[]);
        let (told, _) = text.split_once(END).unwrap_or_else(|| panic!("{text}"));
        let mut steps: Vec<&str> = told.split(STEP).skip(1).collect();
        let whole = steps.pop().unwrap();
        assert!(!whole.contains("race at") && text.contains("1 passed"), "nothing was forgotten:\n{text}");
        // The batch, three buckets, and the compute stream behind all of them.
        assert_eq!(steps.len(), 5, "{text}");
        for step in &steps {
            assert!(step.contains("race at"), "{step}\nof\n{text}");
        }
        for (step, [later, earlier]) in steps.iter().zip([
            ["a copy reads", "a copy writes"],
            ["collective_f32", "accumulate_tensors writes"],
            ["collective_f32", "accumulate_tensors writes"],
            ["collective_f32", "accumulate_tensors writes"],
            ["measure_norm reads", "collective_f32 writes"],
        ]) {
            assert!(step.contains(later) && step.contains(earlier), "{later} and {earlier}:\n{step}");
        }
        return;
    }
    let (barrier, file) = (Together::new(2), file());
    launch::threads(2, |environment| {
        let is_first = environment.rank == 0;
        let mut trainer = Trainer::new(environment);
        for wait in 1.. {
            barrier.wait();
            if is_first {
                eprintln!("{STEP}{wait}");
                std::fs::write(&file, format!("0 {wait}")).unwrap();
            }
            barrier.wait();
            trainer.step();
            barrier.wait();
            if file.exists() {
                break;
            }
        }
        if is_first {
            eprintln!("{END}");
        }
        barrier.wait();
        trainer.strategy.teardown(PATIENCE).unwrap();
    })
    .unwrap();
}

/// Which wait a process forgets.
const NUMBER: &str = "ANNULUS_VGPU_TEST_WAIT";
/// How it ends where no race is told.
const NO_GRAPH: &str = "no graph:";
const APART: &str = "the ranks' weights differ";
const NOTHING: &str = "nothing was noticed";

/// To capture a step is to make one for real first, whose waits come first.
#[test]
fn every_edge_of_a_captured_step_is_needed() {
    const TEST: &str = "every_edge_of_a_captured_step_is_needed";
    let Ok(number) = std::env::var(NUMBER) else {
        let races = "race at";
        let expected = [
            &[races; 3] as &[&str],
            &[NOTHING], // the compute stream behind the reductions, for which the host waits next
            &[APART],   // takes the communication stream into the capture: without it that reduction is in no graph
            &[races; 2],
            &[NO_GRAPH], // and back
            // Around the launch of a graph: behind and before eager reductions, of which there are none.
            &[NOTHING; 3],
            &[END],
        ];
        for (wait, expected) in (1..).zip(expected.concat()) {
            let text = run(TEST, "end", &[(NUMBER, wait.to_string())]);
            assert!(text.contains(expected), "without wait {wait}, not {expected}:\n{text}");
        }
        return;
    };
    let (barrier, file) = (Together::new(2), file());
    let weights = launch::threads(2, |environment| {
        let is_first = environment.rank == 0;
        let mut trainer = Trainer::new(environment);
        barrier.wait();
        if is_first {
            std::fs::write(&file, format!("0 {number}")).unwrap();
        }
        barrier.wait();
        let weights = trainer.captured_step().unwrap_or_else(|error| {
            eprintln!("{NO_GRAPH} {error}");
            std::process::exit(1) // the other rank would wait
        });
        barrier.wait();
        trainer.strategy.teardown(PATIENCE).unwrap();
        weights
    })
    .unwrap();
    let outcome = match weights[0] == weights[1] {
        _ if file.exists() => END,
        true => NOTHING,
        false => APART,
    };
    eprintln!("{outcome}");
}

/// A block of a pool that the device still uses is written anew behind that: here it does for certain, as a kernel is in the way.
#[test]
fn the_wait_for_memory_that_was_used_before_is_needed() {
    const TEST: &str = "the_wait_for_memory_that_was_used_before_is_needed";
    let Ok(number) = std::env::var(NUMBER) else {
        let told = run(TEST, "end", &[(NUMBER, "1".to_owned())]);
        assert!(told.contains("race at") && told.contains("a fill writes"), "{told}");
        let whole = run(TEST, "end", &[(NUMBER, "2".to_owned())]);
        return assert!(whole.contains("1 passed") && whole.contains(END), "{whole}");
    };
    let device = Driver::open().unwrap().device(0).unwrap();
    let [user, writer] = ["user", "writer"].map(|name| Stream::new(&device, name, Priority::Normal).unwrap());
    let (kernels, area) = (Kernels::load(&device).unwrap(), Pinned::zeroed(&device, 24).unwrap());
    let pool = Pool::new(&device);
    let take = || pool.take(DType::U8, 256, &user, &writer).unwrap().view();
    let blocks = [take(), take()];
    linger(&kernels, &user, area.address(), PATIENCE);
    blocks.iter().for_each(|block| block.zero(&user).unwrap());
    let before = blocks.each_ref().map(View::address);
    drop(blocks);
    std::fs::write(file(), format!("0 {number}")).unwrap();
    let again = take();
    assert!(before.contains(&again.address()), "a block of before");
    again.zero(&writer).unwrap();
    release(&area);
    user.synchronize(PATIENCE).unwrap();
    writer.synchronize(PATIENCE).unwrap();
    if file().exists() {
        eprintln!("{END}");
    }
}
