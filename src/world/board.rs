//! The control page: everything ranks share about each other, in one sealed segment made by rank 0.
//!
//! ```text
//!   0                Header          magic, version, nonce, world size; written once, before anybody else sees it
//!   2 Ki             Groups          which group areas are taken and have their memory
//!   4 Ki             FaultCell       the first error of the job, for every rank and for ever
//!   8 Ki             RankCell x 64   process, state, heartbeat
//!   MAILBOXES_AT     Mailbox x N     control plane: two slots a rank              (control.rs)
//!   recorders        Recorder x N    last 1,024 operations a rank                 (recorder.rs)
//!   group areas      16 x N x GROUP_AREA_BYTES    flags and staging of communicators, reserved at first use
//! ```
//!
//! Up to the group areas everything has its memory from the start, so no look at it can fail. All fields are atomics
//! or written before they are shared: a peer can write garbage, and then this process reads garbage, not undefined
//! behaviour.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::error::{Error, Result};
use crate::world::control::Mailbox;
use crate::world::fault::FaultCell;
use crate::world::recorder::Ring;
use crate::world::segment::Segment;

/// Most ranks of one world: rank sets travel as one u64.
pub const MAX_RANKS: u32 = 64;
/// Most communicators alive at once.
pub const MAX_GROUPS: u32 = 16;
/// Flags and staging slots of one rank in one communicator.
pub const GROUP_AREA_BYTES: usize = 9 << 19;

/// "annulus" and the layout's number: any change of a shared structure changes it.
const MAGIC: u64 = u64::from_le_bytes(*b"annulus\x02");
/// Version of the layout below.
pub(crate) const LAYOUT_VERSION: u32 = 1;

/// Written by rank 0 before the segment is handed out, read by the others when they map it.
#[repr(C, align(64))]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Header {
    magic: u64,
    version: u32,
    world_size: u32,
    nonce: [u8; 16],
    total_bytes: u64,
    group_area_bytes: u64,
    pad: [u64; 2],
}

/// What a rank tells about itself. One line of its own, written by that rank and its monitor.
#[repr(C, align(128))]
pub(crate) struct RankCell {
    /// A [`RankState`]. Release by the owner; acquire by the others.
    state: AtomicU32,
    /// Process id as the rank sees itself.
    pid: AtomicU32,
    /// Counts up every 50 ms while the rank's threads are scheduled; relaxed, only change is looked at.
    beat: AtomicU64,
    pad: [u64; 14],
}

/// Where a rank is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum RankState {
    /// Has not mapped the board yet.
    Absent = 0,
    /// Joined and expected to answer.
    Joined = 1,
    /// Left by `teardown` or by dropping its world: its going is no error until somebody waits for it.
    Left = 2,
}

/// One bit for each group area.
#[repr(C, align(64))]
struct Groups {
    /// The number is taken.
    claimed: AtomicU32,
    /// The area has its memory. Set by every rank that reserved it, cleared by the one that gives it back.
    reserved: AtomicU32,
    pad: [u32; 14],
}

const GROUPS_AT: usize = 2 << 10;
const FAULT_AT: usize = 4 << 10;
const RANKS_AT: usize = 8 << 10;
const MAILBOXES_AT: usize = 16 << 10;
const AREA_ALIGN: usize = 2 << 20; // so that a group area can be huge pages where the machine gives them

const _: () = assert!(size_of::<Header>() == 64 && std::mem::offset_of!(Header, nonce) == 16);
const _: () = assert!(std::mem::offset_of!(Header, total_bytes) == 32);
const _: () = assert!(size_of::<RankCell>() == 128 && std::mem::offset_of!(RankCell, beat) == 8);
const _: () = assert!(size_of::<FaultCell>() <= RANKS_AT - FAULT_AT);
const _: () = assert!(size_of::<Header>() <= GROUPS_AT && GROUPS_AT + size_of::<Groups>() <= FAULT_AT);
const _: () = assert!(RANKS_AT + MAX_RANKS as usize * size_of::<RankCell>() <= MAILBOXES_AT);
const _: () = assert!(GROUP_AREA_BYTES.is_multiple_of(4096) && size_of::<Mailbox>().is_multiple_of(128));

/// A range of shared memory. The holder keeps the world alive while using it.
#[derive(Debug, Clone, Copy)]
pub struct Region {
    /// First byte, aligned to a page.
    pub ptr: NonNull<u8>,
    /// Length.
    pub len_bytes: usize,
}

// SAFETY: a region is an address and a length; what is done with the memory behind it is argued where it is done.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

/// This rank's view of the control page.
#[derive(Debug)]
pub(crate) struct Board {
    segment: Segment,
    world_size: u32,
    recorders_at: usize,
    groups_at: usize,
}

impl Board {
    /// Makes the page; rank 0 does.
    ///
    /// # Errors
    /// [`Error::NoSpace`], [`Error::Io`] from the segment.
    pub(crate) fn create(world_size: u32, nonce: [u8; 16]) -> Result<Board> {
        let (recorders_at, groups_at, total_bytes) = layout(world_size)?;
        let segment = Segment::create("annulus-board", total_bytes)?;
        segment.reserve("the control page", 0, groups_at)?;
        let header = Header {
            magic: MAGIC,
            version: LAYOUT_VERSION,
            world_size,
            nonce,
            total_bytes: total_bytes as u64,
            group_area_bytes: GROUP_AREA_BYTES as u64,
            pad: [0; 2],
        };
        // SAFETY: the first page is reserved and nobody else has the segment yet.
        unsafe { segment.as_ptr().cast::<Header>().write(header) };
        Ok(Board { segment, world_size, recorders_at, groups_at })
    }

    /// Maps the page that rank 0 handed over and checks that it is this job's.
    ///
    /// # Errors
    /// [`Error::RendezvousRefused`] for another magic, version, world size, nonce or length.
    pub(crate) fn open(fd: OwnedFd, world_size: u32, nonce: [u8; 16]) -> Result<Board> {
        let (recorders_at, groups_at, total_bytes) = layout(world_size)?;
        let segment = Segment::from_fd(fd)?;
        let refuse = |reason: String| Err(Error::RendezvousRefused { place: "control page".into(), reason });
        if segment.len_bytes() != total_bytes {
            return refuse(format!("it is {} bytes long, this version makes {total_bytes}", segment.len_bytes()));
        }
        // SAFETY: the segment is longer than a header, whose memory rank 0 reserved and wrote before sending it.
        let header = unsafe { segment.as_ptr().cast::<Header>().read_volatile() };
        if header.magic != MAGIC || header.version != LAYOUT_VERSION {
            let Header { magic, version, .. } = header;
            return refuse(format!(
                "layout {magic:#x} version {version}, expected {MAGIC:#x} version {LAYOUT_VERSION}"
            ));
        }
        if header.nonce != nonce {
            return refuse("it carries the nonce of another job".into());
        }
        if header.world_size != world_size || header.group_area_bytes != GROUP_AREA_BYTES as u64 {
            return refuse(format!("it is made for {} ranks, expected {world_size}", header.world_size));
        }
        Ok(Board { segment, world_size, recorders_at, groups_at })
    }

    pub(crate) fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.segment.fd()
    }

    /// The shared structure at `offset_bytes`.
    ///
    /// # Safety
    /// `T` is made of atomics only, valid for any bytes, and lies inside the reserved part at its alignment.
    unsafe fn at<T>(&self, offset_bytes: usize) -> &T {
        debug_assert!(offset_bytes.is_multiple_of(align_of::<T>()) && offset_bytes + size_of::<T>() <= self.groups_at);
        // SAFETY: the mapping lives as long as `self`; the rest is the caller's promise.
        unsafe { self.segment.as_ptr().add(offset_bytes).cast::<T>().as_ref() }
    }

    pub(crate) fn fault_cell(&self) -> &FaultCell {
        // SAFETY: FAULT_AT is page aligned and reserved; the cell is atomics.
        unsafe { self.at(FAULT_AT) }
    }

    /// The cell of `rank`, which must be below the world size.
    fn cell(&self, rank: u32) -> &RankCell {
        assert!(rank < self.world_size, "ranks are checked where they enter the library");
        // SAFETY: inside the table by the assertion; the cell is atomics and its size keeps the alignment.
        unsafe { self.at(RANKS_AT + rank as usize * size_of::<RankCell>()) }
    }

    pub(crate) fn mailbox(&self, rank: u32) -> &Mailbox {
        assert!(rank < self.world_size, "ranks are checked where they enter the library");
        // SAFETY: inside the table by the assertion; a mailbox is atomics and its size keeps the alignment.
        unsafe { self.at(MAILBOXES_AT + rank as usize * size_of::<Mailbox>()) }
    }

    pub(crate) fn recorder(&self, rank: u32) -> &Ring {
        assert!(rank < self.world_size, "ranks are checked where they enter the library");
        // SAFETY: inside the table by the assertion; a ring is atomics and its size keeps the alignment.
        unsafe { self.at(self.recorders_at + rank as usize * size_of::<Ring>()) }
    }

    fn groups(&self) -> &Groups {
        // SAFETY: GROUPS_AT is aligned and reserved; the structure is atomics.
        unsafe { self.at(GROUPS_AT) }
    }

    /// This rank is here.
    pub(crate) fn enter(&self, rank: u32, pid: u32) {
        self.cell(rank).pid.store(pid, Ordering::Relaxed);
        self.set_state(rank, RankState::Joined);
    }

    pub(crate) fn set_state(&self, rank: u32, state: RankState) {
        // Release: pairs with the acquire in `state`; what the rank wrote before it left is visible to who sees it gone.
        self.cell(rank).state.store(state as u32, Ordering::Release);
    }

    pub(crate) fn state(&self, rank: u32) -> RankState {
        // Acquire: pairs with the release in `set_state`.
        match self.cell(rank).state.load(Ordering::Acquire) {
            0 => RankState::Absent,
            1 => RankState::Joined,
            _ => RankState::Left,
        }
    }

    pub(crate) fn pid(&self, rank: u32) -> u32 {
        self.cell(rank).pid.load(Ordering::Relaxed)
    }

    /// One sign of life of `rank`.
    pub(crate) fn beat(&self, rank: u32) {
        // Relaxed: only the change is looked at, nothing is published by it.
        self.cell(rank).beat.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn beats(&self, rank: u32) -> u64 {
        self.cell(rank).beat.load(Ordering::Relaxed)
    }

    /// The area of communicator `group`: `world_size * GROUP_AREA_BYTES`, zero at first, with its memory.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a group that does not exist; [`Error::NoSpace`].
    pub(crate) fn group_area(&self, group: u32) -> Result<Region> {
        if group >= MAX_GROUPS {
            return Err(too_many_groups("group", group));
        }
        let len_bytes = self.world_size as usize * GROUP_AREA_BYTES;
        let offset_bytes = self.groups_at + group as usize * len_bytes;
        // Acquire and release: pair with each other and with the clearing in `release_group`, so that a bit that is seen
        // set means memory that is there.
        if self.groups().reserved.load(Ordering::Acquire) & 1 << group == 0 {
            self.segment.reserve("a communicator's flags and staging", offset_bytes, len_bytes)?;
            self.groups().reserved.fetch_or(1 << group, Ordering::Release);
        }
        // SAFETY: the layout holds MAX_GROUPS areas, so the offset lies inside the mapping.
        Ok(Region { ptr: unsafe { self.segment.as_ptr().add(offset_bytes) }, len_bytes })
    }

    /// Takes a group area nobody uses. One rank claims and tells the others the number.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if all are taken.
    pub(crate) fn claim_group(&self) -> Result<u32> {
        let mut taken = self.groups().claimed.load(Ordering::Relaxed);
        loop {
            let group = (!taken).trailing_zeros();
            if group >= MAX_GROUPS {
                return Err(too_many_groups("communicators alive", MAX_GROUPS + 1));
            }
            // AcqRel: pairs with the release in `release_group`; the area is as its last users left it.
            match self.groups().claimed.compare_exchange_weak(
                taken,
                taken | 1 << group,
                Ordering::AcqRel,
                Ordering::Relaxed,
            ) {
                Ok(_) => return Ok(group),
                Err(now) => taken = now,
            }
        }
    }

    /// Gives a group area back, zeroed. Called by one rank, once no rank of the group touches it any more.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a group that does not exist; [`Error::Io`].
    pub(crate) fn release_group(&self, group: u32) -> Result<()> {
        if group >= MAX_GROUPS {
            return Err(too_many_groups("group", group));
        }
        let len_bytes = self.world_size as usize * GROUP_AREA_BYTES;
        self.groups().reserved.fetch_and(!(1 << group), Ordering::Release);
        self.segment.release(self.groups_at + group as usize * len_bytes, len_bytes)?;
        // Release: pairs with the claim in `claim_group`.
        self.groups().claimed.fetch_and(!(1 << group), Ordering::Release);
        Ok(())
    }
}

fn too_many_groups(argument: &'static str, value: u32) -> Error {
    let accepted = "16 communicators at most may be alive at once";
    Error::InvalidArgument { argument, value: value.to_string(), accepted }
}

/// Offsets of the recorders and of the group areas, and the whole length.
fn layout(world_size: u32) -> Result<(usize, usize, usize)> {
    let ranks = world_size as usize;
    let recorders_at = (MAILBOXES_AT + ranks * size_of::<Mailbox>()).next_multiple_of(4096);
    let groups_at = (recorders_at + ranks * size_of::<Ring>()).next_multiple_of(AREA_ALIGN);
    GROUP_AREA_BYTES
        .checked_mul(ranks)
        .and_then(|area| area.checked_mul(MAX_GROUPS as usize))
        .and_then(|areas| areas.checked_add(groups_at))
        .map(|total| (recorders_at, groups_at, total))
        .ok_or_else(|| Error::SizeOverflow { what: "control page", detail: format!("{world_size} ranks") })
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    fn fd_of(board: &Board) -> OwnedFd {
        board.fd().unwrap().try_clone_to_owned().unwrap()
    }

    #[test]
    fn two_mappings_see_one_page() {
        let here = Board::create(3, [7; 16]).unwrap();
        let there = Board::open(fd_of(&here), 3, [7; 16]).unwrap();
        here.enter(1, 4321);
        here.beat(1);
        assert_eq!((there.state(1), there.pid(1), there.beats(1)), (RankState::Joined, 4321, 1));
        assert_eq!((there.state(0), there.state(2)), (RankState::Absent, RankState::Absent));
        let (mine, theirs) = (here.group_area(2).unwrap(), there.group_area(2).unwrap());
        assert_eq!((mine.len_bytes, theirs.len_bytes), (3 * GROUP_AREA_BYTES, 3 * GROUP_AREA_BYTES));
        // SAFETY: the area is reserved, and this thread alone uses it.
        let seen = unsafe {
            mine.ptr.add(mine.len_bytes - 1).write(9);
            theirs.ptr.add(theirs.len_bytes - 1).read()
        };
        assert_eq!(seen, 9);
    }

    #[test]
    fn p08_a_page_of_another_job_is_refused() {
        let board = Board::create(2, [1; 16]).unwrap();
        for (world_size, nonce) in [(2, [2; 16]), (3, [1; 16])] {
            let refused = Board::open(fd_of(&board), world_size, nonce).unwrap_err();
            assert!(matches!(refused, Error::RendezvousRefused { .. }), "{refused:?}");
        }
        // SAFETY: the header is reserved memory that this thread alone uses.
        unsafe { board.segment.as_ptr().write(b'x') };
        let refused = Board::open(fd_of(&board), 2, [1; 16]).unwrap_err();
        assert!(refused.to_string().contains("layout"), "{refused}");
    }

    #[test]
    fn groups_are_claimed_once_and_come_back_zeroed() {
        let board = Board::create(1, [0; 16]).unwrap();
        let claimed: Vec<u32> = (0..MAX_GROUPS).map(|_| board.claim_group().unwrap()).collect();
        assert_eq!(claimed, (0..MAX_GROUPS).collect::<Vec<_>>());
        assert!(matches!(board.claim_group(), Err(Error::InvalidArgument { .. })));
        let area = board.group_area(5).unwrap();
        // SAFETY: reserved memory of this test alone.
        unsafe { area.ptr.write(1) };
        board.release_group(5).unwrap();
        assert_eq!(board.claim_group().unwrap(), 5);
        // SAFETY: reserved again by the call.
        assert_eq!(unsafe { board.group_area(5).unwrap().ptr.read() }, 0);
        assert!(board.group_area(MAX_GROUPS).is_err() && board.release_group(99).is_err());
    }
}
