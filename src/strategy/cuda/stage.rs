//! How gradients get from where backward left them into the buckets.

use super::backend::DeviceBackend;
use super::memory::{DeviceMemory, DevicePlace};
use crate::device::cuda::{Staging, View};
use crate::dtype::{DType, Element};
use crate::error::Result;
use crate::ops::Slice;
use crate::ops::cuda::{Contribution, contribute_each};

/// Of one module's gradients.
#[derive(Debug)]
pub(super) struct Stage {
    /// For elements on the host.
    staging: Staging,
    /// Where those are put first if they must be converted or added: one for each type that came so far, as long as the
    /// longest parameter.
    landing: Vec<DeviceMemory>,
    longest_elems: usize,
}

impl Stage {
    pub fn new(place: &DevicePlace, gradients: &[View]) -> Stage {
        Stage {
            staging: Staging::new(&place.device, place.timeout),
            landing: Vec::new(),
            longest_elems: gradients.iter().map(View::len_elems).max().unwrap_or(0),
        }
    }

    /// Copies or adds a gradient on the host to `to`.
    pub fn take_host(&mut self, backend: &DeviceBackend, gradient: Slice<'_>, to: &View, replaces: bool) -> Result<()> {
        match gradient {
            Slice::F32(elements) => self.upload(backend, elements, to, replaces),
            Slice::F16(elements) => self.upload(backend, elements, to, replaces),
            Slice::BF16(elements) => self.upload(backend, elements, to, replaces),
            Slice::F64(elements) => self.upload(backend, elements, to, replaces),
        }
    }

    fn upload<T: Element>(&mut self, backend: &DeviceBackend, elements: &[T], to: &View, replaces: bool) -> Result<()> {
        if replaces && T::DTYPE == to.dtype() {
            return self.staging.upload(elements, to, backend.compute());
        }
        let landing = self.landing(backend, T::DTYPE)?.slice(0, elements.len())?;
        self.staging.upload(elements, &landing, backend.compute())?;
        take_device(backend, std::iter::once((&landing, to)), replaces)
    }

    /// One for all parameters: what is put there is used, in the order of the compute stream, before the next is.
    fn landing(&mut self, backend: &DeviceBackend, dtype: DType) -> Result<View> {
        if let Some(there) = self.landing.iter().find(|memory| memory.dtype() == dtype) {
            return Ok(there.view());
        }
        let memory = backend.place.alloc(dtype, self.longest_elems)?;
        let view = memory.view();
        self.landing.push(memory);
        Ok(view)
    }
}

/// Copies or adds gradients on the device to their places, as one launch for each 64.
pub(super) fn take_device<'v>(
    backend: &DeviceBackend,
    pairs: impl Iterator<Item = (&'v View, &'v View)> + Clone,
    replaces: bool,
) -> Result<()> {
    contribute_each(&backend.kernels, backend.compute(), pairs, contribution(replaces), 1.0)
}

const fn contribution(replaces: bool) -> Contribution {
    if replaces { Contribution::Replace } else { Contribution::Add }
}
