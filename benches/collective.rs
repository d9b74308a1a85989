//! All-reduce between processes, beside the memory floor of the same ranks in the same run.
//!
//! ```text
//! cargo bench --bench collective                       2 and 4 ranks, about a minute
//! cargo bench --bench collective -- floor              the floors alone
//! cargo bench --bench collective -- '2 ranks/f32'      a part, by regular expression
//! ANNULUS_BENCH_RANKS=8 cargo bench --bench collective
//! ```
//! Ranks are processes, as in a job: threads would share page tables and the allocator, which ranks do not. This
//! executable starts itself once per rank; rank 0 runs criterion and tells the others over the control page what to run
//! how often, outside of what is timed. All ranks meet at a barrier before every call, and the time of a call is that of
//! the slowest rank.
//!
//! A rank must read as many bytes as the vector has and write as many, whatever the number of ranks: it reads a shard of
//! every rank and writes a shard of every rank. The floors move the same bytes, on all ranks at once: `copy` from one
//! private buffer to another, `update` in place.
//!
//! The figures of BENCHMARKS.md come from `benches/peers.sh`, which takes turns with other libraries.

use std::process::ExitCode;
use std::time::Duration;

use annulus::collective::{CollectiveOptions, Communicator};
use annulus::device::{Arena, Buffer, Stream};
use annulus::world::launch::{self, LaunchOptions};
use annulus::world::{Environment, Launcher, World, WorldOptions};
use annulus::{Element, ReduceOp, Result};
use criterion::{Criterion, Throughput};
use half::bf16;
use serde::{Deserialize, Serialize};

const SIZES_BYTES: [usize; 5] = [4 << 10, 64 << 10, 1 << 20, 16 << 20, 64 << 20];
const WORLD_SIZES: [u32; 2] = [2, 4];
/// How long the others wait for rank 0, which analyses between its commands.
const PATIENCE: Duration = Duration::from_secs(600);
/// Calls whose times are exchanged at once.
const BATCH: u64 = 1024;

/// What is run over `size_bytes`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Case {
    kind: Kind,
    size_bytes: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum Kind {
    RegisteredF32,
    PrivateF32,
    RegisteredBf16,
    /// The caller rewrites its buffer before every call, outside of what is timed, as a backward pass does.
    RewrittenRegisteredF32,
    RewrittenPrivateF32,
    /// What is timed is the owner's rewriting its buffer, the call, and the owner's reading the result, as in a step: lines that
    /// moved in the call, or only after it, count alike.
    UsedRegisteredF32,
    UsedPrivateF32,
    FloorCopy,
    FloorUpdate,
}

impl Kind {
    const ALL: [Kind; 9] = [
        Kind::RegisteredF32,
        Kind::PrivateF32,
        Kind::RegisteredBf16,
        Kind::RewrittenRegisteredF32,
        Kind::RewrittenPrivateF32,
        Kind::UsedRegisteredF32,
        Kind::UsedPrivateF32,
        Kind::FloorCopy,
        Kind::FloorUpdate,
    ];

    fn name(self) -> &'static str {
        match self {
            Kind::RegisteredF32 => "f32 registered",
            Kind::PrivateF32 => "f32 private",
            Kind::RegisteredBf16 => "bf16 registered",
            Kind::RewrittenRegisteredF32 => "f32 registered rewritten",
            Kind::RewrittenPrivateF32 => "f32 private rewritten",
            Kind::UsedRegisteredF32 => "f32 registered used",
            Kind::UsedPrivateF32 => "f32 private used",
            Kind::FloorCopy => "floor copy",
            Kind::FloorUpdate => "floor update",
        }
    }

    /// The time of one call, from every rank's start and end.
    fn time_ns(self, ranks: impl Iterator<Item = (i64, i64)> + Clone) -> i64 {
        match self {
            // Each is done on its own, one after the other where there are more ranks than cores.
            Kind::FloorCopy | Kind::FloorUpdate => {
                let first = ranks.clone().map(|(start, _)| start).min().unwrap_or(0);
                ranks.map(|(_, end)| end).max().unwrap_or(0) - first
            }
            // Nobody ends before everybody has come.
            _ => ranks.map(|(start, end)| end - start).max().unwrap_or(0),
        }
    }
}

/// The clock that all processes of the machine share.
fn now_ns() -> i64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec * 1_000_000_000 + now.tv_nsec
}

/// What rank 0 tells the others.
#[derive(Debug, Serialize, Deserialize)]
enum Command {
    Run { case: Case, iterations: u64 },
    End,
}

/// The memory of a case.
enum Memory {
    AllReduce(Option<Buffer>),
    Copy(Vec<u64>, Vec<u64>),
    Update(Vec<u64>),
}

impl Memory {
    fn rewrite(&mut self) -> Result<()> {
        if let Memory::AllReduce(Some(buffer)) = self {
            std::hint::black_box(buffer.as_mut_slice::<f32>()?).fill(0.0);
        }
        Ok(())
    }

    fn read(&self) -> Result<()> {
        if let Memory::AllReduce(Some(buffer)) = self {
            let bits = buffer.as_slice::<f32>()?.iter().map(|sum| sum.to_bits());
            std::hint::black_box(bits.fold(0, |all, bits| all | bits));
        }
        Ok(())
    }
}

/// One rank: its communicator and the memory of the case it ran last.
struct Rank {
    world: World,
    communicator: Communicator,
    stream: Stream,
    current: Option<(Case, Memory)>,
}

impl Rank {
    fn join(environment: Environment) -> Result<Rank> {
        let world = World::join(environment, WorldOptions::default())?;
        let communicator = Communicator::new(&world, CollectiveOptions::default())?;
        Ok(Rank { world, communicator, stream: Stream::immediate("bench"), current: None })
    }

    /// Rank 0 says what to do, and everybody does it.
    fn obey(&mut self, command: Option<Command>) -> Result<Option<Duration>> {
        match self.world.broadcast_value(0, command, PATIENCE)? {
            Command::Run { case, iterations } => self.run(case, iterations).map(Some),
            Command::End => Ok(None),
        }
    }

    /// Runs `case`, and adds up the slowest rank's time of every call.
    fn run(&mut self, case: Case, iterations: u64) -> Result<Duration> {
        let mut memory = match self.current.take() {
            Some((current, memory)) if current == case => memory,
            _ => self.prepare(case)?,
        };
        let (mut spans, mut total_ns, mut left) = (Vec::with_capacity(2 * BATCH as usize), 0, iterations);
        let mut everybodys = vec![0; 2 * BATCH as usize * self.world.world_size() as usize];
        while left > 0 {
            let batch = left.min(BATCH) as usize;
            spans.clear();
            for _ in 0..batch {
                if let Kind::RewrittenRegisteredF32 | Kind::RewrittenPrivateF32 = case.kind {
                    memory.rewrite()?;
                }
                self.communicator.barrier_now()?;
                let is_used = matches!(case.kind, Kind::UsedRegisteredF32 | Kind::UsedPrivateF32);
                let start_ns = now_ns();
                if is_used {
                    memory.rewrite()?;
                }
                self.call(&mut memory)?;
                if is_used {
                    memory.read()?;
                }
                spans.extend([start_ns, now_ns()]);
            }
            let everybodys = &mut everybodys[..2 * batch * self.world.world_size() as usize];
            self.communicator.all_gather_slice(&spans, everybodys)?;
            for call in 0..batch {
                let ranks = everybodys.chunks_exact(2 * batch).map(|spans| (spans[2 * call], spans[2 * call + 1]));
                total_ns += case.kind.time_ns(ranks);
            }
            left -= batch as u64;
        }
        self.current = Some((case, memory));
        Ok(Duration::from_nanos(total_ns as u64))
    }

    fn call(&mut self, memory: &mut Memory) -> Result<()> {
        match memory {
            Memory::AllReduce(buffer) => {
                if let Some(taken) = buffer.take() {
                    *buffer = Some(self.communicator.all_reduce(taken, ReduceOp::Sum, &self.stream)?.wait()?);
                }
            }
            Memory::Copy(from, to) => to.copy_from_slice(std::hint::black_box(from)),
            Memory::Update(words) => {
                std::hint::black_box(&mut *words).iter_mut().for_each(|word| *word = word.wrapping_add(1));
            }
        }
        Ok(())
    }

    /// Memory of the case, touched; an all-reduce is checked once, and from then on sums zeroes.
    fn prepare(&mut self, case: Case) -> Result<Memory> {
        self.current = None;
        let words = case.size_bytes / size_of::<u64>();
        Ok(match case.kind {
            Kind::FloorCopy => Memory::Copy(vec![1; words], vec![2; words]),
            Kind::FloorUpdate => Memory::Update(vec![1; words]),
            Kind::RegisteredF32 | Kind::RewrittenRegisteredF32 | Kind::UsedRegisteredF32 => {
                self.checked::<f32>(case.size_bytes, true)?
            }
            Kind::PrivateF32 | Kind::RewrittenPrivateF32 | Kind::UsedPrivateF32 => {
                self.checked::<f32>(case.size_bytes, false)?
            }
            Kind::RegisteredBf16 => self.checked::<bf16>(case.size_bytes, true)?,
        })
    }

    fn checked<T: Element>(&mut self, size_bytes: usize, registered: bool) -> Result<Memory> {
        let len_elems = size_bytes / T::DTYPE.size_bytes();
        let mut buffer = match registered {
            true => Arena::new(&self.world).alloc(T::DTYPE, len_elems)?,
            false => Buffer::zeroed(T::DTYPE, len_elems)?,
        };
        buffer.as_mut_slice()?.fill(T::from_f64(1.0));
        let mut buffer = self.communicator.all_reduce(buffer, ReduceOp::Sum, &self.stream)?.wait()?;
        let expected = T::from_f64(f64::from(self.world.world_size()));
        assert!(buffer.as_slice::<T>()?.iter().all(|sum| *sum == expected), "a wrong sum of {size_bytes} bytes");
        buffer.as_mut_slice()?.fill(T::from_f64(0.0));
        Ok(Memory::AllReduce(Some(buffer)))
    }
}

/// Rank 0: criterion.
fn lead(rank: &mut Rank) -> Result<()> {
    // Short by default: enough to see a change of a tenth. --measurement-time and --sample-size ask for more.
    let mut criterion = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(100))
        .measurement_time(Duration::from_millis(400))
        .configure_from_args();
    let mut failure = None;
    for size_bytes in SIZES_BYTES {
        let mut group = criterion.benchmark_group(format!("{} ranks", rank.world.world_size()));
        group.throughput(Throughput::Bytes(size_bytes as u64));
        for kind in Kind::ALL {
            group.bench_function(format!("{}/{size_bytes}", kind.name()), |bencher| {
                bencher.iter_custom(|iterations| {
                    let command = Command::Run { case: Case { kind, size_bytes }, iterations };
                    match failure.is_none().then(|| rank.obey(Some(command))) {
                        Some(Ok(Some(time))) => time,
                        Some(Err(error)) => {
                            failure = Some(error);
                            Duration::from_nanos(iterations)
                        }
                        Some(Ok(None)) | None => Duration::from_nanos(iterations),
                    }
                });
            });
        }
        group.finish();
    }
    if let Some(error) = failure {
        return Err(error);
    }
    rank.obey(Some(Command::End))?;
    criterion.final_summary();
    Ok(())
}

fn follow(rank: &mut Rank) -> Result<()> {
    while rank.obey(None)?.is_some() {}
    Ok(())
}

/// One of the ranks.
fn bench(environment: Environment) -> Result<()> {
    let mut rank = Rank::join(environment)?;
    if rank.world.rank() == 0 {
        lead(&mut rank)?
    } else {
        follow(&mut rank)?
    }
    let Rank { world, communicator, .. } = rank;
    drop(communicator);
    world.teardown(PATIENCE)
}

/// Starts the ranks of every world, one world after the other.
fn start() -> Result<ExitCode> {
    let told = std::env::var("ANNULUS_BENCH_RANKS").ok();
    let world_sizes = match &told {
        Some(told) => told.split_whitespace().filter_map(|number| number.parse().ok()).collect(),
        None => WORLD_SIZES.to_vec(),
    };
    for world_size in world_sizes {
        let options = LaunchOptions { prefix: false, ..LaunchOptions::default() };
        let outcome = launch::spawn_self(world_size, &options)?;
        if outcome.code != 0 {
            eprintln!("{}", outcome.failure.unwrap_or_default());
            return Ok(ExitCode::FAILURE);
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn main() -> ExitCode {
    let result = Environment::detect().and_then(|environment| match environment.launcher {
        Launcher::Single => start(),
        _ => bench(environment).map(|()| ExitCode::SUCCESS),
    });
    result.unwrap_or_else(|error| {
        eprintln!("{error}");
        ExitCode::FAILURE
    })
}
