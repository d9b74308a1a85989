//! Ranks as threads of this process, all on device 0: one cooperative grid.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Barrier;
use std::time::{Duration, Instant};

use annulus::collective::cuda::{Communicator, Options, Way};
use annulus::device::cuda::Buffer;
use annulus::schedule::{Algorithm, Collective};
use annulus::world::launch;
use annulus::{DType, Error, ReduceOp};
use half::bf16;

use super::operations::{every_dtype, every_operation, reduced};
use super::ranks::{PATIENCE, Rank, inputs};
use super::{communicator, links};
use crate::Result;
use crate::part::Scale;
use crate::record::{Goal, Record, Timing, check, figure, say};
use crate::site::Site;
use crate::time::{Spread, Stopwatch};

/// Of a comparison, after which no longer vectors are tried.
const LIMIT: Duration = Duration::from_secs(6);
const ALGORITHMS: [Algorithm; 2] = [Algorithm::Direct, Algorithm::Ring];

/// Runs `body` on so many ranks; a comparison that fails ends the rank that makes it, and so the job.
fn on_ranks(world_size: u32, body: impl Fn(&Rank) + Sync) -> Result<()> {
    let job = || launch::threads(world_size, |environment| body(&Rank::on(0, environment)));
    match catch_unwind(AssertUnwindSafe(job)) {
        Ok(outcome) => Ok(outcome.map(drop)?),
        Err(panic) => {
            let words = panic.downcast_ref::<String>().cloned();
            let words = words.or_else(|| panic.downcast_ref::<&str>().map(|words| (*words).to_owned()));
            Err(words.unwrap_or_else(|| "a rank ended before its time".to_owned()).into())
        }
    }
}

/// Compares every operation with the reference, in worlds of several sizes; then goes wrong.
///
/// # Errors
/// None: what fails is said.
pub fn run(scale: Scale) -> Result<()> {
    let worlds: &[u32] = if scale == Scale::Short { &[2, 3] } else { &[1, 2, 3, 4, 8] };
    for world_size in worlds {
        for algorithm in ALGORITHMS {
            check(format!("collectives of {world_size} ranks in one grid, {algorithm:?}"), LIMIT, |tally| {
                for len_elems in lengths(scale) {
                    if !tally.has_time() {
                        break;
                    }
                    on_ranks(*world_size, |rank| compare(rank, algorithm, *len_elems, scale))?;
                    tally.agreed();
                }
                Ok(())
            });
        }
    }
    check("links as a trial finds them: silent, sound, corrupt", PATIENCE, links::compare);
    check("long vectors of ranks in one grid", PATIENCE, |tally| {
        on_ranks(2, |rank| long(rank, if scale == Scale::Short { 40_003 } else { 5_000_011 }))?;
        tally.agreed();
        Ok(())
    });
    check("a rank that does not come is named, and the device still works", PATIENCE, |tally| {
        absent()?;
        tally.agreed();
        Ok(())
    });
    Ok(())
}

fn lengths(scale: Scale) -> &'static [usize] {
    match scale {
        Scale::Short => &[35],
        Scale::Quick => &[0, 1, 259],
        Scale::Full => &[0, 1, 259, 4_099],
    }
}

fn compare(rank: &Rank, algorithm: Algorithm, len_elems: usize, scale: Scale) {
    let options = Options { algorithm: Some(algorithm), ..Options::default() };
    if scale != Scale::Short || rank.world.world_size() == 2 && algorithm == Algorithm::Direct {
        return every_dtype(rank, &options, len_elems);
    }
    let mut communicator = communicator(rank, algorithm, Way::Cooperative).unwrap();
    every_operation::<f32>(rank, &mut communicator, algorithm, len_elems);
    every_operation::<bf16>(rank, &mut communicator, algorithm, len_elems);
}

/// Several channels and rounds.
fn long(rank: &Rank, len_elems: usize) {
    for algorithm in ALGORITHMS {
        let mut communicator = communicator(rank, algorithm, Way::Cooperative).unwrap();
        let terms = inputs::<f32>(2, len_elems);
        let buffer = rank.framed(&terms[rank.number()], 0);
        communicator.all_reduce(&buffer.view, ReduceOp::Sum, &rank.stream).unwrap();
        let expected = reduced(&terms, ReduceOp::Sum, algorithm, Collective::AllReduce);
        buffer.check(rank, &expected, &format!("{len_elems} elements by {algorithm:?}"));
    }
}

fn absent() -> Result<()> {
    let seen = Barrier::new(2);
    on_ranks(2, |rank| {
        let options = Options { timeout: Some(Duration::from_millis(500)), ..Options::default() };
        let mut communicator = Communicator::new(&rank.world, &rank.kernels, options).unwrap();
        if rank.number() == 0 {
            let error = communicator.barrier(&rank.stream).unwrap_err();
            assert!(matches!(error, Error::PeerStalled { rank: 1, sequence: 1, .. }), "{error}");
        }
        seen.wait();
        assert!(matches!(communicator.barrier(&rank.stream), Err(Error::Poisoned { .. })));
        rank.framed(&[1.0f32; 10], 0).check(rank, &[1.0f32; 10], "a buffer of a device whose operation failed");
    })
}

// ---- durations ---------------------------------------------------------------------------------------------------------

/// Times all-reduces of 4 ranks that share the device.
///
/// # Errors
/// What keeps the device from being used.
pub fn time(scale: Scale) -> Result<()> {
    const WORLD_SIZE: u32 = 4;
    let (large_bytes, rounds) = match scale {
        Scale::Short => (64 << 10, 1),
        Scale::Quick => (256 << 20, 7),
        Scale::Full => (256 << 20, 21),
    };
    for (len_bytes, is_large) in [(large_bytes, true), (8 << 10, false)] {
        for algorithm in ALGORITHMS {
            let timed = on_ranks(WORLD_SIZE, |rank| time_one(rank, algorithm, (len_bytes, is_large), rounds).unwrap());
            if let Err(error) = timed {
                check(format!("timing all-reduces by {algorithm:?}"), PATIENCE, |_| Err(error));
            }
        }
    }
    Ok(())
}

/// Rank 0 has the stopwatch; the others do as often what it times.
fn time_one(rank: &Rank, algorithm: Algorithm, (len_bytes, is_large): (usize, bool), rounds: usize) -> Result<()> {
    let mut communicator = communicator(rank, algorithm, Way::Cooperative)?;
    let buffer = Buffer::zeroed(rank.kernels.device(), DType::F32, len_bytes / 4)?;
    let view = buffer.view();
    let seen_by_host = if is_large { 0 } else { rounds };
    if rank.number() > 0 {
        for _ in 0..Stopwatch::calls(rounds) + seen_by_host {
            communicator.all_reduce(&view, ReduceOp::Sum, &rank.stream)?;
        }
        return Ok(communicator.synchronize(PATIENCE)?);
    }
    let (kernels, stream) = (rank.kernels.clone(), rank.stream.clone());
    let site = Site { device: kernels.device().clone(), kernels, stream };
    let stopwatch = Stopwatch::new(&site, rounds)?;
    let ranks = u64::from(rank.world.world_size());
    // Every rank reads its vector and writes it. What travels between them stays in the device's cache where it is large
    // enough; that is the floor.
    let bytes = 2 * ranks * len_bytes as u64;
    let Spread { median, least, most } =
        stopwatch.time(bytes, || Ok(communicator.all_reduce(&view, ReduceOp::Sum, &site.stream)?))?;
    communicator.synchronize(PATIENCE)?;
    let what = format!("all_reduce of {ranks} ranks in one grid, {} KiB each, {algorithm:?}", len_bytes >> 10);
    if is_large {
        let (what, limit_us) = (what, stopwatch.limit_us(bytes));
        let goal = Goal { share: Some(0.8), ..Goal::default() }; // 1.25 times the floor
        say(&Record::Timing(Timing { what, bytes, us: median, range_us: [least, most], limit_us, goal }));
        return Ok(());
    }
    figure(format!("{what}, from the stream's turn to its end"), median, "us");
    let mut rounds_us = Vec::with_capacity(seen_by_host);
    for _ in 0..seen_by_host {
        // The others have come by then, so that this rank launches.
        std::thread::sleep(Duration::from_millis(1));
        let start = Instant::now();
        communicator.all_reduce(&view, ReduceOp::Sum, &site.stream)?;
        communicator.synchronize(PATIENCE)?;
        rounds_us.push(start.elapsed().as_secs_f64() * 1e6);
    }
    figure(format!("{what}, from its launch until the host has seen its end"), Spread::of(rounds_us).median, "us");
    Ok(())
}
