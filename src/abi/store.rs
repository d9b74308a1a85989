//! `kernels/store.cu`: a few words from the host into device memory, in stream order.

use std::mem::{offset_of, size_of};

use bytemuck::{Pod, Zeroable};

/// Most words of one store.
pub const STORE_WORDS: usize = 5;

/// The argument of `store_words`, which one warp runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Zeroable, Pod)]
#[repr(C)]
pub struct StoreArguments {
    /// `[len_words]` u64, written.
    pub target: u64,
    /// What is written.
    pub words: [u64; STORE_WORDS],
    /// At most [`STORE_WORDS`].
    pub len_words: u32,
    /// Not read.
    pub padding: u32,
}

const _: () = assert!(size_of::<StoreArguments>() == 56 && offset_of!(StoreArguments, len_words) == 48);
