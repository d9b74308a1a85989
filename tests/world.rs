//! Worlds of threads: the real rendezvous, segments and control plane, in one process.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use annulus::world::{Environment, GATHER_LIMIT_BYTES, GROUP_AREA_BYTES, World, WorldOptions, launch};
use annulus::{Error, Result};

const SOON: Duration = Duration::from_secs(30);
/// A deadline that is to pass. Long enough for those who do come, on a busy machine.
const MISSED: Duration = Duration::from_secs(1);

fn options() -> WorldOptions {
    WorldOptions { init_timeout: SOON, timeout: SOON, ..WorldOptions::default() }
}

/// Runs `rank` in a world of `world_size` threads; every rank leaves in order.
fn in_world<T: Send>(world_size: u32, rank: impl Fn(&World) -> T + Sync) -> Vec<T> {
    launch::threads(world_size, |environment| {
        let world = World::join(environment, options()).unwrap();
        let result = rank(&world);
        world.teardown(SOON).unwrap();
        result
    })
    .unwrap()
}

/// As [`in_world`], for worlds that fail: nobody waits for anybody at the end, and all ranks see the same end.
fn in_failing_world<T: Send>(world_size: u32, rank: impl Fn(&World) -> Result<T> + Sync) -> Vec<Result<T>> {
    let left = AtomicU32::new(0);
    launch::threads(world_size, |environment| {
        let world = World::join(environment, options()).unwrap();
        let result = rank(&world);
        left.fetch_add(1, Ordering::SeqCst);
        let start = Instant::now();
        while left.load(Ordering::SeqCst) < world_size && start.elapsed() < SOON {
            std::thread::sleep(Duration::from_millis(1));
        }
        result
    })
    .unwrap()
}

#[test]
fn one_rank_runs_the_same_code() {
    let world = World::join(Environment::single(), options()).unwrap();
    assert_eq!((world.rank(), world.world_size(), world.local_rank(), world.node_rank()), (0, 1, 0, 0));
    assert_eq!(world.group_area(0).unwrap().len_bytes, GROUP_AREA_BYTES);
    assert_eq!(world.broadcast_value(0, Some(vec![1, 2]), SOON).unwrap(), [1, 2]);
    assert_eq!(world.all_gather_bytes(b"x", SOON).unwrap(), [b"x"]);
    assert!(world.reduce_boolean(true, true, SOON).unwrap());
    assert!(world.fault().is_none());
    world.teardown(SOON).unwrap();
}

#[test]
fn ranks_see_each_others_memory() {
    for world_size in [2, 3, 5] {
        in_world(world_size, |world| {
            let rank = world.rank();
            world.arena_segment(rank).unwrap().reserve("test", 0, 4096).unwrap();
            // SAFETY: the rank's own reserved page, which the others read only after the barrier.
            unsafe { world.arena_segment(rank).unwrap().as_ptr().write(rank as u8 + 1) };
            world.barrier("written", SOON).unwrap();
            for peer in 0..world_size {
                // SAFETY: reserved and written by its owner before the barrier, not written after it.
                assert_eq!(unsafe { world.arena_segment(peer).unwrap().as_ptr().read() }, peer as u8 + 1);
            }
            assert!(matches!(world.arena_segment(world_size), Err(Error::InvalidArgument { .. })));
        });
    }
}

#[test]
fn sixty_four_ranks_meet_and_agree() {
    let gathered = in_world(64, |world| {
        let one_says_no = world.reduce_boolean(world.rank() != 41, true, SOON).unwrap();
        let one_says_yes = world.reduce_boolean(world.rank() == 41, false, SOON).unwrap();
        assert!(!one_says_no && one_says_yes);
        world.all_gather_bytes(&world.rank().to_le_bytes(), SOON).unwrap()
    });
    let expected: Vec<Vec<u8>> = (0..64_u32).map(|rank| rank.to_le_bytes().to_vec()).collect();
    assert!(gathered.iter().all(|seen| *seen == expected));
}

#[test]
fn zero_and_too_many_ranks_are_refused() {
    for world_size in [0, 65, u32::MAX] {
        let refused = launch::threads(world_size, |_| ());
        assert!(matches!(refused, Err(Error::InvalidArgument { argument: "world_size", .. })), "{refused:?}");
    }
    let mut wrong = Environment::single();
    wrong.rank = 3;
    assert!(matches!(World::join(wrong, options()), Err(Error::InvalidArgument { argument: "rank", .. })));
    for limit in [Duration::from_millis(99), Duration::from_secs(3601)] {
        let wrong = WorldOptions { heartbeat_limit: Some(limit), ..options() };
        let refused = World::join(Environment::single(), wrong).unwrap_err();
        assert!(matches!(refused, Error::InvalidArgument { argument: "heartbeat_limit", .. }), "{refused:?}");
    }
    let wrong = WorldOptions { arena_bytes: usize::MAX, ..options() };
    assert!(matches!(World::join(Environment::single(), wrong), Err(Error::SizeOverflow { .. })));
}

#[test]
fn booleans_follow_all_and_any() {
    for world_size in [1, 2, 4] {
        for yes in 0..1_u32 << world_size {
            let (all, any) = (yes + 1 == 1 << world_size, yes != 0);
            in_world(world_size, |world| {
                let mine = yes >> world.rank() & 1 == 1;
                assert_eq!(world.reduce_boolean(mine, true, SOON).unwrap(), all);
                assert_eq!(world.reduce_boolean(mine, false, SOON).unwrap(), any);
            });
        }
    }
}

#[test]
fn bytes_of_any_length_are_broadcast_from_any_root() {
    // Around the size of a slot, 16 KiB, and far beyond it.
    let lengths = [0_usize, 1, 7, 8, 16_383, 16_384, 16_385, 32_768, 1_000_003];
    in_world(3, |world| {
        for root in 0..3 {
            for len in lengths {
                let sent: Vec<u8> = (0..len).map(|index| (index * 7 + root as usize) as u8).collect();
                let given = if world.rank() == root { sent.clone() } else { vec![0xee; 5] };
                assert!(world.broadcast_bytes(root, &given, SOON).unwrap() == sent, "{len} bytes from {root}");
            }
        }
        assert!(matches!(world.broadcast_bytes(3, &[], SOON), Err(Error::InvalidArgument { argument: "root", .. })));
    });
}

#[test]
fn values_are_broadcast_whole() {
    #[derive(Debug, PartialEq, Clone, serde::Serialize, serde::Deserialize)]
    struct State {
        step: u64,
        loss: f64,
        name: String,
        shuffled: Vec<u32>,
    }
    let state = State { step: u64::MAX, loss: 0.1 + 0.2, name: "né\0".into(), shuffled: (0..50_000).rev().collect() };
    in_world(3, |world| {
        let given = (world.rank() == 2).then(|| state.clone());
        assert_eq!(world.broadcast_value(2, given, SOON).unwrap(), state);
    });
    // A root without a value says so to its own caller; the others go on waiting for it.
    let world = World::join(Environment::single(), options()).unwrap();
    assert!(matches!(world.broadcast_value::<u32>(0, None, SOON), Err(Error::InvalidArgument { .. })));
}

#[test]
fn a_value_that_does_not_fit_the_receiver_fails_every_rank() {
    let results = in_failing_world(2, |world| {
        if world.rank() == 0 {
            world.broadcast_value(0, Some("not a number".to_owned()), SOON)?;
        } else {
            world.broadcast_value::<u32>(0, None, SOON)?;
        }
        world.barrier("after", SOON)
    });
    for result in &results {
        assert!(matches!(result, Err(Error::RankFailed { rank: 1, reason }) if reason.contains("u32")), "{result:?}");
    }
}

#[test]
fn gathered_lengths_may_differ() {
    in_world(4, |world| {
        let mine = vec![world.rank() as u8; world.rank() as usize * 20_000];
        let gathered = world.all_gather_bytes(&mine, SOON).unwrap();
        for (rank, theirs) in gathered.iter().enumerate() {
            assert_eq!(*theirs, vec![rank as u8; rank * 20_000]);
        }
        let refused = world.all_gather_bytes(&vec![0; GATHER_LIMIT_BYTES + 1], SOON);
        assert!(matches!(refused, Err(Error::InvalidArgument { argument: "bytes", .. })));
    });
}

/// A pipe's end as the number of its inode, which is the pipe's own.
fn inode(descriptor: impl std::os::fd::AsFd) -> u64 {
    rustix::fs::fstat(descriptor).unwrap().st_ino
}

#[test]
fn every_rank_receives_every_descriptor() {
    for world_size in [1, 2, 5] {
        let received = in_world(world_size, |world| {
            let both = [0, 1].map(|_| {
                let (own, _) = rustix::pipe::pipe().unwrap();
                let all = world.exchange_descriptors(&own, SOON).unwrap();
                let flags = all.iter().map(|one| rustix::io::fcntl_getfd(one).unwrap());
                assert!(flags.into_iter().all(|flags| flags == rustix::io::FdFlags::CLOEXEC));
                assert_eq!(inode(&all[world.rank() as usize]), inode(own));
                all
            });
            world.barrier("between", SOON).unwrap();
            both.map(|all| all.iter().map(inode).collect::<Vec<u64>>())
        });
        assert!(received.iter().all(|both| *both == received[0] && both[0].len() == world_size as usize));
        assert!(received[0][0] != received[0][1], "each call its own");
    }
}

#[test]
fn thousands_of_calls_stay_in_order() {
    in_world(4, |world| {
        for round in 0..500_u32 {
            let root = round % 4;
            let sent = round.to_le_bytes();
            assert_eq!(world.broadcast_bytes(root, &sent, SOON).unwrap(), sent);
            assert!(world.reduce_boolean(round % 3 == world.rank() % 3, false, SOON).unwrap());
            world.barrier("round", SOON).unwrap();
        }
    });
}

#[test]
fn p06_different_calls_name_both_sides_on_every_rank() {
    type Call = fn(&World) -> Result<()>;
    let calls: [(&str, Call); 8] = [
        ("barrier \"a\"", |world| world.barrier("a", SOON)),
        ("barrier \"b\"", |world| world.barrier("b", SOON)),
        ("broadcast of bytes from rank 0", |world| world.broadcast_bytes(0, b"x", SOON).map(drop)),
        ("broadcast of bytes from rank 1", |world| world.broadcast_bytes(1, b"x", SOON).map(drop)),
        ("all_gather of bytes", |world| world.all_gather_bytes(b"x", SOON).map(drop)),
        ("reduce_boolean (all)", |world| world.reduce_boolean(true, true, SOON).map(drop)),
        ("reduce_boolean (any)", |world| world.reduce_boolean(true, false, SOON).map(drop)),
        ("exchange_descriptors", |world| world.exchange_descriptors(std::io::stdin(), SOON).map(drop)),
    ];
    for (one, (most_say, most)) in calls.iter().enumerate() {
        for (two, (odd_says, odd)) in calls.iter().enumerate() {
            if one == two {
                continue;
            }
            let results = in_failing_world(3, |world| if world.rank() == 2 { odd(world) } else { most(world) });
            for (rank, result) in results.iter().enumerate() {
                let Err(Error::Mismatch { mine, theirs, rank: teller, peer, .. }) = result else {
                    panic!("{most_say} against {odd_says}, rank {rank}: {result:?}");
                };
                let mut said = [mine.as_str(), theirs.as_str()];
                said.sort_unstable();
                let mut expected = [*most_say, *odd_says];
                expected.sort_unstable();
                assert_eq!(said, expected);
                // Rank 2 tells it from its own side.
                assert!(rank != 2 || (*teller == 2 && mine == odd_says), "{teller} {peer} {mine}");
            }
        }
    }
}

#[test]
fn p04_a_barrier_lists_who_is_absent() {
    let results = in_failing_world(4, |world| {
        if world.rank() % 2 == 1 {
            while world.fault().is_none() {
                std::thread::sleep(Duration::from_millis(1));
            }
            return world.barrier("late", SOON);
        }
        world.barrier("epoch 3", MISSED)
    });
    for result in &results {
        let Err(Error::BarrierTimeout { name, absent, waited_ms }) = result else { panic!("{result:?}") };
        assert_eq!((name.as_str(), absent.as_slice()), ("epoch 3", &[1, 3][..]));
        assert!(u128::from(*waited_ms) >= MISSED.as_millis());
    }
}

/// Threads of one rank take turns, and nobody waits for his turn longer than his deadline.
#[test]
fn threads_of_a_rank_take_turns() {
    in_world(2, |world| {
        // One more call than threads on the other rank, so that all of them end.
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..50 {
                        world.barrier("same", SOON).unwrap();
                    }
                });
            }
        });
    });
    let has_given_up = AtomicU32::new(0);
    let results = in_failing_world(2, |world| {
        if world.rank() == 1 {
            while has_given_up.load(Ordering::SeqCst) == 0 {
                std::thread::sleep(Duration::from_millis(1));
            }
            return world.barrier("long", SOON);
        }
        std::thread::scope(|scope| {
            let long = scope.spawn(|| world.barrier("long", SOON));
            while !world.flight_record(0).unwrap().to_string().contains("barrier \\\"long") {
                std::thread::sleep(Duration::from_millis(1));
            }
            let short = world.barrier("short", Duration::from_millis(100));
            has_given_up.store(1, Ordering::SeqCst);
            assert!(matches!(&short, Err(Error::BarrierTimeout { absent, .. }) if *absent == [0]), "{short:?}");
            long.join().unwrap()
        })
    });
    assert!(results.iter().all(Result::is_ok), "{results:?}");
}

/// Collects what is logged, as one line each.
#[derive(Clone, Default)]
struct Log(std::sync::Arc<std::sync::Mutex<Vec<String>>>);

impl tracing::Subscriber for Log {
    fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
        *metadata.level() <= tracing::Level::WARN
    }
    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }
    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}
    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}
    fn event(&self, event: &tracing::Event<'_>) {
        struct Line(String);
        impl tracing::field::Visit for Line {
            fn record_debug(&mut self, field: &tracing::field::Field, value: &dyn std::fmt::Debug) {
                self.0.push_str(&format!("{}={value:?} ", field.name()));
            }
        }
        let mut line = Line(format!("{} ", event.metadata().level()));
        event.record(&mut line);
        self.0.lock().unwrap().push(line.0);
    }
    fn enter(&self, _: &tracing::span::Id) {}
    fn exit(&self, _: &tracing::span::Id) {}
}

#[test]
fn p04_a_long_wait_is_warned_of_by_name_and_the_error_is_logged_with_the_last_operations() {
    let log = Log::default();
    // With one subscriber alone tracing asks the thread that meets a line first whether anybody wants it, and that may be
    // another test's.
    let _second = tracing::Dispatch::new(Log::default());
    let results = launch::threads(2, |environment| {
        let options = WorldOptions { warn_after: Duration::from_millis(100), ..options() };
        let world = World::join(environment, options).unwrap();
        if world.rank() == 1 {
            while world.fault().is_none() {
                std::thread::sleep(Duration::from_millis(1));
            }
            return Ok(());
        }
        let _logged = tracing::subscriber::set_default(log.clone());
        world.barrier("epoch", 2 * MISSED)
    })
    .unwrap();
    assert!(results[0].is_err());
    let lines = log.0.lock().unwrap().clone();
    let warning = lines.iter().find(|line| line.starts_with("WARN")).expect("a warning");
    assert!(warning.contains("absent=[1]") && warning.contains("barrier \"epoch\""), "{warning}");
    assert_eq!(lines.iter().filter(|line| line.starts_with("WARN")).count(), 1, "one is enough: {lines:?}");
    let error = lines.iter().find(|line| line.starts_with("ERROR")).unwrap_or_else(|| panic!("no error in {lines:?}"));
    assert!(error.contains("did not come within") && error.contains("barrier \\\"join"), "{error}");
}

#[test]
fn a_dropped_rank_is_lost_to_who_waits_for_it() {
    let results = launch::threads(3, |environment| {
        let world = World::join(environment, options()).unwrap();
        if world.rank() == 1 {
            return Ok(());
        }
        let start = Instant::now();
        let result = world.barrier("never", SOON);
        assert!(start.elapsed() < SOON / 2);
        assert!(world.fault().is_some() && world.barrier("later", SOON).is_err());
        result
    })
    .unwrap();
    for rank in [0, 2] {
        assert!(matches!(&results[rank], Err(Error::PeerLost { rank: 1, .. })), "{:?}", results[rank]);
    }
}

#[test]
fn a_panic_of_a_rank_reaches_the_others_and_the_caller() {
    let survivors = AtomicU32::new(0);
    let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        launch::threads(3, |environment| {
            let world = World::join(environment, options()).unwrap();
            assert!(world.rank() != 1, "deliberate");
            let error = world.barrier("never", SOON).unwrap_err();
            assert!(matches!(error, Error::PeerLost { rank: 1, .. }), "{error:?}");
            survivors.fetch_add(1, Ordering::SeqCst);
        })
    }));
    assert!(caught.is_err());
    assert_eq!(survivors.load(Ordering::SeqCst), 2);
}

#[test]
fn p05_the_first_error_stays_and_stops_everything() {
    let results = in_failing_world(3, |world| {
        if world.rank() == 1 {
            return Err(world.raise(Error::RankFailed { rank: 1, reason: "out of disk".into() }));
        }
        let first = world.barrier("never", SOON);
        assert!(matches!(&first, Err(Error::RankFailed { rank: 1, .. })), "{first:?}");
        let start = Instant::now();
        let second = world.raise(Error::RankFailed { rank: world.rank(), reason: "consequence".into() });
        assert!(matches!(second, Error::RankFailed { rank: 1, .. }), "{second:?}");
        assert!(world.barrier("x", SOON).is_err() && world.reduce_boolean(true, true, SOON).is_err());
        assert!(world.broadcast_bytes(0, &[], SOON).is_err() && world.all_gather_bytes(&[], SOON).is_err());
        assert!(world.broadcast_value(0, Some(1), SOON).is_err());
        assert!(start.elapsed() < SOON / 2, "none of them waits");
        first
    });
    for result in results {
        assert!(matches!(result, Err(Error::RankFailed { rank: 1, reason }) if reason == "out of disk"));
    }
}

/// Ranks leave one after the other; who has left is an error only to who then waits for it.
#[test]
fn leaving_is_no_failure() {
    let results = launch::threads(4, |environment| {
        let world = World::join(environment, options()).unwrap();
        let rank = world.rank();
        world.barrier("work", SOON).unwrap();
        if rank != 3 {
            drop(world);
            return None;
        }
        let start = Instant::now();
        while !(0..3).all(|peer| matches!(world.fault_of(peer), Some(Error::PeerLost { .. }))) {
            assert!(start.elapsed() < SOON);
            std::thread::sleep(Duration::from_millis(1));
        }
        let unharmed = world.fault();
        assert!(unharmed.is_none(), "{unharmed:?}");
        Some(world.teardown(SOON))
    })
    .unwrap();
    assert!(matches!(results[3], Some(Err(Error::PeerLost { .. }))), "{:?}", results[3]);
}

#[test]
fn p22_threads_that_never_join_are_missing() {
    let results = launch::threads(4, |environment| {
        if environment.rank % 2 == 1 {
            std::thread::sleep(2 * MISSED);
            return Ok(());
        }
        let options = WorldOptions { init_timeout: MISSED, ..options() };
        World::join(environment, options).map(drop)
    })
    .unwrap();
    for rank in [0, 2] {
        let Err(Error::RanksMissing { rank: teller, missing, world_size: 4, .. }) = &results[rank] else {
            panic!("{:?}", results[rank]);
        };
        assert_eq!((*teller as usize, missing.as_slice()), (rank, &[1, 3][..]));
    }
}

#[test]
fn several_worlds_live_side_by_side() {
    std::thread::scope(|scope| {
        for world_size in [2, 3, 4] {
            scope.spawn(move || {
                for _ in 0..5 {
                    let sizes = in_world(world_size, |world| world.all_gather_bytes(&[], SOON).unwrap().len());
                    assert!(sizes.iter().all(|size| *size == world_size as usize));
                }
            });
        }
    });
}

#[test]
fn nothing_stays_open_when_worlds_end() {
    let open = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let threads = || std::fs::read_dir("/proc/self/task").unwrap().count();
    // Other tests of this process come and go meanwhile, so the counts are taken in a process of their own.
    let Some(_) = std::env::var_os("ANNULUS_TEST_ALONE") else {
        let own = std::env::current_exe().unwrap();
        let alone = std::process::Command::new(own)
            .args(["nothing_stays_open_when_worlds_end", "--exact", "--nocapture"])
            .env("ANNULUS_TEST_ALONE", "1")
            .output()
            .unwrap();
        assert!(alone.status.success(), "{}", String::from_utf8_lossy(&alone.stdout));
        return;
    };
    in_world(3, |_| ());
    let before = (open(), threads());
    for _ in 0..10 {
        in_world(3, |world| world.barrier("x", SOON).unwrap());
    }
    assert_eq!((open(), threads()), before);
}

/// One relaxed load and a branch: it stands in every wait loop.
#[test]
fn asking_for_a_fault_is_cheap() {
    let world = World::join(Environment::single(), options()).unwrap();
    let start = Instant::now();
    for _ in 0..1_000_000 {
        assert!(std::hint::black_box(&world).fault().is_none());
    }
    let each = start.elapsed() / 1_000_000;
    println!("fault(): {each:?}");
    assert!(each < Duration::from_micros(1));
}
