//! The device of one rank, and what every part of a step on it shares.

use std::cell::RefCell;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use super::batch::BatchMover;
use super::memory::{DeviceMemory, DevicePlace};
use super::watch::{Part, Watch};
use crate::collective::CollectiveOptions;
use crate::collective::cuda::{self, Communicator};
use crate::device::cuda::{Driver, Event, Kernels, Priority, Stream};
use crate::dtype::ReduceOp;
use crate::error::{Error, Result};
use crate::ops::GradScaler;
use crate::ops::cuda::LossScale;
use crate::strategy::batch;
use crate::strategy::gate::Gate;
use crate::strategy::options::{Accelerator, StrategyOptions};
use crate::strategy::place::Place;
use crate::strategy::statistics::Counters;
use crate::telemetry::Track;
use crate::world::World;

/// All that a strategy has on a device. Three streams carry a step, and nothing on them waits for the host:
///
/// ```text
/// copies         batch ──┐
/// compute        forward ┴ gradients are staged ──┬── … ──┬── wait(last bucket) ── norm ── step ── scaler
/// communication                                   └ all_reduce(bucket 0) └ all_reduce(bucket 1) …
/// ```
pub(crate) struct DeviceBackend {
    pub(super) place: DevicePlace,
    pub(super) kernels: Kernels,
    pub(super) communicator: Communicator,
    pub(super) communication: Stream,
    /// What the compute stream wrote to a bucket before its reduction.
    pub(super) filled: Event,
    /// The reduction enqueued last, when the compute stream comes to need it.
    pub(super) reduced: Event,
    pub(super) step_done: Event,
    pub(super) scaler: Option<LossScale>,
    pub(super) rounding_seed: Option<u64>,
    pub(super) counters: Arc<Counters>,
    pub(super) watch: RefCell<Watch>,
    /// Of the timeline: this strategy's compute and communication streams.
    pub(super) tracks: [Track; 2],
    mover: BatchMover,
}

impl DeviceBackend {
    /// The device that the options ask for, if they do. Collective: it is opened on every rank or on none.
    ///
    /// # Errors
    /// With [`Accelerator::Cuda`], that of the driver; [`Error::RankFailed`] on the ranks that have theirs.
    pub fn open(
        world: &World,
        options: &StrategyOptions,
        timeout: Duration,
        counters: &Arc<Counters>,
    ) -> Result<Option<DeviceBackend>> {
        let ordinal = match options.accelerator {
            Accelerator::Host => return Ok(None),
            Accelerator::Auto => {
                let devices = Driver::open().map_or(0, |driver| driver.len_devices());
                let suffices = devices >= world.world_size();
                if !world.reduce_boolean(suffices, true, options.world_timeout())? {
                    return Ok(None);
                }
                None
            }
            Accelerator::Cuda(ordinal) => ordinal,
        };
        let opened = DeviceBackend::open_device(world, ordinal);
        let trouble = opened.as_ref().err().map(Error::to_string).unwrap_or_default();
        let troubles = world.all_gather_bytes(trouble.as_bytes(), options.world_timeout())?;
        if let Some((rank, trouble)) = troubles.iter().zip(0..).map(|(t, rank)| (rank, t)).find(|(_, t)| !t.is_empty())
        {
            let reason = String::from_utf8_lossy(trouble).into_owned();
            return Err(opened.err().unwrap_or(Error::RankFailed { rank, reason }));
        }
        DeviceBackend::on(world, options, timeout, counters, opened?).map(Some)
    }

    fn open_device(world: &World, ordinal: Option<u32>) -> Result<Kernels> {
        let driver = Driver::open()?;
        let device = driver.device(ordinal.unwrap_or(world.local_rank() % driver.len_devices()))?;
        Kernels::load(&device)
    }

    fn on(
        world: &World,
        options: &StrategyOptions,
        timeout: Duration,
        counters: &Arc<Counters>,
        kernels: Kernels,
    ) -> Result<DeviceBackend> {
        let device = kernels.device();
        let compute = Stream::new(device, "compute", Priority::Normal)?;
        let copies = Stream::new(device, "copies", Priority::Normal)?;
        let communication = Stream::new(device, "communication", Priority::High)?;
        let place = DevicePlace { device: device.clone(), compute, timeout };
        let scaler = match options.precision.scales_loss() {
            true => Some(LossScale::new(&kernels, &options.scaler)?),
            false => None,
        };
        let CollectiveOptions { algorithm, partials, timeout: deadline, .. } = options.collective.clone();
        let collective = cuda::Options { algorithm, partials, timeout: deadline, ..cuda::Options::default() };
        Ok(DeviceBackend {
            communicator: Communicator::new(world, &kernels, collective)?,
            communication,
            filled: Event::new(device)?,
            reduced: Event::new(device)?,
            step_done: Event::new(device)?,
            scaler,
            rounding_seed: options.stochastic_rounding.then_some(options.seed),
            counters: Arc::clone(counters),
            watch: RefCell::new(Watch::new(&place, Arc::clone(counters), options.timeline.clone())?),
            tracks: ["compute", "communication"].map(|name| options.timeline.track(name)),
            mover: BatchMover::new(place.clone(), copies)?,
            kernels,
            place,
        })
    }

    pub fn place(&self) -> Place {
        Place::Device(self.place.clone())
    }

    pub fn gate(&self, timeout: Duration) -> Gate {
        Gate::of_device(timeout, self.step_done.clone())
    }

    pub fn root_device(&self) -> batch::Device {
        batch::Device::Cuda(self.mover.clone())
    }

    /// The stream of staging, norms and steps.
    pub fn compute(&self) -> &Stream {
        &self.place.compute
    }

    /// What a kernel or a peer has reported since.
    pub fn check(&mut self) -> Result<()> {
        self.watch.get_mut().collect();
        self.communicator.check()
    }

    /// Rank 0's contents of a tensor.
    pub fn share(&mut self, memory: &DeviceMemory) -> Result<()> {
        self.broadcast(memory, 0)
    }

    pub fn broadcast(&mut self, memory: &DeviceMemory, src: u32) -> Result<()> {
        self.communicator.broadcast(&memory.view(), src, &self.place.compute)?;
        self.settle()
    }

    pub fn all_reduce(&mut self, memory: &DeviceMemory, op: ReduceOp) -> Result<()> {
        self.communicator.all_reduce(&memory.view(), op, &self.place.compute)?;
        self.settle()
    }

    pub fn all_gather(&mut self, memory: &DeviceMemory, len_elems: usize) -> Result<DeviceMemory> {
        let gathered = self.place.alloc(memory.dtype(), len_elems)?;
        self.communicator.all_gather(&memory.view(), &gathered.view(), &self.place.compute)?;
        self.settle()?;
        Ok(gathered)
    }

    /// Waits for an operation that the caller wants the result of.
    fn settle(&mut self) -> Result<()> {
        self.place.compute.synchronize(self.place.timeout)?;
        // What another rank has failed with since is told by the next call.
        if self.communicator.is_whole() { Ok(()) } else { self.check() }
    }

    /// Orders the compute stream behind the reductions enqueued so far.
    pub fn join(&self) -> Result<()> {
        let part = self.part("wait for reduction", 0, |counters| &counters.exposed_ns);
        self.communication.record(&self.reduced)?;
        self.watch.borrow_mut().time(self.compute(), part, || self.compute().wait(&self.reduced))
    }

    /// A part of a step on the compute stream.
    pub(super) fn part(&self, name: &'static str, index: u32, total: fn(&Counters) -> &AtomicU64) -> Part {
        Part { name, index, size_bytes: 0, track: self.tracks[0], total }
    }

    /// The loss scaler, if the precision has one. Waits for the compute stream.
    pub fn scaler(&self) -> Result<Option<GradScaler>> {
        self.scaler.as_ref().map(|scaler| scaler.read(self.compute(), self.place.timeout)).transpose()
    }

    pub fn set_scaler(&self, scaler: GradScaler) -> Result<()> {
        self.scaler.as_ref().map_or(Ok(()), |on_device| on_device.set(self.compute(), &scaler))
    }

    pub fn synchronize(&mut self) -> Result<()> {
        self.drain(self.place.timeout)?;
        let watch = self.watch.get_mut();
        watch.collect();
        watch.set_base()
    }

    /// Waits until all streams have ended.
    pub fn drain(&mut self, timeout: Duration) -> Result<()> {
        self.place.compute.synchronize(timeout)?;
        self.communication.synchronize(timeout)
    }
}
