//! The kernels on host memory: one thread, plain loops that vectorise, compiled once for each [`level::Level`].

pub(crate) mod adamw;
pub(crate) mod elementwise;
pub(crate) mod lane;
pub(crate) mod level;
pub(crate) mod philox;
pub(crate) mod powers;
pub(crate) mod sgd;
pub(crate) mod sums;
pub(crate) mod unscale;
pub(crate) mod update;
