//! The `annulus` program as its user meets it: `bench`, `info`, `completions`, and what wrong use gets.

mod ranks;

use std::ffi::OsStr;
use std::io::{BufRead, BufReader};
use std::os::unix::ffi::OsStrExt;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

/// The program, as if no launcher had started this test.
fn annulus(arguments: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_annulus"));
    command.args(arguments.split_whitespace());
    for name in ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "ANNULUS_RANK", "ANNULUS_WORLD_SIZE"] {
        command.env_remove(name);
    }
    command
}

fn run(arguments: &str) -> Output {
    annulus(arguments).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// The table's lines that are no comment, in columns.
fn rows(output: &Output) -> Vec<Vec<String>> {
    text(&output.stdout)
        .lines()
        .filter(|line| !line.starts_with('#'))
        .map(|line| line.split_whitespace().map(str::to_owned).collect())
        .collect()
}

#[test]
fn bench_prints_the_table_of_nccl_tests() {
    let output = run("bench -b 4 -e 64K -f 128 -n 3 -w 1");
    assert!(output.status.success(), "{}", text(&output.stderr));
    let rows = rows(&output);
    assert_eq!(rows.iter().map(|row| row[0].as_str()).collect::<Vec<_>>(), ["4", "512", "65536"]);
    for row in &rows {
        assert_eq!(row.len(), 13, "{row:?}");
        assert_eq!(
            row[1..5],
            [(row[0].parse::<u64>().unwrap() / 4).to_string(), "f32".into(), "sum".into(), "-1".into()]
        );
        for half in [&row[5..9], &row[9..13]] {
            let [time_us, algbw, busbw] = [0, 1, 2].map(|column| half[column].parse::<f64>().unwrap());
            assert!(time_us > 0.0);
            // Two ranks send the whole vector once: both bandwidths are the same.
            assert_eq!(algbw, busbw);
            assert_eq!(half[3], "0");
        }
    }
    let table = text(&output.stdout);
    assert!(table.contains("# Out of bounds values : 0 OK"), "{table}");
    assert!(table.contains("# Avg bus bandwidth"), "{table}");
    assert!(table.contains("Rank  1 Pid"), "{table}");
}

#[test]
fn bench_is_right_for_every_collective_and_memory() {
    for op in ["all_reduce", "reduce_scatter", "all_gather", "broadcast", "barrier"] {
        for memory in ["registered", "private", "slice"] {
            let output =
                run(&format!("bench --ranks 3 --op {op} --memory {memory} -b 1K -e 1K --dtype bf16 -n 2 -w 1"));
            assert!(output.status.success(), "{op} {memory}: {}", text(&output.stderr));
            let rows = rows(&output);
            let wrong = [&rows[0][8], &rows[0][12]];
            let verified = wrong.iter().filter(|wrong| **wrong == "0").count();
            let expected = match (op, memory) {
                ("barrier", _) => 0,
                ("broadcast", _) | (_, "slice") => 1,
                _ => 2,
            };
            assert_eq!(verified, expected, "{op} {memory}: {rows:?}");
            assert!(wrong.iter().all(|wrong| ["0", "N/A"].contains(&wrong.as_str())), "{op} {memory}: {rows:?}");
        }
    }
}

#[test]
fn bench_counts_shards_and_their_share_of_the_bus() {
    let output = run("bench --ranks 4 --op reduce_scatter -b 64K -e 64K -n 20 -w 5 --place out");
    let row = &rows(&output)[0];
    assert_eq!(row[..2], ["65536", "4096"], "the whole vector in bytes, one shard in elements");
    let [algbw, busbw] = [6, 7].map(|column: usize| row[column].parse::<f64>().unwrap());
    assert!((busbw - 0.75 * algbw).abs() <= 0.011, "{row:?}");
    assert_eq!(row[9..], ["N/A"; 4]);
}

#[test]
fn bench_writes_json() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("bench.json");
    let output = run(&format!("bench -b 1K -e 4K -n 7 -w 0 --dtype f16 --redop avg --json {}", path.display()));
    assert!(output.status.success(), "{}", text(&output.stderr));
    let document: serde_json::Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    assert_eq!(document["ranks"], 2);
    assert_eq!((&document["dtype"], &document["redop"]), (&"f16".into(), &"avg".into()));
    assert_eq!(document["wrong"], 0);
    let results = document["results"].as_array().unwrap();
    assert_eq!(results.len(), 2);
    assert_eq!((&results[1]["size_bytes"], &results[1]["count_elems"]), (&4096.into(), &2048.into()));
    for half in ["out_of_place", "in_place"] {
        let half = &results[0][half];
        assert_eq!(half["iterations"], 7);
        let [min, median, p99] = ["min_us", "median_us", "p99_us"].map(|name| half[name].as_f64().unwrap());
        assert!(0.0 < min && min <= median && median <= p99, "{half}");
    }
}

#[test]
fn bench_joins_the_ranks_of_a_launcher() {
    let program = env!("CARGO_BIN_EXE_annulus");
    let output = run(&format!("launch -n 3 --no-prefix -- {program} bench -b 1K -e 1K -n 2 -w 1"));
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(text(&output.stdout).contains("# 3 ranks by annulus launch"));
    assert_eq!(rows(&output).len(), 1, "one table: {}", text(&output.stdout));
}

#[test]
fn bench_on_a_stream_and_with_adaptive_iterations() {
    let output = run("bench -b 1K -e 1K --stream --seconds 0.02 --memory private --algorithm ring --partials native");
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(text(&output.stdout).contains("issued on a stream"));
}

#[test]
fn bench_ends_quietly_when_nobody_reads_on() {
    let mut child =
        annulus("bench -b 1K -e 512M -f 2 -n 5 -w 1").stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    assert_eq!(text(&output.stderr), "");
}

#[test]
fn wrong_use_is_told_and_is_exit_code_2() {
    for (arguments, told) in [
        ("bench --ranks 0", "0 is not in 1..=64"),
        ("bench --ranks 65", "65 is not in 1..=64"),
        ("bench -b 2M -e 1M", "--min-bytes is 2097152"),
        ("bench -b 1X", "1X"),
        ("bench --op all_reduc", "all_reduce"),
        ("bench --redop avg --dtype i64", "avg is not defined for i64"),
        ("bench --op broadcast --root 2", "--root is 2 of 2 ranks"),
        ("bench --dtype f8", "bf16"),
        ("bench -n 0", "0"),
        ("bench --seconds=-1", "above 0 and at most 3600"),
        ("bench --json /nonexistent/bench.json", "writing /nonexistent/bench.json: No such file"),
        ("completions tcsh", "bash"),
        ("inf", "info"),
    ] {
        let output = run(arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments}: {}", text(&output.stdout));
        assert!(text(&output.stderr).contains(told), "{arguments}: {}", text(&output.stderr));
        assert!(!text(&output.stderr).contains("panicked"), "{arguments}");
    }
}

#[test]
fn failures_at_run_time_are_exit_code_1() {
    let output = run("bench -b 4096G -e 4096G");
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("no space"), "{}", text(&output.stderr));
}

#[test]
fn info_says_what_there_is_and_what_not() {
    let output = run("info");
    assert!(output.status.success());
    let told = text(&output.stdout);
    assert!(told.contains("backend host: available"), "{told}");
    let usable = if std::path::Path::new("/proc/driver/nvidia/version").exists() { "" } else { "0 usable device(s)" };
    assert!(told.contains(&format!("backend cuda: not available: {usable}")), "{told}");
    assert!(told.contains("no launcher: rank 0 of 1"), "{told}");

    let output = run("info --json");
    let document: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(document["backends"][0]["name"], "host");
    assert_eq!(document["backends"][0]["available"], true);
    assert_eq!(document["environment"]["world_size"], 1);
}

#[test]
fn info_tells_malformed_variables_and_keeps_the_jobs_secret() {
    let output =
        annulus("info").env("RANK", "-1").env("WORLD_SIZE", "2").env("ANNULUS_JOB", "5ec7e7").output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    let told = text(&output.stdout);
    assert!(told.contains("RANK=-1"), "{told}");
    assert!(told.contains("ANNULUS_JOB=<redacted>") && !told.contains("5ec7e7"), "{told}");
}

/// As the user of a job's script meets it: one line, whatever is in the variables, and before anything was begun.
#[test]
fn p21_garbage_in_the_environment_is_one_line_and_exit_code_2() {
    type Variables<'a> = &'a [(&'a str, &'a [u8])];
    let table: [(Variables<'_>, &[&str]); 6] = [
        (&[("RANK", b"-1"), ("WORLD_SIZE", b"2")], &["RANK=-1", "0 to 63"]),
        (&[("RANK", b"0"), ("WORLD_SIZE", b"0")], &["WORLD_SIZE=0", "1 to 64"]),
        (&[("RANK", b"0")], &["WORLD_SIZE", "must be set"]),
        (&[("RANK", b"\xff\n1"), ("WORLD_SIZE", b"2")], &["RANK=\u{fffd}\\n1", "UTF-8"]),
        (
            &[("RANK", b"0"), ("WORLD_SIZE", b"2"), ("MASTER_ADDR", b"\xc3\x28\r\n"), ("MASTER_PORT", b"1")],
            &["MASTER_ADDR=\u{fffd}(\\r\\n", "UTF-8"],
        ),
        (
            &[("ANNULUS_RANK", b"0"), ("ANNULUS_WORLD_SIZE", b"1"), ("RANK", b"1"), ("WORLD_SIZE", b"2")],
            &["ANNULUS_RANK=0", "RANK=1"],
        ),
    ];
    for (variables, told) in table {
        let set = || variables.iter().map(|(name, value)| (*name, OsStr::from_bytes(value)));
        // The shortest of three: one of them may have waited for a processor.
        let runs = (0..3).map(|_| {
            let start = Instant::now();
            let output = annulus("bench -b 4 -e 4").envs(set()).output().unwrap();
            (start.elapsed(), output)
        });
        let (time, output) = runs.min_by_key(|(time, _)| *time).unwrap();
        let line = text(&output.stderr);
        assert_eq!((output.status.code(), line.lines().count()), (Some(2), 1), "{variables:?}: {line}");
        assert!(told.iter().all(|told| line.contains(told)), "{variables:?}: {line}");
        assert_eq!(text(&output.stdout), "", "{variables:?}");
        let limit = Duration::from_millis(if ranks::long() { 100 } else { 10_000 });
        assert!(time <= limit, "{variables:?}: {time:?}");
        // What tells of the machine tells of this too, in its table.
        let output = annulus("info").envs(set()).output().unwrap();
        let table = text(&output.stdout);
        let line: Vec<&str> = table.lines().filter(|line| line.starts_with("environment: ")).collect();
        assert_eq!((output.status.code(), line.len()), (Some(2), 1), "{variables:?}: {table}");
        assert!(told.iter().all(|told| line[0].contains(told)), "{variables:?}: {table}");
        assert_eq!(text(&output.stderr), "", "{variables:?}");
    }
}

#[test]
fn completions_know_the_subcommands() {
    for shell in ["bash", "zsh", "fish"] {
        let output = run(&format!("completions {shell}"));
        assert!(output.status.success());
        let script = text(&output.stdout);
        assert!(script.contains("launch") && script.contains("bench") && script.contains("reduce_scatter"), "{shell}");
    }
}

#[test]
fn help_teaches() {
    let help = text(&run("bench --help").stdout);
    for taught in ["busbw", "2(N-1)/N", "Examples:", "annulus launch -n 4 -- annulus bench", "Exit code"] {
        assert!(help.contains(taught), "{taught} is not in\n{help}");
    }
    assert!(text(&run("--help").stdout).contains("bench"));
}
