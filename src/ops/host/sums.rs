//! The norm of one chunk: which additions are made, in which precision, in which order.
//!
//! ```text
//! for each run of 2,048 elements, x[block][row][lane] with 16 blocks, 4 rows, 32 lanes; zeros behind the end:
//!     t = |x|^p                                                                     f32
//!     sum[lane] += (t[row 0] + t[row 1]) + (t[row 2] + t[row 3])                    f32, each block's added in f64
//!     total = tree over the 32 lanes, halves onto halves                            f64
//!     if f32 may have overflowed or underflowed: the same run with f64 terms, row by row
//!     chunk += total                                                                f64
//! ```
//!
//! So an f32 rounding touches a square once and a sum twice: the norm's relative error is at most 2^-23 (1.5 units of
//! 2^-24 for p = 2, 2 for p = 1) whatever the elements. On a GPU a run is the work of 8 threads, 4 loads of 16 bytes in
//! flight each.
//!
//! Lanes are numbered by the index in the chunk, not by address or vector width, so the bits are those of the elements.
//! No scaling is needed for f32 and narrower types: their squares fit f64. The check costs nothing: a sum of
//! non-negative terms is infinite or NaN if one of them was, and underflow matters only where the whole sum is tiny.
//! NaN and infinities fail the check, and the f64 sum carries them to the result.
//!
//! The third to the sixth powers of f32 and narrower types are products in f64, summed row by row. Other exponents and f64
//! elements, whose powers do not fit f64, are divided by the chunk's largest magnitude first; the slot holds that magnitude
//! beside the sum.

use bytemuck::{Pod, Zeroable};

use super::lane::{self, Lane};
use super::level::{Kernel, Level};
use super::powers::power;
use crate::dtype::NormType;

/// Elements of one slot's chunk.
pub(crate) const CHUNK_ELEMS: usize = 16 * RUN_ELEMS;
/// Elements that are summed again in f64 if their f32 sums cannot be trusted.
pub(crate) const RUN_ELEMS: usize = 16 * BLOCK_ELEMS;
/// Lanes of a run, at every level.
const LANES: usize = 32;
/// Elements of which an f32 sum is made, for all lanes.
const BLOCK_ELEMS: usize = 4 * LANES;

/// What is kept of one chunk: its part of the norm's sum is `sum * scale^p`. For the maximum norm `sum` is the maximum.
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct Slot {
    pub sum: f64,
    /// 1 unless the terms were scaled; 0 if the chunk has not been measured.
    pub scale: f64,
}

impl Slot {
    pub const UNMEASURED: Slot = Slot { sum: 0.0, scale: 0.0 };
    pub const NOTHING: Slot = Slot::plain(0.0);

    const fn plain(sum: f64) -> Slot {
        Slot { sum, scale: 1.0 }
    }
}

/// Measures one chunk of at most [`CHUNK_ELEMS`] elements whose arithmetic is in f32.
pub(crate) struct ChunkNorm<'a, T> {
    pub chunk: &'a [T],
    pub norm_type: NormType,
}

impl<T: Lane> Kernel for ChunkNorm<'_, T> {
    type Output = Slot;

    #[inline(always)]
    fn run(self, level: Level) -> Slot {
        match self.norm_type {
            NormType::L1 => chunk_f32(self.chunk, Magnitude::new(), level),
            NormType::L2 => chunk_f32(self.chunk, Square, level),
            NormType::Inf => Slot::plain(largest(self.chunk, level)),
            NormType::P(3.0) => chunk_products(self.chunk, Product::<3>, level),
            NormType::P(4.0) => chunk_products(self.chunk, Product::<4>, level),
            NormType::P(5.0) => chunk_products(self.chunk, Product::<5>, level),
            NormType::P(6.0) => chunk_products(self.chunk, Product::<6>, level),
            NormType::P(p) => chunk_scaled(self.chunk, Power(p), level),
        }
    }
}

/// Measures one chunk of at most [`CHUNK_ELEMS`] f64 elements.
pub(crate) struct ChunkNormF64<'a> {
    pub chunk: &'a [f64],
    pub norm_type: NormType,
}

impl Kernel for ChunkNormF64<'_> {
    type Output = Slot;

    #[inline(always)]
    fn run(self, level: Level) -> Slot {
        match self.norm_type {
            NormType::L1 => chunk_f64(self.chunk, Magnitude::new(), level),
            NormType::L2 => chunk_f64(self.chunk, Square, level),
            NormType::Inf => Slot::plain(f64::largest(self.chunk, level)),
            NormType::P(3.0) => chunk_scaled(self.chunk, Product::<3>, level),
            NormType::P(4.0) => chunk_scaled(self.chunk, Product::<4>, level),
            NormType::P(5.0) => chunk_scaled(self.chunk, Product::<5>, level),
            NormType::P(6.0) => chunk_scaled(self.chunk, Product::<6>, level),
            NormType::P(p) => chunk_scaled(self.chunk, Power(p), level),
        }
    }
}

// ---- terms ---------------------------------------------------------------------------------------------------------
// Traits rather than closures all through this file: only what is `#[inline(always)]` is sure to be compiled for the level.

/// What is summed, of an element's value.
trait Term: Copy {
    fn term_f64(self, x: f64) -> f64;
}

/// A term that can be taken in f32, and sums above which f32 lost nothing to underflow.
trait Term32: Term {
    const SAFE_F32: f64;
    const SAFE_F64: f64;
    fn term_f32(self, x: f32) -> f32;
}

/// The mask that clears a sign, unknown to the compiler: it makes `fabs` of one that it knows, and loops of that do not vectorise.
#[derive(Clone, Copy)]
struct Magnitude {
    mask: u32,
}

impl Magnitude {
    #[inline(always)]
    fn new() -> Magnitude {
        Magnitude { mask: std::hint::black_box(0x7fff_ffff) }
    }
}

impl Term for Magnitude {
    #[inline(always)]
    fn term_f64(self, x: f64) -> f64 {
        x.abs()
    }
}

impl Term32 for Magnitude {
    // Additions lose nothing to underflow.
    const SAFE_F32: f64 = 0.0;
    const SAFE_F64: f64 = 0.0;

    #[inline(always)]
    fn term_f32(self, x: f32) -> f32 {
        f32::from_bits(x.to_bits() & self.mask)
    }
}

#[derive(Clone, Copy)]
struct Square;

impl Term for Square {
    #[inline(always)]
    fn term_f64(self, x: f64) -> f64 {
        x * x
    }
}

impl Term32 for Square {
    /// What underflow took from 2,048 squares is at most 2^11 * 2^-150, less than 2^-37 of 2^-100.
    const SAFE_F32: f64 = f64::from_bits((1023 - 100) << 52);
    /// The same for a chunk in f64: 2^15 * 2^-1075 is less than 2^-100 of 2^-900.
    const SAFE_F64: f64 = f64::from_bits((1023 - 900) << 52);

    #[inline(always)]
    fn term_f32(self, x: f32) -> f32 {
        x * x
    }
}

/// `|x|^P`, whose powers of every f32 fit f64: the exponents 3, 4, 5 and 6.
#[derive(Clone, Copy)]
struct Product<const P: u32>;

impl<const P: u32> Term for Product<P> {
    #[inline(always)]
    fn term_f64(self, x: f64) -> f64 {
        let square = x * x;
        match P {
            3 => square * x.abs(),
            4 => square * square,
            5 => square * square * x.abs(),
            _ => square * square * square,
        }
    }
}

#[derive(Clone, Copy)]
struct Power(f64);

impl Term for Power {
    #[inline(always)]
    fn term_f64(self, x: f64) -> f64 {
        power(x.abs(), self.0)
    }
}

/// An element of a chunk.
trait Value: Pod {
    fn values(row: &[Self; LANES], level: Level) -> [f64; LANES];
    /// The largest magnitude; NaN if there is a NaN.
    fn largest(chunk: &[Self], level: Level) -> f64;
}

impl<T: Lane> Value for T {
    #[inline(always)]
    fn values(row: &[T; LANES], level: Level) -> [f64; LANES] {
        let wide = widen_row(row, level);
        let mut values = [0.0; LANES];
        for lane in 0..LANES {
            values[lane] = f64::from(wide[lane]);
        }
        values
    }

    #[inline(always)]
    fn largest(chunk: &[T], level: Level) -> f64 {
        largest(chunk, level)
    }
}

impl Value for f64 {
    #[inline(always)]
    fn values(row: &[f64; LANES], _: Level) -> [f64; LANES] {
        *row
    }

    #[inline(always)]
    fn largest(chunk: &[f64], _: Level) -> f64 {
        let mut largest = 0;
        for x in chunk {
            largest = largest.max(x.to_bits() & 0x7fff_ffff_ffff_ffff);
        }
        f64::from_bits(largest)
    }
}

// ---- chunks --------------------------------------------------------------------------------------------------------

#[inline(always)]
fn chunk_f32<T: Lane>(chunk: &[T], term: impl Term32, level: Level) -> Slot {
    let mut total = 0.0;
    for run in chunk.chunks(RUN_ELEMS) {
        total += run_f32(run, term, level);
    }
    Slot::plain(total)
}

#[inline(always)]
fn run_f32<T: Lane, A: Term32>(run: &[T], term: A, level: Level) -> f64 {
    let sum = sum_f32(run, term, level);
    if is_safe(sum, A::SAFE_F32) { sum } else { sum_f64(run, term, 1.0, level) }
}

/// A chunk whose elements are made just before they are summed: `make` writes one run, which then is in the first-level
/// cache. The same bits as [`ChunkNorm`] on the finished chunk.
#[inline(always)]
pub(crate) fn chunk_made_by_runs<T: Lane>(
    chunk: &mut [T],
    norm_type: NormType,
    mut make: impl MakeRun<T>,
    level: Level,
) -> Slot {
    let mut total = 0.0;
    for (index, run) in chunk.chunks_mut(RUN_ELEMS).enumerate() {
        make.make(index * RUN_ELEMS, run, level);
        total += match norm_type {
            NormType::L1 => run_f32(run, Magnitude::new(), level),
            NormType::L2 => run_f32(run, Square, level),
            NormType::Inf | NormType::P(_) => 0.0,
        };
    }
    match norm_type {
        NormType::L1 | NormType::L2 => Slot::plain(total),
        // These need the chunk's largest magnitude first.
        NormType::Inf | NormType::P(_) => ChunkNorm { chunk, norm_type }.run(level),
    }
}

/// What [`chunk_made_by_runs`] calls for each run: writes the elements from `offset_elems` of the chunk on.
pub(crate) trait MakeRun<T> {
    fn make(&mut self, offset_elems: usize, run: &mut [T], level: Level);
}

#[inline(always)]
fn chunk_f64<A: Term32>(chunk: &[f64], term: A, level: Level) -> Slot {
    let mut total = 0.0;
    for run in chunk.chunks(RUN_ELEMS) {
        total += sum_f64(run, term, 1.0, level);
    }
    if is_safe(total, A::SAFE_F64) { Slot::plain(total) } else { chunk_scaled(chunk, term, level) }
}

/// Terms that fit f64 for every f32.
#[inline(always)]
fn chunk_products<T: Lane>(chunk: &[T], term: impl Term, level: Level) -> Slot {
    let mut total = 0.0;
    for run in chunk.chunks(RUN_ELEMS) {
        total += sum_f64(run, term, 1.0, level);
    }
    Slot::plain(total)
}

/// Every magnitude divided by the largest first.
#[inline(always)]
fn chunk_scaled<T: Value>(chunk: &[T], term: impl Term, level: Level) -> Slot {
    let largest = T::largest(chunk, level);
    if largest == 0.0 || !largest.is_finite() {
        return Slot::plain(largest);
    }
    let mut sum = 0.0;
    for run in chunk.chunks(RUN_ELEMS) {
        sum += sum_f64(run, term, largest, level);
    }
    Slot { sum, scale: largest }
}

/// Whether a sum of non-negative terms neither overflowed nor lost to underflow. Not so for NaN.
#[inline(always)]
fn is_safe(sum: f64, least: f64) -> bool {
    sum >= least && sum < f64::INFINITY
}

// ---- runs ----------------------------------------------------------------------------------------------------------

#[inline(always)]
fn sum_f32<T: Lane>(run: &[T], term: impl Term32, level: Level) -> f64 {
    let mut lanes = [0f64; LANES];
    let (blocks, tail) = run.as_chunks::<BLOCK_ELEMS>();
    for block in blocks {
        add_block(&mut lanes, block, term, level);
    }
    if !tail.is_empty() {
        let mut block = [T::zeroed(); BLOCK_ELEMS];
        block[..tail.len()].copy_from_slice(tail);
        add_block(&mut lanes, &block, term, level);
    }
    tree(lanes)
}

#[inline(always)]
fn widen_row<T: Lane>(row: &[T; LANES], level: Level) -> [f32; LANES] {
    let mut wide = [0.0; LANES];
    if T::has_blocks(level) {
        let blocks = wide.as_chunks_mut::<{ lane::BLOCK_ELEMS }>().0;
        for (wide, block) in blocks.iter_mut().zip(row.as_chunks::<{ lane::BLOCK_ELEMS }>().0) {
            *wide = T::widen_block(block, level);
        }
    } else {
        for lane in 0..LANES {
            wide[lane] = row[lane].widen();
        }
    }
    wide
}

/// Row by row into arrays first: written as one expression over the four rows, some element types do not vectorise.
#[inline(always)]
fn add_block<T: Lane>(lanes: &mut [f64; LANES], block: &[T; BLOCK_ELEMS], term: impl Term32, level: Level) {
    let mut rows = [[0f32; LANES]; 4];
    for (row, elements) in rows.iter_mut().zip(block.as_chunks::<LANES>().0) {
        let wide = widen_row(elements, level);
        for lane in 0..LANES {
            row[lane] = term.term_f32(wide[lane]);
        }
    }
    let [a, b, c, d] = rows;
    for lane in 0..LANES {
        lanes[lane] += f64::from((a[lane] + b[lane]) + (c[lane] + d[lane]));
    }
}

#[inline(always)]
fn sum_f64<T: Value>(run: &[T], term: impl Term, divisor: f64, level: Level) -> f64 {
    let mut lanes = [0f64; LANES];
    let (rows, tail) = run.as_chunks::<LANES>();
    for row in rows {
        add_row(&mut lanes, row, term, divisor, level);
    }
    if !tail.is_empty() {
        let mut row = [T::zeroed(); LANES];
        row[..tail.len()].copy_from_slice(tail);
        add_row(&mut lanes, &row, term, divisor, level);
    }
    tree(lanes)
}

#[inline(always)]
fn add_row<T: Value>(lanes: &mut [f64; LANES], row: &[T; LANES], term: impl Term, divisor: f64, level: Level) {
    let values = T::values(row, level);
    let mut terms = [0f64; LANES];
    for lane in 0..LANES {
        terms[lane] = term.term_f64(values[lane] / divisor);
    }
    for lane in 0..LANES {
        lanes[lane] += terms[lane];
    }
}

/// Adds the upper half of the lanes to the lower half until one is left.
#[inline(always)]
fn tree(mut lanes: [f64; LANES]) -> f64 {
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] += lanes[lane + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// The largest magnitude. Magnitudes are ordered as their bits, infinity above all numbers and NaN above that.
#[inline(always)]
fn largest<T: Lane>(chunk: &[T], level: Level) -> f64 {
    let mut lanes = [0u32; LANES];
    let (rows, tail) = chunk.as_chunks::<LANES>();
    for row in rows {
        // By rows first, loops over the other types do not vectorise.
        let wide = if T::has_blocks(level) { widen_row(row, level) } else { [0.0; LANES] };
        for lane in 0..LANES {
            let x = if T::has_blocks(level) { wide[lane] } else { row[lane].widen() };
            lanes[lane] = lanes[lane].max(x.to_bits() & 0x7fff_ffff);
        }
    }
    for (lane, x) in lanes.iter_mut().zip(tail) {
        *lane = (*lane).max(x.widen().to_bits() & 0x7fff_ffff);
    }
    let mut largest = 0;
    for lane in lanes {
        largest = largest.max(lane);
    }
    f64::from(f32::from_bits(largest))
}
