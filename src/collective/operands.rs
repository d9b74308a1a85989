//! What the operands of one call must have in common.

use crate::dtype::DType;
use crate::error::{Error, Result};

/// Element type and number of elements.
pub(super) type Extent = (DType, usize);

/// Fails unless the operand called `what` is as the others make it.
pub(super) fn check_extent(what: &str, (dtype, actual_elems): Extent, expected: Extent) -> Result<()> {
    let (expected, expected_elems) = expected;
    if dtype != expected {
        return Err(Error::DTypeMismatch { what: what.to_owned(), expected, actual: dtype });
    }
    if actual_elems != expected_elems {
        return Err(Error::LengthMismatch { what: what.to_owned(), expected_elems, actual_elems });
    }
    Ok(())
}

/// Elements of every rank's shard together.
pub(super) fn all_shards(shard_elems: usize, world_size: u32) -> Result<usize> {
    shard_elems.checked_mul(world_size as usize).ok_or_else(|| Error::SizeOverflow {
        what: "the shards of all ranks",
        detail: format!("{shard_elems} elements x {world_size} ranks"),
    })
}
