//! The command line of `annulus bench`.

use std::path::PathBuf;

use annulus::collective::Partials;
use annulus::schedule::Algorithm;
use annulus::world::MAX_RANKS;
use annulus::{DType, Error, ReduceOp, Result};
use clap::ValueEnum;
use clap::builder::{PossibleValuesParser, TypedValueParser};

const EXAMPLES: &str = "\
Examples:
  annulus bench
      2 ranks of its own, f32 sums from 4 KiB to 64 MiB
  annulus bench --ranks 4 -b 1M -e 256M --dtype bf16
  annulus bench --op reduce_scatter --memory private --json target/bench.json
  annulus launch -n 4 -- annulus bench -n 100 -w 20
      the ranks of a launcher; torchrun, srun and mpirun do as well";

/// Lines of at most 80 columns: clap breaks longer ones where it likes.
const READING: &str = "\
How to read the table:
  size     bytes of the whole vector: what a rank holds before a reduction or
           after a gather
  count    elements of the argument: the whole vector, or a rank's shard of it
           (reduce_scatter, all_gather)
  time     of every call the slowest rank's time, and of those the median; all
           ranks meet at a barrier before every call
  algbw    size / time: what a caller gets
  busbw    algbw times the share of the vector that every rank must send. So
           figures of different operations and numbers of ranks compare, with
           one another and with the speed of the link:
             all_reduce                   2(N-1)/N
             reduce_scatter, all_gather    (N-1)/N
             broadcast                     1
           One rank sends nothing: 0. Between ranks of one machine the link is
           memory; `cargo bench --bench collective -- floor` measures it.
  #wrong   elements of all ranks that are not exactly the right ones, and damaged
           guard bytes. Inputs have so few bits that every order of summation is
           exact, so the tolerance is zero.
  N/A      the library has no such form: a broadcast is in place; slices are
           reduced in place, and scattered and gathered out of place

Exit code: 0; 1 if anything was wrong or failed at run time; 2 for usage and
environment errors.";

/// Measure and verify collectives, with the table of nccl-tests.
///
/// Under a launcher (annulus launch, torchrun, srun, mpirun) it joins as one of the ranks; else it runs itself as --ranks
/// processes. Every size is verified before and after it is timed.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES, after_long_help = format!("{READING}\n\n{EXAMPLES}"))]
pub(crate) struct Arguments {
    /// Ranks to start, 1 to 64; under a launcher the launcher decides. [default: 2]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_RANKS)))]
    pub(super) ranks: Option<u32>,
    /// Smallest size: bytes, or with K, M or G (powers of 1024).
    #[arg(short = 'b', long, value_name = "SIZE", default_value = "4K", value_parser = size_bytes)]
    pub(super) min_bytes: usize,
    /// Largest size.
    #[arg(short = 'e', long, value_name = "SIZE", default_value = "64M", value_parser = size_bytes)]
    pub(super) max_bytes: usize,
    /// From one size to the next.
    #[arg(short = 'f', long, value_name = "FACTOR", default_value_t = 4, value_parser = clap::value_parser!(u16).range(2..))]
    pub(super) factor: u16,
    /// Timed calls of each size; by default as many as fit --seconds, 10 to 10,000.
    #[arg(short = 'n', long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub(super) iters: Option<u32>,
    /// Calls of each size before the timed ones; by default 8 and then a tenth of --seconds.
    #[arg(short = 'w', long, value_name = "N", value_parser = clap::value_parser!(u32).range(0..=1_000_000))]
    pub(super) warmup: Option<u32>,
    /// Time for the timed calls of one size and place, without -n.
    #[arg(long, value_name = "SECONDS", default_value_t = 0.5, value_parser = seconds)]
    pub(super) seconds: f64,
    /// The collective.
    #[arg(long, value_enum, default_value_t = Op::AllReduce)]
    pub(super) op: Op,
    /// The reduction, where the collective has one.
    #[arg(long, value_enum, default_value_t = Redop::Sum)]
    pub(super) redop: Redop,
    /// Element type.
    #[arg(long, default_value = "f32", value_parser = dtypes())]
    pub(super) dtype: DType,
    /// Root of a broadcast.
    #[arg(long, value_name = "RANK", default_value_t = 0)]
    pub(super) root: u32,
    /// In place, out of place, or one after the other.
    #[arg(long, value_enum, default_value_t = Places::Both)]
    pub(super) place: Places,
    /// How data moves; auto chooses by size and memory.
    #[arg(long, value_enum, default_value_t = AlgorithmChoice::Auto)]
    pub(super) algorithm: AlgorithmChoice,
    /// Where the vectors lie.
    #[arg(long, value_enum, default_value_t = MemoryKind::Registered)]
    pub(super) memory: MemoryKind,
    /// How partial sums of 16-bit floats travel in a ring.
    #[arg(long, value_enum, default_value_t = PartialsChoice::F32)]
    pub(super) partials: PartialsChoice,
    /// Issue on a stream's thread and wait, instead of blocking calls on the calling thread.
    #[arg(long)]
    pub(super) stream: bool,
    /// Verify every size, before and after it is timed.
    #[arg(long, value_enum, default_value_t = Switch::On)]
    pub(super) check: Switch,
    /// Seed of the inputs.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(super) seed: u64,
    /// Also write everything, with the fastest call and the 99th percentile, to this file.
    #[arg(long, value_name = "FILE")]
    pub(super) json: Option<PathBuf>,
}

/// The collective to measure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
pub(super) enum Op {
    AllReduce,
    ReduceScatter,
    AllGather,
    Broadcast,
    Barrier,
}

impl Op {
    pub(super) fn name(self) -> &'static str {
        match self {
            Op::AllReduce => "all_reduce",
            Op::ReduceScatter => "reduce_scatter",
            Op::AllGather => "all_gather",
            Op::Broadcast => "broadcast",
            Op::Barrier => "barrier",
        }
    }

    pub(super) fn reduces(self) -> bool {
        matches!(self, Op::AllReduce | Op::ReduceScatter)
    }

    /// Whether one rank's argument is a shard of the vector.
    pub(super) fn is_sharded(self) -> bool {
        matches!(self, Op::ReduceScatter | Op::AllGather)
    }

    /// Share of the vector that every rank must send.
    pub(super) fn bus_factor(self, world_size: u32) -> f64 {
        let others = f64::from(world_size - 1) / f64::from(world_size);
        match self {
            Op::AllReduce => 2.0 * others,
            Op::ReduceScatter | Op::AllGather => others,
            Op::Broadcast if world_size > 1 => 1.0,
            Op::Broadcast | Op::Barrier => 0.0,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Redop {
    Sum,
    Avg,
    Min,
    Max,
}

impl From<Redop> for ReduceOp {
    fn from(redop: Redop) -> ReduceOp {
        match redop {
            Redop::Sum => ReduceOp::Sum,
            Redop::Avg => ReduceOp::Avg,
            Redop::Min => ReduceOp::Min,
            Redop::Max => ReduceOp::Max,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Places {
    Out,
    In,
    Both,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum AlgorithmChoice {
    Auto,
    Ring,
    Direct,
}

impl From<AlgorithmChoice> for Option<Algorithm> {
    fn from(choice: AlgorithmChoice) -> Option<Algorithm> {
        match choice {
            AlgorithmChoice::Auto => None,
            AlgorithmChoice::Ring => Some(Algorithm::Ring),
            AlgorithmChoice::Direct => Some(Algorithm::Direct),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum MemoryKind {
    /// Buffers of the arena, which peers reach directly.
    Registered,
    /// Buffers of this process alone, which are staged.
    Private,
    /// Plain slices of this process.
    Slice,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum PartialsChoice {
    /// Rounded once, at the end.
    F32,
    /// In the element type, rounded at every hop.
    Native,
}

impl From<PartialsChoice> for Partials {
    fn from(choice: PartialsChoice) -> Partials {
        match choice {
            PartialsChoice::F32 => Partials::F32,
            PartialsChoice::Native => Partials::Native,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Switch {
    Off,
    On,
}

impl Arguments {
    /// What clap cannot see from one argument alone.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] and [`Error::Unsupported`].
    pub(super) fn check(&self, world_size: u32) -> Result<()> {
        let refuse = |argument, value: String, accepted| Err(Error::InvalidArgument { argument, value, accepted });
        if self.min_bytes > self.max_bytes {
            return refuse("--min-bytes", self.min_bytes.to_string(), "must not exceed --max-bytes");
        }
        if self.root >= world_size {
            return refuse("--root", format!("{} of {world_size} ranks", self.root), "must be a rank of the job");
        }
        if self.stream && self.memory == MemoryKind::Slice {
            return refuse("--stream", "with --memory slice".into(), "slices are used by blocking calls only");
        }
        if self.op.reduces() {
            ReduceOp::from(self.redop).check(self.dtype)?;
        }
        Ok(())
    }

    /// In place or out of place or both; a barrier has no place.
    pub(super) fn places(&self) -> Places {
        if self.op == Op::Barrier { Places::In } else { self.place }
    }

    /// Elements of the whole vector, from the smallest size to the largest; no size twice.
    pub(super) fn lengths_elems(&self, world_size: u32) -> Vec<usize> {
        if self.op == Op::Barrier {
            return vec![0];
        }
        let multiple = if self.op.is_sharded() { world_size as usize } else { 1 };
        let (mut lengths, mut size_bytes) = (Vec::new(), self.min_bytes);
        while size_bytes <= self.max_bytes {
            let len_elems = size_bytes / self.dtype.size_bytes();
            lengths.push(len_elems - len_elems % multiple);
            size_bytes = size_bytes.saturating_mul(usize::from(self.factor)).max(1);
            if size_bytes == usize::MAX {
                break;
            }
        }
        lengths.dedup();
        lengths
    }
}

fn dtypes() -> impl TypedValueParser<Value = DType> {
    PossibleValuesParser::new(DType::ALL.map(DType::name)).try_map(|name| name.parse::<DType>())
}

/// `64`, `4K`, `1MiB`, `2g`.
fn size_bytes(text: &str) -> std::result::Result<usize, String> {
    let lower = text.to_ascii_lowercase();
    let digits = lower.trim_end_matches(|letter: char| letter.is_ascii_alphabetic());
    let shift = match &lower[digits.len()..] {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        _ => return Err("must be a number of bytes, or of K, M or G (powers of 1024)".into()),
    };
    let number: usize = digits.parse().map_err(|_| "must begin with a whole number".to_owned())?;
    number.checked_mul(1 << shift).filter(|bytes| isize::try_from(*bytes).is_ok()).ok_or_else(|| "is too large".into())
}

fn seconds(text: &str) -> std::result::Result<f64, String> {
    match text.parse::<f64>() {
        Ok(seconds) if seconds > 0.0 && seconds <= 3600.0 => Ok(seconds),
        _ => Err("must be a number of seconds above 0 and at most 3600".into()),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Program {
        #[command(flatten)]
        arguments: Arguments,
    }

    fn parse(line: &str) -> Arguments {
        Program::try_parse_from(line.split(' ')).unwrap().arguments
    }

    #[test]
    fn sizes_have_suffixes_and_limits() {
        assert_eq!(size_bytes("64"), Ok(64));
        assert_eq!(size_bytes("4k"), Ok(4 << 10));
        assert_eq!(size_bytes("3MiB"), Ok(3 << 20));
        assert_eq!(size_bytes("2G"), Ok(2 << 30));
        for bad in ["", "K", "1T", "-1", "1.5K", "99999999999G", "1K2"] {
            assert!(size_bytes(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn lengths_grow_by_the_factor_and_divide_into_shards() {
        assert_eq!(parse("bench -b 1K -e 64K -f 4").lengths_elems(2), [256, 1024, 4096, 16384]);
        assert_eq!(parse("bench -b 100 -e 100 --dtype u8 --op all_gather").lengths_elems(3), [99]);
        assert_eq!(parse("bench -b 1 -e 4 -f 2").lengths_elems(2), [0, 1], "no length twice");
        assert_eq!(parse("bench -b 0 -e 1 -f 2 --dtype u8").lengths_elems(2), [0, 1]);
        assert_eq!(parse("bench --op barrier").lengths_elems(2), [0]);
    }

    #[test]
    fn contradictions_are_told() {
        assert!(parse("bench -b 2K -e 1K").check(2).is_err());
        assert!(parse("bench --op broadcast --root 2").check(2).is_err());
        assert!(parse("bench --redop avg --dtype i32").check(2).is_err());
        assert!(parse("bench --op all_gather --redop avg --dtype i32").check(2).is_ok());
        assert!(parse("bench --stream --memory slice").check(2).is_err());
        assert!(parse("bench").check(2).is_ok());
    }

    #[test]
    fn the_bus_factor_is_the_share_that_is_sent() {
        assert_eq!(Op::AllReduce.bus_factor(4), 1.5);
        assert_eq!(Op::AllGather.bus_factor(4), 0.75);
        assert_eq!(Op::Broadcast.bus_factor(4), 1.0);
        assert_eq!(Op::Broadcast.bus_factor(1), 0.0);
        assert_eq!(Op::AllReduce.bus_factor(1), 0.0);
    }
}
