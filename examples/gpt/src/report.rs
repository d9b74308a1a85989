//! What the terminal shows: a progress bar or log lines while the run goes on, a summary at the end. Only rank 0 speaks.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::metrics::Row;

/// Time between two log lines when standard error is no terminal.
const LOG_EVERY: Duration = Duration::from_secs(5);

/// How far the run has come.
pub struct Progress {
    bar: Option<ProgressBar>,
    /// Whether to say anything.
    speaks: bool,
    steps: u64,
    last_log: Option<Instant>,
}

impl Progress {
    /// Of a run that has made `step` of `steps` steps. Silent unless `speaks`.
    pub fn new(step: u64, steps: u64, speaks: bool) -> Progress {
        let bar = (speaks && std::io::stderr().is_terminal()).then(|| {
            let template = "{bar:24.cyan/dim} {pos}/{len}  {wide_msg}  {eta} left";
            let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
            let bar = ProgressBar::with_draw_target(Some(steps), ProgressDrawTarget::stderr_with_hz(10));
            bar.set_style(style.progress_chars("━╸─"));
            bar.set_position(step);
            bar.reset_eta();
            bar
        });
        Progress { bar, speaks, steps, last_log: None }
    }

    /// Shows the means over `rows`, which are the latest.
    pub fn update(&mut self, rows: &[Row]) {
        let Some(last) = rows.last().filter(|_| self.speaks) else { return };
        let mean = |of: fn(&Row) -> f64| rows.iter().map(of).sum::<f64>() / rows.len() as f64;
        let step_ms = mean(|row| row.step_ms);
        let waits = 100.0 * mean(|row| row.comm_wait_ms) / step_ms.max(f64::MIN_POSITIVE);
        let message = format!(
            "loss {:.3}  {:.1}k tokens/s  {waits:.1} % waiting for ranks",
            mean(|row| row.loss),
            mean(|row| row.tokens_per_s) / 1000.0,
        );
        match &self.bar {
            Some(bar) => {
                bar.set_position(last.step);
                bar.set_message(message);
            }
            None if last.step == self.steps || self.last_log.is_none_or(|at| at.elapsed() >= LOG_EVERY) => {
                self.last_log = Some(Instant::now());
                eprintln!("step {}/{}  {message}", last.step, self.steps);
            }
            None => {}
        }
    }

    /// Prints a line above the bar.
    pub fn say(&self, line: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| eprintln!("{line}")),
            None if self.speaks => eprintln!("{line}"),
            None => {}
        }
    }

    /// Removes the bar.
    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// Rows of a table, the first column as wide as its widest cell, for standard output.
pub fn table(rows: &[(&str, String)]) -> String {
    let width = rows.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    rows.iter().map(|(name, value)| format!("  {name:width$}  {value}\n")).collect()
}

/// Writes to standard output; a reader that has gone away (`| head`) is no error.
pub fn print(text: &str) {
    let _ = std::io::stdout().lock().write_all(text.as_bytes());
}

/// `1 min 52 s`, `14.2 s`.
pub fn duration(time: Duration) -> String {
    match time.as_secs() {
        0..60 => format!("{:.1} s", time.as_secs_f64()),
        seconds => format!("{} min {} s", seconds / 60, seconds % 60),
    }
}

/// `27,400`.
pub fn thousands(number: f64) -> String {
    let digits = format!("{:.0}", number.max(0.0));
    let mut grouped = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_written_for_people() {
        assert_eq!(
            ["0", "999", "1,000", "27,400", "1,019,475"],
            [0.4, 999.0, 999.6, 27_400.0, 1_019_475.0].map(thousands)[..]
        );
        assert_eq!(duration(Duration::from_millis(14_240)), "14.2 s");
        assert_eq!(duration(Duration::from_millis(112_900)), "1 min 52 s");
        assert_eq!(table(&[("a", "1".to_owned()), ("long", "2".to_owned())]), "  a     1\n  long  2\n");
    }
}
