//! Collective operations between devices: the schedules of [`schedule`](crate::schedule), run by `kernels/collective.cu`.
//!
//! ```text
//!   Communicator::new     ranks tell their devices, map each other's staging, probe every pair with data    (connect.rs, share.rs)
//!                         who shares a device with whom -> how kernels come to run together                 (way.rs)
//!                         beside those of other communicators                                               (residency.rs)
//!   all_reduce ..         descriptor -> schedule -> channels, protocol, pieces                              (geometry.rs)
//!                         -> one launch, whose blocks greet, compare descriptors, and move                  (communicator.rs)
//!                         or one for all ranks of a device (cohort.rs), or one for each step (stepped.rs)
//!   check                 what blocks that gave up have left in pinned memory, as errors                    (records.rs)
//! ```
//! The numeric contract is that of [`collective`](super), and so are agreement before payload and errors that poison.
//! Where every rank has a device of its own, nothing in an operation waits on the host, allocates, or differs from one issue to
//! the next of the same operation, so it can be captured in a CUDA graph: counters live on the device.

mod cohort;
mod communicator;
mod connect;
mod geometry;
mod history;
mod offers;
mod page;
mod records;
mod residency;
mod share;
mod stepped;
mod tables;
mod way;

pub use communicator::{Communicator, Finish, Options};
pub use connect::Transport;
pub use way::Way;
