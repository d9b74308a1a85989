//! The functions of the library. Codes and meanings are those of "NVML API Reference Guide" R535, chapter 4.
//!
//! That pointers are what the reference says they are is the caller's contract with any NVML; [`give`] and [`copy_text`] are
//! where it is relied on.
#![allow(non_snake_case, non_upper_case_globals, reason = "the names are NVML's")]

use std::ffi::{c_char, c_int, c_uint, c_ulonglong};
use std::time::Duration;

use nvml_wrapper_sys::bindings::*;

use crate::machine::{self, DEVICES, Far, next};
use crate::settings::{Between, SETTINGS};

const SUCCESS: u32 = nvmlReturn_enum_NVML_SUCCESS;
const INVALID_ARGUMENT: u32 = nvmlReturn_enum_NVML_ERROR_INVALID_ARGUMENT;
const NOT_SUPPORTED: u32 = nvmlReturn_enum_NVML_ERROR_NOT_SUPPORTED;
const INSUFFICIENT_SIZE: u32 = nvmlReturn_enum_NVML_ERROR_INSUFFICIENT_SIZE;
const GPU_IS_LOST: u32 = nvmlReturn_enum_NVML_ERROR_GPU_IS_LOST;

/// The highest bus number is the switches'.
const SWITCH_BUS: u32 = 0xff;
/// `NVML_NVLINK_VERSION_4_0`
const NVLINK_4_0: c_uint = 6;

type Result<T> = std::result::Result<T, u32>;

/// What a function returns: the code it was told to, or what `body` finds.
fn answer(function: &str, body: impl FnOnce() -> Result<()>) -> u32 {
    let told = SETTINGS.answers.iter().find(|(name, _)| name == function);
    told.map_or_else(|| body().err().unwrap_or(SUCCESS), |(_, code)| *code)
}

/// As [`answer`], about a device, which may be lost, or not answer.
fn ask(function: &str, device: nvmlDevice_t, body: impl FnOnce(usize) -> Result<()>) -> u32 {
    answer(function, || {
        while SETTINGS.hang.as_ref().is_some_and(|path| path.exists()) {
            std::thread::sleep(Duration::from_millis(5));
        }
        // "if the target GPU has fallen off the bus or is otherwise inaccessible"
        if SETTINGS.lost.as_ref().is_some_and(|path| path.exists()) {
            return Err(GPU_IS_LOST);
        }
        body(number(device)?)
    })
}

/// NVML_ERROR_INVALID_ARGUMENT "if device is invalid", as every function about a device has it.
fn number(device: nvmlDevice_t) -> Result<usize> {
    let number = device.addr().checked_sub(1).filter(|number| *number < DEVICES.len());
    number.ok_or(INVALID_ARGUMENT)
}

/// NVML_ERROR_INVALID_ARGUMENT if the place "is NULL", as every function with one has it.
fn give<T>(to: *mut T, value: T) -> Result<()> {
    if to.is_null() {
        return Err(INVALID_ARGUMENT);
    }
    // SAFETY: NVML asks its caller for null or a place that holds a T.
    unsafe { to.write(value) };
    Ok(())
}

/// NVML_ERROR_INSUFFICIENT_SIZE "if length is too small".
fn copy_text(text: &str, to: *mut c_char, len_bytes: c_uint) -> Result<()> {
    if len_bytes as usize <= text.len() {
        return Err(INSUFFICIENT_SIZE);
    }
    text.bytes().chain([0]).enumerate().try_for_each(|(at, byte)| give(to.wrapping_add(at), byte as c_char))
}

#[unsafe(no_mangle)]
extern "C" fn nvmlInit_v2() -> u32 {
    answer("nvmlInit_v2", || Ok(()))
}

#[unsafe(no_mangle)]
extern "C" fn nvmlShutdown() -> u32 {
    SUCCESS
}

#[unsafe(no_mangle)]
extern "C" fn nvmlSystemGetDriverVersion(text: *mut c_char, len_bytes: c_uint) -> u32 {
    answer("nvmlSystemGetDriverVersion", || copy_text("535.0", text, len_bytes))
}

#[unsafe(no_mangle)]
extern "C" fn nvmlDeviceGetCount_v2(count: *mut c_uint) -> u32 {
    answer("nvmlDeviceGetCount_v2", || give(count, DEVICES.len() as c_uint))
}

#[unsafe(no_mangle)]
extern "C" fn nvmlDeviceGetHandleByIndex_v2(index: c_uint, device: *mut nvmlDevice_t) -> u32 {
    answer("nvmlDeviceGetHandleByIndex_v2", || {
        let handle = std::ptr::without_provenance_mut(index as usize + 1);
        number(handle)?;
        give(device, handle)
    })
}

#[unsafe(no_mangle)]
extern "C" fn nvmlDeviceGetUUID(device: nvmlDevice_t, text: *mut c_char, len_bytes: c_uint) -> u32 {
    ask("nvmlDeviceGetUUID", device, |number| copy_text(&machine::uuid(number), text, len_bytes))
}

#[unsafe(no_mangle)]
extern "C" fn nvmlDeviceGetName(device: nvmlDevice_t, text: *mut c_char, len_bytes: c_uint) -> u32 {
    ask("nvmlDeviceGetName", device, |_| copy_text("annulus virtual GPU", text, len_bytes))
}

// ---- where devices are -------------------------------------------------------------------------------------------------

fn give_place(bus: u32, to: *mut nvmlPciInfo_t) -> Result<()> {
    let mut place = nvmlPciInfo_t {
        busIdLegacy: [0; 16],
        domain: 0,
        bus,
        device: 0,
        pciDeviceId: 0,
        pciSubSystemId: 0,
        busId: [0; 32],
    };
    copy_text(&format!("00000000:{bus:02X}:00.0"), place.busId.as_mut_ptr(), place.busId.len() as c_uint)?;
    give(to, place)
}

#[unsafe(no_mangle)]
extern "C" fn nvmlDeviceGetPciInfo_v3(device: nvmlDevice_t, place: *mut nvmlPciInfo_t) -> u32 {
    ask("nvmlDeviceGetPciInfo_v3", device, |number| give_place(number as u32, place))
}

#[unsafe(no_mangle)]
extern "C" fn nvmlDeviceGetTopologyCommonAncestor(one: nvmlDevice_t, other: nvmlDevice_t, level: *mut c_uint) -> u32 {
    ask("nvmlDeviceGetTopologyCommonAncestor", one, |one| match SETTINGS.between[one][number(other)?] {
        Between::Level(found) => give(level, found),
        // Beside NVLink there is always PCIe.
        Between::Links(_) | Between::Switch(_) => give(level, nvmlGpuLevel_enum_NVML_TOPOLOGY_NODE),
        // Stricter than NVML, whose reference says nothing of a device and itself.
        Between::Nothing => Err(INVALID_ARGUMENT),
    })
}

/// NVML_ERROR_NOT_SUPPORTED "if the device doesn't support this feature", NVML_ERROR_INVALID_ARGUMENT "if device or link is
/// invalid".
fn far(device: usize, link: c_uint) -> Result<Far> {
    let links = &DEVICES[device].links;
    if links.is_empty() {
        return Err(NOT_SUPPORTED);
    }
    links.get(link as usize).copied().ok_or(INVALID_ARGUMENT)
}

#[unsafe(no_mangle)]
extern "C" fn nvmlDeviceGetNvLinkState(device: nvmlDevice_t, link: c_uint, state: *mut c_uint) -> u32 {
    ask("nvmlDeviceGetNvLinkState", device, |number| far(number, link).and_then(|_| give(state, 1)))
}

#[unsafe(no_mangle)]
extern "C" fn nvmlDeviceGetNvLinkVersion(device: nvmlDevice_t, link: c_uint, version: *mut c_uint) -> u32 {
    ask("nvmlDeviceGetNvLinkVersion", device, |number| far(number, link).and_then(|_| give(version, NVLINK_4_0)))
}

#[unsafe(no_mangle)]
extern "C" fn nvmlDeviceGetNvLinkRemotePciInfo_v2(
    device: nvmlDevice_t,
    link: c_uint,
    place: *mut nvmlPciInfo_t,
) -> u32 {
    ask("nvmlDeviceGetNvLinkRemotePciInfo_v2", device, |number| match far(number, link)? {
        Far::Device(other) => give_place(other as u32, place),
        Far::Switch => give_place(SWITCH_BUS, place),
    })
}

#[unsafe(no_mangle)]
extern "C" fn nvmlDeviceGetNvLinkRemoteDeviceType(device: nvmlDevice_t, link: c_uint, kind: *mut c_uint) -> u32 {
    ask("nvmlDeviceGetNvLinkRemoteDeviceType", device, |number| match far(number, link)? {
        Far::Device(_) => give(kind, nvmlIntNvLinkDeviceType_enum_NVML_NVLINK_DEVICE_TYPE_GPU),
        Far::Switch => give(kind, nvmlIntNvLinkDeviceType_enum_NVML_NVLINK_DEVICE_TYPE_SWITCH),
    })
}

// ---- what they measure -------------------------------------------------------------------------------------------------

#[unsafe(no_mangle)]
extern "C" fn nvmlDeviceGetUtilizationRates(device: nvmlDevice_t, rates: *mut nvmlUtilization_t) -> u32 {
    ask("nvmlDeviceGetUtilizationRates", device, |number| {
        let gpu = (10 * number as u64 + next(&DEVICES[number].utilization_calls)) % 101;
        give(rates, nvmlUtilization_t { gpu: gpu as c_uint, memory: 5 })
    })
}

#[unsafe(no_mangle)]
extern "C" fn nvmlDeviceGetMemoryInfo_v2(device: nvmlDevice_t, memory: *mut nvmlMemory_v2_t) -> u32 {
    ask("nvmlDeviceGetMemoryInfo_v2", device, |number| {
        let (total, used) = (80 << 30, (number as u64 + 1) << 30);
        give(memory, nvmlMemory_v2_t { version: 0, total, reserved: 0, free: total - used, used })
    })
}

#[unsafe(no_mangle)]
extern "C" fn nvmlDeviceGetPowerUsage(device: nvmlDevice_t, milliwatts: *mut c_uint) -> u32 {
    ask("nvmlDeviceGetPowerUsage", device, |number| give(milliwatts, 100_000 + 1000 * number as c_uint))
}

#[unsafe(no_mangle)]
extern "C" fn nvmlDeviceGetClockInfo(device: nvmlDevice_t, clock: c_uint, megahertz: *mut c_uint) -> u32 {
    ask("nvmlDeviceGetClockInfo", device, |_| match clock {
        nvmlClockType_enum_NVML_CLOCK_SM => give(megahertz, 1500),
        nvmlClockType_enum_NVML_CLOCK_MEM => give(megahertz, 2000),
        _ => Err(INVALID_ARGUMENT),
    })
}

#[unsafe(no_mangle)]
extern "C" fn nvmlDeviceGetCurrentClocksThrottleReasons(device: nvmlDevice_t, reasons: *mut c_ulonglong) -> u32 {
    ask("nvmlDeviceGetCurrentClocksThrottleReasons", device, |number| {
        let found = match next(&DEVICES[number].reasons_calls) {
            0 => nvmlClocksThrottleReasonGpuIdle,
            _ => nvmlClocksThrottleReasonSwPowerCap | nvmlClocksThrottleReasonHwThermalSlowdown,
        };
        give(reasons, c_ulonglong::from(found))
    })
}

/// "This function is querying a byte counter over a 20ms interval": it takes that long.
#[unsafe(no_mangle)]
extern "C" fn nvmlDeviceGetPcieThroughput(device: nvmlDevice_t, counter: c_uint, kilobytes: *mut c_uint) -> u32 {
    ask("nvmlDeviceGetPcieThroughput", device, |_| {
        std::thread::sleep(Duration::from_millis(20));
        match counter {
            nvmlPcieUtilCounter_enum_NVML_PCIE_UTIL_TX_BYTES => give(kilobytes, 1000),
            nvmlPcieUtilCounter_enum_NVML_PCIE_UTIL_RX_BYTES => give(kilobytes, 2000),
            // "if device or counter is invalid"
            _ => Err(INVALID_ARGUMENT),
        }
    })
}

#[unsafe(no_mangle)]
extern "C" fn nvmlDeviceGetFieldValues(device: nvmlDevice_t, len: c_int, values: *mut nvmlFieldValue_t) -> u32 {
    ask("nvmlDeviceGetFieldValues", device, |number| {
        // "if device is invalid or values is NULL"; what is not known says so itself, in `nvmlReturn`.
        if values.is_null() {
            return Err(INVALID_ARGUMENT);
        }
        let calls = next(&DEVICES[number].nvlink_calls);
        for at in 0..usize::try_from(len).map_err(|_| INVALID_ARGUMENT)? {
            // SAFETY: NVML asks its caller for so many values.
            let value = unsafe { &mut *values.add(at) };
            let kibibytes = match value.fieldId {
                field_id::NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX => Some(1024 * calls),
                field_id::NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX => Some(2048 * calls),
                _ => None,
            };
            // All links together are asked for with the scope UINT_MAX.
            let known = kibibytes.filter(|_| value.scopeId == c_uint::MAX && !DEVICES[number].links.is_empty());
            value.nvmlReturn = if known.is_some() { SUCCESS } else { NOT_SUPPORTED };
            value.valueType = nvmlValueType_enum_NVML_VALUE_TYPE_UNSIGNED_LONG_LONG;
            value.value = nvmlValue_t { ullVal: known.unwrap_or(0) };
        }
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn nvmlDeviceGetTemperature(device: nvmlDevice_t, sensor: c_uint, celsius: *mut c_uint) -> u32 {
    ask("nvmlDeviceGetTemperature", device, |number| match sensor {
        nvmlTemperatureSensors_enum_NVML_TEMPERATURE_GPU => give(celsius, 40 + number as c_uint),
        // "sensorType is invalid"
        _ => Err(INVALID_ARGUMENT),
    })
}
