//! How an optimizer's rule is carried over a tensor: tile by tile, so that what is widened before the rule and narrowed
//! after it stays in the first-level cache.

use super::lane::{Lane, map};
use super::level::{Kernel, Level, dispatch};
use super::philox::{RoundStochastic, StochasticLane};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::ops::cast::Saturate;
use crate::ops::optimizer::{Rounding, Weights};
use crate::ops::slice::{Slice, SliceMut};

/// Elements updated between one widening and the next narrowing: 4 KiB of each f32 stream, at most 20 KiB together.
const TILE_ELEMS: usize = 1024;

/// An element-wise update with `S` f32 states an element.
pub(crate) trait Rule<const S: usize>: Copy {
    /// The new weight and states from the gradient, the weight and the states.
    fn update(&self, gradient: f32, weight: f32, states: [f32; S]) -> (f32, [f32; S]);
}

/// Updates a tensor whose lengths have been checked.
///
/// # Errors
/// [`Error::Unsupported`] for a dtype that has no kernel; nothing is written then.
pub(crate) fn update<R: Rule<S>, const S: usize>(
    rule: R,
    weights: Weights<'_>,
    gradient: Slice<'_>,
    states: [&mut [f32]; S],
) -> Result<()> {
    match gradient {
        Slice::F32(gradient) => update_with(rule, weights, gradient, states),
        Slice::F16(gradient) => update_with(rule, weights, gradient, states),
        Slice::BF16(gradient) => update_with(rule, weights, gradient, states),
        Slice::F64(_) => unsupported("gradients", gradient.dtype()),
    }
}

fn update_with<R: Rule<S>, G: Lane, const S: usize>(
    rule: R,
    weights: Weights<'_>,
    gradient: &[G],
    states: [&mut [f32]; S],
) -> Result<()> {
    match weights {
        Weights::Master { master, model: None } => dispatch(Master { rule, master, gradient, states }),
        Weights::Master { master, model: Some(SliceMut::F16(model)) } => {
            dispatch(MasterAndModel { rule, master, model, gradient, states });
        }
        Weights::Master { master, model: Some(SliceMut::BF16(model)) } => {
            dispatch(MasterAndModel { rule, master, model, gradient, states });
        }
        Weights::Model { model: SliceMut::F16(model), rounding } => {
            dispatch(ModelOnly { rule, model, rounding, gradient, states });
        }
        Weights::Model { model: SliceMut::BF16(model), rounding } => {
            dispatch(ModelOnly { rule, model, rounding, gradient, states });
        }
        Weights::Master { model: Some(model), .. } | Weights::Model { model, .. } => {
            return unsupported("low-precision weights", model.dtype());
        }
    }
    Ok(())
}

fn unsupported(what: &str, dtype: DType) -> Result<()> {
    Err(Error::Unsupported { op: format!("an optimizer step with {what}"), dtype })
}

/// Applies the rule to slices of one length.
#[inline(always)]
fn apply<R: Rule<S>, G: Lane, const S: usize>(
    rule: R,
    weights: &mut [f32],
    gradient: &[G],
    mut states: [&mut [f32]; S],
    level: Level,
) {
    if !G::has_blocks(level) {
        return apply_by_element(rule, weights, gradient, states);
    }
    let mut wide = [0f32; TILE_ELEMS];
    for (weights, gradient) in weights.chunks_mut(TILE_ELEMS).zip(gradient.chunks(TILE_ELEMS)) {
        let wide = &mut wide[..gradient.len()];
        map(gradient, wide, level, |x| x);
        apply_by_element(rule, weights, wide, split_states(&mut states, gradient.len()));
    }
}

#[inline(always)]
fn apply_by_element<R: Rule<S>, G: Lane, const S: usize>(
    rule: R,
    weights: &mut [f32],
    gradient: &[G],
    mut states: [&mut [f32]; S],
) {
    let len = weights.len();
    let gradient = &gradient[..len];
    for state in &mut states {
        *state = &mut std::mem::take(state)[..len];
    }
    for i in 0..len {
        let before = std::array::from_fn(|k| states[k][i]);
        let (weight, after) = rule.update(gradient[i].widen(), weights[i], before);
        weights[i] = weight;
        for k in 0..S {
            states[k][i] = after[k];
        }
    }
}

/// Splits the first `len` elements off each state.
#[inline(always)]
fn split_states<'a, const S: usize>(states: &mut [&'a mut [f32]; S], len: usize) -> [&'a mut [f32]; S] {
    states.each_mut().map(|state| {
        let (now, rest) = std::mem::take(state).split_at_mut(len);
        *state = rest;
        now
    })
}

struct Master<'a, R, G, const S: usize> {
    rule: R,
    master: &'a mut [f32],
    gradient: &'a [G],
    states: [&'a mut [f32]; S],
}

impl<R: Rule<S>, G: Lane, const S: usize> Kernel for Master<'_, R, G, S> {
    type Output = ();

    #[inline(always)]
    fn run(self, level: Level) {
        apply(self.rule, self.master, self.gradient, self.states, level);
    }
}

struct MasterAndModel<'a, R, G, M, const S: usize> {
    rule: R,
    master: &'a mut [f32],
    model: &'a mut [M],
    gradient: &'a [G],
    states: [&'a mut [f32]; S],
}

impl<R: Rule<S>, G: Lane, M: Lane, const S: usize> Kernel for MasterAndModel<'_, R, G, M, S> {
    type Output = ();

    #[inline(always)]
    fn run(mut self, level: Level) {
        let tiles = self.master.chunks_mut(TILE_ELEMS).zip(self.model.chunks_mut(TILE_ELEMS));
        for ((master, model), gradient) in tiles.zip(self.gradient.chunks(TILE_ELEMS)) {
            apply(self.rule, master, gradient, split_states(&mut self.states, gradient.len()), level);
            map(master, model, level, |x| x);
        }
    }
}

struct ModelOnly<'a, R, G, M, const S: usize> {
    rule: R,
    model: &'a mut [M],
    rounding: Rounding,
    gradient: &'a [G],
    states: [&'a mut [f32]; S],
}

impl<R: Rule<S>, G: Lane, M: StochasticLane, const S: usize> Kernel for ModelOnly<'_, R, G, M, S> {
    type Output = ();

    #[inline(always)]
    fn run(mut self, level: Level) {
        let mut tile = [0f32; TILE_ELEMS];
        let tiles = self.model.chunks_mut(TILE_ELEMS).zip(self.gradient.chunks(TILE_ELEMS));
        for (index, (model, gradient)) in tiles.enumerate() {
            let tile = &mut tile[..gradient.len()];
            map(model, tile, level, |x| x);
            apply(self.rule, tile, gradient, split_states(&mut self.states, gradient.len()), level);
            match self.rounding {
                Rounding::Nearest => map(tile, model, level, |x| x),
                Rounding::Stochastic { key, first_index } => {
                    let first_index = first_index + (index * TILE_ELEMS) as u64;
                    RoundStochastic { src: tile, dst: model, key, first_index, saturate: Saturate::No }.run(level);
                }
            }
        }
    }
}
