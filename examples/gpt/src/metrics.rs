//! What a run measures, a row per step, as CSV and as JSON Lines.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Deserializer, Serialize};

use crate::failure::Failure;
use crate::plot::LossCurve;

/// One step. Times are those of rank 0, losses the mean over all ranks.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// Optimizer steps made, this one included.
    pub step: u64,
    /// Epoch of the batch.
    pub epoch: u64,
    /// Cross entropy of the batch in nats per byte.
    #[serde(deserialize_with = "nan_if_null")]
    pub loss: f64,
    /// The same of the validation text, at the steps where it was measured.
    pub val_loss: Option<f64>,
    /// Learning rate.
    pub lr: f64,
    /// L2 norm of the averaged gradients before clipping.
    pub grad_norm: Option<f64>,
    /// What the loss was multiplied with (f16-mixed).
    pub loss_scale: f64,
    /// Bytes of text over all ranks, per second of the step.
    pub tokens_per_s: f64,
    /// The whole step.
    pub step_ms: f64,
    /// Forward pass.
    pub forward_ms: f64,
    /// Backward pass.
    pub backward_ms: f64,
    /// Time in which buckets were being reduced, mostly while backward went on.
    pub comm_ms: f64,
    /// The part of it that the step had to wait for.
    pub comm_wait_ms: f64,
}

const COLUMNS: &str = "step,epoch,loss,val_loss,lr,grad_norm,loss_scale,tokens_per_s,step_ms,forward_ms,backward_ms,\
                       comm_ms,comm_wait_ms";

impl Row {
    /// The step had to wait this much longer for the other ranks.
    pub fn add_wait(&mut self, wait_ms: f64) {
        self.tokens_per_s *= self.step_ms / (self.step_ms + wait_ms);
        self.step_ms += wait_ms;
        self.comm_wait_ms += wait_ms;
    }

    fn csv(&self) -> String {
        let optional = |value: Option<f64>| value.map_or_else(String::new, |value| value.to_string());
        format!(
            "{},{},{},{},{},{},{},{:.1},{:.3},{:.3},{:.3},{:.3},{:.3}",
            self.step,
            self.epoch,
            self.loss,
            optional(self.val_loss),
            self.lr,
            optional(self.grad_norm),
            self.loss_scale,
            self.tokens_per_s,
            self.step_ms,
            self.forward_ms,
            self.backward_ms,
            self.comm_ms,
            self.comm_wait_ms
        )
    }
}

/// The two files, open to append.
pub struct Metrics {
    csv: (PathBuf, File),
    json: (PathBuf, File),
}

impl Metrics {
    /// Opens the files in `folder`. Rows after `step` are removed: a resumed run makes those steps again.
    ///
    /// # Errors
    /// [`Failure::File`].
    pub fn open(folder: &Path, step: u64) -> Result<Metrics, Failure> {
        let (csv, json) = (folder.join("metrics.csv"), folder.join("metrics.jsonl"));
        let up_to_here =
            |line: &str, number: &str| number.parse().is_ok_and(|number: u64| number <= step) && !line.is_empty();
        keep(&csv, |line| line == COLUMNS || up_to_here(line, line.split(',').next().unwrap_or_default()))?;
        keep(&json, |line| serde_json::from_str::<Step>(line).is_ok_and(|row| row.step <= step))?;
        let metrics = Metrics { csv: append(csv)?, json: append(json)? };
        let (path, file) = &metrics.csv;
        if file.metadata().map_err(Failure::file(path))?.len() == 0 {
            writeln!(&*file, "{COLUMNS}").map_err(Failure::file(path))?;
        }
        Ok(metrics)
    }

    /// Appends rows to both.
    ///
    /// # Errors
    /// [`Failure::File`].
    pub fn write(&mut self, rows: &[Row]) -> Result<(), Failure> {
        let (mut csv, mut json) = (String::new(), String::new());
        for row in rows {
            csv += &row.csv();
            csv.push('\n');
            // Numbers that are not finite become null.
            json += &serde_json::to_string(row).map_err(Failure::file(&self.json.0))?;
            json.push('\n');
        }
        self.csv.1.write_all(csv.as_bytes()).map_err(Failure::file(&self.csv.0))?;
        self.json.1.write_all(json.as_bytes()).map_err(Failure::file(&self.json.0))
    }
}

/// What a row must have to be kept.
#[derive(Deserialize)]
struct Step {
    step: u64,
}

/// All rows of a run, from its JSON Lines: also those before a resume. Lines that are no rows are skipped.
///
/// # Errors
/// [`Failure::File`] if the file cannot be read.
pub fn rows(folder: &Path) -> Result<Vec<Row>, Failure> {
    let path = folder.join("metrics.jsonl");
    let text = std::fs::read_to_string(&path).map_err(Failure::file(&path))?;
    Ok(text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect())
}

/// The curve of a whole run.
///
/// # Errors
/// As [`rows`].
pub fn loss_curve(folder: &Path) -> Result<LossCurve, Failure> {
    let mut curve = LossCurve::default();
    for row in rows(folder)? {
        curve.train.push((row.step, row.loss));
        curve.validation.extend(row.val_loss.map(|loss| (row.step, loss)));
    }
    Ok(curve)
}

/// Numbers that are not finite are null in JSON.
fn nan_if_null<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or(f64::NAN))
}

fn append(path: PathBuf) -> Result<(PathBuf, File), Failure> {
    let file = OpenOptions::new().create(true).append(true).open(&path).map_err(Failure::file(&path))?;
    Ok((path, file))
}

/// Rewrites a file with only the lines that `wanted` accepts, if there is such a file. A line torn by a crash goes too.
fn keep(path: &Path, wanted: impl Fn(&str) -> bool) -> Result<(), Failure> {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(Failure::file(path)(error)),
    };
    let whole = &text[..text.rfind('\n').map_or(0, |end| end + 1)];
    let kept: String = whole.split_inclusive('\n').filter(|line| wanted(line.trim_end())).collect();
    if kept != text {
        std::fs::write(path, kept).map_err(Failure::file(path))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(step: u64) -> Row {
        Row {
            step,
            epoch: 0,
            loss: 2.5 - step as f64 / 10.0,
            val_loss: (step == 2).then_some(2.25),
            lr: 1e-3,
            grad_norm: Some(0.5),
            loss_scale: 1.0,
            tokens_per_s: 1000.0,
            step_ms: 1.0,
            forward_ms: 0.3,
            backward_ms: 0.6,
            comm_ms: 0.2,
            comm_wait_ms: 0.1,
        }
    }

    #[test]
    fn rows_stand_in_both_files_and_the_curve_comes_back() {
        let folder = tempfile::tempdir().unwrap();
        let mut metrics = Metrics::open(folder.path(), 0).unwrap();
        metrics.write(&[row(1), row(2)]).unwrap();
        metrics.write(&[Row { loss: f64::NAN, grad_norm: None, ..row(3) }]).unwrap();
        let csv = std::fs::read_to_string(folder.path().join("metrics.csv")).unwrap();
        let lines: Vec<&str> = csv.lines().collect();
        assert_eq!(lines[0], COLUMNS);
        assert_eq!(lines[2], "2,0,2.3,2.25,0.001,0.5,1,1000.0,1.000,0.300,0.600,0.200,0.100");
        assert!(lines.iter().all(|line| line.split(',').count() == 13));
        let curve = loss_curve(folder.path()).unwrap();
        assert_eq!(curve.train[..2], [(1, 2.4), (2, 2.3)]);
        assert!(curve.train[2].1.is_nan());
        assert_eq!(curve.validation, [(2, 2.25)]);
    }

    #[test]
    fn resuming_removes_the_rows_that_are_made_again() {
        let folder = tempfile::tempdir().unwrap();
        Metrics::open(folder.path(), 0).unwrap().write(&[row(1), row(2), row(3)]).unwrap();
        for name in ["metrics.csv", "metrics.jsonl"] {
            let mut torn = OpenOptions::new().append(true).open(folder.path().join(name)).unwrap();
            torn.write_all(b"{\"step\":1").unwrap();
        }
        let mut metrics = Metrics::open(folder.path(), 1).unwrap();
        metrics.write(&[row(2)]).unwrap();
        let steps: Vec<u64> = loss_curve(folder.path()).unwrap().train.iter().map(|(step, _)| *step).collect();
        assert_eq!(steps, [1, 2]);
        let csv = std::fs::read_to_string(folder.path().join("metrics.csv")).unwrap();
        assert_eq!(csv, format!("{COLUMNS}\n{}\n{}\n", row(1).csv(), row(2).csv()));
    }
}
