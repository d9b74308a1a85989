//! Pinned blocks by way of which elements in ordinary memory reach a device without the host waiting for the copy.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use super::bindings::cuMemcpyHtoDAsync;
use super::buffer::{Pinned, View};
use super::context::Device;
use super::event::Event;
use super::stream::Stream;
use crate::dtype::Element;
use crate::error::Result;

/// Blocks in use at once before a new copy waits for an old one.
const MAX_BLOCKS: usize = 8;
/// Blocks are whole multiples of it, so that tensors of nearly the same size share them.
const GRANULE_BYTES: usize = 64 << 10;

/// Reusable pinned memory of one device.
#[derive(Debug)]
pub struct Staging {
    device: Device,
    timeout: Duration,
    /// The one used longest ago first.
    blocks: Mutex<Vec<Block>>,
}

#[derive(Debug)]
struct Block {
    pinned: Pinned,
    /// The last copy out of it has ended.
    copied: Event,
}

impl Staging {
    /// For copies to `device`. `timeout` is the longest that a copy waits for a block.
    pub fn new(device: &Device, timeout: Duration) -> Staging {
        Staging { device: device.clone(), timeout, blocks: Mutex::new(Vec::new()) }
    }

    /// Copies `elements` to `dst` in the order of `stream`. They may be changed when the call returns.
    ///
    /// # Errors
    /// [`Error::DTypeMismatch`](crate::Error::DTypeMismatch) and [`Error::LengthMismatch`](crate::Error::LengthMismatch);
    /// [`Error::InvalidArgument`](crate::Error::InvalidArgument) for a stream of another device;
    /// [`Error::NoSpace`](crate::Error::NoSpace) for the block; what the driver says.
    ///
    /// # Synchronization
    /// Does not wait for the copy. Waits for an earlier one if eight are in flight.
    pub fn upload<T: Element>(&self, elements: &[T], dst: &View, stream: &Stream) -> Result<()> {
        dst.check_like(T::DTYPE, elements.len())?;
        dst.check_stream(stream)?;
        if elements.is_empty() {
            return Ok(());
        }
        let bytes: &[u8] = bytemuck::cast_slice(elements);
        let mut blocks = self.blocks.lock().unwrap_or_else(PoisonError::into_inner);
        let block = self.take(&mut blocks, bytes.len())?;
        let start = block.pinned.as_ptr().as_ptr();
        // SAFETY: the block holds as many bytes and no copy reads it any more; the exclusive borrow of the blocks makes this
        // the one writer.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), start, bytes.len()) };
        let access = stream.access()?;
        access.check_eager("cuMemcpyHtoDAsync")?;
        // SAFETY: `dst` has room for these bytes; the block stays as it is until `copied`, and is freed by the driver behind
        // the copy.
        let copied = unsafe { cuMemcpyHtoDAsync(dst.address(), start.cast(), bytes.len(), access.raw()) };
        drop(access);
        let recorded = self.device.check(copied).and_then(|()| stream.record(&block.copied));
        recorded?; // what a copy may read and nobody can ask for is freed behind it
        blocks.push(block);
        Ok(())
    }

    /// A block of at least `len_bytes` that no copy reads.
    fn take(&self, blocks: &mut Vec<Block>, len_bytes: usize) -> Result<Block> {
        let fits = |block: &Block| block.pinned.len_bytes() >= len_bytes;
        if let Some(free) = blocks.iter().position(|block| fits(block) && block.copied.was_reached()) {
            return Ok(blocks.remove(free));
        }
        if blocks.len() == MAX_BLOCKS {
            let block = blocks.remove(blocks.iter().position(fits).unwrap_or(0));
            block.copied.synchronize(self.timeout)?;
            if fits(&block) {
                return Ok(block);
            }
        }
        let whole = len_bytes.checked_next_multiple_of(GRANULE_BYTES).unwrap_or(len_bytes);
        Ok(Block { pinned: Pinned::zeroed(&self.device, whole)?, copied: Event::new(&self.device)? })
    }
}
