//! What this driver refuses or waits for, and CUDA lets pass, or not always: so that a program that relies on it is found out.
//! Not for a GPU.

#[path = "support/kernels.rs"]
mod kernels;
#[path = "support/raw.rs"]
mod raw;
mod support;

use std::time::Duration;

use cudarc::driver::result;
use cudarc::driver::sys::{self, CUgraphInstantiate_flags, CUresult, CUstreamCaptureMode};
use raw::{Module, NON_BLOCKING, alloc, code, context, launch, read, write};
use support::{Peer, as_peer, hex, listen, on_virtual_gpu, say, unhex};

// ---- memory ------------------------------------------------------------------------------------------------------------

/// CUDA maps 2 MiB at a time: what lies behind an allocation is there, too.
#[test]
fn one_word_behind_an_allocation_is_illegal() {
    on_virtual_gpu("one_word_behind_an_allocation_is_illegal", &[], || {
        context();
        let function = Module::load(kernels::SMALL).unwrap().function("add").unwrap();
        let (mut data, mut one) = (alloc(4 * 8), 1u32);
        write(data, &[0; 8]);
        let arguments = &mut [(&raw mut data).cast(), (&raw mut one).cast()];
        launch(function, 9, result::stream::null(), arguments).unwrap();
        assert_eq!(code(result::ctx::synchronize()), CUresult::CUDA_ERROR_ILLEGAL_ADDRESS);
    });
}

/// CUDA was seen to give CUDA_ERROR_LAUNCH_FAILED for 4 MiB; a word may lie in 2 MiB that are still mapped.
#[test]
fn a_graph_that_outlives_its_memory_fails_aloud() {
    on_virtual_gpu("a_graph_that_outlives_its_memory_fails_aloud", &[], || {
        context();
        let (word, stream) = (alloc(4), result::stream::create(NON_BLOCKING).unwrap());
        // SAFETY: the memory is freed too early, which is what is tested; the driver is virtual.
        unsafe {
            let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
            result::stream::begin_capture(stream, mode).unwrap();
            result::memset_d8_async(word, 1, 4, stream).unwrap();
            let graph = result::stream::end_capture(stream).unwrap();
            let graph = result::graph::instantiate(graph, CUgraphInstantiate_flags(0)).unwrap();
            result::free_sync(word).unwrap();
            result::graph::launch(graph, stream).unwrap();
            assert_eq!(code(result::stream::synchronize(stream)), CUresult::CUDA_ERROR_ILLEGAL_ADDRESS);
        }
    });
}

/// Frees memory when it is told to.
#[test]
fn early_exporter() {
    as_peer("early_exporter", || {
        context();
        let data = alloc(64);
        let mut handle = sys::CUipcMemHandle_st { reserved: [0; 64] };
        // SAFETY: the allocation's base.
        unsafe { sys::cuIpcGetMemHandle(&mut handle, data) }.result().unwrap();
        say(hex(&handle.reserved.map(i8::cast_unsigned)));
        assert_eq!(listen(), "free");
        // SAFETY: too early for the importer, as is tested; the driver is virtual.
        unsafe { result::free_sync(data) }.unwrap();
    });
}

/// Undefined in CUDA (Driver API, 6.13, `cuIpcOpenMemHandle`), where the memory was seen to live on; so this driver ends the
/// process that does it.
#[test]
fn memory_is_not_freed_before_its_importer_closes_it() {
    on_virtual_gpu("memory_is_not_freed_before_its_importer_closes_it", &[], || {
        context();
        let mut peer = Peer::start("early_exporter", &[]);
        let bytes = unhex(&peer.hear());
        let handle = sys::CUipcMemHandle_st { reserved: std::array::from_fn(|i| bytes[i].cast_signed()) };
        let mut address = 0;
        // SAFETY: a handle from the exporter.
        unsafe { sys::cuIpcOpenMemHandle_v2(&mut address, handle, 1) }.result().unwrap();
        peer.tell("free");
        assert_eq!(peer.signal(), Some(6), "SIGABRT");
    });
}

/// The manual asks for the beginning.
#[test]
fn the_middle_of_an_allocation_is_not_exported() {
    on_virtual_gpu("the_middle_of_an_allocation_is_not_exported", &[], || {
        context();
        let mut handle = sys::CUipcMemHandle_st { reserved: [0; 64] };
        // SAFETY: writes the handle, if it were not refused.
        let exported = unsafe { sys::cuIpcGetMemHandle(&mut handle, alloc(64) + 4) };
        assert_eq!(exported, CUresult::CUDA_ERROR_INVALID_VALUE);
    });
}

// ---- code --------------------------------------------------------------------------------------------------------------

/// Whether the first launch of `add`, its function loaded before or not, returns within `window` beside a kernel that runs.
fn first_launch_returns(is_loaded: bool, window: Duration) -> bool {
    context();
    let module = Module::load(kernels::SMALL).unwrap();
    let (spin, add_function) = (module.function("spin").unwrap(), module.function("add").unwrap());
    let (mut flag, data) = (alloc(4), alloc(4));
    write(flag, &[0]);
    write(data, &[0]);
    let (first, second) =
        (result::stream::create(NON_BLOCKING).unwrap(), result::stream::create(NON_BLOCKING).unwrap());
    if is_loaded {
        // SAFETY: a function of a loaded module.
        unsafe { sys::cuFuncLoad(add_function) }.result().unwrap();
    }
    launch(spin, 1, first, &mut [(&raw mut flag).cast()]).unwrap();
    let (sender, launched) = std::sync::mpsc::channel();
    let (function, stream) = (add_function.addr(), second.addr());
    let other = std::thread::spawn(move || {
        context();
        let (mut data, mut one) = (data, 1u32);
        let arguments = &mut [(&raw mut data).cast(), (&raw mut one).cast()];
        let handle = std::ptr::with_exposed_provenance_mut(function);
        launch(handle, 1, std::ptr::with_exposed_provenance_mut(stream), arguments).unwrap();
        sender.send(()).unwrap();
    });
    let returns = launched.recv_timeout(window).is_ok();
    // SAFETY: streams live; the flag is a word of device memory.
    unsafe {
        let third = result::stream::create(NON_BLOCKING).unwrap();
        sys::cuStreamWriteValue32_v2(third, flag, 1, 0).result().unwrap();
        other.join().unwrap();
        result::stream::synchronize(second).unwrap();
    }
    assert_eq!(read(data, 1), [1]);
    returns
}

/// A launch that waits is told from a slow one by so much.
const BRIEF: Duration = Duration::from_millis(300);
const LONG: Duration = Duration::from_secs(20);

#[test]
fn a_kernel_is_loaded_lazily_by_an_idle_device() {
    on_virtual_gpu("a_kernel_is_loaded_lazily_by_an_idle_device", &[], || {
        assert!(!first_launch_returns(false, BRIEF));
        assert!(first_launch_returns(true, LONG));
    });
}

#[test]
fn a_kernel_is_loaded_early_where_asked_for_and_by_old_drivers() {
    let name = "a_kernel_is_loaded_early_where_asked_for_and_by_old_drivers";
    for variables in [("CUDA_MODULE_LOADING", "EAGER"), ("ANNULUS_VGPU_DRIVER_VERSION", "12020")] {
        on_virtual_gpu(name, &[variables], || assert!(first_launch_returns(false, LONG)));
    }
}
