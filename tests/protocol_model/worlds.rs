//! Worlds of 1 to 4 ranks, explored completely: about six million states, half a minute on one core.

use std::fmt::Debug;
use std::hash::Hash;

use annulus::schedule::{Algorithm, Collective, Schedule};
use stateright::{Checker, Model};

use crate::protocol::{COMPLETES, FAILURE, LIVE, Noticing, Protocol, SAFE, SUCCESS};
use crate::staged::Staged;

pub const ALGORITHMS: [Algorithm; 2] = [Algorithm::Ring, Algorithm::Direct];
const NOTICING: [Noticing; 2] = [Noticing::Monitor, Noticing::Deadline];

/// One element a round.
pub fn schedule(collective: Collective, algorithm: Algorithm, world_size: u32, len_elems: usize) -> Schedule {
    Schedule::new(collective, algorithm, world_size, len_elems, 1, 1).unwrap()
}

pub fn assert_sound(protocol: Protocol) {
    let may_fail = protocol.deaths || protocol.noticing == Noticing::Deadline;
    let several = protocol.operations[0].world_size() > 1;
    explore(protocol.clone().compile(), may_fail && several, &protocol);
}

pub fn assert_staged_sound(protocol: Staged) {
    let may_fail = protocol.deaths || protocol.noticing == Noticing::Deadline;
    let several = protocol.operations[0].world_size() > 1;
    explore(protocol.clone().compile(), may_fail && several, &protocol);
}

/// Explores every interleaving; panics with the path to the first bad state.
fn explore<M>(model: M, may_fail: bool, what: &dyn Debug)
where
    M: Model + Send + Sync + 'static,
    M::State: Clone + Debug + Hash + PartialEq + Send + Sync + 'static,
    M::Action: Clone + Debug + PartialEq,
{
    let checker = model.checker().spawn_bfs().join();
    assert!(checker.is_done());
    for property in [SAFE, LIVE, COMPLETES] {
        if let Some(path) = checker.discovery(property) {
            let end = path.last_state().clone();
            panic!("not so: {property}\n{what:#?}\n{:?}\n{end:#?}", path.into_actions());
        }
    }
    assert!(checker.discovery(SUCCESS).is_some(), "no run succeeds: {what:#?}");
    assert_eq!(checker.discovery(FAILURE).is_some(), may_fail, "{what:#?}");
    println!("{} states: {what:?}", checker.unique_state_count());
}

#[test]
fn all_reduce_of_one_to_four() {
    for world_size in 1..=4 {
        for algorithm in ALGORITHMS {
            for (slots, cut_through) in [(2, false), (2, true), (3, true)] {
                for noticing in NOTICING {
                    let operation = schedule(Collective::AllReduce, algorithm, world_size, world_size as usize);
                    assert_sound(Protocol { slots, cut_through, noticing, ..Protocol::new(vec![operation]) });
                }
            }
        }
    }
}

/// Two rounds, in the second of which the last ranks own nothing: their transfers are empty but do take place.
#[test]
fn all_reduce_in_rounds() {
    for (world_size, len_elems) in [(1, 3), (2, 7), (3, 4), (4, 5)] {
        for algorithm in ALGORITHMS {
            let operation = schedule(Collective::AllReduce, algorithm, world_size, len_elems);
            assert!(operation.rounds() > 1);
            assert_sound(Protocol::new(vec![operation]));
        }
    }
}

#[test]
fn the_other_collectives() {
    for world_size in 1..=4 {
        for algorithm in ALGORITHMS {
            for collective in
                [Collective::ReduceScatter, Collective::AllGather, Collective::Broadcast { root: world_size - 1 }]
            {
                for noticing in NOTICING {
                    let len_elems = if world_size == 4 { 4 } else { 2 * world_size as usize };
                    let operation = schedule(collective, algorithm, world_size, len_elems);
                    assert_sound(Protocol { noticing, ..Protocol::new(vec![operation]) });
                }
            }
        }
    }
}

/// Generations go on from operation to operation, whatever these are, and start anywhere on the circle.
#[test]
fn operations_one_after_the_other() {
    for base in 0..8 {
        let of = |world_size| {
            vec![
                schedule(Collective::AllReduce, Algorithm::Ring, world_size, world_size as usize),
                schedule(Collective::Broadcast { root: 1 }, Algorithm::Ring, world_size, 1),
                schedule(Collective::AllReduce, Algorithm::Direct, world_size, world_size as usize),
            ]
        };
        assert_sound(Protocol { base, ..Protocol::new(of(2)) });
        if base == 6 {
            assert_sound(Protocol { base, ..Protocol::new(of(3)) });
        }
    }
}

/// One slot is enough for an executor that gives it back before it sends on; see the mutants for the one that does not.
#[test]
fn one_slot_is_enough_without_cut_through() {
    for world_size in 2..=4 {
        for algorithm in ALGORITHMS {
            let operation = schedule(Collective::AllReduce, algorithm, world_size, world_size as usize);
            assert_sound(Protocol { slots: 1, cut_through: false, ..Protocol::new(vec![operation]) });
        }
    }
}

/// Without this the generations' wrap-around would go unchecked.
#[test]
fn the_generations_wrap() {
    for world_size in 2..=4 {
        for algorithm in ALGORITHMS {
            let operation = schedule(Collective::AllReduce, algorithm, world_size, world_size as usize);
            assert!(Protocol::new(vec![operation]).compile().wraps());
        }
    }
}

#[test]
fn staged_direct_of_one_to_four() {
    for world_size in 1..=4 {
        let len_elems = if world_size == 4 { 4 } else { 3 * world_size as usize };
        for collective in [
            Collective::AllReduce,
            Collective::ReduceScatter,
            Collective::AllGather,
            Collective::Broadcast { root: world_size - 1 },
        ] {
            for noticing in NOTICING {
                let operation = schedule(collective, Algorithm::Direct, world_size, len_elems);
                assert_staged_sound(Staged { noticing, ..Staged::new(vec![operation]) });
            }
        }
    }
}

/// Operations with different phases, and of vectors of which the last ranks own nothing in the last round.
#[test]
fn staged_operations_one_after_the_other() {
    for base in 0..8 {
        let of = |world_size| {
            vec![
                schedule(Collective::AllReduce, Algorithm::Direct, world_size, 2),
                schedule(Collective::Broadcast { root: 1 }, Algorithm::Direct, world_size, 3),
                schedule(Collective::ReduceScatter, Algorithm::Direct, world_size, world_size as usize),
                schedule(Collective::AllReduce, Algorithm::Direct, world_size, world_size as usize + 1),
            ]
        };
        assert_staged_sound(Staged { base, ..Staged::new(of(2)) });
        if base == 6 {
            assert_staged_sound(Staged { base, deaths: false, ..Staged::new(of(3)) });
        }
    }
}
