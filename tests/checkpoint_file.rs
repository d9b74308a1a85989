//! The file layer of checkpoints: P16 to P19 of the promises, and other readers of the format.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use annulus::strategy::Rng;
use annulus::strategy::checkpoint::{self, Checkpoint, MAX_HEADER_BYTES, MAX_TENSORS, TensorView, Values};
use annulus::{DType, Error};

/// Counts the bytes that the calling thread holds, and their peak.
struct Counting;

thread_local! {
    static HELD: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

fn count(bytes: isize) {
    // A thread that is ending has no counters any more; nothing is measured there.
    let _ = HELD.try_with(|held| {
        held.set(held.get() + bytes);
        PEAK.with(|peak| peak.set(peak.get().max(held.get())));
    });
}

// SAFETY: every call goes to the system allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// What `f` returns, the most bytes it held, and the time it took.
fn measure<T>(f: impl FnOnce() -> T) -> (T, usize, Duration) {
    let before = HELD.get();
    PEAK.set(before);
    let start = Instant::now();
    let result = f();
    (result, (PEAK.get() - before) as usize, start.elapsed())
}

fn view<'a>(name: &str, dtype: DType, shape: &[usize], bytes: &'a [u8]) -> TensorView<'a> {
    TensorView { name: name.to_owned(), dtype, shape: shape.to_vec(), bytes }
}

/// A small file with every element type, an empty tensor and a scalar.
fn write_small(path: &Path) {
    let bytes: Vec<u8> = (0..96).collect();
    let tensors = [
        view("model.weight", DType::F32, &[2, 3], &bytes[..24]),
        view("model.bias", DType::F32, &[3], &bytes[4..16]),
        view("model.half", DType::F16, &[5], &bytes[..10]),
        view("model.brain", DType::BF16, &[2, 2], &bytes[..8]),
        view("double", DType::F64, &[], &bytes[8..16]),
        view("long", DType::I64, &[1, 1, 1], &bytes[..8]),
        view("int", DType::I32, &[3], &bytes[..12]),
        view("byte", DType::U8, &[7], &bytes[..7]),
        view("größe", DType::F32, &[0, 4], &[]),
    ];
    let mut values = Values::new();
    values.insert("epoch", &3).unwrap();
    values.insert("note", "a \"quoted\" line\nand another").unwrap();
    checkpoint::write(path, &tensors, &values).unwrap();
}

fn assert_small(checkpoint: &Checkpoint) {
    assert_eq!(checkpoint.value::<u32>("epoch").unwrap(), Some(3));
    assert_eq!(checkpoint.value::<String>("note").unwrap().as_deref(), Some("a \"quoted\" line\nand another"));
    assert_eq!(checkpoint.value::<u32>("absent").unwrap(), None);
    assert!(checkpoint.value::<u32>("note").is_err());
    assert_eq!(checkpoint.tensors("").count(), 9);
    let weight = checkpoint.tensor("model.weight").unwrap().unwrap();
    assert_eq!(weight.shape(), [2, 3]);
    let expected: Vec<f32> = (0..6_u8).map(|i| f32::from_le_bytes([4 * i, 4 * i + 1, 4 * i + 2, 4 * i + 3])).collect();
    assert_eq!(weight.as_slice::<f32>().unwrap(), expected);
    assert_eq!(checkpoint.tensor("größe").unwrap().unwrap().shape(), [0, 4]);
    assert!(checkpoint.tensor("model").unwrap().is_none());
    let names: Vec<_> = checkpoint.tensors("model.").map(|(name, ..)| name).collect();
    assert_eq!(names, ["model.bias", "model.brain", "model.half", "model.weight"]);
}

fn names_in(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn what_is_written_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("small.safetensors");
    for _ in 0..2 {
        write_small(&path);
        assert_small(&Checkpoint::open(&path).unwrap());
        assert_eq!(names_in(folder.path()), ["small.safetensors"]);
    }
    checkpoint::point_latest(&path).unwrap();
    checkpoint::point_latest(&path).unwrap();
    assert_small(&Checkpoint::open(&folder.path().join("latest")).unwrap());
    assert_eq!(names_in(folder.path()), ["latest", "small.safetensors"]);
    checkpoint::write(&path, &[], &Values::new()).unwrap();
    assert_eq!(Checkpoint::open(&path).unwrap().tensors("").count(), 0);
}

#[test]
fn the_safetensors_crate_reads_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("small.safetensors");
    write_small(&path);
    let bytes = fs::read(&path).unwrap();
    let theirs = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let ours = Checkpoint::open(&path).unwrap();
    assert_eq!(theirs.len(), ours.tensors("").count());
    for (name, dtype, shape) in ours.tensors("") {
        let tensor = theirs.tensor(name).unwrap();
        assert_eq!(tensor.dtype().to_string().to_lowercase(), dtype.name());
        assert_eq!(tensor.shape(), shape);
        // Aligned for its type, as readers that map the file need it.
        assert_eq!((tensor.data().as_ptr() as usize - bytes.as_ptr() as usize) % dtype.size_bytes(), 0, "{name}");
    }
}

#[test]
fn python_safetensors_reads_it() {
    let has_package = Command::new("python3").args(["-c", "import safetensors.numpy"]).stderr(Stdio::null()).status();
    if !has_package.is_ok_and(|status| status.success()) {
        println!("skipped: python3 with the packages safetensors and numpy is needed (pip install safetensors numpy)");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("small.safetensors");
    write_small(&path);
    let script = r#"
import json, sys
import numpy as np
import safetensors
from safetensors import safe_open
raw = bytes(range(96))
with safe_open(sys.argv[1], "np") as f:
    assert sorted(f.keys()) == sorted(["model.weight", "model.bias", "model.half", "model.brain", "double", "long", "int", "byte", "größe"]), f.keys()
    assert (f.get_tensor("model.weight") == np.frombuffer(raw[:24], "<f4").reshape(2, 3)).all()
    assert f.get_tensor("model.half").dtype == np.float16 and f.get_tensor("model.half").shape == (5,)
    assert f.get_tensor("double") == np.frombuffer(raw[8:16], "<f8")[0] and f.get_tensor("double").shape == ()
    assert f.get_tensor("long").shape == (1, 1, 1)
    assert f.get_tensor("größe").shape == (0, 4)
    assert json.loads(f.metadata()["value.epoch"]) == 3
    assert json.loads(f.metadata()["value.note"]) == 'a "quoted" line\nand another'
brain = dict(safetensors.deserialize(open(sys.argv[1], "rb").read()))["model.brain"]
assert brain["dtype"] == "BF16" and brain["shape"] == [2, 2] and bytes(brain["data"]) == raw[:8]
print("python read it")
"#;
    let output = Command::new("python3").args(["-c", script]).arg(&path).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn what_the_format_cannot_hold_is_refused_before_anything_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("file");
    let mut quoted = Values::new();
    quoted.insert("a\"b", &1).unwrap();
    let none = Values::new();
    let refused: [(&[TensorView<'_>], &Values); 7] = [
        (&[view("a", DType::F32, &[2], &[0; 4])], &none),
        (&[view("a", DType::F32, &[usize::MAX, 2], &[0; 4])], &none),
        (&[view("a", DType::U8, &[1; 9], &[0])], &none),
        (&[view("", DType::U8, &[1], &[0])], &none),
        (&[view("a\nb", DType::U8, &[1], &[0])], &none),
        (&[view("twin", DType::U8, &[1], &[0]), view("twin", DType::F32, &[1], &[0; 4])], &none),
        (&[], &quoted),
    ];
    for (tensors, values) in refused {
        let error = checkpoint::write(&path, tensors, values).unwrap_err();
        assert!(matches!(error, Error::Checkpoint { .. }), "{error}");
    }
    assert!(matches!(checkpoint::write(folder.path(), &[], &none), Err(Error::Checkpoint { .. })));
    assert!(matches!(checkpoint::write(Path::new("/"), &[], &none), Err(Error::InvalidArgument { .. })));
    assert!(matches!(checkpoint::write(&folder.path().join("no/such/file"), &[], &none), Err(Error::Io { .. })));
    assert!(names_in(folder.path()).is_empty());
}

// ---- P16 -----------------------------------------------------------------------------------------------------------

const KILL_POINTS: usize = 200;
const CHILD_FOLDER: &str = "ANNULUS_TEST_CHILD_FOLDER";

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
            .args(["--exact", "p16_child", "--ignored", "--quiet"])
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

// ---- P17 -----------------------------------------------------------------------------------------------------------

#[test]
fn p17_any_flipped_bit_and_any_truncation_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("small.safetensors");
    write_small(&path);
    let whole = fs::read(&path).unwrap();
    let data_start = 8 + u64::from_le_bytes(*whole.first_chunk().unwrap()) as usize;
    let damaged = folder.path().join("damaged");
    fs::write(&damaged, &whole).unwrap();
    let file = fs::OpenOptions::new().write(true).open(&damaged).unwrap();
    for bit in 0..8 * whole.len() {
        file.write_all_at(&[whole[bit / 8] ^ (1 << (bit % 8))], bit as u64 / 8).unwrap();
        let error = Checkpoint::open(&damaged).expect_err(&format!("bit {bit} was flipped"));
        let Error::Checkpoint { path, item, .. } = &error else { panic!("{error}") };
        assert_eq!(path, &damaged);
        // A flip in the data names a tensor.
        assert!(bit / 8 < data_start || theirs(&whole).contains(item), "bit {bit}: {error}");
        file.write_all_at(&whole[bit / 8..=bit / 8], bit as u64 / 8).unwrap();
    }
    assert_small(&Checkpoint::open(&damaged).unwrap());
    for len in (0..whole.len()).rev() {
        file.set_len(len as u64).unwrap();
        let error = Checkpoint::open(&damaged).expect_err("truncated");
        let Error::Checkpoint { item, .. } = &error else { panic!("{error}") };
        assert!(len < data_start || theirs(&whole).contains(item), "length {len}: {error}");
    }
    for extra in 1..20 {
        fs::write(&damaged, [&whole[..], &vec![0; extra]].concat()).unwrap();
        assert!(Checkpoint::open(&damaged).is_err());
    }
}

fn theirs(file: &[u8]) -> Vec<String> {
    safetensors::SafeTensors::deserialize(file).unwrap().names().into_iter().map(str::to_owned).collect()
}

#[test]
fn p17_a_thousand_flips_of_a_large_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("large");
    let mut rng = Rng::new(17);
    let data: Vec<u8> = (0..200_000).map(|_| rng.next_u64() as u8).collect();
    let tensors =
        [view("a", DType::F32, &[10_000], &data[..40_000]), view("b", DType::F16, &[80_000], &data[40_000..])];
    checkpoint::write(&path, &tensors, &Values::new()).unwrap();
    let whole = fs::read(&path).unwrap();
    let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
    for _ in 0..1_000 {
        let bit = rng.below(8 * whole.len() as u64);
        let at = (bit / 8) as usize;
        file.write_all_at(&[whole[at] ^ (1 << (bit % 8))], bit / 8).unwrap();
        assert!(matches!(Checkpoint::open(&path), Err(Error::Checkpoint { .. })), "bit {bit}");
        file.write_all_at(&whole[at..=at], bit / 8).unwrap();
    }
    assert!(Checkpoint::open(&path).is_ok());
}

// ---- P18 -----------------------------------------------------------------------------------------------------------

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
        println!("skipped: mounting a tmpfs needs root; p18_a_file_size_limit_keeps_the_old_file runs without");
        return;
    }
    let result = std::panic::catch_unwind(|| {
        let mut child = Command::new(std::env::current_exe().unwrap());
        p18_run(child.args(["--exact", "p18_child", "--ignored", "--nocapture"]), folder.path())
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
        .args(["-c", "trap '' XFSZ; ulimit -f 8192; exec \"$0\" --exact p18_child --ignored --nocapture"])
        .arg(std::env::current_exe().unwrap());
    let text = p18_run(&mut child, folder.path());
    assert!(text.contains("write of checkpoint"), "{text}");
}

// ---- P19 -----------------------------------------------------------------------------------------------------------

const PREFIX: &str = "{\"__metadata__\":{\"annulus.header_crc32\":\"";

/// A file whose header text is `text` behind the prefix, with a checksum that fits: what a malicious writer makes.
fn forged(text: &[u8], data: &[u8]) -> Vec<u8> {
    let mut header = [PREFIX.as_bytes(), b"00000000", text].concat();
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header);
    let crc = crc32fast::hash(&file);
    let at = 8 + PREFIX.len();
    file[at..at + 8].copy_from_slice(format!("{crc:08x}").as_bytes());
    file.extend(data);
    file
}

/// A forged file with these tensors and their right number of checksums.
fn forged_tensors(count: usize, tensors: &str, data: &[u8]) -> Vec<u8> {
    let crc = "00000000".repeat(count);
    let text = format!("\",\"annulus.tensor_crc32\":\"{crc}\",\"annulus.format\":\"1\"}}{tensors}}}");
    forged(text.as_bytes(), data)
}

#[test]
fn p19_hostile_files_are_refused_in_bounded_time_and_memory() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("hostile");
    let info = |shape: &str, start: u64, end: u64| {
        format!("{{\"dtype\":\"F32\",\"shape\":{shape},\"data_offsets\":[{start},{end}]}}")
    };
    let named = |name: &str, info: &str| format!(",\"{name}\":{info}");
    let big = MAX_HEADER_BYTES - 4096;

    let mut files: BTreeMap<&str, Vec<u8>> = BTreeMap::new();
    files.insert("empty", Vec::new());
    files.insert("seven bytes", vec![0; 7]);
    files.insert("length of the address space", [&u64::MAX.to_le_bytes()[..], &[b' '; 64]].concat());
    files.insert("length of 100 MB", [&100_000_000_u64.to_le_bytes()[..], &[b' '; 64]].concat());
    files.insert("length past the end", [&65_u64.to_le_bytes()[..], &[b' '; 64]].concat());
    files.insert("another program's file", {
        let mut file = 16_u64.to_le_bytes().to_vec();
        file.extend(b"{\"a\":1}         ");
        file
    });
    files.insert("not UTF-8", forged(b"\",\"x\":\"\xff\xff\"}}", &[]));
    files.insert("not JSON", forged(b"\",", &[]));
    files.insert("deep nesting", forged(format!("\",\"x\":{}", "[".repeat(big)).as_bytes(), &[]));
    files.insert("metadata of numbers", forged(b"\",\"x\":1}}", &[]));
    files.insert("no format", forged(b"\"}}", &[]));
    files.insert("trailing text", forged_tensors(0, "} {", &[]));
    files.insert("no checksums", forged_tensors(0, &named("a", &info("[1]", 0, 4)), &[0; 4]));
    files.insert("too many checksums", forged_tensors(2, &named("a", &info("[1]", 0, 4)), &[0; 4]));
    files.insert("shape times size wraps", {
        forged_tensors(1, &named("a", &info("[4611686018427387904,4]", 0, 0)), &[])
    });
    files.insert("shape beyond u64", forged_tensors(1, &named("a", &info("[99999999999999999999]", 0, 0)), &[]));
    files.insert("negative shape", forged_tensors(1, &named("a", &info("[-1]", 0, 4)), &[0; 4]));
    files.insert("offsets at the end of u64", {
        forged_tensors(1, &named("a", &info("[4611686018427387903]", 0, u64::MAX - 3)), &[])
    });
    files.insert("end before start", forged_tensors(1, &named("a", &info("[1]", 4, 0)), &[0; 4]));
    files.insert("nine dimensions", forged_tensors(1, &named("a", &info("[1,1,1,1,1,1,1,1,1]", 0, 4)), &[0; 4]));
    files.insert("a shape of sixteen megabytes", {
        forged_tensors(1, &named("a", &info(&format!("[{}1]", "1,".repeat(big / 2)), 0, 4)), &[0; 4])
    });
    files.insert("a hole", {
        let tensors = named("a", &info("[1]", 0, 4)) + &named("b", &info("[1]", 8, 12));
        forged_tensors(2, &tensors, &[0; 12])
    });
    files.insert("an overlap", {
        let tensors = named("a", &info("[1]", 0, 4)) + &named("b", &info("[1]", 0, 4));
        forged_tensors(2, &tensors, &[0; 4])
    });
    files.insert("twins", {
        let tensors = named("a", &info("[1]", 0, 4)) + &named("a", &info("[1]", 4, 8));
        forged_tensors(2, &tensors, &[0; 8])
    });
    files.insert("unknown dtype", {
        forged_tensors(1, ",\"a\":{\"dtype\":\"F99\",\"shape\":[1],\"data_offsets\":[0,1]}", &[0])
    });
    files.insert("dtype annulus does not hold", {
        forged_tensors(1, ",\"a\":{\"dtype\":\"F8_E4M3\",\"shape\":[1],\"data_offsets\":[0,1]}", &[0])
    });
    files.insert("unknown field", {
        forged_tensors(1, ",\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1],\"x\":0}", &[0])
    });
    files.insert("escaped name", forged_tensors(1, &named("\\u0061", &info("[1]", 0, 4)), &[0; 4]));
    files.insert("wrong data", forged_tensors(1, &named("a", &info("[1]", 0, 4)), b"abcd"));
    files.insert("more tensors than allowed", {
        let tensors: String = (0..=MAX_TENSORS).map(|i| named(&i.to_string(), &info("[0]", 0, 0))).collect();
        forged_tensors(0, &tensors, &[])
    });
    files.insert("sixteen megabytes of metadata", {
        let metadata: String = (0..big / 16).map(|i| format!(",\"{i:08}\":\"\"")).collect();
        forged(format!("\"{metadata}}}}}").as_bytes(), &[])
    });
    files.insert("one metadata entry twice", forged(b"\",\"x\":\"\",\"x\":\"\"}}", &[]));
    files.insert("no end", forged(format!("\",\"x\":\"{}", "x".repeat(big)).as_bytes(), &[]));

    for (what, file) in &files {
        fs::write(&path, file).unwrap();
        let (result, peak_bytes, time) = measure(|| Checkpoint::open(&path));
        let error = result.expect_err(what);
        assert!(matches!(error, Error::Checkpoint { .. }), "{what}: {error}");
        assert!(error.to_string().len() < 4096, "{what}: the message has {} bytes", error.to_string().len());
        assert!(peak_bytes <= 2 * file.len() + (64 << 10), "{what}: {peak_bytes} bytes for a file of {}", file.len());
        // The promise is 100 ms; unoptimised and on a busy machine it may take a few times that.
        assert!(time < Duration::from_secs(1), "{what}: {time:?}");
        println!("{what:32} {:9} bytes {time:10.1?} peak {peak_bytes:9}: {error}", file.len());
    }
}

#[test]
fn p19_the_largest_honest_header_is_read_in_bounded_memory() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("many");
    let tensors: Vec<_> =
        (0..MAX_TENSORS).map(|i| view(&format!("t{i}"), DType::F32, &[1], &[0, 0, 128, 63])).collect();
    checkpoint::write(&path, &tensors, &Values::new()).unwrap();
    let len_bytes = fs::metadata(&path).unwrap().len() as usize;
    let (checkpoint, peak_bytes, time) = measure(|| Checkpoint::open(&path).unwrap());
    println!("{MAX_TENSORS} tensors, {len_bytes} bytes: {time:?}, peak {peak_bytes}");
    assert!(peak_bytes < 4 * len_bytes, "{peak_bytes} bytes for a file of {len_bytes}");
    assert_eq!(checkpoint.tensor("t99999").unwrap().unwrap().as_slice::<f32>().unwrap(), [1.0]);
    let one_more: Vec<_> = (0..=MAX_TENSORS).map(|i| view(&format!("t{i}"), DType::U8, &[0], &[])).collect();
    assert!(matches!(checkpoint::write(&path, &one_more, &Values::new()), Err(Error::Checkpoint { .. })));
}

#[test]
fn p19_what_is_no_regular_file_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    assert!(Checkpoint::open(folder.path()).is_err());
    assert!(Checkpoint::open(&folder.path().join("absent")).is_err());
    assert!(Checkpoint::open(Path::new("/dev/zero")).is_err());
    let pipe = folder.path().join("pipe");
    if Command::new("mkfifo").arg(&pipe).status().is_ok_and(|status| status.success()) {
        assert!(Checkpoint::open(&pipe).is_err(), "and without waiting for a writer");
    }
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig { failure_persistence: None, ..Default::default() })]
    /// Damage with a checksum that fits, so that the parser is reached: no panic, and nothing is accepted that the
    /// safetensors crate refuses.
    #[test]
    fn p19_forged_headers(edits in proptest::collection::vec((0_usize..700, proptest::prelude::any::<u8>()), 1..6)) {
        thread_local! {
            static SMALL: Vec<u8> = {
                let folder = tempfile::tempdir().unwrap();
                let path = folder.path().join("small");
                write_small(&path);
                fs::read(&path).unwrap()
            };
        }
        let mut file = SMALL.with(Clone::clone);
        let header_bytes = u64::from_le_bytes(*file.first_chunk().unwrap()) as usize;
        let first = 8 + PREFIX.len() + 8;
        for (at, byte) in edits {
            // Printable bytes reach deeper than the UTF-8 check.
            file[first + at % (8 + header_bytes - first)] = if byte < 128 { 32 + byte % 95 } else { b"0123456789[]{},:\""[usize::from(byte) % 17] };
        }
        file[8 + PREFIX.len()..first].fill(b'0');
        let crc = crc32fast::hash(&file[..8 + header_bytes]);
        file[8 + PREFIX.len()..first].copy_from_slice(format!("{crc:08x}").as_bytes());
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("forged");
        fs::write(&path, &file).unwrap();
        if let Ok(checkpoint) = Checkpoint::open(&path) {
            let theirs = safetensors::SafeTensors::deserialize(&file).unwrap();
            proptest::prop_assert_eq!(theirs.len(), checkpoint.tensors("").count());
        }
    }
}
