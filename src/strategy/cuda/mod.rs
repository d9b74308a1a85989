//! A replicated model on NVIDIA devices: what of a strategy is a device's own. The rest of the layer is the host's, too.
//!
//! ```text
//! memory     parameters, gradients, moments; copies to and from the host
//! backend    device, streams, communicator: what every part of a step shares
//! batch      batches on their way to the device
//! stage      gradients into buckets; backward: full ones reduced while it goes on
//! step       norm, clip, optimizer, loss scale
//! captured   a whole step as one graph
//! watch      how long the device took for each
//! ```
//! Nothing in a step waits on the host, unless gradients or losses are made there.

mod backend;
mod backward;
mod batch;
mod captured;
mod memory;
mod stage;
mod step;
mod watch;

pub(crate) use crate::device::cuda::Event as DeviceEvent;
pub(crate) use backend::DeviceBackend;
pub use backward::GradientSource;
pub(crate) use backward::{DeviceGradients, DeviceReceiver};
pub use batch::BatchMover;
pub use captured::{CapturedStep, StepClip};
pub(crate) use memory::{DeviceMemory, DevicePlace};
pub(crate) use step::{DeviceNorm, DeviceOptimizer};
