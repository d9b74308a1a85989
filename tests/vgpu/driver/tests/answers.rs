//! What `annulus::device::cuda` makes of a driver that is not the one it was built for: of answers that nobody knows, and of
//! functions that are not there.

#[path = "support/linger.rs"]
mod linger;
mod support;

use std::fmt::Debug;
use std::time::{Duration, Instant};

use annulus::device::cuda::{Buffer, Device, Driver, Event, Kernels, Pinned, Priority, Stream, Timer};
use annulus::{DType, Error};
use linger::{linger, release};
use support::{on_virtual_gpu, on_virtual_gpu_without};

const PATIENCE: Duration = Duration::from_secs(30);

fn device() -> Device {
    Driver::open().unwrap().device(0).unwrap()
}

fn stream(device: &Device) -> Stream {
    Stream::new(device, "test", Priority::Normal).unwrap()
}

/// The error is about this call, and tells the code as a number.
fn is_told<T: Debug>(result: Result<T, Error>, call: &str, expected: u32) {
    let error = result.unwrap_err();
    assert!(matches!(error, Error::Cuda { device: 0, operation, code, .. } if operation == call && code == expected));
    assert!(error.to_string().contains(&format!("failed with code {expected}")), "{error}");
}

#[test]
fn a_code_that_nobody_knows_is_told_as_a_number() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("code");
    let variables = [("ANNULUS_VGPU_LOST", path.to_str().unwrap())];
    on_virtual_gpu("a_code_that_nobody_knows_is_told_as_a_number", &variables, || {
        let device = device();
        let (kernels, stream) = (Kernels::load(&device).unwrap(), stream(&device));
        let (event, timer) = (Event::new(&device).unwrap(), Timer::new(&device).unwrap());
        let area = Pinned::zeroed(&device, 24).unwrap();
        linger(&kernels, &stream, area.address(), PATIENCE);
        stream.record(&event).unwrap();
        timer.start(&stream).unwrap();
        timer.stop(&stream).unwrap();
        assert!(!event.is_complete());

        // Whole when it appears: the threads of the driver look, too, and an empty file is another code.
        let lost = std::path::PathBuf::from(std::env::var_os("ANNULUS_VGPU_LOST").unwrap());
        std::fs::write(lost.with_extension("new"), "9999").unwrap();
        std::fs::rename(lost.with_extension("new"), lost).unwrap();
        let start = Instant::now();
        is_told(Buffer::zeroed(&device, DType::F32, 1), "cuMemAlloc", 9999);
        is_told(Pinned::zeroed(&device, 1), "cuMemHostAlloc", 9999);
        is_told(event.synchronize(PATIENCE), "cuEventQuery", 9999);
        is_told(timer.poll(), "cuEventQuery", 9999);
        is_told(stream.synchronize(PATIENCE), "cuStreamQuery", 9999);
        is_told(stream.capture(|| Ok(())), "cuStreamBeginCapture", 9999);
        assert!(event.is_complete(), "what will never be reached");
        assert!(start.elapsed() < PATIENCE / 2, "an answer that is not \"not ready\" is waited for");
        release(&area);
    });
}

#[test]
fn a_function_that_a_driver_lacks_is_an_error_where_it_is_needed() {
    let name = "a_function_that_a_driver_lacks_is_an_error_where_it_is_needed";
    on_virtual_gpu_without("cuEventElapsedTime", name, || {
        let device = device();
        let (stream, timer) = (stream(&device), Timer::new(&device).unwrap());
        timer.start(&stream).unwrap();
        timer.stop(&stream).unwrap();
        is_told(timer.elapsed(PATIENCE), "cuEventElapsedTime", 500);
        stream.synchronize(PATIENCE).unwrap();
    });
}

#[test]
fn kernels_are_loaded_by_drivers_without_cu_func_load() {
    on_virtual_gpu_without("cuFuncLoad", "kernels_are_loaded_by_drivers_without_cu_func_load", || {
        let device = device();
        let (kernels, stream) = (Kernels::load(&device).unwrap(), stream(&device));
        let area = Pinned::zeroed(&device, 24).unwrap();
        linger(&kernels, &stream, area.address(), Duration::ZERO);
        stream.synchronize(PATIENCE).unwrap();
    });
}
