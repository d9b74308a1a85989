//! Whole steps as graphs, of a strategy on a device.

use std::sync::Arc;

use super::Replica;
use crate::error::{Error, Result};
use crate::strategy::clip::NormHandle;
use crate::strategy::cuda::{CapturedStep, DeviceBackend, GradientSource, StepClip};
use crate::strategy::gate::lock;
use crate::strategy::gradient::GradSink;
use crate::strategy::module::Module;
use crate::strategy::optimizer::{Optimizer, OptimizerMemory};

impl Replica {
    pub fn capture_step(
        &mut self,
        module: &dyn Module,
        optimizer: &mut Optimizer,
        gradients: &[GradientSource],
        clip: StepClip,
    ) -> Result<CapturedStep> {
        self.on_device()?.check_capture()?;
        let compute = self.on_device()?.compute().clone();
        let write = &mut |sink: &mut GradSink<'_>| sink.write_device_all(gradients, None);
        // Once for real: what is allocated or loaded at the first use is there then, and every rank has come.
        self.run_backward(module, write)?;
        self.join(optimizer.module)?;
        self.synchronize()?;
        self.zero_gradients(optimizer)?;
        self.on_device()?.set_capturing(true);
        let mut norm = None;
        let captured = compute.capture(|| {
            self.run_backward(module, write)?;
            self.check_module(module, optimizer)?;
            let slot = self.measure(optimizer, clip.max_norm, clip.norm_type, clip.nonfinite)?;
            norm = lock(&slot.device).clone();
            let (Some(device), OptimizerMemory::Device(on)) = (&self.device, &optimizer.core.memory) else {
                return Err(on_host());
            };
            device.enqueue_step(on, true)
        });
        self.zero_gradients(optimizer)?;
        let device = self.on_device()?;
        device.set_capturing(false);
        match (captured, norm, &optimizer.core.memory) {
            (Ok(graph), Some(norm), OptimizerMemory::Device(on)) => {
                device.take_back(on, &norm);
                Ok(CapturedStep { graph, norm, clip })
            }
            (captured, ..) => {
                // The host has counted a step that will never run, and may be one of several ranks that did.
                Err(self.gate.fail(captured.err().unwrap_or_else(on_host)))
            }
        }
    }

    pub fn replay_step(&mut self, step: &mut CapturedStep, optimizer: &mut Optimizer) -> Result<NormHandle> {
        self.check()?;
        self.report_deferred()?;
        if !step.is_of(&optimizer.core) || self.modules[optimizer.module].gradients.has_any() {
            return Err(Error::InvalidArgument {
                argument: "captured step",
                value: "of another optimizer, or with gradients that no step has used".to_owned(),
                accepted: "the optimizer that it was captured with, and no backward since its last step",
            });
        }
        optimizer.parameters().try_for_each(|parameter| parameter.check_unread("replay_step"))?;
        let learning_rate = optimizer.learning_rate();
        let slot = optimizer.norm_slot();
        let (Some(device), OptimizerMemory::Device(on)) = (&mut self.device, &optimizer.core.memory) else {
            return Err(on_host());
        };
        let replayed = device.replay(on, learning_rate, step);
        *lock(&slot.device) = Some(replayed.map_err(|error| self.fail_together("a captured step", error))?);
        self.follow_policy(optimizer, &slot, step.clip.nonfinite)?;
        Ok(NormHandle::new(Arc::clone(&slot)))
    }

    fn on_device(&mut self) -> Result<&mut DeviceBackend> {
        self.device.as_mut().ok_or_else(on_host)
    }
}

fn on_host() -> Error {
    Error::InvalidArgument {
        argument: "captured step",
        value: "of a strategy on the host".to_owned(),
        accepted: "a strategy that was set up with Accelerator::Cuda",
    }
}
