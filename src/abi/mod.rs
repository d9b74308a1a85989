//! What host and kernels say to each other: the arguments and reports of `kernels/*.cu`, byte for byte.
//!
//! Every struct here stands in a `.cu` or `.cuh` file, too, field by field in the same order; the asserts below each pin
//! its size and the offsets where a difference would show. Addresses are those of device memory (or of host memory that
//! the device reaches), as `CUdeviceptr`. The kernels trust them: whoever launches a kernel vouches for them.

mod accumulate;
mod cast;
pub mod collective;
mod norm;
mod optimizer;
mod probe;
mod scaler;
mod store;
mod table;

pub use accumulate::{AccumulateArguments, MAX_STAGED, StagedTensor};
pub use cast::{CastArguments, CastTensor, ClampArguments, ELEMENTWISE_THREADS, RoundingKey, ScaleArguments};
pub use norm::{
    CombineArguments, NORM_THREADS, NormArguments, NormRecord, NormSlot, NormState, NormTensor, StepSignal,
    UnscaleArguments, UnscaleTensor, norm_kind,
};
pub use optimizer::{AdamWRule, OptimizerArguments, OptimizerState, OptimizerTensor, SgdRule};
pub use probe::{PROBE_THREADS, ProbeArguments, ProbeReport};
pub use scaler::{LossScaler, ScalerArguments};
pub use store::{STORE_WORDS, StoreArguments};
pub use table::{CHUNK_ELEMS, ChunkRange, ChunkRef, chunks};

/// How a wait in a kernel ended (`Verdict` of `signal.cuh`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Verdict {
    /// What was waited for came.
    Arrived = 0,
    /// The deadline passed.
    Late = 1,
    /// The host had set the abort word.
    Aborted = 2,
}

impl Verdict {
    /// The verdict with this code, if there is one.
    pub const fn from_code(code: u32) -> Option<Verdict> {
        match code {
            0 => Some(Verdict::Arrived),
            1 => Some(Verdict::Late),
            2 => Some(Verdict::Aborted),
            _ => None,
        }
    }
}
