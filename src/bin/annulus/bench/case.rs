//! One collective of one size, in place or out of place: fill, call, verify, time.

use std::time::Instant;

use annulus::collective::Communicator;
use annulus::device::{Arena, Stream};
use annulus::{Element, ReduceOp, Result};

use super::arguments::{Arguments, MemoryKind, Op};
use super::inputs::Inputs;
use super::operand::Operand;

/// Calls whose time says how many more there will be.
const TRIAL_CALLS: u32 = 8;
const FEWEST_ITERATIONS: u32 = 10;
const MOST_ITERATIONS: u32 = 10_000;
/// Share of the timed calls' time that warming up may take.
const WARMUP_SHARE: f64 = 0.1;

/// Whether input and output are the same memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    OutOfPlace,
    InPlace,
}

impl Place {
    /// Whether the library has this form of the collective.
    pub(super) fn has(self, op: Op, memory: MemoryKind) -> bool {
        match (op, self) {
            (Op::Broadcast | Op::Barrier, place) => place == Place::InPlace,
            (Op::AllReduce, Place::OutOfPlace) => memory != MemoryKind::Slice,
            (Op::ReduceScatter | Op::AllGather, Place::InPlace) => memory != MemoryKind::Slice,
            (Op::AllReduce | Op::ReduceScatter | Op::AllGather, _) => true,
        }
    }
}

/// Seconds per call; of every call the slowest rank's.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Times {
    pub(super) iterations: u32,
    pub(super) min_s: f64,
    pub(super) median_s: f64,
    pub(super) mean_s: f64,
    pub(super) p99_s: f64,
}

impl Times {
    fn of(mut slowest_ns: Vec<i64>) -> Times {
        slowest_ns.sort_unstable();
        let iterations = slowest_ns.len();
        let at = |index: usize| slowest_ns[index.min(iterations - 1)] as f64 * 1e-9;
        Times {
            iterations: iterations as u32,
            min_s: at(0),
            median_s: at(iterations / 2),
            mean_s: slowest_ns.iter().map(|ns| *ns as f64 * 1e-9).sum::<f64>() / iterations as f64,
            // Nearest rank: 99 of 100 calls took no longer.
            p99_s: at((iterations * 99).div_ceil(100).saturating_sub(1)),
        }
    }
}

/// The memory of one collective and how to call it.
pub(super) struct Case<'a, T> {
    arguments: &'a Arguments,
    communicator: &'a mut Communicator,
    /// Where operations are issued.
    stream: &'a Stream,
    inputs: Inputs,
    place: Place,
    /// Elements of the whole vector.
    len_elems: usize,
    /// Input of out-of-place forms; empty otherwise.
    src: Operand<T>,
    /// Output, and input in place.
    dst: Operand<T>,
}

impl<'a, T: Element> Case<'a, T> {
    pub(super) fn new(
        arguments: &'a Arguments,
        communicator: &'a mut Communicator,
        stream: &'a Stream,
        place: Place,
        len_elems: usize,
    ) -> Result<Case<'a, T>> {
        let (op, world_size) = (arguments.op, communicator.world_size());
        let shard_elems = len_elems / world_size as usize;
        let (src_elems, dst_elems) = match (place, op) {
            (Place::InPlace, _) => (0, len_elems),
            (Place::OutOfPlace, Op::ReduceScatter) => (len_elems, shard_elems),
            (Place::OutOfPlace, Op::AllGather) => (shard_elems, len_elems),
            (Place::OutOfPlace, _) => (len_elems, len_elems),
        };
        let arena = Arena::new(communicator.world());
        let inputs = Inputs::new(arguments.seed, op, arguments.redop, arguments.root, T::DTYPE, world_size);
        let src = Operand::new(arguments.memory, &arena, src_elems)?;
        let dst = Operand::new(arguments.memory, &arena, dst_elems)?;
        Ok(Case { arguments, communicator, stream, inputs, place, len_elems, src, dst })
    }

    /// One call, on fresh inputs, verified. Returns what is wrong on all ranks together.
    ///
    /// # Errors
    /// The operation's.
    pub(super) fn verify(&mut self) -> Result<u64> {
        self.fill()?;
        self.call()?;
        let wrong = self.wrong_here()?;
        Ok(self.of_all_ranks(wrong as i64)?.into_iter().map(|wrong| wrong as u64).sum())
    }

    /// Warms up and times.
    ///
    /// # Errors
    /// The operation's.
    pub(super) fn time(&mut self) -> Result<Times> {
        // Sums in place grow with every call; zeroes stay, and meet no infinity and no subnormal number.
        self.src.elements_mut()?.fill(T::from_f64(0.0));
        self.dst.elements_mut()?.fill(T::from_f64(0.0));
        let trial = self.slowest(self.arguments.warmup.unwrap_or(TRIAL_CALLS))?;
        // All ranks know the same times, so they all go on the same number of times.
        let calls_in = |seconds: f64| (seconds * 1e9 / median_ns(&trial).max(1.0)) as u32;
        if self.arguments.warmup.is_none() {
            self.slowest(calls_in(self.arguments.seconds * WARMUP_SHARE).min(MOST_ITERATIONS))?;
        }
        let iterations = match self.arguments.iters {
            Some(iterations) => iterations,
            None if trial.is_empty() => FEWEST_ITERATIONS,
            None => calls_in(self.arguments.seconds).clamp(FEWEST_ITERATIONS, MOST_ITERATIONS),
        };
        Ok(Times::of(self.slowest(iterations)?))
    }

    /// Calls so many times; of every call the time of the slowest rank, in nanoseconds.
    fn slowest(&mut self, calls: u32) -> Result<Vec<i64>> {
        let mut times_ns = Vec::with_capacity(calls as usize);
        for _ in 0..calls {
            self.communicator.barrier_now()?;
            let start = Instant::now();
            self.call()?;
            times_ns.push(start.elapsed().as_nanos() as i64);
        }
        let mut all_ns = vec![0i64; times_ns.len() * self.communicator.world_size() as usize];
        self.communicator.all_gather_slice(&times_ns, &mut all_ns)?;
        for other in all_ns.chunks_exact(times_ns.len().max(1)) {
            times_ns.iter_mut().zip(other).for_each(|(slowest, time)| *slowest = (*slowest).max(*time));
        }
        Ok(times_ns)
    }

    /// The operation, to its end.
    fn call(&mut self) -> Result<()> {
        let op = ReduceOp::from(self.arguments.redop);
        let (communicator, stream, root) = (&mut *self.communicator, self.stream, self.arguments.root);
        let (src, dst) = (&mut self.src, &mut self.dst);
        match (self.arguments.op, self.place, self.arguments.memory) {
            (Op::Barrier, ..) if self.arguments.stream => communicator.barrier(stream)?.wait(),
            (Op::Barrier, ..) => communicator.barrier_now(),

            (Op::AllReduce, _, MemoryKind::Slice) => communicator.all_reduce_slice(dst.elements_mut()?, op),
            (Op::ReduceScatter, _, MemoryKind::Slice) => {
                communicator.reduce_scatter_slice(src.elements()?, dst.elements_mut()?, op)
            }
            (Op::AllGather, _, MemoryKind::Slice) => {
                communicator.all_gather_slice(src.elements()?, dst.elements_mut()?)
            }
            (Op::Broadcast, _, MemoryKind::Slice) => communicator.broadcast_slice(dst.elements_mut()?, root),

            (Op::AllReduce, Place::InPlace, _) => dst.lend(|dst| communicator.all_reduce(dst, op, stream)),
            (Op::ReduceScatter, Place::InPlace, _) => {
                dst.lend(|dst| communicator.reduce_scatter_in_place(dst, op, stream))
            }
            (Op::AllGather, Place::InPlace, _) => dst.lend(|dst| communicator.all_gather_in_place(dst, stream)),
            (Op::Broadcast, ..) => dst.lend(|dst| communicator.broadcast(dst, root, stream)),

            (Op::AllReduce, Place::OutOfPlace, _) => {
                src.lend_with(dst, |src, dst| communicator.all_reduce_into(src, dst, op, stream))
            }
            (Op::ReduceScatter, Place::OutOfPlace, _) => {
                src.lend_with(dst, |src, dst| communicator.reduce_scatter(src, dst, op, stream))
            }
            (Op::AllGather, Place::OutOfPlace, _) => {
                src.lend_with(dst, |src, dst| communicator.all_gather(src, dst, stream))
            }
        }
    }

    /// Puts this rank's inputs where the operation looks for them, and something else everywhere else.
    fn fill(&mut self) -> Result<()> {
        let (inputs, rank, len_elems) = (self.inputs, self.communicator.rank(), self.len_elems);
        let own = self.own_shard();
        // What an operation is to write must not be right already.
        let stale = T::from_f64(77.0);
        match self.place {
            Place::OutOfPlace => {
                let first = if self.arguments.op == Op::AllGather { own.start } else { 0 };
                for (index, element) in self.src.elements_mut()?.iter_mut().enumerate() {
                    *element = T::from_f64(inputs.input(rank, first + index));
                }
                self.dst.elements_mut()?.fill(stale);
            }
            Place::InPlace => {
                let is_input = |index| match self.arguments.op {
                    Op::AllGather => own.contains(&index),
                    Op::Broadcast => rank == self.arguments.root,
                    Op::AllReduce | Op::ReduceScatter | Op::Barrier => index < len_elems,
                };
                for (index, element) in self.dst.elements_mut()?.iter_mut().enumerate() {
                    *element = if is_input(index) { T::from_f64(inputs.input(rank, index)) } else { stale };
                }
            }
        }
        Ok(())
    }

    /// Elements of this rank that are not exactly what they should be, and damaged guard bytes.
    fn wrong_here(&self) -> Result<u64> {
        let (inputs, rank, len_elems) = (self.inputs, self.communicator.rank(), self.len_elems);
        let own = self.own_shard();
        let mut wrong = self.src.damaged_bytes()? + self.dst.damaged_bytes()?;
        let mut expect = |element: &T, expected: f64| {
            wrong += u64::from(bytemuck::bytes_of(element) != bytemuck::bytes_of(&T::from_f64(expected)));
        };
        // An input that is not the output, too, is left alone.
        let first = if self.arguments.op == Op::AllGather { own.start } else { 0 };
        for (index, element) in self.src.elements()?.iter().enumerate() {
            expect(element, inputs.input(rank, first + index));
        }
        let scatters = self.arguments.op == Op::ReduceScatter;
        let first = if scatters && self.place == Place::OutOfPlace { own.start } else { 0 };
        for (index, element) in self.dst.elements()?.iter().enumerate() {
            let index = first + index;
            let expected = match scatters && !own.contains(&index) {
                true => inputs.input(rank, index),
                false => inputs.output(index, len_elems),
            };
            expect(element, expected);
        }
        Ok(wrong)
    }

    /// This rank's shard of the whole vector.
    fn own_shard(&self) -> std::ops::Range<usize> {
        let shard_elems = self.len_elems / self.communicator.world_size() as usize;
        let start = shard_elems * self.communicator.rank() as usize;
        start..start + shard_elems
    }

    /// Every rank's number.
    fn of_all_ranks(&mut self, number: i64) -> Result<Vec<i64>> {
        let mut numbers = vec![0; self.communicator.world_size() as usize];
        self.communicator.all_gather_slice(&[number], &mut numbers)?;
        Ok(numbers)
    }
}

/// Half of the calls took no longer; 0 without calls.
fn median_ns(times_ns: &[i64]) -> f64 {
    let mut sorted = times_ns.to_vec();
    sorted.sort_unstable();
    sorted.get(sorted.len() / 2).map_or(0.0, |median| *median as f64)
}

#[cfg(test)]
mod tests {
    use annulus::collective::CollectiveOptions;
    use annulus::world::{Environment, World, WorldOptions};
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Program {
        #[command(flatten)]
        arguments: Arguments,
    }

    #[test]
    fn one_wrong_element_is_one() {
        let world = World::join(Environment::single(), WorldOptions::default()).unwrap();
        let mut communicator = Communicator::new(&world, CollectiveOptions::default()).unwrap();
        let stream = Stream::immediate("test");
        for op in ["all_reduce", "reduce_scatter", "all_gather", "broadcast"] {
            let arguments = Program::parse_from(["bench", "--op", op]).arguments;
            for place in [Place::OutOfPlace, Place::InPlace] {
                if !place.has(arguments.op, arguments.memory) {
                    continue;
                }
                let mut case = Case::<f32>::new(&arguments, &mut communicator, &stream, place, 1000).unwrap();
                assert_eq!(case.verify().unwrap(), 0, "{op} {place:?}");
                // One unit in the last place.
                let element = &mut case.dst.elements_mut().unwrap()[999];
                *element = f32::from_bits(element.to_bits() ^ 1);
                assert_eq!(case.wrong_here().unwrap(), 1, "{op} {place:?}");
            }
        }
    }

    #[test]
    fn an_operation_that_does_nothing_is_noticed() {
        let world = World::join(Environment::single(), WorldOptions::default()).unwrap();
        let mut communicator = Communicator::new(&world, CollectiveOptions::default()).unwrap();
        let (stream, arguments) = (Stream::immediate("test"), Program::parse_from(["bench"]).arguments);
        let mut case = Case::<f32>::new(&arguments, &mut communicator, &stream, Place::OutOfPlace, 1000).unwrap();
        case.fill().unwrap();
        assert!(case.wrong_here().unwrap() > 990);
    }

    #[test]
    fn times_are_order_statistics() {
        let times = Times::of((1..=100).rev().map(|us| us * 1_000).collect());
        assert_eq!(times.iterations, 100);
        assert!((times.min_s - 1e-6).abs() < 1e-12);
        assert!((times.median_s - 51e-6).abs() < 1e-12);
        assert!((times.p99_s - 99e-6).abs() < 1e-12);
        assert!((times.mean_s - 50.5e-6).abs() < 1e-12);
        let one = Times::of(vec![5]);
        assert_eq!((one.min_s, one.median_s, one.p99_s), (5e-9, 5e-9, 5e-9));
    }
}
