//! A virtual GPU with its kernels and a stream, and tensors that go there and back.

use std::time::Duration;

use annulus::device::cuda::{Buffer, Device, Driver, Kernels, Priority, Stream, View};
use annulus::{DType, Element};

use super::tensors::Tensor;

pub const PATIENCE: Duration = Duration::from_secs(60);

pub struct Gpu {
    pub kernels: Kernels,
    pub stream: Stream,
}

impl Gpu {
    pub fn new() -> Gpu {
        Gpu::number(0)
    }

    pub fn number(ordinal: u32) -> Gpu {
        let device = Driver::open().unwrap().device(ordinal).unwrap();
        let stream = Stream::new(&device, "test", Priority::Normal).unwrap();
        Gpu { kernels: Kernels::load(&device).unwrap(), stream }
    }

    pub fn device(&self) -> &Device {
        self.kernels.device()
    }

    /// The tensor, `offset_elems` behind a multiple of 256 bytes.
    pub fn place_at(&self, tensor: &Tensor, offset_elems: usize) -> View {
        fn upload<T: Element>(device: &Device, elements: &[T], offset_elems: usize) -> View {
            let mut padded = vec![T::from_f64(7.0); offset_elems];
            padded.extend_from_slice(elements);
            let buffer = Buffer::filled(device, &padded).unwrap();
            buffer.view().slice(offset_elems, elements.len()).unwrap()
        }
        match tensor {
            Tensor::F32(elements) => upload(self.device(), elements, offset_elems),
            Tensor::F16(elements) => upload(self.device(), elements, offset_elems),
            Tensor::BF16(elements) => upload(self.device(), elements, offset_elems),
            Tensor::F64(elements) => upload(self.device(), elements, offset_elems),
        }
    }

    pub fn place(&self, tensor: &Tensor) -> View {
        self.place_at(tensor, 0)
    }

    pub fn write(&self, view: &View, tensor: &Tensor) {
        match tensor {
            Tensor::F32(elements) => view.write(elements, &self.stream),
            Tensor::F16(elements) => view.write(elements, &self.stream),
            Tensor::BF16(elements) => view.write(elements, &self.stream),
            Tensor::F64(elements) => view.write(elements, &self.stream),
        }
        .unwrap();
    }

    pub fn read(&self, view: &View) -> Tensor {
        fn download<T: Element>(view: &View, stream: &Stream) -> Vec<T> {
            let mut elements = vec![T::from_f64(0.0); view.len_elems()];
            view.read(&mut elements, stream, PATIENCE).unwrap();
            elements
        }
        match view.dtype() {
            DType::F16 => Tensor::F16(download(view, &self.stream)),
            DType::BF16 => Tensor::BF16(download(view, &self.stream)),
            DType::F64 => Tensor::F64(download(view, &self.stream)),
            _ => Tensor::F32(download(view, &self.stream)),
        }
    }
}
