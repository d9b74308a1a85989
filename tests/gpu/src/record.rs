//! What a part finds, as lines of JSON from its process to the one that runs all parts.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::Result;

/// One finding.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Record {
    /// Something is right or wrong.
    Check(Check),
    /// Something took so long.
    Timing(Timing),
    /// The same work in PyTorch took so long.
    Peer(Peer),
    /// A figure that the copy's bandwidth does not bound.
    Figure(Figure),
    /// What was left out, and why.
    Skipped(String),
}

/// A comparison over many cases.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Check {
    /// What was compared.
    pub what: String,
    /// Cases that agreed.
    pub cases: u64,
    /// The first that did not; or why the comparison could not be made.
    pub failure: Option<String>,
    /// Whether the time limit left cases out.
    pub is_cut_short: bool,
    /// Duration.
    pub seconds: f64,
}

/// A duration beside the time in which the card copies as many bytes.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Timing {
    /// What was timed; [`Peer`]s of the same name did the same.
    pub what: String,
    /// The least that must be read and written.
    pub bytes: u64,
    /// Median.
    pub us: f64,
    /// Fastest and slowest.
    pub range_us: [f64; 2],
    /// Time in which the card copies as many bytes, in the same process.
    pub limit_us: f64,
    /// What is wanted.
    pub goal: Goal,
}

/// What a timing should reach.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Goal {
    /// Least share of the copy's bandwidth.
    pub share: Option<f64>,
    /// Other work of the same run.
    pub beside: Vec<Beside>,
    /// On one card.
    pub h100: Option<OnH100>,
}

/// The longest that something may take beside other work of the same run.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Beside {
    /// Who does the other work.
    pub who: Who,
    /// Its name.
    pub what: String,
    /// Most of its time.
    pub times: f64,
}

/// Whose work a duration is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Who {
    /// A [`Timing`].
    Annulus,
    /// A [`Peer`].
    #[serde(rename = "pytorch")]
    PyTorch,
}

/// The longest that something may take on an H100 which does all of it.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct OnH100 {
    /// The longest.
    pub us: f64,
    /// Bytes of all of it.
    pub bytes: u64,
}

/// PyTorch's duration.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Peer {
    /// As in [`Timing`].
    pub what: String,
    /// The calls, as a user writes them.
    pub how: String,
    /// Median.
    pub us: f64,
    /// Fastest and slowest.
    pub range_us: [f64; 2],
}

/// A number with its unit.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Figure {
    /// What it is.
    pub what: String,
    /// The number.
    pub value: f64,
    /// Its unit.
    pub unit: String,
    /// What is wanted.
    pub at_most: Option<f64>,
}

/// Says a finding to the process that started this one.
pub fn say(record: &Record) {
    // Records are plain data, which always has a JSON form.
    println!("{}", serde_json::to_string(record).unwrap_or_default());
}

/// Says a number.
pub fn figure(what: impl Into<String>, value: f64, unit: &str) {
    say(&Record::Figure(Figure { what: what.into(), value, unit: unit.to_owned(), at_most: None }));
}

/// Says a number that should not be larger than `most`.
pub fn figure_at_most(what: impl Into<String>, value: f64, unit: &str, most: f64) {
    say(&Record::Figure(Figure { what: what.into(), value, unit: unit.to_owned(), at_most: Some(most) }));
}

/// Counts the cases of a check, and ends it in time.
#[derive(Debug)]
pub struct Tally {
    cases: u64,
    deadline: Instant,
    is_cut_short: bool,
}

impl Tally {
    /// For cases whose number nobody asks.
    pub fn endless() -> Tally {
        Tally { cases: 0, deadline: Instant::now() + Duration::from_secs(3600), is_cut_short: false }
    }

    /// Whether there is time for another case; the one before has agreed.
    pub fn has_time(&mut self) -> bool {
        self.is_cut_short |= Instant::now() >= self.deadline;
        !self.is_cut_short
    }

    /// Counts a case that agreed.
    pub fn agreed(&mut self) {
        self.cases += 1;
    }
}

/// Makes a comparison and says how it went. No case that agreed is a failure, too.
pub fn check(what: impl Into<String>, limit: Duration, body: impl FnOnce(&mut Tally) -> Result<()>) {
    let start = Instant::now();
    let mut tally = Tally { cases: 0, deadline: start + limit, is_cut_short: false };
    let outcome = body(&mut tally);
    let failure = match outcome {
        Err(error) => Some(error.to_string()),
        Ok(()) if tally.cases == 0 => Some("no case was tried".to_owned()),
        Ok(()) => None,
    };
    let Tally { cases, is_cut_short, .. } = tally;
    let seconds = start.elapsed().as_secs_f64();
    say(&Record::Check(Check { what: what.into(), cases, failure, is_cut_short, seconds }));
}
