//! What the host learns of a norm without waiting for a stream: a ring of records in pinned memory, which the kernel writes
//! and anybody reads while it runs.
//!
//! ```text
//! kernel                                      host
//! record.generation = 0         relaxed       before = record.generation    acquire
//! fence                                       signal = record.signal        relaxed, word by word
//! record.signal = ..                          fence                         acquire
//! record.generation = n         release       n == before == record.generation: the signal is whole
//! ```
//! A seqlock (Boehm 2012, "Can seqlocks get along with programming language memory models?"). Record `n % 64` is
//! written over by norm `n + 64`, and who asks for it then is told so.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering, fence};
use std::time::{Duration, Instant};

use crossbeam::utils::Backoff;

use crate::abi::{NormRecord, StepSignal};
use crate::device::cuda::{Kernels, Pinned};
use crate::error::{Error, Result};

/// Norms whose records are kept.
pub(super) const LEN_RECORDS: u32 = 64;

/// How long a wait looks without sleeping: many norms are there by then, and a sleep would last longer than they take.
const EAGER: Duration = Duration::from_micros(200);
const LOOK_PAUSE: Duration = Duration::from_micros(50);

const RECORD_WORDS: usize = size_of::<NormRecord>() / 4;
const SIGNAL_WORDS: usize = size_of::<StepSignal>() / 4;

/// What a measurement found.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct NormReport {
    /// Norm of the unscaled gradients, as [`NormResult::total_norm`](crate::ops::NormResult::total_norm).
    pub total_norm: f64,
    /// What the optimizer multiplies in; 1 if the step is skipped.
    pub clip_coef: f32,
    /// Loss scale that was in the gradients.
    pub grad_scale: f32,
    /// Whether the step is skipped.
    pub found_inf: bool,
    /// Index of the first tensor that has a NaN or an infinity.
    pub first_nonfinite: Option<usize>,
}

pub(super) struct Ring {
    records: Pinned,
    first_chunks: Arc<[u64]>,
}

impl Ring {
    pub fn new(kernels: &Kernels, first_chunks: Arc<[u64]>) -> Result<Ring> {
        let len_bytes = LEN_RECORDS as usize * size_of::<NormRecord>();
        Ok(Ring { records: Pinned::zeroed(kernels.device(), len_bytes)?, first_chunks })
    }

    pub fn address(&self) -> u64 {
        self.records.address()
    }

    fn words(&self, generation: u32) -> &[AtomicU32; RECORD_WORDS] {
        let index = (generation % LEN_RECORDS) as usize;
        // SAFETY: record `index` lies in the pinned memory, which is page-aligned, zeroed and lives as long as `self`; the
        // kernel writes it while it is looked at, and all looks of the host are atomic.
        unsafe { self.records.as_ptr().cast::<[AtomicU32; RECORD_WORDS]>().add(index).as_ref() }
    }

    /// The signal of a norm; none if it is not there yet, or is being written.
    fn look(&self, generation: u32) -> Result<Option<StepSignal>> {
        let words = self.words(generation);
        let posted = &words[SIGNAL_WORDS];
        loop {
            let before = posted.load(Ordering::Acquire); // pairs with `post`: the signal is not older
            if before != generation {
                let is_later = before != 0 && before.wrapping_sub(generation).cast_signed() > 0;
                return if is_later { Err(written_over(generation, before)) } else { Ok(None) };
            }
            let mut signal = [0u32; SIGNAL_WORDS];
            for (to, from) in signal.iter_mut().zip(words) {
                *to = from.load(Ordering::Relaxed); // ordered by the fence
            }
            fence(Ordering::Acquire); // pairs with the fence of `retract`: whoever saw a newer signal sees the mark
            if posted.load(Ordering::Relaxed) == before {
                return Ok(Some(bytemuck::pod_read_unaligned(bytemuck::cast_slice(&signal))));
            }
        }
    }

    fn report(&self, signal: StepSignal) -> NormReport {
        let tensor_of = |slot: u64| self.first_chunks.partition_point(|first| *first <= slot).saturating_sub(1);
        NormReport {
            total_norm: signal.total_norm,
            clip_coef: signal.clip_coef,
            grad_scale: signal.grad_scale,
            found_inf: signal.found_inf != 0,
            first_nonfinite: (signal.nonfinite != 0).then(|| tensor_of(signal.first_nonfinite)),
        }
    }
}

#[cold]
fn written_over(generation: u32, by: u32) -> Error {
    Error::InvalidArgument {
        argument: "norm to read",
        value: format!("number {generation}, whose record number {by} was written over"),
        accepted: "must be read before 64 later ones are measured",
    }
}

/// The number of one measurement, by which the host asks for what it found. Clones ask for the same.
#[derive(Clone)]
pub struct Ticket {
    ring: Arc<Ring>,
    generation: u32,
}

impl Ticket {
    pub(super) fn new(ring: &Arc<Ring>, generation: u32) -> Ticket {
        Ticket { ring: Arc::clone(ring), generation }
    }

    pub(super) fn generation(&self) -> u32 {
        self.generation
    }

    /// What was found, if the measurement has ended. Calls no driver and disturbs no stream.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if 64 later measurements have ended.
    pub fn poll(&self) -> Result<Option<NormReport>> {
        Ok(self.ring.look(self.generation)?.map(|signal| self.ring.report(signal)))
    }

    /// Waits for the measurement alone, not for what else its stream does.
    ///
    /// # Errors
    /// As [`Ticket::poll`]; [`Error::TimedOut`] after `timeout`: also where the device has failed, which the stream then says.
    pub fn wait(&self, timeout: Duration) -> Result<NormReport> {
        let start = Instant::now();
        let backoff = Backoff::new();
        loop {
            if let Some(report) = self.poll()? {
                return Ok(report);
            }
            let waited = start.elapsed();
            if waited >= timeout {
                let what = format_args!("the measurement of gradient norm {}", self.generation);
                return Err(Error::timed_out(what, timeout));
            }
            if waited < EAGER {
                backoff.snooze(); // spins at first, and then yields
            } else {
                std::thread::sleep(LOOK_PAUSE);
            }
        }
    }
}

impl std::fmt::Debug for Ticket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ticket").field("generation", &self.generation).finish()
    }
}
