//! Giving back a group's area.

use super::page::Page;
use crate::collective::membership::leave;
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
        leave(&self.world, self.group, &first.departed, self.world.world_size());
    }
}
