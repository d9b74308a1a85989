//! Rows of the contract about values exchanged among ranks.

use std::collections::BTreeMap;
use std::time::Duration;

use annulus::device::Buffer;
use annulus::strategy::{Reduce, Reducer, Strategy, Tensor};
use annulus::{DType, Error, ReduceOp};

use crate::model::{ddp, everywhere, options};

#[test]
fn row_all_reduce_averages_in_place() {
    struct Metrics {
        loss: f64,
        counts: (f32, Tensor),
        name: String,
    }
    impl Reduce for Metrics {
        fn reduce(&mut self, reducer: &mut Reducer<'_>) -> annulus::Result<()> {
            self.loss.reduce(reducer)?;
            self.counts.reduce(reducer)
        }
    }
    everywhere(&options(), |strategy| {
        let (rank, n) = (f64::from(strategy.rank()), f64::from(strategy.world_size()));
        let mean = (n - 1.0) / 2.0;
        let mut scalar = rank;
        strategy.all_reduce(&mut scalar, None, None).unwrap();
        assert_eq!(scalar, mean);

        let mut metrics = Metrics {
            loss: rank,
            counts: (rank as f32, Tensor::from_slice(&[2, 1], &[rank as f32, 1.0]).unwrap()),
            name: format!("rank {rank}"),
        };
        strategy.all_reduce(&mut metrics, None, None).unwrap();
        assert_eq!((metrics.loss, f64::from(metrics.counts.0)), (mean, mean));
        assert_eq!(metrics.counts.1.as_slice::<f32>().unwrap(), [mean as f32, 1.0]);
        assert_eq!(metrics.name, format!("rank {rank}"), "what is not a number stays");

        let mut nested = BTreeMap::from([("a", vec![rank as i64, 1]), ("b", vec![2])]);
        strategy.all_reduce(&mut nested, None, Some(ReduceOp::Sum)).unwrap();
        assert_eq!(nested["a"], [(n * mean) as i64, n as i64]);
        strategy.all_reduce(&mut nested, None, Some(ReduceOp::Max)).unwrap();
        assert_eq!(nested["b"], [2 * n as i64]);
        let mut scaled = [1.0_f32; 3];
        strategy.all_reduce(&mut scaled, None, Some(ReduceOp::PremulSum(0.5))).unwrap();
        assert_eq!(scaled, [0.5 * n as f32; 3], "also on one rank");

        // A tensor in the arena is reduced where it is.
        let mut tensor = strategy.alloc(&[1000], DType::F32).unwrap();
        tensor.write(&[rank as f32; 1000]).unwrap();
        strategy.all_reduce(&mut tensor, None, None).unwrap();
        assert!(tensor.buffer().is_none_or(Buffer::is_registered), "on the host in the arena");
        assert_eq!(tensor.to_vec::<f32>().unwrap(), [mean as f32; 1000]);

        // The average of integers is not defined, on any number of ranks, and the value is left alone.
        let mut integer = 5_i32;
        assert!(matches!(strategy.all_reduce(&mut integer, None, None), Err(Error::Unsupported { .. })));
        assert_eq!(integer, 5);
    });
}

#[test]
fn row_all_reduce_of_different_lengths_is_an_error() {
    let errors = ddp(2, options(), |mut strategy| {
        let mut values = vec![1.0_f32; 3 + strategy.rank() as usize];
        let error = strategy.all_reduce(&mut values, None, None).unwrap_err();
        assert!(values.iter().all(|value| *value == 1.0));
        error
    });
    assert!(errors.iter().all(|error| matches!(error, Error::Mismatch { .. })), "{errors:?}");
}

/// Private or registered: no byte has changed.
#[test]
fn row_all_reduce_leaves_a_tensor_alone_when_calls_differ() {
    for registered in [false, true] {
        ddp(3, options(), move |mut strategy| {
            let len_elems = if strategy.rank() == 1 { 70_001 } else { 70_000 };
            let mut tensor = match registered {
                true => strategy.alloc(&[len_elems], DType::F32).unwrap(),
                false => Tensor::zeroed(&[len_elems], DType::F32).unwrap(),
            };
            tensor.write(&vec![1.5_f32; len_elems]).unwrap();
            let error = match strategy.all_reduce(&mut tensor, None, None).unwrap_err() {
                Error::Poisoned { cause } => *cause, // the others met before this rank came
                error => error,
            };
            assert!(matches!(error, Error::Mismatch { .. }), "{error:?}");
            for _ in 0..2 {
                assert!(tensor.buffer().is_none_or(|buffer| buffer.is_registered() == registered));
                assert!(tensor.to_vec::<f32>().unwrap().iter().all(|value| *value == 1.5));
                // Nor when nothing works any more.
                assert!(strategy.all_reduce(&mut tensor, None, None).is_err());
            }
        });
    }
}

#[test]
fn row_all_gather_adds_a_leading_axis() {
    everywhere(&options(), |strategy| {
        let (rank, n) = (strategy.rank() as usize, strategy.world_size() as usize);
        let mine: Vec<f32> = (0..6).map(|i| (10 * rank + i) as f32).collect();
        let tensor = Tensor::from_slice(&[2, 3], &mine).unwrap();
        let all = strategy.all_gather(&tensor, None).unwrap();
        assert_eq!(all.shape(), [n, 2, 3], "also for one rank");
        let expected: Vec<f32> = (0..n).flat_map(|r| (0..6).map(move |i| (10 * r + i) as f32)).collect();
        assert_eq!(all.as_slice::<f32>().unwrap(), expected);
        let scalar = Tensor::from_slice(&[], &[rank as u8]).unwrap();
        let ranks = strategy.all_gather(&scalar, None).unwrap();
        assert_eq!(ranks.as_slice::<u8>().unwrap(), (0..n as u8).collect::<Vec<_>>());
        assert_eq!(strategy.all_gather(&Tensor::zeroed(&[0], DType::F32).unwrap(), None).unwrap().shape(), [n, 0]);
        assert!(strategy.all_gather(&Tensor::zeroed(&[1; 9], DType::F32).unwrap(), None).is_err());
    });
}

#[test]
fn row_all_gather_of_unequal_shapes_names_the_ranks() {
    let errors = ddp(3, options(), |mut strategy| {
        let shape = if strategy.rank() == 1 { [3, 2] } else { [2, 3] };
        let tensor = Tensor::zeroed(&shape, DType::F32).unwrap();
        let error = strategy.all_gather(&tensor, None).unwrap_err().to_string();
        // Nothing is broken by it.
        assert_eq!(strategy.all_gather(&Tensor::zeroed(&[1], DType::F32).unwrap(), None).unwrap().shape(), [3, 1]);
        error
    });
    for error in errors {
        assert!(error.contains("rank 0 has \"f32 [2, 3]\"") && error.contains("rank 1 has \"f32 [3, 2]\""), "{error}");
    }
}

/// The same number of elements in another shape is another tensor.
#[test]
fn row_broadcast_of_unequal_shapes_names_the_ranks() {
    let errors = ddp(3, options(), |mut strategy| {
        let shape = if strategy.rank() == 2 { [3, 2] } else { [2, 3] };
        let mut tensor = Tensor::zeroed(&shape, DType::F32).unwrap();
        let error = strategy.broadcast(&mut tensor, 0, None).unwrap_err();
        // Nothing is broken by it.
        strategy.broadcast(&mut Tensor::zeroed(&[1], DType::F32).unwrap(), 0, None).unwrap();
        error
    });
    for error in errors {
        let Error::Disagreement { what, peer: 2, mine, theirs, .. } = &error else { panic!("{error:?}") };
        assert_eq!((mine.as_str(), theirs.as_str()), ("f32 [2, 3]", "f32 [3, 2]"));
        assert!(what.contains("broadcast"), "{error}");
    }
}

#[test]
fn row_all_gather_backward_is_a_reduce_scatter() {
    everywhere(&options(), |strategy| {
        let (rank, n) = (strategy.rank() as usize, strategy.world_size() as usize);
        // loss of rank r = sum over gathered x[i][j] * (r + 1) * c[i][j]; so d x[i][j] = c[i][j] * sum of (r + 1).
        let c: Vec<f32> = (0..n * 4).map(|i| i as f32).collect();
        let upstream: Vec<f32> = c.iter().map(|c| (rank + 1) as f32 * c).collect();
        let gradient = Tensor::from_slice(&[n, 2, 2], &upstream).unwrap();
        let mine = strategy.all_gather_backward(&gradient, None).unwrap();
        assert_eq!(mine.shape(), [2, 2]);
        let total = (n * (n + 1) / 2) as f32;
        let expected: Vec<f32> = c[4 * rank..][..4].iter().map(|c| c * total).collect();
        assert_eq!(mine.as_slice::<f32>().unwrap(), expected);
        let wrong = Tensor::zeroed(&[n + 1, 2], DType::F32).unwrap();
        assert!(matches!(strategy.all_gather_backward(&wrong, None), Err(Error::ShapeMismatch { .. })));
    });
}

#[test]
fn row_broadcast_tensors_and_values() {
    everywhere(&options(), |strategy| {
        let (rank, last) = (strategy.rank(), strategy.world_size() - 1);
        let mut tensor = Tensor::from_slice(&[3], &[rank as i32, 7, 9]).unwrap();
        strategy.broadcast(&mut tensor, last, None).unwrap();
        assert_eq!(tensor.as_slice::<i32>().unwrap(), [last as i32, 7, 9]);
        let value = BTreeMap::from([("path".to_owned(), format!("run of rank {rank}"))]);
        assert_eq!(strategy.broadcast_value(value, last).unwrap()["path"], format!("run of rank {last}"));
        assert!(strategy.broadcast(&mut tensor, last + 1, None).is_err());
        // What the source cannot write is an error on every rank, and breaks nothing.
        let odd: Vec<(Vec<u8>, u8)> = Vec::new();
        let map: std::collections::HashMap<Vec<u8>, u8> = [(vec![1], 2)].into();
        let _ = odd;
        assert!(strategy.broadcast_value(map, 0).is_err());
        strategy.barrier("still alive").unwrap();
    });
}

#[test]
fn row_barrier_names_absent_ranks() {
    everywhere(&options(), |strategy| strategy.barrier("start").unwrap());
    let mut short = options();
    short.world.timeout = Duration::from_secs(1);
    let errors = ddp(2, short, |mut strategy| match strategy.rank() {
        0 => Some(strategy.barrier("after epoch 3").unwrap_err()),
        _ => {
            std::thread::sleep(Duration::from_secs(3));
            None
        }
    });
    let Some(Error::BarrierTimeout { name, absent, .. }) = &errors[0] else { panic!("{errors:?}") };
    assert_eq!((name.as_str(), absent.as_slice()), ("after epoch 3", &[1][..]));
}

#[test]
fn row_reduce_boolean_decision() {
    everywhere(&options(), |strategy| {
        let (first, several) = (strategy.rank() == 0, strategy.world_size() > 1);
        assert!(strategy.reduce_boolean_decision(true, true).unwrap());
        assert!(!strategy.reduce_boolean_decision(false, false).unwrap());
        assert_eq!(strategy.reduce_boolean_decision(first, true).unwrap(), !several);
        assert!(strategy.reduce_boolean_decision(first, false).unwrap());
    });
}

#[test]
fn groups_are_an_argument_of_the_collectives() {
    ddp(4, options(), |mut strategy| {
        let rank = strategy.rank();
        // Even and odd ranks; rank 3 first among the odd.
        let mut group = strategy.split_group(Some(rank % 2), u32::from(rank == 1)).unwrap().unwrap();
        let members = if rank % 2 == 0 { [0, 2] } else { [3, 1] };
        assert_eq!((group.members(), group.world_size()), (&members[..], 2));
        let mut sum = rank as i32;
        strategy.all_reduce(&mut sum, Some(&mut group), Some(ReduceOp::Sum)).unwrap();
        assert_eq!(sum, members.iter().sum::<u32>() as i32);
        let mine = Tensor::from_slice(&[1], &[rank as i32]).unwrap();
        let all = strategy.all_gather(&mine, Some(&mut group)).unwrap();
        assert_eq!(all.as_slice::<i32>().unwrap(), members.map(|rank| rank as i32));
        let mut tensor = mine;
        strategy.broadcast(&mut tensor, 1, Some(&mut group)).unwrap();
        assert_eq!(tensor.as_slice::<i32>().unwrap(), [members[1] as i32]);
        let none = strategy.split_group((rank == 0).then_some(0), 0).unwrap();
        assert_eq!(none.is_some(), rank == 0);
        strategy.teardown(crate::model::TIMEOUT).unwrap();
    });
}
