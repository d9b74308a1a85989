//! `kernels/table.cuh`: the list of tensors that one launch works through.

use std::mem::{offset_of, size_of};

use bytemuck::{Pod, Zeroable};

/// Elements of one chunk, the unit of work of a team of threads.
pub const CHUNK_ELEMS: usize = 32768;

/// One chunk: which tensor, and which of its chunks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Zeroable, Pod)]
#[repr(C)]
pub struct ChunkRef {
    /// Index into the launch's tensors.
    pub tensor: u32,
    /// Elements `index * CHUNK_ELEMS ..` of it.
    pub index: u32,
}

const _: () = assert!(size_of::<ChunkRef>() == 8);

/// The chunks of one launch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Zeroable, Pod)]
#[repr(C)]
pub struct ChunkRange {
    /// [`ChunkRef`]s of all tensors, tensor after tensor, in device memory.
    pub chunks: u64,
    /// The first that this launch works on.
    pub first_chunk: u64,
    /// How many it works on.
    pub len_chunks: u64,
}

const _: () = assert!(size_of::<ChunkRange>() == 24 && offset_of!(ChunkRange, len_chunks) == 16);

/// The chunks of tensors of these lengths; empty tensors have none. `None` if an index does not fit 32 bits.
pub fn chunks(lens_elems: &[u64]) -> Option<Vec<ChunkRef>> {
    let mut chunks = Vec::new();
    for (tensor, len_elems) in lens_elems.iter().enumerate() {
        let tensor = u32::try_from(tensor).ok()?;
        let len_chunks = u32::try_from(len_elems.div_ceil(CHUNK_ELEMS as u64)).ok()?;
        chunks.extend((0..len_chunks).map(|index| ChunkRef { tensor, index }));
    }
    Some(chunks)
}
