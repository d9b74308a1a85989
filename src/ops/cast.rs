//! Casts between float types: to nearest, ties to even, or stochastic.

use bytemuck::Zeroable;
use half::{bf16, f16};

use super::host::lane::{Lane, map};
use super::host::level::{Kernel, Level, dispatch};
use super::host::philox;
use super::slice::{Slice, SliceMut};
use crate::error::{Error, Result};
use crate::streamed::{self, LINE_BYTES};

/// What becomes of a value that is too large for the narrower type.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Saturate {
    /// Infinity, as IEEE 754 says.
    #[default]
    No,
    /// The largest finite value of its sign; infinities too, as `cvt.satfinite` does. NaN stays NaN.
    Yes,
}

/// `dst = src` with one rounding: to nearest, ties to even. NaN stays NaN of the same sign, and is quiet
/// where the result is narrower.
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

/// Results from here on are streamed: no cache holds them until they are read, and a plain store fetches first what it writes over,
/// which for bf16 to f32 is 4 of 10 bytes that move.
const STREAM_BYTES: usize = 64 << 20;

fn cast_pair<S: CastTo<D>, D: Copy + Zeroable>(src: &[S], dst: &mut [D], saturate: Saturate) {
    if size_of_val(dst) >= STREAM_BYTES && cfg!(target_arch = "x86_64") {
        cast_streamed(src, dst, saturate);
    } else {
        cast_cached(src, dst, saturate);
    }
}

fn cast_cached<S: CastTo<D>, D>(src: &[S], dst: &mut [D], saturate: Saturate) {
    match saturate {
        Saturate::No => dispatch(Cast::<S, D, false> { src, dst }),
        Saturate::Yes => dispatch(Cast::<S, D, true> { src, dst }),
    }
}

fn cast_streamed<S: CastTo<D>, D: Copy + Zeroable>(src: &[S], dst: &mut [D], saturate: Saturate) {
    // So that tiles begin with a line.
    let head = dst.as_ptr().align_offset(LINE_BYTES).min(dst.len());
    let (src_head, src) = src.split_at(head);
    let (dst_head, dst) = dst.split_at_mut(head);
    cast_cached(src_head, dst_head, saturate);
    let whole = dst.len() / line_elems::<D>() * line_elems::<D>();
    let (src, src_tail) = src.split_at(whole);
    let (dst, dst_tail) = dst.split_at_mut(whole);
    match saturate {
        Saturate::No => dispatch(CastLines(Cast::<S, D, false> { src, dst })),
        Saturate::Yes => dispatch(CastLines(Cast::<S, D, true> { src, dst })),
    }
    streamed::fence();
    cast_cached(src_tail, dst_tail, saturate);
}

/// Elements of a line.
const fn line_elems<D>() -> usize {
    LINE_BYTES / size_of::<D>()
}

/// As [`Cast`], of whole lines that lie on lines. Nobody looks at the result before [`streamed::fence`].
struct CastLines<'a, S, D, const SATURATE: bool>(Cast<'a, S, D, SATURATE>);

impl<S: CastTo<D>, D: Copy + Zeroable, const SATURATE: bool> Kernel for CastLines<'_, S, D, SATURATE> {
    type Output = ();

    #[inline(always)]
    fn run(self, level: Level) {
        let Cast { src, dst } = self.0;
        let len = line_elems::<D>();
        for (src, dst) in src.chunks_exact(len).zip(dst.chunks_exact_mut(len)) {
            // As many as the narrowest type has.
            let mut line = [D::zeroed(); LINE_BYTES / 2];
            S::cast_all::<SATURATE>(src, &mut line[..len], level);
            // SAFETY: a line each; that of `dst` lies on one, and `dst` is borrowed until the caller's fence is behind.
            unsafe { streamed::store_line(line.as_ptr().cast(), dst.as_mut_ptr().cast()) };
        }
    }
}

struct Cast<'a, S, D, const SATURATE: bool> {
    src: &'a [S],
    dst: &'a mut [D],
}

impl<S: CastTo<D>, D, const SATURATE: bool> Kernel for Cast<'_, S, D, SATURATE> {
    type Output = ();

    #[inline(always)]
    fn run(self, level: Level) {
        S::cast_all::<SATURATE>(self.src, self.dst, level);
    }
}

trait CastTo<D>: Copy {
    fn cast<const SATURATE: bool>(self) -> D;

    /// As many as the shorter one has.
    #[inline(always)]
    fn cast_all<const SATURATE: bool>(src: &[Self], dst: &mut [D], _level: Level) {
        for (dst, src) in dst.iter_mut().zip(src) {
            *dst = src.cast::<SATURATE>();
        }
    }
}

impl<S: Lane, D: Lane> CastTo<D> for S {
    #[inline(always)]
    fn cast<const SATURATE: bool>(self) -> D {
        if SATURATE { D::narrow_saturating(self.widen()) } else { D::narrow(self.widen()) }
    }

    #[inline(always)]
    fn cast_all<const SATURATE: bool>(src: &[S], dst: &mut [D], level: Level) {
        if !SATURATE {
            return map(src, dst, level, |x| x);
        }
        for (dst, src) in dst.iter_mut().zip(src) {
            *dst = D::narrow_saturating(src.widen());
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    const LEN_ELEMS: usize = 1024;

    /// Wherever it begins and however long it is, with the bits of the plain loop, and nothing beside it.
    #[test]
    fn streamed_results_are_the_cached_ones() {
        let src: Vec<f32> = (0..3 * LEN_ELEMS).map(|i| f32::from_bits((i as u32).wrapping_mul(0x9e37_79b9))).collect();
        for len in [0, 1, 15, 16, 17, LEN_ELEMS - 1, LEN_ELEMS + 1, 2 * LEN_ELEMS + 333] {
            for skew in [0, 1, 5, 31] {
                for saturate in [Saturate::No, Saturate::Yes] {
                    let [mut cached, mut streamed] = [(); 2].map(|()| vec![bf16::ONE; skew + len + 40]);
                    cast_cached(&src[..len], &mut cached[skew..skew + len], saturate);
                    cast_streamed(&src[..len], &mut streamed[skew..skew + len], saturate);
                    let bits = |values: &[bf16]| values.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                    assert_eq!(bits(&cached), bits(&streamed), "{len} from {skew}");
                }
            }
        }
    }

    #[test]
    fn a_result_that_no_cache_holds_is_whole() {
        let src: Vec<bf16> = (0..STREAM_BYTES / 4 + 13).map(|i| bf16::from_bits(i as u16 & 0x7f7f)).collect();
        let mut dst = vec![f32::NAN; src.len()];
        cast(Slice::BF16(&src), SliceMut::F32(&mut dst), Saturate::No).unwrap();
        assert!(dst.iter().zip(&src).all(|(wide, narrow)| wide.to_bits() == u32::from(narrow.to_bits()) << 16));
    }
}
