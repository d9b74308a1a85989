//! The strategy layer: how a training loop becomes a data-parallel one.
//!
//! ```text
//! module      Parameter, Module, ModuleInit          who owns weights
//! loader      DataLoader -> Loader                    who sees which samples
//! gradient    Backward, GradSink                      how gradients arrive
//! bucket      gradients in the arena, full ones reduced while backward goes on
//! clip, optimizer                                     from gradients to weights
//! exchange    Reduce, Group                           values across ranks
//! state, checkpoint                                   what survives the process
//! contract    trait Strategy: all of it, method by method
//! replica     what SingleDevice and Ddp share
//! ```
//!
//! Only this layer decides what overlaps with what. The loop:
//!
//! ```
//! use std::time::Duration;
//!
//! use annulus::strategy::{
//!     AdamW, DataLoader, Ddp, GradSink, Init, Module, ModuleInit, Nonfinite, Parameter, State, Strategy, StrategyOptions,
//! };
//! use annulus::world::Environment;
//! use annulus::{NormType, Result};
//!
//! struct Line {
//!     slope: Parameter,
//! }
//!
//! impl Line {
//!     fn new(init: &ModuleInit) -> Result<Line> {
//!         Ok(Line { slope: init.parameter("slope", &[1], |values| values.fill(0.0))? })
//!     }
//! }
//!
//! impl Module for Line {
//!     fn parameters(&self, visit: &mut dyn FnMut(&Parameter)) {
//!         visit(&self.slope);
//!     }
//! }
//!
//! # fn main() -> Result<()> {
//! let environment = Environment::detect()?;
//! let mut strategy = Ddp::setup_environment(environment, StrategyOptions::default())?;
//! let init = strategy.module_init_context(Init::Default);
//! let model = Line::new(&init)?;
//! let (mut model, mut optimizer) = strategy.setup_module_and_optimizers(model, AdamW::new(3e-2))?;
//! let data: Vec<(f32, f32)> = (0..64).map(|i| (i as f32 / 64.0, 3.0 * i as f32 / 64.0)).collect();
//! let loader = strategy.process_dataloader(DataLoader::new(data, 8).shuffle(true))?;
//! for epoch in 0..20 {
//!     for batch in loader.epoch(epoch) {
//!         let batch = strategy.batch_to_device(batch)?;
//!         // d/da of the mean of (a x - y)^2: by hand here, by an autograd library as a rule.
//!         let loss = |model: &mut Line, gradients: &mut GradSink<'_>| {
//!             let slope = model.slope.read()?.as_slice::<f32>()?[0];
//!             let sum: f32 = batch.iter().map(|(x, y)| 2.0 * (slope * x - y) * x).sum();
//!             gradients.write(&model.slope, &[sum / batch.len() as f32])
//!         };
//!         strategy.backward(&loss, &mut model)?;
//!         let norm =
//!             strategy.clip_gradients_norm(&model, &mut optimizer, 1.0, NormType::L2, Nonfinite::SkipStep)?;
//!         strategy.optimizer_step(&mut optimizer)?;
//!     }
//! }
//! assert!((model.slope.read()?.as_slice::<f32>()?[0] - 3.0).abs() < 0.2);
//! # let folder = std::env::temp_dir().join(format!("annulus-doc-{}", std::process::id()));
//! # std::fs::create_dir_all(&folder).unwrap();
//! # let path = folder.join("line.safetensors");
//! let state = State::new().module("model", &model).optimizer("optimizer", &optimizer).value("loader", &loader.state());
//! strategy.save_checkpoint(&path, &state, None)?;
//! strategy.teardown(Duration::from_secs(30))?;
//! # std::fs::remove_dir_all(&folder).unwrap();
//! # Ok(())
//! # }
//! ```
#![forbid(unsafe_code)]
#![cfg_attr(not(all(feature = "cuda", not(loom))), allow(dead_code, reason = "what only a strategy on a device uses"))]

mod batch;
mod bucket;
pub mod checkpoint;
mod clip;
mod contract;
#[cfg(all(feature = "cuda", not(loom)))]
mod cuda;
#[cfg(not(all(feature = "cuda", not(loom))))]
#[path = "no_cuda.rs"]
mod cuda;
mod ddp;
mod exchange;
mod forward;
mod gate;
mod gradient;
mod loader;
mod module;
mod optimizer;
mod options;
mod place;
mod precision;
mod replica;
mod rng;
mod sampler;
mod single_device;
mod state;
mod statistics;
mod storage;
mod tensor;

pub use batch::{Device, ToDevice};
pub use clip::{Nonfinite, NormHandle};
pub use contract::{Optimizers, Strategy};
pub use cuda::BatchMover;
#[cfg(all(feature = "cuda", not(loom)))]
pub use cuda::{CapturedStep, GradientSource, StepClip};
pub use ddp::Ddp;
pub use exchange::{Group, Reduce, Reducer};
pub use gradient::{Backward, BucketProgress, GradSink, GradientElement};
pub use loader::{DataLoader, Dataset, Epoch, Iterable, IterableDataset, Loader, LoaderState, MapStyle, Source};
pub use module::{Init, Module, ModuleBuffer, ModuleInit, Parameter, ParameterRead};
pub use optimizer::{AdamW, KernelRule, Optimizer, OptimizerSpec, Piece, Sgd, UpdateRule};
pub use options::{Accelerator, StrategyOptions};
pub use precision::Precision;
pub use replica::NoSyncGuard;
pub use rng::Rng;
pub use sampler::{DistributedSampler, Last};
pub use single_device::SingleDevice;
pub use state::{Filter, LoadReport, State, StateDict, StateMut};
pub use statistics::Statistics;
pub use tensor::Tensor;

/// The strategy for `environment`: [`SingleDevice`] for one rank, [`Ddp`] for several.
///
/// # Errors
/// Those of either's `setup_environment`.
pub fn setup(environment: crate::world::Environment, options: StrategyOptions) -> crate::Result<Box<dyn Strategy>> {
    match environment.world_size {
        1 => Ok(Box::new(SingleDevice::setup_environment(environment, options)?)),
        _ => Ok(Box::new(Ddp::setup_environment(environment, options)?)),
    }
}
