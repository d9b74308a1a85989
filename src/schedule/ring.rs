//! The ring: rank `r` sends to `r+1` and receives from `r-1`, always.
//!
//! ```text
//! reduce-scatter  for s in 0..N-1:  send chunk r-1-s (own term, from s = 1 on the sum made in the step before)
//!                                   recv chunk r-2-s, add the own term            (s = N-2: chunk r, finish)
//! all-gather      for s in 0..N-1:  send chunk r-s   (s = 0: the own, then what the step before received)
//!                                   recv chunk r-1-s, copy
//! broadcast       d = r - root:     recv in step d-1, send in step d              (a chain; rounds pipeline)
//! ```
//! What a step receives is what the next step sends. Chunk `c` is summed as `(..((x[c+1] + x[c+2]) + ..) + x[c]`, once,
//! by its owner last: the same bits on every rank. Source: Patarasuk & Yuan 2009, section 4.

use std::ops::Range;

use super::{Action, Exchange, Hop, clockwise, counterclockwise};

pub(super) fn reduce_scatter(rank: u32, step: u32, world_size: u32) -> Exchange {
    let last = step == world_size - 2;
    Exchange {
        send: Some(Hop { peer: clockwise(rank, 1, world_size), chunk: counterclockwise(rank, 1 + step, world_size) }),
        recv: Some(Hop {
            peer: counterclockwise(rank, 1, world_size),
            chunk: counterclockwise(rank, 2 + step, world_size),
        }),
        action: Some(if last { Action::Finish } else { Action::Reduce }),
    }
}

pub(super) fn all_gather(rank: u32, step: u32, world_size: u32) -> Exchange {
    Exchange {
        send: Some(Hop { peer: clockwise(rank, 1, world_size), chunk: counterclockwise(rank, step, world_size) }),
        recv: Some(Hop {
            peer: counterclockwise(rank, 1, world_size),
            chunk: counterclockwise(rank, 1 + step, world_size),
        }),
        action: Some(Action::Copy),
    }
}

/// A rank at distance `d` from the root receives in step `d-1` and sends in step `d`; the root only sends, the last
/// only receives.
pub(super) fn broadcast_steps(rank: u32, root: u32, world_size: u32) -> Range<u32> {
    let distance = counterclockwise(rank, root, world_size);
    distance.saturating_sub(1)..(distance + 1).min(world_size - 1)
}

pub(super) fn broadcast(rank: u32, root: u32, step: u32, world_size: u32) -> Exchange {
    let distance = counterclockwise(rank, root, world_size);
    let receives = distance == step + 1;
    Exchange {
        send: (distance == step).then(|| Hop { peer: clockwise(rank, 1, world_size), chunk: root }),
        recv: receives.then(|| Hop { peer: counterclockwise(rank, 1, world_size), chunk: root }),
        action: receives.then_some(Action::Copy),
    }
}
