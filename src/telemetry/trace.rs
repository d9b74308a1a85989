//! A timeline in the format of Chrome's `about:tracing` and of [Perfetto](https://ui.perfetto.dev).
//!
//! ```text
//! rank 0   backward       [layer 3 ][layer 2 ][layer 1 ]
//!          communication           [ bucket 0 ][ bucket 1 ]
//!          optimizer                                       [ step ]
//! rank 1   backward       [layer 3   ][layer 2 ] ..
//! ```
//! One process per rank, one track per stream. Stamps are CLOCK_MONOTONIC nanoseconds, which all processes of one machine
//! share, so the files of several ranks line up when [`merge`] puts them into one.
//!
//! Cost: off (the default), a record is one branch, and so it is while paused. On, it is one push into a bounded queue that
//! was allocated at the start; when the queue is full the record is dropped and counted, so that tracing never changes what
//! is traced.
//!
//! Source of the format: "Trace Event Format", Google, events `X` (complete), `C` (counter) and `M` (metadata).
#![forbid(unsafe_code)]

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crossbeam::queue::ArrayQueue;
use rustix::time::{ClockId, clock_gettime};
use serde::Deserialize;

use super::nvtx;
use crate::error::{Error, Result};

/// Largest trace file that [`merge`] reads, so that a wrong path cannot take all memory.
const MAX_TRACE_FILE_BYTES: u64 = 1 << 30;

/// Nanoseconds of CLOCK_MONOTONIC: comparable between all processes of one machine, not between machines.
pub fn now_ns() -> u64 {
    let time = clock_gettime(ClockId::Monotonic);
    // The monotonic clock counts up from boot: neither part is negative.
    (time.tv_sec as u64).wrapping_mul(1_000_000_000).wrapping_add(time.tv_nsec as u64)
}

/// A row of the timeline, as registered with [`Timeline::track`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Track(u32);

/// A cheap handle to one rank's trace; clones record into the same buffer.
#[derive(Clone, Default)]
pub struct Timeline {
    recorder: Option<Arc<Recorder>>,
}

struct Recorder {
    rank: u32,
    recording: AtomicBool,
    tracks: Mutex<Vec<String>>,
    records: ArrayQueue<Record>,
    dropped: AtomicU64,
}

#[derive(Clone, Copy)]
enum Record {
    Span { track: Track, name: &'static str, index: u32, start_ns: u64, end_ns: u64, size_bytes: u64 },
    Counter { name: &'static str, of: Option<u32>, at_ns: u64, value: f64 },
}

/// The queue keeps a stamp of one word beside each record.
const _: () = assert!(size_of::<Record>() + size_of::<usize>() <= 64);

impl Timeline {
    /// A timeline that records nothing.
    pub const fn disabled() -> Timeline {
        Timeline { recorder: None }
    }

    /// A timeline of `rank` that keeps the first `capacity_records` spans and counters (64 bytes each, allocated now).
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if `capacity_records` is 0 or above 2^26 (4 GiB).
    pub fn new(rank: u32, capacity_records: usize) -> Result<Timeline> {
        if capacity_records == 0 || capacity_records > 1 << 26 {
            return Err(Error::InvalidArgument {
                argument: "capacity_records",
                value: capacity_records.to_string(),
                accepted: "a timeline holds 1 to 67108864 records; use Timeline::disabled() for none",
            });
        }
        Ok(Timeline {
            recorder: Some(Arc::new(Recorder {
                rank,
                recording: AtomicBool::new(true),
                tracks: Mutex::new(Vec::new()),
                records: ArrayQueue::new(capacity_records),
                dropped: AtomicU64::new(0),
            })),
        })
    }

    /// Whether records are kept. Callers may skip taking stamps when they are not.
    #[inline]
    pub fn is_enabled(&self) -> bool {
        self.recording().is_some()
    }

    /// Stops or goes on recording, on all clones: a long run shows a few of its steps. A disabled timeline stays disabled.
    pub fn set_recording(&self, recording: bool) {
        if let Some(recorder) = &self.recorder {
            // Relaxed, here and where it is read: it publishes nothing; a record around the change may fall on either side.
            recorder.recording.store(recording, Ordering::Relaxed);
        }
    }

    #[inline]
    fn recording(&self) -> Option<&Recorder> {
        self.recorder.as_deref().filter(|recorder| recorder.recording.load(Ordering::Relaxed))
    }

    /// [`now_ns`] when enabled, else 0: no clock is read for a timeline that is off.
    pub fn now_ns(&self) -> u64 {
        if self.is_enabled() { now_ns() } else { 0 }
    }

    /// The track called `name`, registered at first use; tracks are shown in the order of their registration. Allocates:
    /// call it once, before the steps.
    pub fn track(&self, name: &str) -> Track {
        let Some(recorder) = &self.recorder else { return Track(0) };
        let mut tracks = recorder.tracks.lock().unwrap_or_else(PoisonError::into_inner);
        let position = tracks.iter().position(|known| known == name).unwrap_or_else(|| {
            tracks.push(name.to_owned());
            tracks.len() - 1
        });
        Track(position as u32)
    }

    /// Records that `name` number `index` (a bucket, a layer, a step) ran on `track` from `start_ns` to `end_ns` (both
    /// [`now_ns`]) and worked on `size_bytes` bytes (0 if that means nothing).
    ///
    /// Spans of one track must nest or be disjoint, as the viewers demand. An `end_ns` before `start_ns` is taken as an
    /// empty span.
    #[inline]
    pub fn span(&self, track: Track, name: &'static str, index: u32, start_ns: u64, end_ns: u64, size_bytes: u64) {
        if let Some(recorder) = self.recording() {
            recorder.push(Record::Span { track, name, index, start_ns, end_ns: end_ns.max(start_ns), size_bytes });
        }
    }

    /// Opens a span of `name` number `index` that works on `size_bytes` bytes, on the calling thread: now here and in a
    /// profiler that listens ([`nvtx`]), off or paused timeline or not. It ends when what is returned is closed or dropped.
    /// Reads the clock twice.
    #[inline]
    pub fn open(&self, track: Track, name: &'static str, index: u32, size_bytes: u64) -> Open<'_> {
        let range = nvtx::range(name, index);
        Open { timeline: self, track, name, index, size_bytes, start_ns: now_ns(), end_ns: None, _range: range }
    }

    /// Records the value of a counter (loss, tokens per second) at `at_ns`. Values that are not finite are left out of
    /// the file: JSON has no word for them.
    #[inline]
    pub fn counter(&self, name: &'static str, at_ns: u64, value: f64) {
        if let Some(recorder) = self.recording() {
            recorder.push(Record::Counter { name, of: None, at_ns, value });
        }
    }

    /// As [`counter`](Timeline::counter), of one of several things, whose number `of` is put after the name.
    #[inline]
    pub fn counter_of(&self, name: &'static str, of: u32, at_ns: u64, value: f64) {
        if let Some(recorder) = self.recording() {
            recorder.push(Record::Counter { name, of: Some(of), at_ns, value });
        }
    }

    /// Records that found the buffer full and were not kept.
    pub fn dropped(&self) -> u64 {
        // Relaxed: a statistic; nothing is published through it.
        self.recorder.as_ref().map_or(0, |recorder| recorder.dropped.load(Ordering::Relaxed))
    }

    /// Writes what was recorded as one JSON document and empties the buffer. The number of dropped records stands in
    /// `otherData`. A disabled timeline writes an empty trace.
    ///
    /// # Errors
    /// Whatever `out` fails with.
    pub fn write_json(&self, out: &mut impl Write) -> io::Result<()> {
        let (rank, tracks, mut records) = match &self.recorder {
            None => (0, Vec::new(), Vec::new()),
            Some(recorder) => {
                let tracks = recorder.tracks.lock().unwrap_or_else(PoisonError::into_inner).clone();
                let mut records = Vec::with_capacity(recorder.records.len());
                records.extend(std::iter::from_fn(|| recorder.records.pop()));
                (recorder.rank, tracks, records)
            }
        };
        // A span that encloses another comes first when both start together: viewers nest in file order.
        records.sort_by_key(|record| match *record {
            Record::Span { start_ns, end_ns, .. } => (start_ns, u64::MAX - end_ns),
            Record::Counter { at_ns, .. } => (at_ns, 0),
        });

        write!(out, "{{\"displayTimeUnit\":\"ms\",\"otherData\":{{\"dropped\":{}}},\"traceEvents\":[", self.dropped())?;
        write!(
            out,
            "\n{{\"ph\":\"M\",\"name\":\"process_name\",\"pid\":{rank},\"tid\":0,\"args\":{{\"name\":\"rank {rank}\"}}}},\
             \n{{\"ph\":\"M\",\"name\":\"process_sort_index\",\"pid\":{rank},\"tid\":0,\"args\":{{\"sort_index\":{rank}}}}}"
        )?;
        for (position, name) in tracks.iter().enumerate() {
            let tid = position + 1;
            write!(
                out,
                ",\n{{\"ph\":\"M\",\"name\":\"thread_name\",\"pid\":{rank},\"tid\":{tid},\"args\":{{\"name\":{}}}}},\
                 \n{{\"ph\":\"M\",\"name\":\"thread_sort_index\",\"pid\":{rank},\"tid\":{tid},\"args\":{{\"sort_index\":{tid}}}}}",
                json_string(name)?
            )?;
        }
        for record in &records {
            match *record {
                Record::Span { track, name, index, start_ns, end_ns, size_bytes } => {
                    write!(
                        out,
                        ",\n{{\"ph\":\"X\",\"name\":{},\"pid\":{rank},\"tid\":{},\"ts\":{},\"dur\":{},\"args\":{{\"index\":{index}",
                        json_string(name)?,
                        u64::from(track.0) + 1,
                        Microseconds(start_ns),
                        Microseconds(end_ns - start_ns),
                    )?;
                    if size_bytes > 0 {
                        write!(out, ",\"bytes\":{size_bytes}")?;
                    }
                    out.write_all(b"}}")?;
                }
                Record::Counter { name, of, at_ns, value } if value.is_finite() => write!(
                    out,
                    ",\n{{\"ph\":\"C\",\"name\":{},\"pid\":{rank},\"tid\":0,\"ts\":{},\"args\":{{\"value\":{value}}}}}",
                    json_string(&of.map_or_else(|| name.to_owned(), |of| format!("{name} {of}")))?,
                    Microseconds(at_ns),
                )?,
                Record::Counter { .. } => {}
            }
        }
        out.write_all(b"\n]}\n")
    }

    /// [`write_json`](Timeline::write_json) into a file, which is replaced if it exists.
    ///
    /// # Errors
    /// [`Error::Io`] with the path.
    pub fn write_file(&self, path: &Path) -> Result<()> {
        let write = || {
            let mut out = BufWriter::new(File::create(path)?);
            self.write_json(&mut out)?;
            out.flush()
        };
        write().map_err(|source| Error::io(format!("writing the timeline {}", path.display()), source))
    }
}

/// A span that has begun: see [`Timeline::open`].
#[derive(Debug)]
#[must_use = "dropping it ends the span"]
pub struct Open<'a> {
    timeline: &'a Timeline,
    track: Track,
    name: &'static str,
    index: u32,
    size_bytes: u64,
    start_ns: u64,
    end_ns: Option<u64>,
    /// Closed after the drop below.
    _range: nvtx::Range,
}

impl Open<'_> {
    /// When it began, as [`now_ns`].
    pub fn start_ns(&self) -> u64 {
        self.start_ns
    }

    /// Ends the span; returns when.
    pub fn close(mut self) -> u64 {
        let end_ns = now_ns();
        self.end_ns = Some(end_ns);
        end_ns
    }
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        let end_ns = self.end_ns.unwrap_or_else(now_ns);
        self.timeline.span(self.track, self.name, self.index, self.start_ns, end_ns, self.size_bytes);
    }
}

impl std::fmt::Debug for Timeline {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.recorder {
            None => f.write_str("Timeline(disabled)"),
            Some(recorder) => f
                .debug_struct("Timeline")
                .field("rank", &recorder.rank)
                .field("records", &recorder.records.len())
                .field("dropped", &self.dropped())
                .finish(),
        }
    }
}

impl Recorder {
    fn push(&self, record: Record) {
        if self.records.push(record).is_err() {
            self.dropped.fetch_add(1, Ordering::Relaxed); // Relaxed: a statistic, read by dropped()
        }
    }
}

/// Nanoseconds written as decimal microseconds, the unit of the format, without going through a float: a machine that has
/// been up for months would lose the nanoseconds.
struct Microseconds(u64);

impl std::fmt::Display for Microseconds {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{:03}", self.0 / 1000, self.0 % 1000)
    }
}

fn json_string(text: &str) -> io::Result<String> {
    serde_json::to_string(text).map_err(io::Error::from)
}

/// What [`merge`] needs of a trace file; events stay as text.
#[derive(Deserialize)]
struct TraceFile<'a> {
    #[serde(borrow, rename = "traceEvents")]
    events: Vec<&'a serde_json::value::RawValue>,
    #[serde(default, rename = "otherData")]
    other: OtherData,
}

#[derive(Deserialize, Default)]
struct OtherData {
    #[serde(default)]
    dropped: u64,
}

/// Puts the trace files of several ranks of one machine into one; returns the number of records they had dropped.
///
/// # Errors
/// [`Error::Io`] naming the file that cannot be read or written, is larger than 1 GiB or is no trace. Nothing is written
/// then, except when writing itself fails.
pub fn merge<P: AsRef<Path>>(inputs: &[P], output: &Path) -> Result<u64> {
    let mut texts = Vec::with_capacity(inputs.len());
    for input in inputs {
        let path = input.as_ref();
        let read = || {
            let size_bytes = std::fs::metadata(path)?.len();
            if size_bytes > MAX_TRACE_FILE_BYTES {
                return Err(io::Error::new(
                    io::ErrorKind::FileTooLarge,
                    format!("{size_bytes} bytes, at most {MAX_TRACE_FILE_BYTES} are read"),
                ));
            }
            std::fs::read_to_string(path)
        };
        texts.push(read().map_err(|source| Error::io(format!("reading the timeline {}", path.display()), source))?);
    }
    let mut events = Vec::new();
    let mut dropped = 0_u64;
    for (input, text) in inputs.iter().zip(&texts) {
        let file: TraceFile<'_> = serde_json::from_str(text).map_err(|source| {
            Error::io(format!("reading the timeline {}", input.as_ref().display()), io::Error::from(source))
        })?;
        dropped = dropped.saturating_add(file.other.dropped);
        events.extend(file.events);
    }
    let write = || {
        let mut out = BufWriter::new(File::create(output)?);
        write!(out, "{{\"displayTimeUnit\":\"ms\",\"otherData\":{{\"dropped\":{dropped}}},\"traceEvents\":[")?;
        for (position, event) in events.iter().enumerate() {
            write!(out, "{}\n{}", if position == 0 { "" } else { "," }, event.get())?;
        }
        out.write_all(b"\n]}\n")?;
        out.flush()
    };
    write().map_err(|source| Error::io(format!("writing the timeline {}", output.display()), source))?;
    Ok(dropped)
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    fn parse(timeline: &Timeline) -> Value {
        let mut out = Vec::new();
        timeline.write_json(&mut out).unwrap();
        serde_json::from_slice(&out).unwrap()
    }

    fn spans(trace: &Value) -> Vec<&Value> {
        trace["traceEvents"].as_array().unwrap().iter().filter(|event| event["ph"] == "X").collect()
    }

    #[test]
    fn disabled_timeline_records_nothing_and_reads_no_clock() {
        let timeline = Timeline::default();
        let track = timeline.track("backward");
        timeline.span(track, "layer", 0, 1, 2, 3);
        timeline.counter("loss", 1, 2.0);
        assert!(!timeline.is_enabled());
        assert_eq!(timeline.now_ns(), 0);
        assert_eq!(timeline.dropped(), 0);
        assert!(spans(&parse(&timeline)).is_empty());
    }

    #[test]
    fn spans_carry_rank_track_time_and_arguments() {
        let timeline = Timeline::new(3, 16).unwrap();
        let backward = timeline.track("backward");
        let communication = timeline.track("communi\"cation");
        assert_eq!(timeline.track("backward"), backward);
        // An uptime of 200 days: nanoseconds must survive.
        let start_ns = 17_280_000_123_456_789;
        timeline.span(communication, "bucket", 7, start_ns, start_ns + 1_001, 4096);
        timeline.counter("loss", start_ns, 1.5);
        timeline.counter("loss", start_ns + 1, f64::NAN);
        timeline.counter_of("power (W), GPU", 5, start_ns + 2, 250.5);

        let mut out = Vec::new();
        timeline.write_json(&mut out).unwrap();
        let text = String::from_utf8(out).unwrap();
        assert!(text.contains("\"ts\":17280000123456.789,\"dur\":1.001,"), "{text}");
        let trace: Value = serde_json::from_str(&text).unwrap();
        let found = spans(&trace);
        assert_eq!(found.len(), 1);
        assert_eq!(found[0]["name"], "bucket");
        assert_eq!(found[0]["pid"], 3);
        assert_eq!(found[0]["tid"], 2);
        assert_eq!(found[0]["args"]["index"], 7);
        assert_eq!(found[0]["args"]["bytes"], 4096);

        let events = trace["traceEvents"].as_array().unwrap();
        let named = |kind: &str, tid: u64| {
            events.iter().find(|event| event["name"] == kind && event["tid"] == tid).unwrap()["args"]["name"].clone()
        };
        assert_eq!(named("process_name", 0), "rank 3");
        assert_eq!(named("thread_name", 1), "backward");
        assert_eq!(named("thread_name", 2), "communi\"cation");
        let counters: Vec<_> = events.iter().filter(|event| event["ph"] == "C").collect();
        assert_eq!(counters.len(), 2, "the NaN is left out");
        assert_eq!(counters[0]["args"]["value"], 1.5);
        assert_eq!((&counters[1]["name"], &counters[1]["args"]["value"]), (&"power (W), GPU 5".into(), &250.5.into()));
    }

    #[test]
    fn enclosing_span_comes_before_the_enclosed() {
        let timeline = Timeline::new(0, 16).unwrap();
        let track = timeline.track("compute");
        // Inner spans end, and are recorded, first.
        timeline.span(track, "inner", 0, 100, 200, 0);
        timeline.span(track, "inner", 1, 200, 300, 0);
        timeline.span(track, "outer", 0, 100, 300, 0);
        timeline.span(track, "backwards", 0, 400, 350, 0);
        let trace = parse(&timeline);
        let found = spans(&trace);
        let names: Vec<_> = found.iter().map(|event| event["name"].as_str().unwrap()).collect();
        assert_eq!(names, ["outer", "inner", "inner", "backwards"]);
        // Every span lies inside every earlier one that has not ended: the viewers' rule.
        let bounds = |event: &Value| {
            let start = event["ts"].as_f64().unwrap();
            (start, start + event["dur"].as_f64().unwrap())
        };
        for (position, later) in found.iter().enumerate() {
            for earlier in &found[..position] {
                let ((start, end), (next_start, next_end)) = (bounds(earlier), bounds(later));
                assert!(next_start >= end - 1e-9 || (next_start >= start && next_end <= end + 1e-9));
            }
        }
        assert_eq!(found[3]["dur"], 0.0);
        assert!(spans(&parse(&timeline)).is_empty(), "writing empties the buffer");
    }

    #[test]
    fn open_spans_end_when_closed_or_dropped() {
        let timeline = Timeline::new(0, 16).unwrap();
        let track = timeline.track("compute");
        let outer = timeline.open(track, "step", 7, 0);
        drop(timeline.open(track, "norm", 8, 64));
        let start_ns = outer.start_ns();
        let lasted_ns = outer.close() - start_ns;
        let trace = parse(&timeline);
        let found = spans(&trace);
        assert_eq!((&found[0]["name"], &found[1]["name"]), (&"step".into(), &"norm".into()));
        assert_eq!((&found[0]["args"]["index"], &found[1]["args"]["bytes"]), (&7.into(), &64.into()));
        assert_eq!((found[0]["dur"].as_f64().unwrap() * 1e3).round() as u64, lasted_ns);
        assert!(lasted_ns > 0 && found[1]["ts"].as_f64() >= found[0]["ts"].as_f64());
        assert!(Timeline::disabled().open(track, "step", 7, 0).close() > start_ns, "the clock is read all the same");
    }

    #[test]
    fn overflow_is_counted_and_keeps_the_first_records() {
        let timeline = Timeline::new(0, 4).unwrap();
        let track = timeline.track("compute");
        std::thread::scope(|scope| {
            for _ in 0..4 {
                let timeline = timeline.clone();
                scope.spawn(move || (0..25).for_each(|index| timeline.span(track, "step", index, 1, 2, 0)));
            }
        });
        assert_eq!(timeline.dropped(), 96);
        let trace = parse(&timeline);
        assert_eq!(spans(&trace).len(), 4);
        assert_eq!(trace["otherData"]["dropped"], 96);
    }

    #[test]
    fn recording_can_pause() {
        let timeline = Timeline::new(0, 16).unwrap();
        let (clone, track) = (timeline.clone(), timeline.track("compute"));
        for (index, recording) in [true, false, true].into_iter().enumerate() {
            timeline.set_recording(recording);
            assert_eq!(clone.is_enabled(), recording);
            assert_eq!(clone.now_ns() != 0, recording);
            clone.span(track, "step", index as u32, 1, 2, 0);
            clone.counter("loss", 1, 0.5);
        }
        let trace = parse(&timeline);
        let indices: Vec<_> = spans(&trace).iter().map(|event| event["args"]["index"].as_u64().unwrap()).collect();
        assert_eq!(indices, [0, 2]);
        assert_eq!(timeline.dropped(), 0);
        let disabled = Timeline::disabled();
        disabled.set_recording(true);
        assert!(!disabled.is_enabled());
    }

    #[test]
    fn capacity_outside_the_limits_is_refused() {
        for capacity in [0, (1 << 26) + 1, usize::MAX] {
            let error = Timeline::new(0, capacity).unwrap_err().to_string();
            assert!(error.contains(&capacity.to_string()), "{error}");
        }
    }

    #[test]
    fn merged_ranks_share_one_clock() {
        let folder = tempfile::tempdir().unwrap();
        let before = now_ns();
        let paths: Vec<_> = (0..3).map(|rank| folder.path().join(format!("rank{rank}.json"))).collect();
        for (rank, path) in paths.iter().enumerate() {
            let timeline = Timeline::new(rank as u32, 1).unwrap();
            let track = timeline.track("communication");
            let start_ns = timeline.now_ns();
            timeline.span(track, "bucket", 0, start_ns, timeline.now_ns(), 8);
            timeline.span(track, "bucket", 1, start_ns, start_ns, 8);
            timeline.write_file(path).unwrap();
        }
        let after = now_ns();
        let merged = folder.path().join("timeline.json");
        assert_eq!(merge(&paths, &merged).unwrap(), 3);
        let trace: Value = serde_json::from_slice(&std::fs::read(&merged).unwrap()).unwrap();
        assert_eq!(trace["otherData"]["dropped"], 3);
        let found = spans(&trace);
        assert_eq!(found.iter().map(|event| event["pid"].as_u64().unwrap()).collect::<Vec<_>>(), [0, 1, 2]);
        let starts: Vec<_> = found.iter().map(|event| event["ts"].as_f64().unwrap() * 1e3).collect();
        assert!(starts.is_sorted(), "{starts:?}");
        assert!(starts[0] >= before as f64 - 1e3 && starts[2] <= after as f64 + 1e3);
    }

    #[test]
    fn merge_names_the_file_that_is_no_trace() {
        let folder = tempfile::tempdir().unwrap();
        let good = folder.path().join("good.json");
        Timeline::disabled().write_file(&good).unwrap();
        let output = folder.path().join("out.json");
        for (name, content) in
            [("torn.json", "{\"traceEvents\":[{\"ph\""), ("other.json", "{\"a\":1}"), ("empty.json", "")]
        {
            let bad = folder.path().join(name);
            std::fs::write(&bad, content).unwrap();
            let error = merge(&[&good, &bad], &output).unwrap_err().to_string();
            assert!(error.contains(name), "{error}");
            assert!(!output.exists());
        }
        let error = merge(&[folder.path().join("absent.json")], &output).unwrap_err().to_string();
        assert!(error.contains("absent.json"), "{error}");
    }
}
