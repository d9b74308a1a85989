//! Every collective against `reference`: operations, dtypes, counts, placement, algorithms; bit for bit.
#![cfg(not(loom))]

use std::time::Duration;

use annulus::collective::{CollectiveOptions, Communicator, Partials};
use annulus::device::{Buffer, Stream};
use annulus::schedule::Algorithm;
use annulus::world::{World, WorldOptions, launch};
use annulus::{DType, Element, Error, ReduceOp, reference};
use half::{bf16, f16};

const PATIENCE: Duration = Duration::from_secs(60);

/// Runs `body` on `world_size` ranks that are threads, each with its own mappings.
fn ranks<T: Send>(world_size: u32, body: impl Fn(&World, &mut Communicator) -> T + Sync) -> Vec<T> {
    ranks_with(world_size, CollectiveOptions::default(), body)
}

fn ranks_with<T: Send>(
    world_size: u32,
    options: CollectiveOptions,
    body: impl Fn(&World, &mut Communicator) -> T + Sync,
) -> Vec<T> {
    launch::threads(world_size, |environment| {
        let world = World::join(environment, WorldOptions { timeout: PATIENCE, ..WorldOptions::default() }).unwrap();
        let mut communicator = Communicator::new(&world, options.clone()).unwrap();
        let result = body(&world, &mut communicator);
        drop(communicator);
        world.teardown(PATIENCE).unwrap();
        result
    })
    .unwrap()
}

/// Values whose sums differ with the order of additions, with all the odd ones in between.
fn input<T: Element>(rank: u32, len_elems: usize) -> Vec<T> {
    let odd = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, -0.0, 0.0, 1e-40, 65504.0, 3.4e38];
    (0..len_elems)
        .map(|i| {
            let hash = (i as u64 * 64 + u64::from(rank)).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40;
            let plain = (hash as f64 / 8192.0 - 1024.0) * (1.0 + f64::from(rank) * 1e-3);
            T::from_f64(if i % 61 == 7 && T::DTYPE.is_float() { odd[hash as usize % odd.len()] } else { plain })
        })
        .collect()
}

/// Bit equality, but any NaN equals any NaN.
fn first_difference<T: Element>(actual: &[T], expected: &[T]) -> Option<usize> {
    let differ = |(a, e): (&T, &T)| {
        bytemuck::bytes_of(a) != bytemuck::bytes_of(e) && !(a.to_f64().is_nan() && e.to_f64().is_nan())
    };
    actual.iter().zip(expected).position(differ)
}

fn is_same<T: Element>(actual: &[T], expected: &[T]) -> bool {
    actual.len() == expected.len() && first_difference(actual, expected).is_none()
}

fn assert_same<T: Element>(what: &str, actual: &[T], expected: &[T]) {
    assert_eq!(actual.len(), expected.len(), "{what}");
    if let Some(i) = first_difference(actual, expected) {
        panic!("{what}: element {i} is {:?}, expected {:?}", actual[i], expected[i]);
    }
}

const COUNTS: [usize; 9] = [0, 1, 2, 3, 63, 257, 4099, 20_011, 150_001];

fn ops(dtype: DType) -> Vec<ReduceOp> {
    let all = [ReduceOp::Sum, ReduceOp::Avg, ReduceOp::Min, ReduceOp::Max, ReduceOp::PremulSum(0.7)];
    all.into_iter().filter(|op| op.check(dtype).is_ok()).collect()
}

fn all_reduce_matches<T: Element>(world_size: u32, options: &CollectiveOptions) {
    let counts = COUNTS;
    let results = ranks_with(world_size, options.clone(), |world, communicator| {
        let stream = Stream::new("communication").unwrap();
        let arena = annulus::device::Arena::new(world);
        let mut results = Vec::new();
        for count in counts {
            for op in ops(T::DTYPE) {
                let mine = input::<T>(world.rank(), count);
                let private = Buffer::from_slice(&mine).unwrap();
                let mut registered = arena.alloc(T::DTYPE, count).unwrap();
                registered.as_mut_slice::<T>().unwrap().copy_from_slice(&mine);
                let mut slice = mine.clone();
                communicator.all_reduce_slice(&mut slice, op).unwrap();
                let private = communicator.all_reduce(private, op, &stream).unwrap();
                let registered = communicator.all_reduce(registered, op, &stream).unwrap();
                let (src, dst) = (Buffer::from_slice(&mine).unwrap(), Buffer::zeroed(T::DTYPE, count).unwrap());
                let apart = communicator.all_reduce_into(src, dst, op, &stream).unwrap();
                let mut src = arena.alloc(T::DTYPE, count).unwrap();
                src.as_mut_slice::<T>().unwrap().copy_from_slice(&mine);
                let dst = arena.alloc(T::DTYPE, count).unwrap();
                let registered_apart = communicator.all_reduce_into(src, dst, op, &stream).unwrap();
                let (src, dst) = apart.wait().unwrap();
                assert_same("source", src.as_slice::<T>().unwrap(), &mine);
                let (registered_src, registered_dst) = registered_apart.wait().unwrap();
                assert_same("registered source", registered_src.as_slice::<T>().unwrap(), &mine);
                let forms = [
                    ("slice", slice),
                    ("private", private.wait().unwrap().as_slice::<T>().unwrap().to_vec()),
                    ("registered", registered.wait().unwrap().as_slice::<T>().unwrap().to_vec()),
                    ("private, apart", dst.as_slice::<T>().unwrap().to_vec()),
                    ("registered, apart", registered_dst.as_slice::<T>().unwrap().to_vec()),
                ];
                results.push((count, op, forms));
            }
        }
        results
    });
    for at in 0..results[0].len() {
        let (count, op, _) = results[0][at];
        let inputs: Vec<Vec<T>> = (0..world_size).map(|rank| input::<T>(rank, count)).collect();
        let expected = Expected::of(&inputs, op, options);
        for (rank, results) in results.iter().enumerate() {
            for (form, actual) in &results[at].2 {
                expected
                    .check(&format!("{form} {op} of {count} x {} on rank {rank} of {world_size}", T::DTYPE), actual);
            }
        }
    }
}

/// Payload of one step is added in rank order, whatever is asked; no more than so much goes in one step.
const MOST_ONE_STEP_BYTES: usize = 256 << 10;

/// What an all-reduce may give.
struct Expected<T> {
    in_rank_order: Vec<T>,
    /// Where a ring was asked for and the order of the terms shows.
    in_ring_order: Option<Vec<T>>,
}

impl<T: Element> Expected<T> {
    fn of(inputs: &[Vec<T>], op: ReduceOp, options: &CollectiveOptions) -> Expected<T> {
        let shows_order = T::DTYPE.is_float() && !matches!(op, ReduceOp::Min | ReduceOp::Max);
        let is_ring = options.algorithm == Some(Algorithm::Ring) && shows_order;
        Expected {
            in_rank_order: reference::all_reduce(inputs, op).unwrap(),
            in_ring_order: is_ring.then(|| in_ring_order(inputs, op, options.partials)),
        }
    }

    fn check(&self, what: &str, actual: &[T]) {
        match &self.in_ring_order {
            None => assert_same(what, actual, &self.in_rank_order),
            // All of it in one order: halves of both would be no algorithm's.
            Some(_) if size_of_val(actual) <= MOST_ONE_STEP_BYTES && is_same(actual, &self.in_rank_order) => {}
            Some(in_ring_order) => assert_same(&format!("by ring, {what}"), actual, in_ring_order),
        }
    }
}

/// The ring's order: the shard of `owner` is added from `owner + 1` on.
fn in_ring_order<T: Element>(inputs: &[Vec<T>], op: ReduceOp, partials: Partials) -> Vec<T> {
    use annulus::schedule::{Collective, Schedule};
    let (world_size, len_elems) = (inputs.len() as u32, inputs[0].len());
    let align = 64 / T::DTYPE.size_bytes();
    let plan = Schedule::new(Collective::AllReduce, Algorithm::Ring, world_size, len_elems, 1, align).unwrap();
    let mut whole = vec![T::zeroed(); len_elems];
    for owner in 0..world_size {
        let shard = plan.shard(owner);
        let range = shard.offset_elems..shard.end_elems();
        let pieces: Vec<&[T]> = inputs.iter().map(|input| &input[range.clone()]).collect();
        whole[range].copy_from_slice(&shard_of_ring(&pieces, op, owner as usize, partials));
    }
    whole
}

fn shard_of_ring<T: Element>(pieces: &[&[T]], op: ReduceOp, owner: usize, partials: Partials) -> Vec<T> {
    let first = (owner + 1) % pieces.len();
    match partials {
        Partials::F32 => reference::all_reduce_from(pieces, op, first).unwrap(),
        Partials::Native => {
            let mut sum = pieces[first].to_vec();
            for k in 1..pieces.len() {
                let next = pieces[(first + k) % pieces.len()];
                sum = reference::all_reduce(&[sum.as_slice(), next], op).unwrap();
            }
            sum
        }
    }
}

#[test]
fn all_reduce_f32() {
    for world_size in [1, 2, 3, 4, 7] {
        all_reduce_matches::<f32>(world_size, &CollectiveOptions::default());
    }
}

#[test]
fn all_reduce_16_bit_floats() {
    all_reduce_matches::<bf16>(3, &CollectiveOptions::default());
    all_reduce_matches::<f16>(2, &CollectiveOptions::default());
}

#[test]
fn all_reduce_other_dtypes() {
    all_reduce_matches::<f64>(3, &CollectiveOptions::default());
    all_reduce_matches::<i32>(2, &CollectiveOptions::default());
    all_reduce_matches::<i64>(4, &CollectiveOptions::default());
    all_reduce_matches::<u8>(3, &CollectiveOptions::default());
}

#[test]
fn all_reduce_by_ring_adds_in_the_rings_order() {
    let ring = CollectiveOptions { algorithm: Some(Algorithm::Ring), ..CollectiveOptions::default() };
    for world_size in [1, 2, 4] {
        all_reduce_matches::<f32>(world_size, &ring);
    }
    all_reduce_matches::<bf16>(3, &ring);
    all_reduce_matches::<f16>(3, &ring);
    all_reduce_matches::<i32>(3, &ring);
}

/// Native partials round at every hop; sum only, because the reference of a hop is a sum of two.
#[test]
fn a_ring_of_native_partials_rounds_at_every_hop() {
    let options = CollectiveOptions {
        algorithm: Some(Algorithm::Ring),
        partials: Partials::Native,
        ..CollectiveOptions::default()
    };
    let count = 50_021;
    let results = ranks_with(3, options, |world, communicator| {
        let mut mine = input::<bf16>(world.rank(), count);
        communicator.all_reduce_slice(&mut mine, ReduceOp::Sum).unwrap();
        mine
    });
    let inputs: Vec<Vec<bf16>> = (0..3).map(|rank| input(rank, count)).collect();
    let expected = in_ring_order(&inputs, ReduceOp::Sum, Partials::Native);
    for actual in &results {
        assert_same("native partials", actual, &expected);
    }
    let rounded_once = reference::all_reduce(&inputs, ReduceOp::Sum).unwrap();
    let differ = |(a, b): (&bf16, &bf16)| !a.is_nan() && a.to_bits() != b.to_bits();
    assert!(results[0].iter().zip(&rounded_once).any(differ), "the test cannot tell the two apart");
}

fn scatter_gather_broadcast<T: Element>(world_size: u32, options: &CollectiveOptions) {
    for shard in [0, 1, 5, 1021, 33_333] {
        let whole = shard * world_size as usize;
        let root = world_size - 1;
        let inputs: Vec<Vec<T>> = (0..world_size).map(|rank| input(rank, whole)).collect();
        let summed = |owner: usize| {
            let range = owner * shard..(owner + 1) * shard;
            let pieces: Vec<&[T]> = inputs.iter().map(|input| &input[range.clone()]).collect();
            let is_ring = options.algorithm == Some(Algorithm::Ring);
            Expected {
                in_rank_order: reference::all_reduce(&pieces, ReduceOp::Sum).unwrap(),
                in_ring_order: is_ring.then(|| shard_of_ring(&pieces, ReduceOp::Sum, owner, options.partials)),
            }
        };
        let smallest = reference::reduce_scatter(&inputs, ReduceOp::Min).unwrap();
        let shards: Vec<&[T]> = inputs.iter().map(|input| &input[..shard]).collect();
        let gathered = reference::all_gather(&shards).unwrap();
        let sent = reference::broadcast(&inputs, root as usize).unwrap();
        ranks_with(world_size, options.clone(), |world, communicator| {
            let (rank, stream) = (world.rank() as usize, Stream::new("communication").unwrap());
            let arena = annulus::device::Arena::new(world);
            for registered in [false, true] {
                let make = |elements: &[T]| {
                    if !registered {
                        return Buffer::from_slice(elements).unwrap();
                    }
                    let mut buffer = arena.alloc(T::DTYPE, elements.len()).unwrap();
                    buffer.as_mut_slice::<T>().unwrap().copy_from_slice(elements);
                    buffer
                };
                let zero = |len: usize| make(&vec![T::zeroed(); len]);
                let what = format!("shards of {shard} x {} on rank {rank}, registered {registered}", T::DTYPE);
                let (_, dst) = communicator
                    .reduce_scatter(make(&inputs[rank]), zero(shard), ReduceOp::Min, &stream)
                    .unwrap()
                    .wait()
                    .unwrap();
                assert_same(&what, dst.as_slice().unwrap(), &smallest[rank]);
                let in_place = communicator
                    .reduce_scatter_in_place(make(&inputs[rank]), ReduceOp::Min, &stream)
                    .unwrap()
                    .wait()
                    .unwrap();
                let mut expected = inputs[rank].clone();
                expected[rank * shard..(rank + 1) * shard].copy_from_slice(&smallest[rank]);
                assert_same(&format!("in place, {what}"), in_place.as_slice().unwrap(), &expected);
                let work =
                    communicator.reduce_scatter(make(&inputs[rank]), zero(shard), ReduceOp::Sum, &stream).unwrap();
                summed(rank).check(&format!("sum, {what}"), work.wait().unwrap().1.as_slice().unwrap());
                let (src, dst) =
                    communicator.all_gather(make(shards[rank]), zero(whole), &stream).unwrap().wait().unwrap();
                assert_same(&what, src.as_slice().unwrap(), shards[rank]);
                assert_same(&format!("all_gather, {what}"), dst.as_slice().unwrap(), &gathered);
                let mut own = vec![T::zeroed(); whole];
                own[rank * shard..(rank + 1) * shard].copy_from_slice(shards[rank]);
                let in_place = communicator.all_gather_in_place(make(&own), &stream).unwrap().wait().unwrap();
                assert_same(&format!("all_gather in place, {what}"), in_place.as_slice().unwrap(), &gathered);
                let broadcast = communicator.broadcast(make(&inputs[rank]), root, &stream).unwrap().wait().unwrap();
                assert_same(&format!("broadcast, {what}"), broadcast.as_slice().unwrap(), &sent);
            }
            communicator.barrier(&stream).unwrap().wait().unwrap();
            communicator.barrier_now().unwrap();
        });
    }
}

#[test]
fn reduce_scatter_all_gather_and_broadcast() {
    for world_size in [1, 2, 4] {
        scatter_gather_broadcast::<f32>(world_size, &CollectiveOptions::default());
    }
    scatter_gather_broadcast::<bf16>(3, &CollectiveOptions::default());
    scatter_gather_broadcast::<u8>(3, &CollectiveOptions::default());
}

#[test]
fn reduce_scatter_all_gather_and_broadcast_by_ring() {
    let ring = CollectiveOptions { algorithm: Some(Algorithm::Ring), ..CollectiveOptions::default() };
    scatter_gather_broadcast::<f32>(3, &ring);
    scatter_gather_broadcast::<bf16>(2, &ring);
}

/// The bits of an element do not depend on the message it is part of: slicing a vector changes nothing.
#[test]
fn bits_do_not_depend_on_the_size_of_the_message() {
    let count = 100_003;
    let results = ranks(3, |world, communicator| {
        let mine = input::<f32>(world.rank(), count);
        let (mut whole, mut sliced) = (mine.clone(), mine);
        communicator.all_reduce_slice(&mut whole, ReduceOp::Sum).unwrap();
        for piece in sliced.chunks_mut(997) {
            communicator.all_reduce_slice(piece, ReduceOp::Sum).unwrap();
        }
        (whole, sliced)
    });
    for (whole, sliced) in &results {
        assert_same("sliced", sliced, whole);
        assert_same("across ranks", whole, &results[0].0);
    }
}

#[test]
fn unaligned_slices_and_their_surroundings() {
    for count in [1, 7, 64, 1000, 30_001] {
        let inputs: Vec<Vec<f32>> = (0..2).map(|rank| input(rank, count)).collect();
        let expected = reference::all_reduce(&inputs, ReduceOp::Max).unwrap();
        ranks(2, |world, communicator| {
            for shift in [1, 3] {
                let mut memory = vec![7.25f32; count + 8];
                memory[shift..shift + count].copy_from_slice(&inputs[world.rank() as usize]);
                communicator.all_reduce_slice(&mut memory[shift..shift + count], ReduceOp::Max).unwrap();
                assert_same("unaligned", &memory[shift..shift + count], &expected);
                assert!(memory[..shift].iter().chain(&memory[shift + count..]).all(|value| *value == 7.25));
            }
        });
    }
}

#[test]
fn operations_on_two_streams_run_in_the_order_of_issue() {
    let count = 300_000;
    let results = ranks(2, |world, communicator| {
        let (first, second) = (Stream::new("first").unwrap(), Stream::new("second").unwrap());
        // The first stream is busy, so without the edge the second operation would overtake.
        let delay = Duration::from_millis(20 * u64::from(world.rank()));
        first.enqueue(move || std::thread::sleep(delay)).unwrap();
        let ones = Buffer::from_slice(&vec![1.0f32; count]).unwrap();
        let one = communicator.all_reduce(ones, ReduceOp::Sum, &first).unwrap();
        let twos = Buffer::from_slice(&[2.0f32; 10]).unwrap();
        let two = communicator.all_reduce(twos, ReduceOp::Sum, &second).unwrap();
        let (two, one) = (two.wait().unwrap(), one.wait().unwrap());
        (one.as_slice::<f32>().unwrap()[count - 1], two.as_slice::<f32>().unwrap()[9])
    });
    assert_eq!(results, [(2.0, 4.0), (2.0, 4.0)]);
}

#[test]
fn subgroups_reduce_among_themselves_and_are_given_back() {
    let sums = ranks(4, |world, communicator| {
        let mut sums = Vec::new();
        // More splits than there are group areas: the areas must come back.
        for _ in 0..20 {
            let mut half = communicator.split(Some(world.rank() % 2), 10 - world.rank()).unwrap().unwrap();
            assert_eq!(half.world_size(), 2);
            assert_eq!(half.rank(), 1 - world.rank() / 2, "a smaller key comes first");
            let mut value = [f64::from(world.rank()); 3];
            half.all_reduce_slice(&mut value, ReduceOp::Sum).unwrap();
            sums.push(value[2]);
            communicator.barrier_now().unwrap();
        }
        assert!(communicator.split(None, 0).unwrap().is_none());
        sums
    });
    for (rank, sums) in sums.iter().enumerate() {
        assert_eq!(sums, &vec![[2.0, 4.0][rank % 2]; 20]);
    }
}

#[test]
fn sixty_four_ranks() {
    let results = ranks(64, |world, communicator| {
        let mut mine = input::<f32>(world.rank(), 5_000);
        communicator.all_reduce_slice(&mut mine, ReduceOp::Sum).unwrap();
        mine
    });
    let inputs: Vec<Vec<f32>> = (0..64).map(|rank| input(rank, 5_000)).collect();
    let expected = reference::all_reduce(&inputs, ReduceOp::Sum).unwrap();
    for result in &results {
        assert_same("64 ranks", result, &expected);
    }
}

#[test]
fn a_dropped_or_forgotten_work_is_harmless() {
    let results = ranks(2, |world, communicator| {
        let stream = Stream::new("communication").unwrap();
        let arena = annulus::device::Arena::new(world);
        for _ in 0..50 {
            drop(communicator.all_reduce(arena.alloc(DType::F32, 9_000).unwrap(), ReduceOp::Sum, &stream).unwrap());
            let work = communicator.all_reduce(Buffer::zeroed(DType::F32, 9_000).unwrap(), ReduceOp::Sum, &stream);
            std::mem::forget(work.unwrap());
        }
        let mut value = [1i32];
        communicator.all_reduce_slice(&mut value, ReduceOp::Sum).unwrap();
        value[0]
    });
    assert_eq!(results, [2, 2]);
}

#[test]
fn arguments_that_cannot_be_are_refused_before_anything_moves() {
    ranks(2, |_, communicator| {
        let stream = Stream::new("communication").unwrap();
        let f32s = |len| Buffer::zeroed(DType::F32, len).unwrap();
        let ints = Buffer::zeroed(DType::I32, 4).unwrap();
        assert!(matches!(communicator.all_reduce(ints, ReduceOp::Avg, &stream), Err(Error::Unsupported { .. })));
        assert!(matches!(communicator.broadcast(f32s(4), 2, &stream), Err(Error::InvalidArgument { .. })));
        assert!(matches!(
            communicator.all_gather(f32s(4), f32s(9), &stream),
            Err(Error::LengthMismatch { expected_elems: 8, actual_elems: 9, .. })
        ));
        assert!(matches!(
            communicator.all_reduce_into(f32s(4), Buffer::zeroed(DType::F64, 4).unwrap(), ReduceOp::Sum, &stream),
            Err(Error::DTypeMismatch { .. })
        ));
        assert!(matches!(
            communicator.reduce_scatter_in_place(f32s(5), ReduceOp::Sum, &stream),
            Err(Error::InvalidArgument { .. })
        ));
        let mut still_works = [1.0f32];
        communicator.all_reduce_slice(&mut still_works, ReduceOp::Sum).unwrap();
        assert_eq!(still_works, [2.0]);
    });
}
