//! What rank 0 tells: the table, the file, the progress.

use std::cell::Cell;
use std::fs::File;
use std::io::{ErrorKind, Write};
use std::path::Path;
use std::sync::Arc;

use annulus::world::World;
use annulus::{Error, Result};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::{Value, json};

use super::arguments::{Arguments, Op, Switch};
use super::case::{Place, Times};
use crate::machine::Machine;

/// One size, in place or out of place.
#[derive(Debug, Clone)]
pub(super) struct Measured {
    pub(super) times: Times,
    /// None: not verified.
    pub(super) wrong: Option<u64>,
}

/// One line of the table.
pub(super) struct Row {
    pub(super) size_bytes: usize,
    pub(super) out_of_place: Option<Measured>,
    pub(super) in_place: Option<Measured>,
}

impl Row {
    pub(super) fn set(&mut self, place: Place, measured: Measured) {
        match place {
            Place::OutOfPlace => self.out_of_place = Some(measured),
            Place::InPlace => self.in_place = Some(measured),
        }
    }

    fn wrong(&self) -> u64 {
        [&self.out_of_place, &self.in_place].into_iter().flatten().filter_map(|measured| measured.wrong).sum()
    }
}

/// Writes the table as rows come in.
pub(super) struct Report<'a> {
    arguments: &'a Arguments,
    world_size: u32,
    progress: ProgressBar,
    json: Option<(&'a Path, File)>,
    header: Value,
    rows: Vec<Row>,
    /// Nobody reads the table any more (`| head`).
    is_unread: Cell<bool>,
}

impl<'a> Report<'a> {
    /// Opens the file and writes the head of the table. `pids` are the ranks' processes.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(super) fn begin(
        arguments: &'a Arguments,
        world: &World,
        pids: &[i64],
        measurements: u64,
    ) -> Result<Report<'a>> {
        let json = match &arguments.json {
            Some(path) => Some((path.as_path(), create(path)?)),
            None => None,
        };
        // Hidden where standard error is no terminal. Drawn between measurements only: no clockwork runs beside them.
        let progress = ProgressBar::with_draw_target(Some(measurements), ProgressDrawTarget::stderr());
        let style = "  {bar:30} {pos}/{len} {msg} ({elapsed}, about {eta} left)";
        progress.set_style(ProgressStyle::with_template(style).unwrap_or_else(|_| ProgressStyle::default_bar()));
        let (machine, world_size) = (Machine::look(), world.world_size());
        let header = json!({
            "program": "annulus bench",
            "version": env!("CARGO_PKG_VERSION"),
            "op": arguments.op.name(),
            "redop": redop_name(arguments),
            "dtype": type_name(arguments),
            "root": arguments.root,
            "ranks": world_size,
            "launcher": world.environment().launcher.to_string(),
            "pids": pids,
            "backend": "host",
            "host": machine.host,
            "cpu": machine.cpu,
            "cores": machine.cores,
            "memory": name_of(arguments.memory),
            "algorithm": name_of(arguments.algorithm),
            "partials": name_of(arguments.partials),
            "issued": issued(arguments),
            "seconds": arguments.seconds,
            "seed": arguments.seed,
            "check": arguments.check == Switch::On,
        });
        let report =
            Report { arguments, world_size, progress, json, header, rows: Vec::new(), is_unread: Cell::new(false) };
        report.write_head(&machine, world, pids)?;
        Ok(report)
    }

    fn write_head(&self, machine: &Machine, world: &World, pids: &[i64]) -> Result<()> {
        let arguments = self.arguments;
        let iterations = match arguments.iters {
            Some(iterations) => iterations.to_string(),
            None => format!("what fits {} s", arguments.seconds),
        };
        let warmup = arguments.warmup.map_or_else(|| "adaptive".to_owned(), |warmup| warmup.to_string());
        let mut lines = vec![
            format!("# annulus {}: {}, backend host", env!("CARGO_PKG_VERSION"), arguments.op.name()),
            format!(
                "# min-bytes {} max-bytes {} factor {} warmup {warmup} iters {iterations} check {}",
                arguments.min_bytes,
                arguments.max_bytes,
                arguments.factor,
                name_of(arguments.check)
            ),
            format!(
                "# memory {} algorithm {} partials {} issued {}; time: median of the slowest rank",
                name_of(arguments.memory),
                name_of(arguments.algorithm),
                name_of(arguments.partials),
                issued(arguments)
            ),
            "#".to_owned(),
            format!("# {} ranks by {} on {}", self.world_size, world.environment().launcher, machine.describe()),
        ];
        lines.extend(pids.iter().enumerate().map(|(rank, pid)| format!("#  Rank {rank:>2} Pid {pid:>7}")));
        if usize::try_from(self.world_size).is_ok_and(|ranks| ranks > machine.cores) {
            lines.push(format!(
                "# {} ranks share {} cores: they wait for each other's turns",
                self.world_size, machine.cores
            ));
        }
        lines.push("#".to_owned());
        lines.push(format!("# {:58}{:>22}{:>32}", "", "out-of-place", "in-place"));
        let half = format!("{:>9}{:>8}{:>8}{:>7}", "time", "algbw", "busbw", "#wrong");
        lines.push(format!(
            "# {:>12}{:>14}{:>9}{:>9}{:>7}       {half}{half}",
            "size", "count", "type", "redop", "root"
        ));
        let half = format!("{:>9}{:>8}{:>8}", "(us)", "(GB/s)", "(GB/s)");
        lines
            .push(format!("# {:>12}{:>14}{:>9}{:>9}{:>7}       {half}{:7}{half}", "(B)", "(elements)", "", "", "", ""));
        self.write(&lines.join("\n"))
    }

    /// Says what is being measured.
    pub(super) fn announce(&self, size_bytes: usize, place: Place) {
        let place = if place == Place::InPlace { "in place" } else { "out of place" };
        self.progress.set_message(format!("{size_bytes} B {place}"));
    }

    /// One measurement is done.
    pub(super) fn advance(&self) {
        self.progress.inc(1);
    }

    /// Writes a line of the table.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(super) fn row(&mut self, row: Row) -> Result<()> {
        let arguments = self.arguments;
        let half = |measured: &Option<Measured>| match measured {
            Some(measured) => {
                let (algbw, busbw) = self.bandwidths(row.size_bytes, &measured.times);
                let wrong = measured.wrong.map_or_else(|| "N/A".to_owned(), |wrong| wrong.to_string());
                let time = figure(measured.times.median_s * 1e6);
                format!("{time:>9}{:>8}{:>8}{wrong:>7}", figure(algbw), figure(busbw))
            }
            None => format!("{:>9}{:>8}{:>8}{:>7}", "N/A", "N/A", "N/A", "N/A"),
        };
        let root = if arguments.op == Op::Broadcast { arguments.root.to_string() } else { "-1".to_owned() };
        let line = format!(
            "  {:>12}{:>14}{:>9}{:>9}{:>7}       {}{}",
            row.size_bytes,
            self.count(&row),
            type_name(arguments),
            redop_name(arguments),
            root,
            half(&row.out_of_place),
            half(&row.in_place)
        );
        self.rows.push(row);
        self.write(&line)
    }

    /// Whether it is in vain to go on: neither table nor file is read.
    pub(super) fn is_unread(&self) -> bool {
        self.is_unread.get() && self.json.is_none()
    }

    /// Writes the foot of the table and the file. Returns what was wrong in all.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(super) fn end(mut self) -> Result<u64> {
        self.progress.finish_and_clear();
        let wrong: u64 = self.rows.iter().map(Row::wrong).sum();
        let busbws: Vec<f64> = self
            .rows
            .iter()
            .flat_map(|row| [(row.size_bytes, &row.out_of_place), (row.size_bytes, &row.in_place)])
            .filter_map(|(size_bytes, measured)| Some(self.bandwidths(size_bytes, &measured.as_ref()?.times).1))
            .collect();
        let average = busbws.iter().sum::<f64>() / busbws.len().max(1) as f64;
        let verdict = match (self.arguments.check, wrong) {
            (Switch::Off, _) => "not checked",
            (Switch::On, 0) => "OK",
            (Switch::On, _) => "FAILED",
        };
        self.write(&format!(
            "# Out of bounds values : {wrong} {verdict}\n# Avg bus bandwidth    : {}\n#",
            figure(average)
        ))?;
        if let Some((path, mut file)) = self.json.take() {
            let rows: Vec<Value> = self.rows.iter().map(|row| self.row_as_json(row)).collect();
            let mut document = self.header.clone();
            document["results"] = rows.into();
            document["wrong"] = wrong.into();
            document["avg_busbw_gb_per_s"] = json!(average);
            serde_json::to_writer_pretty(&mut file, &document).map_err(|error| io(path.display(), error.into()))?;
            file.write_all(b"\n").map_err(|error| io(path.display(), error))?;
        }
        Ok(wrong)
    }

    fn row_as_json(&self, row: &Row) -> Value {
        let half = |measured: &Option<Measured>| {
            measured.as_ref().map(|measured| {
                let (algbw, busbw) = self.bandwidths(row.size_bytes, &measured.times);
                let times = &measured.times;
                json!({
                    "iterations": times.iterations,
                    "min_us": times.min_s * 1e6,
                    "median_us": times.median_s * 1e6,
                    "mean_us": times.mean_s * 1e6,
                    "p99_us": times.p99_s * 1e6,
                    "algbw_gb_per_s": algbw,
                    "busbw_gb_per_s": busbw,
                    "wrong": measured.wrong,
                })
            })
        };
        json!({
            "size_bytes": row.size_bytes,
            "count_elems": self.count(row),
            "out_of_place": half(&row.out_of_place),
            "in_place": half(&row.in_place),
        })
    }

    /// Elements of one rank's argument.
    fn count(&self, row: &Row) -> usize {
        let count = row.size_bytes / self.arguments.dtype.size_bytes();
        if self.arguments.op.is_sharded() { count / self.world_size as usize } else { count }
    }

    /// algbw and busbw in GB/s (10^9 bytes).
    fn bandwidths(&self, size_bytes: usize, times: &Times) -> (f64, f64) {
        let algbw = if times.median_s > 0.0 { size_bytes as f64 / times.median_s * 1e-9 } else { 0.0 };
        (algbw, algbw * self.arguments.op.bus_factor(self.world_size))
    }

    fn write(&self, text: &str) -> Result<()> {
        let written = self.progress.suspend(|| {
            let mut out = std::io::stdout().lock();
            writeln!(out, "{text}").and_then(|()| out.flush())
        });
        match written {
            Err(error) if error.kind() == ErrorKind::BrokenPipe => {
                self.is_unread.set(true);
                Ok(())
            }
            other => other.map_err(|error| io("standard output", error)),
        }
    }
}

/// The file that takes the results: made before anything is measured, for nothing is worse than to fail afterwards.
///
/// # Errors
/// [`Error::Io`].
pub(super) fn create(path: &Path) -> Result<File> {
    File::create(path).map_err(|error| io(path.display(), error))
}

fn type_name(arguments: &Arguments) -> &'static str {
    if arguments.op == Op::Barrier { "none" } else { arguments.dtype.name() }
}

fn redop_name(arguments: &Arguments) -> String {
    if arguments.op.reduces() { name_of(arguments.redop) } else { "none".into() }
}

fn issued(arguments: &Arguments) -> &'static str {
    if arguments.stream { "on a stream" } else { "on the calling thread" }
}

/// The name on the command line.
fn name_of(choice: impl clap::ValueEnum) -> String {
    choice.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
}

/// Two decimals, fewer where they say nothing.
fn figure(number: f64) -> String {
    match number {
        small if small < 1_000.0 => format!("{small:.2}"),
        medium if medium < 100_000.0 => format!("{medium:.1}"),
        large => format!("{large:.0}"),
    }
}

fn io(what: impl std::fmt::Display, error: std::io::Error) -> Error {
    Error::Io { what: format!("writing {what}"), source: Arc::new(error) }
}
