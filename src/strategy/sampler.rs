//! Which samples a rank sees, in which order: a pure function of (seed, epoch, rank, world size).
//!
//! ```text
//! order      p = permutation(seed, epoch) of 0..len, or 0..len itself
//! batch k    of all ranks together: p[k*W*B .. (k+1)*W*B], W ranks, B samples a batch
//! rank r     takes every W-th of them, from the r-th on
//! ```
//! This is the order of PyTorch's `DistributedSampler` under a `BatchSampler`
//! (`torch/utils/data/distributed.py`), and so is the padding: the list is continued with its own beginning.

use serde::{Deserialize, Serialize};

use super::rng::Rng;
use crate::error::{Error, Result};

/// What happens to samples that do not fill a batch on every rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Last {
    /// Samples from the beginning of the order are repeated until every rank has equally many; the last batch may be
    /// shorter than the others, by the same number on every rank.
    #[default]
    Pad,
    /// They are left out: every batch has exactly the batch size.
    Drop,
}

/// The shard of one rank.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DistributedSampler {
    len: usize,
    batch_size: usize,
    rank: u32,
    world_size: u32,
    shuffle: Option<u64>,
    last: Last,
    epoch: u64,
    start: usize,
    order: Order,
}

/// A permutation, in the narrowest integers that hold it.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Order {
    Sequential,
    Narrow(Vec<u32>),
    Wide(Vec<u64>),
}

impl DistributedSampler {
    /// The shard of `rank` of `world_size` of a data set of `len` samples, in batches of `batch_size` per rank; shuffled if
    /// a seed is given.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if `batch_size` is 0 or `rank` is not below `world_size`; [`Error::SizeOverflow`] if
    /// `batch_size * world_size` wraps.
    pub fn new(
        len: usize,
        batch_size: usize,
        rank: u32,
        world_size: u32,
        shuffle: Option<u64>,
        last: Last,
    ) -> Result<Self> {
        if batch_size == 0 {
            return Err(Error::InvalidArgument {
                argument: "batch_size",
                value: "0".to_owned(),
                accepted: "a batch has at least one sample",
            });
        }
        if rank >= world_size {
            return Err(Error::InvalidArgument {
                argument: "rank",
                value: format!("{rank} of {world_size}"),
                accepted: "ranks count from 0 to world_size - 1",
            });
        }
        // The padded length must be addressable too.
        batch_size.checked_mul(world_size as usize).and_then(|window| window.checked_add(len)).ok_or_else(|| {
            Error::SizeOverflow {
                what: "samples of one batch of all ranks",
                detail: format!("{batch_size} samples on {world_size} ranks over {len}"),
            }
        })?;
        Ok(DistributedSampler {
            len,
            batch_size,
            rank,
            world_size,
            shuffle,
            last,
            epoch: 0,
            start: 0,
            order: Order::Sequential,
        }
        .at_epoch(0))
    }

    fn at_epoch(mut self, epoch: u64) -> Self {
        self.set_epoch(epoch);
        self
    }

    /// A sampler of the same data at the beginning of `epoch`, shuffled with `seed` if there is one.
    pub(super) fn for_epoch(&self, epoch: u64, seed: Option<u64>) -> DistributedSampler {
        DistributedSampler { shuffle: seed, start: 0, order: Order::Sequential, ..*self }.at_epoch(epoch)
    }

    /// Makes the order that of `epoch` and begins at its first batch.
    pub fn set_epoch(&mut self, epoch: u64) {
        self.epoch = epoch;
        self.start = 0;
        let Some(seed) = self.shuffle else { return };
        let mut rng = Rng::for_stream(seed, epoch);
        // A second epoch shuffles the memory of the first.
        match &mut self.order {
            Order::Narrow(order) => {
                order.clear();
                order.extend(0..self.len as u32);
                rng.shuffle(order);
            }
            Order::Wide(order) => {
                order.clear();
                order.extend(0..self.len as u64);
                rng.shuffle(order);
            }
            Order::Sequential if u32::try_from(self.len).is_ok() => {
                let mut order: Vec<u32> = (0..self.len as u32).collect();
                rng.shuffle(&mut order);
                self.order = Order::Narrow(order);
            }
            Order::Sequential => {
                let mut order: Vec<u64> = (0..self.len as u64).collect();
                rng.shuffle(&mut order);
                self.order = Order::Wide(order);
            }
        }
    }

    /// Skips the first `samples` of the epoch, counted over all ranks: where a resumed run goes on. A run of another world
    /// size goes on at the same place of the same order.
    pub fn skip_samples(&mut self, samples: usize) {
        self.start = samples.min(self.len);
    }

    /// The epoch of the order.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Samples of all ranks in one full batch.
    pub fn global_batch_size(&self) -> usize {
        self.batch_size * self.world_size as usize
    }

    /// Batches that this rank, and every other, takes from here to the end of the epoch.
    pub fn batches(&self) -> usize {
        match self.last {
            Last::Drop => (self.len - self.start) / self.global_batch_size(),
            Last::Pad => self.samples_per_rank().div_ceil(self.batch_size),
        }
    }

    /// Samples each rank takes from here to the end of the epoch.
    pub fn samples_per_rank(&self) -> usize {
        match self.last {
            Last::Drop => self.batches() * self.batch_size,
            Last::Pad => (self.len - self.start).div_ceil(self.world_size as usize),
        }
    }

    /// Samples of the epoch that are used up when `batches` more have been taken, over all ranks.
    pub fn consumed_after(&self, batches: usize) -> usize {
        self.start.saturating_add(batches.saturating_mul(self.global_batch_size())).min(self.len)
    }

    /// Writes the sample indices of batch `batch` (0 is the first after the skipped ones) into `indices`, replacing what
    /// it held. Empty beyond the last batch.
    pub fn indices(&self, batch: usize, indices: &mut Vec<usize>) {
        indices.clear();
        if batch >= self.batches() {
            return;
        }
        let first = batch * self.batch_size;
        let count = self.batch_size.min(self.samples_per_rank() - first);
        indices.extend((first..first + count).map(|sample| {
            let position = (self.start + sample * self.world_size as usize + self.rank as usize) % self.len;
            match &self.order {
                Order::Sequential => position,
                Order::Narrow(order) => order[position] as usize,
                Order::Wide(order) => order[position] as usize,
            }
        }));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(len: usize, batch: usize, world: u32, shuffle: Option<u64>, last: Last, epoch: u64) -> Vec<Vec<Vec<usize>>> {
        (0..world)
            .map(|rank| {
                let mut sampler = DistributedSampler::new(len, batch, rank, world, shuffle, last).unwrap();
                sampler.set_epoch(epoch);
                (0..sampler.batches())
                    .map(|k| {
                        let mut indices = Vec::new();
                        sampler.indices(k, &mut indices);
                        indices
                    })
                    .collect()
            })
            .collect()
    }

    /// torch.utils.data.DistributedSampler(range(len), world, rank, shuffle=False, drop_last=False), written out.
    fn torch(len: usize, world: usize, rank: usize) -> Vec<usize> {
        let mut indices: Vec<usize> = (0..len).collect();
        let total = len.div_ceil(world) * world;
        let mut padding = total - len;
        while padding > 0 {
            let piece = padding.min(len);
            indices.extend_from_within(..piece);
            padding -= piece;
        }
        indices.into_iter().skip(rank).step_by(world).collect()
    }

    #[test]
    fn pads_as_pytorch_does() {
        for len in 1..40 {
            for world in 1..9 {
                for batch in 1..5 {
                    let shards = all(len, batch, world, None, Last::Pad, 0);
                    for (rank, shard) in shards.iter().enumerate() {
                        assert_eq!(shard.concat(), torch(len, world as usize, rank), "len {len} world {world}");
                        assert_eq!(shard.len(), shards[0].len());
                        assert!(shard.iter().zip(&shards[0]).all(|(a, b)| a.len() == b.len()));
                    }
                }
            }
        }
    }

    #[test]
    fn drop_gives_full_batches_of_distinct_samples() {
        for len in 0..50 {
            for world in 1..6 {
                for batch in 1..5 {
                    let shards = all(len, batch, world, Some(9), Last::Drop, 2);
                    let mut seen: Vec<usize> = shards.concat().concat();
                    assert_eq!(seen.len(), len / (world as usize * batch) * (world as usize * batch));
                    seen.sort_unstable();
                    seen.dedup();
                    assert_eq!(seen.len(), len / (world as usize * batch) * (world as usize * batch));
                    assert!(shards.concat().iter().all(|b| b.len() == batch));
                }
            }
        }
    }

    #[test]
    fn the_order_is_one_permutation_of_seed_and_epoch() {
        let epoch = |seed, epoch, world| {
            let shards = all(96, 4, world, Some(seed), Last::Pad, epoch);
            // Interleave: sample j of rank r is position j * W + r.
            let shards: Vec<Vec<usize>> = shards.into_iter().map(|s| s.concat()).collect();
            (0..96).map(|i| shards[i % world as usize][i / world as usize]).collect::<Vec<_>>()
        };
        let one = epoch(5, 0, 1);
        let mut sorted = one.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, (0..96).collect::<Vec<_>>());
        assert_eq!(one, epoch(5, 0, 4), "the order does not depend on the world size");
        assert_ne!(one, epoch(5, 1, 1));
        assert_ne!(one, epoch(6, 0, 1));
        assert_eq!(one, epoch(5, 0, 1));
    }

    #[test]
    fn skipping_goes_on_where_the_run_stopped() {
        for last in [Last::Pad, Last::Drop] {
            let whole = all(103, 3, 4, Some(1), last, 7);
            for done in 0..=whole[0].len() {
                for rank in 0..4 {
                    let mut sampler = DistributedSampler::new(103, 3, rank, 4, Some(1), last).unwrap();
                    sampler.set_epoch(7);
                    sampler.skip_samples(sampler.consumed_after(done));
                    let mut rest = Vec::new();
                    for k in 0..sampler.batches() {
                        let mut indices = Vec::new();
                        sampler.indices(k, &mut indices);
                        rest.push(indices);
                    }
                    assert_eq!(rest, whole[rank as usize][done..], "after {done}");
                }
            }
        }
    }

    #[test]
    fn bad_arguments_are_errors() {
        assert!(DistributedSampler::new(10, 0, 0, 1, None, Last::Pad).is_err());
        assert!(DistributedSampler::new(10, 1, 2, 2, None, Last::Pad).is_err());
        assert!(DistributedSampler::new(10, usize::MAX / 2, 0, 4, None, Last::Pad).is_err());
        let empty = DistributedSampler::new(0, 4, 1, 2, Some(1), Last::Pad).unwrap();
        assert_eq!(empty.batches(), 0);
        let mut indices = vec![1];
        empty.indices(0, &mut indices);
        assert!(indices.is_empty());
    }
}
