//! The operations on a device: lists of tensors that are uploaded once and launched any number of times.
//!
//! ```text
//! setup    Contributions::new(kernels, pairs)     checks every dtype, length, device and overlap, uploads the tables
//!          GradientNorm, OptimizerStep, LossScale, ..
//! step     contributions.add(stream, 1.0)         one launch each, whatever the number of tensors
//!          norm.measure(stream, &how)             -> Ticket: the host may ask for the norm, later, or never
//!          step.step(stream, Some(norm.signal()))
//!          scale.update(stream, norm.signal())
//! ```
//! | what | kernel | the same on the host |
//! |---|---|---|
//! | [`Contributions`], [`contribute`] | `accumulate.cu` | sums in f32 |
//! | [`GradientNorm`], [`UnscaleNorm`] | `norm.cu`, `unscale.cu` | [`NormSlots`](super::NormSlots) |
//! | [`CastList`], [`StochasticCastList`] | `cast.cu` | [`cast`](fn@super::cast), [`cast_stochastic`](super::cast_stochastic) |
//! | [`ClipList`] | `cast.cu` | [`scale_in_place`](super::scale_in_place), [`clip_value`](super::clip_value) |
//! | [`OptimizerStep`] | `optimizer.cu` | [`adamw_step`](super::adamw_step), [`sgd_step`](super::sgd_step) |
//! | [`LossScale`] | `scaler.cu` | [`GradScaler`](super::GradScaler) |
//!
//! The bits are those of the host. A launch allocates nothing, copies no list and waits for nothing; what changes from step to
//! step (clip coefficient, loss scale, skip, step count, learning rate) is in device memory. So a step can be captured as a
//! graph: its launches take the same arguments every time. What the host changes between steps it changes by a launch of
//! `store.cu`, in the stream's order and outside the captured part.
//!
//! Lists keep their tensors' memory alive. Whatever else uses it is ordered by the stream or by events; without that the
//! contents are anything, as always on a device.

mod accumulate;
mod cast;
mod cell;
mod combine;
mod norm;
mod optimizer;
mod record;
mod scaler;
mod table;

pub(crate) use accumulate::contribute_each;
pub use accumulate::{Contribution, Contributions, contribute};
pub use cast::{CastList, ClipList, StochasticCastList};
pub use combine::{Measure, Signal, Skip};
pub use norm::{GradientNorm, UnscaleNorm};
pub use optimizer::{OptimizerStep, Rule, StepCounts, StepTensor, StepWeights};
pub use record::{NormReport, Ticket};
pub use scaler::LossScale;
