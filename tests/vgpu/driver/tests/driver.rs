//! The driver as an unmodified cudarc finds it: what works, and what it refuses as CUDA does.

#[path = "support/kernels.rs"]
mod kernels;
#[path = "support/raw.rs"]
mod raw;
mod support;

use std::sync::atomic::{AtomicU32, Ordering};
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
        let data = alloc(4);
        add(function, 0, 1, 1).unwrap(); // the launch itself succeeds
        let illegal = CUresult::CUDA_ERROR_ILLEGAL_ADDRESS;
        assert_eq!(code(result::ctx::synchronize()), illegal);
        // SAFETY: a call that must be refused.
        assert_eq!(code(unsafe { result::malloc_sync(4) }), illegal);
        assert_eq!(code(add(function, data, 1, 1)), illegal);
        result::ctx::get_current().unwrap();
        let mut device = -1;
        // SAFETY: writes one integer.
        unsafe { sys::cuCtxGetDevice(&mut device) }.result().unwrap();
        assert_eq!(device, 0, "whose context it is can be asked");
    });
}

#[test]
fn what_cuda_refuses_is_refused() {
    on_virtual_gpu("what_cuda_refuses_is_refused", &[], || {
        let unready = code(result::device::get_count());
        assert_eq!(unready, CUresult::CUDA_ERROR_NOT_INITIALIZED);
        result::init().unwrap();
        let beyond = result::device::get_count().unwrap();
        assert_eq!(code(result::device::get(beyond)), CUresult::CUDA_ERROR_INVALID_DEVICE);
        // SAFETY: calls that must be refused, or whose memory nobody reads.
        unsafe {
            assert_eq!(code(result::malloc_sync(4)), CUresult::CUDA_ERROR_INVALID_CONTEXT);
            context();
            assert_eq!(code(result::malloc_sync(0)), CUresult::CUDA_ERROR_INVALID_VALUE);
            assert_eq!(code(result::malloc_sync(1 << 40)), CUresult::CUDA_ERROR_OUT_OF_MEMORY);
            let data = result::malloc_sync(64).unwrap();
            assert_eq!(code(result::memcpy_htod_sync(data + 4, &[0u32; 16])), CUresult::CUDA_ERROR_INVALID_VALUE);
            assert_eq!(code(result::free_sync(data + 4)), CUresult::CUDA_ERROR_INVALID_VALUE);
            let mut handle = sys::CUipcMemHandle_st { reserved: [0; 64] };
            let invalid = CUresult::CUDA_ERROR_INVALID_VALUE;
            let pool = result::malloc_async(std::ptr::null_mut(), 64).unwrap();
            assert_eq!(sys::cuIpcGetMemHandle(&mut handle, pool), invalid, "memory of a pool");
            sys::cuIpcGetMemHandle(&mut handle, data).result().unwrap();
            let mut opened = 0;
            let own = sys::cuIpcOpenMemHandle_v2(&mut opened, handle, 1);
            assert_eq!(own, CUresult::CUDA_ERROR_INVALID_CONTEXT, "the own process");
            assert_eq!(sys::cuIpcCloseMemHandle(data), invalid, "not opened");
            result::free_sync(data).unwrap();
            assert_eq!(code(result::free_sync(data)), invalid, "twice");
            result::free_sync(0).unwrap();
            let mut host = vec![0u32; 1 << 20];
            sys::cuMemHostRegister_v2(host.as_mut_ptr().cast(), 8192, 0).result().unwrap();
            assert_eq!(sys::cuMemHostUnregister(host[1024..].as_mut_ptr().cast()), invalid, "in the middle");
            sys::cuMemHostUnregister(host.as_mut_ptr().cast()).result().unwrap();
            let again = sys::cuMemHostUnregister(host.as_mut_ptr().cast());
            assert_eq!(again, CUresult::CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED);
            let mut own_context = std::ptr::null_mut();
            sys::cuCtxGetCurrent(&mut own_context).result().unwrap();
            let peer = sys::cuCtxEnablePeerAccess(own_context, 0);
            assert_eq!(peer, CUresult::CUDA_ERROR_PEER_ACCESS_UNSUPPORTED, "of itself");
        }
        let module = Module::load(kernels::SMALL).unwrap();
        assert_eq!(code(module.function("absent")), CUresult::CUDA_ERROR_NOT_FOUND);
        assert_eq!(code(Module::load(".version 8.2\nnonsense")), CUresult::CUDA_ERROR_INVALID_PTX);
        let newer = kernels::SMALL.replace("8.2", "9.9");
        assert_eq!(code(Module::load(&newer)), CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION);
        let newer = kernels::SMALL.replace("sm_80", "sm_100").replace("8.2", "8.8");
        assert_eq!(code(Module::load(&newer)), CUresult::CUDA_ERROR_INVALID_PTX);
        let function = module.function("add").unwrap();
        assert_eq!(code(add(function, 0, 0, 1025)), CUresult::CUDA_ERROR_INVALID_VALUE);
        // SAFETY: a live function.
        let no_attribute =
            unsafe { sys::cuFuncSetAttribute(function, sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX, 1) };
        assert_eq!(no_attribute, CUresult::CUDA_ERROR_INVALID_VALUE);
    });
}

/// Whether `work` returns within `window` beside a kernel that runs on the stream it is given.
fn returns(window: Duration, work: impl FnOnce(sys::CUstream) + Send + 'static) -> bool {
    let spin = Module::load(kernels::SMALL).unwrap().function("spin").unwrap();
    // Set without the driver, of which a call that waits may hold a lock.
    // SAFETY: a word of pinned memory, which stays; device and host have it at one address.
    let word = unsafe { AtomicU32::from_ptr(result::malloc_host(4, 0).unwrap().cast()) };
    word.store(0, Ordering::Relaxed);
    let mut flag = word.as_ptr().expose_provenance() as sys::CUdeviceptr;
    let first = result::stream::create(NON_BLOCKING).unwrap();
    launch(spin, 1, first, &mut [(&raw mut flag).cast()]).unwrap();
    let (sender, done) = std::sync::mpsc::channel();
    let stream = first.addr();
    let other = std::thread::spawn(move || {
        context();
        work(std::ptr::with_exposed_provenance_mut(stream));
        sender.send(()).unwrap();
    });
    let returns = done.recv_timeout(window).is_ok();
    word.store(1, Ordering::Relaxed);
    other.join().unwrap();
    result::ctx::synchronize().unwrap();
    returns
}

/// A call that waits is told from a slow one by so much.
fn waits(work: impl FnOnce(sys::CUstream) + Send + 'static) -> bool {
    !returns(Duration::from_millis(300), work)
}

fn goes_on(work: impl FnOnce(sys::CUstream) + Send + 'static) -> bool {
    returns(Duration::from_secs(20), work)
}

#[test]
fn some_calls_wait_for_kernels() {
    on_virtual_gpu("some_calls_wait_for_kernels", &[], || {
        context();
        let data = alloc(4 << 20);
        let elements = |len_bytes| vec![0u8; len_bytes];
        // SAFETY: what is freed is not used any more; the copies fit.
        unsafe {
            assert!(waits(|_| Module::load(kernels::SMALL).map(drop).unwrap()));
            assert!(goes_on(|_| _ = alloc(4)));
            assert!(waits(|_| result::free_sync(alloc(4)).unwrap()));
            assert!(goes_on(|_| result::free_sync(0).unwrap()));
            assert!(goes_on(|_| write(alloc(4), &[1])));
            let small = elements(64 << 10);
            assert!(goes_on(move |stream| result::memcpy_htod_async(data, &small, stream).unwrap()));
            let large = elements(4 << 20);
            assert!(
                waits(move |stream| result::memcpy_htod_async(data, &large, stream).unwrap()),
                "from pageable memory"
            );
        }
    });
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
fn exporter() {
    as_peer("exporter", || {
        context();
        let data = alloc(4 << 20);
        let mut handle = sys::CUipcMemHandle_st { reserved: [0; 64] };
        // SAFETY: the allocation's base.
        unsafe { sys::cuIpcGetMemHandle(&mut handle, data) }.result().unwrap();
        say(hex(&handle.reserved.map(i8::cast_unsigned)));
        listen();
        // SAFETY: the importer has closed it.
        unsafe { result::free_sync(data) }.unwrap();
        say("freed");
        listen();
    });
}

#[test]
fn a_handle_of_freed_memory_is_not_opened() {
    on_virtual_gpu("a_handle_of_freed_memory_is_not_opened", &[], || {
        context();
        let mut peer = Peer::start("exporter", &[]);
        let bytes = unhex(&peer.hear());
        let handle = sys::CUipcMemHandle_st { reserved: std::array::from_fn(|i| bytes[i].cast_signed()) };
        let mut address = 0;
        // SAFETY: a handle from the exporter; what is opened is closed once.
        unsafe {
            sys::cuIpcOpenMemHandle_v2(&mut address, handle, 1).result().unwrap();
            sys::cuIpcCloseMemHandle(address).result().unwrap();
            peer.tell("free");
            assert_eq!(peer.hear(), "freed");
            assert_eq!(sys::cuIpcOpenMemHandle_v2(&mut address, handle, 1), CUresult::CUDA_ERROR_INVALID_VALUE);
            peer.finish();
            assert_eq!(sys::cuIpcOpenMemHandle_v2(&mut address, handle, 1), CUresult::CUDA_ERROR_INVALID_HANDLE);
        }
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
