//! The host's protocol for `Direct`: slots that several ranks read, three flags per rank and round.
//!
//! ```text
//! round g of rank r                                                    waits before it, for every other rank
//!   terms[g % 2]  <- own terms of the others' chunks;  sent = g          reduced >= g-2    (they have read terms g-2)
//!   own chunk     <- sum over all ranks' terms[g % 2]                    sent >= g
//!   result[g % 2] <- own chunk;                        reduced = g       gathered >= g-2   (they have read result g-2)
//!   vector        <- the others' result[g % 2];        gathered = g      reduced >= g
//! ```
//! The terms of round g+1 are sent before round g is summed. An operation that lacks a phase posts its flag all the
//! same, so that the flags of all operations stay in step.
//!
//! As in [`crate::protocol`], slots and ranks also carry full round numbers that the ranks cannot see, and generations
//! have three bits. A slot counts as being read until its reader posts the flag that says so.

use annulus::schedule::{Action, Collective, Phase, Schedule};
use stateright::{Model, Property};

use crate::protocol::{
    COMPLETES, FAILURE, GENERATIONS, LIVE, Life, Move, Noticing, SAFE, SUCCESS, Violation, reached_on_circle,
};
use crate::value::{Elem, MAX_WORLD_SIZE, Memory, Value, Vectors, add, elem, finish};

/// Faults of the protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StagedMutant {
    /// Writes terms without waiting for `reduced`.
    NoTermsWait,
    /// Writes results without waiting for `gathered`.
    NoResultWait,
    /// Sums without waiting for `sent`.
    NoSentWait,
    /// Waits for the round before the one it needs.
    OffByOne,
    /// Compares generations as plain numbers.
    PlainCompare,
    /// Posts only the flags of the phases that an operation has.
    UnusedFlagsStay,
}

/// One checked configuration.
#[derive(Debug, Clone)]
pub struct Staged {
    /// Run one after the other over the same slots. One element a round.
    pub operations: Vec<Schedule>,
    /// Slots of each kind per rank.
    pub slots: u8,
    /// Where the generations start.
    pub base: u8,
    pub deaths: bool,
    pub noticing: Noticing,
    pub mutant: Option<StagedMutant>,
}

impl Staged {
    pub fn new(operations: Vec<Schedule>) -> Self {
        Self { operations, slots: 2, base: 6, deaths: true, noticing: Noticing::Monitor, mutant: None }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Flag {
    Sent,
    Reduced,
    Gathered,
}

/// A round: counted from 1 over all operations, and its part of an operation.
#[derive(Debug, Clone, Copy)]
struct Round {
    number: u8,
    operation: u8,
    /// The round's number in its operation, for the schedule.
    local: u64,
}

#[derive(Debug, Clone, Copy)]
enum Op {
    /// Wait until `rank`'s flag reaches the round.
    Wait {
        rank: usize,
        flag: Flag,
        number: i16,
    },
    /// Begin to write the terms slot. It ends with the next `Post` of `Sent`.
    WriteTerms {
        round: Round,
    },
    /// Read all terms of the own chunk; it becomes final.
    Sum {
        round: Round,
    },
    /// Begin to write the result slot. It ends with the next `Post` of `Reduced`.
    WriteResult {
        round: Round,
    },
    /// Read `owner`'s result slot.
    Take {
        round: Round,
        owner: usize,
    },
    Post {
        flag: Flag,
        number: u8,
    },
}

/// A protocol with the programs of its ranks; the model that stateright explores.
pub struct CompiledStaged {
    protocol: Staged,
    world_size: usize,
    vectors: Vectors,
    programs: Vec<Vec<Op>>,
}

impl Staged {
    pub fn compile(self) -> CompiledStaged {
        let world_size = self.operations[0].world_size();
        assert!(world_size as usize <= MAX_WORLD_SIZE);
        CompiledStaged {
            programs: (0..world_size).map(|rank| self.program(rank)).collect(),
            world_size: world_size as usize,
            vectors: Vectors::new(self.operations.clone()),
            protocol: self,
        }
    }

    fn program(&self, rank: u32) -> Vec<Op> {
        let mut ops = Vec::new();
        let mut before = 0;
        for (operation, schedule) in (0..).zip(&self.operations) {
            let round = |local: u64| Round { number: before + local as u8 + 1, operation, local };
            let rounds = schedule.rounds();
            for local in 0..rounds {
                if local == 0 {
                    self.send(schedule, rank, round(0), &mut ops);
                }
                if local + 1 < rounds {
                    self.send(schedule, rank, round(local + 1), &mut ops);
                }
                self.finish(schedule, rank, round(local), &mut ops);
                self.gather(schedule, rank, round(local), &mut ops);
            }
            before += rounds as u8;
        }
        ops
    }

    fn wait_all(&self, schedule: &Schedule, rank: u32, flag: Flag, number: i16, ops: &mut Vec<Op>) {
        let early = i16::from(self.mutant == Some(StagedMutant::OffByOne));
        for distance in 1..schedule.world_size() {
            let peer = (rank + distance) % schedule.world_size();
            ops.push(Op::Wait { rank: peer as usize, flag, number: number - early });
        }
    }

    fn post(&self, schedule: &Schedule, flag: Flag, number: u8, ops: &mut Vec<Op>) {
        let used = match flag {
            Flag::Sent => matches!(schedule.collective(), Collective::AllReduce | Collective::ReduceScatter),
            Flag::Gathered => schedule.collective() != Collective::ReduceScatter,
            Flag::Reduced => true,
        };
        if used || self.mutant != Some(StagedMutant::UnusedFlagsStay) {
            ops.push(Op::Post { flag, number });
        }
    }

    fn send(&self, schedule: &Schedule, rank: u32, round: Round, ops: &mut Vec<Op>) {
        let sends = |phase| schedule.steps(rank, round.local).any(|step| step.phase == phase && step.send.is_some());
        if sends(Phase::ReduceScatter) {
            if self.mutant != Some(StagedMutant::NoTermsWait) {
                let free = i16::from(round.number) - i16::from(self.slots);
                self.wait_all(schedule, rank, Flag::Reduced, free, ops);
            }
            ops.push(Op::WriteTerms { round });
        }
        self.post(schedule, Flag::Sent, round.number, ops);
    }

    fn finish(&self, schedule: &Schedule, rank: u32, round: Round, ops: &mut Vec<Op>) {
        let mut steps = schedule.steps(rank, round.local);
        let sums = steps.clone().any(|step| step.action == Some(Action::Finish));
        if steps.any(|step| step.phase != Phase::ReduceScatter && step.send.is_some()) {
            if self.mutant != Some(StagedMutant::NoResultWait) {
                let free = i16::from(round.number) - i16::from(self.slots);
                self.wait_all(schedule, rank, Flag::Gathered, free, ops);
            }
            if sums {
                self.sum(schedule, rank, round, ops);
            }
            ops.push(Op::WriteResult { round });
        } else if sums {
            self.sum(schedule, rank, round, ops);
        }
        self.post(schedule, Flag::Reduced, round.number, ops);
    }

    fn sum(&self, schedule: &Schedule, rank: u32, round: Round, ops: &mut Vec<Op>) {
        if self.mutant != Some(StagedMutant::NoSentWait) {
            self.wait_all(schedule, rank, Flag::Sent, i16::from(round.number), ops);
        }
        ops.push(Op::Sum { round });
    }

    fn gather(&self, schedule: &Schedule, rank: u32, round: Round, ops: &mut Vec<Op>) {
        for step in schedule.steps(rank, round.local) {
            let (Some(recv), Some(Action::Copy)) = (step.recv, step.action) else { continue };
            let owner = recv.peer as usize;
            ops.push(Op::Wait { rank: owner, flag: Flag::Reduced, number: i16::from(round.number) });
            ops.push(Op::Take { round, owner });
        }
        self.post(schedule, Flag::Gathered, round.number, ops);
    }

    fn generation(&self, number: i16) -> u8 {
        (i16::from(self.base) + number).rem_euclid(i16::from(GENERATIONS)) as u8
    }
}

/// A slot of one rank: an element for every owner (terms), or the own one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Slot {
    writing: bool,
    /// The round it was last written in; 0 if never. Ranks cannot see it.
    number: u8,
    values: [Option<Value>; MAX_WORLD_SIZE],
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Rank {
    counter: u8,
    life: Life,
    /// What the flags say, and the last round that each was posted for.
    flags: [u8; 3],
    posted: [u8; 3],
}

/// Everything, at one moment.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct StagedState {
    ranks: Vec<Rank>,
    /// By rank, then slot.
    terms: Vec<Slot>,
    results: Vec<Slot>,
    memory: Memory,
    fault: bool,
    pub violation: Option<Violation>,
}

impl CompiledStaged {
    fn slot(&self, rank: usize, number: u8) -> usize {
        rank * usize::from(self.protocol.slots) + usize::from(number % self.protocol.slots)
    }

    fn chunk(&self, round: Round, owner: usize) -> Elem {
        elem(self.protocol.operations[usize::from(round.operation)].chunk(round.local, owner as u32))
    }

    fn next_op(&self, state: &StagedState, rank: usize) -> Option<Op> {
        let counter = usize::from(state.ranks[rank].counter);
        (state.ranks[rank].life == Life::Running).then(|| self.programs[rank][counter])
    }

    fn is_satisfied(&self, state: &StagedState, op: Op) -> bool {
        let Op::Wait { rank, flag, number } = op else { return true };
        let (seen, wanted) = (state.ranks[rank].flags[flag as usize], self.protocol.generation(number));
        match self.protocol.mutant {
            Some(StagedMutant::PlainCompare) => seen >= wanted,
            _ => reached_on_circle(seen, wanted),
        }
    }

    fn may_give_up(&self, state: &StagedState, op: Op) -> bool {
        let late = self.protocol.noticing == Noticing::Deadline && !self.is_satisfied(state, op);
        matches!(op, Op::Wait { .. }) && (state.fault || late)
    }

    fn someone_is_dead(state: &StagedState) -> bool {
        state.ranks.iter().any(|rank| rank.life == Life::Dead)
    }

    fn may_notice(&self, state: &StagedState) -> bool {
        self.protocol.noticing == Noticing::Monitor && !state.fault && Self::someone_is_dead(state)
    }

    fn is_over(&self, state: &StagedState) -> bool {
        let can_move = |rank| {
            self.next_op(state, rank).is_some_and(|op| self.is_satisfied(state, op) || self.may_give_up(state, op))
        };
        state.violation.is_none() && !self.may_notice(state) && !(0..self.world_size).any(can_move)
    }

    /// Begins to write a slot whose readers post `taken`.
    fn begin(&self, state: &StagedState, rank: usize, slot: Slot, taken: Flag) -> Result<(), Violation> {
        let is_read = |peer: usize| peer == rank || state.ranks[peer].posted[taken as usize] >= slot.number;
        if slot.writing || !(0..self.world_size).all(is_read) { Err(Violation::Overwritten) } else { Ok(()) }
    }

    fn advance(&self, state: &mut StagedState, rank: usize, op: Op) -> Result<(), Violation> {
        match op {
            Op::Wait { .. } => {}
            Op::WriteTerms { round } => {
                let at = self.slot(rank, round.number);
                self.begin(state, rank, state.terms[at], Flag::Reduced)?;
                let mut values = [None; MAX_WORLD_SIZE];
                for owner in (0..self.world_size).filter(|&owner| owner != rank) {
                    values[owner] =
                        self.vectors.load(&state.memory, rank, round.operation, self.chunk(round, owner))?;
                }
                state.terms[at] = Slot { writing: true, number: round.number, values };
            }
            Op::Sum { round } => {
                let own = self.chunk(round, rank);
                let mut sum = None;
                for from in 0..self.world_size {
                    let term = if from == rank {
                        self.vectors.load(&state.memory, rank, round.operation, own)?
                    } else {
                        self.read(&state.terms, from, round)?.values[rank]
                    };
                    sum = if from == 0 { term } else { add(sum, term)? };
                }
                if let Some(own) = own {
                    state.memory[self.vectors.at(rank, round.operation, own)] = finish(sum);
                }
            }
            Op::WriteResult { round } => {
                let at = self.slot(rank, round.number);
                self.begin(state, rank, state.results[at], Flag::Gathered)?;
                let mut values = [None; MAX_WORLD_SIZE];
                values[rank] = self.vectors.load(&state.memory, rank, round.operation, self.chunk(round, rank))?;
                state.results[at] = Slot { writing: true, number: round.number, values };
            }
            Op::Take { round, owner } => {
                let value = self.read(&state.results, owner, round)?.values[owner];
                if let Some(elem) = self.chunk(round, owner) {
                    state.memory[self.vectors.at(rank, round.operation, elem)] = value;
                }
            }
            Op::Post { flag, number } => {
                let slots = match flag {
                    Flag::Sent => &mut state.terms,
                    Flag::Reduced => &mut state.results,
                    Flag::Gathered => &mut Vec::new(),
                };
                if let Some(slot) = slots.get_mut(self.slot(rank, number)) {
                    slot.writing = false;
                }
                state.ranks[rank].flags[flag as usize] = self.protocol.generation(i16::from(number));
                state.ranks[rank].posted[flag as usize] = number;
            }
        }
        state.ranks[rank].counter += 1;
        if usize::from(state.ranks[rank].counter) == self.programs[rank].len() {
            state.ranks[rank].life = Life::Completed;
            if !self.vectors.are_exact(&state.memory, rank) {
                return Err(Violation::WrongResult);
            }
        }
        Ok(())
    }

    fn read(&self, slots: &[Slot], from: usize, round: Round) -> Result<Slot, Violation> {
        let slot = slots[self.slot(from, round.number)];
        if slot.writing || slot.number != round.number { Err(Violation::WrongGeneration) } else { Ok(slot) }
    }
}

impl Model for CompiledStaged {
    type State = StagedState;
    type Action = Move;

    fn init_states(&self) -> Vec<StagedState> {
        let life = |ops: &Vec<Op>| if ops.is_empty() { Life::Completed } else { Life::Running };
        let flags = [self.protocol.base; 3];
        let empty = Slot { writing: false, number: 0, values: [None; MAX_WORLD_SIZE] };
        let slots = vec![empty; self.world_size * usize::from(self.protocol.slots)];
        let ranks = self.programs.iter().map(|ops| Rank { counter: 0, life: life(ops), flags, posted: [0; 3] });
        vec![StagedState {
            ranks: ranks.collect(),
            terms: slots.clone(),
            results: slots,
            memory: self.vectors.initial(),
            fault: false,
            violation: None,
        }]
    }

    fn actions(&self, state: &StagedState, moves: &mut Vec<Move>) {
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

    fn next_state(&self, last: &StagedState, action: Move) -> Option<StagedState> {
        let mut state = last.clone();
        match action {
            Move::Advance(rank) => {
                let op = self.next_op(last, rank)?;
                state.violation = self.advance(&mut state, rank, op).err();
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
            Property::always(SAFE, |_, state: &StagedState| state.violation.is_none()),
            Property::always(LIVE, |model: &Self, state: &StagedState| {
                !model.is_over(state) || state.ranks.iter().all(|rank| rank.life != Life::Running)
            }),
            Property::always(COMPLETES, |model: &Self, state: &StagedState| {
                !model.is_over(state) || state.fault || Self::someone_is_dead(state) || all_completed(state)
            }),
            Property::sometimes(SUCCESS, |_, state: &StagedState| all_completed(state)),
            Property::sometimes(FAILURE, |_, state: &StagedState| {
                state.ranks.iter().any(|rank| rank.life == Life::Failed)
            }),
        ]
    }
}

fn all_completed(state: &StagedState) -> bool {
    state.ranks.iter().all(|rank| rank.life == Life::Completed)
}
