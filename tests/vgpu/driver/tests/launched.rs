//! `annulus launch` with a device each, as models are trained: two processes, eager and as a graph, to the bits of the host.

#[allow(dead_code, reason = "a part of it is enough")]
#[path = "../../../strategy/model.rs"]
mod model;
mod support;

use std::process::Command;

use annulus::NormType;
use annulus::device::cuda::{Buffer, Driver, Priority, Stream, View};
use annulus::strategy::{
    Accelerator, AdamW, Ddp, GradSink, GradientSource, Module, Nonfinite, Parameter, StepClip, Strategy,
    StrategyOptions,
};
use annulus::world::{Environment, Launcher};
use model::{Loss, Mlp, TIMEOUT, bits, ddp, samples, widened};
use support::{as_peer, in_role, library, on_virtual_gpu, say};

const STEPS: usize = 4;
const CLIP: StepClip = StepClip { max_norm: 0.5, norm_type: NormType::L2, nonfinite: Nonfinite::SkipStep };

/// Where gradients are when the strategy gets them, and how the step is made.
#[derive(Clone, Copy, PartialEq)]
enum How {
    /// In memory of the host.
    Written,
    /// In memory of the device.
    OnDevice,
    /// As before, and the whole step is a graph.
    Captured,
}

/// Weights and norms, as bits.
type Outcome = (Vec<u32>, Vec<u64>);

fn on(accelerator: Accelerator) -> StrategyOptions {
    let mut options = StrategyOptions { accelerator, ..model::options() };
    // Interpreted kernels keep the cores busy, and the monitors with them from beating.
    options.world.heartbeat_limit = None;
    options
}

/// A step with a backward of its own: half of the samples on each rank.
fn mlp(strategy: &mut Box<dyn Strategy>) -> Outcome {
    let data = samples(8);
    let mine = &data[4 * strategy.rank() as usize..][..4];
    let mut model = Mlp::set_up(strategy);
    let mut optimizer = strategy.setup_optimizer(&model, AdamW::new(1e-2).into()).unwrap();
    let mut norms = Vec::new();
    for _ in 0..STEPS {
        strategy.backward(&Loss::of(mine), &mut model).unwrap();
        let norm = strategy.clip_gradients_norm(&model, &mut optimizer, 0.05, NormType::L2, Nonfinite::SkipStep);
        strategy.optimizer_step(&mut optimizer).unwrap();
        norms.push(norm.unwrap().get(TIMEOUT).unwrap().to_bits());
    }
    (bits(&model.weights()), norms)
}

/// What a rank hands over in a step. The weights are in it, so that one wrong step makes all that follow wrong.
fn gradient(parameter: &Parameter, step: usize, rank: usize) -> Vec<f32> {
    let value = |(i, weight): (usize, &f32)| ((i * 7 + step + 3 * rank) % 11) as f32 - 5.0 + 0.5 * weight;
    widened(parameter).iter().enumerate().map(value).collect()
}

/// Steps with the gradients that [`gradient`] makes.
fn made_up(strategy: &mut Box<dyn Strategy>, how: How) -> Outcome {
    let model = Mlp::set_up(strategy);
    let mut optimizer = strategy.setup_optimizer(&model, AdamW::new(1e-2).into()).unwrap();
    let mut parameters: Vec<Parameter> = Vec::new();
    model.parameters(&mut |parameter| parameters.push(parameter.clone()));
    let rank = strategy.rank() as usize;
    let (stream, mut buffers) = if how == How::Written { (None, Vec::new()) } else { memory(strategy, &parameters) };
    let views: Vec<View> = buffers.iter().map(Buffer::view).collect();
    let source = |(parameter, view): (&Parameter, &View)| GradientSource {
        parameter: parameter.clone(),
        gradient: view.clone(),
    };
    let sources: Vec<GradientSource> = parameters.iter().zip(&views).map(source).collect();
    let mut graph =
        (how == How::Captured).then(|| strategy.capture_step(&model, &mut optimizer, &sources, CLIP).unwrap());
    let mut norms = Vec::new();
    for step in 0..STEPS {
        let gradients: Vec<Vec<f32>> = parameters.iter().map(|parameter| gradient(parameter, step, rank)).collect();
        if let Some(stream) = &stream {
            buffers.iter_mut().zip(&gradients).for_each(|(buffer, elements)| buffer.write(elements, stream).unwrap());
            stream.synchronize(TIMEOUT).unwrap();
        }
        let norm = match &mut graph {
            Some(graph) => strategy.replay_step(graph, &mut optimizer).unwrap(),
            None => {
                let body = &mut |sink: &mut GradSink<'_>| {
                    parameters.iter().enumerate().rev().try_for_each(|(at, parameter)| match views.get(at) {
                        Some(view) => sink.write_device(parameter, view, None),
                        None => sink.write(parameter, &gradients[at]),
                    })
                };
                strategy.run_backward(&model, body).unwrap();
                let StepClip { max_norm, norm_type, nonfinite } = CLIP;
                let norm = strategy.clip_gradients_norm(&model, &mut optimizer, max_norm, norm_type, nonfinite);
                strategy.optimizer_step(&mut optimizer).unwrap();
                norm.unwrap()
            }
        };
        norms.push(norm.get(TIMEOUT).unwrap().to_bits());
        // Not before the step has read what is written over next.
        strategy.synchronize().unwrap();
    }
    (bits(&model.weights()), norms)
}

/// A trainer's own stream, and its memory for the gradient of each parameter.
fn memory(strategy: &dyn Strategy, parameters: &[Parameter]) -> (Option<Stream>, Vec<Buffer>) {
    let device = Driver::open().unwrap().device(strategy.local_rank()).unwrap();
    let buffer = |parameter: &Parameter| Buffer::zeroed(&device, annulus::DType::F32, parameter.len_elems()).unwrap();
    let buffers = parameters.iter().map(buffer).collect();
    (Some(Stream::new(&device, "the trainer's", Priority::Normal).unwrap()), buffers)
}

/// A rank of the job: says what it has trained on its device.
#[test]
fn trainer() {
    as_peer("trainer", || {
        let environment = Environment::detect().unwrap();
        assert_eq!(environment.launcher, Launcher::Annulus);
        let strategy = Ddp::setup_environment(environment, on(Accelerator::Cuda(None))).unwrap();
        let mut strategy: Box<dyn Strategy> = Box::new(strategy);
        say(format!("on {}", strategy.root_device()));
        say(format!("mlp {:?}", mlp(&mut strategy)));
        for (name, how) in [("written", How::Written), ("on the device", How::OnDevice), ("captured", How::Captured)] {
            say(format!("{name} {:?}", made_up(&mut strategy, how)));
        }
        strategy.teardown(TIMEOUT).unwrap();
    });
}

#[test]
fn launched_processes_with_a_device_each_train_to_the_bits_of_the_host() {
    let name = "launched_processes_with_a_device_each_train_to_the_bits_of_the_host";
    // Beside this executable, if the workspace was built with the feature `cli` of annulus.
    let program = library("annulus_vgpu_driver").with_file_name("annulus");
    let program =
        [program.clone(), program.parent().unwrap().with_file_name("annulus")].into_iter().find(|p| p.exists());
    let Some(program) = program else {
        return eprintln!("{name} is skipped: the annulus program is built with --features annulus/cli only");
    };
    on_virtual_gpu(name, &[("ANNULUS_VGPU_DEVICES", "2")], || {
        let mut command = Command::new(&program);
        command.args(["launch", "-n", "2", "--timeout", "120", "--"]);
        let output = in_role(command, "trainer").output().unwrap();
        let told = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success(), "{told}{}", String::from_utf8_lossy(&output.stderr));
        let on_the_host = ddp(2, on(Accelerator::Host), |strategy| {
            let mut strategy: Box<dyn Strategy> = Box::new(strategy);
            let outcomes = (mlp(&mut strategy), made_up(&mut strategy, How::Written));
            strategy.teardown(TIMEOUT).unwrap();
            outcomes
        });
        for (rank, (mlp, made_up)) in on_the_host.iter().enumerate() {
            let said: Vec<&str> = told.lines().filter_map(|line| line.strip_prefix(&format!("[{rank}] >> "))).collect();
            let expected = [
                format!("on cuda:{rank}"),
                format!("mlp {mlp:?}"),
                format!("written {made_up:?}"),
                format!("on the device {made_up:?}"),
                format!("captured {made_up:?}"),
            ];
            assert_eq!(said, expected, "rank {rank}");
        }
    });
}
