//! The driver as an unmodified cudarc finds it: what works, and what it refuses as CUDA does.

#[path = "support/kernels.rs"]
mod kernels;
#[path = "support/raw.rs"]
mod raw;
mod support;

use std::time::Duration;

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::{self, CUresult};
use raw::{Module, NON_BLOCKING, alloc, code, context, launch, read, write};
use support::{Peer, as_peer, hex, listen, on_virtual_gpu, say, unhex};

fn add(function: sys::CUfunction, mut data: u64, mut term: u32, threads: u32) -> Result<(), DriverError> {
    let arguments = &mut [(&raw mut data).cast(), (&raw mut term).cast()];
    launch(function, threads, result::stream::null(), arguments)
}

#[test]
fn a_kernel_from_ptx_runs_between_two_copies() {
    on_virtual_gpu("a_kernel_from_ptx_runs_between_two_copies", &[], || {
        context();
        let module = Module::load(kernels::SMALL).unwrap();
        let data = alloc(4 * 64);
        write(data, &[7; 64]);
        add(module.function("add").unwrap(), data, 5, 64).unwrap();
        assert_eq!(read(data, 64), [12; 64]);
        // SAFETY: nothing uses the memory any more.
        unsafe { result::free_sync(data) }.unwrap();
    });
}

#[test]
fn a_spinning_kernel_lets_other_streams_go_on() {
    on_virtual_gpu("a_spinning_kernel_lets_other_streams_go_on", &[], || {
        context();
        let spin = Module::load(kernels::SMALL).unwrap().function("spin").unwrap();
        let mut flag = alloc(4);
        write(flag, &[0]);
        let (first, second) =
            (result::stream::create(NON_BLOCKING).unwrap(), result::stream::create(NON_BLOCKING).unwrap());
        launch(spin, 1, first, &mut [(&raw mut flag).cast()]).unwrap();
        // SAFETY: both streams live; the flag is a word of device memory.
        unsafe {
            assert_eq!(sys::cuStreamQuery(first), CUresult::CUDA_ERROR_NOT_READY);
            sys::cuStreamWriteValue32_v2(second, flag, 1, 0).result().unwrap();
            result::stream::synchronize(first).unwrap();
            // Cyclic, as the documentation has it: 1 is not yet 2, and 0 is later than 2^32 - 1.
            sys::cuStreamWaitValue32_v2(first, flag, 2, 0).result().unwrap();
            assert_eq!(sys::cuStreamQuery(first), CUresult::CUDA_ERROR_NOT_READY);
            sys::cuStreamWriteValue32_v2(second, flag, 2, 0).result().unwrap();
            sys::cuStreamWaitValue32_v2(first, flag, u32::MAX, 0).result().unwrap();
            result::stream::synchronize(first).unwrap();
        }
    });
}

#[test]
fn an_illegal_access_sticks_to_the_context() {
    on_virtual_gpu("an_illegal_access_sticks_to_the_context", &[], || {
        context();
        let function = Module::load(kernels::SMALL).unwrap().function("add").unwrap();
        let data = alloc(4 * 8);
        write(data, &[0; 8]);
        add(function, data, 1, 9).unwrap(); // one thread beyond the end; the launch itself succeeds
        let illegal = CUresult::CUDA_ERROR_ILLEGAL_ADDRESS;
        assert_eq!(code(result::ctx::synchronize()), illegal);
        // SAFETY: a call that must be refused.
        assert_eq!(code(unsafe { result::malloc_sync(4) }), illegal);
        assert_eq!(code(add(function, data, 1, 1)), illegal);
    });
}

#[test]
fn what_cuda_refuses_is_refused() {
    on_virtual_gpu("what_cuda_refuses_is_refused", &[("ANNULUS_VGPU_MEMORY_BYTES", "1048576")], || {
        let unready = code(result::device::get_count());
        assert_eq!(unready, CUresult::CUDA_ERROR_NOT_INITIALIZED);
        result::init().unwrap();
        assert_eq!(code(result::device::get(1)), CUresult::CUDA_ERROR_INVALID_DEVICE);
        // SAFETY: calls that must be refused, or whose memory nobody reads.
        unsafe {
            assert_eq!(code(result::malloc_sync(4)), CUresult::CUDA_ERROR_INVALID_CONTEXT);
            context();
            assert_eq!(code(result::malloc_sync(0)), CUresult::CUDA_ERROR_INVALID_VALUE);
            assert_eq!(code(result::malloc_sync(2 << 20)), CUresult::CUDA_ERROR_OUT_OF_MEMORY);
            let data = result::malloc_sync(64).unwrap();
            assert_eq!(code(result::memcpy_htod_sync(data + 4, &[0u32; 16])), CUresult::CUDA_ERROR_INVALID_VALUE);
            assert_eq!(code(result::free_sync(data + 4)), CUresult::CUDA_ERROR_INVALID_VALUE);
            let mut handle = sys::CUipcMemHandle_st { reserved: [0; 64] };
            let invalid = CUresult::CUDA_ERROR_INVALID_VALUE;
            assert_eq!(sys::cuIpcGetMemHandle(&mut handle, data + 4), invalid, "an interior pointer");
            let pool = result::malloc_async(std::ptr::null_mut(), 64).unwrap();
            assert_eq!(sys::cuIpcGetMemHandle(&mut handle, pool), invalid, "memory of a pool");
            sys::cuIpcGetMemHandle(&mut handle, data).result().unwrap();
            let mut opened = 0;
            let own = sys::cuIpcOpenMemHandle_v2(&mut opened, handle, 1);
            assert_eq!(own, CUresult::CUDA_ERROR_INVALID_CONTEXT, "the own process");
            assert_eq!(sys::cuIpcCloseMemHandle(data), invalid, "not opened");
            result::free_sync(data).unwrap();
            assert_eq!(code(result::free_sync(data)), invalid, "twice");
        }
        let module = Module::load(kernels::SMALL).unwrap();
        assert_eq!(code(module.function("absent")), CUresult::CUDA_ERROR_NOT_FOUND);
        assert_eq!(code(Module::load(".version 8.2\nnonsense")), CUresult::CUDA_ERROR_INVALID_PTX);
        let newer = kernels::SMALL.replace("8.2", "9.9");
        assert_eq!(code(Module::load(&newer)), CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION);
        assert_eq!(code(add(module.function("add").unwrap(), 0, 0, 1025)), CUresult::CUDA_ERROR_INVALID_VALUE);
    });
}

/// Whether the first launch of `add`, its function loaded before or not, waits for a kernel that is running.
fn first_launch_waits(is_loaded: bool) -> bool {
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
    let waits = launched.recv_timeout(Duration::from_millis(300)).is_err();
    // SAFETY: streams live; the flag is a word of device memory.
    unsafe {
        let third = result::stream::create(NON_BLOCKING).unwrap();
        sys::cuStreamWriteValue32_v2(third, flag, 1, 0).result().unwrap();
        other.join().unwrap();
        result::stream::synchronize(second).unwrap();
    }
    assert_eq!(read(data, 1), [1]);
    waits
}

#[test]
fn a_kernel_is_loaded_lazily_by_an_idle_device() {
    on_virtual_gpu("a_kernel_is_loaded_lazily_by_an_idle_device", &[], || {
        assert!(first_launch_waits(false));
        assert!(!first_launch_waits(true));
    });
}

#[test]
fn a_kernel_is_loaded_early_where_asked_for_and_by_old_drivers() {
    let name = "a_kernel_is_loaded_early_where_asked_for_and_by_old_drivers";
    for variables in [("CUDA_MODULE_LOADING", "EAGER"), ("ANNULUS_VGPU_DRIVER_VERSION", "12020")] {
        on_virtual_gpu(name, &[variables], || assert!(!first_launch_waits(false)));
    }
}

/// Opens a handle, adds 1 to each word by a kernel, closes it again.
#[test]
fn importer() {
    as_peer("importer", || {
        context();
        let bytes = unhex(&listen());
        let handle = sys::CUipcMemHandle_st { reserved: std::array::from_fn(|i| bytes[i].cast_signed()) };
        let function = Module::load(kernels::SMALL).unwrap().function("add").unwrap();
        let (mut first, mut second) = (0, 0);
        // SAFETY: a handle from the exporter, which keeps its memory until this process has ended.
        unsafe {
            assert_eq!(sys::cuIpcOpenMemHandle_v2(&mut first, handle, 0), CUresult::CUDA_ERROR_INVALID_VALUE);
            sys::cuIpcOpenMemHandle_v2(&mut first, handle, 1).result().unwrap();
            sys::cuIpcOpenMemHandle_v2(&mut second, handle, 1).result().unwrap();
            assert_eq!(first, second, "counted, not mapped twice");
            add(function, first, 1, 16).unwrap();
            result::ctx::synchronize().unwrap();
            sys::cuIpcCloseMemHandle(first).result().unwrap();
            assert_eq!(code(result::free_sync(first)), CUresult::CUDA_ERROR_INVALID_VALUE, "not its owner");
            sys::cuIpcCloseMemHandle(first).result().unwrap();
            assert_eq!(sys::cuIpcCloseMemHandle(first), CUresult::CUDA_ERROR_INVALID_VALUE, "closed");
        }
        say("done");
        listen();
    });
}

/// Frees memory when it is told to.
#[test]
fn early_exporter() {
    as_peer("early_exporter", || {
        context();
        for _ in 0..2 {
            let data = alloc(64);
            let mut handle = sys::CUipcMemHandle_st { reserved: [0; 64] };
            // SAFETY: the allocation's base.
            unsafe { sys::cuIpcGetMemHandle(&mut handle, data) }.result().unwrap();
            say(hex(&handle.reserved.map(i8::cast_unsigned)));
            assert_eq!(listen(), "free");
            // SAFETY: perhaps too early for the importer, as is tested; the driver is virtual.
            unsafe { result::free_sync(data) }.unwrap();
            say("freed");
        }
    });
}

/// Undefined in CUDA (Driver API, 6.13, `cuIpcOpenMemHandle`), so this driver ends the process that does it.
#[test]
fn memory_is_not_freed_before_its_importer_closes_it() {
    on_virtual_gpu("memory_is_not_freed_before_its_importer_closes_it", &[], || {
        context();
        let mut peer = Peer::start("early_exporter", &[]);
        let open = |peer: &mut Peer| {
            let bytes = unhex(&peer.hear());
            let handle = sys::CUipcMemHandle_st { reserved: std::array::from_fn(|i| bytes[i].cast_signed()) };
            let mut address = 0;
            // SAFETY: a handle from the exporter.
            unsafe { sys::cuIpcOpenMemHandle_v2(&mut address, handle, 1) }.result().unwrap();
            (address, handle)
        };
        let (mut address, handle) = open(&mut peer);
        // SAFETY: opened above, and closed once; then the handle of memory that is gone.
        unsafe {
            sys::cuIpcCloseMemHandle(address).result().unwrap();
            peer.tell("free");
            assert_eq!(peer.hear(), "freed");
            assert_eq!(sys::cuIpcOpenMemHandle_v2(&mut address, handle, 1), CUresult::CUDA_ERROR_INVALID_HANDLE);
        }
        open(&mut peer);
        peer.tell("free");
        assert_eq!(peer.signal(), Some(6), "SIGABRT");
    });
}

#[test]
fn memory_is_shared_between_processes() {
    on_virtual_gpu("memory_is_shared_between_processes", &[], || {
        context();
        let data = alloc(64);
        write(data, &[41; 16]);
        let mut handle = sys::CUipcMemHandle_st { reserved: [0; 64] };
        // SAFETY: the allocation's base.
        unsafe { sys::cuIpcGetMemHandle(&mut handle, data) }.result().unwrap();
        let mut peer = Peer::start("importer", &[]);
        peer.tell(&hex(&handle.reserved.map(i8::cast_unsigned)));
        assert_eq!(peer.hear(), "done");
        peer.finish();
        assert_eq!(read(data, 16), [42; 16]);
    });
}
