//! `kernels/cast.cu`: casts, in-place scaling, clipping by value.

use std::mem::{offset_of, size_of};

use bytemuck::{Pod, Zeroable};

use super::ChunkRange;

/// Threads of a block of the kernels in `cast.cu` and `optimizer.cu`.
pub const ELEMENTWISE_THREADS: u32 = 256;

/// One tensor that is read and written. Kernels that work in place use `dst` and `dst_dtype` alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Zeroable, Pod)]
#[repr(C)]
pub struct CastTensor {
    /// `[len_elems]`, aligned to the element; `dst` itself or apart from it.
    pub src: u64,
    /// `[len_elems]`, aligned to the element.
    pub dst: u64,
    /// Elements.
    pub len_elems: u64,
    /// Global index of the first element, for stochastic rounding.
    pub first_index: u64,
    /// Code of a float [`DType`](crate::DType); f32 for stochastic rounding.
    pub src_dtype: u32,
    /// Code of a float [`DType`](crate::DType); f16 or bf16 for stochastic rounding.
    pub dst_dtype: u32,
}

const _: () = assert!(size_of::<CastTensor>() == 40 && offset_of!(CastTensor, src_dtype) == 32);

/// What selects the random bits of stochastic rounding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Zeroable, Pod)]
#[repr(C)]
pub struct RoundingKey {
    /// Seed of the run.
    pub seed: u64,
    /// Optimizer step.
    pub step: u64,
}

const _: () = assert!(size_of::<RoundingKey>() == 16);

/// The argument of `cast_tensors` and `cast_stochastic`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Zeroable, Pod)]
#[repr(C)]
pub struct CastArguments {
    /// [`CastTensor`]s.
    pub tensors: u64,
    /// What this launch casts.
    pub range: ChunkRange,
    /// For `cast_stochastic`.
    pub key: RoundingKey,
    /// Not 0: infinities, given or arising, become the largest finite value.
    pub saturates: u32,
    /// Not read.
    pub padding: u32,
}

const _: () = assert!(size_of::<CastArguments>() == 56 && offset_of!(CastArguments, saturates) == 48);

/// The argument of `scale_tensors`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Zeroable, Pod)]
#[repr(C)]
pub struct ScaleArguments {
    /// [`CastTensor`]s.
    pub tensors: u64,
    /// What this launch scales.
    pub range: ChunkRange,
    /// [`StepSignal`](super::StepSignal); its `clip_coef` is the factor.
    pub signal: u64,
}

const _: () = assert!(size_of::<ScaleArguments>() == 40 && offset_of!(ScaleArguments, signal) == 32);

/// The argument of `clamp_tensors`.
#[derive(Debug, Clone, Copy, PartialEq, Zeroable, Pod)]
#[repr(C)]
pub struct ClampArguments {
    /// [`CastTensor`]s.
    pub tensors: u64,
    /// What this launch limits.
    pub range: ChunkRange,
    /// [`StepSignal`](super::StepSignal) whose loss scale and coefficient are still to be applied; 0 for none.
    pub signal: u64,
    /// Largest magnitude, of unscaled gradients; not negative, not NaN.
    pub limit: f64,
}

const _: () = assert!(size_of::<ClampArguments>() == 48 && offset_of!(ClampArguments, limit) == 40);
