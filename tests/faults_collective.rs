//! Collectives when things go wrong: ranks that die, stop or do not come inside an operation, and ranks that call
//! different things (P1-P6). Ranks are processes, but for the mismatches.
//!
//! `ANNULUS_FAULTS=long` runs the whole matrix and asserts the promised figures, on a machine of one's own.
#![cfg(not(loom))]

mod ranks;

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use annulus::collective::{CollectiveOptions, Communicator};
use annulus::device::{Arena, Buffer, Stream};
use annulus::world::{Environment, World, WorldOptions, launch};
use annulus::{DType, Error, ReduceOp, Result};
use ranks::{PATIENCE, Process, long, say, torch_rank};
use rustix::process::Signal;

#[test]
fn role() {
    ranks::play(&[("collectives", collectives), ("absent", absent), ("sums", sums)]);
}

// ---- roles -------------------------------------------------------------------------------------------------------------

fn setting<T: std::str::FromStr>(name: &str, default: T) -> T {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

fn join(timeout: Duration) -> (World, Communicator, Stream) {
    let options = WorldOptions { timeout, warn_after: timeout / 4, ..ranks::options() };
    let world = World::join(Environment::detect().unwrap(), options).unwrap();
    let communicator = Communicator::new(&world, CollectiveOptions::default()).unwrap();
    (world, communicator, Stream::new("communication").unwrap())
}

/// One kind of operation, again and again on the same memory, so that the time goes into the operation.
struct Operation<'a> {
    kind: &'a str,
    src: Option<Buffer>,
    dst: Option<Buffer>,
    slice: Vec<f32>,
}

impl<'a> Operation<'a> {
    fn new(kind: &'a str, len_bytes: usize, world: &World) -> Result<Operation<'a>> {
        let (arena, len_elems) = (Arena::new(world), len_bytes / 4);
        let shards = |count: usize| arena.alloc(DType::F32, len_elems * count).map(Some);
        let all = world.world_size() as usize;
        let (src, dst) = match kind {
            "all_reduce" | "broadcast" => (shards(1)?, None),
            "all_reduce private" => (Some(Buffer::zeroed(DType::F32, len_elems)?), None),
            "reduce_scatter" => (shards(all)?, shards(1)?),
            "all_gather" => (shards(1)?, shards(all)?),
            _ => (None, None),
        };
        Ok(Operation { kind, src, dst, slice: vec![0.0; if kind == "all_reduce slice" { len_elems } else { 0 }] })
    }

    fn run(&mut self, communicator: &mut Communicator, stream: &Stream) -> Result<()> {
        // A failed operation keeps its buffers; then there is one element.
        let take = |buffer: &mut Option<Buffer>| buffer.take().map_or_else(|| Buffer::zeroed(DType::F32, 1), Ok);
        match self.kind {
            "all_reduce" => {
                self.src = Some(communicator.all_reduce(take(&mut self.src)?, ReduceOp::Sum, stream)?.wait()?);
            }
            "all_reduce private" => {
                self.src = Some(communicator.all_reduce(take(&mut self.src)?, ReduceOp::Avg, stream)?.wait()?);
            }
            "all_reduce slice" => communicator.all_reduce_slice(&mut self.slice, ReduceOp::Max)?,
            "broadcast" => self.src = Some(communicator.broadcast(take(&mut self.src)?, 0, stream)?.wait()?),
            "barrier" => communicator.barrier(stream)?.wait()?,
            pair => {
                let (src, dst) = (take(&mut self.src)?, take(&mut self.dst)?);
                let work = match pair {
                    "reduce_scatter" => communicator.reduce_scatter(src, dst, ReduceOp::Sum, stream)?,
                    "all_gather" => communicator.all_gather(src, dst, stream)?,
                    other => panic!("no operation {other:?}"),
                };
                let (src, dst) = work.wait()?;
                (self.src, self.dst) = (Some(src), Some(dst));
            }
        }
        Ok(())
    }
}

const KINDS: [&str; 7] =
    ["all_reduce", "all_reduce private", "all_reduce slice", "reduce_scatter", "all_gather", "broadcast", "barrier"];

/// Operations without end; tells how they ended, and that nothing works any more.
fn collectives() {
    let (world, mut communicator, stream) = join(PATIENCE);
    let (kind, len_bytes) = (std::env::var("TEST_KIND").unwrap(), setting("TEST_BYTES", 4));
    let mut operation = Operation::new(&kind, len_bytes, &world).unwrap();
    operation.run(&mut communicator, &stream).unwrap();
    say(format!("running rank {}", world.rank()));
    let error = loop {
        if let Err(error) = operation.run(&mut communicator, &stream) {
            break error;
        }
    };
    say(format!("error {error:?}"));
    let (mut next, mut medians, mut processor) = (None, Vec::new(), Duration::ZERO);
    for kind in KINDS {
        let (mut times, mut processor_times): (Vec<Duration>, Vec<Duration>) = (0..5)
            .map(|_| {
                let mut operation = Operation::new(kind, 4, &world).unwrap();
                let (start, processor_start) = (Instant::now(), processor_time());
                let result = operation.run(&mut communicator, &stream);
                let (time, processor_time) = (start.elapsed(), processor_time() - processor_start);
                assert!(matches!(result, Err(Error::Poisoned { .. })), "{kind}: {result:?}");
                next.get_or_insert(time);
                (time, processor_time)
            })
            .unzip();
        medians.push(median(&mut times));
        // But one: interrupts, as when the dead rank's memory is unmapped, count as the time of whom they interrupt.
        processor_times.sort_unstable();
        processor = processor.max(processor_times[3]);
    }
    assert!(
        communicator.split(Some(0), 0).is_err() && Communicator::new(&world, CollectiveOptions::default()).is_err()
    );
    assert!(world.barrier("after", PATIENCE).is_err());
    let us = [next, medians.into_iter().max(), Some(processor)].map(|time| time.unwrap().as_micros().to_string());
    say(format!("poisoned: {}", us.join(" ")));
}

/// Time that this thread had a processor.
fn processor_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

fn median(times: &mut [Duration]) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

/// The last rank sleeps instead of reducing.
fn absent() {
    let (world, mut communicator, stream) = join(Duration::from_millis(2_500));
    communicator.barrier(&stream).unwrap().wait().unwrap();
    say("running");
    if world.rank() == world.world_size() - 1 {
        while world.fault().is_none() {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    let kind = std::env::var("TEST_KIND").unwrap();
    let error = Operation::new(&kind, 4096, &world).unwrap().run(&mut communicator, &stream).unwrap_err();
    say(format!("error {error:?}"));
}

/// Sums that are checked, for a while.
fn sums() {
    let (world, mut communicator, _) = join(PATIENCE);
    say("running");
    let end = Instant::now() + Duration::from_millis(setting("TEST_MS", 1_000));
    let expected: f32 = (1..=world.world_size()).map(|rank| rank as f32).sum();
    let mut steps = 0;
    loop {
        // All ranks stop after the same step.
        let mut more = [i32::from(Instant::now() < end)];
        communicator.all_reduce_slice(&mut more, ReduceOp::Min).unwrap();
        if more[0] == 0 {
            break;
        }
        let mut slice = vec![world.rank() as f32 + 1.0; 30_000];
        communicator.all_reduce_slice(&mut slice, ReduceOp::Sum).unwrap();
        assert!(slice.iter().all(|sum| *sum == expected));
        steps += 1;
    }
    say(format!("done after {steps} steps"));
    drop(communicator);
    world.teardown(PATIENCE).unwrap();
}

// ---- starting them -----------------------------------------------------------------------------------------------------

/// Every test here loads both cores: one at a time.
fn alone() -> MutexGuard<'static, ()> {
    static MACHINE: Mutex<()> = Mutex::new(());
    MACHINE.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

struct Harm {
    world_size: u32,
    victim: u32,
    kind: &'static str,
    len_bytes: usize,
    delay: Duration,
    signal: Signal,
}

/// What a rank tells of another's end.
struct Told {
    after: Duration,
    error: String,
    /// Time of the call that came next.
    next: Duration,
}

/// Time in which a call of a communicator that has failed fails.
fn poisoned_limit() -> Duration {
    Duration::from_millis(if long() { 1 } else { 5_000 })
}

/// Starts endless operations, harms one rank, and returns what the others said.
fn harmed(harm: &Harm) -> Vec<Told> {
    let tmpdir = tempfile::tempdir().unwrap();
    let start = |rank| {
        let mut command = torch_rank("collectives", tmpdir.path(), rank, harm.world_size);
        command.env("TEST_KIND", harm.kind).env("TEST_BYTES", harm.len_bytes.to_string());
        Process::start(command)
    };
    let mut processes: Vec<Process> = (0..harm.world_size).map(start).collect();
    processes.iter_mut().for_each(|process| drop(process.expect(">> running")));
    std::thread::sleep(harm.delay);
    let since = Instant::now();
    processes[harm.victim as usize].signal(harm.signal);
    let mut told = Vec::new();
    for (_, process) in processes.iter_mut().enumerate().filter(|(rank, _)| *rank != harm.victim as usize) {
        let (when, error) = process.expect(">> error");
        let (_, poisoned) = process.expect(">> poisoned");
        let us: Vec<u64> = poisoned.split_whitespace().skip(2).map(|us| us.parse().unwrap()).collect();
        let [next, slowest, processor] = [us[0], us[1], us[2]].map(Duration::from_micros);
        // All ranks wake at once, more of them than there may be processors, so a call may be interrupted for longer than
        // it may take: of every kind of call it is the median, and of all but one of each kind what they compute.
        let limit = poisoned_limit();
        assert!(
            slowest <= limit && processor <= limit,
            "a call took {slowest:?}, or computed for {processor:?}, to fail"
        );
        told.push(Told { after: when.saturating_duration_since(since), error, next });
    }
    told
}

/// Harms, and checks what is said.
fn check(harm: &Harm, expected: &str) -> Vec<Told> {
    let told = harmed(harm);
    assert_eq!(told.len() as u32, harm.world_size - 1);
    let op = harm.kind.split(' ').next().unwrap();
    let Harm { world_size, victim, kind, len_bytes, .. } = harm;
    for Told { error, .. } in &told {
        let what = format!("{kind} of {len_bytes} B on {world_size} ranks, rank {victim} harmed: {error}");
        assert!(error.contains(&format!("{expected} {{ rank: {victim},")), "{what}");
        // A rank that was between two operations is told when it issues the next.
        assert!(error.contains(op) || error.contains("Poisoned"), "{what}");
    }
    told
}

fn percentile_99(times: &mut [Duration]) -> Duration {
    times.sort_unstable();
    times[(times.len() * 99 / 100).min(times.len() - 1)]
}

/// Gloo's matrix (gloo/test/transport_test.cc): ranks x bytes x delay x operation.
fn matrix(signal: Signal) -> impl Iterator<Item = Harm> {
    const BYTES: [usize; 3] = [4, 4 << 10, 64 << 20];
    let repeats = if long() { 100 } else { 1 };
    let delays: &'static [u64] = if long() { &[0, 5, 50] } else { &[5] };
    // The short form takes every size and every number of ranks once, with operations in turn.
    let mut turn = 0;
    (0..repeats)
        .flat_map(move |_| [2, 3, 4].into_iter().flat_map(move |n| BYTES.into_iter().map(move |bytes| (n, bytes))))
        .flat_map(move |cell| delays.iter().map(move |delay| (cell, *delay)))
        .map(move |((world_size, len_bytes), delay)| {
            turn += 1;
            // A gather of 64 MiB from each of four ranks is 1.25 GiB a rank: too much for a small machine.
            let kind = match KINDS[turn % KINDS.len()] {
                "reduce_scatter" | "all_gather" if len_bytes > 1 << 20 => "all_reduce",
                kind => kind,
            };
            let victim = turn as u32 % world_size;
            Harm { world_size, victim, kind, len_bytes, delay: Duration::from_millis(delay), signal }
        })
}

fn run_matrix(signal: Signal, expected: &str, loose: Duration, figure: Duration) {
    let _alone = alone();
    let (mut times, mut nexts) = (Vec::new(), Vec::new());
    for harm in matrix(signal) {
        let told = check(&harm, expected);
        let after: Vec<Duration> = told.iter().map(|told| told.after).collect();
        let what = format!("{} of {} B on {} ranks: {after:?}", harm.kind, harm.len_bytes, harm.world_size);
        if after.iter().any(|after| *after > figure) {
            println!("{what}");
        }
        assert!(after.iter().all(|after| *after <= loose), "{what}");
        times.extend(after);
        nexts.extend(told.iter().map(|told| told.next));
    }
    let (p99, next) = (percentile_99(&mut times), median(&mut nexts));
    println!(
        "{expected}: {} reports, p99 {p99:?}, most {:?}; the next call {next:?}",
        times.len(),
        times.last().unwrap()
    );
    assert!(!long() || p99 <= figure, "p99 {p99:?}, promised {figure:?}");
    // The very next call has one try in every run; that of most runs was not interrupted.
    assert!(next <= poisoned_limit(), "the next call took {next:?} to fail");
}

// ---- tests -------------------------------------------------------------------------------------------------------------

#[test]
fn p01_p05_a_rank_killed_in_an_operation_is_lost_and_nothing_works_any_more() {
    run_matrix(Signal::KILL, "PeerLost", Duration::from_secs(3), Duration::from_millis(50));
}

#[test]
fn p02_a_rank_stopped_in_an_operation_is_reported() {
    run_matrix(Signal::STOP, "PeerStopped", Duration::from_secs(5), Duration::from_millis(700));
}

#[test]
fn p03_a_job_that_is_stopped_whole_goes_on_with_the_right_sums() {
    let _alone = alone();
    let pause = if long() { 5_000 } else { 1_200 };
    let tmpdir = tempfile::tempdir().unwrap();
    let start = |rank| {
        let mut command = torch_rank("sums", tmpdir.path(), rank, 3);
        command.env("TEST_MS", (pause + 800).to_string());
        Process::start(command)
    };
    let mut processes: Vec<Process> = (0..3).map(start).collect();
    processes.iter_mut().for_each(|process| drop(process.expect(">> running")));
    std::thread::sleep(Duration::from_millis(50));
    for signal in [Signal::STOP, Signal::CONT] {
        processes.iter().for_each(|process| process.signal(signal));
        std::thread::sleep(Duration::from_millis(pause));
    }
    for mut process in processes {
        process.expect(">> done");
        assert_eq!(process.finish().0, 0);
    }
}

#[test]
fn p04_a_rank_that_does_not_come_is_named_with_the_operation() {
    let _alone = alone();
    for kind in ["all_reduce", "all_reduce slice", "barrier"] {
        let tmpdir = tempfile::tempdir().unwrap();
        let start = |rank| {
            let mut command = torch_rank("absent", tmpdir.path(), rank, 3);
            command.env("TEST_KIND", kind);
            Process::start(command)
        };
        let mut processes: Vec<Process> = (0..3).map(start).collect();
        for process in &mut processes {
            // The absent rank, too, is told that it was missed.
            let (_, error) = process.expect(">> error");
            assert!(error.contains("PeerStalled { rank: 2,"), "{kind}: {error}");
            assert!(error.contains(kind.split(' ').next().unwrap()), "{kind}: {error}");
        }
    }
}

/// One call of the slice forms, with what it is made of.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Call {
    kind: u8,
    dtype: u8,
    len_elems: usize,
    op: u8,
    root: u32,
}

const OPS: [ReduceOp; 6] =
    [ReduceOp::Sum, ReduceOp::Avg, ReduceOp::Min, ReduceOp::Max, ReduceOp::PremulSum(0.5), ReduceOp::PremulSum(0.25)];

impl Call {
    fn random(random: &mut impl FnMut(u64) -> u64) -> Call {
        let lengths = [1, 2, 3, 64, 1_000, 40_000];
        let mut call = Call {
            kind: random(4) as u8,
            dtype: random(2) as u8,
            len_elems: lengths[random(lengths.len() as u64) as usize],
            op: random(OPS.len() as u64) as u8,
            root: random(2) as u32,
        };
        // What an operation does not look at is no difference.
        if call.kind >= 2 {
            call.op = 0;
        }
        if call.kind != 3 {
            call.root = 0;
        }
        call
    }

    /// Runs it on `pattern` and returns whether any byte of the caller's has changed.
    fn run(self, communicator: &mut Communicator) -> (Result<()>, bool) {
        match self.dtype {
            0 => self.run_typed::<f32>(communicator, |index| index as f32 + 0.5),
            _ => self.run_typed::<f64>(communicator, |index| index as f64 + 0.5),
        }
    }

    fn run_typed<T: annulus::Element>(self, communicator: &mut Communicator, of: fn(usize) -> T) -> (Result<()>, bool) {
        let world_size = communicator.world_size() as usize;
        let pattern = |len: usize| (0..len).map(of).collect::<Vec<T>>();
        let (mut one, mut all) = (pattern(self.len_elems), pattern(self.len_elems * world_size));
        let result = match self.kind {
            0 => communicator.all_reduce_slice(&mut one, OPS[self.op as usize]),
            1 => communicator.reduce_scatter_slice(&all, &mut one, OPS[self.op as usize]),
            2 => communicator.all_gather_slice(&one, &mut all),
            _ => communicator.broadcast_slice(&mut one, self.root),
        };
        (result, one != pattern(self.len_elems) || all != pattern(self.len_elems * world_size))
    }
}

/// Ranks that call different things: an error on every rank, that names both calls, before any byte moves.
#[test]
fn p06_mismatches_are_errors_on_every_rank_and_touch_nothing() {
    let _alone = alone();
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = move |below: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % below
    };
    let mut times = Vec::new();
    for round in 0..if long() { 2_000 } else { 60 } {
        let world_size = 2 + random(3) as u32;
        let odd_one = random(u64::from(world_size)) as u32;
        let most = Call::random(&mut random);
        let odd = loop {
            let odd = Call::random(&mut random);
            if odd != most {
                break odd;
            }
        };
        let (ready, ended) = (AtomicU32::new(0), AtomicU32::new(0));
        let results = launch::threads(world_size, |environment| {
            let world = World::join(environment, WorldOptions { timeout: PATIENCE, ..ranks::options() }).unwrap();
            let mut communicator = Communicator::new(&world, CollectiveOptions::default()).unwrap();
            // Agreement first: a mismatch is found wherever it comes.
            let mut warm = [1.0_f32; 3];
            communicator.all_reduce_slice(&mut warm, ReduceOp::Sum).unwrap();
            ready.fetch_add(1, Ordering::SeqCst);
            let arrived = Instant::now();
            let (result, changed) = if world.rank() == odd_one { odd } else { most }.run(&mut communicator);
            let told = Instant::now();
            let again = communicator.all_reduce_slice(&mut warm, ReduceOp::Sum);
            // Nobody leaves before everybody has seen it: a rank that left would be another error.
            ended.fetch_add(1, Ordering::SeqCst);
            let start = Instant::now();
            while ended.load(Ordering::SeqCst) < world_size && start.elapsed() < PATIENCE {
                std::thread::yield_now();
            }
            (result, changed, again, (arrived, told))
        })
        .unwrap();
        let last_arrived = results.iter().map(|(.., (arrived, _))| *arrived).max().unwrap();
        for (rank, (result, changed, again, (_, told))) in results.into_iter().enumerate() {
            times.push(told.saturating_duration_since(last_arrived));
            let what = format!("round {round}, rank {rank} of {world_size}: {odd:?} on {odd_one}, else {most:?}");
            // A rank that comes when the others have found out already is told why it cannot go on.
            let result = match result {
                Err(Error::Poisoned { cause }) => Err(*cause),
                result => result,
            };
            let Err(Error::Mismatch { mine, theirs, rank: teller, peer, .. }) = &result else {
                panic!("{what}: {result:?}");
            };
            assert!(mine != theirs && teller != peer, "{what}: {mine} / {theirs}");
            assert!([*teller, *peer].contains(&odd_one), "{what}: {result:?}");
            assert!(!changed, "{what}: bytes have changed");
            assert!(matches!(again, Err(Error::Poisoned { .. })), "{what}: {again:?}");
        }
    }
    let (p99, figure) = (percentile_99(&mut times), Duration::from_millis(5));
    println!("Mismatch: {} reports after the last arrival, p99 {p99:?}, most {:?}", times.len(), times.last().unwrap());
    assert!(!long() || p99 <= figure, "p99 {p99:?}, promised {figure:?}");
}

/// The same for registered buffers, which peers could reach: their memory is looked at in the arena itself.
#[test]
fn p06_registered_buffers_are_not_touched_by_a_mismatch() {
    let _alone = alone();
    const LEN_ELEMS: usize = 100_000;
    let ended = AtomicU32::new(0);
    let results = launch::threads(3, |environment| {
        let world = World::join(environment, WorldOptions { timeout: PATIENCE, ..ranks::options() }).unwrap();
        let mut communicator = Communicator::new(&world, CollectiveOptions::default()).unwrap();
        let stream = Stream::new("communication").unwrap();
        let mut buffer = Arena::new(&world).alloc(DType::F32, LEN_ELEMS).unwrap();
        buffer.as_mut_slice::<f32>().unwrap().fill(world.rank() as f32 + 1.0);
        let at = buffer.as_slice::<f32>().unwrap().as_ptr();
        let op = if world.rank() == 1 { ReduceOp::Max } else { ReduceOp::Sum };
        let result = communicator.all_reduce(buffer, op, &stream).and_then(|work| work.wait()).map(drop);
        ended.fetch_add(1, Ordering::SeqCst);
        let start = Instant::now();
        while ended.load(Ordering::SeqCst) < 3 && start.elapsed() < PATIENCE {
            std::thread::yield_now();
        }
        // After the failed operation the range reads as it was or, given back, as zeroes.
        let unchanged = (0..LEN_ELEMS).all(|index| {
            // SAFETY: the arena's mapping lives as long as the world, and every rank has ended its operation, so nobody
            // writes there.
            let value = unsafe { at.add(index).read_volatile() };
            value == world.rank() as f32 + 1.0 || value == 0.0
        });
        (result, unchanged)
    })
    .unwrap();
    for (result, unchanged) in results {
        let result = match result {
            Err(Error::Poisoned { cause }) => Err(*cause),
            result => result,
        };
        let Err(Error::Mismatch { mine, theirs, .. }) = &result else { panic!("{result:?}") };
        assert!(mine.contains("sum") != theirs.contains("sum"), "{mine} / {theirs}");
        assert!(unchanged);
    }
}
