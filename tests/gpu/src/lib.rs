//! What a real GPU can say about annulus: whether every kernel has the bits of the host, whether collectives and faults are
//! what they should be, and how fast it all is beside the card's own copy and beside PyTorch.
//!
//! ```text
//! annulus-gpu                 for each part:  annulus-gpu part NAME      a process of its own, with a time limit
//!                                             records, a line of JSON each  --> annulus-gpu.json, annulus-gpu.md
//! ```
//! A part that crashes, hangs or leaves the device's context broken takes no other part with it.
//!
//! All checks and timings of a card are in this one program: `annulus-gpu pack FOLDER` copies it with a script, and there are no
//! other test or bench binaries to take along. (`cargo bench -p annulus-gpu` has the same operations in criterion's statistics,
//! on a machine with Rust.)

pub mod card;
pub mod check;
pub mod pack;
pub mod part;
pub mod pytorch;
pub mod record;
pub mod report;
pub mod sanitizer;
pub mod shared;
pub mod site;
pub mod tensor;
pub mod time;
pub mod verdict;

/// What fails is told in words: everything here ends in a report that people read.
pub type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;
