//! What a strategy is set up with.

use std::time::Duration;

use crate::collective::CollectiveOptions;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::ops::GradScaler;
use crate::strategy::Precision;
use crate::telemetry::Timeline;
use crate::world::WorldOptions;

/// Where a strategy keeps and trains the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Accelerator {
    /// NVIDIA devices if every rank of the machine has one of its own, else the host. As Fabric's `"auto"`.
    #[default]
    Auto,
    /// The processor.
    Host,
    /// The NVIDIA device with this number in the driver's order; without a number, that of the local rank modulo the number
    /// of devices, so that ranks share devices if there are more of them. An error without a driver.
    Cuda(Option<u32>),
}

/// Options of [`SingleDevice`](super::SingleDevice) and [`Ddp`](super::Ddp). Every rank passes the same.
///
/// ```
/// use annulus::strategy::{Precision, StrategyOptions};
/// let options = StrategyOptions { precision: Precision::Bf16Mixed, seed: 7, ..StrategyOptions::default() };
/// ```
#[derive(Clone)]
pub struct StrategyOptions {
    /// Where the model is trained. [`Accelerator::Auto`].
    pub accelerator: Accelerator,
    /// Which numbers the model is trained in.
    pub precision: Precision,
    /// Type in which gradients are accumulated and reduced; by default the precision's.
    pub gradient_dtype: Option<DType>,
    /// Most bytes of a gradient bucket; a parameter with a larger gradient has a bucket of its own. 25 MiB.
    pub bucket_bytes: usize,
    /// Most bytes of the bucket that is reduced first: a small one lets communication begin early. 1 MiB.
    pub first_bucket_bytes: usize,
    /// Seed of data orders and of stochastic rounding.
    pub seed: u64,
    /// Round weights without master weights (`Bf16True`, `F16True`) up or down at random, right on average, instead of to
    /// nearest, where small updates are lost. The bits depend on seed, step and element alone. Off.
    pub stochastic_rounding: bool,
    /// The loss scaler that precisions with a scaled loss begin with.
    pub scaler: GradScaler,
    /// How ranks meet and how long they wait. The deadline of an operation is `world.timeout`, 600 s.
    pub world: WorldOptions,
    /// How ranks exchange data.
    pub collective: CollectiveOptions,
    /// Where backward, reductions and steps are recorded. Off.
    pub timeline: Timeline,
}

impl Default for StrategyOptions {
    fn default() -> Self {
        StrategyOptions {
            accelerator: Accelerator::default(),
            precision: Precision::default(),
            gradient_dtype: None,
            bucket_bytes: 25 << 20,
            first_bucket_bytes: 1 << 20,
            seed: 0,
            stochastic_rounding: false,
            scaler: GradScaler::default(),
            world: WorldOptions::default(),
            collective: CollectiveOptions::default(),
            timeline: Timeline::disabled(),
        }
    }
}

impl StrategyOptions {
    /// Type in which gradients are accumulated and reduced.
    pub fn gradient_dtype(&self) -> DType {
        self.gradient_dtype.unwrap_or(self.precision.gradient_dtype())
    }

    /// Deadline of control-plane calls.
    pub(super) fn world_timeout(&self) -> Duration {
        self.collective.timeout.unwrap_or(self.world.timeout)
    }

    /// Fails unless every option is in its range.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] names it.
    pub fn check(&self) -> Result<()> {
        if self.bucket_bytes == 0 || self.first_bucket_bytes == 0 {
            return Err(Error::InvalidArgument {
                argument: "bucket_bytes, first_bucket_bytes",
                value: format!("{}, {}", self.bucket_bytes, self.first_bucket_bytes),
                accepted: "a bucket holds at least one byte",
            });
        }
        if !matches!(self.gradient_dtype(), DType::F32 | DType::BF16 | DType::F16) {
            return Err(Error::Unsupported { op: "gradients".to_owned(), dtype: self.gradient_dtype() });
        }
        self.scaler.check()
    }

    /// What replicas must have alike to stay alike, a line each. (How long to wait, and where to record, is each rank's own
    /// affair.)
    pub(super) fn fingerprint(&self) -> String {
        let accelerator = match self.accelerator {
            Accelerator::Auto => "auto",
            Accelerator::Host => "host",
            Accelerator::Cuda(_) => "cuda", // which one is each rank's own affair
        };
        let StrategyOptions { precision, bucket_bytes, first_bucket_bytes, seed, stochastic_rounding, scaler, .. } =
            self;
        let CollectiveOptions { algorithm, partials, .. } = &self.collective;
        format!(
            "accelerator {accelerator}\nprecision {precision}\ngradient dtype {}\nbucket_bytes {bucket_bytes}\nfirst_bucket_bytes {first_bucket_bytes}\n\
             seed {seed}\nstochastic_rounding {stochastic_rounding}\nscaler {scaler:?}\nalgorithm {algorithm:?}\n\
             partials {partials:?}",
            self.gradient_dtype(),
        )
    }
}

impl std::fmt::Debug for StrategyOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StrategyOptions")
            .field("accelerator", &self.accelerator)
            .field("precision", &self.precision)
            .field("gradient_dtype", &self.gradient_dtype())
            .field("bucket_bytes", &self.bucket_bytes)
            .field("first_bucket_bytes", &self.first_bucket_bytes)
            .field("seed", &self.seed)
            .field("stochastic_rounding", &self.stochastic_rounding)
            .field("world", &self.world)
            .finish_non_exhaustive()
    }
}
