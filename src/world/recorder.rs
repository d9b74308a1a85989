//! The flight recorder: the last 1,024 operations of every rank, in the shared control page, always on.
//!
//! A rank writes its own ring only; everybody can read all of them, also after their writers have died. A record costs
//! about a dozen relaxed stores and one reading of the clock at either end, which the caller shares with the timeline.
//! Field names of the dump are those of PyTorch's flight recorder (`FlightRecorder.hpp`), so its analyzers read it.

use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering, fence};
use std::time::{Duration, SystemTime};

use serde_json::{Value, json};

use crate::dtype::DType;
use crate::telemetry::now_ns;

/// Records a rank keeps.
pub const RECORDS: usize = 1024;
const NAME_BYTES: usize = 40;
const NO_DTYPE: u64 = 0xff;
/// Group number of calls on the control plane.
const CONTROL_GROUP: u32 = u32::MAX;

/// What is known about an operation when it is issued.
#[derive(Debug, Clone, Copy)]
pub struct Record<'a> {
    /// Name, of which the first 40 bytes are kept.
    pub op: &'a str,
    /// Communicator.
    pub group: u32,
    /// Position in the communicator's order.
    pub sequence: u64,
    /// Element type, for operations on buffers.
    pub dtype: Option<DType>,
    /// Elements this rank gives.
    pub input_elems: u64,
    /// Elements this rank receives.
    pub output_elems: u64,
    /// Deadline of the operation.
    pub timeout: Duration,
}

impl<'a> Record<'a> {
    pub(crate) fn control(op: &'a str, sequence: u64, timeout: Duration) -> Record<'a> {
        Record { op, group: CONTROL_GROUP, sequence, dtype: None, input_elems: 0, output_elems: 0, timeout }
    }
}

/// Names a record that was started, so that it can be ended.
#[derive(Debug, Clone, Copy)]
#[must_use = "a record that is never ended reads as an operation that is still running"]
pub struct RecordId(u64);

/// One rank's ring.
#[repr(C, align(128))]
pub(crate) struct Ring {
    /// Records started so far.
    next: AtomicU64,
    pad: [u64; 15],
    entries: [Entry; RECORDS],
}

/// Relaxed stores between two writes of `stamp`: 0 while the entry changes, else the record's number + 1.
#[repr(C, align(128))]
struct Entry {
    stamp: AtomicU64,
    sequence: AtomicU64,
    created_ns: AtomicU64,
    /// 0 until the operation has ended.
    ended_ns: AtomicU64,
    /// group | dtype << 32
    group_dtype: AtomicU64,
    input_elems: AtomicU64,
    output_elems: AtomicU64,
    timeout_ms: AtomicU64,
    name: [AtomicU64; NAME_BYTES / 8],
    pad: [u64; 3],
}

const _: () = assert!(size_of::<Entry>() == 128 && size_of::<Ring>() == 128 * (RECORDS + 1));

/// What to add to a stamp to have nanoseconds since 1970, the clock PyTorch's recorder uses. Taken at the dump, which is on
/// the machine that wrote the stamps, and before it is booted anew.
fn since_1970_ns() -> u64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_nanos() as u64);
    now.saturating_sub(now_ns())
}

/// A copy of one entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Snapshot {
    record: u64,
    group: u32,
    pub(crate) sequence: u64,
    pub(crate) op: String,
    dtype: Option<DType>,
    input_elems: u64,
    output_elems: u64,
    timeout_ms: u64,
    created_ns: u64,
    ended_ns: u64,
}

impl Ring {
    /// `now_ns` as [`now_ns`](crate::telemetry::now_ns).
    pub(crate) fn start(&self, record: &Record<'_>, now_ns: u64) -> RecordId {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let entry = &self.entries[(id % RECORDS as u64) as usize];
        entry.stamp.store(0, Ordering::Relaxed);
        // Release fence: pairs with the acquire fence in `read`; a reader that sees a field below sees the stamp gone.
        fence(Ordering::Release);
        let mut name = [0_u8; NAME_BYTES];
        let len_bytes = record.op.len().min(NAME_BYTES);
        name[..len_bytes].copy_from_slice(&record.op.as_bytes()[..len_bytes]);
        for (word, bytes) in entry.name.iter().zip(name.as_chunks::<8>().0) {
            word.store(u64::from_le_bytes(*bytes), Ordering::Relaxed);
        }
        let dtype = record.dtype.map_or(NO_DTYPE, |dtype| dtype as u64);
        entry.group_dtype.store(u64::from(record.group) | dtype << 32, Ordering::Relaxed);
        entry.sequence.store(record.sequence, Ordering::Relaxed);
        entry.input_elems.store(record.input_elems, Ordering::Relaxed);
        entry.output_elems.store(record.output_elems, Ordering::Relaxed);
        entry.timeout_ms.store(record.timeout.as_millis() as u64, Ordering::Relaxed);
        entry.created_ns.store(now_ns, Ordering::Relaxed);
        entry.ended_ns.store(0, Ordering::Relaxed);
        // Release: pairs with the acquire in `read`.
        entry.stamp.store(id.wrapping_add(1), Ordering::Release);
        RecordId(id)
    }

    /// `now_ns` as [`now_ns`](crate::telemetry::now_ns).
    pub(crate) fn end(&self, id: RecordId, now_ns: u64) {
        let entry = &self.entries[(id.0 % RECORDS as u64) as usize];
        if entry.stamp.load(Ordering::Relaxed) == id.0.wrapping_add(1) {
            entry.ended_ns.store(now_ns, Ordering::Relaxed);
        }
    }

    fn read(&self, id: u64) -> Option<Snapshot> {
        let entry = &self.entries[(id % RECORDS as u64) as usize];
        // Acquire: pairs with the release in `start`.
        if entry.stamp.load(Ordering::Acquire) != id.wrapping_add(1) {
            return None;
        }
        let mut name = Vec::with_capacity(NAME_BYTES);
        for word in &entry.name {
            name.extend_from_slice(&word.load(Ordering::Relaxed).to_le_bytes());
        }
        let group_dtype = entry.group_dtype.load(Ordering::Relaxed);
        let snapshot = Snapshot {
            record: id,
            group: group_dtype as u32,
            sequence: entry.sequence.load(Ordering::Relaxed),
            op: String::from_utf8_lossy(&name).trim_end_matches(['\0', '\u{fffd}']).to_owned(),
            dtype: DType::from_code((group_dtype >> 32) as u8),
            input_elems: entry.input_elems.load(Ordering::Relaxed),
            output_elems: entry.output_elems.load(Ordering::Relaxed),
            timeout_ms: entry.timeout_ms.load(Ordering::Relaxed),
            created_ns: entry.created_ns.load(Ordering::Relaxed),
            ended_ns: entry.ended_ns.load(Ordering::Relaxed),
        };
        // Acquire fence: pairs with the release fence in `start`; the stamp is unchanged, so the fields were whole.
        fence(Ordering::Acquire);
        (entry.stamp.load(Ordering::Relaxed) == id.wrapping_add(1)).then_some(snapshot)
    }

    /// The last `limit` records, oldest first; those being written are left out.
    pub(crate) fn last(&self, limit: usize) -> Vec<Snapshot> {
        let next = self.next.load(Ordering::Relaxed);
        let first = next.saturating_sub(limit.min(RECORDS) as u64);
        (first..next).filter_map(|id| self.read(id)).collect()
    }

    /// The newest record that has not ended.
    pub(crate) fn running(&self) -> Option<Snapshot> {
        self.last(16).into_iter().rev().find(|record| record.ended_ns == 0)
    }
}

impl Snapshot {
    /// `op (sequence n)`, the way an error names an operation.
    pub(crate) fn describe(&self) -> String {
        let mut text = self.op.clone();
        if let Some(dtype) = self.dtype {
            let _ = write!(text, " {}x{dtype}", self.input_elems);
        }
        let _ = match self.group {
            CONTROL_GROUP => write!(text, " (control sequence {})", self.sequence),
            group => write!(text, " (communicator {group}, sequence {})", self.sequence),
        };
        text
    }

    fn to_json(&self, since_1970_ns: u64) -> Value {
        let dtypes = |elems: u64| self.dtype.filter(|_| elems > 0).map(torch_name).into_iter().collect::<Vec<_>>();
        let control = self.group == CONTROL_GROUP;
        let group = if control { "control".to_owned() } else { self.group.to_string() };
        let ended = self.ended_ns != 0;
        let [created_ns, ended_ns] = [self.created_ns, self.ended_ns].map(|ns| since_1970_ns.saturating_add(ns));
        json!({
            "record_id": self.record,
            "pg_id": if control { -1 } else { i64::from(self.group) },
            "process_group": [group, if control { "control plane" } else { "communicator" }],
            "collective_seq_id": self.sequence,
            "p2p_seq_id": 0,
            "op_id": self.record,
            "profiling_name": format!("annulus:{}", self.op),
            "time_created_ns": created_ns,
            "duration_ms": ended.then(|| self.ended_ns.saturating_sub(self.created_ns) as f64 / 1e6),
            "input_sizes": [[self.input_elems]],
            "input_dtypes": dtypes(self.input_elems),
            "output_sizes": [[self.output_elems]],
            "output_dtypes": dtypes(self.output_elems),
            "state": if ended { "completed" } else { "started" },
            "time_discovered_started_ns": created_ns,
            "time_discovered_completed_ns": ended.then_some(ended_ns),
            "retired": ended,
            "timeout_ms": self.timeout_ms,
            "is_p2p": false,
            "frames": [],
        })
    }
}

/// PyTorch's name of a scalar type.
fn torch_name(dtype: DType) -> &'static str {
    match dtype {
        DType::F32 => "Float",
        DType::F16 => "Half",
        DType::BF16 => "BFloat16",
        DType::F64 => "Double",
        DType::I32 => "Int",
        DType::I64 => "Long",
        DType::U8 => "Byte",
    }
}

/// One rank's ring as PyTorch's flight recorder writes it.
pub(crate) fn dump(ring: &Ring, rank: u32, world_size: u32) -> Value {
    let records = ring.last(RECORDS);
    let last_ended = records.iter().filter(|record| record.ended_ns != 0).map(|record| record.sequence).max();
    let last_started = records.iter().map(|record| record.sequence).max();
    let ranks: Vec<u32> = (0..world_size).collect();
    let since_1970_ns = since_1970_ns();
    json!({
        "version": "2.10",
        "rank": rank,
        "pg_config": { "0": { "name": "0", "desc": "world", "ranks": format!("{ranks:?}") } },
        "pg_status": { "0": {
            "last_enqueued_collective": last_started,
            "last_started_collective": last_started,
            "last_completed_collective": last_ended,
        } },
        "entries": records.iter().map(|record| record.to_json(since_1970_ns)).collect::<Vec<_>>(),
    })
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::world::segment::Segment;

    fn with_ring(test: impl FnOnce(&Ring)) {
        let segment = Segment::create("test", size_of::<Ring>()).unwrap();
        segment.reserve("test", 0, size_of::<Ring>()).unwrap();
        // SAFETY: reserved, zeroed, page aligned, as long as a ring; a ring is atomics.
        test(unsafe { segment.as_ptr().cast::<Ring>().as_ref() });
    }

    fn record(op: &str, sequence: u64) -> Record<'_> {
        Record {
            op,
            group: 0,
            sequence,
            dtype: Some(DType::BF16),
            input_elems: 12,
            output_elems: 24,
            timeout: Duration::from_secs(600),
        }
    }

    #[test]
    fn the_last_1024_are_kept_and_the_running_one_is_found() {
        with_ring(|ring| {
            for sequence in 0..3_000 {
                let id = ring.start(&record("all_reduce", sequence), 1);
                if sequence != 2_999 {
                    ring.end(id, 2);
                }
            }
            let kept = ring.last(usize::MAX);
            assert_eq!((kept.len(), kept[0].sequence, kept[1023].sequence), (1024, 1_976, 2_999));
            assert_eq!(ring.running().unwrap().describe(), "all_reduce 12xbf16 (communicator 0, sequence 2999)");
        });
    }

    #[test]
    fn an_overwritten_record_cannot_be_ended() {
        with_ring(|ring| {
            let old = ring.start(&record("old", 0), 1);
            for sequence in 1..=RECORDS as u64 {
                let _ = ring.start(&record("new", sequence), 1);
            }
            ring.end(old, 2);
            assert!(ring.last(RECORDS).iter().all(|record| record.ended_ns == 0));
        });
    }

    #[test]
    fn p23_the_dump_has_pytorchs_fields() {
        with_ring(|ring| {
            let id = ring.start(&record("a name that is longer than the forty bytes kept: é", 5), 1);
            ring.end(id, 2);
            let _ = ring.start(&Record::control("barrier", 1, Duration::from_secs(1)), 1);
            let dump = dump(ring, 3, 4);
            let entries = dump["entries"].as_array().unwrap();
            assert_eq!((dump["rank"].as_u64(), entries.len()), (Some(3), 2));
            for field in [
                "record_id",
                "pg_id",
                "process_group",
                "collective_seq_id",
                "p2p_seq_id",
                "op_id",
                "profiling_name",
                "time_created_ns",
                "duration_ms",
                "input_sizes",
                "input_dtypes",
                "output_sizes",
                "output_dtypes",
                "state",
                "time_discovered_started_ns",
                "time_discovered_completed_ns",
                "retired",
                "timeout_ms",
                "is_p2p",
                "frames",
            ] {
                assert!(entries.iter().all(|entry| entry.get(field).is_some()), "{field}");
            }
            assert_eq!((&entries[0]["state"], &entries[1]["state"]), (&json!("completed"), &json!("started")));
            assert_eq!(entries[0]["output_dtypes"], json!(["BFloat16"]));
        });
    }

    /// Promised are 100 ns a record; asserted is what no busy machine exceeds.
    #[test]
    fn p23_a_record_costs_little() {
        with_ring(|ring| {
            let start = std::time::Instant::now();
            for sequence in 0..100_000 {
                let id = ring.start(&record("all_reduce", sequence), crate::telemetry::now_ns());
                ring.end(id, crate::telemetry::now_ns());
            }
            let each = start.elapsed() / 100_000;
            println!("a record: {each:?}");
            assert!(each < Duration::from_micros(5), "{each:?}");
        });
    }

    #[test]
    fn readers_never_see_half_a_record() {
        with_ring(|ring| {
            let done = std::sync::atomic::AtomicBool::new(false);
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    for sequence in 0..200_000_u64 {
                        let name = if sequence % 2 == 0 { "even" } else { "odd" };
                        let id = ring.start(&Record { input_elems: sequence, ..record(name, sequence) }, 1);
                        ring.end(id, 2);
                    }
                    done.store(true, Ordering::Relaxed);
                });
                while !done.load(Ordering::Relaxed) {
                    for record in ring.last(RECORDS) {
                        assert_eq!(record.input_elems, record.sequence);
                        assert_eq!(record.op, if record.sequence % 2 == 0 { "even" } else { "odd" });
                    }
                }
            });
        });
    }
}
