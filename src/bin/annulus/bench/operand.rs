//! The memory of one argument of a collective, with guards around it.

use annulus::collective::Work;
use annulus::device::{Arena, Buffer};
use annulus::{DType, Element, Result};

use super::arguments::MemoryKind;

/// Bytes of a guard: the arena hands out whole pages.
const GUARD_BYTES: usize = 4096;
const GUARD_BYTE: u8 = 0xa5;

/// `len_elems` elements in one of the kinds of memory.
pub(super) enum Operand<T> {
    /// A buffer of its own. Registered ones lie between two guard pages of the arena; nothing outside a private one can
    /// be looked at.
    Buffer {
        /// None while an operation owns it.
        buffer: Option<Buffer>,
        guards: Vec<Buffer>,
    },
    /// Guard, elements, guard.
    Slice { cells: Vec<T>, len_elems: usize },
}

impl<T: Element> Operand<T> {
    pub(super) fn new(kind: MemoryKind, arena: &Arena, len_elems: usize) -> Result<Operand<T>> {
        let guard = || -> Result<Buffer> {
            let mut guard = arena.alloc(DType::U8, GUARD_BYTES)?;
            guard.as_mut_slice::<u8>()?.fill(GUARD_BYTE);
            Ok(guard)
        };
        Ok(match kind {
            MemoryKind::Registered => {
                // In this order: neighbours in the arena.
                let (before, buffer, behind) = (guard()?, arena.alloc(T::DTYPE, len_elems)?, guard()?);
                Operand::Buffer { buffer: Some(buffer), guards: vec![before, behind] }
            }
            MemoryKind::Private => {
                Operand::Buffer { buffer: Some(Buffer::zeroed(T::DTYPE, len_elems)?), guards: Vec::new() }
            }
            MemoryKind::Slice => {
                let cells = vec![guard_element::<T>(); len_elems + 2 * guard_elems::<T>()];
                Operand::Slice { cells, len_elems }
            }
        })
    }

    /// The elements; none while an operation owns them.
    pub(super) fn elements(&self) -> Result<&[T]> {
        match self {
            Operand::Buffer { buffer: Some(buffer), .. } => buffer.as_slice(),
            Operand::Buffer { buffer: None, .. } => Ok(&[]),
            Operand::Slice { cells, len_elems } => Ok(&cells[guard_elems::<T>()..][..*len_elems]),
        }
    }

    /// As [`elements`](Operand::elements), to write.
    pub(super) fn elements_mut(&mut self) -> Result<&mut [T]> {
        match self {
            Operand::Buffer { buffer: Some(buffer), .. } => buffer.as_mut_slice(),
            Operand::Buffer { buffer: None, .. } => Ok(&mut []),
            Operand::Slice { cells, len_elems } => Ok(&mut cells[guard_elems::<T>()..][..*len_elems]),
        }
    }

    /// Has the buffer run through an operation that takes and returns it. The elements are lost if it fails.
    ///
    /// # Errors
    /// The operation's.
    pub(super) fn lend(&mut self, issue: impl FnOnce(Buffer) -> Result<Work<Buffer>>) -> Result<()> {
        let Operand::Buffer { buffer, .. } = self else { return Ok(()) };
        let Some(taken) = buffer.take() else { return Ok(()) };
        *buffer = Some(issue(taken)?.wait()?);
        Ok(())
    }

    /// As [`lend`](Operand::lend), together with another.
    pub(super) fn lend_with(
        &mut self,
        other: &mut Operand<T>,
        issue: impl FnOnce(Buffer, Buffer) -> Result<Work<(Buffer, Buffer)>>,
    ) -> Result<()> {
        let (Operand::Buffer { buffer: first, .. }, Operand::Buffer { buffer: second, .. }) = (self, other) else {
            return Ok(());
        };
        let (Some(one), Some(two)) = (first.take(), second.take()) else { return Ok(()) };
        let (one, two) = issue(one, two)?.wait()?;
        (*first, *second) = (Some(one), Some(two));
        Ok(())
    }

    /// Guard bytes that are not what they were.
    pub(super) fn damaged_bytes(&self) -> Result<u64> {
        let damaged = |bytes: &[u8]| bytes.iter().filter(|byte| **byte != GUARD_BYTE).count() as u64;
        match self {
            Operand::Buffer { guards, .. } => {
                guards.iter().map(|guard| Ok(damaged(guard.as_slice::<u8>()?))).sum::<Result<u64>>()
            }
            Operand::Slice { cells, len_elems } => {
                let (before, rest) = cells.split_at(guard_elems::<T>());
                Ok(damaged(bytemuck::cast_slice(before)) + damaged(bytemuck::cast_slice(&rest[*len_elems..])))
            }
        }
    }
}

fn guard_elems<T: Element>() -> usize {
    GUARD_BYTES / T::DTYPE.size_bytes()
}

fn guard_element<T: Element>() -> T {
    bytemuck::pod_read_unaligned(&[GUARD_BYTE; 8][..T::DTYPE.size_bytes()])
}

#[cfg(test)]
mod tests {
    use annulus::world::{Environment, World, WorldOptions};

    use super::*;

    #[test]
    fn guards_lie_next_to_the_elements_and_notice() {
        let world = World::join(Environment::single(), WorldOptions::default()).unwrap();
        let arena = Arena::new(&world);
        let mut slice = Operand::<f32>::new(MemoryKind::Slice, &arena, 10).unwrap();
        slice.elements_mut().unwrap().fill(1.0);
        assert_eq!(slice.damaged_bytes().unwrap(), 0);
        let Operand::Slice { cells, .. } = &mut slice else { panic!("a slice") };
        cells[GUARD_BYTES / 4 + 10] = 0.0;
        assert_eq!(slice.damaged_bytes().unwrap(), 4, "the first element behind the slice");

        let mut registered = Operand::<f32>::new(MemoryKind::Registered, &arena, 1024).unwrap();
        let start = registered.elements().unwrap().as_ptr() as usize;
        let Operand::Buffer { guards, .. } = &mut registered else { panic!("a buffer") };
        let [before, behind] = guards.as_mut_slice() else { panic!("two guards") };
        assert_eq!(before.as_slice::<u8>().unwrap().as_ptr() as usize + GUARD_BYTES, start);
        assert_eq!(start + 4096, behind.as_slice::<u8>().unwrap().as_ptr() as usize);
        behind.as_mut_slice::<u8>().unwrap()[0] = 0;
        assert_eq!(registered.damaged_bytes().unwrap(), 1);
    }
}
