//! The program on a virtual GPU: what it says of kernels that are right, and of a device that fails.

#[path = "../../vgpu/driver/tests/support/mod.rs"]
mod support;

use std::path::Path;
use std::process::{Command, Output};

use annulus::device::cuda::{Buffer, Timer};
use annulus::{DType, Error};
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
    on_virtual_gpu("every_comparison_agrees_and_no_duration_is_reported", &[], || {
        let folder = tempfile::tempdir().unwrap();
        let output = annulus_gpu(&[], folder.path());
        let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{said}");
        let report = report(folder.path());
        let checks = records(&report, "check");
        assert!(checks.len() >= 38, "{said}");
        for check in checks {
            assert!(check["failure"].is_null() && check["cases"].as_u64().unwrap() > 0, "{check}");
        }
        assert!(records(&report, "timing").is_empty() && records(&report, "figure").is_empty());
        let skipped: Vec<_> = records(&report, "skipped").iter().map(|reason| reason.to_string()).collect();
        assert_eq!(skipped.iter().filter(|reason| reason.contains("interpreter")).count(), 4, "{skipped:?}");
        let table = std::fs::read_to_string(folder.path().join("annulus-gpu.md")).unwrap();
        assert!(table.contains("# annulus on annulus virtual GPU") && table.contains("| norms | norms of bf16 |"));
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
