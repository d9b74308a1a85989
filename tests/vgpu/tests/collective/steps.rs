//! Operations by steps, as ranks that are processes on one device run them: a kernel for each step of a rank, which begins when
//! its peers have told that it may, and runs alone. A wait in it would be in vain.

use std::collections::VecDeque;

use annulus::abi::collective::{
    Awaited, CollectiveArguments, NOBODY, Progress, Protocol, SIGNALS, Source, Step, steps as table,
};
use annulus::schedule::{Algorithm, Collective};
use annulus_vgpu::{Module, Options};
use bytemuck::Zeroable;

use super::trial::{Failure, expected, inputs, rough};
use super::world::{Epilogue, Operation, Shape, World, same};
use super::{ALGORITHMS, module, seeded};

/// What peers tell, and how far the ranks have been led.
struct Steps {
    /// `told[rank][peer]`: the words in which `peer` tells `rank` how far it is.
    told: Vec<Vec<u64>>,
    /// `[rank]`: where those lie that it writes.
    signals: Vec<u64>,
    /// Transfers of all operations so far, `[rank][peer]`.
    counts: Vec<Vec<Progress>>,
    operations: u32,
}

/// A kernel, and what it waits for.
type Kernel = (Vec<(Awaited, u32, u32)>, CollectiveArguments);

impl Steps {
    fn new(world: &mut World) -> Steps {
        let ranks = world.shape.world_size as usize;
        let mut words = |_| (0..ranks).map(|_| world.alloc(&[0u32; SIGNALS])).collect();
        let told: Vec<Vec<u64>> = (0..ranks).map(&mut words).collect();
        let at_peers = |rank: usize| told.iter().map(|told| told[rank]).collect::<Vec<u64>>();
        let signals = (0..ranks).map(|rank| world.alloc(&at_peers(rank))).collect();
        Steps { told, signals, counts: vec![vec![Progress::zeroed(); ranks]; ranks], operations: 0 }
    }

    /// The kernels of one operation of `rank`, in its order.
    fn kernels(&mut self, rank: usize, whole: CollectiveArguments, table: &[Step], slots: u32) -> VecDeque<Kernel> {
        let peers: Vec<u32> = (0..whole.world_size).filter(|peer| *peer as usize != rank).collect();
        let empty = CollectiveArguments { rounds: 0, opens: 0, closes: 0, ..whole };
        let mut all = VecDeque::from([(Vec::new(), CollectiveArguments { opens: 1, ..empty })]);
        for first_round in 0..whole.rounds {
            for (index, step) in table.iter().enumerate() {
                let mut waits: Vec<_> = peers.iter().map(|peer| (Awaited::Greeting, *peer, self.operations)).collect();
                let takes_all = step.source == Source::All as u8;
                for peer in peers.iter().filter(|peer| takes_all || **peer == u32::from(step.recv_peer)) {
                    let taken = &mut self.counts[rank][*peer as usize].taken;
                    *taken += 1;
                    waits.push((Awaited::Data, *peer, *taken));
                }
                if step.send_peer != NOBODY {
                    let sent = &mut self.counts[rank][usize::from(step.send_peer)].sent;
                    *sent += 1;
                    waits.push((Awaited::Credit, step.send_peer.into(), sent.saturating_sub(slots)));
                }
                let rounds = first_round + 1;
                let closes = u32::from(rounds == whole.rounds && index + 1 == table.len());
                let mut part = CollectiveArguments { first_round, rounds, opens: 0, closes, ..whole };
                part.ranks[0].steps += (index * size_of::<Step>()) as u64;
                part.ranks[0].len_steps = 1;
                all.push_back((waits, part));
            }
        }
        all
    }

    /// An all-reduce in place, whose kernels run in some order that the signals allow.
    fn all_reduce(
        &mut self,
        world: &mut World,
        module: &Module,
        operation: &Operation,
        options: &Options,
    ) -> Result<(), Failure> {
        let world_size = world.shape.world_size;
        let terms = inputs::<f32>(operation, world_size, rough);
        let buffers: Vec<u64> = terms.iter().map(|terms| world.alloc(terms)).collect();
        self.operations += 1;
        let mut kernels = Vec::new();
        for (rank, buffer) in buffers.iter().enumerate() {
            let mut whole = world.arguments::<f32>(operation, rank as u32, [*buffer; 2], Epilogue::default());
            whole.ranks[0].signals = self.signals[rank];
            let table = table(&operation.schedule(world_size), rank as u32);
            kernels.push(self.kernels(rank, whole, &table, world.shape.slots));
        }
        while kernels.iter().any(|kernels| !kernels.is_empty()) {
            let may = |rank: usize| {
                let is_told = |(awaited, peer, expected): &(Awaited, u32, u32)| {
                    world.read::<u32>(self.told[rank][*peer as usize], SIGNALS)[*awaited as usize] >= *expected
                };
                kernels[rank].front().is_some_and(|(waits, _)| waits.iter().all(is_told))
            };
            let Some(rank) = (0..world_size as usize).find(|rank| may(*rank)) else {
                return Err(Failure::Result("no rank may go on".to_owned()));
            };
            let part = kernels[rank].pop_front().map(|(_, part)| part).unwrap();
            world.launch::<f32>(module, &[part], options).map_err(Failure::Machine)?;
            if let Some(record) = world.faults(rank).first() {
                return Err(Failure::GaveUp(rank, *record));
            }
        }
        let whole = expected(operation, world_size, &terms);
        for (rank, buffer) in buffers.iter().enumerate() {
            let found: Vec<f32> = world.read(*buffer, whole.len());
            if let Some(i) = (0..whole.len()).find(|i| !same(found[*i], whole[*i])) {
                return Err(Failure::Result(format!("rank {rank}, element {i}: {}, not {}", found[i], whole[i])));
            }
        }
        Ok(())
    }
}

/// Two operations, so that what the first one told shows in the second.
pub fn steps(module: &Module, shape: Shape, algorithm: Algorithm, options: &Options) -> Result<(), Failure> {
    if shape.protocol == Protocol::Words {
        return Ok(()); // nothing travels as words by steps
    }
    let mut world = World::new(shape);
    let mut steps = Steps::new(&mut world);
    for len_elems in [300, 75] {
        let operation = Operation { timeout_ns: 30_000, ..Operation::new(Collective::AllReduce, algorithm, len_elems) };
        steps.all_reduce(&mut world, module, &operation, options)?;
    }
    Ok(())
}

#[test]
fn steps_need_no_wait_in_a_kernel() {
    for algorithm in ALGORITHMS {
        for world_size in [2, 3, 5] {
            let shape = Shape { channels: 2, threads: 64, ..Shape::new(world_size) };
            let outcome = steps(&module(), shape, algorithm, &seeded(world_size.into()));
            outcome.unwrap_or_else(|failure| panic!("{algorithm:?} of {world_size}: {failure}"));
        }
    }
}
