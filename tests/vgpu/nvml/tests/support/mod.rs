//! Tests of what is asked of the management library: in a process of their own, which finds that of this package, or none.

#![allow(dead_code, reason = "every test file uses a part of it")]

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

/// Set in the processes that tests run in: the name of the test.
const INSIDE: &str = "ANNULUS_VGPU_TEST";

/// The library, beside this executable.
pub fn library() -> PathBuf {
    let own = std::env::current_exe().unwrap();
    let name = "libannulus_vgpu_nvml.so";
    let found = own.ancestors().skip(1).take(2).map(|folder| folder.join(name)).find(|path| path.exists());
    found.expect("cargo builds the library of this package before its tests")
}

/// Runs `body`, which is the test called `test`, in a process that finds `library` as libnvidia-ml.so.1, if there is one.
pub fn with_library(test: &str, library: Option<&Path>, variables: &[(&str, &OsStr)], body: impl FnOnce()) {
    if std::env::var_os(INSIDE).is_some_and(|inside| inside == OsStr::new(test)) {
        return body();
    }
    let folder = TempDir::new().unwrap();
    if let Some(library) = library {
        std::os::unix::fs::symlink(library, folder.path().join("libnvidia-ml.so.1")).unwrap();
    }
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args([test, "--exact", "--include-ignored", "--nocapture", "--quiet", "--test-threads=1"]);
    command.env("LD_LIBRARY_PATH", folder.path()).env(INSIDE, test).envs(variables.iter().copied());
    let output = command.output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{test}:\n{}{}", text(&output.stdout), text(&output.stderr));
    println!("{}", text(&output.stdout)); // seen with --nocapture
    assert!(text(&output.stdout).contains("1 passed"), "{test} is not the name of the test that calls this");
}

/// As [`with_library`], on a machine with the GPUs that `variables` describe.
pub fn on_virtual_machine(test: &str, variables: &[(&str, &str)], body: impl FnOnce()) {
    let variables: Vec<(&str, &OsStr)> = variables.iter().map(|(name, value)| (*name, OsStr::new(value))).collect();
    with_library(test, Some(&library()), &variables, body);
}
