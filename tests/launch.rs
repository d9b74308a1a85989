//! The launcher: what ranks get, what becomes of their output, how jobs end, and that nothing is left.

mod ranks;

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use annulus::world::launch::{self, LaunchOptions};
use annulus::world::{Environment, Launcher, World};
use ranks::{PATIENCE, Process, command, eventually, is_alive, names_in, say};
use rustix::process::Signal;

const RANKS: &str = "TEST_RANKS";
const SCRIPT: &str = "TEST_SCRIPT";
const NEXT_ROLE: &str = "TEST_NEXT_ROLE";

#[test]
fn role() {
    ranks::play(&[
        ("script-launcher", script_launcher),
        ("rank-launcher", rank_launcher),
        ("meet", meet),
        ("meet-twice", meet_twice),
        ("wait-in-world", wait_in_world),
        ("myself", myself),
    ]);
}

// ---- roles -------------------------------------------------------------------------------------------------------------

fn finish(outcome: annulus::Result<launch::Outcome>) -> ! {
    match outcome {
        Ok(outcome) => {
            if let Some(failure) = outcome.failure {
                say(failure);
            }
            std::process::exit(outcome.code)
        }
        Err(error) => {
            say(error);
            std::process::exit(2)
        }
    }
}

fn number_of_ranks() -> u32 {
    std::env::var(RANKS).unwrap().parse().unwrap()
}

/// Launches a shell script.
fn script_launcher() {
    let script = std::env::var_os(SCRIPT).unwrap();
    let options = LaunchOptions {
        prefix: std::env::var_os("TEST_NO_PREFIX").is_none(),
        grace: Duration::from_secs(2),
        timeout: std::env::var("TEST_TIMEOUT_MS").ok().map(|ms| Duration::from_millis(ms.parse().unwrap())),
    };
    finish(launch::processes(number_of_ranks(), &["sh".into(), "-c".into(), script], &options));
}

/// Launches this executable in another role.
fn rank_launcher() {
    // SAFETY: a role runs alone in its process; no other thread reads the environment now.
    unsafe { std::env::set_var("ANNULUS_TEST_ROLE", std::env::var_os(NEXT_ROLE).unwrap()) };
    finish(launch::processes(number_of_ranks(), &ranks::command_line(), &LaunchOptions::default()));
}

fn meet() {
    let environment = Environment::detect().unwrap();
    assert_eq!(environment.launcher, Launcher::Annulus);
    let world = World::join(environment, ranks::options()).unwrap();
    let pids = world.all_gather_bytes(std::process::id().to_string().as_bytes(), PATIENCE).unwrap();
    let distinct: std::collections::HashSet<_> = pids.iter().collect();
    assert_eq!(distinct.len(), world.world_size() as usize);
    world.teardown(PATIENCE).unwrap();
    say("met");
}

fn meet_twice() {
    for _ in 0..2 {
        meet();
    }
}

/// Joins and stays, until it is killed or its world ends.
fn wait_in_world() {
    let world = World::join(Environment::detect().unwrap(), ranks::options()).unwrap();
    say(format!("rank {} pid {}", world.rank(), std::process::id()));
    std::thread::sleep(2 * PATIENCE);
}

fn myself() {
    if Environment::detect().unwrap().launcher == Launcher::Single {
        finish(launch::spawn_self(3, &LaunchOptions::default()));
    }
    meet();
}

// ---- starting one ------------------------------------------------------------------------------------------------------

fn script(ranks: u32, script: &str) -> (tempfile::TempDir, Command) {
    let tmpdir = tempfile::tempdir().unwrap();
    let mut command = command("script-launcher", tmpdir.path());
    command.env(RANKS, ranks.to_string()).env(SCRIPT, script);
    (tmpdir, command)
}

fn run_script(ranks: u32, text: &str) -> (i32, Vec<String>) {
    let (tmpdir, command) = script(ranks, text);
    let result = Process::start(command).finish();
    assert_eq!(names_in(tmpdir.path()), [""; 0], "{text}");
    result
}

fn lines_of(rank: u32, lines: &[String]) -> Vec<&str> {
    let prefix = format!("[{rank}] ");
    lines.iter().filter_map(|line| line.strip_prefix(&prefix)).collect()
}

fn run_role(ranks: u32, role: &str) -> Process {
    let tmpdir = std::env::temp_dir();
    let mut command = command("rank-launcher", &tmpdir);
    command.env(RANKS, ranks.to_string()).env(NEXT_ROLE, role);
    Process::start(command)
}

// ---- tests -------------------------------------------------------------------------------------------------------------

#[test]
fn every_rank_gets_its_number_and_its_own_lines() {
    let (code, lines) = run_script(3, r#"echo "I am $ANNULUS_RANK of $ANNULUS_WORLD_SIZE"; printf 'no newline'"#);
    assert_eq!(code, 0, "{lines:?}");
    for rank in 0..3 {
        assert_eq!(lines_of(rank, &lines), [&format!("I am {rank} of 3"), "no newline"]);
    }
    let (_tmpdir, mut command) = script(2, "echo plain $ANNULUS_RANK");
    command.env("TEST_NO_PREFIX", "1");
    let (code, lines) = Process::start(command).finish();
    assert!(code == 0 && lines.contains(&"plain 0".to_owned()) && lines.contains(&"plain 1".to_owned()), "{lines:?}");
}

#[test]
fn much_output_arrives_whole() {
    let (code, lines) = run_script(2, "i=0; while [ $i -lt 20000 ]; do echo line $i; i=$((i+1)); done");
    assert_eq!(code, 0);
    for rank in 0..2 {
        let expected: Vec<String> = (0..20_000).map(|line| format!("line {line}")).collect();
        assert_eq!(lines_of(rank, &lines), expected);
    }
}

#[test]
fn the_first_failure_ends_the_job_with_its_code() {
    let start = Instant::now();
    let (code, lines) = run_script(3, "if [ $ANNULUS_RANK = 1 ]; then exit 7; fi; sleep 60");
    assert_eq!(code, 7, "{lines:?}");
    assert!(lines.iter().any(|line| line.starts_with(">> rank 1 (pid ") && line.ends_with("exit code 7")), "{lines:?}");
    let (code, lines) = run_script(2, "if [ $ANNULUS_RANK = 0 ]; then kill -9 $$; fi; sleep 60");
    assert!(code == 137 && lines.iter().any(|line| line.contains("rank 0") && line.contains("SIGKILL")), "{lines:?}");
    // SIGTERM is not enough for everybody; the grace of this launcher is 2 s.
    let (code, _) =
        run_script(2, "if [ $ANNULUS_RANK = 1 ]; then sleep 0.3; exit 3; fi; trap '' TERM; while :; do sleep 1; done");
    assert_eq!(code, 3);
    assert!(start.elapsed() < PATIENCE);
}

#[test]
fn a_job_has_no_more_than_its_time() {
    let (_tmpdir, mut command) = script(2, "sleep 60");
    command.env("TEST_TIMEOUT_MS", "300");
    let (code, lines) = Process::start(command).finish();
    assert!(code == 124 && lines.iter().any(|line| line.contains("did not end within 0.3 s")), "{lines:?}");
}

#[test]
fn signals_reach_every_rank() {
    let wait = "echo ready; while :; do sleep 0.05; done";
    for (signal, name, code) in [
        (Signal::TERM, "TERM", 0),
        (Signal::INT, "INT", 0),
        (Signal::HUP, "HUP", 0),
        (Signal::USR1, "USR1", 0),
        (Signal::USR2, "USR2", 0),
    ] {
        let (_tmpdir, command) = script(2, &format!("trap 'echo got {name}; exit 0' {name}; {wait}"));
        let mut job = Process::start(command);
        (0..2).for_each(|_| drop(job.expect("ready")));
        job.signal(signal);
        let (seen, lines) = job.finish();
        assert_eq!(seen, code, "{name} {lines:?}");
        for rank in 0..2 {
            assert!(lines_of(rank, &lines).contains(&format!("got {name}").as_str()), "{name} {lines:?}");
        }
    }
    // Ranks that die of it give its code; ranks that ignore it are killed after the grace.
    for (trap, expected) in [("", 143), ("trap '' TERM;", 137)] {
        let (_tmpdir, command) = script(2, &format!("{trap} {wait}"));
        let mut job = Process::start(command);
        (0..2).for_each(|_| drop(job.expect("ready")));
        job.signal(Signal::TERM);
        let (code, lines) = job.finish();
        assert_eq!(code, expected, "{lines:?}");
        assert!(!lines.iter().any(|line| line.contains(">> rank")), "no rank failed: {lines:?}");
    }
}

#[test]
fn a_second_interrupt_kills() {
    let (_tmpdir, command) = script(2, "trap 'echo not yet' INT; echo ready; while :; do sleep 0.05; done");
    let mut job = Process::start(command);
    (0..2).for_each(|_| drop(job.expect("ready")));
    job.signal(Signal::INT);
    (0..2).for_each(|_| drop(job.expect("not yet")));
    job.signal(Signal::INT);
    assert_eq!(job.finish().0, 137);
}

#[test]
fn only_the_first_rank_reads_what_is_piped_in() {
    let (_tmpdir, mut command) = script(2, "echo got $(cat)");
    let (read, write) = std::io::pipe().unwrap();
    command.stdin(Stdio::from(read));
    let job = Process::start(command);
    rustix::io::write(&write, b"words\n").unwrap();
    drop(write);
    let (_, lines) = job.finish();
    assert_eq!((lines_of(0, &lines), lines_of(1, &lines)), (vec!["got words"], vec!["got"]));
}

#[test]
fn variables_of_an_outer_launcher_are_taken_away() {
    let (_tmpdir, mut command) =
        script(2, "echo rank ${RANK-unset} ${OMPI_COMM_WORLD_SIZE-unset} ${SLURM_JOB_ID-unset}");
    command.env("RANK", "5").env("OMPI_COMM_WORLD_SIZE", "8").env("SLURM_JOB_ID", "77");
    let (_, lines) = Process::start(command).finish();
    assert_eq!(lines_of(1, &lines), ["rank unset unset 77"]);
}

#[test]
fn launched_ranks_meet_once_and_again() {
    for (ranks, role, times) in [(1, "meet", 1), (4, "meet", 1), (3, "meet-twice", 2)] {
        let (code, lines) = run_role(ranks, role).finish();
        let met = lines.iter().filter(|line| line.contains(">> met")).count();
        assert_eq!((code, met), (0, (ranks * times) as usize), "{lines:#?}");
    }
}

#[test]
fn a_program_can_launch_itself() {
    let tmpdir = tempfile::tempdir().unwrap();
    let (code, lines) = Process::start(command("myself", tmpdir.path())).finish();
    let met = lines.iter().filter(|line| line.contains(">> met")).count();
    assert_eq!((code, met, names_in(tmpdir.path()).len()), (0, 3, 0), "{lines:#?}");
}

/// What a rank leaves running in its process group goes with it.
#[test]
fn p07_background_processes_of_a_rank_end_with_it() {
    let (code, lines) = run_script(2, "sleep 60 & echo child $!");
    assert_eq!(code, 0);
    let pids = lines.iter().filter_map(|line| line.split_once("child ")?.1.parse::<u32>().ok());
    let pids: Vec<u32> = pids.collect();
    assert_eq!(pids.len(), 2, "{lines:?}");
    eventually("background processes end", || !pids.iter().any(|pid| is_alive(*pid)));
}

#[test]
fn p07_a_killed_launcher_leaves_no_process_and_no_name() {
    let tmpdir = tempfile::tempdir().unwrap();
    for behind_a_shell in [false, true] {
        let mut launcher = if behind_a_shell {
            // The kernel kills the shell; the rank behind it notices the lifeline.
            let line: Vec<String> =
                ranks::command_line().iter().map(|word| format!("'{}'", word.to_str().unwrap())).collect();
            let script = format!("ANNULUS_TEST_ROLE=wait-in-world {}; true", line.join(" "));
            let mut command = command("script-launcher", tmpdir.path());
            command.env(RANKS, "3").env(SCRIPT, script);
            Process::start(command)
        } else {
            let mut command = command("rank-launcher", tmpdir.path());
            command.env(RANKS, "3").env(NEXT_ROLE, "wait-in-world");
            Process::start(command)
        };
        let pids: Vec<u32> = (0..3)
            .map(|_| launcher.expect(">> rank").1.rsplit_once("pid ").unwrap().1.trim().parse().unwrap())
            .collect();
        assert!(pids.iter().all(|pid| is_alive(*pid)));
        launcher.signal(Signal::KILL);
        let killed = Instant::now();
        eventually("ranks end with their launcher", || !pids.iter().any(|pid| is_alive(*pid)));
        let limit = if ranks::long() { Duration::from_secs(2) } else { PATIENCE / 2 };
        assert!(killed.elapsed() < limit, "{:?}", killed.elapsed());
        assert_eq!(names_in(tmpdir.path()), [""; 0]);
    }
}

/// At 40 moments from the launcher's first instruction on.
#[test]
fn p07_a_launcher_killed_at_any_moment_leaves_nothing() {
    let tmpdir = tempfile::tempdir().unwrap();
    let marker = format!("annulus-test-{}", std::process::id());
    let moments = if ranks::long() { 200 } else { 40 };
    for moment in 0..moments {
        let mut command = command("rank-launcher", tmpdir.path());
        command.env(RANKS, "3").env(NEXT_ROLE, "wait-in-world").env("TEST_MARKER", &marker);
        let launcher = Process::start(command);
        std::thread::sleep(Duration::from_micros(moment * 40_000 / moments));
        launcher.signal(Signal::KILL);
        drop(launcher);
    }
    let marked = format!("TEST_MARKER={marker}");
    eventually("no rank is left", || {
        let processes = std::fs::read_dir("/proc").unwrap().flatten();
        !processes
            .filter_map(|entry| std::fs::read(entry.path().join("environ")).ok())
            .any(|environ| environ.split(|byte| *byte == 0).any(|variable| variable == marked.as_bytes()))
    });
    // A launcher that is killed in the microseconds in which its socket has a name leaves that name to the next one.
    assert!(names_in(tmpdir.path()).len() <= 2, "{:?}", names_in(tmpdir.path()));
    let mut command = command("rank-launcher", tmpdir.path());
    command.env(RANKS, "1").env(NEXT_ROLE, "meet");
    assert_eq!(Process::start(command).finish().0, 0);
    assert_eq!(names_in(tmpdir.path()), [""; 0]);
}

/// The program itself, where it was built (`--features cli`).
#[test]
fn p21_the_program_says_what_is_wrong_in_one_line() {
    let Some(program) = option_env!("CARGO_BIN_EXE_annulus").filter(|path| std::path::Path::new(path).exists()) else {
        return ranks::skip("the annulus program is built with --features cli only");
    };
    let table: [(&[&str], i32, &str); 6] = [
        (&["launch", "-n", "0", "--", "true"], 2, "world_size is 0"),
        (&["launch", "-n", "65", "--", "true"], 2, "world_size is 65"),
        (&["launch", "-n", "-1", "--", "true"], 2, "-1"),
        (&["launch", "-n", "2", "--", "/no/such/program"], 127, "/no/such/program"),
        (&["launch", "-n", "2", "--", "/tmp"], 126, "/tmp"),
        (&["launch", "-n", "2", "--", "sh", "-c", "exit 9"], 9, "exit code 9"),
    ];
    for (arguments, code, said) in table {
        let mut command = Command::new(program);
        command.args(arguments);
        let (seen, lines) = Process::start(command).finish();
        assert_eq!(seen, code, "{arguments:?} {lines:?}");
        assert!(lines.iter().any(|line| line.contains(said) && !line.contains("panicked")), "{arguments:?} {lines:?}");
    }
}
