//! What a program can do wrong with the library, and what it gets: an error, soon, and on every rank that is concerned.

use std::sync::Mutex;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use annulus::collective::{CollectiveOptions, Communicator};
use annulus::device::{Arena, Buffer, Event, Stream};
use annulus::world::{MAX_GROUPS, World};
use annulus::{DType, Error, ReduceOp};

use super::{PATIENCE, cause, communicator, ranks, registered};

/// Far less than any deadline, far more than a busy machine needs.
const SOON: Duration = Duration::from_secs(10);

/// A stream whose first task has panicked.
fn failed_stream() -> Stream {
    let stream = Stream::new("failing").unwrap();
    stream.enqueue(|| panic!("on purpose")).unwrap();
    assert!(stream.synchronize(PATIENCE).is_err());
    stream
}

#[test]
fn an_operation_on_a_failed_stream_is_told_to_every_rank() {
    let start = Instant::now();
    let told = ranks(3, PATIENCE, |world, everybody| {
        let mut communicator = communicator(world);
        let stream = if world.rank() == 1 { failed_stream() } else { Stream::new("communication").unwrap() };
        everybody.wait();
        let result = communicator.all_reduce(Buffer::zeroed(DType::F32, 4).unwrap(), ReduceOp::Sum, &stream);
        let error = result.and_then(|work| work.wait()).unwrap_err();
        assert!(matches!(communicator.barrier_now(), Err(Error::Poisoned { .. })));
        error
    });
    assert!(start.elapsed() < SOON);
    for (rank, error) in told.into_iter().enumerate() {
        if rank == 1 && matches!(error, Error::Stream { .. }) {
            assert!(error.to_string().contains("on purpose"), "{error}");
            continue;
        }
        let Error::RankFailed { rank: 1, reason } = cause(error) else { panic!("rank {rank}") };
        assert!(reason.contains("stream"), "{reason}");
    }
}

#[test]
fn an_operation_that_a_failing_stream_drops_is_told_to_every_rank() {
    let start = Instant::now();
    let told = ranks(2, PATIENCE, |world, everybody| {
        let mut communicator = communicator(world);
        let stream = Stream::new("communication").unwrap();
        let (hold, held) = mpsc::channel::<()>();
        if world.rank() == 1 {
            let fail = move || {
                held.recv().unwrap();
                panic!("on purpose");
            };
            stream.enqueue(fail).unwrap();
        }
        let work = communicator.all_reduce(Buffer::zeroed(DType::F32, 4).unwrap(), ReduceOp::Sum, &stream).unwrap();
        everybody.wait();
        let _ = hold.send(()); // on rank 1 somebody listens
        let error = work.wait().unwrap_err();
        assert!(matches!(communicator.barrier_now(), Err(Error::Poisoned { .. })));
        error
    });
    assert!(start.elapsed() < SOON);
    for error in told {
        let Error::RankFailed { rank: 1, reason } = &error else { panic!("{error:?}") };
        assert!(reason.contains("all_reduce(4 x f32, sum)") && reason.contains("not run"), "{reason}");
    }
}

#[test]
fn work_of_a_stream_that_waits_for_that_stream_is_an_error_and_no_deadlock() {
    let start = Instant::now();
    ranks(2, PATIENCE, |world, everybody| {
        let mut communicator = communicator(world);
        let stream = Stream::new("communication").unwrap();
        communicator.barrier(&stream).unwrap().wait().unwrap();
        everybody.wait();
        let (done, ended) = mpsc::channel();
        stream
            .enqueue(move || done.send(communicator.all_reduce_slice(&mut [1.0f32], ReduceOp::Sum)).unwrap())
            .unwrap();
        let error = ended.recv_timeout(PATIENCE).unwrap().unwrap_err();
        assert!(matches!(&error, Error::Stream { .. } | Error::TimedOut { .. } | Error::Poisoned { .. }), "{error:?}");
    });
    assert!(start.elapsed() < SOON);
}

/// If it could be recorded anew, its operation would seem to have ended, and its buffers would come back too early.
#[test]
fn the_event_of_an_operation_cannot_be_recorded() {
    ranks(2, PATIENCE, |world, everybody| {
        let mut communicator = communicator(world);
        let (stream, other) = (Stream::new("communication").unwrap(), Stream::immediate("other"));
        if world.rank() == 0 {
            let work = communicator.barrier(&stream).unwrap();
            assert!(matches!(other.record(work.event()), Err(Error::InvalidArgument { .. })));
            assert!(!work.is_complete(), "rank 1 has not come");
            everybody.wait();
            work.wait().unwrap();
        } else {
            everybody.wait();
            communicator.barrier(&other).unwrap().wait().unwrap();
        }
        let ended = communicator.barrier(&other).unwrap();
        assert!(ended.is_complete() && ended.event().is_complete() && other.record(ended.event()).is_err());
        ended.wait().unwrap();
    });
}

/// Completions are used again, but not while somebody still has their event.
#[test]
fn an_event_that_was_kept_goes_on_telling_of_its_own_operation() {
    ranks(2, PATIENCE, |world, everybody| {
        let mut communicator = communicator(world);
        let stream = Stream::new("communication").unwrap();
        let work = communicator.barrier(&stream).unwrap();
        let kept: Event = work.event().clone();
        work.wait().unwrap();
        everybody.wait();
        // Rank 1 comes later, so all of these are under way on rank 0.
        if world.rank() == 1 {
            everybody.wait();
        }
        let works: Vec<_> = (0..100).map(|_| communicator.barrier(&stream).unwrap()).collect();
        if world.rank() == 0 {
            assert!(kept.is_complete() && works.iter().all(|work| !work.is_complete()));
            everybody.wait();
        }
        for work in works {
            work.wait().unwrap();
        }
    });
}

/// A buffer in the arena of another rank (or of another world) is no memory that peers find where they look for it.
#[test]
fn a_registered_buffer_of_another_membership_is_used_as_a_private_one() {
    const LEN_ELEMS: usize = 30_000; // beyond one step, so that registered memory is reached in place
    let exchange: [Mutex<Option<Buffer>>; 2] = Default::default();
    ranks(2, PATIENCE, |world, everybody| {
        let mut communicator = communicator(world);
        let stream = Stream::new("communication").unwrap();
        let (rank, other) = (world.rank() as usize, 1 - world.rank() as usize);
        // At the same place in the own arena lies something that must stay as it is.
        let bystander = registered(world, &vec![7.0f32; LEN_ELEMS]);
        let mine = registered(world, &vec![rank as f32 + 1.0; LEN_ELEMS]);
        *exchange[other].lock().unwrap() = Some(mine);
        everybody.wait();
        let theirs = exchange[rank].lock().unwrap().take().unwrap();
        assert!(theirs.is_registered());
        let sum = communicator.all_reduce(theirs, ReduceOp::Sum, &stream).unwrap().wait().unwrap();
        assert!(sum.as_slice::<f32>().unwrap().iter().all(|value| *value == 3.0));
        let (sum, own) = (sum, registered(world, &vec![1.0f32; LEN_ELEMS]));
        let (src, dst) = communicator.all_reduce_into(sum, own, ReduceOp::Max, &stream).unwrap().wait().unwrap();
        assert!(dst.as_slice::<f32>().unwrap().iter().all(|value| *value == 3.0));
        assert!(bystander.as_slice::<f32>().unwrap().iter().all(|value| *value == 7.0));
        everybody.wait();
        drop((src, dst));
    });
}

/// Every rank learns in the same call that there is no room for another, and what there is goes on.
#[test]
fn one_communicator_too_many_is_refused_on_every_rank_and_harms_nothing() {
    let start = Instant::now();
    ranks(3, PATIENCE, |world, _| {
        let make = || Communicator::new(world, CollectiveOptions::default());
        let mut all: Vec<Communicator> = (1..MAX_GROUPS).map(|_| make().unwrap()).collect();
        // One place is left: the first of two colors to ask gets it, and the other color learns that it is too late.
        let half = all[0].split(Some(world.rank() % 2), 0);
        let members = world.world_size().div_ceil(2) - world.rank() % 2;
        match &half {
            Ok(Some(half)) => assert_eq!(half.world_size(), members),
            Ok(None) => panic!("it passed a color"),
            Err(error) => assert!(matches!(error, Error::InvalidArgument { .. }), "{error:?}"),
        }
        let made = all[0].world().reduce_boolean(half.is_ok(), false, PATIENCE).unwrap();
        let refused = all[0].world().reduce_boolean(half.is_err(), false, PATIENCE).unwrap();
        assert!(made && refused);
        let error = make().unwrap_err();
        assert!(matches!(&error, Error::InvalidArgument { argument: "communicators alive", .. }), "{error:?}");
        assert!(matches!(all[1].split(Some(0), 0), Err(Error::InvalidArgument { .. })));
        for communicator in &mut all {
            let mut value = [1i32];
            communicator.all_reduce_slice(&mut value, ReduceOp::Sum).unwrap();
            assert_eq!(value, [3]);
        }
        // Given back by whoever lets go last.
        drop((all.pop(), half));
        world.barrier("let go", PATIENCE).unwrap();
        let mut again = make().unwrap();
        again.barrier_now().unwrap();
    });
    assert!(start.elapsed() < SOON);
}

/// A member that drops its communicator while others are still inside an operation takes nothing away from them.
#[test]
fn who_leaves_a_group_first_takes_nothing_from_the_others() {
    ranks(4, PATIENCE, |world, _| {
        for round in 0..200u32 {
            let mut communicator = communicator(world);
            let mut value =
                vec![world.rank() + 1; 1 + 37 * round as usize].into_iter().map(f64::from).collect::<Vec<_>>();
            communicator.all_reduce_slice(&mut value, ReduceOp::Sum).unwrap();
            assert!(value.iter().all(|sum| *sum == 10.0));
        }
    });
}

#[test]
fn deadlines_that_know_no_end_are_no_panic() {
    ranks(2, PATIENCE, |world, _| {
        let options = CollectiveOptions { timeout: Some(Duration::MAX), ..CollectiveOptions::default() };
        let mut communicator = Communicator::new(world, options).unwrap();
        let stream = Stream::new("no end\0in sight").unwrap();
        communicator.barrier(&stream).unwrap().wait().unwrap();
        communicator.barrier_now().unwrap();
        stream.synchronize(Duration::MAX).unwrap();
        Event::new().synchronize(Duration::MAX).unwrap();
    });
}

fn threads_of_monitors() -> usize {
    let names = std::fs::read_dir("/proc/self/task")
        .unwrap()
        .filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("comm")).ok());
    names.filter(|name| name.starts_with("annulus-monitor")).count()
}

/// Memory that is kept for ever after an error keeps nothing else.
#[test]
fn a_failed_operation_does_not_keep_its_world() {
    let kept: Mutex<Vec<std::sync::Weak<()>>> = Mutex::default();
    ranks(2, PATIENCE, |world: &World, _| {
        let mut communicator = communicator(world);
        let token = std::sync::Arc::new(());
        kept.lock().unwrap().push(std::sync::Arc::downgrade(&token));
        let stream = Stream::new("communication").unwrap();
        stream.enqueue(move || drop(token)).unwrap();
        let buffer = Arena::new(world).alloc(DType::F32, 10 + world.rank() as usize).unwrap();
        assert!(communicator.all_reduce(buffer, ReduceOp::Sum, &stream).and_then(|work| work.wait()).is_err());
        // The last clone is this rank's: were the buffer's memory to hold another, the rank would never leave.
        drop(communicator);
    });
    let start = Instant::now();
    // Other tests of this process have monitors of their own, but not for ever.
    while threads_of_monitors() > 0 && start.elapsed() < PATIENCE {
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(kept.lock().unwrap().iter().all(|token| token.upgrade().is_none()));
}
