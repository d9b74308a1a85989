//! Norms, clip coefficients and what is not finite.

use annulus::NormType;
use annulus::device::cuda::{Buffer, View};
use annulus::ops::cuda::{GradientNorm, Measure, NormReport, Skip, UnscaleNorm};
use annulus::ops::{GradScaler, NormResult, NormSlots, clip_coef, grad_norm};

use super::{VALUES, hiding_places, lengths, limit, shifts};
use crate::Result;
use crate::part::Scale;
use crate::record::check;
use crate::site::{PATIENCE, Placed, Site};
use crate::tensor::{FLOATS, SINGLES, Tensor, Values};

const TYPES: [NormType; 5] = [NormType::L1, NormType::L2, NormType::Inf, NormType::P(3.0), NormType::P(3.5)];
const MAX_NORM: f64 = 1.0;

/// Compares all.
///
/// # Errors
/// What keeps the device from being used.
pub fn run(scale: Scale) -> Result<()> {
    let site = Site::open()?;
    for dtype in FLOATS {
        check(format!("norms of {dtype}"), limit(scale), |tally| {
            for (seed, len_elems) in lengths(scale).iter().enumerate() {
                for (values, shift) in VALUES.iter().flat_map(|values| shifts(scale, dtype).map(move |s| (values, s))) {
                    let tensors = [(Tensor::of(dtype, *len_elems, *values, seed as u64), shift)];
                    for norm_type in TYPES {
                        if !tally.has_time() {
                            return Ok(());
                        }
                        compare(&site, &tensors, norm_type)?;
                        tally.agreed();
                    }
                }
            }
            Ok(())
        });
    }
    check("norms of lists of mixed dtypes, empty tensors among them", limit(scale), |tally| {
        let tensors = mixed(if scale == Scale::Short { 257 } else { 40_003 });
        for norm_type in TYPES {
            compare(&site, &tensors, norm_type)?;
            by_bucket(&site, &tensors, norm_type)?;
            tally.agreed();
        }
        Ok(())
    });
    check("a NaN or an infinity anywhere", limit(scale), |tally| {
        for dtype in FLOATS {
            let len_elems = if scale == Scale::Short { 131 } else { 70_001 };
            for at in hiding_places(len_elems) {
                for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
                    if !tally.has_time() {
                        return Ok(());
                    }
                    let tensors = [
                        (Tensor::of(dtype, 3, Values::Ordinary, 1), 0),
                        (Tensor::of(dtype, len_elems, Values::With(at, bad), 2), 1),
                    ];
                    TYPES.iter().try_for_each(|norm_type| compare(&site, &tensors, *norm_type))?;
                    tally.agreed();
                }
            }
        }
        Ok(())
    });
    check("unscale, cast and norm in one pass", limit(scale), |tally| {
        let float_pairs = SINGLES.iter().flat_map(|src| SINGLES.iter().map(move |dst| (*src, *dst)));
        for (src, dst) in float_pairs.chain([(annulus::DType::F64, annulus::DType::F64)]) {
            for len_elems in lengths(scale).iter().filter(|len| **len < 100_000) {
                for norm_type in TYPES {
                    if !tally.has_time() {
                        return Ok(());
                    }
                    let tensors = [(Tensor::of(src, *len_elems, Values::Ordinary, 7), 1)];
                    unscale(&site, &tensors, dst, norm_type)?;
                    tally.agreed();
                }
            }
        }
        Ok(())
    });
    Ok(())
}

fn mixed(len_elems: usize) -> Vec<(Tensor, usize)> {
    let tensor = |i: usize| {
        let len_elems = if i % 3 == 1 { 0 } else { len_elems + 17 * i };
        (Tensor::of(FLOATS[i % 4], len_elems, Values::Ordinary, i as u64), i % 2)
    };
    (0..9).map(tensor).collect()
}

fn place(site: &Site, tensors: &[(Tensor, usize)]) -> Result<(Vec<Placed>, Vec<View>)> {
    let placed: Vec<Placed> =
        tensors.iter().map(|(tensor, shift)| site.place(tensor, *shift)).collect::<Result<_>>()?;
    let views = placed.iter().map(|placed| placed.view.clone()).collect();
    Ok((placed, views))
}

fn on_host(tensors: &[(Tensor, usize)], norm_type: NormType) -> Result<NormResult> {
    let lens: Vec<usize> = tensors.iter().map(|(tensor, _)| tensor.len_elems()).collect();
    let slices: Vec<_> = tensors.iter().map(|(tensor, _)| tensor.slice()).collect();
    Ok(grad_norm(&slices, norm_type, &mut NormSlots::new(&lens)?)?)
}

fn how(norm_type: NormType) -> Measure<'static> {
    Measure { norm_type, max_norm: MAX_NORM, grad_scale: None, skip: Skip::Nonfinite }
}

/// Fails unless the device's `report` is what the host says.
fn agree(report: NormReport, host: NormResult, what: impl FnOnce() -> String) -> Result<()> {
    let is_same = report.total_norm.to_bits() == host.total_norm.to_bits()
        || report.total_norm.is_nan() && host.total_norm.is_nan();
    let coef = if host.nonfinite { 1.0 } else { clip_coef(host.total_norm, MAX_NORM) };
    if is_same
        && report.found_inf == host.nonfinite
        && report.first_nonfinite == host.first_nonfinite
        && report.clip_coef.to_bits() == coef.to_bits()
    {
        return Ok(());
    }
    Err(format!("{}: the device says {report:?}, the host {host:?} and coefficient {coef}", what()).into())
}

fn name(tensors: &[(Tensor, usize)], norm_type: NormType) -> String {
    let lists: Vec<_> = tensors.iter().map(|(t, shift)| (t.dtype(), t.len_elems(), *shift)).collect();
    format!("{norm_type:?} of (dtype, elements, shift) {lists:?}")
}

fn compare(site: &Site, tensors: &[(Tensor, usize)], norm_type: NormType) -> Result<()> {
    let (_placed, views) = place(site, tensors)?;
    let report = GradientNorm::new(&site.kernels, &views)?.measure(&site.stream, &how(norm_type))?.wait(PATIENCE)?;
    agree(report, on_host(tensors, norm_type)?, || name(tensors, norm_type))
}

/// Measured in two launches, twice, as buckets are.
fn by_bucket(site: &Site, tensors: &[(Tensor, usize)], norm_type: NormType) -> Result<()> {
    let (_placed, views) = place(site, tensors)?;
    let mut norm = GradientNorm::new(&site.kernels, &views)?;
    for border in [1, tensors.len() - 1] {
        norm.measure_part(&site.stream, &how(norm_type), border..tensors.len())?;
        let report = norm.measure_last(&site.stream, &how(norm_type), 0..border)?.wait(PATIENCE)?;
        agree(report, on_host(tensors, norm_type)?, || format!("by bucket, {}", name(tensors, norm_type)))?;
    }
    Ok(())
}

fn unscale(site: &Site, tensors: &[(Tensor, usize)], dst: annulus::DType, norm_type: NormType) -> Result<()> {
    let scaler = GradScaler::new(1024.0, 2.0, 0.5, 2000)?;
    let mut results: Vec<(Tensor, usize)> =
        tensors.iter().map(|(src, shift)| (Tensor::zeros(dst, src.len_elems()), *shift)).collect();
    let (_sources, src_views) = place(site, tensors)?;
    let (placed, dst_views) = place(site, &results)?;
    let pairs: Vec<_> = src_views.into_iter().zip(dst_views).collect();
    let factor = Buffer::filled(&site.device, &[scaler.scale()])?;
    let mut norm = UnscaleNorm::new(&site.kernels, &pairs)?;
    let report = norm.measure(&site.stream, &how(norm_type), &factor.view())?.wait(PATIENCE)?;

    let lens: Vec<usize> = tensors.iter().map(|(tensor, _)| tensor.len_elems()).collect();
    let mut slots = NormSlots::new(&lens)?;
    slots.begin(norm_type)?;
    for (index, ((src, _), (dst, _))) in tensors.iter().zip(&mut results).enumerate() {
        slots.unscale_at(index, 0, src.slice(), dst.slice_mut(), scaler.inv_scale())?;
    }
    let what = || format!("to {dst}, {}", name(tensors, norm_type));
    agree(report, slots.combine()?, what)?;
    for ((expected, _), placed) in results.iter().zip(&placed) {
        if let Some(difference) = site.fetch(placed)?.difference(expected) {
            return Err(format!("unscaled {}: {difference}", what()).into());
        }
    }
    Ok(())
}
