//! Shared memory without a name: sealed memfds, mapped by every rank that was handed the descriptor.
//!
//! A segment is sparse: its length is address space, and a page takes memory when it is reserved. Its size is sealed
//! before anybody else sees it, so no peer can shrink it under a mapping (SIGBUS); and what the library touches it
//! reserves first by `fallocate`, so a full machine is an [`Error::NoSpace`] and not a SIGBUS either. The memory goes
//! when the last process that maps it ends, however it ends. A memfd lies outside the `/dev/shm` mount and its limit.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;

use memmap2::{MmapOptions, MmapRaw};
use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags, SeekFrom};
use rustix::io::Errno;

use crate::error::{Error, Result};
use crate::world::memory;

/// What keeps a segment's length as it was when it was made.
const SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW).union(SealFlags::SEAL);

/// What a mapping has behind its end. The kernel lays mappings out one beside the other, and without it the same offset
/// in two segments of 64 GiB would have addresses that are equal in their lower 36 bits. The first-level cache of AMD's
/// Zen finds its way by a hash of bits 12 to 27 of the address (Lipp et al., "Take A Way", 2020): it held one of two such
/// lines at a time, and a rank that added the same place of two arenas took 45 us for what another did in 19.
const SPACER_BYTES: usize = 4096;

/// What is asked for at a time.
const GRANT_BYTES: u64 = 16 << 20;

/// A sealed memfd and this process's mapping of it.
///
/// The memory is shared with other processes: whoever reads or writes it through [`as_ptr`](Segment::as_ptr) follows a
/// protocol of flags or atomics, and touches reserved ranges only.
#[derive(Debug)]
pub struct Segment {
    map: MmapRaw,
    len_bytes: usize,
    /// Absent once [`close_fd`](Segment::close_fd) was called: the mapping stands on its own.
    file: Option<File>,
}

impl Segment {
    /// Makes a segment of `len_bytes`, all zeroes and without memory yet. `name` shows in `/proc/PID/maps` only.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a length of 0; [`Error::NoSpace`] if the file-size or address-space limit of this
    /// process is too small; [`Error::Io`] for any other refusal.
    pub fn create(name: &'static str, len_bytes: usize) -> Result<Segment> {
        if len_bytes == 0 || isize::try_from(len_bytes).is_err() {
            return Err(Error::InvalidArgument {
                argument: "segment length",
                value: format!("{len_bytes} bytes"),
                accepted: "must be positive and fit the address space",
            });
        }
        // Beyond RLIMIT_FSIZE the kernel does not only refuse, it sends SIGXFSZ.
        memory::check_file_size_limit(name, len_bytes as u64)?;
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let fd = match rustix::fs::memfd_create(name, flags | MemfdFlags::NOEXEC_SEAL) {
            Err(Errno::INVAL) => rustix::fs::memfd_create(name, flags), // before Linux 6.3
            other => other,
        }
        .map_err(|errno| Error::io(format!("memfd_create {name}"), errno))?;
        rustix::fs::ftruncate(&fd, len_bytes as u64)
            .map_err(|errno| Error::io(format!("ftruncate of {name} to {len_bytes} bytes"), errno))?;
        rustix::fs::fcntl_add_seals(&fd, SEALS).map_err(|errno| Error::io(format!("sealing {name}"), errno))?;
        Segment::map(fd, len_bytes)
    }

    /// Maps a segment that a peer made and handed over.
    ///
    /// # Errors
    /// [`Error::RendezvousRefused`] if `fd` is not a memfd whose length is sealed; [`Error::NoSpace`] and [`Error::Io`]
    /// as for [`create`](Segment::create).
    pub fn from_fd(fd: OwnedFd) -> Result<Segment> {
        let refuse = |reason: String| Error::RendezvousRefused { place: "shared memory of a peer".into(), reason };
        let seals = rustix::fs::fcntl_get_seals(&fd)
            .map_err(|errno| refuse(format!("the descriptor is not a memfd ({errno})")))?;
        if !seals.contains(SealFlags::SHRINK | SealFlags::GROW) {
            return Err(refuse(format!("the memfd's length is not sealed (seals {:#x})", seals.bits())));
        }
        let size = rustix::fs::fstat(&fd).map_err(|errno| Error::io("fstat of a peer's memfd", errno))?.st_size;
        let len_bytes = usize::try_from(size).ok().filter(|len| *len > 0 && isize::try_from(*len).is_ok());
        Segment::map(fd, len_bytes.ok_or_else(|| refuse(format!("the memfd is {size} bytes long")))?)
    }

    fn map(fd: OwnedFd, len_bytes: usize) -> Result<Segment> {
        let file = File::from(fd);
        let map_len_bytes = len_bytes.saturating_add(SPACER_BYTES);
        let map = MmapOptions::new().len(map_len_bytes).no_reserve_swap().map_raw(&file).map_err(|error| {
            if error.raw_os_error() == Some(Errno::NOMEM.raw_os_error()) {
                return Error::NoSpace {
                    what: "address space of a shared segment",
                    need_bytes: len_bytes as u64,
                    have_bytes: memory::address_space_left_bytes(),
                };
            }
            Error::io(format!("mmap of {len_bytes} shared bytes"), error)
        })?;
        Ok(Segment { map, len_bytes, file: Some(file) })
    }

    /// First byte of the mapping, page aligned. Valid for [`len_bytes`](Segment::len_bytes) bytes while the segment
    /// lives.
    pub fn as_ptr(&self) -> NonNull<u8> {
        // A mapping never lies at address 0, so the other branch is not reached.
        NonNull::new(self.map.as_mut_ptr()).unwrap_or(NonNull::dangling())
    }

    /// Length of the segment: address space, not memory.
    pub fn len_bytes(&self) -> usize {
        self.len_bytes
    }

    /// Gives `len_bytes` from `offset_bytes` on their memory, now. Pages that were written before cost nothing; pages
    /// that were reserved and never written are asked for again when it is tested whether there is enough.
    ///
    /// # Errors
    /// [`Error::NoSpace`] if the machine, the control group or a limit has too little; nothing is lost then.
    /// [`Error::InvalidArgument`] if the range leaves the segment or the descriptor was closed.
    pub fn reserve(&self, what: &'static str, offset_bytes: usize, len_bytes: usize) -> Result<()> {
        let end = offset_bytes.checked_add(len_bytes).filter(|end| *end <= self.len_bytes());
        let (Some(end), Some(file)) = (end, &self.file) else {
            return Err(Error::InvalidArgument {
                argument: "reserved range",
                value: format!("{len_bytes} bytes from {offset_bytes} of {what}"),
                accepted: "must lie inside a segment that this rank may reserve from",
            });
        };
        if len_bytes == 0 {
            return Ok(());
        }
        let (offset, len) = (offset_bytes as u64, len_bytes as u64);
        let need_bytes = hole_bytes(file, offset, end as u64);
        if need_bytes == 0 {
            return Ok(());
        }
        // The kernel answers a charge beyond a control group's limit by killing a process of the group, so look first.
        let have_bytes = memory::available_bytes();
        if need_bytes > have_bytes {
            return Err(Error::NoSpace { what, need_bytes, have_bytes });
        }
        let granted = grant(file, offset, end as u64).map_err(|errno| match errno {
            Errno::NOSPC | Errno::NOMEM | Errno::FBIG => {
                Error::NoSpace { what, need_bytes, have_bytes: memory::available_bytes() }
            }
            errno => Error::io(format!("fallocate of {len_bytes} bytes for {what}"), errno),
        });
        // Nothing stands in a range that was all holes, so what was got of it can go.
        if granted.is_err() && need_bytes == len {
            self.release(offset_bytes, len_bytes)?;
        }
        granted
    }

    /// Gives the memory of a range back; it reads as zeroes afterwards and is no longer reserved.
    ///
    /// # Errors
    /// As [`reserve`](Segment::reserve), but for `NoSpace`.
    pub fn release(&self, offset_bytes: usize, len_bytes: usize) -> Result<()> {
        let inside = offset_bytes.checked_add(len_bytes).is_some_and(|end| end <= self.len_bytes());
        let (true, Some(file)) = (inside, &self.file) else {
            return Err(Error::InvalidArgument {
                argument: "released range",
                value: format!("{len_bytes} bytes from {offset_bytes}"),
                accepted: "must lie inside a segment that this rank may reserve from",
            });
        };
        if len_bytes == 0 {
            return Ok(());
        }
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(file, punch, offset_bytes as u64, len_bytes as u64)
            .map_err(|errno| Error::io(format!("releasing {len_bytes} shared bytes"), errno))
    }

    /// The descriptor, to hand to a peer; none once it was closed.
    pub(crate) fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.file.as_ref().map(File::as_fd)
    }

    /// Closes the descriptor and keeps the mapping: with 64 ranks a table of 64 arenas is not worth 64 descriptors.
    pub(crate) fn close_fd(&mut self) {
        self.file = None;
    }
}

/// Gives `offset..end` its memory, piece by piece: a signal ends a call, which takes back what it had got on kernels that heed
/// every signal there, so a call for all of it need never end under a profiler's timer.
fn grant(file: &File, offset: u64, end: u64) -> rustix::io::Result<()> {
    let mut at = offset;
    while at < end {
        let len_bytes = GRANT_BYTES.min(end - at);
        match rustix::fs::fallocate(file, FallocateFlags::empty(), at, len_bytes) {
            Ok(()) => at += len_bytes,
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

/// Bytes in `offset..end` that have no memory yet, or have it and were never written.
fn hole_bytes(file: &File, offset: u64, end: u64) -> u64 {
    let mut holes = 0;
    let mut at = offset;
    while at < end {
        // Data and hole boundaries are page boundaries; an error (ENXIO: no data to the end) means holes only.
        let data = rustix::fs::seek(file, SeekFrom::Data(at)).unwrap_or(end).clamp(at, end);
        holes += data - at;
        if data == end {
            break;
        }
        at = rustix::fs::seek(file, SeekFrom::Hole(data)).unwrap_or(end).clamp(data, end);
        if at == data {
            break;
        }
    }
    holes
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    const PAGE: usize = 4096;

    #[test]
    fn a_segment_is_zeroed_sparse_and_shared() {
        let segment = Segment::create("test", 1 << 36).unwrap();
        assert_eq!(hole_bytes(segment.file.as_ref().unwrap(), 0, 1 << 36), 1 << 36, "64 GiB cost nothing");
        segment.reserve("test", 3 * PAGE, PAGE).unwrap();
        let twin = Segment::from_fd(segment.fd().unwrap().try_clone_to_owned().unwrap()).unwrap();
        assert_eq!(twin.len_bytes(), segment.len_bytes());
        // SAFETY: both mappings cover the reserved page, and no other thread touches it.
        let seen = unsafe {
            segment.as_ptr().add(3 * PAGE).write(7);
            twin.as_ptr().add(3 * PAGE).read()
        };
        assert_eq!(seen, 7);
        assert_eq!(hole_bytes(segment.file.as_ref().unwrap(), 0, 8 * PAGE as u64), 7 * PAGE as u64);
        segment.release(3 * PAGE, PAGE).unwrap();
        assert_eq!(hole_bytes(segment.file.as_ref().unwrap(), 0, 8 * PAGE as u64), 8 * PAGE as u64);
    }

    #[test]
    fn a_peer_cannot_change_the_length() {
        let segment = Segment::create("test", 4 * PAGE).unwrap();
        assert_eq!(rustix::fs::ftruncate(segment.fd().unwrap(), 0), Err(Errno::PERM));
        assert_eq!(rustix::fs::ftruncate(segment.fd().unwrap(), 1 << 20), Err(Errno::PERM));
    }

    #[test]
    fn unsealed_and_foreign_descriptors_are_refused() {
        let unsealed = rustix::fs::memfd_create("x", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        rustix::fs::ftruncate(&unsealed, PAGE as u64).unwrap();
        let refused = Segment::from_fd(unsealed).unwrap_err();
        assert!(matches!(&refused, Error::RendezvousRefused { reason, .. } if reason.contains("not sealed")));
        let null = File::open("/dev/null").unwrap();
        assert!(matches!(Segment::from_fd(null.into()), Err(Error::RendezvousRefused { .. })));
    }

    #[test]
    fn ranges_are_checked() {
        let segment = Segment::create("test", 4 * PAGE).unwrap();
        assert!(matches!(segment.reserve("test", PAGE, 4 * PAGE), Err(Error::InvalidArgument { .. })));
        assert!(matches!(segment.reserve("test", usize::MAX, 2), Err(Error::InvalidArgument { .. })));
        assert!(matches!(Segment::create("test", 0), Err(Error::InvalidArgument { .. })));
        assert!(segment.reserve("test", 4 * PAGE, 0).is_ok());
    }

    #[test]
    fn p12_more_than_the_machine_has_is_no_space() {
        let segment = Segment::create("test", 1 << 44).unwrap();
        let refused = segment.reserve("test", 0, 1 << 44).unwrap_err();
        let Error::NoSpace { need_bytes, have_bytes, .. } = refused else { panic!("{refused:?}") };
        assert!(need_bytes == 1 << 44 && have_bytes > 0 && have_bytes < need_bytes);
        assert!(segment.reserve("test", 0, PAGE).is_ok(), "a refusal leaves the segment usable");
    }
}
