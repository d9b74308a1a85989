//! Vector clocks: how much of every strand is known to have happened.

use std::sync::Arc;

/// What runs in an order of its own: a stream, a node of a graph, the host.
pub(crate) type Strand = u32;

/// Of each strand, up to which of its steps. Clones share until one is changed: most clocks are handed on as they are.
#[derive(Debug, Clone, Default)]
pub(crate) struct Clock(Arc<Vec<u32>>);

impl Clock {
    pub fn knows(&self, strand: Strand, step: u32) -> bool {
        self.0.get(strand as usize).is_some_and(|known| *known >= step)
    }

    /// Whether all that `other` knows is known.
    pub fn covers(&self, other: &Clock) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
            || other.0.iter().enumerate().all(|(strand, step)| *step == 0 || self.knows(strand as Strand, *step))
    }

    pub fn join(&mut self, other: &Clock) {
        if self.covers(other) {
            return;
        }
        if other.covers(self) {
            return *self = other.clone();
        }
        let steps = Arc::make_mut(&mut self.0);
        steps.resize(steps.len().max(other.0.len()), 0);
        steps.iter_mut().zip(&*other.0).for_each(|(own, other)| *own = (*own).max(*other));
    }

    /// Begins the next step of `strand`, whose clock this is, and returns its number.
    pub fn advance(&mut self, strand: Strand) -> u32 {
        let steps = Arc::make_mut(&mut self.0);
        steps.resize(steps.len().max(strand as usize + 1), 0);
        steps[strand as usize] += 1;
        steps[strand as usize]
    }
}
