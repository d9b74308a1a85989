//! Every way annulus can fail: one variant each, its numbers as fields.
//!
//! Errors are cheap to clone because a poisoned communicator answers every later call with the error that poisoned it.
//! Messages are sentences with numbers; they name the rank, the operation and the place.

#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::sync::Arc;

use crate::dtype::DType;

/// What every fallible function of this crate returns.
pub type Result<T> = std::result::Result<T, Error>;

/// One variant per way to fail.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    // ---- arguments -------------------------------------------------------------------------------------------------
    /// An argument is outside what the function accepts.
    #[error("{argument} is {value}: {accepted}")]
    InvalidArgument {
        /// Name of the argument.
        argument: &'static str,
        /// The value that was passed.
        value: String,
        /// What would have been accepted, as a clause.
        accepted: &'static str,
    },
    /// Two lengths that must agree do not.
    #[error("{what}: expected {expected_elems} elements, got {actual_elems}")]
    LengthMismatch {
        /// Which lengths.
        what: String,
        /// The length that is right.
        expected_elems: usize,
        /// The length that was passed.
        actual_elems: usize,
    },
    /// A buffer holds another element type than the call needs.
    #[error("{what}: expected dtype {expected}, got {actual}")]
    DTypeMismatch {
        /// Which buffer or tensor.
        what: String,
        /// The dtype that is right.
        expected: DType,
        /// The dtype that was passed.
        actual: DType,
    },
    /// Two shapes that must agree do not.
    #[error("{what}: expected shape {expected:?}, got {actual:?}")]
    ShapeMismatch {
        /// Which tensor.
        what: String,
        /// The shape that is right.
        expected: Vec<usize>,
        /// The shape that was passed.
        actual: Vec<usize>,
    },
    /// The operation is not defined for the element type.
    #[error("{op} is not defined for {dtype}")]
    Unsupported {
        /// The operation, with its reduction.
        op: String,
        /// The element type.
        dtype: DType,
    },
    /// A size computation would wrap around.
    #[error("{what} overflows the address space: {detail}")]
    SizeOverflow {
        /// Which size.
        what: &'static str,
        /// The factors.
        detail: String,
    },

    // ---- environment and rendezvous --------------------------------------------------------------------------------
    /// An environment variable is malformed.
    #[error("environment variable {variable}={value}: {accepted}")]
    Environment {
        /// Name of the variable.
        variable: String,
        /// Its value (lossy when it was not UTF-8).
        value: String,
        /// The accepted form.
        accepted: String,
    },
    /// Two environment variables contradict each other.
    #[error("environment variables disagree about {about}: {first}={first_value} but {second}={second_value}")]
    EnvironmentConflict {
        /// The quantity they disagree about.
        about: &'static str,
        /// One variable.
        first: String,
        /// Its value.
        first_value: String,
        /// The other variable.
        second: String,
        /// Its value.
        second_value: String,
    },
    /// Not every rank arrived before the deadline of the rendezvous.
    #[error("rank {rank} waited {waited_ms} ms at {place} for rank(s) {missing:?} of {world_size} to join")]
    RanksMissing {
        /// The rank that reports.
        rank: u32,
        /// Ranks that never came.
        missing: Vec<u32>,
        /// How many were expected.
        world_size: u32,
        /// Time waited.
        waited_ms: u64,
        /// The socket or launcher where they were to meet.
        place: String,
    },
    /// A peer of the rendezvous was refused, or refused us.
    #[error("rendezvous at {place}: {reason}")]
    RendezvousRefused {
        /// The socket.
        place: String,
        /// Why, with both sides' values.
        reason: String,
    },

    // ---- the world: peers that leave or never come -----------------------------------------------------------------
    /// A peer's process has ended.
    #[error("rank {rank} (pid {pid}) was lost during {operation}")]
    PeerLost {
        /// The rank that is gone.
        rank: u32,
        /// Its process.
        pid: u32,
        /// What the reporting rank was doing.
        operation: String,
    },
    /// A peer's process is alive but its heartbeat has stopped (SIGSTOP, a debugger, swap).
    #[error(
        "rank {rank} (pid {pid}) has given no sign of life for {silent_ms} ms (limit {limit_ms} ms) during {operation}"
    )]
    PeerStopped {
        /// The silent rank.
        rank: u32,
        /// Its process.
        pid: u32,
        /// Time since its last beat.
        silent_ms: u64,
        /// The heartbeat limit.
        limit_ms: u64,
        /// What the reporting rank was doing.
        operation: String,
    },
    /// A peer is alive but did not come to the operation before the deadline.
    #[error(
        "rank {rank} did not come to {operation} (sequence {sequence}, {place}) within {waited_ms} ms: generation {expected} expected, {seen} seen"
    )]
    PeerStalled {
        /// The rank that did not come.
        rank: u32,
        /// The operation waited in.
        operation: String,
        /// Its sequence number in the communicator.
        sequence: u64,
        /// Phase and step.
        place: String,
        /// Time waited.
        waited_ms: u64,
        /// Generation waited for.
        expected: u32,
        /// Generation last seen.
        seen: u32,
    },
    /// A barrier's deadline passed.
    #[error("barrier {name:?}: rank(s) {absent:?} did not come within {waited_ms} ms")]
    BarrierTimeout {
        /// The name given to the barrier.
        name: String,
        /// Who is missing.
        absent: Vec<u32>,
        /// Time waited.
        waited_ms: u64,
    },
    /// A rank met an error that stops the whole job; every rank tells it in that rank's words.
    #[error("rank {rank} failed: {reason}")]
    RankFailed {
        /// The rank that failed.
        rank: u32,
        /// Its error.
        reason: String,
    },
    /// Ranks issued different operations at the same place in the communicator's order. No payload was moved.
    #[error("operation mismatch at sequence {sequence}: rank {rank} issued {mine}; rank {peer} issued {theirs}")]
    Mismatch {
        /// Position in the communicator's order.
        sequence: u64,
        /// The reporting rank.
        rank: u32,
        /// What it issued.
        mine: String,
        /// A rank that issued something else.
        peer: u32,
        /// What that rank issued.
        theirs: String,
    },
    /// An earlier error made the communicator unusable.
    #[error("the communicator is poisoned by an earlier error: {cause}")]
    Poisoned {
        /// The first error.
        cause: Box<Error>,
    },

    // ---- memory, streams, I/O --------------------------------------------------------------------------------------
    /// Memory could not be obtained.
    #[error("no space for {what}: need {need_bytes} bytes, have {have_bytes}")]
    NoSpace {
        /// What the memory was for.
        what: &'static str,
        /// Bytes asked for.
        need_bytes: u64,
        /// Bytes available.
        have_bytes: u64,
    },
    /// What was waited for did not end before the deadline. It may still: nothing is lost yet.
    #[error("{what} did not end within {waited_ms} ms")]
    TimedOut {
        /// The stream, the event or the number.
        what: String,
        /// The deadline.
        waited_ms: u64,
    },
    /// A stream can run nothing more.
    #[error("stream {stream}: {reason}")]
    Stream {
        /// Name of the stream.
        stream: String,
        /// What happened.
        reason: String,
    },
    /// A system call failed.
    #[error("{what}: {source}")]
    Io {
        /// The call and its object (a path, a descriptor).
        what: String,
        /// The operating system's error.
        source: Arc<std::io::Error>,
    },

    // ---- CUDA ------------------------------------------------------------------------------------------------------
    /// There is no NVIDIA driver on this machine, or this process does not find it.
    #[error("no NVIDIA driver: libcuda.so cannot be opened (it comes with the driver, not with the CUDA toolkit)")]
    DriverAbsent,
    /// The driver does not know the functions or the PTX that are used here.
    #[error(
        "the NVIDIA driver is of CUDA {}.{}; {}.{} or later is needed",
        found / 1000, found % 1000 / 10, oldest / 1000, oldest % 1000 / 10
    )]
    DriverTooOld {
        /// The driver's version, as `cuDriverGetVersion` writes it: 1000 * major + 10 * minor.
        found: u32,
        /// The oldest version that will do, written in the same way.
        oldest: u32,
    },
    /// There is a driver and no device for this process (`CUDA_VISIBLE_DEVICES` may hide them).
    #[error("the NVIDIA driver shows no device to this process")]
    NoDevice,
    /// A device does not answer any more. Nothing on it can be saved; the process must be started anew.
    #[error("device {device} was lost in {operation}: {reason}")]
    DeviceLost {
        /// Its number in this process.
        device: u32,
        /// The call that found out.
        operation: &'static str,
        /// The driver's words.
        reason: String,
    },
    /// A kernel did what it must not, and the device's context is unusable for the rest of the process.
    #[error("a kernel failed on device {device}, as {operation} found: {reason}")]
    KernelFault {
        /// The device's number in this process.
        device: u32,
        /// The call that found out; the kernel may have run long before.
        operation: &'static str,
        /// The driver's words.
        reason: String,
    },
    /// A call that the capture of a graph does not allow.
    #[error("{operation} on device {device} is not possible in the capture of a graph: {reason}")]
    Capture {
        /// The device's number in this process.
        device: u32,
        /// The call.
        operation: &'static str,
        /// The driver's words, or what is wrong.
        reason: String,
    },
    /// The driver refused a call.
    #[error("{operation} on device {device} failed with code {code}: {reason}")]
    Cuda {
        /// The device's number in this process.
        device: u32,
        /// The call.
        operation: &'static str,
        /// `CUresult`
        code: u32,
        /// The driver's words.
        reason: String,
    },

    /// The NVIDIA management library is missing or refused a call. It only shows: nothing but telemetry and the order of
    /// ranks depends on it.
    #[error("the NVIDIA management library (libnvidia-ml.so.1, a part of the driver): {operation}: {reason}")]
    Management {
        /// What was tried.
        operation: &'static str,
        /// The library's words, or the loader's.
        reason: String,
    },

    // ---- strategy --------------------------------------------------------------------------------------------------
    /// A module or optimizer was set up twice.
    #[error("{what} is already set up with a strategy")]
    AlreadySetUp {
        /// Which one.
        what: String,
    },
    /// Ranks that must be alike are not.
    #[error("ranks disagree about {what}: rank {rank} has {mine:?}, rank {peer} has {theirs:?}")]
    Disagreement {
        /// What they must agree about.
        what: String,
        /// One rank.
        rank: u32,
        /// What it has.
        mine: String,
        /// The first rank that has something else.
        peer: u32,
        /// What that rank has.
        theirs: String,
    },
    /// A parameter is borrowed while the call needs to write it.
    #[error("parameter {name:?} is borrowed while {operation} needs to write it")]
    Borrowed {
        /// The parameter.
        name: String,
        /// The call.
        operation: &'static str,
    },
    /// The user's backward failed. The autograd library's own error stands in the text.
    #[error("backward failed: {reason}")]
    Backward {
        /// What it said.
        reason: String,
    },
    /// A gradient is NaN or infinite and the policy is to report it.
    #[error("gradient of {tensor:?} is not finite at step {step} (total norm {total_norm})")]
    Nonfinite {
        /// First tensor, in parameter order, with a nonfinite element.
        tensor: String,
        /// Optimizer step at which it was seen.
        step: u64,
        /// The total norm as computed.
        total_norm: f64,
    },

    // ---- checkpoints -----------------------------------------------------------------------------------------------
    /// A checkpoint file is not what it should be.
    #[error("checkpoint {path}: {item}: {reason}")]
    Checkpoint {
        /// The file.
        path: PathBuf,
        /// Tensor, key or section.
        item: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Strict loading found other keys than it wants.
    #[error("{what}: missing keys {missing:?}, unexpected keys {unexpected:?}")]
    Keys {
        /// Which state dict.
        what: String,
        /// Keys wanted but absent.
        missing: Vec<String>,
        /// Keys present but not wanted.
        unexpected: Vec<String>,
    },
}

impl Error {
    #[cold]
    pub(crate) fn timed_out(what: std::fmt::Arguments<'_>, timeout: std::time::Duration) -> Self {
        Error::TimedOut { what: what.to_string(), waited_ms: u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX) }
    }

    /// Wraps an operating-system error with the call it came from.
    pub(crate) fn io(what: impl Into<String>, source: impl Into<std::io::Error>) -> Self {
        Error::Io { what: what.into(), source: Arc::new(source.into()) }
    }
}
