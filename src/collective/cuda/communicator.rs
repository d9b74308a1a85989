//! The communicator of devices: validates, gives an order, launches.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::connect::{Connection, Meeting, Transport, together, upload};
use super::geometry::{Plan, SLOTS};
use super::page::Page;
use super::records::Records;
use crate::abi::collective::{
    CollectiveArguments, RankArguments, RankState, Step, collective_entry, reduce_code, steps,
};
use crate::collective::communicator::claim_area;
use crate::collective::descriptor::{Descriptor, Kind, Partials};
use crate::device::cuda::{Buffer, Device, Event, Kernels, Shape, Stream, View};
use crate::dtype::{DType, ReduceOp};
use crate::error::{Error, Result};
use crate::schedule::{Algorithm, Collective, Schedule};
use crate::telemetry;
use crate::world::flag::reached;
use crate::world::{Outpost, Record, RecordId, Region, World};
use bytemuck::Zeroable;

/// What the host waits beyond the kernels' own deadline.
const GRACE: Duration = Duration::from_secs(5);
/// Operations whose end is yet to be noted in the flight recorder, which itself keeps no more.
const UNFINISHED: usize = 1024;

/// How a communicator works. Every rank passes the same.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Force an algorithm; by default it is [`Algorithm::Direct`], which adds in rank order.
    pub algorithm: Option<Algorithm>,
    /// How partial sums of 16-bit floats travel in a ring.
    pub partials: Partials,
    /// Deadline of a wait for a peer; by default the world's.
    pub timeout: Option<Duration>,
    /// Most blocks of an operation: multiprocessors that it takes from what it overlaps with. By default a quarter of the
    /// device's, 32 at most.
    pub channels: Option<u32>,
}

/// Collective operations among all ranks of a world, each on a device of its own, in one order.
///
/// Every rank issues the same operations in the same order; before payload moves the kernels compare what was issued, and a
/// difference is [`Error::Mismatch`] on every rank. Arguments that cannot be are refused before anything happens. After any
/// other error the job has failed: every later call returns [`Error::Poisoned`], and the device can still be used.
///
/// # Synchronization
/// A call returns once the operation is enqueued. It runs behind what was enqueued on the stream before, and behind the
/// communicator's operations before it, also those on other streams. What went wrong in it is told by
/// [`check`](Communicator::check) and [`synchronize`](Communicator::synchronize), and by every later call.
pub struct Communicator {
    world: World,
    group: u32,
    region: Region,
    device: Device,
    kernels: Kernels,
    options: Options,
    timeout: Duration,
    connection: Option<Connection>,
    tables: Tables,
    state: Buffer,
    records: Arc<Records>,
    sequence: u64,
    /// Stream of the operation issued last: the next one runs behind it.
    last: Option<Stream>,
    order: Event,
    unfinished: VecDeque<(u32, RecordId)>,
}

impl Communicator {
    /// The communicator of all ranks of `world`; `kernels` are those of this rank's device. Collective: every rank calls it,
    /// in the same order as other constructors. It is made on every rank or on none.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] on every rank if two share a device or the world's group areas are used up;
    /// [`Error::NoSpace`] and what a driver says on a rank, and [`Error::RankFailed`] on the others; the world's fault.
    pub fn new(world: &World, kernels: &Kernels, options: Options) -> Result<Communicator> {
        let (group, region) = claim_area(world)?;
        let device = kernels.device();
        let timeout = options.timeout.unwrap_or(world.options().timeout);
        let meeting =
            Meeting { world, region, device, kernels, channels: options.channels, timeout: world.options().timeout };
        // From here on a failure gives the area back as a communicator does.
        let mut leaver = Leaver { world: world.clone(), group, region, leaves: true };
        let connection = meeting.connect()?;
        let made = Self::over(world, kernels, options, timeout, group, region, connection);
        let made = together(world, made, world.options().timeout)?;
        leaver.leaves = false; // from now on the communicator does
        made.tell();
        Ok(made)
    }

    fn over(
        world: &World,
        kernels: &Kernels,
        options: Options,
        timeout: Duration,
        group: u32,
        region: Region,
        connection: Connection,
    ) -> Result<Communicator> {
        let device = kernels.device();
        // SAFETY: the region is that of the group just claimed; communicator and monitor, who look at it, hold the world.
        let records = unsafe { Records::new(device, connection.geometry.channels, world.rank(), region, timeout) }?;
        let records = Arc::new(records);
        let outpost: Arc<dyn Outpost> = records.clone();
        world.watch(&outpost);
        Ok(Communicator {
            tables: Tables::new(device, world)?,
            state: Buffer::zeroed(device, DType::U8, size_of::<RankState>())?,
            order: Event::new(device)?,
            world: world.clone(),
            group,
            region,
            device: device.clone(),
            kernels: kernels.clone(),
            options,
            timeout,
            connection: Some(connection),
            records,
            sequence: 0,
            last: None,
            unfinished: VecDeque::with_capacity(UNFINISHED),
        })
    }

    /// Says in the log how bytes travel.
    fn tell(&self) {
        let Some(connection) = &self.connection else { return };
        let count =
            |wanted: fn(&Transport) -> bool| connection.transports.iter().flatten().filter(|t| wanted(t)).count();
        tracing::info!(
            rank = self.world.rank(),
            device = %self.device.uuid(),
            channels = connection.geometry.channels,
            peers_by_device_memory = count(|t| *t == Transport::Device),
            peers_by_host_memory = count(|t| *t != Transport::Device),
            "communicator of devices"
        );
    }

    /// This rank.
    pub fn rank(&self) -> u32 {
        self.world.rank()
    }

    /// Number of ranks.
    pub fn world_size(&self) -> u32 {
        self.world.world_size()
    }

    /// The world whose ranks these are.
    pub fn world(&self) -> &World {
        &self.world
    }

    /// The device of this rank.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// How bytes travel between this rank and `peer`; `None` for the rank itself and for one that does not exist.
    pub fn transport(&self, peer: u32) -> Option<Transport> {
        self.connection.as_ref()?.transports.get(peer as usize).copied().flatten()
    }

    /// Reduces `view` in place: afterwards every rank holds the same reduction over all ranks.
    ///
    /// # Errors
    /// [`Error::Poisoned`] after an earlier error; [`Error::Unsupported`] if `op` is not defined for the dtype;
    /// [`Error::InvalidArgument`] for a view or stream of another device. What the driver says ends the job.
    pub fn all_reduce(&mut self, view: &View, op: ReduceOp, stream: &Stream) -> Result<()> {
        self.all_reduce_into(view, view, op, stream)
    }

    /// Reduces `src` into `dst`, which may be the same.
    ///
    /// # Errors
    /// As [`all_reduce`](Communicator::all_reduce); [`Error::LengthMismatch`] and [`Error::DTypeMismatch`] if the views
    /// differ.
    pub fn all_reduce_into(&mut self, src: &View, dst: &View, op: ReduceOp, stream: &Stream) -> Result<()> {
        check_like("all_reduce_into: dst", src, dst, Some(src.len_elems()))?;
        let call = self.call(Kind::AllReduce, src.dtype(), src.len_elems(), op, 0)?;
        self.issue(call, [src, dst], stream)
    }

    /// Reduces `src` (`world_size` shards) and leaves shard `rank` of the result in `dst`, which may be that shard of `src`.
    ///
    /// # Errors
    /// As [`all_reduce_into`](Communicator::all_reduce_into).
    pub fn reduce_scatter(&mut self, src: &View, dst: &View, op: ReduceOp, stream: &Stream) -> Result<()> {
        check_like("reduce_scatter: src", dst, src, self.shards(dst.len_elems()))?;
        let call = self.call(Kind::ReduceScatter, src.dtype(), src.len_elems(), op, 0)?;
        self.issue(call, [src, dst], stream)
    }

    /// Gathers every rank's `src` (one shard) into `dst` (`world_size` shards, in rank order); `src` may be the shard of
    /// `dst` that belongs to this rank.
    ///
    /// # Errors
    /// As [`all_reduce_into`](Communicator::all_reduce_into).
    pub fn all_gather(&mut self, src: &View, dst: &View, stream: &Stream) -> Result<()> {
        check_like("all_gather: dst", src, dst, self.shards(src.len_elems()))?;
        let call = self.call(Kind::AllGather, dst.dtype(), dst.len_elems(), ReduceOp::Sum, 0)?;
        self.issue(call, [src, dst], stream)
    }

    /// Every rank's `view` becomes that of rank `root`.
    ///
    /// # Errors
    /// As [`all_reduce`](Communicator::all_reduce); [`Error::InvalidArgument`] if `root` is no rank.
    pub fn broadcast(&mut self, view: &View, root: u32, stream: &Stream) -> Result<()> {
        let call = self.call(Kind::Broadcast, view.dtype(), view.len_elems(), ReduceOp::Sum, root)?;
        self.issue(call, [view, view], stream)
    }

    /// What is enqueued on the stream behind it runs once every rank's stream has come to its barrier.
    ///
    /// # Errors
    /// As [`all_reduce`](Communicator::all_reduce).
    pub fn barrier(&mut self, stream: &Stream) -> Result<()> {
        let call = self.call(Kind::Barrier, DType::U8, 0, ReduceOp::Sum, 0)?;
        self.launch(call, [0, 0], stream)
    }

    /// Whether all is well so far: a few loads, no call of the driver.
    ///
    /// # Errors
    /// What ended an operation, here or on another rank: [`Error::PeerLost`], [`Error::PeerStopped`],
    /// [`Error::PeerStalled`], [`Error::Mismatch`], [`Error::RankFailed`].
    pub fn check(&self) -> Result<()> {
        if let Some(fault) = self.world.fault() {
            return Err(fault);
        }
        match self.records.look() {
            None => Ok(()),
            Some(error) => Err(self.world.raise(self.known_better(error))),
        }
    }

    /// Blocks the calling thread until all operations issued so far have run.
    ///
    /// # Errors
    /// As [`check`](Communicator::check); [`Error::Stream`] after `timeout`; what the device failed with.
    pub fn synchronize(&mut self, timeout: Duration) -> Result<()> {
        let done = self.last.as_ref().map_or(Ok(()), |last| last.synchronize(timeout));
        self.note_finished();
        self.check()?;
        done
    }

    /// A peer that did not come because it has left is lost, not late.
    fn known_better(&self, error: Error) -> Error {
        match &error {
            Error::PeerStalled { rank, .. } => self.world.fault_of(*rank).unwrap_or(error),
            _ => error,
        }
    }

    // ---- issuing -----------------------------------------------------------------------------------------------------

    fn call(&self, kind: Kind, dtype: DType, len_elems: usize, op: ReduceOp, root: u32) -> Result<Descriptor> {
        if let Err(cause) = self.check() {
            return Err(Error::Poisoned { cause: Box::new(cause) });
        }
        if root >= self.world_size() {
            return Err(Error::InvalidArgument {
                argument: "root",
                value: root.to_string(),
                accepted: "must be a rank of the group",
            });
        }
        op.check(dtype)?;
        let how = (self.options.algorithm, self.options.partials);
        Ok(Descriptor::new(self.sequence + 1, kind, dtype, len_elems, op, root, how))
    }

    /// Elements of `world_size` shards, if there can be as many.
    fn shards(&self, shard_elems: usize) -> Option<usize> {
        shard_elems.checked_mul(self.world_size() as usize)
    }

    fn issue(&mut self, call: Descriptor, views: [&View; 2], stream: &Stream) -> Result<()> {
        for view in views {
            if !view.device().is_same(&self.device) {
                return Err(Error::InvalidArgument {
                    argument: "buffer of a collective",
                    value: format!("memory of device {}", view.device().ordinal()),
                    accepted: "must be on the communicator's device",
                });
            }
        }
        // A graph may outlive the views. It is of no use without the communicator, whose records the kernels write, too.
        stream.keep(&(views.map(View::clone), Arc::clone(&self.records)));
        let [src, dst] = views.map(View::address);
        // Where element 0 of the whole vector would be. It is only ever added to.
        let (given, taken) = call.sizes_elems(self.world_size());
        let own_bytes = u64::from(self.rank()).wrapping_mul(given.min(taken) * call.dtype().size_bytes() as u64);
        let addresses = match call.kind() {
            Kind::AllGather => [src.wrapping_sub(own_bytes), dst],
            Kind::ReduceScatter => [src, dst.wrapping_sub(own_bytes)],
            _ => [src, dst],
        };
        self.launch(call, addresses, stream)
    }

    fn launch(&mut self, call: Descriptor, addresses: [u64; 2], stream: &Stream) -> Result<()> {
        if !stream.device().is_same(&self.device) {
            return Err(Error::InvalidArgument {
                argument: "stream of a collective",
                value: stream.name().to_owned(),
                accepted: "must be of the communicator's device",
            });
        }
        let Some(connection) = &self.connection else { return Ok(()) };
        let plan = connection.geometry.plan(&call, self.world_size())?;
        let arguments = self.arguments(&call, &plan, connection, addresses);
        self.line_up(stream).map_err(|error| self.stopped(error))?;
        self.sequence += 1;
        self.records.note_issued(1);
        // SAFETY: the region is the group's, and `world` is alive.
        unsafe { Page::of(self.region, self.rank()) }.remember(&call);
        self.note_started(&call);
        let shape = Shape { blocks: plan.channels, threads: plan.threads, shared_bytes: 0, cooperative: false };
        // SAFETY: the arguments' own type. Tables, links, state and records live in `self`, which is not dropped before its
        // kernels have ended; links lead to staging that is mapped as long; the views' lengths were checked against the
        // descriptor, and freeing their memory waits for what uses it. Kernels of this communicator run one after another.
        let launched = unsafe { self.kernels.launch(collective_entry(call.dtype()), shape, stream, &arguments) };
        launched.map_err(|error| self.stopped(error))
    }

    fn arguments(
        &self,
        call: &Descriptor,
        plan: &Plan,
        connection: &Connection,
        [input, output]: [u64; 2],
    ) -> CollectiveArguments {
        let (table, len_steps) = self.tables.of(&plan.schedule);
        let mut arguments = CollectiveArguments {
            shards: plan.shards,
            rounds: plan.rounds,
            round_elems: plan.round_elems,
            piece_elems: plan.piece_elems,
            slot_bytes: plan.slot_bytes,
            timeout_ns: u64::try_from(self.timeout.as_nanos()).unwrap_or(u64::MAX),
            factor: if let ReduceOp::PremulSum(factor) = call.op() { factor } else { 0.0 },
            world_size: self.world_size(),
            channels: plan.channels,
            slots: SLOTS,
            protocol: plan.protocol as u32,
            op: reduce_code(call.op()),
            native_partials: u32::from(call.partials() == Partials::Native),
            descriptor: call.hash(),
            cast_dtype: 0,
            ranks: Zeroable::zeroed(),
        };
        arguments.ranks[0] = RankArguments {
            input,
            output,
            links: connection.links[plan.protocol as usize].address(),
            steps: table,
            state: self.state.address(),
            abort: self.records.abort_address(),
            faults: self.records.faults_address(),
            finished: self.records.finished_address(),
            len_steps,
            rank: self.rank(),
            ..RankArguments::zeroed()
        };
        arguments
    }

    /// One order: the operation issued last, on another stream, comes first.
    fn line_up(&mut self, stream: &Stream) -> Result<()> {
        match &self.last {
            Some(last) if last.is_same(stream) => return Ok(()),
            Some(last) => {
                last.record(&self.order)?;
                stream.wait(&self.order)?;
            }
            None => {}
        }
        self.last = Some(stream.clone());
        Ok(())
    }

    /// A device that does not take an operation ends the job: the peers would wait for it.
    #[cold]
    fn stopped(&self, error: Error) -> Error {
        self.world.raise(error.clone());
        error
    }

    /// Whether all operations issued so far have run to their end, whatever has befallen the job since.
    pub(crate) fn is_whole(&self) -> bool {
        self.records.is_whole()
    }

    // ---- graphs ------------------------------------------------------------------------------------------------------

    /// Operations issued so far.
    pub(crate) fn sequence(&self) -> u64 {
        self.sequence
    }

    /// The last `operations` were captured in a graph and have not run.
    pub(crate) fn note_captured(&mut self, operations: u64) {
        self.sequence -= operations.min(self.sequence);
        self.records.note_issued((operations as u32).wrapping_neg());
        for _ in 0..operations {
            if let Some((_, id)) = self.unfinished.pop_back() {
                self.world.record_end(id, telemetry::now_ns());
            }
        }
    }

    /// A graph with so many was launched.
    pub(crate) fn note_replayed(&mut self, operations: u64) {
        self.sequence += operations;
        self.records.note_issued(operations as u32);
    }

    // ---- the flight recorder -----------------------------------------------------------------------------------------

    fn note_started(&mut self, call: &Descriptor) {
        self.note_finished();
        if self.unfinished.len() == UNFINISHED {
            self.unfinished.pop_front(); // the recorder has forgotten it, too
        }
        let (input_elems, output_elems) = call.sizes_elems(self.world_size());
        let record = Record {
            op: call.kind().name(),
            group: self.group,
            sequence: call.sequence,
            dtype: Some(call.dtype()),
            input_elems,
            output_elems,
            timeout: self.timeout,
        };
        let id = self.world.record_start(&record, telemetry::now_ns());
        self.unfinished.push_back((call.sequence as u32, id));
    }

    /// The host learns that an operation has ended when it comes by here.
    fn note_finished(&mut self) {
        let (finished, mut now_ns) = (self.records.finished(), None);
        while let Some((sequence, id)) = self.unfinished.front().copied()
            && reached(finished, sequence)
        {
            self.world.record_end(id, *now_ns.get_or_insert_with(telemetry::now_ns));
            self.unfinished.pop_front();
        }
    }
}

fn check_like(what: &str, like: &View, other: &View, expected_elems: Option<usize>) -> Result<()> {
    if other.dtype() != like.dtype() {
        return Err(Error::DTypeMismatch { what: what.to_owned(), expected: like.dtype(), actual: other.dtype() });
    }
    let actual_elems = other.len_elems();
    match expected_elems {
        Some(expected_elems) if expected_elems == actual_elems => Ok(()),
        expected => {
            let expected_elems = expected.unwrap_or(usize::MAX);
            Err(Error::LengthMismatch { what: what.to_owned(), expected_elems, actual_elems })
        }
    }
}

impl std::fmt::Debug for Communicator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Communicator")
            .field("rank", &self.rank())
            .field("world_size", &self.world_size())
            .field("device", &self.device.ordinal())
            .field("sequence", &self.sequence)
            .finish_non_exhaustive()
    }
}

// ---- step tables -----------------------------------------------------------------------------------------------------

/// The step tables of one rank, of every collective by every algorithm: they depend on nothing else.
struct Tables {
    memory: Buffer,
    /// First step and number of steps.
    places: Vec<(Collective, Algorithm, usize, u32)>,
}

impl Tables {
    fn new(device: &Device, world: &World) -> Result<Tables> {
        let (rank, world_size) = (world.rank(), world.world_size());
        let mut all: Vec<Step> = Vec::new();
        let mut places = Vec::new();
        let others = [Collective::AllReduce, Collective::ReduceScatter, Collective::AllGather];
        let collectives = others.into_iter().chain((0..world_size).map(|root| Collective::Broadcast { root }));
        for collective in collectives {
            for algorithm in [Algorithm::Direct, Algorithm::Ring] {
                let any = Schedule::new(collective, algorithm, world_size, world_size as usize, 1, 1)?;
                let table = steps(&any, rank);
                places.push((collective, algorithm, all.len(), table.len() as u32));
                all.extend(table);
            }
        }
        Ok(Tables { memory: upload(device, bytemuck::cast_slice(&all))?, places })
    }

    /// Address and length of the table for `schedule`; no steps where it has no rounds.
    fn of(&self, schedule: &Schedule) -> (u64, u32) {
        let wanted = (schedule.collective(), schedule.algorithm());
        let place = self.places.iter().find(|(collective, algorithm, ..)| (*collective, *algorithm) == wanted);
        place.map_or((0, 0), |(_, _, first, len_steps)| {
            (self.memory.address() + (first * size_of::<Step>()) as u64, *len_steps)
        })
    }
}

// ---- leaving ---------------------------------------------------------------------------------------------------------

/// A rank's part in a group's area, given back when the last rank leaves.
struct Leaver {
    world: World,
    group: u32,
    region: Region,
    leaves: bool,
}

impl Drop for Leaver {
    fn drop(&mut self) {
        if !self.leaves {
            return;
        }
        // SAFETY: the region is the group's, and `world` is alive.
        let first = unsafe { Page::of(self.region, 0) };
        // AcqRel: everything the others did to the area comes before it is given back.
        let departed = first.departed.fetch_add(1, std::sync::atomic::Ordering::AcqRel) + 1;
        if departed == self.world.world_size() && self.world.fault().is_none() {
            // An area that cannot be given back is one fewer to use; nothing else depends on it.
            if let Err(error) = self.world.release_group(self.group) {
                tracing::warn!(%error, group = self.group, "could not give back a communicator's area");
            }
        }
    }
}

impl Drop for Communicator {
    /// Waits, no longer than an operation may take, for the kernels in flight; then unmaps what belongs to others, and frees
    /// the own staging when nobody has it mapped any more.
    fn drop(&mut self) {
        let (world, group, region) = (self.world.clone(), self.group, self.region);
        let mut leaver = Leaver { world, group, region, leaves: true };
        if let Some(last) = self.last.take() {
            let start = Instant::now();
            let patience = self.timeout.saturating_add(GRACE);
            while self.world.fault().is_none() && start.elapsed() < patience {
                if last.synchronize(Duration::from_millis(10)).is_ok() {
                    break;
                }
            }
            if last.synchronize(Duration::ZERO).is_err() {
                self.records.abort();
                if let Err(error @ Error::Stream { .. }) = last.synchronize(GRACE) {
                    // Kernels may still run: nothing that they use may go.
                    tracing::warn!(rank = self.rank(), %error, "a communicator's memory is kept for ever");
                    std::mem::forget(self.connection.take());
                    leaver.leaves = false;
                    return;
                }
            }
        }
        if let Some(connection) = self.connection.take() {
            // SAFETY: the region is the group's until this rank has departed, and `world` is alive.
            connection.close(&self.world, unsafe { Page::of(self.region, 0) });
        }
    }
}
