//! `annulus::ops::cuda` on virtual GPUs: the bits of the host's operations, what is refused before anything is launched, and
//! what a launch does not do.

mod gpu;
mod lists;
mod norm;
mod step;
#[path = "../support/mod.rs"]
mod support;
#[path = "../../../tests/tensors/mod.rs"]
mod tensors;
