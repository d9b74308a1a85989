//! The step tables of one rank, on its device.

use super::connect::upload;
use crate::abi::collective::{ONE_STEP, Step, steps};
use crate::device::cuda::{Buffer, Device, View};
use crate::error::Result;
use crate::schedule::{Algorithm, Collective, Schedule};
use crate::world::World;

/// Those of every collective by every algorithm: they depend on nothing else.
pub(super) struct Tables {
    memory: Buffer,
    /// The same for the host: [`ONE_STEP`], then the others.
    all: Vec<Step>,
    /// First step and number of steps.
    places: Vec<(Collective, Algorithm, usize, usize)>,
}

impl Tables {
    pub(super) fn new(device: &Device, world: &World) -> Result<Tables> {
        let (rank, world_size) = (world.rank(), world.world_size());
        let mut all: Vec<Step> = ONE_STEP.to_vec();
        let mut places = Vec::new();
        let others = [Collective::AllReduce, Collective::ReduceScatter, Collective::AllGather];
        let collectives = others.into_iter().chain((0..world_size).map(|root| Collective::Broadcast { root }));
        for collective in collectives {
            for algorithm in [Algorithm::Direct, Algorithm::Ring] {
                let any = Schedule::new(collective, algorithm, world_size, world_size as usize, 1, 1)?;
                let table = steps(&any, rank);
                places.push((collective, algorithm, all.len(), table.len()));
                all.extend(table);
            }
        }
        Ok(Tables { memory: upload(device, bytemuck::cast_slice(&all))?, all, places })
    }

    /// What lies on the device.
    pub(super) fn view(&self) -> View {
        self.memory.view()
    }

    /// That of an all-reduce that goes to everybody at once, and its address on the device.
    pub(super) fn one_step(&self) -> (u64, &[Step]) {
        (self.memory.address(), &self.all[..ONE_STEP.len()])
    }

    /// The table for `schedule`, and its address on the device.
    pub(super) fn of(&self, schedule: &Schedule) -> (u64, &[Step]) {
        let wanted = (schedule.collective(), schedule.algorithm());
        let place = self.places.iter().find(|(collective, algorithm, ..)| (*collective, *algorithm) == wanted);
        place.map_or((0, &[]), |(_, _, first, len_steps)| {
            (self.memory.address() + (first * size_of::<Step>()) as u64, &self.all[*first..first + len_steps])
        })
    }
}
