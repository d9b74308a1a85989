//! What waits for peers where no thread of this process looks at the fault cell: kernels on a device.
//!
//! The monitor visits every outpost once a beat: one that has found an error raises it for the whole job, and when the job
//! has failed, all of them are told to stop waiting.

use std::sync::{Arc, Mutex, PoisonError, Weak};

use super::board::RankState;
use super::{Core, World};
use crate::error::Error;

/// Something that waits for peers on its own.
pub(crate) trait Outpost: Send + Sync {
    /// Ends every wait there, now and in future. May be called again.
    fn abort(&self);

    /// The error that was found there, if any.
    fn look(&self) -> Option<Error>;

    /// Asked once a beat: whether operations have been waiting there for some beats and none has ended meanwhile.
    fn is_stuck(&self) -> bool;
}

/// The outposts of one rank.
#[derive(Default)]
pub(super) struct Outposts(Mutex<Vec<Weak<dyn Outpost>>>);

impl Outposts {
    fn alive(&self) -> Vec<Arc<dyn Outpost>> {
        let mut outposts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        outposts.retain(|outpost| outpost.strong_count() > 0);
        outposts.iter().filter_map(Weak::upgrade).collect()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).is_empty()
    }

    pub(super) fn abort(&self) {
        self.alive().iter().for_each(|outpost| outpost.abort());
    }
}

impl std::fmt::Debug for Outposts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Outposts").finish_non_exhaustive()
    }
}

impl World {
    /// Has `outpost` visited as long as it lives.
    pub(crate) fn watch(&self, outpost: &Arc<dyn Outpost>) {
        let mut outposts = self.core().outposts.0.lock().unwrap_or_else(PoisonError::into_inner);
        outposts.push(Arc::downgrade(outpost));
        drop(outposts);
        // It may be late.
        if self.fault().is_some() {
            outpost.abort();
        }
    }
}

impl Core {
    /// Raises what an outpost has found, and stops all of them if the job has failed.
    pub(super) fn visit_outposts(&self) {
        if self.outposts.is_empty() {
            return;
        }
        if self.fault().is_some() {
            return self.outposts.abort();
        }
        let alive = self.outposts.alive();
        if let Some(error) = alive.iter().find_map(|outpost| outpost.look()) {
            self.raise(error);
        } else if alive.iter().filter(|outpost| outpost.is_stuck()).count() > 0
            && let Some(peer) = (0..self.environment.world_size).find(|rank| self.board.state(*rank) == RankState::Left)
        {
            // Who left in peace has left them waiting all the same.
            self.raise(self.lost(peer, self.doing()));
        }
    }
}
