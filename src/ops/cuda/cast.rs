//! Casts, scaling and clipping by value of lists of tensors on a device.

use bytemuck::Zeroable;

use super::combine::Signal;
use super::table::{FLOATS, Grid, HALVES, Operands, Table};
use crate::abi::{self, CastArguments, CastTensor, ClampArguments, ELEMENTWISE_THREADS, ScaleArguments};
use crate::device::cuda::{Kernels, Stream, View};
use crate::dtype::DType;
use crate::error::Result;
use crate::ops::cast::check_indices;
use crate::ops::{RoundingKey, Saturate, clip};

pub(super) const ELEMENTWISE: Grid = Grid { threads: ELEMENTWISE_THREADS, resident_blocks: 3 };

/// The table of pairs of source and target, of one length each.
pub(super) fn pairs_table<'v>(
    kernels: &Kernels,
    pairs: impl Iterator<Item = (&'v View, &'v View, u64)> + Clone,
    accepted: [&[DType]; 2],
) -> Result<Table> {
    let mut operands = Operands::new(kernels.device());
    let mut entries = Vec::new();
    for (tensor, (src, dst, first_index)) in pairs.clone().enumerate() {
        let [src_address, dst_address] = operands.pair(tensor, src, dst, accepted)?;
        entries.push(CastTensor {
            src: src_address,
            dst: dst_address,
            len_elems: src.len_elems() as u64,
            first_index,
            src_dtype: src.dtype() as u32,
            dst_dtype: dst.dtype() as u32,
        });
    }
    Table::new(kernels, &entries, pairs.map(|(src, ..)| src.len_elems()), operands)
}

/// `dst = src` with one rounding for a list of pairs: [`cast`](fn@crate::ops::cast), any float types.
pub struct CastList(Table);

impl CastList {
    /// Pairs of source and target of one length: the same memory in the same type, or apart. The host waits until the table
    /// is uploaded.
    ///
    /// # Errors
    /// [`Error::Unsupported`](crate::Error::Unsupported), [`Error::LengthMismatch`](crate::Error::LengthMismatch);
    /// [`Error::InvalidArgument`](crate::Error::InvalidArgument) for tensors that overlap or are on another device; as
    /// [`Buffer::zeroed`](crate::device::cuda::Buffer::zeroed).
    pub fn new(kernels: &Kernels, pairs: &[(View, View)]) -> Result<CastList> {
        let pairs = pairs.iter().map(|(src, dst)| (src, dst, 0));
        Ok(CastList(pairs_table(kernels, pairs, [FLOATS, FLOATS])?))
    }

    /// Casts all.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`](crate::Error::InvalidArgument) for another device's stream; what the driver says.
    pub fn cast(&self, stream: &Stream, saturate: Saturate) -> Result<()> {
        launch_cast(&self.0, "cast_tensors", stream, abi::RoundingKey::zeroed(), saturate)
    }
}

/// Stochastic rounding of f32 to f16 or bf16 for a list of pairs: [`cast_stochastic`](crate::ops::cast_stochastic).
pub struct StochasticCastList(Table);

impl StochasticCastList {
    /// Triples of source, target and the global index of their first element. The host waits until the table is uploaded.
    ///
    /// # Errors
    /// As [`CastList::new`]; [`Error::SizeOverflow`](crate::Error::SizeOverflow) if the last index is beyond `u64`.
    pub fn new(kernels: &Kernels, tensors: &[(View, View, u64)]) -> Result<StochasticCastList> {
        tensors.iter().try_for_each(|(src, _, first_index)| check_indices(*first_index, src.len_elems()))?;
        let tensors = tensors.iter().map(|(src, dst, first_index)| (src, dst, *first_index));
        Ok(StochasticCastList(pairs_table(kernels, tensors, [&[DType::F32], HALVES])?))
    }

    /// Casts all. The step in `key` is an argument of the launch: a captured graph would repeat it.
    ///
    /// # Errors
    /// As [`CastList::cast`].
    pub fn cast(&self, stream: &Stream, key: RoundingKey, saturate: Saturate) -> Result<()> {
        let RoundingKey { seed, step } = key;
        launch_cast(&self.0, "cast_stochastic", stream, abi::RoundingKey { seed, step }, saturate)
    }
}

fn launch_cast(table: &Table, kernel: &str, stream: &Stream, key: abi::RoundingKey, saturate: Saturate) -> Result<()> {
    let range = table.range();
    if range.len_chunks == 0 {
        return Ok(());
    }
    let saturates = (saturate == Saturate::Yes).into();
    let arguments = CastArguments { tensors: table.tensors(), range, key, saturates, padding: 0 };
    // SAFETY: the argument of both kernels over this table, whose views were checked for the one it was made for.
    unsafe { table.launch(kernel, ELEMENTWISE, range.len_chunks, stream, &arguments) }
}

/// Gradients that are clipped in place, by norm or by value.
pub struct ClipList(Table);

impl ClipList {
    /// Gradients of any float types, none twice. The host waits until the table is uploaded.
    ///
    /// # Errors
    /// As [`CastList::new`].
    pub fn new(kernels: &Kernels, gradients: &[View]) -> Result<ClipList> {
        let gradients = gradients.iter().map(|gradient| (gradient, gradient, 0));
        Ok(ClipList(pairs_table(kernels, gradients, [FLOATS, FLOATS])?))
    }

    /// Multiplies by the clip coefficient of `signal`: [`scale_in_place`](crate::ops::scale_in_place). Reads and writes nothing if
    /// it is 1. For trainers whose optimizer does not take the coefficient itself.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`](crate::Error::InvalidArgument) for another device's stream or signal; what the driver says.
    pub fn scale(&self, stream: &Stream, signal: &Signal) -> Result<()> {
        stream.keep(signal);
        let signal = signal.address_on(self.0.kernels().device())?;
        let range = self.0.range();
        if range.len_chunks == 0 {
            return Ok(());
        }
        let arguments = ScaleArguments { tensors: self.0.tensors(), range, signal };
        // SAFETY: the kernel's own argument over this table, whose views were checked; freeing the signal waits for it.
        unsafe { self.0.launch("scale_tensors", ELEMENTWISE, range.len_chunks, stream, &arguments) }
    }

    /// Limits every element to `[-limit, limit]`, the limit meant for gradients as the optimizer sees them: what `signal` says
    /// is still to be divided out or multiplied in is. [`clip_value`](crate::ops::clip_value) otherwise.
    ///
    /// # Errors
    /// As [`ClipList::scale`]; [`Error::InvalidArgument`](crate::Error::InvalidArgument) for a limit that is negative or NaN.
    pub fn clamp(&self, stream: &Stream, limit: f32, signal: Option<&Signal>) -> Result<()> {
        clip::check_limit(limit)?;
        stream.keep(&signal.cloned());
        let device = self.0.kernels().device();
        let signal = signal.map_or(Ok(0), |signal| signal.address_on(device))?;
        let range = self.0.range();
        if range.len_chunks == 0 {
            return Ok(());
        }
        let arguments = ClampArguments { tensors: self.0.tensors(), range, signal, limit: limit.into() };
        // SAFETY: as for `scale`.
        unsafe { self.0.launch("clamp_tensors", ELEMENTWISE, range.len_chunks, stream, &arguments) }
    }
}
