//! Loads, stores and atomics: where the bytes are, whether they may be touched, and what the race detector is told.

use super::arith::{integer, unsigned};
use super::step::{LOCAL_WINDOW, SHARED_WINDOW, WINDOW_BYTES, extend};
use super::{Machine, Next};
use crate::fault::Fault;
use crate::outside::{Manner, Reach};
use crate::ptx::{Access, AtomicFunction, Instruction, Operand, Order, Scope, Space};
use crate::race::{Location, Touch};

/// An address whose space is known.
#[derive(Clone, Copy)]
struct Place {
    space: Space,
    address: u64,
}

impl Machine<'_> {
    pub(super) fn load(
        &mut self,
        thread: usize,
        at: usize,
        instruction: &Instruction,
        access: &Access,
    ) -> Result<Next, Fault> {
        let place = self.place_of(thread, &instruction.operands[1], access.space);
        let len_bytes = access.ty.bytes * access.lanes;
        let touch = self.check(thread, at, place, access, len_bytes, false)?;
        self.tell(thread, touch, false)?;
        let mut bytes = [0u8; 32];
        self.announce(at, place, access);
        self.read(thread, at, place, &mut bytes[..len_bytes])?;
        let destination = &instruction.operands[0];
        for (lane, chunk) in bytes[..len_bytes].chunks(access.ty.bytes).enumerate() {
            let value = extend(little_endian(chunk), access.ty.kind, access.ty.bytes);
            self.set(thread, element(destination, lane), value);
        }
        if place.space == Space::Global {
            self.report.loaded_bytes += len_bytes as u64;
            self.report.loaded_sectors += self.sectors_of(thread, at, place, len_bytes);
        }
        Ok(if touch.is_some() { Next::Yield } else { Next::Go })
    }

    pub(super) fn store(
        &mut self,
        thread: usize,
        at: usize,
        instruction: &Instruction,
        access: &Access,
    ) -> Result<Next, Fault> {
        let place = self.place_of(thread, &instruction.operands[0], access.space);
        let len_bytes = access.ty.bytes * access.lanes;
        let touch = self.check(thread, at, place, access, len_bytes, true)?;
        let mut bytes = [0u8; 32];
        for lane in 0..access.lanes {
            let value = self.value(thread, element(&instruction.operands[1], lane));
            let start = lane * access.ty.bytes;
            bytes[start..start + access.ty.bytes].copy_from_slice(&value.to_le_bytes()[..access.ty.bytes]);
        }
        self.announce(at, place, access);
        self.write(thread, at, place, &bytes[..len_bytes])?;
        self.tell(thread, touch, false)?;
        if place.space == Space::Global {
            self.report.stored_bytes += len_bytes as u64;
            self.report.stored_sectors += self.sectors_of(thread, at, place, len_bytes);
        }
        Ok(if touch.is_some() { Next::Yield } else { Next::Go })
    }

    pub(super) fn atomic(
        &mut self,
        thread: usize,
        at: usize,
        instruction: &Instruction,
        function: AtomicFunction,
        access: &Access,
        returns: bool,
    ) -> Result<Next, Fault> {
        let sources = &instruction.operands[usize::from(returns)..];
        let place = self.place_of(thread, &sources[0], access.space);
        let (ty, len_bytes) = (access.ty, access.ty.bytes);
        let touch = self.check(thread, at, place, access, len_bytes, true)?;
        let operand = unsigned(self.value(thread, &sources[1]), len_bytes);
        let replacement = sources.get(2).map_or(0, |source| self.value(thread, source));
        let change = |old: u64| {
            let (wide_old, wide_operand) = (integer(old, ty), integer(operand, ty));
            match function {
                AtomicFunction::Add => old.wrapping_add(operand),
                AtomicFunction::Min => wide_old.min(wide_operand) as u64,
                AtomicFunction::Max => wide_old.max(wide_operand) as u64,
                AtomicFunction::Exchange => operand,
                AtomicFunction::CompareSwap if old == operand => replacement,
                AtomicFunction::CompareSwap => old,
                AtomicFunction::And => old & operand,
                AtomicFunction::Or => old | operand,
                AtomicFunction::Xor => old ^ operand,
                AtomicFunction::Increment if old >= operand => 0,
                AtomicFunction::Increment => old + 1,
                AtomicFunction::Decrement if old == 0 || old > operand => operand,
                AtomicFunction::Decrement => old - 1,
            }
        };
        self.announce(at, place, access);
        let old = self.update(thread, at, place, len_bytes, &change)?;
        self.tell(thread, touch, true)?;
        if returns {
            self.set(thread, &instruction.operands[0], extend(old, ty.kind, len_bytes));
        }
        Ok(Next::Yield)
    }

    /// Tells the outside of the access that it is asked for next.
    fn announce(&self, at: usize, place: Place, access: &Access) {
        if place.space != Space::Global {
            return;
        }
        let reach = match (access.order, access.scope) {
            (Order::Weak | Order::NonCoherent, _) | (_, Scope::Cta) => Reach::Nobody,
            (_, Scope::Gpu) => Reach::Device,
            (_, Scope::Sys) => Reach::System,
        };
        let is = |order| reach != Reach::Nobody && [order, Order::AcquireRelease].contains(&access.order);
        let (acquires, releases) = (is(Order::Acquire), is(Order::Release));
        self.outside.announce(Manner { instruction: at, reach, acquires, releases });
    }

    fn sectors_of(&mut self, thread: usize, at: usize, place: Place, len_bytes: usize) -> u64 {
        let lane = self.threads[thread].index;
        let sectors = self.sectors.as_mut();
        sectors.map_or(0, |sectors| sectors.touch(thread, lane, at, place.address, len_bytes))
    }

    fn place_of(&self, thread: usize, operand: &Operand, space: Space) -> Place {
        let address = self.value(thread, operand);
        let within = |window: u64| (window..window + WINDOW_BYTES).contains(&address);
        match space {
            Space::Generic if within(SHARED_WINDOW) => Place { space: Space::Shared, address: address - SHARED_WINDOW },
            Space::Generic if within(LOCAL_WINDOW) => Place { space: Space::Local, address: address - LOCAL_WINDOW },
            Space::Generic => Place { space: Space::Global, address },
            Space::Shared => Place { space, address: unsigned(address, 4) },
            space => Place { space, address },
        }
    }

    /// Alignment, and what the race detector must hear: nothing for memory that one thread has alone.
    fn check(
        &self,
        thread: usize,
        at: usize,
        place: Place,
        access: &Access,
        len_bytes: usize,
        writes: bool,
    ) -> Result<Option<Touch>, Fault> {
        let Place { space, address } = place;
        if !address.is_multiple_of(len_bytes as u64) {
            return Err(Fault::Misaligned { site: self.site(thread, at), address, len_bytes });
        }
        let block = match space {
            Space::Shared => Some(self.threads[thread].block),
            Space::Global => None,
            _ => return Ok(None),
        };
        let Access { order, scope, .. } = *access;
        let location = Location { block, address };
        // Outside memory nothing is noted: the access itself fails.
        if !self.reaches(thread, place, len_bytes) {
            return Err(self.out_of_bounds(thread, at, place, len_bytes));
        }
        Ok(Some(Touch { location, len_bytes: len_bytes as u64, writes, order, scope, instruction: at }))
    }

    fn tell(&mut self, thread: usize, touch: Option<Touch>, atomic: bool) -> Result<(), Fault> {
        let (Some(detector), Some(touch)) = (&mut self.detector, touch) else {
            return Ok(());
        };
        match detector.touch(thread, touch) {
            Ok(()) => {
                if touch.order != Order::NonCoherent {
                    detector.order(thread, touch, atomic);
                }
                Ok(())
            }
            Err(conflict) => Err(Fault::Race {
                site: self.site(thread, touch.instruction),
                earlier: self.site(conflict.thread, conflict.instruction),
                address: touch.location.address,
                what: conflict.what,
            }),
        }
    }

    fn reaches(&self, thread: usize, place: Place, len_bytes: usize) -> bool {
        match place.space {
            Space::Global | Space::Generic => self.outside.contains(place.address, len_bytes),
            _ => self.own(thread, place, len_bytes).is_some(),
        }
    }

    /// Bytes that no other block reaches.
    fn own(&self, thread: usize, place: Place, len_bytes: usize) -> Option<&[u8]> {
        let owner = &self.threads[thread];
        let block = &self.blocks[owner.block];
        match place.space {
            Space::Global | Space::Generic => None,
            Space::Shared => slice(&block.shared, place.address, len_bytes),
            Space::Local => slice(&owner.local, place.address, len_bytes),
            Space::Param => slice(&self.launches[block.launch].arguments.0, place.address, len_bytes),
        }
    }

    /// As [`own`](Machine::own), to change them; arguments are read-only.
    fn own_mut(&mut self, thread: usize, place: Place, len_bytes: usize) -> Option<&mut [u8]> {
        let start = usize::try_from(place.address).ok()?;
        let range = start..start.checked_add(len_bytes)?;
        match place.space {
            Space::Shared => {
                let block = self.threads[thread].block;
                self.blocks[block].shared.get_mut(range)
            }
            Space::Local => self.threads[thread].local.get_mut(range),
            Space::Param | Space::Global | Space::Generic => None,
        }
    }

    fn read(&self, thread: usize, at: usize, place: Place, into: &mut [u8]) -> Result<(), Fault> {
        let done = match place.space {
            Space::Global | Space::Generic => self.outside.load(place.address, into),
            _ => self.own(thread, place, into.len()).map(|bytes| into.copy_from_slice(bytes)).is_some(),
        };
        if done { Ok(()) } else { Err(self.out_of_bounds(thread, at, place, into.len())) }
    }

    fn write(&mut self, thread: usize, at: usize, place: Place, bytes: &[u8]) -> Result<(), Fault> {
        let done = match place.space {
            Space::Global | Space::Generic => self.outside.store(place.address, bytes),
            _ => self.own_mut(thread, place, bytes.len()).map(|to| to.copy_from_slice(bytes)).is_some(),
        };
        if done { Ok(()) } else { Err(self.out_of_bounds(thread, at, place, bytes.len())) }
    }

    /// Replaces a value by what `change` makes of it and returns the old one.
    fn update(
        &mut self,
        thread: usize,
        at: usize,
        place: Place,
        len_bytes: usize,
        change: &dyn Fn(u64) -> u64,
    ) -> Result<u64, Fault> {
        let old = match place.space {
            Space::Global | Space::Generic => self.outside.update(place.address, len_bytes, change),
            _ => self.own_mut(thread, place, len_bytes).map(|bytes| {
                let old = little_endian(bytes);
                bytes.copy_from_slice(&change(old).to_le_bytes()[..len_bytes]);
                old
            }),
        };
        old.ok_or_else(|| self.out_of_bounds(thread, at, place, len_bytes))
    }

    fn out_of_bounds(&self, thread: usize, at: usize, place: Place, len_bytes: usize) -> Fault {
        let Place { space, address } = place;
        let (space, nearest) = match space {
            Space::Global | Space::Generic => ("global", self.outside.nearest(address)),
            Space::Shared => ("shared", format!("{} bytes", self.blocks[self.threads[thread].block].shared.len())),
            Space::Local => ("local", format!("{} bytes", self.threads[thread].local.len())),
            Space::Param => ("parameter", "read-only arguments".to_owned()),
        };
        Fault::OutOfBounds { site: self.site(thread, at), address, len_bytes, space, nearest }
    }
}

fn slice(bytes: &[u8], address: u64, len_bytes: usize) -> Option<&[u8]> {
    let start = usize::try_from(address).ok()?;
    bytes.get(start..start.checked_add(len_bytes)?)
}

fn little_endian(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

/// The `lane`-th register of a vector operand, or the operand itself.
fn element(operand: &Operand, lane: usize) -> &Operand {
    match operand {
        Operand::Vector(elements) => elements.get(lane).unwrap_or(&Operand::Sink),
        operand => operand,
    }
}
