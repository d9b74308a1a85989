//! Norms of gradients on a device, alone and together with taking out the loss scale.

use std::ops::Range;

use super::combine::{Combine, Measure, Signal, check_scale};
use super::record::Ticket;
use super::table::{FLOATS, Grid, Operands, Table};
use crate::abi::{NORM_THREADS, NormArguments, NormTensor, UnscaleArguments, UnscaleTensor};
use crate::device::cuda::{Kernels, Stream, View};
use crate::dtype::{DType, NormType};
use crate::error::{Error, Result};
use crate::ops::host::powers::is_product;

const MEASURE: Grid = Grid { threads: NORM_THREADS, resident_blocks: 3 };
/// `measure_norm_p` and `unscale_norm`.
const HEAVY: Grid = Grid { threads: NORM_THREADS, resident_blocks: 2 };

/// The norm of a list of gradients, and what the optimizer is told of it.
///
/// One launch measures all; or one for each bucket as it is reduced, of which the last combines. The bits are the same:
/// those of [`NormSlots`](crate::ops::NormSlots).
pub struct GradientNorm {
    table: Table,
    combine: Combine,
}

impl GradientNorm {
    /// A norm over `gradients`: any float types, any lengths. The host waits until the tables are uploaded.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for integers; [`Error::InvalidArgument`] for another device's; as
    /// [`Buffer::zeroed`](crate::device::cuda::Buffer::zeroed).
    pub fn new(kernels: &Kernels, gradients: &[View]) -> Result<GradientNorm> {
        let mut operands = Operands::new(kernels.device());
        let entry = |(tensor, view): (usize, &View)| {
            let gradient = operands.read("norm", tensor, view, FLOATS)?;
            Ok(NormTensor { gradient, len_elems: view.len_elems() as u64, dtype: view.dtype() as u32, padding: 0 })
        };
        let entries: Vec<NormTensor> = gradients.iter().enumerate().map(entry).collect::<Result<_>>()?;
        let table = Table::new(kernels, &entries, gradients.iter().map(View::len_elems), operands)?;
        Ok(GradientNorm { combine: Combine::new(&table)?, table })
    }

    /// What the last measurement in the stream's order leaves on the device; before the first: change nothing.
    pub fn signal(&self) -> &Signal {
        self.combine.signal()
    }

    /// Measures all gradients.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a norm or bound that is not one, or another device's stream or scale; what the driver
    /// says.
    pub fn measure(&mut self, stream: &Stream, how: &Measure<'_>) -> Result<Ticket> {
        self.measure_last(stream, how, 0..self.table.len_tensors())
    }

    /// Measures some gradients; [`measure_last`](GradientNorm::measure_last) comes when all others are.
    ///
    /// # Errors
    /// As [`GradientNorm::measure`]; [`Error::InvalidArgument`] if another norm was begun, or there are no such gradients.
    pub fn measure_part(&mut self, stream: &Stream, how: &Measure<'_>, tensors: Range<usize>) -> Result<()> {
        self.launch(stream, how, &tensors, false)?;
        self.combine.note_part(how.norm_type, tensors);
        Ok(())
    }

    /// Measures the gradients that are left, perhaps none, and combines.
    ///
    /// # Errors
    /// As [`GradientNorm::measure_part`]; [`Error::InvalidArgument`] if a gradient has not been measured.
    pub fn measure_last(&mut self, stream: &Stream, how: &Measure<'_>, tensors: Range<usize>) -> Result<Ticket> {
        self.launch(stream, how, &tensors, true)?;
        Ok(self.combine.note_finish())
    }

    /// The ticket of the measurement in a graph that was replayed just now.
    pub fn replayed(&mut self) -> Ticket {
        self.combine.note_finish()
    }

    /// Says that the measurement with this ticket, the last one, was captured in a graph and has not run.
    pub fn captured(&mut self, ticket: Ticket) {
        self.combine.take_back(ticket);
    }

    fn launch(&self, stream: &Stream, how: &Measure<'_>, tensors: &Range<usize>, finishes: bool) -> Result<()> {
        how.check(self.table.kernels().device())?;
        let range = self.table.range_of(tensors.clone())?;
        self.combine.check_next(how.norm_type, tensors, finishes)?;
        if range.len_chunks == 0 && !finishes {
            return Ok(());
        }
        let combine = self.combine.arguments(how, finishes);
        let arguments = NormArguments { tensors: self.table.tensors(), range, combine };
        let (kernel, grid) = match how.norm_type {
            NormType::P(p) if is_product(p) => ("measure_norm_products", MEASURE),
            NormType::P(_) => ("measure_norm_p", HEAVY),
            _ => ("measure_norm", MEASURE),
        };
        self.combine.keep(stream, how);
        // SAFETY: the kernel's own argument over this table, whose views were checked, and the memory of `combine`, which
        // has a slot for each chunk; the loss scale is one f32 of this device, and freeing it waits for the kernel.
        unsafe { self.table.launch(kernel, grid, range.len_chunks, stream, &arguments) }
    }
}

/// Gradients without their loss scale, in the type they are wanted in, and the norm of the result, in one read.
///
/// The bits of [`NormSlots::unscale_at`](crate::ops::NormSlots::unscale_at). Norms of another exponent than 1, 2 and inf
/// take a second launch, which reads the result again.
pub struct UnscaleNorm {
    table: Table,
    norm: GradientNorm,
}

impl UnscaleNorm {
    /// Pairs of source and result of one length: f32, f16 and bf16 in any pair, or f64 for both; the same memory in the same
    /// type, or apart. The host waits until the tables are uploaded.
    ///
    /// # Errors
    /// [`Error::Unsupported`], [`Error::LengthMismatch`]; [`Error::InvalidArgument`] for tensors that overlap or are on
    /// another device; as [`Buffer::zeroed`](crate::device::cuda::Buffer::zeroed).
    pub fn new(kernels: &Kernels, pairs: &[(View, View)]) -> Result<UnscaleNorm> {
        let mut operands = Operands::new(kernels.device());
        let mut entries = Vec::with_capacity(pairs.len());
        for (tensor, (src, dst)) in pairs.iter().enumerate() {
            let [src_address, dst_address] = operands.pair(tensor, src, dst, [FLOATS, FLOATS])?;
            if (src.dtype() == DType::F64) != (dst.dtype() == DType::F64) {
                let op = format!("unscaling tensor {tensor} from {} to", src.dtype());
                return Err(Error::Unsupported { op, dtype: dst.dtype() });
            }
            entries.push(UnscaleTensor {
                src: src_address,
                dst: dst_address,
                len_elems: src.len_elems() as u64,
                src_dtype: src.dtype() as u32,
                dst_dtype: dst.dtype() as u32,
            });
        }
        let table = Table::new(kernels, &entries, pairs.iter().map(|(src, _)| src.len_elems()), operands)?;
        let results: Vec<View> = pairs.iter().map(|(_, dst)| dst.clone()).collect();
        Ok(UnscaleNorm { table, norm: GradientNorm::new(kernels, &results)? })
    }

    /// As [`GradientNorm::signal`]. The results have no scale any more.
    pub fn signal(&self) -> &Signal {
        self.norm.signal()
    }

    /// Divides all gradients by `scale`, `[1]` f32, casts and measures them. [`Measure::grad_scale`] is none.
    ///
    /// # Errors
    /// As [`GradientNorm::measure`].
    pub fn measure(&mut self, stream: &Stream, how: &Measure<'_>, scale: &View) -> Result<Ticket> {
        how.check(self.table.kernels().device())?;
        check_scale(self.table.kernels().device(), scale)?;
        if how.grad_scale.is_some() {
            return Err(Error::InvalidArgument {
                argument: "grad_scale",
                value: "a scale in gradients that are unscaled".into(),
                accepted: "must be none: what is measured has no scale",
            });
        }
        let is_two_launches = matches!(how.norm_type, NormType::P(_));
        let first = Measure { norm_type: if is_two_launches { NormType::Inf } else { how.norm_type }, ..*how };
        let arguments = UnscaleArguments {
            tensors: self.table.tensors(),
            range: self.table.range(),
            combine: self.norm.combine.arguments(&first, !is_two_launches),
            scale: scale.address(),
        };
        self.norm.combine.keep(stream, how);
        stream.keep(scale);
        // SAFETY: the kernel's own argument over this table, whose views were checked, and the memory of the norm, whose
        // table has the same chunks; the scale is one f32 of this device, and freeing it waits for the kernel.
        unsafe { self.table.launch("unscale_norm", HEAVY, arguments.range.len_chunks, stream, &arguments)? };
        if is_two_launches {
            return self.norm.measure(stream, how);
        }
        Ok(self.norm.combine.note_finish())
    }

    /// As [`GradientNorm::replayed`].
    pub fn replayed(&mut self) -> Ticket {
        self.norm.replayed()
    }

    /// As [`GradientNorm::captured`].
    pub fn captured(&mut self, ticket: Ticket) {
        self.norm.captured(ticket);
    }
}
