//! What each rank executes: a schedule's steps, taken apart into waits, writes, posts, reads and credits.

use annulus::schedule::{Action, Step};

use crate::protocol::{Mutant, Protocol};
use crate::value::{Elem, MAX_WORLD_SIZE, elem};

/// The `ordinal`-th transfer of the link `from -> to`.
#[derive(Debug, Clone, Copy)]
pub struct Place {
    pub from: u8,
    pub to: u8,
    pub ordinal: u8,
    /// What the flags will say; `ordinal` is hidden from the ranks.
    pub generation: u8,
}

#[derive(Debug, Clone)]
pub enum Op {
    /// Wait for the credit, begin to write: from memory, or what the last `Read` made.
    Write { place: Place, operation: u8, elem: Elem, forwards: bool },
    /// End of the write.
    Post { place: Place },
    /// Wait for the post; no more. Mutants only.
    Await { place: Place },
    /// Wait for the post, then act. `held`: the places that a `Finish` adds.
    Read { place: Place, operation: u8, elem: Elem, action: Action, held: Vec<Place> },
    /// Give the slot back.
    Credit { place: Place },
    /// Finish without a transfer.
    FinishAlone { operation: u8, elem: Elem },
}

pub struct Program {
    pub ops: Vec<Op>,
    /// Transfers so far, by peer.
    sent: [u8; MAX_WORLD_SIZE],
    received: [u8; MAX_WORLD_SIZE],
    /// The same since the generations last started over.
    sent_before: [u8; MAX_WORLD_SIZE],
    received_before: [u8; MAX_WORLD_SIZE],
}

impl Program {
    pub fn new(protocol: &Protocol, rank: u32) -> Self {
        let none = [0; MAX_WORLD_SIZE];
        let mut program =
            Self { ops: Vec::new(), sent: none, received: none, sent_before: none, received_before: none };
        for (operation, schedule) in (0..).zip(&protocol.operations) {
            if protocol.mutant == Some(Mutant::GenerationsRestart) {
                (program.sent_before, program.received_before) = (program.sent, program.received);
            }
            for round in 0..schedule.rounds() {
                let steps: Vec<Step> = schedule.steps(rank, round).collect();
                program.round(protocol, rank, operation, elem(schedule.chunk(round, rank)), &steps);
            }
        }
        program
    }

    fn round(&mut self, protocol: &Protocol, rank: u32, operation: u8, own: Elem, steps: &[Step]) {
        let mut held = Vec::new();
        let mut forwarded = false;
        for (index, step) in steps.iter().enumerate() {
            if let Some(send) = step.send
                && !std::mem::take(&mut forwarded)
            {
                self.send(protocol, rank, send.peer, operation, elem(send.span), false);
            }
            let Some(action) = step.action else { continue };
            let Some(recv) = step.recv else {
                self.ops.push(Op::FinishAlone { operation, elem: own });
                continue;
            };
            let peer = recv.peer as usize;
            let (ordinal, before) = (self.received[peer], self.received_before[peer]);
            self.received[peer] += 1;
            let generation = protocol.generation(ordinal - before);
            let place = Place { from: recv.peer as u8, to: rank as u8, ordinal, generation };
            let finished = if action == Action::Finish { held.clone() } else { Vec::new() };
            let read = Op::Read { place, operation, elem: elem(recv.span), action, held: finished };
            if protocol.mutant == Some(Mutant::CreditBeforeRead) {
                self.ops.extend([Op::Await { place }, Op::Credit { place }, read]);
                continue;
            }
            self.ops.push(read);
            held.push(place);
            if action == Action::Hold {
                continue;
            }
            let next = steps.get(index + 1).and_then(|next| next.send);
            if let Some(next) = next.filter(|next| protocol.cut_through && next.chunk == recv.chunk) {
                forwarded = true;
                self.send(protocol, rank, next.peer, operation, elem(next.span), true);
            }
            self.ops.extend(held.drain(..).map(|place| Op::Credit { place }));
        }
    }

    fn send(&mut self, protocol: &Protocol, rank: u32, peer: u32, operation: u8, elem: Elem, forwards: bool) {
        let (ordinal, before) = (self.sent[peer as usize], self.sent_before[peer as usize]);
        self.sent[peer as usize] += 1;
        let place =
            Place { from: rank as u8, to: peer as u8, ordinal, generation: protocol.generation(ordinal - before) };
        let mut ops = [Op::Write { place, operation, elem, forwards }, Op::Post { place }];
        if protocol.mutant == Some(Mutant::PostBeforeWrite) {
            ops.reverse();
        }
        self.ops.extend(ops);
    }
}
