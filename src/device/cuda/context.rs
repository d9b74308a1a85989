//! Devices and their primary contexts.

use std::ffi::{CStr, c_int};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use cudarc::driver::sys::{self, CUresult};

use super::bindings::{
    Answer, cuCtxSetCurrent, cuDeviceGet, cuDeviceGetAttribute, cuDeviceGetName, cuDeviceGetUuid,
    cuDevicePrimaryCtxRelease, cuDevicePrimaryCtxRetain, cuMemGetInfo, cuMemsetD8, cuStreamQuery,
};
use super::fault::check;
use super::wait::until_ready;
use crate::error::{Error, Result};

/// What names a device on every process of the machine; ordinals differ where `CUDA_VISIBLE_DEVICES` does.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Uuid(pub [u8; 16]);

impl fmt::Display for Uuid {
    /// As nvidia-smi prints it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("GPU")?;
        for (index, byte) in self.0.iter().enumerate() {
            let dash = if [0, 4, 6, 8, 10].contains(&index) { "-" } else { "" };
            write!(f, "{dash}{byte:02x}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A device with its primary context, which all users of the device in the process share (a trainer's library, too).
/// Clones are the same. The context is released with the last clone; everything made on the device keeps one.
#[derive(Clone)]
pub struct Device(Arc<Core>);

struct Core {
    ordinal: u32,
    device: sys::CUdevice,
    context: sys::CUcontext,
    uuid: Uuid,
    name: String,
}

// SAFETY: a context may be used from any thread that makes it current (CUDA Driver API, 6.8); the handle is only passed.
unsafe impl Send for Core {}
// SAFETY: as for Send.
unsafe impl Sync for Core {}

impl Drop for Core {
    fn drop(&mut self) {
        // SAFETY: `retain` took this reference, and whatever was made in the context is gone: it held the core.
        let _ = unsafe { cuDevicePrimaryCtxRelease(self.device) }; // a lost device cannot be released
    }
}

impl Device {
    pub(super) fn retain(ordinal: u32) -> Result<Device> {
        let at = Some(ordinal);
        let number = i32::try_from(ordinal).map_err(|_| Error::NoDevice)?;
        let mut device = 0;
        // SAFETY: writes one integer.
        check(at, unsafe { cuDeviceGet(&mut device, number) })?;
        let mut name = [0u8; 128];
        // SAFETY: writes no more bytes than it is told of, and a zero among them.
        check(at, unsafe { cuDeviceGetName(name.as_mut_ptr().cast(), name.len() as c_int, device) })?;
        let name = CStr::from_bytes_until_nul(&name).unwrap_or_default().to_string_lossy().into_owned();
        let mut uuid = sys::CUuuid { bytes: [0; 16] };
        // SAFETY: writes the 16 bytes.
        check(at, unsafe { cuDeviceGetUuid(&mut uuid, device) })?;
        let uuid = Uuid(uuid.bytes.map(|byte| byte as u8));
        let mut context = std::ptr::null_mut();
        // SAFETY: writes one handle; the device was named by the driver just now.
        check(at, unsafe { cuDevicePrimaryCtxRetain(&mut context, device) })?;
        Ok(Device(Arc::new(Core { ordinal, device, context, uuid, name })))
    }

    /// Number in the driver's order, for messages; not the same in other processes.
    pub fn ordinal(&self) -> u32 {
        self.0.ordinal
    }

    /// The name to compare with other processes.
    pub fn uuid(&self) -> Uuid {
        self.0.uuid
    }

    /// The product.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// Whether both are the same device of the machine.
    pub fn is_same(&self, other: &Device) -> bool {
        Arc::ptr_eq(&self.0, &other.0) || self.0.uuid == other.0.uuid
    }

    /// Compute capability, major and minor.
    ///
    /// # Errors
    /// What the driver says.
    pub fn compute_capability(&self) -> Result<(u32, u32)> {
        use sys::CUdevice_attribute::*;
        Ok((
            self.attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            self.attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ))
    }

    /// Streaming multiprocessors.
    ///
    /// # Errors
    /// What the driver says.
    pub fn len_multiprocessors(&self) -> Result<u32> {
        self.attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)
    }

    /// Whether memory can be shared by descriptors ([`Sharing::Descriptor`](super::Sharing)).
    ///
    /// # Errors
    /// What the driver says.
    pub fn shares_descriptors(&self) -> Result<bool> {
        use sys::CUdevice_attribute::*;
        Ok(self.attribute(CU_DEVICE_ATTRIBUTE_VIRTUAL_ADDRESS_MANAGEMENT_SUPPORTED)? != 0
            && self.attribute(CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED)? != 0)
    }

    /// Whether its streams wait for words of memory and write them: what orders ranks that share one device.
    ///
    /// # Errors
    /// What the driver says.
    pub fn orders_by_memory(&self) -> Result<bool> {
        // The attribute of the 64-bit ones: the second version of the 32-bit ones, which we use, has none and comes with them,
        // and that of the first version is 0 unless an administrator turned it on (CUDA Driver API 11.8, 6.18).
        let can = self.attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_CAN_USE_64_BIT_STREAM_MEM_OPS)?;
        Ok(can != 0)
    }

    /// Free and total memory in bytes.
    ///
    /// # Errors
    /// What the driver says.
    pub fn memory_bytes(&self) -> Result<(u64, u64)> {
        self.bind()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: writes two integers.
        self.check(unsafe { cuMemGetInfo(&mut free, &mut total) })?;
        Ok((free as u64, total as u64))
    }

    pub(super) fn attribute(&self, attribute: sys::CUdevice_attribute) -> Result<u32> {
        let mut value = 0;
        // SAFETY: writes one integer; the device was named by the driver.
        self.check(unsafe { cuDeviceGetAttribute(&mut value, attribute, self.0.device) })?;
        Ok(u32::try_from(value).unwrap_or(0))
    }

    pub(super) fn raw(&self) -> sys::CUdevice {
        self.0.device
    }

    pub(super) fn context(&self) -> sys::CUcontext {
        self.0.context
    }

    /// Makes the context current to the calling thread: before every call that works in one.
    pub(super) fn bind(&self) -> Result<()> {
        // SAFETY: the context is retained while the device lives.
        self.check(unsafe { cuCtxSetCurrent(self.0.context) })
    }

    /// Fills memory with zeroes and waits until it has them. For the default stream, where that is done, and not for the
    /// context, which would end a capture on another thread.
    ///
    /// # Safety
    /// The bytes are of one live allocation that nobody else uses.
    pub(super) unsafe fn zero(&self, address: sys::CUdeviceptr, len_bytes: usize) -> Result<()> {
        self.bind()?;
        // SAFETY: the caller's promise.
        self.check(unsafe { cuMemsetD8(address, 0, len_bytes) })?;
        self.settle()
    }

    /// Waits for what was just given to the default stream, which no stream of ours waits for.
    ///
    /// # Errors
    /// [`Error::TimedOut`] if that takes more than a minute, as behind a kernel of somebody else that hangs.
    pub(super) fn settle(&self) -> Result<()> {
        // SAFETY: the current context's own default stream.
        until_ready(self, "default", Duration::from_secs(60), || unsafe { cuStreamQuery(std::ptr::null_mut()) })
    }

    pub(super) fn check(&self, answer: Answer) -> Result<()> {
        check(Some(self.0.ordinal), answer)
    }

    /// As [`check`](Device::check), for an allocation: out of memory with its numbers.
    pub(super) fn check_space(&self, what: &'static str, need_bytes: usize, answer: Answer) -> Result<()> {
        if answer.is(CUresult::CUDA_ERROR_OUT_OF_MEMORY) {
            let have_bytes = self.memory_bytes().map_or(0, |(free, _)| free);
            return Err(Error::NoSpace { what, need_bytes: need_bytes as u64, have_bytes });
        }
        self.check(answer)
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Core { ordinal, uuid, name, .. } = &*self.0;
        f.debug_struct("Device").field("ordinal", ordinal).field("name", name).field("uuid", uuid).finish()
    }
}
