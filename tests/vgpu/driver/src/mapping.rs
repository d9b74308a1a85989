//! Memory that several threads and processes reach at the same time.
//!
//! Every access is made of atomic ones of up to 8 bytes, all sequentially consistent: kernels of several streams and
//! processes, copies and waits for values may meet anywhere, and a program's mistake is then a wrong value, as on a GPU,
//! and never undefined behaviour of this driver.

use std::ffi::c_void;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

use rustix::fs::{FlockOperation, MemfdFlags};
use rustix::mm::{MapFlags, ProtFlags};

/// Memory is called by this and the number of its device.
const NAME: &str = "annulus-vgpu-";

/// What memory holds before it is written.
const UNWRITTEN: u8 = 0xd5;

/// Which memory it is, whoever has mapped it: device and inode of its file.
pub(crate) type MemoryId = (u64, u64);

/// Bytes of the address space, readable and writable for as long as the value lives.
pub(crate) struct Mapping {
    base: NonNull<u8>,
    len_bytes: usize,
    memory: Option<OwnedFd>,
    /// Which memory, and where in it the mapping begins; none for memory that only one call reads or writes.
    identity: Option<(MemoryId, u64)>,
    end: End,
    /// A program has it no more, though a kernel may refer to it.
    is_closed: AtomicBool,
}

/// What becomes of the address space.
enum End {
    Unmap,
    /// A reserved range stays reserved.
    Reserve,
    /// Somebody else's memory.
    Leave,
}

// SAFETY: the memory stays mapped while the value lives, and is accessed only by atomics.
unsafe impl Send for Mapping {}
// SAFETY: as for Send.
unsafe impl Sync for Mapping {}

/// A new memfd of `len_bytes` for device `number`, filled with a pattern, because device memory is not zeroed.
pub(crate) fn new_memory(len_bytes: usize, number: usize) -> rustix::io::Result<OwnedFd> {
    let memory = rustix::fs::memfd_create(format!("{NAME}{number}"), MemfdFlags::CLOEXEC)?;
    rustix::fs::ftruncate(&memory, len_bytes as u64)?;
    Mapping::of_memory(memory.try_clone().map_err(|_| rustix::io::Errno::MFILE)?, len_bytes)?
        .fill(0, len_bytes, UNWRITTEN);
    Ok(memory)
}

/// The device of memory that another process has made with [`new_memory`]; none for other descriptors.
pub(crate) fn device_of(memory: BorrowedFd<'_>) -> Option<usize> {
    let link = std::fs::read_link(format!("/proc/self/fd/{}", memory.as_raw_fd())).ok()?;
    let name = link.to_str()?.strip_prefix("/memfd:")?.strip_prefix(NAME)?;
    name.split(' ').next()?.parse().ok()
}

/// The file that is mapped at `address`, and where in it that is; none for anonymous memory.
fn file_at(address: u64) -> Option<(MemoryId, u64)> {
    // proc_pid_maps(5): "address perms offset dev inode pathname", numbers in base 16 but the inode.
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    maps.lines().find_map(|line| {
        let mut fields = line.split_ascii_whitespace();
        let (range, _, offset, device, inode) =
            (fields.next()?, fields.next()?, fields.next()?, fields.next()?, fields.next()?);
        let (start, end) = range.split_once('-')?;
        let hex = |text| u64::from_str_radix(text, 16).ok();
        let (start, end, offset, inode) = (hex(start)?, hex(end)?, hex(offset)?, inode.parse::<u64>().ok()?);
        let (major, minor) = device.split_once(':')?;
        let device = rustix::fs::makedev(hex(major)? as u32, hex(minor)? as u32);
        ((start..end).contains(&address) && inode != 0).then(|| ((device, inode), offset + (address - start)))
    })
}

/// Reserves addresses that nothing is mapped at.
pub(crate) fn reserve(len_bytes: usize, align_bytes: usize) -> rustix::io::Result<u64> {
    let all_bytes = len_bytes.checked_add(align_bytes).ok_or(rustix::io::Errno::NOMEM)?;
    // SAFETY: a new mapping at an address of the kernel's choice touches no existing one.
    let base = unsafe {
        rustix::mm::mmap_anonymous(
            std::ptr::null_mut(),
            all_bytes,
            ProtFlags::empty(),
            MapFlags::PRIVATE | MapFlags::NORESERVE,
        )?
    };
    // What lies before the aligned address and behind the range stays reserved with it: address space is plenty.
    Ok((base.addr() as u64).next_multiple_of(align_bytes as u64))
}

impl Mapping {
    /// Maps the first `len_bytes` of `memory`.
    pub fn of_memory(memory: OwnedFd, len_bytes: usize) -> rustix::io::Result<Mapping> {
        // SAFETY: a new mapping at an address of the kernel's choice touches no existing one.
        let base = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                len_bytes,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                &memory,
                0,
            )?
        };
        Mapping::over(base, len_bytes, memory, 0, End::Unmap)
    }

    /// Maps `len_bytes` of `memory`, from `offset_bytes` on, at a reserved address.
    ///
    /// # Safety
    /// `address .. address + len_bytes` lies in a range from [`reserve`] where nothing is mapped.
    pub unsafe fn at(
        address: u64,
        memory: OwnedFd,
        offset_bytes: u64,
        len_bytes: usize,
    ) -> rustix::io::Result<Mapping> {
        let place = std::ptr::with_exposed_provenance_mut(address as usize);
        // SAFETY: the caller's promise: nothing but a reservation is replaced.
        let base = unsafe {
            let flags = MapFlags::SHARED | MapFlags::FIXED;
            rustix::mm::mmap(place, len_bytes, ProtFlags::READ | ProtFlags::WRITE, flags, &memory, offset_bytes)?
        };
        Mapping::over(base, len_bytes, memory, offset_bytes, End::Reserve)
    }

    /// Memory of the program.
    ///
    /// # Safety
    /// The bytes are readable and writable until the value is dropped.
    pub unsafe fn borrowed(address: u64, len_bytes: usize) -> Option<Mapping> {
        let base = NonNull::new(std::ptr::with_exposed_provenance_mut::<u8>(address as usize))?;
        let is_closed = AtomicBool::new(false);
        Some(Mapping { base, len_bytes, memory: None, identity: None, end: End::Leave, is_closed })
    }

    /// As [`borrowed`](Mapping::borrowed), for longer than a call.
    ///
    /// # Safety
    /// As there.
    pub unsafe fn registered(address: u64, len_bytes: usize) -> Option<Mapping> {
        // SAFETY: the caller's promise.
        let mut mapping = unsafe { Mapping::borrowed(address, len_bytes) }?;
        // Anonymous memory is known by its address; inode 0 is no file's.
        mapping.identity = Some(file_at(address).unwrap_or(((0, 0), address)));
        Some(mapping)
    }

    fn over(
        base: *mut c_void,
        len_bytes: usize,
        memory: OwnedFd,
        offset_bytes: u64,
        end: End,
    ) -> rustix::io::Result<Mapping> {
        let status = rustix::fs::fstat(&memory)?;
        let identity = Some(((status.st_dev, status.st_ino), offset_bytes));
        let base: NonNull<u8> = NonNull::new(base.cast()).ok_or(rustix::io::Errno::NOMEM)?;
        let _ = base.as_ptr().expose_provenance(); // programs hold it as an integer
        let is_closed = AtomicBool::new(false);
        Ok(Mapping { base, len_bytes, memory: Some(memory), identity, end, is_closed })
    }

    pub fn address(&self) -> u64 {
        self.base.as_ptr().addr() as u64
    }

    pub fn identity(&self) -> Option<(MemoryId, u64)> {
        self.identity
    }

    /// From now on kernels in flight do not reach it either.
    pub fn close(&self) {
        self.is_closed.store(true, Ordering::SeqCst);
    }

    pub fn is_closed(&self) -> bool {
        self.is_closed.load(Ordering::SeqCst)
    }

    /// The descriptor of the memory behind it.
    pub fn memory(&self) -> Option<BorrowedFd<'_>> {
        self.memory.as_ref().map(AsFd::as_fd)
    }

    pub fn descriptor(&self) -> Option<RawFd> {
        self.memory.as_ref().map(AsRawFd::as_raw_fd)
    }

    /// Lets the process that made the memory know of this mapping until [`forgo`](Mapping::forgo). The lock is the open
    /// file's, so it goes with the process at the latest; the maker holds none.
    pub fn announce(&self) -> rustix::io::Result<()> {
        self.lock(FlockOperation::NonBlockingLockShared)
    }

    pub fn forgo(&self) -> rustix::io::Result<()> {
        self.lock(FlockOperation::Unlock)
    }

    /// Whether another process has announced a mapping of this memory, which this one has made.
    pub fn is_announced(&self) -> bool {
        let taken = self.lock(FlockOperation::NonBlockingLockExclusive);
        taken.is_err_and(|error| error == rustix::io::Errno::WOULDBLOCK)
    }

    fn lock(&self, operation: FlockOperation) -> rustix::io::Result<()> {
        self.memory.as_ref().map_or(Ok(()), |memory| rustix::fs::flock(memory, operation))
    }

    /// The pointer to `len_bytes` bytes at `offset_bytes`.
    fn place(&self, offset_bytes: usize, len_bytes: usize) -> *mut u8 {
        let end = offset_bytes.checked_add(len_bytes);
        assert!(end.is_some_and(|end| end <= self.len_bytes), "callers check against the allocation");
        self.base.as_ptr().wrapping_add(offset_bytes)
    }

    pub fn read(&self, offset_bytes: usize, into: &mut [u8]) {
        let from = self.place(offset_bytes, into.len());
        let mut done = 0;
        while done < into.len() {
            let (at, rest) = (from.wrapping_add(done), &mut into[done..]);
            // SAFETY: `place` has checked the range, which stays mapped while `self` lives; `width` divides the address.
            done += unsafe {
                match width(at, rest.len()) {
                    8 => put(rest, AtomicU64::from_ptr(at.cast()).load(Ordering::SeqCst).to_le_bytes()),
                    4 => put(rest, AtomicU32::from_ptr(at.cast()).load(Ordering::SeqCst).to_le_bytes()),
                    2 => put(rest, AtomicU16::from_ptr(at.cast()).load(Ordering::SeqCst).to_le_bytes()),
                    _ => put(rest, [AtomicU8::from_ptr(at).load(Ordering::SeqCst)]),
                }
            };
        }
    }

    pub fn write(&self, offset_bytes: usize, bytes: &[u8]) {
        let to = self.place(offset_bytes, bytes.len());
        let mut done = 0;
        while done < bytes.len() {
            let (at, rest) = (to.wrapping_add(done), &bytes[done..]);
            let width = width(at, rest.len());
            // SAFETY: as in `read`.
            unsafe {
                match width {
                    8 => AtomicU64::from_ptr(at.cast()).store(u64::from_le_bytes(take(rest)), Ordering::SeqCst),
                    4 => AtomicU32::from_ptr(at.cast()).store(u32::from_le_bytes(take(rest)), Ordering::SeqCst),
                    2 => AtomicU16::from_ptr(at.cast()).store(u16::from_le_bytes(take(rest)), Ordering::SeqCst),
                    _ => AtomicU8::from_ptr(at).store(rest[0], Ordering::SeqCst),
                }
            }
            done += width;
        }
    }

    pub fn fill(&self, offset_bytes: usize, len_bytes: usize, byte: u8) {
        let chunk = [byte; 4096];
        for start in (0..len_bytes).step_by(chunk.len()) {
            self.write(offset_bytes + start, &chunk[..chunk.len().min(len_bytes - start)]);
        }
    }

    /// Replaces an aligned value of 2, 4 or 8 bytes and returns the old one; `None` for other values.
    pub fn update(&self, offset_bytes: usize, len_bytes: usize, change: &dyn Fn(u64) -> u64) -> Option<u64> {
        let at = self.place(offset_bytes, len_bytes);
        if !at.addr().is_multiple_of(len_bytes.max(1)) {
            return None;
        }
        macro_rules! swap {
            ($atomic:ty, $word:ty) => {{
                // SAFETY: as in `read`; the address is a multiple of the size.
                let value = unsafe { <$atomic>::from_ptr(at.cast()) };
                let change = |old: $word| Some(change(old.into()) as $word);
                value.fetch_update(Ordering::SeqCst, Ordering::SeqCst, change).ok().map(u64::from)
            }};
        }
        match len_bytes {
            2 => swap!(AtomicU16, u16),
            4 => swap!(AtomicU32, u32),
            8 => swap!(AtomicU64, u64),
            _ => None,
        }
    }
}

/// The largest power of two up to 8 that divides the address and fits.
fn width(at: *mut u8, len_bytes: usize) -> usize {
    let aligned = 1 << at.addr().trailing_zeros().min(3);
    let fits = 1 << len_bytes.ilog2().min(3);
    aligned.min(fits)
}

fn put<const N: usize>(into: &mut [u8], bytes: [u8; N]) -> usize {
    into[..N].copy_from_slice(&bytes);
    N
}

fn take<const N: usize>(from: &[u8]) -> [u8; N] {
    std::array::from_fn(|i| from[i])
}

impl Drop for Mapping {
    fn drop(&mut self) {
        let base: *mut c_void = self.base.as_ptr().cast();
        // A failure would leave address space behind, no more.
        match self.end {
            // SAFETY: the range was mapped by `of_memory`, and nothing refers to it any more.
            End::Unmap => _ = unsafe { rustix::mm::munmap(base, self.len_bytes) },
            // SAFETY: replaces this very mapping, to which nothing refers any more, by a reservation.
            End::Reserve => unsafe {
                let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED;
                _ = rustix::mm::mmap_anonymous(base, self.len_bytes, ProtFlags::empty(), flags);
            },
            End::Leave => {}
        }
    }
}
