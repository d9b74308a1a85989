//! A kernel that takes its time.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use annulus::abi::{PROBE_THREADS, ProbeArguments};
use annulus::device::cuda::{Kernels, Pinned, Shape, Stream};
use bytemuck::Zeroable;

/// A probe whose peer never comes: it waits for so long, or until it is released, and then writes its report to `area`, of 6
/// words.
pub fn linger(kernels: &Kernels, stream: &Stream, area: u64, timeout: Duration) {
    let at = |word: u64| area + 4 * word;
    let arguments = ProbeArguments {
        peer_flag: at(0),
        flag: at(1),
        abort: at(2),
        report: at(3),
        timeout_ns: timeout.as_nanos() as u64,
        generation: 1,
        ..ProbeArguments::zeroed()
    };
    let shape = Shape { blocks: 1, threads: PROBE_THREADS, shared_bytes: 0, cooperative: false };
    // SAFETY: the arguments' own type; all addresses are of words of memory that outlives the kernel in every test.
    unsafe { kernels.launch("probe_peer", shape, stream, &arguments) }.unwrap();
}

/// Ends the wait of a kernel that lingers over `area`.
#[allow(dead_code, reason = "not every test file does")]
pub fn release(area: &Pinned) {
    // SAFETY: the third word of six; kernel and host access it by atomics.
    let abort = unsafe { AtomicU32::from_ptr(area.as_ptr().as_ptr().cast::<u32>().add(2)) };
    abort.store(1, Ordering::Release);
}
