//! Vectors of more than 2^32 elements: their last round, which is all of them that there is memory of.

use annulus::schedule::{Algorithm, Collective, Span};
use annulus::{Element, reference};
use annulus_vgpu::{Module, Options};
use bytemuck::cast_slice;
use half::bf16;

use super::trial::rough;
use super::world::{Epilogue, Operation, Shape, World, same};
use super::{ALGORITHMS, PROTOCOLS, collectives, module};

/// Where a rank's vector begins: no two overlap.
fn base(rank: u32) -> u64 {
    u64::from(rank + 1) << 44
}

fn address<T>(rank: u32, chunk: Span) -> u64 {
    base(rank) + (chunk.offset_elems * size_of::<T>()) as u64
}

/// The part of `chunk` that is `owner`'s, reduced or copied.
fn expected<T: Element>(operation: &Operation, owner: u32, inputs: &[Vec<T>]) -> Vec<T> {
    match (operation.collective, operation.algorithm) {
        (Collective::AllReduce | Collective::ReduceScatter, Algorithm::Direct) => {
            reference::all_reduce(inputs, operation.op).unwrap()
        }
        // A ring adds the shard of `owner` from rank owner + 1 on.
        (Collective::AllReduce | Collective::ReduceScatter, Algorithm::Ring) => {
            reference::all_reduce_from(inputs, operation.op, (owner as usize + 1) % inputs.len()).unwrap()
        }
        (Collective::AllGather | Collective::Broadcast { .. }, _) => inputs[owner as usize].clone(),
    }
}

/// Runs the last round alone. Chunks are allocations of their own: whatever else is touched is a fault.
fn check<T: Element>(module: &Module, shape: Shape, operation: &Operation) {
    let schedule = operation.schedule(shape.world_size);
    let round = schedule.rounds() - 1;
    let owners = (0..shape.world_size).map(|owner| (owner, schedule.chunk(round, owner)));
    let chunks: Vec<(u32, Span)> = owners.filter(|(_, chunk)| chunk.len_elems > 0).collect();
    let input = |rank: u32, chunk: Span| -> Vec<T> {
        (chunk.offset_elems..chunk.end_elems()).map(|i| rough(rank as usize, i)).collect()
    };

    let mut world = World::new(shape);
    let mut arguments = Vec::new();
    for rank in 0..shape.world_size {
        for (_, chunk) in &chunks {
            world.memory.alloc_at(address::<T>(rank, *chunk), cast_slice(&input(rank, *chunk)));
        }
        let mut own = world.arguments::<T>(operation, rank, [base(rank); 2], Epilogue::default());
        own.first_round = round;
        arguments.push(own);
    }
    let what = format!("{operation:?} of {}, {:?}", T::DTYPE, shape.protocol);
    world.launch::<T>(module, &arguments, &Options::default()).unwrap_or_else(|fault| panic!("{what}: {fault}"));

    for rank in 0..shape.world_size {
        assert_eq!(world.faults(rank as usize), [], "{what}: rank {rank}");
        let is_result = |owner: u32| operation.collective != Collective::ReduceScatter || owner == rank;
        for (owner, chunk) in chunks.iter().filter(|(owner, _)| is_result(*owner)) {
            let inputs: Vec<Vec<T>> = (0..shape.world_size).map(|rank| input(rank, *chunk)).collect();
            let wanted = expected(operation, *owner, &inputs);
            let actual: Vec<T> = world.read(address::<T>(rank, *chunk), chunk.len_elems);
            for (i, (actual, wanted)) in actual.into_iter().zip(wanted).enumerate() {
                let element = chunk.offset_elems + i;
                assert!(same(actual, wanted), "{what}: rank {rank}, element {element}: {actual:?}, not {wanted:?}");
            }
        }
    }
}

#[test]
fn the_last_round_of_a_long_vector_is_at_its_own_addresses() {
    let module = module();
    for protocol in PROTOCOLS {
        let shape = Shape { protocol, channels: 2, ..Shape::new(3) };
        for (collective, algorithm) in collectives(3).into_iter().flat_map(|of| ALGORITHMS.map(|by| (of, by))) {
            // Each owner's end, and the first owner's too, lies beyond 2^32 elements.
            let operation = Operation::new(collective, algorithm, 3 * ((1 << 32) + 1000 + 37));
            check::<f32>(&module, shape, &operation);
            check::<bf16>(&module, shape, &operation);
        }
    }
}
