//! Ranks that die, stop, come late or never: what the others are told, and how soon (P1-P5, P12, P22, P23).
//!
//! The short form asserts that things happen and within a second or two; `ANNULUS_FAULTS=long` repeats them and asserts
//! the figures of the promises, which needs a machine of one's own.

mod ranks;

use std::process::Command;
use std::sync::{RwLock, RwLockReadGuard};
use std::time::{Duration, Instant};

use annulus::Error;
use annulus::world::{Environment, World, WorldOptions};
use ranks::{PATIENCE, Process, eventually, is_alive, long, say, torch_rank};
use rustix::process::Signal;

#[test]
fn role() {
    ranks::play(&[
        ("barriers", barriers),
        ("watch", watch),
        ("late", late),
        ("steps", steps),
        ("exit", exit_without_leaving),
        ("reserve", reserve),
    ]);
}

// ---- roles -------------------------------------------------------------------------------------------------------------

fn milliseconds(name: &str, default: Duration) -> Duration {
    std::env::var(name).map_or(default, |text| Duration::from_millis(text.parse().unwrap()))
}

fn role_options() -> WorldOptions {
    let heartbeat_limit = match std::env::var("TEST_HEARTBEAT_MS").as_deref() {
        Ok("off") => None,
        _ => Some(milliseconds("TEST_HEARTBEAT_MS", Duration::from_millis(500))),
    };
    WorldOptions {
        init_timeout: milliseconds("TEST_INIT_MS", PATIENCE),
        warn_after: milliseconds("TEST_WARN_MS", Duration::from_secs(5)),
        heartbeat_limit,
        ..ranks::options()
    }
}

fn join() -> World {
    World::join(Environment::detect().unwrap(), role_options()).unwrap()
}

/// Waits in a barrier that not everybody enters, and tells how it ended.
fn barriers() {
    let world = join();
    let absent: u32 = std::env::var("TEST_ABSENT").unwrap().parse().unwrap();
    say(format!("joined rank {}", world.rank()));
    if world.rank() == absent {
        std::thread::sleep(2 * PATIENCE);
    }
    let timeout = milliseconds("TEST_BARRIER_MS", PATIENCE);
    let error = world.barrier("never", timeout).unwrap_err();
    say(format!("error {error:?}"));
    // Poisoned: every later call says so at once.
    let again = Instant::now();
    assert!(world.barrier("again", PATIENCE).is_err() && world.reduce_boolean(true, true, PATIENCE).is_err());
    say(format!("again after {} us", again.elapsed().as_micros()));
    let record = world.flight_record(absent).unwrap();
    say(format!("record {record}"));
}

/// Waits until there is a fault, without any call.
fn watch() {
    let world = join();
    say(format!("joined rank {}", world.rank()));
    let start = Instant::now();
    while start.elapsed() < 2 * PATIENCE {
        if let Some(fault) = world.fault() {
            say(format!("error {fault:?}"));
            return;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Joins with a short deadline and tells how that went.
fn late() {
    match World::join(Environment::detect().unwrap(), role_options()) {
        Ok(world) => {
            say("joined");
            world.teardown(PATIENCE).unwrap();
        }
        Err(error) => say(format!("error {error:?}")),
    }
}

/// Barriers without end, each told, until standard input is closed everywhere.
fn steps() {
    let world = join();
    say(format!("joined rank {}", world.rank()));
    let end = Instant::now() + milliseconds("TEST_STEPS_MS", Duration::from_secs(1));
    let mut step = 0_u64;
    while world.reduce_boolean(Instant::now() < end, true, PATIENCE).unwrap() {
        step += 1;
        if step.is_multiple_of(64) {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    assert!(world.fault().is_none(), "{:?}", world.fault());
    say(format!("done after {step} steps"));
    world.teardown(PATIENCE).unwrap();
}

fn exit_without_leaving() {
    let world = join();
    if world.rank() == 1 {
        std::process::exit(0);
    }
    say(format!("error {:?}", world.barrier("never", PATIENCE).unwrap_err()));
}

/// Asks for more memory than there may be.
fn reserve() {
    let options = ranks::options();
    let world = match World::join(Environment::single(), options) {
        Ok(world) => world,
        Err(error) => return say(format!("error {error:?}")),
    };
    let arena = world.arena_segment(0).unwrap();
    let need = 256 << 20;
    match arena.reserve("test", 0, need) {
        Err(error) => say(format!("error {error:?}")),
        Ok(()) => {
            // What was granted can be touched.
            for page in (0..need).step_by(4096) {
                // SAFETY: inside the range just reserved, which this thread alone uses.
                unsafe { arena.as_ptr().add(page).write(1) };
            }
            say("granted");
        }
    }
}

// ---- starting them -----------------------------------------------------------------------------------------------------

fn start(role: &str, world_size: u32, also: impl Fn(&mut Command)) -> (tempfile::TempDir, Vec<Process>) {
    let tmpdir = tempfile::tempdir().unwrap();
    let start = |rank| {
        let mut command = torch_rank(role, tmpdir.path(), rank, world_size);
        also(&mut command);
        Process::start(command)
    };
    let processes = (0..world_size).map(start).collect();
    (tmpdir, processes)
}

fn nothing_else(_: &mut Command) {}

/// Starts `barriers` with `victim` absent, does `harm` to it, and returns what the others said and after what time.
fn harmed(world_size: u32, victim: u32, signal: Signal, delay: Duration) -> Vec<(Duration, String)> {
    let (_tmpdir, mut processes) = start("barriers", world_size, |command| {
        command.env("TEST_ABSENT", victim.to_string());
    });
    processes.iter_mut().for_each(|process| drop(process.expect(">> joined")));
    std::thread::sleep(delay);
    let harmed = Instant::now();
    processes[victim as usize].signal(signal);
    let mut told = Vec::new();
    for (rank, process) in processes.iter_mut().enumerate().filter(|(rank, _)| *rank != victim as usize) {
        let (when, error) = process.expect(">> error");
        let (_, again) = process.expect(">> again after");
        let again: u64 = again.split_whitespace().nth(3).unwrap().parse().unwrap();
        assert!(again < if long() { 100_000 } else { 5_000_000 }, "rank {rank} took {again} us to say it again");
        told.push((when.saturating_duration_since(harmed), error));
    }
    told
}

/// Tests that load the machine have it to themselves; the others hold this for reading.
static MACHINE: RwLock<()> = RwLock::new(());

fn quiet() -> RwLockReadGuard<'static, ()> {
    MACHINE.read().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// So many busy loops, until they are dropped.
fn burners(count: usize) -> Vec<Process> {
    let burner = |_| {
        let mut command = Command::new("sh");
        command.args(["-c", "while :; do :; done"]);
        Process::start(command)
    };
    (0..count).map(burner).collect()
}

fn percentile_99(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[(times.len() * 99 / 100).min(times.len() - 1)]
}

/// The matrix of Gloo's transport test: signal x ranks x victim x delay.
fn matrix(signal: Signal, expected: &str, loose: Duration, figure: Duration) {
    let repeats = if long() { 25 } else { 1 };
    let delays: &[u64] = if long() { &[0, 5, 50] } else { &[0, 20] };
    let mut times = Vec::new();
    for world_size in [2, 3, 4] {
        for victim in if long() { vec![0, world_size - 1] } else { vec![world_size / 2] } {
            for delay in delays {
                for _ in 0..repeats {
                    let told = harmed(world_size, victim, signal, Duration::from_millis(*delay));
                    assert_eq!(told.len() as u32, world_size - 1);
                    for (after, error) in told {
                        let named = error.contains(expected) && error.contains(&format!("rank: {victim},"));
                        assert!(named && error.contains("barrier"), "{world_size} ranks, {victim}: {error}");
                        assert!(after < loose, "{world_size} ranks, {victim}: told after {after:?}");
                        times.push(after);
                    }
                }
            }
        }
    }
    let (p99, count) = (percentile_99(times.clone()), times.len());
    println!("{expected}: {count} reports, p99 {p99:?}, most {:?}", times.iter().max().unwrap());
    assert!(!long() || p99 <= figure, "p99 {p99:?} of {count}, promised {figure:?}");
}

// ---- tests -------------------------------------------------------------------------------------------------------------

#[test]
fn p01_a_killed_rank_is_lost_to_every_other() {
    let _quiet = quiet();
    matrix(Signal::KILL, "PeerLost", Duration::from_secs(2), Duration::from_millis(50));
}

#[test]
fn p02_a_stopped_rank_is_reported_not_waited_for() {
    let _quiet = quiet();
    matrix(Signal::STOP, "PeerStopped", Duration::from_secs(4), Duration::from_millis(700));
}

#[test]
fn p01_a_rank_that_exits_without_leaving_is_lost() {
    let _quiet = quiet();
    let (_tmpdir, mut processes) = start("exit", 3, nothing_else);
    for rank in [0, 2] {
        let (_, error) = processes[rank].expect(">> error");
        assert!(error.contains("PeerLost") && error.contains("rank: 1,"), "{error}");
    }
}

/// Nobody waits for anybody, and all the same everybody knows.
#[test]
fn p01_a_death_is_known_without_a_call() {
    let _quiet = quiet();
    let (_tmpdir, mut processes) = start("watch", 3, nothing_else);
    processes.iter_mut().for_each(|process| drop(process.expect(">> joined")));
    processes[0].signal(Signal::KILL);
    for process in &mut processes[1..] {
        let (_, error) = process.expect(">> error");
        assert!(error.contains("PeerLost { rank: 0,"), "{error}");
    }
}

/// The stopped rank itself learns of it when it goes on.
#[test]
fn p02_a_stopped_rank_that_goes_on_fails_too() {
    let _quiet = quiet();
    let (_tmpdir, mut processes) = start("watch", 2, nothing_else);
    processes.iter_mut().for_each(|process| drop(process.expect(">> joined")));
    processes[1].signal(Signal::STOP);
    assert!(processes[0].expect(">> error").1.contains("PeerStopped { rank: 1,"));
    processes[1].signal(Signal::CONT);
    let (_, error) = processes[1].expect(">> error");
    // Rank 0 may have ended in the meantime, but its report was first.
    assert!(error.contains("PeerStopped { rank: 1,"), "{error}");
}

#[test]
fn p02_the_limit_can_be_set_and_switched_off() {
    let _quiet = quiet();
    for (limit, pause) in [("off", 1_200), ("3000", 1_200)] {
        let (_tmpdir, mut processes) = start("steps", 2, |command| {
            command.env("TEST_HEARTBEAT_MS", limit).env("TEST_STEPS_MS", "1500");
        });
        processes.iter_mut().for_each(|process| drop(process.expect(">> joined")));
        processes[1].signal(Signal::STOP);
        std::thread::sleep(Duration::from_millis(pause));
        processes[1].signal(Signal::CONT);
        for mut process in processes {
            process.expect(">> done");
            assert_eq!(process.finish().0, 0, "limit {limit}");
        }
    }
}

#[test]
fn p03_a_suspended_job_goes_on() {
    let _quiet = quiet();
    let pause = if long() { 5_000 } else { 1_500 };
    let (_tmpdir, mut processes) = start("steps", 3, |command| {
        command.env("TEST_STEPS_MS", (pause + 1_000).to_string());
    });
    processes.iter_mut().for_each(|process| drop(process.expect(">> joined")));
    for signal in [Signal::STOP, Signal::CONT] {
        processes.iter().for_each(|process| process.signal(signal));
        std::thread::sleep(Duration::from_millis(pause));
    }
    for mut process in processes {
        process.expect(">> done");
        assert_eq!(process.finish().0, 0);
    }
}

/// Ten minutes in the long form.
#[test]
fn p02_a_busy_machine_is_no_alarm() {
    let _alone = MACHINE.write().unwrap_or_else(|poisoned| poisoned.into_inner());
    let seconds: u64 = if long() { 600 } else { 3 };
    let burners = burners(16);
    let (_tmpdir, mut processes) = start("steps", 4, |command| {
        command.env("TEST_STEPS_MS", (seconds * 1_000).to_string());
    });
    processes.iter_mut().for_each(|process| drop(process.expect(">> joined")));
    std::thread::sleep(Duration::from_secs(seconds));
    for process in &mut processes {
        process.expect(">> done");
    }
    drop(burners);
}

#[test]
fn p01_a_death_on_a_busy_machine_is_noticed_too() {
    let _alone = MACHINE.write().unwrap_or_else(|poisoned| poisoned.into_inner());
    let burners = burners(8);
    let mut times = Vec::new();
    for _ in 0..if long() { 100 } else { 2 } {
        let told = harmed(3, 1, Signal::KILL, Duration::ZERO);
        assert!(told.iter().all(|(_, error)| error.contains("PeerLost { rank: 1,")), "{told:?}");
        times.extend(told.into_iter().map(|(after, _)| after));
    }
    drop(burners);
    let p99 = percentile_99(times.clone());
    println!("PeerLost beside 8 busy processes: p99 {p99:?}");
    assert!(p99 < Duration::from_millis(if long() { 250 } else { 3_000 }), "{times:?}");
}

#[test]
fn p04_a_live_rank_that_does_not_come_is_named() {
    let _quiet = quiet();
    let (_tmpdir, mut processes) = start("barriers", 3, |command| {
        command.env("TEST_ABSENT", "2").env("TEST_BARRIER_MS", "1500").env("TEST_WARN_MS", "100");
    });
    for process in &mut processes[..2] {
        let (_, error) = process.expect(">> error");
        assert!(error.contains("BarrierTimeout") && error.contains("absent: [2]"), "{error}");
        assert!(error.contains("\"never\""), "{error}");
    }
}

#[test]
fn p23_survivors_read_the_dead_ranks_flight_record() {
    let _quiet = quiet();
    let (_tmpdir, mut processes) = start("barriers", 2, |command| {
        command.env("TEST_ABSENT", "1");
    });
    processes.iter_mut().for_each(|process| drop(process.expect(">> joined")));
    processes[1].signal(Signal::KILL);
    let (_, line) = processes[0].expect(">> record");
    let record: serde_json::Value = serde_json::from_str(line.split_once("record ").unwrap().1).unwrap();
    let last = record["entries"].as_array().unwrap().last().unwrap();
    assert_eq!(record["rank"], 1);
    assert!(last["profiling_name"].as_str().unwrap().contains("barrier \"join\""), "{last}");
    assert_eq!(last["state"], "completed");
}

#[test]
fn p22_missing_ranks_are_listed_by_everybody_who_came() {
    let _quiet = quiet();
    // Also rank 0, which collects the others.
    for (world_size, missing) in [(2, vec![1]), (4, vec![1, 2]), (3, vec![0])] {
        let tmpdir = tempfile::tempdir().unwrap();
        let begun = Instant::now();
        let processes: Vec<Process> = (0..world_size)
            .filter(|rank| !missing.contains(rank))
            .map(|rank| {
                let mut command = torch_rank("late", tmpdir.path(), rank, world_size);
                command.env("TEST_INIT_MS", "2500");
                Process::start(command)
            })
            .collect();
        for process in processes {
            let (code, lines) = process.finish();
            let error = lines.iter().find(|line| line.contains("RanksMissing")).expect("RanksMissing");
            assert!(code == 0 && error.contains(&format!("missing: {missing:?}")), "{error}");
        }
        assert!(begun.elapsed() < PATIENCE);
        assert_eq!(ranks::names_in(tmpdir.path()), [""; 0], "an init that fails leaves no name");
    }
}

#[test]
fn p22_late_ranks_are_waited_for() {
    let _quiet = quiet();
    for order in [[0, 1, 2], [2, 1, 0], [1, 0, 2]] {
        let tmpdir = tempfile::tempdir().unwrap();
        let mut processes = Vec::new();
        for rank in order {
            processes.push(Process::start(torch_rank("late", tmpdir.path(), rank, 3)));
            std::thread::sleep(Duration::from_millis(250));
        }
        for mut process in processes {
            process.expect(">> joined");
            assert_eq!(process.finish().0, 0);
        }
        assert_eq!(ranks::names_in(tmpdir.path()), [""; 0]);
    }
}

#[test]
fn p22_a_rank_that_dies_while_others_wait_ends_the_waiting() {
    let _quiet = quiet();
    let tmpdir = tempfile::tempdir().unwrap();
    let mut processes: Vec<Process> =
        [0, 1, 2].map(|rank| Process::start(torch_rank("late", tmpdir.path(), rank, 4))).into();
    // Rank 2 has said hello once its socket is connected; give it time for that.
    std::thread::sleep(Duration::from_secs(2));
    processes[2].signal(Signal::KILL);
    for process in &mut processes[..2] {
        let (_, error) = process.expect(">> error");
        assert!(error.contains("PeerLost { rank: 2,"), "{error}");
    }
}

#[test]
fn p12_too_little_memory_is_an_error_not_a_signal() {
    let _quiet = quiet();
    let tmpdir = tempfile::tempdir().unwrap();
    // The file-size limit would be a SIGXFSZ, the address space a failed mmap.
    for limit in ["ulimit -f 1000", "ulimit -v 4000000"] {
        let line: Vec<String> =
            ranks::command_line().iter().map(|word| format!("'{}'", word.to_str().unwrap())).collect();
        let mut command = ranks::command("reserve", tmpdir.path());
        let mut shell = Command::new("sh");
        shell.args(["-c", &format!("{limit}; exec {}", line.join(" "))]);
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => shell.env(name, value),
                None => shell.env_remove(name),
            };
        }
        command = shell;
        let (code, lines) = Process::start(command).finish();
        let error = lines.iter().find(|line| line.contains(">> error"));
        assert!(code == 0 && error.is_some_and(|error| error.contains("NoSpace")), "{limit}: {code} {lines:?}");
    }
}

#[test]
fn p12_a_full_control_group_is_an_error_not_a_kill() {
    let _quiet = quiet();
    let Some(group) = MemoryGroup::of_bytes(96 << 20) else {
        return ranks::skip("no control group with a memory limit can be made here");
    };
    let tmpdir = tempfile::tempdir().unwrap();
    let line: Vec<String> = ranks::command_line().iter().map(|word| format!("'{}'", word.to_str().unwrap())).collect();
    let mut command = Command::new("sh");
    let script = format!("echo $$ > {} && exec {}", group.folder.join("cgroup.procs").display(), line.join(" "));
    command.args(["-c", &script]).env("ANNULUS_TEST_ROLE", "reserve").env("TMPDIR", tmpdir.path());
    let (code, lines) = Process::start(command).finish();
    let error = lines.iter().find(|line| line.contains(">> error"));
    assert!(code == 0 && error.is_some_and(|error| error.contains("NoSpace")), "{code} {lines:?}");
}

/// A control group that is removed at the end.
struct MemoryGroup {
    folder: std::path::PathBuf,
}

impl MemoryGroup {
    fn of_bytes(limit: u64) -> Option<MemoryGroup> {
        for (root, file) in [("/sys/fs/cgroup", "memory.max"), ("/sys/fs/cgroup/memory", "memory.limit_in_bytes")] {
            // Only where the limit is a file already is this a hierarchy with a memory controller.
            if !std::path::Path::new(root).join(file).exists()
                && !std::path::Path::new(root).join("cgroup.procs").exists()
            {
                continue;
            }
            let folder = std::path::Path::new(root).join(format!("annulus-test-{}", std::process::id()));
            if std::fs::create_dir(&folder).is_ok() {
                let group = MemoryGroup { folder };
                let limited = std::fs::OpenOptions::new()
                    .write(true)
                    .open(group.folder.join(file))
                    .and_then(|mut file| std::io::Write::write_all(&mut file, limit.to_string().as_bytes()));
                if limited.is_ok() {
                    return Some(group);
                }
            }
        }
        None
    }
}

impl Drop for MemoryGroup {
    fn drop(&mut self) {
        // Empty as soon as the process in it is reaped; a test that failed before leaves it.
        for _ in 0..200 {
            if std::fs::remove_dir(&self.folder).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// Killing every rank at once leaves neither process nor name, whatever they were doing. (A socket whose rank 0 was
/// killed while it waited has a name until the next job comes; see `faults_rendezvous.rs`.)
#[test]
fn p07_all_ranks_killed_at_once_leave_nothing() {
    let _quiet = quiet();
    let (tmpdir, mut processes) = start("steps", 3, |command| {
        command.env("TEST_STEPS_MS", "60000");
    });
    processes.iter_mut().for_each(|process| drop(process.expect(">> joined")));
    let pids: Vec<u32> = processes.iter().map(Process::pid).collect();
    processes.iter().for_each(|process| process.signal(Signal::KILL));
    drop(processes);
    eventually("all end", || !pids.iter().any(|pid| is_alive(*pid)));
    assert_eq!(ranks::names_in(tmpdir.path()), [""; 0]);
}

/// The type that carries all of this says it in one line.
#[test]
fn errors_read_as_sentences() {
    let lost = Error::PeerLost { rank: 2, pid: 77, operation: "all_reduce 5xf32".into() };
    assert_eq!(lost.to_string(), "rank 2 (pid 77) was lost during all_reduce 5xf32");
}
