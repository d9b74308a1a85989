//! What collectives promise when something is wrong: with who comes (P4, P5), with what they call (P6), with how the
//! library is used, and with the values themselves (P14, P15, P20). Ranks are threads, each with its own mappings;
//! `faults_collective` kills and stops ranks that are processes.
#![cfg(not(loom))]

mod mismatches;
mod misuse;
mod stalls;
#[path = "../together/mod.rs"]
mod together;
mod values;

use std::time::Duration;

use annulus::collective::{CollectiveOptions, Communicator};
use annulus::device::{Arena, Buffer};
use annulus::world::{World, WorldOptions, launch};
use annulus::{Element, Error};
use together::Together;

const PATIENCE: Duration = Duration::from_secs(60);

/// Runs `body` on `world_size` ranks. It is given a barrier that is not the library's, so that nobody leaves (which would
/// be another error) before everybody has seen what there is to see.
fn ranks<T: Send>(world_size: u32, timeout: Duration, body: impl Fn(&World, &Together) -> T + Sync) -> Vec<T> {
    let everybody = Together::new(world_size);
    launch::threads(world_size, |environment| {
        let options = WorldOptions { timeout, warn_after: timeout / 2, ..WorldOptions::default() };
        let world = World::join(environment, options).unwrap();
        let result = body(&world, &everybody);
        everybody.wait();
        result
    })
    .unwrap()
}

fn communicator(world: &World) -> Communicator {
    Communicator::new(world, CollectiveOptions::default()).unwrap()
}

fn registered<T: Element>(world: &World, elements: &[T]) -> Buffer {
    let mut buffer = Arena::new(world).alloc(T::DTYPE, elements.len()).unwrap();
    buffer.as_mut_slice::<T>().unwrap().copy_from_slice(elements);
    buffer
}

/// The error that stopped the job, however it is told.
fn cause(error: Error) -> Error {
    match error {
        Error::Poisoned { cause } => *cause,
        error => error,
    }
}
