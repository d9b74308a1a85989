//! A small network with gradients written out by hand, and strategies to train it with.

use std::time::Duration;

use annulus::Result;
use annulus::strategy::{
    Backward, Ddp, GradSink, Init, Module, ModuleBuffer, ModuleInit, Parameter, Rng, SingleDevice, Strategy,
    StrategyOptions,
};
use annulus::world::{Environment, launch};

pub const INPUTS: usize = 6;
pub const HIDDEN: usize = 40;
pub const OUTPUTS: usize = 3;
pub const TIMEOUT: Duration = Duration::from_secs(60);

/// `full`, or `short` where every instruction of a kernel is interpreted.
pub fn times(full: usize, short: usize) -> usize {
    if std::env::var_os("ANNULUS_VGPU_INSIDE").is_some() { short } else { full }
}

/// Options under which a lost test fails soon and the model has several buckets.
pub fn options() -> StrategyOptions {
    let mut options = StrategyOptions { bucket_bytes: 512, first_bucket_bytes: 64, ..StrategyOptions::default() };
    options.world.timeout = TIMEOUT;
    options
}

/// Runs `test` on every rank of a `Ddp` of `world_size` ranks; returns what the ranks returned.
pub fn ddp<T: Send>(world_size: u32, options: StrategyOptions, test: impl Fn(Ddp) -> T + Sync) -> Vec<T> {
    launch::threads(world_size, |environment: Environment| {
        test(Ddp::setup_environment(environment, options.clone()).unwrap())
    })
    .unwrap()
}

/// What a test runs on: one rank without data parallelism, one with, and several.
pub const WORLDS: [Option<u32>; 4] = [None, Some(1), Some(2), Some(3)];

/// Runs `test` on every rank of one of [`WORLDS`], and tears it down.
pub fn run_in<T: Send>(
    world: Option<u32>,
    options: &StrategyOptions,
    test: impl Fn(&mut Box<dyn Strategy>) -> T + Sync,
) -> Vec<T> {
    let run = |mut strategy: Box<dyn Strategy>| {
        let result = test(&mut strategy);
        strategy.teardown(TIMEOUT).unwrap();
        result
    };
    match world {
        None => {
            let strategy = SingleDevice::setup_environment(Environment::single(), options.clone());
            vec![run(Box::new(strategy.unwrap()))]
        }
        Some(world_size) => ddp(world_size, options.clone(), |strategy| run(Box::new(strategy))),
    }
}

/// Runs `test` in every one of [`WORLDS`].
pub fn everywhere(options: &StrategyOptions, test: impl Fn(&mut Box<dyn Strategy>) + Sync) {
    for world in WORLDS {
        run_in(world, options, &test);
    }
}

/// Two layers with a tanh between them, and a parameter that forward does not use.
pub struct Mlp {
    pub hidden: (Parameter, Parameter),
    pub output: (Parameter, Parameter),
    pub idle: Parameter,
    pub seen: ModuleBuffer,
}

impl Mlp {
    /// Weights drawn from `seed`.
    pub fn new(init: &ModuleInit, seed: u64) -> Result<Mlp> {
        let mut rng = Rng::new(seed);
        let mut draw = |values: &mut [f32]| values.iter_mut().for_each(|value| *value = 0.3 * rng.normal() as f32);
        let layer = init.within("hidden");
        let hidden =
            (layer.parameter("weight", &[HIDDEN, INPUTS], &mut draw)?, layer.parameter("bias", &[HIDDEN], &mut draw)?);
        let layer = init.within("output");
        let output = (
            layer.parameter("weight", &[OUTPUTS, HIDDEN], &mut draw)?,
            layer.parameter("bias", &[OUTPUTS], &mut draw)?,
        );
        let idle = init.parameter("idle", &[2], &mut draw)?;
        Ok(Mlp { hidden, output, idle, seen: init.buffer("seen", &[1], &mut draw)? })
    }

    /// Made and set up with `strategy`, every rank's with weights of its own at first.
    pub fn set_up(strategy: &mut Box<dyn Strategy>) -> Mlp {
        let init = strategy.module_init_context(Init::Default);
        let model = Mlp::new(&init, 100 + u64::from(strategy.rank())).unwrap();
        strategy.setup_module(&model).unwrap();
        model
    }

    /// All weights, one after another, widened.
    pub fn weights(&self) -> Vec<f32> {
        let mut all = Vec::new();
        self.parameters(&mut |parameter| all.extend(widened(parameter)));
        all
    }

    /// The loss of `samples`: half the squared distance, on average.
    pub fn loss(&self, samples: &[Sample]) -> f64 {
        let weights = self.read();
        samples.iter().map(|sample| weights.forward(sample).1).sum::<f64>() / samples.len() as f64
    }

    fn read(&self) -> Weights {
        Weights {
            hidden: (widened(&self.hidden.0), widened(&self.hidden.1)),
            output: (widened(&self.output.0), widened(&self.output.1)),
        }
    }
}

impl Module for Mlp {
    fn parameters(&self, visit: &mut dyn FnMut(&Parameter)) {
        for parameter in [&self.idle, &self.hidden.0, &self.hidden.1, &self.output.0, &self.output.1] {
            visit(parameter);
        }
    }

    fn buffers(&self, visit: &mut dyn FnMut(&ModuleBuffer)) {
        visit(&self.seen);
    }
}

/// A parameter's model weights in f32.
pub fn widened(parameter: &Parameter) -> Vec<f32> {
    let mut values = vec![f32::NAN; parameter.len_elems()];
    parameter.read().unwrap().copy_to_f32(&mut values).unwrap();
    values
}

struct Weights {
    hidden: (Vec<f32>, Vec<f32>),
    output: (Vec<f32>, Vec<f32>),
}

impl Weights {
    /// Activations, loss, and the gradient of the loss with respect to the outputs.
    fn forward(&self, sample: &Sample) -> (Vec<f32>, f64, Vec<f32>) {
        let row =
            |weight: &[f32], bias: f32, input: &[f32]| weight.iter().zip(input).map(|(w, x)| w * x).sum::<f32>() + bias;
        let hidden: Vec<f32> = (0..HIDDEN)
            .map(|i| row(&self.hidden.0[i * INPUTS..][..INPUTS], self.hidden.1[i], &sample.input).tanh())
            .collect();
        let error: Vec<f32> = (0..OUTPUTS)
            .map(|i| row(&self.output.0[i * HIDDEN..][..HIDDEN], self.output.1[i], &hidden) - sample.target[i])
            .collect();
        let loss = error.iter().map(|e| 0.5 * f64::from(*e) * f64::from(*e)).sum();
        (hidden, loss, error)
    }
}

/// What the network is to learn.
#[derive(Debug, Clone, PartialEq)]
pub struct Sample {
    pub input: Vec<f32>,
    pub target: Vec<f32>,
}

/// `count` samples of a fixed smooth function.
pub fn samples(count: usize) -> Vec<Sample> {
    let mut rng = Rng::new(4);
    (0..count)
        .map(|_| {
            let input: Vec<f32> = (0..INPUTS).map(|_| rng.normal() as f32).collect();
            let target = (0..OUTPUTS).map(|i| (input[i] * input[i + 1] + input[i + 2]).sin()).collect();
            Sample { input, target }
        })
        .collect()
}

/// The loss of a batch, divided by the number of micro-batches it is one of.
pub struct Loss<'b> {
    pub batch: &'b [Sample],
    pub micro_batches: f32,
}

impl<'b> Loss<'b> {
    pub fn of(batch: &'b [Sample]) -> Loss<'b> {
        Loss { batch, micro_batches: 1.0 }
    }
}

impl Backward<Mlp> for Loss<'_> {
    fn backward(&self, model: &mut Mlp, gradients: &mut GradSink<'_>) -> Result<()> {
        let weights = model.read();
        let scale = gradients.loss_scale()? / (self.batch.len() as f32 * self.micro_batches);
        let forwards: Vec<_> = self.batch.iter().map(|sample| weights.forward(sample)).collect();
        let mut bias = [0.0; OUTPUTS];
        let mut weight = vec![0.0; OUTPUTS * HIDDEN];
        for (hidden, _, error) in &forwards {
            for i in 0..OUTPUTS {
                bias[i] += scale * error[i];
                (0..HIDDEN).for_each(|j| weight[i * HIDDEN + j] += scale * error[i] * hidden[j]);
            }
        }
        gradients.write(&model.output.1, &bias)?;
        gradients.write(&model.output.0, &weight)?;

        let mut bias = [0.0; HIDDEN];
        let mut weight = vec![0.0; HIDDEN * INPUTS];
        for ((hidden, _, error), sample) in forwards.iter().zip(self.batch) {
            for j in 0..HIDDEN {
                let back: f32 = (0..OUTPUTS).map(|i| weights.output.0[i * HIDDEN + j] * error[i]).sum();
                let back = scale * back * (1.0 - hidden[j] * hidden[j]);
                bias[j] += back;
                (0..INPUTS).for_each(|k| weight[j * INPUTS + k] += back * sample.input[k]);
            }
        }
        // In two parts, as for a weight that is used twice; then nothing for the idle parameter.
        gradients.add(&model.hidden.1, &bias)?;
        gradients.write(&model.hidden.1, &[0.0_f32; HIDDEN])?;
        gradients.write(&model.hidden.0, &weight)
    }
}

/// Bits, so that NaN and signed zeroes are compared, too.
pub fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}
