//! The protocols between threads and processes under every interleaving and reordering loom knows (C11): run with
//! `RUSTFLAGS="--cfg loom" cargo test --release --test loom`.
//!
//! The sources under test are compiled into this crate, so that the models reach what the library does not show, and so
//! that `weak` can compile the very same flag against atomics that can be told to be too weak: the negative controls.
#![cfg(loom)]

use annulus::error;

#[allow(dead_code)]
#[path = "../../src/device/event.rs"]
mod event;
#[allow(dead_code)]
#[path = "../../src/world/flag.rs"]
mod flag;
#[allow(dead_code)]
#[path = "../../src/world/sync.rs"]
mod sync;
#[allow(dead_code)]
mod weak;
#[allow(dead_code)]
#[path = "../../src/collective/work.rs"]
mod work;

/// The paths by which the sources know each other.
mod world {
    pub(crate) use crate::{flag, sync};
}
mod device {
    pub(crate) use crate::event::Event;
}

mod devices;
mod flags;

/// Explores every execution with at most three preemptions: two waiters that sleep in a loop have too many otherwise.
fn bounded_model(check: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(check);
}
