//! A whole step as one graph: gradients into the buckets, reductions, norm, optimizer and loss scale, enqueued by one call.

use std::sync::Arc;

use super::backend::DeviceBackend;
use super::step::{DeviceNorm, DeviceOptimizer};
use crate::device::cuda::Graph;
use crate::dtype::NormType;
use crate::error::Result;
use crate::strategy::clip::Nonfinite;
use crate::strategy::gate::lock;
use crate::strategy::optimizer::OptimizerCore;

/// How a captured step clips.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepClip {
    /// Bound of the total norm; infinite to measure only.
    pub max_norm: f64,
    /// Which norm.
    pub norm_type: NormType,
    /// What happens to a step with a gradient that is not finite.
    pub nonfinite: Nonfinite,
}

/// A step that `Strategy::capture_step` captured and `Strategy::replay_step` makes. What changes from one to the next is read on
/// the device: gradients, weights, loss scale, learning rate, counts.
#[derive(Debug)]
pub struct CapturedStep {
    pub(crate) graph: Graph,
    /// That of the measurement in it, for the number of each replay.
    pub(crate) norm: DeviceNorm,
    pub(crate) clip: StepClip,
}

impl CapturedStep {
    /// Whether it is of this optimizer.
    pub(crate) fn is_of(&self, core: &Arc<OptimizerCore>) -> bool {
        self.norm.is_of(core)
    }
}

impl DeviceBackend {
    /// Refuses graphs where ranks share devices.
    pub fn check_capture(&self) -> Result<()> {
        self.communicator.check_capture()
    }

    /// While `is_capturing`, the parts of a step have no time of their own.
    pub fn set_capturing(&mut self, is_capturing: bool) {
        self.watch.get_mut().is_paused = is_capturing;
    }

    /// Puts back what the host counted in a capture, which has not run.
    pub fn take_back(&self, optimizer: &DeviceOptimizer, norm: &DeviceNorm) {
        let mut running = lock(&optimizer.running);
        norm.take_back(&mut running.norm);
        running.calls = running.calls.saturating_sub(1);
    }

    /// Enqueues a captured step: behind everything eager on both streams, and before what comes.
    pub fn replay(
        &mut self,
        optimizer: &DeviceOptimizer,
        learning_rate: f64,
        step: &mut CapturedStep,
    ) -> Result<DeviceNorm> {
        self.set_learning_rate(optimizer, learning_rate)?;
        self.communication.record(&self.reduced)?;
        self.place.compute.wait(&self.reduced)?;
        self.communicator.before_launch(&step.graph, &self.place.compute)?;
        let part = self.part("captured step", lock(&optimizer.running).calls as u32, |counters| &counters.step_ns);
        self.watch.get_mut().time(&self.place.compute, part, || step.graph.launch(&self.place.compute))?;
        self.place.compute.record(&self.filled)?;
        self.communication.wait(&self.filled)?;
        self.place.compute.record(&self.step_done)?;
        let mut running = lock(&optimizer.running);
        running.calls += 1;
        let ticket = running.norm.replayed();
        Ok(step.norm.of_replay(ticket, running.calls))
    }
}
