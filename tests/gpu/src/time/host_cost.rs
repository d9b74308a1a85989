//! What it costs the processor to enqueue a step, its all-reduces among it.
//!
//! In a world of one: `Communicator` launches the kernel that it launches where every rank has a device of its own, with the
//! same arguments, and the kernel finds that there are no peers. Ranks that share the card would launch one grid together and
//! wait for each other on the host first, which ranks with devices of their own do not.

use std::time::{Duration, Instant};

use annulus::NormType;
use annulus::device::cuda::View;
use annulus::ops::cuda::{GradientNorm, Measure, Skip};
use annulus::world::{Environment, World, WorldOptions};

use super::Spread;
use super::bare::Bare;
use super::model::{gpt2, like_gpt2, tensors};
use super::step::Step;
use super::trainer::Trainer;
use crate::Result;
use crate::part::Scale;
use crate::record::{check, figure, figure_at_most};
use crate::site::{PATIENCE, Site};

/// Of a step's gradients.
pub const BUCKETS: usize = 5;
/// What a step may cost without a graph.
const GOAL_US: f64 = 30.0;
/// What is enqueued between waits: less than a stream takes before a launch blocks, about a thousand.
const PENDING: usize = 600;

/// How much is timed.
#[derive(Clone, Copy)]
struct Extent {
    /// Bursts of calls, each behind a wait.
    bursts: usize,
    /// What a burst enqueues, or one call if that is more.
    pending: usize,
}

/// A step of GPT-2's 148 tensors in 5 buckets: as `Ddp` makes it, as a graph, and by operations.
///
/// # Errors
/// What keeps the device from being used.
pub fn host_cost(scale: Scale) -> Result<()> {
    let site = Site::open()?;
    let (lens, extent) = match scale {
        Scale::Short => (like_gpt2(4, 100, 8), Extent { bursts: 1, pending: 1 }),
        Scale::Quick => (gpt2(), Extent { bursts: 20, pending: PENDING }),
        Scale::Full => (gpt2(), Extent { bursts: 50, pending: PENDING }),
    };
    let what = format!("{} tensors in {BUCKETS} buckets", lens.len());
    if let Err(error) = bare(&site, extent) {
        check("host time of bare calls", Duration::ZERO, |_| Err(error));
    }
    for (name, cost) in [("by operations", by_operations as fn(_, _, _, _) -> _), ("by Ddp", by_ddp)] {
        if let Err(error) = cost(&site, &lens, extent, &what) {
            check(format!("host time of a step {name}"), Duration::ZERO, |_| Err(error));
        }
    }
    latency(&site, extent)
}

/// A world of one rank.
///
/// # Errors
/// Those of [`World::join`].
pub fn alone() -> Result<World> {
    Ok(World::join(Environment::single(), WorldOptions { timeout: PATIENCE, ..WorldOptions::default() })?)
}

/// How a step measures its norm.
pub fn clipped(grad_scale: Option<&View>) -> Measure<'_> {
    Measure { norm_type: NormType::L2, max_norm: 1.0, grad_scale, skip: Skip::Nonfinite }
}

/// What the driver takes for the same calls: what a step costs beyond that is this crate's.
fn bare(site: &Site, extent: Extent) -> Result<()> {
    let mut bare = Bare::new(site)?;
    let spread = per_call(extent, 1, &mut bare, Bare::launch, Bare::settle)?;
    figure("host time of one launch of the smallest kernel", spread.median, "us");
    let spread = per_call(extent, Step::ENQUEUED, &mut bare, Bare::step, Bare::settle)?;
    let what = format!("host time of {} launches of it, with the events of a step by operations", Step::LAUNCHES);
    figure(what, spread.median, "us");
    let spread = per_call(extent, 2, &mut bare, Bare::time, Bare::settle)?;
    figure("host time of the two points of a timer", spread.median, "us");
    Ok(())
}

fn by_operations(site: &Site, lens: &[usize], extent: Extent, what: &str) -> Result<()> {
    let mut step = Step::new(site, alone()?, lens)?;
    let spread = per_call(extent, Step::ENQUEUED, &mut step, Step::enqueue, Step::settle)?;
    let what = format!("host time of a step by operations, {what}: {} launches", Step::LAUNCHES);
    figure_at_most(what, spread.median, "us", GOAL_US);
    let spread = per_call(extent, 1, &mut step, Step::all_reduce, Step::settle)?;
    figure("host time of one all_reduce of them", spread.median, "us");
    Ok(())
}

fn by_ddp(site: &Site, lens: &[usize], extent: Extent, what: &str) -> Result<()> {
    let mut trainer = Trainer::new(site, lens)?;
    let what = format!("host time of a step by Ddp, {what}");
    let spread = per_call(extent, Step::ENQUEUED + 30, &mut trainer, Trainer::step, Trainer::settle)?;
    figure_at_most(&what, spread.median, "us", GOAL_US);
    // A launch for every tensor, and a few for the step.
    let spread = per_call(extent, lens.len() + 50, &mut trainer, Trainer::step_one_by_one, Trainer::settle)?;
    figure(format!("{what}, each gradient handed over alone"), spread.median, "us");
    trainer.capture()?;
    let spread = per_call(extent, 10, &mut trainer, Trainer::replay, Trainer::settle)?;
    figure(what + ", replayed as a graph", spread.median, "us");
    trainer.leave()
}

/// How soon the host knows a small norm.
fn latency(site: &Site, extent: Extent) -> Result<()> {
    let mut norm = GradientNorm::new(&site.kernels, &tensors(site, annulus::DType::F32, &[768])?)?;
    let mut latencies = Vec::new();
    for _ in 0..extent.bursts {
        let start = Instant::now();
        norm.measure(&site.stream, &clipped(None))?.wait(PATIENCE)?;
        latencies.push(start.elapsed().as_secs_f64() * 1e6);
    }
    let what = "from the launch of a norm of one bias to its number on the host";
    figure(what, Spread::of(latencies).median, "us");
    Ok(())
}

/// The host's time for one call, which enqueues about so much, as the median over bursts. Nothing waits but the end of a burst.
fn per_call<S>(
    Extent { bursts, pending }: Extent,
    enqueued: usize,
    on: &mut S,
    call: fn(&mut S) -> Result<()>,
    settle: fn(&mut S) -> Result<()>,
) -> Result<Spread> {
    call(on)?; // what is made at the first use
    settle(on)?;
    let calls = (pending / enqueued).max(1);
    let mut rounds_us = Vec::with_capacity(bursts);
    for _ in 0..bursts {
        let start = Instant::now();
        for _ in 0..calls {
            call(on)?;
        }
        rounds_us.push(start.elapsed().as_secs_f64() * 1e6 / calls as f64);
        settle(on)?;
    }
    Ok(Spread::of(rounds_us))
}
