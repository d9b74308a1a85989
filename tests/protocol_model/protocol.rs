//! The protocol of a link, for every link of a schedule:
//!
//! ```text
//! sender of transfer k                                  receiver of transfer k
//!   g = base + k + 1                                      g = base + k + 1
//!   wait credited >= g - slots                            wait posted >= g
//!   write slot k % slots                                  reduce or copy from slot k % slots
//!   posted = g                                            (cut-through: wait, write and post the next transfer)
//!                                                         credited = g
//! ```
//! `posted` and `credited` have one writer each and count modulo 8; `a >= b` is `(a - b) mod 8 < 4`. Every wait also
//! ends when the fault word is set, or at its deadline. `base` is where earlier operations left the link.
//!
//! Besides what ranks can see, a slot records which transfer it holds (in full), so that the model notices when the
//! three bits deceive a rank.
//!
//! Every action advances a program counter, ends a rank or sets the fault word, and nothing undoes these: runs are
//! finite, and a rank hangs exactly if it is neither ended nor able to move in a state without successors.

use annulus::schedule::{Action, Algorithm, Schedule};
use stateright::{Model, Property};

use crate::program::{Op, Place, Program};
use crate::value::{MAX_WORLD_SIZE, Value, Vectors, add, finish};

pub const GENERATIONS: u8 = 8;

/// No slot is overwritten or misread, and a rank that completes has the exact result.
pub const SAFE: &str = "nothing is violated";
/// Every survivor completes or ends with an error.
pub const LIVE: &str = "nobody hangs";
/// No rank gives up for nothing.
pub const COMPLETES: &str = "without a death or a fault everyone completes";
/// Not vacuous: some run succeeds.
pub const SUCCESS: &str = "everyone completes";
/// Not vacuous: some run ends a survivor with an error.
pub const FAILURE: &str = "a survivor fails";

/// Faults of a protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mutant {
    /// Writes without waiting for a credit.
    NoCreditWait,
    /// Waits for the credit before the one it needs.
    CreditOffByOne,
    /// Waits for the post before the one it needs.
    PostOffByOne,
    /// Compares generations as plain numbers.
    PlainCompare,
    /// Posts, then writes.
    PostBeforeWrite,
    /// Gives the slot back, then reads it.
    CreditBeforeRead,
    /// Starts every operation at `base` again.
    GenerationsRestart,
    /// Looks at the fault word only while it waits for posts.
    CreditWaitIgnoresFault,
}

/// How survivors learn that a rank is dead.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Noticing {
    /// The monitor sets the fault word, some time after a death and never without one.
    Monitor,
    /// Only by the deadline of a wait, which may pass at any time while the wait is not satisfied, even if nobody died.
    Deadline,
    /// Not at all: a mutant.
    Never,
}

/// One checked configuration.
#[derive(Debug, Clone)]
pub struct Protocol {
    /// Run one after the other over the same links. One element a round.
    pub operations: Vec<Schedule>,
    /// Staging slots per link; at most 3, so that three bits tell generations apart.
    pub slots: u8,
    /// Reduce from the own slot straight into the next rank's, and give the own slot back only then.
    pub cut_through: bool,
    /// Where the generations of all links start.
    pub base: u8,
    /// Whether one rank may die.
    pub deaths: bool,
    pub noticing: Noticing,
    pub mutant: Option<Mutant>,
}

impl Protocol {
    pub fn new(operations: Vec<Schedule>) -> Self {
        Self {
            operations,
            slots: 2,
            cut_through: true,
            base: 6,
            deaths: true,
            noticing: Noticing::Monitor,
            mutant: None,
        }
    }

    pub fn compile(self) -> Compiled {
        let world_size = self.operations[0].world_size();
        assert!(world_size as usize <= MAX_WORLD_SIZE && (1..=3).contains(&self.slots) && self.base < GENERATIONS);
        for operation in &self.operations {
            assert!(operation.world_size() == world_size && operation.slot_elems() <= 1);
        }
        let programs = (0..world_size).map(|rank| Program::new(&self, rank).ops).collect();
        let vectors = Vectors::new(self.operations.clone());
        Compiled { vectors, programs, world_size: world_size as usize, protocol: self }
    }
}

/// A protocol with the programs of its ranks; the model that stateright explores.
pub struct Compiled {
    pub protocol: Protocol,
    world_size: usize,
    vectors: Vectors,
    programs: Vec<Vec<Op>>,
}

impl Protocol {
    /// The generation of a link's `ordinal`-th transfer.
    pub fn generation(&self, ordinal: u8) -> u8 {
        (self.base + ordinal + 1) % GENERATIONS
    }

    fn reached(&self, seen: u8, wanted: u8) -> bool {
        if self.mutant == Some(Mutant::PlainCompare) {
            return seen >= wanted;
        }
        reached_on_circle(seen, wanted)
    }

    fn has_credit(&self, credited: u8, generation: u8) -> bool {
        let early = match self.mutant {
            Some(Mutant::NoCreditWait) => return true,
            Some(Mutant::CreditOffByOne) => 1,
            _ => 0,
        };
        self.reached(credited, (generation + GENERATIONS - self.slots - early) % GENERATIONS)
    }

    fn is_posted(&self, posted: u8, generation: u8) -> bool {
        let early = u8::from(self.mutant == Some(Mutant::PostOffByOne));
        self.reached(posted, (generation + GENERATIONS - early) % GENERATIONS)
    }
}

/// `seen >= wanted`, as the flags decide it.
pub fn reached_on_circle(seen: u8, wanted: u8) -> bool {
    (seen + GENERATIONS - wanted) % GENERATIONS < GENERATIONS / 2
}

/// Why a state is wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Violation {
    /// A slot was written before it was given back.
    Overwritten,
    /// A rank read a slot that holds another transfer, or one that is not there yet.
    WrongGeneration,
    /// Memory was read that holds nothing, or a value that cannot be added.
    WrongValue,
    /// A rank completed with another result than the exact one.
    WrongResult,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Life {
    Running,
    /// The operations returned success.
    Completed,
    /// The operations returned an error.
    Failed,
    Dead,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Use {
    Free,
    Writing,
    Full,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Slot {
    usage: Use,
    /// The transfer that was last written here. Ranks cannot see it.
    ordinal: u8,
    value: Option<Value>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Rank {
    counter: u8,
    life: Life,
    /// What the last `Read` made.
    carried: Option<Value>,
}

/// Everything, at one moment.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct State {
    ranks: Vec<Rank>,
    /// By link.
    posted: Vec<u8>,
    credited: Vec<u8>,
    /// By link, then slot.
    slots: Vec<Slot>,
    /// By rank, then operation and element.
    memory: Vec<Option<Value>>,
    fault: bool,
    pub violation: Option<Violation>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Move {
    /// The rank executes its next operation.
    Advance(usize),
    /// The rank's wait ends with an error.
    GiveUp(usize),
    Die(usize),
    /// The monitor sets the fault word.
    Notice,
}

impl Compiled {
    fn link(&self, place: Place) -> usize {
        usize::from(place.from) * self.world_size + usize::from(place.to)
    }

    fn slot(&self, place: Place) -> usize {
        self.link(place) * usize::from(self.protocol.slots) + usize::from(place.ordinal % self.protocol.slots)
    }

    fn next_op(&self, state: &State, rank: usize) -> Option<&Op> {
        let rank_state = &state.ranks[rank];
        (rank_state.life == Life::Running).then(|| &self.programs[rank][usize::from(rank_state.counter)])
    }

    fn is_satisfied(&self, state: &State, op: &Op) -> bool {
        match *op {
            Op::Write { place, .. } => self.protocol.has_credit(state.credited[self.link(place)], place.generation),
            Op::Await { place } | Op::Read { place, .. } => {
                self.protocol.is_posted(state.posted[self.link(place)], place.generation)
            }
            Op::Post { .. } | Op::Credit { .. } | Op::FinishAlone { .. } => true,
        }
    }

    /// Whether the rank is in a wait that may end with an error now.
    fn may_give_up(&self, state: &State, op: &Op) -> bool {
        let sees_fault = match op {
            Op::Write { .. } => self.protocol.mutant != Some(Mutant::CreditWaitIgnoresFault),
            Op::Await { .. } | Op::Read { .. } => true,
            Op::Post { .. } | Op::Credit { .. } | Op::FinishAlone { .. } => return false,
        };
        let late = self.protocol.noticing == Noticing::Deadline && !self.is_satisfied(state, op);
        (sees_fault && state.fault) || late
    }

    fn someone_is_dead(state: &State) -> bool {
        state.ranks.iter().any(|rank| rank.life == Life::Dead)
    }

    fn may_notice(&self, state: &State) -> bool {
        self.protocol.noticing == Noticing::Monitor && !state.fault && Self::someone_is_dead(state)
    }

    /// Whether some link's generations go past 7, so that only a comparison on the circle is right.
    pub fn wraps(&self) -> bool {
        let place = |op: &Op| match *op {
            Op::Post { place } => Some(place),
            _ => None,
        };
        self.programs.iter().flatten().filter_map(place).any(|place| place.generation <= self.protocol.base)
    }

    /// No survivor can do anything any more.
    fn is_over(&self, state: &State) -> bool {
        let can_move = |rank| {
            self.next_op(state, rank).is_some_and(|op| self.is_satisfied(state, op) || self.may_give_up(state, op))
        };
        state.violation.is_none() && !self.may_notice(state) && !(0..self.world_size).any(can_move)
    }

    fn someone_hangs(&self, state: &State) -> bool {
        self.is_over(state) && state.ranks.iter().any(|rank| rank.life == Life::Running)
    }

    fn advance(&self, state: &mut State, rank: usize) -> Result<(), Violation> {
        let op = &self.programs[rank][usize::from(state.ranks[rank].counter)];
        match *op {
            Op::Write { place, operation, elem, forwards } => {
                let value = if forwards {
                    state.ranks[rank].carried
                } else {
                    self.vectors.load(&state.memory, rank, operation, elem)?
                };
                let slot = &mut state.slots[self.slot(place)];
                let expected =
                    if self.protocol.mutant == Some(Mutant::PostBeforeWrite) { Use::Full } else { Use::Free };
                if slot.usage != expected {
                    return Err(Violation::Overwritten);
                }
                *slot = Slot { usage: Use::Writing, ordinal: place.ordinal, value };
            }
            Op::Post { place } => {
                state.slots[self.slot(place)].usage = Use::Full;
                state.posted[self.link(place)] = place.generation;
            }
            Op::Await { .. } => {}
            Op::Read { place, operation, elem, action, ref held } => {
                let received = self.receive(state, place)?;
                let own = |state: &State| self.vectors.load(&state.memory, rank, operation, elem);
                let algorithm = self.protocol.operations[usize::from(operation)].algorithm();
                let made = match (action, algorithm) {
                    (Action::Hold, _) => None,
                    (Action::Copy, _) => received,
                    (Action::Reduce, _) => add(received, own(state)?)?,
                    (Action::Finish, Algorithm::Ring) => finish(add(received, own(state)?)?),
                    (Action::Finish, Algorithm::Direct) => {
                        let mut terms = [None; MAX_WORLD_SIZE];
                        terms[rank] = own(state)?;
                        for &place in held.iter().chain([&place]) {
                            terms[usize::from(place.from)] = self.receive(state, place)?;
                        }
                        let first = terms[0];
                        finish(terms[1..self.world_size].iter().try_fold(first, |sum, &term| add(sum, term))?)
                    }
                };
                let keeps_out = action == Action::Hold || (action == Action::Reduce && self.protocol.cut_through);
                if let Some(elem) = elem.filter(|_| !keeps_out) {
                    state.memory[self.vectors.at(rank, operation, elem)] = made;
                }
                state.ranks[rank].carried = made;
            }
            Op::Credit { place } => {
                state.slots[self.slot(place)].usage = Use::Free;
                state.credited[self.link(place)] = place.generation;
            }
            Op::FinishAlone { operation, elem } => {
                let value = finish(self.vectors.load(&state.memory, rank, operation, elem)?);
                if let Some(elem) = elem {
                    state.memory[self.vectors.at(rank, operation, elem)] = value;
                }
            }
        }
        let rank_state = &mut state.ranks[rank];
        rank_state.counter += 1;
        if usize::from(rank_state.counter) == self.programs[rank].len() {
            rank_state.life = Life::Completed;
            rank_state.carried = None;
            if !self.vectors.are_exact(&state.memory, rank) {
                return Err(Violation::WrongResult);
            }
        }
        Ok(())
    }

    fn receive(&self, state: &State, place: Place) -> Result<Option<Value>, Violation> {
        let slot = state.slots[self.slot(place)];
        // A mutant may have given the slot back already; that alone is not wrong, being overwritten is.
        if slot.ordinal != place.ordinal || slot.usage == Use::Writing {
            return Err(Violation::WrongGeneration);
        }
        Ok(slot.value)
    }
}

impl Model for Compiled {
    type State = State;
    type Action = Move;

    fn init_states(&self) -> Vec<State> {
        let life = |program: &Vec<Op>| if program.is_empty() { Life::Completed } else { Life::Running };
        let links = self.world_size * self.world_size;
        let free = Slot { usage: Use::Free, ordinal: u8::MAX, value: None };
        vec![State {
            ranks: self.programs.iter().map(|ops| Rank { counter: 0, life: life(ops), carried: None }).collect(),
            posted: vec![self.protocol.base; links],
            credited: vec![self.protocol.base; links],
            slots: vec![free; links * usize::from(self.protocol.slots)],
            memory: self.vectors.initial(),
            fault: false,
            violation: None,
        }]
    }

    fn actions(&self, state: &State, moves: &mut Vec<Move>) {
        if state.violation.is_some() {
            return;
        }
        let may_die = self.protocol.deaths && !Self::someone_is_dead(state);
        for rank in 0..self.world_size {
            let Some(op) = self.next_op(state, rank) else { continue };
            if self.is_satisfied(state, op) {
                moves.push(Move::Advance(rank));
            }
            if self.may_give_up(state, op) {
                moves.push(Move::GiveUp(rank));
            }
            if may_die {
                moves.push(Move::Die(rank));
            }
        }
        if self.may_notice(state) {
            moves.push(Move::Notice);
        }
    }

    fn next_state(&self, last: &State, action: Move) -> Option<State> {
        let mut state = last.clone();
        match action {
            Move::Advance(rank) => {
                if let Err(violation) = self.advance(&mut state, rank) {
                    state.violation = Some(violation);
                }
            }
            Move::GiveUp(rank) => {
                state.ranks[rank].life = Life::Failed;
                state.fault = true;
            }
            Move::Die(rank) => state.ranks[rank].life = Life::Dead,
            Move::Notice => state.fault = true,
        }
        Some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always(SAFE, |_, state: &State| state.violation.is_none()),
            Property::always(LIVE, |model: &Self, state: &State| !model.someone_hangs(state)),
            Property::always(COMPLETES, |model: &Self, state: &State| {
                !model.is_over(state)
                    || state.fault
                    || Self::someone_is_dead(state)
                    || state.ranks.iter().all(|rank| rank.life == Life::Completed)
            }),
            Property::sometimes(SUCCESS, |_, state: &State| {
                state.ranks.iter().all(|rank| rank.life == Life::Completed)
            }),
            Property::sometimes(FAILURE, |_, state: &State| state.ranks.iter().any(|rank| rank.life == Life::Failed)),
        ]
    }
}
