//! Where a strategy allocates: the host's arena, or its device's.

use super::cuda::DevicePlace;
use super::storage::Storage;
use crate::device::Arena;
use crate::dtype::DType;
use crate::error::Result;

/// Memory of a strategy. Clones are the same.
#[derive(Clone)]
pub(crate) enum Place {
    /// Memory that the host's peers reach.
    Host(Arena),
    Device(DevicePlace),
}

impl Place {
    /// Zeroes, in memory that was not used before; else what was left there.
    pub fn alloc(&self, dtype: DType, len_elems: usize) -> Result<Storage> {
        match self {
            Place::Host(arena) => arena.alloc(dtype, len_elems).map(Storage::Host),
            Place::Device(place) => place.alloc(dtype, len_elems).map(Storage::Device),
        }
    }
}
