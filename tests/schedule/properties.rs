//! What holds for every collective, world size, length, round and alignment.

use std::collections::BTreeSet;

use annulus::schedule::{Action, Algorithm, Collective, MAX_WORLD_SIZE, Phase, Schedule};
use proptest::prelude::*;
use proptest::test_runner::TestCaseError;

use crate::simulator::{Machine, Memory, Plan, Planned, check_pairing, chooser, phase_order, run};

const MACHINES: [Machine; 4] = [
    Machine { slots: 1, cut_through: false, waits_for_credit: true },
    Machine { slots: 2, cut_through: false, waits_for_credit: true },
    Machine { slots: 2, cut_through: true, waits_for_credit: true },
    Machine { slots: 5, cut_through: true, waits_for_credit: true },
];

fn algorithm() -> impl Strategy<Value = Algorithm> {
    prop_oneof![Just(Algorithm::Ring), Just(Algorithm::Direct)]
}

/// Any schedule of a vector short enough to simulate. Reduce-scatter and all-gather take the next multiple.
fn schedule(worlds: impl Strategy<Value = u32>, max_len_elems: usize) -> impl Strategy<Value = Schedule> {
    let len_elems = prop_oneof![0..=max_len_elems, 0..8usize];
    let round_elems = prop_oneof![1..=9usize, 1..=max_len_elems.max(1), Just(usize::MAX)];
    let align_elems = prop_oneof![Just(1usize), 1..=20usize, Just(usize::MAX)];
    (worlds, 0..4u8, any::<u32>(), algorithm(), len_elems, round_elems, align_elems).prop_map(
        |(world_size, collective, root, algorithm, len_elems, round_elems, align_elems)| {
            let equal_shards = len_elems.next_multiple_of(world_size as usize);
            let (collective, len_elems) = match collective {
                0 => (Collective::AllReduce, len_elems),
                1 => (Collective::ReduceScatter, equal_shards),
                2 => (Collective::AllGather, equal_shards),
                _ => (Collective::Broadcast { root: root % world_size }, len_elems),
            };
            Schedule::new(collective, algorithm, world_size, len_elems, round_elems, align_elems).unwrap()
        },
    )
}

fn simulate(plan: &Plan, machine: Machine, seed: u64) -> Result<Memory, TestCaseError> {
    run(plan, machine, chooser(seed))
        .map_err(|violation| TestCaseError::fail(format!("{violation:?} with {machine:?}")))
}

/// The documented order of the additions: the owner alone decides it, never rounds, lengths or speeds.
fn documented_order(schedule: &Schedule, owner: u32) -> Vec<u8> {
    let world_size = schedule.world_size();
    match schedule.algorithm() {
        Algorithm::Direct => (0..world_size as u8).collect(),
        Algorithm::Ring => (1..=world_size).map(|hop| ((owner + hop) % world_size) as u8).collect(),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(192))]

    /// Every element is reduced once, with every rank's term once and in the documented order; nothing is read before
    /// it is written; no slot is overwritten before its credit; nobody blocks.
    #[test]
    fn every_interleaving_gives_the_exact_result(schedule in schedule(1..=9u32, 150), seed in any::<u64>()) {
        let plan = Plan::of(&schedule);
        for machine in MACHINES {
            for seed in [0, 1, seed | 2] {
                let memory = simulate(&plan, machine, seed)?;
                if !matches!(schedule.collective(), Collective::AllReduce | Collective::ReduceScatter) {
                    continue;
                }
                for owner in 0..schedule.world_size() {
                    let shard = schedule.shard(owner);
                    let order = documented_order(&schedule, owner);
                    for memory in &memory {
                        let values = memory[shard.offset_elems..shard.end_elems()].iter().flatten();
                        for value in values.filter(|value| value.finished) {
                            prop_assert_eq!(&value.terms, &order, "element {}", value.elem);
                        }
                    }
                }
            }
        }
    }

    /// The same for worlds up to the largest.
    #[test]
    fn large_worlds_give_the_exact_result(schedule in schedule(10..=MAX_WORLD_SIZE, 70), seed in any::<u64>()) {
        let plan = Plan::of(&schedule);
        // Few rounds only: the number of steps is quadratic in the world size.
        prop_assume!(plan.ranks.iter().map(Vec::len).sum::<usize>() < 20_000);
        simulate(&plan, MACHINES[2], seed)?;
    }

    /// Both sides of every link list the same transfers in the same steps; every step is one stream out and one in;
    /// indices ascend and stay below the number of steps; a chunk fits its slot.
    #[test]
    fn sends_and_receives_are_paired(schedule in schedule(1..=MAX_WORLD_SIZE, 100), last_round in any::<bool>()) {
        let mut plan = Plan::of(&schedule);
        prop_assert_eq!(check_pairing(&plan), Ok(()));
        let world_size = schedule.world_size();
        let round = if last_round { schedule.rounds().saturating_sub(1) } else { 0 };
        for planned in &mut plan.ranks {
            planned.retain(|planned| planned.round == round);
            for pair in planned.windows(2) {
                let place = |which: usize| (phase_order(pair[which].step.phase), pair[which].step.index);
                prop_assert!(place(0) < place(1), "{:?}", pair);
            }
            for planned in planned {
                let step = planned.step;
                let phases = if schedule.collective() == Collective::AllReduce { 2 } else { 1 };
                prop_assert!(step.index < phases * (world_size - 1).max(1));
                prop_assert_eq!(step.action.is_some(), step.recv.is_some() || world_size == 1);
                prop_assert!(step.send.is_some() || step.recv.is_some() || world_size == 1);
                let broadcasts = matches!(schedule.collective(), Collective::Broadcast { .. });
                prop_assert_eq!(step.phase == Phase::Broadcast, broadcasts);
                for transfer in step.send.into_iter().chain(step.recv) {
                    prop_assert_eq!(transfer.span, schedule.chunk(round, transfer.chunk));
                    prop_assert!(transfer.span.len_elems <= schedule.slot_elems());
                }
            }
        }
        if !matches!(schedule.collective(), Collective::Broadcast { .. }) && world_size > 1 && schedule.rounds() > 0 {
            for index in 0..schedule.steps(0, round).len() {
                let receiver = |steps: &Vec<Planned>| steps[index].step.send.unwrap().peer;
                let receivers: BTreeSet<_> = plan.ranks.iter().map(receiver).collect();
                prop_assert_eq!(receivers.len(), world_size as usize, "step {} is no permutation", index);
            }
        }
    }

    /// The formula equals the sum over the steps; all ranks together send what the table in the documentation says; and
    /// rounds have the documented number of steps.
    #[test]
    fn wire_and_steps_are_as_documented(schedule in schedule(1..=MAX_WORLD_SIZE, 300)) {
        let world_size = schedule.world_size();
        let (len_elems, peers) = (schedule.len_elems(), world_size as usize - 1);
        let mut all = 0;
        for rank in 0..world_size {
            let steps = (0..schedule.rounds()).flat_map(|round| schedule.steps(rank, round));
            let sent: usize = steps.filter_map(|step| step.send).map(|transfer| transfer.span.len_elems).sum();
            prop_assert_eq!(schedule.wire_elems_sent(rank), sent);
            all += sent;
        }
        prop_assert_eq!(schedule.wire_elems_sent(world_size), 0);
        let phases = if schedule.collective() == Collective::AllReduce { 2 } else { 1 };
        prop_assert_eq!(all, phases * peers * len_elems);
        let even = schedule.shard(0).len_elems == schedule.shard(world_size - 1).len_elems;
        if schedule.collective() == Collective::AllReduce && even {
            prop_assert_eq!(schedule.wire_elems_sent(0), 2 * peers * len_elems / world_size as usize);
        }
        if world_size > 1 && schedule.rounds() > 0 {
            let indices = (0..world_size).flat_map(|rank| schedule.steps(rank, 0)).map(|step| step.index);
            let steps = indices.collect::<BTreeSet<_>>().len();
            prop_assert_eq!(steps, phases * peers);
        }
    }

    /// Shards tile the vector and start on the alignment; the chunks of all rounds tile each shard.
    #[test]
    fn shards_and_chunks_tile(schedule in schedule(1..=MAX_WORLD_SIZE, 400)) {
        let mut end = 0;
        for owner in 0..schedule.world_size() {
            let shard = schedule.shard(owner);
            prop_assert_eq!(shard.offset_elems, end);
            end = shard.end_elems();
            let mut chunk_end = shard.offset_elems;
            for round in 0..schedule.rounds() {
                let chunk = schedule.chunk(round, owner);
                prop_assert_eq!(chunk.offset_elems, chunk_end);
                chunk_end = chunk.end_elems();
            }
            prop_assert_eq!(chunk_end, end);
            prop_assert!(schedule.chunk(schedule.rounds(), owner).is_empty());
        }
        prop_assert_eq!(end, schedule.len_elems());
        prop_assert_eq!(schedule.rounds() == 0, schedule.len_elems() == 0);
        prop_assert_eq!(schedule.steps(0, schedule.rounds()).len(), 0);
        prop_assert_eq!(schedule.steps(schedule.world_size(), 0).len(), 0);
    }

    /// Alignment is kept, and costs no owner more than one block.
    #[test]
    fn shards_are_aligned_and_even(
        world_size in 1..=MAX_WORLD_SIZE,
        len_elems in 0..100_000usize,
        align_elems in 1..3000usize,
    ) {
        let schedule =
            Schedule::new(Collective::AllReduce, Algorithm::Ring, world_size, len_elems, 1024, align_elems).unwrap();
        let lens: Vec<_> = (0..world_size).map(|owner| schedule.shard(owner)).collect();
        for shard in &lens {
            prop_assert!(shard.offset_elems % align_elems == 0 || shard.offset_elems == len_elems);
        }
        let longest = lens.iter().map(|shard| shard.len_elems).max().unwrap();
        let blocks = len_elems.div_ceil(align_elems);
        prop_assert!(longest <= blocks.div_ceil(world_size as usize) * align_elems);
    }

    /// Near the end of the address space every number is either right or refused.
    #[test]
    fn huge_sizes_are_right_or_refused(
        world_size in 1..=MAX_WORLD_SIZE,
        collective in 0..4u8,
        algorithm in algorithm(),
        below in prop_oneof![0..1000usize, any::<usize>()],
        round_elems in prop_oneof![1..1000usize, (0..1000usize).prop_map(|below| usize::MAX - below), 1..usize::MAX],
        align_elems in prop_oneof![1..1000usize, (0..1000usize).prop_map(|below| usize::MAX - below), 1..usize::MAX],
        round in any::<u64>(),
    ) {
        let len_elems = usize::MAX - below;
        let (collective, len_elems) = match collective {
            0 => (Collective::AllReduce, len_elems),
            1 => (Collective::ReduceScatter, len_elems - len_elems % world_size as usize),
            2 => (Collective::AllGather, len_elems - len_elems % world_size as usize),
            _ => (Collective::Broadcast { root: world_size - 1 }, len_elems),
        };
        let Ok(schedule) = Schedule::new(collective, algorithm, world_size, len_elems, round_elems, align_elems) else {
            // Refused only where the busiest rank's count does not fit.
            let (all, peers) = (len_elems as u128, u128::from(world_size) - 1);
            prop_assert!(peers * all * 2 > usize::MAX as u128, "{} elements fit", len_elems);
            return Ok(());
        };
        let mut end = 0u128;
        let mut sent = 0u128;
        for owner in 0..world_size {
            let shard = schedule.shard(owner);
            prop_assert_eq!(shard.offset_elems as u128, end);
            end += shard.len_elems as u128;
            sent += schedule.wire_elems_sent(owner) as u128;
            let last = schedule.chunk(schedule.rounds().saturating_sub(1), owner);
            prop_assert!(last.len_elems <= round_elems);
            prop_assert_eq!(last.offset_elems as u128 + last.len_elems as u128, end);
            let any = schedule.chunk(round, owner);
            prop_assert!(any.offset_elems >= shard.offset_elems && any.end_elems() <= shard.end_elems());
            prop_assert!(round < schedule.rounds() || any.is_empty());
        }
        prop_assert_eq!(end, len_elems as u128);
        let phases = if collective == Collective::AllReduce { 2 } else { 1 };
        prop_assert_eq!(sent, phases * (u128::from(world_size) - 1) * len_elems as u128);
    }
}

/// A copy is a handful of words, so a schedule owns no heap; and its steps need none either.
#[test]
fn schedules_are_plain_data() {
    fn assert_copy<T: Copy + Send + Sync + 'static>() {}
    assert_copy::<Schedule>();
    assert!(size_of::<Schedule>() <= 64);
}

/// The algorithms differ where they should: the ring talks to neighbours, direct lets the owner add.
#[test]
fn ring_uses_neighbours_and_direct_holds() {
    let actions = |algorithm| {
        let schedule = Schedule::new(Collective::AllReduce, algorithm, 5, 100, 7, 4).unwrap();
        let steps: Vec<_> = schedule.steps(3, 0).collect();
        let peers: BTreeSet<_> = steps.iter().map(|step| step.send.unwrap().peer).collect();
        (peers.len(), steps.iter().filter(|step| step.action == Some(Action::Hold)).count())
    };
    assert_eq!(actions(Algorithm::Ring), (1, 0));
    assert_eq!(actions(Algorithm::Direct), (4, 3));
}
