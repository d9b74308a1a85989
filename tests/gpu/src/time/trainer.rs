//! A step as a trainer makes it: `Ddp`, which is handed gradients and reduces a bucket when it is full.

use annulus::device::cuda::View;
use annulus::strategy::{
    Accelerator, AdamW, CapturedStep, Ddp, GradSink, GradientSource, Init, Module, Nonfinite, Optimizer, Parameter,
    Precision, StepClip, Strategy, StrategyOptions,
};
use annulus::world::{Environment, WorldOptions};
use annulus::{DType, NormType};

use super::host_cost::BUCKETS;
use super::model::tensors;
use crate::Result;
use crate::site::{PATIENCE, Site};

const CLIP: StepClip = StepClip { max_norm: 1.0, norm_type: NormType::L2, nonfinite: Nonfinite::SkipStep };
/// Gradients begin at multiples of so many f32 in a bucket.
const ALIGN_ELEMS: usize = 16;

struct Model(Vec<Parameter>);

impl Module for Model {
    fn parameters(&self, visit: &mut dyn FnMut(&Parameter)) {
        self.0.iter().for_each(visit);
    }
}

/// How a backward pass hands its gradients over.
#[derive(Clone, Copy)]
enum Handed {
    /// All in one call.
    Together,
    /// Each in a call of its own.
    Alone,
}

/// A rank of a world of one, in training.
pub struct Trainer {
    strategy: Ddp,
    model: Model,
    optimizer: Optimizer,
    /// In the order in which a backward pass finishes them.
    sources: Vec<GradientSource>,
    captured: Option<CapturedStep>,
}

impl Trainer {
    /// A model of parameters of so many elements each, in mixed bf16, whose gradients are bf16 on the device.
    ///
    /// # Errors
    /// What the driver says; if the gradients do not come to lie in 5 buckets.
    pub fn new(site: &Site, lens: &[usize]) -> Result<Trainer> {
        let bucket_bytes = bucket_bytes(lens);
        let options = StrategyOptions {
            accelerator: Accelerator::Cuda(Some(0)),
            precision: Precision::Bf16Mixed,
            bucket_bytes,
            first_bucket_bytes: bucket_bytes,
            world: WorldOptions { timeout: PATIENCE, ..WorldOptions::default() },
            ..StrategyOptions::default()
        };
        let mut strategy = Ddp::setup_environment(Environment::single(), options)?;
        let init = strategy.module_init_context(Init::Zeroed);
        let parameters = lens.iter().enumerate().map(|(i, len)| init.parameter(&format!("p{i}"), &[*len], |_| {}));
        let model = Model(parameters.collect::<annulus::Result<_>>()?);
        let (model, optimizer) = strategy.setup_module_and_optimizers(model, AdamW::new(1e-4))?;
        let source =
            |(parameter, gradient): (&Parameter, View)| GradientSource { parameter: parameter.clone(), gradient };
        let sources = model.0.iter().zip(tensors(site, DType::BF16, lens)?).rev().map(source).collect();
        let mut trainer = Trainer { strategy, model, optimizer, sources, captured: None };
        match trainer.backward(Handed::Together)? {
            BUCKETS => {}
            buckets => return Err(format!("the gradients lie in {buckets} buckets").into()),
        }
        trainer.clip_and_step()?;
        Ok(trainer)
    }

    /// Hands over all gradients; in how many buckets they are.
    fn backward(&mut self, handed: Handed) -> Result<usize> {
        let Trainer { strategy, model, sources, .. } = self;
        let mut buckets = 0;
        strategy.run_backward(model, &mut |sink: &mut GradSink<'_>| {
            buckets = sink.buckets().total;
            match handed {
                Handed::Together => sink.write_device_all(sources, None),
                Handed::Alone => sources.iter().try_for_each(|s| sink.write_device(&s.parameter, &s.gradient, None)),
            }
        })?;
        Ok(buckets)
    }

    fn clip_and_step(&mut self) -> Result<()> {
        let Trainer { strategy, model, optimizer, .. } = self;
        let StepClip { max_norm, norm_type, nonfinite } = CLIP;
        strategy.clip_gradients_norm(model, optimizer, max_norm, norm_type, nonfinite)?;
        Ok(strategy.optimizer_step(optimizer)?)
    }

    /// The whole step, its gradients handed over in one call; waits for nothing.
    ///
    /// # Errors
    /// What the strategy says.
    pub fn step(&mut self) -> Result<()> {
        self.backward(Handed::Together)?;
        self.clip_and_step()
    }

    /// As [`Trainer::step`], with a call for each gradient.
    ///
    /// # Errors
    /// What the strategy says.
    pub fn step_one_by_one(&mut self) -> Result<()> {
        self.backward(Handed::Alone)?;
        self.clip_and_step()
    }

    /// Makes a graph of the step.
    ///
    /// # Errors
    /// What the strategy says.
    pub fn capture(&mut self) -> Result<()> {
        let Trainer { strategy, model, optimizer, sources, captured } = self;
        *captured = Some(strategy.capture_step(model, optimizer, sources, CLIP)?);
        Ok(())
    }

    /// The whole step by its graph.
    ///
    /// # Errors
    /// None was captured; what the strategy says.
    pub fn replay(&mut self) -> Result<()> {
        let captured = self.captured.as_mut().ok_or("no step was captured")?;
        self.strategy.replay_step(captured, &mut self.optimizer)?;
        Ok(())
    }

    /// Waits for all that is enqueued.
    ///
    /// # Errors
    /// What the device failed with.
    pub fn settle(&mut self) -> Result<()> {
        Ok(self.strategy.synchronize()?)
    }

    /// Ends the training.
    ///
    /// # Errors
    /// What the strategy says.
    pub fn leave(self) -> Result<()> {
        Ok(self.strategy.teardown(PATIENCE)?)
    }
}

/// The size of buckets with which gradients of these lengths need 5: filled from the last on, as the strategy does.
fn bucket_bytes(lens: &[usize]) -> usize {
    let padded = || lens.iter().rev().map(|len_elems| 4 * len_elems.next_multiple_of(ALIGN_ELEMS));
    let needed = |bucket_bytes: usize| {
        let (mut buckets, mut left) = (0, 0);
        for bytes in padded() {
            if bytes > left {
                (buckets, left) = (buckets + 1, bucket_bytes.max(bytes));
            }
            left -= bytes;
        }
        buckets
    };
    // The least that suffices, as larger buckets are never more.
    let (mut too_small, mut suffices): (usize, usize) = (0, padded().sum());
    while suffices - too_small > 4 * ALIGN_ELEMS {
        let between = too_small.midpoint(suffices);
        if needed(between) > BUCKETS { too_small = between } else { suffices = between }
    }
    suffices
}
