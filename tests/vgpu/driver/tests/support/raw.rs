//! The driver API as cudarc offers it, for tests that use nothing else of this crate.

#![allow(dead_code, reason = "every test file uses a part of it")]

use std::ffi::{CString, c_void};

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::{self, CUresult};

pub const NON_BLOCKING: result::stream::StreamKind = result::stream::StreamKind::NonBlocking;

/// The primary context of device 0, current.
pub fn context() {
    result::init().unwrap();
    let device = result::device::get(0).unwrap();
    // SAFETY: a device that the driver has just named; its context stays retained.
    unsafe { result::ctx::set_current(result::primary_ctx::retain(device).unwrap()).unwrap() };
}

pub fn alloc(len_bytes: usize) -> sys::CUdeviceptr {
    // SAFETY: nothing reads the memory before it is written.
    unsafe { result::malloc_sync(len_bytes) }.unwrap()
}

pub fn write(address: sys::CUdeviceptr, words: &[u32]) {
    // SAFETY: every caller's words fit its allocation.
    unsafe { result::memcpy_htod_sync(address, words) }.unwrap();
}

pub fn read(address: sys::CUdeviceptr, len_words: usize) -> Vec<u32> {
    let mut words = vec![0; len_words];
    // SAFETY: every caller's words lie in its allocation.
    unsafe { result::memcpy_dtoh_sync(&mut words, address) }.unwrap();
    words
}

pub struct Module(sys::CUmodule);

impl Module {
    pub fn load(ptx: &str) -> Result<Module, DriverError> {
        let text = CString::new(ptx).unwrap();
        // SAFETY: a zero-terminated text.
        unsafe { result::module::load_data(text.as_ptr().cast()) }.map(Module)
    }

    /// Its functions must not be used any more.
    pub fn unload(&self) -> Result<(), DriverError> {
        // SAFETY: a module that was loaded.
        unsafe { result::module::unload(self.0) }
    }

    pub fn function(&self, name: &str) -> Result<sys::CUfunction, DriverError> {
        // SAFETY: the module was loaded, and is unloaded by no test before it is used.
        unsafe { result::module::get_function(self.0, CString::new(name).unwrap()) }
    }
}

pub fn launch(
    function: sys::CUfunction,
    threads: u32,
    stream: sys::CUstream,
    arguments: &mut [*mut c_void],
) -> Result<(), DriverError> {
    // SAFETY: every caller passes what its kernel takes.
    unsafe { result::launch_kernel(function, (1, 1, 1), (threads, 1, 1), 0, stream, arguments) }
}

pub fn code<T>(result: Result<T, DriverError>) -> CUresult {
    result.map_or_else(|error| error.0, |_| CUresult::CUDA_SUCCESS)
}
