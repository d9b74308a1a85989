//! What connects candle's model to annulus's strategy: a few lines each.
//!
//! annulus owns the weights (in its arena, where peers reach them) and updates them; candle's variables are a copy in f32, refreshed
//! after every step.

use std::cell::Cell;
use std::sync::atomic::{AtomicU64, Ordering};

use annulus::strategy::{Backward, Dataset, Device, GradSink, Module, ModuleInit, Parameter, Rng, ToDevice};
use annulus::telemetry::{Timeline, Track};

use crate::failure::Failure;
use crate::model::{Batch, Gpt, Initial, ModelConfig, Tape};
use crate::text::Windows;

/// The model with its parameters.
pub struct Network {
    /// candle's side.
    pub gpt: Gpt,
    /// annulus's side, in the same order.
    parameters: Vec<Parameter>,
}

impl Network {
    /// A new model; every rank that passes the same `seed` gets the same weights.
    ///
    /// # Errors
    /// Those of allocating.
    pub fn new(init: &ModuleInit, config: ModelConfig, seed: u64) -> Result<Network, Failure> {
        let mut rng = Rng::new(seed);
        let parameters = config
            .parameters()
            .into_iter()
            .map(|spec| {
                init.parameter(&spec.name, &spec.shape, |weights| match spec.initial {
                    Initial::Zero => weights.fill(0.0),
                    Initial::One => weights.fill(1.0),
                    Initial::Normal(deviation) => weights.fill_with(|| (rng.normal() * deviation) as f32),
                })
            })
            .collect::<annulus::Result<_>>()?;
        Ok(Network { gpt: Gpt::new(config)?, parameters })
    }

    /// Copies the weights to candle. Waits for the optimizer step in flight.
    ///
    /// # Errors
    /// The error of the step in flight; those of candle.
    pub fn refresh(&self) -> Result<(), Failure> {
        for (index, parameter) in self.parameters.iter().enumerate() {
            let mut weights = vec![0.0; parameter.len_elems()];
            parameter.read()?.copy_to_f32(&mut weights)?;
            self.gpt.load(index, weights)?;
        }
        Ok(())
    }
}

impl Module for Network {
    fn parameters(&self, visit: &mut dyn FnMut(&Parameter)) {
        self.parameters.iter().for_each(visit);
    }
}

/// The loss of a batch, to be differentiated once.
pub struct Loss<'t> {
    tape: Cell<Option<Tape>>,
    timeline: &'t Timeline,
    track: Track,
    scale: Cell<f32>,
}

impl<'t> Loss<'t> {
    /// The loss at the end of `tape`. Spans of its backward pass go to `track`.
    pub fn new(tape: Tape, timeline: &'t Timeline, track: Track) -> Self {
        Loss { tape: Cell::new(Some(tape)), timeline, track, scale: Cell::new(1.0) }
    }

    /// What the loss was multiplied with, once it is differentiated.
    pub fn scale(&self) -> f32 {
        self.scale.get()
    }
}

impl Backward<Network> for Loss<'_> {
    fn backward(&self, network: &mut Network, gradients: &mut GradSink<'_>) -> annulus::Result<()> {
        let failed = |reason: String| annulus::Error::Backward { reason };
        let tape = self.tape.take().ok_or_else(|| failed("this loss was differentiated before".to_owned()))?;
        self.scale.set(gradients.loss_scale()?);
        let mut start_ns = self.timeline.now_ns();
        let result = network.gpt.backward(
            tape,
            gradients.loss_scale()?,
            // Nothing is gathered for later: the bucket that this gradient fills is on its way before the next segment.
            |index, gradient| gradients.write(&network.parameters[index], gradient).map_err(Failure::from),
            |segment| {
                let end_ns = self.timeline.now_ns();
                self.timeline.span(self.track, "backward segment", segment as u32, start_ns, end_ns, 0);
                start_ns = end_ns;
            },
        );
        result.map_err(|error| match error {
            Failure::Annulus(error) => error,
            error => failed(error.to_string()),
        })
    }
}

/// Text in host memory goes nowhere: the model computes on the CPU.
impl ToDevice for Batch {
    fn to_device(self, _device: &Device) -> annulus::Result<Self> {
        Ok(self)
    }
}

/// The training text as a data set.
pub struct TrainingText {
    windows: Windows,
    epoch: AtomicU64,
}

impl TrainingText {
    /// Windows of the training part.
    pub fn new(windows: Windows) -> TrainingText {
        TrainingText { windows, epoch: AtomicU64::new(0) }
    }

    /// Chooses the epoch's cut of the text.
    pub fn set_epoch(&self, epoch: u64) {
        self.epoch.store(epoch, Ordering::Relaxed); // Relaxed: read by the same thread
    }
}

impl Dataset for TrainingText {
    type Batch = Batch;

    fn len(&self) -> usize {
        self.windows.len()
    }

    fn batch(&self, indices: &[usize]) -> Batch {
        self.windows.batch(self.epoch.load(Ordering::Relaxed), indices)
    }
}
