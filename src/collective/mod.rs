//! Collective operations: what they cost, in which order they add, and how ranks agree on them.
//!
//! # Numeric contract
//! - f32, f64 and integers are added in their own type (integers wrap); f16 and bf16 in f32, rounded to the element type
//!   once, at the end.
//! - Unless a ring is asked for, the terms are added in rank order 0..N-1: the bits depend neither on the size of the
//!   buffer, nor on chunking, nor on whether it is registered. A ring adds each shard in the order that begins behind its
//!   owner; it gives the same bits on every rank and on every run of one size and world. A ring of 16-bit floats with
//!   [`Partials::Native`] rounds at every hop.
//! - `Avg` divides once, in the accumulator type, by the exact number of ranks.
//! - NaN, infinities and -0.0 follow IEEE 754; `Min` and `Max` propagate NaN and order -0.0 below +0.0.
//!
//! # Cost on the host backend, per rank, for an all-reduce of S bytes over N ranks
//! | path | when | bytes read + written | meetings |
//! |---|---|---|---|
//! | one step | S up to 2 KiB, 32 KiB / N for N > 2; private: 256 KiB, 128 KiB / N | (N+1) S + 2 S | 1 |
//! | mapped | every rank's buffers are registered | S + S, the least there is | 2 |
//! | staged | a private buffer among them | about 3 S + 2 S, the excess in cache | 3 a round |

mod area;
mod calls;
mod combine;
mod communicator;
#[cfg(all(feature = "cuda", not(loom)))]
pub mod cuda;
mod descriptor;
mod executor;
#[cfg(target_arch = "x86_64")]
mod half256;
#[cfg(target_arch = "x86_64")]
mod half512;
#[cfg(target_arch = "x86_64")]
mod half_blocks;
mod hand_over;
mod lane;
mod membership;
mod operands;
mod operation;
mod partial;
mod ring;
mod simd;
mod slices;
mod staged;
mod work;

pub use communicator::{CollectiveOptions, Communicator};
pub use descriptor::Partials;
pub use work::Work;
