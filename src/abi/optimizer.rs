//! `kernels/optimizer.cu`: AdamW and SGD over a list of tensors.

use std::mem::{offset_of, size_of};

use bytemuck::{Pod, Zeroable};

use super::ChunkRange;

/// What one tensor's step reads and writes, `[len_elems]` each. Aligned to the element; if all lie equally far, in
/// elements, from a multiple of four, all accesses are wide.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Zeroable, Pod)]
#[repr(C)]
pub struct OptimizerTensor {
    /// f32, f16 or bf16.
    pub gradient: u64,
    /// f32 weights; 0: the model weights are widened, updated and rounded back.
    pub master: u64,
    /// f16 or bf16 weights that the model computes with; 0 if that is `master`.
    pub model: u64,
    /// f32: first and second moment of AdamW; velocity of SGD, 0 without momentum.
    pub states: [u64; 2],
    /// Elements.
    pub len_elems: u64,
    /// Global index of the first element, for stochastic rounding.
    pub first_index: u64,
    /// Code of a [`DType`](crate::DType).
    pub gradient_dtype: u32,
    /// Code of f16 or bf16.
    pub model_dtype: u32,
    /// Not 0: weight decay applies.
    pub decays: u32,
    /// Not read.
    pub padding: u32,
}

const _: () = assert!(size_of::<OptimizerTensor>() == 72 && offset_of!(OptimizerTensor, gradient_dtype) == 56);

/// What the kernel keeps from step to step. In the checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Zeroable, Pod)]
#[repr(C)]
pub struct OptimizerState {
    /// Steps made.
    pub steps: u64,
    /// Steps skipped because a gradient was not finite.
    pub skipped_steps: u64,
    /// Blocks of the running launch that have finished; 0 between launches.
    pub arrivals: u32,
    /// Not read.
    pub padding: u32,
}

const _: () = assert!(size_of::<OptimizerState>() == 24 && offset_of!(OptimizerState, arrivals) == 16);

/// AdamW's hyper-parameters, in device memory.
#[derive(Debug, Clone, Copy, PartialEq, Zeroable, Pod)]
#[repr(C)]
pub struct AdamWRule {
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

const _: () = assert!(size_of::<AdamWRule>() == 40);

/// SGD's hyper-parameters, in device memory.
#[derive(Debug, Clone, Copy, PartialEq, Zeroable, Pod)]
#[repr(C)]
pub struct SgdRule {
    /// Learning rate.
    pub lr: f64,
    /// Decay of the velocity; 0 for none.
    pub momentum: f64,
    /// Added to the gradient, times the weight.
    pub weight_decay: f64,
    /// Not 0: Nesterov's variant.
    pub nesterov: u32,
    /// Not read.
    pub padding: u32,
}

const _: () = assert!(size_of::<SgdRule>() == 32 && offset_of!(SgdRule, nesterov) == 24);

/// The argument of `step_adamw` and `step_sgd`. One launch makes the whole step: it counts it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Zeroable, Pod)]
#[repr(C)]
pub struct OptimizerArguments {
    /// [`OptimizerTensor`]s.
    pub tensors: u64,
    /// What this launch updates.
    pub range: ChunkRange,
    /// [`AdamWRule`] or [`SgdRule`].
    pub rule: u64,
    /// [`OptimizerState`].
    pub state: u64,
    /// [`StepSignal`](super::StepSignal) of these gradients; 0: they are used as they are.
    pub signal: u64,
    /// Seed of stochastic rounding.
    pub rounding_seed: u64,
    /// Not 0: weights without a master are rounded at random.
    pub is_stochastic: u32,
    /// Not read.
    pub padding: u32,
}

const _: () = assert!(size_of::<OptimizerArguments>() == 72 && offset_of!(OptimizerArguments, rounding_seed) == 56);
