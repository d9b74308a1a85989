//! The CUDA half of the device: the same words as the host's, over the NVIDIA driver.
//!
//! | | host (`device`) | CUDA (`device::cuda`) |
//! |---|---|---|
//! | [`Stream`] | a worker thread that runs closures in order | `CUstream` of a priority; does not block with the default stream |
//! | [`Event`] | a count of points reached | `CUevent` without timing |
//! | [`Buffer`] | memory the host reads | memory of a device; moved by [`Buffer::write`], [`Buffer::read`] |
//! | [`Arena`] | the rank's memfd | one allocation that peers map: by descriptor, by legacy handle, or as it is |
//!
//! [`Stream::capture`] makes a [`Graph`] of enqueued work, which only CUDA has. Methods with the same name mean the same: `record` marks a point, `wait` makes a stream wait for it without the host,
//! `synchronize` waits on the host with a deadline. It is a closed set of two, so the layers above are written against
//! one or the other as an enum decides; nothing is a trait object.
//!
//! The driver library is opened when [`Driver::open`] is called, and its absence is an error like any other: a program that
//! is built with this module starts on a machine without a GPU. Only this module makes raw driver calls, which its `bindings`
//! declare. Streams, events and memory are made by hand and not by cudarc's safe layer: that one tracks every use of memory
//! by events once a second stream exists, and allocates from pools, which other processes cannot map.

mod arena;
mod bindings;
mod buffer;
mod context;
mod driver;
mod event;
mod fault;
mod free;
mod graph;
mod modules;
mod peers;
mod pool;
mod probe;
mod registered;
mod staging;
mod stream;
mod timer;
mod wait;

pub use arena::{Arena, Exported, PeerArena, Sharing, Token};
pub use buffer::{Buffer, Pinned, View};
pub use context::{Device, Uuid};
pub use driver::{Driver, OLDEST_DRIVER};
pub use event::Event;
pub use graph::Graph;
pub(crate) use graph::{Capture, captures_here};
pub use modules::{Kernels, Shape};
pub use peers::PeerAccess;
pub use pool::Pool;
pub use probe::{Link, ProbeArea, probe_pair};
pub use registered::HostRange;
pub use staging::Staging;
pub use stream::{Priority, Stream};
pub use timer::Timer;
