//! P19: whatever a file says, opening it costs bounded time and memory.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use annulus::strategy::checkpoint::{self, Checkpoint, MAX_HEADER_BYTES, MAX_TENSORS, Values};
use annulus::{DType, Error};

use crate::{ranks, view, write_small};

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

/// What a call has cost.
#[derive(Debug)]
struct Cost {
    peak_bytes: usize,
    time: Duration,
    /// Of the thread: a processor that is taken away meanwhile is no cost of the file.
    processor_time: Duration,
}

fn processor_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

fn measure<T>(f: impl FnOnce() -> T) -> (T, Cost) {
    let (before, start, processor_start) = (HELD.get(), Instant::now(), processor_time());
    PEAK.set(before);
    let result = f();
    let peak_bytes = (PEAK.get() - before) as usize;
    (result, Cost { peak_bytes, time: start.elapsed(), processor_time: processor_time() - processor_start })
}

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

/// What a malicious writer may try, by name.
fn hostile_files() -> BTreeMap<&'static str, Vec<u8>> {
    let info = |shape: &str, start: u64, end: u64| {
        format!("{{\"dtype\":\"F32\",\"shape\":{shape},\"data_offsets\":[{start},{end}]}}")
    };
    let named = |name: &str, info: &str| format!(",\"{name}\":{info}");
    let big = MAX_HEADER_BYTES - 4096;

    let mut files = BTreeMap::new();
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
    files
}

/// Memory for what stands in no proportion to the file: the path, the message.
const SMALL_BYTES: usize = 64 << 10;

/// What is promised of a file with `len_bytes`, in the long form; on a busy machine it may take a few times 100 ms.
fn assert_bounded(what: &str, cost: &Cost, len_bytes: usize) {
    let limit = Duration::from_millis(if ranks::long() { 100 } else { 1_000 });
    assert!(cost.processor_time <= limit && cost.time <= 10 * limit, "{what}: {cost:?}");
    assert!(cost.peak_bytes <= 2 * len_bytes + SMALL_BYTES, "{what}: {cost:?} for a file of {len_bytes} bytes");
}

#[test]
fn p19_hostile_files_are_refused_in_bounded_time_and_memory() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("hostile");
    for (what, file) in hostile_files() {
        fs::write(&path, &file).unwrap();
        let (result, cost) = measure(|| Checkpoint::open(&path));
        let error = result.expect_err(what);
        assert!(matches!(error, Error::Checkpoint { .. }), "{what}: {error}");
        assert!(error.to_string().len() < 4096, "{what}: the message has {} bytes", error.to_string().len());
        assert_bounded(what, &cost, file.len());
        println!("{what:32} {:9} bytes {:10.1?} peak {:9}: {error}", file.len(), cost.processor_time, cost.peak_bytes);
    }
}

#[test]
fn p19_the_largest_honest_header_is_read_in_bounded_time_and_memory() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("many");
    let tensors: Vec<_> =
        (0..MAX_TENSORS).map(|i| view(&format!("t{i}"), DType::F32, &[1], &[0, 0, 128, 63])).collect();
    checkpoint::write(&path, &tensors, &Values::new()).unwrap();
    let len_bytes = fs::metadata(&path).unwrap().len() as usize;
    let (checkpoint, cost) = measure(|| Checkpoint::open(&path).unwrap());
    println!("{MAX_TENSORS} tensors, {len_bytes} bytes: {cost:?}");
    assert_bounded("the largest header", &cost, len_bytes);
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
