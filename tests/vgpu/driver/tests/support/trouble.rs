//! What every way of running a collective must do when something goes wrong.

#![allow(dead_code, reason = "every test file uses a part of it")]

use annulus::collective::cuda::{Communicator, Options};
use annulus::device::cuda::{Buffer, Stream, View};
use annulus::world::{Environment, launch};
use annulus::{DType, Error, ReduceOp};

use crate::ranks::{PATIENCE, Rank};
use crate::together::Together;

/// A later call says that the job has failed.
pub fn is_poisoned(rank: &Rank, communicator: &mut Communicator) {
    let poisoned = communicator.barrier(&rank.stream).unwrap_err();
    assert!(matches!(poisoned, Error::Poisoned { .. }), "{poisoned:?}");
}

/// A later call says that the job has failed and touches nothing; the device still works.
pub fn is_poisoned_and_usable(rank: &Rank, communicator: &mut Communicator) {
    is_poisoned(rank, communicator);
    let late = rank.framed(&[1.0f32; 4], 0);
    let poisoned = communicator.all_reduce(&late.view, ReduceOp::Sum, &rank.stream).unwrap_err();
    assert!(matches!(poisoned, Error::Poisoned { .. }), "{poisoned:?}");
    late.check(rank, &[1.0f32; 4], "a buffer of a refused call");
    assert!(Buffer::zeroed(rank.kernels.device(), DType::F32, 10).is_ok());
}

/// The error of an operation that is issued at once, and fails as it runs.
pub fn fails_as_it_runs(communicator: &mut Communicator, view: &View, stream: &Stream) -> Error {
    communicator.all_reduce(view, ReduceOp::Sum, stream).unwrap();
    communicator.synchronize(PATIENCE).unwrap_err()
}

/// Rank 2 of 3 reduces 200 elements, the others 100: all are told both calls, as `quoted`, and nothing is changed.
pub fn a_mismatch_changes_nothing(
    join: impl Fn(Environment) -> Rank + Sync,
    options: &Options,
    fails: impl Fn(&mut Communicator, &View, &Stream) -> Error + Sync,
    quoted: [&str; 2],
) {
    let done = Together::new(3);
    launch::threads(3, |environment| {
        let rank = join(environment);
        let mut communicator = rank.communicator(options.clone());
        let elements = vec![rank.number() as f32; if rank.number() == 2 { 200 } else { 100 }];
        let buffer = rank.framed(&elements, 0);
        let error = fails(&mut communicator, &buffer.view, &rank.stream);
        assert!(matches!(error, Error::Mismatch { sequence: 1, .. }), "{error:?}");
        let text = error.to_string();
        for quoted in [quoted[0], quoted[1], "rank 2"] {
            assert!(text.contains(quoted), "{text}");
        }
        done.wait();
        buffer.check(&rank, &elements, "a buffer of a mismatched call");
        is_poisoned_and_usable(&rank, &mut communicator);
    })
    .unwrap();
}

/// A capture is refused, and the communicator works on.
pub fn is_no_part_of_a_graph(rank: &Rank, communicator: &mut Communicator) {
    let captured = rank.stream.capture(|| communicator.barrier(&rank.stream));
    assert!(matches!(captured, Err(Error::Capture { .. })), "{captured:?}");
    communicator.barrier(&rank.stream).unwrap();
    communicator.synchronize(PATIENCE).unwrap();
}
