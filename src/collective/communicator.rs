//! The communicator: validates, gives an order, hands to a stream.

use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::time::Duration;

use super::calls::Calls;
use super::descriptor::{Descriptor, Kind, Partials};
use super::executor::{Group, Job, Operand};
use super::hand_over::HandOver;
use super::membership;
use super::operands::{Extent, all_shards, check_extent};
use super::operation::{Log, Operation, operand, perform};
use super::work::{Pool, Work};
use crate::device::{Buffer, Event, Memory, Stream};
use crate::dtype::{DType, ReduceOp};
use crate::error::{Error, Result};
use crate::schedule::Algorithm;
use crate::telemetry::Timeline;
use crate::world::{Region, World};

/// Time beyond the operation's own deadline that a caller waits for a queued operation: the deadline reports the cause.
const QUEUE_GRACE: Duration = Duration::from_secs(1_200);

/// The memory that an operation touches.
type Held<'a> = [Option<&'a Arc<dyn Memory>>; 2];

/// How a communicator works. Every rank passes the same.
#[derive(Clone, Default)]
pub struct CollectiveOptions {
    /// Force an algorithm; by default the library chooses by size and memory (all choices but `Ring` add in rank order
    /// and give the same bits). Payload small enough for one step (256 KiB at most, less with more ranks or registered
    /// memory) is added in rank order whatever is asked.
    pub algorithm: Option<Algorithm>,
    /// How partial sums of 16-bit floats travel in a ring.
    pub partials: Partials,
    /// Longest single wait for a peer in an operation (not in making the communicator); by default the world's. A large
    /// operation that gets on may take longer.
    pub timeout: Option<Duration>,
    /// Where operations are recorded, on the track `communication`.
    pub timeline: Timeline,
}

/// Collective operations among a group of ranks, in one order.
///
/// Every rank of the group issues the same operations in the same order; before payload moves they compare what they
/// issued, and a difference is [`Error::Mismatch`] on every rank. Arguments that cannot be are refused before anything
/// happens. After any other error the job has failed and every communicator of it is poisoned: every later call returns
/// [`Error::Poisoned`].
///
/// # Synchronization
/// Operations on a stream run after what was enqueued there before. One communicator's operations run in the order in
/// which they were issued even on different streams. The slice forms (`all_reduce_slice` ..) block and run on the
/// calling thread, after all operations issued before.
pub struct Communicator {
    pub(super) group: Arc<Group>,
    options: CollectiveOptions,
    log: Log,
    calls: Calls,
    /// Stream of the operation issued last: the next one runs behind it.
    last: Option<Stream>,
    order: Event,
    pool: Pool,
}

impl Communicator {
    /// The communicator of all ranks of `world`. Collective: every rank calls it, in the same order as other
    /// constructors and splits. It is made on every rank or on none.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] on every rank if the world's group areas are used up; [`Error::NoSpace`] on a rank that
    /// gets no memory and [`Error::RankFailed`] on the others; the world's fault.
    pub fn new(world: &World, options: CollectiveOptions) -> Result<Communicator> {
        let (index, region) = membership::claim(world)?;
        let members = (0..world.world_size()).collect();
        Ok(Communicator::over(world.clone(), index, region, world.rank(), members, options))
    }

    fn over(
        world: World,
        index: u32,
        region: Region,
        rank: u32,
        members: Vec<u32>,
        options: CollectiveOptions,
    ) -> Communicator {
        let group = Group {
            region,
            hand_over: HandOver::default(),
            one_steps: AtomicU32::new(0),
            index,
            rank,
            pacing: world.pacing(),
            timeout: options.timeout.unwrap_or(world.options().timeout),
            warn_after: world.options().warn_after,
            members,
            world,
        };
        Communicator {
            calls: Calls::new(group.world_size(), (options.algorithm, options.partials)),
            group: Arc::new(group),
            log: Log { track: options.timeline.track("communication"), timeline: options.timeline.clone() },
            options,
            last: None,
            order: Event::new(),
            pool: Pool::new(),
        }
    }

    /// Splits the group: ranks that pass the same `color` form a new one, ordered by `key`, then by rank; `None` joins no
    /// group. Collective over this communicator. A new group is made on every member or on none.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] on every member of a group for which no area is left; [`Error::NoSpace`] on a member that
    /// gets no memory and [`Error::RankFailed`] on the others; else as any operation.
    pub fn split(&mut self, color: Option<u32>, key: u32) -> Result<Option<Communicator>> {
        let mine = [color.map_or(-1, i64::from), i64::from(key)];
        let mut all = vec![0i64; 2 * self.world_size() as usize];
        self.all_gather_slice(&mine, &mut all)?;
        let mut members: Vec<(i64, u32)> = (0..self.world_size())
            .filter(|rank| color.is_some() && all[2 * *rank as usize] == mine[0])
            .map(|rank| (all[2 * rank as usize + 1], rank))
            .collect();
        members.sort_unstable();
        let members: Vec<u32> = members.into_iter().map(|(_, rank)| rank).collect();
        // The first member claims an area and tells the others which, or that there is none.
        let claimed = (members.first() == Some(&self.rank())).then(|| membership::claim_and_reserve(&self.group.world));
        let index = claimed.as_ref().and_then(|claimed| claimed.as_ref().ok().copied());
        let indices = self.gather(index.map_or(-1, i64::from))?;
        let index = members.first().and_then(|first| u32::try_from(indices[*first as usize]).ok());
        let region = index.map(|index| self.group.world.group_area(index));
        let have = self.gather(i64::from(matches!(region, Some(Ok(_)))))?;
        let Some(rank) = members.iter().position(|member| *member == self.rank()) else { return Ok(None) };
        let (Some(index), Some(region)) = (index, region) else {
            return Err(claimed.and_then(Result::err).unwrap_or_else(membership::none_left));
        };
        let world = &self.group.world;
        match (region, members.iter().find(|member| have[**member as usize] == 0)) {
            (Ok(region), None) => {
                let members = members.iter().map(|member| self.group.members[*member as usize]).collect();
                let (world, options) = (world.clone(), self.options.clone());
                Ok(Some(Communicator::over(world, index, region, rank as u32, members, options)))
            }
            (region, without) => {
                if rank == 0 {
                    world.release_group(index)?; // nobody has used it
                }
                let without = without.map_or(world.rank(), |member| self.group.members[*member as usize]);
                let reason = || "it has no memory for the communicator's area".to_owned();
                Err(region.err().unwrap_or_else(|| Error::RankFailed { rank: without, reason: reason() }))
            }
        }
    }

    /// Every rank's `value`.
    fn gather(&mut self, value: i64) -> Result<Vec<i64>> {
        let mut values = vec![0; self.world_size() as usize];
        self.all_gather_slice(&[value], &mut values)?;
        Ok(values)
    }

    /// This rank's number in the group.
    pub fn rank(&self) -> u32 {
        self.group.rank
    }

    /// Number of ranks in the group.
    pub fn world_size(&self) -> u32 {
        self.group.world_size()
    }

    /// The world the group is part of.
    pub fn world(&self) -> &World {
        &self.group.world
    }

    /// The group's members as ranks of the world, in group order.
    pub fn members(&self) -> &[u32] {
        &self.group.members
    }

    /// Reduces `buffer` in place: afterwards every rank holds the same reduction over all ranks.
    ///
    /// # Errors
    /// [`Error::Poisoned`] after an earlier error; [`Error::Unsupported`] for an average or a premultiplied sum of integers;
    /// [`Error::Stream`], which ends the job. The buffer is dropped then. What goes wrong later is returned by
    /// [`Work::wait`].
    ///
    /// # Synchronization
    /// Returns once enqueued; runs on `stream`.
    pub fn all_reduce(&mut self, buffer: Buffer, op: ReduceOp, stream: &Stream) -> Result<Work<Buffer>> {
        let call = self.call(Kind::AllReduce, buffer.dtype(), buffer.len_elems(), op, 0)?;
        let operand = operand(&self.group, &buffer, 0);
        self.issue(call, operand, operand, buffer, stream, one)
    }

    /// Out of place: reduces `src` into `dst`. Returns both.
    ///
    /// # Errors
    /// As [`all_reduce`](Communicator::all_reduce); [`Error::LengthMismatch`] and [`Error::DTypeMismatch`] if the buffers
    /// differ.
    pub fn all_reduce_into(
        &mut self,
        src: Buffer,
        dst: Buffer,
        op: ReduceOp,
        stream: &Stream,
    ) -> Result<Work<(Buffer, Buffer)>> {
        let call = self.call(Kind::AllReduce, src.dtype(), src.len_elems(), op, 0)?;
        check_extent("all_reduce_into", extent(&dst), extent(&src))?;
        self.issue_pair(call, src, dst, stream)
    }

    /// Reduces `src` (`world_size` shards) and leaves shard `rank` of the result in `dst` (one shard). Returns both.
    ///
    /// # Errors
    /// As [`all_reduce_into`](Communicator::all_reduce_into).
    pub fn reduce_scatter(
        &mut self,
        src: Buffer,
        dst: Buffer,
        op: ReduceOp,
        stream: &Stream,
    ) -> Result<Work<(Buffer, Buffer)>> {
        let call = self.call(Kind::ReduceScatter, src.dtype(), src.len_elems(), op, 0)?;
        let all_elems = all_shards(dst.len_elems(), self.world_size())?;
        check_extent("reduce_scatter: src", extent(&src), (dst.dtype(), all_elems))?;
        self.issue_pair(call, src, dst, stream)
    }

    /// In place: afterwards shard `rank` of `buffer` (`world_size` shards) holds the reduction; the rest is as it was.
    ///
    /// # Errors
    /// As [`all_reduce`](Communicator::all_reduce); [`Error::InvalidArgument`] if the length is no multiple of the world
    /// size.
    pub fn reduce_scatter_in_place(&mut self, buffer: Buffer, op: ReduceOp, stream: &Stream) -> Result<Work<Buffer>> {
        let call = self.call(Kind::ReduceScatter, buffer.dtype(), buffer.len_elems(), op, 0)?;
        let own = operand(&self.group, &buffer, self.own_shard_bytes(&buffer)?);
        self.issue(call, operand(&self.group, &buffer, 0), own, buffer, stream, one)
    }

    /// Gathers every rank's `src` (one shard) into `dst` (`world_size` shards, in rank order). Returns both.
    ///
    /// # Errors
    /// As [`all_reduce_into`](Communicator::all_reduce_into).
    pub fn all_gather(&mut self, src: Buffer, dst: Buffer, stream: &Stream) -> Result<Work<(Buffer, Buffer)>> {
        let call = self.call(Kind::AllGather, src.dtype(), dst.len_elems(), ReduceOp::Sum, 0)?;
        let all_elems = all_shards(src.len_elems(), self.world_size())?;
        check_extent("all_gather: dst", extent(&dst), (src.dtype(), all_elems))?;
        self.issue_pair(call, src, dst, stream)
    }

    /// In place: shard `rank` of `buffer` (`world_size` shards) is this rank's contribution.
    ///
    /// # Errors
    /// As [`reduce_scatter_in_place`](Communicator::reduce_scatter_in_place).
    pub fn all_gather_in_place(&mut self, buffer: Buffer, stream: &Stream) -> Result<Work<Buffer>> {
        let call = self.call(Kind::AllGather, buffer.dtype(), buffer.len_elems(), ReduceOp::Sum, 0)?;
        let own = operand(&self.group, &buffer, self.own_shard_bytes(&buffer)?);
        self.issue(call, own, operand(&self.group, &buffer, 0), buffer, stream, one)
    }

    /// Every rank's `buffer` becomes that of rank `root` of the group.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if `root` is no rank of the group; else as [`all_reduce`](Communicator::all_reduce).
    pub fn broadcast(&mut self, buffer: Buffer, root: u32, stream: &Stream) -> Result<Work<Buffer>> {
        let call = self.call(Kind::Broadcast, buffer.dtype(), buffer.len_elems(), ReduceOp::Sum, root)?;
        let operand = operand(&self.group, &buffer, 0);
        self.issue(call, operand, operand, buffer, stream, one)
    }

    /// Completes once every rank's stream has come to its barrier.
    ///
    /// # Errors
    /// As [`all_reduce`](Communicator::all_reduce).
    pub fn barrier(&mut self, stream: &Stream) -> Result<Work<()>> {
        let call = self.call(Kind::Barrier, DType::U8, 0, ReduceOp::Sum, 0)?;
        self.issue(call, Operand::NONE, Operand::NONE, (), stream, |()| [None, None])
    }

    /// The next operation of this communicator, if there may be one.
    pub(super) fn call(
        &self,
        kind: Kind,
        dtype: DType,
        len_elems: usize,
        op: ReduceOp,
        root: u32,
    ) -> Result<Descriptor> {
        self.calls.next(self.group.world.fault(), kind, dtype, len_elems, op, root)
    }

    fn issue_pair(
        &mut self,
        call: Descriptor,
        src: Buffer,
        dst: Buffer,
        stream: &Stream,
    ) -> Result<Work<(Buffer, Buffer)>> {
        let (from, to) = (operand(&self.group, &src, 0), operand(&self.group, &dst, 0));
        self.issue(call, from, to, (src, dst), stream, |(src, dst)| [Some(src.memory()), Some(dst.memory())])
    }

    /// Hands an operation that owns `buffers` to `stream`, or runs it now if that is immediate; `held` names the memory it
    /// touches.
    fn issue<B>(
        &mut self,
        descriptor: Descriptor,
        src: Operand,
        dst: Operand,
        buffers: B,
        stream: &Stream,
        held: fn(&B) -> Held<'_>,
    ) -> Result<Work<B>> {
        let job = Job { descriptor, src, dst };
        self.calls.note_issued(1);
        self.line_up(stream).map_err(|error| self.group.world.fail(error))?;
        if stream.is_immediate() {
            let memory = held(&buffers).map(|memory| memory.map(|memory| &**memory));
            // SAFETY: the operands point into `buffers`, which are not given back before the operation has ended, and never
            // after an error; their lengths were checked against the descriptor; the communicator lines its operations up.
            let run = || unsafe { perform(&self.group, &self.log, &job, memory) };
            let result = stream.run(run).map_err(|error| self.group.world.fail(error))?;
            return Ok(Work::ended(buffers, result));
        }
        let memory = held(&buffers).map(|memory| memory.cloned());
        let (completion, promise) = self.pool.take();
        let operation = Operation { memory, log: self.log.clone(), group: Arc::clone(&self.group), job, promise };
        stream.enqueue(move || operation.run()).map_err(|error| self.group.world.fail(error))?;
        // The deadline of the operation counts from where it begins.
        let timeout = self.group.timeout.saturating_add(QUEUE_GRACE);
        Ok(Work::in_flight(buffers, completion, timeout))
    }

    /// Runs an operation on the calling thread, behind those issued before.
    ///
    /// # Safety
    /// `src` and `dst` are valid for what the descriptor says. They are private, or they lie in `held`, which nobody else
    /// accesses until this returns and, after any error but [`Error::Mismatch`], ever.
    pub(super) unsafe fn run_now(
        &mut self,
        descriptor: Descriptor,
        src: Operand,
        dst: Operand,
        held: Option<&dyn Memory>,
    ) -> Result<()> {
        self.calls.note_issued(1);
        let job = Job { descriptor, src, dst };
        // SAFETY: the caller's promise; private operands are touched by nobody else, also after an error.
        let run = || unsafe { perform(&self.group, &self.log, &job, [held, None]) };
        match &self.last {
            Some(last) => last.run(run).map_err(|error| self.group.world.fail(error))?,
            None => run(),
        }
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

    /// Where this rank's shard begins.
    fn own_shard_bytes(&self, buffer: &Buffer) -> Result<usize> {
        let world_size = self.world_size() as usize;
        if !buffer.len_elems().is_multiple_of(world_size) {
            return Err(Error::InvalidArgument {
                argument: "buffer length",
                value: format!("{} elements", buffer.len_elems()),
                accepted: "must be a multiple of the group's size",
            });
        }
        Ok(buffer.len_bytes() / world_size * self.rank() as usize)
    }
}

impl std::fmt::Debug for Communicator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Communicator")
            .field("rank", &self.group.rank)
            .field("members", &self.group.members)
            .field("sequence", &self.calls.issued())
            .finish_non_exhaustive()
    }
}

// Operations in flight hold the group: who lets go of it last leaves.
impl Drop for Group {
    fn drop(&mut self) {
        membership::leave(&self.world, self.index, &self.area(0).departed, self.world_size());
    }
}

fn one(buffer: &Buffer) -> Held<'_> {
    [Some(buffer.memory()), None]
}

fn extent(buffer: &Buffer) -> Extent {
    (buffer.dtype(), buffer.len_elems())
}
