//! Moving a batch to the strategy's device, whatever it is made of.

use std::collections::{BTreeMap, HashMap};
use std::hash::{BuildHasher, Hash};

use super::cuda::BatchMover;
use super::tensor::Tensor;
use crate::error::{Error, Result};

/// Where a strategy computes.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Device {
    /// The processor: memory is the process's own, and moving to it is no copy.
    Host,
    /// An NVIDIA device.
    Cuda(BatchMover),
}

impl std::fmt::Display for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Device::Host => f.write_str("host"),
            Device::Cuda(mover) => mover.fmt(f),
        }
    }
}

/// A value whose tensors can be moved to a device: a tensor, or anything made of such values. The same type comes back.
///
/// Numbers, strings and booleans pass through. A struct of your own says what it is made of:
///
/// ```
/// use annulus::strategy::{Device, Tensor, ToDevice};
///
/// struct Batch {
///     tokens: Tensor,
///     targets: Tensor,
///     weight: f32,
/// }
///
/// impl ToDevice for Batch {
///     fn to_device(self, device: &Device) -> annulus::Result<Self> {
///         Ok(Batch {
///             tokens: self.tokens.to_device(device)?,
///             targets: self.targets.to_device(device)?,
///             weight: self.weight,
///         })
///     }
/// }
/// ```
///
/// # Synchronization
/// On the host nothing is moved and nothing waits. To a device a tensor is copied by way of pinned memory, in order with the
/// strategy's compute stream; the host does not wait for it.
pub trait ToDevice: Sized {
    /// Moves every tensor in `self` to `device`.
    ///
    /// # Errors
    /// Those of allocating on the device.
    fn to_device(self, device: &Device) -> Result<Self>;
}

impl ToDevice for Tensor {
    fn to_device(self, device: &Device) -> Result<Self> {
        match device {
            Device::Host => Ok(self),
            Device::Cuda(mover) => mover.take(self),
        }
    }
}

macro_rules! passes_through {
    ($($type:ty),*) => {$(
        impl ToDevice for $type {
            fn to_device(self, _device: &Device) -> Result<Self> {
                Ok(self)
            }
        }
    )*};
}

passes_through!(
    (),
    bool,
    char,
    u8,
    u16,
    u32,
    u64,
    usize,
    i8,
    i16,
    i32,
    i64,
    isize,
    f32,
    f64,
    half::f16,
    half::bf16,
    String,
    &str
);

impl<T: ToDevice> ToDevice for Vec<T> {
    fn to_device(self, device: &Device) -> Result<Self> {
        self.into_iter().map(|item| item.to_device(device)).collect()
    }
}

impl<T: ToDevice> ToDevice for Option<T> {
    fn to_device(self, device: &Device) -> Result<Self> {
        self.map(|item| item.to_device(device)).transpose()
    }
}

impl<T: ToDevice> ToDevice for Box<T> {
    fn to_device(self, device: &Device) -> Result<Self> {
        Ok(Box::new((*self).to_device(device)?))
    }
}

impl<T: ToDevice, E> ToDevice for std::result::Result<T, E> {
    fn to_device(self, device: &Device) -> Result<Self> {
        match self {
            Ok(item) => Ok(Ok(item.to_device(device)?)),
            Err(error) => Ok(Err(error)),
        }
    }
}

impl<T: ToDevice, const N: usize> ToDevice for [T; N] {
    fn to_device(self, device: &Device) -> Result<Self> {
        let moved = self.into_iter().map(|item| item.to_device(device)).collect::<Result<Vec<T>>>()?;
        moved.try_into().map_err(|moved: Vec<T>| Error::LengthMismatch {
            what: "array of a batch".to_owned(),
            expected_elems: N,
            actual_elems: moved.len(),
        })
    }
}

impl<K: Eq + Hash, V: ToDevice, S: BuildHasher + Default> ToDevice for HashMap<K, V, S> {
    fn to_device(self, device: &Device) -> Result<Self> {
        self.into_iter().map(|(key, item)| Ok((key, item.to_device(device)?))).collect()
    }
}

impl<K: Ord, V: ToDevice> ToDevice for BTreeMap<K, V> {
    fn to_device(self, device: &Device) -> Result<Self> {
        self.into_iter().map(|(key, item)| Ok((key, item.to_device(device)?))).collect()
    }
}

macro_rules! tuples {
    ($(($($name:ident),+);)*) => {$(
        impl<$($name: ToDevice),+> ToDevice for ($($name,)+) {
            fn to_device(self, device: &Device) -> Result<Self> {
                #[allow(non_snake_case)] // the type's name is the variable's
                let ($($name,)+) = self;
                Ok(($($name.to_device(device)?,)+))
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::DType;

    #[test]
    fn nested_collections_come_back_as_they_went() {
        let tensor = |x: f32| Tensor::from_slice(&[1], &[x]).unwrap();
        let batch = (
            vec![tensor(1.0), tensor(2.0)],
            [Some(tensor(3.0)), None],
            BTreeMap::from([("mask", (tensor(4.0), 5_u32, "name"))]),
            Box::new(HashMap::from([(1, Tensor::zeroed(&[2, 0], DType::I64).unwrap())])),
        );
        let (list, pair, map, boxed) = batch.to_device(&Device::Host).unwrap();
        assert_eq!(list, [tensor(1.0), tensor(2.0)]);
        assert_eq!(pair, [Some(tensor(3.0)), None]);
        assert_eq!(map["mask"], (tensor(4.0), 5, "name"));
        assert_eq!(boxed[&1].shape(), [2, 0]);
    }
}
