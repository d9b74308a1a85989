//! From reduced gradients to new weights: clipping and the optimizer step, on the compute stream.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::Replica;
use crate::dtype::{DType, NormType};
use crate::error::{Error, Result};
use crate::ops::{self, GradScaler, Rounding, RoundingKey, Saturate, SliceMut, StepSignal, Weights};
use crate::strategy::bucket::{self, Buckets, Gradient};
use crate::strategy::clip::{Nonfinite, NormHandle, NormSlot};
use crate::strategy::cuda::DeviceBackend;
use crate::strategy::gate::lock;
use crate::strategy::module::{Module, Parameter};
use crate::strategy::optimizer::{Optimizer, OptimizerCore, OptimizerMemory, OptimizerState, Piece};
use crate::strategy::statistics::Counters;
use crate::telemetry::trace::now_ns;

/// What is measured of the gradients, and what follows from it.
#[derive(Clone, Copy)]
pub(crate) struct Measurement {
    pub norm_type: NormType,
    pub max_norm: f64,
    pub policy: Nonfinite,
    /// In the gradients, on the host.
    loss_scale: f32,
    pub scales_loss: bool,
    /// Whether these very gradients were measured before. What that found still holds, though clipping by value may have
    /// hidden it since.
    pub is_again: bool,
}

impl Replica {
    /// Fails unless the gradients of `optimizer` are there and reduced.
    fn check_gradients(&self, optimizer: &Optimizer, operation: &'static str) -> Result<()> {
        self.check_own(optimizer)?;
        let gradients = &self.modules[optimizer.module].gradients;
        if gradients.unreduced {
            return Err(Error::InvalidArgument {
                argument: "gradients",
                value: format!("{operation} after backward under no_backward_sync"),
                accepted: "the last backward before it must reduce the gradients",
            });
        }
        if !optimizer.core.bound.iter().all(|bound| gradients.has(bound.index)) {
            return Err(Error::InvalidArgument {
                argument: "gradients",
                value: format!("none since the last step, in {operation}"),
                accepted: "a backward comes before it",
            });
        }
        Ok(())
    }

    /// Fails if the gradients were clipped by norm and have changed since: the factor would be that of others.
    fn check_measured(&self, optimizer: &Optimizer, operation: &'static str) -> Result<()> {
        match optimizer.measured_at {
            Some(at) if at != self.modules[optimizer.module].gradients.backwards => Err(Error::InvalidArgument {
                argument: "gradients",
                value: format!("{operation} after clip_gradients_norm and another backward"),
                accepted: "clip_gradients_norm comes after the last backward before it",
            }),
            _ => Ok(()),
        }
    }

    /// Orders the compute stream behind the reductions of a module.
    pub(super) fn join(&mut self, module: usize) -> Result<()> {
        let gradients = &mut self.modules[module].gradients;
        if !gradients.unjoined {
            return Ok(());
        }
        if let Some(device) = &self.device {
            device.join()?;
            gradients.unjoined = false; // not before: what failed is done again by the next call
            return Ok(());
        }
        let counters = Arc::clone(&self.counters);
        self.compute.enqueue(move || counters.wait_start_ns.store(now_ns(), Ordering::Relaxed))?;
        for bucket in gradients.host_buckets() {
            bucket.join(&self.compute)?;
        }
        gradients.unjoined = false;
        let counters = Arc::clone(&self.counters);
        let (timeline, track, index) = (self.options.timeline.clone(), self.track, self.backwards);
        self.compute.enqueue(move || {
            let (start_ns, end_ns) = (counters.wait_start_ns.load(Ordering::Relaxed), now_ns());
            Counters::add(&counters.exposed_ns, end_ns.saturating_sub(start_ns));
            timeline.span(track, "wait for reduction", index, start_ns, end_ns, 0);
        })
    }

    pub fn clip_gradients_norm(
        &mut self,
        module: &dyn Module,
        optimizer: &mut Optimizer,
        max_norm: f64,
        norm_type: NormType,
        policy: Nonfinite,
    ) -> Result<NormHandle> {
        self.check()?;
        self.report_deferred()?;
        norm_type.check()?;
        ops::clip::check_max_norm(max_norm)?;
        self.check_module(module, optimizer)?;
        self.check_gradients(optimizer, "clip_gradients_norm")?;
        let slot = self.measure(optimizer, max_norm, norm_type, policy)?;
        self.follow_policy(optimizer, &slot, policy)?;
        Ok(NormHandle::new(slot))
    }

    /// Does with a norm that was enqueued what the policy says.
    pub(super) fn follow_policy(
        &mut self,
        optimizer: &mut Optimizer,
        slot: &Arc<NormSlot>,
        policy: Nonfinite,
    ) -> Result<()> {
        match policy {
            Nonfinite::ErrorDeferred => self.deferred = Some(Arc::clone(slot)),
            Nonfinite::ErrorNow => {
                slot.wait(self.gate.timeout())?;
                self.check()?;
                if let Some(error) = slot.take_nonfinite() {
                    // They are of no use any more, and must not be accumulated upon.
                    self.zero_gradients(optimizer)?;
                    return Err(error);
                }
            }
            Nonfinite::Propagate | Nonfinite::SkipStep => {}
        }
        Ok(())
    }

    pub(super) fn check_module(&self, module: &dyn Module, optimizer: &Optimizer) -> Result<()> {
        if self.module_number(module)? == optimizer.module {
            return Ok(());
        }
        Err(Error::InvalidArgument {
            argument: "optimizer",
            value: format!("{} of another module", optimizer.rule_name()),
            accepted: "an optimizer that was set up with this module",
        })
    }

    /// Enqueues the measurement that the next step of `optimizer` goes by.
    pub(super) fn measure(
        &mut self,
        optimizer: &mut Optimizer,
        max_norm: f64,
        norm_type: NormType,
        policy: Nonfinite,
    ) -> Result<Arc<NormSlot>> {
        self.join(optimizer.module)?;
        let gradients = &self.modules[optimizer.module].gradients;
        let measured_before = optimizer.measured_at.replace(gradients.backwards);
        let measurement = Measurement {
            norm_type,
            max_norm,
            policy,
            loss_scale: gradients.loss_scale,
            scales_loss: self.options.precision.scales_loss(),
            is_again: measured_before == Some(gradients.backwards),
        };
        let slot = optimizer.norm_slot();
        if let (Some(device), OptimizerMemory::Device(on)) = (&self.device, &optimizer.core.memory) {
            let norm = device.measure(on, &optimizer.core, measurement)?;
            *lock(&slot.device) = Some(norm);
            return Ok(slot);
        }
        let (core, gate, to) = (Arc::clone(&optimizer.core), self.gate.clone(), Arc::clone(&slot));
        let (counters, timeline, track) = (Arc::clone(&self.counters), self.options.timeline.clone(), self.track);
        let index = self.backwards;
        self.compute.enqueue(move || {
            let span = timeline.open(track, "norm", index, 0);
            let (result, nonfinite) = match gate.guard(|| measure(&core, measurement)) {
                Ok((total_norm, nonfinite)) => (Ok(total_norm), nonfinite),
                Err(error) => (Err(error), None),
            };
            *lock(&to.result) = Some(result);
            *lock(&to.nonfinite) = nonfinite;
            let start_ns = span.start_ns();
            Counters::add(&counters.step_ns, span.close().saturating_sub(start_ns));
        })?;
        self.compute.record(&slot.measured)?;
        Ok(slot)
    }

    /// Nobody may have asked for the norm, but the scaler must know whether the gradients are finite, and know it before an
    /// infinity is clipped to a limit.
    fn measure_for_scaler(&mut self, optimizer: &mut Optimizer) -> Result<()> {
        if self.options.precision.scales_loss() && optimizer.measured_at.is_none() {
            self.measure(optimizer, f64::INFINITY, NormType::Inf, Nonfinite::SkipStep)?;
        }
        Ok(())
    }

    pub fn clip_gradients_value(
        &mut self,
        module: &dyn Module,
        optimizer: &mut Optimizer,
        clip_value: f32,
    ) -> Result<()> {
        self.gate.check()?;
        // Refuses a bad limit here and not on the stream.
        ops::clip_value(SliceMut::F32(&mut []), clip_value)?;
        self.check_module(module, optimizer)?;
        self.check_gradients(optimizer, "clip_gradients_value")?;
        self.check_measured(optimizer, "clip_gradients_value")?;
        self.measure_for_scaler(optimizer)?;
        self.join(optimizer.module)?;
        if let (Some(device), OptimizerMemory::Device(on)) = (&self.device, &optimizer.core.memory) {
            return device.clip_value(on, clip_value, optimizer.measured_at.is_some());
        }
        let loss_scale = self.modules[optimizer.module].gradients.loss_scale;
        let (core, gate) = (Arc::clone(&optimizer.core), self.gate.clone());
        self.compute.enqueue(move || {
            // What clipping by norm found is multiplied in by the step only, so here the limit is divided by it.
            let Ok(host) = core.host() else { return };
            let clip_coef = lock(&host.state).signal.clip_coef;
            let limit = (f64::from(clip_value) * f64::from(loss_scale) / f64::from(clip_coef)) as f32;
            if limit.is_nan() {
                return; // a NaN norm was propagated: the step makes NaN of everything
            }
            let clip = |gradient: &Gradient| gradient.write(|gradient| ops::clip_value(gradient, limit));
            // The gate keeps the error for the next call.
            let _ = gate.guard(|| host.gradients.iter().try_for_each(clip));
        })
    }

    pub fn optimizer_step(&mut self, optimizer: &mut Optimizer) -> Result<()> {
        self.gate.check()?;
        self.check_gradients(optimizer, "optimizer_step")?;
        self.check_measured(optimizer, "optimizer_step")?;
        optimizer.parameters().try_for_each(|parameter| parameter.check_unread("optimizer_step"))?;
        self.measure_for_scaler(optimizer)?;
        self.join(optimizer.module)?;
        let was_measured = optimizer.measured_at.take().is_some();
        let gradients = &mut self.modules[optimizer.module].gradients;
        gradients.discard(optimizer.core.bound.iter().map(|bound| bound.index));
        if let (Some(device), OptimizerMemory::Device(on)) = (&self.device, &optimizer.core.memory) {
            return device.step(on, optimizer.learning_rate(), was_measured);
        }

        let (core, gate) = (Arc::clone(&optimizer.core), self.gate.clone());
        let scaler = self.options.precision.scales_loss().then(|| Arc::clone(&self.scaler));
        let learning_rate = optimizer.learning_rate();
        let rounding_seed = self.options.stochastic_rounding.then_some(self.options.seed);
        let (counters, timeline, track) = (Arc::clone(&self.counters), self.options.timeline.clone(), self.track);
        let index = self.backwards;
        self.compute.enqueue(move || {
            let span = timeline.open(track, "optimizer step", index, 0);
            // The gate keeps an error for the next call.
            if let Ok(found_inf) = gate.guard(|| step(&core, learning_rate, rounding_seed)) {
                scaler.iter().for_each(|scaler| lock(scaler).update(found_inf));
            }
            let start_ns = span.start_ns();
            Counters::add(&counters.step_ns, span.close().saturating_sub(start_ns));
        })?;
        self.compute.record(self.gate.step_done())
    }

    pub fn zero_gradients(&mut self, optimizer: &mut Optimizer) -> Result<()> {
        self.check_own(optimizer)?;
        if optimizer.measured_at.take().is_some() && self.device.is_none() {
            let core = Arc::clone(&optimizer.core);
            self.compute.run(|| core.host().map(|host| lock(&host.state).signal = StepSignal::default()))??;
        }
        let gradients = &mut self.modules[optimizer.module].gradients;
        gradients.discard(optimizer.core.bound.iter().map(|bound| bound.index));
        Ok(())
    }

    pub fn read_gradient(&mut self, parameter: &Parameter, gradient: &mut [f32]) -> Result<()> {
        let slot = parameter.slot().filter(|_| parameter.gate().is_same(&self.gate));
        let slot = slot.ok_or_else(|| super::foreign(parameter.name()))?;
        self.join(slot.module)?;
        let gradients = &self.modules[slot.module].gradients;
        if let (Some(device), Buckets::Device(on)) = (&self.device, &gradients.memory) {
            return device.read_gradient(on, slot.parameter, gradient);
        }
        let place = &gradients.host_gradients()[slot.parameter];
        let inv_scale = 1.0 / gradients.loss_scale;
        self.compute.run(|| place.read(|source| ops::cast(source, SliceMut::F32(gradient), Saturate::No)))??;
        ops::scale_in_place(SliceMut::F32(gradient), inv_scale);
        self.gate.check()
    }

    /// The loss scaler, behind the step in flight.
    pub(super) fn scaler_state(&self) -> Result<GradScaler> {
        self.gate.wait()?;
        let on_device = self.device.as_ref().map_or(Ok(None), DeviceBackend::scaler)?;
        Ok(on_device.unwrap_or_else(|| *lock(&self.scaler)))
    }

    /// Replaces the loss scaler. No step is in flight.
    pub(super) fn set_scaler(&self, scaler: GradScaler) -> Result<()> {
        if let Some(device) = &self.device {
            device.set_scaler(scaler)?;
        }
        *lock(&self.scaler) = scaler;
        Ok(())
    }
}

/// Measures the gradients and leaves the signal for the step. The norm of the unscaled gradients, and what is to be reported.
fn measure(core: &OptimizerCore, how: Measurement) -> Result<(f64, Option<Error>)> {
    let host = core.host()?;
    let mut state = lock(&host.state);
    let OptimizerState { norms, signal, counts, .. } = &mut *state;
    norms.begin(how.norm_type)?;
    for (index, gradient) in host.gradients.iter().enumerate() {
        gradient.read(|gradient| norms.measure(index, gradient))?;
    }
    let norm = norms.combine()?;
    // Exact: loss scales are powers of two unless somebody asked for another.
    let total_norm = norm.total_norm / f64::from(how.loss_scale);
    let hidden = how.is_again && how.scales_loss && signal.found_inf;
    let skips = hidden || norm.nonfinite && (how.scales_loss || how.policy != Nonfinite::Propagate);
    *signal = StepSignal {
        clip_coef: if skips { 1.0 } else { ops::clip_coef(total_norm, how.max_norm) },
        grad_scale: how.loss_scale,
        found_inf: skips,
    };
    let reports = matches!(how.policy, Nonfinite::ErrorDeferred | Nonfinite::ErrorNow)
        && !(how.scales_loss && how.loss_scale > 1.0);
    let nonfinite = norm.first_nonfinite.filter(|_| reports).map(|index| Error::Nonfinite {
        tensor: core.bound[index].parameter.name().to_owned(),
        step: counts.steps + counts.skipped_steps + 1,
        total_norm,
    });
    Ok((total_norm, nonfinite))
}

/// Makes the step that the signal asks for. Whether it was skipped.
fn step(core: &OptimizerCore, learning_rate: f64, rounding_seed: Option<u64>) -> Result<bool> {
    let host = core.host()?;
    let mut state = lock(&host.state);
    let signal = std::mem::take(&mut state.signal);
    if signal.found_inf {
        state.counts.skipped_steps += 1;
        return Ok(true);
    }
    let step = state.counts.steps + 1;
    for ((bound, gradient), moments) in core.bound.iter().zip(&host.gradients).zip(&mut state.moments) {
        let rounding = match rounding_seed {
            None => Rounding::Nearest,
            Some(seed) => Rounding::Stochastic { key: RoundingKey { seed, step }, first_index: bound.first_index },
        };
        let mut weights = bound.parameter.weights_mut();
        let weights = &mut *weights;
        let len_elems = bound.parameter.len_elems();
        let model = weights.model.host_mut("a step on the host")?;
        let weights = match &mut weights.master {
            Some(master) => Weights::Master {
                master: master.host_mut("a step on the host")?.as_mut_slice()?,
                model: Some(bucket::slice_mut(model, 0, len_elems)?),
            },
            None if model.dtype() == DType::F32 => Weights::Master { master: model.as_mut_slice()?, model: None },
            None => Weights::Model { model: bucket::slice_mut(model, 0, len_elems)?, rounding },
        };
        let state = moments.as_mut_slice()?;
        let decays = bound.decays;
        gradient.read(|gradient| {
            core.rule.update(Piece { learning_rate, step, decays, signal, weights, gradient, state })
        })?;
    }
    state.counts.steps = step;
    Ok(false)
}
