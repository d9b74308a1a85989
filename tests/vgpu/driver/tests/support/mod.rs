//! Tests that run on virtual GPUs: in a process of their own, which finds the library of this package as libcuda.so.
//!
//! Cargo builds a package's library before its tests, so the driver is never an old one; and it is linked under the name
//! of the real one only in a folder that such a process alone looks in.
//!
//! The bodies also run on a card: `ANNULUS_VGPU_TEST=NAME target/debug/deps/FILE-HASH NAME --exact` takes the driver that the machine
//! has, and so do the peers that a test starts if a link to it, called libannulus_vgpu_driver.so, lies beside the executable. There
//! fails whatever needs more devices than there are, a device with little memory, a list of calls, or a device that nobody else
//! uses, and `stricter.rs`.

#![allow(dead_code, reason = "every test file uses a part of it")]

use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use tempfile::TempDir;

/// Set in the processes that have a driver: the name of the test they run.
const INSIDE: &str = "ANNULUS_VGPU_TEST";

/// The library of a package, beside this executable.
pub fn library(package: &str) -> PathBuf {
    let own = std::env::current_exe().unwrap();
    let name = format!("lib{package}.so");
    let found = own.ancestors().skip(1).take(2).map(|folder| folder.join(&name)).find(|path| path.exists());
    found.expect("cargo builds the libraries of this package, and of those it names, before its tests")
}

/// What a process finds as its driver.
enum Driver<'a> {
    None,
    Whole,
    /// All but one function.
    Without(&'a str),
}

/// This executable, running only `test`, with `variables`; and its folder of libraries, where the driver is.
fn command(test: &str, variables: &[(&str, &str)], driver: Driver<'_>) -> (Command, TempDir) {
    let folder = TempDir::new().unwrap();
    let (whole, place) = (library("annulus_vgpu_driver"), folder.path().join("libcuda.so"));
    match driver {
        Driver::None => {}
        Driver::Whole => std::os::unix::fs::symlink(whole, place).unwrap(),
        Driver::Without(function) => std::fs::write(place, without(&std::fs::read(whole).unwrap(), function)).unwrap(),
    }
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(arguments(test))
        .env("LD_LIBRARY_PATH", folder.path())
        .env(INSIDE, test)
        .envs(variables.iter().copied());
    (command, folder)
}

/// Of this executable, to run only `test`.
fn arguments(test: &str) -> [&str; 5] {
    [test, "--exact", "--nocapture", "--quiet", "--test-threads=1"]
}

/// A library in whose table of names `function` stands under another one.
fn without(library: &[u8], function: &str) -> Vec<u8> {
    let (name, mut other) = (format!("\0{function}\0").into_bytes(), format!("\0{function}\0").into_bytes());
    other[1] = b'_';
    let mut library = library.to_vec();
    let places: Vec<usize> = (0..library.len() - name.len()).filter(|at| library[*at..].starts_with(&name)).collect();
    assert!(!places.is_empty(), "the virtual driver has no {function}");
    places.into_iter().for_each(|at| library[at..at + other.len()].copy_from_slice(&other));
    library
}

fn is_inside(test: &str) -> bool {
    std::env::var_os(INSIDE).is_some_and(|inside| inside == OsStr::new(test))
}

fn run_alone(test: &str, variables: &[(&str, &str)], driver: Driver<'_>, body: impl FnOnce()) {
    if is_inside(test) {
        return body();
    }
    let (mut command, _folder) = command(test, variables, driver);
    let output = command.output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{test}:\n{}{}", text(&output.stdout), text(&output.stderr));
    assert!(text(&output.stdout).contains("1 passed"), "{test} is not the name of the test that calls this");
}

/// Runs `body`, which is the test called `test`, in a process with the virtual GPU as its driver.
pub fn on_virtual_gpu(test: &str, variables: &[(&str, &str)], body: impl FnOnce()) {
    run_alone(test, variables, Driver::Whole, body);
}

/// As [`on_virtual_gpu`], with a driver that lacks `function`.
pub fn on_virtual_gpu_without(function: &str, test: &str, body: impl FnOnce()) {
    run_alone(test, &[], Driver::Without(function), body);
}

/// As [`on_virtual_gpu`], with no driver library; not on a machine that has a real one, which would be found.
pub fn without_driver(test: &str, body: impl FnOnce()) {
    if std::path::Path::new("/proc/driver/nvidia/version").exists() {
        return eprintln!("{test} is skipped: this machine has an NVIDIA driver");
    }
    run_alone(test, &[], Driver::None, body);
}

/// Another process with a driver of its own. It runs the test `role` of the same file, whose body is in [`as_peer`]; the two
/// talk in lines.
pub struct Peer {
    child: Child,
    lines: BufReader<std::process::ChildStdout>,
    _folder: TempDir,
}

impl Peer {
    pub fn start(role: &str, variables: &[(&str, &str)]) -> Peer {
        let (mut command, folder) = command(role, variables, Driver::Whole);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap());
        Peer { child, lines, _folder: folder }
    }

    pub fn tell(&mut self, line: &str) {
        writeln!(self.child.stdin.as_mut().unwrap(), "{line}").unwrap();
    }

    /// The next line that the peer says.
    pub fn hear(&mut self) -> String {
        let mut line = String::new();
        loop {
            line.clear();
            assert_ne!(self.lines.read_line(&mut line).unwrap(), 0, "the peer has ended");
            if let Some(said) = line.strip_prefix(">> ") {
                return said.trim_end().to_owned();
            }
        }
    }

    /// SIGKILL, and the process is gone.
    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Waits for its end: the signal that ended it.
    pub fn signal(mut self) -> Option<i32> {
        self.child.wait().unwrap().signal()
    }

    /// Waits for its end.
    pub fn finish(mut self) {
        drop(self.child.stdin.take());
        let mut rest = String::new();
        std::io::Read::read_to_string(&mut self.lines, &mut rest).unwrap();
        assert!(self.child.wait().unwrap().success(), "{rest}");
    }
}

/// The body of a role: nothing, unless this process was started for it.
pub fn as_peer(role: &str, body: impl FnOnce()) {
    if is_inside(role) {
        body();
    }
}

/// `command` with the command line of the test `role` behind it: a launcher of processes that are in that role.
pub fn in_role(mut command: Command, role: &str) -> Command {
    command.arg(std::env::current_exe().unwrap()).args(arguments(role)).env(INSIDE, role);
    command
}

/// Says a line to the process that started this one.
pub fn say(what: impl std::fmt::Display) {
    println!(">> {what}");
}

/// The next line of the process that started this one; empty at its end.
pub fn listen() -> String {
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).unwrap();
    line.trim_end().to_owned()
}

pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

pub fn unhex(text: &str) -> Vec<u8> {
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap()).collect()
}
