//! Values that are not numbers, bits that must not differ, sizes at the limits.

use std::io::Write;

use annulus::collective::{CollectiveOptions, Communicator, Partials};
use annulus::device::{Arena, Buffer, Stream};
use annulus::schedule::Algorithm;
use annulus::{DType, Element, Error, ReduceOp};
use half::{bf16, f16};
use proptest::prelude::*;

use super::{PATIENCE, communicator, ranks, registered};

const OPS: [ReduceOp; 5] = [ReduceOp::Sum, ReduceOp::Avg, ReduceOp::Min, ReduceOp::Max, ReduceOp::PremulSum(0.5)];

/// `bad` on the last rank at each of `positions`, in turn: the result has it there, and only there, on every rank.
fn seen_everywhere<T: Element>(
    world_size: u32,
    len_elems: usize,
    ops: &[ReduceOp],
    options: &CollectiveOptions,
    is_registered: bool,
    positions: &[usize],
) {
    ranks(world_size, PATIENCE, |world, _| {
        let mut communicator = Communicator::new(world, options.clone()).unwrap();
        let stream = Stream::immediate("communication");
        let mut plain = vec![T::from_f64(2.0); len_elems];
        let mut buffer = is_registered.then(|| registered(world, &plain));
        let is_last = world.rank() == world.world_size() - 1;
        for &op in ops {
            for (bad, is_bad) in [
                (f64::NAN, (|value| f64::is_nan(value)) as fn(f64) -> bool),
                (f64::INFINITY, |value| value == f64::INFINITY),
            ] {
                if op == ReduceOp::Min && !bad.is_nan() {
                    continue; // the smallest is finite
                }
                for &position in positions {
                    let what = format!("{op} of {len_elems} x {}, {bad} at {position}", T::DTYPE);
                    let elements = match &mut buffer {
                        Some(buffer) => buffer.as_mut_slice::<T>().unwrap(),
                        None => &mut plain[..],
                    };
                    elements.fill(T::from_f64(2.0));
                    if is_last {
                        elements[position] = T::from_f64(bad);
                    }
                    let elements = match buffer.take() {
                        Some(taken) => {
                            let work = communicator.all_reduce(taken, op, &stream).unwrap();
                            buffer.insert(work.wait().unwrap()).as_slice::<T>().unwrap()
                        }
                        None => {
                            communicator.all_reduce_slice(&mut plain, op).unwrap();
                            &plain[..]
                        }
                    };
                    assert!(is_bad(elements[position].to_f64()), "{what}: {:?}", elements[position]);
                    let others = elements[..position].iter().chain(&elements[position + 1..]);
                    let bad = others.filter(|value| !value.to_f64().is_finite()).count();
                    assert_eq!(bad, 0, "{what}: elsewhere, too");
                }
            }
        }
    });
}

/// First and last elements of vectors, blocks and buffers, and some between.
fn edges(len_elems: usize) -> Vec<usize> {
    let mut edges: Vec<usize> = (0..len_elems).filter(|i| *i < 70 || len_elems - i <= 70 || i % 1_999 == 7).collect();
    edges.dedup();
    edges
}

#[test]
fn p14_one_nan_or_inf_at_any_position_of_a_small_buffer_is_seen_by_every_rank() {
    let (all, direct) = (|len: usize| (0..len).collect::<Vec<_>>(), CollectiveOptions::default());
    for len_elems in [1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 127, 130, 257] {
        seen_everywhere::<f32>(3, len_elems, &OPS, &direct, false, &all(len_elems));
        seen_everywhere::<bf16>(2, len_elems, &OPS, &direct, false, &all(len_elems));
        seen_everywhere::<f16>(2, len_elems, &OPS, &direct, false, &all(len_elems));
        seen_everywhere::<f64>(2, len_elems, &OPS[..2], &direct, false, &all(len_elems));
    }
}

#[test]
fn p14_every_position_of_4099_elements() {
    let (all, direct) = ((0..4_099).collect::<Vec<_>>(), CollectiveOptions::default());
    seen_everywhere::<f32>(2, 4_099, &OPS[1..2], &direct, true, &all);
    seen_everywhere::<bf16>(2, 4_099, &OPS[..1], &direct, false, &all);
}

#[test]
fn p14_on_every_path() {
    let ring = |partials| CollectiveOptions { algorithm: Some(Algorithm::Ring), partials, ..Default::default() };
    for len_elems in [40_007, 150_001] {
        let edges = edges(len_elems);
        for is_registered in [false, true] {
            let options = CollectiveOptions::default();
            seen_everywhere::<f32>(3, len_elems, &OPS[..1], &options, is_registered, &edges[..60]);
            seen_everywhere::<bf16>(2, len_elems, &OPS[1..2], &options, is_registered, &edges);
        }
        seen_everywhere::<f32>(3, len_elems, &OPS[..1], &ring(Partials::F32), false, &edges[60..120]);
        seen_everywhere::<f16>(2, len_elems, &OPS[1..2], &ring(Partials::F32), false, &edges);
        seen_everywhere::<bf16>(2, len_elems, &OPS[3..4], &ring(Partials::Native), true, &edges[..60]);
    }
}

/// FNV-1a.
fn hash(bytes: &[u8], seed: u64) -> u64 {
    bytes
        .iter()
        .fold(seed ^ 0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3))
}

/// Sums of these depend on the order of additions, and NaN of different payloads is among them.
fn bits<T: Element>(rank: u32, len_elems: usize) -> Vec<T> {
    let mut state = u64::from(rank) + 1;
    let mut elements: Vec<T> = vec![T::zeroed(); len_elems];
    for (i, element) in elements.iter_mut().enumerate() {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        if i % 41 == 5 {
            // Any bits at all.
            bytemuck::bytes_of_mut(element).copy_from_slice(&state.to_le_bytes()[8 - T::DTYPE.size_bytes()..]);
        } else {
            *element = T::from_f64(((state >> 20) as f64 / 2f64.powi(40) - 4.0) * f64::from(rank + 3));
        }
    }
    elements
}

/// One run: the hash of everything that every rank has got.
fn run<T: Element>(world_size: u32, options: &CollectiveOptions) -> Vec<Vec<u64>> {
    ranks(world_size, PATIENCE, |world, _| {
        let mut communicator = Communicator::new(world, options.clone()).unwrap();
        let stream = Stream::new("communication").unwrap();
        let mut hashes = Vec::new();
        for (index, len_elems) in [1, 66, 1_001, 9_973, 100_003].into_iter().enumerate() {
            for op in OPS.into_iter().filter(|op| op.check(T::DTYPE).is_ok()) {
                let mine = bits::<T>(world.rank(), len_elems);
                let mut slice = mine.clone();
                communicator.all_reduce_slice(&mut slice, op).unwrap();
                let work = communicator.all_reduce(registered(world, &mine), op, &stream).unwrap();
                let reduced = work.wait().unwrap();
                for elements in [&slice[..], reduced.as_slice::<T>().unwrap()] {
                    hashes.push(hash(bytemuck::cast_slice(elements), index as u64));
                }
                let mut shard = vec![T::zeroed(); len_elems];
                let whole: Vec<T> =
                    (0..world.world_size()).flat_map(|part| bits(world.rank() * 64 + part, len_elems)).collect();
                communicator.reduce_scatter_slice(&whole, &mut shard, op).unwrap();
                let mut gathered = vec![T::zeroed(); whole.len()];
                communicator.all_gather_slice(&shard, &mut gathered).unwrap();
                hashes.push(hash(bytemuck::cast_slice(&gathered), index as u64));
            }
        }
        hashes
    })
}

/// The same bits, NaN and all, on every rank of both of two runs.
fn reproducible<T: Element>(world_size: u32, options: &CollectiveOptions) {
    let (first, second) = (run::<T>(world_size, options), run::<T>(world_size, options));
    for (rank, hashes) in first.iter().chain(&second).enumerate() {
        assert_eq!(*hashes, first[0], "{} on rank {rank} of two runs of {world_size}", T::DTYPE);
    }
}

#[test]
fn p15_bits_are_the_same_on_every_rank_and_in_every_run() {
    let direct = CollectiveOptions::default();
    reproducible::<f32>(3, &direct);
    reproducible::<f64>(2, &direct);
    reproducible::<bf16>(4, &direct);
    reproducible::<f16>(3, &direct);
    reproducible::<i32>(2, &direct);
    reproducible::<i64>(3, &direct);
    reproducible::<u8>(2, &direct);
}

#[test]
fn p15_also_by_ring() {
    for partials in [Partials::F32, Partials::Native] {
        let ring = CollectiveOptions { algorithm: Some(Algorithm::Ring), partials, ..Default::default() };
        reproducible::<f32>(3, &ring);
        reproducible::<bf16>(4, &ring);
        reproducible::<f16>(2, &ring);
    }
}

/// Counts at which a product or a sum of 64 bits would wrap, and their neighbours.
fn extreme_counts() -> impl Strategy<Value = usize> {
    let limits = vec![
        usize::MAX,
        isize::MAX as usize,
        usize::MAX / 8,
        usize::MAX / 4,
        usize::MAX / 2,
        isize::MAX as usize / 8,
        isize::MAX as usize / 4,
    ];
    (prop::sample::select(limits), -70isize..70).prop_map(|(limit, by)| limit.saturating_add_signed(by))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn p20_buffers_that_no_machine_can_hold_are_refused(
        len_elems in extreme_counts(),
        dtype in prop::sample::select(DType::ALL.to_vec()),
    ) {
        let need_bytes = len_elems as u128 * dtype.size_bytes() as u128;
        match Buffer::zeroed(dtype, len_elems) {
            Err(Error::SizeOverflow { .. }) => prop_assert!(need_bytes > isize::MAX as u128),
            Err(Error::NoSpace { need_bytes: told, have_bytes, .. }) => {
                prop_assert_eq!(u128::from(told), need_bytes);
                prop_assert!(have_bytes > 0 && have_bytes < told);
            }
            other => prop_assert!(false, "{:?}", other),
        }
    }
}

#[test]
fn p20_the_arena_refuses_what_it_cannot_hold() {
    ranks(1, PATIENCE, |world, _| {
        let arena = Arena::new(world);
        proptest!(ProptestConfig::with_cases(200), |(
            len_elems in extreme_counts(),
            dtype in prop::sample::select(DType::ALL.to_vec()),
        )| {
            let error = arena.alloc(dtype, len_elems).unwrap_err();
            prop_assert!(matches!(error, Error::SizeOverflow { .. } | Error::NoSpace { .. }), "{:?}", error);
            prop_assert_eq!(arena.used_bytes(), 0);
        });
        assert_eq!(arena.alloc(DType::F64, 100).unwrap().len_elems(), 100, "and goes on");
    });
}

/// More than 2^31 elements: a 32-bit index anywhere would show.
#[test]
fn p20_more_elements_than_32_bits_count() {
    const LEN_ELEMS: usize = (1 << 31) + 12_345;
    let available_bytes = std::fs::read_to_string("/proc/meminfo")
        .unwrap()
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:")?.trim().strip_suffix(" kB")?.parse::<usize>().ok());
    if available_bytes.unwrap_or(0) << 10 < LEN_ELEMS + (2 << 30) {
        // To stderr itself: what is printed is shown for tests that fail, only.
        let _ = writeln!(std::io::stderr(), "skipped p20_more_elements_than_32_bits_count: 4 GiB are not free");
        return;
    }
    ranks(1, PATIENCE, |world, _| {
        let mut communicator = communicator(world);
        let stream = Stream::immediate("communication");
        let mut buffer = Buffer::zeroed(DType::U8, LEN_ELEMS).unwrap();
        let marks = [0, (1 << 31) - 1, 1 << 31, (1 << 31) + 1, LEN_ELEMS - 1];
        for (mark, value) in marks.into_iter().zip(1..) {
            buffer.as_mut_slice::<u8>().unwrap()[mark] = value;
        }
        let buffer = communicator.all_reduce(buffer, ReduceOp::Max, &stream).unwrap().wait().unwrap();
        let elements = buffer.as_slice::<u8>().unwrap();
        for (mark, value) in marks.into_iter().zip(1..) {
            assert_eq!(elements[mark], value, "at {mark}");
        }
    });
}
