//! The tensors that are timed: those of real models, as their gradients lie in memory.

use annulus::device::cuda::{Buffer, Device, View};
use annulus::dtype::Element;
use annulus::{DType, NormType};

use crate::Result;
use crate::part::Scale;
use crate::site::Site;
use crate::tensor::{Tensor, Values};
use crate::with_float;

/// Bytes of an element in the largest case, and in PyTorch's version of it.
const MOST_BYTES_PER_ELEM: u64 = 36;
const LAYERS: usize = 28;

/// Lengths of the 338 tensors of Qwen2.5-1.5B (1,543,714,304 elements; Qwen Team 2024, `config.json`), with so many layers.
fn qwen2(layers: usize) -> Vec<usize> {
    const WIDTH: usize = 1536;
    const KEYS: usize = 256;
    const HIDDEN: usize = 8960;
    const TOKENS: usize = 151_936;
    let attention = [WIDTH * WIDTH, WIDTH, KEYS * WIDTH, KEYS, KEYS * WIDTH, KEYS, WIDTH * WIDTH];
    let rest = [WIDTH * HIDDEN, WIDTH * HIDDEN, HIDDEN * WIDTH, WIDTH, WIDTH];
    let layer = attention.into_iter().chain(rest);
    let mut lens = vec![TOKENS * WIDTH];
    (0..layers).for_each(|_| lens.extend(layer.clone()));
    lens.push(WIDTH);
    lens
}

/// Lengths of the 148 tensors of GPT-2 (124,439,808 elements; Radford et al. 2019).
pub fn gpt2() -> Vec<usize> {
    like_gpt2(768, 50_257, 1024)
}

/// As many tensors of the same kinds, so many elements wide.
pub fn like_gpt2(width: usize, tokens: usize, positions: usize) -> Vec<usize> {
    let norm = [width, width];
    let attention = [3 * width * width, 3 * width, width * width, width];
    let hidden = [4 * width * width, 4 * width, 4 * width * width, width];
    let layer = norm.into_iter().chain(attention).chain(norm).chain(hidden);
    let mut lens = vec![tokens * width, positions * width];
    (0..12).for_each(|_| lens.extend(layer.clone()));
    lens.extend(norm);
    lens
}

/// As many layers as the device's memory allows, or as a short run has time for.
///
/// # Errors
/// What the driver says; a device too small for the embedding alone.
pub fn that_fits(device: &Device, scale: Scale) -> Result<Vec<usize>> {
    let (_, total_bytes) = device.memory_bytes()?;
    let most_elems = total_bytes / 10 * 8 / MOST_BYTES_PER_ELEM;
    let most_layers = if scale == Scale::Full { LAYERS } else { LAYERS / 4 };
    let fits = |layers: &usize| qwen2(*layers).iter().sum::<usize>() as u64 <= most_elems;
    let layers = (0..=most_layers).rev().find(fits);
    layers.map(qwen2).ok_or_else(|| format!("{total_bytes} bytes of memory are too few to time anything").into())
}

/// Tensors on the device, one behind the other, each from a multiple of 128 elements on, with a gradient's values.
///
/// # Errors
/// What the driver says.
pub fn tensors(site: &Site, dtype: DType, lens: &[usize]) -> Result<Vec<View>> {
    Ok(in_one(site, dtype, lens)?.1)
}

/// As [`tensors`], behind what they all lie in.
///
/// # Errors
/// What the driver says.
pub fn in_one(site: &Site, dtype: DType, lens: &[usize]) -> Result<(View, Vec<View>)> {
    const BLOCK_ELEMS: usize = 1 << 22;
    let whole: usize = lens.iter().map(|len_elems| len_elems.next_multiple_of(128)).sum();
    let buffer = Buffer::zeroed(&site.device, dtype, whole)?;
    let block = Tensor::of(dtype, BLOCK_ELEMS.min(whole), Values::Ordinary, 1);
    let view = buffer.view();
    let first = view.slice(0, block.len_elems())?;
    with_float!(dtype, T => write::<T>(site, &first, &block))?;
    for at in (BLOCK_ELEMS..whole).step_by(BLOCK_ELEMS) {
        let len_elems = BLOCK_ELEMS.min(whole - at);
        view.slice(at, len_elems)?.copy_from(&first.slice(0, len_elems)?, &site.stream)?;
    }
    site.synchronize()?;
    let mut at = 0;
    let slices = lens.iter().map(|len_elems| {
        let slice = view.slice(at, *len_elems);
        at += len_elems.next_multiple_of(128);
        Ok(slice?)
    });
    let slices = slices.collect::<Result<_>>()?;
    Ok((view, slices))
}

fn write<T: Element>(site: &Site, view: &View, block: &Tensor) -> Result<()> {
    Ok(view.write(block.elements::<T>(), &site.stream)?)
}

/// The L2 norm of tensors on the device.
///
/// # Errors
/// What the driver says.
pub fn norm_of(site: &Site, views: &[View]) -> Result<f64> {
    use annulus::ops::cuda::{GradientNorm, Measure, Skip};
    let how = Measure { norm_type: NormType::L2, max_norm: f64::INFINITY, grad_scale: None, skip: Skip::Never };
    let ticket = GradientNorm::new(&site.kernels, views)?.measure(&site.stream, &how)?;
    Ok(ticket.wait(crate::site::PATIENCE)?.total_norm)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_models_are_those_that_are_named() {
        assert_eq!((qwen2(LAYERS).len(), qwen2(LAYERS).iter().sum::<usize>()), (338, 1_543_714_304));
        assert_eq!((gpt2().len(), gpt2().iter().sum::<usize>()), (148, 124_439_808));
    }
}
