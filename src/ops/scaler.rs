//! Dynamic loss scaling, so that small f16 gradients do not vanish: PyTorch's rules.

use serde::{Deserialize, Serialize};

#[cfg(all(feature = "cuda", not(loom)))]
use crate::abi::LossScaler;
use crate::error::{Error, Result};

/// The loss scale and what moves it. Part of the checkpoint.
///
/// The loss is multiplied by [`scale`](Self::scale) before backward, gradients by [`inv_scale`](Self::inv_scale) after.
/// A step in which a gradient overflowed is skipped and shrinks the scale; a run of good steps makes it grow. Departure from
/// PyTorch: the scale never leaves the normal f32 range at the lower end either, where its reciprocal would be infinite.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct GradScaler {
    scale: f32,
    growth_factor: f32,
    backoff_factor: f32,
    growth_interval: u32,
    good_steps: u32,
    enabled: bool,
}

impl Default for GradScaler {
    /// 2^16, doubled after 2,000 good steps in a row, halved after an overflow.
    fn default() -> Self {
        GradScaler {
            scale: 65536.0,
            growth_factor: 2.0,
            backoff_factor: 0.5,
            growth_interval: 2000,
            good_steps: 0,
            enabled: true,
        }
    }
}

impl GradScaler {
    /// A scaler with these rules.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] unless `initial_scale` is a normal positive number of which the reciprocal is normal too,
    /// `growth_factor` > 1, 0 < `backoff_factor` < 1 and `growth_interval` > 0.
    pub fn new(
        initial_scale: f32,
        growth_factor: f32,
        backoff_factor: f32,
        growth_interval: u32,
    ) -> Result<GradScaler> {
        let scaler = GradScaler {
            scale: initial_scale,
            growth_factor,
            backoff_factor,
            growth_interval,
            good_steps: 0,
            enabled: true,
        };
        scaler.check()?;
        Ok(scaler)
    }

    /// A scaler whose scale is 1 and stays 1: for precisions that need none.
    pub fn disabled() -> GradScaler {
        GradScaler { scale: 1.0, enabled: false, ..GradScaler::default() }
    }

    /// As the device keeps it.
    #[cfg(all(feature = "cuda", not(loom)))]
    pub(super) fn to_device(self) -> LossScaler {
        LossScaler {
            scale: self.scale,
            growth_factor: self.growth_factor,
            backoff_factor: self.backoff_factor,
            growth_interval: self.growth_interval,
            good_steps: self.good_steps,
            enabled: self.enabled.into(),
        }
    }

    #[cfg(all(feature = "cuda", not(loom)))]
    pub(super) fn from_device(scaler: LossScaler) -> GradScaler {
        GradScaler {
            scale: scaler.scale,
            growth_factor: scaler.growth_factor,
            backoff_factor: scaler.backoff_factor,
            growth_interval: scaler.growth_interval,
            good_steps: scaler.good_steps,
            enabled: scaler.enabled != 0,
        }
    }

    /// Fails unless the state is one that [`new`](Self::new) and [`update`](Self::update) can reach: after reading it from
    /// a file.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] names the field.
    pub fn check(&self) -> Result<()> {
        let refuse = |argument, value: String, accepted| Err(Error::InvalidArgument { argument, value, accepted });
        if !usable(self.scale) {
            return refuse("loss scale", self.scale.to_string(), "a normal positive f32 with a normal reciprocal");
        }
        if !(self.growth_factor > 1.0 && self.growth_factor.is_finite()) {
            return refuse("growth factor", self.growth_factor.to_string(), "a finite number above 1");
        }
        if !(self.backoff_factor > 0.0 && self.backoff_factor < 1.0) {
            return refuse("backoff factor", self.backoff_factor.to_string(), "a number between 0 and 1");
        }
        if self.growth_interval == 0 || self.good_steps >= self.growth_interval {
            let value = format!("{} of {} good steps", self.good_steps, self.growth_interval);
            return refuse("growth interval", value, "at least 1, and more than the good steps so far");
        }
        Ok(())
    }

    /// What the loss is multiplied with.
    pub fn scale(&self) -> f32 {
        self.scale
    }

    /// What gradients are multiplied with: the reciprocal, computed in f64 and rounded once.
    pub fn inv_scale(&self) -> f32 {
        (1.0 / f64::from(self.scale)) as f32
    }

    /// Good steps since the scale last changed.
    pub fn good_steps(&self) -> u32 {
        self.good_steps
    }

    /// Whether the scale moves at all.
    pub fn is_enabled(&self) -> bool {
        self.enabled
    }

    /// Notes the outcome of a step: `found_inf` if a gradient was NaN or infinite, which also means it was skipped.
    pub fn update(&mut self, found_inf: bool) {
        if !self.enabled {
            return;
        }
        self.good_steps = if found_inf { 0 } else { self.good_steps + 1 };
        let grown = self.good_steps == self.growth_interval;
        if grown {
            self.good_steps = 0;
        }
        let factor = match (found_inf, grown) {
            (true, _) => self.backoff_factor,
            (false, true) => self.growth_factor,
            (false, false) => return,
        };
        let next = self.scale * factor;
        if usable(next) {
            self.scale = next;
        }
    }
}

fn usable(scale: f32) -> bool {
    scale > 0.0 && scale.is_normal() && ((1.0 / f64::from(scale)) as f32).is_normal()
}
