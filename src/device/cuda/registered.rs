//! Host memory of somebody else, made reachable for a device.

use std::any::Any;
use std::ffi::c_void;
use std::ptr::NonNull;

use cudarc::driver::sys;

use super::bindings::{cuMemHostGetDevicePointer, cuMemHostRegister, cuMemHostUnregister};
use super::context::Device;
use crate::error::Result;

/// Pages of the host that kernels of a device read and write in place: memory that processes share, where their devices
/// cannot reach each other. Unregistered when dropped.
pub struct HostRange {
    device: Device,
    memory: NonNull<u8>,
    address: u64,
    len_bytes: usize,
    /// Some until it is dropped.
    owner: Option<Box<dyn Any + Send + Sync>>,
}

// SAFETY: an address; what is done with the memory behind it is argued where it is done.
unsafe impl Send for HostRange {}
// SAFETY: as for Send.
unsafe impl Sync for HostRange {}

impl HostRange {
    /// Pins the pages and maps them for `device`. `owner` keeps them mapped in this process.
    ///
    /// # Errors
    /// What the driver says: too little memory that may be locked, for one.
    ///
    /// # Safety
    /// `len_bytes` bytes from `memory` on, whole pages, are mapped as long as `owner` lives.
    pub(crate) unsafe fn register(
        device: &Device,
        memory: NonNull<u8>,
        len_bytes: usize,
        owner: Box<dyn Any + Send + Sync>,
    ) -> Result<HostRange> {
        device.bind()?;
        let place: *mut c_void = memory.as_ptr().cast();
        let flags = sys::CU_MEMHOSTREGISTER_PORTABLE | sys::CU_MEMHOSTREGISTER_DEVICEMAP;
        // SAFETY: the caller's promise; unregistered once, on drop.
        device.check(unsafe { cuMemHostRegister(place, len_bytes, flags) })?;
        let mut range = HostRange { device: device.clone(), memory, address: 0, len_bytes, owner: Some(owner) };
        // SAFETY: writes one address; the memory was registered just now.
        let asked = unsafe { cuMemHostGetDevicePointer(&mut range.address, place, 0) };
        range.device.check(asked)?;
        Ok(range)
    }

    /// Where the device finds the first byte.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Length in bytes.
    pub fn len_bytes(&self) -> usize {
        self.len_bytes
    }

    /// Drops it, and tells whether that was done: if not, the device may still use the pages, which stay as they are.
    pub(crate) fn close(mut self) -> bool {
        self.unregister()
    }

    fn unregister(&mut self) -> bool {
        let Some(owner) = self.owner.take() else { return true };
        let place = self.memory.as_ptr().expose_provenance();
        self.device.free("pinned memory of the host's", owner, move |device| {
            device.drain()?;
            // SAFETY: registered by `register`, unregistered once; what used it has ended.
            let ended = unsafe { cuMemHostUnregister(std::ptr::with_exposed_provenance_mut(place)) };
            // Nothing uses the pages any more, whatever the driver says.
            if let Err(error) = device.check(ended) {
                tracing::warn!(device = device.ordinal(), %error, "pages of the host stay pinned");
            }
            Ok(())
        })
    }
}

impl Drop for HostRange {
    fn drop(&mut self) {
        self.unregister();
    }
}

impl std::fmt::Debug for HostRange {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HostRange").field("len_bytes", &self.len_bytes).finish()
    }
}
