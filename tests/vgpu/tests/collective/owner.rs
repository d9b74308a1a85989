//! What the owner of a chunk makes of its f32 sums while it has them: a cast copy, the sum of squares, a nonfinite flag.

use annulus::DType;
use annulus::reference;
use annulus::schedule::{Algorithm, Collective};
use annulus_vgpu::Options;
use half::bf16;

use super::trial::{inputs, rough};
use super::world::{Epilogue, Operation, Shape, World};
use super::{ALGORITHMS, PROTOCOLS, module};

/// Runs an all-reduce of bf16 with everything asked for; each rank's copy of its shard in f32, sum of squares and flag.
fn run(
    world_size: u32,
    algorithm: Algorithm,
    shape: Shape,
    value: impl Fn(usize, usize) -> bf16,
) -> Vec<(Vec<f32>, f64, u32)> {
    let operation = Operation { in_place: false, ..Operation::new(Collective::AllReduce, algorithm, 333) };
    let schedule = operation.schedule(world_size);
    let mut world = World::new(shape);
    let inputs = inputs::<bf16>(&operation, world_size, value);
    let mut given = Vec::new();
    let mut arguments = Vec::new();
    for rank in 0..world_size {
        let epilogue = Epilogue {
            cast_output: world.alloc(&vec![-1f32; 333]),
            cast_dtype: DType::F32 as u32,
            squares: world.alloc(&vec![0f64; shape.channels as usize]),
            sum_squares: world.alloc(&[-1f64]),
            found_nonfinite: world.alloc(&[0u32]),
        };
        let buffers = [world.alloc(&inputs[rank as usize]), world.alloc(&vec![bf16::ZERO; 333])];
        given.push(epilogue);
        arguments.push(world.arguments::<bf16>(&operation, rank, buffers, epilogue));
    }
    world.launch::<bf16>(&module(), &arguments, &Options::default()).unwrap();
    let results = given.iter().enumerate().map(|(rank, epilogue)| {
        let copy: Vec<f32> = world.read(epilogue.cast_output, 333);
        let shard = schedule.shard(rank as u32);
        let outside = copy.iter().enumerate().filter(|(i, _)| !(shard.offset_elems..shard.end_elems()).contains(i));
        outside.for_each(|(i, value)| assert_eq!(*value, -1.0, "rank {rank} copied element {i} of another's shard"));
        let copy = copy[shard.offset_elems..shard.end_elems()].to_vec();
        (copy, world.read(epilogue.sum_squares, 1)[0], world.read(epilogue.found_nonfinite, 1)[0])
    });
    results.collect()
}

#[test]
fn sums_are_copied_before_they_are_rounded_and_their_squares_added_in_f64() {
    for algorithm in ALGORITHMS {
        for protocol in PROTOCOLS {
            let shape = Shape { channels: 2, protocol, threads: 64, ..Shape::new(3) };
            // Multiples of 1/64 below 5: all sums and squares are exact, and bf16 would lose bits of the sums.
            let value = |rank: usize, i: usize| bf16::from_f32(((rank * 31 + i * 7) % 61) as f32 / 64.0 + rank as f32);
            let operation = Operation::new(Collective::AllReduce, algorithm, 333);
            let wide: Vec<Vec<f32>> = inputs::<bf16>(&operation, 3, value)
                .iter()
                .map(|terms| terms.iter().map(|term| term.to_f32()).collect())
                .collect();
            let sums = reference::all_reduce(&wide, annulus::ReduceOp::Sum).unwrap();
            assert!(
                sums.iter().any(|sum| bf16::from_f32(*sum).to_f32() != *sum),
                "the test needs sums that bf16 rounds"
            );
            let mut begin = 0;
            for (rank, (copy, squares, nonfinite)) in run(3, algorithm, shape, value).into_iter().enumerate() {
                assert_eq!(copy, sums[begin..begin + copy.len()], "rank {rank}");
                assert_eq!(squares, copy.iter().map(|sum| f64::from(*sum).powi(2)).sum::<f64>(), "rank {rank}");
                assert_eq!(nonfinite, 0);
                begin += copy.len();
            }
            assert_eq!(begin, 333);
        }
    }
}

#[test]
fn one_nonfinite_sum_is_found_by_its_owner_alone() {
    let shape = Shape::new(2);
    for (spoiled, owner) in [(0, 0), (170, 0), (180, 1), (332, 1)] {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let value = |rank, i| bf16::from_f32(if rank == 1 && i == spoiled { bad } else { 1.0 });
            let found = run(2, Algorithm::Direct, shape, value);
            assert_eq!(found[owner].2, 1, "element {spoiled} is {bad}");
            assert_eq!(found[1 - owner].2, 0, "element {spoiled} is {bad}");
            assert!(!found[owner].1.is_finite());
        }
    }
    let found = run(2, Algorithm::Ring, shape, rough);
    assert!(found.iter().any(|found| found.2 == 1));
}
