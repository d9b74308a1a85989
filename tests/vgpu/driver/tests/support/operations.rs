//! Every operation of a communicator of devices, against the reference.

#![allow(dead_code, reason = "every test file uses a part of it")]

use annulus::collective::cuda::{Communicator, Options};
use annulus::schedule::{Algorithm, Collective, Schedule};
use annulus::{Element, ReduceOp, reference};
use half::{bf16, f16};

use super::ranks::{PATIENCE, Rank, inputs};

/// What every rank holds in the end, as the whole vector.
pub fn reduced<T: Element>(inputs: &[Vec<T>], op: ReduceOp, algorithm: Algorithm, collective: Collective) -> Vec<T> {
    let world_size = inputs.len() as u32;
    if algorithm == Algorithm::Direct {
        return reference::all_reduce(inputs, op).unwrap();
    }
    // A ring adds the shard of `owner` from rank owner + 1 on; shards begin on lines of 64 bytes.
    let align_elems = 64 / size_of::<T>();
    let schedule = Schedule::new(collective, algorithm, world_size, inputs[0].len(), 1, align_elems).unwrap();
    let shard_of = |owner: u32| {
        let shard = schedule.shard(owner);
        let first = (owner as usize + 1) % inputs.len();
        reference::all_reduce_from(inputs, op, first).unwrap()[shard.offset_elems..shard.end_elems()].to_vec()
    };
    (0..world_size).flat_map(shard_of).collect()
}

/// One rank's part of every operation on `len_elems` elements (shards of so many where there are shards), in place and out of
/// place, at every distance from a 16-byte boundary in turn.
pub fn every_operation<T: Element>(
    rank: &Rank,
    communicator: &mut Communicator,
    algorithm: Algorithm,
    len_elems: usize,
) {
    let (world_size, number, stream) = (rank.world.world_size() as usize, rank.number(), &rank.stream);
    let terms = inputs::<T>(world_size, len_elems);
    let wide = inputs::<T>(world_size, len_elems * world_size);
    let own = number * len_elems..(number + 1) * len_elems;
    let shift_elems = len_elems % 5;
    let label = |what: &str, op: ReduceOp| format!("{what} of {len_elems} x {}, {op}, {algorithm:?}", T::DTYPE);
    let all = [ReduceOp::Sum, ReduceOp::Avg, ReduceOp::Min, ReduceOp::Max, ReduceOp::PremulSum(0.3)];
    for op in all.into_iter().filter(|op| op.check(T::DTYPE).is_ok()) {
        let expected = reduced(&terms, op, algorithm, Collective::AllReduce);
        let in_place = rank.framed(&terms[number], shift_elems);
        communicator.all_reduce(&in_place.view, op, stream).unwrap();
        in_place.check(rank, &expected, &label("all_reduce", op));
        let (src, dst) = (rank.framed(&terms[number], shift_elems), rank.framed(&vec![T::zeroed(); len_elems], 1));
        communicator.all_reduce_into(&src.view, &dst.view, op, stream).unwrap();
        dst.check(rank, &expected, &label("all_reduce_into", op));
        src.check(rank, &terms[number], "the input of all_reduce_into");

        let expected = reduced(&wide, op, algorithm, Collective::ReduceScatter)[own.clone()].to_vec();
        let (src, dst) = (rank.framed(&wide[number], shift_elems), rank.framed(&vec![T::zeroed(); len_elems], 0));
        communicator.reduce_scatter(&src.view, &dst.view, op, stream).unwrap();
        dst.check(rank, &expected, &label("reduce_scatter", op));
        let shard = src.view.slice(own.start, len_elems).unwrap();
        communicator.reduce_scatter(&src.view, &shard, op, stream).unwrap();
        let mut whole = wide[number].clone();
        whole[own.clone()].copy_from_slice(&expected);
        src.check(rank, &whole, &label("reduce_scatter in place", op));
    }
    let gathered = terms.concat();
    let (src, dst) = (rank.framed(&terms[number], shift_elems), rank.framed(&vec![T::zeroed(); gathered.len()], 0));
    communicator.all_gather(&src.view, &dst.view, stream).unwrap();
    dst.check(rank, &gathered, &label("all_gather", ReduceOp::Sum));
    let in_place = rank.framed(&vec![T::zeroed(); gathered.len()], 2);
    let shard = in_place.view.slice(own.start, len_elems).unwrap();
    shard.write(&terms[number], stream).unwrap();
    communicator.all_gather(&shard, &in_place.view, stream).unwrap();
    in_place.check(rank, &gathered, &label("all_gather in place", ReduceOp::Sum));
    for root in 0..world_size {
        let buffer = rank.framed(&terms[number], shift_elems);
        communicator.broadcast(&buffer.view, root as u32, stream).unwrap();
        buffer.check(rank, &terms[root], &label("broadcast", ReduceOp::Sum));
    }
    communicator.barrier(stream).unwrap();
    communicator.synchronize(PATIENCE).unwrap();
}

pub fn every_dtype(rank: &Rank, options: &Options, len_elems: usize) {
    let algorithm = options.algorithm.unwrap_or(Algorithm::Direct);
    let communicator = &mut rank.communicator(options.clone());
    every_operation::<f32>(rank, communicator, algorithm, len_elems);
    every_operation::<f16>(rank, communicator, algorithm, len_elems);
    every_operation::<bf16>(rank, communicator, algorithm, len_elems);
    every_operation::<f64>(rank, communicator, algorithm, len_elems);
    every_operation::<i32>(rank, communicator, algorithm, len_elems);
    every_operation::<i64>(rank, communicator, algorithm, len_elems);
    every_operation::<u8>(rank, communicator, algorithm, len_elems);
}

pub fn ring() -> Options {
    Options { algorithm: Some(Algorithm::Ring), ..Options::default() }
}
