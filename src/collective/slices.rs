//! Blocking forms on slices of any memory of this process: for small values and simple programs.
//!
//! They run on the calling thread, so a small message costs no hand-over to another thread.

use super::communicator::Communicator;
use super::descriptor::Kind;
use super::executor::Operand;
use super::operands::{all_shards, check_extent};
use super::operation::operand;
use crate::device::Buffer;
use crate::dtype::{Element, ReduceOp};
use crate::error::{Error, Result};

impl Communicator {
    /// Reduces `elements` in place.
    ///
    /// # Errors
    /// As [`all_reduce`](Communicator::all_reduce) and [`Work::wait`](super::Work::wait). After an error the elements may
    /// be partly reduced, but for [`Error::Mismatch`], which leaves them as they were.
    ///
    /// # Synchronization
    /// Blocks until done, after all operations issued before.
    pub fn all_reduce_slice<T: Element>(&mut self, elements: &mut [T], op: ReduceOp) -> Result<()> {
        let call = self.call(Kind::AllReduce, T::DTYPE, elements.len(), op, 0)?;
        let operand = output(elements);
        // SAFETY: both operands are the borrowed slice, whose length is in the call.
        unsafe { self.run_now(call, operand, operand, None) }
    }

    /// Reduces `buffer` in place; peers reach it directly if it is registered.
    ///
    /// # Errors
    /// As [`all_reduce_slice`](Communicator::all_reduce_slice). What is refused before anything happens, and
    /// [`Error::Mismatch`], leave the buffer as it was. After any other error peers may still use registered memory: the
    /// buffer is then private, and zero.
    ///
    /// # Synchronization
    /// Blocks until done, after all operations issued before.
    pub fn all_reduce_buffer(&mut self, buffer: &mut Buffer, op: ReduceOp) -> Result<()> {
        let (dtype, len_elems) = (buffer.dtype(), buffer.len_elems());
        let call = self.call(Kind::AllReduce, dtype, len_elems, op, 0)?;
        // Taken, so that neither an error nor a panic leaves the caller with memory that a peer still uses.
        let taken = std::mem::replace(buffer, Buffer::zeroed(dtype, 0)?);
        let operand = operand(&self.group, &taken, 0);
        // SAFETY: both operands are the buffer taken, whose length is in the call; it is given back only where the
        // operation has ended on every rank or began on none.
        let result = unsafe { self.run_now(call, operand, operand, Some(&**taken.memory())) };
        let is_ours = matches!(result, Ok(()) | Err(Error::Mismatch { .. }));
        if is_ours || operand.arena_offset_bytes.is_none() {
            *buffer = taken;
        } else if let Ok(zeroes) = Buffer::zeroed(dtype, len_elems) {
            *buffer = zeroes; // without memory for them it stays empty, and the error is the one above
        }
        result
    }

    /// Every rank's `elements` become those of rank `root`.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if `root` is no rank of the group; else as
    /// [`all_reduce_slice`](Communicator::all_reduce_slice).
    pub fn broadcast_slice<T: Element>(&mut self, elements: &mut [T], root: u32) -> Result<()> {
        let call = self.call(Kind::Broadcast, T::DTYPE, elements.len(), ReduceOp::Sum, root)?;
        let operand = output(elements);
        // SAFETY: both operands are the borrowed slice, whose length is in the call.
        unsafe { self.run_now(call, operand, operand, None) }
    }

    /// Gathers every rank's `src` (one shard) into `dst` (`world_size` shards, in rank order).
    ///
    /// # Errors
    /// [`Error::LengthMismatch`] if `dst` does not hold them; else as
    /// [`all_reduce_slice`](Communicator::all_reduce_slice).
    pub fn all_gather_slice<T: Element>(&mut self, src: &[T], dst: &mut [T]) -> Result<()> {
        let call = self.call(Kind::AllGather, T::DTYPE, dst.len(), ReduceOp::Sum, 0)?;
        let all_elems = all_shards(src.len(), self.world_size())?;
        check_extent("all_gather_slice: dst", (T::DTYPE, dst.len()), (T::DTYPE, all_elems))?;
        // SAFETY: the lengths were checked against each other; the input is only read.
        unsafe { self.run_now(call, input(src), output(dst), None) }
    }

    /// Reduces `src` (`world_size` shards) and leaves shard `rank` of the result in `dst` (one shard).
    ///
    /// # Errors
    /// [`Error::LengthMismatch`] if `src` is not `world_size` times `dst`; else as
    /// [`all_reduce_slice`](Communicator::all_reduce_slice).
    pub fn reduce_scatter_slice<T: Element>(&mut self, src: &[T], dst: &mut [T], op: ReduceOp) -> Result<()> {
        let call = self.call(Kind::ReduceScatter, T::DTYPE, src.len(), op, 0)?;
        let all_elems = all_shards(dst.len(), self.world_size())?;
        check_extent("reduce_scatter_slice: src", (T::DTYPE, src.len()), (T::DTYPE, all_elems))?;
        // SAFETY: the lengths were checked against each other; the input is only read.
        unsafe { self.run_now(call, input(src), output(dst), None) }
    }

    /// Blocks until every rank of the group has come to its barrier.
    ///
    /// # Errors
    /// As [`all_reduce_slice`](Communicator::all_reduce_slice).
    pub fn barrier_now(&mut self) -> Result<()> {
        let call = self.call(Kind::Barrier, crate::dtype::DType::U8, 0, ReduceOp::Sum, 0)?;
        // SAFETY: a barrier touches no operand.
        unsafe { self.run_now(call, Operand::NONE, Operand::NONE, None) }
    }
}

fn output<T: Element>(elements: &mut [T]) -> Operand {
    Operand { ptr: elements.as_mut_ptr().cast(), arena_offset_bytes: None }
}

fn input<T: Element>(elements: &[T]) -> Operand {
    Operand { ptr: elements.as_ptr().cast_mut().cast(), arena_offset_bytes: None }
}
