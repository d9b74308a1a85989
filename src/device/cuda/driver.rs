//! Finding the driver.

use std::ffi::c_int;
use std::sync::OnceLock;

use cudarc::driver::sys::{self, CUresult};

use super::bindings::{cuDeviceGetCount, cuDriverGetVersion, cuInit};
use super::context::Device;
use super::fault::check;
use crate::error::{Error, Result};

/// The oldest driver that reads our PTX and has every function used here: CUDA 12.2, as `cuDriverGetVersion` writes it.
pub const OLDEST_DRIVER: u32 = 12_020;

/// The NVIDIA driver of this machine, initialised, with at least one device.
#[derive(Debug, Clone, Copy)]
pub struct Driver {
    version: u32,
    devices: u32,
}

impl Driver {
    /// Opens the driver library and checks that it can be used. The first call does the work.
    ///
    /// # Errors
    /// [`Error::DriverAbsent`], [`Error::DriverTooOld`], [`Error::NoDevice`], or [`Error::Cuda`] for what else it says.
    pub fn open() -> Result<Driver> {
        static DRIVER: OnceLock<Result<Driver>> = OnceLock::new();
        DRIVER.get_or_init(look).clone()
    }

    /// CUDA version of the driver: 1000 times the major plus 10 times the minor.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// Number of devices that this process may use (`CUDA_VISIBLE_DEVICES` is the driver's business).
    pub fn len_devices(&self) -> u32 {
        self.devices
    }

    /// The device with this number in the driver's order.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if there is none; what the driver says.
    pub fn device(&self, ordinal: u32) -> Result<Device> {
        if ordinal >= self.devices {
            return Err(Error::InvalidArgument {
                argument: "device ordinal",
                value: format!("{ordinal} of {} device(s)", self.devices),
                accepted: "must be less than the number of devices",
            });
        }
        Device::retain(ordinal)
    }
}

fn look() -> Result<Driver> {
    // Looking functions up panics where the library is missing, so this comes before every call.
    // SAFETY: opens the driver library, whose initialisers are NVIDIA's.
    if !unsafe { sys::is_culib_present() } {
        return Err(Error::DriverAbsent);
    }
    let mut version: c_int = 0;
    // The only call that may come before `cuInit`; a driver too old would lack functions that we look up later.
    // SAFETY: writes one integer.
    check(None, unsafe { cuDriverGetVersion(&mut version) })?;
    let version = u32::try_from(version).unwrap_or(0);
    if version < OLDEST_DRIVER {
        return Err(Error::DriverTooOld { found: version, oldest: OLDEST_DRIVER });
    }
    // SAFETY: no flags, as there are none.
    let initialised = unsafe { cuInit(0) };
    if initialised.is(CUresult::CUDA_ERROR_NO_DEVICE) {
        return Err(Error::NoDevice);
    }
    check(None, initialised)?;
    let mut devices: c_int = 0;
    // SAFETY: writes one integer.
    check(None, unsafe { cuDeviceGetCount(&mut devices) })?;
    match u32::try_from(devices) {
        Ok(devices) if devices > 0 => Ok(Driver { version, devices }),
        _ => Err(Error::NoDevice),
    }
}
