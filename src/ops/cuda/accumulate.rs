//! Gradients into buckets on a device, from wherever a backward left them.

use bytemuck::Zeroable;

use super::cast::{ELEMENTWISE, pairs_table};
use super::table::{Outline, SINGLES, Table, check_apart, pair_regions};
use crate::abi::{AccumulateArguments, CHUNK_ELEMS, ChunkRange, MAX_STAGED, StagedTensor};
use crate::device::cuda::{Kernels, Stream, View};
use crate::error::{Error, Result};

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
        let arguments =
            AccumulateArguments { tensors: self.0.tensors(), range, factor, ..AccumulateArguments::zeroed() };
        // SAFETY: the kernel's own argument over this table, whose views were checked.
        unsafe { self.0.launch(contribution.kernel(), ELEMENTWISE, range.len_chunks, stream, &arguments) }
    }
}

/// `dst = src * factor`, or `dst += src * factor`, for pairs of source and target whose sources may lie somewhere else in every
/// step: gradients that an autograd library allocated ([`Buffer::foreign`](crate::device::cuda::Buffer::foreign)). f32, f16 and
/// bf16 in any pair. The addresses are arguments of the launch, one for each 64 pairs; nothing is allocated or uploaded.
///
/// # Errors
/// [`Error::Unsupported`](crate::Error::Unsupported), [`Error::LengthMismatch`](crate::Error::LengthMismatch);
/// [`Error::InvalidArgument`](crate::Error::InvalidArgument) for views that overlap with others of their launch or are on another
/// device; [`Error::SizeOverflow`](crate::Error::SizeOverflow) for 2^47 elements in a launch; what the driver says. Launches
/// before the one that fails have been enqueued.
pub fn contribute(
    kernels: &Kernels,
    stream: &Stream,
    pairs: &[(View, View)],
    contribution: Contribution,
    factor: f32,
) -> Result<()> {
    contribute_each(kernels, stream, pairs.iter().map(|(src, dst)| (src, dst)), contribution, factor)
}

/// As [`contribute`], of pairs that lie anywhere on the host.
///
/// # Errors
/// As [`contribute`].
pub(crate) fn contribute_each<'v>(
    kernels: &Kernels,
    stream: &Stream,
    mut pairs: impl Iterator<Item = (&'v View, &'v View)> + Clone,
    contribution: Contribution,
    factor: f32,
) -> Result<()> {
    while launch(kernels, stream, pairs.clone().take(MAX_STAGED), contribution, factor)? == MAX_STAGED {
        pairs.nth(MAX_STAGED - 1);
    }
    Ok(())
}

/// One launch, of [`MAX_STAGED`] pairs at most, or none if there is nothing in them; how many pairs there were.
fn launch<'v>(
    kernels: &Kernels,
    stream: &Stream,
    pairs: impl Iterator<Item = (&'v View, &'v View)> + Clone,
    contribution: Contribution,
    factor: f32,
) -> Result<usize> {
    let mut arguments = AccumulateArguments { factor, ..AccumulateArguments::zeroed() };
    let mut outline = Outline::new();
    let (mut len_pairs, mut len_staged, mut len_chunks) = (0, 0, 0);
    for (src, dst) in pairs.clone() {
        let (target, source) = pair_regions(kernels.device(), len_pairs, (src, dst), [SINGLES, SINGLES])?;
        len_pairs += 1;
        if src.is_empty() {
            continue;
        }
        outline.extend(&target, source.as_ref());
        let len_elems = src.len_elems() as u64;
        arguments.staged[len_staged] = StagedTensor {
            src: source.as_ref().unwrap_or(&target).address(), // no source: it is the target
            dst: target.address(),
            len_elems,
            first_chunk: u32::try_from(len_chunks).map_err(|_| too_long(pairs.clone()))?,
            src_dtype: src.dtype() as u16,
            dst_dtype: dst.dtype() as u16,
        };
        len_staged += 1;
        len_chunks += len_elems.div_ceil(CHUNK_ELEMS as u64);
    }
    if len_staged == 0 {
        return Ok(len_pairs);
    }
    if !outline.is_apart() {
        let mut regions = Vec::with_capacity(2 * len_staged);
        for (tensor, (src, dst)) in pairs.clone().enumerate().filter(|(_, (src, _))| !src.is_empty()) {
            let (target, source) = pair_regions(kernels.device(), tensor, (src, dst), [SINGLES, SINGLES])?;
            regions.extend([Some(target), source].into_iter().flatten());
        }
        check_apart(&mut regions)?;
    }
    // The last chunk has a number, too.
    u32::try_from(len_chunks - 1).map_err(|_| too_long(pairs.clone()))?;
    arguments.len_staged = len_staged as u32;
    arguments.range = ChunkRange { chunks: 0, first_chunk: 0, len_chunks };
    if let Some(capture) = stream.open_capture() {
        pairs.for_each(|(src, dst)| capture.keep(&(src.clone(), dst.clone())));
    }
    let shape = ELEMENTWISE.shape(kernels, len_chunks);
    // SAFETY: the kernel's own argument, of views that were checked; private memory is freed behind the kernel, an arena outlives
    // its ranges, and of foreign memory its caller has promised it.
    unsafe { kernels.launch(contribution.kernel(), shape, stream, &arguments) }?;
    Ok(len_pairs)
}

#[cold]
fn too_long<'v>(pairs: impl Iterator<Item = (&'v View, &'v View)> + Clone) -> Error {
    let longest = pairs.clone().map(|(src, _)| src.len_elems()).max();
    let detail = format!("{} tensors, the longest of {longest:?} elements", pairs.count());
    Error::SizeOverflow { what: "chunks of tensors to stage", detail }
}
