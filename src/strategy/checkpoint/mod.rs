//! Checkpoints: one safetensors file, written so that it is never torn and read so that nothing of it is trusted.
//!
//! This is the file layer: named tensors and named JSON values. What a training run puts into a file is said in
//! [`State`](super::State); `Strategy::save_checkpoint` and `Strategy::load_checkpoint` stand on both.
//!
//! The files are ordinary safetensors files, which Python reads:
//!
//! ```python
//! from safetensors import safe_open
//! with safe_open("step_100.safetensors", "np") as file:
//!     weight = file.get_tensor("model.h.0.attn.weight")
//!     epoch = json.loads(file.metadata()["value.epoch"])
//! ```

mod header;
mod reader;
mod writer;

use std::collections::BTreeMap;

use serde::Serialize;
use serde::de::DeserializeOwned;

pub use header::{MAX_DIMS, MAX_HEADER_BYTES, MAX_TENSORS, MAX_VALUES, TensorView};
pub use reader::Checkpoint;
pub use writer::{point_latest, write};

use crate::error::{Error, Result};

/// The JSON part of a checkpoint: one document per key.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Values(BTreeMap<String, String>);

impl Values {
    /// No values.
    pub fn new() -> Values {
        Values::default()
    }

    /// Stores `value` under `key`, in place of what was there.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if the value cannot be written as JSON.
    pub fn insert<T: Serialize + ?Sized>(&mut self, key: impl Into<String>, value: &T) -> Result<()> {
        let key = key.into();
        let text = serde_json::to_string(value).map_err(|error| Error::InvalidArgument {
            argument: "value",
            value: format!("{key}: {error}"),
            accepted: "it must be representable as JSON",
        })?;
        self.0.insert(key, text);
        Ok(())
    }

    /// The value under `key`; none if there is no such key.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if it is no `T`.
    pub fn get<T: DeserializeOwned>(&self, key: &str) -> Result<Option<T>> {
        let Some(text) = self.0.get(key) else { return Ok(None) };
        serde_json::from_str(text).map(Some).map_err(|error| Error::InvalidArgument {
            argument: "value",
            value: format!("{key}: {error}"),
            accepted: "the type it was stored with",
        })
    }

    /// Stores a JSON document as it is.
    pub(crate) fn insert_json(&mut self, key: impl Into<String>, text: String) {
        self.0.insert(key.into(), text);
    }

    pub(crate) fn remove(&mut self, key: &str) {
        self.0.remove(key);
    }

    pub(crate) fn json(&self, key: &str) -> Option<&str> {
        self.0.get(key).map(String::as_str)
    }
}
