//! Ranks that do not come, come late, or come with something else: what the others' fault records say.

use annulus::abi::collective::{Awaited, FaultRecord, Protocol, Reason};
use annulus::schedule::{Algorithm, Collective};
use annulus_vgpu::Options;

use super::trial::{inputs, rough};
use super::world::{Epilogue, Operation, Shape, World};
use super::{ALGORITHMS, PROTOCOLS, collectives, module};

/// Runs the given operations, rank by rank (`None`: the rank is not there), and returns each rank's first fault and buffer.
fn run(world: &mut World, operations: &[Option<Operation>]) -> Vec<(Option<FaultRecord>, Vec<f32>)> {
    let mut arguments = Vec::new();
    let mut buffers = Vec::new();
    for (rank, operation) in operations.iter().enumerate() {
        let Some(operation) = operation else { continue };
        let inputs = inputs::<f32>(operation, operations.len() as u32, rough);
        let buffer = world.alloc(&inputs[rank]);
        buffers.push((rank, buffer, inputs[rank].clone()));
        arguments.push(world.arguments::<f32>(operation, rank as u32, [buffer; 2], Epilogue::default()));
    }
    world.launch::<f32>(&module(), &arguments, &Options::default()).unwrap();
    let results = buffers.into_iter().map(|(rank, buffer, before)| {
        let after: Vec<f32> = world.read(buffer, before.len());
        let changed: Vec<f32> =
            before.iter().zip(&after).filter(|(a, b)| a.to_bits() != b.to_bits()).map(|(_, b)| *b).collect();
        (world.faults(rank).first().copied(), changed)
    });
    results.collect()
}

fn short(operation: Operation) -> Operation {
    Operation { timeout_ns: 400_000, ..operation }
}

#[test]
fn a_rank_that_never_comes_is_named() {
    for protocol in PROTOCOLS {
        for algorithm in ALGORITHMS {
            for collective in collectives(3) {
                let mut world = World::new(Shape { protocol, ..Shape::new(3) });
                let operation = short(Operation::new(collective, algorithm, 30));
                for (record, changed) in run(&mut world, &[Some(operation), None, Some(operation)]) {
                    let record = record.expect("a rank that waits for another gives up");
                    assert_eq!(Reason::from_code(record.reason), Some(Reason::Late), "{record:?}");
                    assert_eq!((record.peer, record.operation), (1, 1), "{record:?}");
                    assert_eq!(Awaited::from_code(record.awaited), Some(Awaited::Greeting), "{record:?}");
                    assert_eq!((record.expected, record.seen), (1, 0), "{record:?}");
                    assert!(changed.is_empty(), "{collective:?} by {algorithm:?} wrote before all had come");
                }
            }
        }
    }
}

#[test]
fn the_abort_word_ends_every_wait() {
    for protocol in PROTOCOLS {
        let mut world = World::new(Shape { protocol, ..Shape::new(2) });
        let abort = world.aborts[0];
        world.memory.write(abort, 4).unwrap().fill(1);
        let operation = Operation::new(Collective::AllReduce, Algorithm::Direct, 30);
        let outcome = run(&mut world, &[Some(operation), None]);
        let record = outcome[0].0.expect("an aborted rank says so");
        assert_eq!(Reason::from_code(record.reason), Some(Reason::Aborted), "{record:?}");
    }
}

#[test]
fn another_operation_is_found_by_all_before_any_output_is_written() {
    for protocol in PROTOCOLS {
        for algorithm in ALGORITHMS {
            for collective in collectives(4) {
                let mut world = World::new(Shape { protocol, channels: 2, ..Shape::new(4) });
                let operation = short(Operation::new(collective, algorithm, 60));
                let other = Operation { descriptor: 0xbad, len_elems: 120, ..operation };
                let outcome = run(&mut world, &[Some(operation), Some(operation), Some(other), Some(operation)]);
                for (rank, (record, changed)) in outcome.into_iter().enumerate() {
                    let record = record.unwrap_or_else(|| panic!("rank {rank} noticed nothing"));
                    assert_eq!(Reason::from_code(record.reason), Some(Reason::Mismatch), "{record:?}");
                    let hashes = if rank == 2 { (0xbad, 0x5eed) } else { (0x5eed, 0xbad) };
                    assert_eq!((record.expected, record.seen), hashes, "{record:?}");
                    assert_eq!(record.rank as usize, rank);
                    assert!(rank == 2 || record.peer == 2, "{record:?}");
                    assert!(changed.is_empty(), "rank {rank}");
                }
            }
        }
    }
}

#[test]
fn a_rank_lost_in_the_middle_is_named_by_those_who_wait_for_its_data() {
    for protocol in [Protocol::Bulk, Protocol::Words] {
        let mut world = World::new(Shape { protocol, ..Shape::new(3) });
        let operation = short(Operation::new(Collective::AllReduce, Algorithm::Ring, 3 * 64 * 6));
        // Rank 1 stops after one of six rounds.
        let mut arguments = Vec::new();
        for rank in 0..3 {
            let inputs = inputs::<f32>(&operation, 3, rough);
            let buffer = world.alloc(&inputs[rank as usize]);
            arguments.push(world.arguments::<f32>(&operation, rank, [buffer; 2], Epilogue::default()));
        }
        arguments[1].rounds = 1;
        world.launch::<f32>(&module(), &arguments, &Options::default()).unwrap();
        let record = *world.faults(2).first().expect("rank 2 waits for rank 1");
        assert_eq!((record.peer, Awaited::from_code(record.awaited)), (1, Some(Awaited::Data)), "{record:?}");
        assert_eq!((Reason::from_code(record.reason), record.round), (Some(Reason::Late), 1), "{record:?}");
        assert_eq!(record.expected, record.seen.wrapping_add(1), "{record:?}");
        assert!(world.faults(1).is_empty());
        // Whoever waits for the one that waits gives up, too; nobody hangs.
        assert!(!world.faults(0).is_empty());
    }
}

#[test]
fn a_group_of_one_waits_for_nobody() {
    let mut world = World::new(Shape::new(1));
    let operation = short(Operation::new(Collective::AllReduce, Algorithm::Direct, 30));
    assert_eq!(run(&mut world, &[Some(operation)])[0].0, None);
}
