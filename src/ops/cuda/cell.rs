//! A few words of device memory that kernels keep between launches.

use std::marker::PhantomData;
use std::time::Duration;

use bytemuck::Pod;

use crate::abi::{STORE_WORDS, StoreArguments};
use crate::device::cuda::{Buffer, Kernels, Shape, Stream, View};
use crate::error::Result;

/// One `T` of `abi` in device memory.
pub(super) struct Cell<T> {
    kernels: Kernels,
    /// f32, because the one word that is handed out, the loss scale, is one.
    words: Buffer,
    _value: PhantomData<T>,
}

impl<T: Pod> Cell<T> {
    /// Places `value`. The host waits until it is there.
    ///
    /// # Errors
    /// As [`Buffer::zeroed`].
    pub fn new(kernels: &Kernels, value: &T) -> Result<Cell<T>> {
        const { assert!(size_of::<T>().is_multiple_of(8) && align_of::<T>() >= 4) };
        let words: &[f32] = bytemuck::cast_slice(std::slice::from_ref(value));
        let words = Buffer::filled(kernels.device(), words)?;
        Ok(Cell { kernels: kernels.clone(), words, _value: PhantomData })
    }

    pub fn kernels(&self) -> &Kernels {
        &self.kernels
    }

    pub fn address(&self) -> u64 {
        self.words.address()
    }

    pub fn view(&self) -> View {
        self.words.view()
    }

    /// Writes `value` over the first bytes of the cell, in the order of `stream`: at most [`STORE_WORDS`] words of 8 bytes.
    ///
    /// # Errors
    /// What the driver says.
    pub fn store<V: Pod>(&self, stream: &Stream, value: &V) -> Result<()> {
        const {
            assert!(size_of::<V>() <= size_of::<T>() && size_of::<V>() <= 8 * STORE_WORDS);
            assert!(size_of::<V>().is_multiple_of(8));
        };
        let mut words = [0u64; STORE_WORDS];
        let bytes = bytemuck::bytes_of(value);
        bytemuck::cast_slice_mut(&mut words)[..bytes.len()].copy_from_slice(bytes);
        let len_words = (bytes.len() / 8) as u32; // at most STORE_WORDS
        let arguments = StoreArguments { target: self.address(), words, len_words, padding: 0 };
        let shape = Shape { blocks: 1, threads: 32, shared_bytes: 0, cooperative: false };
        stream.keep(&self.view());
        // SAFETY: the kernel's own argument; so many words are the cell's, checked above, and freeing them waits for the
        // kernel.
        unsafe { self.kernels.launch("store_words", shape, stream, &arguments) }
    }

    /// Waits for everything enqueued on `stream` and reads the value.
    ///
    /// # Errors
    /// [`Error::TimedOut`](crate::Error::TimedOut) after `timeout`; what the device failed with.
    pub fn read(&self, stream: &Stream, timeout: Duration) -> Result<T> {
        let words: Vec<f32> = self.words.read(stream, timeout)?;
        Ok(bytemuck::pod_read_unaligned(bytemuck::cast_slice(&words)))
    }
}
