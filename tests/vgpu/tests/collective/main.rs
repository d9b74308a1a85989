//! `kernels/collective.cu` on several virtual devices at once, under the race detector, against `annulus::reference`.

mod counts;
mod far;
mod faults;
mod mutants;
mod owner;
mod steps;
mod trial;
mod world;

use annulus::abi::collective::Protocol;
use annulus::schedule::{Algorithm, Collective};
use annulus::{Element, ReduceOp};
use annulus_vgpu::{Module, Options};
use half::{bf16, f16};

use trial::{Failure, inputs, native_ring, reductions, rough, same_as, trial};
use world::{Operation, Shape, World};

const ALGORITHMS: [Algorithm; 2] = [Algorithm::Direct, Algorithm::Ring];
const PROTOCOLS: [Protocol; 2] = [Protocol::Bulk, Protocol::Words];

fn module() -> Module {
    Module::parse(annulus::kernels::COLLECTIVE).unwrap()
}

fn collectives(world_size: u32) -> [Collective; 4] {
    let root = world_size - 1;
    [Collective::AllReduce, Collective::ReduceScatter, Collective::AllGather, Collective::Broadcast { root }]
}

fn seeded(seed: u64) -> Options {
    Options { seed, ..Options::default() }
}

/// Calls a function for each element type.
macro_rules! of_every_type {
    ($check:ident, $module:expr) => {
        $check::<f32>($module);
        $check::<f16>($module);
        $check::<bf16>($module);
        $check::<f64>($module);
        $check::<i32>($module);
        $check::<i64>($module);
        $check::<u8>($module);
    };
}

/// An all-reduce that goes to everybody at once.
fn one_step(len_elems: usize) -> Operation {
    Operation { one_step: true, ..Operation::new(Collective::AllReduce, Algorithm::Direct, len_elems) }
}

#[track_caller]
fn check<T: Element>(module: &Module, shape: Shape, operation: &Operation, seed: u64) {
    let inputs = inputs::<T>(operation, shape.world_size, rough);
    let outcome = trial(&mut World::new(shape), module, operation, &inputs, &seeded(seed), false);
    outcome.unwrap_or_else(|failure| panic!("{shape:?} {operation:?} of {}, seed {seed}: {failure}", T::DTYPE));
}

#[test]
fn every_element_type_and_reduction_by_every_algorithm_and_protocol() {
    fn check_type<T: Element>(module: &Module) {
        for op in reductions::<T>() {
            for algorithm in ALGORITHMS {
                for protocol in PROTOCOLS {
                    let shape = Shape { slot_bytes: 1024, protocol, ..Shape::new(3) };
                    let operation =
                        Operation { op, round_elems: 48, ..Operation::new(Collective::AllReduce, algorithm, 157) };
                    check::<T>(module, shape, &operation, 1);
                }
            }
        }
    }
    let module = module();
    of_every_type!(check_type, &module);
}

#[test]
fn one_step_gives_the_bits_of_direct_for_every_type_world_and_length() {
    fn check_type<T: Element>(module: &Module) {
        let mut seed = 0;
        for op in reductions::<T>() {
            for in_place in [true, false] {
                seed += 1;
                let shape = Shape { slot_bytes: 1024, protocol: Protocol::Words, ..Shape::new(3) };
                let operation = Operation { op, in_place, round_elems: 48, shift_elems: 1, ..one_step(157) };
                check::<T>(module, shape, &operation, seed);
            }
        }
    }
    let module = module();
    of_every_type!(check_type, &module);
    for (seed, world_size) in (0..).zip([2, 4, 5, 8]) {
        for len_elems in [1, 403] {
            let (slots, protocol) = (2 + seed as u32 % 2, Protocol::Words);
            let shape = Shape { channels: 3, slots, protocol, threads: 64, ..Shape::new(world_size) };
            check::<f32>(&module, shape, &one_step(len_elems), seed);
        }
    }
}

#[test]
fn every_collective_of_any_length_on_worlds_of_any_size() {
    let module = module();
    let mut seed = 0;
    for world_size in [1, 2, 3, 4, 8] {
        for collective in collectives(world_size) {
            for algorithm in ALGORITHMS {
                for (protocol, in_place) in [(Protocol::Bulk, false), (Protocol::Words, true)] {
                    for len_elems in [0, 1, 2, 41, 101, 257].into_iter().take(if world_size == 8 { 4 } else { 6 }) {
                        let needs_shards = matches!(collective, Collective::ReduceScatter | Collective::AllGather);
                        let len_elems = if needs_shards { len_elems * world_size as usize } else { len_elems };
                        seed += 1;
                        let shape = Shape { protocol, slot_bytes: 1024, ..Shape::new(world_size) };
                        let operation = Operation { in_place, ..Operation::new(collective, algorithm, len_elems) };
                        check::<bf16>(&module, shape, &operation, seed);
                    }
                }
            }
        }
    }
}

#[test]
fn buffers_at_any_alignment_and_long_pieces() {
    let module = module();
    for collective in collectives(2) {
        for algorithm in ALGORITHMS {
            for shift_elems in [0, 1, 3] {
                for in_place in [false, true] {
                    let shape = Shape { slot_bytes: 16 << 10, ..Shape::new(2) };
                    let len_elems = if shift_elems == 0 { 2 * 2099 } else { 2 * 331 };
                    let operation = Operation {
                        shift_elems,
                        in_place,
                        round_elems: 1600,
                        ..Operation::new(collective, algorithm, len_elems)
                    };
                    check::<f32>(&module, shape, &operation, 7);
                    check::<u8>(&module, shape, &operation, 8);
                }
            }
        }
    }
}

#[test]
fn several_channels_and_slots_under_many_interleavings() {
    let module = module();
    for seed in 0..6 {
        for algorithm in ALGORITHMS {
            for protocol in PROTOCOLS {
                let slots = 2 + seed as u32 % 3;
                let threads = 32 + 32 * (seed as u32 % 2);
                let shape = Shape { channels: 3, slots, protocol, slot_bytes: 1024, threads, ..Shape::new(4) };
                let operation = Operation::new(Collective::AllReduce, algorithm, 499);
                check::<f32>(&module, shape, &operation, seed);
            }
        }
    }
}

#[test]
fn native_partials_are_rounded_at_every_hop() {
    let module = module();
    for protocol in PROTOCOLS {
        let shape = Shape { protocol, ..Shape::new(4) };
        let operation =
            Operation { native_partials: true, ..Operation::new(Collective::AllReduce, Algorithm::Ring, 203) };
        let inputs = inputs::<f16>(&operation, 4, rough);
        let expected = native_ring(&operation.schedule(4), &inputs);
        let mut world = World::new(shape);
        same_as(&mut world, &module, &operation, &inputs, &expected).unwrap();
    }
}

#[test]
fn one_group_runs_operation_after_operation() {
    let module = module();
    for protocol in PROTOCOLS {
        let mut world = World::new(Shape { channels: 2, protocol, ..Shape::new(3) });
        // Counters pass the end of their circle in the middle.
        world.set_generation(u32::MAX - 5);
        for (i, collective) in collectives(3).into_iter().cycle().take(12).enumerate() {
            let operation = Operation {
                descriptor: i as u32,
                in_place: i % 2 == 0,
                ..Operation::new(collective, ALGORITHMS[i / 4 % 2], 3 * (50 + 30 * (i % 5)))
            };
            // Among the others, on the same links.
            let is_one_step = (collective, operation.algorithm, protocol)
                == (Collective::AllReduce, Algorithm::Direct, Protocol::Words);
            let operation = Operation { one_step: is_one_step, ..operation };
            let inputs = inputs::<f32>(&operation, 3, rough);
            let outcome = trial(&mut world, &module, &operation, &inputs, &seeded(i as u64), i % 3 == 0);
            outcome.unwrap_or_else(|failure| panic!("operation {i}, {protocol:?}: {failure}"));
        }
    }
}

#[test]
fn all_ranks_in_one_grid() {
    let module = module();
    for world_size in [2, 4, 8] {
        for algorithm in ALGORITHMS {
            let mut world = World::new(Shape { channels: 2, ..Shape::new(world_size) });
            let operation = Operation::new(Collective::AllReduce, algorithm, 611);
            let inputs = inputs::<bf16>(&operation, world_size, rough);
            trial(&mut world, &module, &operation, &inputs, &seeded(3), true).unwrap();
        }
    }
}

#[test]
fn the_order_of_the_sum_does_not_depend_on_rounds_channels_or_protocol() {
    // `rough` values: any other order gives other bits somewhere, so equality with the reference says it all.
    let module = module();
    for (channels, round_elems) in [(1, 16), (2, 33), (3, 100)] {
        for protocol in PROTOCOLS {
            let shape = Shape { channels, protocol, slot_bytes: 2048, ..Shape::new(4) };
            let operation = Operation { round_elems, ..Operation::new(Collective::AllReduce, Algorithm::Direct, 300) };
            check::<f32>(&module, shape, &operation, 5);
        }
    }
}

#[test]
fn one_slot_is_a_deadlock_in_a_ring() {
    let module = module();
    let mut world = World::new(Shape { slots: 1, ..Shape::new(3) });
    let operation = Operation { timeout_ns: 300_000, ..Operation::new(Collective::AllReduce, Algorithm::Ring, 300) };
    let inputs = inputs::<f32>(&operation, 3, rough);
    let outcome = trial(&mut world, &module, &operation, &inputs, &Options::default(), false);
    assert!(matches!(&outcome, Err(Failure::GaveUp(..))), "{outcome:?}");
}

#[test]
fn reductions_are_those_of_the_type() {
    assert_eq!(reductions::<i32>(), [ReduceOp::Sum, ReduceOp::Min, ReduceOp::Max]);
    assert_eq!(reductions::<f16>().len(), 5);
}
