//! Reading a checkpoint: nothing of it is used before all of it has been checked.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::de::DeserializeOwned;

use super::header::{Header, TensorInfo};
use crate::device::Buffer;
use crate::device::mapping::FileMapping;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::strategy::tensor::{self, Tensor};

/// A checkpoint file, opened, mapped and found whole: its header is valid and every tensor has the checksum it was
/// written with. Clones share the mapping.
#[derive(Clone)]
pub struct Checkpoint {
    path: Arc<PathBuf>,
    header: Arc<Header>,
    bytes: Arc<dyn AsRef<[u8]> + Send + Sync>,
}

impl fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Checkpoint").field("path", &self.path).finish_non_exhaustive()
    }
}

impl Checkpoint {
    /// Opens and validates the file at `path`.
    ///
    /// The file must not be cut short while the checkpoint is open; replacing it, as [`write`](super::write()) does, is
    /// harmless.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be opened; [`Error::Checkpoint`], naming the header or the tensor, if it is truncated,
    /// damaged or no checkpoint of annulus. Takes memory in proportion to the header, which is at most 16 MiB.
    pub fn open(path: &Path) -> Result<Checkpoint> {
        Checkpoint::validate(path, Arc::new(FileMapping::open(path)?))
    }

    /// Validates `bytes`, the contents of the file at `path`.
    pub(crate) fn validate(path: &Path, bytes: Arc<dyn AsRef<[u8]> + Send + Sync>) -> Result<Self> {
        let file = (*bytes).as_ref();
        let header = Header::parse(path, file)?;
        for tensor in header.tensors(file) {
            let computed = crc32fast::hash(&file[tensor.range()]);
            if computed != tensor.crc32() {
                return Err(Error::Checkpoint {
                    path: path.to_owned(),
                    item: tensor.name.to_owned(),
                    reason: format!(
                        "checksum {:08x} in the file, {computed:08x} computed: the tensor is damaged",
                        tensor.crc32()
                    ),
                });
            }
        }
        Ok(Checkpoint { path: Arc::new(path.to_owned()), header: Arc::new(header), bytes })
    }

    /// Where it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Name, element type and shape of every tensor whose name begins with `prefix`, by name.
    pub fn tensors<'c>(&'c self, prefix: &'c str) -> impl Iterator<Item = (&'c str, DType, Vec<usize>)> {
        self.header.tensors_under(self.file(), prefix).map(|tensor| (tensor.name, tensor.dtype, tensor.shape()))
    }

    /// A private copy of the tensor called `name`; none if there is no such tensor.
    ///
    /// # Errors
    /// [`Error::NoSpace`] if there is no memory for it.
    pub fn tensor(&self, name: &str) -> Result<Option<Tensor>> {
        let Some(info) = self.header.tensor(self.file(), name) else { return Ok(None) };
        let shape = info.shape();
        let mut buffer = Buffer::zeroed(info.dtype, tensor::len_elems(&shape)?)?;
        tensor::bytes_mut(&mut buffer).copy_from_slice(self.bytes_of(&info));
        Tensor::from_buffer(&shape, buffer).map(Some)
    }

    /// Element type, shape and bytes of the tensor called `name`, in the mapping.
    pub(crate) fn view(&self, name: &str) -> Option<(DType, Vec<usize>, &[u8])> {
        self.header.tensor(self.file(), name).map(|info| (info.dtype, info.shape(), self.bytes_of(&info)))
    }

    /// The keys of the JSON part.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.header.values().keys().map(String::as_str)
    }

    /// The value stored under `key`; none if there is no such key.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if it is no `T`.
    pub fn value<T: DeserializeOwned>(&self, key: &str) -> Result<Option<T>> {
        let Some(text) = self.json(key) else { return Ok(None) };
        serde_json::from_str(text).map(Some).map_err(|error| Error::Checkpoint {
            path: self.path().to_owned(),
            item: key.to_owned(),
            reason: error.to_string(),
        })
    }

    /// The text of the value stored under `key`.
    pub fn json(&self, key: &str) -> Option<&str> {
        self.header.values().get(key).map(String::as_str)
    }

    /// Checksum of the header, and with it of the checksums of all tensors: two files with the same are the same.
    pub(crate) fn fingerprint(&self) -> u32 {
        self.header.crc32()
    }

    fn bytes_of(&self, tensor: &TensorInfo<'_>) -> &[u8] {
        &self.file()[tensor.range()]
    }

    fn file(&self) -> &[u8] {
        (*self.bytes).as_ref()
    }
}
