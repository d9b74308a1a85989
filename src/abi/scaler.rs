//! `kernels/scaler.cu`: the dynamic loss scale.

use std::mem::{offset_of, size_of};

use bytemuck::{Pod, Zeroable};

/// The loss scale and what moves it, in device memory.
#[derive(Debug, Clone, Copy, PartialEq, Zeroable, Pod)]
#[repr(C)]
pub struct LossScaler {
    /// What the loss is multiplied with.
    pub scale: f32,
    /// Above 1.
    pub growth_factor: f32,
    /// Between 0 and 1.
    pub backoff_factor: f32,
    /// Good steps in a row after which the scale grows.
    pub growth_interval: u32,
    /// Good steps since the scale last changed.
    pub good_steps: u32,
    /// 0: the scale never moves.
    pub enabled: u32,
}

const _: () = assert!(size_of::<LossScaler>() == 24 && offset_of!(LossScaler, scale) == 0);

/// The argument of `update_scaler`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Zeroable, Pod)]
#[repr(C)]
pub struct ScalerArguments {
    /// [`LossScaler`], updated.
    pub scaler: u64,
    /// [`StepSignal`](super::StepSignal) of the step.
    pub signal: u64,
}

const _: () = assert!(size_of::<ScalerArguments>() == 16 && offset_of!(ScalerArguments, signal) == 8);
