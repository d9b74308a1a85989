//! A device that is set up: kernels loaded, one stream.

use std::time::Duration;

use annulus::DType;
use annulus::device::cuda::{Buffer, Device, Driver, Kernels, Priority, Stream, View};

use crate::Result;
use crate::tensor::Tensor;
use crate::with_float;

/// Longest that the host waits for work here. The virtual GPU needs it.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Elements around a tensor that nobody may touch, and what they hold.
const CANARY_ELEMS: usize = 64;
const CANARY: f64 = 77.0;

/// A device, its kernels and a stream.
pub struct Site {
    /// The device.
    pub device: Device,
    /// Its kernels.
    pub kernels: Kernels,
    /// Where work is enqueued.
    pub stream: Stream,
}

impl Site {
    /// Device 0 of the driver.
    ///
    /// # Errors
    /// No driver, no device, or what the driver says.
    pub fn open() -> Result<Site> {
        let device = Driver::open()?.device(0)?;
        let kernels = Kernels::load(&device)?;
        let stream = Stream::new(&device, "pack", Priority::Normal)?;
        Ok(Site { device, kernels, stream })
    }

    /// Waits for what is enqueued.
    ///
    /// # Errors
    /// What the device failed with, or that it did not end in time.
    pub fn synchronize(&self) -> Result<()> {
        Ok(self.stream.synchronize(PATIENCE)?)
    }

    /// A copy of `tensor` on the device that begins `shift_elems` behind a multiple of 64 elements, between canaries.
    ///
    /// # Errors
    /// What the driver says.
    pub fn place(&self, tensor: &Tensor, shift_elems: usize) -> Result<Placed> {
        let (dtype, first) = (tensor.dtype(), CANARY_ELEMS + shift_elems);
        let mut framed = Tensor::from_fn(dtype, first + tensor.len_elems() + CANARY_ELEMS, |_| CANARY);
        with_float!(dtype, T => {
            framed.elements_mut::<T>()[first..first + tensor.len_elems()].copy_from_slice(tensor.elements::<T>());
        });
        let buffer = Buffer::zeroed(&self.device, dtype, framed.len_elems())?;
        with_float!(dtype, T => buffer.view().write(framed.elements::<T>(), &self.stream))?;
        let view = buffer.view().slice(first, tensor.len_elems())?;
        Ok(Placed { buffer, view, first })
    }

    /// As [`Site::place`], of zeroes.
    ///
    /// # Errors
    /// What the driver says.
    pub fn place_zeros(&self, dtype: DType, len_elems: usize, shift_elems: usize) -> Result<Placed> {
        self.place(&Tensor::zeros(dtype, len_elems), shift_elems)
    }

    /// Reads a tensor back.
    ///
    /// # Errors
    /// What the driver says; a canary that was touched.
    pub fn fetch(&self, placed: &Placed) -> Result<Tensor> {
        let dtype = placed.view.dtype();
        let mut framed = Tensor::zeros(dtype, placed.buffer.len_elems());
        let mut tensor = Tensor::zeros(dtype, placed.view.len_elems());
        with_float!(dtype, T => {
            placed.buffer.view().read(framed.elements_mut::<T>(), &self.stream, PATIENCE)?;
            let elements = framed.elements::<T>();
            let end = placed.first + tensor.len_elems();
            tensor.elements_mut::<T>().copy_from_slice(&elements[placed.first..end]);
            let canary = <T as annulus::Element>::from_f64(CANARY);
            let touched = (0..elements.len()).filter(|i| !(placed.first..end).contains(i)).find(|i| elements[*i] != canary);
            if let Some(at) = touched {
                let from_start = at as i64 - placed.first as i64;
                return Err(format!("element {from_start}, outside the {} of the tensor, was written", tensor.len_elems()).into());
            }
        });
        Ok(tensor)
    }
}

/// A tensor on the device, between canaries.
pub struct Placed {
    buffer: Buffer,
    /// The tensor without its canaries.
    pub view: View,
    first: usize,
}
