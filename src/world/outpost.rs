//! What waits for peers where no thread of this process looks at the fault cell: kernels on a device.
//!
//! The monitor visits every outpost once a beat: one that has found an error raises it for the whole job, and when the job
//! has failed, all of them are told to stop waiting.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

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
    fn lock(&self) -> MutexGuard<'_, Vec<Weak<dyn Outpost>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn abort(&self) {
        self.lock().iter().filter_map(Weak::upgrade).for_each(|outpost| outpost.abort());
    }

    /// What one of them has found; else whether any is stuck.
    fn look(&self) -> (Option<Error>, bool) {
        let mut outposts = self.lock();
        outposts.retain(|outpost| outpost.strong_count() > 0);
        let alive = || outposts.iter().filter_map(Weak::upgrade);
        match alive().find_map(|outpost| outpost.look()) {
            Some(error) => (Some(error), false),
            None => (None, alive().filter(|outpost| outpost.is_stuck()).count() > 0), // each counts its beats
        }
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
        self.core().outposts.lock().push(Arc::downgrade(outpost));
        // It may be late.
        if self.fault().is_some() {
            outpost.abort();
        }
    }
}

impl Core {
    /// Raises what an outpost has found, and stops all of them if the job has failed.
    pub(super) fn visit_outposts(&self) {
        if self.outposts.lock().is_empty() {
            return;
        }
        if self.fault().is_some() {
            return self.outposts.abort();
        }
        let (found, any_stuck) = self.outposts.look();
        if let Some(error) = found {
            self.raise(error);
        } else if any_stuck
            && let Some(peer) = (0..self.environment.world_size).find(|rank| self.board.state(*rank) == RankState::Left)
        {
            // Who left in peace has left them waiting all the same.
            self.raise(self.lost(peer, self.doing()));
        }
    }
}
