//! The program as its users run it: whole runs, interrupted runs, and what it says to what it cannot do.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

fn command(folder: &Path, arguments: &[&str]) -> Command {
    // What was ignored when the tests were started (in the background of a script: SIGINT) stays ignored, also by the
    // launcher; these runs are to hear it.
    let mut command = Command::new("env");
    command.args(["--default-signal=INT,TERM", env!("CARGO_BIN_EXE_annulus-gpt")]);
    command.current_dir(folder).args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn run(folder: &Path, arguments: &[&str]) -> Output {
    command(folder, arguments).output().unwrap()
}

#[track_caller]
fn succeed(folder: &Path, arguments: &[&str]) -> String {
    let output = run(folder, arguments);
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{arguments:?}: {}\n{out}\n{err}", output.status);
    out.into_owned()
}

#[track_caller]
fn refused(folder: &Path, arguments: &[&str], code: i32, expected: &[&str]) {
    let output = run(folder, arguments);
    let err = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{arguments:?}: {err}");
    for expected in expected {
        assert!(err.contains(expected), "{arguments:?}: {expected:?} is not in {err:?}");
    }
    assert!(!err.contains("panicked"), "{err}");
}

fn rows(run: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn losses(run: &Path) -> Vec<f64> {
    rows(run).iter().map(|row| row["loss"].as_f64().unwrap()).collect()
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

#[test]
fn a_short_run_learns_and_leaves_everything_behind() {
    let folder = tempfile::tempdir().unwrap();
    let out = succeed(folder.path(), &["--short"]);
    let run = folder.path().join("runs/gpt-1");
    for expected in ["steps", "loss", "communication", "runs/gpt-1/checkpoint.safetensors", "Mat5:1 "] {
        assert!(out.contains(expected), "{expected:?} is not in {out:?}");
    }

    let losses = losses(&run);
    assert_eq!(losses.len(), 40);
    // 256 equally likely bytes cost 5.5 nats; how often each letter occurs is learnt in a few steps.
    assert!((losses[0] - 256_f64.ln()).abs() < 0.3, "{losses:?}");
    assert!(mean(&losses[35..]) < losses[0] - 1.5, "{losses:?}");
    let validations: Vec<f64> = rows(&run).iter().filter_map(|row| row["val_loss"].as_f64()).collect();
    assert!(validations.len() == 2 && validations[1] < validations[0], "{validations:?}");
    let csv = std::fs::read_to_string(run.join("metrics.csv")).unwrap();
    assert_eq!(csv.lines().count(), 41);
    assert!(csv.starts_with("step,epoch,loss,"));

    assert!(std::fs::read_to_string(run.join("loss.svg")).unwrap().contains("nats per byte"));
    assert_eq!(std::fs::read(run.join("loss.png")).unwrap()[..4], *b"\x89PNG");
    assert!(std::fs::read(run.join("sample.txt")).unwrap().starts_with(b"Mat5:1 "));
    let config: Value = serde_json::from_slice(&std::fs::read(run.join("config.json")).unwrap()).unwrap();
    assert_eq!(config["width"], 64);

    let checkpoint = std::fs::read(run.join("checkpoint.safetensors")).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&checkpoint).unwrap();
    assert_eq!(tensors.tensor("model.head.out").unwrap().shape(), [64, 256]);
    let spans = spans(&run.join("timeline.json"));
    assert!((0..2).all(|rank| spans.iter().filter(|span| span.0 == rank && span.1 == "step").count() == 20));
    assert!(!run.join("timeline.0.json").exists());

    // The next run gets the next folder.
    succeed(folder.path(), &["--short", "--steps", "1", "--ranks", "1", "--trace-steps", "0"]);
    assert!(folder.path().join("runs/gpt-2/metrics.csv").exists());
    assert!(!folder.path().join("runs/gpt-2/timeline.json").exists());
}

/// The spans of a run's timeline: `(rank, track, start, end)`, in microseconds.
fn spans(path: &Path) -> Vec<(u64, String, f64, f64)> {
    let timeline: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    assert_eq!(timeline["otherData"]["dropped"], 0);
    let events = timeline["traceEvents"].as_array().unwrap();
    let place = |event: &Value| (event["pid"].as_u64().unwrap(), event["tid"].as_u64().unwrap());
    let mut tracks = BTreeMap::new();
    for event in events.iter().filter(|event| event["name"] == "thread_name") {
        tracks.insert(place(event), event["args"]["name"].as_str().unwrap());
    }
    let span = |event: &Value| {
        let start = event["ts"].as_f64().unwrap();
        let track = tracks[&place(event)].to_owned();
        (place(event).0, track, start, start + event["dur"].as_f64().unwrap())
    };
    events.iter().filter(|event| event["ph"] == "X").map(span).collect()
}

#[test]
fn the_timeline_shows_reductions_while_backward_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    // The default model: its backward passes are long enough to see something happen meanwhile.
    let settings = ["--steps", "8", "--trace-steps", "3", "--eval-every", "100", "--sample-bytes", "0"];
    succeed(folder.path(), &settings);
    let spans = spans(&folder.path().join("runs/gpt-1/timeline.json"));
    for rank in 0..2 {
        let of = |track: &str| spans.iter().filter(|span| span.0 == rank && span.1 == track).collect::<Vec<_>>();
        assert_eq!((of("step").len(), of("forward").len()), (3, 3));
        let (backward, communication) = (of("backward"), of("communication"));
        assert_eq!(backward.len(), 3 * 6, "rank {rank}: a span for each segment of each step");
        assert!(communication.len() >= 3 * 6, "rank {rank}: {} reductions", communication.len());
        let overlaps = |reduction: &&&(u64, String, f64, f64)| {
            backward.iter().any(|segment| segment.2 < reduction.3 && reduction.2 < segment.3)
        };
        let hidden = communication.iter().filter(overlaps).count();
        assert!(hidden >= 3, "rank {rank}: only {hidden} of {} reductions overlap backward", communication.len());
    }
}

#[test]
fn a_resumed_run_repeats_an_uninterrupted_one_bit_for_bit() {
    for precision in ["f32", "f16-mixed"] {
        let folder = tempfile::tempdir().unwrap();
        let settings =
            ["--short", "--steps", "20", "--eval-every", "5", "--precision", precision, "--sample-bytes", "20"];
        let with = |more: &[&'static str]| [&settings[..], more].concat();
        succeed(folder.path(), &with(&["--run-dir", "straight"]));
        let out = succeed(folder.path(), &with(&["--run-dir", "broken", "--stop-after", "10"]));
        assert!(out.contains("--resume broken"), "{out}");
        let (straight, broken) = (folder.path().join("straight"), folder.path().join("broken"));
        let half = std::fs::read(broken.join("checkpoint.safetensors")).unwrap();
        assert_eq!(losses(&broken).len(), 10);
        succeed(folder.path(), &["--resume", "broken"]);

        let checkpoint = |run: &Path| std::fs::read(run.join("checkpoint.safetensors")).unwrap();
        assert_ne!(half, checkpoint(&broken));
        assert_eq!(checkpoint(&straight), checkpoint(&broken), "{precision}: the checkpoints differ");
        assert_eq!(losses(&straight), losses(&broken));
        assert_eq!(losses(&broken).len(), 20);
        let sample = |run: &Path| std::fs::read(run.join("sample.txt")).unwrap();
        assert_eq!(sample(&straight), sample(&broken));
    }
}

#[test]
fn two_ranks_follow_one_rank_with_the_whole_batch() {
    let folder = tempfile::tempdir().unwrap();
    for ranks in ["1", "2"] {
        succeed(folder.path(), &["--short", "--steps", "30", "--ranks", ranks, "--run-dir", ranks]);
    }
    let (one, two) = (losses(&folder.path().join("1")), losses(&folder.path().join("2")));
    let furthest = one.iter().zip(&two).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    assert!(furthest < 1e-3, "{furthest}: {one:?} {two:?}");
    assert_ne!(one, two, "different sums round differently; equal ones would mean that the same run was compared");
}

/// Waits until the run has written rows.
fn wait_for_rows(run: &Path, child: &mut Child) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while std::fs::read_to_string(run.join("metrics.csv")).unwrap_or_default().lines().count() < 2 {
        assert!(child.try_wait().unwrap().is_none(), "the run has ended");
        assert!(Instant::now() < deadline, "no rows after a minute");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn ctrl_c_and_sigterm_leave_a_checkpoint_to_go_on_from() {
    for signal in [Signal::INT, Signal::TERM] {
        let folder = tempfile::tempdir().unwrap();
        let run = folder.path().join("run");
        let mut child = command(folder.path(), &["--short", "--steps", "1000000", "--run-dir", "run"]).spawn().unwrap();
        wait_for_rows(&run, &mut child);
        kill_process(Pid::from_child(&child), signal).unwrap();
        let output = child.wait_with_output().unwrap();
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert_eq!(output.status.code(), Some(0), "{out}\n{err}");
        assert!(out.contains("stopped; go on with --resume run"), "{out}");
        let steps = losses(&run).len();
        assert!(steps >= 10 && run.join("loss.png").exists() && run.join("timeline.json").exists());
        succeed(folder.path(), &["--resume", "run", "--stop-after", "2"]);
        assert_eq!(losses(&run).len(), steps + 2);
    }
}

/// The processes that `parent` has started.
fn children_of(parent: u32) -> Vec<Pid> {
    let stats = std::fs::read_dir("/proc").unwrap().flatten().filter_map(|entry| {
        let stat = std::fs::read_to_string(entry.path().join("stat")).ok()?;
        // pid (name) state parent ..
        let (pid, rest) = (stat.split(' ').next()?.parse().ok()?, stat.rsplit_once(") ")?.1);
        (rest.split(' ').nth(1)?.parse() == Ok(parent)).then(|| Pid::from_raw(pid))?
    });
    stats.collect()
}

#[test]
fn a_killed_rank_is_named_and_the_run_goes_on_from_its_last_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    let endless = ["--short", "--steps", "1000000", "--checkpoint-every", "15", "--run-dir", "run"];
    let mut child = command(folder.path(), &endless).spawn().unwrap();
    wait_for_rows(&run, &mut child);
    while !run.join("checkpoint.safetensors").exists() {
        assert!(child.try_wait().unwrap().is_none(), "the run has ended");
        std::thread::sleep(Duration::from_millis(5));
    }
    let ranks = children_of(child.id());
    assert_eq!(ranks.len(), 2);
    kill_process(ranks[1], Signal::KILL).unwrap();
    let output = child.wait_with_output().unwrap();
    let err = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(137), "{err}");
    for expected in [format!("(pid {}) was lost", ranks[1].as_raw_pid()), "was killed by SIGKILL".to_owned()] {
        assert!(err.contains(&expected), "{expected:?} is not in {err:?}");
    }
    succeed(folder.path(), &["--resume", "run", "--stop-after", "2"]);
    let steps: Vec<u64> = rows(&run).iter().map(|row| row["step"].as_u64().unwrap()).collect();
    assert_eq!(steps, (1..=steps.len() as u64).collect::<Vec<_>>(), "no step is missing or told twice");
    assert_eq!(steps.len() % 15, 2, "two steps after a checkpoint");
}

#[test]
fn what_cannot_be_is_refused_with_code_2_and_its_name() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    for (arguments, expected) in [
        (&["--batch", "9"][..], "--batch 9"),
        (&["--width", "100"], "--width 100"),
        (&["--ranks", "0"], "0 is not in 1..=64"),
        (&["--ranks", "65"], "65 is not in 1..=64"),
        (&["--precision", "int4"], "bf16-mixed"),
        (&["--steps", "many"], "many"),
        (&["--stepz", "3"], "--steps"),
        (&["--batch", "60000"], "--batch 60000: the text has only"),
        (&["--resume", "nowhere"], "--resume nowhere: there is no such folder"),
    ] {
        refused(path, arguments, 2, &[expected]);
    }
    assert!(!path.join("runs").exists(), "nothing was begun");
    let launched = |arguments: &[&str], variables: &[(&str, &str)]| {
        let output = command(path, arguments).envs(variables.iter().copied()).output().unwrap();
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let (code, err) = launched(&["--short"], &[("RANK", "-1"), ("WORLD_SIZE", "2")]);
    assert!(code == Some(2) && err.contains("RANK"), "{code:?} {err}");
}

#[test]
fn checkpoints_that_do_not_fit_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    let tiny = ["--short", "--steps", "4", "--sample-bytes", "0", "--run-dir"];
    succeed(path, &[&tiny[..], &["run", "--stop-after", "2"]].concat());
    refused(path, &[&tiny[..], &["run"]].concat(), 2, &["--run-dir run", "--resume"]);
    refused(path, &["--resume", "run", "--width", "128"], 2, &["--width 128", "64"]);
    refused(path, &["--resume", "run", "--steps", "2"], 2, &["made its 2 steps"]);

    std::fs::create_dir(path.join("empty")).unwrap();
    refused(path, &["--resume", "empty"], 2, &["--resume empty: there is no checkpoint.safetensors"]);

    let whole = std::fs::read(path.join("run/checkpoint.safetensors")).unwrap();
    std::fs::create_dir(path.join("bad")).unwrap();
    let bad = path.join("bad/checkpoint.safetensors");
    let mut flipped = whole.clone();
    let middle = flipped.len() / 2;
    flipped[middle] ^= 0x10;
    for content in [&whole[..whole.len() - 1], &whole[..100], &[], &flipped] {
        std::fs::write(&bad, content).unwrap();
        refused(path, &["--resume", "bad"], 1, &["bad/checkpoint.safetensors"]);
        assert!(!path.join("bad/metrics.csv").exists(), "nothing was begun");
    }

    // A file of somebody else's tensors.
    let other = safetensors::serialize(std::iter::empty::<(&str, safetensors::tensor::TensorView)>(), None).unwrap();
    std::fs::write(&bad, other).unwrap();
    refused(path, &["--resume", "bad"], 1, &["bad/checkpoint.safetensors"]);
}

#[test]
fn another_text_is_learnt_and_must_stay_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let text = folder.path().join("words.txt");
    std::fs::write(&text, "the cat sat on the mat; ".repeat(400)).unwrap();
    let arguments = ["--text", "words.txt", "--short", "--ranks", "1", "--run-dir", "run", "--stop-after", "30"];
    succeed(folder.path(), &arguments);
    assert!(losses(&folder.path().join("run"))[29] < 1.5, "a text of a few words is easy");
    std::fs::write(&text, "the dog sat on the mat; ".repeat(400)).unwrap();
    refused(folder.path(), &["--resume", "run"], 2, &["the text has changed"]);
    std::fs::remove_file(&text).unwrap();
    refused(folder.path(), &["--resume", "run"], 1, &["words.txt"]);
}
