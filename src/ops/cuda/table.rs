//! The tensors of one list: checked, uploaded, kept alive, and the shape of the launches over them.

use std::ops::Range;
use std::sync::Arc;

use bytemuck::Pod;

use crate::abi::{ChunkRange, ChunkRef, chunks};
use crate::device::cuda::{Buffer, Device, Kernels, Shape, Stream, View};
use crate::dtype::DType;
use crate::error::{Error, Result};

/// Every float type.
pub(super) const FLOATS: &[DType] = &[DType::F32, DType::F16, DType::BF16, DType::F64];
/// Those whose arithmetic is f32.
pub(super) const SINGLES: &[DType] = &[DType::F32, DType::F16, DType::BF16];
pub(super) const HALVES: &[DType] = &[DType::F16, DType::BF16];

/// Memory that a launch reads or writes.
#[derive(Clone, Copy)]
pub(super) struct Region {
    begin: u64,
    end: u64,
    tensor: usize,
    is_written: bool,
}

impl Region {
    pub fn address(&self) -> u64 {
        self.begin
    }

    fn of(view: &View, tensor: usize, is_written: bool) -> Region {
        let begin = view.address();
        Region { begin, end: begin + view.len_bytes() as u64, tensor, is_written }
    }
}

/// Collects what a list's tensors use, and checks it.
pub(super) struct Operands<'d> {
    device: &'d Device,
    regions: Vec<Region>,
    views: Vec<View>,
}

impl<'d> Operands<'d> {
    pub fn new(device: &'d Device) -> Operands<'d> {
        Operands { device, regions: Vec::new(), views: Vec::new() }
    }

    /// The address of `view`, which is read as `what` of a tensor.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a dtype that is not `accepted`; [`Error::InvalidArgument`] for a view of another device.
    pub fn read(&mut self, what: &'static str, tensor: usize, view: &View, accepted: &[DType]) -> Result<u64> {
        self.take(what, tensor, view, accepted, false)
    }

    /// As [`Operands::read`], of a view that is written, and perhaps read before.
    ///
    /// # Errors
    /// As [`Operands::read`].
    pub fn write(&mut self, what: &'static str, tensor: usize, view: &View, accepted: &[DType]) -> Result<u64> {
        self.take(what, tensor, view, accepted, true)
    }

    /// The addresses of a source and a target of one length. They may be the same memory in the same type.
    ///
    /// # Errors
    /// As [`Operands::read`]; [`Error::LengthMismatch`].
    pub fn pair(&mut self, tensor: usize, src: &View, dst: &View, accepted: [&[DType]; 2]) -> Result<[u64; 2]> {
        let (target, source) = pair_regions(self.device, tensor, (src, dst), accepted)?;
        if !src.is_empty() {
            self.regions.extend([Some(target), source].into_iter().flatten());
        }
        self.views.extend([src, dst].map(View::clone));
        Ok([src.address(), dst.address()])
    }

    fn take(
        &mut self,
        what: &'static str,
        tensor: usize,
        view: &View,
        accepted: &[DType],
        is_written: bool,
    ) -> Result<u64> {
        check_operand(what, self.device, tensor, view, accepted)?;
        if !view.is_empty() {
            self.regions.push(Region::of(view, tensor, is_written));
        }
        self.views.push(view.clone());
        Ok(view.address())
    }

    /// As [`check_apart`], of all that was taken.
    ///
    /// # Errors
    /// As that.
    pub fn check_apart(&mut self) -> Result<()> {
        check_apart(&mut self.regions)
    }
}

/// Fails if anything written is also something else's: blocks run in any order.
///
/// # Errors
/// [`Error::InvalidArgument`] names two tensors.
pub(super) fn check_apart(regions: &mut [Region]) -> Result<()> {
    regions.sort_unstable_by_key(|region| region.begin);
    // The region that reaches furthest so far, of all and of those that are written.
    let (mut any, mut written): (Option<&Region>, Option<&Region>) = (None, None);
    for region in &*regions {
        let before = if region.is_written { any } else { written };
        if let Some(before) = before.filter(|before| before.end > region.begin) {
            return Err(overlap(before.tensor, region.tensor));
        }
        let further = |old: Option<&Region>| old.is_none_or(|old| region.end > old.end);
        if further(any) {
            any = Some(region);
        }
        if region.is_written && further(written) {
            written = Some(region);
        }
    }
    Ok(())
}

/// Where the regions of a launch lie, as far as it takes no sorting to tell: whether they are clearly apart, which those of a
/// bucket's gradients nearly always are, as they follow one another in it and come from elsewhere.
pub(super) struct Outline {
    read: Hull,
    written: Hull,
    /// A target began or ended among those before it. It may still be apart from each.
    is_unclear: bool,
}

/// From the begin of the first of some regions to the end of the last.
#[derive(Clone, Copy)]
struct Hull {
    begin: u64,
    end: u64,
}

impl Hull {
    /// Of no regions: apart from everything.
    const EMPTY: Hull = Hull { begin: u64::MAX, end: 0 };

    fn is_apart(self, other: Hull) -> bool {
        self.end <= other.begin || other.end <= self.begin
    }

    fn extend(&mut self, other: Hull) {
        *self = Hull { begin: self.begin.min(other.begin), end: self.end.max(other.end) };
    }
}

impl Outline {
    pub fn new() -> Outline {
        Outline { read: Hull::EMPTY, written: Hull::EMPTY, is_unclear: false }
    }

    /// Adds what [`pair_regions`] tells of a pair.
    pub fn extend(&mut self, target: &Region, source: Option<&Region>) {
        let hull = |region: &Region| Hull { begin: region.begin, end: region.end };
        self.is_unclear |= !hull(target).is_apart(self.written);
        self.written.extend(hull(target));
        if let Some(source) = source {
            self.read.extend(hull(source));
        }
    }

    /// Whether [`check_apart`] would find nothing. If not, it may still find nothing.
    pub fn is_apart(&self) -> bool {
        !self.is_unclear && self.read.is_apart(self.written)
    }
}

/// What one pair of a list uses, as [`Operands::pair`] takes it: its target, and its source unless that is the same memory.
///
/// # Errors
/// As [`Operands::pair`].
#[inline]
pub(super) fn pair_regions(
    device: &Device,
    tensor: usize,
    (src, dst): (&View, &View),
    accepted: [&[DType]; 2],
) -> Result<(Region, Option<Region>)> {
    check_length("target", tensor, src.len_elems(), dst)?;
    check_operand("target", device, tensor, dst, accepted[1])?;
    check_operand("source", device, tensor, src, accepted[0])?;
    let (target, source) = (Region::of(dst, tensor, true), Region::of(src, tensor, false));
    let is_in_place = source.begin == target.begin && src.dtype() == dst.dtype();
    Ok((target, (!is_in_place).then_some(source)))
}

fn overlap(one: usize, other: usize) -> Error {
    Error::InvalidArgument {
        argument: "tensors on the device",
        value: format!("tensors {one} and {other}, which overlap"),
        accepted: "what is written must not be used by another tensor or under another type",
    }
}

/// Fails unless `view` is on `device`, and of a dtype that is `accepted`.
fn check_operand(what: &'static str, device: &Device, tensor: usize, view: &View, accepted: &[DType]) -> Result<()> {
    check_device(what, device, view)?;
    if accepted.contains(&view.dtype()) { Ok(()) } else { Err(unsupported(what, tensor, view)) }
}

#[cold]
fn unsupported(what: &'static str, tensor: usize, view: &View) -> Error {
    Error::Unsupported { op: format!("{what} of tensor {tensor}"), dtype: view.dtype() }
}

/// Fails unless `view` is on `device`.
pub(super) fn check_device(what: &'static str, device: &Device, view: &View) -> Result<()> {
    if view.device().is_same(device) { Ok(()) } else { Err(elsewhere(what, view)) }
}

#[cold]
fn elsewhere(what: &'static str, view: &View) -> Error {
    Error::InvalidArgument {
        argument: what,
        value: format!("a view of device {}", view.device().ordinal()),
        accepted: "must be on the device that the kernels are loaded on",
    }
}

/// Fails unless `view` has as many elements as the rest of its tensor.
pub(super) fn check_length(what: &'static str, tensor: usize, expected_elems: usize, view: &View) -> Result<()> {
    if view.len_elems() == expected_elems { Ok(()) } else { Err(mismatch(what, tensor, expected_elems, view)) }
}

#[cold]
fn mismatch(what: &'static str, tensor: usize, expected_elems: usize, view: &View) -> Error {
    Error::LengthMismatch { what: format!("{what} of tensor {tensor}"), expected_elems, actual_elems: view.len_elems() }
}

/// How a kernel is launched over chunks.
#[derive(Clone, Copy)]
pub(super) struct Grid {
    pub threads: u32,
    /// Blocks that one multiprocessor holds: `__launch_bounds__` of the kernel.
    pub resident_blocks: u32,
}

impl Grid {
    /// A block for each chunk until the device is full: then every block takes several. At least one.
    pub fn shape(self, kernels: &Kernels, len_chunks: u64) -> Shape {
        let most = self.resident_blocks.saturating_mul(kernels.len_multiprocessors()).max(1);
        let blocks = u32::try_from(len_chunks).unwrap_or(u32::MAX).clamp(1, most);
        Shape { blocks, threads: self.threads, shared_bytes: 0, cooperative: false }
    }
}

/// The tables of a list in device memory.
pub(super) struct Table {
    kernels: Kernels,
    tensors: Buffer,
    chunks: Buffer,
    /// Of each tensor, its first chunk; and the number of all.
    first_chunks: Arc<[u64]>,
    /// The tensors and the tables: what a graph that holds a launch keeps.
    kept: Arc<[View]>,
}

impl Table {
    /// Uploads `entries`, the kernel's description of the tensors in `operands`. The host waits until it is there.
    ///
    /// # Errors
    /// As [`Operands::check_apart`]; [`Error::SizeOverflow`] for more than 2^32 tensors, or chunks of one; as
    /// [`Buffer::zeroed`].
    pub fn new<T: Pod>(
        kernels: &Kernels,
        entries: &[T],
        lens_elems: impl Iterator<Item = usize>,
        mut operands: Operands<'_>,
    ) -> Result<Table> {
        operands.check_apart()?;
        let lens_elems: Vec<u64> = lens_elems.map(|len_elems| len_elems as u64).collect();
        let refs: Vec<ChunkRef> = chunks(&lens_elems).ok_or_else(|| Error::SizeOverflow {
            what: "chunks of a list of tensors",
            detail: format!("{} tensors, the longest of {:?} elements", lens_elems.len(), lens_elems.iter().max()),
        })?;
        let mut first_chunks = vec![0; lens_elems.len() + 1];
        refs.iter().for_each(|chunk| first_chunks[chunk.tensor as usize + 1] += 1);
        (1..first_chunks.len()).for_each(|tensor| first_chunks[tensor] += first_chunks[tensor - 1]);
        let upload = |bytes: &[u8]| Buffer::filled(kernels.device(), bytes);
        let (tensors, chunks) = (upload(bytemuck::cast_slice(entries))?, upload(bytemuck::cast_slice(&refs))?);
        let kept = operands.views.into_iter().chain([tensors.view(), chunks.view()]).collect();
        Ok(Table { kernels: kernels.clone(), tensors, chunks, first_chunks: first_chunks.into(), kept })
    }

    pub fn kernels(&self) -> &Kernels {
        &self.kernels
    }

    pub fn len_tensors(&self) -> usize {
        self.first_chunks.len() - 1
    }

    pub fn first_chunks(&self) -> &Arc<[u64]> {
        &self.first_chunks
    }

    /// The address of the entries.
    pub fn tensors(&self) -> u64 {
        self.tensors.address()
    }

    /// All chunks.
    pub fn range(&self) -> ChunkRange {
        ChunkRange { chunks: self.chunks.address(), first_chunk: 0, len_chunks: self.first_chunks[self.len_tensors()] }
    }

    /// The chunks of some tensors.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if there are no such tensors.
    pub fn range_of(&self, tensors: Range<usize>) -> Result<ChunkRange> {
        match (self.first_chunks.get(tensors.start), self.first_chunks.get(tensors.end)) {
            (Some(first), Some(end)) if first <= end => {
                Ok(ChunkRange { first_chunk: *first, len_chunks: end - first, ..self.range() })
            }
            _ => Err(Error::InvalidArgument {
                argument: "tensors",
                value: format!("{tensors:?} of {}", self.len_tensors()),
                accepted: "a range of the list's tensors",
            }),
        }
    }

    /// Enqueues `kernel` over `len_chunks` chunks.
    ///
    /// # Errors
    /// As [`Kernels::launch`].
    ///
    /// # Safety
    /// As [`Kernels::launch`]: `arguments` is what the kernel takes, and points to nothing but this table and memory that
    /// lives as long.
    pub unsafe fn launch<A: Pod>(
        &self,
        kernel: &str,
        grid: Grid,
        len_chunks: u64,
        stream: &Stream,
        arguments: &A,
    ) -> Result<()> {
        stream.keep(&self.kept);
        // SAFETY: the caller's promise.
        unsafe { self.kernels.launch(kernel, grid.shape(&self.kernels, len_chunks), stream, arguments) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn region(tensor: usize, begin: u64, len: u64, is_written: bool) -> Region {
        Region { begin, end: begin + len, tensor, is_written }
    }

    #[test]
    fn gradients_of_a_bucket_are_clearly_apart() {
        for (up, sources) in [(true, 10_000), (false, 10_000), (true, 0), (false, 0)] {
            let mut outline = Outline::new();
            for tensor in 0..64 {
                let at = if up { tensor } else { 63 - tensor };
                let target = region(tensor as usize, 5_000 + 64 * at, 64, true);
                let source = region(tensor as usize, sources + 32 * ((7 * tensor) % 64), 32, false);
                outline.extend(&target, Some(&source));
            }
            assert!(outline.is_apart());
        }
    }

    proptest! {
        #[test]
        fn what_is_clearly_apart_is_apart(
            pairs in prop::collection::vec((0_u64..400, 1_u64..20, prop::option::of((0_u64..400, 1_u64..20))), 0..8)
        ) {
            let (mut outline, mut regions) = (Outline::new(), Vec::new());
            for (tensor, (begin, len, source)) in pairs.into_iter().enumerate() {
                let target = region(tensor, begin, len, true);
                let source = source.map(|(begin, len)| region(tensor, begin, len, false));
                outline.extend(&target, source.as_ref());
                regions.extend([Some(target), source].into_iter().flatten());
            }
            let is_apart = check_apart(&mut regions).is_ok();
            prop_assert!(is_apart || !outline.is_apart());
        }
    }
}
