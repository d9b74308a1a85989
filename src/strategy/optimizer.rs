//! Optimizers: what updates which parameters, and the state it keeps for them.
//!
//! An [`UpdateRule`] (AdamW, SGD, or one of yours) is pure arithmetic on slices. `Strategy::setup_optimizer` binds it to
//! parameters and makes an [`Optimizer`], which owns the rule's state. Where that state lives, and on which stream the rule
//! runs, is the strategy's affair: one that shards its state hands the rule a piece of each parameter.

use std::fmt::{self, Write as _};
use std::sync::{Arc, Mutex, MutexGuard};

use super::bucket::Gradient;
use super::clip::NormSlot;
use super::cuda::DeviceOptimizer;
use super::gate::{Gate, lock};
use super::module::Parameter;
use super::tensor;
use crate::device::Buffer;
use crate::error::{Error, Result};
use crate::ops::{self, AdamWOptions, NormSlots, SgdOptions, Slice, StepSignal, Weights};

/// A piece of a parameter, and all that updates it.
#[derive(Debug)]
pub struct Piece<'a> {
    /// Learning rate of this step.
    pub learning_rate: f64,
    /// Number of this step, from 1. Skipped steps do not count.
    pub step: u64,
    /// Whether weight decay applies to the parameter.
    pub decays: bool,
    /// What the gradient must still be multiplied with: `signal.factor()`. `found_inf` is never set here.
    pub signal: StepSignal,
    /// The weights.
    pub weights: Weights<'a>,
    /// The gradient: averaged over ranks, scaled by the loss scale, not clipped.
    pub gradient: Slice<'a>,
    /// The rule's state: as many elements for each of [`UpdateRule::state_names`] as there are weights, one after another.
    pub state: &'a mut [f32],
}

/// How weights follow gradients. Its `Debug` form shows every hyper-parameter: ranks compare it.
pub trait UpdateRule: fmt::Debug + Send + Sync + 'static {
    /// Name in checkpoints: a checkpoint is not loaded into an optimizer with another rule.
    fn name(&self) -> &'static str;

    /// Learning rate at the start; [`Optimizer::set_learning_rate`] changes it.
    fn learning_rate(&self) -> f64;

    /// Names of the tensors of state kept for each parameter, in f32 and of its shape, zero at the start.
    fn state_names(&self) -> &'static [&'static str];

    /// Fails unless the hyper-parameters are in range, with this learning rate.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] names the value.
    fn check(&self, learning_rate: f64) -> Result<()>;

    /// Updates the weights and the state of one piece. Runs on the compute stream; must not allocate.
    ///
    /// # Errors
    /// An error makes the strategy unusable: pieces before this one were updated.
    fn update(&self, piece: Piece<'_>) -> Result<()>;

    /// The kernel that does the same on a device, if there is one.
    fn kernel(&self) -> Option<KernelRule> {
        None
    }

    /// Updates only the parameters for which `select` is true.
    fn only(self, select: impl Fn(&Parameter) -> bool + 'static) -> OptimizerSpec
    where
        Self: Sized,
    {
        OptimizerSpec::from(self).only(select)
    }

    /// Exempts the parameters for which `select` is true from weight decay: usually biases and norms.
    fn without_decay(self, select: impl Fn(&Parameter) -> bool + 'static) -> OptimizerSpec
    where
        Self: Sized,
    {
        OptimizerSpec::from(self).without_decay(select)
    }
}

/// A rule of which there is a kernel, with its hyper-parameters.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum KernelRule {
    /// Decoupled weight decay, two moments.
    AdamW(AdamWOptions),
    /// Momentum, if it is not 0.
    Sgd(SgdOptions),
}

/// AdamW (Loshchilov & Hutter 2019), with PyTorch's defaults: betas 0.9 and 0.999, eps 1e-8, weight decay 0.01.
#[derive(Debug, Clone, PartialEq)]
pub struct AdamW(AdamWOptions);

impl AdamW {
    /// With this learning rate.
    pub fn new(learning_rate: f64) -> AdamW {
        AdamW(AdamWOptions { lr: learning_rate, ..AdamWOptions::default() })
    }

    /// Decay of the first and the second moment.
    pub fn betas(mut self, beta1: f64, beta2: f64) -> AdamW {
        (self.0.beta1, self.0.beta2) = (beta1, beta2);
        self
    }

    /// Added to the root of the second moment.
    pub fn eps(mut self, eps: f64) -> AdamW {
        self.0.eps = eps;
        self
    }

    /// Decoupled weight decay.
    pub fn weight_decay(mut self, weight_decay: f64) -> AdamW {
        self.0.weight_decay = weight_decay;
        self
    }
}

impl UpdateRule for AdamW {
    fn name(&self) -> &'static str {
        "adamw"
    }

    fn learning_rate(&self) -> f64 {
        self.0.lr
    }

    fn state_names(&self) -> &'static [&'static str] {
        &["exp_avg", "exp_avg_sq"]
    }

    fn check(&self, lr: f64) -> Result<()> {
        AdamWOptions { lr, ..self.0 }.check()
    }

    fn kernel(&self) -> Option<KernelRule> {
        Some(KernelRule::AdamW(self.0))
    }

    fn update(&self, piece: Piece<'_>) -> Result<()> {
        let Piece { learning_rate: lr, step, decays, signal, weights, gradient, state } = piece;
        let weight_decay = if decays { self.0.weight_decay } else { 0.0 };
        let (exp_avg, exp_avg_sq) = state.split_at_mut(state.len() / 2);
        let options = AdamWOptions { lr, weight_decay, ..self.0 };
        ops::adamw_step(&options, step, signal, weights, gradient, exp_avg, exp_avg_sq)
    }
}

/// Stochastic gradient descent, with PyTorch's defaults: no momentum, no weight decay.
#[derive(Debug, Clone, PartialEq)]
pub struct Sgd(SgdOptions);

impl Sgd {
    /// With this learning rate.
    pub fn new(learning_rate: f64) -> Sgd {
        Sgd(SgdOptions { lr: learning_rate, ..SgdOptions::default() })
    }

    /// Decay of the velocity.
    pub fn momentum(mut self, momentum: f64) -> Sgd {
        self.0.momentum = momentum;
        self
    }

    /// Nesterov's variant; needs momentum.
    pub fn nesterov(mut self, nesterov: bool) -> Sgd {
        self.0.nesterov = nesterov;
        self
    }

    /// Added to the gradient, times the weight.
    pub fn weight_decay(mut self, weight_decay: f64) -> Sgd {
        self.0.weight_decay = weight_decay;
        self
    }
}

impl UpdateRule for Sgd {
    fn name(&self) -> &'static str {
        "sgd"
    }

    fn learning_rate(&self) -> f64 {
        self.0.lr
    }

    fn state_names(&self) -> &'static [&'static str] {
        if self.0.momentum != 0.0 { &["momentum_buffer"] } else { &[] }
    }

    fn check(&self, lr: f64) -> Result<()> {
        SgdOptions { lr, ..self.0 }.check()
    }

    fn kernel(&self) -> Option<KernelRule> {
        Some(KernelRule::Sgd(self.0))
    }

    fn update(&self, piece: Piece<'_>) -> Result<()> {
        let Piece { learning_rate: lr, decays, signal, weights, gradient, state, .. } = piece;
        let weight_decay = if decays { self.0.weight_decay } else { 0.0 };
        ops::sgd_step(&SgdOptions { lr, weight_decay, ..self.0 }, signal, weights, gradient, state)
    }
}

type Selector = Box<dyn Fn(&Parameter) -> bool>;

/// A rule and the parameters it is for, before it is set up. A bare rule is for all of them.
pub struct OptimizerSpec {
    pub(crate) rule: Box<dyn UpdateRule>,
    only: Option<Selector>,
    without_decay: Option<Selector>,
}

impl OptimizerSpec {
    /// Updates only the parameters for which `select` is true.
    pub fn only(mut self, select: impl Fn(&Parameter) -> bool + 'static) -> OptimizerSpec {
        self.only = Some(Box::new(select));
        self
    }

    /// Exempts the parameters for which `select` is true from weight decay.
    pub fn without_decay(mut self, select: impl Fn(&Parameter) -> bool + 'static) -> OptimizerSpec {
        self.without_decay = Some(Box::new(select));
        self
    }

    pub(crate) fn selects(&self, parameter: &Parameter) -> bool {
        self.only.as_ref().is_none_or(|only| only(parameter))
    }

    pub(crate) fn decays(&self, parameter: &Parameter) -> bool {
        !self.without_decay.as_ref().is_some_and(|without| without(parameter))
    }
}

impl<R: UpdateRule> From<R> for OptimizerSpec {
    fn from(rule: R) -> Self {
        OptimizerSpec { rule: Box::new(rule), only: None, without_decay: None }
    }
}

impl fmt::Debug for OptimizerSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OptimizerSpec").field("rule", &self.rule.name()).finish_non_exhaustive()
    }
}

/// A parameter bound to an optimizer.
pub(crate) struct Bound {
    pub parameter: Parameter,
    /// Which parameter of its module.
    pub index: usize,
    pub decays: bool,
    /// Number of its first element among all of the strategy: selects the bits of stochastic rounding.
    pub first_index: u64,
}

/// What an optimizer is made of, whatever runs it.
pub(crate) struct OptimizerCore {
    pub rule: Box<dyn UpdateRule>,
    pub bound: Vec<Bound>,
    pub memory: OptimizerMemory,
}

/// Where its state is, and what steps it.
pub(crate) enum OptimizerMemory {
    Host(HostOptimizer),
    Device(Box<DeviceOptimizer>),
}

/// An optimizer on the host: what the host and the closures of the compute stream share.
pub(crate) struct HostOptimizer {
    /// Of the bound parameters.
    pub gradients: Vec<Gradient>,
    pub state: Mutex<OptimizerState>,
}

/// What a step changes. Locked by closures of the compute stream, by the host only behind them.
pub(crate) struct OptimizerState {
    /// The rule's state of each bound parameter.
    pub moments: Vec<Buffer>,
    pub norms: NormSlots,
    /// What the next step is told by clipping; the default if it was not asked for.
    pub signal: StepSignal,
    pub counts: StepCounts,
}

/// How many steps were made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct StepCounts {
    /// Those that changed weights.
    pub steps: u64,
    pub skipped_steps: u64,
}

/// The rule's state, to read on the host.
pub(crate) enum Moments<'o> {
    Own(MutexGuard<'o, OptimizerState>),
    /// Of each bound parameter, each state.
    Copies(Vec<Vec<Buffer>>),
}

impl Moments<'_> {
    /// The bytes of one state of one bound parameter, of which there are `len_states` states.
    pub fn bytes(&self, bound: usize, state: usize, len_states: usize) -> &[u8] {
        match self {
            Moments::Own(own) => {
                let whole = tensor::bytes(&own.moments[bound]);
                let len_bytes = whole.len() / len_states;
                &whole[state * len_bytes..][..len_bytes]
            }
            Moments::Copies(copies) => tensor::bytes(&copies[bound][state]),
        }
    }
}

impl OptimizerCore {
    /// The parts that closures on the host's streams work with.
    pub fn host(&self) -> Result<&HostOptimizer> {
        match &self.memory {
            OptimizerMemory::Host(host) => Ok(host),
            OptimizerMemory::Device(_) => Err(Error::InvalidArgument {
                argument: "optimizer",
                value: format!("{} of a device", self.rule.name()),
                accepted: "an optimizer of a strategy on the host",
            }),
        }
    }

    /// Behind the step in flight.
    pub fn counts(&self) -> Result<StepCounts> {
        match &self.memory {
            OptimizerMemory::Host(host) => Ok(lock(&host.state).counts),
            OptimizerMemory::Device(device) => device.counts(),
        }
    }

    pub fn set_counts(&self, counts: StepCounts) -> Result<()> {
        match &self.memory {
            OptimizerMemory::Host(host) => {
                lock(&host.state).counts = counts;
                Ok(())
            }
            OptimizerMemory::Device(device) => device.set_counts(counts),
        }
    }

    /// Behind the step in flight.
    pub fn moments(&self) -> Result<Moments<'_>> {
        match &self.memory {
            OptimizerMemory::Host(host) => Ok(Moments::Own(lock(&host.state))),
            OptimizerMemory::Device(device) => device.moments().map(Moments::Copies),
        }
    }

    /// Replaces one state of one bound parameter. The length was checked.
    pub fn store_moment(&self, bound: usize, state: usize, bytes: &[u8]) -> Result<()> {
        match &self.memory {
            OptimizerMemory::Host(host) => {
                let mut own = lock(&host.state);
                tensor::bytes_mut(&mut own.moments[bound])[state * bytes.len()..][..bytes.len()].copy_from_slice(bytes);
                Ok(())
            }
            OptimizerMemory::Device(device) => device.store_moment(bound, state, bytes),
        }
    }
}

impl HostOptimizer {
    pub fn new(rule: &dyn UpdateRule, bound: &[Bound], gradients: Vec<Gradient>) -> Result<HostOptimizer> {
        let lens_elems: Vec<usize> = bound.iter().map(|bound| bound.parameter.len_elems()).collect();
        let state_names = rule.state_names();
        let moments = lens_elems
            .iter()
            .map(|len_elems| {
                let len_elems = len_elems.checked_mul(state_names.len()).ok_or_else(|| Error::SizeOverflow {
                    what: "optimizer state",
                    detail: format!("{} tensors of {len_elems} elements", state_names.len()),
                })?;
                Buffer::zeroed(crate::dtype::DType::F32, len_elems)
            })
            .collect::<Result<_>>()?;
        let state = OptimizerState {
            moments,
            norms: NormSlots::new(&lens_elems)?,
            signal: StepSignal::default(),
            counts: StepCounts::default(),
        };
        Ok(HostOptimizer { gradients, state: Mutex::new(state) })
    }
}

/// An optimizer of a module that was set up with a strategy. It owns its rule's state; the weights belong to the
/// parameters.
pub struct Optimizer {
    pub(crate) core: Arc<OptimizerCore>,
    pub(crate) gate: Gate,
    /// The module whose parameters it updates.
    pub(crate) module: usize,
    learning_rate: f64,
    /// The backward of its module behind which the gradients were measured; none since the last step.
    pub(crate) measured_at: Option<u64>,
    /// Results of norms, used again as soon as nobody holds their handle.
    slots: Vec<Arc<NormSlot>>,
}

/// Norms whose handles are alive at once before another slot is allocated.
const NORM_SLOTS: usize = 4;

impl Optimizer {
    pub(crate) fn new(core: OptimizerCore, module: usize, gate: Gate) -> Optimizer {
        Optimizer {
            learning_rate: core.rule.learning_rate(),
            core: Arc::new(core),
            gate,
            module,
            measured_at: None,
            slots: (0..NORM_SLOTS).map(|_| Arc::default()).collect(),
        }
    }

    /// Name of the rule.
    pub fn rule_name(&self) -> &'static str {
        self.core.rule.name()
    }

    /// Learning rate of the next step.
    pub fn learning_rate(&self) -> f64 {
        self.learning_rate
    }

    /// Sets the learning rate of the steps from the next one on. Steps in flight keep theirs.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if the rule does not accept it.
    pub fn set_learning_rate(&mut self, learning_rate: f64) -> Result<()> {
        self.core.rule.check(learning_rate)?;
        self.learning_rate = learning_rate;
        Ok(())
    }

    /// Steps made so far; skipped ones are not counted.
    ///
    /// # Errors
    /// The error of the step in flight.
    ///
    /// # Synchronization
    /// Waits for the step in flight.
    pub fn steps(&self) -> Result<u64> {
        self.gate.wait()?;
        Ok(self.core.counts()?.steps)
    }

    /// Steps skipped so far because of a gradient that was not finite.
    ///
    /// # Errors
    /// The error of the step in flight.
    ///
    /// # Synchronization
    /// Waits for the step in flight.
    pub fn skipped_steps(&self) -> Result<u64> {
        self.gate.wait()?;
        Ok(self.core.counts()?.skipped_steps)
    }

    /// The parameters it updates, in the order of their module.
    pub fn parameters(&self) -> impl Iterator<Item = &Parameter> {
        self.core.bound.iter().map(|bound| &bound.parameter)
    }

    /// What every rank must have alike.
    pub(crate) fn description(&self) -> String {
        let mut text = format!("{:?} with learning rate {}\n", self.core.rule, self.learning_rate);
        for bound in &self.core.bound {
            let decay = if bound.decays { "" } else { " without decay" };
            // Writing to a string cannot fail.
            let _ = writeln!(text, "parameter {}{decay}", bound.parameter.name());
        }
        text
    }

    pub(crate) fn state_names(&self) -> &'static [&'static str] {
        self.core.rule.state_names()
    }

    /// Restores the learning rate of a checkpoint, which was in range when it was saved.
    pub(crate) fn restore_learning_rate(&mut self, learning_rate: f64) {
        self.learning_rate = learning_rate;
    }

    /// A slot that nobody looks at.
    pub(crate) fn norm_slot(&mut self) -> Arc<NormSlot> {
        if let Some(free) = self.slots.iter().position(|slot| Arc::strong_count(slot) == 1) {
            self.slots.rotate_left(free); // the longest unused one comes next
        } else {
            self.slots.insert(0, Arc::default());
        }
        Arc::clone(&self.slots[0])
    }
}

impl fmt::Debug for Optimizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Optimizer")
            .field("rule", &self.rule_name())
            .field("parameters", &self.core.bound.len())
            .field("learning_rate", &self.learning_rate)
            .finish_non_exhaustive()
    }
}
