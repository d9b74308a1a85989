//! Tensors of more than 2^31 elements, where the card has the memory.

use annulus::device::cuda::{Buffer, View};
use annulus::ops::cuda::{CastList, GradientNorm, Measure, Skip};
use annulus::ops::{NormSlots, Saturate, Slice, cast};
use annulus::{DType, NormType};
use half::bf16;

use crate::Result;
use crate::part::Scale;
use crate::record::{Record, check, say};
use crate::site::{PATIENCE, Site};
use crate::tensor::{Tensor, Values};

const LEN_ELEMS: usize = (1 << 31) + 1_000_003;
/// Of f32 and bf16, and what the program needs beside.
const NEED_BYTES: u64 = LEN_ELEMS as u64 * 6 + (1 << 30);
/// Elements that are not zero: at the start, across 2^31, at the end. They begin at chunks.
const PIECE_ELEMS: usize = 4 * NormSlots::CHUNK_ELEMS;
const PIECES: [usize; 3] = [0, (1 << 31) - PIECE_ELEMS / 2, LEN_ELEMS / PIECE_ELEMS * PIECE_ELEMS];

/// Compares all.
///
/// # Errors
/// What keeps the device from being used.
pub fn run(scale: Scale) -> Result<()> {
    let site = Site::open()?;
    let (free_bytes, _) = site.device.memory_bytes()?;
    if free_bytes < NEED_BYTES || scale == Scale::Short {
        let need_gb = NEED_BYTES as f64 / 1e9;
        let why = format!("{LEN_ELEMS} elements need {need_gb:.0} GB, {:.1} GB are free", free_bytes as f64 / 1e9);
        say(&Record::Skipped(why));
        return Ok(());
    }
    let limit = std::time::Duration::from_secs(30);
    check("cast and norm of more than 2^31 elements", limit, |tally| {
        let wide = Buffer::zeroed(&site.device, DType::F32, LEN_ELEMS)?;
        let narrow = Buffer::zeroed(&site.device, DType::BF16, LEN_ELEMS)?;
        let mut expected = Vec::new();
        for first in PIECES {
            let len_elems = PIECE_ELEMS.min(LEN_ELEMS - first);
            let source = Tensor::of(DType::F32, len_elems, Values::Ordinary, first as u64);
            wide.view().slice(first, len_elems)?.write(source.elements::<f32>(), &site.stream)?;
            let mut rounded = Tensor::zeros(DType::BF16, len_elems);
            cast(source.slice(), rounded.slice_mut(), Saturate::No)?;
            expected.push((first, rounded));
        }
        CastList::new(&site.kernels, &[(wide.view(), narrow.view())])?.cast(&site.stream, Saturate::No)?;
        for (first, rounded) in &expected {
            let found = read(&site, &narrow.view().slice(*first, rounded.len_elems())?)?;
            if let Some(difference) = found.difference(rounded) {
                return Err(format!("cast, from element {first} on: {difference}").into());
            }
            tally.agreed();
        }
        let how = Measure { norm_type: NormType::L2, max_norm: f64::INFINITY, grad_scale: None, skip: Skip::Never };
        let report = GradientNorm::new(&site.kernels, &[narrow.view()])?.measure(&site.stream, &how)?.wait(PATIENCE)?;
        let host = on_host(&expected)?;
        if report.total_norm.to_bits() != host.to_bits() {
            return Err(format!("norm {:e}, on the host {host:e}", report.total_norm).into());
        }
        tally.agreed();
        Ok(())
    });
    Ok(())
}

fn read(site: &Site, view: &View) -> Result<Tensor> {
    let mut tensor = Tensor::zeros(DType::BF16, view.len_elems());
    view.read(tensor.elements_mut::<bf16>(), &site.stream, PATIENCE)?;
    Ok(tensor)
}

/// The norm of the pieces among zeroes, which are measured without being there.
fn on_host(pieces: &[(usize, Tensor)]) -> Result<f64> {
    let zeroes = vec![bf16::ZERO; PIECE_ELEMS];
    let mut slots = NormSlots::new(&[LEN_ELEMS])?;
    slots.begin(NormType::L2)?;
    for first in (0..LEN_ELEMS).step_by(PIECE_ELEMS) {
        slots.measure_at(0, first, Slice::BF16(&zeroes[..PIECE_ELEMS.min(LEN_ELEMS - first)]))?;
    }
    for (first, piece) in pieces {
        slots.measure_at(0, *first, piece.slice())?;
    }
    Ok(slots.combine()?.total_norm)
}
