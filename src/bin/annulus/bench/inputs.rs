//! Inputs whose reduction is exact in any order, so that the right result is known bit for bit.
//!
//! The idea is that of nccl-tests' verifiable inputs: integers so small that the sum over all ranks has no more bits than
//! the element type's significand, times one power of two per element. Every partial sum is then exact, too, in the
//! element type itself. For an average the terms besides a common value cancel, so that the quotient is that value.

use annulus::DType;

use super::arguments::{Op, Redop};

/// Larger numbers would only hide what is wrong among more digits.
const LARGEST: u64 = 1 << 20;

/// What every rank puts in, and what must come out, as functions of (rank, index).
#[derive(Debug, Clone, Copy)]
pub(super) struct Inputs {
    seed: u64,
    op: Op,
    redop: Redop,
    root: u32,
    world_size: u32,
    is_float: bool,
    is_unsigned: bool,
    /// Values are integers of at most this magnitude, before scaling.
    limit: u64,
}

impl Inputs {
    pub(super) fn new(seed: u64, op: Op, redop: Redop, root: u32, dtype: DType, world_size: u32) -> Inputs {
        let significand_bits = match dtype {
            DType::U8 | DType::BF16 => 8,
            DType::F16 => 11,
            DType::F32 => 24,
            DType::I32 => 31,
            DType::F64 | DType::I64 => 53,
        };
        let largest = (1u64 << significand_bits) - 1;
        let adds = op.reduces() && matches!(redop, Redop::Sum | Redop::Avg);
        let limit = if adds { largest / u64::from(world_size) } else { largest };
        let limit = limit.min(LARGEST);
        Inputs { seed, op, redop, root, world_size, is_float: dtype.is_float(), is_unsigned: dtype == DType::U8, limit }
    }

    /// Element `index` of the whole vector as rank `rank` puts it in.
    pub(super) fn input(&self, rank: u32, index: usize) -> f64 {
        if self.op.reduces() && self.redop == Redop::Avg {
            let (common, apart) = self.average(index);
            let turn = (u64::from(rank) + index as u64) % u64::from(self.world_size);
            let cancels = self.world_size.is_multiple_of(2) || turn + 1 < u64::from(self.world_size);
            let sign = if turn.is_multiple_of(2) { 1.0 } else { -1.0 };
            return if cancels { common + sign * apart } else { common };
        }
        self.integer(hash(self.seed, u64::from(rank) + 1, index), self.limit) * self.scale(index)
    }

    /// Element `index` of the whole vector as it must come out; `len_elems` is the length of the whole vector.
    pub(super) fn output(&self, index: usize, len_elems: usize) -> f64 {
        match (self.op, self.redop) {
            (Op::AllReduce | Op::ReduceScatter, Redop::Sum) => self.terms(index).sum(),
            (Op::AllReduce | Op::ReduceScatter, Redop::Min) => self.terms(index).fold(f64::INFINITY, f64::min),
            (Op::AllReduce | Op::ReduceScatter, Redop::Max) => self.terms(index).fold(f64::NEG_INFINITY, f64::max),
            (Op::AllReduce | Op::ReduceScatter, Redop::Avg) => self.average(index).0,
            (Op::AllGather, _) => {
                let shard_elems = (len_elems / self.world_size as usize).max(1);
                self.input((index / shard_elems) as u32, index)
            }
            (Op::Broadcast | Op::Barrier, _) => self.input(self.root, index),
        }
    }

    fn terms(&self, index: usize) -> impl Iterator<Item = f64> {
        (0..self.world_size).map(move |rank| self.input(rank, index))
    }

    /// The average of element `index`, and by how much ranks lie above and below it.
    fn average(&self, index: usize) -> (f64, f64) {
        let (common, apart) = (hash(self.seed, 0, index), hash(self.seed, u64::MAX, index));
        let half = self.limit / 2;
        (self.integer(common, half) * self.scale(index), self.integer(apart, half).abs() * self.scale(index))
    }

    fn integer(&self, hash: u64, limit: u64) -> f64 {
        let (magnitude, sign) = ((hash >> 1) % (limit + 1), hash & 1);
        let magnitude = magnitude as f64;
        // Not -0.0: it is not what a sum of zeroes gives.
        if sign == 1 && magnitude > 0.0 && !self.is_unsigned { -magnitude } else { magnitude }
    }

    /// The same for all ranks: 1/4 to 4 for floats.
    fn scale(&self, index: usize) -> f64 {
        match self.is_float {
            true => [0.25, 0.5, 1.0, 2.0, 4.0][index % 5],
            false => 1.0,
        }
    }
}

/// SplitMix64's finisher over the three numbers.
fn hash(seed: u64, rank: u64, index: usize) -> u64 {
    let mut word = seed ^ rank.wrapping_mul(0xd1b5_4a32_d192_ed03) ^ (index as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

#[cfg(test)]
mod tests {
    use annulus::{Element, ReduceOp};
    use half::{bf16, f16};

    use super::*;

    /// Adds in the element type, rank by rank and backwards: every order must give the bits that are expected.
    fn sums_are_exact<T: Element>(add: impl Fn(T, T) -> T) {
        for world_size in [1, 2, 3, 5, 8, 64] {
            let inputs = Inputs::new(3, Op::AllReduce, Redop::Sum, 0, T::DTYPE, world_size);
            for index in 0..500 {
                let terms: Vec<T> = (0..world_size).map(|rank| T::from_f64(inputs.input(rank, index))).collect();
                let expected = inputs.output(index, 500);
                assert_eq!(T::from_f64(expected).to_f64(), expected, "{}, {world_size} ranks", T::DTYPE);
                let forward = terms.iter().copied().reduce(&add).unwrap();
                let backward = terms.iter().rev().copied().reduce(&add).unwrap();
                assert_eq!(forward.to_f64(), expected);
                assert_eq!(backward.to_f64(), expected);
            }
        }
    }

    #[test]
    fn sums_are_exact_in_any_order_and_every_type() {
        sums_are_exact::<f32>(|a, b| a + b);
        sums_are_exact::<f64>(|a, b| a + b);
        sums_are_exact::<f16>(|a, b| a + b);
        sums_are_exact::<bf16>(|a, b| a + b);
        sums_are_exact::<i32>(|a, b| a.checked_add(b).unwrap());
        sums_are_exact::<i64>(|a, b| a.checked_add(b).unwrap());
        sums_are_exact::<u8>(|a, b| a.checked_add(b).unwrap());
    }

    #[test]
    fn averages_are_exact() {
        for dtype in [DType::F32, DType::F16, DType::BF16, DType::F64] {
            for world_size in [1, 2, 3, 7, 64] {
                let inputs = Inputs::new(9, Op::ReduceScatter, Redop::Avg, 0, dtype, world_size);
                for index in 0..500 {
                    let sum: f64 = inputs.terms(index).sum();
                    assert_eq!(sum / f64::from(world_size), inputs.output(index, 500), "{dtype}, {world_size} ranks");
                }
            }
        }
    }

    #[test]
    fn gathered_and_broadcast_elements_are_their_owners() {
        let gather = Inputs::new(1, Op::AllGather, Redop::Sum, 0, DType::F32, 4);
        assert_eq!(gather.output(0, 40), gather.input(0, 0));
        assert_eq!(gather.output(39, 40), gather.input(3, 39));
        let broadcast = Inputs::new(1, Op::Broadcast, Redop::Sum, 2, DType::F32, 4);
        assert_eq!(broadcast.output(17, 40), broadcast.input(2, 17));
    }

    #[test]
    fn inputs_tell_ranks_and_places_apart() {
        let inputs = Inputs::new(1, Op::AllReduce, Redop::Sum, 0, DType::F32, 2);
        let distinct = |values: Vec<f64>| {
            let count = values.len();
            let mut bits: Vec<u64> = values.into_iter().map(f64::to_bits).collect();
            bits.sort_unstable();
            bits.dedup();
            bits.len() * 10 > count * 9
        };
        assert!(distinct((0..1000).map(|index| inputs.input(0, index)).collect()));
        assert!((0..1000).filter(|index| inputs.input(0, *index) == inputs.input(1, *index)).count() < 10);
        assert!(ReduceOp::from(Redop::Sum).check(DType::U8).is_ok());
    }
}
