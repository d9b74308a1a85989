//! Worlds of 1 to 4 ranks, explored completely: about fifteen million states, less than a minute on one core.

use std::fmt::Debug;
use std::hash::Hash;

use annulus::schedule::{Algorithm, Collective, Schedule};
use stateright::{Checker, Model};

use crate::calls::{Call, Kind, Len};
use crate::meeting::Meeting;
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

pub fn assert_meeting_sound(meeting: Meeting) {
    let may_fail = meeting.deaths || meeting.noticing == Noticing::Deadline || meeting.has_mismatch();
    explore(meeting.clone(), may_fail, &meeting);
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

fn same(world_size: usize, kind: Kind, len: Len, registered: bool) -> Vec<Call> {
    vec![Call { kind, len, registered }; world_size]
}

/// One of each path, and one that fills a mailbox in vain because another rank's buffer is registered.
pub fn every_path(world_size: usize) -> Vec<Vec<Call>> {
    let mut in_vain = same(world_size, Kind::AllReduce, Len::Middle, false);
    in_vain[0].registered = true;
    vec![
        same(world_size, Kind::Barrier, Len::Large, false),
        same(world_size, Kind::AllReduce, Len::Small, false),
        same(world_size, Kind::Broadcast { root: 0 }, Len::Small, false),
        same(world_size, Kind::AllReduce, Len::Large, true),
        same(world_size, Kind::Broadcast { root: 0 }, Len::Large, true),
        in_vain,
    ]
}

fn more(world_size: usize) -> Vec<Vec<Call>> {
    vec![
        same(world_size, Kind::Broadcast { root: 1 }, Len::Small, true),
        same(world_size, Kind::Broadcast { root: 1 }, Len::Large, true),
        same(world_size, Kind::AllGather, Len::Large, true),
        same(world_size, Kind::ReduceScatter, Len::Large, true),
        same(world_size, Kind::AllReduce, Len::Large, false),
    ]
}

/// One rank calls something else than the others, or all differ.
pub fn mismatches(world_size: usize) -> Vec<Vec<Call>> {
    let differing = |one: usize, other: Call, mut calls: Vec<Call>| {
        calls[one] = other;
        calls
    };
    let barrier = Call { kind: Kind::Barrier, len: Len::Large, registered: false };
    let broadcast = Call { kind: Kind::Broadcast { root: 0 }, len: Len::Large, registered: true };
    let small = Call { kind: Kind::AllReduce, len: Len::Small, registered: true };
    let mapped = same(world_size, Kind::AllReduce, Len::Large, true);
    vec![
        differing(world_size - 1, barrier, same(world_size, Kind::AllReduce, Len::Small, false)),
        differing(0, broadcast, mapped.clone()),
        differing(1, small, mapped.clone()),
        differing(1, small, differing(0, broadcast, mapped)),
    ]
}

/// 1.7 million states; generations have three bits here, and two where there are more ranks.
#[test]
fn meetings_of_two() {
    let operations = [every_path(2), more(2), mismatches(2)].concat();
    for noticing in NOTICING {
        let deaths = noticing == Noticing::Monitor;
        assert_meeting_sound(Meeting { circle: 8, deaths, noticing, ..Meeting::new(operations.clone()) });
    }
}

/// 1.3 million states.
#[test]
fn meetings_of_three() {
    let all = [every_path(3), more(3), mismatches(3)].concat();
    assert_meeting_sound(Meeting { deaths: false, ..Meeting::new(all) });
    let noticing = Noticing::Deadline;
    assert_meeting_sound(Meeting { deaths: false, noticing, ..Meeting::new(every_path(3)) });
}

/// 3.9 million states.
#[test]
fn meetings_of_three_with_a_death() {
    assert_meeting_sound(Meeting::new([every_path(3), mismatches(3)].concat()));
}

/// 1.1 million states, without barriers and the one-step all-reduce. With a death two operations alone have 5 million.
#[test]
fn meetings_of_four() {
    assert_meeting_sound(Meeting { deaths: false, ..Meeting::new(every_path(4).split_off(2)) });
}
