//! Data parallelism: every rank holds the whole model and works on its share of the data.

use std::time::Duration;

use super::contract::Strategy;
use super::forward::forward_strategy;
use super::options::StrategyOptions;
use super::replica::Replica;
use crate::error::Result;
use crate::world::{Environment, World};

/// Distributed data parallel: gradients are averaged over the ranks, bucket by bucket, while backward goes on.
///
/// All ranks begin with rank 0's weights and apply the same gradients with the same arithmetic, so their weights are the
/// same bits for ever; no parameter is sent after setup. Costs one bucketed copy of the gradients beside weights and
/// optimizer state.
pub struct Ddp {
    replica: Replica,
}

impl Ddp {
    /// Meets the other ranks of `environment` and returns a strategy that is ready: there is none that is not set up.
    /// Every rank passes the same options.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`](crate::Error::InvalidArgument) for options out of range;
    /// [`Error::Disagreement`](crate::Error::Disagreement) if the ranks' options differ; the errors of [`World::join`].
    pub fn setup_environment(environment: Environment, options: StrategyOptions) -> Result<Ddp> {
        Ok(Ddp { replica: Replica::new(environment, options, true)? })
    }

    /// The job as this rank sees it.
    pub fn world(&self) -> &World {
        self.replica.world()
    }
}

impl Strategy for Ddp {
    forward_strategy!(self => self.replica);

    fn teardown_boxed(self: Box<Self>, timeout: Duration) -> Result<()> {
        self.replica.teardown(timeout)
    }
}
