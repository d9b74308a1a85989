//! How long the device took for parts of a step, without waiting for it: events around them, read when they have passed. For
//! profilers each part is a range of the host's, too, in which its work is enqueued.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use super::memory::DevicePlace;
use crate::device::cuda::{Stream, Timer};
use crate::error::Result;
use crate::strategy::statistics::Counters;
use crate::telemetry::trace::now_ns;
use crate::telemetry::{Timeline, Track, nvtx};

/// Parts that are timed and not read yet, at most. The device is no further behind the host in sound training.
const MAX_RUNNING: usize = 256;

/// What a part of a step is.
#[derive(Debug, Clone, Copy)]
pub(super) struct Part {
    pub name: &'static str,
    pub index: u32,
    pub size_bytes: u64,
    pub track: Track,
    /// The total that its time is added to.
    pub total: fn(&Counters) -> &AtomicU64,
}

/// The timed parts of one strategy.
pub(super) struct Watch {
    place: DevicePlace,
    counters: Arc<Counters>,
    timeline: Timeline,
    /// Started when the clock of the host was at `base_ns`.
    base: Timer,
    base_ns: u64,
    running: VecDeque<(Timer, Part)>,
    free: Vec<Timer>,
    /// While a graph is captured, whose parts have no time of their own.
    pub is_paused: bool,
}

impl Watch {
    pub fn new(place: &DevicePlace, counters: Arc<Counters>, timeline: Timeline) -> Result<Watch> {
        let mut watch = Watch {
            place: place.clone(),
            counters,
            timeline,
            base: Timer::new(&place.device)?,
            base_ns: 0,
            running: VecDeque::with_capacity(MAX_RUNNING),
            free: Vec::with_capacity(MAX_RUNNING),
            is_paused: false,
        };
        watch.set_base()?;
        Ok(watch)
    }

    /// Relates the device's clock to the host's. The compute stream is idle.
    pub fn set_base(&mut self) -> Result<()> {
        let before_ns = now_ns();
        self.base.start(&self.place.compute)?;
        self.base.stop(&self.place.compute)?;
        self.base.elapsed(self.place.timeout)?;
        self.base_ns = before_ns + (now_ns() - before_ns) / 2;
        Ok(())
    }

    /// Has `enqueue` enqueue a part on `stream`, and takes its time.
    pub fn time<R>(&mut self, stream: &Stream, part: Part, enqueue: impl FnOnce() -> Result<R>) -> Result<R> {
        let _range = nvtx::range(part.name, part.index);
        if self.is_paused || self.running.len() == MAX_RUNNING {
            return enqueue();
        }
        let timer = self.free.pop().map_or_else(|| Timer::new(&self.place.device), Ok)?;
        timer.start(stream)?;
        let result = enqueue()?;
        timer.stop(stream)?;
        self.running.push_back((timer, part));
        Ok(result)
    }

    /// Adds up what has passed since. Waits for nothing.
    pub fn collect(&mut self) {
        while let Some((timer, part)) = self.running.front() {
            let Ok(Some(took)) = timer.took() else { return };
            let ns = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
            Counters::add((part.total)(&self.counters), ns(took));
            // When it was is for the timeline alone, and to ask costs as much as how long it took.
            if self.timeline.is_enabled()
                && let Ok(since) = timer.start_since(&self.base)
            {
                let start_ns = self.base_ns.saturating_add(ns(since));
                let end_ns = start_ns.saturating_add(ns(took));
                self.timeline.span(part.track, part.name, part.index, start_ns, end_ns, part.size_bytes);
            }
            self.free.extend(self.running.pop_front().map(|(timer, _)| timer));
        }
    }
}
