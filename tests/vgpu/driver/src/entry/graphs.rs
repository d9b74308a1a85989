//! DAPI 6.18, 6.24: stream capture and graphs.

use std::ffi::{c_uint, c_ulonglong};

use super::{In, Out};
use crate::capture::{self, Mode};
use crate::device;
use crate::graph::{self, EXECUTABLES, GRAPHS};
use crate::status::{Status, answer, refuse};
use crate::stream::{LEGACY, Stream};

#[unsafe(no_mangle)]
extern "C" fn cuStreamBeginCapture_v2(stream: u64, mode: c_uint) -> u32 {
    answer(|| capture::begin(&*Stream::of(stream)?, Mode::of(mode)?))
}

/// "If capture was invalidated .. then a NULL graph will be returned."
#[unsafe(no_mangle)]
extern "C" fn cuStreamEndCapture(stream: u64, graph: Out<u64>) -> u32 {
    answer(|| {
        graph.give(0)?;
        graph.give(GRAPHS.insert(capture::end(&*Stream::of(stream)?)?))
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamIsCapturing(stream: u64, status: Out<c_uint>) -> u32 {
    answer(|| {
        // DAPI 6.18: called on the legacy stream "while a blocking stream in the same context is capturing".
        if stream <= LEGACY && capture::is_legacy_blocked(device::current()?) {
            return refuse(
                Status::STREAM_CAPTURE_IMPLICIT,
                "cuStreamIsCapturing of the legacy stream, which is blocked",
            );
        }
        status.give(capture::status(&*Stream::of(stream)?))
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuThreadExchangeStreamCaptureMode(mode: *mut c_uint) -> u32 {
    answer(|| {
        device::check_initialized()?;
        let before = capture::exchange_mode(Mode::of(In(mode.cast_const()).get()?)?);
        Out(mode).give(before as c_uint)
    })
}

/// `CUgraphInstantiate_flags`; the others are for memory nodes, uploads and launches from the device.
const USE_NODE_PRIORITY: c_ulonglong = 8;

/// Priorities are remembered by streams and change nothing. Stricter than CUDA, which takes the other flags for any graph.
#[unsafe(no_mangle)]
extern "C" fn cuGraphInstantiateWithFlags(executable: Out<u64>, graph: u64, flags: c_ulonglong) -> u32 {
    answer(|| {
        device::current()?;
        capture::check_unsafe("cuGraphInstantiate")?;
        if flags & !USE_NODE_PRIORITY != 0 {
            return refuse(Status::NOT_SUPPORTED, "cuGraphInstantiate with flags for what graphs here do not have");
        }
        executable.give(graph::instantiate(graph)?)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuGraphLaunch(executable: u64, stream: u64) -> u32 {
    answer(|| graph::launch(executable, stream))
}

/// There is nothing to upload; the call is ordered by the launch that follows.
#[unsafe(no_mangle)]
extern "C" fn cuGraphUpload(executable: u64, stream: u64) -> u32 {
    answer(|| {
        capture::check_not_captured(&*Stream::of(stream)?, "cuGraphUpload")?;
        EXECUTABLES.get(executable).map(drop)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuGraphExecDestroy(executable: u64) -> u32 {
    answer(|| {
        capture::check_unsafe("cuGraphExecDestroy")?;
        EXECUTABLES.remove(executable)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuGraphDestroy(graph: u64) -> u32 {
    answer(|| GRAPHS.remove(graph))
}
