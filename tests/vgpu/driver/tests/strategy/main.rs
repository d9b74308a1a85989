//! The strategy contract on virtual GPUs: the very tests of the host backend, row by row, and what only a device has.
//!
//! Four devices, so that [`Accelerator::Auto`](annulus::strategy::Accelerator), the default, gives every rank of every test one
//! of its own.

#[path = "../../../../strategy/collectives.rs"]
mod collectives;
mod device;
#[path = "../../../../strategy/gradients.rs"]
mod gradients;
mod inside;
#[path = "../../../../strategy/model.rs"]
mod model;
#[path = "../../../../strategy/nonfinite.rs"]
mod nonfinite;
#[path = "../../../../strategy/precision.rs"]
mod precision;
#[path = "../../../../strategy/rows.rs"]
mod rows;
#[path = "../../../../strategy/state.rs"]
mod state;
#[path = "../../../../strategy/training.rs"]
mod training;
