//! Clipping: by the total norm (one coefficient for all tensors) and by value.

use super::host::elementwise::{Clamp, ClampF64, Scale, ScaleF64};
use super::host::level::dispatch;
use super::slice::SliceMut;
use crate::error::{Error, Result};

/// The factor that brings gradients of norm `total_norm` to `max_norm`: `max_norm / (total_norm + 1e-6)`, at most 1.
///
/// Computed in f64 and rounded once, as PyTorch's formula with its constant. NaN if the norm is NaN, 0 if it is infinite.
pub fn clip_coef(total_norm: f64, max_norm: f64) -> f32 {
    let coef = max_norm / (total_norm + 1e-6);
    if coef > 1.0 { 1.0 } else { coef as f32 }
}

/// Fails unless `max_norm` can be a bound: a number, not negative. Infinity is no bound at all.
///
/// # Errors
/// [`Error::InvalidArgument`].
pub fn check_max_norm(max_norm: f64) -> Result<()> {
    if max_norm >= 0.0 {
        return Ok(());
    }
    Err(Error::InvalidArgument {
        argument: "max_norm",
        value: max_norm.to_string(),
        accepted: "a norm that is not negative and not NaN",
    })
}

/// `gradient *= coef`, in f32 (f64 for f64) with one rounding to the element type. A coefficient of 1 touches nothing.
pub fn scale_in_place(gradient: SliceMut<'_>, coef: f32) {
    if coef == 1.0 {
        return;
    }
    match gradient {
        SliceMut::F32(elements) => dispatch(Scale { elements, coef }),
        SliceMut::F16(elements) => dispatch(Scale { elements, coef }),
        SliceMut::BF16(elements) => dispatch(Scale { elements, coef }),
        SliceMut::F64(elements) => dispatch(ScaleF64 { elements, coef: f64::from(coef) }),
    }
}

pub(super) fn check_limit(limit: f32) -> Result<()> {
    if limit >= 0.0 {
        return Ok(());
    }
    Err(Error::InvalidArgument {
        argument: "clip value",
        value: limit.to_string(),
        accepted: "a limit that is not negative and not NaN",
    })
}

/// Limits every element to `[-limit, limit]`, `limit` rounded to the element type. NaN stays NaN, -0.0 stays -0.0.
///
/// # Errors
/// [`Error::InvalidArgument`] if `limit` is negative or NaN; nothing is written then.
pub fn clip_value(gradient: SliceMut<'_>, limit: f32) -> Result<()> {
    check_limit(limit)?;
    match gradient {
        SliceMut::F32(elements) => dispatch(Clamp { elements, limit }),
        SliceMut::F16(elements) => dispatch(Clamp { elements, limit }),
        SliceMut::BF16(elements) => dispatch(Clamp { elements, limit }),
        SliceMut::F64(elements) => dispatch(ClampF64 { elements, limit: f64::from(limit) }),
    }
    Ok(())
}
