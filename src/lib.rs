//! annulus: a data-parallel gradient runtime for trainers written in Rust, without NCCL.
//!
//! One training step, drawn:
//!
//! ```text
//! backward ──ready(parameter)──> bucket in the arena ──full──> event on the compute stream
//!                                                               │ (the communication stream waits for it)
//!    schedule (pure data) ──> Communicator ──> executor: threads of the host | a CUDA kernel
//!                                                               │ every rank adds its shard of the bucket, for all
//!                                                               └──> event ──> norm ──> clip_coef, found_inf
//! optimizer (the compute stream waits for the last event):
//!    master = step(master, gradient * clip_coef / grad_scale), unless found_inf
//!                              └──> cast ──> model weights ──> next forward
//! ```
//! Nothing in it waits on the host, nothing allocates after setup, and no gradient byte is read twice without need.
//!
//! | layer | what it knows |
//! |---|---|
//! | [`error`], [`dtype`] | the words every layer shares |
//! | [`schedule`] | which rank moves which chunk when: pure data |
//! | [`reference`](mod@reference) | the specification: every operation once more, naive |
//! | [`abi`], [`kernels`] | what host and CUDA kernels say to each other; the kernels' PTX |
//! | [`world`] | how ranks meet, share memory, and notice that one has left |
//! | [`device`] | streams, events, buffers, the arena that peers reach |
//! | [`collective`] | all-reduce and its kin, their numeric contract, agreement before payload |
//! | [`ops`] | norm, clip, casts, loss scaling, optimizers on slices |
//! | [`strategy`] | what overlaps with what: the training loop, bucket by bucket |
//! | [`telemetry`] | timelines, links between GPUs |
//!
//! Begin with [`strategy`]; a trainer that brings its own loop begins with [`collective`].

/// The README's example is compiled with the documentation's.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

pub mod abi;
pub mod collective;
pub mod device;
pub mod dtype;
pub mod error;
#[cfg(target_arch = "x86_64")]
mod f16c;
pub mod kernels;
pub mod ops;
pub mod reference;
pub mod schedule;
pub mod strategy;
mod streamed;
pub mod telemetry;
pub mod world;

pub use dtype::{DType, Element, NormType, ReduceOp};
pub use error::{Error, Result};
