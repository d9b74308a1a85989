//! P18: a disk that is full keeps the old file.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use annulus::DType;
use annulus::strategy::checkpoint::{self, Checkpoint, Values};

use crate::{CHILD_FOLDER, assert_small, names_in, ranks, view, write_small};

/// Run by the tests below: tries to replace `old` in the folder by a file of 20 MiB, which must fail and change nothing.
#[test]
#[ignore = "the child process of p18"]
fn p18_child() {
    let Some(folder) = std::env::var_os(CHILD_FOLDER).map(PathBuf::from) else { return };
    let path = folder.join("old");
    write_small(&path);
    let data = vec![7_u8; 20 << 20];
    let error = checkpoint::write(&path, &[view("data", DType::U8, &[data.len()], &data)], &Values::new());
    println!("error: {}", error.unwrap_err());
    assert_small(&Checkpoint::open(&path).unwrap());
    assert_eq!(names_in(&folder), ["old"]);
    // And there is room for a small one again.
    write_small(&path);
}

fn p18_run(command: &mut Command, folder: &Path) -> String {
    let output = command.env(CHILD_FOLDER, folder).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    assert!(text.contains("1 passed"), "{text}");
    text
}

#[test]
fn p18_a_full_disk_keeps_the_old_file() {
    let folder = tempfile::tempdir().unwrap();
    let mounted = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=16m", "annulus-test"])
        .arg(folder.path())
        .stderr(Stdio::null())
        .status();
    if !mounted.is_ok_and(|status| status.success()) {
        return ranks::skip("mounting a tmpfs needs root; p18_a_file_size_limit_keeps_the_old_file runs without");
    }
    let result = std::panic::catch_unwind(|| {
        let mut child = Command::new(std::env::current_exe().unwrap());
        p18_run(child.args(["--exact", "full_disk::p18_child", "--ignored", "--nocapture"]), folder.path())
    });
    assert!(Command::new("umount").arg(folder.path()).status().unwrap().success());
    let text = result.unwrap();
    assert!(text.contains("no space for a checkpoint: need 2097"), "{text}");
}

#[test]
fn p18_a_file_size_limit_keeps_the_old_file() {
    let folder = tempfile::tempdir().unwrap();
    // The shell sets the limit, and lets the write fail instead of ending the process.
    let mut child = Command::new("sh");
    child
        .args(["-c", "trap '' XFSZ; ulimit -f 8192; exec \"$0\" --exact full_disk::p18_child --ignored --nocapture"])
        .arg(std::env::current_exe().unwrap());
    let text = p18_run(&mut child, folder.path());
    assert!(text.contains("write of checkpoint"), "{text}");
}
