//! Ranks that share one device, which is all that a machine with one card has: threads in one cooperative grid, and
//! processes that take turns. What is compared, and how, is what the tests on virtual GPUs compare.

mod links;
#[path = "../../../vgpu/driver/tests/support/operations.rs"]
mod operations;
pub mod processes;
#[path = "../../../vgpu/driver/tests/support/ranks.rs"]
mod ranks;
pub mod threads;

use annulus::Result;
use annulus::collective::cuda::{Communicator, Options, Way};
use annulus::schedule::Algorithm;
use ranks::Rank;

/// A communicator that must come to run by `way`.
fn communicator(rank: &Rank, algorithm: Algorithm, way: Way) -> Result<Communicator> {
    let options = Options { algorithm: Some(algorithm), ..Options::default() };
    let communicator = Communicator::new(&rank.world, &rank.kernels, options)?;
    assert_eq!(communicator.way(), way, "the way that follows from where the ranks are");
    Ok(communicator)
}
