//! The command line, and what it settles for a run.

use std::path::PathBuf;

use clap::builder::PossibleValuesParser;
use clap::{Args, Parser};
use serde::{Deserialize, Serialize};

use crate::failure::Failure;
use crate::kernels::LANES;
use crate::model::ModelConfig;

const EXAMPLES: &str = "\
Examples:
  annulus-gpt                                 two ranks, two to four minutes, everything in runs/gpt-1
  annulus-gpt --short                         a few seconds: does it work on this machine?
  annulus-gpt --ranks 1                       the same batches on one rank: the same losses to rounding, more slowly
  annulus-gpt --resume runs/gpt-1             goes on after Ctrl-C, bit for bit
  annulus-gpt --text mail.txt --prompt 'Dear ' learns another text
  annulus launch -n 4 -- annulus-gpt          under a launcher the ranks are the launcher's";

/// Trains a small byte-level GPT on the New Testament (King James Version), data-parallel over several ranks.
///
/// Every rank is a process with the whole model and its share of each batch. While candle goes back through the layers,
/// annulus already averages the gradients that are ready over the ranks. Ctrl-C finishes the step, writes a checkpoint and
/// ends; a second Ctrl-C ends at once.
#[derive(Debug, Clone, Parser)]
#[command(name = "annulus-gpt", version, after_help = EXAMPLES)]
pub struct Cli {
    /// Ranks to start on this machine, one process and one core each [default: 2]. Under a launcher (annulus launch, torchrun,
    /// srun, mpirun) the launcher decides; a different number here is an error
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=64))]
    pub ranks: Option<u32>,

    /// Goes on with the run in this folder, from its checkpoint. Settings are the checkpoint's; only --steps and --ranks may
    /// differ
    #[arg(long, value_name = "RUN")]
    pub resume: Option<PathBuf>,

    /// Folder for metrics, curves, checkpoint and timeline; must not hold a run [default: the first free of runs/gpt-1, ..]
    #[arg(long, value_name = "DIR", conflicts_with = "resume")]
    pub run_dir: Option<PathBuf>,

    /// A tiny model for a few seconds: what CI runs. Other options still apply
    #[arg(long, conflicts_with = "resume")]
    pub short: bool,

    /// Stops after this many steps as Ctrl-C would: --resume goes on to --steps
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub stop_after: Option<u64>,

    #[command(flatten)]
    pub given: Given,
}

/// The settings as given. What is left out comes from the defaults or, with `--resume`, from the checkpoint.
#[derive(Debug, Clone, Default, Args, Serialize)]
pub struct Given {
    /// Optimizer steps [default: 1200; --short: 40]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=10_000_000), help_heading = "Training")]
    pub steps: Option<u64>,

    /// Sequences in a batch, over all ranks together; each rank takes its part [default: 16; --short: 8]
    #[arg(long, value_name = "N", help_heading = "Training")]
    pub batch: Option<usize>,

    /// Largest learning rate, reached after a warm-up of 5 % of the steps; it then falls along a cosine to a tenth
    /// [default: 0.003]
    #[arg(long, value_name = "RATE", help_heading = "Training")]
    pub lr: Option<f64>,

    /// Gradients with a larger norm are scaled down to it [default: 1]
    #[arg(long, value_name = "NORM", help_heading = "Training")]
    pub max_norm: Option<f64>,

    /// Numbers of the model: f32; or 16-bit weights over f32 master weights, f16 with a dynamic loss scale. candle computes in
    /// f32 on the CPU in any case; what the mixed modes show here is the numerics, not speed [default: f32]
    #[arg(long, value_name = "MODE", value_parser = PossibleValuesParser::new(["f32", "bf16-mixed", "f16-mixed"]), help_heading = "Training")]
    pub precision: Option<String>,

    /// Seed of first weights, order of the data and samples [default: 1]
    #[arg(long, value_name = "N", help_heading = "Training")]
    pub seed: Option<u64>,

    /// Transformer blocks [default: 4; --short: 2]
    #[arg(long, value_name = "N", help_heading = "Model")]
    pub layers: Option<usize>,

    /// Elements of one position, a multiple of 16 per head [default: 128; --short: 64]
    #[arg(long, value_name = "N", help_heading = "Model")]
    pub width: Option<usize>,

    /// Attention heads [default: 4]
    #[arg(long, value_name = "N", help_heading = "Model")]
    pub heads: Option<usize>,

    /// Bytes the model sees at once [default: 128; --short: 64]
    #[arg(long, value_name = "BYTES", help_heading = "Model")]
    pub context: Option<usize>,

    /// Text to learn instead of the Bible: any file; its last tenth is for validation
    #[arg(long, value_name = "FILE", help_heading = "Text")]
    pub text: Option<PathBuf>,

    /// What the samples begin with [default: a verse's place, "Mat5:1 "; with --text: the text's first bytes]
    #[arg(long, value_name = "TEXT", help_heading = "Text")]
    pub prompt: Option<String>,

    /// Bytes sampled at the end [default: 600; --short: 100]
    #[arg(long, value_name = "N", help_heading = "Text")]
    pub sample_bytes: Option<usize>,

    /// Below 1 samples are safer, above 1 wilder [default: 0.7]
    #[arg(long, value_name = "T", help_heading = "Text")]
    pub temperature: Option<f64>,

    /// Steps between two validations, each with a line of sampled text [default: 100; --short: 20]
    #[arg(long, value_name = "N", help_heading = "Output")]
    pub eval_every: Option<u64>,

    /// Steps between two checkpoints; there is one at the end in any case [default: 500]
    #[arg(long, value_name = "N", help_heading = "Output")]
    pub checkpoint_every: Option<u64>,

    /// Steps shown in timeline.json, from the fifth on [default: 20]
    #[arg(long, value_name = "N", help_heading = "Output")]
    pub trace_steps: Option<u64>,

    /// Largest gradient bucket: smaller ones start their reduction earlier, larger ones cost less each [default: 256]
    #[arg(long, value_name = "KIB", help_heading = "Output")]
    pub bucket_kib: Option<usize>,
}

/// Everything that defines a run; in its checkpoint and its `config.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    pub steps: u64,
    pub batch: usize,
    pub lr: f64,
    pub max_norm: f64,
    pub precision: String,
    pub seed: u64,
    pub layers: usize,
    pub width: usize,
    pub heads: usize,
    pub context: usize,
    pub text: Option<PathBuf>,
    pub prompt: Option<String>,
    pub sample_bytes: usize,
    pub temperature: f64,
    pub eval_every: u64,
    pub checkpoint_every: u64,
    pub trace_steps: u64,
    pub bucket_kib: usize,
}

impl Settings {
    /// The settings of a new run.
    pub fn new(given: &Given, short: bool) -> Settings {
        let short = |in_short, otherwise| if short { in_short } else { otherwise };
        let given = given.clone();
        Settings {
            steps: given.steps.unwrap_or(short(40, 1200)),
            batch: given.batch.unwrap_or(short(8, 16) as usize),
            lr: given.lr.unwrap_or(0.003),
            max_norm: given.max_norm.unwrap_or(1.0),
            precision: given.precision.unwrap_or_else(|| "f32".to_owned()),
            seed: given.seed.unwrap_or(1),
            layers: given.layers.unwrap_or(short(2, 4) as usize),
            width: given.width.unwrap_or(short(64, 128) as usize),
            heads: given.heads.unwrap_or(4),
            context: given.context.unwrap_or(short(64, 128) as usize),
            text: given.text,
            prompt: given.prompt,
            sample_bytes: given.sample_bytes.unwrap_or(short(100, 600) as usize),
            temperature: given.temperature.unwrap_or(0.7),
            eval_every: given.eval_every.unwrap_or(short(20, 100)),
            checkpoint_every: given.checkpoint_every.unwrap_or(500),
            trace_steps: given.trace_steps.unwrap_or(20),
            bucket_kib: given.bucket_kib.unwrap_or(256),
        }
    }

    /// The settings of a run that goes on: those of its checkpoint, and `--steps` if given.
    ///
    /// # Errors
    /// [`Failure::Usage`] naming an option that was given and contradicts the checkpoint.
    pub fn resumed(mut self, given: &Given) -> Result<Settings, Failure> {
        let json =
            |value: serde_json::Result<serde_json::Value>| value.map_err(|error| Failure::Usage(error.to_string()));
        let (saved, given_json) = (json(serde_json::to_value(&self))?, json(serde_json::to_value(given))?);
        for (key, value) in given_json.as_object().into_iter().flatten() {
            if key != "steps" && !value.is_null() && saved.get(key) != Some(value) {
                return Err(Failure::Usage(format!(
                    "--{} {value} contradicts the checkpoint, which has {}; leave it out, or start a new run",
                    key.replace('_', "-"),
                    saved[key],
                )));
            }
        }
        self.steps = given.steps.unwrap_or(self.steps);
        Ok(self)
    }

    /// The sizes of the model.
    pub fn model(&self) -> ModelConfig {
        ModelConfig { layers: self.layers, width: self.width, heads: self.heads, context: self.context }
    }

    /// Fails unless the settings make sense together and for `world_size` ranks.
    ///
    /// # Errors
    /// [`Failure::Usage`] naming the option and its value.
    pub fn check(&self, world_size: u32) -> Result<(), Failure> {
        let refuse = |reason: String| Err(Failure::Usage(reason));
        let within = |option: &str, value: usize, low: usize, high: usize| match value {
            value if (low..=high).contains(&value) => Ok(()),
            value => Err(Failure::Usage(format!("--{option} {value}: must be from {low} to {high}"))),
        };
        within("batch", self.batch, 1, 65_536)?;
        within("layers", self.layers, 1, 64)?;
        within("heads", self.heads, 1, 64)?;
        within("width", self.width, 16, 4096)?;
        within("context", self.context, 2, 4096)?;
        within("sample-bytes", self.sample_bytes, 0, 1 << 20)?;
        within("bucket-kib", self.bucket_kib, 1, 1 << 20)?;
        if !self.width.is_multiple_of(self.heads * LANES) {
            return refuse(format!(
                "--width {}: must be a multiple of {LANES} times --heads {}, that is of {}",
                self.width,
                self.heads,
                self.heads * LANES
            ));
        }
        if !self.batch.is_multiple_of(world_size as usize) {
            return refuse(format!("--batch {}: cannot be divided evenly among {world_size} ranks", self.batch));
        }
        if !(self.lr.is_finite() && self.lr > 0.0) {
            return refuse(format!("--lr {}: must be a positive number", self.lr));
        }
        if !(self.max_norm.is_finite() && self.max_norm > 0.0) {
            return refuse(format!("--max-norm {}: must be a positive number", self.max_norm));
        }
        if !(self.temperature.is_finite() && self.temperature > 0.0) {
            return refuse(format!("--temperature {}: must be a positive number", self.temperature));
        }
        for (option, value) in [("eval-every", self.eval_every), ("checkpoint-every", self.checkpoint_every)] {
            if value == 0 {
                return refuse(format!("--{option} 0: must be at least 1"));
            }
        }
        if self.prompt.as_deref() == Some("") {
            return refuse("--prompt \"\": must hold at least one byte".to_owned());
        }
        Ok(())
    }

    /// Learning rate of step `step`, counted from 0.
    pub fn learning_rate(&self, step: u64) -> f64 {
        let warmup = (self.steps / 20).max(1);
        if step < warmup {
            return self.lr * (step + 1) as f64 / warmup as f64;
        }
        let done = (step - warmup) as f64 / (self.steps - warmup).max(1) as f64;
        self.lr * (0.1 + 0.45 * (1.0 + (std::f64::consts::PI * done.min(1.0)).cos()))
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn given(arguments: &[&str]) -> Given {
        Cli::try_parse_from([&["annulus-gpt"], arguments].concat()).unwrap().given
    }

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn defaults_and_the_short_form_are_valid_for_one_two_and_four_ranks() {
        for short in [false, true] {
            let settings = Settings::new(&Given::default(), short);
            for ranks in [1, 2, 4] {
                settings.check(ranks).unwrap();
            }
        }
        assert_eq!(Settings::new(&given(&["--layers", "3"]), true).layers, 3);
    }

    #[test]
    fn odd_settings_are_refused_by_name_and_value() {
        for (arguments, ranks, expected) in [
            (&["--batch", "9"][..], 2, "--batch 9"),
            (&["--batch", "0"], 1, "--batch 0"),
            (&["--width", "100"], 1, "--width 100"),
            (&["--width", "32", "--heads", "4"], 1, "of 64"),
            (&["--heads", "0"], 1, "--heads 0"),
            (&["--lr", "nan"], 1, "--lr NaN"),
            (&["--lr=-1"], 1, "--lr -1"),
            (&["--max-norm", "0"], 1, "--max-norm 0"),
            (&["--temperature", "inf"], 1, "--temperature inf"),
            (&["--context", "1"], 1, "--context 1"),
            (&["--eval-every", "0"], 1, "--eval-every 0"),
            (&["--prompt", ""], 1, "--prompt"),
        ] {
            let error = Settings::new(&given(arguments), false).check(ranks).unwrap_err();
            assert!(matches!(error, Failure::Usage(_)));
            assert!(error.to_string().contains(expected), "{arguments:?}: {error}");
        }
        for arguments in [&["--steps", "0"][..], &["--ranks", "65"], &["--precision", "f8"], &["--stop-after", "0"]] {
            assert!(Cli::try_parse_from([&["annulus-gpt"], arguments].concat()).is_err(), "{arguments:?}");
        }
    }

    #[test]
    fn a_resumed_run_keeps_its_settings() {
        let saved = Settings::new(&Given::default(), true);
        assert_eq!(saved.clone().resumed(&Given::default()).unwrap(), saved);
        assert_eq!(saved.clone().resumed(&given(&["--width", "64", "--steps", "99"])).unwrap().steps, 99);
        let error = saved.resumed(&given(&["--width", "128"])).unwrap_err().to_string();
        assert!(error.contains("--width 128") && error.contains("has 64"), "{error}");
    }

    #[test]
    fn the_learning_rate_rises_then_falls_to_a_tenth() {
        let settings = Settings { steps: 100, lr: 1.0, ..Settings::new(&Given::default(), false) };
        let rates: Vec<f64> = (0..100).map(|step| settings.learning_rate(step)).collect();
        assert!(rates[..5].is_sorted() && rates[0] == 0.2 && rates[4] == 1.0);
        assert!(rates[5..].is_sorted_by(|a, b| a >= b) && rates[99] < 0.11 && rates[99] >= 0.1);
        for steps in [1, 2, 3] {
            let settings = Settings { steps, ..settings.clone() };
            assert!((0..steps).all(|step| settings.learning_rate(step).is_finite()));
        }
    }
}
