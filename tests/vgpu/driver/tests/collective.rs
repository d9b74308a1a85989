//! `annulus::collective::cuda` on virtual GPUs: every operation against the reference, by every transport, between threads
//! and between processes; and what each rank is told when something goes wrong.

#[path = "support/linger.rs"]
mod linger;
#[path = "support/log.rs"]
mod log;
#[path = "support/operations.rs"]
mod operations;
#[path = "support/ranks.rs"]
mod ranks;
mod support;
#[path = "../../../together/mod.rs"]
mod together;
#[path = "support/trouble.rs"]
mod trouble;

use std::time::{Duration, Instant};

use annulus::abi::{PROBE_THREADS, ProbeArguments};
use annulus::collective::cuda::{Communicator, Options, Transport};
use annulus::device::cuda::{Buffer, Link, Pinned, Priority, Shape, Stream};
use annulus::schedule::{Algorithm, Collective};
use annulus::world::{Environment, launch};
use annulus::{DType, Error, ReduceOp, reference};
use bytemuck::Zeroable;
use half::bf16;
use linger::{linger, release};
use operations::{every_dtype, every_operation, reduced, ring};
use ranks::{PATIENCE, Rank, inputs};
use support::{Peer, as_peer, listen, on_virtual_gpu, say};
use together::Together;
use trouble::{a_mismatch_changes_nothing, fails_as_it_runs, is_poisoned_and_usable};

const ONE: &[(&str, &str)] = &[("ANNULUS_VGPU_DEVICES", "1")];
const TWO: &[(&str, &str)] = &[("ANNULUS_VGPU_DEVICES", "2")];
const THREE: &[(&str, &str)] = &[("ANNULUS_VGPU_DEVICES", "3")];
const EIGHT: &[(&str, &str)] = &[("ANNULUS_VGPU_DEVICES", "8")];

#[test]
fn two_ranks_give_the_bits_of_the_reference() {
    on_virtual_gpu("two_ranks_give_the_bits_of_the_reference", TWO, || {
        launch::threads(2, |environment| {
            let rank = Rank::join(environment);
            every_dtype(&rank, &Options::default(), 259);
            every_dtype(&rank, &ring(), 259);
        })
        .unwrap();
    });
}

#[test]
fn three_ranks_give_the_bits_of_the_reference() {
    on_virtual_gpu("three_ranks_give_the_bits_of_the_reference", THREE, || {
        launch::threads(3, |environment| {
            let rank = Rank::join(environment);
            every_dtype(&rank, &Options::default(), 131);
            every_dtype(&rank, &ring(), 17);
        })
        .unwrap();
    });
}

#[test]
fn four_and_eight_ranks_give_the_bits_of_the_reference() {
    let some = |rank: &Rank| {
        for options in [Options::default(), ring()] {
            let algorithm = options.algorithm.unwrap_or(Algorithm::Direct);
            let communicator = &mut rank.communicator(options);
            every_operation::<f32>(rank, communicator, algorithm, 65);
            every_operation::<bf16>(rank, communicator, algorithm, 7);
        }
    };
    on_virtual_gpu("four_and_eight_ranks_give_the_bits_of_the_reference", EIGHT, || {
        for world_size in [4, 8] {
            launch::threads(world_size, |environment| some(&Rank::join(environment))).unwrap();
        }
    });
}

#[test]
fn one_rank_runs_the_same_code() {
    on_virtual_gpu("one_rank_runs_the_same_code", ONE, || {
        launch::threads(1, |environment| {
            let rank = Rank::join(environment);
            every_dtype(&rank, &Options::default(), 300);
            every_dtype(&rank, &ring(), 1);
        })
        .unwrap();
    });
}

/// Lengths on both sides of the choice of protocol, of channels, and of rounds.
#[test]
fn long_vectors_take_several_channels_and_rounds() {
    on_virtual_gpu("long_vectors_take_several_channels_and_rounds", TWO, || {
        launch::threads(2, |environment| {
            let rank = Rank::join(environment);
            for algorithm in [Algorithm::Direct, Algorithm::Ring] {
                let options = Options { algorithm: Some(algorithm), ..Options::default() };
                let mut communicator = rank.communicator(options);
                for len_elems in [0, 1, 8_191, 16_384, 16_385, 100_003] {
                    let terms = inputs::<f32>(2, len_elems);
                    let buffer = rank.framed(&terms[rank.number()], 0);
                    communicator.all_reduce(&buffer.view, ReduceOp::Sum, &rank.stream).unwrap();
                    let expected = reduced(&terms, ReduceOp::Sum, algorithm, Collective::AllReduce);
                    buffer.check(&rank, &expected, &format!("{len_elems} elements by {algorithm:?}"));
                }
                communicator.synchronize(PATIENCE).unwrap();
            }
        })
        .unwrap();
    });
}

#[test]
fn one_communicator_has_one_order_and_two_do_not_disturb_each_other() {
    on_virtual_gpu("one_communicator_has_one_order_and_two_do_not_disturb_each_other", TWO, || {
        launch::threads(2, |environment| {
            let rank = Rank::join(environment);
            let second = Stream::new(rank.kernels.device(), "second", Priority::Normal).unwrap();
            let [mut one, mut other] = [Options::default(), ring()].map(|options| rank.communicator(options));
            let terms = inputs::<f64>(2, 3_001);
            let (twice, once) = (rank.framed(&terms[rank.number()], 0), rank.framed(&terms[rank.number()], 0));
            one.all_reduce(&twice.view, ReduceOp::Avg, &rank.stream).unwrap();
            one.all_reduce(&twice.view, ReduceOp::Sum, &second).unwrap();
            other.all_reduce(&once.view, ReduceOp::Max, &rank.stream).unwrap();
            one.synchronize(PATIENCE).unwrap();
            let average = reference::all_reduce(&terms, ReduceOp::Avg).unwrap();
            let sum = reference::all_reduce(&[average.clone(), average], ReduceOp::Sum).unwrap();
            twice.check(&rank, &sum, "two operations on two streams");
            once.check(&rank, &reference::all_reduce(&terms, ReduceOp::Max).unwrap(), "another communicator's");
            drop(one);
            other.barrier(&second).unwrap();
            other.synchronize(PATIENCE).unwrap();
        })
        .unwrap();
    });
}

// ---- transports --------------------------------------------------------------------------------------------------------

/// Devices that cannot write into each other's memory, for the reason that `found` tells.
fn over_the_host(test: &str, peers: &str, found: Link) {
    on_virtual_gpu(test, &[TWO[0], ("ANNULUS_VGPU_PEERS", peers)], || {
        launch::threads(2, |environment| {
            let rank = Rank::join(environment);
            let mut communicator = rank.communicator(Options::default());
            assert_eq!(communicator.transport(1 - rank.world.rank()), Some(Transport::Host(found)));
            every_operation::<f32>(&rank, &mut communicator, Algorithm::Direct, 203);
            let terms = inputs::<f32>(2, 100_003);
            let buffer = rank.framed(&terms[rank.number()], 0);
            communicator.all_reduce(&buffer.view, ReduceOp::Sum, &rank.stream).unwrap();
            buffer.check(&rank, &reference::all_reduce(&terms, ReduceOp::Sum).unwrap(), "a long vector");
        })
        .unwrap();
    });
}

#[test]
fn without_peer_access_bytes_go_over_the_host() {
    over_the_host("without_peer_access_bytes_go_over_the_host", "none", Link::NoAccess);
}

#[test]
fn where_the_probe_loses_words_bytes_go_over_the_host() {
    let found = Link::Silent { waited_ms: 5_000 };
    over_the_host("where_the_probe_loses_words_bytes_go_over_the_host", "lossy", found);
}

// ---- what goes wrong ---------------------------------------------------------------------------------------------------

#[test]
fn a_rank_that_stalls_is_named_and_the_device_can_still_be_used() {
    on_virtual_gpu("a_rank_that_stalls_is_named_and_the_device_can_still_be_used", TWO, || {
        let seen = Together::new(2);
        launch::threads(2, |environment| {
            let rank = Rank::join(environment);
            let options = Options { timeout: Some(Duration::from_millis(700)), ..Options::default() };
            let mut communicator = rank.communicator(options);
            let buffer = rank.framed(&[1.0f32; 100], 0);
            if rank.number() == 0 {
                communicator.all_reduce(&buffer.view, ReduceOp::Sum, &rank.stream).unwrap();
                let error = communicator.synchronize(PATIENCE).unwrap_err();
                assert!(matches!(error, Error::PeerStalled { rank: 1, sequence: 1, .. }), "{error:?}");
                assert!(error.to_string().contains("all_reduce(100 x f32, sum)"), "{error}");
                buffer.check(&rank, &[1.0f32; 100], "a buffer whose operation failed");
            }
            seen.wait();
            is_poisoned_and_usable(&rank, &mut communicator);
        })
        .unwrap();
    });
}

#[test]
fn a_mismatch_is_told_on_every_rank_and_changes_nothing() {
    on_virtual_gpu("a_mismatch_is_told_on_every_rank_and_changes_nothing", THREE, || {
        let quoted = ["all_reduce(100 x f32, sum)", "all_reduce(200 x f32, sum)"];
        a_mismatch_changes_nothing(Rank::join, &Options::default(), fails_as_it_runs, quoted);
    });
}

#[test]
fn arguments_that_cannot_be_are_refused_and_poison_nothing() {
    on_virtual_gpu("arguments_that_cannot_be_are_refused_and_poison_nothing", TWO, || {
        launch::threads(2, |environment| {
            let rank = Rank::join(environment);
            let mut communicator = rank.communicator(Options::default());
            let (floats, ints) = (rank.framed(&[1.0f32; 4], 0).view, rank.framed(&[1i32; 4], 0).view);
            let stream = &rank.stream;
            let unsupported = communicator.all_reduce(&ints, ReduceOp::Avg, stream);
            assert!(matches!(unsupported, Err(Error::Unsupported { .. })), "{unsupported:?}");
            let dtypes = communicator.all_reduce_into(&floats, &ints, ReduceOp::Sum, stream);
            assert!(matches!(dtypes, Err(Error::DTypeMismatch { .. })), "{dtypes:?}");
            let lengths = communicator.all_gather(&floats, &floats, stream);
            assert!(matches!(lengths, Err(Error::LengthMismatch { .. })), "{lengths:?}");
            let root = communicator.broadcast(&floats, 2, stream);
            assert!(matches!(root, Err(Error::InvalidArgument { .. })), "{root:?}");
            communicator.barrier(stream).unwrap();
            communicator.synchronize(PATIENCE).unwrap();
        })
        .unwrap();
    });
}

#[test]
fn a_communicator_that_one_rank_cannot_make_leaves_nothing_behind() {
    on_virtual_gpu("a_communicator_that_one_rank_cannot_make_leaves_nothing_behind", TWO, || {
        launch::threads(2, |environment| {
            let rank = Rank::join(environment);
            let device = rank.kernels.device();
            let meet = || rank.world.barrier("of the test", PATIENCE).unwrap();
            let free_bytes = || device.memory_bytes().unwrap().0;
            let before = free_bytes();
            let communicator = rank.communicator(Options::default());
            let need_bytes = before - free_bytes();
            drop(communicator);
            assert_eq!(free_bytes(), before);
            // All but the last of it fits on the device of rank 1.
            let filled_bytes = if rank.number() == 1 { before - need_bytes + 1 } else { 1 };
            let filler = Buffer::zeroed(device, DType::U8, usize::try_from(filled_bytes).unwrap()).unwrap();
            let refused = Communicator::new(&rank.world, &rank.kernels, Options::default()).unwrap_err();
            match rank.number() {
                1 => assert!(matches!(refused, Error::NoSpace { .. }), "{refused:?}"),
                _ => assert!(matches!(refused, Error::RankFailed { rank: 1, .. }), "{refused:?}"),
            }
            drop(filler);
            assert_eq!(free_bytes(), before, "what rank {} had got", rank.number());
            meet();
            let communicator = rank.communicator(Options::default());
            meet();
            if rank.number() == 0 {
                drop(communicator);
                let other = rank.world.claim_group().unwrap();
                assert_ne!(other, 0, "the area of a communicator that rank 1 still has");
                rank.world.release_group(other).unwrap();
                meet();
            } else {
                meet();
                drop(communicator);
            }
        })
        .unwrap();
    });
}

#[test]
fn dropping_ends_though_a_kernel_does_not() {
    on_virtual_gpu("dropping_ends_though_a_kernel_does_not", ONE, || {
        launch::threads(1, |environment| {
            let rank = Rank::join(environment);
            let area = Pinned::zeroed(rank.kernels.device(), 6 * size_of::<u32>()).unwrap();
            let options = Options { timeout: Some(Duration::from_millis(100)), ..Options::default() };
            let mut communicator = rank.communicator(options);
            linger(&rank.kernels, &rank.stream, area.address(), PATIENCE);
            communicator.barrier(&rank.stream).unwrap();
            let start = Instant::now();
            drop(communicator);
            assert!(start.elapsed() < PATIENCE / 2, "{:?}", start.elapsed());
            // Its own kernel comes after that, and finds all that it uses.
            release(&area);
            rank.stream.synchronize(PATIENCE).unwrap();
        })
        .unwrap();
    });
}

#[test]
fn a_graph_outlives_its_communicator() {
    on_virtual_gpu("a_graph_outlives_its_communicator", TWO, || {
        launch::threads(2, |environment| {
            let rank = Rank::join(environment);
            let free_bytes = || rank.kernels.device().memory_bytes().unwrap().0;
            let meet = || rank.world.barrier("of the test", PATIENCE).unwrap();
            let buffer = rank.framed(&[1.0f32; 100], 0);
            let before = free_bytes();
            let mut communicator = rank.communicator(Options::default());
            let mut graph = rank.stream.capture(|| {
                communicator.barrier(&rank.stream)?;
                communicator.all_reduce(&buffer.view, ReduceOp::Sum, &rank.stream)
            });
            drop(communicator);
            meet();
            graph.as_mut().unwrap().launch(&rank.stream).unwrap();
            buffer.check(&rank, &[2.0f32; 100], "a sum of a graph without a communicator");
            meet();
            drop(graph);
            meet();
            assert_eq!(free_bytes(), before);
        })
        .unwrap();
    });
}

#[test]
fn dropping_in_a_capture_frees_nothing_and_does_not_end_it() {
    on_virtual_gpu("dropping_in_a_capture_frees_nothing_and_does_not_end_it", ONE, || {
        launch::threads(1, |environment| {
            let rank = Rank::join(environment);
            let area = Pinned::zeroed(rank.kernels.device(), 6 * size_of::<u32>()).unwrap();
            let mut communicator = rank.communicator(Options::default());
            let free_bytes = || rank.kernels.device().memory_bytes().unwrap().0;
            let before = free_bytes();
            // An operation that the drop must neither wait for nor take the memory of.
            linger(&rank.kernels, &rank.stream, area.address(), PATIENCE);
            communicator.barrier(&rank.stream).unwrap();
            let mut graph = rank.stream.capture(|| {
                drop(communicator);
                Ok(())
            });
            assert_eq!(free_bytes(), before);
            release(&area);
            rank.stream.synchronize(PATIENCE).unwrap();
            graph.as_mut().unwrap().launch(&rank.stream).unwrap();
            rank.stream.synchronize(PATIENCE).unwrap();
        })
        .unwrap();
    });
}

#[test]
fn dropping_does_not_wait_for_a_device_that_has_failed() {
    on_virtual_gpu("dropping_does_not_wait_for_a_device_that_has_failed", ONE, || {
        launch::threads(1, |environment| {
            let rank = Rank::join(environment);
            let mut communicator = rank.communicator(Options::default());
            communicator.barrier(&rank.stream).unwrap();
            let shape = Shape { blocks: 1, threads: PROBE_THREADS, shared_bytes: 0, cooperative: false };
            // SAFETY: none: what follows the kernel's fault is what is tested, and the driver is virtual.
            unsafe { rank.kernels.launch("probe_peer", shape, &rank.stream, &ProbeArguments::zeroed()) }.unwrap();
            let fault = rank.stream.synchronize(PATIENCE).unwrap_err();
            assert!(matches!(fault, Error::KernelFault { .. }), "{fault:?}");
            let start = Instant::now();
            drop(communicator);
            assert!(start.elapsed() < PATIENCE / 2, "{:?}", start.elapsed());
        })
        .unwrap();
    });
}

// ---- processes ---------------------------------------------------------------------------------------------------------

/// This process as the rank that its variables say.
fn join_by_variables() -> Rank {
    Rank::join(Environment::detect().unwrap())
}

fn one_sum(rank: &Rank, communicator: &mut Communicator, len_elems: usize) {
    let terms = inputs::<f32>(rank.world.world_size() as usize, len_elems);
    let buffer = rank.framed(&terms[rank.number()], 0);
    communicator.all_reduce(&buffer.view, ReduceOp::Sum, &rank.stream).unwrap();
    buffer.check(rank, &reference::all_reduce(&terms, ReduceOp::Sum).unwrap(), "a sum between processes");
}

/// Every rank but the first.
#[test]
fn second_process() {
    as_peer("second_process", || {
        let log = log::keep();
        let rank = join_by_variables();
        let mut communicator = rank.communicator(Options::default());
        for len_elems in [1_000, 40_000] {
            one_sum(&rank, &mut communicator, len_elems);
        }
        assert!(!log.tells_of_handles());
        say("done");
        listen();
    });
}

/// Rank 0 of 2, with `variable`; rank 1 has `theirs` besides.
fn between_processes(test: &str, variable: (&str, &str), theirs: (&str, &str), body: impl FnOnce(Rank, Peer)) {
    beside(test, "second_process", &[variable], theirs, body);
}

/// Runs `body` as rank 0 of 2, with `variables`, and the test `role` as rank 1, with `theirs` besides.
fn beside(test: &str, role: &str, variables: &[(&str, &str)], theirs: (&str, &str), body: impl FnOnce(Rank, Peer)) {
    let folder = tempfile::tempdir().unwrap();
    let fixed = [
        TWO[0],
        ("RANK", "0"),
        ("WORLD_SIZE", "2"),
        ("MASTER_ADDR", "localhost"),
        ("MASTER_PORT", "29500"),
        ("TMPDIR", folder.path().to_str().unwrap()),
    ];
    on_virtual_gpu(test, &[&fixed, variables].concat(), || {
        let peer = Peer::start(role, &[("RANK", "1"), theirs]);
        body(join_by_variables(), peer);
    });
}

/// Variables of a rank.
const PEERS: (&str, &str) = ("ANNULUS_VGPU_PEERS", "all");
const NO_PEERS: (&str, &str) = ("ANNULUS_VGPU_PEERS", "none");
const NO_DESCRIPTORS: (&str, &str) = ("ANNULUS_VGPU_DESCRIPTORS", "none");

fn sum_over_device_memory(rank: Rank, mut peer: Peer, way: &str) {
    let log = log::keep();
    let mut communicator = rank.communicator(Options::default());
    assert_eq!(communicator.transport(1), Some(Transport::Device));
    for len_elems in [1_000, 40_000] {
        one_sum(&rank, &mut communicator, len_elems);
    }
    assert_eq!(peer.hear(), "done");
    peer.tell("leave");
    drop(communicator);
    peer.finish();
    assert!(log.has(way) && !log.tells_of_handles());
}

fn over_host_memory(rank: Rank, mut peer: Peer) {
    let mut communicator = rank.communicator(Options::default());
    assert!(matches!(communicator.transport(1), Some(Transport::Host(_))));
    for len_elems in [1_000, 40_000] {
        one_sum(&rank, &mut communicator, len_elems);
    }
    peer.tell("leave");
    drop(communicator);
    peer.finish();
}

#[test]
fn p13_processes_reach_each_other_by_descriptors() {
    between_processes("p13_processes_reach_each_other_by_descriptors", PEERS, PEERS, |rank, peer| {
        sum_over_device_memory(rank, peer, "staging crosses between processes as descriptors");
    });
}

const BY_HANDLES: &str = "staging crosses between processes as legacy handles";

#[test]
fn p13_processes_whose_devices_share_no_descriptors_reach_each_other_by_handles() {
    let name = "p13_processes_whose_devices_share_no_descriptors_reach_each_other_by_handles";
    between_processes(name, NO_DESCRIPTORS, NO_DESCRIPTORS, |rank, peer| {
        sum_over_device_memory(rank, peer, BY_HANDLES);
    });
}

#[test]
fn p13_one_device_that_shares_no_descriptors_decides_for_all() {
    let name = "p13_one_device_that_shares_no_descriptors_decides_for_all";
    between_processes(name, PEERS, NO_DESCRIPTORS, |rank, peer| sum_over_device_memory(rank, peer, BY_HANDLES));
}

/// Every rank has three others' memory mapped. That nobody frees before all have unmapped, when they leave, the driver sees
/// to.
fn four_processes(test: &str, variable: (&'static str, &'static str), way: &str) {
    let folder = tempfile::tempdir().unwrap();
    let fixed = [
        ("ANNULUS_VGPU_DEVICES", "4"),
        ("RANK", "0"),
        ("WORLD_SIZE", "4"),
        ("MASTER_ADDR", "localhost"),
        ("MASTER_PORT", "29500"),
        ("TMPDIR", folder.path().to_str().unwrap()),
        variable,
    ];
    on_virtual_gpu(test, &fixed, || {
        let mut peers = ["1", "2", "3"].map(|rank| Peer::start("second_process", &[("RANK", rank)]));
        let log = log::keep();
        let rank = join_by_variables();
        let mut communicator = rank.communicator(Options::default());
        assert!((1..4).all(|peer| communicator.transport(peer) == Some(Transport::Device)));
        for len_elems in [1_000, 40_000] {
            one_sum(&rank, &mut communicator, len_elems);
        }
        for peer in &mut peers {
            assert_eq!(peer.hear(), "done");
        }
        peers.iter_mut().for_each(|peer| peer.tell("leave"));
        drop(communicator);
        peers.into_iter().for_each(Peer::finish);
        assert!(log.has(way) && !log.tells_of_handles());
    });
}

#[test]
fn four_processes_reach_each_other_by_descriptors() {
    four_processes(
        "four_processes_reach_each_other_by_descriptors",
        PEERS,
        "staging crosses between processes as descriptors",
    );
}

#[test]
fn four_processes_reach_each_other_by_handles() {
    four_processes("four_processes_reach_each_other_by_handles", NO_DESCRIPTORS, BY_HANDLES);
}

/// On rank 1 the driver refuses the stream that the probe would run on, when both have mapped the memory of the other.
fn failed_after_mapping(rank: &Rank) {
    let free_bytes = || rank.kernels.device().memory_bytes().unwrap().0;
    let before = free_bytes();
    for _ in 0..8 {
        if rank.number() == 1 {
            std::fs::write(std::env::var("ANNULUS_VGPU_REFUSE").unwrap(), "cuStreamCreateWithPriority 1").unwrap();
        }
        let refused = Communicator::new(&rank.world, &rank.kernels, Options::default()).unwrap_err();
        match rank.number() {
            1 => assert!(matches!(refused, Error::Cuda { .. }), "{refused:?}"),
            _ => assert!(matches!(refused, Error::RankFailed { rank: 1, .. }), "{refused:?}"),
        }
        assert_eq!(free_bytes(), before, "of rank {}", rank.number());
        rank.world.barrier("of the test", PATIENCE).unwrap();
    }
}

/// Rank 1 of 2.
#[test]
fn second_process_that_fails_after_mapping() {
    as_peer("second_process_that_fails_after_mapping", || {
        failed_after_mapping(&join_by_variables());
        say("done");
        listen();
    });
}

/// What CUDA calls undefined: to free memory that another process has mapped.
#[test]
fn a_communicator_that_cannot_be_made_unmaps_before_anybody_frees() {
    let folder = tempfile::tempdir().unwrap();
    let [calls, refused] = ["calls", "refused"].map(|name| folder.path().join(name).to_str().unwrap().to_owned());
    let variables = [NO_DESCRIPTORS, ("ANNULUS_VGPU_CALLS", &*calls)];
    let theirs = ("ANNULUS_VGPU_REFUSE", &*refused);
    let name = "a_communicator_that_cannot_be_made_unmaps_before_anybody_frees";
    beside(name, "second_process_that_fails_after_mapping", &variables, theirs, |rank, mut peer| {
        failed_after_mapping(&rank);
        assert_eq!(peer.hear(), "done");
        let calls = std::fs::read_to_string(std::env::var("ANNULUS_VGPU_CALLS").unwrap()).unwrap();
        let (mut mapped, mut closed, mut freed) = (0, 0, 0);
        for call in calls.lines() {
            match call {
                "cuIpcOpenMemHandle_v2" => mapped += 1,
                "cuIpcCloseMemHandle" => (mapped, closed) = (mapped - 1, closed + 1),
                "cuMemFree_v2" if mapped == 0 => freed += 1,
                "cuMemFree_v2" => panic!("memory is freed while {mapped} are mapped"),
                _ => {}
            }
        }
        assert_eq!((mapped, closed, freed), (0, 16, 16));
        peer.tell("leave");
        peer.finish();
    });
}

/// The driver says that stores to a peer arrive, and they do not.
#[test]
fn processes_whose_peer_access_is_a_lie_use_the_host() {
    let lossy = ("ANNULUS_VGPU_PEERS", "lossy");
    between_processes("processes_whose_peer_access_is_a_lie_use_the_host", lossy, lossy, over_host_memory);
}

#[test]
fn processes_without_peer_access_use_the_host() {
    between_processes("processes_without_peer_access_use_the_host", NO_PEERS, NO_PEERS, over_host_memory);
}

#[test]
fn a_rank_that_is_killed_is_lost_within_a_second() {
    between_processes("a_rank_that_is_killed_is_lost_within_a_second", PEERS, PEERS, |rank, mut peer| {
        let mut communicator = rank.communicator(Options::default());
        for len_elems in [1_000, 40_000] {
            one_sum(&rank, &mut communicator, len_elems);
        }
        assert_eq!(peer.hear(), "done");
        let buffer = rank.framed(&[1.0f32; 100], 0);
        communicator.all_reduce(&buffer.view, ReduceOp::Sum, &rank.stream).unwrap();
        peer.kill();
        let killed = Instant::now();
        let error = communicator.synchronize(PATIENCE).unwrap_err();
        assert!(matches!(error, Error::PeerLost { rank: 1, .. }), "{error:?}");
        assert!(killed.elapsed() < Duration::from_secs(1), "{:?}", killed.elapsed());
        assert!(Buffer::zeroed(rank.kernels.device(), DType::F32, 10).is_ok(), "the context is usable");
    });
}
