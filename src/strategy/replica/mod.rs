//! What [`SingleDevice`](super::SingleDevice) and [`Ddp`](super::Ddp) share: a strategy that keeps all of the model on
//! every rank.
//!
//! Two streams carry a step, and nothing on them waits for the host:
//!
//! ```text
//! compute        gradients are written ──┬── … ──┬── wait(last bucket) ── norm ── step ──> weights
//! communication                          └ all_reduce(bucket 0) └ all_reduce(bucket 1) …
//! ```

mod checkpoint;
mod exchange;
mod gradients;
mod step;

pub use gradients::NoSyncGuard;

use std::collections::HashSet;
use std::fmt::Write as _;
use std::sync::atomic::AtomicU32;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::bucket::Gradients;
use super::clip::NormSlot;
use super::gate::{Gate, lock};
use super::module::{self, GradientSlot, Init, Module, ModuleBuffer, ModuleInit, Parameter};
use super::optimizer::{Bound, Optimizer, OptimizerSpec};
use super::options::StrategyOptions;
use super::statistics::{Counters, Statistics};
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
    arena: Arena,
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
        let mut replica = Replica {
            arena: Arena::new(&world),
            communicator: Communicator::new(&world, collective)?,
            reduces,
            compute: Stream::new("compute")?,
            communication: Stream::new("communication")?,
            filled: Event::new(),
            gate: Gate::new(timeout),
            modules: Vec::new(),
            parameter_elems: 0,
            scaler: Arc::new(Mutex::new(options.scaler)),
            deferred: None,
            counters: Arc::default(),
            track,
            backwards: 0,
            world,
            options,
        };
        replica.check_agreement("the strategy's options", &replica.options.fingerprint())?;
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

    pub fn statistics(&self) -> Statistics {
        self.counters.read()
    }

    /// Deadline of control-plane calls.
    fn timeout(&self) -> Duration {
        self.options.collective.timeout.unwrap_or(self.options.world.timeout)
    }

    pub fn module_init_context(&mut self, init: Init) -> ModuleInit {
        ModuleInit::new(self.arena.clone(), self.options.precision, self.gate.clone(), init)
    }

    pub fn alloc(&mut self, shape: &[usize], dtype: DType) -> Result<Tensor> {
        Tensor::from_buffer(shape, self.arena.alloc(dtype, tensor::len_elems(shape)?)?)
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
            let mut values = buffer.values_mut();
            *values = self.share(std::mem::replace(&mut *values, Buffer::zeroed(buffer.dtype(), 0)?))?;
        }
        let number = self.modules.len();
        let gradients = Gradients::new(
            parameters.clone(),
            &self.arena,
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
        let weights = &mut *weights;
        match &mut weights.master {
            Some(master) => {
                *master = self.share(std::mem::replace(master, Buffer::zeroed(DType::F32, 0)?))?;
                // Rounded here as everywhere, so it is the same on every rank too.
                tensor::fill_from_f32(&mut weights.model, master.as_slice()?)
            }
            None => {
                let dtype = weights.model.dtype();
                weights.model = self.share(std::mem::replace(&mut weights.model, Buffer::zeroed(dtype, 0)?))?;
                Ok(())
            }
        }
    }

    /// Rank 0's contents of a buffer.
    fn share(&mut self, buffer: Buffer) -> Result<Buffer> {
        let work = self.communicator.broadcast(buffer, 0, &self.communication);
        work.and_then(|work| work.wait()).map_err(|error| self.gate.fail(error))
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
                bound.push(Bound {
                    parameter: parameter.clone(),
                    gradient: gradients.gradients[index].clone(),
                    index,
                    decays: spec.decays(parameter),
                    first_index,
                });
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
        let optimizer = Optimizer::new(spec.rule, bound, number, self.gate.clone())?;
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
        let all = self.world.all_gather_bytes(mine.as_bytes(), self.timeout())?;
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

    pub fn synchronize(&mut self) -> Result<()> {
        self.compute.synchronize(self.gate.timeout())?;
        self.communication.synchronize(self.gate.timeout())?;
        self.gate.check()
    }

    /// Waits for the streams, and for the other ranks.
    pub fn teardown(self, timeout: Duration) -> Result<()> {
        let start = std::time::Instant::now();
        let left = || timeout.saturating_sub(start.elapsed());
        let drained = self.compute.synchronize(left()).and_then(|()| self.communication.synchronize(left()));
        let failure = self.gate.check();
        // The last step's; there is no later call to tell it. What was not measured in time is not waited for.
        let deferred = self.deferred.as_ref().and_then(|slot| lock(&slot.nonfinite).take());
        let Replica { world, communicator, arena, modules, .. } = self;
        // A peer may still read this rank's memory until it has come to the barrier, too.
        let torn_down = world.clone().teardown(left());
        drop((communicator, arena, modules, world));
        drained.and(failure).and(deferred.map_or(Ok(()), Err)).and(torn_down)
    }
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
