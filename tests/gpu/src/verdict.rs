//! Which goals were reached.

use std::fmt;

use serde::Serialize;

use crate::card::Card;
use crate::record::{Beside, Figure, OnH100, Record, Timing, Who};

/// What became of a goal.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// It was reached.
    Reached,
    /// It was not.
    Missed,
    /// It could not be judged, and why.
    Open(String),
}

/// A goal, and what became of it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Verdict {
    /// What it is the goal of.
    pub what: String,
    /// What is wanted.
    pub goal: String,
    /// What became of it.
    pub outcome: Outcome,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.outcome {
            Outcome::Reached => write!(f, "reached {}", self.goal),
            Outcome::Missed => write!(f, "MISSED {}", self.goal),
            Outcome::Open(why) => write!(f, "open: {} ({why})", self.goal),
        }
    }
}

/// The verdicts on one finding among `all` those of a run on `card`.
pub fn of<'r>(record: &Record, all: impl Iterator<Item = &'r Record> + Clone, card: &Card) -> Vec<Verdict> {
    match record {
        Record::Timing(timing) => of_timing(timing, all, card),
        Record::Figure(Figure { what, value, unit, at_most: Some(most) }) => {
            vec![judged(what, format!("at most {most} {unit}"), value <= most)]
        }
        _ => Vec::new(),
    }
}

fn of_timing<'r>(timing: &Timing, all: impl Iterator<Item = &'r Record> + Clone, card: &Card) -> Vec<Verdict> {
    let what = &timing.what;
    let share = timing
        .goal
        .share
        .map(|least| judged(what, format!("{least} of the copy's bandwidth"), timing.limit_us / timing.us >= least));
    let beside = timing.goal.beside.iter().map(|beside| {
        let Beside { who, what: other, times } = beside;
        let whose = match who {
            Who::Annulus => format!("of {other}"),
            Who::PyTorch if other == what => "of PyTorch's".to_owned(),
            Who::PyTorch => format!("of PyTorch's {other}"),
        };
        let goal = format!("{times} x the time {whose}");
        match us_of(*who, other, all.clone()) {
            Some(us) => judged(what, goal, timing.us <= times * us),
            None => open(what, goal, "that was not timed".to_owned()),
        }
    });
    let h100 = timing.goal.h100.map(|OnH100 { us, bytes }| {
        let goal = format!("{us} us on an H100");
        if !card.is_h100() {
            open(what, goal, format!("this is {}", card.name))
        } else if timing.bytes < bytes {
            open(what, goal, format!("that is for {:.0} MB", bytes as f64 / 1e6))
        } else {
            judged(what, goal, timing.us <= us)
        }
    });
    share.into_iter().chain(beside).chain(h100).collect()
}

/// How long `who` took for `what`.
fn us_of<'r>(who: Who, what: &str, mut all: impl Iterator<Item = &'r Record>) -> Option<f64> {
    all.find_map(|record| match (who, record) {
        (Who::Annulus, Record::Timing(timing)) if timing.what == what => Some(timing.us),
        (Who::PyTorch, Record::Peer(peer)) if peer.what == what => Some(peer.us),
        _ => None,
    })
}

fn judged(what: &str, goal: String, is_reached: bool) -> Verdict {
    let outcome = if is_reached { Outcome::Reached } else { Outcome::Missed };
    Verdict { what: what.to_owned(), goal, outcome }
}

fn open(what: &str, goal: String, why: String) -> Verdict {
    Verdict { what: what.to_owned(), goal, outcome: Outcome::Open(why) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::{Goal, Peer};

    fn card(name: &str) -> Card {
        Card {
            name: name.to_owned(),
            devices: 1,
            compute_capability: [9, 0],
            memory_bytes: 80 << 30,
            cuda: "12.2".to_owned(),
            nvidia_smi: None,
            date: String::new(),
        }
    }

    /// 1,000 us would be the copy's speed.
    fn timing(what: &str, us: f64, goal: Goal) -> Record {
        let what = what.to_owned();
        Record::Timing(Timing { what, bytes: 3_000, us, range_us: [us, us], limit_us: 1000.0, goal })
    }

    fn peer(what: &str, us: f64) -> Record {
        Record::Peer(Peer { what: what.to_owned(), how: "calls".to_owned(), us, range_us: [us, us] })
    }

    fn beside(who: Who, what: &str, times: f64) -> Goal {
        Goal { beside: vec![Beside { who, what: what.to_owned(), times }], ..Goal::default() }
    }

    /// The verdicts on the first of `records`, as they are printed.
    #[track_caller]
    fn told(records: &[Record], card_name: &str) -> Vec<String> {
        of(&records[0], records.iter(), &card(card_name)).iter().map(Verdict::to_string).collect()
    }

    #[test]
    fn a_share_of_the_copy_is_a_least_bandwidth() {
        let goal = || Goal { share: Some(0.8), ..Goal::default() };
        assert_eq!(told(&[timing("norm", 1250.0, goal())], "any"), ["reached 0.8 of the copy's bandwidth"]);
        assert_eq!(told(&[timing("norm", 1251.0, goal())], "any"), ["MISSED 0.8 of the copy's bandwidth"]);
        assert_eq!(told(&[timing("norm", f64::NAN, goal())], "any"), ["MISSED 0.8 of the copy's bandwidth"]);
    }

    #[test]
    fn other_norms_are_judged_by_the_time_of_l2_and_not_by_the_copy() {
        let inf = |us| timing("inf", us, beside(Who::Annulus, "L2", 1.1));
        let l2 = |us| timing("L2", us, Goal::default());
        // Slower than 0.85 of the copy, as L2 is.
        assert_eq!(told(&[inf(2199.0), l2(2000.0)], "any"), ["reached 1.1 x the time of L2"]);
        // Faster than 0.85 of the copy, and yet too slow beside L2.
        assert_eq!(told(&[inf(1101.0), l2(1000.0)], "any"), ["MISSED 1.1 x the time of L2"]);
        // PyTorch's L2 is no measure.
        assert_eq!(told(&[inf(1.0), peer("L2", 9.0)], "any"), ["open: 1.1 x the time of L2 (that was not timed)"]);
    }

    #[test]
    fn peers_are_found_by_name() {
        let half = |us| timing("clip", us, beside(Who::PyTorch, "clip", 0.5));
        assert_eq!(
            told(&[half(500.0), peer("cast", 1.0), peer("clip", 1000.0)], "any"),
            ["reached 0.5 x the time of PyTorch's"]
        );
        assert_eq!(told(&[half(501.0), peer("clip", 1000.0)], "any"), ["MISSED 0.5 x the time of PyTorch's"]);
        let fused = timing("fused", 700.0, beside(Who::PyTorch, "cast", 1.0));
        assert_eq!(told(&[fused.clone(), peer("cast", 700.0)], "any"), ["reached 1 x the time of PyTorch's cast"]);
        assert_eq!(told(&[fused], "any"), ["open: 1 x the time of PyTorch's cast (that was not timed)"]);
    }

    #[test]
    fn microseconds_are_for_one_card_and_all_of_the_work() {
        let norm = |us, bytes| timing("norm", us, Goal { h100: Some(OnH100 { us: 1150.0, bytes }), ..Goal::default() });
        let h100 = "NVIDIA H100 80GB HBM3";
        assert_eq!(told(&[norm(1150.0, 3_000)], h100), ["reached 1150 us on an H100"]);
        assert_eq!(told(&[norm(1150.1, 2_999)], h100), ["MISSED 1150 us on an H100"]);
        assert_eq!(told(&[norm(1.0, 6_000_000)], h100), ["open: 1150 us on an H100 (that is for 6 MB)"]);
        assert_eq!(told(&[norm(1.0, 3_000)], "NVIDIA H200"), ["open: 1150 us on an H100 (this is NVIDIA H200)"]);
    }

    #[test]
    fn a_figure_may_have_a_goal() {
        let cost = |value, at_most| {
            [Record::Figure(Figure { what: "host time".to_owned(), value, unit: "us".to_owned(), at_most })]
        };
        assert_eq!(told(&cost(30.0, Some(30.0)), "any"), ["reached at most 30 us"]);
        assert_eq!(told(&cost(30.1, Some(30.0)), "any"), ["MISSED at most 30 us"]);
        assert!(told(&cost(1e9, None), "any").is_empty());
    }
}
