//! What the driver takes by itself for calls that enqueue a step: the limit of what a step can cost the host.

use annulus::DType;
use annulus::abi::{STORE_WORDS, StoreArguments};
use annulus::device::cuda::{Buffer, Event, Kernels, Priority, Shape, Stream, Timer};

use super::host_cost::BUCKETS;
use super::step::Step;
use crate::Result;
use crate::site::{PATIENCE, Site};

/// Launches of the smallest kernel there is, and the events of a step around them.
pub struct Bare {
    kernels: Kernels,
    compute: Stream,
    communication: Stream,
    filled: Event,
    reduced: Event,
    timer: Timer,
    /// One for each stream.
    words: Buffer,
}

impl Bare {
    /// Nothing enqueued.
    ///
    /// # Errors
    /// What the driver says.
    pub fn new(site: &Site) -> Result<Bare> {
        Ok(Bare {
            kernels: site.kernels.clone(),
            compute: site.stream.clone(),
            communication: Stream::new(&site.device, "communication", Priority::High)?,
            filled: Event::new(&site.device)?,
            reduced: Event::new(&site.device)?,
            timer: Timer::new(&site.device)?,
            words: Buffer::zeroed(&site.device, DType::F64, 2)?,
        })
    }

    fn launch_on(&self, stream: &Stream) -> Result<()> {
        let target = self.words.address() + if stream.is_same(&self.compute) { 0 } else { 8 };
        let arguments = StoreArguments { target, words: [0; STORE_WORDS], len_words: 1, padding: 0 };
        let shape = Shape { blocks: 1, threads: 32, shared_bytes: 0, cooperative: false };
        // SAFETY: the kernel's own argument; the word is of this device, is the stream's own, and freeing it waits for the kernel.
        Ok(unsafe { self.kernels.launch("store_words", shape, stream, &arguments) }?)
    }

    /// One launch.
    ///
    /// # Errors
    /// What the driver says.
    pub fn launch(&mut self) -> Result<()> {
        self.launch_on(&self.compute)
    }

    /// The launches, records and waits of [`Step::enqueue`], on as many streams.
    ///
    /// # Errors
    /// What the driver says.
    pub fn step(&mut self) -> Result<()> {
        for _ in 0..BUCKETS {
            self.launch_on(&self.compute)?;
            self.compute.record(&self.filled)?;
            self.communication.wait(&self.filled)?;
            self.launch_on(&self.communication)?;
        }
        self.communication.record(&self.reduced)?;
        self.compute.wait(&self.reduced)?;
        (2 * BUCKETS..Step::LAUNCHES).try_for_each(|_| self.launch_on(&self.compute))
    }

    /// Both points of a timer, around nothing.
    ///
    /// # Errors
    /// What the driver says.
    pub fn time(&mut self) -> Result<()> {
        self.timer.start(&self.compute)?;
        Ok(self.timer.stop(&self.compute)?)
    }

    /// Waits for all that is enqueued.
    ///
    /// # Errors
    /// What the device failed with.
    pub fn settle(&mut self) -> Result<()> {
        self.compute.synchronize(PATIENCE)?;
        Ok(self.communication.synchronize(PATIENCE)?)
    }
}
