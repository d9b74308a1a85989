//! A communicator's operations in the flight recorder. The host learns that one has ended when it comes by.

use std::collections::VecDeque;
use std::time::Duration;

use crate::collective::descriptor::Descriptor;
use crate::telemetry;
use crate::world::flag::reached;
use crate::world::{Record, RecordId, World};

/// Operations whose end is yet to be noted; the flight recorder itself keeps no more.
const UNFINISHED: usize = 1024;

pub(super) struct History {
    world: World,
    group: u32,
    timeout: Duration,
    unfinished: VecDeque<(u32, RecordId)>,
}

impl History {
    pub(super) fn new(world: &World, group: u32, timeout: Duration) -> History {
        History { world: world.clone(), group, timeout, unfinished: VecDeque::with_capacity(UNFINISHED) }
    }

    pub(super) fn note_started(&mut self, call: &Descriptor) {
        if self.unfinished.len() == UNFINISHED {
            self.unfinished.pop_front(); // the recorder has forgotten it, too
        }
        let (input_elems, output_elems) = call.sizes_elems(self.world.world_size());
        let record = Record {
            op: call.kind().name(),
            group: self.group,
            sequence: call.sequence,
            dtype: Some(call.dtype()),
            input_elems,
            output_elems,
            timeout: self.timeout,
        };
        let id = self.world.record_start(&record, telemetry::now_ns());
        self.unfinished.push_back((call.sequence as u32, id));
    }

    /// So many operations have run on the device.
    pub(super) fn note_finished(&mut self, finished: u32) {
        let mut now_ns = None;
        while let Some((sequence, id)) = self.unfinished.front().copied()
            && reached(finished, sequence)
        {
            self.world.record_end(id, *now_ns.get_or_insert_with(telemetry::now_ns));
            self.unfinished.pop_front();
        }
    }
}
