//! The functions of the driver that are called here, under their names in its manual (CUDA Driver API, 6).
//!
//! cudarc opens the library and has the types. Its functions are not used: they return a closed enum, in which a code of a
//! later driver would be undefined behaviour, and panic if a driver lacks them. Results are numbers here, out-parameters are
//! integers and handles, and enums only go in.
//!
//! The library must be present, or looking a function up panics: [`Driver::open`](super::Driver::open) sees to that before
//! the first call, and everything else begins with a driver.
#![allow(non_snake_case, reason = "the names are the driver's")]

use std::ffi::{c_char, c_int, c_uint, c_ulonglong, c_void};
use std::sync::OnceLock;

use cudarc::driver::sys::{self, *};

/// What the driver answered to a call.
#[derive(Debug, Clone, Copy)]
#[must_use]
pub(super) struct Answer {
    pub operation: &'static str,
    /// A `CUresult`, or what a later driver adds to it.
    pub code: u32,
}

impl Answer {
    pub(super) fn is(self, code: CUresult) -> bool {
        self.code == code as u32
    }
}

/// Each function is looked up once, by the symbol that has these arguments in every driver from
/// [`OLDEST_DRIVER`](super::OLDEST_DRIVER) on: its name, or what `as` says. If the driver lacks it nonetheless, the answer is
/// `CUDA_ERROR_NOT_FOUND`.
macro_rules! functions {
    ($($name:ident $(as $symbol:ident)? ($($argument:ident: $type:ty),*);)*) => {$(
        /// # Safety
        /// What the driver's manual asks for.
        #[allow(clippy::too_many_arguments, reason = "as many as the driver's")]
        pub(super) unsafe fn $name($($argument: $type),*) -> Answer {
            type Function = unsafe extern "C" fn($($type),*) -> u32;
            static FOUND: OnceLock<Option<Function>> = OnceLock::new();
            let find = || {
                // SAFETY: the manual gives the function of this symbol these arguments, and the size and signedness of its
                // result are a u32's. cudarc keeps the library open for ever.
                unsafe { sys::culib().get::<Function>(symbol!($name $($symbol)?)) }.ok().map(|function| *function)
            };
            let code = match FOUND.get_or_init(find) {
                // SAFETY: the caller's promise.
                Some(function) => unsafe { function($($argument),*) },
                None => CUresult::CUDA_ERROR_NOT_FOUND as u32,
            };
            Answer { operation: stringify!($name), code }
        }
    )*};
}

macro_rules! symbol {
    ($name:ident) => {
        concat!(stringify!($name), "\0").as_bytes()
    };
    ($name:ident $symbol:ident) => {
        symbol!($symbol)
    };
}

// The driver, and its results.
functions! {
    cuInit(flags: c_uint);
    cuDriverGetVersion(version: *mut c_int);
    cuGetErrorName(code: u32, name: *mut *const c_char);
    cuGetErrorString(code: u32, text: *mut *const c_char);
}

// Devices and contexts.
functions! {
    cuDeviceGetCount(count: *mut c_int);
    cuDeviceGet(device: *mut CUdevice, ordinal: c_int);
    cuDeviceGetName(name: *mut c_char, len_bytes: c_int, device: CUdevice);
    cuDeviceGetUuid as cuDeviceGetUuid_v2(uuid: *mut CUuuid, device: CUdevice);
    cuDeviceGetAttribute(value: *mut c_int, attribute: CUdevice_attribute, device: CUdevice);
    cuDeviceCanAccessPeer(can: *mut c_int, device: CUdevice, peer: CUdevice);
    cuDevicePrimaryCtxRetain(context: *mut CUcontext, device: CUdevice);
    cuDevicePrimaryCtxRelease as cuDevicePrimaryCtxRelease_v2(device: CUdevice);
    cuCtxSetCurrent(context: CUcontext);
    cuCtxSynchronize();
    cuCtxGetStreamPriorityRange(least: *mut c_int, greatest: *mut c_int);
    cuCtxEnablePeerAccess(peer: CUcontext, flags: c_uint);
}

// Memory.
functions! {
    cuMemGetInfo as cuMemGetInfo_v2(free_bytes: *mut usize, total_bytes: *mut usize);
    cuMemAlloc as cuMemAlloc_v2(address: *mut CUdeviceptr, len_bytes: usize);
    cuMemFree as cuMemFree_v2(address: CUdeviceptr);
    cuMemGetAddressRange as cuMemGetAddressRange_v2(base: *mut CUdeviceptr, len_bytes: *mut usize, address: CUdeviceptr);
    cuMemHostAlloc(memory: *mut *mut c_void, len_bytes: usize, flags: c_uint);
    cuMemFreeHost(memory: *mut c_void);
    cuMemHostRegister as cuMemHostRegister_v2(memory: *mut c_void, len_bytes: usize, flags: c_uint);
    cuMemHostUnregister(memory: *mut c_void);
    cuMemHostGetDevicePointer as cuMemHostGetDevicePointer_v2(
        address: *mut CUdeviceptr, memory: *mut c_void, flags: c_uint
    );
    cuMemcpyHtoD as cuMemcpyHtoD_v2(to: CUdeviceptr, from: *const c_void, len_bytes: usize);
    cuMemcpyHtoDAsync as cuMemcpyHtoDAsync_v2(
        to: CUdeviceptr, from: *const c_void, len_bytes: usize, stream: CUstream
    );
    cuMemcpyDtoHAsync as cuMemcpyDtoHAsync_v2(
        to: *mut c_void, from: CUdeviceptr, len_bytes: usize, stream: CUstream
    );
    cuMemcpyDtoDAsync as cuMemcpyDtoDAsync_v2(to: CUdeviceptr, from: CUdeviceptr, len_bytes: usize, stream: CUstream);
    cuMemsetD8 as cuMemsetD8_v2(address: CUdeviceptr, value: u8, len_bytes: usize);
    cuMemsetD8Async(address: CUdeviceptr, value: u8, len_bytes: usize, stream: CUstream);
}

// Memory that other processes map.
functions! {
    cuIpcGetMemHandle(handle: *mut CUipcMemHandle, address: CUdeviceptr);
    cuIpcOpenMemHandle as cuIpcOpenMemHandle_v2(address: *mut CUdeviceptr, handle: CUipcMemHandle, flags: c_uint);
    cuIpcCloseMemHandle(address: CUdeviceptr);
    cuMemGetAllocationGranularity(
        granule_bytes: *mut usize, properties: *const CUmemAllocationProp, option: CUmemAllocationGranularity_flags
    );
    cuMemCreate(
        handle: *mut CUmemGenericAllocationHandle,
        len_bytes: usize,
        properties: *const CUmemAllocationProp,
        flags: c_ulonglong
    );
    cuMemRelease(handle: CUmemGenericAllocationHandle);
    cuMemExportToShareableHandle(
        shareable: *mut c_void, handle: CUmemGenericAllocationHandle, kind: CUmemAllocationHandleType, flags: c_ulonglong
    );
    cuMemImportFromShareableHandle(
        handle: *mut CUmemGenericAllocationHandle, shareable: *mut c_void, kind: CUmemAllocationHandleType
    );
    cuMemAddressReserve(
        address: *mut CUdeviceptr, len_bytes: usize, align_bytes: usize, wish: CUdeviceptr, flags: c_ulonglong
    );
    cuMemAddressFree(address: CUdeviceptr, len_bytes: usize);
    cuMemMap(
        address: CUdeviceptr,
        len_bytes: usize,
        offset_bytes: usize,
        handle: CUmemGenericAllocationHandle,
        flags: c_ulonglong
    );
    cuMemUnmap(address: CUdeviceptr, len_bytes: usize);
    cuMemSetAccess(address: CUdeviceptr, len_bytes: usize, access: *const CUmemAccessDesc, count: usize);
}

// Streams, events and graphs.
functions! {
    cuStreamCreateWithPriority(stream: *mut CUstream, flags: c_uint, priority: c_int);
    cuStreamDestroy as cuStreamDestroy_v2(stream: CUstream);
    cuStreamQuery(stream: CUstream);
    cuStreamWaitEvent(stream: CUstream, event: CUevent, flags: c_uint);
    cuStreamWaitValue32 as cuStreamWaitValue32_v2(stream: CUstream, address: CUdeviceptr, value: u32, flags: c_uint);
    cuStreamWriteValue32 as cuStreamWriteValue32_v2(stream: CUstream, address: CUdeviceptr, value: u32, flags: c_uint);
    cuStreamBeginCapture as cuStreamBeginCapture_v2(stream: CUstream, mode: CUstreamCaptureMode);
    cuStreamEndCapture(stream: CUstream, graph: *mut CUgraph);
    cuThreadExchangeStreamCaptureMode(mode: *mut c_uint);
    cuEventCreate(event: *mut CUevent, flags: c_uint);
    cuEventDestroy as cuEventDestroy_v2(event: CUevent);
    cuEventRecord(event: CUevent, stream: CUstream);
    cuEventQuery(event: CUevent);
    cuEventElapsedTime(ms: *mut f32, start: CUevent, stop: CUevent);
    cuGraphInstantiate as cuGraphInstantiateWithFlags(executable: *mut CUgraphExec, graph: CUgraph, flags: c_ulonglong);
    cuGraphLaunch(executable: CUgraphExec, stream: CUstream);
    cuGraphExecDestroy(executable: CUgraphExec);
    cuGraphDestroy(graph: CUgraph);
}

// Kernels.
functions! {
    cuModuleLoadData(module: *mut CUmodule, image: *const c_void);
    cuModuleUnload(module: CUmodule);
    cuModuleGetFunction(function: *mut CUfunction, module: CUmodule, name: *const c_char);
    cuFuncGetAttribute(value: *mut c_int, attribute: CUfunction_attribute, function: CUfunction);
    cuFuncLoad(function: CUfunction); // from CUDA 12.4 on
    cuOccupancyMaxActiveBlocksPerMultiprocessor(
        blocks: *mut c_int, function: CUfunction, threads: c_int, shared_bytes: usize
    );
    cuLaunchKernel(
        function: CUfunction,
        blocks_x: c_uint, blocks_y: c_uint, blocks_z: c_uint,
        threads_x: c_uint, threads_y: c_uint, threads_z: c_uint,
        shared_bytes: c_uint,
        stream: CUstream,
        parameters: *mut *mut c_void,
        extra: *mut *mut c_void
    );
    cuLaunchCooperativeKernel(
        function: CUfunction,
        blocks_x: c_uint, blocks_y: c_uint, blocks_z: c_uint,
        threads_x: c_uint, threads_y: c_uint, threads_z: c_uint,
        shared_bytes: c_uint,
        stream: CUstream,
        parameters: *mut *mut c_void
    );
}
