//! What a kernel touches, told to the detector.

use std::cell::{Cell, RefCell};
use std::sync::Arc;

use annulus_vgpu::Manner;

use super::footprint::{Footprint, Mode};
use super::{Item, acquired, note, release, with_actor};
use crate::mapping::Mapping;
use crate::module::Function;

/// One launch. Bytes are noted where it learns or tells something, and at its end: those between two such points know the same.
pub(crate) struct Watch {
    item: Arc<Item>,
    footprint: RefCell<Footprint>,
    /// Of the access that comes next.
    manner: Cell<Manner>,
}

impl Watch {
    /// Of this thread's strand; none if races are not looked for.
    pub fn new(function: &Function) -> Option<Watch> {
        let item = with_actor(|actor| actor.item(function.kernel().name(), Some(function.clone())))?;
        Some(Watch { item, footprint: RefCell::new(Footprint::new()), manner: Cell::default() })
    }

    pub fn announce(&self, manner: Manner) {
        self.manner.set(manner);
    }

    /// Before bytes are read or written, or both.
    pub fn before(&self, mapping: &Mapping, offset: usize, len_bytes: usize, writes: bool) {
        let Some((memory, base)) = mapping.identity() else { return };
        let Manner { instruction, reach, releases, .. } = self.manner.get();
        let at = base + offset as u64;
        let mode = Mode { writes, reach };
        self.footprint.borrow_mut().touch(memory, at, len_bytes as u64, mode, instruction as u32);
        if writes && releases {
            self.note();
            with_actor(|actor| release(actor, (memory, at), reach));
        }
    }

    /// After they were read.
    pub fn after(&self, mapping: &Mapping, offset: usize, is_host_memory: bool) {
        let Manner { reach, acquires, .. } = self.manner.get();
        let (true, Some((memory, base))) = (acquires, mapping.identity()) else { return };
        let location = (memory, base + offset as u64);
        let learnt = with_actor(|actor| acquired(actor, location, reach, is_host_memory)).flatten();
        if let Some(learnt) = learnt {
            self.note(); // what it did before did not know
            with_actor(|actor| actor.clock.join(&learnt));
        }
    }

    /// Notes all that was touched since.
    pub fn note(&self) {
        let mut footprint = self.footprint.borrow_mut();
        with_actor(|actor| {
            for run in footprint.runs() {
                let instruction = |at| footprint.instruction(run.memory, run.mode, at).unwrap_or(run.instruction);
                note(actor, &self.item, &run, instruction);
            }
        });
        footprint.clear();
    }
}
