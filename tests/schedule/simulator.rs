//! Symbolic execution of a plan.
//!
//! An element's value is the list of ranks whose terms are in it, in the order of their additions, so a sum with a term
//! missing, doubled, misplaced or in another order is a different value.
//!
//! Every rank runs its own list of operations; a chooser decides whose operation is next, so any interleaving can
//! occur. Writing a slot and posting it are two operations, and so are reading a slot and giving it back.
//!
//! ```text
//! sender     [credit] Write ──── Post
//! slot         Empty ──▶ Writing ──▶ Full ──▶ Reading ──▶ Empty
//! receiver                     [posted] Read ──── Credit
//! ```

use std::collections::BTreeMap;

use annulus::schedule::{Action, Algorithm, Collective, Phase, Schedule, Span, Step, Transfer};

/// A schedule written out, so that it can be compared and damaged.
#[derive(Debug, Clone)]
pub struct Plan {
    pub collective: Collective,
    pub algorithm: Algorithm,
    pub world_size: u32,
    pub len_elems: usize,
    pub shards: Vec<Span>,
    /// Per rank, in order.
    pub ranks: Vec<Vec<Planned>>,
}

/// A step and the round it belongs to.
#[derive(Debug, Clone, PartialEq)]
pub struct Planned {
    pub round: u64,
    /// The rank's own chunk in this round.
    pub own: Span,
    pub step: Step,
}

impl Plan {
    pub fn of(schedule: &Schedule) -> Self {
        let ranks = (0..schedule.world_size()).map(|rank| {
            let planned = |round| {
                let own = schedule.chunk(round, rank);
                schedule.steps(rank, round).map(move |step| Planned { round, own, step })
            };
            (0..schedule.rounds()).flat_map(planned).collect()
        });
        Self {
            collective: schedule.collective(),
            algorithm: schedule.algorithm(),
            world_size: schedule.world_size(),
            len_elems: schedule.len_elems(),
            shards: (0..schedule.world_size()).map(|owner| schedule.shard(owner)).collect(),
            ranks: ranks.collect(),
        }
    }
}

/// How ranks execute: what the plan leaves to the executor.
#[derive(Debug, Clone, Copy)]
pub struct Machine {
    /// Staging slots per link.
    pub slots: usize,
    /// Reduce from the own slot straight into the next rank's, and give the own slot back only then.
    pub cut_through: bool,
    /// Wait for a credit before writing. A machine that does not is a mutant.
    pub waits_for_credit: bool,
}

/// Why a run is wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Violation {
    /// No rank can go on, and not all are done.
    Deadlock,
    /// A slot was written before its receiver gave it back.
    Overwritten,
    /// An element was read that holds nothing.
    Unwritten,
    /// What arrived is not the piece that was expected.
    WrongPiece,
    /// A term was added twice.
    TermTwice,
    /// A finished value was added to, or finished again.
    FinishedTwice,
    /// An action that the algorithm does not have, or an action without data.
    WrongAction,
    /// A span outside of the vector, a peer outside of the world.
    OutOfRange,
    /// A transfer was posted that nobody took.
    Untaken,
    /// The result lacks terms, or has those of other ranks.
    WrongTerms,
    /// The result was never finished (scaled).
    Unfinished,
    /// The two sides of a link do not list the same transfers.
    Mispaired,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Value {
    pub elem: usize,
    /// Ranks, in the order of the additions.
    pub terms: Vec<u8>,
    pub finished: bool,
}

/// The memory of every rank: `[rank][elem]`.
pub type Memory = Vec<Vec<Option<Value>>>;

#[derive(Debug)]
enum Slot {
    Empty,
    Writing(Vec<Value>),
    Full(Vec<Value>),
    Reading,
}

struct Link {
    slots: Vec<Slot>,
    written: usize,
    posted: usize,
    read: usize,
    credited: usize,
}

#[derive(Debug, Clone, Copy)]
enum Op {
    /// Wait for a credit, then fill the slot: from memory, or with what the last `Read` made.
    Write {
        to: Transfer,
        forwards: bool,
    },
    Post {
        to: u32,
    },
    /// Wait for the post, then act on what the slot holds.
    Read {
        from: Transfer,
        action: Action,
        own: Span,
    },
    Credit {
        from: u32,
    },
    /// Finish without a transfer.
    FinishAlone {
        own: Span,
    },
}

/// Checks a plan without running it: the k-th send of a link is the k-th receive of it, in the same step.
pub fn check_pairing(plan: &Plan) -> Result<(), Violation> {
    let mut links: BTreeMap<(u32, u32), [Vec<_>; 2]> = BTreeMap::new();
    for (rank, planned) in (0..).zip(&plan.ranks) {
        for Planned { round, step, .. } in planned {
            let place = (*round, step.index, step.phase);
            if let Some(Transfer { peer, chunk, span }) = step.send {
                links.entry((rank, peer)).or_default()[0].push((place, chunk, span));
            }
            if let Some(Transfer { peer, chunk, span }) = step.recv {
                links.entry((peer, rank)).or_default()[1].push((place, chunk, span));
            }
        }
    }
    let paired = links.values().all(|[sends, recvs]| sends == recvs);
    if paired { Ok(()) } else { Err(Violation::Mispaired) }
}

/// Runs the plan to its end. `choose(n)` picks one of `n` ranks that can go on.
pub fn run(plan: &Plan, machine: Machine, mut choose: impl FnMut(usize) -> usize) -> Result<Memory, Violation> {
    let mut run = Run::new(plan, machine);
    let programs: Vec<Vec<Op>> = plan.ranks.iter().map(|planned| compile(planned, machine)).collect();
    let mut counters = vec![0; programs.len()];
    loop {
        let ready: Vec<usize> = (0..programs.len())
            .filter(|&rank| programs[rank].get(counters[rank]).is_some_and(|op| run.is_ready(rank as u32, op)))
            .collect();
        if ready.is_empty() {
            break;
        }
        let rank = ready[choose(ready.len())];
        run.execute(rank as u32, programs[rank][counters[rank]])?;
        counters[rank] += 1;
    }
    if (0..programs.len()).any(|rank| counters[rank] < programs[rank].len()) {
        return Err(Violation::Deadlock);
    }
    run.check_result()?;
    Ok(run.memory)
}

fn compile(planned: &[Planned], machine: Machine) -> Vec<Op> {
    let mut ops = Vec::new();
    let mut held = Vec::new();
    let mut forwarded = false;
    for (place, Planned { round, own, step }) in planned.iter().enumerate() {
        if let Some(to) = step.send
            && !std::mem::take(&mut forwarded)
        {
            ops.extend([Op::Write { to, forwards: false }, Op::Post { to: to.peer }]);
        }
        match (step.recv, step.action) {
            (Some(from), Some(action)) => {
                ops.push(Op::Read { from, action, own: *own });
                held.push(from.peer);
                if action == Action::Hold {
                    continue;
                }
                let next = planned.get(place + 1).filter(|next| machine.cut_through && next.round == *round);
                if let Some(to) = next.and_then(|next| next.step.send).filter(|to| to.chunk == from.chunk) {
                    forwarded = true;
                    ops.extend([Op::Write { to, forwards: true }, Op::Post { to: to.peer }]);
                }
                ops.extend(held.drain(..).map(|from| Op::Credit { from }));
            }
            (None, Some(_)) => ops.push(Op::FinishAlone { own: *own }),
            _ => {}
        }
    }
    ops
}

struct Run<'p> {
    plan: &'p Plan,
    machine: Machine,
    memory: Memory,
    links: BTreeMap<(u32, u32), Link>,
    /// What every rank holds until its `Finish`, by sender.
    held: Vec<BTreeMap<u32, Vec<Value>>>,
    /// What every rank's last `Read` made.
    carried: Vec<Vec<Value>>,
    finished: Vec<bool>,
}

impl<'p> Run<'p> {
    fn new(plan: &'p Plan, machine: Machine) -> Self {
        let value = |elem, rank: u32, finished| Some(Value { elem, terms: vec![rank as u8], finished });
        let initial = |rank: u32, elem| match plan.collective {
            Collective::AllReduce | Collective::ReduceScatter => value(elem, rank, false),
            Collective::AllGather if holds(plan.shards[rank as usize], elem) => value(elem, rank, true),
            Collective::Broadcast { root } if rank == root => value(elem, rank, true),
            _ => None,
        };
        let world = 0..plan.world_size;
        Self {
            plan,
            machine,
            memory: world.map(|rank| (0..plan.len_elems).map(|elem| initial(rank, elem)).collect()).collect(),
            links: BTreeMap::new(),
            held: vec![BTreeMap::new(); plan.world_size as usize],
            carried: vec![Vec::new(); plan.world_size as usize],
            finished: vec![false; plan.len_elems],
        }
    }

    fn link(&mut self, from: u32, to: u32) -> &mut Link {
        let slots = self.machine.slots;
        self.links.entry((from, to)).or_insert_with(|| Link {
            slots: (0..slots).map(|_| Slot::Empty).collect(),
            written: 0,
            posted: 0,
            read: 0,
            credited: 0,
        })
    }

    fn is_ready(&self, rank: u32, op: &Op) -> bool {
        match *op {
            Op::Write { to, .. } if self.machine.waits_for_credit => {
                self.links.get(&(rank, to.peer)).is_none_or(|link| link.written - link.credited < self.machine.slots)
            }
            Op::Read { from, .. } => self.links.get(&(from.peer, rank)).is_some_and(|link| link.posted > link.read),
            Op::Write { .. } | Op::Post { .. } | Op::Credit { .. } | Op::FinishAlone { .. } => true,
        }
    }

    fn execute(&mut self, rank: u32, op: Op) -> Result<(), Violation> {
        let own_rank = rank as usize;
        let slots = self.machine.slots;
        match op {
            Op::Write { to, forwards } => {
                if to.peer >= self.plan.world_size || to.peer == rank {
                    return Err(Violation::OutOfRange);
                }
                let values = if forwards { self.carried[own_rank].clone() } else { self.load(rank, to.span)? };
                let link = self.link(rank, to.peer);
                let slot = &mut link.slots[link.written % slots];
                if !matches!(slot, Slot::Empty) {
                    return Err(Violation::Overwritten);
                }
                *slot = Slot::Writing(values);
                link.written += 1;
            }
            Op::Post { to } => {
                let link = self.link(rank, to);
                let slot = &mut link.slots[link.posted % slots];
                let Slot::Writing(values) = std::mem::replace(slot, Slot::Empty) else {
                    return Err(Violation::Overwritten);
                };
                *slot = Slot::Full(values);
                link.posted += 1;
            }
            Op::Read { from, action, own } => {
                let link = self.link(from.peer, rank);
                let slot = &mut link.slots[link.read % slots];
                let Slot::Full(received) = std::mem::replace(slot, Slot::Reading) else {
                    return Err(Violation::Unwritten);
                };
                link.read += 1;
                self.act(rank, from, received, action, own)?;
            }
            Op::Credit { from } => {
                let link = self.link(from, rank);
                let slot = &mut link.slots[link.credited % slots];
                if !matches!(slot, Slot::Reading) {
                    return Err(Violation::Overwritten);
                }
                *slot = Slot::Empty;
                link.credited += 1;
            }
            Op::FinishAlone { own } => {
                let value = self.load(rank, own)?;
                let value = self.finish(value)?;
                self.store(rank, own, value)?;
            }
        }
        Ok(())
    }

    fn act(
        &mut self,
        rank: u32,
        from: Transfer,
        received: Vec<Value>,
        action: Action,
        own: Span,
    ) -> Result<(), Violation> {
        if received.len() != from.span.len_elems {
            return Err(Violation::WrongPiece);
        }
        let made = match (action, self.plan.algorithm) {
            (Action::Copy, _) => received,
            (Action::Reduce, Algorithm::Ring) => add(received, &self.load(rank, from.span)?)?,
            (Action::Hold | Action::Finish, _) if from.span != own => return Err(Violation::WrongPiece),
            (Action::Hold, Algorithm::Direct) => {
                if self.held[rank as usize].insert(from.peer, received).is_some() {
                    return Err(Violation::TermTwice);
                }
                return Ok(());
            }
            (Action::Finish, Algorithm::Ring) => {
                let sum = add(received, &self.load(rank, own)?)?;
                self.finish(sum)?
            }
            (Action::Finish, Algorithm::Direct) => {
                let mut terms = std::mem::take(&mut self.held[rank as usize]);
                let twice = terms.insert(from.peer, received).is_some();
                if twice | terms.insert(rank, self.load(rank, own)?).is_some() {
                    return Err(Violation::TermTwice);
                }
                let mut terms = terms.into_values();
                let first = terms.next().unwrap_or_default();
                let sum = terms.try_fold(first, |sum, term| add(sum, &term))?;
                self.finish(sum)?
            }
            (Action::Reduce | Action::Hold, _) => return Err(Violation::WrongAction),
        };
        self.carried[rank as usize].clone_from(&made);
        // A cut-through executor keeps partial sums out of the caller's memory.
        if action == Action::Reduce && self.machine.cut_through { Ok(()) } else { self.store(rank, from.span, made) }
    }

    fn load(&self, rank: u32, span: Span) -> Result<Vec<Value>, Violation> {
        let memory =
            self.memory[rank as usize].get(span.offset_elems..span.end_elems()).ok_or(Violation::OutOfRange)?;
        memory.iter().cloned().collect::<Option<_>>().ok_or(Violation::Unwritten)
    }

    fn store(&mut self, rank: u32, span: Span, values: Vec<Value>) -> Result<(), Violation> {
        let memory =
            self.memory[rank as usize].get_mut(span.offset_elems..span.end_elems()).ok_or(Violation::OutOfRange)?;
        for ((elem, place), value) in (span.offset_elems..).zip(memory).zip(values) {
            if value.elem != elem {
                return Err(Violation::WrongPiece);
            }
            *place = Some(value);
        }
        Ok(())
    }

    fn finish(&mut self, mut values: Vec<Value>) -> Result<Vec<Value>, Violation> {
        for value in &mut values {
            if std::mem::replace(&mut self.finished[value.elem], true) {
                return Err(Violation::FinishedTwice);
            }
            value.finished = true;
        }
        Ok(values)
    }

    fn check_result(&self) -> Result<(), Violation> {
        if self.links.values().any(|link| link.credited != link.written) {
            return Err(Violation::Untaken);
        }
        for (rank, memory) in (0..).zip(&self.memory) {
            for (elem, value) in memory.iter().enumerate() {
                let owner =
                    self.plan.shards.iter().position(|&shard| holds(shard, elem)).ok_or(Violation::OutOfRange)?;
                let expected: Vec<u8> = match self.plan.collective {
                    Collective::ReduceScatter if owner != rank => continue,
                    Collective::AllReduce | Collective::ReduceScatter => (0..self.plan.world_size as u8).collect(),
                    Collective::AllGather => vec![owner as u8],
                    Collective::Broadcast { root } => vec![root as u8],
                };
                let value = value.as_ref().ok_or(Violation::Unwritten)?;
                let mut terms = value.terms.clone();
                terms.sort_unstable();
                if terms != expected {
                    return Err(Violation::WrongTerms);
                }
                if !value.finished {
                    return Err(Violation::Unfinished);
                }
            }
        }
        Ok(())
    }
}

fn holds(span: Span, elem: usize) -> bool {
    (span.offset_elems..span.end_elems()).contains(&elem)
}

/// `left + right`, in that order.
fn add(mut left: Vec<Value>, right: &[Value]) -> Result<Vec<Value>, Violation> {
    if left.len() != right.len() {
        return Err(Violation::WrongPiece);
    }
    for (left, right) in left.iter_mut().zip(right) {
        if left.elem != right.elem {
            return Err(Violation::WrongPiece);
        }
        if left.finished || right.finished {
            return Err(Violation::FinishedTwice);
        }
        if left.terms.iter().any(|term| right.terms.contains(term)) {
            return Err(Violation::TermTwice);
        }
        left.terms.extend(&right.terms);
    }
    Ok(left)
}

/// Choosers with a seed: even-handed, or in love with one rank, so that it runs as far ahead as the credits let it (or,
/// the other way, lags as far behind as it can).
pub fn chooser(seed: u64) -> impl FnMut(usize) -> usize {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    move |ready| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        match seed % 4 {
            0 => 0,
            1 => ready - 1,
            _ => (state >> 33) as usize % ready,
        }
    }
}

/// Phases in the order they may appear in a round.
pub fn phase_order(phase: Phase) -> u8 {
    match phase {
        Phase::Broadcast | Phase::ReduceScatter => 0,
        Phase::AllGather => 1,
    }
}
