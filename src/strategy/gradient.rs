//! Backward as the strategy sees it: gradients that arrive one after another.

use half::{bf16, f16};

use super::cuda::DeviceReceiver;
use super::module::Parameter;
use crate::dtype::Element;
use crate::error::Result;
use crate::ops::{self, Saturate, Slice, SliceMut};

/// A loss whose gradient can be computed: what connects an autograd library to a strategy.
///
/// `backward` computes the gradients of `module`'s parameters and hands each to `gradients` as soon as it is final. The earlier
/// that is, the more of the communication is hidden behind the rest. Any closure of the right shape will do, too.
///
/// Under precisions with a scaled loss the gradients must be those of the loss times
/// [`loss_scale`](GradSink::loss_scale).
pub trait Backward<M: ?Sized> {
    /// Computes gradients and writes them.
    ///
    /// # Errors
    /// Whatever went wrong. The gradients accumulated so far are thrown away; if they were to be reduced, the strategy
    /// becomes unusable on every rank, because the others wait for reductions that do not come.
    fn backward(&self, module: &mut M, gradients: &mut GradSink<'_>) -> Result<()>;
}

impl<M: ?Sized, F> Backward<M> for F
where
    F: Fn(&mut M, &mut GradSink<'_>) -> Result<()>,
{
    fn backward(&self, module: &mut M, gradients: &mut GradSink<'_>) -> Result<()> {
        self(module, gradients)
    }
}

mod sealed {
    pub trait Sealed {}
}

/// Element types in which gradients are written: f32, bf16 and f16. They are converted to the type of the buckets.
pub trait GradientElement: Element + sealed::Sealed {
    /// The elements as an operand.
    #[doc(hidden)]
    fn slice(elements: &[Self]) -> Slice<'_>;
}

macro_rules! gradient_elements {
    ($($type:ty => $variant:ident),*) => {$(
        impl sealed::Sealed for $type {}
        impl GradientElement for $type {
            fn slice(elements: &[Self]) -> Slice<'_> {
                Slice::$variant(elements)
            }
        }
    )*};
}

gradient_elements!(f32 => F32, bf16 => BF16, f16 => F16);

/// Buckets of a module during a backward.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BucketProgress {
    /// All of them.
    pub total: usize,
    /// Those whose reduction this backward has started; always the first ones.
    pub launched: usize,
    /// Those of them whose reduction has ended.
    pub reduced: usize,
}

/// Where a strategy takes gradients.
pub(crate) trait Receiver {
    fn receive(&mut self, parameter: &Parameter, gradient: Slice<'_>, is_last: bool) -> Result<()>;
    fn loss_scale(&self) -> Result<f32>;
    fn is_synchronizing(&self) -> bool;
    fn buckets(&self) -> BucketProgress;
    /// The same on a device, if that is where gradients are.
    fn on_device(&mut self) -> Option<&mut dyn DeviceReceiver>;
}

/// Takes the gradients of one backward.
///
/// # Synchronization
/// The gradient is copied before the call returns. When the last gradient of a bucket has arrived its reduction starts at once
/// on the communication stream, while backward goes on.
pub struct GradSink<'s> {
    pub(super) receiver: &'s mut dyn Receiver,
}

impl<'s> GradSink<'s> {
    pub(crate) fn new(receiver: &'s mut dyn Receiver) -> GradSink<'s> {
        GradSink { receiver }
    }

    /// What the loss is to be multiplied with before it is differentiated; 1 unless the precision scales losses.
    ///
    /// # Synchronization
    /// On a device with a scaled loss, waits on the host for the step in flight, which sets the scale.
    ///
    /// # Errors
    /// The error of that step.
    pub fn loss_scale(&self) -> Result<f32> {
        self.receiver.loss_scale()
    }

    /// Writes the gradient of `parameter`: `[parameter.len_elems()]`, row-major. It is final: a second `write` of the same
    /// parameter in one backward is an error. It is added to what earlier micro-batches left, if there were any.
    ///
    /// Parameters that get no gradient in a backward count as having a gradient of zero.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`](crate::Error::InvalidArgument) if the parameter is not of this module or has its gradient
    /// already; [`Error::LengthMismatch`](crate::Error::LengthMismatch); the error that poisoned the strategy.
    pub fn write<T: GradientElement>(&mut self, parameter: &Parameter, gradient: &[T]) -> Result<()> {
        self.receiver.receive(parameter, T::slice(gradient), true)
    }

    /// Adds to the gradient of `parameter` without making it final: for a parameter that is used in several places. A
    /// [`write`](GradSink::write) may follow; at the end of backward the gradient is final anyway.
    ///
    /// # Errors
    /// As [`write`](GradSink::write).
    pub fn add<T: GradientElement>(&mut self, parameter: &Parameter, gradient: &[T]) -> Result<()> {
        self.receiver.receive(parameter, T::slice(gradient), false)
    }

    /// Whether this backward's gradients are reduced over the ranks: not under `no_backward_sync`.
    pub fn is_synchronizing(&self) -> bool {
        self.receiver.is_synchronizing()
    }

    /// How far the reductions of this backward have come.
    pub fn buckets(&self) -> BucketProgress {
        self.receiver.buckets()
    }
}

/// Elements converted at a time when a gradient is added in another type.
const CHUNK_ELEMS: usize = 512;

/// `target = source`, or `target += source` with the sum in f32, rounded once to the target's type.
pub(crate) fn contribute(mut target: SliceMut<'_>, source: Slice<'_>, replace: bool) -> Result<()> {
    if replace {
        return ops::cast(source, target, Saturate::No);
    }
    if let (SliceMut::F32(target), Slice::F32(source)) = (&mut target, source) {
        target.iter_mut().zip(source).for_each(|(sum, term)| *sum += term);
        return Ok(());
    }
    let (mut sums, mut terms) = ([0_f32; CHUNK_ELEMS], [0_f32; CHUNK_ELEMS]);
    let len_elems = target.len_elems();
    for start in (0..len_elems).step_by(CHUNK_ELEMS) {
        let range = start..len_elems.min(start + CHUNK_ELEMS);
        let (sums, terms) = (&mut sums[..range.len()], &mut terms[..range.len()]);
        ops::cast(part(&source, range.clone()), SliceMut::F32(terms), Saturate::No)?;
        ops::cast(part(&target.as_slice(), range.clone()), SliceMut::F32(sums), Saturate::No)?;
        sums.iter_mut().zip(&*terms).for_each(|(sum, term)| *sum += term);
        ops::cast(Slice::F32(sums), part_mut(&mut target, range), Saturate::No)?;
    }
    Ok(())
}

fn part<'a>(slice: &Slice<'a>, range: std::ops::Range<usize>) -> Slice<'a> {
    match slice {
        Slice::F32(elements) => Slice::F32(&elements[range]),
        Slice::F16(elements) => Slice::F16(&elements[range]),
        Slice::BF16(elements) => Slice::BF16(&elements[range]),
        Slice::F64(elements) => Slice::F64(&elements[range]),
    }
}

fn part_mut<'a>(slice: &'a mut SliceMut<'_>, range: std::ops::Range<usize>) -> SliceMut<'a> {
    match slice {
        SliceMut::F32(elements) => SliceMut::F32(&mut elements[range]),
        SliceMut::F16(elements) => SliceMut::F16(&mut elements[range]),
        SliceMut::BF16(elements) => SliceMut::BF16(&mut elements[range]),
        SliceMut::F64(elements) => SliceMut::F64(&mut elements[range]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_in_any_pair_of_types() {
        let len = 2 * CHUNK_ELEMS + 3;
        let first: Vec<f32> = (0..len).map(|i| i as f32 * 0.25).collect();
        let halves: Vec<bf16> = (0..len).map(|i| bf16::from_f32((i % 100) as f32)).collect();
        let mut sum = vec![f32::NAN; len];
        contribute(SliceMut::F32(&mut sum), Slice::F32(&first), true).unwrap();
        contribute(SliceMut::F32(&mut sum), Slice::BF16(&halves), false).unwrap();
        assert!(sum.iter().enumerate().all(|(i, x)| *x == i as f32 * 0.25 + (i % 100) as f32));
        let mut narrow = vec![f16::NAN; len];
        contribute(SliceMut::F16(&mut narrow), Slice::BF16(&halves), true).unwrap();
        contribute(SliceMut::F16(&mut narrow), Slice::F32(&first), false).unwrap();
        assert!(narrow.iter().zip(&sum).all(|(a, b)| *a == f16::from_f32(*b)));
    }
}
