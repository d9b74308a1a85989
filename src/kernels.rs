//! The PTX of the kernels, as text in the program: no file is needed where it runs.
//!
//! `build.rs` takes it from nvcc or from `kernels/ptx`, which is the same. The driver compiles it for the card at hand;
//! drivers from CUDA 12.2 on read it.

/// The PTX that the build script chose for `kernels/$name.cu`.
macro_rules! ptx {
    ($name:literal) => {
        include_str!(concat!(env!("OUT_DIR"), "/ptx/", $name, ".ptx"))
    };
}

/// Gradients into buckets, replacing or added. Arguments: [`AccumulateArguments`](crate::abi::AccumulateArguments).
pub const ACCUMULATE: &str = ptx!("accumulate");

/// Casts, in-place scaling and clipping by value. Arguments: [`CastArguments`](crate::abi::CastArguments) and its neighbours.
pub const CAST: &str = ptx!("cast");

/// Any collective by any schedule: `collective_*`, by element type. Argument:
/// [`CollectiveArguments`](crate::abi::collective::CollectiveArguments).
pub const COLLECTIVE: &str = ptx!("collective");

/// Norm of a list of gradients, clip coefficient, skip decision. Arguments: [`NormArguments`](crate::abi::NormArguments).
pub const NORM: &str = ptx!("norm");

/// AdamW and SGD. Arguments: [`OptimizerArguments`](crate::abi::OptimizerArguments).
pub const OPTIMIZER: &str = ptx!("optimizer");

/// The dynamic loss scale after a step. Arguments: [`ScalerArguments`](crate::abi::ScalerArguments).
pub const SCALER: &str = ptx!("scaler");

/// Does what a rank writes into a peer's memory arrive? Arguments: [`ProbeArguments`](crate::abi::ProbeArguments).
pub const PROBE: &str = ptx!("probe");

/// A few words from the host, in stream order. Arguments: [`StoreArguments`](crate::abi::StoreArguments).
pub const STORE: &str = ptx!("store");

/// Takes the loss scale out of gradients, casts and measures them. Arguments:
/// [`UnscaleArguments`](crate::abi::UnscaleArguments).
pub const UNSCALE: &str = ptx!("unscale");

/// Every module, by the name of its source.
pub const ALL: [(&str, &str); 9] = [
    ("accumulate", ACCUMULATE),
    ("cast", CAST),
    ("collective", COLLECTIVE),
    ("norm", NORM),
    ("optimizer", OPTIMIZER),
    ("probe", PROBE),
    ("scaler", SCALER),
    ("store", STORE),
    ("unscale", UNSCALE),
];

/// Which compiler made `ptx`, and for which PTX ISA: for `annulus info` and bug reports.
pub fn origin(ptx: &str) -> &str {
    ptx.lines().next().and_then(|line| line.split(';').next()).unwrap_or("").trim_start_matches("// ")
}
