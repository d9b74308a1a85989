//! The race detector: vector clocks with scopes.
//!
//! Two accesses conflict if they overlap and one writes. Conflicting accesses of different threads are a data race unless
//! one happens before the other, or they are *morally strong*: both strong, the same bytes, and each one's scope includes
//! the other's thread (PTX ISA 9.0, 8.7). Happens-before comes from
//! - a release pattern (release store or atomic; or fence, then a strong store) that an acquire pattern (acquire load or
//!   atomic; or a strong load, then a fence) of another thread has read from, if both patterns' scopes include both threads;
//!   atomics in between carry it on, plain stores end it;
//! - `bar.sync` among the threads of a block, `bar.warp.sync` among those of a warp.
//!
//! Each thread has a clock, raised at every release. An access remembers its thread's clock and is before all threads that
//! know that value. Shadow state is kept for words of 4 bytes with a mask of the bytes touched.

use std::collections::HashMap;
use std::rc::Rc;

use crate::ptx::{Order, Scope};

/// A byte that threads share: an address in global memory, or an offset in one block's shared memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Location {
    /// `None` is global memory.
    pub block: Option<usize>,
    pub address: u64,
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct Touch {
    pub location: Location,
    pub len_bytes: u64,
    pub writes: bool,
    pub order: Order,
    pub scope: Scope,
    /// Index of the instruction, for reports.
    pub instruction: usize,
}

impl Touch {
    fn strong(&self) -> bool {
        !matches!(self.order, Order::Weak | Order::NonCoherent)
    }
}

/// A race: the earlier access and what the two are.
#[derive(Debug)]
pub(crate) struct Conflict {
    pub thread: usize,
    pub instruction: usize,
    pub what: &'static str,
}

#[derive(Debug, Clone, Copy)]
struct Past {
    thread: usize,
    clock: u32,
    mask: u8,
    touch: Touch,
}

#[derive(Debug, Default)]
struct Word {
    writes: Vec<Past>,
    reads: Vec<Past>,
}

type Clock = Rc<[u32]>;

/// What a reader of a location may acquire.
#[derive(Debug, Clone)]
struct Released {
    thread: usize,
    scope: Scope,
    clock: Clock,
}

#[derive(Debug)]
struct Thread {
    clock: Vec<u32>,
    device: usize,
    block: usize,
    /// The clock at the last fence of each scope: what a later strong store releases.
    fenced: [Option<Clock>; 3],
    /// What strong loads have read from since: what a later fence acquires.
    read_from: Vec<Released>,
}

#[derive(Debug)]
pub(crate) struct Detector {
    threads: Vec<Thread>,
    words: HashMap<Location, Word>,
    released: HashMap<Location, Vec<Released>>,
}

const SCOPES: [Scope; 3] = [Scope::Cta, Scope::Gpu, Scope::Sys];

impl Detector {
    /// One (device, block) for each thread; block numbers are unique over all devices.
    pub fn new(places: &[(usize, usize)]) -> Detector {
        let thread = |(index, (device, block)): (usize, &(usize, usize))| {
            let mut clock = vec![0; places.len()];
            clock[index] = 1;
            Thread { clock, device: *device, block: *block, fenced: [const { None }; 3], read_from: Vec::new() }
        };
        Detector {
            threads: places.iter().enumerate().map(thread).collect(),
            words: HashMap::new(),
            released: HashMap::new(),
        }
    }

    /// The narrowest scope that includes both threads.
    fn distance(&self, a: usize, b: usize) -> Scope {
        let (a, b) = (&self.threads[a], &self.threads[b]);
        match (a.block == b.block, a.device == b.device) {
            (true, _) => Scope::Cta,
            (false, true) => Scope::Gpu,
            (false, false) => Scope::Sys,
        }
    }

    /// Notes an access, or tells with which earlier one it races; [`Detector::order`] follows it.
    pub fn touch(&mut self, thread: usize, touch: Touch) -> Result<(), Conflict> {
        let Location { block, address } = touch.location;
        let end = address + touch.len_bytes;
        let mut word_address = address & !3;
        while word_address < end {
            let mask = (0..4u64).filter(|i| (address..end).contains(&(word_address + i)));
            let mask = mask.fold(0u8, |mask, i| mask | 1 << i);
            let key = Location { block, address: word_address };
            let word = self.words.remove(&key).unwrap_or_default();
            let word = self.touch_word(thread, touch, mask, word)?;
            self.words.insert(key, word);
            word_address += 4;
        }
        Ok(())
    }

    fn touch_word(&self, thread: usize, touch: Touch, mask: u8, mut word: Word) -> Result<Word, Conflict> {
        let clock = &self.threads[thread].clock;
        let known = |past: &Past| clock[past.thread] >= past.clock;
        let against = word.writes.iter().chain(if touch.writes { word.reads.as_slice() } else { &[] });
        for past in against.filter(|past| past.mask & mask != 0) {
            let both = (touch.order, past.touch.order);
            let what = match (both.0 == Order::NonCoherent, both.1 == Order::NonCoherent) {
                (true, _) => "ld.global.nc of memory that this launch writes",
                (_, true) => "a write to memory that this launch reads with ld.global.nc",
                _ if known(past) || self.morally_strong(thread, &touch, past) => continue,
                _ => match (touch.writes, past.touch.writes) {
                    (true, true) => "write after write",
                    (true, false) => "write after read",
                    _ => "read after write",
                },
            };
            return Err(Conflict { thread: past.thread, instruction: past.touch.instruction, what });
        }
        let past = Past { thread, clock: clock[thread], mask, touch };
        // A past access is covered by a later one that is ordered after it and touches at least its bytes.
        let covered = |old: &Past| old.mask & !mask == 0 && known(old) && old.touch.order != Order::NonCoherent;
        if touch.writes {
            word.writes.retain(|old| !covered(old));
            word.reads.retain(|old| !covered(old));
            word.writes.push(past);
        } else {
            word.reads.retain(|old| !(covered(old) && old.thread == thread));
            word.reads.push(past);
        }
        Ok(word)
    }

    fn morally_strong(&self, thread: usize, touch: &Touch, past: &Past) -> bool {
        let needed = self.distance(thread, past.thread);
        touch.strong()
            && past.touch.strong()
            && touch.scope >= needed
            && past.touch.scope >= needed
            && touch.location == past.touch.location
            && touch.len_bytes == past.touch.len_bytes
    }

    /// The orders that an access makes: first what it acquires, then what it releases. `atomic`: reads and writes.
    pub fn order(&mut self, thread: usize, touch: Touch, atomic: bool) {
        if atomic || !touch.writes {
            self.read_from(thread, &touch);
        }
        if touch.writes {
            self.release(thread, &touch, atomic);
        }
    }

    fn read_from(&mut self, thread: usize, touch: &Touch) {
        if !touch.strong() {
            return;
        }
        let released = self.released.get(&touch.location).cloned().unwrap_or_default();
        for from in released.into_iter().filter(|from| from.thread != thread) {
            let needed = self.distance(thread, from.thread);
            if touch.scope < needed || from.scope < needed {
                continue;
            }
            if matches!(touch.order, Order::Acquire | Order::AcquireRelease) {
                join(&mut self.threads[thread].clock, &from.clock);
            } else {
                self.threads[thread].read_from.push(from);
            }
        }
    }

    fn release(&mut self, thread: usize, touch: &Touch, atomic: bool) {
        if !touch.strong() {
            self.released.remove(&touch.location);
            return;
        }
        let heads = self.released.entry(touch.location).or_default();
        if !atomic {
            heads.clear();
        }
        let state = &mut self.threads[thread];
        if matches!(touch.order, Order::Release | Order::AcquireRelease) {
            let clock: Clock = state.clock.as_slice().into();
            push(heads, Released { thread, scope: touch.scope, clock });
            state.clock[thread] += 1;
        } else {
            for (fenced, scope) in state.fenced.iter().zip(SCOPES) {
                if let Some(clock) = fenced {
                    push(heads, Released { thread, scope: scope.min(touch.scope), clock: Rc::clone(clock) });
                }
            }
        }
    }

    /// `fence` and `membar`.
    pub fn fence(&mut self, thread: usize, scope: Scope) {
        let read_from = std::mem::take(&mut self.threads[thread].read_from);
        for from in read_from {
            if scope >= self.distance(thread, from.thread) {
                join(&mut self.threads[thread].clock, &from.clock);
            } else {
                self.threads[thread].read_from.push(from);
            }
        }
        let state = &mut self.threads[thread];
        state.fenced[scope as usize] = Some(state.clock.as_slice().into());
        state.clock[thread] += 1;
    }

    /// All that `threads` did before is before all that they do next.
    pub fn barrier(&mut self, threads: impl Iterator<Item = usize> + Clone) {
        let mut all = vec![0; self.threads.len()];
        for thread in threads.clone() {
            join(&mut all, &self.threads[thread].clock);
        }
        for thread in threads {
            self.threads[thread].clock.copy_from_slice(&all);
            self.threads[thread].clock[thread] += 1;
        }
    }
}

fn push(heads: &mut Vec<Released>, released: Released) {
    heads.retain(|head| head.thread != released.thread || head.scope > released.scope);
    heads.push(released);
}

fn join(clock: &mut [u32], other: &[u32]) {
    for (mine, theirs) in clock.iter_mut().zip(other) {
        *mine = (*mine).max(*theirs);
    }
}
