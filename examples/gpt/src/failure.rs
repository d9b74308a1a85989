//! How a run fails, and the exit code that says so.

use std::path::{Path, PathBuf};

/// Why a run ended early.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The command line asks for something that cannot be: exit code 2.
    #[error("{0}")]
    Usage(String),
    /// annulus failed.
    #[error(transparent)]
    Annulus(#[from] annulus::Error),
    /// candle failed.
    #[error("candle: {0}")]
    Candle(#[from] candle_core::Error),
    /// A file could not be read or written.
    #[error("{}: {reason}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What happened.
        reason: String,
    },
}

impl Failure {
    /// Says which file an error is about.
    pub fn file<E: std::fmt::Display>(path: &Path) -> impl FnOnce(E) -> Failure {
        move |error| Failure::File { path: path.to_owned(), reason: error.to_string() }
    }

    /// 2 for what the command line should not have asked, else 1.
    pub fn exit_code(&self) -> u8 {
        match self {
            Failure::Usage(_) => 2,
            _ => 1,
        }
    }
}
