//! What a large all-reduce costs, as far as it can be known without a GPU: bytes, memory transactions and instructions of all
//! ranks together, beside the least that its schedule moves.
//!
//!     cargo test -p annulus-vgpu --test collective counts -- --nocapture

use annulus::abi::collective::{NOBODY, Source, Step, steps};
use annulus::schedule::{Algorithm, Collective, Schedule};
use annulus::{Element, ReduceOp};
use annulus_vgpu::{Module, Options};
use half::bf16;

use super::module;
use super::trial::inputs;
use super::world::{Epilogue, Operation, Shape, World};

const LEN_ELEMS: usize = 1 << 16;

/// Bytes that `step` reads and writes for an element of its chunk: the own term or result, what was received, what is kept
/// and what is sent. Partial sums of 16-bit floats travel in f32.
fn step_bytes<T: Element>(step: &Step, world_size: u32) -> usize {
    let (own, partial) = (size_of::<T>(), if T::DTYPE.is_half() { 4 } else { size_of::<T>() });
    let is = |source: Source| step.source == source as u8;
    let read = if is(Source::Partial) || is(Source::Finish) {
        own + partial
    } else if is(Source::All) {
        own * world_size as usize
    } else {
        own
    };
    let travels = if is(Source::Start) || is(Source::Partial) { partial } else { own };
    let sent = if step.send_peer == NOBODY { 0 } else { travels };
    read + sent + usize::from(step.to_output) * own
}

/// The same of all steps of all ranks, an element of the vector.
fn least_bytes<T: Element>(schedule: &Schedule) -> f64 {
    let world_size = schedule.world_size();
    let all = (0..world_size).flat_map(|rank| steps(schedule, rank));
    let bytes: usize =
        all.map(|step| step_bytes::<T>(&step, world_size) * schedule.shard(step.chunk.into()).len_elems).sum();
    bytes as f64 / schedule.len_elems() as f64
}

fn count<T: Element>(module: &Module, world_size: u32, algorithm: Algorithm) {
    let shape = Shape { channels: 2, slot_bytes: (8192 + 16) * 4, threads: 128, ..Shape::new(world_size) };
    let operation = Operation {
        round_elems: 2 * 8192,
        op: ReduceOp::Sum,
        ..Operation::new(Collective::AllReduce, algorithm, LEN_ELEMS)
    };
    let mut world = World::new(shape);
    let terms = inputs::<T>(&operation, world_size, |rank, i| T::from_f64((rank + i % 7) as f64));
    let mut arguments = Vec::new();
    for rank in 0..world_size {
        let buffer = world.alloc(&terms[rank as usize]);
        arguments.push(world.arguments::<T>(&operation, rank, [buffer; 2], Epilogue::default()));
    }
    let options = Options { detect_races: false, counts_sectors: true, ..Options::default() };
    let report = world.launch::<T>(module, &arguments, &options).unwrap();
    assert!((0..world_size as usize).all(|rank| world.faults(rank).is_empty()));

    let least = least_bytes::<T>(&operation.schedule(world_size));
    let each = |count: u64| count as f64 / LEN_ELEMS as f64;
    let (loaded, stored) = (each(report.loaded_bytes), each(report.stored_bytes));
    let transactions = 32.0 * each(report.loaded_sectors + report.stored_sectors);
    println!(
        "| {algorithm:?} | {world_size} | {} | {least:.0} | {loaded:.2} + {stored:.2} | {:.3} | {:.3} | {:.1} |",
        T::DTYPE,
        (loaded + stored) / least,
        transactions / least,
        each(report.instructions)
    );
    assert!(loaded + stored >= least, "{loaded} + {stored} bytes, and {least} are needed");
    // Flags that are waited for, step tables, links.
    assert!(loaded + stored <= 1.05 * least, "{loaded} + {stored} bytes, and {least} would do");
    // A thread's eight partial sums are two accesses of 16 bytes, each half of a sector.
    let halves = algorithm == Algorithm::Ring && T::DTYPE.is_half();
    let most = if halves { 1.5 } else { 1.05 };
    assert!(transactions <= most * least, "transactions of {transactions} bytes, and {least} would do");
}

#[test]
fn counts_of_a_large_all_reduce_are_those_of_its_schedule() {
    let module = module();
    println!("| algorithm | ranks | dtype | least B | loaded + stored B | of least | transactions | instructions |");
    println!("|---|---:|---|---:|---:|---:|---:|---:|");
    for algorithm in [Algorithm::Direct, Algorithm::Ring] {
        for world_size in [2, 4] {
            count::<f32>(&module, world_size, algorithm);
            count::<bf16>(&module, world_size, algorithm);
        }
    }
}
