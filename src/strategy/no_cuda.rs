//! What stands for a device where the library is built without one: types that have no values.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use super::batch::Device;
use super::bucket::{Gradients, Place};
use super::gate::Gate;
use super::gradient::Receiver;
use super::optimizer::{Bound, OptimizerCore, StepCounts, UpdateRule};
use super::options::{Accelerator, StrategyOptions};
use super::place;
use super::replica::Measurement;
use super::statistics::Counters;
use super::tensor::Tensor;
use crate::device::Buffer;
use crate::dtype::{DType, ReduceOp};
use crate::error::{Error, Result};
use crate::ops::{GradScaler, Slice};
use crate::strategy::gradient::BucketProgress;
use crate::strategy::module::Parameter;
use crate::world::World;

/// Moves tensors to a device.
#[derive(Clone)]
pub enum BatchMover {}

impl BatchMover {
    pub(crate) fn take(&self, _tensor: Tensor) -> Result<Tensor> {
        match *self {}
    }
}

impl fmt::Display for BatchMover {
    fn fmt(&self, _f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {}
    }
}

impl fmt::Debug for BatchMover {
    fn fmt(&self, _f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {}
    }
}

#[derive(Debug, Clone)]
pub(crate) enum DevicePlace {}

impl DevicePlace {
    pub fn alloc(&self, _dtype: DType, _len_elems: usize) -> Result<DeviceMemory> {
        match *self {}
    }
}

#[derive(Debug)]
pub(crate) enum DeviceMemory {}

impl DeviceMemory {
    pub fn dtype(&self) -> DType {
        match *self {}
    }

    pub fn len_elems(&self) -> usize {
        match *self {}
    }

    pub fn copy_to_host(&self) -> Result<Buffer> {
        match *self {}
    }

    pub fn copy_from_host(&self, _buffer: &Buffer) -> Result<()> {
        match *self {}
    }
}

#[derive(Debug, Clone)]
pub(crate) enum DeviceEvent {}

impl DeviceEvent {
    pub fn synchronize(&self, _timeout: Duration) -> Result<()> {
        match *self {}
    }
}

#[derive(Debug, Clone)]
pub(crate) enum DeviceNorm {}

impl DeviceNorm {
    pub fn wait(&self, _timeout: Duration) -> Result<()> {
        match *self {}
    }

    pub fn poll(&self) -> Result<Option<f64>> {
        match *self {}
    }

    pub fn nonfinite(&self) -> Option<Error> {
        match *self {}
    }
}

#[derive(Debug)]
pub(crate) enum DeviceGradients {}

impl DeviceGradients {
    pub fn new(buckets: Vec<DeviceMemory>, _places: &[Place]) -> Result<DeviceGradients> {
        match buckets.first() {
            Some(bucket) => match *bucket {},
            None => Err(unavailable()),
        }
    }
}

pub(crate) enum DeviceOptimizer {}

impl DeviceOptimizer {
    pub fn counts(&self) -> Result<StepCounts> {
        match *self {}
    }

    pub fn set_counts(&self, _counts: StepCounts) -> Result<()> {
        match *self {}
    }

    pub fn moments(&self) -> Result<Vec<Vec<Buffer>>> {
        match *self {}
    }

    pub fn store_moment(&self, _bound: usize, _state: usize, _bytes: &[u8]) -> Result<()> {
        match *self {}
    }
}

pub(crate) trait DeviceReceiver {}

pub(crate) enum DeviceBackward {}

impl DeviceBackward {
    pub fn finish(&mut self) -> Result<()> {
        match *self {}
    }
}

impl Receiver for DeviceBackward {
    fn receive(&mut self, _parameter: &Parameter, _gradient: Slice<'_>, _is_last: bool) -> Result<()> {
        match *self {}
    }

    fn loss_scale(&self) -> Result<f32> {
        match *self {}
    }

    fn is_synchronizing(&self) -> bool {
        match *self {}
    }

    fn buckets(&self) -> BucketProgress {
        match *self {}
    }

    fn on_device(&mut self) -> Option<&mut dyn DeviceReceiver> {
        match *self {}
    }
}

pub(crate) enum DeviceBackend {}

impl DeviceBackend {
    pub fn open(
        _world: &World,
        options: &StrategyOptions,
        _timeout: Duration,
        _counters: &Arc<Counters>,
    ) -> Result<Option<DeviceBackend>> {
        match options.accelerator {
            Accelerator::Auto | Accelerator::Host => Ok(None),
            Accelerator::Cuda(_) => Err(unavailable()),
        }
    }

    pub fn place(&self) -> place::Place {
        match *self {}
    }

    pub fn gate(&self, _timeout: Duration) -> Gate {
        match *self {}
    }

    pub fn root_device(&self) -> Device {
        match *self {}
    }

    pub fn check(&mut self) -> Result<()> {
        match *self {}
    }

    pub fn share(&mut self, _memory: &DeviceMemory) -> Result<()> {
        match *self {}
    }

    pub fn optimizer(
        &self,
        _rule: &dyn UpdateRule,
        _bound: &[Bound],
        _gradients: &DeviceGradients,
    ) -> Result<DeviceOptimizer> {
        match *self {}
    }

    pub fn begin_backward(
        &mut self,
        _number: usize,
        _gradients: &mut Gradients,
        _reduces: bool,
        _synchronize: bool,
        _gate: &Gate,
    ) -> Result<DeviceBackward> {
        match *self {}
    }

    pub fn join(&self) -> Result<()> {
        match *self {}
    }

    pub fn measure(
        &self,
        _on: &DeviceOptimizer,
        _core: &Arc<OptimizerCore>,
        _measurement: Measurement,
    ) -> Result<DeviceNorm> {
        match *self {}
    }

    pub fn clip_value(&self, _optimizer: &DeviceOptimizer, _clip_value: f32, _was_measured: bool) -> Result<()> {
        match *self {}
    }

    pub fn step(&self, _optimizer: &DeviceOptimizer, _learning_rate: f64, _was_measured: bool) -> Result<()> {
        match *self {}
    }

    pub fn read_gradient(&self, _gradients: &DeviceGradients, _parameter: usize, _gradient: &mut [f32]) -> Result<()> {
        match *self {}
    }

    pub fn scaler(&self) -> Result<Option<GradScaler>> {
        match *self {}
    }

    pub fn set_scaler(&self, _scaler: GradScaler) -> Result<()> {
        match *self {}
    }

    pub fn all_reduce(&mut self, _memory: &DeviceMemory, _op: ReduceOp) -> Result<()> {
        match *self {}
    }

    pub fn all_gather(&mut self, _memory: &DeviceMemory, _len_elems: usize) -> Result<DeviceMemory> {
        match *self {}
    }

    pub fn broadcast(&mut self, _memory: &DeviceMemory, _src: u32) -> Result<()> {
        match *self {}
    }

    pub fn synchronize(&mut self) -> Result<()> {
        match *self {}
    }

    pub fn drain(&mut self, _timeout: Duration) -> Result<()> {
        match *self {}
    }
}

fn unavailable() -> Error {
    Error::InvalidArgument {
        argument: "accelerator",
        value: "CUDA".to_owned(),
        accepted: "Accelerator::Host: this library was built without the feature `cuda`",
    }
}
