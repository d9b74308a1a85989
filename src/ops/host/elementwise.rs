//! In-place loops over one tensor.

use super::lane::{Lane, map_in_place};
use super::level::{Kernel, Level};

pub(crate) struct Scale<'a, T> {
    pub elements: &'a mut [T],
    pub coef: f32,
}

impl<T: Lane> Kernel for Scale<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run(self, level: Level) {
        map_in_place(self.elements, level, |x| x * self.coef);
    }
}

pub(crate) struct ScaleF64<'a> {
    pub elements: &'a mut [f64],
    pub coef: f64,
}

impl Kernel for ScaleF64<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self, _: Level) {
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
    fn run(self, level: Level) {
        let limit = T::narrow(self.limit).widen();
        map_in_place(self.elements, level, |x| {
            // NaN fails both comparisons.
            let x = if x > limit { limit } else { x };
            if x < -limit { -limit } else { x }
        });
    }
}

pub(crate) struct ClampF64<'a> {
    pub elements: &'a mut [f64],
    pub limit: f64,
}

impl Kernel for ClampF64<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self, _: Level) {
        for x in self.elements {
            let value = if *x > self.limit { self.limit } else { *x };
            *x = if value < -self.limit { -self.limit } else { value };
        }
    }
}
