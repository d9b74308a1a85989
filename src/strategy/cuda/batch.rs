//! Batches on their way to the device.

use std::fmt;
use std::sync::Arc;

use super::memory::DevicePlace;
use crate::device::cuda::{Event, Staging, Stream};
use crate::error::Result;
use crate::strategy::storage::Storage;
use crate::strategy::tensor::{Tensor, with_element};

/// Moves tensors to the device of a strategy. Clones are the same.
///
/// # Synchronization
/// Tensors are copied by way of pinned memory on a stream of their own; what is enqueued on the strategy's compute stream
/// after the call runs behind the copy. The host waits for neither.
#[derive(Clone)]
pub struct BatchMover(Arc<Mover>);

struct Mover {
    place: DevicePlace,
    copies: Stream,
    staging: Staging,
}

impl BatchMover {
    pub(super) fn new(place: DevicePlace, copies: Stream) -> BatchMover {
        let staging = Staging::new(&place.device, place.timeout);
        BatchMover(Arc::new(Mover { place, copies, staging }))
    }

    /// The device's number in this process.
    pub fn ordinal(&self) -> u32 {
        self.0.place.device.ordinal()
    }

    pub(crate) fn take(&self, tensor: Tensor) -> Result<Tensor> {
        let Mover { place, copies, staging } = &*self.0;
        let Some(buffer) = tensor.buffer() else {
            return Ok(tensor); // it is there
        };
        let memory = place.alloc(tensor.dtype(), tensor.len_elems())?;
        let copied = Event::new(&place.device)?;
        with_element!(buffer.dtype(), T => staging.upload::<T>(buffer.as_slice()?, &memory.view(), copies))?;
        copies.record(&copied)?;
        place.compute.wait(&copied)?;
        Tensor::over(tensor.shape(), Storage::Device(memory))
    }
}

impl fmt::Display for BatchMover {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cuda:{}", self.ordinal())
    }
}

impl fmt::Debug for BatchMover {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
