//! `dst = src * inv_scale` and the norm of `dst`, run by run, so that the second read of a run hits the cache.

use super::lane::{Lane, map, map_in_place};
use super::level::{Kernel, Level, dispatch};
use super::sums::{CHUNK_ELEMS, ChunkNormF64, MakeRun, Slot, chunk_made_by_runs};
use crate::dtype::NormType;
use crate::error::{Error, Result};
use crate::ops::slice::{Slice, SliceMut};

/// Unscales `src` into `dst`, which is as long, and fills one slot a chunk.
pub(crate) fn unscale(
    slots: &mut [Slot],
    norm_type: NormType,
    src: Slice<'_>,
    dst: SliceMut<'_>,
    inv_scale: f32,
) -> Result<()> {
    macro_rules! pairs {
        ($($src:ident => $dst:ident,)*) => {
            match (src, dst) {
                $((Slice::$src(src), SliceMut::$dst(dst)) => {
                    let chunks = src.chunks(CHUNK_ELEMS).zip(dst.chunks_mut(CHUNK_ELEMS));
                    for (slot, (src, dst)) in slots.iter_mut().zip(chunks) {
                        *slot = dispatch(Chunk { src, dst, norm_type, inv_scale });
                    }
                })*
                (Slice::F64(src), SliceMut::F64(dst)) => {
                    let chunks = src.chunks(CHUNK_ELEMS).zip(dst.chunks_mut(CHUNK_ELEMS));
                    for (slot, (src, dst)) in slots.iter_mut().zip(chunks) {
                        dst.copy_from_slice(src);
                        *slot = dispatch(ChunkF64 { chunk: dst, norm_type, inv_scale });
                    }
                }
                (src, dst) => {
                    let (op, dtype) = (format!("unscaling {} gradients into another dtype", src.dtype()), dst.dtype());
                    return Err(Error::Unsupported { op, dtype });
                }
            }
        };
    }
    pairs! {
        F32 => F32, F32 => F16, F32 => BF16,
        F16 => F32, F16 => F16, F16 => BF16,
        BF16 => F32, BF16 => F16, BF16 => BF16,
    }
    Ok(())
}

/// Unscales in place and fills one slot a chunk.
pub(crate) fn unscale_in_place(slots: &mut [Slot], norm_type: NormType, gradient: SliceMut<'_>, inv_scale: f32) {
    macro_rules! fill {
        ($kernel:ident, $elements:expr) => {
            for (slot, chunk) in slots.iter_mut().zip($elements.chunks_mut(CHUNK_ELEMS)) {
                *slot = dispatch($kernel { chunk, norm_type, inv_scale });
            }
        };
    }
    match gradient {
        SliceMut::F32(elements) => fill!(ChunkInPlace, elements),
        SliceMut::F16(elements) => fill!(ChunkInPlace, elements),
        SliceMut::BF16(elements) => fill!(ChunkInPlace, elements),
        SliceMut::F64(elements) => fill!(ChunkF64, elements),
    }
}

struct Chunk<'a, S, D> {
    src: &'a [S],
    dst: &'a mut [D],
    norm_type: NormType,
    inv_scale: f32,
}

impl<S: Lane, D: Lane> Kernel for Chunk<'_, S, D> {
    type Output = Slot;

    #[inline(always)]
    fn run(self, level: Level) -> Slot {
        chunk_made_by_runs(self.dst, self.norm_type, Unscaled { src: self.src, inv_scale: self.inv_scale }, level)
    }
}

struct Unscaled<'a, S> {
    src: &'a [S],
    inv_scale: f32,
}

impl<S: Lane, D: Lane> MakeRun<D> for Unscaled<'_, S> {
    #[inline(always)]
    fn make(&mut self, offset_elems: usize, run: &mut [D], level: Level) {
        map(&self.src[offset_elems..], run, level, |x| x * self.inv_scale);
    }
}

struct ChunkInPlace<'a, T> {
    chunk: &'a mut [T],
    norm_type: NormType,
    inv_scale: f32,
}

impl<T: Lane> Kernel for ChunkInPlace<'_, T> {
    type Output = Slot;

    #[inline(always)]
    fn run(self, level: Level) -> Slot {
        chunk_made_by_runs(self.chunk, self.norm_type, UnscaleInPlace { inv_scale: self.inv_scale }, level)
    }
}

struct UnscaleInPlace {
    inv_scale: f32,
}

impl<T: Lane> MakeRun<T> for UnscaleInPlace {
    #[inline(always)]
    fn make(&mut self, _: usize, run: &mut [T], level: Level) {
        map_in_place(run, level, |x| x * self.inv_scale);
    }
}

struct ChunkF64<'a> {
    chunk: &'a mut [f64],
    norm_type: NormType,
    inv_scale: f32,
}

impl Kernel for ChunkF64<'_> {
    type Output = Slot;

    #[inline(always)]
    fn run(self, level: Level) -> Slot {
        for x in &mut *self.chunk {
            *x *= f64::from(self.inv_scale);
        }
        ChunkNormF64 { chunk: self.chunk, norm_type: self.norm_type }.run(level)
    }
}
