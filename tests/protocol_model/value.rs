//! What moves: symbolic elements, one per rank and place of an operation's vector, and the results that are exact.

use annulus::schedule::{Algorithm, Collective, Schedule, Span};

use crate::protocol::Violation;

pub const MAX_WORLD_SIZE: usize = 4;

/// The one element of a chunk, by its place in the vector; none if the chunk is empty.
pub type Elem = Option<u8>;

pub fn elem(span: Span) -> Elem {
    (!span.is_empty()).then_some(span.offset_elems as u8)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Value {
    elem: u8,
    finished: bool,
    /// Ranks plus one, in the order of the additions; 0 ends.
    terms: [u8; MAX_WORLD_SIZE],
}

fn terms(ranks: impl IntoIterator<Item = u32>) -> [u8; MAX_WORLD_SIZE] {
    let mut terms = [0; MAX_WORLD_SIZE];
    for (term, rank) in terms.iter_mut().zip(ranks) {
        *term = rank as u8 + 1;
    }
    terms
}

/// `left + right`, in that order.
pub fn add(left: Option<Value>, right: Option<Value>) -> Result<Option<Value>, Violation> {
    match (left, right) {
        (Some(left), Some(right)) => left.plus(right).map(Some).ok_or(Violation::WrongValue),
        (None, None) => Ok(None),
        _ => Err(Violation::WrongValue),
    }
}

/// Scales, once.
pub fn finish(value: Option<Value>) -> Option<Value> {
    value.map(|value| Value { finished: true, ..value })
}

impl Value {
    /// None if that is no sum of two unfinished values of one element.
    fn plus(mut self, right: Value) -> Option<Value> {
        let len = self.terms.iter().position(|&term| term == 0)?;
        let right_len = right.terms.iter().position(|&term| term == 0).unwrap_or(MAX_WORLD_SIZE);
        let sound = self.elem == right.elem && !self.finished && !right.finished;
        self.terms.get_mut(len..len + right_len)?.copy_from_slice(&right.terms[..right_len]);
        sound.then_some(self)
    }
}

/// The ranks' memory: of every rank, the vectors of all operations, in place.
pub type Memory = Vec<Option<Value>>;

/// Where the vectors of a sequence of operations lie in a [`Memory`], and what they hold before and after.
pub struct Vectors {
    operations: Vec<Schedule>,
    offsets: Vec<usize>,
    rank_elems: usize,
}

impl Vectors {
    pub fn new(operations: Vec<Schedule>) -> Self {
        let mut rank_elems = 0;
        let mut offsets = Vec::new();
        for operation in &operations {
            offsets.push(rank_elems);
            rank_elems += operation.len_elems();
        }
        Self { operations, offsets, rank_elems }
    }

    pub fn at(&self, rank: usize, operation: u8, elem: u8) -> usize {
        rank * self.rank_elems + self.offsets[usize::from(operation)] + usize::from(elem)
    }

    pub fn load(&self, memory: &Memory, rank: usize, operation: u8, elem: Elem) -> Result<Option<Value>, Violation> {
        let Some(elem) = elem else { return Ok(None) };
        memory[self.at(rank, operation, elem)].map(Some).ok_or(Violation::WrongValue)
    }

    /// Every rank's inputs.
    pub fn initial(&self) -> Memory {
        let world_size = self.operations[0].world_size();
        let mut memory = vec![None; world_size as usize * self.rank_elems];
        for (operation, schedule) in (0..).zip(&self.operations) {
            for rank in 0..world_size {
                let shard = schedule.shard(rank);
                let (mine, finished) = match schedule.collective() {
                    Collective::AllReduce | Collective::ReduceScatter => (0..schedule.len_elems(), false),
                    // Of a broadcast, the root owns everything and the others nothing.
                    Collective::AllGather | Collective::Broadcast { .. } => {
                        (shard.offset_elems..shard.end_elems(), true)
                    }
                };
                for elem in mine {
                    let value = Value { elem: elem as u8, finished, terms: terms([rank]) };
                    memory[self.at(rank as usize, operation, elem as u8)] = Some(value);
                }
            }
        }
        memory
    }

    /// Whether `rank` holds the exact results of all operations, the order of the additions included.
    pub fn are_exact(&self, memory: &Memory, rank: usize) -> bool {
        (0..).zip(&self.operations).all(|(operation, schedule)| {
            let world_size = schedule.world_size();
            (0..world_size).all(|owner| {
                let terms = match (schedule.collective(), schedule.algorithm()) {
                    (Collective::ReduceScatter, _) if owner as usize != rank => return true,
                    (Collective::AllGather | Collective::Broadcast { .. }, _) => terms([owner]),
                    (_, Algorithm::Direct) => terms(0..world_size),
                    (_, Algorithm::Ring) => terms((1..=world_size).map(|hop| (owner + hop) % world_size)),
                };
                let shard = schedule.shard(owner);
                (shard.offset_elems..shard.end_elems()).all(|elem| {
                    let exact = Value { elem: elem as u8, finished: true, terms };
                    memory[self.at(rank, operation, elem as u8)] == Some(exact)
                })
            })
        })
    }
}
