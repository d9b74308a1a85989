//! Rounds of an operation between two timed events.

use annulus::DType;
use annulus::device::cuda::{Buffer, Timer};

use crate::Result;
use crate::site::{PATIENCE, Site};

/// More than any card's second-level cache holds: what moves less is timed with that cache full of something else.
const FLUSH_BYTES: usize = 256 << 20;
/// Rounds that are not counted: clocks rise, pages are mapped.
const WARM_UP: usize = 3;
/// What is copied to learn the card's bandwidth.
const COPY_BYTES: usize = 1 << 30;

/// Microseconds of a round.
#[derive(Debug, Clone, Copy)]
pub struct Spread {
    /// Median.
    pub median: f64,
    /// Fastest.
    pub least: f64,
    /// Slowest.
    pub most: f64,
}

impl Spread {
    /// Of at least one round.
    pub fn of(mut rounds_us: Vec<f64>) -> Spread {
        rounds_us.sort_by(f64::total_cmp);
        let at = |index: usize| rounds_us.get(index).copied().unwrap_or(f64::NAN);
        Spread { median: at(rounds_us.len() / 2), least: at(0), most: at(rounds_us.len().saturating_sub(1)) }
    }
}

/// Times work on a device.
pub struct Stopwatch<'s> {
    site: &'s Site,
    timers: Vec<Timer>,
    flush: Buffer,
    copy_bytes_per_us: f64,
}

impl<'s> Stopwatch<'s> {
    /// Learns how fast the card copies; every operation is timed over so many `rounds`.
    ///
    /// # Errors
    /// Too little memory; what the driver says.
    pub fn new(site: &'s Site, rounds: usize) -> Result<Stopwatch<'s>> {
        let timers = (0..rounds.max(1)).map(|_| Timer::new(&site.device)).collect::<annulus::Result<_>>()?;
        let flush = Buffer::zeroed(&site.device, DType::U8, FLUSH_BYTES)?;
        let mut stopwatch = Stopwatch { site, timers, flush, copy_bytes_per_us: f64::NAN };
        let (free_bytes, _) = site.device.memory_bytes()?;
        let len_bytes = COPY_BYTES.min(usize::try_from(free_bytes / 4)?);
        let [from, to] = [0, 1].map(|_| Buffer::zeroed(&site.device, DType::U8, len_bytes));
        let (from, to) = (from?.view(), to?.view());
        let bytes = 2 * len_bytes as u64;
        let spread = stopwatch.time(bytes, || Ok(to.copy_from(&from, &site.stream)?))?;
        stopwatch.copy_bytes_per_us = bytes as f64 / spread.median;
        Ok(stopwatch)
    }

    /// How often [`time`](Stopwatch::time) calls its work when it is made for so many `rounds`.
    pub fn calls(rounds: usize) -> usize {
        WARM_UP + rounds.max(1)
    }

    /// Bandwidth of a copy within the device.
    pub fn copy_gb_s(&self) -> f64 {
        self.copy_bytes_per_us / 1e3
    }

    /// Time in which a copy moves as many bytes, read and written ones together.
    pub fn limit_us(&self, bytes: u64) -> f64 {
        bytes as f64 / self.copy_bytes_per_us
    }

    /// Times `work`, which enqueues on the site's stream.
    ///
    /// # Errors
    /// What the work says; what the device failed with.
    pub fn time(&self, bytes: u64, mut work: impl FnMut() -> Result<()>) -> Result<Spread> {
        for _ in 0..WARM_UP {
            work()?;
        }
        for timer in &self.timers {
            self.flush(bytes)?;
            timer.start(&self.site.stream)?;
            work()?;
            timer.stop(&self.site.stream)?;
        }
        let rounds_us = self.timers.iter().map(|timer| Ok(timer.elapsed(PATIENCE)?.as_secs_f64() * 1e6));
        Ok(Spread::of(rounds_us.collect::<Result<_>>()?))
    }

    fn flush(&self, bytes: u64) -> Result<()> {
        if bytes < 2 * FLUSH_BYTES as u64 {
            self.flush.view().zero(&self.site.stream)?;
        }
        Ok(())
    }
}
