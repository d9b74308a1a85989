//! What a strategy has done so far, in numbers.

use std::sync::atomic::{AtomicU64, Ordering};

/// Totals since the strategy was set up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Statistics {
    /// Calls of backward.
    pub backwards: u64,
    /// Time spent in backward, on the host.
    pub backward_ns: u64,
    /// Gradient bytes reduced.
    pub reduced_bytes: u64,
    /// Time in which a gradient bucket was being reduced.
    pub reduction_ns: u64,
    /// Time in which the compute stream had nothing to do but wait for a reduction: the part that no backward hides.
    pub exposed_ns: u64,
    /// Time in norms and optimizer steps; in all of a replayed step.
    pub step_ns: u64,
}

/// The same, while streams add to it.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub backwards: AtomicU64,
    pub backward_ns: AtomicU64,
    pub reduced_bytes: AtomicU64,
    pub reduction_ns: AtomicU64,
    pub exposed_ns: AtomicU64,
    pub step_ns: AtomicU64,
    /// When the reduction in progress began; only the communication stream uses it.
    pub reduction_start_ns: AtomicU64,
    /// When the compute stream began to wait; only the compute stream uses it.
    pub wait_start_ns: AtomicU64,
}

impl Counters {
    pub fn read(&self) -> Statistics {
        // Relaxed, here and where they are added to: totals, through which nothing is published.
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Statistics {
            backwards: load(&self.backwards),
            backward_ns: load(&self.backward_ns),
            reduced_bytes: load(&self.reduced_bytes),
            reduction_ns: load(&self.reduction_ns),
            exposed_ns: load(&self.exposed_ns),
            step_ns: load(&self.step_ns),
        }
    }

    pub fn add(counter: &AtomicU64, amount: u64) {
        counter.fetch_add(amount, Ordering::Relaxed);
    }
}
