//! Processes with a device each, the common deployment: every operation against the reference, by every algorithm.

#[path = "support/operations.rs"]
mod operations;
#[path = "support/ranks.rs"]
mod ranks;
mod support;

use annulus::collective::cuda::{Options, Transport, Way};
use annulus::schedule::Algorithm;
use annulus::world::Environment;
use half::bf16;
use operations::{every_operation, ring};
use ranks::{PATIENCE, Rank};
use support::{Peer, as_peer, on_virtual_gpu};

/// The part of the rank that this process's variables say, on the device of its number.
fn every_algorithm() {
    let rank = Rank::join(Environment::detect().unwrap());
    let world_size = rank.world.world_size();
    // Every shard is of another length and begins elsewhere; and eight processes share what cores there are.
    let len_elems = if world_size == 8 { 5 } else { 35 };
    for options in [Options::default(), ring()] {
        let algorithm = options.algorithm.unwrap_or(Algorithm::Direct);
        let mut communicator = rank.communicator(options);
        assert_eq!(communicator.way(), Way::Persistent);
        for peer in (0..world_size).filter(|peer| *peer != rank.world.rank()) {
            assert_eq!(communicator.transport(peer), Some(Transport::Device), "to rank {peer}");
        }
        every_operation::<f32>(&rank, &mut communicator, algorithm, len_elems);
        every_operation::<bf16>(&rank, &mut communicator, algorithm, len_elems);
    }
    rank.world.clone().teardown(PATIENCE).unwrap();
}

/// Every rank but the first.
#[test]
fn process() {
    as_peer("process", every_algorithm);
}

fn of_processes(test: &str, world_size: u32) {
    let folder = tempfile::tempdir().unwrap();
    let count = world_size.to_string();
    let variables = [
        ("ANNULUS_VGPU_DEVICES", count.as_str()),
        ("RANK", "0"),
        ("WORLD_SIZE", &count),
        ("MASTER_ADDR", "localhost"),
        ("MASTER_PORT", "29500"),
        ("TMPDIR", folder.path().to_str().unwrap()),
    ];
    on_virtual_gpu(test, &variables, || {
        let start = |rank: u32| Peer::start("process", &[("RANK", &rank.to_string())]);
        let peers: Vec<Peer> = (1..world_size).map(start).collect();
        every_algorithm();
        peers.into_iter().for_each(Peer::finish);
    });
}

#[test]
fn two_processes_give_the_bits_of_the_reference() {
    of_processes("two_processes_give_the_bits_of_the_reference", 2);
}

#[test]
fn three_processes_give_the_bits_of_the_reference() {
    of_processes("three_processes_give_the_bits_of_the_reference", 3);
}

#[test]
fn eight_processes_give_the_bits_of_the_reference() {
    of_processes("eight_processes_give_the_bits_of_the_reference", 8);
}
