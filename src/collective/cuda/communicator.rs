//! The communicator of devices: validates, gives an order, launches.

mod finish;
mod leaving;

use std::any::Any;
use std::sync::Arc;
use std::time::Duration;

pub use finish::Finish;
use finish::Finishing;

use super::cohort::{Failure, Part};
use super::connect::{Connection, Meeting, Runner, Transport, together};
use super::geometry::{Plan, SLOTS};
use super::history::History;
use super::page::Page;
use super::records::Records;
use super::stepped::{Site, Work};
use super::tables::Tables;
use super::way::Way;
use crate::abi::collective::{CollectiveArguments, RankArguments, RankState, collective_entry, reduce_code};
use crate::collective::calls::Calls;
use crate::collective::descriptor::{Descriptor, Kind, Partials};
use crate::collective::membership;
use crate::collective::operands::{Extent, all_shards, check_extent};
use crate::device::cuda::{Buffer, Capture, Device, Event, Graph, Kernels, Shape, Stream, View};
use crate::dtype::{DType, ReduceOp};
use crate::error::{Error, Result};
use crate::schedule::Algorithm;
use crate::world::{Outpost, Region, Watch, World};
use bytemuck::Zeroable;

/// Said of an operation that cannot be part of a graph.
const NOT_CAPTURED: &str = "a collective of ranks that share a device";

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
    /// device's, 32 at most; fewer where ranks share devices, or communicators do, and more would not run at the same time.
    pub channels: Option<u32>,
    /// Force a way of running; by default it follows from the devices that the ranks are on, as [`Way`] says.
    pub way: Option<Way>,
}

/// Collective operations among all ranks of a world, in one order. Ranks may share devices; see [`Way`].
///
/// Every rank issues the same operations in the same order; before payload moves the kernels compare what was issued, and a
/// difference is [`Error::Mismatch`] on every rank. Arguments that cannot be are refused before anything happens. After any
/// other error the job has failed: every later call returns [`Error::Poisoned`], and the device can still be used.
///
/// # Synchronization
/// A call returns once the operation is enqueued. It runs behind what was enqueued on the stream before, and behind the
/// communicator's operations before it, also those on other streams. What went wrong in it is told by
/// [`check`](Communicator::check) and [`synchronize`](Communicator::synchronize), and by every later call.
///
/// An operation can be captured in a graph ([`Stream::capture`]) where every rank has a device of its own ([`Way::Persistent`]),
/// and not else. It is issued whenever the graph is launched: each time [`before_launch`](Communicator::before_launch) has to be
/// called first, for the one order to hold. The graph keeps the memory of the communicator, also that of peers: it is given
/// back with the last of both.
/// By [`Way::Cooperative`] a call first waits until the other ranks on the device have called, no longer than the timeout:
/// ranks that share a device must issue the operations of all their communicators in the same order; the others should, see
/// [`Way`]. By [`Way::Stepped`] a call may wait for room in the stream, as one that launches many kernels.
pub struct Communicator {
    world: World,
    region: Region,
    device: Device,
    kernels: Kernels,
    timeout: Duration,
    connection: Option<Connection>,
    /// All memory that its kernels use.
    held: Option<Arc<dyn Any + Send + Sync>>,
    tables: Tables,
    state: Buffer,
    /// `[channels]` f64, of kernels that add squares.
    squares: Buffer,
    records: Arc<Records>,
    /// Looks at the records, and at the group's area.
    watch: Option<Watch>,
    calls: Calls,
    /// Stream of the operation issued last: the next one runs behind it.
    last: Option<Stream>,
    captured: Option<Captured>,
    order: Event,
    history: History,
}

/// Operations in a graph that is being captured, or was.
struct Captured {
    capture: Capture,
    /// Of the last one: the next one in the graph runs behind it.
    stream: Stream,
    operations: u64,
}

impl Communicator {
    /// The communicator of all ranks of `world`; `kernels` are those of this rank's device. Collective: every rank calls it,
    /// in the same order as other constructors. It is made on every rank or on none.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] on every rank if the way that is asked for cannot be, or a device cannot do what it takes,
    /// more than 8 ranks of a process are on one device, its communicators leave no room ([`Way`], "Several communicators"), or
    /// the world's group areas are used up;
    /// [`Error::NoSpace`] and what a driver says on a rank, and [`Error::RankFailed`] on the others; the world's fault.
    pub fn new(world: &World, kernels: &Kernels, options: Options) -> Result<Communicator> {
        let (group, region) = membership::claim(world)?;
        let device = kernels.device();
        let timeout = options.timeout.unwrap_or(world.options().timeout);
        // What it gives takes the area along, also where it fails.
        let meeting = Meeting {
            world,
            group,
            region,
            device,
            kernels,
            channels: options.channels,
            way: options.way,
            timeout: world.options().timeout,
        };
        let mut connection = Some(meeting.connect()?);
        let channels = connection.as_ref().map_or(1, |connection| connection.geometry.channels);
        let mut made = Self::over(world, kernels, options, timeout, group, region, channels);
        if let Ok(made) = &mut made {
            let memory = connection.as_ref().map(Connection::hold);
            let on_device = [made.state.view(), made.tables.view(), made.squares.view()];
            made.held = Some(Arc::new((memory, on_device, Arc::clone(&made.records))));
            made.connection = connection.take();
        }
        let made = together(world, made, world.options().timeout)?;
        made.tell();
        Ok(made)
    }

    /// All but the connection.
    fn over(
        world: &World,
        kernels: &Kernels,
        options: Options,
        timeout: Duration,
        group: u32,
        region: Region,
        channels: u32,
    ) -> Result<Communicator> {
        let device = kernels.device();
        // SAFETY: the region is that of the group just claimed; communicator and monitor, who look at it, hold the world.
        let records = unsafe { Records::new(device, channels, world.rank(), region, timeout) }?;
        let records = Arc::new(records);
        Ok(Communicator {
            tables: Tables::new(device, world)?,
            state: Buffer::zeroed(device, DType::U8, size_of::<RankState>())?,
            squares: Buffer::zeroed(device, DType::F64, channels as usize)?,
            order: Event::new(device)?,
            world: world.clone(),
            region,
            device: device.clone(),
            kernels: kernels.clone(),
            timeout,
            connection: None,
            held: None,
            watch: Some(world.watch(records.clone())),
            records,
            calls: Calls::new(world.world_size(), (options.algorithm, options.partials)),
            last: None,
            captured: None,
            history: History::new(world, group, timeout),
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
            way = ?connection.way,
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

    /// How the kernels of an operation come to run together.
    pub fn way(&self) -> Way {
        self.connection.as_ref().map_or(Way::Persistent, |connection| connection.way)
    }

    /// Reduces `view` in place: afterwards every rank holds the same reduction over all ranks.
    ///
    /// # Errors
    /// [`Error::Poisoned`] after an earlier error; [`Error::Unsupported`] for an average or a premultiplied sum of integers;
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
        check_extent("all_reduce_into: dst", extent(dst), extent(src))?;
        let call = self.call(Kind::AllReduce, src.dtype(), src.len_elems(), op, 0)?;
        self.issue(call, [src, dst], Finishing::default(), stream)
    }

    /// Reduces `src` (`world_size` shards) and leaves shard `rank` of the result in `dst`, which may be that shard of `src`.
    ///
    /// # Errors
    /// As [`all_reduce_into`](Communicator::all_reduce_into).
    pub fn reduce_scatter(&mut self, src: &View, dst: &View, op: ReduceOp, stream: &Stream) -> Result<()> {
        let all_elems = all_shards(dst.len_elems(), self.world_size())?;
        check_extent("reduce_scatter: src", extent(src), (dst.dtype(), all_elems))?;
        let call = self.call(Kind::ReduceScatter, src.dtype(), src.len_elems(), op, 0)?;
        self.issue(call, [src, dst], Finishing::default(), stream)
    }

    /// Gathers every rank's `src` (one shard) into `dst` (`world_size` shards, in rank order); `src` may be the shard of
    /// `dst` that belongs to this rank.
    ///
    /// # Errors
    /// As [`all_reduce_into`](Communicator::all_reduce_into).
    pub fn all_gather(&mut self, src: &View, dst: &View, stream: &Stream) -> Result<()> {
        let all_elems = all_shards(src.len_elems(), self.world_size())?;
        check_extent("all_gather: dst", extent(dst), (src.dtype(), all_elems))?;
        let call = self.call(Kind::AllGather, dst.dtype(), dst.len_elems(), ReduceOp::Sum, 0)?;
        self.issue(call, [src, dst], Finishing::default(), stream)
    }

    /// Every rank's `view` becomes that of rank `root`.
    ///
    /// # Errors
    /// As [`all_reduce`](Communicator::all_reduce); [`Error::InvalidArgument`] if `root` is no rank.
    pub fn broadcast(&mut self, view: &View, root: u32, stream: &Stream) -> Result<()> {
        let call = self.call(Kind::Broadcast, view.dtype(), view.len_elems(), ReduceOp::Sum, root)?;
        self.issue(call, [view, view], Finishing::default(), stream)
    }

    /// What is enqueued on the stream behind it runs once every rank's stream has come to its barrier.
    ///
    /// # Errors
    /// As [`all_reduce`](Communicator::all_reduce).
    pub fn barrier(&mut self, stream: &Stream) -> Result<()> {
        let call = self.call(Kind::Barrier, DType::U8, 0, ReduceOp::Sum, 0)?;
        self.check_stream(stream)?;
        self.launch(call, [0, 0], Finishing::default(), stream)
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
            Some(error) => Err(self.world.raise(known_better(&self.world, error))),
        }
    }

    /// Blocks the calling thread until all operations issued so far have run.
    ///
    /// # Errors
    /// As [`check`](Communicator::check); [`Error::TimedOut`] after `timeout`; what the device failed with.
    pub fn synchronize(&mut self, timeout: Duration) -> Result<()> {
        let done = self.last.as_ref().map_or(Ok(()), |last| last.synchronize(timeout));
        self.history.note_finished(self.records.finished());
        self.check()?;
        done
    }

    /// To be called before every launch of `graph` on `stream`, where operations of this communicator were captured in it. They
    /// are issued by that: they run behind those issued before, on whichever streams, and before those that follow.
    ///
    /// Without it the graph's operations have no place in the order: whether they run behind those on other streams, before
    /// or at the same time is left to chance, and then results and errors are, too; and a rank that waits in one for a
    /// peer that has left is told at the deadline only.
    ///
    /// # Errors
    /// [`Error::Poisoned`] after an earlier error; [`Error::InvalidArgument`] for a stream of another device;
    /// [`Error::Capture`] if the stream captures. What the driver says ends the job.
    pub fn before_launch(&mut self, graph: &Graph, stream: &Stream) -> Result<()> {
        self.check().map_err(|fault| Error::Poisoned { cause: Box::new(fault) })?;
        self.check_stream(stream)?;
        stream.check_eager("cuGraphLaunch")?;
        // Each operation in it has had the memory kept.
        let operations = self.held.as_ref().map_or(0, |held| graph.count_kept(held));
        self.line_up(stream).map_err(|error| self.world.fail(error))?;
        self.calls.note_issued(operations as u64);
        self.records.note_issued(operations as u32);
        Ok(())
    }

    // ---- issuing -----------------------------------------------------------------------------------------------------

    fn call(&self, kind: Kind, dtype: DType, len_elems: usize, op: ReduceOp, root: u32) -> Result<Descriptor> {
        self.calls.next(self.check().err(), kind, dtype, len_elems, op, root)
    }

    fn issue(&mut self, call: Descriptor, views: [&View; 2], finishing: Finishing, stream: &Stream) -> Result<()> {
        for view in views {
            self.check_view(view)?;
        }
        self.check_stream(stream)?;
        // A graph may outlive the views.
        stream.keep(&views.map(View::clone));
        let [src, dst] = views.map(View::address);
        // Where element 0 of the whole vector would be. It is only ever added to.
        let (given, taken) = call.sizes_elems(self.world_size());
        let own_bytes = u64::from(self.rank()).wrapping_mul(given.min(taken) * call.dtype().size_bytes() as u64);
        let addresses = match call.kind() {
            Kind::AllGather => [src.wrapping_sub(own_bytes), dst],
            Kind::ReduceScatter => [src, dst.wrapping_sub(own_bytes)],
            _ => [src, dst],
        };
        self.launch(call, addresses, finishing, stream)
    }

    fn check_view(&self, view: &View) -> Result<()> {
        if view.device().is_same(&self.device) {
            return Ok(());
        }
        Err(Error::InvalidArgument {
            argument: "buffer of a collective",
            value: format!("memory of device {}", view.device().ordinal()),
            accepted: "must be on the communicator's device",
        })
    }

    fn check_stream(&self, stream: &Stream) -> Result<()> {
        if !stream.device().is_same(&self.device) {
            return Err(Error::InvalidArgument {
                argument: "stream of a collective",
                value: stream.name().to_owned(),
                accepted: "must be of the communicator's device",
            });
        }
        if self.way() == Way::Persistent {
            return Ok(());
        }
        // The host has a part in it.
        stream.check_eager(NOT_CAPTURED)
    }

    fn launch(&mut self, call: Descriptor, addresses: [u64; 2], finishing: Finishing, stream: &Stream) -> Result<()> {
        let Some(connection) = &self.connection else { return Ok(()) };
        let plan = connection.geometry.plan(&call, self.world_size())?;
        let arguments = self.arguments(&call, &plan, connection, addresses, finishing);
        // A graph may outlive the communicator, too: without peers its kernels wait until their deadline, in memory that is there.
        self.held.iter().for_each(|held| stream.keep(held));
        self.line_up(stream).map_err(|error| self.world.fail(error))?;
        self.note(call, stream);
        // SAFETY: arguments of this rank for `plan`, made just now.
        unsafe { self.enqueue(call, &plan, arguments, stream) }.map_err(|error| self.world.fail(error))
    }

    /// Gives the device what was lined up.
    ///
    /// # Safety
    /// `arguments` are those of this rank for `plan`.
    unsafe fn enqueue(
        &mut self,
        call: Descriptor,
        plan: &Plan,
        arguments: CollectiveArguments,
        stream: &Stream,
    ) -> Result<()> {
        let Some(connection) = &mut self.connection else { return Ok(()) };
        let shape = Shape { blocks: plan.channels, threads: plan.threads, shared_bytes: 0, cooperative: false };
        // SAFETY: the arguments' own type. Tables, links, state and records live in `self`, which is not dropped before its
        // kernels have ended; links lead to staging that is mapped as long; the views' lengths were checked against the
        // descriptor, and their memory is not unmapped under a kernel; who gets a range of an arena anew is ordered behind this
        // by who gave it back (`Arena::alloc`). Kernels of this communicator run one after another.
        unsafe {
            match &mut connection.runner {
                Runner::Alone => self.kernels.launch(collective_entry(call.dtype()), shape, stream, &arguments),
                Runner::Together(cohort) => {
                    let part = Part { call, arguments, arrived: self.order.clone() };
                    let issued = cohort.issue(part, shape, (&self.kernels, stream), &self.world, self.timeout);
                    issued.map_err(|failure| self.unordered(failure))
                }
                Runner::Stepwise(stepper) => {
                    let site = Site { world: &self.world, kernels: &self.kernels, stream, records: &self.records };
                    debug_assert!(!plan.is_one_step, "a geometry in steps sends nothing in words");
                    let (_, table) = self.tables.of(&plan.schedule);
                    let operation = call.sequence as u32;
                    stepper.issue(&site, &Work { operation, dtype: call.dtype(), plan, arguments, table })
                }
            }
        }
    }

    fn arguments(
        &self,
        call: &Descriptor,
        plan: &Plan,
        connection: &Connection,
        [input, output]: [u64; 2],
        finishing: Finishing,
    ) -> CollectiveArguments {
        let (steps, table) = if plan.is_one_step { self.tables.one_step() } else { self.tables.of(&plan.schedule) };
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
            cast_dtype: finishing.cast_dtype,
            first_round: 0,
            opens: 1,
            closes: 1,
            ranks: Zeroable::zeroed(),
        };
        arguments.ranks[0] = RankArguments {
            input,
            output,
            cast_output: finishing.cast_output,
            links: connection.links[plan.protocol as usize].address(),
            steps,
            state: self.state.address(),
            abort: self.records.abort_address(),
            faults: self.records.faults_address(),
            finished: self.records.finished_address(),
            squares: finishing.squares,
            sum_squares: finishing.sum_squares,
            found_nonfinite: finishing.found_nonfinite,
            signals: connection.signals.as_ref().map_or(0, Buffer::address),
            len_steps: table.len() as u32,
            rank: self.rank(),
        };
        arguments
    }

    /// One order: the operation issued last, on another stream, comes first. In a graph that is the one captured last; what was
    /// issued outside comes before the whole graph, when that is launched.
    fn line_up(&mut self, stream: &Stream) -> Result<()> {
        let captured = self.captured.as_ref().filter(|captured| captured.capture.is_open());
        let before = captured.map(|captured| &captured.stream).or(self.last.as_ref());
        let is_edge = captured.is_some() || stream.open_capture().is_none();
        if let Some(before) = before.filter(|before| is_edge && !before.is_same(stream)) {
            before.record(&self.order)?;
            stream.wait(&self.order)?; // which takes it into the capture of the other, if that captures
        }
        if stream.open_capture().is_none() {
            self.last = Some(stream.clone());
        }
        Ok(())
    }

    /// Counts an operation that is about to be enqueued, or captured: that one has its number when it is launched.
    fn note(&mut self, mut call: Descriptor, stream: &Stream) {
        // SAFETY: the region is the group's, and `world` is alive.
        let page = unsafe { Page::of(self.region, self.rank()) };
        if let Some(capture) = stream.open_capture() {
            let same = self.captured.take().filter(|captured| captured.capture.is_open());
            let operations = same.map_or(0, |captured| captured.operations);
            self.captured = Some(Captured { capture, stream: stream.clone(), operations: operations + 1 });
            call.sequence += operations; // beside the others of the graph, so that peers are told its name
            return page.remember(&call);
        }
        self.calls.note_issued(1);
        self.records.note_issued(1);
        page.remember(&call);
        self.history.note_finished(self.records.finished());
        self.history.note_started(&call);
    }

    /// An operation that runs, and that nothing on the device puts before what is enqueued on this rank's stream from now on:
    /// the job has failed, and the host waits for the end.
    #[cold]
    fn unordered(&mut self, Failure { error, runs_on }: Failure) -> Error {
        if let Some(grid) = runs_on {
            let error = self.world.fail(error);
            self.abort(&grid);
            self.last = Some(grid); // whoever frees what it uses waits again
            return error;
        }
        error
    }

    /// Whether all operations issued so far have run to their end, whatever has befallen the job since.
    pub(crate) fn is_whole(&self) -> bool {
        self.records.is_whole()
    }

    // ---- graphs ------------------------------------------------------------------------------------------------------

    /// Refuses the capture of operations in a graph where the host has a part in them.
    pub(crate) fn check_capture(&self) -> Result<()> {
        if self.way() == Way::Persistent {
            return Ok(());
        }
        let reason = format!("{:?}: the host has a part in every operation", self.way());
        Err(Error::Capture { device: self.device.ordinal(), operation: NOT_CAPTURED, reason })
    }
}

/// A peer that did not come because it has left is lost, not late.
fn known_better(world: &World, error: Error) -> Error {
    match &error {
        Error::PeerStalled { rank, .. } => world.fault_of(*rank).unwrap_or(error),
        _ => error,
    }
}

fn extent(view: &View) -> Extent {
    (view.dtype(), view.len_elems())
}

impl std::fmt::Debug for Communicator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Communicator")
            .field("rank", &self.rank())
            .field("world_size", &self.world_size())
            .field("device", &self.device.ordinal())
            .field("sequence", &self.calls.issued())
            .finish_non_exhaustive()
    }
}
