//! The program on a virtual GPU: what it says of kernels that are right, and of a device that fails.

#[path = "../../vgpu/driver/tests/support/mod.rs"]
mod support;

use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output};

use annulus::device::cuda::{Buffer, Timer};
use annulus::{DType, Error};
use annulus_gpu::part::Part;
use annulus_gpu::sanitizer;
use annulus_gpu::site::{PATIENCE, Site};
use serde_json::Value;
use support::on_virtual_gpu;

fn annulus_gpu(arguments: &[&str], folder: &Path) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_annulus-gpu"));
    command.args(["--scale", "short", "--folder"]).arg(folder).args(arguments).output().unwrap()
}

fn report(folder: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(folder.join("annulus-gpu.json")).unwrap()).unwrap()
}

/// The records of one kind, of all parts.
fn records<'r>(report: &'r Value, kind: &str) -> Vec<&'r Value> {
    let parts = report["parts"].as_array().unwrap();
    let all = parts.iter().flat_map(|part| part["records"].as_array().unwrap());
    all.filter_map(|record| record.get(kind)).collect()
}

#[test]
fn every_comparison_agrees_and_no_duration_is_reported() {
    let tally = tempfile::NamedTempFile::new().unwrap();
    let variables = [("ANNULUS_VGPU_TALLY", tally.path().to_str().unwrap())];
    on_virtual_gpu("every_comparison_agrees_and_no_duration_is_reported", &variables, || {
        // First what a card's checker sees, to find that it sees every kernel.
        let sanitized = |part: &Part| sanitizer::RUNS.iter().any(|(_, other)| part == other);
        let (first, second): (Vec<Part>, Vec<Part>) = Part::ALL.into_iter().partition(sanitized);
        agree(&first, 43, 0);
        let tally = std::fs::read_to_string(std::env::var("ANNULUS_VGPU_TALLY").unwrap()).unwrap();
        let run: BTreeSet<&str> = tally.lines().map(|line| line.split(' ').next().unwrap()).collect();
        let sources = annulus::kernels::ALL.iter().flat_map(|(_, ptx)| ptx.split(".visible .entry ").skip(1));
        assert_eq!(run, sources.map(|entry| entry.split('(').next().unwrap()).collect());
        agree(&second, 3, 4);
    });
}

/// Everything that `parts` compare agrees: at least so many comparisons; exactly so many parts do not time an interpreter.
#[track_caller]
fn agree(parts: &[Part], comparisons: usize, timings: usize) {
    let folder = tempfile::tempdir().unwrap();
    let names: Vec<String> = parts.iter().flat_map(|part| ["--only".to_owned(), part.name()]).collect();
    let output = annulus_gpu(&names.iter().map(String::as_str).collect::<Vec<_>>(), folder.path());
    let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    let report = report(folder.path());
    let checks = records(&report, "check");
    assert!(checks.len() >= comparisons, "{said}");
    for check in checks {
        assert!(check["failure"].is_null() && check["cases"].as_u64().unwrap() > 0, "{check}");
    }
    assert!(records(&report, "timing").is_empty() && records(&report, "figure").is_empty());
    let skipped: Vec<_> = records(&report, "skipped").iter().map(|reason| reason.to_string()).collect();
    assert_eq!(skipped.iter().filter(|reason| reason.contains("interpreter")).count(), timings, "{skipped:?}");
    let table = std::fs::read_to_string(folder.path().join("annulus-gpu.md")).unwrap();
    let row = format!("| {} | ", parts[0].name());
    assert!(table.contains("# annulus on annulus virtual GPU") && table.contains(&row), "{table}");
}

/// A checker that is a script: it notes how it is called, and runs only the collectives under memcheck for real.
const CHECKER: &str = r#"#!/bin/sh
echo "$@" >> "$NOTES"
tool=$2
while [ "$1" != part ]; do program=$1; shift; done
if [ "$tool $2" = 'memcheck threads' ]; then exec "$program" "$@"; fi
echo '{"check":{"what":"canned","cases":1,"failure":null,"is_cut_short":false,"seconds":0}}'
"#;

#[test]
fn a_checker_sees_every_part() {
    on_virtual_gpu("a_checker_sees_every_part", &[], || {
        let folder = tempfile::tempdir().unwrap();
        let [checker, notes] = ["compute-sanitizer", "notes"].map(|name| folder.path().join(name));
        std::fs::write(&checker, CHECKER).unwrap();
        std::fs::set_permissions(&checker, std::fs::Permissions::from_mode(0o755)).unwrap();
        let path = format!("{}:{}", folder.path().display(), std::env::var("PATH").unwrap());
        let mut command = Command::new(env!("CARGO_BIN_EXE_annulus-gpu"));
        command.args(["--scale", "short", "--only", "sanitizer", "--folder"]).arg(folder.path());
        let output = command.env("PATH", path).env("NOTES", &notes).output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{said}");
        let report = report(folder.path());
        let checks = records(&report, "check");
        // They run side by side.
        let told: BTreeSet<&str> = checks.iter().map(|check| check["what"].as_str().unwrap()).collect();
        let runs = sanitizer::RUNS.map(|(tool, part)| format!("{tool} over {}", part.name()));
        assert_eq!(told, runs.iter().map(String::as_str).collect(), "{said}");
        let skipped: Vec<String> = records(&report, "skipped").iter().map(|reason| reason.to_string()).collect();
        for left_out in
            ["racecheck over norms", "over casts", "initcheck over threads", "processes under any tool", "2^31"]
        {
            assert!(skipped.iter().any(|reason| reason.contains(left_out)), "{left_out}: {skipped:?}");
        }
        let notes = std::fs::read_to_string(notes).unwrap();
        let program = std::fs::canonicalize(env!("CARGO_BIN_EXE_annulus-gpu")).unwrap();
        let called = sanitizer::RUNS.map(|(tool, part)| {
            let (program, part) = (program.display(), part.name());
            format!("--tool {tool} --error-exitcode 9 --report-api-errors no {program} part {part} --scale short")
        });
        let noted: BTreeSet<&str> = notes.lines().collect();
        assert_eq!(noted, called.iter().map(String::as_str).collect());
    });
}

#[test]
fn a_timer_says_how_long_the_work_between_its_points_took() {
    on_virtual_gpu("a_timer_says_how_long_the_work_between_its_points_took", &[], || {
        let Site { device, stream, .. } = Site::open().unwrap();
        let timer = Timer::new(&device).unwrap();
        assert!(matches!(timer.elapsed(PATIENCE), Err(Error::Cuda { operation: "cuEventElapsedTime", .. })));
        let buffer = Buffer::zeroed(&device, DType::U8, 16 << 20).unwrap();
        for _ in 0..2 {
            timer.start(&stream).unwrap();
            buffer.view().zero(&stream).unwrap();
            timer.stop(&stream).unwrap();
            let elapsed = timer.elapsed(PATIENCE).unwrap();
            // The interpreter writes no faster than 1 TB/s.
            assert!(elapsed.as_secs_f64() > 16e-6 && elapsed < PATIENCE, "{elapsed:?}");
        }
        let captured = stream.capture(|| timer.start(&stream));
        assert!(matches!(captured, Err(Error::Capture { .. })), "{captured:?}");
    });
}

#[test]
fn a_device_that_is_lost_fails_the_part() {
    on_virtual_gpu("a_device_that_is_lost_fails_the_part", &[], || {
        let lost = tempfile::NamedTempFile::new().unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_annulus-gpu"));
        command.args(["part", "norms", "--scale", "short"]).env("ANNULUS_VGPU_LOST", lost.path());
        assert!(!command.output().unwrap().status.success());
    });
}

#[test]
fn a_device_too_small_fails_the_parts_that_need_it_and_no_other() {
    let name = "a_device_too_small_fails_the_parts_that_need_it_and_no_other";
    on_virtual_gpu(name, &[("ANNULUS_VGPU_MEMORY_BYTES", "8192")], || {
        let folder = tempfile::tempdir().unwrap();
        let output = annulus_gpu(&["--only", "norms", "--only", "long"], folder.path());
        assert_eq!(output.status.code(), Some(1));
        let report = report(folder.path());
        let failures = records(&report, "check");
        assert!(
            failures.iter().any(|check| check["failure"].as_str().is_some_and(|why| why.contains("bytes"))),
            "{report}"
        );
        assert_eq!(records(&report, "skipped").len(), 1, "{report}");
    });
}
