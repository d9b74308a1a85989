//! `kernels/accumulate.cu`: gradients into the buckets, replacing or added.

use std::mem::{offset_of, size_of};

use bytemuck::{Pod, Zeroable};

use super::ChunkRange;

/// Most tensors in the argument of a launch.
pub const MAX_STAGED: usize = 64;

/// One tensor in the argument: f32, f16 or bf16 on both sides. None is empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Zeroable, Pod)]
#[repr(C)]
pub struct StagedTensor {
    /// Address of the source.
    pub src: u64,
    /// Address of the target.
    pub dst: u64,
    /// Elements of both.
    pub len_elems: u64,
    /// Its first chunk among those of the launch; that of tensor 0 is 0, and they ascend.
    pub first_chunk: u32,
    /// [`DType`](crate::DType) of the source.
    pub src_dtype: u16,
    /// [`DType`](crate::DType) of the target.
    pub dst_dtype: u16,
}

const _: () = assert!(size_of::<StagedTensor>() == 32 && offset_of!(StagedTensor, src_dtype) == 28);

/// The argument of `stage_tensors` and `accumulate_tensors`.
#[derive(Debug, Clone, Copy, PartialEq, Zeroable, Pod)]
#[repr(C)]
pub struct AccumulateArguments {
    /// [`CastTensor`](super::CastTensor)s: f32, f16 or bf16 on both sides.
    pub tensors: u64,
    /// What this launch works on; with `chunks` 0 the chunks of all that are `staged`.
    pub range: ChunkRange,
    /// What the sources are multiplied with.
    pub factor: f32,
    /// How many are `staged`, if there is no table.
    pub len_staged: u32,
    /// The first `len_staged` of them are read.
    pub staged: [StagedTensor; MAX_STAGED],
}

const _: () = assert!(size_of::<AccumulateArguments>() == 2088 && offset_of!(AccumulateArguments, staged) == 40);
