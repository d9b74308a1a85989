//! Opening the NVIDIA management library (NVML), and what `nvml-wrapper` does not ask it.

use nvml_wrapper::error::NvmlError;
use nvml_wrapper::{Device, Nvml};
use nvml_wrapper_sys::bindings::{
    nvmlIntNvLinkDeviceType_enum_NVML_NVLINK_DEVICE_TYPE_SWITCH as SWITCH, nvmlReturn_enum_NVML_SUCCESS as SUCCESS,
};

use crate::error::{Error, Result};

/// Opens and initialises the library.
///
/// # Errors
/// [`Error::Management`] if it is missing, or too old, or finds no driver.
pub(super) fn open() -> Result<Nvml> {
    Nvml::init().map_err(|error| failed("opening it", &error))
}

pub(super) fn failed(operation: &'static str, error: &NvmlError) -> Error {
    Error::Management { operation, reason: error.to_string() }
}

/// Whether NVLink number `link` of a device ends in a switch; false also where the library cannot tell.
///
/// Not `NvLink::remote_device_type`: that of nvml-wrapper 0.13 looks at another place than the library writes to.
pub(super) fn ends_in_switch(nvml: &Nvml, device: &Device<'_>, link: u32) -> bool {
    let Ok(ask) = &nvml.lib().nvmlDeviceGetNvLinkRemoteDeviceType else { return false };
    let mut kind = 0;
    // SAFETY: the handle is that of a device of this library, which is open; the call writes one integer.
    unsafe { ask(device.handle(), link, &mut kind) == SUCCESS && kind == SWITCH }
}
