//! The arena: where registered buffers come from.

use std::ptr::NonNull;
use std::sync::Arc;

use super::buffer::{Buffer, Memory};
use crate::dtype::DType;
use crate::error::Result;
use crate::world::{ArenaRange, World};

/// This rank's memory that peers reach directly. Handles are cheap; all of one world allocate from the same memory, whose
/// limit is [`WorldOptions::arena_bytes`](crate::world::WorldOptions::arena_bytes). Buffers are whole pages: make few
/// and large ones.
#[derive(Debug, Clone)]
pub struct Arena {
    world: World,
}

impl Arena {
    /// The arena of this rank of `world`.
    pub fn new(world: &World) -> Arena {
        Arena { world: world.clone() }
    }

    /// A registered buffer of zeroes. Its memory is reserved now, so that using it cannot fail later, and given back
    /// when the buffer is dropped.
    ///
    /// # Errors
    /// [`Error::NoSpace`](crate::Error::NoSpace) if the arena or the machine has too little memory left;
    /// [`Error::SizeOverflow`](crate::Error::SizeOverflow).
    pub fn alloc(&self, dtype: DType, len_elems: usize) -> Result<Buffer> {
        let range = self.world.reserve_arena(dtype.bytes_of(len_elems)?)?;
        Buffer::over(Arc::new(Registered(range)), dtype, len_elems)
    }

    /// Bytes taken by live buffers.
    pub fn used_bytes(&self) -> usize {
        self.world.arena_used_bytes()
    }
}

struct Registered(ArenaRange);

impl Memory for Registered {
    fn as_ptr(&self) -> NonNull<u8> {
        self.0.as_ptr()
    }

    fn len_bytes(&self) -> usize {
        self.0.len_bytes()
    }

    fn registration(&self) -> Option<(&World, usize)> {
        Some((self.0.world(), self.0.offset_bytes()))
    }

    fn abandon(&self) {
        self.0.abandon();
    }
}
