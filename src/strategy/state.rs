//! What a checkpoint is made of: modules, optimizers and values, each under a key.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::checkpoint::{Checkpoint, TensorView, Values};
use super::module::Module;
use super::optimizer::Optimizer;
use super::tensor::Tensor;
use crate::error::{Error, Result};

/// Tensors and values by name: the state of one module or optimizer, copied.
#[derive(Debug, Default, PartialEq)]
pub struct StateDict {
    /// A module's parameters (master weights where there are some) and buffers; an optimizer's moments.
    pub tensors: BTreeMap<String, Tensor>,
    /// An optimizer's rule, learning rate and number of steps.
    pub values: Values,
}

/// What is saved: references to modules and optimizers, and values, each under a key without dots.
///
/// ```no_run
/// # use annulus::strategy::{Ddp, LoaderState, Module, Optimizer, Rng, State, Strategy};
/// # fn save(strategy: &mut Ddp, model: &impl Module, optimizer: &Optimizer, loader: LoaderState, rng: &Rng) -> annulus::Result<()> {
/// let state = State::new()
///     .module("model", model)
///     .optimizer("optimizer", optimizer)
///     .value("loader", &loader)
///     .per_rank("rng", rng);
/// strategy.save_checkpoint("runs/step_100.safetensors".as_ref(), &state, None)
/// # }
/// ```
/// The strategy adds what is its own: precision, seed and loss scaler.
#[derive(Default)]
pub struct State<'a> {
    pub(crate) items: Vec<(String, Item<'a>)>,
}

pub(crate) enum Item<'a> {
    Module(&'a dyn Module),
    Optimizer(&'a Optimizer),
    /// A JSON document, or why it is none.
    Value(Result<String>),
    PerRank(Result<String>),
}

fn json<T: Serialize + ?Sized>(key: &str, value: &T) -> Result<String> {
    serde_json::to_string(value).map_err(|error| Error::InvalidArgument {
        argument: "state",
        value: format!("{key:?}: {error}"),
        accepted: "values must be representable as JSON",
    })
}

impl<'a> State<'a> {
    /// Nothing yet.
    pub fn new() -> State<'a> {
        State::default()
    }

    fn with(mut self, key: &str, item: Item<'a>) -> State<'a> {
        self.items.push((key.to_owned(), item));
        self
    }

    /// A module: its tensors are called `key.name`.
    pub fn module(self, key: &str, module: &'a dyn Module) -> State<'a> {
        self.with(key, Item::Module(module))
    }

    /// An optimizer: its tensors are called `key.state.name`.
    pub fn optimizer(self, key: &str, optimizer: &'a Optimizer) -> State<'a> {
        self.with(key, Item::Optimizer(optimizer))
    }

    /// A value, that of rank 0.
    pub fn value<T: Serialize + ?Sized>(self, key: &str, value: &T) -> State<'a> {
        let text = json(key, value);
        self.with(key, Item::Value(text))
    }

    /// A value that every rank has its own of, such as a random number generator.
    pub fn per_rank<T: Serialize + ?Sized>(self, key: &str, value: &T) -> State<'a> {
        let text = json(key, value);
        self.with(key, Item::PerRank(text))
    }
}

impl fmt::Debug for State<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.items.iter().map(|(key, _)| key)).finish()
    }
}

/// What is restored, in place, under the keys it was saved with.
///
/// ```no_run
/// # use annulus::strategy::{Ddp, LoaderState, Module, Optimizer, Rng, StateMut, Strategy};
/// # fn load(strategy: &mut Ddp, model: &impl Module, optimizer: &mut Optimizer, rng: &mut Rng, epoch: &mut u64) -> annulus::Result<()> {
/// let mut state = StateMut::new()
///     .module("model", model)
///     .optimizer("optimizer", optimizer)
///     .value("epoch", epoch)
///     .per_rank("rng", rng);
/// let report = strategy.load_checkpoint("runs/step_100.safetensors".as_ref(), Some(&mut state), true)?;
/// # Ok(()) }
/// ```
#[derive(Default)]
pub struct StateMut<'a> {
    pub(crate) items: Vec<(String, ItemMut<'a>)>,
}

pub(crate) enum ItemMut<'a> {
    Module(&'a dyn Module),
    Optimizer(&'a mut Optimizer),
    Value(Box<dyn ValueSlot + 'a>),
    PerRank(Box<dyn ValueSlot + 'a>),
}

/// A value to be restored: parsed when everything is validated, stored when everything is valid.
pub(crate) trait ValueSlot {
    fn parse(&mut self, text: &str) -> std::result::Result<(), String>;
    fn commit(&mut self);
}

struct Slot<'a, T> {
    target: &'a mut T,
    parsed: Option<T>,
}

impl<T: DeserializeOwned> ValueSlot for Slot<'_, T> {
    fn parse(&mut self, text: &str) -> std::result::Result<(), String> {
        self.parsed = Some(serde_json::from_str(text).map_err(|error| error.to_string())?);
        Ok(())
    }

    fn commit(&mut self) {
        if let Some(value) = self.parsed.take() {
            *self.target = value;
        }
    }
}

impl<'a> StateMut<'a> {
    /// Nothing yet.
    pub fn new() -> StateMut<'a> {
        StateMut::default()
    }

    fn with(mut self, key: &str, item: ItemMut<'a>) -> StateMut<'a> {
        self.items.push((key.to_owned(), item));
        self
    }

    /// A module's parameters and buffers.
    pub fn module(self, key: &str, module: &'a dyn Module) -> StateMut<'a> {
        self.with(key, ItemMut::Module(module))
    }

    /// An optimizer's state, learning rate and number of steps.
    pub fn optimizer(self, key: &str, optimizer: &'a mut Optimizer) -> StateMut<'a> {
        self.with(key, ItemMut::Optimizer(optimizer))
    }

    /// A value.
    pub fn value<T: DeserializeOwned>(self, key: &str, value: &'a mut T) -> StateMut<'a> {
        self.with(key, ItemMut::Value(Box::new(Slot { target: value, parsed: None })))
    }

    /// A value that every rank had its own of. A rank that was not there when it was saved counts it as missing.
    pub fn per_rank<T: DeserializeOwned>(self, key: &str, value: &'a mut T) -> StateMut<'a> {
        self.with(key, ItemMut::PerRank(Box::new(Slot { target: value, parsed: None })))
    }
}

impl fmt::Debug for StateMut<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.items.iter().map(|(key, _)| key)).finish()
    }
}

type Keep<'f> = Box<dyn Fn(&str, &TensorView<'_>) -> bool + 'f>;

/// Which tensors of a state are saved.
#[derive(Default)]
pub struct Filter<'f> {
    pub(crate) keep: BTreeMap<String, Keep<'f>>,
}

impl<'f> Filter<'f> {
    /// Everything is kept.
    pub fn new() -> Filter<'f> {
        Filter::default()
    }

    /// Of the module or optimizer under `key`, keeps the tensors for which `keep(name, tensor)` is true; the name is without
    /// the key. If it keeps none the key is not in the file.
    pub fn key(mut self, key: &str, keep: impl Fn(&str, &TensorView<'_>) -> bool + 'f) -> Filter<'f> {
        self.keep.insert(key.to_owned(), Box::new(keep));
        self
    }
}

impl fmt::Debug for Filter<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.keep.keys()).finish()
    }
}

/// What became of a load.
#[derive(Debug)]
pub struct LoadReport {
    /// Keys in the file that were not requested, in order.
    pub remaining: Vec<String>,
    /// Keys, or tensors as `key.name`, that were requested but are not in the file. Empty after a strict load.
    pub missing: Vec<String>,
    /// The file, to read what remains from.
    pub checkpoint: Checkpoint,
}

/// Fails unless `key` can be a key of a state.
pub(crate) fn check_keys<'k>(keys: impl Iterator<Item = &'k str>) -> Result<()> {
    let mut seen = BTreeSet::new();
    for key in keys {
        let plain = !key.is_empty() && !key.chars().any(|c| c == '.' || c == '"' || c == '\\' || c.is_control());
        if !plain || key == OWN_KEY || !seen.insert(key) {
            return Err(Error::InvalidArgument {
                argument: "state",
                value: format!("key {key:?}"),
                accepted: "keys are unique, not empty, not \"annulus\", and without dots, quotes or backslashes",
            });
        }
    }
    Ok(())
}

/// Where the strategy keeps what is its own.
pub(crate) const OWN_KEY: &str = "annulus";

/// The keys of a file.
pub(crate) fn keys_of(checkpoint: &Checkpoint) -> BTreeSet<String> {
    let of_tensors = checkpoint.tensors("").map(|(name, ..)| name.split('.').next().unwrap_or(name).to_owned());
    let mut keys: BTreeSet<String> = of_tensors.collect();
    keys.extend(checkpoint.keys().map(str::to_owned));
    keys.remove(OWN_KEY);
    keys
}
