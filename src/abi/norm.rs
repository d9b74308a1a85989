//! `kernels/norm.cu`, `kernels/unscale.cu` and `kernels/combine.cuh`: gradients in, norm and clip coefficient out.

use std::mem::{offset_of, size_of};

use bytemuck::{Pod, Zeroable};

use super::ChunkRange;
use crate::dtype::NormType;

/// Threads of a block of `measure_norm`, `measure_norm_products` and `measure_norm_p`; four teams.
pub const NORM_THREADS: u32 = 256;

/// One gradient that is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Zeroable, Pod)]
#[repr(C)]
pub struct NormTensor {
    /// `[len_elems]`, aligned to the element.
    pub gradient: u64,
    /// Elements.
    pub len_elems: u64,
    /// Code of a float [`DType`](crate::DType).
    pub dtype: u32,
    /// Not read.
    pub padding: u32,
}

const _: () = assert!(size_of::<NormTensor>() == 24 && offset_of!(NormTensor, dtype) == 16);

/// A chunk's part of the norm: `sum * scale^p`; for the maximum norm `sum` is the maximum.
#[derive(Debug, Clone, Copy, PartialEq, Zeroable, Pod)]
#[repr(C)]
pub struct NormSlot {
    /// Sum of the terms.
    pub sum: f64,
    /// What every magnitude was divided by.
    pub scale: f64,
}

const _: () = assert!(size_of::<NormSlot>() == 16);

/// What the gradients of a step went through, and whether the optimizer may use them. On the device; the kernels that
/// clip, update and scale read it there.
#[derive(Debug, Clone, Copy, PartialEq, Zeroable, Pod)]
#[repr(C)]
pub struct StepSignal {
    /// Norm of the unscaled gradients.
    pub total_norm: f64,
    /// First slot that is not finite; `u64::MAX` if there is none.
    pub first_nonfinite: u64,
    /// 1 if the step is skipped.
    pub clip_coef: f32,
    /// Loss scale that is still in the gradients.
    pub grad_scale: f32,
    /// Not 0: a gradient is NaN or infinite.
    pub nonfinite: u32,
    /// Not 0: the step is skipped.
    pub found_inf: u32,
}

const _: () = assert!(size_of::<StepSignal>() == 32 && offset_of!(StepSignal, clip_coef) == 16);

/// A copy of the signal for the host, one of a ring in pinned memory.
///
/// Valid if `generation` is the expected one before and after `signal` is read; the first norm has generation 1.
#[derive(Debug, Clone, Copy, PartialEq, Zeroable, Pod)]
#[repr(C)]
pub struct NormRecord {
    /// What was found.
    pub signal: StepSignal,
    /// Posted last; 0 while the record is written.
    pub generation: u32,
    /// Not read.
    pub padding: u32,
}

const _: () = assert!(size_of::<NormRecord>() == 40 && offset_of!(NormRecord, generation) == 32);

/// What the kernel keeps from launch to launch; zero at first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Zeroable, Pod)]
#[repr(C)]
pub struct NormState {
    /// Blocks of the running launch that have finished; 0 between launches.
    pub arrivals: u32,
    /// Norms finished so far.
    pub generation: u32,
}

const _: () = assert!(size_of::<NormState>() == 8);

/// How the slots become a norm.
#[derive(Debug, Clone, Copy, PartialEq, Zeroable, Pod)]
#[repr(C)]
pub struct CombineArguments {
    /// [`NormSlot`]s, one for each chunk of all tensors. Written by the launches that measure; zero for skipped tensors.
    pub slots: u64,
    /// [`NormState`].
    pub state: u64,
    /// [`StepSignal`], written.
    pub signal: u64,
    /// `[len_records]` [`NormRecord`], written in turn: number `generation % len_records`.
    pub records: u64,
    /// f32, the loss scale that is in the gradients; 0 for none.
    pub grad_scale: u64,
    /// Bound of the norm; infinite for none.
    pub max_norm: f64,
    /// The exponent, where it is not 1, 2 or infinite: 3, 4, 5 or 6 for `measure_norm_products`.
    pub p: f64,
    /// Slots that are combined: all, not only those of this launch.
    pub len_slots: u64,
    /// Records; 0 for none.
    pub len_records: u32,
    /// [`norm_kind`].
    pub kind: u32,
    /// Not 0: the last block of this launch combines.
    pub finishes: u32,
    /// What skips the step. 0: nothing. 1: a NaN or an infinity. 2: that, or what the signal says already: of the same
    /// gradients, before they were clipped by value.
    pub skips: u32,
}

const _: () = assert!(size_of::<CombineArguments>() == 80 && offset_of!(CombineArguments, len_records) == 64);

/// The argument of `measure_norm`, `measure_norm_products` and `measure_norm_p`.
#[derive(Debug, Clone, Copy, PartialEq, Zeroable, Pod)]
#[repr(C)]
pub struct NormArguments {
    /// [`NormTensor`]s.
    pub tensors: u64,
    /// What this launch measures.
    pub range: ChunkRange,
    /// What follows.
    pub combine: CombineArguments,
}

const _: () = assert!(size_of::<NormArguments>() == 112 && offset_of!(NormArguments, combine) == 32);

/// One gradient that is unscaled, cast and measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Zeroable, Pod)]
#[repr(C)]
pub struct UnscaleTensor {
    /// `[len_elems]`, aligned to the element.
    pub src: u64,
    /// `[len_elems]`, aligned to the element; `src` itself if the dtype is the same, else apart from it.
    pub dst: u64,
    /// Elements.
    pub len_elems: u64,
    /// Code of a float [`DType`](crate::DType).
    pub src_dtype: u32,
    /// The same for the result; f64 with f64 only.
    pub dst_dtype: u32,
}

const _: () = assert!(size_of::<UnscaleTensor>() == 32 && offset_of!(UnscaleTensor, src_dtype) == 24);

/// The argument of `unscale_norm`.
#[derive(Debug, Clone, Copy, PartialEq, Zeroable, Pod)]
#[repr(C)]
pub struct UnscaleArguments {
    /// [`UnscaleTensor`]s.
    pub tensors: u64,
    /// What this launch unscales.
    pub range: ChunkRange,
    /// What follows. `grad_scale` is that of the results: 0. `kind` is not that of an exponent.
    pub combine: CombineArguments,
    /// f32, the loss scale that is taken out; finite, not 0.
    pub scale: u64,
}

const _: () = assert!(size_of::<UnscaleArguments>() == 120 && offset_of!(UnscaleArguments, scale) == 112);

/// The code of a norm type, and its exponent where the kernel reads one.
pub const fn norm_kind(norm_type: NormType) -> (u32, f64) {
    match norm_type {
        NormType::L1 => (0, 1.0),
        NormType::L2 => (1, 2.0),
        NormType::Inf => (2, 0.0),
        NormType::P(p) => (3, p),
    }
}
