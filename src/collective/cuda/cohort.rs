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
    /// Operations launched, or given up.
    closed: u64,
    outcome: Option<Error>,
}

/// One rank's part in an operation.
pub(super) struct Part {
    pub(super) call: Descriptor,
    /// Of this rank alone: [`CollectiveArguments::ranks`] has one.
    pub(super) arguments: CollectiveArguments,
    /// Recorded on the rank's stream.
    pub(super) arrived: Event,
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
    /// after `timeout`; the world's fault; what the driver says. Then it was launched for none of the ranks.
    ///
    /// # Safety
    /// What [`Kernels::launch`] asks for, of this rank's arguments, for a kernel on `stream`.
    pub(super) unsafe fn issue(
        &self,
        part: Part,
        shape: Shape,
        (kernels, stream): (&Kernels, &Stream),
        world: &World,
        timeout: Duration,
    ) -> Result<()> {
        let (rank, call) = (world.rank(), part.call);
        let Some(own) = self.0.ranks.iter().position(|other| *other == rank) else { return Ok(()) };
        stream.record(&part.arrived)?;
        let mut meeting = self.meeting();
        meeting.parts[own] = Some(part);
        if meeting.parts.iter().all(Option::is_some) {
            let parts: Vec<Part> = meeting.parts.iter_mut().filter_map(Option::take).collect();
            // SAFETY: every rank's promise is kept: those who wait below have made theirs for this launch.
            let launched = unsafe { self.launch(&parts, shape, kernels, stream) };
            (meeting.closed, meeting.outcome) = (call.sequence, launched.as_ref().err().cloned());
            self.0.changed.notify_all();
            return launched;
        }
        let start = Instant::now();
        while meeting.closed < call.sequence {
            let given_up =
                world.fault().or_else(|| (start.elapsed() > timeout).then(|| self.stalled(&meeting, &call, start)));
            if let Some(error) = given_up {
                // From now on the operation cannot be launched.
                meeting.parts[own] = None;
                return Err(error);
            }
            let slept = self.0.changed.wait_timeout(meeting, LOOK);
            meeting = slept.unwrap_or_else(PoisonError::into_inner).0;
        }
        meeting.outcome.clone().map_or(Ok(()), Err)?;
        stream.wait(&self.0.done)
    }

    /// One grid of all `parts`, behind what every rank has enqueued.
    ///
    /// # Safety
    /// As [`Cohort::issue`], for every part.
    unsafe fn launch(&self, parts: &[Part], shape: Shape, kernels: &Kernels, stream: &Stream) -> Result<()> {
        let Some(first) = parts.first() else { return Ok(()) };
        if let Some(index) = parts.iter().position(|part| part.call != first.call) {
            return Err(first.call.mismatch(self.0.ranks[0], self.0.ranks[index], &parts[index].call));
        }
        let mut arguments = first.arguments;
        for (place, part) in arguments.ranks.iter_mut().zip(parts) {
            *place = part.arguments.ranks[0];
            stream.wait(&part.arrived)?;
        }
        let blocks = shape.blocks * parts.len() as u32;
        let shape = Shape { blocks, cooperative: true, ..shape };
        // SAFETY: the caller's promise for every rank. All blocks run at the same time, so ranks may wait for each other.
        unsafe { kernels.launch(collective_entry(first.call.dtype()), shape, stream, &arguments) }?;
        stream.record(&self.0.done)
    }

    fn stalled(&self, meeting: &Meeting, call: &Descriptor, start: Instant) -> Error {
        let absent = meeting.parts.iter().position(Option::is_none).unwrap_or(0);
        Error::PeerStalled {
            rank: self.0.ranks[absent],
            operation: call.to_string(),
            sequence: call.sequence,
            place: "issuing it on the device that it shares".to_owned(),
            waited_ms: u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX),
            expected: call.sequence as u32,
            seen: meeting.closed as u32,
        }
    }
}
