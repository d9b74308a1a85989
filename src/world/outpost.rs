//! What waits for peers where no thread of this process looks at the fault cell: kernels on a device.
//!
//! The monitor visits every outpost once a beat: one that has found an error raises it for the whole job, and when the job
//! has failed, all of them are told to stop waiting.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

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
pub(super) struct Outposts(Mutex<Vec<Arc<dyn Outpost>>>);

impl Outposts {
    fn lock(&self) -> MutexGuard<'_, Vec<Arc<dyn Outpost>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn abort(&self) {
        self.lock().iter().for_each(|outpost| outpost.abort());
    }

    /// What one of them has found; else whether any is stuck.
    fn look(&self) -> (Option<Error>, bool) {
        let outposts = self.lock();
        match outposts.iter().find_map(|outpost| outpost.look()) {
            Some(error) => (Some(error), false),
            None => (None, outposts.iter().filter(|outpost| outpost.is_stuck()).count() > 0), // each counts its beats
        }
    }
}

impl std::fmt::Debug for Outposts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Outposts").finish_non_exhaustive()
    }
}

/// Has an outpost visited until this is dropped. Then no visit goes on, and none comes: what the outpost looks at may go, and
/// whoever drops it frees it, which waits for a device. The monitor must not: it beats.
pub(crate) struct Watch {
    world: World,
    outpost: Arc<dyn Outpost>,
}

impl World {
    pub(crate) fn watch(&self, outpost: Arc<dyn Outpost>) -> Watch {
        self.core().outposts.lock().push(Arc::clone(&outpost));
        // It may be late.
        if self.fault().is_some() {
            outpost.abort();
        }
        Watch { world: self.clone(), outpost }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.world.core().outposts.lock().retain(|other| !Arc::ptr_eq(other, &self.outpost));
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
