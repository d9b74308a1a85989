//! What happens to gradients and weights between backward and the next forward, besides the collective.
//!
//! | module | operation |
//! |---|---|
//! | [`norm`] | norms 1, 2, inf and p over a list of tensors of mixed dtypes; fused with unscaling and a cast |
//! | [`clip`] | clip coefficient, in-place scaling, clip by value |
//! | [`mod@cast`] | f32, f16, bf16 and f64 into each other, to nearest or stochastic |
//! | [`scaler`] | dynamic loss scale |
//! | [`optimizer`] | AdamW and SGD with master weights, fused with unscaling, clipping and the low-precision copy |
//!
//! `cuda` launches the same on a device, over tensors that live there.
//!
//! The functions here check their arguments and say what is computed; `host` holds the loops. They run on the calling
//! thread, allocate nothing after [`NormSlots::new`], and give the same bits at every CPU feature [`Level`]. The
//! specification is [`crate::reference`].

pub mod cast;
pub mod clip;
#[cfg(all(feature = "cuda", not(loom)))]
pub mod cuda;
mod host;
pub mod norm;
pub mod optimizer;
pub mod scaler;
mod slice;

pub use cast::{RoundingKey, Saturate, cast, cast_stochastic};
pub use clip::{clip_coef, clip_value, scale_in_place};
pub use host::level::Level;
pub use norm::{NormResult, NormSlots, grad_norm};
pub use optimizer::{AdamWOptions, Rounding, SgdOptions, StepSignal, Weights, adamw_step, sgd_step};
pub use scaler::GradScaler;
pub use slice::{Slice, SliceMut};

use crate::error::{Error, Result};

fn check_lengths(what: &'static str, expected_elems: usize, actual_elems: usize) -> Result<()> {
    if expected_elems == actual_elems {
        return Ok(());
    }
    Err(Error::LengthMismatch { what: what.to_owned(), expected_elems, actual_elems })
}
