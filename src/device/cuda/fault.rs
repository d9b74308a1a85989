//! The driver's result codes as this crate's errors.

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
        | CUDA_ERROR_LAUNCH_TIMEOUT
        | CUDA_ERROR_ASSERT
        | CUDA_ERROR_HARDWARE_STACK_ERROR
        | CUDA_ERROR_ILLEGAL_INSTRUCTION
        | CUDA_ERROR_MISALIGNED_ADDRESS
        | CUDA_ERROR_INVALID_ADDRESS_SPACE
        | CUDA_ERROR_INVALID_PC
        | CUDA_ERROR_LAUNCH_FAILED => Error::KernelFault { device, operation, reason },
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
