//! Whether kernels of one device may reach the memory of another.

use cudarc::driver::sys::CUresult;

use super::bindings::{cuCtxEnablePeerAccess, cuDeviceCanAccessPeer};
use super::context::Device;
use crate::error::Result;

/// What the driver says about a pair. It can be wrong: see [`probe_pair`](super::probe_pair).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PeerAccess {
    /// One device, which several ranks may share.
    Same,
    /// Its kernels can reach the other's memory.
    Direct,
    /// They cannot: bytes must go through the host.
    None,
}

impl Device {
    /// What the driver says about kernels of this device and memory of `other`.
    ///
    /// # Errors
    /// What the driver says.
    pub fn peer_access(&self, other: &Device) -> Result<PeerAccess> {
        if self.is_same(other) {
            return Ok(PeerAccess::Same);
        }
        let mut possible = 0;
        // SAFETY: writes one integer; both devices were named by the driver.
        self.check(unsafe { cuDeviceCanAccessPeer(&mut possible, self.raw(), other.raw()) })?;
        Ok(if possible != 0 { PeerAccess::Direct } else { PeerAccess::None })
    }

    /// Lets kernels of this device reach memory of `other` in this process. Doing it again is no error; one device needs
    /// nothing.
    ///
    /// # Errors
    /// What the driver says.
    pub fn enable_peer(&self, other: &Device) -> Result<()> {
        if self.is_same(other) {
            return Ok(());
        }
        self.bind()?;
        // SAFETY: both contexts are retained.
        let enabled = unsafe { cuCtxEnablePeerAccess(other.context(), 0) };
        if enabled.is(CUresult::CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED) { Ok(()) } else { self.check(enabled) }
    }
}
