//! One instruction of one thread.

use super::arith::{self, unsigned};
use super::{Machine, Next, State, WARP_THREADS, convert};
use crate::fault::Fault;
use crate::ptx::{Combine, Compute, Half, Instruction, Kind, Op, Operand, Space, Special};

/// Generic addresses of shared and local memory, below all global allocations.
pub(super) const SHARED_WINDOW: u64 = 1 << 40;
pub(super) const LOCAL_WINDOW: u64 = 1 << 41;
/// Bytes of either window.
pub(super) const WINDOW_BYTES: u64 = 1 << 32;

impl Machine<'_> {
    pub(super) fn step(&mut self, thread: usize) -> Result<Next, Fault> {
        let kernel = self.kernel_of(thread);
        let at = self.threads[thread].pc;
        let Some(instruction) = kernel.instructions.get(at) else {
            return Ok(self.exit(thread)); // the end of the text is a `ret`
        };
        self.threads[thread].pc += 1;
        if let Some(guard) = instruction.guard
            && (self.threads[thread].registers[guard.register] & 1 == 1) == guard.negated
        {
            return Ok(Next::Go);
        }
        match &instruction.op {
            Op::Compute(compute, ty) => {
                let mut sources = [0; 4];
                for (source, operand) in sources.iter_mut().zip(&instruction.operands[1..]) {
                    *source = self.value(thread, operand);
                }
                let undefined = |what| Fault::Undefined { site: self.site(thread, at), what };
                let result = arith::compute(*compute, *ty, sources).map_err(undefined)?;
                let bytes = match compute {
                    Compute::Mul(Half::Wide) | Compute::Mad(Half::Wide) => ty.bytes * 2,
                    Compute::Popc | Compute::Clz => 4,
                    _ => ty.bytes,
                };
                // Narrow signed results live sign-extended in wider registers.
                let signed = ty.is_signed() && bytes < 4;
                let result = if signed { arith::signed(result, bytes) as u64 } else { unsigned(result, bytes) };
                self.set(thread, &instruction.operands[0], result);
            }
            Op::Test { test, combine, ty } => {
                let [a, b] = [1, 2].map(|i| self.value(thread, &instruction.operands[i]));
                let result = arith::test(*test, *ty, a, b);
                let other = instruction.operands.get(3).is_some_and(|operand| self.value(thread, operand) & 1 == 1);
                let result = match combine {
                    Combine::None => result,
                    Combine::And => result && other,
                    Combine::Or => result || other,
                    Combine::Xor => result != other,
                };
                self.set(thread, &instruction.operands[0], result.into());
            }
            Op::Select(ty) => {
                let [a, b, p] = [1, 2, 3].map(|i| self.value(thread, &instruction.operands[i]));
                let chosen = unsigned(if p & 1 == 1 { a } else { b }, ty.bytes);
                self.set(thread, &instruction.operands[0], chosen);
            }
            Op::Convert { round, saturate, to, from } => {
                let first = self.value(thread, &instruction.operands[1]);
                let second = instruction.operands.get(2).map_or(0, |operand| self.value(thread, operand));
                let result = convert::convert(*round, *saturate, *to, *from, first, second);
                let result =
                    if to.is_signed() { arith::signed(result, to.bytes) as u64 } else { unsigned(result, to.bytes) };
                self.set(thread, &instruction.operands[0], result);
            }
            Op::Move(ty) => self.mov(thread, instruction, ty.bytes),
            Op::Generic { space, to } => {
                let window = match space {
                    Space::Shared => SHARED_WINDOW,
                    Space::Local => LOCAL_WINDOW,
                    _ => 0,
                };
                let address = self.value(thread, &instruction.operands[1]);
                let moved = if *to { address.wrapping_sub(window) } else { address.wrapping_add(window) };
                self.set(thread, &instruction.operands[0], moved);
            }
            Op::Load(access) => return self.load(thread, at, instruction, access),
            Op::Store(access) => return self.store(thread, at, instruction, access),
            Op::Atomic { function, access, returns } => {
                return self.atomic(thread, at, instruction, *function, access, *returns);
            }
            Op::Barrier => {
                let number = self.value(thread, &instruction.operands[0]);
                let len_threads = instruction.operands.get(1).map_or(0, |operand| self.value(thread, operand));
                return self.arrive(thread, at, number, len_threads);
            }
            Op::WarpBarrier | Op::Shuffle(_) | Op::Vote(_) => return self.meet_warp(thread, at, instruction),
            Op::Fence(scope) => {
                if let Some(detector) = &mut self.detector {
                    detector.fence(thread, *scope);
                }
                return Ok(Next::Yield);
            }
            Op::Sleep => {
                self.outside.rest();
                return Ok(Next::Yield);
            }
            Op::Branch(target) => {
                let backward = *target <= at;
                self.threads[thread].pc = *target;
                // A loop that touches no memory must not keep the others from running.
                return Ok(if backward { Next::Yield } else { Next::Go });
            }
            Op::Exit => return Ok(self.exit(thread)),
            Op::Trap => return Err(Fault::Undefined { site: self.site(thread, at), what: "trap" }),
        }
        Ok(Next::Go)
    }

    fn exit(&mut self, thread: usize) -> Next {
        self.threads[thread].state = State::Exited;
        let block = self.threads[thread].block;
        self.blocks[block].running -= 1;
        if self.blocks[block].running == 0 {
            self.start_block(self.blocks[block].launch);
        } else {
            self.release_barrier(block);
        }
        Next::Stop
    }

    /// `mov`, which also packs and unpacks.
    fn mov(&mut self, thread: usize, instruction: &Instruction, bytes: usize) {
        match (&instruction.operands[0], &instruction.operands[1]) {
            (Operand::Vector(parts), source) => {
                let part_bytes = bytes / parts.len().max(1);
                let value = self.value(thread, source);
                for (i, part) in parts.iter().enumerate() {
                    self.set(thread, part, unsigned(value >> (i * part_bytes * 8), part_bytes));
                }
            }
            (destination, Operand::Vector(parts)) => {
                let part_bytes = bytes / parts.len().max(1);
                let value = parts.iter().enumerate().fold(0, |value, (i, part)| {
                    value | unsigned(self.value(thread, part), part_bytes) << (i * part_bytes * 8)
                });
                self.set(thread, destination, value);
            }
            (destination, source) => {
                let value = unsigned(self.value(thread, source), bytes);
                self.set(thread, destination, value);
            }
        }
    }

    pub(super) fn value(&self, thread: usize, operand: &Operand) -> u64 {
        match operand {
            Operand::Register(number) => self.threads[thread].registers[*number],
            Operand::Immediate(bits) => *bits,
            Operand::Special(special) => self.special(thread, *special),
            Operand::Address { base, offset } => self.value(thread, base).wrapping_add_signed(*offset),
            Operand::DynamicShared => self.kernel_of(thread).shared_bytes.next_multiple_of(16) as u64,
            Operand::Vector(_) | Operand::Sink => 0, // the instructions that take vectors read their elements
        }
    }

    pub(super) fn set(&mut self, thread: usize, operand: &Operand, value: u64) {
        if let Operand::Register(number) = operand {
            self.threads[thread].registers[*number] = value;
        }
    }

    fn special(&self, thread: usize, special: Special) -> u64 {
        let index = self.threads[thread].index;
        let block = &self.blocks[self.threads[thread].block];
        let launch = &self.launches[block.launch];
        let [width, height, _] = launch.block.map(|n| n as usize);
        match special {
            Special::Tid(0) => (index % width) as u64,
            Special::Tid(1) => (index / width % height) as u64,
            Special::Tid(_) => (index / width / height) as u64,
            Special::Ntid(axis) => launch.block[axis].into(),
            Special::Ctaid(axis) => block.index[axis].into(),
            Special::Nctaid(axis) => launch.grid[axis].into(),
            Special::LaneId => (index % WARP_THREADS) as u64,
            Special::WarpId => (index / WARP_THREADS) as u64,
            // Who looks at the clock is waiting for others.
            Special::Time => {
                self.outside.rest();
                self.outside.time_ns().unwrap_or(self.report.instructions)
            }
        }
    }
}

/// A loaded value as its register holds it.
pub(super) fn extend(value: u64, kind: Kind, bytes: usize) -> u64 {
    if kind == Kind::Signed { arith::signed(value, bytes) as u64 } else { unsigned(value, bytes) }
}
