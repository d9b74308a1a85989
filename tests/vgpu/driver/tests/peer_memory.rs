//! When `annulus` lets go of a peer's memory: not under a kernel that uses it, however it got here; and what the owner does when
//! that has not happened.

#[path = "support/linger.rs"]
mod linger;
#[path = "support/log.rs"]
mod log;
#[path = "support/ranks.rs"]
mod ranks;
mod support;

use std::time::{Duration, Instant};

use annulus::Error;
use annulus::collective::cuda::{Communicator, Options};
use annulus::device::cuda::{Arena, Device, Driver, Exported, Kernels, PeerArena, Priority, Sharing, Stream, Token};
use annulus::world::Environment;
use linger::linger;
use ranks::{PATIENCE, Rank};
use support::{Peer, as_peer, hex, listen, on_virtual_gpu, say, unhex};

const TWO: &[(&str, &str)] = &[("ANNULUS_VGPU_DEVICES", "2")];
const MIB: usize = 1 << 20;
/// How long kernels take.
const LINGERS: Duration = Duration::from_secs(1);

fn device(ordinal: u32) -> Device {
    Driver::open().unwrap().device(ordinal).unwrap()
}

/// Drops what `open` gives under a kernel of device 0 that reads and writes it.
fn let_go_under_a_kernel(open: impl FnOnce(&Device) -> PeerArena) {
    let user = device(0);
    let (kernels, stream) = (Kernels::load(&user).unwrap(), Stream::new(&user, "user", Priority::Normal).unwrap());
    let peer = open(&user);
    let start = Instant::now();
    linger(&kernels, &stream, peer.address(0, 24).unwrap(), LINGERS);
    drop(peer);
    assert!(start.elapsed() >= LINGERS, "let go after {:?}", start.elapsed());
    stream.synchronize(PATIENCE).unwrap();
}

/// The owner's device is idle, and its memory freed by whoever lets go last.
#[test]
fn memory_of_this_process_is_let_go_behind_the_kernels_of_the_other_device() {
    on_virtual_gpu("memory_of_this_process_is_let_go_behind_the_kernels_of_the_other_device", TWO, || {
        let owner = device(1);
        for sharing in [Sharing::Handle, Sharing::Descriptor] {
            let before = owner.memory_bytes().unwrap();
            let arena = Arena::new(&owner, 2 * MIB, sharing).unwrap();
            let_go_under_a_kernel(|user| PeerArena::of_this_process(user, &{ arena }).unwrap());
            assert_eq!(owner.memory_bytes().unwrap(), before, "{sharing:?}");
        }
    });
}

/// The length and the handle of an arena on device 1.
#[test]
fn owner() {
    as_peer("owner", || {
        let arena = Arena::new(&device(1), 2 * MIB, Sharing::Handle).unwrap();
        let exported = arena.export().unwrap();
        let Token::Handle(handle) = exported.token else { panic!("not a handle") };
        say(exported.len_bytes);
        say(hex(&handle));
        listen();
    });
}

/// Runs `body` with what another process exports.
fn with_an_owner(test: &str, body: impl FnOnce(Exported)) {
    on_virtual_gpu(test, TWO, || {
        let mut owner = Peer::start("owner", TWO);
        let len_bytes = owner.hear().parse().unwrap();
        let token = Token::Handle(unhex(&owner.hear()).try_into().unwrap());
        body(Exported { uuid: device(1).uuid(), len_bytes, token });
        owner.finish();
    });
}

#[test]
fn a_handle_is_closed_behind_the_kernels_that_use_the_memory() {
    with_an_owner("a_handle_is_closed_behind_the_kernels_that_use_the_memory", |exported| {
        let_go_under_a_kernel(|user| PeerArena::open(user, exported).unwrap());
    });
}

#[test]
fn an_owner_that_tells_of_more_memory_than_there_is_is_refused() {
    with_an_owner("an_owner_that_tells_of_more_memory_than_there_is_is_refused", |exported| {
        let len_bytes = exported.len_bytes + 1;
        let refused = PeerArena::open(&device(0), Exported { len_bytes, ..exported }).unwrap_err();
        assert!(matches!(refused, Error::InvalidArgument { argument: "length of a peer's arena", .. }), "{refused:?}");
    });
}

// ---- communicators -----------------------------------------------------------------------------------------------------

fn join() -> (Rank, Communicator) {
    let rank = Rank::join(Environment::detect().unwrap());
    let communicator = rank.communicator(Options::default());
    (rank, communicator)
}

/// Rank 1 of 2, whose driver does not close what it has opened.
#[test]
fn rank_that_cannot_let_go() {
    as_peer("rank_that_cannot_let_go", || {
        let log = log::keep();
        let (_rank, communicator) = join();
        std::fs::write(std::env::var("ANNULUS_VGPU_REFUSE").unwrap(), "cuIpcCloseMemHandle 1").unwrap();
        drop(communicator);
        assert!(log.has("what kernels use cannot be unmapped"));
        say("left");
        listen();
    });
}

/// What CUDA calls undefined, and ends this process here: to free memory that another process has mapped.
#[test]
fn an_owner_keeps_what_a_peer_could_not_let_go_of() {
    let folder = tempfile::tempdir().unwrap();
    let refused = folder.path().join("refused");
    let variables = [
        TWO[0],
        ("ANNULUS_VGPU_DESCRIPTORS", "none"),
        ("RANK", "0"),
        ("WORLD_SIZE", "2"),
        ("MASTER_ADDR", "localhost"),
        ("MASTER_PORT", "29500"),
        ("TMPDIR", folder.path().to_str().unwrap()),
    ];
    let theirs = [("RANK", "1"), ("ANNULUS_VGPU_REFUSE", refused.to_str().unwrap())];
    on_virtual_gpu("an_owner_keeps_what_a_peer_could_not_let_go_of", &variables, || {
        let mut peer = Peer::start("rank_that_cannot_let_go", &theirs);
        let log = log::keep();
        let (_rank, communicator) = join();
        drop(communicator);
        assert!(log.has("staging that a peer may still have mapped is kept"));
        assert_eq!(peer.hear(), "left");
        peer.finish();
    });
}
