//! AdamW's rule; the order of its arithmetic is that of [`crate::reference::AdamW`].

use super::update::{Rule, update};
use crate::error::Result;
use crate::ops::optimizer::Weights;
use crate::ops::slice::Slice;

/// What is the same for all elements of a step.
#[derive(Debug, Clone, Copy)]
pub(crate) struct AdamWCoefficients {
    /// `clip_coef / grad_scale`
    pub factor: f32,
    /// `1 - beta1`
    pub beta1_rest: f32,
    pub beta2: f32,
    /// `1 - beta2`
    pub beta2_rest: f32,
    /// `1 / sqrt(1 - beta2^step)`
    pub correction: f32,
    pub eps: f32,
    /// `lr / (1 - beta1^step)`
    pub step_size: f32,
    /// `1 - lr * weight_decay`
    pub decay: f32,
}

impl Rule<2> for AdamWCoefficients {
    #[inline(always)]
    fn update(&self, gradient: f32, weight: f32, [m, v]: [f32; 2]) -> (f32, [f32; 2]) {
        let g = gradient * self.factor;
        let m = self.beta1_rest.mul_add(g - m, m);
        let v = (self.beta2_rest * g).mul_add(g, self.beta2 * v);
        let denom = v.sqrt().mul_add(self.correction, self.eps);
        let weight = (-self.step_size).mul_add(m / denom, weight * self.decay);
        (weight, [m, v])
    }
}

pub(crate) fn adamw(
    coefficients: AdamWCoefficients,
    weights: Weights<'_>,
    gradient: Slice<'_>,
    exp_avg: &mut [f32],
    exp_avg_sq: &mut [f32],
) -> Result<()> {
    update(coefficients, weights, gradient, [exp_avg, exp_avg_sq])
}
