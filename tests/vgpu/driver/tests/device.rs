//! `annulus::device::cuda` on virtual GPUs: what it finds, what runs in which order, what other processes reach, and what
//! goes wrong.

#[path = "support/linger.rs"]
mod linger;
#[path = "support/raw.rs"]
mod raw;
mod support;

use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use annulus::abi::{ELEMENTWISE_THREADS, PROBE_THREADS, ProbeArguments, ScaleArguments};
use annulus::device::cuda::{
    Arena, Buffer, Device, Driver, Event, Exported, Kernels, Link, OLDEST_DRIVER, PeerAccess, PeerArena, Pinned, Pool,
    Priority, ProbeArea, Shape, Sharing, Staging, Stream, Token, Uuid, probe_pair,
};
use annulus::{DType, Error};
use bytemuck::Zeroable;
use cudarc::driver::result;
use cudarc::driver::sys::{self, CUstreamCaptureMode};
use linger::{linger, release};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
};
use support::{Peer, as_peer, hex, listen, on_virtual_gpu, say, unhex, without_driver};

const PATIENCE: Duration = Duration::from_secs(30);
const TWO: &[(&str, &str)] = &[("ANNULUS_VGPU_DEVICES", "2")];

fn device(ordinal: u32) -> Device {
    Driver::open().unwrap().device(ordinal).unwrap()
}

fn stream(device: &Device) -> Stream {
    Stream::new(device, "test", Priority::Normal).unwrap()
}

// ---- what there is -----------------------------------------------------------------------------------------------------

#[test]
fn no_driver_is_an_error_and_not_a_panic() {
    without_driver("no_driver_is_an_error_and_not_a_panic", || {
        assert!(matches!(Driver::open(), Err(Error::DriverAbsent)), "{:?}", Driver::open());
    });
}

#[test]
fn a_driver_one_version_too_old_is_refused_by_its_number() {
    let name = "a_driver_one_version_too_old_is_refused_by_its_number";
    on_virtual_gpu(name, &[("ANNULUS_VGPU_DRIVER_VERSION", "12010")], || {
        let error = Driver::open().unwrap_err();
        assert!(matches!(error, Error::DriverTooOld { found: 12_010, oldest: OLDEST_DRIVER }), "{error:?}");
        assert!(error.to_string().contains("CUDA 12.1; 12.2 or later"), "{error}");
    });
}

#[test]
fn the_oldest_driver_reads_our_kernels() {
    let name = "the_oldest_driver_reads_our_kernels";
    on_virtual_gpu(name, &[("ANNULUS_VGPU_DRIVER_VERSION", "12020")], || {
        Kernels::load(&device(0)).unwrap();
    });
}

#[test]
fn no_device_is_an_error() {
    on_virtual_gpu("no_device_is_an_error", &[("ANNULUS_VGPU_DEVICES", "0")], || {
        assert!(matches!(Driver::open(), Err(Error::NoDevice)));
    });
}

#[test]
fn devices_say_whether_memory_orders_their_streams() {
    let name = "devices_say_whether_memory_orders_their_streams";
    for variables in [&[][..], &[("ANNULUS_VGPU_MEMORY_OPERATIONS", "none")]] {
        on_virtual_gpu(name, variables, || {
            let can = std::env::var_os("ANNULUS_VGPU_MEMORY_OPERATIONS").is_none();
            assert_eq!(device(0).orders_by_memory().unwrap(), can);
        });
    }
}

#[test]
fn devices_have_names_that_last() {
    on_virtual_gpu("devices_have_names_that_last", TWO, || {
        let driver = Driver::open().unwrap();
        assert_eq!((driver.version(), driver.len_devices()), (13_000, 2));
        let (first, second) = (device(0), device(1));
        assert!(first.is_same(&device(0)) && !first.is_same(&second));
        assert_ne!(first.uuid(), second.uuid());
        assert_eq!(first.uuid().to_string(), "GPU-616e6e75-6c75-732d-7667-707500000000");
        assert_eq!(first.peer_access(&second).unwrap(), PeerAccess::Direct);
        assert_eq!(first.peer_access(&first).unwrap(), PeerAccess::Same);
        assert!(matches!(driver.device(2), Err(Error::InvalidArgument { .. })));
    });
}

// ---- streams, events, memory -------------------------------------------------------------------------------------------

#[test]
fn buffers_hold_what_is_written_and_know_their_type() {
    on_virtual_gpu("buffers_hold_what_is_written_and_know_their_type", &[], || {
        let device = device(0);
        let stream = stream(&device);
        let mut buffer = Buffer::zeroed(&device, DType::F32, 1000).unwrap();
        assert_eq!(buffer.read::<f32>(&stream, PATIENCE).unwrap(), [0.0; 1000]);
        let elements: Vec<f32> = (0..1000).map(|i| i as f32).collect();
        buffer.write(&elements, &stream).unwrap();
        assert_eq!(buffer.read::<f32>(&stream, PATIENCE).unwrap(), elements);
        assert!(matches!(buffer.read::<i32>(&stream, PATIENCE), Err(Error::DTypeMismatch { .. })));
        assert!(matches!(buffer.write(&[1.0f32], &stream), Err(Error::LengthMismatch { .. })));
        assert!(Buffer::zeroed(&device, DType::F64, 0).unwrap().is_empty());
        assert!(matches!(Buffer::zeroed(&device, DType::F64, usize::MAX / 4), Err(Error::SizeOverflow { .. })));
    });
}

/// Somebody else's kernel hangs there, for one.
#[test]
fn a_read_does_not_wait_for_the_default_stream() {
    on_virtual_gpu("a_read_does_not_wait_for_the_default_stream", &[], || {
        let device = device(0);
        let (stream, word) = (stream(&device), Pinned::zeroed(&device, 4).unwrap());
        let buffer = Buffer::filled(&device, &[1.0f32, 2.0]).unwrap();
        // SAFETY: the context is current to this thread; a word of memory that the device reaches, until it is 1.
        unsafe { sys::cuStreamWaitValue32_v2(std::ptr::null_mut(), word.address(), 1, 0) }.result().unwrap();
        assert_eq!(buffer.read::<f32>(&stream, PATIENCE).unwrap(), [1.0, 2.0]);
        // SAFETY: aligned, and accessed by atomics.
        unsafe { AtomicU32::from_ptr(word.as_ptr().as_ptr().cast()) }.store(1, Ordering::Release);
    });
}

/// A thread that captures in global mode, as a trainer's library does, is told nothing of events.
#[test]
fn a_block_that_a_copy_may_still_read_is_not_written_in_a_capture() {
    on_virtual_gpu("a_block_that_a_copy_may_still_read_is_not_written_in_a_capture", &[], || {
        let device = device(0);
        let (kernels, stream) = (Kernels::load(&device).unwrap(), stream(&device));
        let staging = Staging::new(&device, PATIENCE);
        let (first, second) = (Buffer::filled(&device, &[0.0f32; 8]), Buffer::filled(&device, &[0.0f32; 8]));
        let (first, second) = (first.unwrap(), second.unwrap());
        let area = Pinned::zeroed(&device, 24).unwrap();
        linger(&kernels, &stream, area.address(), PATIENCE);
        staging.upload(&[1.0f32; 8], &first.view(), &stream).unwrap();
        let other = result::stream::create(raw::NON_BLOCKING).unwrap();
        // SAFETY: a stream that lives.
        unsafe { result::stream::begin_capture(other, CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_GLOBAL) }.unwrap();
        let refused = staging.upload(&[2.0f32; 8], &second.view(), &stream);
        // SAFETY: as above.
        let ended = unsafe { result::stream::end_capture(other) };
        release(&area);
        assert!(matches!(refused, Err(Error::Capture { .. })) && ended.is_err(), "{refused:?}, {ended:?}");
        assert_eq!(first.read::<f32>(&stream, PATIENCE).unwrap(), [1.0; 8]);
        staging.upload(&[2.0f32; 8], &second.view(), &stream).unwrap();
        assert_eq!(second.read::<f32>(&stream, PATIENCE).unwrap(), [2.0; 8]);
    });
}

#[test]
fn an_event_orders_two_streams_without_the_host() {
    on_virtual_gpu("an_event_orders_two_streams_without_the_host", &[], || {
        let device = device(0);
        let kernels = Kernels::load(&device).unwrap();
        let (first, second) = (stream(&device), Stream::new(&device, "second", Priority::High).unwrap());
        let area = Buffer::zeroed(&device, DType::I32, 6).unwrap();
        let mut copy = Buffer::zeroed(&device, DType::I32, 6).unwrap();
        let (event, late) = (Event::new(&device).unwrap(), Event::new(&device).unwrap());
        assert!(event.is_complete(), "never recorded");
        linger(&kernels, &first, area.address(), Duration::from_millis(300));
        first.record(&event).unwrap();
        second.wait(&event).unwrap();
        copy.write(&[7; 6], &second).unwrap();
        second.record(&late).unwrap();
        assert!(!event.is_complete() && !late.is_complete());
        assert!(matches!(late.synchronize(Duration::from_millis(20)), Err(Error::TimedOut { .. })), "a deadline");
        late.synchronize(PATIENCE).unwrap();
        assert!(event.is_complete());
        // The report says that the deadline passed, so the kernel had ended before the second stream went on.
        assert_eq!(area.read::<i32>(&first, PATIENCE).unwrap()[3], 1);
    });
}

#[test]
fn pinned_memory_is_one_for_host_and_device() {
    on_virtual_gpu("pinned_memory_is_one_for_host_and_device", &[], || {
        let device = device(0);
        let (kernels, stream) = (Kernels::load(&device).unwrap(), stream(&device));
        let pinned = Pinned::zeroed(&device, 64).unwrap();
        let report = pinned.address() + 16;
        let arguments = ProbeArguments {
            peer_flag: pinned.address(),
            flag: pinned.address(), // its own peer
            abort: pinned.address() + 4,
            report,
            timeout_ns: PATIENCE.as_nanos() as u64,
            generation: 3,
            ..ProbeArguments::zeroed()
        };
        let shape = Shape { blocks: 1, threads: PROBE_THREADS, shared_bytes: 0, cooperative: true };
        // SAFETY: the arguments' own type, and addresses in memory that outlives the kernel.
        unsafe { kernels.launch("probe_peer", shape, &stream, &arguments) }.unwrap();
        stream.synchronize(PATIENCE).unwrap();
        // SAFETY: 64 bytes, and the kernel has ended.
        let words = unsafe { std::slice::from_raw_parts(pinned.as_ptr().as_ptr().cast::<u32>(), 16) };
        assert_eq!(words[..7], [3, 0, 0, 0, 0, 3, 0], "flag; verdict, generation seen, wrong words");
    });
}

#[test]
fn memory_runs_out_with_numbers() {
    on_virtual_gpu("memory_runs_out_with_numbers", &[("ANNULUS_VGPU_MEMORY_BYTES", "8388608")], || {
        let device = device(0);
        let held = Buffer::zeroed(&device, DType::U8, 3 << 20).unwrap();
        for sharing in [Sharing::Descriptor, Sharing::Handle] {
            let error = Arena::new(&device, 6 << 20, sharing).unwrap_err();
            let expected = (6 << 20, 5 << 20);
            assert!(
                matches!(error, Error::NoSpace { need_bytes, have_bytes, .. } if (need_bytes, have_bytes) == expected),
                "{error:?}"
            );
        }
        drop(held);
        for sharing in [Sharing::Descriptor, Sharing::Handle] {
            let arena = Arena::new(&device, 6 << 20, sharing).unwrap();
            let buffer = arena.alloc(DType::BF16, 1 << 20).unwrap();
            assert!(buffer.is_registered() && buffer.address().is_multiple_of(256));
            assert!(matches!(arena.alloc(DType::BF16, 3 << 20), Err(Error::NoSpace { .. })));
            let overflow = arena.alloc(DType::BF16, usize::MAX / 2);
            assert!(matches!(overflow, Err(Error::SizeOverflow { .. })), "{overflow:?}");
        }
        assert_eq!(device.memory_bytes().unwrap(), (8 << 20, 8 << 20), "all given back");
    });
}

/// A loaded kernel starts beside one that waits; a lazily loaded one would wait for its end, and be waited for.
#[test]
fn a_kernel_starts_for_the_first_time_beside_one_that_runs() {
    on_virtual_gpu("a_kernel_starts_for_the_first_time_beside_one_that_runs", &[], || {
        let device = device(0);
        let kernels = Kernels::load(&device).unwrap();
        let (first, second) = (stream(&device), stream(&device));
        let (area, signal) = (Buffer::zeroed(&device, DType::I32, 6), Buffer::zeroed(&device, DType::F32, 8));
        let (area, signal, event) = (area.unwrap(), signal.unwrap(), Event::new(&device).unwrap());
        linger(&kernels, &first, area.address(), Duration::from_secs(3));
        first.record(&event).unwrap();
        let arguments = ScaleArguments { signal: signal.address(), ..ScaleArguments::zeroed() }; // of no tensors
        let shape = Shape { blocks: 1, threads: ELEMENTWISE_THREADS, shared_bytes: 0, cooperative: false };
        // SAFETY: the kernel's own arguments; the signal outlives it.
        unsafe { kernels.launch("scale_tensors", shape, &second, &arguments) }.unwrap();
        second.synchronize(PATIENCE).unwrap();
        assert!(!event.is_complete(), "the first kernel is still waiting");
        event.synchronize(PATIENCE).unwrap();
    });
}

#[test]
fn a_pool_gives_memory_out_again_behind_its_last_use() {
    on_virtual_gpu("a_pool_gives_memory_out_again_behind_its_last_use", &[], || {
        let device = device(0);
        let (kernels, pool) = (Kernels::load(&device).unwrap(), Pool::new(&device));
        let (user, writer) = (stream(&device), Stream::new(&device, "writer", Priority::Normal).unwrap());
        let area = Buffer::zeroed(&device, DType::I32, 6).unwrap();
        let take = |len_elems| pool.take(DType::F32, len_elems, &user, &writer).unwrap();
        // Finds what is held no more, and lets the device get there.
        let settle = || {
            take(1);
            user.synchronize(PATIENCE).unwrap();
        };
        let (first, second) = (take(1000), take(1000));
        let places = [first.address(), second.address()];
        assert_ne!(places[0], places[1], "both are held");
        let view = first.view().slice(10, 1).unwrap();
        drop((first, second));
        settle();
        assert_eq!(take(900).address(), places[1], "a view holds the first");
        settle();
        let second = take(1024);
        drop(view);
        settle();
        assert_eq!(take(1024).address(), places[0], "another length of the same block");
        drop(second);
        settle();
        assert_eq!(take(0).address() % 256, 0);
        assert!(!places.contains(&take(1025).address()), "no block of that length");
        assert!(matches!(pool.take(DType::F32, usize::MAX / 8, &user, &writer), Err(Error::SizeOverflow { .. })));

        // A device that is not done with either: nothing is waited for, and the third writes behind what used the first.
        let both = [take(1000), take(1000)].map(|buffer| buffer.address());
        let (end, written) = (Event::new(&device).unwrap(), Event::new(&device).unwrap());
        linger(&kernels, &user, area.address(), Duration::from_millis(300));
        user.record(&end).unwrap();
        let mut third = take(1000);
        assert!(both.contains(&third.address()));
        third.write(&[1.0f32; 1000], &writer).unwrap();
        writer.record(&written).unwrap();
        assert!(!end.is_complete() && !written.is_complete());
        written.synchronize(PATIENCE).unwrap();
        assert!(end.is_complete());
    });
}

#[test]
fn a_descriptor_of_memory_is_closed_on_exec() {
    on_virtual_gpu("a_descriptor_of_memory_is_closed_on_exec", &[], || {
        let arena = Arena::new(&device(0), 1, Sharing::Descriptor).unwrap();
        let Token::Descriptor(descriptor) = arena.export().unwrap().token else { panic!("not a descriptor") };
        assert_eq!(rustix::io::fcntl_getfd(&descriptor).unwrap(), rustix::io::FdFlags::CLOEXEC);
    });
}

// ---- what goes wrong ---------------------------------------------------------------------------------------------------

#[test]
fn an_illegal_address_is_a_fault_from_then_on() {
    on_virtual_gpu("an_illegal_address_is_a_fault_from_then_on", &[], || {
        let device = device(0);
        let (kernels, stream) = (Kernels::load(&device).unwrap(), stream(&device));
        let shape = Shape { blocks: 1, threads: PROBE_THREADS, shared_bytes: 0, cooperative: false };
        // SAFETY: none: the kernel's fault is what is tested, and the driver is virtual.
        unsafe { kernels.launch("probe_peer", shape, &stream, &ProbeArguments::zeroed()) }.unwrap();
        let fault = stream.synchronize(PATIENCE).unwrap_err();
        assert!(matches!(fault, Error::KernelFault { device: 0, .. }), "{fault:?}");
        assert!(fault.to_string().contains("CUDA_ERROR_ILLEGAL_ADDRESS"), "{fault}");
        assert!(matches!(Buffer::zeroed(&device, DType::F32, 1), Err(Error::KernelFault { .. })));
    });
}

#[test]
fn a_lost_device_is_told_apart() {
    let lost = tempfile::tempdir().unwrap();
    let path = lost.path().join("lost");
    let variables = [("ANNULUS_VGPU_LOST", path.to_str().unwrap())];
    on_virtual_gpu("a_lost_device_is_told_apart", &variables, || {
        let device = device(0);
        let stream = stream(&device);
        stream.synchronize(PATIENCE).unwrap();
        std::fs::write(std::env::var("ANNULUS_VGPU_LOST").unwrap(), "").unwrap();
        let error = stream.synchronize(PATIENCE).unwrap_err();
        assert!(matches!(error, Error::DeviceLost { device: 0, .. }), "{error:?}");
    });
}

#[test]
fn unknown_kernels_and_strange_streams_are_refused() {
    on_virtual_gpu("unknown_kernels_and_strange_streams_are_refused", TWO, || {
        let kernels = Kernels::load(&device(0)).unwrap();
        let shape = Shape { blocks: 1, threads: 1, shared_bytes: 0, cooperative: false };
        for (name, at) in [("absent", 0), ("probe_peer", 1)] {
            // SAFETY: nothing is launched.
            let refused = unsafe { kernels.launch(name, shape, &stream(&device(at)), &ProbeArguments::zeroed()) };
            assert!(matches!(refused, Err(Error::InvalidArgument { .. })), "{name}");
        }
        let event = Event::new(&device(1)).unwrap();
        assert!(matches!(stream(&device(0)).record(&event), Err(Error::InvalidArgument { .. })));
    });
}

/// Freeing memory waits for its own device.
#[test]
fn a_stream_of_another_device_than_the_memory_is_refused() {
    on_virtual_gpu("a_stream_of_another_device_than_the_memory_is_refused", TWO, || {
        let [here, there] = [0, 1].map(|ordinal| Buffer::filled(&device(ordinal), &[1.0f32; 4]).unwrap().view());
        let (stream, staging) = (stream(&device(0)), Staging::new(&device(0), PATIENCE));
        let refused = [
            there.write(&[2.0f32; 4], &stream),
            there.read(&mut [0.0f32; 4], &stream, PATIENCE),
            there.zero(&stream),
            there.copy_from(&here, &stream),
            here.copy_from(&there, &stream),
            staging.upload(&[2.0f32; 4], &there, &stream),
        ];
        for refused in refused {
            assert!(matches!(refused, Err(Error::InvalidArgument { argument: "stream", .. })), "{refused:?}");
        }
        here.zero(&stream).unwrap();
    });
}

// ---- peers -------------------------------------------------------------------------------------------------------------

fn probe_two() -> Link {
    let (first, second) = (Kernels::load(&device(0)).unwrap(), Kernels::load(&device(1)).unwrap());
    probe_pair([&first, &second], Duration::from_secs(2)).unwrap()
}

#[test]
fn a_pair_that_works_is_found_sound() {
    on_virtual_gpu("a_pair_that_works_is_found_sound", TWO, || assert_eq!(probe_two(), Link::Sound));
}

#[test]
fn a_pair_whose_driver_lies_is_found_out() {
    let variables = [TWO[0], ("ANNULUS_VGPU_PEERS", "lossy")];
    on_virtual_gpu("a_pair_whose_driver_lies_is_found_out", &variables, || {
        assert_eq!(device(0).peer_access(&device(1)).unwrap(), PeerAccess::Direct);
        assert_eq!(probe_two(), Link::Silent { waited_ms: 2000 });
    });
}

#[test]
fn a_pair_without_access_is_not_tried() {
    let variables = [TWO[0], ("ANNULUS_VGPU_PEERS", "none")];
    on_virtual_gpu("a_pair_without_access_is_not_tried", &variables, || assert_eq!(probe_two(), Link::NoAccess));
}

/// Sends one descriptor along with one byte.
fn send_descriptor(socket: impl AsFd, descriptor: BorrowedFd<'_>) {
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let descriptors = [descriptor];
    assert!(ancillary.push(SendAncillaryMessage::ScmRights(&descriptors)));
    rustix::net::sendmsg(socket, &[std::io::IoSlice::new(b"x")], &mut ancillary, SendFlags::empty()).unwrap();
}

fn receive_descriptor(socket: impl AsFd) -> OwnedFd {
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    let into = &mut [std::io::IoSliceMut::new(&mut byte)];
    rustix::net::recvmsg(socket, into, &mut ancillary, RecvFlags::CMSG_CLOEXEC).unwrap();
    let found = ancillary.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    found.unwrap()
}

/// What two ranks tell each other of their arenas, over a line and a socket.
fn tell_arena(arena: &Arena, area: &ProbeArea, socket: &UnixStream) -> String {
    let Exported { uuid, len_bytes, token } = arena.export().unwrap();
    let token = match token {
        Token::Handle(handle) => hex(&handle),
        Token::Descriptor(descriptor) => {
            send_descriptor(socket, descriptor.as_fd());
            "descriptor".to_owned()
        }
    };
    format!("{} {len_bytes} {} {token}", hex(&uuid.0), area.offset_bytes())
}

fn open_arena(device: &Device, line: &str, socket: &UnixStream) -> (PeerArena, usize) {
    let words: Vec<&str> = line.split(' ').collect();
    let token = match words[3] {
        "descriptor" => Token::Descriptor(receive_descriptor(socket)),
        handle => Token::Handle(unhex(handle).try_into().unwrap()),
    };
    let uuid = Uuid(unhex(words[0]).try_into().unwrap());
    let exported = Exported { uuid, len_bytes: words[1].parse().unwrap(), token };
    assert!(!format!("{exported:?}").contains(words[3]), "tokens are not printed");
    (PeerArena::open(device, exported).unwrap(), words[2].parse().unwrap())
}

/// Rank 1 of a probe between processes. Says its arena, hears rank 0's, probes twice.
#[test]
fn rank_one() {
    as_peer("rank_one", || {
        let words = listen();
        let (ordinal, sharing) = words.split_once(' ').unwrap();
        let sharing = if sharing == "handle" { Sharing::Handle } else { Sharing::Descriptor };
        let device = device(ordinal.parse().unwrap());
        // SAFETY: rank 0 has left this end of a socket pair open for the process it started.
        let socket = unsafe { UnixStream::from(OwnedFd::from_raw_fd(listen().parse().unwrap())) };
        let (kernels, stream) = (Kernels::load(&device).unwrap(), stream(&device));
        let arena = Arena::new(&device, 1 << 20, sharing).unwrap();
        let mut area = ProbeArea::new(&arena).unwrap();
        say(tell_arena(&arena, &area, &socket));
        let (peer, offset_bytes) = open_arena(&device, &listen(), &socket);
        for _ in 0..2 {
            area.start(&kernels, &stream, &peer, offset_bytes, (1, 0), PATIENCE).unwrap();
            assert_eq!(area.finish(&stream).unwrap(), Link::Sound);
            say("probed");
            assert_eq!(listen(), "probed");
        }
        drop(peer);
        say("closed");
        listen();
    });
}

/// Rank 0 with rank 1 in another process, on devices of the given numbers.
fn probe_between_processes(devices: [u32; 2], sharing: Sharing, variables: &[(&str, &str)], dies: bool) {
    let own = device(devices[0]);
    let (kernels, stream) = (Kernels::load(&own).unwrap(), stream(&own));
    let arena = Arena::new(&own, 1 << 20, sharing).unwrap();
    let mut area = ProbeArea::new(&arena).unwrap();
    let (socket, theirs) = UnixStream::pair().unwrap();
    rustix::io::fcntl_setfd(&theirs, rustix::io::FdFlags::empty()).unwrap(); // inherited by the peer
    let mut peer = Peer::start("rank_one", variables);
    peer.tell(&format!("{} {}", devices[1], if sharing == Sharing::Handle { "handle" } else { "descriptor" }));
    peer.tell(&std::os::fd::AsRawFd::as_raw_fd(&theirs).to_string());
    let line = peer.hear();
    let (mapped, offset_bytes) = open_arena(&own, &line, &socket);
    if dies {
        peer.kill();
        // Its memory is still mapped here; nothing crashes, and the probe ends at its deadline.
        let timeout = Duration::from_millis(300);
        area.start(&kernels, &stream, &mapped, offset_bytes, (0, 1), timeout).unwrap();
        assert_eq!(area.finish(&stream).unwrap(), Link::Silent { waited_ms: 300 });
        assert!(Buffer::zeroed(&own, DType::F32, 10).is_ok(), "the context is usable");
        return;
    }
    peer.tell(&tell_arena(&arena, &area, &socket));
    for _ in 0..2 {
        area.start(&kernels, &stream, &mapped, offset_bytes, (0, 1), PATIENCE).unwrap();
        assert_eq!(area.finish(&stream).unwrap(), Link::Sound);
        assert_eq!(peer.hear(), "probed");
        peer.tell("probed");
    }
    assert!(mapped.address(0, arena.len_bytes() + 1).is_err(), "a peer's offsets are checked");
    assert_eq!(peer.hear(), "closed");
    drop(mapped);
    peer.finish();
}

#[test]
fn ranks_in_two_processes_reach_each_other_by_handles() {
    on_virtual_gpu("ranks_in_two_processes_reach_each_other_by_handles", TWO, || {
        probe_between_processes([0, 1], Sharing::Handle, TWO, false);
    });
}

#[test]
fn ranks_in_two_processes_reach_each_other_by_descriptors() {
    on_virtual_gpu("ranks_in_two_processes_reach_each_other_by_descriptors", TWO, || {
        probe_between_processes([0, 1], Sharing::Descriptor, TWO, false);
    });
}

#[test]
fn two_ranks_share_one_device() {
    on_virtual_gpu("two_ranks_share_one_device", &[], || {
        probe_between_processes([0, 0], Sharing::Descriptor, &[], false);
        probe_between_processes([0, 0], Sharing::Handle, &[], false);
    });
}

#[test]
fn a_rank_that_dies_while_its_memory_is_mapped_ends_a_wait_at_the_deadline() {
    let name = "a_rank_that_dies_while_its_memory_is_mapped_ends_a_wait_at_the_deadline";
    on_virtual_gpu(name, TWO, || {
        probe_between_processes([0, 1], Sharing::Handle, TWO, true);
        probe_between_processes([0, 1], Sharing::Descriptor, TWO, true);
    });
}

#[test]
fn a_handle_of_a_dead_process_is_refused() {
    on_virtual_gpu("a_handle_of_a_dead_process_is_refused", TWO, || {
        let own = device(0);
        let (socket, theirs) = UnixStream::pair().unwrap();
        rustix::io::fcntl_setfd(&theirs, rustix::io::FdFlags::empty()).unwrap();
        let mut peer = Peer::start("rank_one", TWO);
        peer.tell("1 handle");
        peer.tell(&std::os::fd::AsRawFd::as_raw_fd(&theirs).to_string());
        let line = peer.hear();
        peer.kill();
        drop(socket);
        let words: Vec<&str> = line.split(' ').collect();
        let token = Token::Handle(unhex(words[3]).try_into().unwrap());
        let exported = Exported { uuid: own.uuid(), len_bytes: words[1].parse().unwrap(), token };
        let error = PeerArena::open(&own, exported).unwrap_err();
        assert!(matches!(error, Error::Cuda { operation: "cuIpcOpenMemHandle", .. }), "{error:?}");
    });
}
