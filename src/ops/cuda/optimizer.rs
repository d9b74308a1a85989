//! AdamW and SGD over a list of tensors on a device.

use std::time::Duration;

use super::cell::Cell;
use super::combine::Signal;
use super::table::{Grid, HALVES, Operands, SINGLES, Table, check_length};
use crate::abi::{AdamWRule, ELEMENTWISE_THREADS, OptimizerArguments, OptimizerState, OptimizerTensor, SgdRule};
use crate::device::cuda::{Kernels, Stream, View};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::ops::cast::check_indices;
use crate::ops::{AdamWOptions, SgdOptions};

const STEP: Grid = Grid { threads: ELEMENTWISE_THREADS, resident_blocks: 3 };

/// An optimizer with its hyper-parameters.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Rule {
    /// Two states a tensor: the moments.
    AdamW(AdamWOptions),
    /// One state a tensor, the velocity; without momentum none is needed.
    Sgd(SgdOptions),
}

impl Rule {
    fn check(&self) -> Result<()> {
        match self {
            Rule::AdamW(options) => options.check(),
            Rule::Sgd(options) => options.check(),
        }
    }

    const fn kernel(&self) -> &'static str {
        match self {
            Rule::AdamW(_) => "step_adamw",
            Rule::Sgd(_) => "step_sgd",
        }
    }

    fn needs_velocity(&self) -> bool {
        matches!(self, Rule::Sgd(options) if options.momentum != 0.0)
    }

    /// As the kernel reads it. Both rules have 40 bytes here, of which SGD's kernel reads 32.
    fn to_device(self) -> AdamWRule {
        match self {
            Rule::AdamW(AdamWOptions { lr, beta1, beta2, eps, weight_decay }) => {
                AdamWRule { lr, beta1, beta2, eps, weight_decay }
            }
            Rule::Sgd(SgdOptions { lr, momentum, nesterov, weight_decay }) => {
                let rule = SgdRule { lr, momentum, weight_decay, nesterov: nesterov.into(), padding: 0 };
                let mut bytes = [0; size_of::<AdamWRule>()];
                bytes[..size_of::<SgdRule>()].copy_from_slice(bytemuck::bytes_of(&rule));
                bytemuck::pod_read_unaligned(&bytes)
            }
        }
    }
}

/// The weights of one tensor.
#[derive(Debug, Clone)]
pub enum StepWeights {
    /// f32 weights; with `model`, an f16 or bf16 copy that is rounded to nearest from them.
    Master {
        /// f32.
        master: View,
        /// f16 or bf16.
        model: Option<View>,
    },
    /// f16 or bf16 weights that are widened, updated in f32 and rounded back.
    Model(View),
}

/// One tensor that the step updates: all of one length.
#[derive(Debug, Clone)]
pub struct StepTensor {
    /// f32, f16 or bf16.
    pub gradient: View,
    /// What is updated.
    pub weights: StepWeights,
    /// f32: the moments of AdamW, first and second; the velocity of SGD.
    pub states: Vec<View>,
    /// Whether weight decay applies.
    pub decays: bool,
    /// Global index of the first element, for stochastic rounding.
    pub first_index: u64,
}

/// How many steps there were.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StepCounts {
    /// Made.
    pub steps: u64,
    /// Skipped because a gradient was not finite.
    pub skipped_steps: u64,
}

impl StepCounts {
    fn of(state: OptimizerState) -> StepCounts {
        StepCounts { steps: state.steps, skipped_steps: state.skipped_steps }
    }
}

/// One optimizer over its tensors: unscaling, clipping, the update and the low-precision copy in one launch. The bits of
/// [`adamw_step`](crate::ops::adamw_step) and [`sgd_step`](crate::ops::sgd_step).
pub struct OptimizerStep {
    table: Table,
    rule: Rule,
    device_rule: Cell<AdamWRule>,
    state: Cell<OptimizerState>,
    has_states: bool,
    rounding_seed: Option<u64>,
}

impl OptimizerStep {
    /// A step by `rule` over `tensors`, which counts from 0. `rounding_seed`: weights without a master are rounded at random,
    /// by this seed, the step and the element's index; to nearest without it. The host waits until the tables are uploaded.
    ///
    /// # Errors
    /// [`Error::Unsupported`], [`Error::LengthMismatch`]; [`Error::InvalidArgument`] for hyper-parameters out of range, another
    /// number of states than the rule needs, tensors that overlap or are on another device; [`Error::SizeOverflow`] if a
    /// global index is beyond `u64`; as [`Buffer::zeroed`](crate::device::cuda::Buffer::zeroed).
    pub fn new(
        kernels: &Kernels,
        rule: Rule,
        tensors: &[StepTensor],
        rounding_seed: Option<u64>,
    ) -> Result<OptimizerStep> {
        rule.check()?;
        let has_states = tensors.iter().all(|tensor| !tensor.states.is_empty());
        let mut operands = Operands::new(kernels.device());
        let mut entries = Vec::with_capacity(tensors.len());
        for (index, tensor) in tensors.iter().enumerate() {
            check_states(&rule, index, tensor)?;
            check_indices(tensor.first_index, tensor.gradient.len_elems())?;
            entries.push(entry(&mut operands, index, tensor)?);
        }
        let lens_elems = tensors.iter().map(|tensor| tensor.gradient.len_elems());
        Ok(OptimizerStep {
            table: Table::new(kernels, &entries, lens_elems, operands)?,
            rule,
            device_rule: Cell::new(kernels, &rule.to_device())?,
            state: Cell::new(kernels, &bytemuck::Zeroable::zeroed())?,
            has_states,
            rounding_seed,
        })
    }

    /// Makes the step that `signal` asks for; none: of gradients as they are. Counts it, or that it was skipped.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for another device's stream or signal; what the driver says.
    pub fn step(&self, stream: &Stream, signal: Option<&Signal>) -> Result<()> {
        let device = self.table.kernels().device();
        let range = self.table.range();
        let arguments = OptimizerArguments {
            tensors: self.table.tensors(),
            range,
            rule: self.device_rule.address(),
            state: self.state.address(),
            signal: signal.map_or(Ok(0), |signal| signal.address_on(device))?,
            rounding_seed: self.rounding_seed.unwrap_or(0),
            is_stochastic: self.rounding_seed.is_some().into(),
            padding: 0,
        };
        stream.keep(&(self.device_rule.view(), self.state.view(), signal.cloned()));
        // SAFETY: the kernel's own argument over this table, whose views were checked; the rule is this kernel's, with the
        // states that it needs; freeing the signal waits for the kernel.
        unsafe { self.table.launch(self.rule.kernel(), STEP, range.len_chunks, stream, &arguments) }
    }

    /// The hyper-parameters of steps enqueued from now on.
    pub fn rule(&self) -> Rule {
        self.rule
    }

    /// Changes the hyper-parameters for what is enqueued on `stream` after this call, replayed graphs included; what was
    /// enqueued before keeps the old ones. A launch of one thread. The host does not wait.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for hyper-parameters out of range, another optimizer's, momentum without velocities, or
    /// another device's stream; what the driver says.
    pub fn set_rule(&mut self, stream: &Stream, rule: Rule) -> Result<()> {
        rule.check()?;
        if std::mem::discriminant(&rule) != std::mem::discriminant(&self.rule) {
            return Err(Error::InvalidArgument {
                argument: "rule",
                value: format!("{rule:?}"),
                accepted: "must be of the optimizer that the list was made for",
            });
        }
        if rule.needs_velocity() && !self.has_states {
            return Err(Error::InvalidArgument {
                argument: "momentum",
                value: format!("{rule:?}"),
                accepted: "must be 0: the list was made without velocities",
            });
        }
        self.device_rule.store(stream, &rule.to_device())?;
        self.rule = rule;
        Ok(())
    }

    /// [`set_rule`](OptimizerStep::set_rule) with another learning rate.
    ///
    /// # Errors
    /// As [`set_rule`](OptimizerStep::set_rule).
    pub fn set_learning_rate(&mut self, stream: &Stream, lr: f64) -> Result<()> {
        let rule = match self.rule {
            Rule::AdamW(options) => Rule::AdamW(AdamWOptions { lr, ..options }),
            Rule::Sgd(options) => Rule::Sgd(SgdOptions { lr, ..options }),
        };
        self.set_rule(stream, rule)
    }

    /// Waits for everything enqueued on `stream` and reads how many steps there were.
    ///
    /// # Errors
    /// [`Error::TimedOut`] after `timeout`; what the device failed with.
    pub fn counts(&self, stream: &Stream, timeout: Duration) -> Result<StepCounts> {
        Ok(StepCounts::of(self.state.read(stream, timeout)?))
    }

    /// Sets how many steps there were, in the order of `stream`: from a checkpoint.
    ///
    /// # Errors
    /// What the driver says.
    pub fn set_counts(&self, stream: &Stream, counts: StepCounts) -> Result<()> {
        self.state.store(stream, &[counts.steps, counts.skipped_steps])
    }
}

fn check_states(rule: &Rule, index: usize, tensor: &StepTensor) -> Result<()> {
    let len_states = tensor.states.len();
    let is_right = match rule {
        Rule::AdamW(_) => len_states == 2,
        Rule::Sgd(_) => len_states == 1 || len_states == 0 && !rule.needs_velocity(),
    };
    if is_right {
        return Ok(());
    }
    Err(Error::InvalidArgument {
        argument: "states",
        value: format!("{len_states} of tensor {index}"),
        accepted: "two for AdamW; one for SGD, or none without momentum",
    })
}

fn entry(operands: &mut Operands<'_>, index: usize, tensor: &StepTensor) -> Result<OptimizerTensor> {
    let len_elems = tensor.gradient.len_elems();
    let gradient = operands.read("gradient", index, &tensor.gradient, SINGLES)?;
    let mut write = |what, view: &View, accepted: &[DType]| {
        check_length(what, index, len_elems, view)?;
        operands.write(what, index, view, accepted)
    };
    let (master, model) = match &tensor.weights {
        StepWeights::Master { master, model } => (Some(master), model.as_ref()),
        StepWeights::Model(model) => (None, Some(model)),
    };
    let mut states = [0; 2];
    for (address, view) in states.iter_mut().zip(&tensor.states) {
        *address = write("state", view, &[DType::F32])?;
    }
    Ok(OptimizerTensor {
        gradient,
        master: master.map_or(Ok(0), |view| write("master weights", view, &[DType::F32]))?,
        model: model.map_or(Ok(0), |view| write("model weights", view, HALVES))?,
        states,
        len_elems: len_elems as u64,
        first_index: tensor.first_index,
        gradient_dtype: tensor.gradient.dtype() as u32,
        model_dtype: model.map_or(0, |view| view.dtype() as u32),
        decays: tensor.decays.into(),
        padding: 0,
    })
}
