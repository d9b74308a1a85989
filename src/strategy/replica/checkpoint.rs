//! State dicts and checkpoints of a replicated model: every rank holds all of it, rank 0 writes.

use std::collections::BTreeSet;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::Replica;
use crate::device::Buffer;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::ops::GradScaler;
use crate::strategy::Precision;
use crate::strategy::checkpoint::{self, Checkpoint, TensorView, Values};
use crate::strategy::module::{Module, ModuleBuffer, Parameter, Weights, buffers_of, parameters_of};
use crate::strategy::optimizer::{Optimizer, StepCounts};
use crate::strategy::state::{self, Filter, Item, ItemMut, LoadReport, OWN_KEY, State, StateDict, StateMut};
use crate::strategy::storage::Storage;
use crate::strategy::tensor::{self, Tensor};

/// What the strategy itself adds to a checkpoint.
#[derive(Serialize, Deserialize)]
struct OwnRecord {
    precision: Precision,
    seed: u64,
    world_size: u32,
    scaler: GradScaler,
}

/// What an optimizer adds beside its tensors.
#[derive(Serialize, Deserialize)]
struct OptimizerRecord {
    rule: String,
    learning_rate: f64,
    steps: u64,
    skipped_steps: u64,
}

/// A tensor of a module.
enum Part {
    Parameter(Parameter),
    Buffer(ModuleBuffer),
}

impl Part {
    fn name(&self) -> &str {
        match self {
            Part::Parameter(parameter) => parameter.name(),
            Part::Buffer(buffer) => buffer.name(),
        }
    }

    fn shape(&self) -> &[usize] {
        match self {
            Part::Parameter(parameter) => parameter.shape(),
            Part::Buffer(buffer) => buffer.shape(),
        }
    }

    /// Type in which it is saved: that of the master weights where there are some.
    fn dtype(&self) -> DType {
        match self {
            Part::Parameter(parameter) if parameter.weights().master.is_some() => DType::F32,
            Part::Parameter(parameter) => parameter.dtype(),
            Part::Buffer(buffer) => buffer.dtype(),
        }
    }

    /// A copy of what is saved of it.
    fn copy(&self) -> Result<Tensor> {
        let copy = |storage: &Storage| copied(self.shape(), self.dtype(), tensor::bytes(&*storage.on_host()?));
        match self {
            Part::Parameter(parameter) => copy(parameter.weights().saved()),
            Part::Buffer(buffer) => copy(&buffer.values()),
        }
    }

    /// Replaces its contents. The length was checked.
    fn store(&self, bytes: &[u8]) -> Result<()> {
        let put = |buffer: &mut Buffer| {
            tensor::bytes_mut(buffer).copy_from_slice(bytes);
            Ok(())
        };
        match self {
            Part::Parameter(parameter) => {
                let mut weights = parameter.weights_mut();
                let Weights { master, model } = &mut *weights;
                match master {
                    Some(master) => {
                        master.overwrite(put)?;
                        let master = master.on_host()?;
                        model.overwrite(|model| tensor::fill_from_f32(model, master.as_slice()?))
                    }
                    None => model.overwrite(put),
                }
            }
            Part::Buffer(buffer) => buffer.values_mut().overwrite(put),
        }
    }
}

fn parts_of(module: &dyn Module) -> Vec<Part> {
    let parameters = parameters_of(module).into_iter().map(Part::Parameter);
    parameters.chain(buffers_of(module).into_iter().map(Part::Buffer)).collect()
}

/// Names and shapes of an optimizer's tensors.
fn moments_of(optimizer: &Optimizer) -> Vec<(String, Vec<usize>)> {
    let names = optimizer.state_names();
    let of = |parameter: &Parameter| {
        let (name, shape) = (parameter.name().to_owned(), parameter.shape().to_vec());
        names.iter().map(move |state| (format!("{state}.{name}"), shape.clone()))
    };
    optimizer.parameters().flat_map(of).collect()
}

/// Where tensors are loaded from.
trait Source {
    /// Type, shape and bytes of a tensor.
    fn tensor(&self, name: &str) -> Option<(DType, Vec<usize>, &[u8])>;
    /// The names of all tensors.
    fn names(&self) -> BTreeSet<String>;
    /// The value beside the tensors.
    fn record(&self) -> Option<&str>;
    /// What it is called in errors.
    fn describe(&self) -> String;
}

/// A key of a checkpoint.
struct Keyed<'c> {
    checkpoint: &'c Checkpoint,
    key: &'c str,
}

impl Source for Keyed<'_> {
    fn tensor(&self, name: &str) -> Option<(DType, Vec<usize>, &[u8])> {
        self.checkpoint.view(&format!("{}.{name}", self.key))
    }

    fn names(&self) -> BTreeSet<String> {
        let prefix = format!("{}.", self.key);
        self.checkpoint.tensors(&prefix).map(|(name, ..)| name[prefix.len()..].to_owned()).collect()
    }

    fn record(&self) -> Option<&str> {
        self.checkpoint.json(self.key)
    }

    fn describe(&self) -> String {
        format!("{:?} of checkpoint {}", self.key, self.checkpoint.path().display())
    }
}

/// A state dict, and the key of its values.
struct Copied<'d>(&'d StateDict);

const RECORD_KEY: &str = "optimizer";

impl Source for Copied<'_> {
    fn tensor(&self, name: &str) -> Option<(DType, Vec<usize>, &[u8])> {
        // Those that get_module_state_dict made are on the host.
        let tensor = self.0.tensors.get(name)?;
        Some((tensor.dtype(), tensor.shape().to_vec(), tensor::bytes(tensor.buffer()?)))
    }

    fn names(&self) -> BTreeSet<String> {
        self.0.tensors.keys().cloned().collect()
    }

    fn record(&self) -> Option<&str> {
        self.0.values.json(RECORD_KEY)
    }

    fn describe(&self) -> String {
        "state dict".to_owned()
    }
}

/// Fails unless the source's tensors fit; returns the names that it lacks.
fn validate<'w>(
    source: &dyn Source,
    wanted: impl Iterator<Item = (&'w str, &'w [usize], DType)>,
    strict: bool,
) -> Result<Vec<String>> {
    let mut unexpected = source.names();
    let mut missing = Vec::new();
    for (name, shape, dtype) in wanted {
        unexpected.remove(name);
        let Some((found_dtype, found_shape, _)) = source.tensor(name) else {
            missing.push(name.to_owned());
            continue;
        };
        let what = || format!("tensor {name:?} in {}", source.describe());
        if found_shape != shape {
            return Err(Error::ShapeMismatch { what: what(), expected: shape.to_vec(), actual: found_shape });
        }
        if found_dtype != dtype {
            return Err(Error::DTypeMismatch { what: what(), expected: dtype, actual: found_dtype });
        }
    }
    if strict && !(missing.is_empty() && unexpected.is_empty()) {
        return Err(Error::Keys { what: source.describe(), missing, unexpected: unexpected.into_iter().collect() });
    }
    Ok(missing)
}

fn validate_module(source: &dyn Source, parts: &[Part], strict: bool) -> Result<Vec<String>> {
    for part in parts {
        if let Part::Parameter(parameter) = part {
            parameter.check_unread("loading")?;
        }
    }
    validate(source, parts.iter().map(|part| (part.name(), part.shape(), part.dtype())), strict)
}

fn store_module(source: &dyn Source, parts: &[Part]) -> Result<()> {
    parts.iter().try_for_each(|part| source.tensor(part.name()).map_or(Ok(()), |(.., bytes)| part.store(bytes)))
}

fn validate_optimizer(
    source: &dyn Source,
    optimizer: &Optimizer,
    strict: bool,
) -> Result<(Vec<String>, Option<OptimizerRecord>)> {
    let moments = moments_of(optimizer);
    let missing = validate(source, moments.iter().map(|(name, shape)| (&**name, &**shape, DType::F32)), strict)?;
    let record = match source.record() {
        None if strict => {
            let what = format!("{}: learning rate and steps", source.describe());
            return Err(Error::Keys { what, missing: vec![RECORD_KEY.to_owned()], unexpected: Vec::new() });
        }
        None => None,
        Some(text) => Some(serde_json::from_str::<OptimizerRecord>(text).map_err(|error| Error::InvalidArgument {
            argument: "optimizer state",
            value: format!("{}: {error}", source.describe()),
            accepted: "what get_optimizer_state or save_checkpoint made",
        })?),
    };
    if let Some(record) = &record {
        if record.rule != optimizer.rule_name() {
            return Err(Error::InvalidArgument {
                argument: "optimizer state",
                value: format!("of {} for {}, in {}", record.rule, optimizer.rule_name(), source.describe()),
                accepted: "the state of an optimizer with the same rule",
            });
        }
        optimizer.core.rule.check(record.learning_rate)?;
    }
    Ok((missing, record))
}

fn store_optimizer(source: &dyn Source, optimizer: &mut Optimizer, record: Option<OptimizerRecord>) -> Result<()> {
    for (at, bound) in optimizer.core.bound.iter().enumerate() {
        for (index, name) in optimizer.state_names().iter().enumerate() {
            if let Some((.., bytes)) = source.tensor(&format!("{name}.{}", bound.parameter.name())) {
                optimizer.core.store_moment(at, index, bytes)?;
            }
        }
    }
    if let Some(OptimizerRecord { steps, skipped_steps, learning_rate, .. }) = record {
        optimizer.core.set_counts(StepCounts { steps, skipped_steps })?;
        optimizer.restore_learning_rate(learning_rate);
    }
    Ok(())
}

fn record_of(optimizer: &Optimizer) -> Result<OptimizerRecord> {
    let StepCounts { steps, skipped_steps } = optimizer.core.counts()?;
    let (rule, learning_rate) = (optimizer.rule_name().to_owned(), optimizer.learning_rate());
    Ok(OptimizerRecord { rule, learning_rate, steps, skipped_steps })
}

/// A copy of bytes as a tensor.
fn copied(shape: &[usize], dtype: DType, bytes: &[u8]) -> Result<Tensor> {
    let mut tensor = Tensor::zeroed(shape, dtype)?;
    tensor.storage_mut().overwrite(|buffer| {
        tensor::bytes_mut(buffer).copy_from_slice(bytes);
        Ok(())
    })?;
    Ok(tensor)
}

impl Replica {
    pub fn get_module_state_dict(&mut self, module: &dyn Module) -> Result<StateDict> {
        self.gate.wait()?;
        let tensors =
            parts_of(module).iter().map(|part| Ok((part.name().to_owned(), part.copy()?))).collect::<Result<_>>()?;
        Ok(StateDict { tensors, values: Values::new() })
    }

    pub fn load_module_state_dict(
        &mut self,
        module: &dyn Module,
        dict: &StateDict,
        strict: bool,
    ) -> Result<Vec<String>> {
        self.gate.wait()?;
        let parts = parts_of(module);
        let missing = validate_module(&Copied(dict), &parts, strict)?;
        store_module(&Copied(dict), &parts)?;
        Ok(missing)
    }

    pub fn get_optimizer_state(&mut self, optimizer: &Optimizer) -> Result<StateDict> {
        self.check_own(optimizer)?;
        self.gate.wait()?;
        let mut dict = StateDict::default();
        dict.values.insert(RECORD_KEY, &record_of(optimizer)?)?;
        let (moments, names) = (optimizer.core.moments()?, optimizer.state_names());
        for (at, bound) in optimizer.core.bound.iter().enumerate() {
            for (index, name) in names.iter().enumerate() {
                let bytes = moments.bytes(at, index, names.len());
                let tensor = copied(bound.parameter.shape(), DType::F32, bytes)?;
                dict.tensors.insert(format!("{name}.{}", bound.parameter.name()), tensor);
            }
        }
        Ok(dict)
    }

    pub fn load_optimizer_state(&mut self, optimizer: &mut Optimizer, dict: &StateDict) -> Result<()> {
        self.check_own(optimizer)?;
        self.gate.wait()?;
        let (_, record) = validate_optimizer(&Copied(dict), optimizer, true)?;
        store_optimizer(&Copied(dict), optimizer, record)
    }

    pub fn save_checkpoint(&mut self, path: &Path, state: &State<'_>, filter: Option<&Filter<'_>>) -> Result<()> {
        self.report_deferred()?;
        self.gate.wait()?;
        // What is wrong with one rank's state is an error on all of them, before any of them waits for it; and every rank
        // must have the values that are collected from all.
        let prepared = prepare(state, filter);
        let collected = state.items.iter().filter(|(_, item)| matches!(item, Item::PerRank(_)));
        let collected: Vec<&str> = collected.map(|(key, _)| &**key).collect();
        self.agree("the keys of values per rank", prepared.as_ref().map(|_| format!("{collected:?}")))?;
        let mut values = prepared?;
        for (key, item) in &state.items {
            if let Item::PerRank(text) = item {
                let text = text.as_ref().map_or("null", |text| text);
                let all = self.all_gather_bytes(text.as_bytes())?;
                let all: Vec<_> = all.iter().map(|text| String::from_utf8_lossy(text)).collect();
                values.insert_json(key, format!("[{}]", all.join(",")));
            }
        }
        let own = OwnRecord {
            precision: self.options.precision,
            seed: self.options.seed,
            world_size: self.world.world_size(),
            scaler: self.scaler_state()?,
        };
        values.insert(OWN_KEY, &own)?;
        let written = match self.world.rank() {
            0 => write(path, state, filter, values),
            _ => Ok(()),
        };
        // Nobody goes on before the file is there, or the error is known.
        self.agree("the checkpoint", written.as_ref().map(|()| String::new()))?;
        written
    }

    pub fn load_checkpoint(
        &mut self,
        path: &Path,
        state: Option<&mut StateMut<'_>>,
        strict: bool,
    ) -> Result<LoadReport> {
        self.gate.wait()?;
        let rank = self.world.rank() as usize;
        let empty = &mut StateMut::new();
        let state = state.unwrap_or(empty);
        let planned = Checkpoint::open(path).and_then(|checkpoint| {
            let plan = plan(&checkpoint, state, rank, strict)?;
            Ok((checkpoint, plan))
        });
        // All ranks have validated the same file before any of them changes anything.
        let checksum = planned.as_ref().map(|(checkpoint, _)| format!("{:08x}", checkpoint.fingerprint()));
        self.agree("the checkpoint's checksum", checksum)?;
        let (checkpoint, plan) = planned?;
        let mut records = plan.records.into_iter();
        for (key, item) in &mut state.items {
            let source = Keyed { checkpoint: &checkpoint, key };
            match item {
                ItemMut::Module(module) => store_module(&source, &parts_of(*module))?,
                ItemMut::Optimizer(optimizer) => store_optimizer(&source, optimizer, records.next().flatten())?,
                ItemMut::Value(slot) | ItemMut::PerRank(slot) => slot.commit(),
            }
        }
        if let Some(own) = plan.own.filter(|_| !state.items.is_empty() && self.options.precision.scales_loss()) {
            self.set_scaler(own.scaler)?;
        }
        let mut remaining = state::keys_of(&checkpoint);
        state.items.iter().for_each(|(key, _)| {
            remaining.remove(key);
        });
        Ok(LoadReport { remaining: remaining.into_iter().collect(), missing: plan.missing, checkpoint })
    }

    /// Tells the other ranks how this one fares: every rank fails if one does, or if what they say of `what` differs.
    fn agree(&mut self, what: &str, mine: std::result::Result<String, &Error>) -> Result<()> {
        let failed = mine.is_err();
        let text = match mine {
            Ok(text) => format!("+{text}"),
            Err(error) => format!("-{error}"),
        };
        let all = self.all_gather_bytes(text.as_bytes())?;
        if failed {
            return Ok(()); // the caller returns its own error
        }
        for (rank, theirs) in all.iter().enumerate() {
            if let Some(reason) = theirs.strip_prefix(b"-") {
                let reason = String::from_utf8_lossy(reason).into_owned();
                return Err(Error::RankFailed { rank: rank as u32, reason });
            }
            if *theirs != all[0] {
                return Err(Error::Disagreement {
                    what: what.to_owned(),
                    rank: 0,
                    mine: String::from_utf8_lossy(&all[0][1..]).into_owned(),
                    peer: rank as u32,
                    theirs: String::from_utf8_lossy(&theirs[1..]).into_owned(),
                });
            }
        }
        Ok(())
    }
}

/// Checks a state that is to be saved and collects its values.
fn prepare(state: &State<'_>, filter: Option<&Filter<'_>>) -> Result<Values> {
    state::check_keys(state.items.iter().map(|(key, _)| &**key))?;
    for key in filter.iter().flat_map(|filter| filter.keep.keys()) {
        let item = state.items.iter().find(|(known, _)| known == key).map(|(_, item)| item);
        if !matches!(item, Some(Item::Module(_) | Item::Optimizer(_))) {
            return Err(Error::InvalidArgument {
                argument: "filter",
                value: format!("key {key:?}"),
                accepted: "a filter's keys are those of modules and optimizers of the state",
            });
        }
    }
    let mut values = Values::new();
    for (key, item) in &state.items {
        match item {
            Item::Module(_) => {}
            Item::Optimizer(optimizer) => values.insert(key.as_str(), &record_of(optimizer)?)?,
            Item::Value(text) => values.insert_json(key, text.clone()?),
            Item::PerRank(text) => {
                text.clone()?;
            }
        }
    }
    Ok(values)
}

/// Writes a state from where it is.
fn write(path: &Path, state: &State<'_>, filter: Option<&Filter<'_>>, mut values: Values) -> Result<()> {
    let parts: Vec<(&str, Vec<Part>)> = state
        .items
        .iter()
        .filter_map(|(key, item)| match item {
            Item::Module(module) => Some((&**key, parts_of(*module))),
            _ => None,
        })
        .collect();
    let parts: Vec<(&str, &Part)> =
        parts.iter().flat_map(|(key, parts)| parts.iter().map(|part| (*key, part))).collect();
    let weights: Vec<_> = parts
        .iter()
        .filter_map(|(key, part)| match part {
            Part::Parameter(parameter) => Some((*key, parameter, parameter.weights())),
            Part::Buffer(_) => None,
        })
        .collect();
    let buffers: Vec<_> = parts
        .iter()
        .filter_map(|(key, part)| match part {
            Part::Buffer(buffer) => Some((*key, buffer, buffer.values())),
            Part::Parameter(_) => None,
        })
        .collect();
    let optimizers: Vec<_> = state
        .items
        .iter()
        .filter_map(|(key, item)| match item {
            Item::Optimizer(optimizer) => Some((&**key, *optimizer)),
            _ => None,
        })
        .collect();
    // What is on a device is copied to the host, all of it: the file is written in one go.
    let saved = weights.iter().map(|(.., weights)| weights.saved().on_host()).collect::<Result<Vec<_>>>()?;
    let kept = buffers.iter().map(|(.., values)| values.on_host()).collect::<Result<Vec<_>>>()?;
    let moments = optimizers.iter().map(|(_, optimizer)| optimizer.core.moments()).collect::<Result<Vec<_>>>()?;

    let mut views: Vec<(&str, TensorView<'_>)> = Vec::new();
    for ((key, parameter, _), saved) in weights.iter().zip(&saved) {
        views.push((key, view(parameter.name().to_owned(), parameter.shape(), saved.dtype(), tensor::bytes(saved))));
    }
    for ((key, buffer, _), values) in buffers.iter().zip(&kept) {
        views.push((key, view(buffer.name().to_owned(), buffer.shape(), buffer.dtype(), tensor::bytes(values))));
    }
    for ((key, optimizer), moments) in optimizers.iter().zip(&moments) {
        let names = optimizer.state_names();
        for (at, bound) in optimizer.core.bound.iter().enumerate() {
            let (name, shape) = (bound.parameter.name(), bound.parameter.shape());
            for (index, state_name) in names.iter().enumerate() {
                let bytes = moments.bytes(at, index, names.len());
                views.push((key, view(format!("{state_name}.{name}"), shape, DType::F32, bytes)));
            }
        }
    }
    for (key, keep) in filter.iter().flat_map(|filter| &filter.keep) {
        views.retain(|(of, view)| of != key || keep(&view.name, view));
        if !views.iter().any(|(of, _)| of == key) {
            values.remove(key);
        }
    }
    let views: Vec<TensorView<'_>> =
        views.into_iter().map(|(key, view)| TensorView { name: format!("{key}.{}", view.name), ..view }).collect();
    checkpoint::write(path, &views, &values)
}

fn view<'a>(name: String, shape: &[usize], dtype: DType, bytes: &'a [u8]) -> TensorView<'a> {
    TensorView { name, dtype, shape: shape.to_vec(), bytes }
}

/// What loading a checkpoint will do.
struct Plan {
    /// Of each optimizer, in order.
    records: Vec<Option<OptimizerRecord>>,
    own: Option<OwnRecord>,
    missing: Vec<String>,
}

/// Validates everything that is requested of a checkpoint. Nothing is changed but what slots keep for themselves.
fn plan(checkpoint: &Checkpoint, state: &mut StateMut<'_>, rank: usize, strict: bool) -> Result<Plan> {
    state::check_keys(state.items.iter().map(|(key, _)| &**key))?;
    let keys = state::keys_of(checkpoint);
    let absent: Vec<String> =
        state.items.iter().map(|(key, _)| key).filter(|key| !keys.contains(*key)).cloned().collect();
    if strict && !absent.is_empty() {
        let what = format!("checkpoint {}", checkpoint.path().display());
        return Err(Error::Keys { what, missing: absent, unexpected: Vec::new() });
    }
    let mut plan = Plan { records: Vec::new(), own: checkpoint.value(OWN_KEY)?, missing: Vec::new() };
    if let Some(own) = &plan.own {
        own.scaler.check()?;
    }
    for (key, item) in &mut state.items {
        if absent.contains(key) {
            plan.missing.push(key.clone());
            if let ItemMut::Optimizer(_) = item {
                plan.records.push(None);
            }
            continue;
        }
        let source = Keyed { checkpoint, key };
        let refuse =
            |reason: String| Error::Checkpoint { path: checkpoint.path().to_owned(), item: key.clone(), reason };
        let mut missing = Vec::new();
        match item {
            ItemMut::Module(module) => missing = validate_module(&source, &parts_of(*module), strict)?,
            ItemMut::Optimizer(optimizer) => {
                let record;
                (missing, record) = validate_optimizer(&source, optimizer, strict)?;
                plan.records.push(record);
            }
            ItemMut::Value(slot) => {
                let text = checkpoint.json(key).ok_or_else(|| refuse("it is not a value".to_owned()))?;
                slot.parse(text).map_err(refuse)?;
            }
            ItemMut::PerRank(slot) => {
                let all: Option<Vec<Box<serde_json::value::RawValue>>> = checkpoint.value(key)?;
                match all.as_ref().and_then(|all| all.get(rank)) {
                    Some(text) => slot.parse(text.get()).map_err(refuse)?,
                    None if strict => {
                        let what = format!("{}: rank {rank}", source.describe());
                        return Err(Error::Keys { what, missing: vec![key.clone()], unexpected: Vec::new() });
                    }
                    None => plan.missing.push(key.clone()),
                }
            }
        }
        plan.missing.extend(missing.into_iter().map(|name| format!("{key}.{name}")));
    }
    Ok(plan)
}
