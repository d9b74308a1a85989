//! P16: whenever a writer dies, a path holds the old file or the new one.

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use annulus::DType;
use annulus::strategy::Rng;
use annulus::strategy::checkpoint::{self, Checkpoint, Values};

use crate::{CHILD_FOLDER, names_in, ranks, view, write_small};

const KILL_POINTS: usize = 200;

/// Run by `p16_a_kill_leaves_the_old_or_the_new_file`: writes generation after generation until it is killed.
#[test]
#[ignore = "the child process of p16"]
fn p16_child() {
    let Some(folder) = std::env::var_os(CHILD_FOLDER).map(PathBuf::from) else { return };
    let mut data = vec![0_u8; 300_000];
    let first = Checkpoint::open(&folder.join("latest")).map_or(0, |c| c.value::<u64>("generation").unwrap().unwrap());
    for generation in first + 1.. {
        data.fill(generation as u8);
        let mut values = Values::new();
        values.insert("generation", &generation).unwrap();
        let path = folder.join(format!("step_{}", generation % 2));
        checkpoint::write(&path, &[view("data", DType::U8, &[data.len()], &data)], &values).unwrap();
        checkpoint::point_latest(&path).unwrap();
    }
}

#[test]
fn p16_a_kill_leaves_the_old_or_the_new_file() {
    let folder = tempfile::tempdir().unwrap();
    let generation_of = |name: &str| {
        let checkpoint = Checkpoint::open(&folder.path().join(name)).unwrap();
        let generation: u64 = checkpoint.value("generation").unwrap().unwrap();
        let data = checkpoint.tensor("data").unwrap().unwrap();
        assert!(data.as_slice::<u8>().unwrap().iter().all(|byte| *byte == generation as u8));
        generation
    };
    let mut rng = Rng::new(16);
    let mut latest = 0;
    let mut advanced = 0;
    // Children that got nowhere ask for later kills, the others for earlier ones, whatever the machine's pace.
    let mut span_us = 28_000;
    for kill in 0..KILL_POINTS {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "kills::p16_child", "--ignored", "--quiet"])
            .env(CHILD_FOLDER, folder.path())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_micros(2_000 + rng.below(span_us)));
        child.kill().unwrap();
        assert_eq!(child.wait().unwrap().signal(), Some(9), "the child ended by itself");
        let names = names_in(folder.path());
        for name in names.iter().filter(|name| name.starts_with("step_")) {
            generation_of(name);
        }
        let now = if names.iter().any(|name| name == "latest") { generation_of("latest") } else { 0 };
        assert!(now >= latest, "kill {kill}: latest went back from {latest} to {now}");
        advanced += u32::from(now > latest);
        span_us = if now > latest { (span_us * 7 / 8).max(10_000) } else { (span_us * 5 / 4).min(1_000_000) };
        latest = now;
    }
    assert!(advanced > 20, "only {advanced} children got as far as a checkpoint: the test tested nothing");
    // A kill between link and rename leaves a name, which the next writer removes.
    let temporary = |name: &String| name.ends_with(".tmp");
    let left = names_in(folder.path()).into_iter().filter(temporary).count();
    println!("{KILL_POINTS} kills, generation {latest}, {left} temporary names left");
    let last = folder.path().join("last");
    checkpoint::write(&last, &[], &Values::new()).unwrap();
    checkpoint::point_latest(&last).unwrap();
    let left: Vec<String> = names_in(folder.path()).into_iter().filter(temporary).collect();
    assert_eq!(left, [""; 0]);
}

#[test]
fn p16_the_next_save_removes_names_of_the_dead_and_none_else() {
    let folder = tempfile::tempdir().unwrap();
    let [dead, alive, theirs] = [".old.0123456789abcdef.tmp", ".old.fedcba9876543210.tmp", ".notes.tmp"];
    for name in [dead, alive, theirs] {
        fs::write(folder.path().join(name), b"half a checkpoint").unwrap();
    }
    std::os::unix::fs::symlink("old", folder.path().join(".latest.tmp")).unwrap();
    let writer = fs::File::open(folder.path().join(alive)).unwrap();
    rustix::fs::flock(&writer, rustix::fs::FlockOperation::LockExclusive).unwrap();
    let path = folder.path().join("new");
    checkpoint::write(&path, &[], &Values::new()).unwrap();
    checkpoint::point_latest(&path).unwrap();
    let mut names = names_in(folder.path());
    names.sort();
    assert_eq!(names, [theirs, alive, "latest", "new"]);
}

/// Run by the test below, under a tracer: one save, and `latest` moved to it.
#[test]
#[ignore = "the child process of p16"]
fn p16_one_save() {
    let Some(folder) = std::env::var_os(CHILD_FOLDER).map(PathBuf::from) else { return };
    let path = folder.join("step");
    write_small(&path);
    checkpoint::point_latest(&path).unwrap();
}

/// What no kill can show, because the kernel outlives it: a machine that loses its power finds what was synchronised. So
/// the data goes to the disk before it has a name, the name before `latest` is moved, and `latest` before the call returns.
#[test]
fn p16_data_is_on_the_disk_before_its_name_and_the_name_before_latest_moves() {
    let mut probe = Command::new("strace");
    let can_trace = probe.args(["-o", "/dev/null", "true"]).stderr(Stdio::null()).status();
    if !can_trace.is_ok_and(|status| status.success()) {
        return ranks::skip("strace is needed, and leave to trace (apt-get install strace)");
    }
    let (folder, traces) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (folder_path, trace) = (folder.path().canonicalize().unwrap(), traces.path().join("trace"));
    let traced = Command::new("strace")
        .args(["-f", "-y", "-e", "trace=fsync,fdatasync,link,linkat,symlink,symlinkat,rename,renameat,renameat2", "-o"])
        .args([trace.as_os_str(), std::env::current_exe().unwrap().as_os_str()])
        .args(["--exact", "kills::p16_one_save", "--ignored", "--quiet"])
        .env(CHILD_FOLDER, &folder_path)
        .output()
        .unwrap();
    assert!(traced.status.success(), "{}", String::from_utf8_lossy(&traced.stderr));
    assert_eq!(names_in(&folder_path), ["latest", "step"]);
    let trace = fs::read_to_string(&trace).unwrap();
    let calls: Vec<&str> = trace.lines().filter_map(|line| meaning(line, &folder_path)).collect();
    let expected = [
        "the file is synchronised",
        "step is renamed",
        "the folder is synchronised",
        "latest is renamed",
        "the folder is synchronised",
    ];
    assert_eq!(calls, expected, "{trace}");
}

/// What a line of the trace says of the files in `folder`; none for links under names that nobody looks for.
fn meaning(line: &str, folder: &Path) -> Option<&'static str> {
    // 4711 fsync(3</tmp/folder/#17>) = 0
    let (_pid, call) = line.split_once(' ')?;
    let (name, arguments) = call.trim_start().split_once('(')?;
    let folder = folder.to_str()?;
    if !arguments.contains(folder) || !line.ends_with("= 0") {
        return None;
    }
    match name {
        "fsync" | "fdatasync" if arguments.contains(&format!("<{folder}>)")) => Some("the folder is synchronised"),
        "fsync" | "fdatasync" => Some("the file is synchronised"),
        "rename" | "renameat" | "renameat2" if arguments.contains(&format!("\"{folder}/step\"")) => {
            Some("step is renamed")
        }
        "rename" | "renameat" | "renameat2" if arguments.contains(&format!("\"{folder}/latest\"")) => {
            Some("latest is renamed")
        }
        _ => None,
    }
}
