//! The driver's result codes as this crate's errors.

use std::ffi::{CStr, c_char};

use cudarc::driver::sys::CUresult;

use super::bindings::{Answer, cuGetErrorName, cuGetErrorString};
use crate::error::{Error, Result};

/// Turns an answer that is no success into the error that says what can be done about it. `device`: the ordinal, where there
/// is one.
///
/// Codes are those of the CUDA Driver API's `CUresult`, whose documentation says after which of them a context is lost.
pub(super) fn check(device: Option<u32>, answer: Answer) -> Result<()> {
    if answer.is(CUresult::CUDA_SUCCESS) { Ok(()) } else { Err(explain(device, answer)) }
}

/// A device that fell off the bus or was taken away; which code comes depends on the call that finds out.
const LOST: &[CUresult] = &[
    CUresult::CUDA_ERROR_DEVICE_UNAVAILABLE,
    CUresult::CUDA_ERROR_DEINITIALIZED,
    CUresult::CUDA_ERROR_ECC_UNCORRECTABLE,
    CUresult::CUDA_ERROR_NVLINK_UNCORRECTABLE,
    CUresult::CUDA_ERROR_MPS_CLIENT_TERMINATED,
    CUresult::CUDA_ERROR_EXTERNAL_DEVICE,
    CUresult::CUDA_ERROR_UNKNOWN,
];

/// A kernel that went wrong, and the context with it.
const FAULTS: &[CUresult] = &[
    CUresult::CUDA_ERROR_ILLEGAL_ADDRESS,
    CUresult::CUDA_ERROR_CONTAINED, // an access of a peer's memory that failed, for one
    CUresult::CUDA_ERROR_TENSOR_MEMORY_LEAK,
    CUresult::CUDA_ERROR_LAUNCH_TIMEOUT,
    CUresult::CUDA_ERROR_ASSERT,
    CUresult::CUDA_ERROR_HARDWARE_STACK_ERROR,
    CUresult::CUDA_ERROR_ILLEGAL_INSTRUCTION,
    CUresult::CUDA_ERROR_MISALIGNED_ADDRESS,
    CUresult::CUDA_ERROR_INVALID_ADDRESS_SPACE,
    CUresult::CUDA_ERROR_INVALID_PC,
    CUresult::CUDA_ERROR_LAUNCH_FAILED,
];

/// What a capture does not allow.
const CAPTURES: &[CUresult] = &[
    CUresult::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED,
    CUresult::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED,
    CUresult::CUDA_ERROR_STREAM_CAPTURE_MERGE,
    CUresult::CUDA_ERROR_STREAM_CAPTURE_UNMATCHED,
    CUresult::CUDA_ERROR_STREAM_CAPTURE_UNJOINED,
    CUresult::CUDA_ERROR_STREAM_CAPTURE_ISOLATION,
    CUresult::CUDA_ERROR_STREAM_CAPTURE_IMPLICIT,
    CUresult::CUDA_ERROR_CAPTURED_EVENT,
    CUresult::CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD,
];

#[cold]
fn explain(device: Option<u32>, answer: Answer) -> Error {
    let Answer { operation, code } = answer;
    let reason = text(code);
    let device = device.unwrap_or(0);
    let is_any = |codes: &[CUresult]| codes.iter().any(|named| answer.is(*named));
    if is_any(LOST) {
        Error::DeviceLost { device, operation, reason }
    } else if is_any(FAULTS) {
        Error::KernelFault { device, operation, reason }
    } else if is_any(CAPTURES) {
        Error::Capture { device, operation, reason }
    } else {
        Error::Cuda { device, operation, code, reason }
    }
}

/// `CUDA_ERROR_..: its sentence`, as the driver has them.
fn text(code: u32) -> String {
    type Ask = unsafe fn(u32, *mut *const c_char) -> Answer;
    let part = |ask: Ask| {
        let mut text = std::ptr::null();
        // SAFETY: writes one pointer, null for a code that the driver does not know either.
        let _ = unsafe { ask(code, &mut text) };
        if text.is_null() {
            return "unnamed".to_owned();
        }
        // SAFETY: a zero-terminated text, which is the driver's and stays.
        unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
    };
    format!("{}: {}", part(cuGetErrorName), part(cuGetErrorString))
}
