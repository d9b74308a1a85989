//! All findings, as JSON and as a table.

use std::fmt::Write;
use std::path::Path;

use serde::Serialize;

use crate::Result;
use crate::card::Card;
use crate::part::Part;
use crate::record::{Check, Figure, Peer, Record, Timing};

/// What was found on a card.
#[derive(Debug, Serialize)]
pub struct Report {
    card: Card,
    parts: Vec<Findings>,
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
        Report { card, parts: Vec::new(), card_afterwards: None }
    }

    /// On what.
    pub fn card(&self) -> &Card {
        &self.card
    }

    /// Adds what a part said.
    pub fn add(&mut self, part: Part, records: Vec<Record>) {
        self.parts.push(Findings { part: part.name(), records });
    }

    fn records(&self) -> impl Iterator<Item = &Record> {
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
        format!("{right} checks passed ({cases} cases), {wrong} failed")
    }

    /// Writes `annulus-gpu.json` and `annulus-gpu.md`.
    ///
    /// # Errors
    /// The folder cannot be written.
    pub fn write(&mut self, folder: &Path) -> Result<()> {
        self.card_afterwards = Card::look().ok();
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
        writeln!(text, "Limit: the time in which this card copied as many bytes, in the same run.\n")?;
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
            let verdict = self.verdict_of(timing, peer);
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

    fn verdict_of(&self, timing: &Timing, peer: Option<&Peer>) -> String {
        let goal = &timing.goal;
        let share = goal.share.map(|least| (timing.limit_us / timing.us >= least, format!("{least} of copy")));
        let times = goal.times_peer.zip(peer);
        let times = times.map(|(least, peer)| (peer.us / timing.us >= least, format!("{least} x PyTorch")));
        let h100 = goal.h100_us.filter(|_| self.card.is_h100());
        let h100 = h100.map(|most| (timing.us <= most, format!("{most} us on an H100")));
        let goals = [share, times, h100].into_iter().flatten();
        let told = goals.map(|(is_reached, goal)| format!("{} {goal}", if is_reached { "reached" } else { "MISSED" }));
        told.collect::<Vec<_>>().join("; ")
    }

    fn figures(&self, text: &mut String) -> std::fmt::Result {
        writeln!(text, "\n| figure | value | unit |\n|---|---:|---|")?;
        for record in self.records() {
            if let Record::Figure(Figure { what, value, unit }) = record {
                writeln!(text, "| {what} | {value:.2} | {unit} |")?;
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
        Record::Figure(Figure { what, value, unit }) => format!("{what}: {value:.2} {unit}"),
        Record::Skipped(reason) => format!("left out: {reason}"),
    }
}
