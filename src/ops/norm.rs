//! The norm of a list of gradients: `(sum |g|^p)^(1/p)` over every element of every tensor.
//!
//! ```text
//! setup:  NormSlots::new(lengths)            one slot for each chunk of 32,768 elements of each tensor
//! step:   begin(norm_type)
//!         measure(tensor, gradient)          any order, any grouping, each chunk once: as buckets are reduced
//!         combine()                          all slots, in an order fixed by their index
//! ```
//!
//! A slot's value depends on the elements of its chunk alone and the combination on nothing but the slots. So the bits are
//! the same whatever the buckets, the CPU or the number of calls, and replicas that hold the same gradients compute the
//! same norm. Cost: one read of the gradients; the combination reads 16 bytes for each 32,768 elements.
//!
//! Departures from the sum as written, so that it can be trusted: four terms are added in f32, everything above in
//! f64; where squares leave the range of f32 (a magnitude of 1e19, or a run of tiny ones) they are added in f64; a NaN or
//! an infinity reaches the result from any position.

use super::host::level::dispatch;
use super::host::sums::{CHUNK_ELEMS, ChunkNorm, ChunkNormF64, Slot};
use super::host::{powers, unscale};
use super::slice::{Slice, SliceMut};
use crate::dtype::NormType;
use crate::error::{Error, Result};

/// A norm over tensors, and whether it can be trusted.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct NormResult {
    /// The norm; NaN or infinite if an element is. For f64 gradients also infinite if the norm itself is beyond f64.
    pub total_norm: f64,
    /// Whether any element is NaN or infinite.
    pub nonfinite: bool,
    /// Index of the first tensor that has such an element.
    pub first_nonfinite: Option<usize>,
}

/// The partial sums of a norm. Allocated once for a list of tensors; nothing is allocated afterwards.
#[derive(Debug, Clone)]
pub struct NormSlots {
    norm_type: NormType,
    tensors: Vec<TensorSlots>,
    slots: Vec<Slot>,
}

#[derive(Debug, Clone, Copy)]
struct TensorSlots {
    first_slot: usize,
    len_elems: usize,
}

/// Partial sums that the combination keeps while it walks over the slots. A GPU block does the same with its threads.
const COMBINE_LANES: usize = 256;

impl NormSlots {
    /// Elements of one slot. Pieces of a tensor that are measured apart begin at multiples of it.
    pub const CHUNK_ELEMS: usize = CHUNK_ELEMS;

    /// Slots for tensors of these lengths, in the order in which they are numbered.
    ///
    /// # Errors
    /// [`Error::SizeOverflow`] if the lengths do not fit one address space, [`Error::Io`] if there is no memory for the slots
    /// (16 bytes for each 32,768 elements).
    pub fn new(lens_elems: &[usize]) -> Result<NormSlots> {
        let mut len_slots: usize = 0;
        let mut tensors = Vec::with_capacity(lens_elems.len());
        for &len_elems in lens_elems {
            tensors.push(TensorSlots { first_slot: len_slots, len_elems });
            len_slots = len_slots
                .checked_add(len_elems.div_ceil(CHUNK_ELEMS))
                .filter(|len_slots| *len_slots <= isize::MAX as usize / size_of::<Slot>())
                .ok_or_else(|| Error::SizeOverflow {
                    what: "slots of a gradient norm",
                    detail: format!("{} tensors, the last of {len_elems} elements", tensors.len()),
                })?;
        }
        let mut slots = Vec::new();
        slots.try_reserve_exact(len_slots).map_err(|_| {
            let need_bytes = len_slots * size_of::<Slot>();
            let what = format!("allocation of {need_bytes} bytes for the slots of a gradient norm");
            Error::io(what, std::io::ErrorKind::OutOfMemory)
        })?;
        slots.resize(len_slots, Slot::UNMEASURED);
        Ok(NormSlots { norm_type: NormType::L2, tensors, slots })
    }

    /// Number of tensors.
    pub fn len_tensors(&self) -> usize {
        self.tensors.len()
    }

    /// Forgets what was measured and sets the norm that is measured from now on.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if `norm_type` is not defined.
    pub fn begin(&mut self, norm_type: NormType) -> Result<()> {
        norm_type.check()?;
        self.norm_type = norm_type;
        self.slots.fill(Slot::UNMEASURED);
        Ok(())
    }

    /// Measures a whole tensor. Measuring again replaces what was measured.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if there is no such tensor, [`Error::LengthMismatch`] if `gradient` has another length.
    pub fn measure(&mut self, tensor: usize, gradient: Slice<'_>) -> Result<()> {
        self.check_whole(tensor, gradient.len_elems())?;
        self.measure_at(tensor, 0, gradient)
    }

    /// Measures the elements of a tensor from `offset_elems` on.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if there is no such tensor, or if the piece does not begin and end on chunk borders
    /// (the tensor's end is one).
    pub fn measure_at(&mut self, tensor: usize, offset_elems: usize, piece: Slice<'_>) -> Result<()> {
        let norm_type = self.norm_type;
        let slots = self.slots_of(tensor, offset_elems, piece.len_elems())?.iter_mut();
        macro_rules! fill {
            ($kernel:ident, $elements:expr) => {
                for (slot, chunk) in slots.zip($elements.chunks(CHUNK_ELEMS)) {
                    *slot = dispatch($kernel { chunk, norm_type });
                }
            };
        }
        match piece {
            Slice::F32(elements) => fill!(ChunkNorm, elements),
            Slice::F16(elements) => fill!(ChunkNorm, elements),
            Slice::BF16(elements) => fill!(ChunkNorm, elements),
            Slice::F64(elements) => fill!(ChunkNormF64, elements),
        }
        Ok(())
    }

    /// Writes `dst = src * inv_scale`, rounded to the type of `dst`, and measures `dst` as [`NormSlots::measure_at`]
    /// would: the same bits, with one pass over memory instead of two.
    ///
    /// `src`, `dst`: a piece of the tensor from `offset_elems` on, both of the same length; f32, f16 and bf16 in any pair,
    /// or f64 for both (`inv_scale` is then widened).
    ///
    /// # Errors
    /// As [`NormSlots::measure_at`]; [`Error::LengthMismatch`] if the lengths differ, [`Error::Unsupported`] for f64 with
    /// another type. Nothing is written in these cases.
    pub fn unscale_at(
        &mut self,
        tensor: usize,
        offset_elems: usize,
        src: Slice<'_>,
        dst: SliceMut<'_>,
        inv_scale: f32,
    ) -> Result<()> {
        let norm_type = self.norm_type;
        super::check_lengths("unscaled gradient", src.len_elems(), dst.len_elems())?;
        let slots = self.slots_of(tensor, offset_elems, src.len_elems())?;
        unscale::unscale(slots, norm_type, src, dst, inv_scale)
    }

    /// As [`NormSlots::unscale_at`] for a whole tensor in place.
    ///
    /// # Errors
    /// As [`NormSlots::measure`].
    pub fn unscale_in_place(&mut self, tensor: usize, gradient: SliceMut<'_>, inv_scale: f32) -> Result<()> {
        let norm_type = self.norm_type;
        self.check_whole(tensor, gradient.len_elems())?;
        let slots = self.slots_of(tensor, 0, gradient.len_elems())?;
        unscale::unscale_in_place(slots, norm_type, gradient, inv_scale);
        Ok(())
    }

    /// Counts a tensor as measured with a norm of 0: a parameter that has no gradient in this step.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if there is no such tensor.
    pub fn skip(&mut self, tensor: usize) -> Result<()> {
        let len_elems = self.tensor(tensor)?.len_elems;
        self.slots_of(tensor, 0, len_elems)?.fill(Slot::NOTHING);
        Ok(())
    }

    /// The norm over everything that was measured since [`NormSlots::begin`].
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] names the first tensor of which a chunk has not been measured.
    pub fn combine(&self) -> Result<NormResult> {
        if let Some(slot) = self.slots.iter().position(|slot| *slot == Slot::UNMEASURED) {
            let tensor = self.tensor_of(slot);
            let TensorSlots { first_slot, len_elems } = self.tensors[tensor];
            return Err(Error::InvalidArgument {
                argument: "gradient norm",
                value: format!(
                    "tensor {tensor} ({len_elems} elements) not measured from element {} on",
                    (slot - first_slot) * CHUNK_ELEMS
                ),
                accepted: "every tensor must be measured or skipped before the norm is combined",
            });
        }
        let first_nonfinite = self.slots.iter().position(|slot| !slot.sum.is_finite()).map(|slot| self.tensor_of(slot));
        let total_norm = match first_nonfinite {
            None => self.finite_norm(),
            Some(_) if self.slots.iter().any(|slot| slot.sum.is_nan()) => f64::NAN,
            Some(_) => f64::INFINITY,
        };
        Ok(NormResult { total_norm, nonfinite: first_nonfinite.is_some(), first_nonfinite })
    }

    fn finite_norm(&self) -> f64 {
        if self.norm_type == NormType::Inf {
            return self.slots.iter().map(|slot| slot.sum).fold(0.0, f64::max);
        }
        // Slots without a term have nothing to scale.
        let scale = self.slots.iter().filter(|slot| slot.sum != 0.0).map(|slot| slot.scale).fold(0.0, f64::max);
        if scale == 0.0 {
            return 0.0;
        }
        let mut lanes = [0f64; COMBINE_LANES];
        for row in self.slots.chunks(COMBINE_LANES) {
            // Nor can they be: their ratio to a tiny scale may be infinite, and 0 times that is NaN.
            for (lane, slot) in lanes.iter_mut().zip(row).filter(|(_, slot)| slot.sum != 0.0) {
                *lane += if slot.scale == scale { slot.sum } else { slot.sum * self.powered(slot.scale / scale) };
            }
        }
        let mut width = COMBINE_LANES / 2;
        while width > 0 {
            for lane in 0..width {
                lanes[lane] += lanes[lane + width];
            }
            width /= 2;
        }
        let sum = lanes[0];
        match self.norm_type {
            NormType::L1 | NormType::Inf => sum * scale,
            NormType::L2 => sum.sqrt() * scale,
            NormType::P(p) => powers::power(sum, 1.0 / p) * scale,
        }
    }

    /// `ratio^p`, for a ratio of at most 1.
    fn powered(&self, ratio: f64) -> f64 {
        match self.norm_type {
            NormType::L1 | NormType::Inf => ratio,
            NormType::L2 => ratio * ratio,
            NormType::P(p) => powers::power(ratio, p),
        }
    }

    fn tensor(&self, tensor: usize) -> Result<TensorSlots> {
        self.tensors.get(tensor).copied().ok_or_else(|| Error::InvalidArgument {
            argument: "tensor",
            value: format!("{tensor} of {}", self.tensors.len()),
            accepted: "an index below the number of tensors",
        })
    }

    /// The tensor whose chunk has this slot. Empty tensors have none.
    fn tensor_of(&self, slot: usize) -> usize {
        self.tensors.partition_point(|tensor| tensor.first_slot <= slot).saturating_sub(1)
    }

    fn check_whole(&self, tensor: usize, actual_elems: usize) -> Result<()> {
        let expected_elems = self.tensor(tensor)?.len_elems;
        if actual_elems != expected_elems {
            return Err(Error::LengthMismatch {
                what: format!("gradient of tensor {tensor}"),
                expected_elems,
                actual_elems,
            });
        }
        Ok(())
    }

    fn slots_of(&mut self, tensor: usize, offset_elems: usize, piece_elems: usize) -> Result<&mut [Slot]> {
        let TensorSlots { first_slot, len_elems } = self.tensor(tensor)?;
        let end_elems = offset_elems.checked_add(piece_elems).filter(|end| *end <= len_elems);
        match end_elems {
            Some(end_elems)
                if offset_elems.is_multiple_of(CHUNK_ELEMS)
                    && (end_elems == len_elems || end_elems.is_multiple_of(CHUNK_ELEMS)) =>
            {
                let slots = offset_elems / CHUNK_ELEMS..end_elems.div_ceil(CHUNK_ELEMS);
                Ok(&mut self.slots[first_slot + slots.start.min(slots.end)..first_slot + slots.end])
            }
            _ => Err(Error::InvalidArgument {
                argument: "piece of a gradient",
                value: format!("{piece_elems} elements from {offset_elems} on, of tensor {tensor} with {len_elems}"),
                accepted: "pieces begin and end at multiples of NormSlots::CHUNK_ELEMS or at the tensor's end",
            }),
        }
    }
}

/// The norm of `tensors` in one call: `begin`, `measure` for each, `combine`.
///
/// # Errors
/// [`Error::LengthMismatch`] if the tensors are not those for which `slots` was made, [`Error::InvalidArgument`] if
/// `norm_type` is not defined.
pub fn grad_norm(tensors: &[Slice<'_>], norm_type: NormType, slots: &mut NormSlots) -> Result<NormResult> {
    if tensors.len() != slots.len_tensors() {
        return Err(Error::InvalidArgument {
            argument: "tensors",
            value: format!("{} tensors", tensors.len()),
            accepted: "as many tensors as the slots were made for",
        });
    }
    slots.begin(norm_type)?;
    for (tensor, gradient) in tensors.iter().enumerate() {
        slots.measure(tensor, *gradient)?;
    }
    slots.combine()
}
