//! Frames of the rendezvous' sockets: one SOCK_SEQPACKET message each, so the kernel keeps their borders and a peer cannot send
//! half of one.
//!
//! ```text
//!   "annulus\x01" | JSON of [`Frame`]       at most 64 KiB; descriptors ride along as SCM_RIGHTS
//! ```

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::world::board::MAX_RANKS;

/// Longest frame that is read.
pub(crate) const FRAME_LIMIT_BYTES: usize = 64 << 10;
/// Starts every frame; the last byte is the protocol's number.
pub(crate) const PREFIX: &[u8; 8] = b"annulus\x01";
/// Most descriptors of one frame: the board, and an arena and a pidfd of every rank.
pub(crate) const FRAME_LIMIT_FDS: usize = 1 + 2 * MAX_RANKS as usize;

/// What ranks say to each other before they share memory. `nonce` is hexadecimal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) enum Frame {
    /// Rank 0 to whoever connects: answer with this nonce, so that nothing recorded earlier is an answer.
    Greeting { nonce: String },
    /// A rank to rank 0, with its arena and its pidfd.
    Hello { nonce: String, job: String, rank: u32, world_size: u32, process: Process },
    /// Rank 0 to those who wait, whenever somebody came.
    Missing { ranks: Vec<u32> },
    /// Rank 0, at the deadline: the job does not start.
    GaveUp { ranks: Vec<u32>, waited_ms: u64 },
    /// Rank 0 to a client that did not say hello in time; it may come again.
    TooSlow,
    /// Rank 0: a rank died while the others were waiting.
    Lost { rank: u32, pid: u32 },
    /// Rank 0 to a stranger, or to all if the job cannot start.
    Refused { reason: String },
    /// Rank 0 to every rank, with the board, the arenas and the pidfds in rank order.
    Welcome { processes: Vec<Process> },
    /// A rank to rank 0: everything is mapped.
    Ready,
    /// After the rendezvous, with a rank's descriptor to rank 0, and with those of all ranks back. `sequence` is the call's.
    Descriptors { sequence: u64 },
}

/// Tells processes apart, also where PID namespaces give two of them one number, and after a fork.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Process {
    /// As the process sees itself.
    pub(crate) pid: u32,
    /// Drawn once per process image; 0 where the kernel gives no random numbers.
    token: u64,
}

impl Process {
    pub(crate) fn this() -> Process {
        static TOKEN: OnceLock<u64> = OnceLock::new();
        let token = *TOKEN.get_or_init(|| {
            let nonce = random_nonce().unwrap_or_default();
            nonce.iter().take(8).fold(0, |token, byte| token << 8 | u64::from(*byte))
        });
        Process { pid: std::process::id(), token }
    }
}

impl Frame {
    fn encode(&self) -> Result<Vec<u8>> {
        let mut bytes = PREFIX.to_vec();
        serde_json::to_writer(&mut bytes, self)
            .map_err(|error| Error::io("writing a rendezvous frame", std::io::Error::other(error)))?;
        Ok(bytes)
    }

    /// The frame in `bytes`.
    ///
    /// # Errors
    /// What is wrong with it, for the refusal.
    pub(crate) fn decode(bytes: &[u8]) -> std::result::Result<Frame, String> {
        let Some((prefix, body)) = bytes.split_first_chunk::<8>() else {
            return Err(format!("a frame of {} bytes", bytes.len()));
        };
        if prefix != PREFIX {
            return Err(format!("a frame that begins {prefix:02x?}, expected {PREFIX:02x?}"));
        }
        serde_json::from_slice(body).map_err(|error| format!("a frame that does not parse: {error}"))
    }
}

/// What one look at a socket gave.
#[derive(Debug)]
pub(crate) enum Received {
    /// A frame and the descriptors that came with it.
    Frame(Frame, Vec<OwnedFd>),
    /// Something that is no frame; the reason.
    Garbage(String),
    /// A frame with more descriptors than this process may open: how many it got, and its own error.
    Full(Frame, usize, Error),
    /// The other side has closed.
    Closed,
    /// Nothing there yet.
    Nothing,
}

/// Sends `frame` with `fds`. The socket may be non-blocking; a full buffer is waited for until `deadline`.
///
/// # Errors
/// [`Error::Io`] if the peer has closed or does not read.
pub(crate) fn send(socket: BorrowedFd<'_>, frame: &Frame, fds: &[BorrowedFd<'_>], deadline: Instant) -> Result<()> {
    let bytes = frame.encode()?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FRAME_LIMIT_FDS))];
    loop {
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(Error::io("sending descriptors", Errno::NOBUFS));
        }
        match rustix::net::sendmsg(socket, &[IoSlice::new(&bytes)], &mut control, SendFlags::NOSIGNAL) {
            Ok(_) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) if Instant::now() < deadline => poll_one(socket, PollFlags::OUT, deadline)?,
            // Too many descriptors of this user are under way; they are taken up within milliseconds.
            Err(Errno::TOOMANYREFS) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(2)),
            Err(errno) => return Err(Error::io("sending a rendezvous frame", errno)),
        }
    }
}

/// Takes one frame if there is one. `buffer` is [`FRAME_LIMIT_BYTES`] + 1 long.
pub(crate) fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> Received {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FRAME_LIMIT_FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    let message = loop {
        match rustix::net::recvmsg(socket, &mut [IoSliceMut::new(buffer)], &mut control, flags) {
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return Received::Nothing,
            // ECONNRESET: the other side closed with frames of ours unread.
            Err(_) => return Received::Closed,
            Ok(message) => break message,
        }
    };
    // Taken out before anything is judged, so that they are closed whatever the judgement.
    let mut fds = Vec::new();
    for ancillary in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = ancillary {
            fds.extend(rights);
        }
    }
    if message.bytes == 0 && fds.is_empty() {
        return Received::Closed;
    }
    if message.flags.contains(ReturnFlags::TRUNC) || message.bytes > FRAME_LIMIT_BYTES {
        return Received::Garbage(format!("a frame longer than {FRAME_LIMIT_BYTES} bytes"));
    }
    let is_cut = message.flags.contains(ReturnFlags::CTRUNC);
    if is_cut && fds.len() >= FRAME_LIMIT_FDS {
        return Received::Garbage(format!("a frame with more descriptors than {FRAME_LIMIT_FDS}"));
    }
    match Frame::decode(&buffer[..message.bytes]) {
        // Where there was room for more, so by the limit of this process.
        Ok(frame) if is_cut => Received::Full(frame, fds.len(), no_descriptor_left("receiving descriptors")),
        Ok(frame) => Received::Frame(frame, fds),
        Err(reason) => Received::Garbage(reason),
    }
}

/// The error of a process that may open no more descriptors.
pub(crate) fn no_descriptor_left(what: &str) -> Error {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    let limit = limit.map_or_else(|| "unlimited".to_owned(), |limit| limit.to_string());
    Error::io(format!("{what} (ulimit -n is {limit})"), Errno::MFILE)
}

/// What is left until `deadline`, for poll: rounded up, so that a wait does not end before it.
pub(crate) fn until(deadline: Instant) -> Timespec {
    let left = deadline.saturating_duration_since(Instant::now()) + Duration::from_micros(999);
    Timespec { tv_sec: left.as_secs().min(1 << 40) as i64, tv_nsec: i64::from(left.subsec_nanos()) }
}

/// Waits until `socket` is ready for `events`, or hung up, or `deadline` is there.
///
/// # Errors
/// [`Error::Io`] if poll fails.
pub(crate) fn poll_one(socket: impl AsFd, events: PollFlags, deadline: Instant) -> Result<()> {
    let mut polled = [PollFd::from_borrowed_fd(socket.as_fd(), events)];
    match rustix::event::poll(&mut polled, Some(&until(deadline))) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(errno) => Err(Error::io("poll of a rendezvous socket", errno)),
    }
}

/// Sixteen random bytes.
///
/// # Errors
/// [`Error::Io`] if the kernel gives none.
pub(crate) fn random_nonce() -> Result<[u8; 16]> {
    let mut nonce = [0; 16];
    rustix::rand::getrandom(&mut nonce[..], rustix::rand::GetRandomFlags::empty())
        .map_err(|errno| Error::io("getrandom", errno))?;
    Ok(nonce)
}

pub(crate) fn hex(nonce: &[u8; 16]) -> String {
    nonce.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The nonce that [`hex`] wrote.
pub(crate) fn from_hex(text: &str) -> Option<[u8; 16]> {
    let mut nonce = [0; 16];
    if text.len() != 32 || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    for (byte, digits) in nonce.iter_mut().zip(text.as_bytes().chunks(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?;
    }
    Some(nonce)
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rustix::net::{AddressFamily, SocketFlags, SocketType};

    fn pair() -> (OwnedFd, OwnedFd) {
        rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap()
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(2)
    }

    #[test]
    fn frames_and_descriptors_arrive() {
        let (a, b) = pair();
        let null = std::fs::File::open("/dev/null").unwrap();
        let frame =
            Frame::Hello { nonce: hex(&[9; 16]), job: "j".into(), rank: 3, world_size: 4, process: Process::this() };
        let fds = vec![null.as_fd(); FRAME_LIMIT_FDS];
        send(a.as_fd(), &frame, &fds, soon()).unwrap();
        let mut buffer = vec![0; FRAME_LIMIT_BYTES + 1];
        let Received::Frame(got, fds) = receive(b.as_fd(), &mut buffer) else { panic!() };
        assert_eq!((got, fds.len()), (frame, FRAME_LIMIT_FDS));
        assert!(matches!(receive(b.as_fd(), &mut buffer), Received::Nothing));
        drop(a);
        assert!(matches!(receive(b.as_fd(), &mut buffer), Received::Closed));
    }

    #[test]
    fn p10_oversized_and_foreign_frames_are_garbage() {
        let (a, b) = pair();
        let mut buffer = vec![0; FRAME_LIMIT_BYTES + 1];
        for bytes in [vec![0; FRAME_LIMIT_BYTES + 1], vec![1; 100_000], b"GET / HTTP/1.1\r\n".to_vec(), vec![1]] {
            rustix::net::send(&a, &bytes, SendFlags::NOSIGNAL).unwrap();
            assert!(matches!(receive(b.as_fd(), &mut buffer), Received::Garbage(_)), "{} bytes", bytes.len());
        }
    }

    #[test]
    fn nonces_go_through_hex() {
        let nonce = random_nonce().unwrap();
        assert_eq!(from_hex(&hex(&nonce)), Some(nonce));
        for wrong in ["", "00", "+1000000000000000000000000000000", "é0000000000000000000000000000000"] {
            assert_eq!(from_hex(wrong), None, "{wrong}");
        }
    }

    proptest! {
        #[test]
        fn p10_no_bytes_make_decode_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400), framed in any::<bool>()) {
            let mut all = if framed { PREFIX.to_vec() } else { Vec::new() };
            all.extend(bytes);
            let _ = Frame::decode(&all);
        }

        #[test]
        fn p10_damaged_frames_are_refused_or_whole(at in 0_usize..200, to in any::<u8>()) {
            let frame = Frame::Welcome { processes: vec![Process::this(); 64] };
            let mut bytes = frame.encode().unwrap();
            let at = at % bytes.len();
            bytes[at] = to;
            if let Ok(Frame::Welcome { processes }) = Frame::decode(&bytes) {
                prop_assert!(processes.len() <= bytes.len());
            }
            bytes.truncate(at);
            prop_assert!(Frame::decode(&bytes).is_err());
        }
    }
}
