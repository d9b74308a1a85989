//! Opening the NVIDIA management library (NVML), and what `nvml-wrapper` does not ask it.

use nvml_wrapper::error::NvmlError;
use nvml_wrapper::{Device, Nvml};
use nvml_wrapper_sys::bindings::{
    field_id, nvmlFieldValue_t, nvmlIntNvLinkDeviceType_enum_NVML_NVLINK_DEVICE_TYPE_SWITCH as SWITCH,
    nvmlReturn_enum_NVML_SUCCESS as SUCCESS,
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

/// KiB that a device has sent and received over all its NVLinks since some start; `None` what it does not count.
///
/// Not `Device::field_values_for`: that asks for the first link only.
pub(super) fn nvlink_kibibytes(nvml: &Nvml, device: &Device<'_>) -> [Option<u64>; 2] {
    let Ok(ask) = &nvml.lib().nvmlDeviceGetFieldValues else { return [None; 2] };
    let mut values = [field_id::NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX, field_id::NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX]
        .map(|field| {
            // SAFETY: plain numbers, for which zero is a value.
            let empty: nvmlFieldValue_t = unsafe { std::mem::zeroed() };
            // The scope of all links together.
            nvmlFieldValue_t { fieldId: field, scopeId: u32::MAX, ..empty }
        });
    // SAFETY: the handle is that of a device of this library, which is open; so many values are passed as are told.
    let code = unsafe { ask(device.handle(), values.len() as i32, values.as_mut_ptr()) };
    values.map(|value| match code == SUCCESS && value.nvmlReturn == SUCCESS {
        // SAFETY: both fields are unsigned 64-bit numbers by their definition in nvml.h, and every bit pattern is one.
        true => Some(unsafe { value.value.ullVal }),
        false => None,
    })
}
