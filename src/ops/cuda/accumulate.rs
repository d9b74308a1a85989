//! Gradients into buckets on a device, from wherever a backward left them.

use super::cast::{ELEMENTWISE, pairs_table};
use super::table::{SINGLES, Table, lone_pair};
use crate::abi::{AccumulateArguments, CHUNK_ELEMS, CastTensor, ChunkRange};
use crate::device::cuda::{Kernels, Stream, View};
use crate::error::Result;

/// What becomes of what the target holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Contribution {
    /// It is replaced: the first micro-batch.
    Replace,
    /// It is added to, in f32, and the sum rounded once to the target's type.
    Add,
}

impl Contribution {
    const fn kernel(self) -> &'static str {
        match self {
            Contribution::Replace => "stage_tensors",
            Contribution::Add => "accumulate_tensors",
        }
    }
}

/// Sources and targets that stay where they are: one launch for all.
pub struct Contributions(Table);

impl Contributions {
    /// Pairs of source and target of one length, f32, f16 and bf16 in any pair. The host waits until the table is uploaded.
    ///
    /// # Errors
    /// As [`CastList::new`](super::CastList::new).
    pub fn new(kernels: &Kernels, pairs: &[(View, View)]) -> Result<Contributions> {
        let pairs = pairs.iter().map(|(src, dst)| (src, dst, 0));
        Ok(Contributions(pairs_table(kernels, pairs, [SINGLES, SINGLES])?))
    }

    /// `dst = src * factor`, or `dst += src * factor`, for all.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`](crate::Error::InvalidArgument) for another device's stream; what the driver says.
    pub fn launch(&self, stream: &Stream, contribution: Contribution, factor: f32) -> Result<()> {
        let range = self.0.range();
        if range.len_chunks == 0 {
            return Ok(());
        }
        let tensor = bytemuck::Zeroable::zeroed();
        let arguments = AccumulateArguments { tensors: self.0.tensors(), range, tensor, factor, padding: 0 };
        // SAFETY: the kernel's own argument over this table, whose views were checked.
        unsafe { self.0.launch(contribution.kernel(), ELEMENTWISE, range.len_chunks, stream, &arguments) }
    }
}

/// `dst = src * factor`, or `dst += src * factor`, for one tensor whose source may lie somewhere else in every step: a gradient
/// that an autograd library allocated ([`Buffer::foreign`](crate::device::cuda::Buffer::foreign)). f32, f16 and bf16 in any
/// pair; the addresses are arguments of the launch.
///
/// # Errors
/// [`Error::Unsupported`](crate::Error::Unsupported), [`Error::LengthMismatch`](crate::Error::LengthMismatch);
/// [`Error::InvalidArgument`](crate::Error::InvalidArgument) for views that overlap or are on another device; what the
/// driver says.
pub fn contribute(
    kernels: &Kernels,
    stream: &Stream,
    (src, dst): (&View, &View),
    contribution: Contribution,
    factor: f32,
) -> Result<()> {
    let [src_address, dst_address] = lone_pair(kernels.device(), src, dst, [SINGLES, SINGLES])?;
    if src.is_empty() {
        return Ok(());
    }
    let len_elems = src.len_elems() as u64;
    let range = ChunkRange { chunks: 0, first_chunk: 0, len_chunks: len_elems.div_ceil(CHUNK_ELEMS as u64) };
    let tensor = CastTensor {
        src: src_address,
        dst: dst_address,
        len_elems,
        first_index: 0,
        src_dtype: src.dtype() as u32,
        dst_dtype: dst.dtype() as u32,
    };
    let arguments = AccumulateArguments { tensors: 0, range, tensor, factor, padding: 0 };
    let shape = ELEMENTWISE.shape(kernels, range.len_chunks);
    stream.keep(&(src.clone(), dst.clone()));
    // SAFETY: the kernel's own argument, of views that were checked; private memory is freed behind the kernel, an arena outlives
    // its ranges, and of foreign memory its caller has promised it.
    unsafe { kernels.launch(contribution.kernel(), shape, stream, &arguments) }
}
