//! What a run shows of itself: a timeline of what every stream of every rank did when.

pub mod trace;

pub use trace::{Timeline, Track, merge, now_ns};
