//! The folder that goes to a machine without Rust: what is in it, and that it runs there as it is.

#[path = "../../vgpu/driver/tests/support/mod.rs"]
mod support;

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output};

use annulus_gpu::pack::pack_program;
use support::on_virtual_gpu;

const PROGRAM: &str = env!("CARGO_BIN_EXE_annulus-gpu");

fn names(folder: &Path) -> BTreeSet<OsString> {
    std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name()).collect()
}

fn set(names: &[&str]) -> BTreeSet<OsString> {
    names.iter().map(OsString::from).collect()
}

/// Runs the script from elsewhere, with nothing of this machine but the virtual driver and the shell's own path.
fn run(folder: &Path, arguments: &[&str]) -> Output {
    let elsewhere = tempfile::tempdir().unwrap();
    let mut command = Command::new(folder.join("run.sh"));
    command.args(arguments).current_dir(elsewhere.path()).env_clear();
    for kept in ["LD_LIBRARY_PATH", "PATH"] {
        command.envs(std::env::var_os(kept).map(|value| (kept, value)));
    }
    let output = command.output().unwrap();
    assert!(names(elsewhere.path()).is_empty(), "nothing is written but in its own folder");
    output
}

#[test]
fn a_packed_folder_runs_as_it_is() {
    on_virtual_gpu("a_packed_folder_runs_as_it_is", &[], || {
        let parent = tempfile::tempdir().unwrap();
        let folder = parent.path().join("made if it is not there");
        let packed = pack_program(Path::new(PROGRAM), &folder).unwrap();
        assert_eq!(names(&folder), set(&["annulus-gpu", "run.sh"]), "one program and a script");
        for name in ["annulus-gpu", "run.sh"] {
            let mode = std::fs::metadata(folder.join(name)).unwrap().permissions().mode();
            assert_eq!(mode & 0o111, 0o111, "{name} is executable");
        }
        let bytes: u64 = names(&folder).iter().map(|name| std::fs::metadata(folder.join(name)).unwrap().len()).sum();
        assert_eq!(packed.bytes, bytes);
        assert!(bytes < 60 << 20, "{bytes} bytes");
        let script = std::fs::read_to_string(folder.join("run.sh")).unwrap();
        assert!(script.contains(&format!("glibc {} or later", packed.glibc)) && packed.glibc.starts_with("2."));

        // Only as much as an interpreter gets through; there are no other arguments. A part with ranks starts the program again.
        let output =
            run(&folder, &["--scale", "short", "--only", "processes", "--only", "threads", "--only", "operations"]);
        let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{said}");
        assert_eq!(names(&folder), set(&["annulus-gpu", "annulus-gpu.json", "annulus-gpu.md", "run.sh"]), "{said}");
        let report = std::fs::read(folder.join("annulus-gpu.json")).unwrap();
        let report: serde_json::Value = serde_json::from_slice(&report).unwrap();
        let parts: Vec<&str> =
            report["parts"].as_array().unwrap().iter().map(|part| part["part"].as_str().unwrap()).collect();
        assert_eq!(parts, ["threads", "processes", "operations"]);
        let table = std::fs::read_to_string(folder.join("annulus-gpu.md")).unwrap();
        assert!(table.contains("| processes | f32 sums of two processes over IPC"), "{table}");
    });
}

#[test]
fn what_cannot_be_packed_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let pack = |folder: &Path| Command::new(PROGRAM).arg("pack").arg(folder).output().unwrap();
    let output = pack(&folder.path().join("new"));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    if cfg!(debug_assertions) {
        assert_eq!(output.status.code(), Some(1));
        assert!(said.contains("cargo run --release -p annulus-gpu -- pack"), "{said}");
        assert!(names(folder.path()).is_empty(), "nothing was begun");
    } else {
        assert!(output.status.success(), "{said}");
        assert_eq!(names(&folder.path().join("new")), set(&["annulus-gpu", "run.sh"]));
    }
    let missing = pack_program(&folder.path().join("missing"), &folder.path().join("other")).unwrap_err();
    assert!(missing.to_string().contains("No such file"), "{missing}");
    let text = folder.path().join("text");
    std::fs::write(&text, "no program").unwrap();
    assert!(pack_program(&text, &folder.path().join("other")).unwrap_err().to_string().contains("glibc"));
    let large = std::fs::File::create(folder.path().join("large")).unwrap();
    std::io::Write::write_all(&mut &large, b"GLIBC_2.17").unwrap();
    large.set_len((60 << 20) + 1).unwrap();
    let too_large = pack_program(&folder.path().join("large"), &folder.path().join("other")).unwrap_err();
    assert!(too_large.to_string().contains("62914560 are wanted"), "{too_large}");
}
