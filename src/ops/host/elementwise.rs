//! In-place loops over one tensor.

use super::lane::Lane;
use super::level::Kernel;

pub(crate) struct Scale<'a, T> {
    pub elements: &'a mut [T],
    pub coef: f32,
}

impl<T: Lane> Kernel for Scale<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        for x in self.elements {
            *x = T::narrow(x.widen() * self.coef);
        }
    }
}

pub(crate) struct ScaleF64<'a> {
    pub elements: &'a mut [f64],
    pub coef: f64,
}

impl Kernel for ScaleF64<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        for x in self.elements {
            *x *= self.coef;
        }
    }
}

pub(crate) struct Clamp<'a, T> {
    pub elements: &'a mut [T],
    pub limit: f32,
}

impl<T: Lane> Kernel for Clamp<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let limit = T::narrow(self.limit).widen();
        for x in self.elements {
            // NaN fails both comparisons.
            let value = x.widen();
            let value = if value > limit { limit } else { value };
            *x = T::narrow(if value < -limit { -limit } else { value });
        }
    }
}

pub(crate) struct ClampF64<'a> {
    pub elements: &'a mut [f64],
    pub limit: f64,
}

impl Kernel for ClampF64<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        for x in self.elements {
            let value = if *x > self.limit { self.limit } else { *x };
            *x = if value < -self.limit { -self.limit } else { value };
        }
    }
}
