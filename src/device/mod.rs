//! Streams, events, buffers and the arena: what the layers above schedule with, the same on every backend.
//!
//! On the host backend a [`Stream`] is a worker thread that runs what it is given in order, and an [`Event`] is a
//! completion count that a stream or the host can wait for. The order in which compute and communication overlap is
//! therefore exercised for real without a GPU. What stands in this module is the host's; [`cuda`] has the same words for
//! NVIDIA devices.

mod arena;
mod buffer;
#[cfg(all(feature = "cuda", not(loom)))]
pub mod cuda;
mod event;
pub(crate) mod mapping;
mod stream;
mod task;
mod turn;
mod uninit;

pub use arena::Arena;
pub use buffer::Buffer;
pub(crate) use buffer::Memory;
pub use event::Event;
pub use stream::Stream;
pub(crate) use task::INLINE_BYTES;
pub use uninit::Uninit;
