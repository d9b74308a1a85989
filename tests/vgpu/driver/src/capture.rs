//! Stream capture (DAPI 6.18): streams whose work goes into a graph instead of to the device.
//!
//! Rules are those of the CUDA Programming Guide, 4.2.2.1.2 ("Creating a Graph Using Stream Capture"; "Guide" below), codes
//! those that DAPI 6.1, `CUresult`, describes for them; CuPy's `test_graph.py`, which runs on GPUs, shows which code comes
//! from which call. "When an invalid operation is attempted during stream capture, any associated capture graphs are
//! invalidated" (Guide, "Invalidation"): so does every refusal here that does not say otherwise.
//!
//! What no document says was asked of driver 580.159.04, CUDA 13.0, on an H100: "seen" below, and in the rest of this driver.

use std::cell::Cell;
use std::collections::{BTreeMap, HashMap};
use std::sync::{Mutex, PoisonError};
use std::thread::ThreadId;

use crate::event::{Captured, Event};
use crate::graph::{Graph, Node};
use crate::status::{Result, Status, refuse};
use crate::stream::{NON_BLOCKING, Stream, Work};

/// DAPI 6.1, `CUstreamCaptureMode`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    Global = 0,
    ThreadLocal = 1,
    Relaxed = 2,
}

impl Mode {
    pub fn of(code: u32) -> Result<Mode> {
        match code {
            0 => Ok(Mode::Global),
            1 => Ok(Mode::ThreadLocal),
            2 => Ok(Mode::Relaxed),
            // DAPI 6.18: among the codes of `cuStreamBeginCapture` and `cuThreadExchangeStreamCaptureMode`; the second was seen
            // to take 7, and is stricter here.
            _ => refuse(Status::INVALID_VALUE, "a capture mode that is none"),
        }
    }
}

/// A sequence between `cuStreamBeginCapture` and `cuStreamEndCapture`.
struct Capture {
    /// Handle of the stream where it began.
    origin: u64,
    mode: Mode,
    /// Where it began.
    thread: ThreadId,
    graph: Graph,
    /// The streams that capture into the graph, by handle.
    members: HashMap<u64, Member>,
    is_valid: bool,
}

struct Member {
    device: usize,
    flags: u32,
    /// What the next operation of the stream comes after.
    after: Vec<usize>,
}

impl Member {
    fn new(stream: &Stream, after: Vec<usize>) -> Member {
        Member { device: stream.device, flags: stream.flags, after }
    }
}

impl Capture {
    /// Invalidates it, and refuses. What comes after is CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, "due to a previous error"
    /// (DAPI 6.1).
    fn fail<T>(&mut self, status: Status, why: &str) -> Result<T> {
        if !self.is_valid {
            return refuse(Status::STREAM_CAPTURE_INVALIDATED, why);
        }
        self.is_valid = false;
        refuse(status, why)
    }

    /// The part of `stream`, for more work; refused as by [`fail`](Capture::fail).
    fn member(&mut self, stream: &Stream) -> Result<&mut Member> {
        if !self.is_valid {
            return refuse(Status::STREAM_CAPTURE_INVALIDATED, "a stream whose capture is invalid is used");
        }
        // DAPI 6.1: "an unknown internal error"; whoever comes here has found the stream among the members.
        self.members.get_mut(&stream.handle).ok_or(Status::UNKNOWN)
    }
}

type Captures = BTreeMap<u64, Capture>;

/// Captures in progress by number, and the next number.
static CAPTURES: Mutex<(Captures, u64)> = Mutex::new((BTreeMap::new(), 1));

thread_local! {
    /// The thread's own mode (`cuThreadExchangeStreamCaptureMode`).
    static MODE: Cell<Mode> = const { Cell::new(Mode::Global) };
}

fn with<T>(work: impl FnOnce(&mut Captures) -> T) -> T {
    work(&mut CAPTURES.lock().unwrap_or_else(PoisonError::into_inner).0)
}

fn of<'c>(captures: &'c mut Captures, stream: &Stream) -> Option<(u64, &'c mut Capture)> {
    let mut all = captures.iter_mut();
    all.find(|(_, capture)| capture.members.contains_key(&stream.handle)).map(|(number, capture)| (*number, capture))
}

// ---- begin and end -----------------------------------------------------------------------------------------------------

/// `cuStreamBeginCapture`: "Capture may not be initiated if stream is CU_STREAM_LEGACY", and "only be initiated if the stream
/// is not already in capture mode" (DAPI 6.18). The second is CUDA_ERROR_ILLEGAL_STATE, "not in a valid state to perform the
/// requested operation" (DAPI 6.1). Seen: the capture goes on.
pub(crate) fn begin(stream: &Stream, mode: Mode) -> Result<()> {
    if stream.is_default() {
        return refuse(Status::STREAM_CAPTURE_UNSUPPORTED, "cuStreamBeginCapture of the legacy default stream");
    }
    let (captures, next) = &mut *CAPTURES.lock().unwrap_or_else(PoisonError::into_inner);
    if of(captures, stream).is_some() {
        return refuse(Status::ILLEGAL_STATE, "cuStreamBeginCapture of a stream that captures");
    }
    let members = HashMap::from([(stream.handle, Member::new(stream, Vec::new()))]);
    let thread = std::thread::current().id();
    let (origin, graph) = (stream.handle, Graph::default());
    captures.insert(*next, Capture { origin, mode, thread, graph, members, is_valid: true });
    *next += 1;
    Ok(())
}

/// `cuStreamEndCapture`. Unless it is refused for the stream it is called on, all streams of the capture leave it, also when
/// there is no graph. DAPI 6.18: "Capture must have been initiated on hStream"; DAPI 6.1: if not, it is
/// CUDA_ERROR_STREAM_CAPTURE_UNMATCHED, "not initiated in this stream". In another thread, the capture not being relaxed, it
/// is CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD. Seen: it is over then, too.
pub(crate) fn end(stream: &Stream) -> Result<Graph> {
    with(|captures| {
        let Some((number, capture)) = of(captures, stream) else {
            return refuse(Status::ILLEGAL_STATE, "cuStreamEndCapture of a stream that does not capture");
        };
        if capture.origin != stream.handle {
            return capture.fail(Status::STREAM_CAPTURE_UNMATCHED, "cuStreamEndCapture of a stream that only joined");
        }
        let Some(capture) = captures.remove(&number) else { return Err(Status::UNKNOWN) };
        if capture.mode != Mode::Relaxed && capture.thread != std::thread::current().id() {
            return refuse(Status::STREAM_CAPTURE_WRONG_THREAD, "cuStreamEndCapture in another thread");
        }
        if !capture.is_valid {
            // DAPI 6.18: "If capture was invalidated .. then a NULL graph will be returned."
            return refuse(Status::STREAM_CAPTURE_INVALIDATED, "cuStreamEndCapture of an invalid capture: no graph");
        }
        // Guide, "Cross-stream Dependencies and Events": other streams "must also be joined back to the origin stream".
        let joined = capture.members.get(&stream.handle).map(|origin| capture.graph.behind(&origin.after));
        let joined = joined.unwrap_or_default();
        if capture.members.values().any(|member| member.after.iter().any(|node| !joined[*node])) {
            return refuse(Status::STREAM_CAPTURE_UNJOINED, "cuStreamEndCapture before all streams have joined");
        }
        Ok(capture.graph)
    })
}

/// A stream that is destroyed: its capture is over if it began there, and seen to go on if the stream only joined. What the
/// stream did in it must be joined as before.
pub(crate) fn leave(stream: &Stream) {
    with(|captures| captures.retain(|_, capture| capture.origin != stream.handle));
}

/// `CUstreamCaptureStatus`
pub(crate) fn status(stream: &Stream) -> u32 {
    with(|captures| match of(captures, stream) {
        None => 0,
        Some((_, capture)) if capture.is_valid => 1,
        Some(_) => 2,
    })
}

pub(crate) fn is_capturing(stream: &Stream) -> bool {
    status(stream) != 0
}

// ---- work --------------------------------------------------------------------------------------------------------------

/// Takes `work` into the graph that `stream` captures into; false if it captures into none.
pub(crate) fn add(stream: &Stream, work: &Work) -> Result<bool> {
    with(|captures| {
        let Some((_, capture)) = of(captures, stream) else { return Ok(false) };
        let node = capture.graph.nodes.len();
        let after = std::mem::replace(&mut capture.member(stream)?.after, vec![node]);
        capture.graph.nodes.push(Node { work: Work::clone(work), device: stream.device, after });
        Ok(true)
    })
}

/// `cuEventRecord` in a capturing stream: the event stands for what the stream would do next after; false if it captures not.
pub(crate) fn record(stream: &Stream, event: &Event) -> Result<bool> {
    with(|captures| {
        let Some((number, capture)) = of(captures, stream) else { return Ok(false) };
        let after = capture.member(stream)?.after.clone();
        event.capture(Captured { capture: number, after });
        Ok(true)
    })
}

/// `cuStreamWaitEvent` where the stream captures or the event was last recorded in a capture; false for neither. Refused as
/// DAPI 6.1 has it: ISOLATION for a dependency "which crosses the capture sequence boundary", MERGE "of two independent
/// capture sequences", IMPLICIT for a "dependency on a current capture sequence from cudaStreamLegacy". Seen: INVALID_VALUE if
/// the event's capture is over or invalid; and there is nothing to wait for in an event that was never recorded.
pub(crate) fn wait(stream: &Stream, event: &Event) -> Result<bool> {
    let captured = event.captured();
    with(|captures| match (of(captures, stream).map(|(number, _)| number), captured) {
        (None, None) => Ok(false),
        (Some(_), None) if event.recording().is_none() => Ok(true),
        (Some(own), None) => {
            let why = "a capturing stream waits for an event that was not recorded in the capture";
            captures.get_mut(&own).map_or(Ok(true), |own| own.fail(Status::STREAM_CAPTURE_ISOLATION, why))
        }
        (own, Some(event)) if !captures.get(&event.capture).is_some_and(|capture| capture.is_valid) => {
            let (status, why) = (Status::INVALID_VALUE, "a stream waits for an event of a capture that is over");
            let own = own.and_then(|own| captures.get_mut(&own));
            own.map_or_else(|| refuse(status, why), |own| own.fail(status, why))
        }
        (Some(own), Some(event)) if own != event.capture => {
            let why = "a capturing stream waits for an event of another capture";
            if let Some(other) = captures.get_mut(&event.capture) {
                other.is_valid = false;
            }
            captures.get_mut(&own).map_or(Ok(true), |own| own.fail(Status::STREAM_CAPTURE_MERGE, why))
        }
        (own, Some(event)) => {
            let Some(capture) = captures.get_mut(&event.capture) else { return Err(Status::UNKNOWN) };
            if stream.is_default() {
                let why = "the legacy default stream waits for an event of a capture";
                return capture.fail(Status::STREAM_CAPTURE_IMPLICIT, why);
            }
            if own.is_none() {
                capture.members.insert(stream.handle, Member::new(stream, Vec::new()));
            }
            let member = capture.member(stream)?;
            member.after.extend(event.after);
            member.after.sort_unstable();
            member.after.dedup();
            Ok(true)
        }
    })
}

// ---- what is refused ---------------------------------------------------------------------------------------------------

/// Guide, "Prohibited and Unhandled Operations": "It is invalid to synchronize or query the execution status of a stream
/// which is being captured". Seen: the code is the same when the capture is invalid already; and so is that of
/// `cuStreamGetFlags`, `cuGraphUpload` and `cuGraphLaunch`.
pub(crate) fn check_not_captured(stream: &Stream, call: &str) -> Result<()> {
    with(|captures| match of(captures, stream) {
        Some((_, capture)) => {
            capture.is_valid = false;
            refuse(Status::STREAM_CAPTURE_UNSUPPORTED, &format!("{call} of a capturing stream"))
        }
        None => Ok(()),
    })
}

/// A launch that is refused for what it is: seen to invalidate the capture of its stream.
pub(crate) fn invalidate(stream: &Stream) {
    with(|captures| {
        if let Some((_, capture)) = of(captures, stream) {
            capture.is_valid = false;
        }
    });
}

/// As above, of "a broader handle which encompasses an active stream capture, such as a device or context handle".
pub(crate) fn check_context_question(device: usize) -> Result<()> {
    let why = "a context with a capturing stream is synchronized";
    fail_where(Status::STREAM_CAPTURE_UNSUPPORTED, why, |capture| {
        capture.members.values().any(|member| member.device == device)
    })
}

/// As above, of "a captured event": DAPI 6.1, CUDA_ERROR_CAPTURED_EVENT. Seen: CUDA_ERROR_INVALID_VALUE if its capture is over
/// or invalid; and that the capture goes on (`harms` not) if the time between events is asked for.
pub(crate) fn check_event(event: &Event, harms: bool) -> Result<()> {
    let Some(Captured { capture, .. }) = event.captured() else { return Ok(()) };
    with(|captures| match captures.get_mut(&capture).filter(|capture| capture.is_valid) {
        Some(capture) => {
            capture.is_valid = !harms;
            refuse(Status::CAPTURED_EVENT, "an event last recorded in a capture is synchronized or queried")
        }
        None => refuse(Status::INVALID_VALUE, "an event last recorded in a capture that is over is asked for"),
    })
}

/// As above: "When any stream in the same context is being captured, and it was not created with cudaStreamNonBlocking, any
/// attempted use of the legacy stream is invalid."
pub(crate) fn check_legacy(device: usize) -> Result<()> {
    let why = "the legacy default stream is used while a blocking stream captures";
    fail_where(Status::STREAM_CAPTURE_IMPLICIT, why, |capture| makes_legacy_wait(capture, device))
}

/// `cuStreamIsCapturing` of the legacy stream: as above, but "the blocking stream capture is not invalidated".
pub(crate) fn is_legacy_blocked(device: usize) -> bool {
    with(|captures| captures.values().any(|capture| makes_legacy_wait(capture, device)))
}

fn makes_legacy_wait(capture: &Capture, device: usize) -> bool {
    capture.members.values().any(|member| member.device == device && member.flags & NON_BLOCKING == 0)
}

/// DAPI 6.18, `cuThreadExchangeStreamCaptureMode`: which captures prohibit the thread from "potentially unsafe API calls". Of
/// these the reference names `cudaMalloc`, for being "not enqueued asynchronously to a stream, and not observed by stream
/// capture". Seen to be of that kind: allocations and their ends, of pools too; registration; the end of a module; questions to
/// streams and events, and waits for them; the beginning and the end of an executable graph. Seen not to be: loading a module;
/// copies and fills that wait; virtual memory; streams and events and their ends. IPC handles count here: of those of others
/// nothing was seen.
pub(crate) fn check_unsafe(call: &str) -> Result<()> {
    let (mode, thread) = (MODE.get(), std::thread::current().id());
    let why = format!("{call}, which a capture prohibits as potentially unsafe");
    fail_where(Status::STREAM_CAPTURE_UNSUPPORTED, &why, |capture| {
        let prohibits = if capture.thread == thread {
            capture.mode != Mode::Relaxed
        } else {
            capture.mode == Mode::Global && mode == Mode::Global
        };
        prohibits && mode != Mode::Relaxed
    })
}

/// Refuses with `status`, and invalidates, if there is a capture of which `is_hurt` holds.
fn fail_where(status: Status, why: &str, is_hurt: impl Fn(&Capture) -> bool) -> Result<()> {
    with(|captures| {
        let mut hurt = captures.values_mut().filter(|capture| is_hurt(capture)).peekable();
        if hurt.peek().is_none() {
            return Ok(());
        }
        hurt.for_each(|capture| capture.is_valid = false);
        refuse(status, why)
    })
}

/// Sets the thread's mode and returns the one before.
pub(crate) fn exchange_mode(mode: Mode) -> Mode {
    MODE.replace(mode)
}
