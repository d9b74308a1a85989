//! Plans and machines with one fault each. If the simulator lets one of them pass, it proves nothing about the others.

use std::collections::BTreeSet;

use annulus::schedule::{Action, Algorithm, Collective, Schedule, Transfer};

use crate::simulator::{Machine, Plan, Planned, Violation, check_pairing, chooser, run};

const TWO_SLOTS: Machine = Machine { slots: 2, cut_through: true, waits_for_credit: true };
const ALGORITHMS: [Algorithm; 2] = [Algorithm::Ring, Algorithm::Direct];

fn all_reduce(algorithm: Algorithm, world_size: u32) -> (Schedule, Plan) {
    // Three elements a shard in rounds of two: no chunk is empty, so every fault touches data.
    let len_elems = 3 * world_size as usize;
    let schedule = Schedule::new(Collective::AllReduce, algorithm, world_size, len_elems, 2, 1).unwrap();
    (schedule, Plan::of(&schedule))
}

/// What some interleaving of the plan violates; none if all of 40 pass.
fn violations(plan: &Plan, machine: Machine) -> BTreeSet<Violation> {
    (0..40).filter_map(|seed| run(plan, machine, chooser(seed)).err()).collect()
}

/// Applies `damage` to every step of every rank in turn, and asserts that each such plan is refused by simulation
/// alone. `damage` says whether it could be applied. Returns all the ways in which they failed.
fn every_damage_is_refused(
    algorithm: Algorithm,
    mut damage: impl FnMut(&Schedule, &mut Vec<Planned>, usize) -> bool,
) -> BTreeSet<Violation> {
    let mut seen = BTreeSet::new();
    let mut applied = 0;
    for world_size in [3, 4] {
        let (schedule, sound) = all_reduce(algorithm, world_size);
        for rank in 0..sound.ranks.len() {
            for place in 0..sound.ranks[rank].len() {
                let mut plan = sound.clone();
                if !damage(&schedule, &mut plan.ranks[rank], place) {
                    continue;
                }
                for machine in [TWO_SLOTS, Machine { cut_through: false, ..TWO_SLOTS }] {
                    let violations = violations(&plan, machine);
                    assert!(!violations.is_empty(), "{algorithm:?} rank {rank} {:?} passed", plan.ranks[rank][place]);
                    seen.extend(violations);
                }
                applied += 1;
            }
        }
    }
    assert!(applied > 0, "the damage never applied");
    seen
}

fn chunk_after(schedule: &Schedule, round: u64, transfer: Transfer) -> Transfer {
    let chunk = (transfer.chunk + 1) % schedule.world_size();
    Transfer { chunk, span: schedule.chunk(round, chunk), ..transfer }
}

fn other_peer(schedule: &Schedule, rank: u32, transfer: Transfer) -> Transfer {
    let peer = (0..schedule.world_size()).find(|&peer| peer != rank && peer != transfer.peer).unwrap();
    Transfer { peer, ..transfer }
}

fn rank_of(schedule: &Schedule, planned: &Planned) -> u32 {
    (0..schedule.world_size()).find(|&owner| schedule.chunk(planned.round, owner) == planned.own).unwrap()
}

#[test]
fn the_undamaged_plans_pass() {
    for algorithm in ALGORITHMS {
        for world_size in [3, 4] {
            let (_, plan) = all_reduce(algorithm, world_size);
            assert_eq!(violations(&plan, TWO_SLOTS), BTreeSet::new());
            assert_eq!(check_pairing(&plan), Ok(()));
        }
    }
}

#[test]
fn a_chunk_off_by_one_is_refused() {
    for algorithm in ALGORITHMS {
        let sent = every_damage_is_refused(algorithm, |schedule, planned, place| {
            let Planned { round, step, .. } = &mut planned[place];
            step.send = step.send.map(|transfer| chunk_after(schedule, *round, transfer));
            true
        });
        assert!(sent.contains(&Violation::WrongPiece), "{sent:?}");
        let received = every_damage_is_refused(algorithm, |schedule, planned, place| {
            let Planned { round, step, .. } = &mut planned[place];
            step.recv = step.recv.map(|transfer| chunk_after(schedule, *round, transfer));
            true
        });
        assert!(received.contains(&Violation::WrongPiece), "{received:?}");
    }
}

#[test]
fn an_element_off_by_one_is_refused() {
    for algorithm in ALGORITHMS {
        every_damage_is_refused(algorithm, |_, planned, place| {
            let span = &mut planned[place].step.recv.as_mut().unwrap().span;
            span.offset_elems += 1;
            true
        });
        every_damage_is_refused(algorithm, |_, planned, place| {
            let span = &mut planned[place].step.recv.as_mut().unwrap().span;
            span.len_elems -= 1;
            true
        });
    }
}

#[test]
fn a_swapped_peer_is_refused() {
    for algorithm in ALGORITHMS {
        every_damage_is_refused(algorithm, |schedule, planned, place| {
            let rank = rank_of(schedule, &planned[place]);
            let send = &mut planned[place].step.send;
            *send = send.map(|transfer| other_peer(schedule, rank, transfer));
            true
        });
        every_damage_is_refused(algorithm, |schedule, planned, place| {
            let rank = rank_of(schedule, &planned[place]);
            let recv = &mut planned[place].step.recv;
            *recv = recv.map(|transfer| other_peer(schedule, rank, transfer));
            true
        });
        // Even where all ranks agree to go the other way round.
        let (_, mut plan) = all_reduce(algorithm, 3);
        for planned in &mut plan.ranks {
            let step = &mut planned[0].step;
            let (send, recv) = (step.send.as_mut().unwrap(), step.recv.as_mut().unwrap());
            std::mem::swap(&mut send.peer, &mut recv.peer);
        }
        assert!(!violations(&plan, TWO_SLOTS).is_empty());
    }
}

#[test]
fn a_skipped_or_doubled_step_is_refused() {
    for algorithm in ALGORITHMS {
        let skipped = every_damage_is_refused(algorithm, |_, planned, place| {
            planned.remove(place);
            true
        });
        assert!(skipped.contains(&Violation::Deadlock), "{skipped:?}");
        every_damage_is_refused(algorithm, |_, planned, place| {
            planned.insert(place, planned[place].clone());
            true
        });
    }
}

#[test]
fn a_skipped_or_doubled_round_is_refused() {
    for algorithm in ALGORITHMS {
        // By one rank.
        every_damage_is_refused(algorithm, |_, planned, place| {
            let round = planned[place].round;
            planned.retain(|planned| planned.round != round);
            true
        });
        for round in 0..2 {
            // By all of them together.
            let (_, mut plan) = all_reduce(algorithm, 3);
            plan.ranks.iter_mut().for_each(|planned| planned.retain(|planned| planned.round != round));
            assert_eq!(violations(&plan, TWO_SLOTS), [Violation::WrongTerms].into());
            let (_, mut plan) = all_reduce(algorithm, 3);
            for planned in &mut plan.ranks {
                let again: Vec<_> = planned.iter().filter(|planned| planned.round == round).cloned().collect();
                planned.extend(again);
            }
            assert!(!violations(&plan, TWO_SLOTS).is_empty());
        }
    }
}

#[test]
fn a_wrong_action_is_refused() {
    for algorithm in ALGORITHMS {
        for action in [Action::Copy, Action::Reduce, Action::Hold, Action::Finish] {
            every_damage_is_refused(algorithm, |_, planned, place| {
                planned[place].step.action.replace(action) != Some(action)
            });
        }
    }
}

#[test]
fn steps_out_of_order_are_refused() {
    every_damage_is_refused(Algorithm::Ring, |_, planned, place| {
        let swaps = place + 1 < planned.len();
        if swaps {
            planned.swap(place, place + 1);
        }
        swaps
    });
}

/// A receive before its step's send: everybody waits for everybody.
#[test]
fn receiving_before_sending_deadlocks() {
    for algorithm in ALGORITHMS {
        let (_, mut plan) = all_reduce(algorithm, 3);
        for planned in &mut plan.ranks {
            let mut reordered = Vec::new();
            for Planned { round, own, step } in planned.drain(..) {
                let recv = annulus::schedule::Step { send: None, ..step };
                let send = annulus::schedule::Step { recv: None, action: None, ..step };
                reordered.extend([recv, send].map(|step| Planned { round, own, step }));
            }
            *planned = reordered;
        }
        assert_eq!(violations(&plan, TWO_SLOTS), [Violation::Deadlock].into());
    }
}

#[test]
fn one_slot_deadlocks_a_cut_through_executor() {
    for algorithm in ALGORITHMS {
        for world_size in 2..=6 {
            let (_, plan) = all_reduce(algorithm, world_size);
            assert_eq!(violations(&plan, TWO_SLOTS), BTreeSet::new());
            let one_slot = violations(&plan, Machine { slots: 1, ..TWO_SLOTS });
            assert!(one_slot.contains(&Violation::Deadlock), "{algorithm:?} of {world_size}: {one_slot:?}");
        }
    }
}

/// Where data flow back (all-reduce by direct, for one) a writer cannot get two slots ahead even without credits; the
/// ring's senders and a root can.
#[test]
fn a_writer_without_credits_overwrites() {
    let broadcast =
        |algorithm| Plan::of(&Schedule::new(Collective::Broadcast { root: 1 }, algorithm, 4, 12, 2, 1).unwrap());
    let (_, ring_all_reduce) = all_reduce(Algorithm::Ring, 4);
    for plan in [ring_all_reduce, broadcast(Algorithm::Ring), broadcast(Algorithm::Direct)] {
        for cut_through in [false, true] {
            let machine = Machine { slots: 2, cut_through, waits_for_credit: true };
            assert_eq!(violations(&plan, machine), BTreeSet::new());
            let hasty = violations(&plan, Machine { waits_for_credit: false, ..machine });
            assert!(hasty.contains(&Violation::Overwritten), "{:?} {:?}: {hasty:?}", plan.collective, plan.algorithm);
        }
    }
}

/// The pairing check refuses what a simulation cannot see: damage to an empty chunk.
#[test]
fn pairing_sees_damage_to_empty_chunks() {
    for algorithm in ALGORITHMS {
        let schedule = Schedule::new(Collective::AllReduce, algorithm, 4, 2, 2, 1).unwrap();
        let sound = Plan::of(&schedule);
        assert_eq!(check_pairing(&sound), Ok(()));
        for rank in 0..4 {
            for place in 0..sound.ranks[rank].len() {
                let mut plan = sound.clone();
                let Planned { round, step, .. } = &mut plan.ranks[rank][place];
                step.send = step.send.map(|transfer| chunk_after(&schedule, *round, transfer));
                assert_eq!(check_pairing(&plan), Err(Violation::Mispaired));
            }
        }
    }
}
