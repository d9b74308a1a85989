//! Giving back a group's area.

use std::sync::atomic::Ordering;

use super::page::Page;
use crate::world::{Region, World};

/// A rank's part in a group's area, given back when the last rank leaves.
pub(super) struct Leaver {
    pub(super) world: World,
    pub(super) group: u32,
    pub(super) region: Region,
    pub(super) leaves: bool,
}

impl Drop for Leaver {
    fn drop(&mut self) {
        if !self.leaves {
            return;
        }
        // SAFETY: the region is the group's, and `world` is alive.
        let first = unsafe { Page::of(self.region, 0) };
        // AcqRel: everything the others did to the area comes before it is given back.
        let departed = first.departed.fetch_add(1, Ordering::AcqRel) + 1;
        if departed == self.world.world_size() && self.world.fault().is_none() {
            // An area that cannot be given back is one fewer to use; nothing else depends on it.
            if let Err(error) = self.world.release_group(self.group) {
                tracing::warn!(%error, group = self.group, "could not give back a communicator's area");
            }
        }
    }
}
