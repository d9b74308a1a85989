//! What a run shows of itself, and what the machine shows of its GPUs.
//!
//! - [`trace`]: a timeline of what every stream of every rank did when.
//! - [`topology`]: which links lie between the GPUs.
//!
//! The NVIDIA management library is opened when one of them is asked for; its absence is an error like any other, and
//! nothing depends on it but what is shown. Only this module calls it.

#[cfg(feature = "cuda")]
mod nvml;
#[cfg(feature = "cuda")]
pub mod topology;
pub mod trace;

#[cfg(feature = "cuda")]
pub use topology::Topology;
pub use trace::{Timeline, Track, merge, now_ns};
