//! Ranks that call different things: an error on every rank that quotes both sides, and not one byte changed (P6).

use std::time::Duration;

use annulus::collective::{CollectiveOptions, Communicator, Partials};
use annulus::device::{Buffer, Stream};
use annulus::schedule::Algorithm;
use annulus::world::World;
use annulus::{DType, Element, Error, ReduceOp, Result};
use half::bf16;
use proptest::prelude::*;

use super::{PATIENCE, cause, ranks, registered};

#[derive(Debug, Clone, Copy, PartialEq)]
enum Kind {
    AllReduce,
    ReduceScatter,
    AllGather,
    Broadcast,
    Barrier,
}

impl Kind {
    const ALL: [Kind; 5] = [Kind::AllReduce, Kind::ReduceScatter, Kind::AllGather, Kind::Broadcast, Kind::Barrier];

    fn name(self) -> &'static str {
        ["all_reduce", "reduce_scatter", "all_gather", "broadcast", "barrier"][self as usize]
    }

    fn reduces(self) -> bool {
        matches!(self, Kind::AllReduce | Kind::ReduceScatter)
    }
}

/// One call; `len_elems` is a shard's where there are shards.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Call {
    kind: Kind,
    dtype: DType,
    len_elems: usize,
    op: ReduceOp,
    root: u32,
}

/// In what one rank's call differs from the others'.
#[derive(Debug, Clone, Copy)]
enum Difference {
    Kind(usize),
    DType,
    Count(usize),
    Op,
    Factor,
    Root,
    Algorithm,
    Partials,
    Order,
}

/// How the memory is handed over.
#[derive(Debug, Clone, Copy)]
enum Form {
    Slice,
    Registered,
    RegisteredImmediate,
    RegisteredInPlace,
}

const OPS: [ReduceOp; 5] = [ReduceOp::Sum, ReduceOp::Avg, ReduceOp::Min, ReduceOp::Max, ReduceOp::PremulSum(0.5)];

fn calls() -> impl Strategy<Value = Call> {
    let dtypes = prop::sample::select(vec![DType::F32, DType::F64, DType::BF16, DType::I32]);
    let lengths = prop::sample::select(vec![1, 3, 64, 1_000, 5_000, 40_000]);
    (0..5usize, dtypes, lengths, 0..5usize, 0..2u32).prop_map(|(kind, dtype, len_elems, op, root)| {
        let op = if OPS[op].check(dtype).is_ok() { OPS[op] } else { ReduceOp::Sum };
        Call { kind: Kind::ALL[kind], dtype, len_elems, op, root }
    })
}

fn differences() -> impl Strategy<Value = Difference> {
    prop_oneof![
        (1..5usize).prop_map(Difference::Kind),
        Just(Difference::DType),
        (1..50usize).prop_map(Difference::Count),
        Just(Difference::Op),
        Just(Difference::Factor),
        Just(Difference::Root),
        Just(Difference::Algorithm),
        Just(Difference::Partials),
        Just(Difference::Order),
    ]
}

/// What one rank does.
#[derive(Debug, Clone)]
struct Script {
    calls: Vec<Call>,
    algorithm: Option<Algorithm>,
    partials: Partials,
}

impl Script {
    /// The script of most, and of those who differ.
    fn pair(mut call: Call, difference: Difference) -> (Script, Script) {
        let mut odd = call;
        let (mut algorithm, mut partials) = (None, Partials::F32);
        match difference {
            Difference::Kind(by) => odd.kind = Kind::ALL[(call.kind as usize + by) % 5],
            // A barrier has no more to differ in: make it something that has.
            _ if call.kind == Kind::Barrier => (call.kind, odd.kind) = (Kind::AllReduce, Kind::AllReduce),
            _ => {}
        }
        match difference {
            Difference::Kind(_) => {}
            Difference::DType => odd.dtype = if call.dtype == DType::F32 { DType::F64 } else { DType::F32 },
            Difference::Count(more) => odd.len_elems += more,
            Difference::Op | Difference::Factor if !call.kind.reduces() => odd.len_elems += 1,
            Difference::Op => odd.op = if call.op == ReduceOp::Max { ReduceOp::Sum } else { ReduceOp::Max },
            Difference::Factor => {
                (call.dtype, odd.dtype) = (DType::F32, DType::F32);
                (call.op, odd.op) = (ReduceOp::PremulSum(0.1), ReduceOp::PremulSum(0.1f64.next_up()));
            }
            Difference::Root => {
                (call.kind, odd.kind) = (Kind::Broadcast, Kind::Broadcast);
                odd.root = 1 - call.root;
            }
            Difference::Algorithm => algorithm = Some(Algorithm::Ring),
            Difference::Partials => partials = Partials::Native,
            Difference::Order => odd.len_elems += 2,
        }
        let plain = Script { calls: vec![call], algorithm: None, partials: Partials::F32 };
        match difference {
            Difference::Order => {
                (Script { calls: vec![call, odd], ..plain.clone() }, Script { calls: vec![odd, call], ..plain })
            }
            _ => (plain, Script { calls: vec![odd], algorithm, partials }),
        }
    }
}

/// Something that is no likely result of anything, different on every rank.
fn pattern<T: Element>(rank: u32, len_elems: usize) -> Vec<T> {
    (0..len_elems).map(|i| T::from_f64(f64::from(rank + 1) * 3.25 + (i % 89) as f64)).collect()
}

/// Makes the call with memory of `pattern`; returns how it ended and whether any byte is another afterwards.
fn perform(call: Call, form: Form, world: &World, communicator: &mut Communicator) -> (Result<()>, bool) {
    match call.dtype {
        DType::F64 => perform_typed::<f64>(call, form, world, communicator),
        DType::BF16 => perform_typed::<bf16>(call, form, world, communicator),
        DType::I32 => perform_typed::<i32>(call, form, world, communicator),
        _ => perform_typed::<f32>(call, form, world, communicator),
    }
}

fn perform_typed<T: Element>(
    call: Call,
    form: Form,
    world: &World,
    communicator: &mut Communicator,
) -> (Result<()>, bool) {
    let Call { kind, len_elems, op, root, .. } = call;
    let all_elems = len_elems * world.world_size() as usize;
    let (few, many) = (pattern::<T>(world.rank(), len_elems), pattern::<T>(world.rank() + 64, all_elems));
    if let (Form::Slice, _) | (_, Kind::Barrier) = (form, kind) {
        let (mut few_now, mut many_now) = (few.clone(), many.clone());
        let result = match kind {
            Kind::AllReduce => communicator.all_reduce_slice(&mut few_now, op),
            Kind::ReduceScatter => communicator.reduce_scatter_slice(&many_now, &mut few_now, op),
            Kind::AllGather => communicator.all_gather_slice(&few_now, &mut many_now),
            Kind::Broadcast => communicator.broadcast_slice(&mut few_now, root),
            Kind::Barrier => communicator.barrier_now(),
        };
        return (result, few_now != few || many_now != many);
    }
    let stream = match form {
        Form::RegisteredImmediate => Stream::immediate("immediate"),
        _ => Stream::new("communication").unwrap(),
    };
    let is_in_place = matches!(form, Form::RegisteredInPlace);
    let (one, whole) = (registered(world, &few), registered(world, &many));
    // The buffers are gone with the operation, but their memory is kept, because a peer may still use it.
    let at = |buffer: &Buffer| buffer.as_slice::<T>().unwrap().as_ptr();
    let (one_at, whole_at) = (at(&one), at(&whole));
    let kept = registered(world, &few);
    let wait_for_one = |work: annulus::collective::Work<Buffer>| work.wait().map(std::mem::forget);
    let wait_for_two = |work: annulus::collective::Work<(Buffer, Buffer)>| work.wait().map(std::mem::forget);
    let (result, used) = match kind {
        Kind::AllReduce if is_in_place => {
            (communicator.all_reduce(one, op, &stream).and_then(wait_for_one), [true, false])
        }
        Kind::AllReduce => (communicator.all_reduce_into(one, kept, op, &stream).and_then(wait_for_two), [true, false]),
        Kind::ReduceScatter if is_in_place => {
            (communicator.reduce_scatter_in_place(whole, op, &stream).and_then(wait_for_one), [false, true])
        }
        Kind::ReduceScatter => {
            (communicator.reduce_scatter(whole, one, op, &stream).and_then(wait_for_two), [true, true])
        }
        Kind::AllGather if is_in_place => {
            (communicator.all_gather_in_place(whole, &stream).and_then(wait_for_one), [false, true])
        }
        Kind::AllGather => (communicator.all_gather(one, whole, &stream).and_then(wait_for_two), [true, true]),
        Kind::Broadcast => (communicator.broadcast(one, root, &stream).and_then(wait_for_one), [true, false]),
        Kind::Barrier => unreachable!("a barrier has no memory"),
    };
    // A call that was refused before it began has given its buffers back: their memory reads as zeroes then, or belongs to
    // somebody else.
    let began = !matches!(result, Err(Error::Poisoned { .. }));
    let has_changed = |at: *const T, before: &[T]| {
        // SAFETY: the arena's mapping lives as long as the world, the range was not given back, and no rank is inside an
        // operation any more that could write there (each has failed before it moved anything; that is the promise).
        let now = unsafe { std::slice::from_raw_parts(at, before.len()) };
        bytemuck::cast_slice::<T, u8>(now) != bytemuck::cast_slice::<T, u8>(before)
    };
    let changed = began && (used[0] && has_changed(one_at, &few) || used[1] && has_changed(whole_at, &many));
    (result, changed)
}

/// One world in which some ranks follow another script than most.
fn disagree(world_size: u32, odd_ones: u64, form: Form, (most, odd): (Script, Script)) {
    // At least one of each.
    let odd_ones = (0..world_size).filter(|rank| odd_ones >> rank & 1 == 1).take(world_size as usize - 1);
    let odd_ones: Vec<u32> = Some(odd_ones.collect::<Vec<_>>()).filter(|odd| !odd.is_empty()).unwrap_or(vec![0]);
    let script = |rank: u32| if odd_ones.contains(&rank) { &odd } else { &most };
    let results = ranks(world_size, PATIENCE, |world, everybody| {
        let script = script(world.rank());
        let options = CollectiveOptions {
            algorithm: script.algorithm,
            partials: script.partials,
            ..CollectiveOptions::default()
        };
        let mut communicator = Communicator::new(world, options).unwrap();
        everybody.wait();
        let mut outcome = None;
        for call in &script.calls {
            let (result, has_changed) = perform(*call, form, world, &mut communicator);
            assert!(!has_changed, "rank {} of {world_size}: {form:?} {call:?} has changed bytes", world.rank());
            outcome = outcome.or(Some(result));
        }
        let again = communicator.barrier_now();
        assert!(matches!(again, Err(Error::Poisoned { .. })), "{again:?}");
        outcome.unwrap()
    });
    for (rank, result) in results.into_iter().enumerate() {
        let what =
            format!("rank {rank} of {world_size}, {odd_ones:?} differ, {form:?}: {most:?} / {odd:?}: {result:?}");
        let Err(Error::Mismatch { sequence: 1, rank: teller, mine, peer, theirs }) = result.map_err(cause) else {
            panic!("{what}");
        };
        assert_ne!(mine, theirs, "{what}");
        assert_ne!(odd_ones.contains(&teller), odd_ones.contains(&peer), "{what}");
        for (told, rank) in [(&mine, teller), (&theirs, peer)] {
            let call = script(rank).calls[0];
            assert!(told.starts_with(call.kind.name()), "{what}");
            if call.kind != Kind::Barrier {
                let shards = match call.kind {
                    Kind::ReduceScatter | Kind::AllGather => world_size as usize,
                    _ => 1,
                };
                assert!(told.contains(&format!("({} x {}", call.len_elems * shards, call.dtype)), "{what}");
            }
            assert!(!call.kind.reduces() || told.contains(&format!(", {}", call.op)), "{what}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, max_shrink_iters: 20, ..ProptestConfig::default() })]

    #[test]
    fn p06_ranks_that_disagree_all_learn_it_and_nothing_is_touched(
        world_size in 2..=4u32,
        odd_ones in 1..15u64,
        form in prop::sample::select(
            vec![Form::Slice, Form::Registered, Form::RegisteredImmediate, Form::RegisteredInPlace]
        ),
        call in calls(),
        difference in differences(),
    ) {
        disagree(world_size, odd_ones, form, Script::pair(call, difference));
    }
}

/// The last to come is told as soon as it comes, and so are those who wait.
#[test]
fn p06_a_mismatch_is_told_when_the_last_has_come() {
    let times = ranks(2, PATIENCE, |world, everybody| {
        let mut communicator = super::communicator(world);
        let mut value = [1.0f32; 4];
        let op = if world.rank() == 0 { ReduceOp::Sum } else { ReduceOp::Max };
        everybody.wait();
        std::thread::sleep(Duration::from_millis(50 * u64::from(world.rank())));
        let start = std::time::Instant::now();
        let error = communicator.all_reduce_slice(&mut value, op).unwrap_err();
        assert!(matches!(cause(error), Error::Mismatch { .. }));
        start.elapsed()
    });
    assert!(times.iter().all(|time| *time < PATIENCE / 4), "nobody waits for a deadline: {times:?}");
}

/// A mismatch inside a group of some names the ranks of the world.
#[test]
fn p06_a_subgroup_names_ranks_of_the_world() {
    let told = ranks(4, PATIENCE, |world, _| {
        let mut communicator = super::communicator(world);
        let mut half = communicator.split(Some(world.rank() / 2), 0).unwrap().unwrap();
        if world.rank() < 2 {
            return None;
        }
        let mut value = vec![0.5f64; 2 + world.rank() as usize];
        let error = half.all_reduce_slice(&mut value, ReduceOp::Sum).unwrap_err();
        assert_eq!(value, vec![0.5; 2 + world.rank() as usize]);
        Some(cause(error))
    });
    for error in told.into_iter().flatten() {
        let Error::Mismatch { rank, peer, mine, theirs, .. } = error else { panic!("{error:?}") };
        assert_eq!((rank.min(peer), rank.max(peer)), (2, 3));
        assert!(mine.contains(&format!("({} x f64", 2 + rank)) && theirs.contains(&format!("({} x f64", 2 + peer)));
    }
}
