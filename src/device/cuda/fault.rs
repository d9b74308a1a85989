//! The driver's result codes as this crate's errors.
//!
//! cudarc's `CUresult` is a closed enum that the driver's functions return as such, so a code that it does not name would be
//! undefined behaviour the moment a call returns. Hence its names are those of CUDA 13.1, while every function used here is
//! in 12.2, the oldest driver, under the same name. Codes that came later (47, 227, 918, 919) are of multicast memory, library
//! loaders, recapture and fabrics, which nothing here uses. A driver that gives a newer code to an old call remains outside
//! of what these bindings can express.

use cudarc::driver::result::DriverError;
use cudarc::driver::sys::CUresult;

use crate::error::{Error, Result};

/// Turns a code into the error that says what can be done about it. `device`: the ordinal, where there is one.
///
/// Codes are those of the CUDA Driver API's `CUresult`, whose documentation says after which of them a context is lost.
pub(super) fn check<T>(
    device: Option<u32>,
    operation: &'static str,
    result: std::result::Result<T, DriverError>,
) -> Result<T> {
    result.map_err(|error| explain(device, operation, error))
}

#[cold]
fn explain(device: Option<u32>, operation: &'static str, error: DriverError) -> Error {
    use CUresult::*;
    let reason = text(error);
    let device = device.unwrap_or(0);
    match error.0 {
        // A device that fell off the bus or was taken away; which code comes depends on the call that finds out.
        CUDA_ERROR_DEVICE_UNAVAILABLE
        | CUDA_ERROR_DEINITIALIZED
        | CUDA_ERROR_ECC_UNCORRECTABLE
        | CUDA_ERROR_NVLINK_UNCORRECTABLE
        | CUDA_ERROR_MPS_CLIENT_TERMINATED
        | CUDA_ERROR_EXTERNAL_DEVICE
        | CUDA_ERROR_UNKNOWN => Error::DeviceLost { device, operation, reason },
        CUDA_ERROR_ILLEGAL_ADDRESS
        | CUDA_ERROR_CONTAINED // an access of a peer's memory that failed, for one
        | CUDA_ERROR_TENSOR_MEMORY_LEAK
        | CUDA_ERROR_LAUNCH_TIMEOUT
        | CUDA_ERROR_ASSERT
        | CUDA_ERROR_HARDWARE_STACK_ERROR
        | CUDA_ERROR_ILLEGAL_INSTRUCTION
        | CUDA_ERROR_MISALIGNED_ADDRESS
        | CUDA_ERROR_INVALID_ADDRESS_SPACE
        | CUDA_ERROR_INVALID_PC
        | CUDA_ERROR_LAUNCH_FAILED => Error::KernelFault { device, operation, reason },
        CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED
        | CUDA_ERROR_STREAM_CAPTURE_INVALIDATED
        | CUDA_ERROR_STREAM_CAPTURE_MERGE
        | CUDA_ERROR_STREAM_CAPTURE_UNMATCHED
        | CUDA_ERROR_STREAM_CAPTURE_UNJOINED
        | CUDA_ERROR_STREAM_CAPTURE_ISOLATION
        | CUDA_ERROR_STREAM_CAPTURE_IMPLICIT
        | CUDA_ERROR_CAPTURED_EVENT
        | CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD => Error::Capture { device, operation, reason },
        code => Error::Cuda { device, operation, code: code as u32, reason },
    }
}

/// `CUDA_ERROR_..: its sentence`
fn text(error: DriverError) -> String {
    let part = |text: std::result::Result<&std::ffi::CStr, DriverError>| {
        text.map_or_else(|_| "unnamed".to_owned(), |text| text.to_string_lossy().into_owned())
    };
    format!("{}: {}", part(error.error_name()), part(error.error_string()))
}
