//! Writing a checkpoint so that, whenever the process dies, the path holds the old file or the new one, whole.
//!
//! ```text
//! nameless file in the same folder (O_TMPFILE) ── reserve all bytes ── header ── data, checksummed as it is written
//!     ── header again, with the checksums ── fsync(file) ── link under a temporary name ── rename over path ── fsync(folder)
//! ```
//!
//! A nameless file vanishes with the process, so a kill leaves nothing behind but in the instant between link and
//! rename. File systems without `O_TMPFILE` get a temporary name from the start. A writer holds its file locked, so the
//! next one in the folder tells a name that was left from one in use, and removes it.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FallocateFlags, FlockOperation, OFlags};
use rustix::io::Errno;

use super::Values;
use super::header::{self, TensorView};
use crate::error::{Error, Result};

/// Bytes checksummed and written at a time: they are still in the cache when the kernel copies them.
const PIECE_BYTES: usize = 256 << 10;

/// Writes `tensors` and the JSON part `values` to `path`, in place of what is there.
///
/// Whenever the process dies, `path` holds the old file or the new one, whole; when the call has returned, the new one
/// is on the disk. Tensors are written from where they are: no copy of them is made.
///
/// # Errors
/// [`Error::NoSpace`] on a full disk, [`Error::Io`] for other failures of the file system, [`Error::Checkpoint`] for names
/// and shapes that the format cannot hold. In every case the old file is intact and the temporary one removed.
pub fn write(path: &Path, tensors: &[TensorView<'_>], values: &Values) -> Result<()> {
    let records = tensors;
    let mut header = header::encode(path, records, &values.0)?;
    let total_bytes =
        records.iter().try_fold(header.bytes.len() as u64, |sum, r| sum.checked_add(r.bytes.len() as u64));
    let total_bytes = total_bytes
        .ok_or_else(|| Error::SizeOverflow { what: "checkpoint size", detail: format!("{} tensors", records.len()) })?;
    let mut target = Target::create(path)?;

    target.reserve(total_bytes)?;
    target.write(&header.bytes)?;
    let mut tensor_crc32 = Vec::with_capacity(records.len());
    for &index in &header.order {
        let mut hasher = crc32fast::Hasher::new();
        for piece in records[index].bytes.chunks(PIECE_BYTES) {
            hasher.update(piece);
            target.write(piece)?;
        }
        tensor_crc32.push(hasher.finalize());
    }
    header.seal(&tensor_crc32);
    target.overwrite_start(&header.bytes)?;
    target.publish()
}

/// Points `latest` in the folder of `path` at `path`, by a relative symbolic link that is replaced in one step.
///
/// Call it when [`write()`] has returned: the file it points at is then on the disk.
///
/// # Errors
/// [`Error::Io`]; the old link is intact.
pub fn point_latest(path: &Path) -> Result<()> {
    let (folder, name) = split(path)?;
    // A link cannot be locked, so it has one name, and what a killed process left there is replaced.
    let (temporary, latest) = (folder.join(".latest.tmp"), folder.join("latest"));
    let _ = fs::remove_file(&temporary);
    std::os::unix::fs::symlink(name, &temporary)
        .map_err(|error| Error::io(format!("symlink {}", temporary.display()), error))?;
    fs::rename(&temporary, &latest).map_err(|error| {
        let _ = fs::remove_file(&temporary);
        Error::io(format!("rename {} to {}", temporary.display(), latest.display()), error)
    })?;
    sync_folder(folder)
}

/// The folder and the name of `path`.
fn split(path: &Path) -> Result<(&Path, &OsStr)> {
    let name = path.file_name().ok_or_else(|| Error::InvalidArgument {
        argument: "path",
        value: path.display().to_string(),
        accepted: "it must end in a file name",
    })?;
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    Ok((folder, name))
}

/// A hidden name that nothing else uses, not even what a killed process of the same number left behind.
fn temporary_name(name: &OsStr) -> PathBuf {
    // Each `RandomState` has its own random keys; the hash of nothing shows them.
    let nonce = RandomState::new().build_hasher().finish();
    let mut temporary = OsString::from(".");
    temporary.push(name);
    temporary.push(format!(".{nonce:016x}.tmp"));
    temporary.into()
}

/// Whether [`temporary_name`] makes such names.
fn is_temporary(name: &OsStr) -> bool {
    let nonce = name.to_str().and_then(|name| name.strip_prefix('.')?.strip_suffix(".tmp")?.rsplit_once('.'));
    nonce.is_some_and(|(_, nonce)| nonce.len() == 16 && nonce.bytes().all(|byte| byte.is_ascii_hexdigit()))
}

/// Locks a temporary file for as long as it is open; false if somebody else holds it.
fn lock(file: &File) -> io::Result<bool> {
    match rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(true),
        Err(Errno::WOULDBLOCK) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

/// A locked file with a temporary name.
fn create_named(folder: &Path, name: &OsStr) -> Result<(File, PathBuf)> {
    loop {
        let temporary = folder.join(temporary_name(name));
        let create = || -> io::Result<Option<File>> {
            let file = fs::OpenOptions::new().write(true).create_new(true).open(&temporary)?;
            // Another writer may have swept it before it was locked, or be about to.
            let is_swept = matches!(lock(&file), Ok(false)) || file.metadata()?.nlink() == 0;
            Ok((!is_swept).then_some(file))
        };
        let created = create().map_err(|error| Error::io(format!("create {}", temporary.display()), error))?;
        if let Some(file) = created {
            return Ok((file, temporary));
        }
    }
}

/// Removes the temporary names that killed writers have left in `folder`. What cannot be removed is left: it is in nobody's
/// way.
fn sweep(folder: &Path) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries.flatten().filter(|entry| is_temporary(&entry.file_name())) {
        let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC).bits() as i32;
        let file = fs::OpenOptions::new().read(true).custom_flags(flags).open(entry.path());
        if file.is_ok_and(|file| lock(&file).is_ok_and(|is_ours| is_ours)) {
            let _ = fs::remove_file(entry.path());
        }
    }
}

fn sync_folder(folder: &Path) -> Result<()> {
    File::open(folder)
        .and_then(|folder| folder.sync_all())
        .map_err(|error| Error::io(format!("fsync of folder {}", folder.display()), error))
}

/// The file being written. Removes what it has made unless it was published.
struct Target<'p> {
    path: &'p Path,
    folder: &'p Path,
    file: File,
    /// The temporary name, once there is one.
    temporary: Option<PathBuf>,
    written_bytes: u64,
}

impl<'p> Target<'p> {
    fn create(path: &'p Path) -> Result<Self> {
        let (folder, name) = split(path)?;
        if fs::symlink_metadata(path).is_ok_and(|metadata| metadata.is_dir()) {
            return Err(Error::Checkpoint {
                path: path.to_owned(),
                item: "path".to_owned(),
                reason: "it is a folder".to_owned(),
            });
        }
        sweep(folder);
        let nameless = fs::OpenOptions::new()
            .write(true)
            .mode(0o666)
            .custom_flags((OFlags::TMPFILE | OFlags::CLOEXEC).bits() as i32)
            .open(folder);
        let (file, temporary) = match nameless {
            Ok(file) => {
                let _ = lock(&file); // without locks on this file system nobody gets one to sweep with either
                (file, None)
            }
            // What file systems and kernels without O_TMPFILE answer (open(2)).
            Err(error)
                if [Errno::OPNOTSUPP, Errno::ISDIR, Errno::NOENT, Errno::INVAL]
                    .iter()
                    .any(|errno| error.raw_os_error() == Some(errno.raw_os_error())) =>
            {
                let (file, temporary) = create_named(folder, name)?;
                (file, Some(temporary))
            }
            Err(error) => return Err(Error::io(format!("create a file in {}", folder.display()), error)),
        };
        Ok(Target { path, folder, file, temporary, written_bytes: 0 })
    }

    /// Asks the disk for all bytes at once, so that a full one is found before anything is written.
    fn reserve(&mut self, total_bytes: u64) -> Result<()> {
        match rustix::fs::fallocate(&self.file, FallocateFlags::empty(), 0, total_bytes) {
            Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => Ok(()),
            Err(error) => Err(self.refused(error.into(), total_bytes)),
        }
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(|error| self.refused(error, bytes.len() as u64))?;
        self.written_bytes += bytes.len() as u64;
        Ok(())
    }

    fn overwrite_start(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all_at(bytes, 0).map_err(|error| self.refused(error, bytes.len() as u64))
    }

    /// The error of a write that wanted `need_bytes` more.
    fn refused(&self, error: io::Error, need_bytes: u64) -> Error {
        let full = [Errno::NOSPC, Errno::DQUOT].iter().any(|e| error.raw_os_error() == Some(e.raw_os_error()));
        if full {
            let have_bytes = rustix::fs::fstatvfs(&self.file).map_or(0, |fs| fs.f_bavail.saturating_mul(fs.f_frsize));
            return Error::NoSpace { what: "a checkpoint", need_bytes, have_bytes };
        }
        Error::io(format!("write of checkpoint {} after {} bytes", self.path.display(), self.written_bytes), error)
    }

    fn publish(mut self) -> Result<()> {
        self.file.sync_all().map_err(|error| self.refused(error, self.written_bytes))?;
        let temporary = match &self.temporary {
            Some(temporary) => temporary.clone(),
            None => {
                let temporary = self.folder.join(temporary_name(split(self.path)?.1));
                // The descriptor's own name is the documented way to name a nameless file (open(2), O_TMPFILE).
                let source = format!("/proc/self/fd/{}", self.file.as_raw_fd());
                rustix::fs::linkat(CWD, &source, CWD, &temporary, AtFlags::SYMLINK_FOLLOW)
                    .map_err(|error| Error::io(format!("link {}", temporary.display()), error))?;
                self.temporary = Some(temporary.clone());
                temporary
            }
        };
        fs::rename(&temporary, self.path)
            .map_err(|error| Error::io(format!("rename {} to {}", temporary.display(), self.path.display()), error))?;
        self.temporary = None;
        sync_folder(self.folder)
    }
}

impl Drop for Target<'_> {
    fn drop(&mut self) {
        if let Some(temporary) = &self.temporary {
            // Nothing can be done about a failure here; the error that led here is already on its way.
            let _ = fs::remove_file(temporary);
        }
    }
}
