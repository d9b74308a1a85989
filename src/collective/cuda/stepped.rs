//! Operations as one kernel a step, for ranks whose kernels do not run at the same time: processes that share a device.
//!
//! ```text
//!   kernel: greet ─ wait until all have greeted ─ wait for data and a free slot ─ kernel: step 0 ─ wait .. ─ kernel: step 1 ..
//! ```
//! Kernels tell the peers' streams how far they are, in [`Page::signal`]; streams wait (`cuStreamWaitValue32`), and no kernel
//! does. The words are in memory of the host: so it sees which wait takes too long, and ends all of them when the job has
//! failed, by writing what they wait for. The kernels behind find the abort word and neither move nor tell anything.
//!
//! Ranks must not be threads of one process, where they need not be: streams of a process may share a hardware queue, and one
//! rank's wait would then hold back the kernel of another that it waits for. Among the streams of one rank that cannot be:
//! nothing that its wait needs is enqueued behind it.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::geometry::{Plan, SLOTS};
use super::page::Page;
use super::records::Records;
use crate::abi::collective::{
    Awaited, CollectiveArguments, FaultRecord, NOBODY, Progress, Reason, Source, Step, collective_entry,
};
use crate::device::cuda::{Kernels, Shape, Stream};
use crate::dtype::DType;
use crate::error::Result;
use crate::world::World;
use crate::world::flag::reached;

// ---- what streams wait for ---------------------------------------------------------------------------------------------

/// What a rank's stream waits for, in its order, as far as it may not have come yet: each as the fault that it may become.
#[derive(Default)]
pub(super) struct Waits(Mutex<Queue>);

#[derive(Default)]
struct Queue {
    pending: VecDeque<FaultRecord>,
    /// When the first one was seen to be what the stream stands at.
    since: Option<Instant>,
    is_released: bool,
}

impl Queue {
    fn forget_the_past(&mut self, page: &Page) {
        while let Some(wait) = self.pending.front()
            && reached(page.signal(wait.peer, wait.awaited), wait.expected)
        {
            self.pending.pop_front();
            self.since = None;
        }
    }
}

impl Waits {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One more. Room is made by those that are over before there is more of it.
    fn push(&self, page: &Page, wait: FaultRecord) {
        let queue = &mut *self.queue();
        if queue.pending.len() == queue.pending.capacity() {
            queue.forget_the_past(page);
        }
        queue.pending.push_back(wait);
    }

    /// The wait that the stream stands at for longer than `timeout`, if there is one. `page` is the waiting rank's; the
    /// stream has come to operation `begun`. To be asked often: the clock starts at the first question.
    pub(super) fn overdue(&self, page: &Page, begun: u32, timeout: Duration) -> Option<FaultRecord> {
        let queue = &mut *self.queue();
        if queue.is_released {
            return None;
        }
        queue.forget_the_past(page);
        let wait = queue.pending.front().filter(|wait| reached(begun, wait.operation))?;
        let since = *queue.since.get_or_insert_with(Instant::now);
        (since.elapsed() > timeout).then(|| FaultRecord { seen: page.signal(wait.peer, wait.awaited), ..*wait })
    }

    /// Ends all waits. Again where a peer has written a smaller number since.
    pub(super) fn release(&self, page: &Page) {
        let queue = &mut *self.queue();
        queue.is_released = true;
        for wait in &queue.pending {
            page.release(wait.peer, wait.awaited, wait.expected);
        }
    }
}

// ---- issuing -----------------------------------------------------------------------------------------------------------

/// Issues a rank's operations step by step.
pub(super) struct Stepper {
    /// Where the device finds the rank's page.
    page: u64,
    /// Transfers of the link with each peer, of all operations issued.
    counts: Vec<Progress>,
}

/// What the operations of a communicator have in common.
pub(super) struct Site<'a> {
    pub(super) world: &'a World,
    pub(super) kernels: &'a Kernels,
    pub(super) stream: &'a Stream,
    pub(super) records: &'a Records,
}

/// One operation of one rank.
pub(super) struct Work<'a> {
    pub(super) operation: u32,
    pub(super) dtype: DType,
    pub(super) plan: &'a Plan,
    /// Of the whole operation.
    pub(super) arguments: CollectiveArguments,
    /// The steps that `arguments` tell the address of.
    pub(super) table: &'a [Step],
}

impl Stepper {
    pub(super) fn new(page: u64, world_size: u32) -> Stepper {
        Stepper { page, counts: vec![Progress { sent: 0, taken: 0 }; world_size as usize] }
    }

    /// Enqueues the kernels of `work` and what they wait for.
    ///
    /// # Errors
    /// The world's fault, if there is one by now; what the driver says.
    ///
    /// # Safety
    /// What [`Kernels::launch`] asks for, of the arguments.
    pub(super) unsafe fn issue(&mut self, site: &Site<'_>, work: &Work<'_>) -> Result<()> {
        // SAFETY: a word of the records, which outlive the stream's work.
        unsafe { site.stream.write_value(site.records.begun_address(), work.operation) }?;
        let whole = work.arguments;
        let empty = CollectiveArguments { channels: 1, rounds: 0, opens: 0, closes: 0, ..whole };
        let launch = |arguments: &CollectiveArguments| {
            let Plan { threads, .. } = *work.plan;
            let shape = Shape { blocks: arguments.channels, threads, shared_bytes: 0, cooperative: false };
            // SAFETY: the caller's promise, of which each kernel needs a part.
            unsafe { site.kernels.launch(collective_entry(work.dtype), shape, site.stream, arguments) }
        };
        launch(&CollectiveArguments { opens: 1, ..empty })?;
        let mut has_greetings = false;
        for round in 0..work.plan.rounds {
            if let Some(fault) = site.world.fault() {
                return Err(fault);
            }
            for (index, step) in work.table.iter().enumerate() {
                if !has_greetings && uses_others(step) {
                    self.await_greetings(site, work)?;
                    has_greetings = true;
                }
                self.await_step(site, work, step, round)?;
                let is_last = round + 1 == work.plan.rounds && index + 1 == work.table.len();
                let mut part = CollectiveArguments { first_round: round, rounds: round + 1, opens: 0, ..whole };
                part.closes = u32::from(is_last && has_greetings);
                part.ranks[0].steps += (index * size_of::<Step>()) as u64;
                part.ranks[0].len_steps = 1;
                launch(&part)?;
                if part.closes == 1 {
                    return Ok(());
                }
            }
        }
        if !has_greetings {
            self.await_greetings(site, work)?;
        }
        launch(&CollectiveArguments { closes: 1, ..empty })
    }

    fn await_greetings(&self, site: &Site<'_>, work: &Work<'_>) -> Result<()> {
        let own = site.world.rank();
        let nowhere =
            Step { recv_peer: NOBODY, send_peer: NOBODY, chunk: 0, source: 0, to_output: 0, phase: 0, index: 0 };
        let mut peers = (0..site.world.world_size()).filter(|peer| *peer != own);
        peers.try_for_each(|peer| self.wait(site, work, &nowhere, 0, (Awaited::Greeting, peer, work.operation)))
    }

    /// What `step` needs, and what it changes in the counts.
    fn await_step(&mut self, site: &Site<'_>, work: &Work<'_>, step: &Step, round: u64) -> Result<()> {
        for peer in senders(step, site.world) {
            let taken = self.counts[peer as usize].taken.wrapping_add(1);
            self.wait(site, work, step, round, (Awaited::Data, peer, taken))?;
            self.counts[peer as usize].taken = taken;
        }
        if step.send_peer != NOBODY {
            let sent = self.counts[usize::from(step.send_peer)].sent.wrapping_add(1);
            let credit = sent.wrapping_sub(SLOTS);
            self.wait(site, work, step, round, (Awaited::Credit, step.send_peer.into(), credit))?;
            self.counts[usize::from(step.send_peer)].sent = sent;
        }
        Ok(())
    }

    /// Makes the stream wait until `peer` is as far as `expected`, if it is not yet.
    fn wait(
        &self,
        site: &Site<'_>,
        work: &Work<'_>,
        step: &Step,
        round: u64,
        (awaited, peer, expected): (Awaited, u32, u32),
    ) -> Result<()> {
        let awaited = awaited as u32;
        if reached(site.records.own_page().signal(peer, awaited), expected) {
            return Ok(());
        }
        site.records.waits().push(
            site.records.own_page(),
            FaultRecord {
                reason: Reason::Late as u32,
                operation: work.operation,
                rank: site.world.rank(),
                peer,
                awaited,
                phase: step.phase.into(),
                index: step.index.into(),
                chunk: step.chunk.into(),
                round,
                expected,
                seen: 0,
            },
        );
        // SAFETY: a word of this rank's page, which is mapped for the device as long as the communicator lives.
        unsafe { site.stream.wait_value(self.page + Page::signal_offset_bytes(peer, awaited) as u64, expected) }
    }
}

/// As the kernel has it: whether a step is not before the ranks have agreed.
fn uses_others(step: &Step) -> bool {
    step.recv_peer != NOBODY || step.source == Source::All as u8 || step.to_output != 0
}

/// Whose transfers a step takes.
fn senders(step: &Step, world: &World) -> impl Iterator<Item = u32> {
    let (own, step) = (world.rank(), *step);
    let takes_all = step.source == Source::All as u8;
    (0..world.world_size()).filter(move |peer| *peer != own && (takes_all || *peer == u32::from(step.recv_peer)))
}

#[cfg(test)]
mod tests {
    use bytemuck::Zeroable;

    use super::*;

    fn page() -> Box<Page> {
        // SAFETY: a page is atomics, of which any bytes are valid.
        Box::new(unsafe { std::mem::zeroed() })
    }

    fn wait(operation: u32, peer: u32, awaited: Awaited, expected: u32) -> FaultRecord {
        FaultRecord { operation, peer, awaited: awaited as u32, expected, ..FaultRecord::zeroed() }
    }

    /// The waits of two operations for peer 3, of which the first stands at its data.
    fn waits(page: &Page) -> Waits {
        let waits = Waits::default();
        waits.push(page, wait(1, 3, Awaited::Greeting, 1));
        waits.push(page, wait(1, 3, Awaited::Data, 5));
        waits.push(page, wait(2, 3, Awaited::Data, 6));
        page.count(3, Awaited::Greeting as u32, 1);
        page.count(3, Awaited::Data as u32, 4);
        waits
    }

    #[test]
    fn the_first_wait_that_is_not_over_becomes_overdue_once_the_stream_is_there() {
        let page = page();
        let waits = waits(&page);
        let overdue = |begun, timeout| waits.overdue(&page, begun, timeout);
        assert_eq!(overdue(0, Duration::ZERO), None, "the stream has not come to the operation");
        assert_eq!(overdue(1, Duration::from_secs(3600)), None);
        let first = FaultRecord { seen: 4, ..wait(1, 3, Awaited::Data, 5) };
        std::thread::sleep(Duration::from_millis(2));
        assert_eq!(overdue(1, Duration::from_millis(1)), Some(first));
        page.count(3, Awaited::Data as u32, 5);
        assert_eq!(overdue(1, Duration::ZERO), None, "the next operation has not begun");
        assert_eq!(overdue(2, Duration::from_secs(3600)), None, "its clock begins anew");
    }

    #[test]
    fn waits_that_are_over_make_room_for_others() {
        let (page, waits) = (page(), Waits::default());
        let capacity = || waits.queue().pending.capacity();
        let push = |expected: u32| waits.push(&page, wait(1, 3, Awaited::Data, expected));
        push(1);
        let first = capacity();
        for expected in 2..10 * first as u32 {
            page.count(3, Awaited::Data as u32, expected - 1);
            push(expected);
        }
        assert_eq!(capacity(), first);
        (0..first as u32).for_each(|more| push(10 * first as u32 + more));
        assert!(capacity() > first, "no wait is forgotten that is not over");
    }

    #[test]
    fn released_waits_are_over_and_stay_so_when_peers_go_on_counting() {
        let page = page();
        let waits = waits(&page);
        waits.release(&page);
        assert_eq!(page.signal(3, Awaited::Data as u32), 6);
        assert_eq!(waits.overdue(&page, 2, Duration::ZERO), None);
        // A kernel of the peer that was under way.
        page.count(3, Awaited::Data as u32, 5);
        waits.release(&page);
        assert_eq!(page.signal(3, Awaited::Data as u32), 6);
    }
}
