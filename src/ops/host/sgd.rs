//! SGD's rule; the order of its arithmetic is that of [`crate::reference::Sgd`].

use super::update::{Rule, update};
use crate::error::Result;
use crate::ops::optimizer::Weights;
use crate::ops::slice::Slice;

/// What is the same for all elements of a step.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SgdCoefficients {
    /// `clip_coef / grad_scale`
    pub factor: f32,
    pub lr: f32,
    pub momentum: f32,
    pub weight_decay: f32,
    pub nesterov: bool,
}

impl SgdCoefficients {
    #[inline(always)]
    fn gradient(&self, gradient: f32, weight: f32) -> f32 {
        let g = gradient * self.factor;
        if self.weight_decay != 0.0 { self.weight_decay.mul_add(weight, g) } else { g }
    }
}

impl Rule<0> for SgdCoefficients {
    #[inline(always)]
    fn update(&self, gradient: f32, weight: f32, _: [f32; 0]) -> (f32, [f32; 0]) {
        ((-self.lr).mul_add(self.gradient(gradient, weight), weight), [])
    }
}

impl Rule<1> for SgdCoefficients {
    #[inline(always)]
    fn update(&self, gradient: f32, weight: f32, [velocity]: [f32; 1]) -> (f32, [f32; 1]) {
        let g = self.gradient(gradient, weight);
        let velocity = self.momentum.mul_add(velocity, g);
        let update = if self.nesterov { self.momentum.mul_add(velocity, g) } else { velocity };
        ((-self.lr).mul_add(update, weight), [velocity])
    }
}

pub(crate) fn sgd(
    coefficients: SgdCoefficients,
    weights: Weights<'_>,
    gradient: Slice<'_>,
    velocity: &mut [f32],
) -> Result<()> {
    if coefficients.momentum == 0.0 {
        update(coefficients, weights, gradient, [])
    } else {
        update(coefficients, weights, gradient, [velocity])
    }
}
