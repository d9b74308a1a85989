//! A step made of operations, as few as there can be: gradients staged bucket by bucket, each reduced beside the staging of the
//! next, then norm, clipped AdamW and loss scale.

use annulus::collective::cuda::{Communicator, Options};
use annulus::device::cuda::{Event, Priority, Stream, View};
use annulus::ops::cuda::{
    Contribution, Contributions, GradientNorm, LossScale, OptimizerStep, Rule, StepTensor, StepWeights,
};
use annulus::ops::{AdamWOptions, GradScaler};
use annulus::world::World;
use annulus::{DType, ReduceOp};

use super::host_cost::{BUCKETS, clipped};
use super::model::{in_one, tensors};
use crate::Result;
use crate::site::{PATIENCE, Site};

/// A rank's step over gradients that lie elsewhere than the buckets.
pub struct Step {
    compute: Stream,
    communication: Stream,
    filled: Event,
    reduced: Event,
    communicator: Communicator,
    /// The last parameters first, as a backward pass finishes them.
    buckets: Vec<(Contributions, View)>,
    norm: GradientNorm,
    optimizer: OptimizerStep,
    loss_scale: LossScale,
}

impl Step {
    /// Kernels of a step: two a bucket; norm, optimizer, loss scale.
    pub const LAUNCHES: usize = 2 * BUCKETS + 3;
    /// Launches and events: two a bucket, and two to join the streams.
    pub const ENQUEUED: usize = Step::LAUNCHES + 2 * BUCKETS + 2;

    /// bf16 gradients of so many elements each, f32 buckets and weights.
    ///
    /// # Errors
    /// What the driver says; fewer tensors than buckets.
    pub fn new(site: &Site, world: World, lens: &[usize]) -> Result<Step> {
        let gradients = tensors(site, DType::BF16, lens)?;
        let (whole, staged) = in_one(site, DType::F32, lens)?;
        let [masters, first, second] = [0, 1, 2].map(|_| tensors(site, DType::F32, lens));
        let (masters, first, second) = (masters?, first?, second?);
        let step_tensor = |i: usize| StepTensor {
            gradient: staged[i].clone(),
            weights: StepWeights::Master { master: masters[i].clone(), model: None },
            states: vec![first[i].clone(), second[i].clone()],
            decays: true,
            first_index: 0,
        };
        let step_tensors: Vec<StepTensor> = (0..lens.len()).map(step_tensor).collect();
        let size = lens.len().div_ceil(BUCKETS);
        let buckets = (0..lens.len()).step_by(size).rev().map(|first| {
            let end = (first + size).min(lens.len());
            let pairs: Vec<_> = (first..end).map(|i| (gradients[i].clone(), staged[i].clone())).collect();
            let offset_elems = ((staged[first].address() - whole.address()) / 4) as usize;
            let end_bytes = staged[end - 1].address() + staged[end - 1].len_bytes() as u64;
            let len_elems = ((end_bytes - staged[first].address()) / 4) as usize;
            Ok((Contributions::new(&site.kernels, &pairs)?, whole.slice(offset_elems, len_elems)?))
        });
        let buckets: Vec<_> = buckets.collect::<Result<_>>()?;
        if buckets.len() != BUCKETS {
            return Err(format!("{} tensors are {} buckets", lens.len(), buckets.len()).into());
        }
        Ok(Step {
            compute: site.stream.clone(),
            communication: Stream::new(&site.device, "communication", Priority::High)?,
            filled: Event::new(&site.device)?,
            reduced: Event::new(&site.device)?,
            communicator: Communicator::new(&world, &site.kernels, Options::default())?,
            buckets,
            norm: GradientNorm::new(&site.kernels, &staged)?,
            optimizer: OptimizerStep::new(&site.kernels, Rule::AdamW(AdamWOptions::default()), &step_tensors, None)?,
            loss_scale: LossScale::new(&site.kernels, &GradScaler::default())?,
        })
    }

    /// The whole step.
    ///
    /// # Errors
    /// What the driver says.
    pub fn enqueue(&mut self) -> Result<()> {
        let Step { compute, communication, filled, reduced, communicator, .. } = self;
        for (contributions, bucket) in &self.buckets {
            contributions.launch(compute, Contribution::Replace, 1.0)?;
            compute.record(filled)?;
            communication.wait(filled)?;
            communicator.all_reduce(bucket, ReduceOp::Avg, communication)?;
        }
        communication.record(reduced)?;
        compute.wait(reduced)?;
        self.norm.measure(compute, &clipped(Some(self.loss_scale.scale())))?;
        self.optimizer.step(compute, Some(self.norm.signal()))?;
        Ok(self.loss_scale.update(compute, self.norm.signal())?)
    }

    /// The reduction of the first bucket alone.
    ///
    /// # Errors
    /// What the driver says.
    pub fn all_reduce(&mut self) -> Result<()> {
        let (_, bucket) = &self.buckets[0];
        Ok(self.communicator.all_reduce(bucket, ReduceOp::Avg, &self.communication)?)
    }

    /// Waits for all that is enqueued.
    ///
    /// # Errors
    /// What the device failed with.
    pub fn settle(&mut self) -> Result<()> {
        self.compute.synchronize(PATIENCE)?;
        Ok(self.communicator.synchronize(PATIENCE)?)
    }
}
