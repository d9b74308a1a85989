//! Two processes on one device, each of which maps the other's memory.
//!
//! Kernels of two processes do not run at the same time on one device, so none of them waits for another: in the first check
//! the hosts meet between the launches; then streams do, in a communicator that runs by steps.

use std::ffi::OsString;
use std::time::Duration;

use annulus::collective::cuda::Way;
use annulus::device::cuda::{Arena, Buffer, Exported, PeerArena, Sharing, Token};
use annulus::ops::cuda::{Contribution, Contributions};
use annulus::schedule::Algorithm;
use annulus::world::{Environment, World, WorldOptions, launch};
use annulus::{DType, ReduceOp, reference};
use half::bf16;

use super::communicator;
use super::operations::every_operation;
use super::ranks::Rank;
use crate::Result;
use crate::part::Scale;
use crate::record::{Tally, check};
use crate::site::{PATIENCE, Site};
use crate::tensor::{Tensor, Values};

const RANKS: u32 = 2;

/// Starts both.
///
/// # Errors
/// They cannot be started, or end with a failure.
pub fn run(scale: Scale) -> Result<()> {
    let own = std::env::current_exe()?.into_os_string();
    let command: Vec<OsString> =
        [own].into_iter().chain(["rank", "--scale", &scale.name()].map(OsString::from)).collect();
    let options = launch::LaunchOptions { prefix: false, timeout: Some(Duration::from_secs(50)), ..Default::default() };
    let outcome = launch::processes(RANKS, &command, &options)?;
    match outcome.failure {
        None if outcome.code == 0 => Ok(()),
        failure => Err(format!("code {}: {}", outcome.code, failure.unwrap_or_default()).into()),
    }
}

/// One of them. Rank 0 says how it went; the other's failure is its exit code.
///
/// # Errors
/// No launcher, no device; on rank 1 also a difference.
pub fn rank(scale: Scale) -> Result<()> {
    let options = WorldOptions { timeout: PATIENCE, heartbeat_limit: None, ..WorldOptions::default() };
    let world = World::join(Environment::detect()?, options)?;
    let site = Site::open()?;
    let lengths: &[usize] = if scale == Scale::Short { &[1, 4099] } else { &[1, 4099, 1_000_003] };
    let sums = |tally: &mut Tally| -> Result<()> {
        for len_elems in lengths {
            sum(&world, &site, *len_elems)?;
            tally.agreed();
        }
        Ok(())
    };
    one_side(&world, "f32 sums of two processes over IPC, stepped by their hosts", sums)?;
    let (kernels, stream) = (site.kernels.clone(), site.stream.clone());
    let rank = Rank { world, kernels, stream };
    for algorithm in [Algorithm::Direct, Algorithm::Ring] {
        let body = |tally: &mut Tally| -> Result<()> {
            let mut communicator = communicator(&rank, algorithm, Way::Stepped)?;
            for len_elems in if scale == Scale::Short { &[35][..] } else { &[0, 1, 259, 16_411] } {
                every_operation::<f32>(&rank, &mut communicator, algorithm, *len_elems);
                every_operation::<bf16>(&rank, &mut communicator, algorithm, *len_elems);
                tally.agreed();
            }
            Ok(())
        };
        one_side(&rank.world, &format!("collectives of two processes, stepped by their streams, {algorithm:?}"), body)?;
    }
    Ok(())
}

/// Does one rank's side of a check. Rank 0 says how it went; the other's failure is its own.
fn one_side(world: &World, what: &str, body: impl FnOnce(&mut Tally) -> Result<()>) -> Result<()> {
    if world.rank() == 0 {
        check(what, PATIENCE, body);
        return Ok(());
    }
    body(&mut Tally::endless())
}

/// The sum of both ranks' terms, read by kernels where they are.
fn sum(world: &World, site: &Site, len_elems: usize) -> Result<()> {
    let terms = [0, 1].map(|rank| Tensor::of(DType::F32, len_elems, Values::Ordinary, rank));
    let arena = Arena::new(&site.device, len_elems * 4 + 256, Sharing::Handle)?;
    let own = arena.alloc(DType::F32, len_elems)?;
    let number = world.rank() as usize;
    own.view().write(terms[number].elements::<f32>(), &site.stream)?;
    site.synchronize()?;
    // The buffer is the first of either arena.
    let offset_bytes = own.arena_offset_bytes().ok_or("the arena's buffer is not registered")?;
    let peer_arena = PeerArena::open(&site.device, exchange(world, &arena)?)?;
    let address = peer_arena.address(offset_bytes, len_elems * 4)?;
    // SAFETY: so many elements lie in the peer's arena, which is mapped as long as its owner, the buffer, lives; the peer has
    // written them and writes nothing more until the barrier below.
    let theirs = unsafe { Buffer::foreign(&site.device, address, DType::F32, len_elems, Box::new(peer_arena)) }?;
    let result = Buffer::zeroed(&site.device, DType::F32, len_elems)?;
    let in_order = if number == 0 { [own.view(), theirs.view()] } else { [theirs.view(), own.view()] };
    let how = [Contribution::Replace, Contribution::Add];
    for (term, contribution) in in_order.into_iter().zip(how) {
        Contributions::new(&site.kernels, &[(term, result.view())])?.launch(&site.stream, contribution, 1.0)?;
    }
    let found: Vec<f32> = result.read(&site.stream, PATIENCE)?;
    drop(theirs);
    // Who owns memory frees it when nobody has it mapped.
    world.barrier("unmapped", PATIENCE)?;
    let inputs = terms.each_ref().map(|term| term.elements::<f32>());
    let expected = reference::all_reduce(&inputs, ReduceOp::Sum)?;
    match found.iter().zip(&expected).position(|(found, expected)| found.to_bits() != expected.to_bits()) {
        None => Ok(()),
        Some(at) => Err(format!("element {at} of {len_elems} is {}, not {}", found[at], expected[at]).into()),
    }
}

/// Tells the own arena and hears of the other.
fn exchange(world: &World, arena: &Arena) -> Result<Exported> {
    let Exported { uuid, len_bytes, token } = arena.export()?;
    let Token::Handle(handle) = token else { return Err("the arena has no handle".into()) };
    // Both ask for as many bytes, so both arenas are as long.
    let all = world.all_gather_bytes(&handle, PATIENCE)?;
    let theirs = all.get(1 - world.rank() as usize).ok_or("the other rank told nothing")?;
    Ok(Exported { uuid, len_bytes, token: Token::Handle(theirs.as_slice().try_into()?) })
}
