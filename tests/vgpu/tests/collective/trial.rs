//! One collective with fresh buffers, compared with the reference, element for element and around the edges.

use std::fmt;

use annulus::abi::collective::FaultRecord;
use annulus::reference;
use annulus::schedule::{Algorithm, Collective, Schedule};
use annulus::{Element, ReduceOp};
use annulus_vgpu::{Fault, Module, Options};
use half::f16;

use super::world::{Epilogue, Operation, World, same};

/// What lies around every buffer, and must stay.
const CANARY_ELEMS: usize = 16;

/// Why a trial failed.
#[derive(Debug)]
pub enum Failure {
    /// The virtual GPU found a fault.
    Machine(Fault),
    /// A rank gave up a wait.
    GaveUp(usize, FaultRecord),
    /// A rank's result is wrong.
    Result(String),
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::Machine(fault) => write!(f, "{fault}"),
            Failure::GaveUp(rank, record) => write!(f, "the fault record of rank {rank}: {record:?}"),
            Failure::Result(what) => f.write_str(what),
        }
    }
}

/// The terms of every rank: the value of element `i` of `rank` is `value(rank, i)`.
pub fn inputs<T: Element>(operation: &Operation, world_size: u32, value: impl Fn(usize, usize) -> T) -> Vec<Vec<T>> {
    (0..world_size as usize).map(|rank| (0..operation.len_elems).map(|i| value(rank, i)).collect()).collect()
}

/// Values whose sums depend on the order: mantissas full of bits, magnitudes apart. NaN, infinities, -0.0 and denormals
/// among them.
pub fn rough<T: Element>(rank: usize, i: usize) -> T {
    let place = (i as u64).wrapping_mul(0x9e37_79b9).wrapping_add(rank as u64 * 0x85eb_ca6b + 1);
    let mixed = place.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16;
    match mixed % 97 {
        0 if i.is_multiple_of(5) => T::from_f64(f64::NAN),
        1 => T::from_f64(f64::INFINITY),
        2 => T::from_f64(-0.0),
        3 => T::from_f64(1e-40),
        _ if T::DTYPE.is_float() => {
            T::from_f64((mixed % 4001) as f64 * 2f64.powi((mixed >> 20) as i32 % 9 - 4) / 7.0 - 90.0)
        }
        _ => T::from_f64((mixed % 0xffff_ffff) as f64 - 2e9),
    }
}

/// What every rank holds in the end, as the whole vector; of a reduce-scatter only the own shard counts.
pub fn expected<T: Element>(operation: &Operation, world_size: u32, inputs: &[Vec<T>]) -> Vec<T> {
    let schedule = operation.schedule(world_size);
    match operation.collective {
        Collective::AllReduce | Collective::ReduceScatter => match operation.algorithm {
            Algorithm::Direct => reference::all_reduce(inputs, operation.op).unwrap(),
            // A ring adds the shard of `owner` from rank owner + 1 on.
            Algorithm::Ring => (0..world_size)
                .flat_map(|owner| {
                    let shard = schedule.shard(owner);
                    let first = (owner as usize + 1) % world_size as usize;
                    let whole = reference::all_reduce_from(inputs, operation.op, first).unwrap();
                    whole[shard.offset_elems..shard.end_elems()].to_vec()
                })
                .collect(),
        },
        Collective::AllGather => (0..world_size)
            .flat_map(|owner| {
                let shard = schedule.shard(owner);
                inputs[owner as usize][shard.offset_elems..shard.end_elems()].to_vec()
            })
            .collect(),
        Collective::Broadcast { root } => inputs[root as usize].clone(),
    }
}

/// A sum around the ring whose partials are f16: rounded at every hop.
pub fn native_ring(schedule: &Schedule, inputs: &[Vec<f16>]) -> Vec<f16> {
    let world_size = schedule.world_size() as usize;
    let owner_of = |i: usize| {
        let owns = |owner: &u32| (schedule.shard(*owner).offset_elems..schedule.shard(*owner).end_elems()).contains(&i);
        (0..schedule.world_size()).find(owns).unwrap() as usize
    };
    let sum = |i: usize| {
        let terms = (1..=world_size).map(|hop| inputs[(owner_of(i) + hop) % world_size][i]);
        terms.reduce(|partial, term| f16::from_f32(partial.to_f32() + term.to_f32())).unwrap()
    };
    (0..inputs[0].len()).map(sum).collect()
}

/// Runs `operation` on `world` and compares with the reference.
pub fn trial<T: Element>(
    world: &mut World,
    module: &Module,
    operation: &Operation,
    inputs: &[Vec<T>],
    options: &Options,
    together: bool,
) -> Result<(), Failure> {
    let whole = expected(operation, world.shape.world_size, inputs);
    compare(world, module, operation, inputs, &whole, options, together)
}

/// Runs `operation` on `world` and compares with `whole`.
pub fn same_as<T: Element>(
    world: &mut World,
    module: &Module,
    operation: &Operation,
    inputs: &[Vec<T>],
    whole: &[T],
) -> Result<(), Failure> {
    compare(world, module, operation, inputs, whole, &Options::default(), false)
}

fn compare<T: Element>(
    world: &mut World,
    module: &Module,
    operation: &Operation,
    inputs: &[Vec<T>],
    whole: &[T],
    options: &Options,
    together: bool,
) -> Result<(), Failure> {
    let (world_size, schedule) = (world.shape.world_size, operation.schedule(world.shape.world_size));
    let canary = T::from_f64(77.0);
    let before = CANARY_ELEMS + operation.shift_elems;
    let mut arguments = Vec::new();
    let mut outputs = Vec::new();
    for rank in 0..world_size {
        let shard = schedule.shard(rank);
        let own = &inputs[rank as usize];
        let given = match operation.collective {
            Collective::AllGather if !operation.in_place => &own[shard.offset_elems..shard.end_elems()],
            _ => own,
        };
        let len_out = match operation.collective {
            Collective::ReduceScatter if !operation.in_place => shard.len_elems,
            _ => operation.len_elems,
        };
        let buffer = |world: &mut World, elements: &[T]| {
            let framed = [&vec![canary; before], elements, &[canary; CANARY_ELEMS]].concat();
            world.alloc(&framed) + (before * size_of::<T>()) as u64
        };
        let input = buffer(world, given);
        let output = if operation.in_place { input } else { buffer(world, &vec![canary; len_out]) };
        outputs.push((output, len_out));
        arguments.push(world.arguments::<T>(operation, rank, [input, output], Epilogue::default()));
    }
    let result = match together {
        true => world.launch_together::<T>(module, &arguments, options),
        false => world.launch::<T>(module, &arguments, options),
    };
    result.map_err(Failure::Machine)?;

    for (rank, (address, len_out)) in outputs.into_iter().enumerate() {
        if let Some(fault) = world.faults(rank).first() {
            return Err(Failure::GaveUp(rank, *fault));
        }
        let shard = schedule.shard(rank as u32);
        let start = address - (before * size_of::<T>()) as u64;
        let framed: Vec<T> = world.read(start, before + len_out + CANARY_ELEMS);
        let (frame, rest) = framed.split_at(before);
        let (actual, frame_behind) = rest.split_at(len_out);
        if frame.iter().chain(frame_behind).any(|element| !same(*element, canary)) {
            return Err(Failure::Result(format!("rank {rank} wrote outside its output")));
        }
        let (actual, wanted, first) = match operation.collective {
            Collective::ReduceScatter if operation.in_place => {
                let range = shard.offset_elems..shard.end_elems();
                (&actual[range.clone()], &whole[range.clone()], range.start)
            }
            Collective::ReduceScatter => (actual, &whole[shard.offset_elems..shard.end_elems()], shard.offset_elems),
            _ => (actual, whole, 0),
        };
        if let Some(i) = (0..wanted.len()).find(|i| !same(actual[*i], wanted[*i])) {
            let (actual, wanted) = (actual[i], wanted[i]);
            return Err(Failure::Result(format!("rank {rank}, element {}: {actual:?}, not {wanted:?}", first + i)));
        }
    }
    Ok(())
}

/// The reductions that `T` has.
pub fn reductions<T: Element>() -> Vec<ReduceOp> {
    let all = [ReduceOp::Sum, ReduceOp::Avg, ReduceOp::Min, ReduceOp::Max, ReduceOp::PremulSum(0.3)];
    all.into_iter().filter(|op| op.check(T::DTYPE).is_ok()).collect()
}
