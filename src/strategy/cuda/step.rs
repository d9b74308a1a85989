//! From reduced gradients to new weights on the device: all of it enqueued, all that one kernel finds and the next needs is
//! handed over in device memory.

use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::backend::DeviceBackend;
use super::backward::DeviceGradients;
use super::memory::{DeviceMemory, DevicePlace, copy_from_bytes, copy_to_host};
use crate::device::Buffer;
use crate::device::cuda::View;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::ops::cuda::{
    ClipList, GradientNorm, Measure, NormReport, OptimizerStep, Rule, Skip, StepTensor, StepWeights, Ticket,
};
use crate::ops::{self, Saturate, SliceMut};
use crate::strategy::bucket::slice;
use crate::strategy::clip::Nonfinite;
use crate::strategy::gate::lock;
use crate::strategy::module::Weights;
use crate::strategy::optimizer::{Bound, KernelRule, OptimizerCore, StepCounts, UpdateRule};
use crate::strategy::replica::Measurement;
use crate::strategy::storage::Storage;

/// An optimizer's state on the device, and the launches over its parameters.
pub(crate) struct DeviceOptimizer {
    place: DevicePlace,
    /// Of each bound parameter, each state.
    moments: Vec<Vec<DeviceMemory>>,
    clip: ClipList,
    /// The loss scale that is in the gradients; none if the precision does not scale.
    loss_scale: Option<View>,
    /// What launches change on the host's side.
    pub(super) running: Mutex<Running>,
}

pub(super) struct Running {
    pub(super) norm: GradientNorm,
    step: OptimizerStep,
    learning_rate: f64,
    /// Steps asked for so far, skipped ones included.
    pub(super) calls: u64,
}

/// A norm that the device measures, and what its policy says of it.
#[derive(Clone)]
pub(crate) struct DeviceNorm {
    ticket: Ticket,
    policy: Nonfinite,
    scales_loss: bool,
    /// Number of the step it is measured for.
    step: u64,
    core: Arc<OptimizerCore>,
}

impl fmt::Debug for DeviceNorm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeviceNorm").field("ticket", &self.ticket).field("step", &self.step).finish_non_exhaustive()
    }
}

impl DeviceNorm {
    pub(super) fn is_of(&self, core: &Arc<OptimizerCore>) -> bool {
        Arc::ptr_eq(&self.core, core)
    }

    /// The same norm of step number `step`, when a graph has measured it again.
    pub(super) fn of_replay(&self, ticket: Ticket, step: u64) -> DeviceNorm {
        DeviceNorm { ticket, step, ..self.clone() }
    }

    /// It was captured and not measured.
    pub(super) fn take_back(&self, norm: &mut GradientNorm) {
        norm.captured(self.ticket.clone());
    }

    pub fn wait(&self, timeout: Duration) -> Result<()> {
        self.ticket.wait(timeout).map(drop)
    }

    pub fn poll(&self) -> Result<Option<f64>> {
        Ok(self.ticket.poll()?.map(|report| report.total_norm))
    }

    /// What is to be reported of it, once it is there.
    pub fn nonfinite(&self) -> Option<Error> {
        let reports = matches!(self.policy, Nonfinite::ErrorDeferred | Nonfinite::ErrorNow);
        let NormReport { total_norm, grad_scale, first_nonfinite, .. } = self.ticket.poll().ok()??;
        let index = first_nonfinite.filter(|_| reports && !(self.scales_loss && grad_scale > 1.0))?;
        let tensor = self.core.bound.get(index)?.parameter.name().to_owned();
        Some(Error::Nonfinite { tensor, step: self.step, total_norm })
    }
}

impl DeviceBackend {
    /// # Errors
    /// [`Error::InvalidArgument`] for a rule of which there is no kernel.
    pub fn optimizer(
        &self,
        rule: &dyn UpdateRule,
        bound: &[Bound],
        gradients: &DeviceGradients,
    ) -> Result<DeviceOptimizer> {
        let kernel = match rule.kernel() {
            Some(KernelRule::AdamW(options)) => Rule::AdamW(options),
            Some(KernelRule::Sgd(options)) => Rule::Sgd(options),
            None => {
                return Err(Error::InvalidArgument {
                    argument: "optimizer",
                    value: format!("{} on a device", rule.name()),
                    accepted: "AdamW or Sgd, of which there are kernels; or Accelerator::Host",
                });
            }
        };
        let moments = |bound: &Bound| {
            rule.state_names().iter().map(|_| self.place.alloc(DType::F32, bound.parameter.len_elems())).collect()
        };
        let moments: Vec<Vec<DeviceMemory>> = bound.iter().map(moments).collect::<Result<_>>()?;
        let views: Vec<View> = bound.iter().map(|bound| gradients.gradients[bound.index].clone()).collect();
        let tensors: Vec<StepTensor> = bound
            .iter()
            .zip(&views)
            .zip(&moments)
            .map(|((bound, gradient), moments)| {
                Ok(StepTensor {
                    gradient: gradient.clone(),
                    weights: weights(&bound.parameter.weights())?,
                    states: moments.iter().map(DeviceMemory::view).collect(),
                    decays: bound.decays,
                    first_index: bound.first_index,
                })
            })
            .collect::<Result<_>>()?;
        let running = Running {
            norm: GradientNorm::new(&self.kernels, &views)?,
            step: OptimizerStep::new(&self.kernels, kernel, &tensors, self.rounding_seed)?,
            learning_rate: rule.learning_rate(),
            calls: 0,
        };
        Ok(DeviceOptimizer {
            place: self.place.clone(),
            clip: ClipList::new(&self.kernels, &views)?,
            loss_scale: self.scaler.as_ref().map(|_| gradients.loss_scale.view()),
            running: Mutex::new(running),
            moments,
        })
    }

    /// Enqueues the measurement that the next step goes by.
    pub fn measure(
        &self,
        on: &DeviceOptimizer,
        core: &Arc<OptimizerCore>,
        measurement: Measurement,
    ) -> Result<DeviceNorm> {
        let Measurement { norm_type, max_norm, policy, scales_loss, is_again, .. } = measurement;
        let skip = match (scales_loss, policy) {
            (true, _) if is_again => Skip::NonfiniteOrBefore,
            (false, Nonfinite::Propagate) => Skip::Never,
            _ => Skip::Nonfinite,
        };
        let mut running = lock(&on.running);
        let how = Measure { norm_type, max_norm, grad_scale: on.loss_scale.as_ref(), skip };
        let part = self.part("norm", running.calls as u32, |counters| &counters.step_ns);
        let measure = || running.norm.measure(self.compute(), &how);
        let ticket = self.watch.borrow_mut().time(self.compute(), part, measure)?;
        Ok(DeviceNorm { ticket, policy, scales_loss, step: running.calls + 1, core: Arc::clone(core) })
    }

    /// Limits the gradients' elements, unscaled, behind what was measured of them.
    pub fn clip_value(&self, optimizer: &DeviceOptimizer, limit: f32, was_measured: bool) -> Result<()> {
        let running = lock(&optimizer.running);
        optimizer.clip.clamp(self.compute(), limit, was_measured.then(|| running.norm.signal()))
    }

    /// Enqueues the step, and what follows from its outcome for the loss scale.
    pub fn step(&self, optimizer: &DeviceOptimizer, learning_rate: f64, was_measured: bool) -> Result<()> {
        self.set_learning_rate(optimizer, learning_rate)?;
        let part = self.part("optimizer step", lock(&optimizer.running).calls as u32, |counters| &counters.step_ns);
        let enqueue = || self.enqueue_step(optimizer, was_measured);
        self.watch.borrow_mut().time(self.compute(), part, enqueue)?;
        self.compute().record(&self.step_done)
    }

    pub(super) fn set_learning_rate(&self, optimizer: &DeviceOptimizer, learning_rate: f64) -> Result<()> {
        let mut running = lock(&optimizer.running);
        if running.learning_rate.to_bits() != learning_rate.to_bits() {
            running.step.set_learning_rate(self.compute(), learning_rate)?;
            running.learning_rate = learning_rate;
        }
        Ok(())
    }

    pub fn enqueue_step(&self, optimizer: &DeviceOptimizer, was_measured: bool) -> Result<()> {
        let mut running = lock(&optimizer.running);
        running.step.step(self.compute(), was_measured.then(|| running.norm.signal()))?;
        running.calls += 1;
        match &self.scaler {
            // It is always measured where the loss is scaled.
            Some(scaler) => scaler.update(self.compute(), running.norm.signal()),
            None => Ok(()),
        }
    }

    /// Waits for the compute stream.
    pub fn read_gradient(&self, gradients: &DeviceGradients, parameter: usize, gradient: &mut [f32]) -> Result<()> {
        let copy = copy_to_host(&gradients.gradients[parameter], &self.place)?;
        ops::cast(slice(&copy, 0, copy.len_elems())?, SliceMut::F32(gradient), Saturate::No)?;
        if self.scaler.is_some() {
            let mut scale = [1.0_f32];
            gradients.loss_scale.view().read(&mut scale, self.compute(), self.place.timeout)?;
            ops::scale_in_place(SliceMut::F32(gradient), 1.0 / scale[0]);
        }
        Ok(())
    }
}

/// Weights as the kernel takes them.
fn weights(weights: &Weights) -> Result<StepWeights> {
    let view = |storage: &Storage| match storage {
        Storage::Device(memory) => Ok(memory.view()),
        Storage::Host(_) => Err(Error::InvalidArgument {
            argument: "parameter",
            value: "on the host".to_owned(),
            accepted: "made by module_init_context of a strategy on a device",
        }),
    };
    let model = view(&weights.model)?;
    Ok(match &weights.master {
        Some(master) => StepWeights::Master { master: view(master)?, model: Some(model) },
        None if model.dtype() == DType::F32 => StepWeights::Master { master: model, model: None },
        None => StepWeights::Model(model),
    })
}

impl DeviceOptimizer {
    /// Waits for the compute stream.
    pub fn counts(&self) -> Result<StepCounts> {
        let counts = lock(&self.running).step.counts(&self.place.compute, self.place.timeout)?;
        Ok(StepCounts { steps: counts.steps, skipped_steps: counts.skipped_steps })
    }

    pub fn set_counts(&self, counts: StepCounts) -> Result<()> {
        let StepCounts { steps, skipped_steps } = counts;
        let mut running = lock(&self.running);
        running.calls = steps.saturating_add(skipped_steps);
        running.step.set_counts(&self.place.compute, ops::cuda::StepCounts { steps, skipped_steps })
    }

    /// Copies on the host; waits for the compute stream.
    pub fn moments(&self) -> Result<Vec<Vec<Buffer>>> {
        let copies = |states: &Vec<DeviceMemory>| states.iter().map(DeviceMemory::copy_to_host).collect();
        self.moments.iter().map(copies).collect()
    }

    pub fn store_moment(&self, bound: usize, state: usize, bytes: &[u8]) -> Result<()> {
        copy_from_bytes(&self.moments[bound][state].view(), bytes, &self.place)
    }
}
