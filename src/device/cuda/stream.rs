//! Streams on a device.

use std::any::Any;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use cudarc::driver::sys;

use super::bindings::{
    cuCtxGetStreamPriorityRange, cuEventRecord, cuStreamCreateWithPriority, cuStreamDestroy, cuStreamQuery,
    cuStreamWaitEvent, cuStreamWaitValue32, cuStreamWriteValue32,
};
use super::context::Device;
use super::event::{Event, check_recording};
use super::graph::Capture;
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
    /// The capture that the stream takes part in, or took. Locked while work is enqueued, so that none gets into a capture
    /// unseen.
    capture: Mutex<Option<Capture>>,
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
        let (mut least, mut greatest) = (0, 0);
        // SAFETY: writes two integers.
        device.check(unsafe { cuCtxGetStreamPriorityRange(&mut least, &mut greatest) })?;
        let priority = if priority == Priority::High { greatest } else { least };
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        let mut stream = std::ptr::null_mut();
        // SAFETY: writes one handle.
        device.check(unsafe { cuStreamCreateWithPriority(&mut stream, flags, priority) })?;
        Ok(Stream(Arc::new(Core { device: device.clone(), name: name.to_owned(), stream, capture: Mutex::new(None) })))
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
    /// [`Error::InvalidArgument`] for an event of another device; [`Error::Capture`] if another thread captures on the
    /// stream; what the driver says.
    pub fn record(&self, event: &Event) -> Result<()> {
        if !event.device().is_same(&self.0.device) {
            return Err(Error::InvalidArgument {
                argument: "event to record",
                value: format!("an event of device {}", event.device().ordinal()),
                accepted: "must be of the stream's device",
            });
        }
        let access = self.access()?;
        let mut capture = event.slot();
        // SAFETY: both live, in one context, which is current.
        self.0.device.check(unsafe { cuEventRecord(event.raw(), access.raw()) })?;
        *capture = access.capture.clone();
        Ok(())
    }

    /// Makes everything enqueued after this call run after the point that `event` has recorded last. The host does not
    /// wait. If the event was recorded in a capture, the stream joins it.
    ///
    /// # Errors
    /// [`Error::Capture`] if the stream is in a capture and the event's point is not, or one is in another thread's, or the event
    /// was recorded in one that is over; what the driver says.
    pub fn wait(&self, event: &Event) -> Result<()> {
        let mut access = self.access()?;
        let capture = event.slot();
        let capture = capture.as_ref();
        check_recording(&self.0.device, capture, "cuStreamWaitEvent")?;
        self.check_thread(capture)?;
        let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT as u32;
        // SAFETY: both live; the driver remembers the recording, so the event may be destroyed or recorded anew.
        self.0.device.check(unsafe { cuStreamWaitEvent(access.raw(), event.raw(), flags) })?;
        if let Some(capture) = capture {
            access.join(capture);
        }
        Ok(())
    }

    /// Blocks the calling thread until everything enqueued so far has run.
    ///
    /// # Errors
    /// [`Error::TimedOut`] after `timeout`; [`Error::Capture`] if the stream captures; what the device failed with.
    pub fn synchronize(&self, timeout: Duration) -> Result<()> {
        self.access()?.check_eager("cuStreamQuery")?;
        // SAFETY: the stream lives as long as `self`.
        let ask = || unsafe { cuStreamQuery(self.0.stream) };
        until_ready(&self.0.device, &self.0.name, timeout, ask)
    }

    /// Whether everything enqueued so far has run. While it asks, no capture begins on the stream, which would be ended by that.
    ///
    /// # Errors
    /// [`Error::Capture`] if the stream captures; what the device failed with.
    pub(crate) fn has_run(&self) -> Result<bool> {
        let access = self.access()?;
        access.check_eager("cuStreamQuery")?;
        // SAFETY: a live stream, in the current context.
        let answer = unsafe { cuStreamQuery(access.raw()) };
        if answer.is(sys::CUresult::CUDA_ERROR_NOT_READY) {
            return Ok(false);
        }
        self.0.device.check(answer).map(|()| true)
    }

    /// Makes everything enqueued after this call run when the u32 at `address` has reached `value`, on the circle. No kernel
    /// waits meanwhile, and neither does the host.
    ///
    /// # Errors
    /// [`Error::Capture`] if the stream captures; what the driver says.
    ///
    /// # Safety
    /// `address` is of a u32 that this device reaches, until the wait is over.
    pub(crate) unsafe fn wait_value(&self, address: u64, value: u32) -> Result<()> {
        let access = self.access()?;
        access.check_eager("cuStreamWaitValue32")?;
        let until = sys::CUstreamWaitValue_flags_enum::CU_STREAM_WAIT_VALUE_GEQ as u32;
        // SAFETY: a live stream; the address is the caller's promise.
        self.0.device.check(unsafe { cuStreamWaitValue32(access.raw(), address, value, until) })
    }

    /// Has `value` written to the u32 at `address` when everything enqueued before has run.
    ///
    /// # Errors
    /// As [`wait_value`](Stream::wait_value).
    ///
    /// # Safety
    /// `address` is of a u32 that this device reaches, until the stream has come there.
    pub(crate) unsafe fn write_value(&self, address: u64, value: u32) -> Result<()> {
        let access = self.access()?;
        access.check_eager("cuStreamWriteValue32")?;
        let flags = sys::CUstreamWriteValue_flags_enum::CU_STREAM_WRITE_VALUE_DEFAULT as u32;
        // SAFETY: a live stream; the address is the caller's promise.
        self.0.device.check(unsafe { cuStreamWriteValue32(access.raw(), address, value, flags) })
    }

    /// Refuses `operation`, which cannot be part of a graph, if the stream captures.
    ///
    /// # Errors
    /// [`Error::Capture`] then; what the driver says.
    pub(crate) fn check_eager(&self, operation: &'static str) -> Result<()> {
        self.access()?.check_eager(operation)
    }

    /// For enqueueing: makes the context current and locks the stream.
    ///
    /// # Errors
    /// [`Error::Capture`] if another thread captures on the stream; what the driver says.
    pub(super) fn access(&self) -> Result<Access<'_>> {
        self.0.device.bind()?;
        let mut capture = self.slot();
        if capture.as_ref().is_some_and(|capture| !capture.is_open()) {
            *capture = None;
        }
        self.check_thread(capture.as_ref())?;
        Ok(Access { stream: self, capture })
    }

    /// The capture in progress that the stream takes part in.
    pub(crate) fn open_capture(&self) -> Option<Capture> {
        self.slot().clone().filter(Capture::is_open)
    }

    fn slot(&self) -> MutexGuard<'_, Option<Capture>> {
        self.0.capture.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn check_thread(&self, capture: Option<&Capture>) -> Result<()> {
        if capture.is_some_and(|capture| !capture.is_of_this_thread()) {
            let reason = format!("another thread captures on stream {}, or the event's", self.0.name);
            return Err(Error::Capture { device: self.0.device.ordinal(), operation: "enqueueing", reason });
        }
        Ok(())
    }
}

/// The right to enqueue on a stream. As long as it is held, the stream neither enters nor leaves a capture by others.
pub(super) struct Access<'s> {
    stream: &'s Stream,
    capture: MutexGuard<'s, Option<Capture>>,
}

impl Access<'_> {
    pub(super) fn raw(&self) -> sys::CUstream {
        self.stream.0.stream
    }

    /// As [`Stream::keep`].
    pub(super) fn keep<T: Clone + Any + Send + Sync>(&self, owner: &T) {
        if let Some(capture) = &*self.capture {
            capture.keep(owner);
        }
    }

    pub(super) fn join(&mut self, capture: &Capture) {
        *self.capture = Some(capture.clone());
    }

    /// Refuses `operation`, which cannot be part of a graph, in a capture.
    pub(super) fn check_eager(&self, operation: &'static str) -> Result<()> {
        if self.capture.is_some() {
            let Core { device, name, .. } = &*self.stream.0;
            let reason = format!("stream {name} captures");
            return Err(Error::Capture { device: device.ordinal(), operation, reason });
        }
        Ok(())
    }
}

impl Drop for Core {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: the last owner; returns at once, and the driver finishes the stream's work first.
            let _ = unsafe { cuStreamDestroy(self.stream) };
        }
    }
}

impl std::fmt::Debug for Stream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Stream").field("name", &self.0.name).field("device", &self.0.device.ordinal()).finish()
    }
}
