//! Modules: named parameters and buffers whose memory belongs to the strategy.
//!
//! ```text
//! ModuleInit ── parameter(name, shape, fill) ──> Parameter    a handle; clones are the same parameter
//!                                                 ├─ model weights   what forward reads     (arena, the precision's type)
//!                                                 ├─ master weights  what the step updates  (f32, mixed precision only)
//!                                                 └─ gradient        in a bucket            (from setup_module on)
//! ```

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use super::bucket;
use super::gate::Gate;
use super::place::Place;
use super::precision::Precision;
use super::storage::{OnHost, Storage};
use super::tensor;
use crate::device::{Buffer, Uninit};
use crate::dtype::{DType, Element};
use crate::error::{Error, Result};
use crate::ops::{self, Saturate, SliceMut};

/// How new parameters and buffers get their first values.
#[derive(Debug, Clone, Copy, Default)]
pub enum Init {
    /// From the function given with each of them.
    #[default]
    Default,
    /// Zero: the functions are not called. For a model that is loaded from a checkpoint at once.
    Zeroed,
    /// Whatever the memory holds: the functions are not called and nothing is written. The token is had by an `unsafe`
    /// call, [`Uninit::assume_overwritten`], whose caller promises that every value is written before it is read.
    Uninit(Uninit),
}

/// A model: something with parameters.
///
/// The order in which they are visited is the order in which forward uses them; it must be the same on every rank and in
/// every run. Gradients are bucketed in the opposite order, because that is how backward makes them ready.
///
/// ```
/// use annulus::strategy::{Module, ModuleInit, Parameter};
///
/// struct Linear {
///     weight: Parameter,
///     bias: Parameter,
/// }
///
/// impl Linear {
///     fn new(init: &ModuleInit, inputs: usize, outputs: usize) -> annulus::Result<Self> {
///         Ok(Linear {
///             weight: init.parameter("weight", &[outputs, inputs], |values| values.fill(0.01))?,
///             bias: init.parameter("bias", &[outputs], |values| values.fill(0.0))?,
///         })
///     }
/// }
///
/// impl Module for Linear {
///     fn parameters(&self, visit: &mut dyn FnMut(&Parameter)) {
///         visit(&self.weight);
///         visit(&self.bias);
///     }
/// }
/// ```
pub trait Module {
    /// Calls `visit` once for every trained parameter.
    fn parameters(&self, visit: &mut dyn FnMut(&Parameter));

    /// Calls `visit` once for every buffer: state that is kept and checkpointed but not trained.
    fn buffers(&self, visit: &mut dyn FnMut(&ModuleBuffer)) {
        let _ = visit;
    }
}

impl<M: Module + ?Sized> Module for &M {
    fn parameters(&self, visit: &mut dyn FnMut(&Parameter)) {
        (**self).parameters(visit);
    }
    fn buffers(&self, visit: &mut dyn FnMut(&ModuleBuffer)) {
        (**self).buffers(visit);
    }
}

impl<M: Module + ?Sized> Module for Box<M> {
    fn parameters(&self, visit: &mut dyn FnMut(&Parameter)) {
        (**self).parameters(visit);
    }
    fn buffers(&self, visit: &mut dyn FnMut(&ModuleBuffer)) {
        (**self).buffers(visit);
    }
}

impl<M: Module> Module for Vec<M> {
    fn parameters(&self, visit: &mut dyn FnMut(&Parameter)) {
        self.iter().for_each(|module| module.parameters(visit));
    }
    fn buffers(&self, visit: &mut dyn FnMut(&ModuleBuffer)) {
        self.iter().for_each(|module| module.buffers(visit));
    }
}

/// Creates parameters and buffers in a strategy's memory. Made by `Strategy::module_init_context`.
#[derive(Clone)]
pub struct ModuleInit {
    place: Place,
    precision: Precision,
    gate: Gate,
    init: Init,
    prefix: String,
}

impl ModuleInit {
    pub(crate) fn new(place: Place, precision: Precision, gate: Gate, init: Init) -> ModuleInit {
        ModuleInit { place, precision, gate, init, prefix: String::new() }
    }

    /// The same, but every name gets `prefix` and a dot in front: for the parts of a model.
    pub fn within(&self, prefix: impl fmt::Display) -> ModuleInit {
        ModuleInit { prefix: format!("{}{prefix}.", self.prefix), ..self.clone() }
    }

    /// The precision in which parameters are made.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// A new parameter of the precision's model type. `fill` gets `shape`'s elements, zeroed, row-major, in f32 and writes the
    /// initial values; mixed precisions keep them unrounded as master weights.
    ///
    /// # Errors
    /// [`Error::NoSpace`] if the arena is full, [`Error::SizeOverflow`] if the shape is too large.
    pub fn parameter(&self, name: &str, shape: &[usize], fill: impl FnOnce(&mut [f32])) -> Result<Parameter> {
        let len_elems = tensor::len_elems(shape)?;
        let mut model = self.place.alloc(self.precision.model_dtype(), len_elems)?;
        let mut master = match self.precision.has_master() {
            true => Some(self.place.alloc(DType::F32, len_elems)?),
            false => None,
        };
        self.fill(&mut model, master.as_mut(), fill)?;
        let info =
            Info { name: format!("{}{name}", self.prefix), shape: shape.to_vec(), dtype: model.dtype(), len_elems };
        Ok(Parameter(Arc::new(Core {
            info,
            weights: RwLock::new(Weights { model, master }),
            gate: self.gate.clone(),
            slot: OnceLock::new(),
            has_optimizer: AtomicBool::new(false),
        })))
    }

    /// A new buffer, f32 in `F32True` and the mixed precisions, else of the model's type. `fill` as for
    /// [`parameter`](ModuleInit::parameter).
    ///
    /// # Errors
    /// As [`parameter`](ModuleInit::parameter).
    pub fn buffer(&self, name: &str, shape: &[usize], fill: impl FnOnce(&mut [f32])) -> Result<ModuleBuffer> {
        let len_elems = tensor::len_elems(shape)?;
        let mut values = self.place.alloc(self.precision.buffer_dtype(), len_elems)?;
        self.fill(&mut values, None, fill)?;
        let info =
            Info { name: format!("{}{name}", self.prefix), shape: shape.to_vec(), dtype: values.dtype(), len_elems };
        Ok(ModuleBuffer(Arc::new(BufferCore { info, values: RwLock::new(values), gate: self.gate.clone() })))
    }

    fn fill(&self, model: &mut Storage, master: Option<&mut Storage>, fill: impl FnOnce(&mut [f32])) -> Result<()> {
        let zero = |storage: &mut Storage| {
            storage.overwrite(|buffer| {
                tensor::bytes_mut(buffer).fill(0);
                Ok(())
            })
        };
        let fill_f32 = |buffer: &mut Buffer| {
            let values = buffer.as_mut_slice::<f32>()?;
            values.fill(0.0);
            fill(values);
            Ok(())
        };
        match (self.init, master) {
            // Fresh memory of the arena is zero; memory used before is not.
            (Init::Zeroed, master) => {
                zero(model)?;
                master.map_or(Ok(()), zero)
            }
            (Init::Uninit(_), _) => Ok(()),
            (Init::Default, Some(master)) => {
                master.overwrite(fill_f32)?;
                let values = master.on_host()?;
                model.overwrite(|model| tensor::fill_from_f32(model, values.as_slice()?))
            }
            (Init::Default, None) if model.dtype() == DType::F32 => model.overwrite(fill_f32),
            (Init::Default, None) => {
                let mut values = Buffer::zeroed(DType::F32, model.len_elems())?;
                fill_f32(&mut values)?;
                model.overwrite(|model| tensor::fill_from_f32(model, values.as_slice()?))
            }
        }
    }
}

impl fmt::Debug for ModuleInit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ModuleInit")
            .field("precision", &self.precision)
            .field("init", &self.init)
            .field("prefix", &self.prefix)
            .finish_non_exhaustive()
    }
}

/// What does not change about a parameter or buffer.
#[derive(Debug)]
struct Info {
    name: String,
    shape: Vec<usize>,
    dtype: DType,
    len_elems: usize,
}

/// A trained tensor of a model. A handle: clones are the same parameter.
#[derive(Clone)]
pub struct Parameter(Arc<Core>);

struct Core {
    info: Info,
    weights: RwLock<Weights>,
    gate: Gate,
    /// Where its gradient is; set by `setup_module`.
    slot: OnceLock<GradientSlot>,
    /// Whether an optimizer updates it. Only changed and read by the thread that sets up.
    has_optimizer: AtomicBool,
}

/// The memory of a parameter.
#[derive(Debug)]
pub(crate) struct Weights {
    pub model: Storage,
    pub master: Option<Storage>,
}

impl Weights {
    /// What a checkpoint holds: the master weights where there are some.
    pub fn saved(&self) -> &Storage {
        self.master.as_ref().unwrap_or(&self.model)
    }
}

/// Where a parameter's gradient lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct GradientSlot {
    /// Which module of the strategy.
    pub module: usize,
    /// Which parameter of the module, in the order of visiting.
    pub parameter: usize,
}

impl Parameter {
    /// Its full name, unique in its module.
    pub fn name(&self) -> &str {
        &self.0.info.name
    }

    /// The dimensions, slowest first.
    pub fn shape(&self) -> &[usize] {
        &self.0.info.shape
    }

    /// Type of the model weights.
    pub fn dtype(&self) -> DType {
        self.0.info.dtype
    }

    /// Number of elements.
    pub fn len_elems(&self) -> usize {
        self.0.info.len_elems
    }

    /// The model weights, to read on the host. Those on a device are copied.
    ///
    /// # Synchronization
    /// Waits on the host for the optimizer step in flight, if there is one. Give the guard back before the next
    /// `optimizer_step`, which otherwise fails.
    ///
    /// # Errors
    /// The error of the step in flight; [`Error::NoSpace`] for the copy.
    pub fn read(&self) -> Result<ParameterRead<'_>> {
        self.0.gate.wait()?;
        let weights = self.weights();
        let copy = match weights.model.on_host()? {
            OnHost::Own(_) => None,
            OnHost::Copy(copy) => Some(copy),
        };
        Ok(ParameterRead { weights, copy, parameter: self })
    }

    /// The model weights on the device, where forward reads them in the order of the strategy's compute stream; `None` if
    /// they are on the host. The same memory for the parameter's life.
    #[cfg(all(feature = "cuda", not(loom)))]
    pub fn device_view(&self) -> Option<crate::device::cuda::View> {
        match &self.weights().model {
            Storage::Host(_) => None,
            Storage::Device(memory) => Some(memory.view()),
        }
    }

    /// The weights as they are now. The caller has waited for the step in flight, or is it.
    pub(crate) fn weights(&self) -> RwLockReadGuard<'_, Weights> {
        self.0.weights.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// The weights, to write. Waits for readers.
    pub(crate) fn weights_mut(&self) -> RwLockWriteGuard<'_, Weights> {
        self.0.weights.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Fails if somebody reads the weights, which `operation` is about to write.
    pub(crate) fn check_unread(&self, operation: &'static str) -> Result<()> {
        match self.0.weights.try_write() {
            Ok(_) | Err(std::sync::TryLockError::Poisoned(_)) => Ok(()),
            Err(std::sync::TryLockError::WouldBlock) => {
                Err(Error::Borrowed { name: self.name().to_owned(), operation })
            }
        }
    }

    pub(crate) fn gate(&self) -> &Gate {
        &self.0.gate
    }

    pub(crate) fn slot(&self) -> Option<GradientSlot> {
        self.0.slot.get().copied()
    }

    /// Gives the parameter its place; fails if it has one.
    pub(crate) fn set_slot(&self, slot: GradientSlot) -> Result<()> {
        self.0
            .slot
            .set(slot)
            .map_err(|_| Error::AlreadySetUp { what: format!("the module with parameter {:?}", self.name()) })
    }

    /// Marks the parameter as updated by an optimizer; fails if it is.
    pub(crate) fn claim(&self) -> Result<()> {
        // Relaxed: publishes nothing; see the field.
        if self.0.has_optimizer.swap(true, Ordering::Relaxed) {
            return Err(Error::AlreadySetUp { what: format!("an optimizer of parameter {:?}", self.name()) });
        }
        Ok(())
    }

    pub(crate) fn is_claimed(&self) -> bool {
        self.0.has_optimizer.load(Ordering::Relaxed)
    }
}

impl fmt::Debug for Parameter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Parameter({:?}, {} {:?})", self.name(), self.dtype(), self.shape())
    }
}

/// The model weights of a parameter, borrowed.
pub struct ParameterRead<'p> {
    weights: RwLockReadGuard<'p, Weights>,
    /// Of weights on a device.
    copy: Option<Buffer>,
    parameter: &'p Parameter,
}

impl ParameterRead<'_> {
    fn elements(&self) -> Result<&Buffer> {
        match &self.copy {
            Some(copy) => Ok(copy),
            None => self.weights.model.host("reading a parameter"),
        }
    }

    /// The elements, row-major.
    ///
    /// # Errors
    /// [`Error::DTypeMismatch`] if `T` is not the parameter's type.
    pub fn as_slice<T: Element>(&self) -> Result<&[T]> {
        self.elements()?.as_slice::<T>().map_err(|error| match error {
            Error::DTypeMismatch { expected, actual, .. } => {
                Error::DTypeMismatch { what: format!("parameter {:?}", self.parameter.name()), expected, actual }
            }
            error => error,
        })
    }

    /// Copies the elements, widened to f32, into `values`: `[len_elems]`.
    ///
    /// # Errors
    /// [`Error::LengthMismatch`].
    pub fn copy_to_f32(&self, values: &mut [f32]) -> Result<()> {
        let weights = bucket::slice(self.elements()?, 0, self.parameter.len_elems())?;
        ops::cast(weights, SliceMut::F32(values), Saturate::No)
    }

    /// The elements' bytes, row-major.
    pub fn as_bytes(&self) -> &[u8] {
        // One of the two is there: weights that are not on the host were copied.
        self.elements().map_or(&[], tensor::bytes)
    }
}

/// State of a model that is not trained. A handle: clones are the same buffer.
#[derive(Clone)]
pub struct ModuleBuffer(Arc<BufferCore>);

struct BufferCore {
    info: Info,
    values: RwLock<Storage>,
    gate: Gate,
}

impl ModuleBuffer {
    /// Its full name, unique in its module among parameters and buffers.
    pub fn name(&self) -> &str {
        &self.0.info.name
    }

    /// The dimensions, slowest first.
    pub fn shape(&self) -> &[usize] {
        &self.0.info.shape
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.0.info.dtype
    }

    /// Runs `f` on the elements, row-major, and returns its result.
    ///
    /// # Errors
    /// [`Error::DTypeMismatch`] if `T` is not the buffer's type.
    pub fn read<T: Element, R>(&self, f: impl FnOnce(&[T]) -> R) -> Result<R> {
        Ok(f(self.values().on_host()?.as_slice()?))
    }

    /// Runs `f` on the elements, row-major, to change them. Each rank changes its own: buffers are made identical at setup and
    /// after loading only.
    ///
    /// # Errors
    /// [`Error::DTypeMismatch`] if `T` is not the buffer's type.
    pub fn write<T: Element, R>(&self, f: impl FnOnce(&mut [T]) -> R) -> Result<R> {
        self.values_mut().change(|values| Ok(f(values.as_mut_slice()?)))
    }

    /// The elements on the device; `None` if they are on the host. The same memory for the buffer's life.
    #[cfg(all(feature = "cuda", not(loom)))]
    pub fn device_view(&self) -> Option<crate::device::cuda::View> {
        match &*self.values() {
            Storage::Host(_) => None,
            Storage::Device(memory) => Some(memory.view()),
        }
    }

    pub(crate) fn values(&self) -> RwLockReadGuard<'_, Storage> {
        self.0.values.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn values_mut(&self) -> RwLockWriteGuard<'_, Storage> {
        self.0.values.write().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn gate(&self) -> &Gate {
        &self.0.gate
    }
}

impl fmt::Debug for ModuleBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ModuleBuffer({:?}, {} {:?})", self.name(), self.dtype(), self.shape())
    }
}

/// The parameters of a module, in order.
pub(crate) fn parameters_of(module: &dyn Module) -> Vec<Parameter> {
    let mut parameters = Vec::new();
    module.parameters(&mut |parameter| parameters.push(parameter.clone()));
    parameters
}

/// The buffers of a module, in order.
pub(crate) fn buffers_of(module: &dyn Module) -> Vec<ModuleBuffer> {
    let mut buffers = Vec::new();
    module.buffers(&mut |buffer| buffers.push(buffer.clone()));
    buffers
}
