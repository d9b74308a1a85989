//! When `annulus::device::cuda` gives memory back: when nobody uses it, when there is no other, and not under a kernel.

#[path = "support/linger.rs"]
mod linger;
#[path = "support/log.rs"]
mod log;
#[path = "support/raw.rs"]
mod raw;
mod support;

use std::time::{Duration, Instant};

use annulus::device::cuda::{Arena, Buffer, Device, Driver, Kernels, Pinned, Pool, Priority, Sharing, Stream};
use annulus::{DType, Error};
use cudarc::driver::result;
use cudarc::driver::sys::CUstreamCaptureMode;
use linger::{linger, release};
use support::on_virtual_gpu;

const PATIENCE: Duration = Duration::from_secs(60);
const MIB: usize = 1 << 20;
/// 8 MiB.
const SMALL: &[(&str, &str)] = &[("ANNULUS_VGPU_MEMORY_BYTES", "8388608")];

fn device() -> Device {
    Driver::open().unwrap().device(0).unwrap()
}

fn stream(device: &Device) -> Stream {
    Stream::new(device, "test", Priority::Normal).unwrap()
}

fn free_bytes(device: &Device) -> usize {
    device.memory_bytes().unwrap().0 as usize
}

#[test]
fn memory_under_a_kernel_that_hangs_is_left_to_it_after_a_while() {
    on_virtual_gpu("memory_under_a_kernel_that_hangs_is_left_to_it_after_a_while", SMALL, || {
        let log = log::keep();
        let device = device();
        let (kernels, stream) = (Kernels::load(&device).unwrap(), stream(&device));
        let arena = |sharing| Arena::new(&device, 2 * MIB, sharing).unwrap();
        let (descriptor, handle) = (arena(Sharing::Descriptor), arena(Sharing::Handle));
        let buffer = Buffer::zeroed(&device, DType::U8, 2 * MIB).unwrap();
        let pinned = || Pinned::zeroed(&self::device(), 24).unwrap(); // each by a device value of its own
        let (area, pinned, late) = (pinned(), pinned(), [pinned(), pinned(), pinned()]);
        linger(&kernels, &stream, area.address(), PATIENCE);

        let start = Instant::now();
        std::thread::scope(|scope| {
            scope.spawn(|| drop(descriptor));
            scope.spawn(|| drop(handle));
            scope.spawn(|| drop(buffer));
            scope.spawn(|| drop(pinned));
        });
        let waited = start.elapsed();
        assert!(waited > Duration::from_secs(9) && waited < PATIENCE / 2, "{waited:?}");
        assert_eq!(free_bytes(&device), 2 * MIB, "nothing is freed under the kernel");
        let start_late = Instant::now();
        drop(late);
        assert!(
            start_late.elapsed() < Duration::from_secs(5),
            "the device is known to hang: {:?}",
            start_late.elapsed()
        );
        assert!(log.has("until the device's work ends"));

        release(&area);
        stream.synchronize(PATIENCE).unwrap();
        while free_bytes(&device) < 8 * MIB {
            assert!(start.elapsed() < PATIENCE, "{} of 8 MiB are free", free_bytes(&device));
            std::thread::sleep(Duration::from_millis(5));
        }
    });
}

#[test]
fn an_arena_dropped_in_a_capture_is_not_unmapped_under_kernels() {
    on_virtual_gpu("an_arena_dropped_in_a_capture_is_not_unmapped_under_kernels", SMALL, || {
        let log = log::keep();
        let device = device();
        let stream = stream(&device);
        let arena = Arena::new(&device, 2 * MIB, Sharing::Descriptor).unwrap();
        let captured = stream.capture(|| {
            drop(arena);
            Ok(())
        });
        assert!(matches!(captured, Err(Error::Capture { .. })), "{captured:?}");
        assert_eq!(free_bytes(&device), 6 * MIB);
        assert!(log.has("an arena") && log.has("memory is kept for ever"));
    });
}

/// A trainer's library captures so: whatever is not for a capture ends it then, in whichever thread.
#[test]
fn memory_is_freed_while_somebody_captures_in_global_mode() {
    on_virtual_gpu("memory_is_freed_while_somebody_captures_in_global_mode", SMALL, || {
        let device = device();
        let buffer = Buffer::zeroed(&device, DType::U8, 2 * MIB).unwrap();
        let pinned = Pinned::zeroed(&device, 24).unwrap();
        // The context is current to this thread.
        let stream = result::stream::create(raw::NON_BLOCKING).unwrap();
        // SAFETY: a stream that lives.
        unsafe { result::stream::begin_capture(stream, CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_GLOBAL) }.unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| drop(buffer));
            drop(pinned);
        });
        // SAFETY: as above.
        unsafe { result::stream::end_capture(stream) }.unwrap();
        assert_eq!(free_bytes(&device), 8 * MIB);
    });
}

#[test]
fn code_is_unloaded_behind_its_kernels() {
    on_virtual_gpu("code_is_unloaded_behind_its_kernels", SMALL, || {
        let device = device();
        let (kernels, stream) = (Kernels::load(&device).unwrap(), stream(&device));
        let area = Pinned::zeroed(&device, 24).unwrap();
        let start = Instant::now();
        linger(&kernels, &stream, area.address(), Duration::from_secs(1));
        drop(kernels);
        assert!(start.elapsed() >= Duration::from_secs(1), "{:?}", start.elapsed());
        stream.synchronize(PATIENCE).unwrap();
    });
}

#[test]
fn a_pool_frees_what_nobody_holds_where_memory_runs_out() {
    on_virtual_gpu("a_pool_frees_what_nobody_holds_where_memory_runs_out", SMALL, || {
        let device = device();
        let (pool, stream) = (Pool::new(&device), stream(&device));
        let take = |len_bytes| pool.take(DType::U8, len_bytes, &stream, &stream);
        let (first, second) = (take(2 * MIB).unwrap(), take(2 * MIB).unwrap());
        drop(first);
        let large = take(4 * MIB).unwrap();
        assert_eq!(free_bytes(&device), 0, "as long as there is room, a block that nobody holds is kept");
        drop(large);
        let small = take(MIB).unwrap();
        assert_eq!(free_bytes(&device), 5 * MIB, "one is held, and one was asked for");
        drop((second, small));
        assert!(matches!(take(16 * MIB), Err(Error::NoSpace { .. })));
        assert_eq!(free_bytes(&device), 8 * MIB, "what there is was given to no avail");
        take(8 * MIB).unwrap();
    });
}
