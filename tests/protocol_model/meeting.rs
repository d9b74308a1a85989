//! The host's meetings, and the operations that need little more: one step, mapped memory, barriers.
//!
//! ```text
//! operation g of rank r                                                      waits before it, peer by peer
//!   call[g % 2]       <- what it was called with
//!   mailbox[turn % 2] <- payload, if the call says so;  arrived = g
//!   compare the peers' call[g % 2]; an error if one differs                    arrived >= g
//!   one step    read the peers' mailbox[turn % 2];  turn += 1
//!   mapped      read and write the own part of all buffers;  done = d
//!               the buffer is the user's again                                 done >= d
//!   else        nothing: a barrier ends here, and staged rounds have slots and flags of their own ([`crate::staged`])
//! ```
//! A run does not end: any operation of the configuration may come next, so sequences of any length are explored. The
//! states are finite because no rank is ever two operations ahead of another (the model would panic), and numbers are
//! counted from the oldest operation under way: it is 1, the next is 2, and 0 is what all ranks have behind them. The
//! ranks cannot see these: they see generations that wrap.
//!
//! Places count as being read until their readers have ended the operation. Buffers are written to by their users as
//! soon as they are given back: after success, and after a mismatch. After any other error they never are.
//!
//! After a death or an error no operation ends but those under way, and every action advances a rank, ends one or sets
//! the fault word; so runs are finite from there on, and before, a rank hangs exactly if none can move.

use stateright::{Model, Property};

use crate::calls::{At, Call, Path, accesses, path};
use crate::protocol::{COMPLETES, FAILURE, LIVE, Life, Move, Noticing, SAFE, SUCCESS, Violation};

/// Faults of the protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MeetingMutant {
    /// One cell for the calls of all operations.
    OneCall,
    /// One place for the payloads of all operations.
    OneMailbox,
    /// Counts as turns the payloads that this rank has put into its mailbox.
    TurnsOfOwnPayloads,
    /// Arrives before its payload is in the mailbox.
    ArriveFirst,
    /// Does not wait before it compares.
    NoArrivedWait,
    /// Compares its call with its successor's only.
    ComparesOnce,
    /// Gives buffers back when it is done with them itself.
    NoDoneWait,
    /// Gives buffers back after any error.
    GivesBackAfterErrors,
    /// Compares generations as plain numbers.
    PlainCompare,
    /// Looks at the fault word only while it waits for `arrived`.
    DoneWaitIgnoresFault,
}

/// One checked configuration.
#[derive(Debug, Clone)]
pub struct Meeting {
    /// What may come next, any time: each rank's call.
    pub operations: Vec<Vec<Call>>,
    /// Generations before they wrap; even, because they choose places, and at least 4.
    pub circle: u8,
    pub deaths: bool,
    pub noticing: Noticing,
    pub mutant: Option<MeetingMutant>,
}

impl Meeting {
    pub fn new(operations: Vec<Vec<Call>>) -> Self {
        Self { operations, circle: 4, deaths: true, noticing: Noticing::Monitor, mutant: None }
    }

    pub fn has_mismatch(&self) -> bool {
        self.operations.iter().any(|calls| calls.iter().any(|call| call.differs(calls[0])))
    }
}

/// What a rank does next in its operation; peers by their distance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Step {
    /// Begin to write the call. It ends with `Arrive`.
    Call,
    /// Begin to write the mailbox. It ends with `Arrive`.
    Fill,
    Arrive,
    /// Wait for a peer and compare.
    Meet(usize),
    ReadMailboxes,
    /// Read mapped memory, and write it: what was read must still be there.
    Begin,
    End,
    Done,
    /// Wait until a peer is done.
    Finish(usize),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Rank {
    life: Life,
    /// The operation that it is in or will begin.
    number: u8,
    step: Step,
    /// Of that operation, as the rank counts.
    generation: u8,
    turn: u8,
    /// What the flags say.
    arrived: u8,
    done: u8,
}

/// A call or a mailbox's place: the operation it was last written in, which ranks cannot see.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
struct Place {
    writing: bool,
    number: u8,
}

/// An element of a registered buffer: the operation it is lent to, or its user's own (0).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
struct Elem {
    is_final: bool,
    number: u8,
}

/// Everything, at one moment.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct MeetingState {
    ranks: Vec<Rank>,
    /// Which operations numbers 1 and 2 are, as far as somebody has begun them.
    operations: [Option<u8>; 2],
    /// By rank, then place.
    calls: Vec<[Place; 2]>,
    mailboxes: Vec<[Place; 2]>,
    /// By owner, then place.
    memory: Vec<Elem>,
    fault: bool,
    pub violation: Option<Violation>,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub enum MeetingMove {
    /// The program has this operation next.
    Next(u8),
    Of(Move),
}

impl Meeting {
    fn world_size(&self) -> usize {
        self.operations[0].len()
    }

    fn has(&self, mutant: MeetingMutant) -> bool {
        self.mutant == Some(mutant)
    }

    /// Which operation `number` is, if somebody has begun it.
    fn chosen(state: &MeetingState, number: u8) -> Option<usize> {
        state.operations[usize::from(number) - 1].map(usize::from)
    }

    /// The calls of operation `number`, which somebody has begun.
    fn calls(&self, state: &MeetingState, number: u8) -> &[Call] {
        &self.operations[Self::chosen(state, number).unwrap()]
    }

    /// The calls of the operation that `rank` is in.
    fn its_calls(&self, state: &MeetingState, rank: usize) -> &[Call] {
        self.calls(state, state.ranks[rank].number)
    }

    fn fills(&self, state: &MeetingState, rank: usize) -> bool {
        let call = self.its_calls(state, rank)[rank];
        call.is_in_mailbox() && call.contributes(rank)
    }

    fn step(state: &MeetingState, rank: usize) -> Option<Step> {
        let Rank { life, number, step, .. } = state.ranks[rank];
        (life == Life::Running && Self::chosen(state, number).is_some()).then_some(step)
    }

    fn buffer<'s>(&self, state: &'s mut MeetingState, owner: usize) -> &'s mut [Elem] {
        let world_size = self.world_size();
        &mut state.memory[owner * world_size..(owner + 1) * world_size]
    }

    fn peer(&self, rank: usize, distance: usize) -> usize {
        (rank + distance) % self.world_size()
    }

    fn reached(&self, seen: u8, wanted: u8) -> bool {
        if self.has(MeetingMutant::PlainCompare) {
            return seen >= wanted;
        }
        (seen + self.circle - wanted) % self.circle < self.circle / 2
    }

    fn has_arrived(&self, state: &MeetingState, rank: usize, peer: usize) -> bool {
        self.reached(state.ranks[peer].arrived, state.ranks[rank].generation)
    }

    fn is_satisfied(&self, state: &MeetingState, rank: usize, step: Step) -> bool {
        match step {
            Step::Meet(_) if self.has(MeetingMutant::NoArrivedWait) => true,
            Step::Meet(distance) => self.has_arrived(state, rank, self.peer(rank, distance)),
            Step::Finish(distance) => self.reached(state.ranks[self.peer(rank, distance)].done, state.ranks[rank].done),
            _ => true,
        }
    }

    /// At its beginning, too, an operation looks at the fault word.
    fn may_give_up(&self, state: &MeetingState, rank: usize) -> bool {
        let Rank { life, step, .. } = state.ranks[rank];
        let late = self.noticing == Noticing::Deadline && !self.is_satisfied(state, rank, step);
        let looks = match step {
            Step::Call | Step::Meet(_) => true,
            Step::Finish(_) => !self.has(MeetingMutant::DoneWaitIgnoresFault),
            _ => false,
        };
        life == Life::Running && looks && (state.fault || late)
    }

    /// Whether somebody is about to begin an operation that nobody has chosen.
    fn is_choice(state: &MeetingState) -> bool {
        let waits = |rank: &Rank| rank.life == Life::Running && Self::chosen(state, rank.number).is_none();
        !state.fault && state.ranks.iter().any(waits)
    }

    fn someone_is_dead(state: &MeetingState) -> bool {
        state.ranks.iter().any(|rank| rank.life == Life::Dead)
    }

    fn may_notice(&self, state: &MeetingState) -> bool {
        self.noticing == Noticing::Monitor && !state.fault && Self::someone_is_dead(state)
    }

    fn is_over(&self, state: &MeetingState) -> bool {
        let can_move = |rank| {
            let advances = Self::step(state, rank).is_some_and(|step| self.is_satisfied(state, rank, step));
            advances || self.may_give_up(state, rank)
        };
        state.violation.is_none()
            && !self.may_notice(state)
            && !Self::is_choice(state)
            && !(0..self.world_size()).any(can_move)
    }

    fn call_at(&self, generation: u8) -> usize {
        if self.has(MeetingMutant::OneCall) { 0 } else { usize::from(generation % 2) }
    }

    fn mailbox_at(&self, turn: u8) -> usize {
        if self.has(MeetingMutant::OneMailbox) { 0 } else { usize::from(turn % 2) }
    }

    /// The place while it is written.
    fn begin(state: &MeetingState, place: Place, number: u8, is_read: bool) -> Result<Place, Violation> {
        let may_read = |rank: &Rank| rank.number <= place.number;
        if place.writing || is_read && state.ranks.iter().any(may_read) {
            return Err(Violation::Overwritten);
        }
        Ok(Place { writing: true, number })
    }

    fn read(place: Place, number: u8) -> Result<(), Violation> {
        if place.writing || place.number != number { Err(Violation::WrongGeneration) } else { Ok(()) }
    }

    /// Whether `peer` has announced something else than `rank`.
    fn differs(&self, state: &MeetingState, rank: usize, peer: usize) -> Result<bool, Violation> {
        let Rank { number, generation, .. } = state.ranks[rank];
        Self::read(state.calls[peer][self.call_at(generation)], number)?;
        let calls = self.calls(state, number);
        Ok(calls[rank].differs(calls[peer]))
    }

    fn fail(&self, state: &mut MeetingState, rank: usize, is_mismatch: bool) {
        state.ranks[rank].life = Life::Failed;
        state.fault = true;
        if is_mismatch || self.has(MeetingMutant::GivesBackAfterErrors) {
            self.buffer(state, rank).fill(Elem::default());
        }
    }

    fn give_up(&self, state: &mut MeetingState, rank: usize) -> Result<(), Violation> {
        let mut is_mismatch = false;
        if matches!(state.ranks[rank].step, Step::Meet(_)) {
            for peer in (1..self.world_size()).map(|distance| self.peer(rank, distance)) {
                if self.has_arrived(state, rank, peer) {
                    is_mismatch |= self.differs(state, rank, peer)?;
                }
            }
        }
        self.fail(state, rank, is_mismatch);
        Ok(())
    }

    fn advance(&self, state: &mut MeetingState, rank: usize, step: Step) -> Result<(), Violation> {
        let next = match step {
            Step::Call => Some(self.announce(state, rank)?),
            Step::Fill => Some(self.fill(state, rank)?),
            Step::Arrive => {
                state.calls[rank].iter_mut().chain(&mut state.mailboxes[rank]).for_each(|place| place.writing = false);
                state.ranks[rank].arrived = state.ranks[rank].generation;
                let still_fills = self.has(MeetingMutant::ArriveFirst) && self.fills(state, rank);
                Some(if still_fills { Step::Fill } else { Step::Meet(1) })
            }
            Step::Meet(distance) => {
                let compares = distance == 1 || !self.has(MeetingMutant::ComparesOnce);
                if compares && self.differs(state, rank, self.peer(rank, distance))? {
                    self.fail(state, rank, true);
                    return Ok(());
                }
                match path(self.its_calls(state, rank)) {
                    _ if distance + 1 < self.world_size() => Some(Step::Meet(distance + 1)),
                    Path::OneStep => Some(Step::ReadMailboxes),
                    Path::Mapped => Some(Step::Begin),
                    Path::Else => None,
                }
            }
            Step::ReadMailboxes => {
                let Rank { number, turn, .. } = state.ranks[rank];
                let call = self.its_calls(state, rank)[rank];
                for peer in (0..self.world_size()).filter(|&peer| peer != rank && call.contributes(peer)) {
                    Self::read(state.mailboxes[peer][self.mailbox_at(turn)], number)?;
                }
                None
            }
            Step::Begin => {
                self.load(state, rank)?;
                Some(Step::End)
            }
            Step::End => {
                self.load(state, rank)?;
                self.store(state, rank)?;
                Some(Step::Done)
            }
            Step::Done => {
                state.ranks[rank].done = (state.ranks[rank].done + 1) % self.circle;
                (!self.has(MeetingMutant::NoDoneWait)).then_some(Step::Finish(1))
            }
            Step::Finish(distance) => (distance + 1 < self.world_size()).then_some(Step::Finish(distance + 1)),
        };
        match next {
            Some(next) => state.ranks[rank].step = next,
            None => self.complete(state, rank)?,
        }
        Ok(())
    }

    fn announce(&self, state: &mut MeetingState, rank: usize) -> Result<Step, Violation> {
        let Rank { number, generation, .. } = state.ranks[rank];
        let generation = (generation + 1) % self.circle;
        state.ranks[rank].generation = generation;
        let at = self.call_at(generation);
        state.calls[rank][at] = Self::begin(state, state.calls[rank][at], number, true)?;
        if self.its_calls(state, rank)[rank].registered {
            self.buffer(state, rank).fill(Elem { is_final: false, number });
        }
        let fills = self.fills(state, rank) && !self.has(MeetingMutant::ArriveFirst);
        Ok(if fills { Step::Fill } else { Step::Arrive })
    }

    fn fill(&self, state: &mut MeetingState, rank: usize) -> Result<Step, Violation> {
        let Rank { number, turn, .. } = state.ranks[rank];
        let at = self.mailbox_at(turn);
        let before = state.mailboxes[rank][at];
        // Nobody reads it if not all have their payload in mailboxes.
        let is_read = before.number > 0 && path(self.calls(state, before.number)) == Path::OneStep;
        state.mailboxes[rank][at] = Self::begin(state, before, number, is_read)?;
        if self.has(MeetingMutant::ArriveFirst) {
            state.mailboxes[rank][at].writing = false;
            return Ok(Step::Meet(1));
        }
        Ok(Step::Arrive)
    }

    fn load(&self, state: &MeetingState, rank: usize) -> Result<(), Violation> {
        let input = Elem { is_final: false, number: state.ranks[rank].number };
        let (reads, _) = self.accesses(state, rank, rank);
        let is_there = reads.iter().all(|&(owner, elem)| state.memory[owner * self.world_size() + elem] == input);
        if is_there { Ok(()) } else { Err(Violation::WrongValue) }
    }

    fn store(&self, state: &mut MeetingState, rank: usize) -> Result<(), Violation> {
        let input = Elem { is_final: false, number: state.ranks[rank].number };
        let (_, writes) = self.accesses(state, rank, rank);
        for (owner, elem) in writes {
            let elem = &mut self.buffer(state, owner)[elem];
            if *elem != input {
                return Err(Violation::Overwritten);
            }
            elem.is_final = true;
        }
        Ok(())
    }

    /// What `peer` accesses in the operation of `rank`.
    fn accesses(&self, state: &MeetingState, rank: usize, peer: usize) -> (Vec<At>, Vec<At>) {
        accesses(self.its_calls(state, rank)[rank].kind, peer, self.world_size())
    }

    /// The operation returns success, and the buffer is its user's.
    fn complete(&self, state: &mut MeetingState, rank: usize) -> Result<(), Violation> {
        let number = state.ranks[rank].number;
        let calls = self.its_calls(state, rank);
        let path = path(calls);
        if calls.iter().any(|theirs| theirs.differs(calls[rank])) {
            return Err(Violation::WrongResult);
        }
        let is_turn = match self.mutant {
            Some(MeetingMutant::TurnsOfOwnPayloads) => self.fills(state, rank),
            _ => path == Path::OneStep,
        };
        if path == Path::Mapped {
            let writes = (0..self.world_size()).flat_map(|peer| self.accesses(state, rank, peer).1);
            let into_mine: Vec<At> = writes.filter(|(owner, _)| *owner == rank).collect();
            let buffer = self.buffer(state, rank);
            if into_mine.iter().any(|&(_, elem)| buffer[elem] != (Elem { is_final: true, number })) {
                return Err(Violation::WrongResult);
            }
        }
        self.buffer(state, rank).fill(Elem::default());
        let it = &mut state.ranks[rank];
        (it.number, it.step, it.turn) = (number + 1, Step::Call, (it.turn + u8::from(is_turn)) % 2);
        if state.ranks.iter().all(|rank| rank.number > 1) {
            Self::renumber(state);
        }
        Ok(())
    }

    /// All ranks have number 1 behind them: number 2 is the oldest now.
    fn renumber(state: &mut MeetingState) {
        state.operations = [state.operations[1], None];
        state.ranks.iter_mut().for_each(|rank| rank.number -= 1);
        for place in state.calls.iter_mut().chain(&mut state.mailboxes).flatten() {
            place.number = place.number.saturating_sub(1);
        }
        state.memory.iter_mut().for_each(|elem| elem.number = elem.number.saturating_sub(1));
    }
}

impl Model for Meeting {
    type State = MeetingState;
    type Action = MeetingMove;

    fn init_states(&self) -> Vec<MeetingState> {
        let world_size = self.world_size();
        let rank =
            Rank { life: Life::Running, number: 1, step: Step::Call, generation: 0, turn: 0, arrived: 0, done: 0 };
        vec![MeetingState {
            ranks: vec![rank; world_size],
            operations: [None; 2],
            calls: vec![[Place::default(); 2]; world_size],
            mailboxes: vec![[Place::default(); 2]; world_size],
            memory: vec![Elem::default(); world_size * world_size],
            fault: false,
            violation: None,
        }]
    }

    fn actions(&self, state: &MeetingState, moves: &mut Vec<MeetingMove>) {
        if state.violation.is_some() {
            return;
        }
        if Self::is_choice(state) {
            moves.extend((0..self.operations.len()).map(|operation| MeetingMove::Next(operation as u8)));
        }
        let may_die = self.deaths && !Self::someone_is_dead(state);
        for rank in 0..self.world_size() {
            if Self::step(state, rank).is_some_and(|step| self.is_satisfied(state, rank, step)) {
                moves.push(MeetingMove::Of(Move::Advance(rank)));
            }
            if self.may_give_up(state, rank) {
                moves.push(MeetingMove::Of(Move::GiveUp(rank)));
            }
            if may_die && state.ranks[rank].life == Life::Running {
                moves.push(MeetingMove::Of(Move::Die(rank)));
            }
        }
        if self.may_notice(state) {
            moves.push(MeetingMove::Of(Move::Notice));
        }
    }

    fn next_state(&self, last: &MeetingState, action: MeetingMove) -> Option<MeetingState> {
        let mut state = last.clone();
        match action {
            MeetingMove::Next(operation) => {
                let number = state.operations.iter().position(Option::is_none)?;
                state.operations[number] = Some(operation);
            }
            MeetingMove::Of(Move::Advance(rank)) => {
                let step = Self::step(last, rank)?;
                state.violation = self.advance(&mut state, rank, step).err();
            }
            MeetingMove::Of(Move::GiveUp(rank)) => state.violation = self.give_up(&mut state, rank).err(),
            MeetingMove::Of(Move::Die(rank)) => state.ranks[rank].life = Life::Dead,
            MeetingMove::Of(Move::Notice) => state.fault = true,
        }
        Some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always(SAFE, |_, state: &MeetingState| state.violation.is_none()),
            Property::always(LIVE, |model: &Self, state: &MeetingState| {
                !model.is_over(state) || state.ranks.iter().all(|rank| rank.life != Life::Running)
            }),
            Property::always(COMPLETES, |model: &Self, state: &MeetingState| {
                !model.is_over(state) || state.fault || Self::someone_is_dead(state)
            }),
            // Operations of every path, and then there are more.
            Property::sometimes(SUCCESS, |_, state: &MeetingState| {
                let has_gone_on = |rank: &Rank| rank.arrived > 2 && rank.done > 0 && rank.turn > 0;
                !state.fault && !Self::someone_is_dead(state) && state.ranks.iter().all(has_gone_on)
            }),
            Property::sometimes(FAILURE, |_, state: &MeetingState| {
                state.ranks.iter().any(|rank| rank.life == Life::Failed)
            }),
        ]
    }
}
