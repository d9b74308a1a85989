//! What is timed beside operations, on a virtual GPU: that a step whose host time is measured is a whole one, all-reduces
//! included, what it asks of the driver, and that everything timed is told.
//!
//!     cargo test -p annulus-gpu --test timed -- --nocapture

#[path = "../../vgpu/driver/tests/support/mod.rs"]
mod support;

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use annulus_gpu::Result;
use annulus_gpu::site::Site;
use annulus_gpu::time::model::like_gpt2;
use annulus_gpu::time::{BUCKETS, Bare, Step, Trainer, alone};
use serde_json::Value;
use support::on_virtual_gpu;

/// As many tensors as GPT-2 has, small ones.
fn lens() -> Vec<usize> {
    let lens = like_gpt2(4, 100, 8);
    assert_eq!(lens.len(), 148);
    lens
}

/// How often each name stands first in a line.
type Counts = BTreeMap<String, usize>;

/// The lines that `work` adds to the file that `variable` names.
fn counted(variable: &str, work: impl FnOnce()) -> Counts {
    let read = || std::fs::read_to_string(std::env::var(variable).unwrap()).unwrap_or_default();
    let before = read().len();
    work();
    let mut counts = Counts::new();
    for line in read()[before..].lines() {
        *counts.entry(line.split(' ').next().unwrap_or_default().to_owned()).or_default() += 1;
    }
    counts
}

/// Kernels of one step, and the calls of the driver that enqueue it.
fn of_step<S>(on: &mut S, step: fn(&mut S) -> Result<()>, settle: fn(&mut S) -> Result<()>) -> [Counts; 2] {
    step(on).unwrap();
    settle(on).unwrap();
    let mut calls = Counts::new();
    let kernels = counted("ANNULUS_VGPU_TALLY", || {
        calls = counted("ANNULUS_VGPU_CALLS", || step(on).unwrap());
        settle(on).unwrap();
    });
    [kernels, calls]
}

fn launches(kernels: &Counts) -> Vec<(&str, usize)> {
    kernels.iter().map(|(kernel, count)| (kernel.as_str(), *count)).collect()
}

/// For who runs the test to know.
fn note(what: &str, calls: &Counts) {
    let note = format!("{what}: {} calls of the driver, {calls:?}\n", calls.values().sum::<usize>());
    let mut file = std::fs::OpenOptions::new().create(true).append(true).open(notes()).unwrap();
    file.write_all(note.as_bytes()).unwrap();
}

fn notes() -> PathBuf {
    Path::new(&std::env::var("ANNULUS_VGPU_TALLY").unwrap()).with_extension("notes")
}

fn on_device(test: &str, body: impl FnOnce(&Site)) {
    let folder = tempfile::tempdir().unwrap();
    let [tally, calls, notes] = ["tally", "calls", "tally.notes"].map(|name| folder.path().join(name));
    let variables = [("ANNULUS_VGPU_TALLY", tally.to_str().unwrap()), ("ANNULUS_VGPU_CALLS", calls.to_str().unwrap())];
    on_virtual_gpu(test, &variables, || body(&Site::open().unwrap()));
    // Not in the process on the virtual GPU, which was given another folder.
    if let Ok(notes) = std::fs::read_to_string(notes) {
        print!("{notes}");
    }
}

#[test]
fn a_step_by_operations_is_whole() {
    on_device("a_step_by_operations_is_whole", |site| {
        let mut step = Step::new(site, alone().unwrap(), &lens()).unwrap();
        let [kernels, calls] = of_step(&mut step, Step::enqueue, Step::settle);
        let expected = [
            ("collective_f32", BUCKETS),
            ("measure_norm", 1),
            ("stage_tensors", BUCKETS),
            ("step_adamw", 1),
            ("update_scaler", 1),
        ];
        assert_eq!(launches(&kernels), expected);
        assert_eq!(calls["cuLaunchKernel"], Step::LAUNCHES);
        let events = calls["cuEventRecord"] + calls["cuStreamWaitEvent"];
        assert_eq!(calls["cuLaunchKernel"] + events, Step::ENQUEUED);
        note("a step by operations", &calls);
        // What stands beside it as its limit asks the driver for as much.
        let [kernels, bare] = of_step(&mut Bare::new(site).unwrap(), Bare::step, Bare::settle);
        assert_eq!(launches(&kernels), [("store_words", Step::LAUNCHES)]);
        for call in ["cuLaunchKernel", "cuEventRecord", "cuStreamWaitEvent"] {
            assert_eq!(bare[call], calls[call], "{call}");
        }
    });
}

#[test]
fn a_step_by_ddp_is_whole_eager_and_as_a_graph() {
    on_device("a_step_by_ddp_is_whole_eager_and_as_a_graph", |site| {
        let mut trainer = Trainer::new(site, &lens()).unwrap();
        let [kernels, calls] = of_step(&mut trainer, Trainer::step, Trainer::settle);
        let expected = |stage_tensors| {
            let stage_tensors = ("stage_tensors", stage_tensors);
            [("collective_f32", BUCKETS), ("measure_norm", 1), stage_tensors, ("step_adamw", 1)]
        };
        assert_eq!(launches(&kernels), expected(BUCKETS));
        note("a step by Ddp", &calls);
        let [kernels, calls] = of_step(&mut trainer, Trainer::step_one_by_one, Trainer::settle);
        assert_eq!(launches(&kernels), expected(148));
        note("a step by Ddp, gradients one by one", &calls);
        trainer.capture().unwrap();
        let [kernels, calls] = of_step(&mut trainer, Trainer::replay, Trainer::settle);
        assert_eq!(launches(&kernels), expected(BUCKETS));
        assert_eq!((calls["cuGraphLaunch"], calls.get("cuLaunchKernel")), (1, None));
        note("a step by Ddp, replayed", &calls);
        trainer.leave().unwrap();
    });
}

/// What a timing part says in its short form.
fn records_of(part: &str) -> Vec<Value> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_annulus-gpu"));
    let output = command.args(["part", part, "--scale", "short"]).output().unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    said.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Only eager steps that hand their gradients over together have a goal.
#[test]
fn every_figure_of_host_time_is_told() {
    on_virtual_gpu("every_figure_of_host_time_is_told", &[], || {
        let records = records_of("host-cost");
        let figures = records.iter().map(|record| {
            let figure = &record["figure"];
            assert!(figure["value"].as_f64().unwrap() > 0.0 && figure["unit"] == "us", "{record}");
            (figure["what"].as_str().unwrap(), figure["at_most"].as_f64())
        });
        let by_ddp = "host time of a step by Ddp, 148 tensors in 5 buckets";
        assert_eq!(
            figures.collect::<Vec<_>>(),
            [
                ("host time of one launch of the smallest kernel", None),
                ("host time of 13 launches of it, with the events of a step by operations", None),
                ("host time of the two points of a timer", None),
                ("host time of a step by operations, 148 tensors in 5 buckets: 13 launches", Some(30.0)),
                ("host time of one all_reduce of them", None),
                (by_ddp, Some(30.0)),
                (format!("{by_ddp}, each gradient handed over alone").as_str(), None),
                (format!("{by_ddp}, replayed as a graph").as_str(), None),
                ("from the launch of a norm of one bias to its number on the host", None),
            ]
        );
    });
}

/// All-reduces of ranks that share the device: bytes, the copy beside them and a goal for large ones, both latencies of small
/// ones.
#[test]
fn all_reduces_on_one_device_are_timed() {
    let variables = [("ANNULUS_VGPU_MEMORY_BYTES", "600000000")];
    on_virtual_gpu("all_reduces_on_one_device_are_timed", &variables, || {
        let mut told = Vec::new();
        for record in records_of("collectives") {
            let (timing, figure) = (&record["timing"], &record["figure"]);
            if timing.is_null() {
                assert!(figure["value"].as_f64().unwrap() > 0.0 && figure["unit"] == "us", "{record}");
                told.push(figure["what"].as_str().unwrap().to_owned());
            } else {
                assert_eq!(timing["bytes"], 2 * 4 * (64 << 10));
                assert!(timing["limit_us"].as_f64().unwrap() > 0.0, "{record}");
                assert_eq!(timing["goal"]["share"], 0.8);
                told.push(timing["what"].as_str().unwrap().to_owned());
            }
        }
        let small = |algorithm| {
            ["from the stream's turn to its end", "from its launch until the host has seen its end"]
                .map(|what| format!("all_reduce of 4 ranks in one grid, 8 KiB each, {algorithm}, {what}"))
        };
        let large = ["Direct", "Ring"].map(|name| format!("all_reduce of 4 ranks in one grid, 64 KiB each, {name}"));
        assert_eq!(told, [&large[..], &small("Direct"), &small("Ring")].concat());
    });
}
