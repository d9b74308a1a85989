//! `kernels/accumulate.cu`: gradients into the buckets, replacing or added.

use std::mem::{offset_of, size_of};

use bytemuck::{Pod, Zeroable};

use super::{CastTensor, ChunkRange};

/// The argument of `stage_tensors` and `accumulate_tensors`.
#[derive(Debug, Clone, Copy, PartialEq, Zeroable, Pod)]
#[repr(C)]
pub struct AccumulateArguments {
    /// [`CastTensor`]s: f32, f16 or bf16 on both sides.
    pub tensors: u64,
    /// What this launch works on; with `chunks` 0 the chunks of `tensor`, all `len_chunks` of them.
    pub range: ChunkRange,
    /// The only one, if there is no table.
    pub tensor: CastTensor,
    /// What the sources are multiplied with.
    pub factor: f32,
    /// Not read.
    pub padding: u32,
}

const _: () = assert!(size_of::<AccumulateArguments>() == 80 && offset_of!(AccumulateArguments, factor) == 72);
