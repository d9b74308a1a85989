//! Staged direct: every term goes straight to its owner, in passes that are permutations.
//!
//! ```text
//! reduce-scatter  for p in 1..N:  send the own term of chunk r+p to rank r+p
//!                                 recv the term of the own chunk from rank r-p, hold it
//!                                                          (p = N-1: add all N terms in rank order, finish)
//! all-gather      for p in 1..N:  send the own, finished chunk to rank r+p; recv chunk r-p from rank r-p, copy
//! broadcast       for p in 1..N:  the root sends to root+p
//! ```
//! One stream out and one in per pass, because on a PCIe root complex all-to-all writes collapse (FlashInfer,
//! `pcie_ipc_all_reduce.cuh`). The sum of a chunk is `((x[0] + x[1]) + ..) + x[N-1]` whoever owns it. Step `s` is pass
//! `s + 1`.

use std::ops::Range;

use super::{Action, Exchange, Hop, clockwise, counterclockwise};

pub(super) fn reduce_scatter(rank: u32, step: u32, world_size: u32) -> Exchange {
    let pass = step + 1;
    let owner = clockwise(rank, pass, world_size);
    let last = pass == world_size - 1;
    Exchange {
        send: Some(Hop { peer: owner, chunk: owner }),
        recv: Some(Hop { peer: counterclockwise(rank, pass, world_size), chunk: rank }),
        action: Some(if last { Action::Finish } else { Action::Hold }),
    }
}

pub(super) fn all_gather(rank: u32, step: u32, world_size: u32) -> Exchange {
    let pass = step + 1;
    let owner = counterclockwise(rank, pass, world_size);
    Exchange {
        send: Some(Hop { peer: clockwise(rank, pass, world_size), chunk: rank }),
        recv: Some(Hop { peer: owner, chunk: owner }),
        action: Some(Action::Copy),
    }
}

/// The root sends in every step, the rank at distance `d` receives in step `d-1`.
pub(super) fn broadcast_steps(rank: u32, root: u32, world_size: u32) -> Range<u32> {
    match counterclockwise(rank, root, world_size) {
        0 => 0..world_size - 1,
        distance => distance - 1..distance,
    }
}

pub(super) fn broadcast(rank: u32, root: u32, step: u32, world_size: u32) -> Exchange {
    let receives = rank != root;
    Exchange {
        send: (!receives).then(|| Hop { peer: clockwise(root, step + 1, world_size), chunk: root }),
        recv: receives.then_some(Hop { peer: root, chunk: root }),
        action: receives.then_some(Action::Copy),
    }
}
