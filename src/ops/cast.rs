//! Casts between float types: to nearest, ties to even, or stochastic.

use half::{bf16, f16};

use super::host::lane::Lane;
use super::host::level::{Kernel, dispatch};
use super::host::philox;
use super::slice::{Slice, SliceMut};
use crate::error::{Error, Result};

/// What becomes of a value that is too large for the narrower type.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Saturate {
    /// Infinity, as IEEE 754 says.
    #[default]
    No,
    /// The largest finite value of its sign; infinities too, as `cvt.satfinite` does. NaN stays NaN.
    Yes,
}

/// `dst = src` with one rounding: to nearest, ties to even. NaN stays NaN (quiet, same sign), also to the same type.
///
/// # Errors
/// [`Error::LengthMismatch`]; nothing is written then.
pub fn cast(src: Slice<'_>, dst: SliceMut<'_>, saturate: Saturate) -> Result<()> {
    super::check_lengths("cast", src.len_elems(), dst.len_elems())?;
    match src {
        Slice::F32(src) => cast_from(src, dst, saturate),
        Slice::F16(src) => cast_from(src, dst, saturate),
        Slice::BF16(src) => cast_from(src, dst, saturate),
        Slice::F64(src) => cast_from(src, dst, saturate),
    }
    Ok(())
}

fn cast_from<S>(src: &[S], dst: SliceMut<'_>, saturate: Saturate)
where
    S: CastTo<f32> + CastTo<f16> + CastTo<bf16> + CastTo<f64>,
{
    match dst {
        SliceMut::F32(dst) => cast_pair(src, dst, saturate),
        SliceMut::F16(dst) => cast_pair(src, dst, saturate),
        SliceMut::BF16(dst) => cast_pair(src, dst, saturate),
        SliceMut::F64(dst) => cast_pair(src, dst, saturate),
    }
}

fn cast_pair<S: CastTo<D>, D>(src: &[S], dst: &mut [D], saturate: Saturate) {
    match saturate {
        Saturate::No => dispatch(Cast::<S, D, false> { src, dst }),
        Saturate::Yes => dispatch(Cast::<S, D, true> { src, dst }),
    }
}

struct Cast<'a, S, D, const SATURATE: bool> {
    src: &'a [S],
    dst: &'a mut [D],
}

impl<S: CastTo<D>, D, const SATURATE: bool> Kernel for Cast<'_, S, D, SATURATE> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        for (dst, src) in self.dst.iter_mut().zip(self.src) {
            *dst = src.cast::<SATURATE>();
        }
    }
}

trait CastTo<D>: Copy {
    fn cast<const SATURATE: bool>(self) -> D;
}

impl<S: Lane, D: Lane> CastTo<D> for S {
    #[inline(always)]
    fn cast<const SATURATE: bool>(self) -> D {
        if SATURATE { D::narrow_saturating(self.widen()) } else { D::narrow(self.widen()) }
    }
}

impl<S: Lane> CastTo<f64> for S {
    #[inline(always)]
    fn cast<const SATURATE: bool>(self) -> f64 {
        f64::from(self.widen()).cast::<SATURATE>()
    }
}

impl CastTo<f64> for f64 {
    #[inline(always)]
    fn cast<const SATURATE: bool>(self) -> f64 {
        if SATURATE && self.is_infinite() { f64::MAX.copysign(self) } else { self }
    }
}

impl CastTo<f32> for f64 {
    #[inline(always)]
    fn cast<const SATURATE: bool>(self) -> f32 {
        let value = self as f32;
        if SATURATE { f32::narrow_saturating(value) } else { value }
    }
}

macro_rules! narrow_f64 {
    ($($dst:ty),*) => {$(
        impl CastTo<$dst> for f64 {
            #[inline(always)]
            fn cast<const SATURATE: bool>(self) -> $dst {
                let value = round_to_odd(self);
                if SATURATE { <$dst>::narrow_saturating(value) } else { <$dst>::narrow(value) }
            }
        }
    )*};
}

narrow_f64!(f16, bf16);

/// `value` as f32 such that rounding once more, to a type of at most 22 bits, is as if `value` had been rounded once: an
/// inexact result ends in an odd bit, so it never lies on a tie (Boldo & Melquiond 2008).
#[inline(always)]
fn round_to_odd(value: f64) -> f32 {
    let nearest = value as f32;
    let back = f64::from(nearest);
    let toward_zero = nearest.to_bits().wrapping_sub(u32::from(back.abs() > value.abs()));
    f32::from_bits(if back == value { nearest.to_bits() } else { toward_zero | 1 })
}

/// What selects the random bits of stochastic rounding. Ranks that round the same tensor pass the same seed and step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RoundingKey {
    /// Seed of the run, the same on every rank.
    pub seed: u64,
    /// Optimizer step: rounding must not repeat its errors.
    pub step: u64,
}

/// `dst = src`, each element rounded up or down with the probabilities that make its mean exact (to 2^-16 of the gap).
///
/// `src`: f32. `dst`: f16 or bf16. `first_index`: global index of the first element, so that shards of a tensor round as
/// the whole does; indices must be unique over all tensors of a step. The bits come from Philox4x32-10 with `seed` as key
/// and (index / 8, step) as counter. Representable values, NaN and infinities are kept as by [`cast`].
///
/// # Errors
/// [`Error::LengthMismatch`]; [`Error::Unsupported`] for other types; [`Error::SizeOverflow`] if the last index is beyond
/// `u64`. Nothing is written then.
pub fn cast_stochastic(
    src: Slice<'_>,
    dst: SliceMut<'_>,
    key: RoundingKey,
    first_index: u64,
    saturate: Saturate,
) -> Result<()> {
    super::check_lengths("stochastic cast", src.len_elems(), dst.len_elems())?;
    check_indices(first_index, src.len_elems())?;
    match (src, dst) {
        (Slice::F32(src), SliceMut::F16(dst)) => {
            dispatch(philox::RoundStochastic { src, dst, key, first_index, saturate })
        }
        (Slice::F32(src), SliceMut::BF16(dst)) => {
            dispatch(philox::RoundStochastic { src, dst, key, first_index, saturate })
        }
        (Slice::F32(_), dst) => {
            return Err(Error::Unsupported { op: "stochastic rounding".to_owned(), dtype: dst.dtype() });
        }
        (src, _) => return Err(Error::Unsupported { op: "stochastic rounding from".to_owned(), dtype: src.dtype() }),
    }
    Ok(())
}

pub(super) fn check_indices(first_index: u64, len_elems: usize) -> Result<()> {
    match first_index.checked_add(len_elems as u64) {
        Some(_) => Ok(()),
        None => Err(Error::SizeOverflow {
            what: "global element index",
            detail: format!("{len_elems} elements from {first_index} on"),
        }),
    }
}
