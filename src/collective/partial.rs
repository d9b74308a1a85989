//! Partial sums on their way around a ring.
//!
//! ```text
//!   start    partial = widen(own)                          the first rank of the chunk's way
//!   fold     partial = received op widen(own)              every rank between
//!   finish   result  = narrow(received op widen(own))      the owner; avg divides before it narrows
//! ```
//! A partial travels as the accumulator type (16-bit floats: f32, rounded once at the end) or, by request, as the
//! element type (rounded at every hop).

use std::marker::PhantomData;

use half::{bf16, f16};

use super::combine::{Combine, load, store};
use super::descriptor::Partials;
use super::lane::{Lane, WIDTH};
use super::simd::{self, Loop};
use crate::dtype::{DType, ReduceOp};

/// Where a partial is made.
#[derive(Clone, Copy)]
pub(super) enum Hop {
    Start,
    Fold,
    Finish,
}

/// Bytes of one partial.
pub(super) fn size_bytes(dtype: DType, partials: Partials) -> usize {
    if dtype.is_half() && partials == Partials::F32 { 4 } else { dtype.size_bytes() }
}

/// Combines `received` (a partial; not read by `Start`) and `own` (elements) into `to`: a partial, or, by `Finish`,
/// elements.
///
/// # Safety
/// All are valid for `len_elems` of their type and nobody else accesses them; `to` is the same as or disjoint from the
/// others.
pub(super) unsafe fn hop(
    hop: Hop,
    (dtype, partials): (DType, Partials),
    how: Combine,
    received: *const u8,
    own: *const u8,
    to: *mut u8,
    len_elems: usize,
) {
    let args = Args { hop, how, received, own, to, len_elems };
    // SAFETY: the caller's promises; the types are those of `dtype` and `partials`.
    unsafe {
        match (dtype, partials) {
            (DType::F32, _) => run::<f32, f32>(args),
            (DType::F16, Partials::F32) => run::<f16, f32>(args),
            (DType::F16, Partials::Native) => run::<f16, f16>(args),
            (DType::BF16, Partials::F32) => run::<bf16, f32>(args),
            (DType::BF16, Partials::Native) => run::<bf16, bf16>(args),
            (DType::F64, _) => run::<f64, f64>(args),
            (DType::I32, _) => run::<i32, i32>(args),
            (DType::I64, _) => run::<i64, i64>(args),
            (DType::U8, _) => run::<u8, u8>(args),
        }
    }
}

#[derive(Clone, Copy)]
struct Args {
    hop: Hop,
    how: Combine,
    received: *const u8,
    own: *const u8,
    to: *mut u8,
    len_elems: usize,
}

struct Hops<T, P>(Args, PhantomData<(T, P)>);

/// # Safety
/// As for [`hop`], with elements `T` and partials `P`.
unsafe fn run<T: Lane, P: Lane<Acc = T::Acc>>(args: Args) {
    // SAFETY: the caller's promises.
    unsafe { simd::run(Hops::<T, P>(args, PhantomData)) }
}

impl<T: Lane, P: Lane<Acc = T::Acc>> Loop for Hops<T, P> {
    #[inline(always)]
    unsafe fn run<const LEVEL: u8>(self) {
        let Args { hop, how, received, own, to, len_elems } = self.0;
        for at in (0..len_elems).step_by(WIDTH) {
            let valid = (len_elems - at).min(WIDTH);
            // SAFETY: `at + valid <= len_elems` elements are inside all three.
            unsafe {
                let mut acc = T::widen::<LEVEL>(&load(own.cast::<T>().wrapping_add(at), valid));
                if let ReduceOp::PremulSum(factor) = how.op {
                    for acc in &mut acc {
                        *acc = T::scale(*acc, factor);
                    }
                }
                if !matches!(hop, Hop::Start) {
                    let sum = P::widen::<LEVEL>(&load(received.cast::<P>().wrapping_add(at), valid));
                    match how.op {
                        ReduceOp::Min => fold(&mut acc, &sum, T::min),
                        ReduceOp::Max => fold(&mut acc, &sum, T::max),
                        ReduceOp::Sum | ReduceOp::Avg | ReduceOp::PremulSum(_) => fold(&mut acc, &sum, T::add),
                    }
                }
                if matches!(hop, Hop::Finish) {
                    if how.op == ReduceOp::Avg {
                        for acc in &mut acc {
                            *acc = T::divide(*acc, how.world_size);
                        }
                    }
                    store(to.cast::<T>().wrapping_add(at), &T::narrow::<LEVEL>(&acc), valid);
                } else {
                    store(to.cast::<P>().wrapping_add(at), &P::narrow::<LEVEL>(&acc), valid);
                }
            }
        }
    }
}

/// `acc = received op acc`: what came first stands first.
#[inline(always)]
fn fold<A: Copy>(acc: &mut [A; WIDTH], received: &[A; WIDTH], op: impl Fn(A, A) -> A) {
    for (acc, received) in acc.iter_mut().zip(received) {
        *acc = op(*received, *acc);
    }
}
