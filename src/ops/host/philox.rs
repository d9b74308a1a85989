//! Stochastic rounding with Philox4x32-10, sixteen counters at a time.
//!
//! A counter-based generator has no state to advance: the bits of an element are a function of (seed, step, index), so
//! they are the same for any sharding and any number of threads, and there is nothing to save in a checkpoint. One block of
//! 128 bits serves eight neighbours, 16 bits each, in index order.
//! (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", 2011.)

use half::{bf16, f16};

use super::lane::{Lane, finite};
use super::level::{Kernel, Level};
use crate::ops::cast::{RoundingKey, Saturate};

/// Blocks computed side by side, one in each lane.
const BLOCKS: usize = 16;
/// Elements they serve.
const TILE_ELEMS: usize = 8 * BLOCKS;

pub(crate) struct RoundStochastic<'a, D> {
    pub src: &'a [f32],
    pub dst: &'a mut [D],
    pub key: RoundingKey,
    pub first_index: u64,
    pub saturate: Saturate,
}

impl<D: StochasticLane> Kernel for RoundStochastic<'_, D> {
    type Output = ();

    #[inline(always)]
    fn run(self, _: Level) {
        let Self { mut src, mut dst, key, first_index, saturate } = self;
        // No magnitude is u16::MAX.
        let infinity_bits = if saturate == Saturate::Yes { D::INFINITY_BITS } else { u16::MAX };
        let mut tile = first_index / TILE_ELEMS as u64;
        let skip = (first_index % TILE_ELEMS as u64) as usize;
        if skip > 0 {
            let len = src.len().min(TILE_ELEMS - skip);
            let (head, src_rest) = src.split_at(len);
            let (head_dst, dst_rest) = dst.split_at_mut(len);
            round_all(head, head_dst, &random_tile(key, tile)[skip..], infinity_bits);
            (src, dst) = (src_rest, dst_rest);
            tile += 1;
        }
        let (src_tiles, src_tail) = src.as_chunks::<TILE_ELEMS>();
        let (dst_tiles, dst_tail) = dst.as_chunks_mut::<TILE_ELEMS>();
        for (src, dst) in src_tiles.iter().zip(dst_tiles) {
            round_all(src, dst, &random_tile(key, tile), infinity_bits);
            tile += 1;
        }
        if !src_tail.is_empty() {
            round_all(src_tail, dst_tail, &random_tile(key, tile), infinity_bits);
        }
    }
}

#[inline(always)]
fn round_all<D: StochasticLane>(src: &[f32], dst: &mut [D], random: &[u16], infinity_bits: u16) {
    for ((dst, src), random) in dst.iter_mut().zip(src).zip(random) {
        *dst = D::from_bits(finite(D::round(*src, u16::from_le(*random)), infinity_bits));
    }
}

/// The random bits of the elements of one tile, in index order, each little-endian.
///
/// The four words of a counter are 64 bits wide with an empty upper half: products need no widening, which is what the
/// time goes into otherwise.
#[inline(always)]
fn random_tile(key: RoundingKey, tile: u64) -> [u16; TILE_ELEMS] {
    const LOW: u64 = 0xffff_ffff;
    let first_block = tile * BLOCKS as u64;
    let (mut c0, mut c1) = ([0; BLOCKS], [0; BLOCKS]);
    let (mut c2, mut c3) = ([key.step & LOW; BLOCKS], [key.step >> 32; BLOCKS]);
    for lane in 0..BLOCKS {
        let block = first_block + lane as u64;
        (c0[lane], c1[lane]) = (block & LOW, block >> 32);
    }
    let (mut k0, mut k1) = (key.seed as u32, (key.seed >> 32) as u32);
    for _ in 0..10 {
        for lane in 0..BLOCKS {
            let product0 = (c0[lane] & LOW) * 0xd251_1f53;
            let product1 = (c2[lane] & LOW) * 0xcd9e_8d57;
            c0[lane] = (product1 >> 32) ^ c1[lane] ^ u64::from(k0);
            c1[lane] = product1 & LOW;
            c2[lane] = (product0 >> 32) ^ c3[lane] ^ u64::from(k1);
            c3[lane] = product0 & LOW;
        }
        k0 = k0.wrapping_add(0x9e37_79b9);
        k1 = k1.wrapping_add(0xbb67_ae85);
    }
    let mut random = [0u64; 2 * BLOCKS];
    for lane in 0..BLOCKS {
        random[2 * lane] = (c0[lane] | c1[lane] << 32).to_le();
        random[2 * lane + 1] = (c2[lane] | c3[lane] << 32).to_le();
    }
    bytemuck::cast(random)
}

/// A 16-bit float that can be rounded to with given random bits.
pub(crate) trait StochasticLane: Lane {
    const INFINITY_BITS: u16;
    /// The magnitude is rounded up if its place in the gap, in units of 2^-16, plus `random` reaches 2^16.
    fn round(value: f32, random: u16) -> u16;
    fn from_bits(bits: u16) -> Self;
}

impl StochasticLane for bf16 {
    const INFINITY_BITS: u16 = 0x7f80;

    #[inline(always)]
    fn round(value: f32, random: u16) -> u16 {
        // The place in the gap is what the low half of the f32 says. Infinity has none and cannot carry.
        let rounded = value.to_bits().wrapping_add(u32::from(random)) >> 16;
        if value.is_nan() { bf16::narrow(value).to_bits() } else { rounded as u16 }
    }

    #[inline(always)]
    fn from_bits(bits: u16) -> bf16 {
        bf16::from_bits(bits)
    }
}

impl StochasticLane for f16 {
    const INFINITY_BITS: u16 = 0x7c00;

    #[inline(always)]
    fn round(value: f32, random: u16) -> u16 {
        let bits = value.to_bits();
        let (sign, magnitude) = ((bits >> 16) & 0x8000, bits & 0x7fff_ffff);
        let normal = magnitude.wrapping_sub((127 - 15) << 23).wrapping_add(u32::from(random >> 3)) >> 13;
        // Below 2^-14 the gap is 2^-24: the value in units of 2^-40, cut off, is the result and 16 bits of its place.
        let small = magnitude.min((127 - 14) << 23);
        let units = (f32::from_bits(small) * f32::from_bits((127 + 40) << 23)) as i32 as u32;
        let subnormal = (units + u32::from(random)) >> 16;
        let rounded = if magnitude < (127 - 14) << 23 { subnormal } else { normal };
        let rounded = if magnitude >= (127 + 16) << 23 { 0x7c00 } else { rounded };
        if value.is_nan() { f16::narrow(value).to_bits() } else { (sign | rounded) as u16 }
    }

    #[inline(always)]
    fn from_bits(bits: u16) -> f16 {
        f16::from_bits(bits)
    }
}
