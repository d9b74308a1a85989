//! Ranks on virtual devices, their links and memory, and one operation on all of them under the race detector.

use annulus::abi::collective::{
    CollectiveArguments, FLAG_STRIDE_BYTES, FaultRecord, Link, ONE_STEP, Progress, Protocol, RankArguments, RankState,
    Step, collective_entry, one_shard, piece_elems, reduce_code, shards, slot_bytes, steps,
};
use annulus::schedule::{Algorithm, Collective, Schedule};
use annulus::{Element, ReduceOp};
use annulus_vgpu::{Arguments, Fault, Launch, Memory, Module, Options, Report, run};
use bytemuck::{Pod, Zeroable};

/// In the virtual GPU a nanosecond is an instruction.
pub const PATIENCE_NS: u64 = 1 << 40;

/// How the ranks are laid out and linked: fixed for a group's life.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    pub world_size: u32,
    pub channels: u32,
    pub slots: u32,
    pub slot_bytes: u64,
    pub protocol: Protocol,
    pub threads: u32,
}

impl Shape {
    pub fn new(world_size: u32) -> Shape {
        Shape { world_size, channels: 1, slots: 2, slot_bytes: 2048, protocol: Protocol::Bulk, threads: 32 }
    }
}

/// One operation, as every rank issues it.
#[derive(Debug, Clone, Copy)]
pub struct Operation {
    pub collective: Collective,
    pub algorithm: Algorithm,
    pub op: ReduceOp,
    /// Of the whole vector.
    pub len_elems: usize,
    pub round_elems: usize,
    pub native_partials: bool,
    pub in_place: bool,
    /// All to everybody at once; an all-reduce by Direct.
    pub one_step: bool,
    /// Elements between a 16-byte boundary and the buffers.
    pub shift_elems: usize,
    pub descriptor: u32,
    pub timeout_ns: u64,
}

impl Operation {
    pub fn new(collective: Collective, algorithm: Algorithm, len_elems: usize) -> Operation {
        Operation {
            collective,
            algorithm,
            op: ReduceOp::Sum,
            len_elems,
            round_elems: 64,
            native_partials: false,
            in_place: true,
            one_step: false,
            shift_elems: 0,
            descriptor: 0x5eed,
            timeout_ns: PATIENCE_NS,
        }
    }

    pub fn schedule(&self, world_size: u32) -> Schedule {
        Schedule::new(self.collective, self.algorithm, world_size, self.len_elems, self.round_elems, 16).unwrap()
    }
}

/// What one rank adds to its arguments.
#[derive(Debug, Clone, Copy, Default)]
pub struct Epilogue {
    pub cast_output: u64,
    pub cast_dtype: u32,
    pub squares: u64,
    pub sum_squares: u64,
    pub found_nonfinite: u64,
}

/// What one rank has for one peer.
#[derive(Clone, Copy)]
struct Inbox {
    slots: u64,
    sent: u64,
    taken: u64,
    greeting: u64,
    progress: u64,
}

pub struct World {
    pub shape: Shape,
    pub memory: Memory,
    links: Vec<u64>,
    states: Vec<u64>,
    pub aborts: Vec<u64>,
    faults: Vec<u64>,
}

impl World {
    pub fn new(shape: Shape) -> World {
        let mut memory = Memory::new();
        let world_size = shape.world_size as usize;
        let (channels, slots) = (shape.channels as usize, shape.slots as usize);
        let mut zeroed = |len_bytes: usize| memory.alloc(&vec![0; len_bytes]);
        let all: Vec<usize> = (0..world_size).collect();
        // inboxes[rank][peer]: what `rank` has for `peer` to write, and the counters of its own.
        let mut inbox = |_: &usize| Inbox {
            slots: zeroed(channels * slots * shape.slot_bytes as usize),
            sent: zeroed(channels * FLAG_STRIDE_BYTES),
            taken: zeroed(channels * FLAG_STRIDE_BYTES),
            greeting: zeroed(16),
            progress: zeroed(channels * size_of::<Progress>()),
        };
        let inboxes: Vec<Vec<Inbox>> = all.iter().map(|_| all.iter().map(&mut inbox).collect()).collect();
        let link = |rank: usize, peer: usize| {
            let (mine, theirs) = (inboxes[rank][peer], inboxes[peer][rank]);
            let link = Link {
                send_slots: theirs.slots,
                send_flags: theirs.sent,
                credits: mine.taken,
                recv_slots: mine.slots,
                recv_flags: mine.sent,
                give_back: theirs.taken,
                greeting: mine.greeting,
                peer_greeting: theirs.greeting,
                progress: mine.progress,
            };
            if peer == rank { Link::zeroed() } else { link }
        };
        let links: Vec<Vec<Link>> =
            all.iter().map(|rank| all.iter().map(|peer| link(*rank, *peer)).collect()).collect();
        let states = (0..world_size).map(|_| zeroed(size_of::<RankState>())).collect();
        let aborts = (0..world_size).map(|_| zeroed(4)).collect();
        let faults = (0..world_size).map(|_| zeroed(channels * size_of::<FaultRecord>())).collect();
        let links = links.iter().map(|links| memory.alloc(bytemuck::cast_slice(links))).collect();
        World { shape, memory, links, states, aborts, faults }
    }

    /// Puts all counters, flags and words to `generation`, as after so many operations and transfers.
    pub fn set_generation(&mut self, generation: u32) {
        let (channels, bytes) = (self.shape.channels as u64, generation.to_le_bytes());
        let mut words = Vec::new();
        for rank in 0..self.shape.world_size as usize {
            words.push(self.states[rank]);
            for link in self.read::<Link>(self.links[rank], self.shape.world_size as usize) {
                if link.progress != 0 && self.shape.protocol == Protocol::Words {
                    let len_bytes = channels * u64::from(self.shape.slots) * self.shape.slot_bytes;
                    words.extend((0..len_bytes / 8).map(|word| link.recv_slots + word * 8 + 4));
                }
                for channel in (0..channels).filter(|_| link.progress != 0) {
                    let stride = channel * FLAG_STRIDE_BYTES as u64;
                    let progress = link.progress + channel * size_of::<Progress>() as u64;
                    words.extend([link.recv_flags + stride, link.credits + stride, progress, progress + 4]);
                }
            }
        }
        words.into_iter().for_each(|word| self.memory.write(word, 4).unwrap().copy_from_slice(&bytes));
    }

    pub fn alloc<T: Pod>(&mut self, items: &[T]) -> u64 {
        self.memory.alloc(bytemuck::cast_slice(items))
    }

    pub fn read<T: Pod>(&self, address: u64, len_items: usize) -> Vec<T> {
        let bytes = self.memory.read(address, len_items * size_of::<T>()).unwrap();
        bytemuck::pod_collect_to_vec(bytes)
    }

    /// The fault records of a rank's channels that have a reason.
    pub fn faults(&self, rank: usize) -> Vec<FaultRecord> {
        let records: Vec<FaultRecord> = self.read(self.faults[rank], self.shape.channels as usize);
        records.into_iter().filter(|record| record.reason != 0).collect()
    }

    /// The arguments of `operation` for one rank alone.
    pub fn arguments<T: Element>(
        &mut self,
        operation: &Operation,
        rank: u32,
        buffers: [u64; 2],
        epilogue: Epilogue,
    ) -> CollectiveArguments {
        let (shape, schedule) = (self.shape, operation.schedule(self.shape.world_size));
        let largest = if operation.one_step { operation.len_elems } else { schedule.slot_elems() } as u64;
        let round_elems = operation.round_elems as u64;
        let piece_elems = piece_elems(largest.min(round_elems), shape.channels);
        let wire_bytes = if T::DTYPE.is_half() && !operation.native_partials { 4 } else { size_of::<T>() };
        assert!(slot_bytes(piece_elems, wire_bytes, shape.protocol).unwrap() <= shape.slot_bytes);
        let table: Vec<Step> = if operation.one_step { ONE_STEP.to_vec() } else { steps(&schedule, rank) };
        let factor = if let ReduceOp::PremulSum(factor) = operation.op { factor } else { 0.0 };
        // Shards alone lie where their vector would have them.
        let shard_bytes = schedule.shard(rank).offset_elems as u64 * size_of::<T>() as u64;
        let [mut input, mut output] = buffers;
        if operation.collective == Collective::AllGather && !operation.in_place {
            input = input.wrapping_sub(shard_bytes);
        }
        if operation.collective == Collective::ReduceScatter && !operation.in_place {
            output = output.wrapping_sub(shard_bytes);
        }
        let mut arguments = CollectiveArguments {
            shards: if operation.one_step { one_shard(operation.len_elems) } else { shards(&schedule) },
            rounds: if operation.one_step { largest.div_ceil(round_elems) } else { schedule.rounds() },
            round_elems,
            piece_elems,
            slot_bytes: shape.slot_bytes,
            timeout_ns: operation.timeout_ns,
            factor,
            world_size: shape.world_size,
            channels: shape.channels,
            slots: shape.slots,
            protocol: shape.protocol as u32,
            op: reduce_code(operation.op),
            native_partials: operation.native_partials.into(),
            descriptor: operation.descriptor,
            cast_dtype: epilogue.cast_dtype,
            first_round: 0,
            opens: 1,
            closes: 1,
            ranks: Zeroable::zeroed(),
        };
        arguments.ranks[0] = RankArguments {
            input,
            output,
            cast_output: epilogue.cast_output,
            links: self.links[rank as usize],
            steps: self.alloc(&table),
            state: self.states[rank as usize],
            abort: self.aborts[rank as usize],
            faults: self.faults[rank as usize],
            finished: 0,
            squares: epilogue.squares,
            sum_squares: epilogue.sum_squares,
            found_nonfinite: epilogue.found_nonfinite,
            signals: 0,
            len_steps: table.len() as u32,
            rank,
        };
        arguments
    }

    /// One launch per entry of `arguments`, each on a device of its own.
    pub fn launch<T: Element>(
        &mut self,
        module: &Module,
        arguments: &[CollectiveArguments],
        options: &Options,
    ) -> Result<Report, Fault> {
        let kernel = module.kernel(collective_entry(T::DTYPE))?;
        let launches = arguments.iter().enumerate().map(|(device, arguments)| Launch {
            device,
            ..Launch::new(kernel, arguments.channels, self.shape.threads, words(arguments))
        });
        run(&launches.collect::<Vec<_>>(), &mut self.memory, options)
    }

    /// All ranks in one grid on one device.
    pub fn launch_together<T: Element>(
        &mut self,
        module: &Module,
        arguments: &[CollectiveArguments],
        options: &Options,
    ) -> Result<Report, Fault> {
        let mut together = arguments[0];
        for (rank, arguments) in arguments.iter().enumerate() {
            together.ranks[rank] = arguments.ranks[0];
        }
        let kernel = module.kernel(collective_entry(T::DTYPE))?;
        let blocks = self.shape.channels * self.shape.world_size;
        let launch = Launch::new(kernel, blocks, self.shape.threads, words(&together));
        run(&[launch], &mut self.memory, options)
    }
}

fn words<A: Pod>(arguments: &A) -> Arguments {
    let words: &[u64] = bytemuck::cast_slice(std::slice::from_ref(arguments));
    words.iter().fold(Arguments::new(), |arguments, word| arguments.u64(*word))
}

/// Whether two elements are the same bits, or both NaN: a GPU keeps no payloads.
pub fn same<T: Element>(a: T, b: T) -> bool {
    let is_nan = |x: T| T::DTYPE.is_float() && x.to_f64().is_nan();
    bytemuck::bytes_of(&a) == bytemuck::bytes_of(&b) || (is_nan(a) && is_nan(b))
}
