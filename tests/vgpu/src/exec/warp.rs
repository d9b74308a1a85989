//! What threads do together: the block's barrier, and the warp's barrier, shuffles and votes.
//!
//! Shuffles and votes exchange registers and order no memory.

use super::{Block, Machine, Next, State, WARP_THREADS};
use crate::fault::Fault;
use crate::ptx::{Instruction, Op, Operand, Shuffle, Vote};

impl Machine<'_> {
    /// `bar.sync a{, b}`: the thread waits for `b` threads at barrier `a`, or for all threads of its block that have not
    /// exited. Source: PTX ISA 9.0, 9.7.13.1: 16 barriers, and a multiple of the warp size for `b`.
    pub(super) fn arrive(&mut self, thread: usize, at: usize, number: u64, len_threads: u64) -> Result<Next, Fault> {
        if number > 15 || !len_threads.is_multiple_of(WARP_THREADS as u64) {
            let what = "a barrier above 15, or a thread count that is no multiple of the warp";
            return Err(Fault::Undefined { site: self.site(thread, at), what });
        }
        self.threads[thread].state = State::Barrier { number, len_threads };
        match len_threads {
            0 => self.release_barrier(self.threads[thread].block),
            _ => self.release_counted(thread, at)?,
        }
        Ok(Next::Stop)
    }

    /// Lets the block's threads go on if all that run stand at one barrier.
    pub(super) fn release_barrier(&mut self, block: usize) {
        let range = self.threads_of(block);
        let running = || self.threads[range.clone()].iter().filter(|thread| thread.state != State::Exited);
        let Some(state @ State::Barrier { len_threads: 0, .. }) = running().next().map(|thread| thread.state) else {
            return;
        };
        if running().any(|thread| thread.state != state) {
            return;
        }
        self.release(range.filter(|thread| self.threads[*thread].state == state).collect());
    }

    /// Lets the threads at a counted barrier go on if they are as many as it was told.
    fn release_counted(&mut self, thread: usize, at: usize) -> Result<(), Fault> {
        let state = self.threads[thread].state;
        let number_of = |state: State| match state {
            State::Barrier { number, .. } => Some(number),
            _ => None,
        };
        let range = self.threads_of(self.threads[thread].block);
        let here = range.filter(|other| number_of(self.threads[*other].state) == number_of(state));
        let together: Vec<usize> = here.collect();
        if together.iter().any(|other| self.threads[*other].state != state) {
            let what = "threads give one barrier different thread counts";
            return Err(Fault::Undefined { site: self.site(thread, at), what });
        }
        if matches!(state, State::Barrier { len_threads, .. } if together.len() as u64 == len_threads) {
            self.release(together);
        }
        Ok(())
    }

    fn threads_of(&self, block: usize) -> std::ops::Range<usize> {
        let Block { first_thread, len_threads, .. } = self.blocks[block];
        first_thread..first_thread + len_threads
    }

    fn release(&mut self, together: Vec<usize>) {
        if let Some(detector) = &mut self.detector {
            detector.barrier(together.iter().copied());
        }
        self.resume(&together);
    }

    fn resume(&mut self, together: &[usize]) {
        for thread in together {
            self.threads[*thread].state = State::Ready;
        }
        self.ready.extend(together);
    }

    /// The thread waits until all threads of the mask stand at the same instruction; then it is done for all of them.
    pub(super) fn meet_warp(&mut self, thread: usize, at: usize, instruction: &Instruction) -> Result<Next, Fault> {
        let mask = instruction.operands.last().map_or(0, |operand| self.value(thread, operand)) as u32;
        let index = self.threads[thread].index;
        if mask >> (index % WARP_THREADS) & 1 == 0 {
            let what = "a thread outside the member mask executes a warp instruction";
            return Err(Fault::Undefined { site: self.site(thread, at), what });
        }
        self.threads[thread].state = State::Warp(mask);
        let first = thread - index % WARP_THREADS;
        let members: Vec<usize> =
            (0..WARP_THREADS).filter(|lane| mask >> lane & 1 == 1).map(|lane| first + lane).collect();
        let block = &self.blocks[self.threads[thread].block];
        let end = block.first_thread + block.len_threads;
        let here = |member: &usize| {
            let other = &self.threads[*member];
            other.state == State::Warp(mask) && other.pc == at + 1
        };
        // A lane beyond the block's end, or one that has exited, never comes: the others deadlock.
        if !members.iter().all(|member| *member < end && here(member)) {
            return Ok(Next::Stop);
        }
        match instruction.op {
            Op::Shuffle(mode) => self.shuffle(&members, first, at, instruction, mode)?,
            Op::Vote(vote) => self.vote(&members, first, instruction, vote),
            _ => {
                if let Some(detector) = &mut self.detector {
                    detector.barrier(members.iter().copied());
                }
            }
        }
        self.resume(&members);
        Ok(Next::Stop)
    }

    /// Source: PTX ISA 9.0, 9.7.9.6: `c` holds the clamp (bits 0-4) and the segment mask (bits 8-12).
    fn shuffle(
        &mut self,
        members: &[usize],
        first: usize,
        at: usize,
        instruction: &Instruction,
        mode: Shuffle,
    ) -> Result<(), Fault> {
        let mut results = Vec::with_capacity(members.len());
        for &member in members {
            let lane = (member - first) as i64;
            let [b, c] = [2, 3].map(|i| self.value(member, &instruction.operands[i]) as i64);
            let (offset, clamp, segment) = (b & 31, c & 31, c >> 8 & 31);
            let most = (lane & segment) | (clamp & !segment);
            let least = lane & segment;
            let (from, valid) = match mode {
                // For `up` the clamp is a lower bound.
                Shuffle::Up => (lane - offset, lane - offset >= most),
                Shuffle::Down => (lane + offset, lane + offset <= most),
                Shuffle::Butterfly => (lane ^ offset, lane ^ offset <= most),
                Shuffle::Index => {
                    let from = least | (offset & !segment);
                    (from, from <= most)
                }
            };
            let from = first + if valid { from } else { lane } as usize;
            if !members.contains(&from) {
                let what = "a shuffle reads from a lane outside the member mask";
                return Err(Fault::Undefined { site: self.site(member, at), what });
            }
            results.push((self.value(from, &instruction.operands[1]) & 0xffff_ffff, valid));
        }
        for (&member, (value, valid)) in members.iter().zip(results) {
            match &instruction.operands[0] {
                Operand::Vector(parts) => {
                    for (part, value) in parts.iter().zip([value, valid.into()]) {
                        self.set(member, part, value);
                    }
                }
                destination => self.set(member, destination, value),
            }
        }
        Ok(())
    }

    fn vote(&mut self, members: &[usize], first: usize, instruction: &Instruction, vote: Vote) {
        let holds = |member: &usize| self.value(*member, &instruction.operands[1]) & 1 == 1;
        let ballot =
            members.iter().filter(|member| holds(member)).fold(0u64, |ballot, member| ballot | 1 << (member - first));
        let all = ballot.count_ones() as usize == members.len();
        let result = match vote {
            Vote::All => all.into(),
            Vote::Any => (ballot != 0).into(),
            Vote::Uniform => (all || ballot == 0).into(),
            Vote::Ballot => ballot,
        };
        for member in members {
            self.set(*member, &instruction.operands[0], result);
        }
    }
}
