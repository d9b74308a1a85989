//! DAPI 6.10, 6.22: modules and functions.

use std::ffi::{c_char, c_int, c_uint, c_void};

use super::{In, Out, Text};
use crate::capture;
use crate::device;
use crate::module::{self, FIRST_TO_LOAD_AT_LAUNCH};
use crate::settings::SETTINGS;
use crate::status::{Result, Status, answer, refuse};
use crate::stream::Stream;

/// `CUjit_option`: where the compiler's complaint goes, and how many bytes fit.
const ERROR_LOG_BUFFER: u32 = 5;
const ERROR_LOG_BUFFER_SIZE_BYTES: u32 = 6;

fn load(out: &Out<u64>, image: &Text, log: impl FnOnce(&str) -> Result<()>) -> Result<()> {
    // Seen to wait for whatever runs on the device, loaded lazily or not.
    Stream::drain_device(device::current()?);
    match module::load(&image.get()?) {
        Ok(handle) => out.give(handle),
        Err((status, why)) => {
            eprintln!("virtual GPU (process {}): {why}", std::process::id());
            log(&why)?;
            Err(status)
        }
    }
}

#[unsafe(no_mangle)]
extern "C" fn cuModuleLoadData(out: Out<u64>, image: Text) -> u32 {
    answer(|| load(&out, &image, |_| Ok(())))
}

#[unsafe(no_mangle)]
extern "C" fn cuModuleLoadDataEx(
    out: Out<u64>,
    image: Text,
    len_options: c_uint,
    options: In<u32>,
    values: In<*mut c_void>,
) -> u32 {
    answer(|| {
        load(&out, &image, |why| {
            let (mut buffer, mut len_bytes) = (std::ptr::null_mut::<c_char>(), 0);
            for index in 0..len_options as usize {
                match options.at(index)? {
                    ERROR_LOG_BUFFER => buffer = values.at(index)?.cast(),
                    // The value itself stands where the pointer would.
                    ERROR_LOG_BUFFER_SIZE_BYTES => len_bytes = values.at(index)?.addr() & 0xffff_ffff,
                    _ => {}
                }
            }
            if buffer.is_null() || len_bytes == 0 {
                return Ok(());
            }
            let text = why.bytes().take(len_bytes - 1).chain([0]).enumerate();
            text.into_iter().try_for_each(|(i, byte)| Out(buffer.wrapping_add(i)).give(byte as c_char))
        })
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuModuleUnload(module: u64) -> u32 {
    answer(|| {
        device::current()?;
        capture::check_unsafe("cuModuleUnload")?;
        module::unload(module)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuModuleGetFunction(out: Out<u64>, module: u64, name: Text) -> u32 {
    answer(|| {
        let number = device::current()?;
        let function = module::function(module, &name.get()?)?;
        if SETTINGS.driver_version < FIRST_TO_LOAD_AT_LAUNCH {
            module::load_function(function, number)?;
        }
        out.give(function)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuFuncLoad(function: u64) -> u32 {
    answer(|| module::load_function(function, device::current()?))
}

/// `CUfunction_attribute`
#[unsafe(no_mangle)]
extern "C" fn cuFuncGetAttribute(value: Out<c_int>, attribute: u32, function: u64) -> u32 {
    answer(|| {
        device::current()?;
        let function = module::get(function)?;
        let kernel = function.kernel();
        value.give(match attribute {
            0 => kernel.max_threads().unwrap_or(device::THREADS_PER_BLOCK as u32) as c_int,
            1 => kernel.shared_bytes() as c_int,
            3 => kernel.local_bytes() as c_int,
            4 => kernel.len_registers().min(255) as c_int,
            5 | 6 => 90,
            8 => function.max_dynamic_shared_bytes as c_int,
            _ => 0,
        })
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuFuncSetAttribute(function: u64, attribute: u32, value: c_int) -> u32 {
    answer(|| {
        device::current()?;
        module::get(function)?;
        match attribute {
            // A negative value: among the codes.
            8 => module::allow_dynamic_shared(function, usize::try_from(value).map_err(|_| Status::INVALID_VALUE)?),
            // "Attempting to set a value on a read-only attribute will result in an error (CUDA_ERROR_INVALID_VALUE)".
            0..8 => refuse(Status::INVALID_VALUE, "cuFuncSetAttribute of a read-only attribute"),
            9..16 => Ok(()), // preferences
            _ => refuse(Status::INVALID_VALUE, "cuFuncSetAttribute of an attribute that is none"),
        }
    })
}
