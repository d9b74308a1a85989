//! Fused optimizer steps: gradient scaling, clipping, the update and the low-precision copy in one pass over memory.
//!
//! ```text
//! unless found_inf:
//!     g      = gradient * (clip_coef / grad_scale)
//!     master = rule(master, g, moments)             f32
//!     model  = round(master)                         f16 or bf16, where there is one
//! ```
//!
//! The arithmetic is written out, multiply-add by multiply-add, in [`crate::reference`]; host and GPU follow it bit for
//! bit. Cost of AdamW with f32 gradients: 16 bytes read and 12 written an element, 2 more for a 16-bit model copy.

use serde::{Deserialize, Serialize};

use super::cast::RoundingKey;
use super::host::adamw::{AdamWCoefficients, adamw};
use super::host::sgd::{SgdCoefficients, sgd};
use super::slice::{Slice, SliceMut};
use super::{cast, check_lengths};
use crate::error::{Error, Result};
use crate::reference;

/// What a step's gradients went through before the optimizer sees them, and whether it may use them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepSignal {
    /// Result of clipping by norm; 1 for none.
    pub clip_coef: f32,
    /// Loss scale that is still in the gradients; 1 if they have been unscaled.
    pub grad_scale: f32,
    /// A gradient is NaN or infinite: the step is skipped, and changes no weight and no moment.
    pub found_inf: bool,
}

impl Default for StepSignal {
    /// Gradients as they are.
    fn default() -> Self {
        StepSignal { clip_coef: 1.0, grad_scale: 1.0, found_inf: false }
    }
}

impl StepSignal {
    /// `clip_coef / grad_scale`, in f64 and rounded once.
    pub fn factor(&self) -> f32 {
        (f64::from(self.clip_coef) / f64::from(self.grad_scale)) as f32
    }
}

/// The weights of one tensor.
#[derive(Debug)]
pub enum Weights<'a> {
    /// f32 weights; with `model`, an f16 or bf16 copy that is rounded to nearest from them in the same pass.
    Master {
        /// The weights that are updated.
        master: &'a mut [f32],
        /// What the model computes with, where that is not `master` itself.
        model: Option<SliceMut<'a>>,
    },
    /// f16 or bf16 weights without an f32 master: widened, updated in f32 and rounded back.
    Model {
        /// The weights.
        model: SliceMut<'a>,
        /// How they are rounded back.
        rounding: Rounding,
    },
}

impl Weights<'_> {
    /// Number of elements.
    pub fn len_elems(&self) -> usize {
        match self {
            Weights::Master { master, .. } => master.len(),
            Weights::Model { model, .. } => model.len_elems(),
        }
    }

    fn check(&self) -> Result<()> {
        match self {
            Weights::Master { master, model: Some(model) } => {
                check_lengths("model weights", master.len(), model.len_elems())
            }
            Weights::Model { model, rounding: Rounding::Stochastic { first_index, .. } } => {
                cast::check_indices(*first_index, model.len_elems())
            }
            _ => Ok(()),
        }
    }
}

/// How weights without a master are rounded after an update.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rounding {
    /// To nearest, ties to even: updates below half a gap are lost.
    Nearest,
    /// Up or down at random, right on average; see [`cast_stochastic`](super::cast_stochastic).
    Stochastic {
        /// Seed and step.
        key: RoundingKey,
        /// Global index of the tensor's first element.
        first_index: u64,
    },
}

fn check_positive(argument: &'static str, value: f64) -> Result<()> {
    if value >= 0.0 && value.is_finite() {
        return Ok(());
    }
    Err(Error::InvalidArgument { argument, value: value.to_string(), accepted: "a finite number that is not negative" })
}

fn check_decay(argument: &'static str, value: f64) -> Result<()> {
    if (0.0..1.0).contains(&value) {
        return Ok(());
    }
    Err(Error::InvalidArgument { argument, value: value.to_string(), accepted: "a number from 0 up to, but not, 1" })
}

/// Hyper-parameters of AdamW (Loshchilov & Hutter 2019), with PyTorch's defaults.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct AdamWOptions {
    /// Learning rate.
    pub lr: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
}

impl Default for AdamWOptions {
    fn default() -> Self {
        AdamWOptions { lr: 1e-3, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 1e-2 }
    }
}

impl AdamWOptions {
    /// Fails unless every value is in its range.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] names the value.
    pub fn check(&self) -> Result<()> {
        check_positive("lr", self.lr)?;
        check_decay("beta1", self.beta1)?;
        check_decay("beta2", self.beta2)?;
        check_positive("eps", self.eps)?;
        check_positive("weight_decay", self.weight_decay)
    }

    /// The coefficients of one step, in f64 and rounded once each, as [`reference::AdamW`] says.
    fn coefficients(&self, step: u64, signal: StepSignal) -> AdamWCoefficients {
        AdamWCoefficients {
            factor: signal.factor(),
            beta1_rest: (1.0 - self.beta1) as f32,
            beta2: self.beta2 as f32,
            beta2_rest: (1.0 - self.beta2) as f32,
            correction: (1.0 / (1.0 - reference::power(self.beta2, step)).sqrt()) as f32,
            eps: self.eps as f32,
            step_size: (self.lr / (1.0 - reference::power(self.beta1, step))) as f32,
            decay: (1.0 - self.lr * self.weight_decay) as f32,
        }
    }
}

/// One AdamW step of one tensor.
///
/// `step` counts the steps that were not skipped, from 1. `exp_avg` and `exp_avg_sq` are the moments, as long as the weights;
/// they begin at 0. `gradient`: f32, f16 or bf16.
///
/// # Errors
/// [`Error::LengthMismatch`], [`Error::Unsupported`] for f64 and for a model copy in f32, [`Error::InvalidArgument`] for a step of 0 or
/// hyper-parameters out of range. Nothing is written then, nor when `signal.found_inf` is set.
pub fn adamw_step(
    options: &AdamWOptions,
    step: u64,
    signal: StepSignal,
    weights: Weights<'_>,
    gradient: Slice<'_>,
    exp_avg: &mut [f32],
    exp_avg_sq: &mut [f32],
) -> Result<()> {
    options.check()?;
    if step == 0 {
        let accepted = "steps count from 1";
        return Err(Error::InvalidArgument { argument: "step", value: "0".to_owned(), accepted });
    }
    weights.check()?;
    let len_elems = weights.len_elems();
    check_lengths("gradient", len_elems, gradient.len_elems())?;
    check_lengths("exp_avg", len_elems, exp_avg.len())?;
    check_lengths("exp_avg_sq", len_elems, exp_avg_sq.len())?;
    if signal.found_inf {
        return Ok(());
    }
    adamw(options.coefficients(step, signal), weights, gradient, exp_avg, exp_avg_sq)
}

/// Hyper-parameters of SGD, with PyTorch's defaults.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct SgdOptions {
    /// Learning rate.
    pub lr: f64,
    /// Decay of the velocity; 0 for none.
    pub momentum: f64,
    /// Whether the update looks one step ahead (Nesterov); needs momentum.
    pub nesterov: bool,
    /// Added to the gradient, times the weight.
    pub weight_decay: f64,
}

impl Default for SgdOptions {
    fn default() -> Self {
        SgdOptions { lr: 1e-3, momentum: 0.0, nesterov: false, weight_decay: 0.0 }
    }
}

impl SgdOptions {
    /// Fails unless every value is in its range.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] names the value.
    pub fn check(&self) -> Result<()> {
        check_positive("lr", self.lr)?;
        check_decay("momentum", self.momentum)?;
        if self.nesterov && self.momentum == 0.0 {
            return Err(Error::InvalidArgument {
                argument: "nesterov",
                value: "true with momentum 0".to_owned(),
                accepted: "Nesterov's variant needs momentum",
            });
        }
        check_positive("weight_decay", self.weight_decay)
    }
}

/// One SGD step of one tensor.
///
/// `velocity`: as long as the weights, 0 at first; not touched, and may be empty, without momentum. `gradient`: f32, f16 or
/// bf16.
///
/// # Errors
/// As [`adamw_step`].
pub fn sgd_step(
    options: &SgdOptions,
    signal: StepSignal,
    weights: Weights<'_>,
    gradient: Slice<'_>,
    velocity: &mut [f32],
) -> Result<()> {
    options.check()?;
    weights.check()?;
    let len_elems = weights.len_elems();
    check_lengths("gradient", len_elems, gradient.len_elems())?;
    if options.momentum != 0.0 {
        check_lengths("velocity", len_elems, velocity.len())?;
    }
    if signal.found_inf {
        return Ok(());
    }
    let coefficients = SgdCoefficients {
        factor: signal.factor(),
        lr: options.lr as f32,
        momentum: options.momentum as f32,
        weight_decay: options.weight_decay as f32,
        nesterov: options.nesterov,
    };
    sgd(coefficients, weights, gradient, velocity)
}
