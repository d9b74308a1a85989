//! Strategies that are another strategy inside.

use std::time::Duration;

use super::contract::Strategy;
use crate::error::Result;

/// The required methods of [`Strategy`] but `teardown_boxed`, by calling those of the same name on another value.
macro_rules! forward_strategy {
    ($self:ident => $target:expr) => {
        fn rank(&$self) -> u32 {
            $target.rank()
        }
        fn world_size(&$self) -> u32 {
            $target.world_size()
        }
        fn local_rank(&$self) -> u32 {
            $target.local_rank()
        }
        fn node_rank(&$self) -> u32 {
            $target.node_rank()
        }
        fn root_device(&$self) -> $crate::strategy::Device {
            $target.root_device()
        }
        fn options(&$self) -> &$crate::strategy::StrategyOptions {
            $target.options()
        }
        fn statistics(&$self) -> $crate::strategy::Statistics {
            $target.statistics()
        }
        fn module_init_context(&mut $self, init: $crate::strategy::Init) -> $crate::strategy::ModuleInit {
            $target.module_init_context(init)
        }
        fn alloc(
            &mut $self,
            shape: &[usize],
            dtype: $crate::dtype::DType,
        ) -> $crate::error::Result<$crate::strategy::Tensor> {
            $target.alloc(shape, dtype)
        }
        fn setup_module(&mut $self, module: &dyn $crate::strategy::Module) -> $crate::error::Result<()> {
            $target.setup_module(module)
        }
        fn setup_optimizer(
            &mut $self,
            module: &dyn $crate::strategy::Module,
            optimizer: $crate::strategy::OptimizerSpec,
        ) -> $crate::error::Result<$crate::strategy::Optimizer> {
            $target.setup_optimizer(module, optimizer)
        }
        fn module_to_device(&mut $self, module: &dyn $crate::strategy::Module) -> $crate::error::Result<()> {
            $target.module_to_device(module)
        }
        fn run_backward(
            &mut $self,
            module: &dyn $crate::strategy::Module,
            body: &mut dyn FnMut(&mut $crate::strategy::GradSink<'_>) -> $crate::error::Result<()>,
        ) -> $crate::error::Result<()> {
            $target.run_backward(module, body)
        }
        fn no_backward_sync(
            &$self,
            module: &dyn $crate::strategy::Module,
            enabled: bool,
        ) -> $crate::error::Result<$crate::strategy::NoSyncGuard> {
            $target.no_backward_sync(module, enabled)
        }
        fn clip_gradients_norm(
            &mut $self,
            module: &dyn $crate::strategy::Module,
            optimizer: &mut $crate::strategy::Optimizer,
            max_norm: f64,
            norm_type: $crate::dtype::NormType,
            nonfinite: $crate::strategy::Nonfinite,
        ) -> $crate::error::Result<$crate::strategy::NormHandle> {
            $target.clip_gradients_norm(module, optimizer, max_norm, norm_type, nonfinite)
        }
        fn clip_gradients_value(
            &mut $self,
            module: &dyn $crate::strategy::Module,
            optimizer: &mut $crate::strategy::Optimizer,
            clip_value: f32,
        ) -> $crate::error::Result<()> {
            $target.clip_gradients_value(module, optimizer, clip_value)
        }
        fn optimizer_step(&mut $self, optimizer: &mut $crate::strategy::Optimizer) -> $crate::error::Result<()> {
            $target.optimizer_step(optimizer)
        }
        fn zero_gradients(&mut $self, optimizer: &mut $crate::strategy::Optimizer) -> $crate::error::Result<()> {
            $target.zero_gradients(optimizer)
        }
        fn read_gradient(
            &mut $self,
            parameter: &$crate::strategy::Parameter,
            gradient: &mut [f32],
        ) -> $crate::error::Result<()> {
            $target.read_gradient(parameter, gradient)
        }
        #[cfg(all(feature = "cuda", not(loom)))]
        fn capture_step(
            &mut $self,
            module: &dyn $crate::strategy::Module,
            optimizer: &mut $crate::strategy::Optimizer,
            gradients: &[$crate::strategy::GradientSource],
            clip: $crate::strategy::StepClip,
        ) -> $crate::error::Result<$crate::strategy::CapturedStep> {
            $target.capture_step(module, optimizer, gradients, clip)
        }
        #[cfg(all(feature = "cuda", not(loom)))]
        fn replay_step(
            &mut $self,
            step: &mut $crate::strategy::CapturedStep,
            optimizer: &mut $crate::strategy::Optimizer,
        ) -> $crate::error::Result<$crate::strategy::NormHandle> {
            $target.replay_step(step, optimizer)
        }
        fn synchronize(&mut $self) -> $crate::error::Result<()> {
            $target.synchronize()
        }
        fn split_group(
            &mut $self,
            color: Option<u32>,
            key: u32,
        ) -> $crate::error::Result<Option<$crate::strategy::Group>> {
            $target.split_group(color, key)
        }
        fn all_reduce_elements(
            &mut $self,
            dtype: $crate::dtype::DType,
            elements: &mut [u8],
            group: Option<&mut $crate::strategy::Group>,
            op: $crate::dtype::ReduceOp,
        ) -> $crate::error::Result<()> {
            $target.all_reduce_elements(dtype, elements, group, op)
        }
        fn all_reduce_tensor(
            &mut $self,
            tensor: &mut $crate::strategy::Tensor,
            group: Option<&mut $crate::strategy::Group>,
            op: $crate::dtype::ReduceOp,
        ) -> $crate::error::Result<()> {
            $target.all_reduce_tensor(tensor, group, op)
        }
        fn all_gather(
            &mut $self,
            tensor: &$crate::strategy::Tensor,
            group: Option<&mut $crate::strategy::Group>,
        ) -> $crate::error::Result<$crate::strategy::Tensor> {
            $target.all_gather(tensor, group)
        }
        fn all_gather_backward(
            &mut $self,
            gradient: &$crate::strategy::Tensor,
            group: Option<&mut $crate::strategy::Group>,
        ) -> $crate::error::Result<$crate::strategy::Tensor> {
            $target.all_gather_backward(gradient, group)
        }
        fn broadcast(
            &mut $self,
            tensor: &mut $crate::strategy::Tensor,
            src: u32,
            group: Option<&mut $crate::strategy::Group>,
        ) -> $crate::error::Result<()> {
            $target.broadcast(tensor, src, group)
        }
        fn broadcast_bytes(&mut $self, bytes: &[u8], src: u32) -> $crate::error::Result<Vec<u8>> {
            $target.broadcast_bytes(bytes, src)
        }
        fn all_gather_bytes(&mut $self, bytes: &[u8]) -> $crate::error::Result<Vec<Vec<u8>>> {
            $target.all_gather_bytes(bytes)
        }
        fn barrier(&mut $self, name: &str) -> $crate::error::Result<()> {
            $target.barrier(name)
        }
        fn reduce_boolean_decision(&mut $self, decision: bool, all: bool) -> $crate::error::Result<bool> {
            $target.reduce_boolean_decision(decision, all)
        }
        fn check_agreement(&mut $self, what: &str, text: &str) -> $crate::error::Result<()> {
            $target.check_agreement(what, text)
        }
        fn get_module_state_dict(
            &mut $self,
            module: &dyn $crate::strategy::Module,
        ) -> $crate::error::Result<$crate::strategy::StateDict> {
            $target.get_module_state_dict(module)
        }
        fn load_module_state_dict(
            &mut $self,
            module: &dyn $crate::strategy::Module,
            state_dict: &$crate::strategy::StateDict,
            strict: bool,
        ) -> $crate::error::Result<Vec<String>> {
            $target.load_module_state_dict(module, state_dict, strict)
        }
        fn get_optimizer_state(
            &mut $self,
            optimizer: &$crate::strategy::Optimizer,
        ) -> $crate::error::Result<$crate::strategy::StateDict> {
            $target.get_optimizer_state(optimizer)
        }
        fn load_optimizer_state(
            &mut $self,
            optimizer: &mut $crate::strategy::Optimizer,
            state_dict: &$crate::strategy::StateDict,
        ) -> $crate::error::Result<()> {
            $target.load_optimizer_state(optimizer, state_dict)
        }
        fn save_checkpoint(
            &mut $self,
            path: &std::path::Path,
            state: &$crate::strategy::State<'_>,
            filter: Option<&$crate::strategy::Filter<'_>>,
        ) -> $crate::error::Result<()> {
            $target.save_checkpoint(path, state, filter)
        }
        fn load_checkpoint(
            &mut $self,
            path: &std::path::Path,
            state: Option<&mut $crate::strategy::StateMut<'_>>,
            strict: bool,
        ) -> $crate::error::Result<$crate::strategy::LoadReport> {
            $target.load_checkpoint(path, state, strict)
        }
    };
}
pub(crate) use forward_strategy;

/// A boxed strategy is one, so that the generic methods can be called on `Box<dyn Strategy>`.
impl<S: Strategy + ?Sized> Strategy for Box<S> {
    forward_strategy!(self => (**self));

    fn teardown_boxed(self: Box<Self>, timeout: Duration) -> Result<()> {
        (*self).teardown_boxed(timeout)
    }
}
