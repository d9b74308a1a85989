//! Tensors on the device, as the rest of the layer sees them.

use std::time::Duration;

use crate::device;
use crate::device::cuda::{Buffer, Device, Stream, View};
use crate::dtype::DType;
use crate::error::Result;
use crate::strategy::tensor::{bytes_mut, with_element};

/// Where parameters, gradients and moments are allocated, and in which order the host reads and writes them: that of the
/// compute stream.
#[derive(Debug, Clone)]
pub(crate) struct DevicePlace {
    pub device: Device,
    pub compute: Stream,
    /// Deadline of the host's waits.
    pub timeout: Duration,
}

impl DevicePlace {
    /// Zeroes.
    pub fn alloc(&self, dtype: DType, len_elems: usize) -> Result<DeviceMemory> {
        Buffer::zeroed(&self.device, dtype, len_elems).map(|buffer| self.adopt(buffer))
    }

    /// A buffer of the place's device.
    pub fn adopt(&self, buffer: Buffer) -> DeviceMemory {
        DeviceMemory { buffer, place: self.clone() }
    }
}

/// Memory of one tensor.
#[derive(Debug)]
pub(crate) struct DeviceMemory {
    buffer: Buffer,
    place: DevicePlace,
}

impl DeviceMemory {
    pub fn dtype(&self) -> DType {
        self.buffer.dtype()
    }

    pub fn len_elems(&self) -> usize {
        self.buffer.len_elems()
    }

    pub fn view(&self) -> View {
        self.buffer.view()
    }

    pub fn place(&self) -> &DevicePlace {
        &self.place
    }

    /// Waits for the compute stream.
    pub fn copy_to_host(&self) -> Result<device::Buffer> {
        copy_to_host(&self.view(), &self.place)
    }

    /// Overwrites the elements in the order of the compute stream; `buffer` may be changed afterwards.
    pub fn copy_from_host(&self, buffer: &device::Buffer) -> Result<()> {
        with_element!(buffer.dtype(), T => self.view().write::<T>(buffer.as_slice()?, &self.place.compute))
    }
}

/// A copy of elements on the device. Waits for the compute stream.
pub(super) fn copy_to_host(view: &View, place: &DevicePlace) -> Result<device::Buffer> {
    let mut copy = device::Buffer::zeroed(view.dtype(), view.len_elems())?;
    with_element!(view.dtype(), T => view.read::<T>(copy.as_mut_slice()?, &place.compute, place.timeout))?;
    Ok(copy)
}

/// Overwrites elements on the device by the bytes of as many, in the order of the compute stream.
pub(super) fn copy_from_bytes(view: &View, bytes: &[u8], place: &DevicePlace) -> Result<()> {
    let mut aligned = device::Buffer::zeroed(view.dtype(), view.len_elems())?;
    bytes_mut(&mut aligned).copy_from_slice(bytes);
    with_element!(view.dtype(), T => view.write::<T>(aligned.as_slice()?, &place.compute))
}
