//! Whether what one device writes into another's memory arrives there: tried with data, both ways, with a deadline.
//!
//! `cuDeviceCanAccessPeer` may say yes where PCIe access control or an IOMMU loses or corrupts peer writes
//! (NVIDIA/open-gpu-kernel-modules issue 1257). `kernels/probe.cu` runs on both sides at the same time.

use std::time::Duration;

use bytemuck::Zeroable;

use super::arena::{Arena, PeerArena, Sharing};
use super::buffer::Buffer;
use super::context::Device;
use super::modules::{Kernels, Shape};
use super::peers::PeerAccess;
use super::stream::{Priority, Stream};
use crate::abi::{PROBE_THREADS, ProbeArguments, ProbeReport, Verdict};
use crate::dtype::DType;
use crate::error::{Error, Result};

/// Words that each side writes: enough to span many packets and pages of 4 KiB.
const LEN_WORDS: usize = 16 << 10;

/// Offsets in a probe area, in words; each on a cache line of its own.
const FLAG: usize = 0;
const ABORT: usize = 64;
const REPORT: usize = 128;
const INBOX: usize = 192;
const AREA_WORDS: usize = INBOX + LEN_WORDS;
const WORD_BYTES: usize = size_of::<u32>();

/// What the host waits beyond the kernels' own deadline.
const GRACE: Duration = Duration::from_secs(10);

/// What a pair of devices, or of ranks, can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Link {
    /// Every word arrived, both ways.
    Sound,
    /// The driver offers no peer access.
    NoAccess,
    /// The peer's flag never came.
    Silent {
        /// How long was waited.
        waited_ms: u64,
    },
    /// The flag came, and words before it were wrong.
    Corrupt {
        /// How many.
        wrong_words: u32,
        /// Of how many.
        of_words: u32,
    },
}

/// Memory for one side of probes: what the peer writes, and the report.
#[derive(Debug)]
pub struct ProbeArea {
    words: Buffer,
    /// Larger by one with each probe, the same on both sides.
    generation: u32,
    /// The deadline of the probe that was started last.
    timeout: Duration,
}

impl ProbeArea {
    /// What it takes of an arena.
    pub const LEN_BYTES: usize = AREA_WORDS * WORD_BYTES;

    /// Takes 64 KiB of `arena`, which must be fresh: flags begin at 0.
    ///
    /// # Errors
    /// As [`Arena::alloc`].
    pub fn new(arena: &Arena) -> Result<ProbeArea> {
        Ok(ProbeArea { words: arena.alloc(DType::I32, AREA_WORDS)?, generation: 0, timeout: Duration::ZERO })
    }

    /// Where it begins in its arena, for the peer.
    pub fn offset_bytes(&self) -> usize {
        self.words.arena_offset_bytes().unwrap_or(0) // always registered
    }

    /// Enqueues this side of a probe; the other side does the same within `timeout`. Both sides have finished the one before:
    /// a faster one would write over words that the other has yet to compare. `peer_offset_bytes` is what the peer's
    /// [`offset_bytes`](ProbeArea::offset_bytes) says. Ranks are `(own, peer)` and differ.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for an offset outside the peer's arena; [`Error::Capture`]; what the driver says.
    pub fn start(
        &mut self,
        kernels: &Kernels,
        stream: &Stream,
        peer: &PeerArena,
        peer_offset_bytes: usize,
        ranks: (u32, u32),
        timeout: Duration,
    ) -> Result<()> {
        stream.access()?.check_eager("a probe, whose arguments change,")?;
        let theirs = peer.address(peer_offset_bytes, AREA_WORDS * WORD_BYTES)?;
        let own = self.words.address();
        let at = |base: u64, word: usize| base + (word * WORD_BYTES) as u64;
        self.generation = self.generation.wrapping_add(1);
        self.timeout = timeout;
        let arguments = ProbeArguments {
            peer_inbox: at(theirs, INBOX),
            peer_flag: at(theirs, FLAG),
            inbox: at(own, INBOX),
            flag: at(own, FLAG),
            abort: at(own, ABORT),
            report: at(own, REPORT),
            timeout_ns: u64::try_from(timeout.as_nanos()).unwrap_or(u64::MAX),
            len_words: LEN_WORDS as u64,
            rank: ranks.0,
            peer: ranks.1,
            generation: self.generation,
            ..ProbeArguments::zeroed()
        };
        let shape = Shape { blocks: 1, threads: PROBE_THREADS, shared_bytes: 0, cooperative: false };
        // SAFETY: the arguments' own type; the addresses lie in the area here and, checked above, in the peer's arena, both
        // alive; the peer's side is the other half of the kernel's protocol.
        unsafe { kernels.launch("probe_peer", shape, stream, &arguments) }
    }

    /// Waits for the probe and tells what this side found.
    ///
    /// # Errors
    /// [`Error::TimedOut`] if the kernel does not end in time; what the device failed with.
    pub fn finish(&self, stream: &Stream) -> Result<Link> {
        let words: Vec<i32> = self.words.read(stream, self.timeout.saturating_add(GRACE))?;
        let len_words = size_of::<ProbeReport>() / WORD_BYTES;
        let report: ProbeReport =
            bytemuck::pod_read_unaligned(bytemuck::cast_slice(&words[REPORT..REPORT + len_words]));
        Ok(match (Verdict::from_code(report.verdict), report.wrong_words) {
            (Some(Verdict::Arrived), 0) => Link::Sound,
            (Some(Verdict::Arrived), wrong_words) => Link::Corrupt { wrong_words, of_words: LEN_WORDS as u32 },
            _ => Link::Silent { waited_ms: u64::try_from(self.timeout.as_millis()).unwrap_or(u64::MAX) },
        })
    }
}

/// Probes two devices of this process, both ways, and tells the worse of what the two sides found.
///
/// # Errors
/// What the drivers say; a link that does not work is no error.
pub fn probe_pair(devices: [&Kernels; 2], timeout: Duration) -> Result<Link> {
    let [first, second] = devices.map(Kernels::device);
    if first.is_same(second) {
        return Err(Error::InvalidArgument {
            argument: "devices to probe",
            value: format!("device {} twice", first.ordinal()),
            accepted: "must be two: one device reaches its own memory",
        });
    }
    for (from, to) in [(first, second), (second, first)] {
        if from.peer_access(to)? == PeerAccess::None {
            return Ok(Link::NoAccess);
        }
    }
    let side = |device: &Device| -> Result<(Arena, ProbeArea, Stream)> {
        let arena = Arena::new(device, AREA_WORDS * WORD_BYTES, Sharing::Handle)?;
        let area = ProbeArea::new(&arena)?;
        Ok((arena, area, Stream::new(device, "probe", Priority::High)?))
    };
    let mut sides = [side(first)?, side(second)?];
    let peer = |index: usize| PeerArena::of_this_process(devices[index].device(), &sides[1 - index].0);
    let peers = [peer(0)?, peer(1)?]; // until the kernels have ended
    for index in [0, 1] {
        let peer_offset_bytes = sides[1 - index].1.offset_bytes();
        let (_, area, stream) = &mut sides[index];
        let ranks = (index as u32, 1 - index as u32);
        area.start(devices[index], stream, &peers[index], peer_offset_bytes, ranks, timeout)?;
    }
    let [one, other] = sides.each_ref().map(|(_, area, stream)| area.finish(stream));
    Ok(match (one?, other?) {
        (Link::Sound, other) => other,
        (one, _) => one,
    })
}
