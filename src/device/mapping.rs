//! Files as read-only memory: how checkpoints are read without a copy.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use memmap2::{Advice, Mmap};
use rustix::fs::OFlags;

use crate::error::{Error, Result};

/// A regular file, mapped whole and read-only.
///
/// The file must not be changed in place while it is mapped: cut short, it would end the process with SIGBUS. Checkpoints
/// are replaced by a rename, which leaves a mapped file as it was.
pub(crate) struct FileMapping {
    /// None for an empty file, which cannot be mapped.
    map: Option<Mmap>,
}

impl FileMapping {
    /// Maps the file at `path`.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be opened or mapped; [`Error::InvalidArgument`] if it is no regular file.
    pub fn open(path: &Path) -> Result<FileMapping> {
        let open = || -> std::io::Result<(File, std::fs::Metadata)> {
            // NONBLOCK: opening a named pipe must not wait for a writer. It means nothing for regular files.
            let flags = (OFlags::NONBLOCK | OFlags::CLOEXEC).bits() as i32;
            let file = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
            let metadata = file.metadata()?;
            Ok((file, metadata))
        };
        let (file, metadata) = open().map_err(|error| Error::io(format!("open {}", path.display()), error))?;
        if !metadata.is_file() {
            return Err(Error::InvalidArgument {
                argument: "path",
                value: path.display().to_string(),
                accepted: "it must be a regular file",
            });
        }
        if metadata.len() == 0 {
            return Ok(FileMapping { map: None });
        }
        // SAFETY: the mapping is private and read-only. Its readers rely on the rule at the type: files that are mapped here
        // are replaced, never rewritten.
        let map = unsafe { Mmap::map(&file) }.map_err(|error| Error::io(format!("map {}", path.display()), error))?;
        // Advice only: a kernel that refuses it reads the file more slowly.
        let _ = map.advise(Advice::Sequential);
        Ok(FileMapping { map: Some(map) })
    }
}

impl AsRef<[u8]> for FileMapping {
    fn as_ref(&self) -> &[u8] {
        self.map.as_deref().unwrap_or(&[])
    }
}
