//! `reduce_scatter_finish` on virtual GPUs: what a rank makes of its finished sums while it has them.

#[path = "support/ranks.rs"]
mod ranks;
mod support;

use annulus::collective::cuda::{Communicator, Finish, Options};
use annulus::device::cuda::Buffer;
use annulus::schedule::Algorithm;
use annulus::world::launch;
use annulus::{DType, Element, Error, ReduceOp};
use half::{bf16, f16};
use ranks::{PATIENCE, Rank};
use support::on_virtual_gpu;

const THREE: &[(&str, &str)] = &[("ANNULUS_VGPU_DEVICES", "3")];

/// Multiples of 1/64 below 4: every sum, average of two and square is exact in f32, and 16 bits lose some of the sums.
fn term(rank: usize, i: usize) -> f64 {
    ((rank * 31 + i * 7) % 61) as f64 / 64.0 + rank as f64
}

struct Asked {
    cast: Buffer,
    sum_squares: Buffer,
    found_nonfinite: Buffer,
}

impl Asked {
    fn new(rank: &Rank, cast: DType, len_elems: usize) -> Asked {
        let device = rank.kernels.device();
        Asked {
            cast: Buffer::zeroed(device, cast, len_elems).unwrap(),
            sum_squares: Buffer::filled(device, &[-1f64]).unwrap(),
            found_nonfinite: Buffer::filled(device, &[0i32]).unwrap(),
        }
    }

    fn finish(&self) -> Finish {
        Finish {
            cast: Some(self.cast.view()),
            sum_squares: Some(self.sum_squares.view()),
            found_nonfinite: Some(self.found_nonfinite.view()),
        }
    }
}

fn is_exact<T: Element, C: Element>(rank: &Rank, communicator: &mut Communicator, op: ReduceOp, len_elems: usize) {
    let world_size = rank.world.world_size() as usize;
    let terms: Vec<T> = (0..world_size * len_elems).map(|i| T::from_f64(term(rank.number(), i))).collect();
    let divisor = if op == ReduceOp::Avg { world_size as f64 } else { 1.0 };
    let first = rank.number() * len_elems;
    let sums: Vec<f64> = (first..first + len_elems)
        .map(|i| (0..world_size).map(|rank| T::from_f64(term(rank, i)).to_f64()).sum::<f64>() / divisor)
        .collect();
    let device = rank.kernels.device();
    let src = Buffer::filled(device, &terms).unwrap();
    let dst = rank.framed(&vec![T::from_f64(0.0); len_elems], 1);
    let cast = rank.framed(&vec![C::from_f64(0.0); len_elems], 3);
    let asked = Asked::new(rank, C::DTYPE, 0);
    let finish = Finish { cast: Some(cast.view.clone()), ..asked.finish() };
    communicator.reduce_scatter_finish(&src.view(), &dst.view, op, &finish, &rank.stream).unwrap();
    let what = format!("{:?} of {len_elems} {} on {world_size} ranks", op, T::DTYPE);
    dst.check(rank, &sums.iter().map(|sum| T::from_f64(*sum)).collect::<Vec<_>>(), &what);
    cast.check(rank, &sums.iter().map(|sum| C::from_f64(*sum)).collect::<Vec<_>>(), &format!("the copy, {what}"));
    let squares: f64 = sums.iter().map(|sum| sum * sum).sum();
    assert_eq!(asked.sum_squares.read::<f64>(&rank.stream, PATIENCE).unwrap(), [squares], "{what}");
    assert_eq!(asked.found_nonfinite.read::<i32>(&rank.stream, PATIENCE).unwrap(), [0], "{what}");
}

#[test]
fn the_owner_of_a_shard_copies_its_sums_before_they_are_rounded_and_adds_their_squares() {
    on_virtual_gpu(
        "the_owner_of_a_shard_copies_its_sums_before_they_are_rounded_and_adds_their_squares",
        THREE,
        || {
            for world_size in [1, 2, 3] {
                launch::threads(world_size, |environment| {
                    let rank = Rank::join(environment);
                    for algorithm in [Algorithm::Direct, Algorithm::Ring] {
                        let options = Options { algorithm: Some(algorithm), ..Options::default() };
                        let communicator = &mut rank.communicator(options);
                        for len_elems in [0, 1, 131, 9_001] {
                            is_exact::<bf16, f32>(&rank, communicator, ReduceOp::Sum, len_elems);
                        }
                        is_exact::<f32, bf16>(&rank, communicator, ReduceOp::Sum, 257);
                        is_exact::<f16, f32>(&rank, communicator, ReduceOp::Sum, 64);
                        is_exact::<f64, f32>(&rank, communicator, ReduceOp::Sum, 33);
                        if world_size < 3 {
                            is_exact::<f32, f32>(&rank, communicator, ReduceOp::Avg, 100);
                        }
                    }
                })
                .unwrap();
            }
        },
    );
}

#[test]
fn what_is_not_finite_is_found_by_its_owner_alone() {
    on_virtual_gpu("what_is_not_finite_is_found_by_its_owner_alone", THREE, || {
        launch::threads(3, |environment| {
            let rank = Rank::join(environment);
            let communicator = &mut rank.communicator(Options::default());
            for (spoiled, owner) in [(0, 0), (99, 0), (100, 1), (299, 2)] {
                let mut terms = vec![1f32; 300];
                if rank.number() == 1 {
                    terms[spoiled] = f32::INFINITY;
                }
                let src = Buffer::filled(rank.kernels.device(), &terms).unwrap();
                let dst = Buffer::zeroed(rank.kernels.device(), DType::F32, 100).unwrap();
                let asked = Asked::new(&rank, DType::BF16, 100);
                // Each may ask for something else.
                let mut finish = asked.finish();
                if rank.number() == 2 {
                    finish.cast = None;
                }
                communicator
                    .reduce_scatter_finish(&src.view(), &dst.view(), ReduceOp::Sum, &finish, &rank.stream)
                    .unwrap();
                let found = asked.found_nonfinite.read::<i32>(&rank.stream, PATIENCE).unwrap();
                assert_eq!(found, [i32::from(rank.number() == owner)], "element {spoiled}");
                let squares = asked.sum_squares.read::<f64>(&rank.stream, PATIENCE).unwrap()[0];
                assert_eq!(squares == 900.0, rank.number() != owner, "{squares}");
            }
        })
        .unwrap();
    });
}

/// A graph keeps what it writes, also when its handles have gone.
#[test]
fn it_can_be_captured() {
    on_virtual_gpu("it_can_be_captured", THREE, || {
        launch::threads(2, |environment| {
            let rank = Rank::join(environment);
            let communicator = &mut rank.communicator(Options::default());
            let src = Buffer::filled(rank.kernels.device(), &[2f32; 128]).unwrap();
            let dst = Buffer::zeroed(rank.kernels.device(), DType::F32, 64).unwrap();
            let asked = Asked::new(&rank, DType::BF16, 64);
            let Asked { cast, sum_squares, found_nonfinite } = asked;
            let finish =
                Finish { cast: Some(cast.view()), sum_squares: Some(sum_squares.view()), found_nonfinite: None };
            drop((found_nonfinite, cast));
            let mut graph = rank
                .stream
                .capture(|| {
                    communicator.reduce_scatter_finish(&src.view(), &dst.view(), ReduceOp::Sum, &finish, &rank.stream)
                })
                .unwrap();
            drop(finish);
            for _ in 0..3 {
                communicator.before_launch(&graph, &rank.stream).unwrap();
                graph.launch(&rank.stream).unwrap();
            }
            assert_eq!(sum_squares.read::<f64>(&rank.stream, PATIENCE).unwrap(), [64.0 * 16.0]);
        })
        .unwrap();
    });
}

#[test]
fn what_cannot_be_is_refused_and_poisons_nothing() {
    on_virtual_gpu("what_cannot_be_is_refused_and_poisons_nothing", THREE, || {
        launch::threads(2, |environment| {
            let rank = Rank::join(environment);
            let device = rank.kernels.device();
            let communicator = &mut rank.communicator(Options::default());
            let src = Buffer::filled(device, &[2f32; 128]).unwrap();
            let dst = Buffer::zeroed(device, DType::F32, 64).unwrap();
            let view = |dtype, len_elems| Some(Buffer::zeroed(device, dtype, len_elems).unwrap().view());
            let refused = [
                Finish { cast: view(DType::BF16, 63), ..Finish::default() },
                Finish { cast: view(DType::I32, 64), ..Finish::default() },
                Finish { sum_squares: view(DType::F32, 1), ..Finish::default() },
                Finish { sum_squares: view(DType::F64, 2), ..Finish::default() },
                Finish { found_nonfinite: view(DType::U8, 4), ..Finish::default() },
            ];
            for finish in refused {
                let told =
                    communicator.reduce_scatter_finish(&src.view(), &dst.view(), ReduceOp::Sum, &finish, &rank.stream);
                assert!(told.is_err(), "{finish:?}");
            }
            let inside = Finish { cast: Some(src.view().slice(64, 64).unwrap()), ..Finish::default() };
            let told =
                communicator.reduce_scatter_finish(&src.view(), &dst.view(), ReduceOp::Sum, &inside, &rank.stream);
            assert!(matches!(told, Err(Error::InvalidArgument { .. })), "{told:?}");
            let doubles = [view(DType::F64, 2).unwrap(), view(DType::F64, 1).unwrap()];
            let narrow = Finish { cast: view(DType::F16, 1), ..Finish::default() };
            let told =
                communicator.reduce_scatter_finish(&doubles[0], &doubles[1], ReduceOp::Sum, &narrow, &rank.stream);
            assert!(matches!(told, Err(Error::Unsupported { dtype: DType::F16, .. })), "{told:?}");
            let (whole, shard) = (view(DType::I32, 2).unwrap(), view(DType::I32, 1).unwrap());
            let finish = Finish::default();
            let told = communicator.reduce_scatter_finish(&whole, &shard, ReduceOp::Sum, &finish, &rank.stream);
            assert!(matches!(told, Err(Error::Unsupported { dtype: DType::I32, .. })), "{told:?}");
            communicator.reduce_scatter_finish(&src.view(), &dst.view(), ReduceOp::Sum, &finish, &rank.stream).unwrap();
            assert_eq!(dst.read::<f32>(&rank.stream, PATIENCE).unwrap(), [4.0; 64]);
        })
        .unwrap();
        // Two ranks on one device.
        launch::threads(2, |environment| {
            let rank = Rank::on(0, environment);
            let communicator = &mut rank.communicator(Options::default());
            let src = Buffer::filled(rank.kernels.device(), &[2f32; 4]).unwrap();
            let dst = Buffer::zeroed(rank.kernels.device(), DType::F32, 2).unwrap();
            let finish = Finish::default();
            let told =
                communicator.reduce_scatter_finish(&src.view(), &dst.view(), ReduceOp::Sum, &finish, &rank.stream);
            assert!(matches!(told, Err(Error::InvalidArgument { .. })), "{told:?}");
        })
        .unwrap();
    });
}
