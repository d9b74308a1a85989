//! One operation of one rank: on record, run, and what its end means for its memory and its job.

use std::sync::Arc;

use super::executor::{self, Group, Job, Operand};
use super::work::Promise;
use crate::device::{Buffer, Memory};
use crate::error::{Error, Result};
use crate::telemetry::{Timeline, Track};
use crate::world::Record;

/// Where operations are told.
#[derive(Clone)]
pub(super) struct Log {
    pub(super) timeline: Timeline,
    pub(super) track: Track,
}

/// An operation in a stream's queue.
pub(super) struct Operation {
    // Dropped in this order, the promise last: who waits for the operation finds all else let go.
    pub(super) memory: [Option<Arc<dyn Memory>>; 2],
    pub(super) log: Log,
    pub(super) group: Arc<Group>,
    pub(super) job: Job,
    pub(super) promise: Promise,
}

const _: () =
    assert!(size_of::<Operation>() <= crate::device::INLINE_BYTES, "an operation is enqueued without allocating");

impl Operation {
    pub(super) fn run(mut self) {
        let memory = self.memory.each_ref().map(Option::as_deref);
        // SAFETY: the operands point into `memory`, which this task keeps alive and whose owner, the `Work`, gives nobody
        // access; its length was checked against the descriptor; the communicator lines its operations up.
        let result = unsafe { perform(&self.group, &self.log, &self.job, memory) };
        self.promise.settle(result);
    }
}

impl Drop for Operation {
    /// An operation that a failed stream drops will never come to its peers: they are told now.
    fn drop(&mut self) {
        if !self.promise.is_settled() {
            let reason = format!("{} was not run, because its stream has failed", self.job.descriptor);
            let world = &self.group.world;
            self.promise.settle(Err(world.raise(Error::RankFailed { rank: world.rank(), reason })));
        }
    }
}

/// Runs an operation on the calling thread. If it fails, so does the job, and `memory` is abandoned.
///
/// # Safety
/// As for [`executor::execute`]; memory that peers reach is in `memory`.
pub(super) unsafe fn perform(group: &Group, log: &Log, job: &Job, memory: [Option<&dyn Memory>; 2]) -> Result<()> {
    let descriptor = &job.descriptor;
    let size_bytes = descriptor.len_elems.saturating_mul(descriptor.dtype().size_bytes() as u64);
    let span = log.timeline.open(log.track, descriptor.kind().name(), descriptor.sequence as u32, size_bytes);
    let (input_elems, output_elems) = descriptor.sizes_elems(group.world_size());
    let record = Record {
        op: descriptor.kind().name(),
        group: group.index,
        sequence: descriptor.sequence,
        dtype: Some(descriptor.dtype()),
        input_elems,
        output_elems,
        timeout: group.timeout,
    };
    let record = group.world.record_start(&record, span.start_ns());
    let mut attempt = Attempt { group, job, memory, has_succeeded: false };
    // SAFETY: the caller's promise; should an error or a panic end it early, `attempt` sees to it that the memory is never
    // used again.
    let result = unsafe { executor::execute(group, job) };
    attempt.has_succeeded = result.is_ok();
    drop(attempt);
    let end_ns = span.close();
    if result.is_ok() {
        group.world.record_end(record, end_ns);
    }
    result
}

/// An operation that is running, and what happens if it does not come to a good end.
struct Attempt<'a> {
    group: &'a Group,
    job: &'a Job,
    memory: [Option<&'a dyn Memory>; 2],
    has_succeeded: bool,
}

impl Drop for Attempt<'_> {
    fn drop(&mut self) {
        if self.has_succeeded {
            return;
        }
        // A peer that has not noticed yet may still use it.
        self.memory.iter().flatten().for_each(|memory| memory.abandon());
        // After an error there is a fault; after a panic not yet.
        if std::thread::panicking() {
            let reason = format!("{} ended in a panic", self.job.descriptor);
            self.group.world.raise(Error::RankFailed { rank: self.group.world.rank(), reason });
        }
    }
}

/// `buffer` from `offset_bytes` on, as `group` sees it: memory in the arena of another world is private to it.
pub(super) fn operand(group: &Group, buffer: &Buffer, offset_bytes: usize) -> Operand {
    let memory = buffer.memory();
    let registration = memory.registration().filter(|(world, _)| world.is_same(&group.world));
    Operand {
        ptr: memory.as_ptr().as_ptr().wrapping_add(offset_bytes),
        arena_offset_bytes: registration.map(|(_, arena)| arena + offset_bytes),
    }
}
