//! The contract: what every strategy does, method by method. Names and order are those of Lightning Fabric's `Strategy`
//! (`fabric/strategies/strategy.py`); what differs is said at each method.

use std::path::Path;
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::batch::{Device, ToDevice};
use super::clip::{Nonfinite, NormHandle};
use super::exchange::{Group, Reduce, Reducer};
use super::gradient::{Backward, GradSink};
use super::loader::{DataLoader, Loader, Source};
use super::module::{Init, Module, ModuleInit, Parameter};
use super::optimizer::{Optimizer, OptimizerSpec, UpdateRule};
use super::options::StrategyOptions;
use super::precision::Precision;
use super::replica::NoSyncGuard;
use super::state::{Filter, LoadReport, State, StateDict, StateMut};
use super::statistics::Statistics;
use super::tensor::Tensor;
use crate::dtype::{DType, NormType, ReduceOp};
use crate::error::{Error, Result};

/// How a model is trained on some number of devices.
///
/// The methods without a body are what a strategy is made of; they can be called through `dyn Strategy`. Those that are
/// generic are defined in terms of them and need a sized strategy, which `Box<dyn Strategy>` is, too.
///
/// # Who calls
/// Every rank calls the same methods in the same order. A rank that does not come is an error on the others within
/// the deadline; one that calls something else is [`Error::Mismatch`] on all of them. After such an error the strategy
/// is unusable: every later call fails.
///
/// # Synchronization
/// Gradients are written on the calling thread, or on a device enqueued to its compute stream. Reductions run on the
/// communication stream; norms and steps on the compute stream. Nothing in a step waits on the host, except where a method
/// says so.
pub trait Strategy: Send {
    // ---- where this is ---------------------------------------------------------------------------------------------

    /// This rank, from 0.
    fn rank(&self) -> u32;

    /// How many ranks there are.
    fn world_size(&self) -> u32;

    /// This rank among those of its machine.
    fn local_rank(&self) -> u32;

    /// This rank's machine, from 0.
    fn node_rank(&self) -> u32;

    /// Where modules and batches live.
    fn root_device(&self) -> Device;

    /// Whether this is rank 0, which writes what is written once.
    fn is_global_zero(&self) -> bool {
        self.rank() == 0
    }

    /// What the strategy was set up with.
    fn options(&self) -> &StrategyOptions;

    /// Which numbers the model is trained in.
    fn precision(&self) -> Precision {
        self.options().precision
    }

    /// What has been done so far, in numbers.
    fn statistics(&self) -> Statistics;

    // ---- data ------------------------------------------------------------------------------------------------------

    /// Divides a data loader among the ranks: each gets the same number of batches, in an order that depends on seed and epoch
    /// alone.
    ///
    /// Fabric leaves the loader alone and lets its caller inject a sampler; that sampler's order and padding are kept.
    ///
    /// # Errors
    /// [`Error::Disagreement`] if the ranks' loaders differ in length, batch size, seed or padding;
    /// [`Error::InvalidArgument`] for a batch size of 0.
    fn process_dataloader<S: Source>(&mut self, loader: DataLoader<S>) -> Result<Loader<S>>
    where
        Self: Sized,
    {
        let loader = Loader::new(loader, self.rank(), self.world_size(), self.options().seed)?;
        self.check_agreement("the data loader", &loader.fingerprint())?;
        Ok(loader)
    }

    /// Moves every tensor in `batch` to the strategy's device, and gives the same type back.
    ///
    /// # Errors
    /// Those of allocating on the device.
    fn batch_to_device<B: ToDevice>(&mut self, batch: B) -> Result<B>
    where
        Self: Sized,
    {
        batch.to_device(&self.root_device())
    }

    // ---- modules and optimizers ------------------------------------------------------------------------------------

    /// Through what it returns, parameters are created in the strategy's memory and precision.
    ///
    /// Fabric's is a context in which PyTorch's own constructors behave differently; here it is a value, and leaving
    /// parameters uninitialised takes an `unsafe` call.
    fn module_init_context(&mut self, init: Init) -> ModuleInit;

    /// A tensor of zeroes that peers reach directly: collectives on it move each byte once less. Fabric's
    /// `tensor_init_context`.
    ///
    /// # Errors
    /// [`Error::NoSpace`], [`Error::SizeOverflow`].
    fn alloc(&mut self, shape: &[usize], dtype: DType) -> Result<Tensor>;

    /// Makes a module ready for training: gives every rank rank 0's parameters and buffers and plans the gradient
    /// buckets. In place: the module stays what it is.
    ///
    /// # Errors
    /// [`Error::AlreadySetUp`]; [`Error::Disagreement`] if the ranks' modules differ in names, shapes or dtypes;
    /// [`Error::InvalidArgument`] for a module without parameters, with two of one name, or of another strategy.
    fn setup_module(&mut self, module: &dyn Module) -> Result<()>;

    /// Binds an optimizer to the parameters of a module that was set up. Several optimizers may share a module if they
    /// select different parameters.
    ///
    /// # Errors
    /// [`Error::AlreadySetUp`] if one of the parameters has an optimizer; [`Error::Disagreement`] if the ranks' rules, learning
    /// rates or selections differ; [`Error::InvalidArgument`] for a module that was not set up, for hyper-parameters out of
    /// range, if no parameter is selected, or on a device for a rule of which there is no kernel.
    fn setup_optimizer(&mut self, module: &dyn Module, optimizer: OptimizerSpec) -> Result<Optimizer>;

    /// Sets up a module and its optimizers: one, a tuple, a vector or none (`()`). They come back in the order given.
    ///
    /// # Errors
    /// As [`setup_module`](Strategy::setup_module) and [`setup_optimizer`](Strategy::setup_optimizer).
    fn setup_module_and_optimizers<M: Module, O: Optimizers>(
        &mut self,
        module: M,
        optimizers: O,
    ) -> Result<(M, O::Bound)>
    where
        Self: Sized,
    {
        self.setup_module(&module)?;
        let optimizers = optimizers.set_up(self, &module)?;
        Ok((module, optimizers))
    }

    /// Moves a module to the strategy's device. Its parameters were created there, so this only checks that they were.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if a parameter belongs to another strategy.
    fn module_to_device(&mut self, module: &dyn Module) -> Result<()>;

    // ---- a step ----------------------------------------------------------------------------------------------------

    /// Differentiates `loss` and averages the gradients over the ranks. Buckets are reduced while backward goes on; on return
    /// the last ones may still be on their way.
    ///
    /// Gradients are added to those of earlier calls until an optimizer step uses them.
    ///
    /// # Errors
    /// That of the loss; [`Error::Nonfinite`] of the step before under
    /// [`ErrorDeferred`](Nonfinite::ErrorDeferred); the error of the step in flight.
    ///
    /// # Synchronization
    /// On the host, waits for the step in flight, which reading the weights for forward has done already. On a device nothing
    /// waits: gradients are written behind that step.
    fn backward<M: Module, L: Backward<M> + ?Sized>(&mut self, loss: &L, module: &mut M) -> Result<()>
    where
        Self: Sized,
    {
        // The handles that say which module it is are shared with the module that backward may change.
        let handles = ModuleHandles::of(module);
        self.run_backward(&handles, &mut |gradients| loss.backward(module, gradients))
    }

    /// As [`backward`](Strategy::backward), with the gradients written by `body`.
    ///
    /// # Errors
    /// As [`backward`](Strategy::backward).
    fn run_backward(
        &mut self,
        module: &dyn Module,
        body: &mut dyn FnMut(&mut GradSink<'_>) -> Result<()>,
    ) -> Result<()>;

    /// While the guard lives, backward of this module accumulates gradients without reducing them: for all micro-batches of a
    /// step but the last. Guards nest: gradients are reduced again when the last one of the module is dropped.
    /// `enabled: false` changes nothing.
    ///
    /// The sum over micro-batches is that of one large batch if each loss is divided by their number.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a module that was not set up.
    fn no_backward_sync(&self, module: &dyn Module, enabled: bool) -> Result<NoSyncGuard>;

    /// Bounds the total norm of the optimizer's gradients: they are multiplied by `max_norm / (norm + 1e-6)`, at most 1. The norm
    /// is that of the averaged, unscaled gradients, the same bits on every rank.
    ///
    /// The factor is kept for the step and folded into it: gradients are not rewritten. A second call before the step
    /// replaces the first; a backward between call and step makes the step an error, because the factor would not be that
    /// of its gradients.
    ///
    /// Fabric waits for the norm and by default fails if it is not finite; here nothing waits, and what happens to such a
    /// step is said by `nonfinite`.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a negative or NaN `max_norm`, an undefined norm, gradients that are missing or
    /// not reduced; [`Error::Nonfinite`] as `nonfinite` says.
    fn clip_gradients_norm(
        &mut self,
        module: &dyn Module,
        optimizer: &mut Optimizer,
        max_norm: f64,
        norm_type: NormType,
        nonfinite: Nonfinite,
    ) -> Result<NormHandle>;

    /// Limits every element of the optimizer's gradients, unscaled, to `[-clip_value, clip_value]`. NaN is kept. An infinity
    /// becomes the limit, but where the loss is scaled it has been noticed before: that step is skipped.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a negative or NaN limit, or gradients that are missing or not reduced.
    fn clip_gradients_value(&mut self, module: &dyn Module, optimizer: &mut Optimizer, clip_value: f32) -> Result<()>;

    /// Updates the optimizer's parameters from their gradients and uses those up. A step that is skipped, because a
    /// gradient was not finite, changes no weight and no moment.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for gradients that are missing, not reduced, or not those that were clipped;
    /// [`Error::Borrowed`] if a parameter is being read.
    ///
    /// # Synchronization
    /// Returns once enqueued; reading a parameter waits for it.
    fn optimizer_step(&mut self, optimizer: &mut Optimizer) -> Result<()>;

    /// Throws the optimizer's gradients away. Steps do that by themselves.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for an optimizer of another strategy.
    fn zero_gradients(&mut self, optimizer: &mut Optimizer) -> Result<()>;

    /// Copies the gradient of `parameter` as it is now, unscaled and not clipped: `[parameter.len_elems()]`.
    ///
    /// # Errors
    /// [`Error::LengthMismatch`]; the error of the reduction.
    ///
    /// # Synchronization
    /// Waits on the host for the reductions in flight.
    fn read_gradient(&mut self, parameter: &Parameter, gradient: &mut [f32]) -> Result<()>;

    /// On a device, captures a whole step as a graph: from gradients in the trainer's memory, the same in every step, to new
    /// weights. [`replay_step`](Strategy::replay_step) then makes it with one call of the driver. A parameter without a source
    /// has a gradient of zero. Every rank captures the same.
    ///
    /// Reduces the gradients once, which what they hold does not matter for; nothing else is done yet.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a strategy on the host, and as [`backward`](Strategy::backward),
    /// [`clip_gradients_norm`](Strategy::clip_gradients_norm) and [`optimizer_step`](Strategy::optimizer_step);
    /// [`Error::Capture`] for what a capture refuses, and where ranks share a device.
    ///
    /// # Synchronization
    /// Waits on the host for everything enqueued.
    #[cfg(all(feature = "cuda", not(loom)))]
    fn capture_step(
        &mut self,
        module: &dyn Module,
        optimizer: &mut Optimizer,
        gradients: &[super::GradientSource],
        clip: super::StepClip,
    ) -> Result<super::CapturedStep>;

    /// Makes a captured step: what `backward`, `clip_gradients_norm` and `optimizer_step` would do with what the gradients hold
    /// when the compute stream comes to it.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for another optimizer's step, or with gradients of a backward that no step has used; as
    /// [`clip_gradients_norm`](Strategy::clip_gradients_norm); what the driver says.
    ///
    /// # Synchronization
    /// Returns once enqueued; waits under [`Nonfinite::ErrorNow`] only.
    #[cfg(all(feature = "cuda", not(loom)))]
    fn replay_step(&mut self, step: &mut super::CapturedStep, optimizer: &mut Optimizer) -> Result<NormHandle>;

    /// Waits on the host until everything enqueued has been done.
    ///
    /// # Errors
    /// The first error of what was enqueued.
    fn synchronize(&mut self) -> Result<()>;

    // ---- collectives -----------------------------------------------------------------------------------------------

    /// Groups of ranks: those that pass the same `color` form one, ordered by `key`, then by rank; `None` joins none.
    /// Every rank calls it.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if too many groups are alive.
    fn split_group(&mut self, color: Option<u32>, key: u32) -> Result<Option<Group>>;

    /// Reduces `value` in place over the group, or all ranks: a tensor, a number, or anything made of them. `op` is
    /// [`ReduceOp::Avg`] unless given.
    ///
    /// Fabric has a barrier before every call, which costs more than a small reduction; here there is none.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for an average of integers; [`Error::Mismatch`] if the ranks' values differ in type or
    /// length; the errors of an all-reduce.
    ///
    /// # Synchronization
    /// Waits on the host for the result, behind the gradient reductions in flight.
    fn all_reduce<T: Reduce + ?Sized>(
        &mut self,
        value: &mut T,
        group: Option<&mut Group>,
        op: Option<ReduceOp>,
    ) -> Result<()>
    where
        Self: Sized,
    {
        value.reduce(&mut Reducer::new(self, group, op.unwrap_or(ReduceOp::Avg)))
    }

    /// As [`all_reduce`](Strategy::all_reduce), of one tensor. One that [`alloc`](Strategy::alloc) made is reduced where it is.
    ///
    /// # Errors
    /// As [`all_reduce`](Strategy::all_reduce). A call that was refused, or that other ranks did not make alike
    /// ([`Error::Mismatch`](crate::Error::Mismatch)), leaves the tensor as it was; after other errors its contents are lost.
    fn all_reduce_tensor(&mut self, tensor: &mut Tensor, group: Option<&mut Group>, op: ReduceOp) -> Result<()>;

    /// As [`all_reduce`](Strategy::all_reduce), of the bytes of elements of type `dtype`, aligned for it.
    ///
    /// # Errors
    /// As [`all_reduce`](Strategy::all_reduce).
    fn all_reduce_elements(
        &mut self,
        dtype: DType,
        elements: &mut [u8],
        group: Option<&mut Group>,
        op: ReduceOp,
    ) -> Result<()>;

    /// The tensors of all ranks of the group, or of all ranks, along a new leading axis: `[ranks, ..shape]`, also for one rank.
    ///
    /// # Errors
    /// [`Error::Disagreement`], naming two of the ranks, if shapes or dtypes differ (with Fabric unequal shapes hang).
    ///
    /// # Synchronization
    /// Waits on the host for the result.
    fn all_gather(&mut self, tensor: &Tensor, group: Option<&mut Group>) -> Result<Tensor>;

    /// The derivative of [`all_gather`](Strategy::all_gather): given the gradient of what it returned, `[ranks, ..shape]`, the
    /// gradient of what this rank passed, `[..shape]`, summed over the ranks. What Fabric's `sync_grads` does.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] unless the leading axis is that of the ranks; the errors of a reduce-scatter.
    fn all_gather_backward(&mut self, gradient: &Tensor, group: Option<&mut Group>) -> Result<Tensor>;

    /// Every rank's `tensor` becomes that of rank `src` of the group, or of all ranks.
    ///
    /// # Errors
    /// [`Error::Disagreement`] on every rank if shapes or dtypes differ; [`Error::InvalidArgument`] for a `src` that does not
    /// exist and for more than 8 dimensions.
    ///
    /// # Synchronization
    /// Waits on the host for the result.
    fn broadcast(&mut self, tensor: &mut Tensor, src: u32, group: Option<&mut Group>) -> Result<()>;

    /// The value of rank `src`, on every rank. It travels as JSON over the control page; what other ranks pass is
    /// ignored. (Fabric pickles objects and tensors alike; tensors have [`broadcast`](Strategy::broadcast).)
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if the value cannot be written or read as JSON, or for a `src` that does not exist.
    fn broadcast_value<T: Serialize + DeserializeOwned>(&mut self, value: T, src: u32) -> Result<T>
    where
        Self: Sized,
    {
        let refuse = |error: serde_json::Error| Error::InvalidArgument {
            argument: "value",
            value: format!("a {}: {error}", std::any::type_name::<T>()),
            accepted: "a value that JSON can hold, of the same type on every rank",
        };
        if self.rank() != src {
            let bytes = self.broadcast_bytes(&[], src)?;
            return serde_json::from_slice(&bytes).map_err(refuse);
        }
        // What cannot be written is sent as nothing, so that the others do not wait for it.
        let bytes = serde_json::to_vec(&value);
        self.broadcast_bytes(bytes.as_deref().unwrap_or(&[]), src)?;
        bytes.map(|_| value).map_err(refuse)
    }

    /// The bytes of rank `src`, on every rank, over the control page.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a `src` that does not exist.
    fn broadcast_bytes(&mut self, bytes: &[u8], src: u32) -> Result<Vec<u8>>;

    /// Every rank's bytes, in rank order, over the control page. Lengths may differ; 16 MiB a rank at most.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for more than that.
    fn all_gather_bytes(&mut self, bytes: &[u8]) -> Result<Vec<Vec<u8>>>;

    /// Waits until every rank has come here. The name appears in the error that lists those that did not.
    ///
    /// # Errors
    /// [`Error::BarrierTimeout`]; [`Error::Mismatch`] if a rank came with another name.
    ///
    /// # Synchronization
    /// Of the calling threads only: streams are not waited for.
    fn barrier(&mut self, name: &str) -> Result<()>;

    /// Whether `decision` is true on all ranks, or (`all: false`) on any. Over the control page: no device is involved.
    ///
    /// # Errors
    /// [`Error::Mismatch`] if the ranks disagree about `all`.
    fn reduce_boolean_decision(&mut self, decision: bool, all: bool) -> Result<bool>;

    /// Fails on every rank unless all of them pass the same text. `what` names it in the error.
    ///
    /// # Errors
    /// [`Error::Disagreement`] quoting the first lines that differ.
    fn check_agreement(&mut self, what: &str, text: &str) -> Result<()>;

    // ---- state -----------------------------------------------------------------------------------------------------

    /// A copy of a module's parameters (the f32 master weights where there are some) and buffers, by name.
    ///
    /// # Errors
    /// [`Error::NoSpace`]; the error of the step in flight, which is waited for.
    fn get_module_state_dict(&mut self, module: &dyn Module) -> Result<StateDict>;

    /// Restores a module. Returns the names it wanted that `state_dict` does not have; with `strict` there are none.
    ///
    /// # Errors
    /// With `strict`, [`Error::Keys`] listing missing and unexpected names. [`Error::ShapeMismatch`] and
    /// [`Error::DTypeMismatch`] always. Nothing is written then.
    fn load_module_state_dict(
        &mut self,
        module: &dyn Module,
        state_dict: &StateDict,
        strict: bool,
    ) -> Result<Vec<String>>;

    /// A copy of an optimizer's state, whole on every rank.
    ///
    /// # Errors
    /// [`Error::NoSpace`]; the error of the step in flight, which is waited for.
    fn get_optimizer_state(&mut self, optimizer: &Optimizer) -> Result<StateDict>;

    /// Restores an optimizer from what [`get_optimizer_state`](Strategy::get_optimizer_state) returned.
    ///
    /// # Errors
    /// As [`load_module_state_dict`](Strategy::load_module_state_dict), strict; [`Error::InvalidArgument`] for the state
    /// of another rule.
    fn load_optimizer_state(&mut self, optimizer: &mut Optimizer, state_dict: &StateDict) -> Result<()>;

    /// Writes a checkpoint. Rank 0 writes; the call returns on every rank when the file is on the disk, or with the error.
    /// Whenever the job dies, `path` holds the old file or the new one, whole.
    ///
    /// `filter` keeps or drops tensors of modules and optimizers by name.
    ///
    /// # Errors
    /// [`Error::NoSpace`] and [`Error::Io`] (the old file is intact then), on other ranks [`Error::RankFailed`];
    /// [`Error::InvalidArgument`] for bad keys and for filters of keys that are not there.
    ///
    /// # Synchronization
    /// Waits on the host for the step in flight.
    fn save_checkpoint(&mut self, path: &Path, state: &State<'_>, filter: Option<&Filter<'_>>) -> Result<()>;

    /// Restores what `state` refers to, in place, on every rank; without a `state` nothing is restored and everything is
    /// [`remaining`](LoadReport::remaining).
    ///
    /// With `strict` every key of `state` must be in the file, and a module's or optimizer's tensors must be exactly those in
    /// the file; without it what is missing is reported. Fabric returns the items that were not requested; here the report
    /// names them and holds the file to read them from.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] for a file that is truncated, damaged or no checkpoint; [`Error::Keys`],
    /// [`Error::ShapeMismatch`], [`Error::DTypeMismatch`]. Whatever is wrong, on whichever rank, is an error on every rank
    /// before anything is written anywhere.
    fn load_checkpoint(&mut self, path: &Path, state: Option<&mut StateMut<'_>>, strict: bool) -> Result<LoadReport>;

    // ---- the end ---------------------------------------------------------------------------------------------------

    /// Waits for the streams and for the other ranks, and lets go of everything. Dropping a strategy does the same
    /// without waiting and without an error.
    ///
    /// # Errors
    /// [`Error::BarrierTimeout`] naming the ranks that did not come; the first error of what was enqueued;
    /// [`Error::Nonfinite`] of the last step under [`ErrorDeferred`](Nonfinite::ErrorDeferred). Everything is let go of all
    /// the same.
    fn teardown(self, timeout: Duration) -> Result<()>
    where
        Self: Sized,
    {
        Box::new(self).teardown_boxed(timeout)
    }

    /// As [`teardown`](Strategy::teardown), of a boxed strategy.
    ///
    /// # Errors
    /// As [`teardown`](Strategy::teardown).
    fn teardown_boxed(self: Box<Self>, timeout: Duration) -> Result<()>;
}

/// Optimizers as they are given to [`Strategy::setup_module_and_optimizers`].
pub trait Optimizers {
    /// The same when they are set up.
    type Bound;

    /// Sets them up, in order.
    ///
    /// # Errors
    /// As [`Strategy::setup_optimizer`].
    fn set_up(self, strategy: &mut dyn Strategy, module: &dyn Module) -> Result<Self::Bound>;
}

impl<R: UpdateRule> Optimizers for R {
    type Bound = Optimizer;

    fn set_up(self, strategy: &mut dyn Strategy, module: &dyn Module) -> Result<Optimizer> {
        strategy.setup_optimizer(module, self.into())
    }
}

impl Optimizers for OptimizerSpec {
    type Bound = Optimizer;

    fn set_up(self, strategy: &mut dyn Strategy, module: &dyn Module) -> Result<Optimizer> {
        strategy.setup_optimizer(module, self)
    }
}

impl<O: Optimizers> Optimizers for Vec<O> {
    type Bound = Vec<O::Bound>;

    fn set_up(self, strategy: &mut dyn Strategy, module: &dyn Module) -> Result<Self::Bound> {
        self.into_iter().map(|optimizer| optimizer.set_up(strategy, module)).collect()
    }
}

impl Optimizers for () {
    type Bound = ();

    fn set_up(self, _strategy: &mut dyn Strategy, _module: &dyn Module) -> Result<()> {
        Ok(())
    }
}

impl<A: Optimizers, B: Optimizers> Optimizers for (A, B) {
    type Bound = (A::Bound, B::Bound);

    fn set_up(self, strategy: &mut dyn Strategy, module: &dyn Module) -> Result<Self::Bound> {
        Ok((self.0.set_up(strategy, module)?, self.1.set_up(strategy, module)?))
    }
}

impl<A: Optimizers, B: Optimizers, C: Optimizers> Optimizers for (A, B, C) {
    type Bound = (A::Bound, B::Bound, C::Bound);

    fn set_up(self, strategy: &mut dyn Strategy, module: &dyn Module) -> Result<Self::Bound> {
        let (a, b) = (self.0.set_up(strategy, module)?, self.1.set_up(strategy, module)?);
        Ok((a, b, self.2.set_up(strategy, module)?))
    }
}

/// The first parameter of a module: enough to tell which module it is.
struct ModuleHandles(Option<Parameter>);

impl ModuleHandles {
    fn of(module: &dyn Module) -> ModuleHandles {
        let mut first = None;
        module.parameters(&mut |parameter| {
            first.get_or_insert_with(|| parameter.clone());
        });
        ModuleHandles(first)
    }
}

impl Module for ModuleHandles {
    fn parameters(&self, visit: &mut dyn FnMut(&Parameter)) {
        self.0.iter().for_each(visit);
    }
}
