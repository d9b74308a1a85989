//! Where a tensor's elements are: on the host, or on the strategy's device.

use std::ops::Deref;

use super::cuda::DeviceMemory;
use crate::device::Buffer;
use crate::dtype::DType;
use crate::error::{Error, Result};

/// Memory of one tensor.
#[derive(Debug)]
pub(crate) enum Storage {
    Host(Buffer),
    Device(DeviceMemory),
}

impl From<Buffer> for Storage {
    fn from(buffer: Buffer) -> Self {
        Storage::Host(buffer)
    }
}

/// Elements on the host: the storage's own, or a copy of what is on the device.
pub(crate) enum OnHost<'s> {
    Own(&'s Buffer),
    Copy(Buffer),
}

impl Deref for OnHost<'_> {
    type Target = Buffer;

    fn deref(&self) -> &Buffer {
        match self {
            OnHost::Own(buffer) => buffer,
            OnHost::Copy(buffer) => buffer,
        }
    }
}

impl Storage {
    pub fn dtype(&self) -> DType {
        match self {
            Storage::Host(buffer) => buffer.dtype(),
            Storage::Device(memory) => memory.dtype(),
        }
    }

    pub fn len_elems(&self) -> usize {
        match self {
            Storage::Host(buffer) => buffer.len_elems(),
            Storage::Device(memory) => memory.len_elems(),
        }
    }

    /// The elements, to read on the host. Of a device they are copied, which waits for what is enqueued there.
    pub fn on_host(&self) -> Result<OnHost<'_>> {
        match self {
            Storage::Host(buffer) => Ok(OnHost::Own(buffer)),
            Storage::Device(memory) => memory.copy_to_host().map(OnHost::Copy),
        }
    }

    /// Has `fill` overwrite all elements.
    pub fn overwrite(&mut self, fill: impl FnOnce(&mut Buffer) -> Result<()>) -> Result<()> {
        match self {
            Storage::Host(buffer) => fill(buffer),
            Storage::Device(memory) => {
                let mut buffer = Buffer::zeroed(memory.dtype(), memory.len_elems())?;
                fill(&mut buffer)?;
                memory.copy_from_host(&buffer)
            }
        }
    }

    /// Has `change` change elements where it likes.
    pub fn change<R>(&mut self, change: impl FnOnce(&mut Buffer) -> Result<R>) -> Result<R> {
        match self {
            Storage::Host(buffer) => change(buffer),
            Storage::Device(memory) => {
                let mut buffer = memory.copy_to_host()?;
                let result = change(&mut buffer)?;
                memory.copy_from_host(&buffer)?;
                Ok(result)
            }
        }
    }

    /// The buffer of a tensor that must be on the host for `operation`.
    pub fn host(&self, operation: &'static str) -> Result<&Buffer> {
        match self {
            Storage::Host(buffer) => Ok(buffer),
            Storage::Device(_) => Err(on_device(operation)),
        }
    }

    /// As [`host`](Storage::host), to write.
    pub fn host_mut(&mut self, operation: &'static str) -> Result<&mut Buffer> {
        match self {
            Storage::Host(buffer) => Ok(buffer),
            Storage::Device(_) => Err(on_device(operation)),
        }
    }
}

fn on_device(operation: &'static str) -> Error {
    Error::InvalidArgument {
        argument: "tensor",
        value: format!("on a device, in {operation}"),
        accepted: "a tensor on the host; copy it with Tensor::to_host first",
    }
}
