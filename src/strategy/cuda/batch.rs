//! Batches on their way to the device.

use std::fmt;
use std::sync::Arc;

use super::memory::DevicePlace;
use crate::device::cuda::{Event, Pool, Staging, Stream};
use crate::error::Result;
use crate::strategy::storage::Storage;
use crate::strategy::tensor::{Tensor, with_element};
use crate::telemetry::nvtx;

/// Moves tensors to the device of a strategy. Clones are the same.
///
/// # Synchronization
/// Tensors are copied by way of pinned memory on a stream of their own; what is enqueued on the strategy's compute stream
/// after the call runs behind the copy. The host waits for neither, unless eight copies are under way: then until the first has
/// run. Memory of tensors that were dropped is written anew behind what the compute stream was given before: who reads a tensor
/// on another stream has the compute stream wait for that.
#[derive(Clone)]
pub struct BatchMover(Arc<Mover>);

struct Mover {
    place: DevicePlace,
    copies: Stream,
    staging: Staging,
    pool: Pool,
    copied: Event,
}

impl BatchMover {
    pub(super) fn new(place: DevicePlace, copies: Stream) -> Result<BatchMover> {
        let staging = Staging::new(&place.device, place.timeout);
        let (pool, copied) = (Pool::new(&place.device), Event::new(&place.device)?);
        Ok(BatchMover(Arc::new(Mover { place, copies, staging, pool, copied })))
    }

    /// The device's number in this process.
    pub fn ordinal(&self) -> u32 {
        self.0.place.device.ordinal()
    }

    pub(crate) fn take(&self, tensor: Tensor) -> Result<Tensor> {
        let Mover { place, copies, staging, pool, copied } = &*self.0;
        let Some(buffer) = tensor.buffer() else {
            return Ok(tensor); // it is there
        };
        let _range = nvtx::range("batch to device", 0);
        let memory = place.adopt(pool.take(tensor.dtype(), tensor.len_elems(), &place.compute, copies)?);
        with_element!(buffer.dtype(), T => staging.upload::<T>(buffer.as_slice()?, &memory.view(), copies))?;
        copies.record(copied)?;
        place.compute.wait(copied)?;
        Ok(tensor.moved_to(Storage::Device(memory)))
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
