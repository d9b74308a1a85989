//! Where ranks find rank 0: a listening Unix socket, with a name for as short as can be.
//!
//! Our own launcher binds the socket, opens an O_PATH descriptor of its inode, and takes the name away before any rank
//! exists; ranks connect to `/proc/self/fd/N`. Under a foreign launcher nobody can hand descriptors down, so rank 0
//! binds a name in a folder of mode 0700 and removes it when all have come:
//!
//! ```text
//!   $TMPDIR/annulus-<uid>/            locked (flock) while a name in it is made, swept or removed
//!       <hash of the job's key>       the socket; renamed into place once it listens
//! ```
//!
//! A rank 0 that is killed while it waits leaves a name behind. A socket nobody listens on refuses connections at once,
//! so whoever comes next, or waits for that rank 0, can tell it from a living one and removes it.

use std::ffi::OsStr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, FileType, FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use crate::error::{Error, Result};
use crate::world::frame::{hex, random_nonce};

/// Connections the kernel queues while rank 0 is busy: every rank, and as many strangers.
const BACKLOG: i32 = 128;
/// Longest wait for the folder's lock.
const LOCK_LIMIT: Duration = Duration::from_secs(5);

fn new_socket() -> Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
        .map_err(|errno| Error::io("making a Unix socket", errno))
}

/// A path to `name` in an open folder, short enough for any socket address.
fn through_fd(fd: BorrowedFd<'_>, name: &str) -> Result<SocketAddrUnix> {
    let slash = if name.is_empty() { "" } else { "/" };
    SocketAddrUnix::new(format!("/proc/self/fd/{}{slash}{name}", fd.as_raw_fd()))
        .map_err(|errno| Error::io("socket address", errno))
}

/// A listening socket and its inode, without a name: what a launcher hands to its ranks.
#[derive(Debug)]
pub(crate) struct Nameless {
    /// For rank 0.
    pub(crate) listener: OwnedFd,
    /// O_PATH descriptor of the socket's inode, for the others.
    pub(crate) inode: OwnedFd,
}

impl Nameless {
    /// Binds in a fresh folder of mode 0700 and takes name and folder away again.
    ///
    /// # Errors
    /// [`Error::Io`] naming the folder.
    pub(crate) fn bind() -> Result<Nameless> {
        let (folder, _lock) = Folder::open_locked(&folder_path())?;
        folder.sweep();
        let name = format!("launch-{}", hex(&random_nonce()?));
        let listener = new_socket()?;
        let bound = rustix::net::bind(&listener, &through_fd(folder.fd.as_fd(), &name)?);
        let failed = |what: &str, errno: Errno| Error::io(format!("{what} in {}", folder.path.display()), errno);
        bound.map_err(|errno| failed("binding a socket", errno))?;
        let inode =
            rustix::fs::openat(&folder.fd, &name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty());
        folder.remove(&name);
        folder.remove_if_empty();
        let inode = inode.map_err(|errno| failed("opening the socket", errno))?;
        rustix::net::listen(&listener, BACKLOG).map_err(|errno| failed("listening", errno))?;
        Ok(Nameless { listener, inode })
    }
}

/// Where this rank meets the others.
#[derive(Debug, Clone)]
pub(crate) enum Place {
    /// Descriptors handed down by our own launcher. Rank 0 has the listener.
    Inherited { listener: Option<Arc<OwnedFd>>, inode: Arc<OwnedFd> },
    /// A name that every rank of the job computes alike.
    Named { folder: PathBuf, name: String },
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Place::Inherited { .. } => f.write_str("the launcher's socket"),
            Place::Named { folder, name } => write!(f, "{}", folder.join(name).display()),
        }
    }
}

/// The folder of named sockets: `annulus-<uid>` in TMPDIR or /tmp.
pub(crate) fn folder_path() -> PathBuf {
    std::env::temp_dir().join(format!("annulus-{}", rustix::process::geteuid().as_raw()))
}

/// The name of a job's socket: FNV-1a of its key, twice with different bases. Two jobs of one user on one machine at
/// one time would have to collide; the key itself is compared afterwards.
pub(crate) fn socket_name(key: &str) -> String {
    let fnv =
        |basis: u64| key.bytes().fold(basis, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3));
    format!("{:016x}{:016x}", fnv(0xcbf2_9ce4_8422_2325), fnv(0x9ae1_6a3b_2f90_404f))
}

/// What rank 0 listens on; takes its name away when it is dropped.
#[derive(Debug)]
pub(crate) struct Listening {
    pub(crate) socket: Arc<OwnedFd>,
    name: Option<(Folder, String)>,
}

impl Listening {
    /// Opens `place` for the other ranks.
    ///
    /// # Errors
    /// [`Error::RendezvousRefused`] if another rank 0 waits under the same key; [`Error::Io`] naming the path.
    pub(crate) fn open(place: &Place) -> Result<Listening> {
        let (folder, name) = match place {
            Place::Inherited { listener: Some(listener), .. } => {
                return Ok(Listening { socket: listener.clone(), name: None });
            }
            Place::Inherited { listener: None, .. } => {
                return Err(Error::RendezvousRefused {
                    place: place.to_string(),
                    reason: "this is rank 0, but it was not handed the listening socket".into(),
                });
            }
            Place::Named { folder, name } => (folder, name),
        };
        let io = |what: &str, errno: Errno| Error::io(format!("{what} {place}"), errno);
        let socket = new_socket()?;
        let (folder, lock) = Folder::open_locked(folder)?;
        {
            let _lock = lock;
            folder.sweep();
            if folder.is_alive(name) == Some(true) {
                return Err(Error::RendezvousRefused {
                    place: place.to_string(),
                    reason: "another rank 0 waits there: a second job with the same address, port and run id".into(),
                });
            }
            let unready = format!("{name}.new");
            folder.remove(&unready);
            rustix::net::bind(&socket, &through_fd(folder.fd.as_fd(), &unready)?).map_err(|e| io("binding", e))?;
            let listening = rustix::net::listen(&socket, BACKLOG).map_err(|errno| io("listening on", errno));
            let named = listening.and_then(|()| {
                rustix::fs::renameat(&folder.fd, &unready, &folder.fd, name).map_err(|errno| io("naming", errno))
            });
            if named.is_err() {
                folder.remove(&unready);
            }
            named?;
        }
        Ok(Listening { socket: Arc::new(socket), name: Some((folder, name.clone())) })
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        if let Some((folder, name)) = &self.name {
            let lock = folder.lock();
            // Without the lock too: the name is ours.
            folder.remove(name);
            if lock.is_ok() {
                folder.remove_if_empty();
            }
        }
    }
}

/// Why a connection did not come about.
#[derive(Debug)]
pub(crate) enum NotConnected {
    /// Rank 0 is not there yet, or its queue is full: try again.
    NotYet,
    /// Rank 0 was there and is gone for good.
    Gone,
    /// It will not work.
    Failed(Error),
}

/// Connects to rank 0.
pub(crate) fn connect(place: &Place) -> std::result::Result<OwnedFd, NotConnected> {
    let socket = new_socket().map_err(NotConnected::Failed)?;
    let (address, named) = match place {
        Place::Inherited { inode, .. } => (through_fd(inode.as_fd(), ""), None),
        Place::Named { folder, name } => match Folder::open(folder, false) {
            Ok(folder) => (through_fd(folder.fd.as_fd(), name), Some(folder)),
            Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
                return Err(NotConnected::NotYet);
            }
            Err(error) => return Err(NotConnected::Failed(error)),
        },
    };
    match rustix::net::connect(&socket, &address.map_err(NotConnected::Failed)?) {
        Ok(()) => Ok(socket),
        Err(Errno::AGAIN | Errno::INTR) => Err(NotConnected::NotYet),
        Err(Errno::CONNREFUSED) => match named {
            None => Err(NotConnected::Gone),
            // The rank 0 that had this name was killed. Another may come, so this is no verdict; but if none does, the name
            // is not to stay.
            Some(folder) => {
                if let Ok(_lock) = folder.lock() {
                    folder.sweep();
                    folder.remove_if_empty();
                }
                Err(NotConnected::NotYet)
            }
        },
        Err(Errno::NOENT) => Err(NotConnected::NotYet),
        Err(errno) => Err(NotConnected::Failed(Error::io(format!("connecting to {place}"), errno))),
    }
}

/// Whether the other end of a Unix socket belongs to this process's user.
pub(crate) fn same_user(socket: impl AsFd) -> std::result::Result<(), String> {
    let theirs = peer_user(socket).map_err(|error| format!("the peer's user cannot be learnt: {error}"))?;
    let mine = rustix::process::geteuid().as_raw();
    if theirs == mine { Ok(()) } else { Err(format!("the peer is user {theirs}, this process is user {mine}")) }
}

/// SO_PEERCRED's user. Not by `rustix`, whose type for a process id has no 0, which is what the kernel says of a peer in
/// another PID namespace.
fn peer_user(socket: impl AsFd) -> std::io::Result<u32> {
    let mut theirs = libc::ucred { pid: 0, uid: u32::MAX, gid: u32::MAX };
    let mut len_bytes = size_of_val(&theirs) as libc::socklen_t;
    let descriptor = socket.as_fd().as_raw_fd();
    let to = (&raw mut theirs).cast();
    // SAFETY: the kernel writes at most `len_bytes` bytes at `to`, which are those of `theirs`; any bytes are a `ucred`.
    let code = unsafe { libc::getsockopt(descriptor, libc::SOL_SOCKET, libc::SO_PEERCRED, to, &raw mut len_bytes) };
    if code == 0 { Ok(theirs.uid) } else { Err(std::io::Error::last_os_error()) }
}

/// An open folder that is ours alone.
#[derive(Debug)]
struct Folder {
    fd: OwnedFd,
    path: PathBuf,
}

/// An flock that goes with its descriptor.
struct Lock(#[expect(dead_code, reason = "held for its drop")] OwnedFd);

impl Folder {
    fn open(path: &Path, create: bool) -> Result<Folder> {
        let failed = |what: &str, errno: Errno| Error::io(format!("{what} {}", path.display()), errno);
        if create {
            match rustix::fs::mkdir(path, Mode::RWXU) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(errno) => return Err(failed("making the folder", errno)),
            }
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = rustix::fs::open(path, flags, Mode::empty()).map_err(|errno| failed("opening the folder", errno))?;
        let stat = rustix::fs::fstat(&fd).map_err(|errno| failed("looking at the folder", errno))?;
        let (owner, mode) = (stat.st_uid, stat.st_mode & 0o777);
        let mine = rustix::process::geteuid().as_raw();
        if owner != mine || mode & 0o077 != 0 {
            return Err(Error::RendezvousRefused {
                place: path.display().to_string(),
                reason: format!("the folder is of user {owner} and mode {mode:03o}; expected user {mine}, mode 700"),
            });
        }
        Ok(Folder { fd, path: path.to_owned() })
    }

    /// Opens the folder, makes it if need be, and locks it.
    fn open_locked(path: &Path) -> Result<(Folder, Lock)> {
        loop {
            let folder = match Folder::open(path, true) {
                // The last one out took the folder along between our mkdir and our open.
                Err(Error::Io { source, .. })
                    if source.kind() == std::io::ErrorKind::NotFound && path.parent().is_some_and(Path::exists) =>
                {
                    continue;
                }
                other => other?,
            };
            let lock = folder.lock()?;
            if folder.is_at_its_path() {
                return Ok((folder, lock));
            }
        }
    }

    /// Waits for the folder's lock. It is held for microseconds at a time, and a holder that dies lets go; one that is
    /// stopped just then is not waited for.
    fn lock(&self) -> Result<Lock> {
        let failed = |errno| Error::io(format!("locking {}", self.path.display()), errno);
        // A description of its own: flock belongs to the description, and threads of one process must exclude each other.
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(&self.fd, ".", flags, Mode::empty()).map_err(failed)?;
        let deadline = Instant::now() + LOCK_LIMIT;
        loop {
            match rustix::fs::flock(&fd, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(Lock(fd)),
                Err(Errno::WOULDBLOCK | Errno::INTR) if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(2));
                }
                Err(errno) => return Err(failed(errno)),
            }
        }
    }

    fn remove(&self, name: &str) {
        // Best effort: a name that stays is swept by the next job.
        let _ = rustix::fs::unlinkat(&self.fd, name, AtFlags::empty());
    }

    /// Under the lock: whoever makes a new folder of this name has locked it before it puts anything there.
    fn remove_if_empty(&self) {
        // A folder that was removed and made anew meanwhile is another's, whose lock this is not. ENOTEMPTY: somebody meets here.
        if self.is_at_its_path() {
            let _ = rustix::fs::rmdir(&self.path);
        }
    }

    fn is_at_its_path(&self) -> bool {
        let inode = |stat: rustix::fs::Stat| (stat.st_dev, stat.st_ino);
        let here = rustix::fs::fstat(&self.fd).map(inode);
        here.is_ok() && here == rustix::fs::stat(&self.path).map(inode)
    }

    /// Whether somebody listens on `name`; none if there is no such socket.
    fn is_alive(&self, name: &str) -> Option<bool> {
        let stat = rustix::fs::statat(&self.fd, name, AtFlags::SYMLINK_NOFOLLOW).ok()?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::Socket {
            return None;
        }
        let (socket, address) = (new_socket().ok()?, through_fd(self.fd.as_fd(), name).ok()?);
        Some(rustix::net::connect(&socket, &address) != Err(Errno::CONNREFUSED))
    }

    /// Removes the sockets whose listeners are gone. Called with the lock held, under which every name is made, so a
    /// socket that does not listen was left behind.
    fn sweep(&self) {
        let Ok(entries) = rustix::fs::Dir::read_from(&self.fd) else { return };
        for entry in entries.flatten() {
            let Ok(name) = OsStr::from_bytes(entry.file_name().to_bytes()).to_os_string().into_string() else {
                continue;
            };
            if self.is_alive(&name) == Some(false) {
                self.remove(&name);
            }
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn named(folder: &Path, key: &str) -> Place {
        Place::Named { folder: folder.to_owned(), name: socket_name(key) }
    }

    fn entries(folder: &Path) -> Vec<String> {
        let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    #[test]
    fn p07_a_nameless_socket_can_be_reached_and_leaves_no_name() {
        let before = entries(&folder_path());
        let Nameless { listener, inode } = Nameless::bind().unwrap();
        assert!(entries(&folder_path()).iter().all(|name| before.contains(name) || !name.starts_with("launch-")));
        let listener = Arc::new(listener);
        let place = Place::Inherited { listener: None, inode: Arc::new(inode) };
        let client = connect(&place).unwrap();
        let server = rustix::net::accept(&*listener).unwrap();
        assert_eq!(same_user(&server), Ok(()));
        assert_eq!(same_user(&client), Ok(()));
        drop(listener);
        assert!(matches!(connect(&place), Err(NotConnected::Gone)));
    }

    #[test]
    fn p08_stale_names_are_swept_and_living_ones_respected() {
        let base = tempfile::tempdir().unwrap();
        let folder = base.path().join("annulus-test");
        let living = Listening::open(&named(&folder, "living")).unwrap();
        // A rank 0 that was killed: the name stays, nobody listens.
        let mut stale = Listening::open(&named(&folder, "stale")).unwrap();
        stale.name = None;
        drop(stale);
        assert_eq!(entries(&folder).len(), 2);
        let again = Listening::open(&named(&folder, "stale")).unwrap();
        assert!(connect(&named(&folder, "stale")).is_ok() && connect(&named(&folder, "living")).is_ok());
        let second = Listening::open(&named(&folder, "living")).unwrap_err();
        assert!(matches!(second, Error::RendezvousRefused { .. }), "{second:?}");
        drop(again);
        assert_eq!(entries(&folder), [socket_name("living")]);
        drop(living);
        assert!(!folder.exists(), "the last one takes the folder along");

        // A rank that waits for a rank 0 that was killed takes its name, and the folder, away.
        let mut killed = Listening::open(&named(&folder, "killed")).unwrap();
        killed.name = None;
        drop(killed);
        assert!(matches!(connect(&named(&folder, "killed")), Err(NotConnected::NotYet)));
        assert!(!folder.exists());
    }

    #[test]
    fn p09_a_folder_open_to_others_is_refused() {
        let base = tempfile::tempdir().unwrap();
        let folder = base.path().join("open");
        std::fs::create_dir(&folder).unwrap();
        std::fs::set_permissions(&folder, std::fs::Permissions::from_mode(0o755)).unwrap();
        let refused = Listening::open(&named(&folder, "x")).unwrap_err();
        assert!(refused.to_string().contains("mode 755"), "{refused}");
        std::fs::remove_dir(&folder).unwrap();
        std::os::unix::fs::symlink("/tmp", &folder).unwrap();
        assert!(matches!(Listening::open(&named(&folder, "x")), Err(Error::Io { .. })), "links are not followed");
    }

    #[test]
    fn long_paths_do_not_matter() {
        let base = tempfile::tempdir().unwrap();
        let folder = base.path().join("d".repeat(200));
        let place = named(&folder, "x");
        let _listening = Listening::open(&place).unwrap();
        assert!(connect(&place).is_ok());
    }
}
