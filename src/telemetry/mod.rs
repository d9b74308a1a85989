//! What a run shows of itself, and what the machine shows of its GPUs.
//!
//! - [`trace`]: a timeline of what every stream of every rank did when.
//! - [`nvtx`]: the same ranges, as they open and close, for NVIDIA's profilers.
//! - [`sampler`]: utilisation, power, clocks and traffic of the GPUs while a run goes on.
//! - [`topology`]: which links lie between the GPUs.
//!
//! The NVIDIA management library is opened when one of the last two is asked for; its absence is an error like any other,
//! and nothing depends on it but what is shown. Only this module calls it.

#[cfg(feature = "cuda")]
mod nvml;
pub mod nvtx;
#[cfg(feature = "cuda")]
mod reading;
#[cfg(feature = "cuda")]
pub mod sampler;
#[cfg(feature = "cuda")]
pub mod topology;
pub mod trace;

#[cfg(feature = "cuda")]
pub use sampler::Sampler;
#[cfg(feature = "cuda")]
pub use topology::Topology;
pub use trace::{Timeline, Track, merge, now_ns};
