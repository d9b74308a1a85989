//! What it costs the processor to enqueue a step.

use std::time::Instant;

use annulus::device::cuda::{Stream, View};
use annulus::ops::cuda::{
    Contribution, Contributions, GradientNorm, LossScale, Measure, OptimizerStep, Rule, Skip, StepTensor, StepWeights,
    Ticket,
};
use annulus::ops::{AdamWOptions, GradScaler};
use annulus::{DType, NormType};

use super::Spread;
use super::model::{gpt2, tensors};
use crate::Result;
use crate::part::Scale;
use crate::record::figure;
use crate::site::{PATIENCE, Site};

const BUCKETS: usize = 5;
/// Steps between waits: fewer than a stream takes before a launch blocks.
const BURST: usize = 16;

/// A step of GPT-2's 148 tensors in 5 buckets: gradients staged and measured bucket by bucket, clipped AdamW, loss scale.
///
/// # Errors
/// What the driver says.
pub fn host_cost(scale: Scale) -> Result<()> {
    let site = Site::open()?;
    let bursts = if scale == Scale::Full { 200 } else { 20 };
    let mut step = Step::new(&site)?;
    let launches = 2 * BUCKETS + 2;
    let spread = per_step(&site, bursts, || Ok(step.enqueue(&site.stream).map(drop)?))?;
    let what = format!("host time of a step of {launches} launches, 148 tensors, {BUCKETS} buckets");
    figure(&what, spread.median, "us");
    let mut ticket = None;
    let mut graph = site.stream.capture(|| {
        ticket = step.enqueue(&site.stream)?;
        Ok(())
    })?;
    if let Some(ticket) = ticket {
        step.norm.captured(ticket);
    }
    let spread = per_step(&site, bursts, || {
        graph.launch(&site.stream)?;
        step.norm.replayed();
        Ok(())
    })?;
    figure(what + ", replayed as a graph", spread.median, "us");

    let mut latencies = Vec::new();
    for _ in 0..bursts * BURST {
        let start = Instant::now();
        step.small_norm.measure(&site.stream, &measure(None))?.wait(PATIENCE)?;
        latencies.push(start.elapsed().as_secs_f64() * 1e6);
    }
    let what = "from the launch of a norm of one bias to its number on the host";
    figure(what, Spread::of(latencies).median, "us");
    Ok(())
}

/// Median over bursts of the host's time for one of their steps.
fn per_step(site: &Site, bursts: usize, mut enqueue: impl FnMut() -> Result<()>) -> Result<Spread> {
    let mut rounds_us = Vec::with_capacity(bursts);
    for _ in 0..bursts {
        let start = Instant::now();
        for _ in 0..BURST {
            enqueue()?;
        }
        rounds_us.push(start.elapsed().as_secs_f64() * 1e6 / BURST as f64);
        site.synchronize()?;
    }
    Ok(Spread::of(rounds_us))
}

/// A step over gradients that lie elsewhere than the buckets.
struct Step {
    contributions: Vec<Contributions>,
    /// Tensors of each bucket, the last parameters first, as a backward pass finishes them.
    buckets: Vec<std::ops::Range<usize>>,
    norm: GradientNorm,
    small_norm: GradientNorm,
    optimizer: OptimizerStep,
    loss_scale: LossScale,
}

impl Step {
    fn new(site: &Site) -> Result<Step> {
        let lens = gpt2();
        let [gradients, staged, masters, first, second] =
            [DType::BF16, DType::F32, DType::F32, DType::F32, DType::F32].map(|dtype| tensors(site, dtype, &lens));
        let (gradients, staged, masters, first, second) = (gradients?, staged?, masters?, first?, second?);
        let step_tensor = |i: usize| StepTensor {
            gradient: staged[i].clone(),
            weights: StepWeights::Master { master: masters[i].clone(), model: None },
            states: vec![first[i].clone(), second[i].clone()],
            decays: true,
            first_index: 0,
        };
        let step_tensors: Vec<StepTensor> = (0..lens.len()).map(step_tensor).collect();
        let rule = Rule::AdamW(AdamWOptions::default());
        let size = lens.len().div_ceil(BUCKETS);
        let buckets: Vec<_> =
            (0..lens.len()).step_by(size).map(|first| first..(first + size).min(lens.len())).rev().collect();
        let contributions = buckets.iter().map(|bucket| {
            let pairs: Vec<_> = bucket.clone().map(|i| (gradients[i].clone(), staged[i].clone())).collect();
            Ok(Contributions::new(&site.kernels, &pairs)?)
        });
        Ok(Step {
            contributions: contributions.collect::<Result<_>>()?,
            buckets,
            norm: GradientNorm::new(&site.kernels, &staged)?,
            small_norm: GradientNorm::new(&site.kernels, &staged[lens.len() - 1..])?,
            optimizer: OptimizerStep::new(&site.kernels, rule, &step_tensors, None)?,
            loss_scale: LossScale::new(&site.kernels, &GradScaler::default())?,
        })
    }

    /// The whole step; the ticket of its norm.
    fn enqueue(&mut self, stream: &Stream) -> annulus::Result<Option<Ticket>> {
        let scale = self.loss_scale.scale().clone();
        let how = measure(Some(&scale));
        let mut ticket = None;
        for (bucket, contributions) in self.buckets.iter().zip(&self.contributions) {
            contributions.launch(stream, Contribution::Replace, 1.0)?;
            if bucket.start == 0 {
                ticket = Some(self.norm.measure_last(stream, &how, bucket.clone())?);
            } else {
                self.norm.measure_part(stream, &how, bucket.clone())?;
            }
        }
        self.optimizer.step(stream, Some(self.norm.signal()))?;
        self.loss_scale.update(stream, self.norm.signal())?;
        Ok(ticket)
    }
}

fn measure(grad_scale: Option<&View>) -> Measure<'_> {
    Measure { norm_type: NormType::L2, max_norm: 1.0, grad_scale, skip: Skip::Nonfinite }
}
