//! Descriptors between processes: they arrive, and what the others are told when a rank dies, stops or sends something else
//! (P1, P2, P7, P9, P10, P13).

mod ranks;

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::time::Duration;

use annulus::world::{Environment, World, WorldOptions};
use ranks::{PATIENCE, Process, long, names_in, say, torch_rank};
use rustix::net::{AddressFamily, SendFlags, SocketType, sockopt};
use rustix::process::{Resource, Rlimit, Signal};

#[test]
fn role() {
    ranks::play(&[
        ("files", files),
        ("exchanges", exchanges),
        ("liar", liar),
        ("starved", starved),
        ("starved_early", starved_early),
    ]);
}

// ---- roles -------------------------------------------------------------------------------------------------------------

fn join(heartbeat_limit: Option<Duration>) -> World {
    World::join(Environment::detect().unwrap(), WorldOptions { heartbeat_limit, ..ranks::options() }).unwrap()
}

fn memory(text: &str) -> File {
    let mut file = File::from(rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
    file.write_all(text.as_bytes()).unwrap();
    file
}

/// The Unix sockets of this process that keep messages apart: those of the rendezvous.
fn sockets() -> Vec<OwnedFd> {
    let own = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
    let numbers = own.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    // Duplicates, which are owned, of whatever is still open.
    let duplicates = numbers.filter_map(|number| {
        // SAFETY: only used for the call, which refuses a number that is not open.
        let open = unsafe { std::os::fd::BorrowedFd::borrow_raw(number) };
        open.try_clone_to_owned().ok()
    });
    let is_ours = |socket: &OwnedFd| {
        sockopt::socket_domain(socket) == Ok(AddressFamily::UNIX)
            && sockopt::socket_type(socket) == Ok(SocketType::SEQPACKET)
    };
    duplicates.filter(is_ours).collect()
}

/// Gives a file, and reads those of the others.
fn files() {
    let world = join(None);
    let own = memory(&format!("of rank {}", world.rank()));
    let all = world.exchange_descriptors(&own, PATIENCE).unwrap();
    for (rank, descriptor) in all.into_iter().enumerate() {
        assert_eq!(rustix::io::fcntl_getfd(&descriptor), Ok(rustix::io::FdFlags::CLOEXEC));
        // From a place of its own: the ranks' descriptors of one memory share the place that `read` would go on from.
        let mut text = [0; 16];
        let len_bytes = File::from(descriptor).read_at(&mut text, 0).unwrap();
        assert_eq!(std::str::from_utf8(&text[..len_bytes]), Ok(&*format!("of rank {rank}")));
    }
    world.barrier("read", PATIENCE).unwrap();
    let sockets = sockets();
    assert!(!sockets.is_empty() && sockets.iter().all(|socket| sockopt::socket_acceptconn(socket) == Ok(false)));
    say("done");
    world.teardown(PATIENCE).unwrap();
}

/// Exchanges without end, and tells how that ended.
fn exchanges() {
    let beating = std::env::var_os("TEST_WAIT_MS").is_none();
    let world = join(beating.then_some(Duration::from_millis(500)));
    let timeout = std::env::var("TEST_WAIT_MS").map_or(PATIENCE, |text| Duration::from_millis(text.parse().unwrap()));
    let own = memory("x");
    say("joined");
    let error = loop {
        if let Err(error) = world.exchange_descriptors(&own, timeout) {
            break error;
        }
    };
    say(format!("error {error:?}"));
    assert!(world.exchange_descriptors(&own, timeout).is_err(), "poisoned");
}

/// Rank 1 sends what the test says before it gives its descriptor.
fn liar() {
    let world = join(None);
    let own = memory("x");
    if world.rank() == 1 {
        let text = std::env::var("TEST_LIE").unwrap();
        let lie = match text.strip_prefix("zeroes ") {
            Some(count) => vec![0; count.parse().unwrap()],
            None => [b"annulus\x01", text.as_bytes()].concat(),
        };
        let [socket] = sockets().try_into().expect("a rank has one socket, to rank 0");
        rustix::net::send(socket.as_fd(), &lie, SendFlags::NOSIGNAL).unwrap();
    }
    say(format!("error {:?}", world.exchange_descriptors(&own, PATIENCE).unwrap_err()));
}

/// From now on this process may open `left` descriptors more.
fn starve(left: usize) {
    let held: Vec<File> = (0..left).map(|_| memory("held")).collect();
    // The least that is free, below which all are in use.
    let end = memory("the first that is too many").as_raw_fd();
    rustix::process::setrlimit(Resource::Nofile, Rlimit { current: Some(end as u64), maximum: Some(1 << 10) }).unwrap();
    drop(held);
}

fn left_to(rank: u32) -> Option<usize> {
    let [starved, left] =
        ["TEST_STARVED", "TEST_LEFT"].map(|name| std::env::var(name).unwrap().parse::<usize>().unwrap());
    (starved == rank as usize).then_some(left)
}

/// One rank has too few descriptors left for those of the others.
fn starved() {
    let world = join(None);
    let own = memory("x");
    if let Some(left) = left_to(world.rank()) {
        starve(left);
    }
    let error = loop {
        if let Err(error) = world.exchange_descriptors(&own, PATIENCE) {
            break error;
        }
    };
    say(format!("error {error:?}"));
}

/// One rank has too few descriptors left for what the rendezvous brings.
fn starved_early() {
    let environment = Environment::detect().unwrap();
    if let Some(left) = left_to(environment.rank) {
        starve(left);
    }
    say(format!("error {:?}", World::join(environment, ranks::options()).unwrap_err()));
}

// ---- tests -------------------------------------------------------------------------------------------------------------

fn start(role: &str, world_size: u32, variables: &[(&str, &str)]) -> (tempfile::TempDir, Vec<Process>) {
    let tmpdir = tempfile::tempdir().unwrap();
    let start = |rank| {
        let mut command = torch_rank(role, tmpdir.path(), rank, world_size);
        command.envs(variables.iter().copied());
        Process::start(command)
    };
    let processes = (0..world_size).map(start).collect();
    (tmpdir, processes)
}

#[test]
fn p13_descriptors_reach_every_process_and_nothing_listens() {
    for world_size in [2, 4] {
        let (tmpdir, mut processes) = start("files", world_size, &[]);
        processes.iter_mut().for_each(|process| drop(process.expect(">> done")));
        assert_eq!(names_in(tmpdir.path()), [""; 0]);
        processes.into_iter().for_each(|process| assert_eq!(process.finish().0, 0));
    }
}

/// Wherever in an exchange it is.
#[test]
fn p01_a_rank_killed_in_an_exchange_is_lost_to_every_other() {
    for round in 0..if long() { 60 } else { 6 } {
        let victim = round % 3;
        let (tmpdir, mut processes) = start("exchanges", 3, &[]);
        processes.iter_mut().for_each(|process| drop(process.expect(">> joined")));
        std::thread::sleep(Duration::from_millis(20) + Duration::from_micros(170 * round as u64));
        processes[victim].signal(Signal::KILL);
        for (rank, process) in processes.iter_mut().enumerate().filter(|(rank, _)| *rank != victim) {
            let (_, error) = process.expect(">> error");
            assert!(error.contains(&format!("PeerLost {{ rank: {victim},")), "rank {rank}: {error}");
        }
        assert_eq!(names_in(tmpdir.path()), [""; 0]);
    }
}

#[test]
fn p02_a_rank_stopped_in_an_exchange_is_reported() {
    let (_tmpdir, mut processes) = start("exchanges", 3, &[]);
    processes.iter_mut().for_each(|process| drop(process.expect(">> joined")));
    processes[1].signal(Signal::STOP);
    for rank in [0, 2] {
        let (_, error) = processes[rank].expect(">> error");
        assert!(error.contains("PeerStopped { rank: 1,"), "rank {rank}: {error}");
    }
}

/// Without the watch, too, by the deadline of the call.
#[test]
fn p04_an_exchange_ends_at_its_deadline() {
    for (victim, waiter) in [(1, 0), (0, 1)] {
        let (_tmpdir, mut processes) = start("exchanges", 2, &[("TEST_WAIT_MS", "700")]);
        processes.iter_mut().for_each(|process| drop(process.expect(">> joined")));
        processes[victim].signal(Signal::STOP);
        let (_, error) = processes[waiter].expect(">> error");
        let named = error.contains("BarrierTimeout") && error.contains(&format!("absent: [{victim}]"));
        assert!(named && error.contains("exchange_descriptors"), "{error}");
    }
}

#[test]
fn p10_what_is_no_such_frame_ends_the_exchange_by_name() {
    for (lie, told) in [
        ("zeroes 65537", "a frame longer than 65536 bytes"),
        ("zeroes 9", "a frame that begins"),
        ("{\"Descriptors\":{\"sequence\":7777}}", "Descriptors { sequence: 7777 } with 0 descriptors, not 1"),
        ("{\"Missing\":{\"ranks\":[]}}", "Missing { ranks: [] } with 0 descriptors"),
        ("{\"Descriptors\":{\"sequence\":2}}", "Descriptors { sequence: 2 } with 0 descriptors, not 1"),
    ] {
        let (_tmpdir, mut processes) = start("liar", 3, &[("TEST_LIE", lie)]);
        for (rank, process) in processes.iter_mut().enumerate() {
            let (_, error) = process.expect(">> error");
            let named = error.contains("RankFailed { rank: 1,") && error.contains(told);
            assert!(named, "{lie}, rank {rank}: {error}");
        }
    }
}

/// What each rank says of rank `starved`, which has `left` descriptors left.
fn told_of_the_starved(role: &str, starved: usize, left: usize) -> Vec<String> {
    let variables = [("TEST_STARVED", &*starved.to_string()), ("TEST_LEFT", &*left.to_string())];
    let (_tmpdir, mut processes) = start(role, 3, &variables);
    let told: Vec<String> = processes.iter_mut().map(|process| process.expect(">> error").1).collect();
    for (rank, error) in told.iter().enumerate() {
        assert!(error.contains("(ulimit -n is "), "rank {rank}: {error}");
        assert_eq!(rank == starved, error.contains("Io {"), "{role}, rank {rank} of {starved}: {error}");
    }
    told
}

/// Where its own is duplicated, where it takes that of another, and where it takes all.
#[test]
fn p10_a_rank_without_descriptors_left_is_the_one_that_has_failed() {
    for (starved, left) in [(0, 0), (0, 1), (1, 0), (1, 2), (2, 1)] {
        for (rank, error) in told_of_the_starved("starved", starved, left).iter().enumerate() {
            let named = error.contains(&format!("RankFailed {{ rank: {starved},"));
            assert!(rank == starved || named, "rank {rank}: {error}");
        }
    }
}

/// In the rendezvous: of the welcome's seven descriptors, and of the two of a hello.
#[test]
fn p10_a_rank_without_descriptors_for_the_rendezvous_says_so() {
    let told = told_of_the_starved("starved_early", 1, 6);
    assert!(told[0].contains("RankFailed { rank: 1,") && told[2].contains("rank 1 failed"), "{told:#?}");
}
