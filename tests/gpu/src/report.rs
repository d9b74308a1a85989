//! All findings, as JSON and as a table.

use std::fmt::Write;
use std::path::Path;

use serde::Serialize;

use crate::Result;
use crate::card::Card;
use crate::part::Part;
use crate::record::{Check, Figure, Peer, Record, Timing};
use crate::verdict::{self, Outcome, Verdict};

/// What was found on a card.
#[derive(Debug, Serialize)]
pub struct Report {
    card: Card,
    parts: Vec<Findings>,
    /// Every goal of what was timed, and what became of it.
    goals: Vec<Verdict>,
    /// The card when all was done: clocks that fell in between explain slow rows.
    card_afterwards: Option<Card>,
}

#[derive(Debug, Serialize)]
struct Findings {
    part: String,
    records: Vec<Record>,
}

impl Report {
    /// Nothing yet.
    pub fn new(card: Card) -> Report {
        Report { card, parts: Vec::new(), goals: Vec::new(), card_afterwards: None }
    }

    /// On what.
    pub fn card(&self) -> &Card {
        &self.card
    }

    /// Adds what a part said. What one part found may decide about what another did.
    pub fn add(&mut self, part: Part, records: Vec<Record>) {
        self.parts.push(Findings { part: part.name(), records });
        self.goals = self.records().flat_map(|record| self.verdicts_on(record)).collect();
    }

    fn verdicts_on(&self, record: &Record) -> Vec<Verdict> {
        verdict::of(record, self.records(), &self.card)
    }

    /// Notes what has become of the card.
    pub fn look_again(&mut self) {
        self.card_afterwards = Card::look().ok();
    }

    fn records(&self) -> impl Iterator<Item = &Record> + Clone {
        self.parts.iter().flat_map(|part| &part.records)
    }

    /// Whether everything that was compared agreed.
    pub fn is_correct(&self) -> bool {
        !self.records().any(|record| matches!(record, Record::Check(check) if check.failure.is_some()))
    }

    /// The last line of a run.
    pub fn verdict(&self) -> String {
        let (mut right, mut wrong, mut cases) = (0, 0, 0);
        for record in self.records() {
            if let Record::Check(check) = record {
                cases += check.cases;
                if check.failure.is_some() { wrong += 1 } else { right += 1 }
            }
        }
        let count = |wanted: fn(&Outcome) -> bool| self.goals.iter().filter(|goal| wanted(&goal.outcome)).count();
        let reached = count(|outcome| *outcome == Outcome::Reached);
        let missed = count(|outcome| *outcome == Outcome::Missed);
        let open = self.goals.len() - reached - missed;
        format!(
            "{right} checks passed ({cases} cases), {wrong} failed; {reached} goals of time reached, {missed} missed, {open} open"
        )
    }

    /// Writes `annulus-gpu.json` and `annulus-gpu.md`.
    ///
    /// # Errors
    /// The folder cannot be written.
    pub fn write(&self, folder: &Path) -> Result<()> {
        std::fs::create_dir_all(folder)?;
        std::fs::write(folder.join("annulus-gpu.json"), serde_json::to_string_pretty(&self)?)?;
        std::fs::write(folder.join("annulus-gpu.md"), self.markdown()?)?;
        Ok(())
    }

    fn markdown(&self) -> std::result::Result<String, std::fmt::Error> {
        let mut text = String::new();
        let Card { name, devices, cuda, date, memory_bytes, .. } = &self.card;
        let gib = *memory_bytes as f64 / (1u64 << 30) as f64;
        writeln!(text, "# annulus on {name}\n\n{devices} device(s) of {gib:.0} GiB, CUDA {cuda}, {date} UTC.")?;
        for (when, card) in [("before", Some(&self.card)), ("after", self.card_afterwards.as_ref())] {
            let state = card.and_then(|card| card.nvidia_smi.as_deref()).unwrap_or("nvidia-smi is not there");
            writeln!(text, "\n{when}: {state}")?;
        }
        writeln!(text, "\n{}\n", self.verdict())?;
        self.timings(&mut text)?;
        self.figures(&mut text)?;
        self.checks(&mut text)?;
        Ok(text)
    }

    fn timings(&self, text: &mut String) -> std::fmt::Result {
        writeln!(
            text,
            "Limit: the time in which this card copied as many bytes, in the same run. Verdicts are by medians.\n"
        )?;
        writeln!(
            text,
            "| what | MB | us | fastest to slowest | GB/s | limit us | of copy | PyTorch us | PyTorch / annulus | verdict |"
        )?;
        writeln!(text, "|---|---:|---:|---:|---:|---:|---:|---:|---:|---|")?;
        for record in self.records() {
            let Record::Timing(timing) = record else { continue };
            let Timing { what, bytes, us, range_us: [least, most], limit_us, .. } = timing;
            let peer = self.peer_of(what);
            let peer_us = peer.map_or("-".to_owned(), |peer| format!("{:.1}", peer.us));
            let times = peer.map_or("-".to_owned(), |peer| format!("{:.2}", peer.us / us));
            let (mb, gb_s) = (*bytes as f64 / 1e6, *bytes as f64 / us / 1e3);
            let verdict = told(&self.verdicts_on(record));
            writeln!(
                text,
                "| {what} | {mb:.1} | {us:.1} | {least:.1} to {most:.1} | {gb_s:.0} | {limit_us:.1} | {:.2} | {peer_us} | \
                 {times} | {verdict} |",
                limit_us / us
            )?;
        }
        Ok(())
    }

    fn peer_of(&self, what: &str) -> Option<&Peer> {
        self.records().find_map(|record| match record {
            Record::Peer(peer) if peer.what == what => Some(peer),
            _ => None,
        })
    }

    fn figures(&self, text: &mut String) -> std::fmt::Result {
        writeln!(text, "\n| figure | value | unit | verdict |\n|---|---:|---|---|")?;
        for record in self.records() {
            if let Record::Figure(Figure { what, value, unit, .. }) = record {
                writeln!(text, "| {what} | {value:.2} | {unit} | {} |", told(&self.verdicts_on(record)))?;
            }
        }
        Ok(())
    }

    fn checks(&self, text: &mut String) -> std::fmt::Result {
        writeln!(text, "\n| part | compared | cases | s | verdict |\n|---|---|---:|---:|---|")?;
        for Findings { part, records } in &self.parts {
            for record in records {
                match record {
                    Record::Check(check) => {
                        let Check { what, cases, seconds, .. } = check;
                        writeln!(text, "| {part} | {what} | {cases} | {seconds:.1} | {} |", outcome(check))?;
                    }
                    Record::Skipped(reason) => writeln!(text, "| {part} | - | 0 | - | left out: {reason} |")?,
                    Record::Timing(_) | Record::Peer(_) | Record::Figure(_) => {}
                }
            }
        }
        Ok(())
    }
}

fn told(verdicts: &[Verdict]) -> String {
    verdicts.iter().map(Verdict::to_string).collect::<Vec<_>>().join("; ")
}

fn outcome(check: &Check) -> String {
    match (&check.failure, check.is_cut_short) {
        (Some(failure), _) => format!("FAILED: {failure}"),
        (None, true) => "agrees, as far as time allowed".to_owned(),
        (None, false) => "agrees".to_owned(),
    }
}

/// A finding as it is printed when it comes.
pub fn line(record: &Record) -> String {
    match record {
        Record::Check(check) => {
            format!("{}: {} ({} cases, {:.1} s)", check.what, outcome(check), check.cases, check.seconds)
        }
        Record::Timing(Timing { what, bytes, us, limit_us, .. }) => {
            let gb_s = *bytes as f64 / us / 1e3;
            format!("{what}: {us:.1} us, {gb_s:.0} GB/s, {:.2} of copy", limit_us / us)
        }
        Record::Peer(Peer { what, how, us, .. }) => format!("{what}: {us:.1} us by {how}"),
        Record::Figure(Figure { what, value, unit, .. }) => format!("{what}: {value:.2} {unit}"),
        Record::Skipped(reason) => format!("left out: {reason}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::{Beside, Goal, Who};

    fn card() -> Card {
        serde_json::from_value(serde_json::json!({
            "name": "a card", "devices": 1, "compute_capability": [9, 0], "memory_bytes": 1, "cuda": "12.2",
            "nvidia_smi": null, "date": "today"
        }))
        .unwrap()
    }

    fn timing(what: &str, us: f64, beside: Beside) -> Record {
        let goal = Goal { share: Some(0.9), beside: vec![beside], h100: None };
        let what = what.to_owned();
        Record::Timing(Timing { what, bytes: 1_000_000, us, range_us: [us, us], limit_us: 90.0, goal })
    }

    /// The row of a table that begins with `first`.
    fn row<'t>(text: &'t str, first: &str) -> &'t str {
        text.lines().find(|line| line.starts_with(&format!("| {first} |"))).unwrap()
    }

    #[test]
    fn every_goal_has_a_verdict_in_table_and_json() {
        let mut report = Report::new(card());
        let by_pytorch = Beside { who: Who::PyTorch, what: "cast".to_owned(), times: 1.0 };
        let by_l2 = Beside { who: Who::Annulus, what: "L2".to_owned(), times: 1.1 };
        report.add(Part::Operations, vec![timing("cast", 100.0, by_pytorch), timing("L1", 200.0, by_l2)]);
        let cost = Figure { what: "host".to_owned(), value: 31.0, unit: "us".to_owned(), at_most: Some(30.0) };
        report.add(Part::HostCost, vec![Record::Figure(cost)]);
        let text = report.markdown().unwrap();
        assert!(row(&text, "cast").ends_with(
            "| reached 0.9 of the copy's bandwidth; open: 1 x the time of PyTorch's (that was not timed) |"
        ));
        // What PyTorch took is known later.
        let peer = Peer { what: "cast".to_owned(), how: "calls".to_owned(), us: 99.0, range_us: [99.0, 99.0] };
        report.add(Part::PyTorch, vec![Record::Peer(peer)]);
        let text = report.markdown().unwrap();
        assert!(
            row(&text, "cast")
                .ends_with("| 99.0 | 0.99 | reached 0.9 of the copy's bandwidth; MISSED 1 x the time of PyTorch's |")
        );
        assert!(
            row(&text, "L1")
                .ends_with("MISSED 0.9 of the copy's bandwidth; open: 1.1 x the time of L2 (that was not timed) |")
        );
        assert_eq!(row(&text, "host"), "| host | 31.00 | us | MISSED at most 30 us |");
        assert!(report.verdict().ends_with("1 goals of time reached, 3 missed, 1 open"), "{}", report.verdict());
        assert!(report.is_correct(), "slow is not wrong");
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(
            json["goals"][1],
            serde_json::json!({
                "what": "cast", "goal": "1 x the time of PyTorch's", "outcome": "missed"
            })
        );
        assert_eq!(json["goals"][3]["outcome"], serde_json::json!({"open": "that was not timed"}));
    }
}
