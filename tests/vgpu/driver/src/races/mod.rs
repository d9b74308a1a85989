//! Races between what streams do: conflicting accesses that nothing orders, found whatever came first this time.
//!
//! ```text
//! strands   each stream, each node of a graph, the host: every one with a clock of what it knows of the others
//! items     launches, copies, fills, allocating and freeing: steps of their strand
//! edges     a call                           host -> item
//!           an event, a wait for it          stream -> stream
//!           synchronize, a query: yes        stream -> host; so do cuMemFree and its like, for the streams of the device
//!           cuLaunchHostFunc                 stream -> host -> stream
//!           edges of a graph                 node -> node, stream -> first nodes, all nodes -> stream
//!           release, acquire                 kernel -> kernel, as they run
//!           the default stream               as stream.rs has it
//! memory    of every byte: who wrote it last, who has read it since
//! ```
//! Two accesses race if they overlap, one writes, neither knows of the other by way of edges, and they are not morally strong
//! ([`Shadow`]). Both are told on standard error, and the process is ended: a test that goes on would be believed.
//!
//! Kernels that talk to each other as they run are taken at their word: what a kernel releases at a location (`.gpu` for those of
//! its device, `.sys` for all; `cuStreamWriteValue32` likewise), whoever acquires there knows. So their staging needs no exception:
//! slots are ordered by their flags, and words that carry their own generation are morally strong. Within a kernel all threads
//! count as one that does what they do in the order in which they did it, so no race is claimed that is none; races inside
//! a launch are the interpreter's own detector's ([`annulus_vgpu::run`]).
//!
//! What is not seen, and why:
//! - What the host does by itself: it reads and writes pinned memory without the driver. So an acquire of host memory learns
//!   what the host knows, because the host may have written what was read.
//! - How the host's threads tell each other what they have waited for. So they count as one.
//! - What other processes do. An edge that leads through one is missed, so a program whose streams are ordered by that alone
//!   would be accused; a race with one is not seen.
//! - What a query that was answered with yes has put in an order: the library asks for timers' events by itself, so whether it
//!   heard of an end in time may depend on the machine's load.
//! - What is long past is not forgotten: clocks and spans grow with streams, graphs and allocations made. For tests.
//! - Fences: a relaxed store behind one releases nothing here. Between kernels annulus has none of these.

mod clock;
mod footprint;
mod shadow;
mod watch;

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};

use annulus_vgpu::Reach;

use crate::mapping::{Mapping, MemoryId};
use crate::module::Function;
use crate::settings::{Races, SETTINGS};
pub(crate) use clock::{Clock, Strand};
use footprint::{Mode, Run};
use shadow::{Past, Shadow};
pub(crate) use watch::Watch;

/// A step of a strand, for reports.
pub(crate) struct Item {
    what: String,
    strand: Arc<str>,
    device: usize,
    /// If it is a launch.
    kernel: Option<Function>,
}

impl Item {
    fn tell(&self, instruction: u32, writes: bool) -> String {
        let Item { what, strand, kernel, .. } = self;
        let place = kernel.as_ref().map(|function| function.kernel().place(instruction as usize));
        let place = place.map(|place| format!(" at {place}")).unwrap_or_default();
        format!("{what} {}{place}, {strand}", if writes { "writes" } else { "reads" })
    }
}

/// What a thread of the driver works for.
#[derive(Clone)]
pub(crate) struct Actor {
    strand: Strand,
    name: Arc<str>,
    device: usize,
    step: u32,
    clock: Clock,
}

impl Actor {
    /// A strand that knows nothing.
    pub fn new(name: &str, device: usize) -> Actor {
        let strand = next_strand();
        Actor { strand, name: name.into(), device, step: 0, clock: Clock::default() }
    }

    /// Begins a step that knows what `known` does.
    pub fn begin(&mut self, known: &[&Clock]) {
        known.iter().for_each(|known| self.clock.join(known));
        self.step = self.clock.advance(self.strand);
    }

    pub fn clock(&self) -> &Clock {
        &self.clock
    }

    fn item(&self, what: &str, kernel: Option<Function>) -> Arc<Item> {
        Arc::new(Item { what: what.to_owned(), strand: Arc::clone(&self.name), device: self.device, kernel })
    }

    fn past(&self, item: &Arc<Item>, reach: Reach, instruction: u32) -> Past {
        Past { item: Arc::clone(item), strand: self.strand, step: self.step, reach, instruction }
    }
}

/// What was released at a location: for everyone, and for the kernels of a device. Never less than whoever reads there may
/// know: later stores do not end it.
#[derive(Default)]
struct Released {
    system: Clock,
    devices: Vec<(usize, Clock)>,
}

#[derive(Default)]
struct State {
    shadows: HashMap<MemoryId, Shadow>,
    released: HashMap<(MemoryId, u64), Released>,
}

static STATE: LazyLock<Mutex<State>> = LazyLock::new(Mutex::default);
static HOST: LazyLock<Mutex<Actor>> = LazyLock::new(|| Mutex::new(Actor::new("the host", usize::MAX)));
static STRANDS: Mutex<Strand> = Mutex::new(0);

thread_local! {
    /// None: the thread is the program's, and works for the host.
    static ACTOR: RefCell<Option<Actor>> = const { RefCell::new(None) };
}

fn state() -> MutexGuard<'static, State> {
    STATE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn host() -> MutexGuard<'static, Actor> {
    HOST.lock().unwrap_or_else(PoisonError::into_inner)
}

fn next_strand() -> Strand {
    let mut strands = STRANDS.lock().unwrap_or_else(PoisonError::into_inner);
    *strands += 1;
    *strands
}

pub(crate) fn is_looked_for() -> bool {
    SETTINGS.races != Races::Ignore
}

// ---- edges -------------------------------------------------------------------------------------------------------------

/// What the host knows: what is submitted now knows it, too.
pub(crate) fn host_clock() -> Clock {
    if is_looked_for() { host().clock.clone() } else { Clock::default() }
}

/// The host has been told that all of this is done.
pub(crate) fn host_learns(clock: &Clock) {
    if is_looked_for() {
        host().clock.join(clock);
    }
}

/// Makes this thread work for `actor` and returns whom it worked for before.
pub(crate) fn play(actor: Option<Actor>) -> Option<Actor> {
    ACTOR.replace(actor)
}

/// Does `work` with the actor of this thread, if it has one and races are looked for.
fn with_actor<T>(work: impl FnOnce(&mut Actor) -> T) -> Option<T> {
    if !is_looked_for() {
        return None;
    }
    ACTOR.with_borrow_mut(|actor| actor.as_mut().map(work))
}

/// The next step of this thread's strand begins, and knows `known`.
pub(crate) fn begin(known: &[&Clock]) {
    with_actor(|actor| actor.begin(known));
}

/// What this thread's strand does from now on knows `known`.
pub(crate) fn learn(known: &Clock) {
    with_actor(|actor| actor.clock.join(known));
}

/// What this thread's strand knows.
pub(crate) fn clock() -> Clock {
    with_actor(|actor| actor.clock.clone()).unwrap_or_default()
}

/// What this thread's strand knows, whoever acquires at the location knows. Called before the value is there to be seen: who
/// sees it learns this.
fn release(actor: &mut Actor, location: (MemoryId, u64), reach: Reach) {
    let mut state = state();
    let released = state.released.entry(location).or_default();
    if reach == Reach::System {
        released.system.join(&actor.clock);
    } else {
        let own = released.devices.iter().position(|(device, _)| *device == actor.device);
        let own = own.unwrap_or_else(|| {
            released.devices.push((actor.device, Clock::default()));
            released.devices.len() - 1
        });
        released.devices[own].1.join(&actor.clock);
    }
    // What comes now is not released.
    actor.step = actor.clock.advance(actor.strand);
}

/// What is to be learnt at a location; nothing if it is known.
fn acquired(actor: &Actor, location: (MemoryId, u64), reach: Reach, is_host_memory: bool) -> Option<Clock> {
    let mut all = Clock::default();
    if let Some(Released { system, devices }) = state().released.get(&location) {
        if reach == Reach::System {
            all.join(system);
        }
        devices.iter().filter(|(device, _)| *device == actor.device).for_each(|(_, clock)| all.join(clock));
    }
    if is_host_memory {
        all.join(&host().clock);
    }
    (!actor.clock.covers(&all)).then_some(all)
}

/// `cuStreamWriteValue32`, before the value is written.
pub(crate) fn write_value(mapping: &Mapping, offset: usize, releases: bool) {
    access_as(mapping, offset, 4, Mode { writes: true, reach: Reach::System }, "cuStreamWriteValue32");
    let Some((memory, base)) = mapping.identity() else { return };
    if releases {
        with_actor(|actor| release(actor, (memory, base + offset as u64), Reach::System));
    }
}

/// `cuStreamWaitValue32`, once it has seen the value.
pub(crate) fn wait_value(mapping: &Mapping, offset: usize, is_host_memory: bool) {
    let Some((memory, base)) = mapping.identity() else { return };
    with_actor(|actor| {
        if let Some(clock) = acquired(actor, (memory, base + offset as u64), Reach::System, is_host_memory) {
            actor.clock.join(&clock);
        }
    });
    access_as(mapping, offset, 4, Mode { writes: false, reach: Reach::System }, "cuStreamWaitValue32");
}

// ---- accesses ----------------------------------------------------------------------------------------------------------

/// This thread's strand, or else the host, touches memory as `call` does.
pub(crate) fn access(mapping: &Mapping, offset: usize, len_bytes: usize, writes: bool, call: &str) {
    access_as(mapping, offset, len_bytes, Mode { writes, reach: Reach::Nobody }, call);
}

fn access_as(mapping: &Mapping, offset: usize, len_bytes: usize, mode: Mode, call: &str) {
    let (true, Some((memory, base))) = (is_looked_for(), mapping.identity()) else { return };
    let start = base + offset as u64;
    let run = Run { memory, bytes: start..start + len_bytes as u64, mode, instruction: 0 };
    let touch = |actor: &mut Actor| {
        let item = actor.item(call, None);
        note(actor, &item, &run, |_| 0);
    };
    if with_actor(touch).is_none() {
        let mut host = host();
        host.begin(&[]);
        touch(&mut host);
    }
}

/// Notes an access of an item; `instruction_at` tells which instruction touched a byte.
fn note(actor: &Actor, item: &Arc<Item>, run: &Run, instruction_at: impl Fn(u64) -> u32) {
    let Run { memory, bytes, mode, instruction } = run;
    let past = actor.past(item, mode.reach, *instruction);
    let conflict = state().shadows.entry(*memory).or_default().touch(bytes.clone(), *mode, &past, &actor.clock);
    let Some(conflict) = conflict else { return };
    let offset = conflict.offset.max(bytes.start);
    let later = item.tell(instruction_at(offset), mode.writes);
    let earlier = conflict.earlier.item.tell(conflict.earlier.instruction, conflict.earlier_writes);
    let places = crate::allocations::places_of(*memory, offset);
    let process = std::process::id();
    eprintln!("virtual GPU (process {process}): race at {places}: nothing orders\n    {later}\nbehind\n    {earlier}");
    if SETTINGS.races == Races::End {
        std::process::abort();
    }
}
