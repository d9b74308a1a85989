//! Streams on a device.

use std::sync::Arc;
use std::time::Duration;

use cudarc::driver::result::stream::{self, StreamKind};
use cudarc::driver::sys;

use super::context::Device;
use super::event::Event;
use super::wait::until_ready;
use crate::error::{Error, Result};

/// Whose blocks go first where streams compete for the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Priority {
    /// The device's default: compute.
    #[default]
    Normal,
    /// The device's greatest: communication, whose few blocks must not wait behind a backward pass.
    High,
}

/// Work in order on a device. Clones are the same stream; when the last one is dropped the device still finishes what it was
/// given. It never waits for the legacy default stream.
#[derive(Clone)]
pub struct Stream(Arc<Core>);

struct Core {
    device: Device,
    name: String,
    stream: sys::CUstream,
}

// SAFETY: the driver's functions on streams may be called from any thread; the handle is only passed to them.
unsafe impl Send for Core {}
// SAFETY: as for Send.
unsafe impl Sync for Core {}

impl Stream {
    /// Starts a stream; `name` appears in errors and timelines.
    ///
    /// # Errors
    /// What the driver says.
    pub fn new(device: &Device, name: &str, priority: Priority) -> Result<Stream> {
        device.bind()?;
        let (least, greatest) = device.check("cuCtxGetStreamPriorityRange", stream::get_priority_range())?;
        let priority = if priority == Priority::High { greatest } else { least };
        let made = stream::create_with_priority(StreamKind::NonBlocking, priority);
        let stream = device.check("cuStreamCreateWithPriority", made)?;
        Ok(Stream(Arc::new(Core { device: device.clone(), name: name.to_owned(), stream })))
    }

    /// The name given at creation.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// Where its work runs.
    pub fn device(&self) -> &Device {
        &self.0.device
    }

    /// Whether both are the same stream.
    pub fn is_same(&self, other: &Stream) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// Marks a point: `event` completes when everything enqueued before has run.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for an event of another device; what the driver says.
    pub fn record(&self, event: &Event) -> Result<()> {
        if !event.device().is_same(&self.0.device) {
            return Err(Error::InvalidArgument {
                argument: "event to record",
                value: format!("an event of device {}", event.device().ordinal()),
                accepted: "must be of the stream's device",
            });
        }
        self.0.device.bind()?;
        // SAFETY: both live, in one context, which is current.
        let recorded = unsafe { cudarc::driver::result::event::record(event.raw(), self.0.stream) };
        self.0.device.check("cuEventRecord", recorded)
    }

    /// Makes everything enqueued after this call run after the point that `event` has recorded last. The host does not
    /// wait.
    ///
    /// # Errors
    /// What the driver says.
    pub fn wait(&self, event: &Event) -> Result<()> {
        self.0.device.bind()?;
        let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: both live; the driver remembers the recording, so the event may be destroyed or recorded anew.
        let waits = unsafe { stream::wait_event(self.0.stream, event.raw(), flags) };
        self.0.device.check("cuStreamWaitEvent", waits)
    }

    /// Blocks the calling thread until everything enqueued so far has run.
    ///
    /// # Errors
    /// [`Error::Stream`] after `timeout`; what the device failed with.
    pub fn synchronize(&self, timeout: Duration) -> Result<()> {
        self.0.device.bind()?;
        // SAFETY: the stream lives as long as `self`.
        let ask = || unsafe { sys::cuStreamQuery(self.0.stream) }.result();
        until_ready(&self.0.device, &self.0.name, "cuStreamQuery", timeout, ask)
    }

    pub(super) fn raw(&self) -> sys::CUstream {
        self.0.stream
    }
}

impl Drop for Core {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: the last owner; returns at once, and the driver finishes the stream's work first.
            let _ = unsafe { stream::destroy(self.stream) };
        }
    }
}

impl std::fmt::Debug for Stream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Stream").field("name", &self.0.name).field("device", &self.0.device.ordinal()).finish()
    }
}
