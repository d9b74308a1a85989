//! Protocols with one fault each. The checker must refuse every one, and for the reason expected; each has a control,
//! the same protocol without the fault, which passes.

use std::fmt::Debug;
use std::hash::Hash;

use annulus::schedule::{Algorithm, Collective, Schedule};
use stateright::{Checker, HasDiscoveries, Model};

use crate::meeting::{Meeting, MeetingMutant};
use crate::protocol::{LIVE, Mutant, Noticing, Protocol, SAFE, Violation};
use crate::staged::{Staged, StagedMutant};
use crate::worlds::{
    ALGORITHMS, assert_meeting_sound, assert_sound, assert_staged_sound, every_path, mismatches, schedule,
};

fn all_reduce(algorithm: Algorithm, world_size: u32) -> Vec<Schedule> {
    vec![schedule(Collective::AllReduce, algorithm, world_size, 2 * world_size as usize)]
}

/// A stream of transfers from one rank, with nothing that flows back but credits.
fn broadcast(algorithm: Algorithm) -> Vec<Schedule> {
    vec![schedule(Collective::Broadcast { root: 0 }, algorithm, 3, 5)]
}

/// Both ways to end badly of one protocol.
#[derive(Debug, PartialEq)]
struct Findings {
    violation: Option<Violation>,
    hangs: bool,
}

fn findings(protocol: Protocol) -> Findings {
    explore(protocol.compile(), |state| state.violation)
}

fn staged_findings(protocol: Staged) -> Findings {
    explore(protocol.compile(), |state| state.violation)
}

fn meeting_findings(meeting: Meeting) -> Findings {
    explore(meeting, |state| state.violation)
}

fn explore<M>(model: M, violation: fn(&M::State) -> Option<Violation>) -> Findings
where
    M: Model + Send + Sync + 'static,
    M::State: Clone + Debug + Hash + PartialEq + Send + Sync + 'static,
    M::Action: Clone + Debug + PartialEq,
{
    // The first counterexample to each, so that a mutant with a large state space is no burden.
    let found = HasDiscoveries::AllOf([SAFE, LIVE].into());
    let checker = model.checker().finish_when(found).spawn_bfs().join();
    let violation = checker.discovery(SAFE).and_then(|path| violation(path.last_state()));
    Findings { violation, hangs: checker.discovery(LIVE).is_some() }
}

#[test]
fn one_slot_deadlocks_a_cut_through_executor() {
    for algorithm in ALGORITHMS {
        for world_size in 2..=4 {
            let control = Protocol { deaths: false, ..Protocol::new(all_reduce(algorithm, world_size)) };
            assert_sound(control.clone());
            let found = findings(Protocol { slots: 1, ..control });
            assert_eq!(found, Findings { violation: None, hangs: true }, "{algorithm:?} of {world_size}");
        }
    }
}

#[test]
fn writing_without_a_credit_overwrites() {
    for operations in [broadcast(Algorithm::Ring), broadcast(Algorithm::Direct), all_reduce(Algorithm::Ring, 3)] {
        let control = Protocol { deaths: false, ..Protocol::new(operations) };
        assert_sound(control.clone());
        let found = findings(Protocol { mutant: Some(Mutant::NoCreditWait), ..control.clone() });
        assert_eq!(found.violation, Some(Violation::Overwritten));
        let found = findings(Protocol { mutant: Some(Mutant::CreditOffByOne), ..control });
        assert_eq!(found.violation, Some(Violation::Overwritten));
    }
}

#[test]
fn a_wait_for_the_generation_before_reads_too_early() {
    for algorithm in ALGORITHMS {
        for operations in [broadcast(algorithm), all_reduce(algorithm, 3)] {
            let control = Protocol { deaths: false, ..Protocol::new(operations) };
            assert_sound(control.clone());
            let found = findings(Protocol { mutant: Some(Mutant::PostOffByOne), ..control });
            assert_eq!(found.violation, Some(Violation::WrongGeneration));
        }
    }
}

#[test]
fn generations_compared_as_plain_numbers_break_at_the_wrap() {
    for algorithm in ALGORITHMS {
        for operations in [broadcast(algorithm), all_reduce(algorithm, 3)] {
            let plain = |base| Protocol {
                base,
                deaths: false,
                mutant: Some(Mutant::PlainCompare),
                ..Protocol::new(operations.clone())
            };
            // Far from the wrap the fault does not show: it is the wrap that finds it.
            let far = Protocol { operations: vec![schedule(Collective::AllReduce, algorithm, 2, 2)], ..plain(2) };
            assert!(!far.clone().compile().wraps());
            assert_sound(far);
            for base in 5..8 {
                let found = findings(plain(base));
                assert!(found.violation.is_some() || found.hangs, "{algorithm:?} from {base}: {found:?}");
            }
        }
    }
}

#[test]
fn posting_before_writing_shows_an_old_slot() {
    for algorithm in ALGORITHMS {
        let mutant = Some(Mutant::PostBeforeWrite);
        let found = findings(Protocol { deaths: false, mutant, ..Protocol::new(all_reduce(algorithm, 2)) });
        assert!(found.violation.is_some(), "{algorithm:?}");
    }
}

#[test]
fn giving_back_before_reading_loses_the_slot() {
    for operations in [broadcast(Algorithm::Ring), broadcast(Algorithm::Direct), all_reduce(Algorithm::Ring, 3)] {
        let control = Protocol { deaths: false, cut_through: false, ..Protocol::new(operations) };
        assert_sound(control.clone());
        let found = findings(Protocol { mutant: Some(Mutant::CreditBeforeRead), ..control });
        assert_eq!(found.violation, Some(Violation::WrongGeneration));
    }
}

#[test]
fn generations_that_start_again_are_refused() {
    for algorithm in ALGORITHMS {
        let two = [all_reduce(algorithm, 2), all_reduce(algorithm, 2)].concat();
        let control = Protocol { deaths: false, ..Protocol::new(two) };
        assert_sound(control.clone());
        let found = findings(Protocol { mutant: Some(Mutant::GenerationsRestart), ..control });
        assert!(found.violation.is_some() || found.hangs, "{algorithm:?}");
    }
}

#[test]
fn an_unnoticed_death_hangs_the_survivors() {
    for algorithm in ALGORITHMS {
        for world_size in 2..=3 {
            let operations = all_reduce(algorithm, world_size);
            let found = findings(Protocol { noticing: Noticing::Never, ..Protocol::new(operations) });
            assert_eq!(found, Findings { violation: None, hangs: true }, "{algorithm:?} of {world_size}");
        }
    }
}

/// Every wait must look at the fault word, that for credits too.
#[test]
fn a_wait_that_ignores_the_fault_word_hangs() {
    for operations in [broadcast(Algorithm::Ring), all_reduce(Algorithm::Ring, 3)] {
        let control = Protocol::new(operations);
        assert_sound(control.clone());
        let found = findings(Protocol { mutant: Some(Mutant::CreditWaitIgnoresFault), ..control });
        assert_eq!(found, Findings { violation: None, hangs: true });
    }
}

/// Of the host's staged protocol: `len_elems` such that there are more rounds than slots.
fn staged(collective: Collective) -> Staged {
    let operation = schedule(collective, Algorithm::Direct, 3, if rootless(collective) { 9 } else { 4 });
    let control = Staged { deaths: false, ..Staged::new(vec![operation]) };
    assert_staged_sound(control.clone());
    control
}

fn rootless(collective: Collective) -> bool {
    !matches!(collective, Collective::Broadcast { .. })
}

#[test]
fn staged_with_one_slot_deadlocks() {
    let found = staged_findings(Staged { slots: 1, ..staged(Collective::AllReduce) });
    assert_eq!(found, Findings { violation: None, hangs: true });
}

/// Where every rank needs something of every other in each round, nobody can get two rounds ahead, flags or not. The
/// waits matter where data flow one way: terms of a reduce-scatter, results of a root.
#[test]
fn staged_without_a_wait_overwrites_or_misreads() {
    let scatter = staged(Collective::ReduceScatter);
    let broadcast = staged(Collective::Broadcast { root: 1 });
    for (mutant, control, expected) in [
        (StagedMutant::NoTermsWait, &scatter, Violation::Overwritten),
        (StagedMutant::NoResultWait, &broadcast, Violation::Overwritten),
        (StagedMutant::NoSentWait, &scatter, Violation::WrongGeneration),
        (StagedMutant::OffByOne, &scatter, Violation::WrongGeneration),
        (StagedMutant::OffByOne, &broadcast, Violation::Overwritten),
    ] {
        let found = staged_findings(Staged { mutant: Some(mutant), ..control.clone() });
        assert_eq!(found.violation, Some(expected), "{mutant:?}");
    }
}

#[test]
fn staged_generations_compared_as_plain_numbers_break_at_the_wrap() {
    for collective in [Collective::AllReduce, Collective::Broadcast { root: 1 }] {
        let control = staged(collective);
        let plain = |base| Staged { base, mutant: Some(StagedMutant::PlainCompare), ..control.clone() };
        assert_staged_sound(plain(2));
        let found = staged_findings(plain(6));
        assert!(found.violation.is_some() || found.hangs, "{collective:?}: {found:?}");
    }
}

/// Why every operation posts all three flags.
#[test]
fn staged_flags_that_stay_behind_are_refused() {
    let operation = |collective, len_elems| schedule(collective, Algorithm::Direct, 2, len_elems);
    let operations = vec![operation(Collective::ReduceScatter, 6), operation(Collective::AllReduce, 2)];
    let control = Staged { deaths: false, ..Staged::new(operations) };
    assert_staged_sound(control.clone());
    let found = staged_findings(Staged { mutant: Some(StagedMutant::UnusedFlagsStay), ..control });
    assert!(found.violation.is_some() || found.hangs, "{found:?}");
}

#[test]
fn staged_with_an_unnoticed_death_hangs() {
    let found = staged_findings(Staged { deaths: true, noticing: Noticing::Never, ..staged(Collective::AllReduce) });
    assert_eq!(found, Findings { violation: None, hangs: true });
}

/// Operations of every path and some that differ, one after the other in any order.
fn meeting(world_size: usize) -> Meeting {
    let operations = [every_path(world_size), mismatches(world_size)].concat();
    Meeting { deaths: false, ..Meeting::new(operations) }
}

#[test]
fn meetings_with_one_place_for_two_or_a_wait_too_few_are_refused() {
    for world_size in 2..=3 {
        assert_meeting_sound(meeting(world_size));
        for (mutant, expected) in [
            (MeetingMutant::OneCall, Violation::Overwritten),
            (MeetingMutant::OneMailbox, Violation::Overwritten),
            (MeetingMutant::ArriveFirst, Violation::WrongGeneration),
            (MeetingMutant::NoArrivedWait, Violation::WrongGeneration),
        ] {
            let found = meeting_findings(Meeting { mutant: Some(mutant), ..meeting(world_size) });
            assert_eq!(found.violation, Some(expected), "{mutant:?} of {world_size}");
        }
    }
}

/// The generation would do for choosing the mailbox's place; what a rank counts by itself would not. Payloads put there
/// in vain are counted by some only, and so are those of a root.
#[test]
fn mailboxes_that_each_rank_counts_for_itself_are_misread() {
    let mutant = Some(MeetingMutant::TurnsOfOwnPayloads);
    for (operation, is_refused) in [(0, false), (2, true), (5, true)] {
        let paths = every_path(3);
        let operations = vec![paths[1].clone(), paths[3].clone(), paths[operation].clone()];
        let control = Meeting { deaths: false, ..Meeting::new(operations) };
        assert_meeting_sound(control.clone());
        let found = meeting_findings(Meeting { mutant, ..control });
        assert_eq!(found.violation, is_refused.then_some(Violation::WrongGeneration), "{operation}");
    }
}

#[test]
fn mapped_memory_given_back_too_early_is_overwritten_or_misread() {
    let paths = every_path(2);
    for (operation, expected) in [(3, Violation::WrongResult), (4, Violation::WrongValue)] {
        let operations = vec![paths[1].clone(), paths[operation].clone()];
        let control = Meeting { deaths: false, ..Meeting::new(operations) };
        assert_meeting_sound(control.clone());
        let found = meeting_findings(Meeting { mutant: Some(MeetingMutant::NoDoneWait), ..control.clone() });
        assert_eq!(found.violation, Some(expected));
        let control = Meeting { noticing: Noticing::Deadline, ..control };
        assert_meeting_sound(control.clone());
        let found = meeting_findings(Meeting { mutant: Some(MeetingMutant::GivesBackAfterErrors), ..control });
        assert!(found.violation.is_some(), "{operation}");
    }
}

#[test]
fn a_call_that_is_compared_with_one_peer_alone_succeeds_in_spite_of_a_mismatch() {
    for (mismatch, expected) in (0..).zip([Violation::WrongResult, Violation::WrongValue]) {
        let operations = [every_path(3), vec![mismatches(3).swap_remove(mismatch)]].concat();
        let control = Meeting { deaths: false, ..Meeting::new(operations) };
        let found = meeting_findings(Meeting { mutant: Some(MeetingMutant::ComparesOnce), ..control });
        assert_eq!(found.violation, Some(expected), "{mismatch}");
    }
}

#[test]
fn meetings_that_compare_generations_as_plain_numbers_break_at_the_wrap() {
    let found = meeting_findings(Meeting { mutant: Some(MeetingMutant::PlainCompare), ..meeting(2) });
    assert!(found.violation.is_some() || found.hangs, "{found:?}");
}

#[test]
fn meetings_that_hear_of_no_death_hang() {
    let control = Meeting { deaths: true, ..meeting(2) };
    assert_meeting_sound(control.clone());
    for mutated in [
        Meeting { noticing: Noticing::Never, ..control.clone() },
        Meeting { mutant: Some(MeetingMutant::DoneWaitIgnoresFault), ..control },
    ] {
        assert_eq!(meeting_findings(mutated), Findings { violation: None, hangs: true });
    }
}
