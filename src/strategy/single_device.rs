//! One rank: the same loop without anybody to talk to.

use std::time::Duration;

use super::contract::Strategy;
use super::forward::forward_strategy;
use super::options::StrategyOptions;
use super::replica::Replica;
use crate::error::{Error, Result};
use crate::world::Environment;

/// Training on one device. Gradients are not reduced, so `no_backward_sync` changes nothing; everything else is as in
/// [`Ddp`](super::Ddp) with one rank, and gives the same bits.
pub struct SingleDevice {
    replica: Replica,
}

impl SingleDevice {
    /// Sets up a strategy for the one rank of `environment`.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for options out of range, or if the environment has several ranks.
    pub fn setup_environment(environment: Environment, options: StrategyOptions) -> Result<SingleDevice> {
        if environment.world_size != 1 {
            return Err(Error::InvalidArgument {
                argument: "environment",
                value: format!("{} ranks", environment.world_size),
                accepted: "SingleDevice is for one rank; several need Ddp",
            });
        }
        Ok(SingleDevice { replica: Replica::new(environment, options, false)? })
    }
}

impl Strategy for SingleDevice {
    forward_strategy!(self => self.replica);

    fn teardown_boxed(self: Box<Self>, timeout: Duration) -> Result<()> {
        self.replica.teardown(timeout)
    }
}
