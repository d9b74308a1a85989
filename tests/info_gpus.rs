//! `annulus info` on machines with GPUs: the virtual driver and the virtual management library.

use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Output};

/// `annulus info` where the named virtual libraries are found under the names of the real ones.
fn info(libraries: &[(&str, &str)], variables: &[(&str, &str)], arguments: &[&str]) -> Output {
    let own = std::env::current_exe().unwrap();
    let folder = tempfile::tempdir().unwrap();
    for (built, name) in libraries {
        let path = own.ancestors().skip(1).take(2).map(|folder| folder.join(built)).find(|path| path.exists());
        let path: PathBuf = path.expect("cargo builds what tests depend on");
        std::os::unix::fs::symlink(path, folder.path().join(name)).unwrap();
    }
    let mut command = Command::new(env!("CARGO_BIN_EXE_annulus"));
    command.arg("info").args(arguments).env("LD_LIBRARY_PATH", folder.path()).envs(variables.iter().copied());
    command.output().unwrap()
}

const DRIVER: (&str, &str) = ("libannulus_vgpu_driver.so", "libcuda.so");
const MANAGEMENT: (&str, &str) = ("libannulus_vgpu_nvml.so", "libnvidia-ml.so.1");
/// Devices 0 and 2, and 1 and 3, share a switch.
const PAIRS: [(&str, &str); 2] = [
    ("ANNULUS_VGPU_DEVICES", "4"),
    ("ANNULUS_VGPU_LINKS", "X SYS PIX SYS; SYS X SYS NV4; PIX SYS X SYS; SYS NV4 SYS X"),
];

#[test]
fn links_verdicts_and_the_ring_are_told() {
    let output = info(&[DRIVER, MANAGEMENT], &PAIRS, &[]);
    let told = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{told}");
    let words: Vec<Vec<&str>> = told.lines().map(|line| line.split_whitespace().collect()).collect();
    for line in [
        &["GPU0", "GPU1", "GPU2", "GPU3"][..],
        &["GPU1", "SYS", "X", "SYS", "NV4"],
        &["NV4", "4", "NVLinks", "4.0"],
        &["PIX", "PCIe", "over", "one", "switch"],
    ] {
        assert!(words.iter().any(|words| words == line), "{line:?} is not in\n{told}");
    }
    for line in [
        "devices 0 and 2            yes  PIX: reach each other's memory, tried just now with data",
        "devices 1 and 3            yes  NV4: reach each other's memory",
        "ring of devices            yes  0 - 1 - 3 - 2, and back",
    ] {
        assert!(told.contains(line), "{line} is not in\n{told}");
    }
    let advice = told.split_once("; for ranks in this order, CUDA_VISIBLE_DEVICES=").map(|(_, rest)| rest);
    let uuids: Vec<&str> = advice.unwrap_or_default().lines().next().unwrap_or_default().split(',').collect();
    let uuid_of = |device: u32| {
        let line = told.lines().find(|line| line.trim_start().starts_with(&format!("device {device} "))).unwrap();
        line.split(", ").find(|part| part.starts_with("GPU-")).unwrap()
    };
    assert_eq!(uuids, [0, 1, 3, 2].map(uuid_of), "{told}");
    let output = info(&[DRIVER, MANAGEMENT], &PAIRS, &["--json"]);
    let document: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(document["links"]["matrix"][1], serde_json::json!(["SYS", "X", "SYS", "NV4"]));
    assert_eq!(document["links"]["gpus"].as_array().unwrap().len(), 4);
}

#[test]
fn either_library_may_be_absent() {
    if std::path::Path::new("/proc/driver/nvidia/version").exists() {
        // To stderr itself: what is printed is shown for tests that fail, only.
        let _ = writeln!(std::io::stderr(), "skipped either_library_may_be_absent: this machine has an NVIDIA driver");
        return;
    }
    let told = |libraries: &[(&str, &str)]| {
        let output = info(libraries, &PAIRS, &[]);
        assert!(output.status.success());
        String::from_utf8(output.stdout).unwrap()
    };
    let only_driver = told(&[DRIVER]);
    assert!(only_driver.contains("management library         no   the NVIDIA management library"), "{only_driver}");
    assert!(only_driver.contains("ring of devices            yes  0 - 1 - 2 - 3, and back"), "{only_driver}");
    assert!(!only_driver.contains("CUDA_VISIBLE_DEVICES"), "there is nothing to gain");
    let only_management = told(&[MANAGEMENT]);
    assert!(only_management.contains("NVIDIA driver              no   no NVIDIA driver"), "{only_management}");
    assert!(only_management.contains("GPU0    X"), "{only_management}");
    let neither = told(&[]);
    assert!(neither.contains("0 usable device(s)") && !neither.contains("links between GPUs"), "{neither}");
}
