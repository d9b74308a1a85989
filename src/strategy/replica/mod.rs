//! What [`SingleDevice`](super::SingleDevice) and [`Ddp`](super::Ddp) share: a strategy that keeps all of the model on
//! every rank.
//!
//! Two streams carry a step, and nothing on them waits for the host:
//!
//! ```text
//! compute        gradients are written ──┬── … ──┬── wait(last bucket) ── norm ── step ──> weights
//! communication                          └ all_reduce(bucket 0) └ all_reduce(bucket 1) …
//! ```

#[cfg(all(feature = "cuda", not(loom)))]
mod captured;
mod checkpoint;
mod exchange;
mod gradients;
mod step;

pub use gradients::NoSyncGuard;
pub(crate) use step::Measurement;

use std::collections::HashSet;
use std::fmt::Write as _;
use std::sync::atomic::AtomicU32;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::batch::Device;
use super::bucket::{Buckets, Gradients};
use super::clip::NormSlot;
use super::cuda::DeviceBackend;
use super::gate::Gate;
use super::module::{self, GradientSlot, Init, Module, ModuleBuffer, ModuleInit, Parameter, Weights};
use super::optimizer::{Bound, HostOptimizer, Optimizer, OptimizerCore, OptimizerMemory, OptimizerSpec};
use super::options::StrategyOptions;
use super::place::Place;
use super::statistics::{Counters, Statistics};
use super::storage::Storage;
use super::tensor::{self, Tensor};
use crate::collective::Communicator;
use crate::device::{Arena, Buffer, Event, Stream};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::ops::GradScaler;
use crate::telemetry::Track;
use crate::world::{Environment, World};

/// Time beyond an operation's own deadline that the host waits for a stream: the operation's error comes first.
const HOST_GRACE: Duration = Duration::from_secs(1_260);

/// A strategy that replicates the model.
pub(crate) struct Replica {
    options: StrategyOptions,
    world: World,
    /// Where parameters, gradients and moments are.
    place: Place,
    /// Of a strategy on a device, all that works there; the streams and the communicator below are then for values on the
    /// host only.
    device: Option<DeviceBackend>,
    communicator: Communicator,
    /// Whether gradients are reduced over the ranks.
    reduces: bool,
    compute: Stream,
    communication: Stream,
    /// What the compute stream wrote to a bucket before its reduction.
    filled: Event,
    gate: Gate,
    modules: Vec<ReplicatedModule>,
    /// Elements of all parameters set up so far.
    parameter_elems: u64,
    scaler: Arc<Mutex<GradScaler>>,
    /// A norm whose error is still to be reported.
    deferred: Option<Arc<NormSlot>>,
    counters: Arc<Counters>,
    track: Track,
    backwards: u32,
}

/// A module that was set up.
struct ReplicatedModule {
    gradients: Gradients,
    /// Number of its first element among all of the strategy.
    first_index: u64,
    /// Guards of `no_backward_sync` that are alive: while there are any, backward does not reduce.
    no_sync_guards: Arc<AtomicU32>,
}

impl Replica {
    pub fn new(environment: Environment, options: StrategyOptions, reduces: bool) -> Result<Replica> {
        options.check()?;
        let world = World::join(environment, options.world.clone())?;
        let mut collective = options.collective.clone();
        if !collective.timeline.is_enabled() {
            collective.timeline = options.timeline.clone();
        }
        let track = options.timeline.track("compute");
        let timeout = collective.timeout.unwrap_or(world.options().timeout).saturating_add(HOST_GRACE);
        check_agreement(&world, options.world_timeout(), "the strategy's options", &options.fingerprint())?;
        let counters = Arc::default();
        let device = DeviceBackend::open(&world, &options, timeout, &counters)?;
        let (place, gate) = match &device {
            Some(device) => (device.place(), device.gate(timeout)),
            None => (Place::Host(Arena::new(&world)), Gate::new(timeout)),
        };
        let replica = Replica {
            place,
            device,
            communicator: Communicator::new(&world, collective)?,
            reduces,
            compute: Stream::new("compute")?,
            communication: Stream::new("communication")?,
            filled: Event::new(),
            gate,
            modules: Vec::new(),
            parameter_elems: 0,
            scaler: Arc::new(Mutex::new(options.scaler)),
            deferred: None,
            counters,
            track,
            backwards: 0,
            world,
            options,
        };
        Ok(replica)
    }

    pub fn world(&self) -> &World {
        &self.world
    }

    pub fn rank(&self) -> u32 {
        self.world.rank()
    }

    pub fn world_size(&self) -> u32 {
        self.world.world_size()
    }

    pub fn local_rank(&self) -> u32 {
        self.world.local_rank()
    }

    pub fn node_rank(&self) -> u32 {
        self.world.node_rank()
    }

    pub fn options(&self) -> &StrategyOptions {
        &self.options
    }

    pub fn root_device(&self) -> Device {
        self.device.as_ref().map_or(Device::Host, DeviceBackend::root_device)
    }

    /// The error that made the strategy unusable, if there was one: also one that a device has reported since.
    fn check(&mut self) -> Result<()> {
        self.gate.check()?;
        match &mut self.device {
            Some(device) => device.check().map_err(|error| self.gate.fail(error)),
            None => Ok(()),
        }
    }

    pub fn statistics(&self) -> Statistics {
        self.counters.read()
    }

    /// Deadline of control-plane calls.
    fn timeout(&self) -> Duration {
        self.options.world_timeout()
    }

    pub fn module_init_context(&mut self, init: Init) -> ModuleInit {
        ModuleInit::new(self.place.clone(), self.options.precision, self.gate.clone(), init)
    }

    pub fn alloc(&mut self, shape: &[usize], dtype: DType) -> Result<Tensor> {
        Tensor::over(shape, self.place.alloc(dtype, tensor::len_elems(shape)?)?)
    }

    pub fn setup_module(&mut self, module: &dyn Module) -> Result<()> {
        self.gate.check()?;
        let parameters = module::parameters_of(module);
        let buffers = module::buffers_of(module);
        self.check_new_module(&parameters, &buffers)?;
        self.check_agreement("the module's parameters and buffers", &description(&parameters, &buffers))?;
        for parameter in &parameters {
            self.share_parameter(parameter)?;
        }
        for buffer in &buffers {
            self.share(&mut buffer.values_mut())?;
        }
        let number = self.modules.len();
        let gradients = Gradients::new(
            parameters.clone(),
            &self.place,
            self.options.gradient_dtype(),
            self.options.first_bucket_bytes,
            self.options.bucket_bytes,
        )?;
        for (index, parameter) in parameters.iter().enumerate() {
            parameter.set_slot(GradientSlot { module: number, parameter: index })?;
        }
        let first_index = self.parameter_elems;
        let len_elems = parameters.iter().map(|parameter| parameter.len_elems() as u64).sum::<u64>();
        self.parameter_elems = first_index.saturating_add(len_elems);
        self.modules.push(ReplicatedModule { gradients, first_index, no_sync_guards: Arc::default() });
        Ok(())
    }

    /// Everything that makes a module unfit, found before anything is changed.
    fn check_new_module(&self, parameters: &[Parameter], buffers: &[ModuleBuffer]) -> Result<()> {
        if parameters.is_empty() {
            return Err(Error::InvalidArgument {
                argument: "module",
                value: "no parameters".to_owned(),
                accepted: "a module has at least one parameter",
            });
        }
        let mut names = HashSet::new();
        let all = parameters.iter().map(|p| (p.name(), p.gate())).chain(buffers.iter().map(|b| (b.name(), b.gate())));
        for (name, gate) in all {
            if !gate.is_same(&self.gate) {
                return Err(foreign(name));
            }
            if !names.insert(name) {
                return Err(Error::InvalidArgument {
                    argument: "module",
                    value: format!("two parameters or buffers called {name:?}"),
                    accepted: "names are unique in a module",
                });
            }
        }
        for parameter in parameters {
            if parameter.slot().is_some() {
                return Err(Error::AlreadySetUp { what: format!("the module with parameter {:?}", parameter.name()) });
            }
            parameter.check_unread("setup_module")?;
        }
        Ok(())
    }

    /// Makes a parameter that of rank 0.
    fn share_parameter(&mut self, parameter: &Parameter) -> Result<()> {
        let mut weights = parameter.weights_mut();
        let Weights { master, model } = &mut *weights;
        match master {
            Some(master) => {
                self.share(master)?;
                // Rounded here as everywhere, so it is the same on every rank too.
                let master = master.on_host()?;
                model.overwrite(|model| tensor::fill_from_f32(model, master.as_slice()?))
            }
            None => self.share(model),
        }
    }

    /// Rank 0's contents of a tensor.
    fn share(&mut self, storage: &mut Storage) -> Result<()> {
        let shared = match (storage, &mut self.device) {
            (Storage::Device(memory), Some(device)) => device.share(memory),
            (storage, _) => {
                let buffer = storage.host_mut("setup_module")?;
                let own = std::mem::replace(buffer, Buffer::zeroed(buffer.dtype(), 0)?);
                let work = self.communicator.broadcast(own, 0, &self.communication);
                work.and_then(|work| work.wait()).map(|whole| *buffer = whole)
            }
        };
        shared.map_err(|error| self.gate.fail(error))
    }

    pub fn setup_optimizer(&mut self, module: &dyn Module, spec: OptimizerSpec) -> Result<Optimizer> {
        self.gate.check()?;
        let number = self.module_number(module)?;
        let ReplicatedModule { gradients, first_index, .. } = &self.modules[number];
        let mut first_index = *first_index;
        let mut bound = Vec::new();
        for (index, parameter) in gradients.parameters.iter().enumerate() {
            if spec.selects(parameter) {
                if parameter.is_claimed() {
                    return Err(Error::AlreadySetUp {
                        what: format!("an optimizer of parameter {:?}", parameter.name()),
                    });
                }
                bound.push(Bound { parameter: parameter.clone(), index, decays: spec.decays(parameter), first_index });
            }
            first_index = first_index.saturating_add(parameter.len_elems() as u64);
        }
        if bound.is_empty() {
            return Err(Error::InvalidArgument {
                argument: "optimizer",
                value: format!("{} for no parameter", spec.rule.name()),
                accepted: "an optimizer selects at least one parameter",
            });
        }
        spec.rule.check(spec.rule.learning_rate())?;
        let memory = match (&self.device, &gradients.memory) {
            (Some(device), Buckets::Device(gradients)) => {
                OptimizerMemory::Device(Box::new(device.optimizer(&*spec.rule, &bound, gradients)?))
            }
            _ => {
                let gradients = bound.iter().map(|bound| gradients.host_gradients()[bound.index].clone()).collect();
                OptimizerMemory::Host(HostOptimizer::new(&*spec.rule, &bound, gradients)?)
            }
        };
        let core = OptimizerCore { rule: spec.rule, bound, memory };
        let optimizer = Optimizer::new(core, number, self.gate.clone());
        self.check_agreement("the optimizer", &optimizer.description())?;
        optimizer.parameters().try_for_each(Parameter::claim)?;
        Ok(optimizer)
    }

    /// Which of the modules that were set up this is.
    fn module_number(&self, module: &dyn Module) -> Result<usize> {
        let mut slot = None;
        let mut is_foreign = false;
        module.parameters(&mut |parameter| {
            if slot.is_none() {
                slot = parameter.slot();
                is_foreign = !parameter.gate().is_same(&self.gate);
            }
        });
        match slot {
            Some(slot) if !is_foreign => Ok(slot.module),
            _ => Err(Error::InvalidArgument {
                argument: "module",
                value: "a module that was not set up with this strategy".to_owned(),
                accepted: "call setup_module first",
            }),
        }
    }

    fn check_own(&self, optimizer: &Optimizer) -> Result<()> {
        if optimizer.gate.is_same(&self.gate) {
            return Ok(());
        }
        Err(foreign(&format!("an optimizer of {}", optimizer.rule_name())))
    }

    pub fn module_to_device(&mut self, module: &dyn Module) -> Result<()> {
        let mut foreign_name = None;
        module.parameters(&mut |parameter| {
            if foreign_name.is_none() && !parameter.gate().is_same(&self.gate) {
                foreign_name = Some(parameter.name().to_owned());
            }
        });
        foreign_name.map_or(Ok(()), |name| Err(foreign(&name)))
    }

    pub fn check_agreement(&mut self, what: &str, mine: &str) -> Result<()> {
        check_agreement(&self.world, self.timeout(), what, mine)
    }

    pub fn synchronize(&mut self) -> Result<()> {
        self.compute.synchronize(self.gate.timeout())?;
        self.communication.synchronize(self.gate.timeout())?;
        if let Some(device) = &mut self.device {
            device.synchronize().map_err(|error| self.gate.fail(error))?;
        }
        self.check()
    }

    /// Waits for the streams, and for the other ranks.
    pub fn teardown(mut self, timeout: Duration) -> Result<()> {
        let start = std::time::Instant::now();
        let left = || timeout.saturating_sub(start.elapsed());
        let drained = self.compute.synchronize(left()).and_then(|()| self.communication.synchronize(left()));
        let on_device = self.device.as_mut().map_or(Ok(()), |device| device.drain(left()));
        let failure = self.gate.check();
        // The last step's; there is no later call to tell it. What was not measured in time is not waited for.
        let deferred = self.deferred.as_ref().and_then(|slot| slot.take_nonfinite());
        let Replica { world, communicator, place, device, modules, .. } = self;
        // A peer may still read this rank's memory until it has come to the barrier, too.
        let torn_down = world.clone().teardown(left());
        drop((device, communicator, place, modules, world));
        drained.and(on_device).and(failure).and(deferred.map_or(Ok(()), Err)).and(torn_down)
    }
}

/// Fails on every rank unless all of them pass the same text.
fn check_agreement(world: &World, timeout: Duration, what: &str, mine: &str) -> Result<()> {
    let all = world.all_gather_bytes(mine.as_bytes(), timeout)?;
    let Some(peer) = all.iter().position(|theirs| theirs != &all[0]) else { return Ok(()) };
    let (first, other) = (String::from_utf8_lossy(&all[0]), String::from_utf8_lossy(&all[peer]));
    let (first, other) = first_difference(&first, &other);
    Err(Error::Disagreement {
        what: what.to_owned(),
        rank: 0,
        mine: first.to_owned(),
        peer: peer as u32,
        theirs: other.to_owned(),
    })
}

fn foreign(name: &str) -> Error {
    Error::InvalidArgument {
        argument: "module",
        value: format!("{name:?} of another strategy"),
        accepted: "its parameters are made by this strategy's module_init_context",
    }
}

/// What every rank must have alike.
fn description(parameters: &[Parameter], buffers: &[ModuleBuffer]) -> String {
    let mut text = String::new();
    for parameter in parameters {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "parameter {} {} {:?}", parameter.name(), parameter.dtype(), parameter.shape());
    }
    for buffer in buffers {
        let _ = writeln!(text, "buffer {} {} {:?}", buffer.name(), buffer.dtype(), buffer.shape());
    }
    text
}

/// The first lines in which two texts differ.
fn first_difference<'t>(a: &'t str, b: &'t str) -> (&'t str, &'t str) {
    let (mut a, mut b) = (a.lines(), b.lines());
    loop {
        match (a.next(), b.next()) {
            (Some(a), Some(b)) if a == b => {}
            (a, b) => return (a.unwrap_or("nothing"), b.unwrap_or("nothing")),
        }
    }
}
