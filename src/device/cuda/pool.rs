//! Memory for what comes and goes with every step, such as batches: to free it is to wait for the device, and new memory is
//! zeroed first.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::buffer::{Buffer, Memory};
use super::context::Device;
use super::event::Event;
use super::stream::Stream;
use crate::dtype::DType;
use crate::error::{Error, Result};

/// Blocks of one length that the device may still use before one of them is given out again.
const SPARE_BLOCKS: usize = 2;
/// The shortest block.
const LEAST_BYTES: usize = 256;

/// Private memory of one device that is used again once its buffers and their views are gone. Blocks are powers of two long, so
/// that lengths which vary a little share them. They are freed with the pool; when memory runs out, those that nobody holds.
pub struct Pool {
    device: Device,
    blocks: Mutex<Blocks>,
    /// Who makes room for a block: one at a time, or each would miss what another frees.
    makes_room: Mutex<()>,
}

#[derive(Default)]
struct Blocks {
    held: Vec<Block>,
    /// That nobody holds, the one held longest ago first.
    spare: Vec<Block>,
}

struct Block {
    memory: Arc<dyn Memory>,
    len_bytes: usize,
    /// Recorded once nobody held it any more.
    used: Event,
}

impl Pool {
    /// A pool without memory.
    pub fn new(device: &Device) -> Pool {
        Pool { device: device.clone(), blocks: Mutex::default(), makes_room: Mutex::default() }
    }

    /// A buffer of anything, to be written in the order of `writer`: behind what `user` was given by the time that the memory
    /// was found to be held by nobody, which is in calls like this.
    ///
    /// # Errors
    /// [`Error::SizeOverflow`]; [`Error::NoSpace`]; what the driver says.
    ///
    /// # Synchronization
    /// Waits for nothing, unless memory has to be allocated, or freed before that; calls for blocks that there are do not wait
    /// for one that does. Who uses a buffer on other streams than
    /// `user` keeps it, or has `user` wait for them, before it is dropped.
    pub fn take(&self, dtype: DType, len_elems: usize, user: &Stream, writer: &Stream) -> Result<Buffer> {
        let need_bytes = dtype.bytes_of(len_elems)?.max(LEAST_BYTES);
        let len_bytes = need_bytes.checked_next_power_of_two().ok_or_else(|| Error::SizeOverflow {
            what: "a block of a pool",
            detail: format!("{need_bytes} bytes, rounded up to a power of two"),
        })?;
        let mut blocks = self.lock();
        blocks.retire(user)?;
        let block = match blocks.choose(len_bytes) {
            Some(at) => {
                let block = blocks.spare.remove(at);
                writer.wait(&block.used)?;
                block
            }
            None => {
                drop(blocks);
                let block = self.allocate(len_bytes)?;
                blocks = self.lock();
                block
            }
        };
        let buffer = Buffer::over(Arc::clone(&block.memory), dtype, len_elems);
        blocks.held.push(block);
        Ok(buffer)
    }

    /// A new block, in place of all spare ones if there is no room beside them.
    fn allocate(&self, len_bytes: usize) -> Result<Block> {
        let allocate = || Buffer::zeroed(&self.device, DType::U8, len_bytes);
        let memory = match allocate() {
            Err(Error::NoSpace { .. }) => {
                let _alone = self.makes_room.lock().unwrap_or_else(PoisonError::into_inner);
                let spare = std::mem::take(&mut self.lock().spare);
                drop(spare); // without the lock: it waits for the device
                allocate()
            }
            other => other,
        };
        Ok(Block { memory: memory?.into_memory(), len_bytes, used: Event::new(&self.device)? })
    }

    fn lock(&self) -> MutexGuard<'_, Blocks> {
        self.blocks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pool").field("device", &self.device.ordinal()).finish_non_exhaustive()
    }
}

impl Blocks {
    /// Finds out what nobody holds any more.
    fn retire(&mut self, user: &Stream) -> Result<()> {
        let mut at = 0;
        while at < self.held.len() {
            if Arc::get_mut(&mut self.held[at].memory).is_none() {
                at += 1;
                continue;
            }
            user.record(&self.held[at].used)?;
            let block = self.held.swap_remove(at);
            self.spare.push(block);
        }
        Ok(())
    }

    /// A spare block of this length: one that the device is done with, or else the first of many.
    fn choose(&self, len_bytes: usize) -> Option<usize> {
        let mut fitting = (0..self.spare.len()).filter(|at| self.spare[*at].len_bytes == len_bytes);
        let count = fitting.clone().count();
        let done = fitting.clone().find(|at| self.spare[*at].used.is_complete());
        done.or_else(|| fitting.next().filter(|_| count >= SPARE_BLOCKS))
    }
}
