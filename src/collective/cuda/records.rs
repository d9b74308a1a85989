//! What a rank's kernels and its host say to each other while the kernels run, in pinned memory.
//!
//! ```text
//!   host -> kernels   abort word: not 0 ends every wait
//!   kernels -> host   operations finished;  [channel] fault record of a block that gave up
//!   stream -> host    operation begun, where they run by steps
//! ```

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use super::page::Page;
use super::stepped::Waits;
use crate::abi::collective::{Awaited, FaultRecord, ONE_STEP_PHASE, Reason};
use crate::device::cuda::{Device, Pinned};
use crate::error::{Error, Result};
use crate::world::flag::reached;
use crate::world::{Outpost, Region};

const ABORT_AT: usize = 0;
const FINISHED_AT: usize = 64;
const BEGUN_AT: usize = 128;
const FAULTS_AT: usize = 192;

pub(super) struct Records {
    memory: Pinned,
    channels: u32,
    rank: u32,
    /// The group's area, for what the ranks have issued.
    region: Region,
    timeout: Duration,
    /// Operations given to the device.
    issued: AtomicU32,
    /// Operations that had run when the monitor looked last, and how often it has found as many.
    seen: [AtomicU32; 2],
    /// What the stream waits for, where operations run by steps.
    waits: Waits,
}

/// Beats without the end of an operation after which one is stuck: longer than a rank needs to do what another waits for
/// when it leaves.
const STUCK_BEATS: u32 = 10;

impl Records {
    /// # Safety
    /// `region` is the group's area, mapped whenever the result is used.
    pub(super) unsafe fn new(
        device: &Device,
        channels: u32,
        rank: u32,
        region: Region,
        timeout: Duration,
    ) -> Result<Records> {
        let memory = Pinned::zeroed(device, FAULTS_AT + channels as usize * size_of::<FaultRecord>())?;
        let (issued, seen) = (AtomicU32::new(0), [const { AtomicU32::new(0) }; 2]);
        Ok(Records { memory, channels, rank, region, timeout, issued, seen, waits: Waits::default() })
    }

    pub(super) fn abort_address(&self) -> u64 {
        self.memory.address() + ABORT_AT as u64
    }

    pub(super) fn finished_address(&self) -> u64 {
        self.memory.address() + FINISHED_AT as u64
    }

    pub(super) fn begun_address(&self) -> u64 {
        self.memory.address() + BEGUN_AT as u64
    }

    pub(super) fn waits(&self) -> &Waits {
        &self.waits
    }

    pub(super) fn faults_address(&self) -> u64 {
        self.memory.address() + FAULTS_AT as u64
    }

    /// Notes that the device was given `operations` more.
    pub(super) fn note_issued(&self, operations: u32) {
        // Relaxed, here and where it is read: a count, through which nothing is published.
        self.issued.fetch_add(operations, Ordering::Relaxed);
    }

    /// Operations that have run on the device.
    pub(super) fn finished(&self) -> u32 {
        self.word(FINISHED_AT).load(Ordering::Relaxed)
    }

    /// Whether the device has run all that it was given, and no block has given up.
    pub(super) fn is_whole(&self) -> bool {
        self.finished() == self.issued.load(Ordering::Relaxed)
            && (0..self.channels).all(|channel| self.record(channel).is_none())
    }

    fn word(&self, offset_bytes: usize) -> &AtomicU32 {
        // SAFETY: inside the memory, aligned, and only accessed by atomics, here and on the device.
        unsafe { self.memory.as_ptr().add(offset_bytes).cast::<AtomicU32>().as_ref() }
    }

    /// The record of a channel whose block has given up.
    fn record(&self, channel: u32) -> Option<FaultRecord> {
        let at = FAULTS_AT + channel as usize * size_of::<FaultRecord>();
        // Acquire: the block writes `reason` last, by a release.
        if self.word(at).load(Ordering::Acquire) == 0 {
            return None;
        }
        let words = std::array::from_fn(|word| self.word(at + 4 * word).load(Ordering::Relaxed));
        Some(bytemuck::cast::<[u32; size_of::<FaultRecord>() / 4], _>(words))
    }

    /// The own page.
    pub(super) fn own_page(&self) -> &Page {
        self.page(self.rank)
    }

    fn page(&self, rank: u32) -> &Page {
        // SAFETY: the promise made to `new`; ranks in records are those of this group's links.
        unsafe { Page::of(self.region, rank) }
    }

    fn describe(&self, record: &FaultRecord) -> Option<Error> {
        let sequence = u64::from(record.operation);
        match Reason::from_code(record.reason)? {
            Reason::Aborted => None, // the job's fault says why
            Reason::Late => {
                let issued = self.own_page().at(record.operation);
                Some(Error::PeerStalled {
                    rank: record.peer,
                    operation: issued.map_or_else(|| "an operation of a replayed graph".into(), |d| d.to_string()),
                    sequence,
                    place: place(record),
                    waited_ms: u64::try_from(self.timeout.as_millis()).unwrap_or(u64::MAX),
                    expected: record.expected,
                    seen: record.seen,
                })
            }
            Reason::Mismatch => {
                let named = |rank: u32, hash: u32| {
                    let Some(mut found) = self.page(rank).find(hash) else {
                        return format!("an operation of hash {hash:#010x}");
                    };
                    found.sequence = sequence;
                    found.to_string()
                };
                let (rank, peer) = (self.rank, record.peer);
                let (mine, theirs) = (named(rank, record.expected), named(peer, record.seen));
                Some(Error::Mismatch { sequence, rank, mine, peer, theirs })
            }
        }
    }
}

/// Where in the operation a block was.
fn place(record: &FaultRecord) -> String {
    let awaited = match Awaited::from_code(record.awaited) {
        Some(Awaited::Greeting) => return "arriving".to_owned(),
        Some(Awaited::Credit) => "a free slot",
        _ => "data",
    };
    let FaultRecord { index, round, chunk, .. } = record;
    let phase = match record.phase {
        0 => "reduce-scatter",
        1 => "all-gather",
        ONE_STEP_PHASE => return format!("one step, round {round}: waiting for {awaited}"),
        _ => "broadcast",
    };
    format!("{phase} step {index}, round {round}, chunk {chunk}: waiting for {awaited}")
}

impl Outpost for Records {
    fn is_stuck(&self) -> bool {
        // By the monitor alone.
        let (finished, [seen, beats]) = (self.finished(), &self.seen);
        // More have ended than were issued where a graph was launched without a word.
        let waits = !reached(finished, self.issued.load(Ordering::Relaxed));
        let stays = seen.swap(finished, Ordering::Relaxed) == finished;
        let count = if waits && stays { beats.load(Ordering::Relaxed).saturating_add(1) } else { 0 };
        beats.store(count, Ordering::Relaxed);
        count >= STUCK_BEATS
    }

    fn abort(&self) {
        // Relaxed: it publishes nothing; `release` orders it before what it writes.
        self.word(ABORT_AT).store(1, Ordering::Relaxed);
        self.waits.release(self.own_page());
    }

    fn look(&self) -> Option<Error> {
        let found: Vec<FaultRecord> = (0..self.channels).filter_map(|channel| self.record(channel)).collect();
        // A mismatch is the cause where another block has waited in vain.
        let first = found
            .iter()
            .find(|record| record.reason == Reason::Mismatch as u32)
            .or_else(|| found.iter().find(|record| record.reason == Reason::Late as u32));
        let begun = self.word(BEGUN_AT).load(Ordering::Relaxed);
        let overdue = || self.waits.overdue(self.own_page(), begun, self.timeout);
        first.copied().or_else(overdue).and_then(|record| self.describe(&record))
    }
}
