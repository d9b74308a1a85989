//! Casts, scaling and clipping by value.

use annulus::ops::cuda::{CastList, ClipList, GradientNorm, Measure, Skip, StochasticCastList};
use annulus::ops::{RoundingKey, Saturate, cast, cast_stochastic, clip_value, scale_in_place};
use annulus::{DType, NormType};

use super::{VALUES, hiding_places, lengths, limit, shifts};
use crate::Result;
use crate::part::Scale;
use crate::record::{Tally, check};
use crate::site::{PATIENCE, Site};
use crate::tensor::{FLOATS, Tensor, Values};

/// Compares all.
///
/// # Errors
/// What keeps the device from being used.
pub fn run(scale: Scale) -> Result<()> {
    let site = Site::open()?;
    for src in FLOATS {
        for dst in FLOATS {
            check(format!("cast of {src} to {dst}"), limit(scale) / 4, |tally| casts(&site, scale, src, dst, tally));
        }
    }
    for dst in [DType::F16, DType::BF16] {
        check(format!("stochastic rounding to {dst}"), limit(scale), |tally| rounded(&site, scale, dst, tally));
    }
    for dtype in FLOATS {
        check(format!("clipping of {dtype} by norm and by value"), limit(scale), |tally| {
            clipped(&site, scale, dtype, tally)
        });
    }
    Ok(())
}

/// Lengths with the values and shifts that are tried with each; and one tensor for each place of a NaN or an infinity.
fn inputs(scale: Scale, dtype: DType) -> impl Iterator<Item = (Tensor, usize)> {
    let many = lengths(scale).iter().enumerate().flat_map(move |(seed, len_elems)| {
        let shifts = shifts(scale, dtype).filter(move |shift| *shift < 2 || *len_elems < 10_000);
        shifts.flat_map(move |shift| {
            VALUES.map(|values| (Tensor::of(dtype, *len_elems, values, (seed + shift) as u64), shift))
        })
    });
    let hidden = hiding_places(2053).into_iter().flat_map(move |at| {
        let bad = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY];
        bad.map(|bad| (Tensor::of(dtype, 2053, Values::With(at, bad), at as u64), 1))
    });
    many.chain(hidden)
}

fn casts(site: &Site, scale: Scale, src: DType, dst: DType, tally: &mut Tally) -> Result<()> {
    for (tensor, shift) in inputs(scale, src) {
        for saturate in [Saturate::No, Saturate::Yes] {
            if !tally.has_time() {
                return Ok(());
            }
            let source = site.place(&tensor, shift)?;
            // Source and target lie differently.
            let target = site.place_zeros(dst, tensor.len_elems(), shift / 2)?;
            CastList::new(&site.kernels, &[(source.view.clone(), target.view.clone())])?
                .cast(&site.stream, saturate)?;
            let mut expected = Tensor::zeros(dst, tensor.len_elems());
            cast(tensor.slice(), expected.slice_mut(), saturate)?;
            if let Some(difference) = site.fetch(&target)?.difference(&expected) {
                return Err(
                    format!("{} elements, shift {shift}, {saturate:?}: {difference}", tensor.len_elems()).into()
                );
            }
            tally.agreed();
        }
    }
    Ok(())
}

fn rounded(site: &Site, scale: Scale, dst: DType, tally: &mut Tally) -> Result<()> {
    let key = RoundingKey { seed: 0x1234_5678_9abc_def0, step: 77 };
    for (tensor, shift) in inputs(scale, DType::F32) {
        for first_index in [0, 5, u64::from(u32::MAX) - 3] {
            if !tally.has_time() {
                return Ok(());
            }
            let source = site.place(&tensor, shift)?;
            let target = site.place_zeros(dst, tensor.len_elems(), shift)?;
            let triple = (source.view.clone(), target.view.clone(), first_index);
            StochasticCastList::new(&site.kernels, &[triple])?.cast(&site.stream, key, Saturate::No)?;
            let mut expected = Tensor::zeros(dst, tensor.len_elems());
            cast_stochastic(tensor.slice(), expected.slice_mut(), key, first_index, Saturate::No)?;
            if let Some(difference) = site.fetch(&target)?.difference(&expected) {
                let what = format!("{} elements, shift {shift}, index {first_index}", tensor.len_elems());
                return Err(format!("{what}: {difference}").into());
            }
            tally.agreed();
        }
    }
    Ok(())
}

fn clipped(site: &Site, scale: Scale, dtype: DType, tally: &mut Tally) -> Result<()> {
    for (tensor, shift) in inputs(scale, dtype) {
        if !tally.has_time() {
            return Ok(());
        }
        let what = |by: &str, difference: String| {
            format!("{} elements, shift {shift}, by {by}: {difference}", tensor.len_elems())
        };
        let gradient = site.place(&tensor, shift)?;
        let list = ClipList::new(&site.kernels, std::slice::from_ref(&gradient.view))?;
        let mut norm = GradientNorm::new(&site.kernels, std::slice::from_ref(&gradient.view))?;
        let how = Measure { norm_type: NormType::L2, max_norm: 0.5, grad_scale: None, skip: Skip::Never };
        let report = norm.measure(&site.stream, &how)?.wait(PATIENCE)?;
        list.scale(&site.stream, norm.signal())?;
        let mut expected = tensor.clone();
        scale_in_place(expected.slice_mut(), report.clip_coef);
        if let Some(difference) = site.fetch(&gradient)?.difference(&expected) {
            return Err(what("norm", difference).into());
        }
        list.clamp(&site.stream, 0.03, None)?;
        clip_value(expected.slice_mut(), 0.03)?;
        if let Some(difference) = site.fetch(&gradient)?.difference(&expected) {
            return Err(what("value", difference).into());
        }
        tally.agreed();
    }
    Ok(())
}
