//! Data loaders: what a rank iterates over.
//!
//! `strategy.process_dataloader(loader)` turns a [`DataLoader`] that knows nothing of ranks into a [`Loader`] of this rank's
//! shard. All ranks get the same number of batches, so that none waits for a gradient that never comes.

use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use super::sampler::{DistributedSampler, Last};
use crate::error::{Error, Result};

/// A data set whose samples are reached by index ("map-style").
pub trait Dataset {
    /// What a batch is.
    type Batch;

    /// Number of samples, the same on every rank.
    fn len(&self) -> usize;

    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The samples with these indices, each below [`len`](Dataset::len), as one batch.
    fn batch(&self, indices: &[usize]) -> Self::Batch;
}

impl<T: Clone> Dataset for Vec<T> {
    type Batch = Vec<T>;

    fn len(&self) -> usize {
        self.len()
    }

    fn batch(&self, indices: &[usize]) -> Vec<T> {
        indices.iter().map(|index| self[*index].clone()).collect()
    }
}

impl<D: Dataset + ?Sized> Dataset for &D {
    type Batch = D::Batch;

    fn len(&self) -> usize {
        (**self).len()
    }

    fn batch(&self, indices: &[usize]) -> D::Batch {
        (**self).batch(indices)
    }
}

/// A data set that can only be read from its beginning ("iterable"): a stream of records of unknown length.
///
/// Every rank reads the whole stream and keeps its share, so the stream must be the same on all of them.
pub trait IterableDataset {
    /// One sample.
    type Item: Clone;

    /// The samples of `epoch`, in order.
    fn samples(&self, epoch: u64) -> impl Iterator<Item = Self::Item>;
}

impl<F, I> IterableDataset for F
where
    F: Fn(u64) -> I,
    I: Iterator,
    I::Item: Clone,
{
    type Item = I::Item;

    fn samples(&self, epoch: u64) -> impl Iterator<Item = I::Item> {
        self(epoch)
    }
}

/// Marks a [`DataLoader`] over a [`Dataset`].
#[derive(Debug, Clone)]
pub struct MapStyle<D>(D);

/// Marks a [`DataLoader`] over an [`IterableDataset`].
#[derive(Debug, Clone)]
pub struct Iterable<D>(D);

/// A data set and how to make batches of it, before it is divided among ranks.
#[derive(Debug, Clone)]
pub struct DataLoader<S> {
    source: S,
    batch_size: usize,
    shuffle: bool,
    seed: Option<u64>,
    last: Last,
}

impl<D: Dataset> DataLoader<MapStyle<D>> {
    /// Batches of `batch_size` samples per rank, in order, the last one padded.
    pub fn new(dataset: D, batch_size: usize) -> Self {
        DataLoader { source: MapStyle(dataset), batch_size, shuffle: false, seed: None, last: Last::Pad }
    }

    /// Whether each epoch has its own random order.
    pub fn shuffle(mut self, shuffle: bool) -> Self {
        self.shuffle = shuffle;
        self
    }

    /// The seed of the orders; the strategy's seed unless given.
    pub fn seed(mut self, seed: u64) -> Self {
        self.seed = Some(seed);
        self
    }
}

impl<D: IterableDataset> DataLoader<Iterable<D>> {
    /// Batches of `batch_size` samples per rank, in the order of the stream, the last one padded.
    pub fn iterable(dataset: D, batch_size: usize) -> Self {
        DataLoader { source: Iterable(dataset), batch_size, shuffle: false, seed: None, last: Last::Pad }
    }
}

impl<S> DataLoader<S> {
    /// What happens to samples that do not fill a batch on every rank.
    pub fn last(mut self, last: Last) -> Self {
        self.last = last;
        self
    }
}

/// Where in the data a run stands: goes into the checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoaderState {
    /// The epoch.
    pub epoch: u64,
    /// Samples of the epoch that all ranks together have been given.
    pub consumed_samples: u64,
    /// The seed of the orders; none if they are not shuffled.
    pub seed: Option<u64>,
    /// Samples in the data set; none for a stream.
    pub len: Option<u64>,
}

/// A source of batches: [`MapStyle`] or [`Iterable`].
pub trait Source: sealed::Sealed {}

mod sealed {
    use super::{LoaderState, Shard};

    pub trait Sealed: Sized {
        fn len(&self) -> Option<u64>;
        type Epoch<'s>: Iterator<Item = (Self::Batch, u64)>
        where
            Self: 's;
        /// What a batch is.
        type Batch;
        /// The batches from `state` on, each with the samples consumed after it.
        fn open<'s>(&'s self, shard: &'s Shard, state: &LoaderState) -> Self::Epoch<'s>;
    }
}

/// How the data is divided.
#[derive(Debug, Clone)]
pub struct Shard {
    rank: u32,
    world_size: u32,
    batch_size: usize,
    last: Last,
    /// Of the whole data set, unshuffled; of no samples for a stream.
    sampler: DistributedSampler,
}

/// The batches of one rank, epoch after epoch. Made by `Strategy::process_dataloader`.
#[derive(Debug)]
pub struct Loader<S> {
    source: S,
    shard: Shard,
    progress: Mutex<Progress>,
}

#[derive(Debug)]
struct Progress {
    state: LoaderState,
    /// Whether the next iteration goes on in the middle of the epoch.
    resumed: bool,
}

impl<S: Source> Loader<S> {
    pub(crate) fn new(loader: DataLoader<S>, rank: u32, world_size: u32, seed: u64) -> Result<Self> {
        let seed = loader.shuffle.then(|| loader.seed.unwrap_or(seed));
        let state = LoaderState { epoch: 0, consumed_samples: 0, seed, len: loader.source.len() };
        let DataLoader { batch_size, last, .. } = loader;
        let len = usize::try_from(state.len.unwrap_or(0)).unwrap_or(usize::MAX);
        let sampler = DistributedSampler::new(len, batch_size, rank, world_size, None, last)?;
        let shard = Shard { rank, world_size, batch_size, last, sampler };
        Ok(Loader { source: loader.source, shard, progress: Mutex::new(Progress { state, resumed: false }) })
    }

    /// What every rank must agree on.
    pub(crate) fn fingerprint(&self) -> String {
        let LoaderState { seed, len, .. } = self.state();
        let Shard { batch_size, last, .. } = &self.shard;
        format!("data loader of {len:?} samples, batch size {batch_size}, seed {seed:?}, last {last:?}")
    }

    /// Begins `epoch` at its first batch.
    pub fn set_epoch(&self, epoch: u64) {
        let mut progress = self.lock();
        progress.state.epoch = epoch;
        progress.state.consumed_samples = 0;
    }

    /// The batches of `epoch`: from the first, or, when the loader was [resumed](Loader::resume) within this epoch and has
    /// not been iterated since, from where that run stopped.
    pub fn epoch(&self, epoch: u64) -> Epoch<'_, S> {
        let state = {
            let mut progress = self.lock();
            if progress.state.epoch != epoch || !progress.resumed {
                progress.state.epoch = epoch;
                progress.state.consumed_samples = 0;
            }
            progress.resumed = false;
            progress.state
        };
        Epoch { batches: self.source.open(&self.shard, &state), loader: self, epoch }
    }

    /// Where the run stands: after the batch that was given out last.
    pub fn state(&self) -> LoaderState {
        self.lock().state
    }

    /// Goes on where `state` was taken, also with another number of ranks.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if `state` is of another data set length or seed.
    pub fn resume(&self, state: LoaderState) -> Result<()> {
        let mut progress = self.lock();
        if (state.len, state.seed) != (progress.state.len, progress.state.seed) {
            return Err(Error::InvalidArgument {
                argument: "loader state",
                value: format!("of {:?} samples with seed {:?}", state.len, state.seed),
                accepted: "it must be of a data set of the same length, shuffled with the same seed",
            });
        }
        *progress = Progress { state, resumed: true };
        Ok(())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<D: Dataset> Loader<MapStyle<D>> {
    /// The data set.
    pub fn dataset(&self) -> &D {
        &self.source.0
    }

    /// Batches of a whole epoch, the same number on every rank.
    pub fn batches_per_epoch(&self) -> usize {
        self.shard.sampler.batches()
    }
}

/// The batches of one epoch of one rank.
pub struct Epoch<'l, S: Source> {
    loader: &'l Loader<S>,
    batches: <S as sealed::Sealed>::Epoch<'l>,
    epoch: u64,
}

impl<S: Source> Iterator for Epoch<'_, S> {
    type Item = <S as sealed::Sealed>::Batch;

    fn next(&mut self) -> Option<Self::Item> {
        let next = self.batches.next();
        let state = &mut self.loader.lock().state;
        match next {
            Some((batch, consumed_samples)) => {
                if state.epoch == self.epoch {
                    state.consumed_samples = consumed_samples;
                }
                Some(batch)
            }
            None => {
                // A finished epoch is the beginning of the next: so a checkpoint between two epochs resumes there.
                if state.epoch == self.epoch {
                    state.epoch = self.epoch.wrapping_add(1);
                    state.consumed_samples = 0;
                }
                None
            }
        }
    }
}

impl<D: Dataset> Source for MapStyle<D> {}

impl<D: Dataset> sealed::Sealed for MapStyle<D> {
    type Epoch<'s>
        = MapEpoch<'s, D>
    where
        D: 's;
    type Batch = D::Batch;

    fn len(&self) -> Option<u64> {
        Some(self.0.len() as u64)
    }

    fn open<'s>(&'s self, shard: &'s Shard, state: &LoaderState) -> MapEpoch<'s, D> {
        let mut sampler = shard.sampler.for_epoch(state.epoch, state.seed);
        sampler.skip_samples(usize::try_from(state.consumed_samples).unwrap_or(usize::MAX));
        MapEpoch { dataset: &self.0, sampler, next: 0, indices: Vec::with_capacity(shard.batch_size.min(1 << 16)) }
    }
}

/// Iterates over the batches of a [`Dataset`].
pub struct MapEpoch<'s, D> {
    dataset: &'s D,
    sampler: DistributedSampler,
    next: usize,
    indices: Vec<usize>,
}

impl<D: Dataset> Iterator for MapEpoch<'_, D> {
    type Item = (D::Batch, u64);

    fn next(&mut self) -> Option<Self::Item> {
        self.sampler.indices(self.next, &mut self.indices);
        if self.indices.is_empty() {
            return None;
        }
        self.next += 1;
        Some((self.dataset.batch(&self.indices), self.sampler.consumed_after(self.next) as u64))
    }
}

impl<D: IterableDataset> Source for Iterable<D> {}

impl<D: IterableDataset> sealed::Sealed for Iterable<D> {
    type Epoch<'s>
        = Box<dyn Iterator<Item = (Vec<D::Item>, u64)> + 's>
    where
        D: 's;
    type Batch = Vec<D::Item>;

    fn len(&self) -> Option<u64> {
        None
    }

    fn open<'s>(&'s self, shard: &'s Shard, state: &LoaderState) -> Self::Epoch<'s> {
        let mut windows = Windows {
            samples: self.0.samples(state.epoch),
            shard,
            head: Vec::with_capacity(shard.world_size as usize),
            consumed: 0,
            ended: false,
        };
        windows.skip_samples(state.consumed_samples);
        Box::new(windows)
    }
}

/// Cuts a stream into windows of one batch of all ranks and keeps this rank's share of each.
struct Windows<'s, I: Iterator> {
    samples: I,
    shard: &'s Shard,
    /// The first samples of the epoch, one per rank: what a short end is padded with.
    head: Vec<I::Item>,
    consumed: u64,
    ended: bool,
}

impl<I: Iterator> Windows<'_, I>
where
    I::Item: Clone,
{
    fn read(&mut self) -> Option<I::Item> {
        let sample = self.samples.next()?;
        if self.head.len() < self.shard.world_size as usize {
            self.head.push(sample.clone());
        }
        self.consumed += 1;
        Some(sample)
    }

    fn skip_samples(&mut self, samples: u64) {
        while self.consumed < samples {
            if self.read().is_none() {
                self.ended = true;
                return;
            }
        }
    }
}

impl<I: Iterator> Iterator for Windows<'_, I>
where
    I::Item: Clone,
{
    type Item = (Vec<I::Item>, u64);

    fn next(&mut self) -> Option<Self::Item> {
        let Shard { rank, world_size, batch_size, last, .. } = *self.shard;
        let (rank, world_size) = (rank as usize, world_size as usize);
        let mut batch = Vec::new();
        let mut filled = 0;
        // Nothing is asked of a stream that has ended: not every iterator ends for good.
        while !self.ended && filled < batch_size * world_size {
            let Some(sample) = self.read() else {
                self.ended = true;
                break;
            };
            if filled % world_size == rank {
                batch.push(sample);
            }
            filled += 1;
        }
        if filled == 0 || (filled < batch_size * world_size && last == Last::Drop) {
            return None;
        }
        let padded = filled.div_ceil(world_size) * world_size;
        batch.extend((filled..padded).filter(|p| p % world_size == rank).map(|p| {
            // The stream has given at least `filled` samples, so the head is not empty.
            self.head[(p - filled) % self.head.len()].clone()
        }));
        Some((batch, self.consumed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shards<S: Source + Clone>(
        loader: &DataLoader<S>,
        world: u32,
        epoch: u64,
    ) -> Vec<Vec<<S as sealed::Sealed>::Batch>> {
        (0..world).map(|rank| Loader::new(loader.clone(), rank, world, 3).unwrap().epoch(epoch).collect()).collect()
    }

    #[test]
    fn a_stream_is_divided_as_an_indexed_set_is() {
        for len in 0..40_usize {
            for world in 1..5 {
                for last in [Last::Pad, Last::Drop] {
                    let indexed = DataLoader::new((0..len).collect::<Vec<_>>(), 3).last(last);
                    let stream = DataLoader::iterable(move |_| 0..len, 3).last(last);
                    assert_eq!(
                        shards(&indexed, world, 0),
                        shards(&stream, world, 0),
                        "len {len} world {world} {last:?}"
                    );
                }
            }
        }
    }

    #[test]
    fn a_stream_shorter_than_the_world_is_repeated() {
        let stream = DataLoader::iterable(|_| 0..2, 1);
        assert_eq!(shards(&stream, 5, 0), [[[0]], [[1]], [[0]], [[1]], [[0]]]);
    }

    #[test]
    fn resume_goes_on_in_the_middle_of_an_epoch() {
        fn check<S: Source + Clone>(loader: DataLoader<S>)
        where
            <S as sealed::Sealed>::Batch: PartialEq + std::fmt::Debug,
        {
            let whole: Vec<_> = Loader::new(loader.clone(), 1, 2, 3).unwrap().epoch(4).collect();
            for done in 0..whole.len() {
                let first = Loader::new(loader.clone(), 1, 2, 3).unwrap();
                let mut epoch = first.epoch(4);
                for batch in &whole[..done] {
                    assert_eq!(epoch.next().as_ref(), Some(batch));
                }
                let state: LoaderState = serde_json::from_str(&serde_json::to_string(&first.state()).unwrap()).unwrap();
                let second = Loader::new(loader.clone(), 1, 2, 3).unwrap();
                second.resume(state).unwrap();
                let rest: Vec<_> = second.epoch(4).collect();
                assert_eq!(rest, whole[done..]);
                assert_eq!(second.state().epoch, 5);
                assert_eq!(second.epoch(4).count(), whole.len(), "an epoch asked for anew begins anew");
            }
        }
        check(DataLoader::new((0..41).collect::<Vec<_>>(), 3).shuffle(true));
        check(DataLoader::iterable(|epoch: u64| (0..41).map(move |i| i + 100 * epoch), 3));
    }

    #[test]
    fn state_of_other_data_is_refused() {
        let loader =
            |len: usize, seed| Loader::new(DataLoader::new(vec![0; len], 2).shuffle(true).seed(seed), 0, 1, 0).unwrap();
        assert!(loader(10, 1).resume(loader(11, 1).state()).is_err());
        assert!(loader(10, 1).resume(loader(10, 2).state()).is_err());
        assert!(loader(10, 1).resume(loader(10, 1).state()).is_ok());
    }
}
