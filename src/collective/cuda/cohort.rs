//! The ranks of one device that are threads of one process: they launch together, as one cooperative grid.
//!
//! ```text
//!   rank 0    .. own work ── arrived ─┐                          ┌─ wait(done) ── own work ..
//!   rank 1    .. own work ── arrived ─┤                          ├─ wait(done) ── own work ..
//!   rank 2    .. own work ────────────┴─ grid of 3 ranks ── done ┴─ own work ..      the last to come launches
//! ```
//! The ranks meet on the host, where it is also found that they issue different operations; so nothing is launched then.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::abi::collective::{CollectiveArguments, collective_entry};
use crate::collective::descriptor::Descriptor;
use crate::device::cuda::{Device, Event, Kernels, Shape, Stream};
use crate::error::{Error, Result};
use crate::world::World;

/// How often a rank that waits for the others looks whether the job has failed.
const LOOK: Duration = Duration::from_millis(5);

/// The ranks of a communicator on one device of this process. Clones are the same.
#[derive(Clone)]
pub(super) struct Cohort(Arc<Core>);

struct Core {
    ranks: Vec<u32>,
    meeting: Mutex<Meeting>,
    changed: Condvar,
    /// The end of the grid launched last.
    done: Event,
}

#[derive(Default)]
struct Meeting {
    /// Who has come to the operation that is next, by position in `ranks`.
    parts: Vec<Option<Part>>,
    /// Operations launched, or found to differ, or refused by the driver.
    closed: u64,
    /// How the last of them ended: the stream that its grid runs on, with `done` behind it.
    outcome: Option<std::result::Result<Stream, Failure>>,
}

/// One rank's part in an operation.
pub(super) struct Part {
    pub(super) call: Descriptor,
    /// Of this rank alone: [`CollectiveArguments::ranks`] has one.
    pub(super) arguments: CollectiveArguments,
    /// Recorded on the rank's stream.
    pub(super) arrived: Event,
}

/// Why a rank's stream is not behind an operation.
#[derive(Clone)]
pub(super) struct Failure {
    pub(super) error: Error,
    /// The stream on which the grid runs all the same, this rank's part in it: nothing on the device keeps what this rank does
    /// next from running beside it.
    pub(super) runs_on: Option<Stream>,
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        Failure { error, runs_on: None }
    }
}

impl Cohort {
    pub(super) fn new(device: &Device, ranks: Vec<u32>) -> Result<Cohort> {
        let meeting = Mutex::new(Meeting { parts: ranks.iter().map(|_| None).collect(), closed: 0, outcome: None });
        Ok(Cohort(Arc::new(Core { meeting, changed: Condvar::new(), done: Event::new(device)?, ranks })))
    }

    fn meeting(&self) -> MutexGuard<'_, Meeting> {
        self.0.meeting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Issues the operation of `part` with the other ranks, each of which calls this once; `stream` is this rank's. When it
    /// returns well, the operation is enqueued, and what is enqueued on `stream` from now on runs behind it.
    ///
    /// # Errors
    /// [`Error::Mismatch`] if the ranks issue different operations; [`Error::PeerStalled`] for a rank that has not come
    /// after `timeout`; what the driver says, and [`Error::RankFailed`] on the other ranks. Each is the job's fault. The
    /// operation was launched for none of the ranks, or for all: then [`Failure::runs_on`] says where.
    ///
    /// # Safety
    /// What [`Kernels::launch`] asks for, of this rank's arguments, for a kernel that has ended when `stream` has come to its
    /// end, or that which the failure names.
    pub(super) unsafe fn issue(
        &self,
        part: Part,
        shape: Shape,
        (kernels, stream): (&Kernels, &Stream),
        world: &World,
        timeout: Duration,
    ) -> std::result::Result<(), Failure> {
        let (rank, call) = (world.rank(), part.call);
        let Some(own) = self.0.ranks.iter().position(|other| *other == rank) else { return Ok(()) };
        stream.record(&part.arrived)?;
        let mut meeting = self.meeting();
        meeting.parts[own] = Some(part);
        if meeting.parts.iter().all(Option::is_some) {
            // SAFETY: every rank's promise is kept: those who wait below have made theirs for this launch.
            let launched = unsafe { self.launch(&meeting.parts, shape, kernels, stream) };
            if let Err(failure) = &launched {
                world.raise(failure.error.clone()); // before the others do, who would take it for their own
            }
            meeting.parts.fill_with(|| None);
            (meeting.closed, meeting.outcome) = (call.sequence, Some(launched.clone().map(|()| stream.clone())));
            self.0.changed.notify_all();
            return launched;
        }
        let start = Instant::now();
        while meeting.closed < call.sequence {
            let given_up = world.fault().or_else(|| {
                let is_late = start.elapsed() > timeout;
                is_late.then(|| world.raise(self.stalled(&meeting, &call, start, world)))
            });
            if let Some(error) = given_up {
                // From now on the operation cannot be launched.
                meeting.parts[own] = None;
                return Err(error.into());
            }
            let slept = self.0.changed.wait_timeout(meeting, LOOK);
            meeting = slept.unwrap_or_else(PoisonError::into_inner).0;
        }
        match &meeting.outcome {
            None => Ok(()), // there is one for every operation that is closed
            Some(Err(Failure { error, runs_on })) => {
                let error = world.fault().unwrap_or_else(|| error.clone()); // as this rank tells it
                Err(Failure { error, runs_on: runs_on.clone() })
            }
            Some(Ok(grid)) => stream.wait(&self.0.done).map_err(|error| Failure { error, runs_on: Some(grid.clone()) }),
        }
    }

    /// One grid of all `parts`, which are there, behind what every rank has enqueued.
    ///
    /// # Safety
    /// As [`Cohort::issue`], for every part.
    unsafe fn launch(
        &self,
        parts: &[Option<Part>],
        shape: Shape,
        kernels: &Kernels,
        stream: &Stream,
    ) -> std::result::Result<(), Failure> {
        let Some(first) = parts.iter().flatten().next() else { return Ok(()) };
        let mut arguments = first.arguments;
        for ((rank, place), part) in self.0.ranks.iter().zip(&mut arguments.ranks).zip(parts.iter().flatten()) {
            if part.call != first.call {
                return Err(first.call.mismatch(self.0.ranks[0], *rank, &part.call).into());
            }
            *place = part.arguments.ranks[0];
            stream.wait(&part.arrived)?;
        }
        let blocks = shape.blocks * parts.len() as u32;
        let shape = Shape { blocks, cooperative: true, ..shape };
        // SAFETY: the caller's promise for every rank. All blocks run at the same time, so ranks may wait for each other.
        unsafe { kernels.launch(collective_entry(first.call.dtype()), shape, stream, &arguments) }?;
        stream.record(&self.0.done).map_err(|error| Failure { error, runs_on: Some(stream.clone()) })
    }

    /// Why the first rank that has not come has not.
    fn stalled(&self, meeting: &Meeting, call: &Descriptor, start: Instant, world: &World) -> Error {
        let absent = self.0.ranks[meeting.parts.iter().position(Option::is_none).unwrap_or(0)];
        // Who has left is lost, not late.
        world.fault_of(absent).unwrap_or_else(|| Error::PeerStalled {
            rank: absent,
            operation: call.to_string(),
            sequence: call.sequence,
            place: "issuing it on the device that it shares".to_owned(),
            waited_ms: u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX),
            expected: call.sequence as u32,
            seen: meeting.closed as u32,
        })
    }
}
