//! A group's area of shared memory: claimed by all together, given back by the last to leave.

use std::sync::atomic::{AtomicU32, Ordering};

use crate::error::{Error, Result};
use crate::world::{MAX_GROUPS, Region, World};

/// A group area for all ranks of `world`, with its memory, on every rank or on none. Collective.
pub(super) fn claim(world: &World) -> Result<(u32, Region)> {
    let timeout = world.options().timeout;
    let claimed = (world.rank() == 0).then(|| claim_and_reserve(world));
    let told = claimed.as_ref().map(|claimed| claimed.as_ref().ok().copied());
    let Some(group) = world.broadcast_value::<Option<u32>>(0, told, timeout)? else {
        return Err(claimed.and_then(Result::err).unwrap_or_else(none_left));
    };
    let region = world.group_area(group);
    let trouble = region.as_ref().err().map(Error::to_string).unwrap_or_default();
    let troubles = world.all_gather_bytes(trouble.as_bytes(), timeout)?;
    let first = troubles.iter().zip(0..).find(|(trouble, _)| !trouble.is_empty());
    match (region, first) {
        (Ok(region), None) => Ok((group, region)),
        (region, first) => {
            if world.rank() == 0 {
                world.release_group(group)?; // nobody has used it
            }
            let (reason, rank) =
                first.map_or((Default::default(), 0), |(text, rank)| (String::from_utf8_lossy(text), rank));
            Err(region.err().unwrap_or_else(|| Error::RankFailed { rank, reason: reason.into_owned() }))
        }
    }
}

/// A group whose area has its memory before anybody else hears of it: ranks that reserve one area at once would each count what
/// the others have reserved as missing. Where there is not enough, this rank is told when it asks for the area, as the others.
pub(super) fn claim_and_reserve(world: &World) -> Result<u32> {
    let group = world.claim_group()?;
    let _ = world.group_area(group);
    Ok(group)
}

/// Why a rank gets no area that was not asked for one itself.
pub(super) fn none_left() -> Error {
    Error::InvalidArgument {
        argument: "communicators alive",
        value: (MAX_GROUPS + 1).to_string(),
        accepted: "16 communicators at most may be alive at once",
    }
}

/// One of `members` touches the area no longer; `departed` counts them. The last one gives it back.
pub(super) fn leave(world: &World, group: u32, departed: &AtomicU32, members: u32) {
    // AcqRel: everything the others did to the area comes before it is given back.
    let is_last = departed.fetch_add(1, Ordering::AcqRel).wrapping_add(1) == members;
    if is_last && world.fault().is_none() {
        // An area that cannot be given back is one fewer to use; nothing else depends on it.
        if let Err(error) = world.release_group(group) {
            tracing::warn!(%error, group, "could not give back a communicator's area");
        }
    }
}
