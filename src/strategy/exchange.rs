//! Values that are reduced over ranks, and the groups they are reduced over.

use std::collections::{BTreeMap, HashMap};
use std::hash::BuildHasher;

use super::contract::Strategy;
use super::tensor::Tensor;
use crate::collective::Communicator;
use crate::dtype::{Element, ReduceOp};
use crate::error::Result;

/// Some of the ranks. Made by `Strategy::split_group`.
pub struct Group {
    pub(crate) communicator: Communicator,
}

impl Group {
    /// This rank's number in the group.
    pub fn rank(&self) -> u32 {
        self.communicator.rank()
    }

    /// How many ranks the group has.
    pub fn world_size(&self) -> u32 {
        self.communicator.world_size()
    }

    /// The members as ranks of the world, in the order of the group.
    pub fn members(&self) -> &[u32] {
        self.communicator.members()
    }
}

impl std::fmt::Debug for Group {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Group").field("rank", &self.rank()).field("members", &self.members()).finish()
    }
}

/// Reduces what it is shown, in place.
pub struct Reducer<'r> {
    strategy: &'r mut dyn Strategy,
    group: Option<&'r mut Group>,
    op: ReduceOp,
}

impl<'r> Reducer<'r> {
    pub(crate) fn new(strategy: &'r mut dyn Strategy, group: Option<&'r mut Group>, op: ReduceOp) -> Reducer<'r> {
        Reducer { strategy, group, op }
    }

    /// Reduces `elements` in one collective.
    ///
    /// # Errors
    /// [`Error::Unsupported`](crate::Error::Unsupported) if the reduction is not defined for the type, as `Avg` for integers;
    /// the errors of an all-reduce.
    pub fn elements<T: Element>(&mut self, elements: &mut [T]) -> Result<()> {
        let elements = bytemuck::cast_slice_mut(elements);
        self.strategy.all_reduce_elements(T::DTYPE, elements, self.group.as_deref_mut(), self.op)
    }

    /// Reduces `tensor` in one collective.
    ///
    /// # Errors
    /// As [`elements`](Reducer::elements).
    pub fn tensor(&mut self, tensor: &mut Tensor) -> Result<()> {
        self.strategy.all_reduce_tensor(tensor, self.group.as_deref_mut(), self.op)
    }
}

/// A value that can be reduced over ranks: tensors, numbers, and anything made of them.
///
/// Each part is one collective, so every rank must have the same parts in the same order. A struct of your own says what
/// its parts are:
///
/// ```
/// use annulus::strategy::{Reduce, Reducer};
///
/// struct Metrics {
///     loss: f64,
///     accuracy: f64,
///     name: String,
/// }
///
/// impl Reduce for Metrics {
///     fn reduce(&mut self, reducer: &mut Reducer<'_>) -> annulus::Result<()> {
///         self.loss.reduce(reducer)?;
///         self.accuracy.reduce(reducer) // the name stays as it is
///     }
/// }
/// ```
pub trait Reduce {
    /// Shows every part to `reducer`.
    ///
    /// # Errors
    /// Those of the reducer.
    fn reduce(&mut self, reducer: &mut Reducer<'_>) -> Result<()>;
}

impl Reduce for Tensor {
    fn reduce(&mut self, reducer: &mut Reducer<'_>) -> Result<()> {
        reducer.tensor(self)
    }
}

macro_rules! numbers {
    ($($type:ty),*) => {$(
        impl Reduce for $type {
            fn reduce(&mut self, reducer: &mut Reducer<'_>) -> Result<()> {
                reducer.elements(std::slice::from_mut(self))
            }
        }
    )*};
}

numbers!(f32, f64, half::f16, half::bf16, i32, i64, u8);

/// One collective for all elements.
impl<T: Element> Reduce for [T] {
    fn reduce(&mut self, reducer: &mut Reducer<'_>) -> Result<()> {
        reducer.elements(self)
    }
}

/// One collective for all elements.
impl<T: Element> Reduce for Vec<T> {
    fn reduce(&mut self, reducer: &mut Reducer<'_>) -> Result<()> {
        reducer.elements(self)
    }
}

/// One collective for all elements.
impl<T: Element, const N: usize> Reduce for [T; N] {
    fn reduce(&mut self, reducer: &mut Reducer<'_>) -> Result<()> {
        reducer.elements(self)
    }
}

impl Reduce for Vec<Tensor> {
    fn reduce(&mut self, reducer: &mut Reducer<'_>) -> Result<()> {
        self.iter_mut().try_for_each(|tensor| tensor.reduce(reducer))
    }
}

impl<T: Reduce> Reduce for Option<T> {
    fn reduce(&mut self, reducer: &mut Reducer<'_>) -> Result<()> {
        self.iter_mut().try_for_each(|value| value.reduce(reducer))
    }
}

impl<T: Reduce + ?Sized> Reduce for &mut T {
    fn reduce(&mut self, reducer: &mut Reducer<'_>) -> Result<()> {
        (**self).reduce(reducer)
    }
}

impl<K: Ord, V: Reduce> Reduce for BTreeMap<K, V> {
    fn reduce(&mut self, reducer: &mut Reducer<'_>) -> Result<()> {
        self.values_mut().try_for_each(|value| value.reduce(reducer))
    }
}

/// In the order of the keys, which is the same on every rank; that of a hash map is not.
impl<K: Ord, V: Reduce, S: BuildHasher> Reduce for HashMap<K, V, S> {
    fn reduce(&mut self, reducer: &mut Reducer<'_>) -> Result<()> {
        let mut entries: Vec<(&K, &mut V)> = self.iter_mut().collect();
        entries.sort_unstable_by_key(|(key, _)| *key);
        entries.into_iter().try_for_each(|(_, value)| value.reduce(reducer))
    }
}

macro_rules! tuples {
    ($(($($name:ident),+);)*) => {$(
        impl<$($name: Reduce),+> Reduce for ($($name,)+) {
            fn reduce(&mut self, reducer: &mut Reducer<'_>) -> Result<()> {
                #[allow(non_snake_case)] // the type's name is the variable's
                let ($($name,)+) = self;
                $($name.reduce(reducer)?;)+
                Ok(())
            }
        }
    )*};
}

tuples! {
    (A);
    (A, B);
    (A, B, C);
    (A, B, C, D);
    (A, B, C, D, E);
    (A, B, C, D, E, F);
}
