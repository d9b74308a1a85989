//! The run of one rank: the loop of a training script over annulus's strategy.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use annulus::dtype::{NormType, ReduceOp};
use annulus::strategy::{
    Accelerator, AdamW, DataLoader, Ddp, Device, Init, Last, Loader, LoaderState, MapStyle, Nonfinite, Optimizer,
    Precision, Rng, State, StateMut, Statistics, Strategy, StrategyOptions, UpdateRule,
};
use annulus::telemetry::{self, Sampler, Timeline, Track, sampler};
use annulus::world::Environment;

use crate::adapter::{Loss, Network, TrainingText};
use crate::failure::Failure;
use crate::folder::RunFolder;
use crate::metrics::{self, Metrics, Row};
use crate::model::Batch;
use crate::plan::{Plan, Saved};
use crate::report::{self, Progress};
use crate::sample::{printable, sample};
use crate::settings::Settings;
use crate::stop::Stop;
use crate::text::Text;

/// Steps whose losses are averaged over the ranks and written together.
const FLUSH_EVERY: u64 = 10;
/// The first steps are not like the others: memory is touched for the first time.
const STEPS_BEFORE_TRACE: u64 = 4;
/// Bytes of the line of text that goes with each validation.
const GLIMPSE_BYTES: usize = 72;
/// How long ranks wait for each other at the end.
const TEARDOWN: Duration = Duration::from_secs(30);

type Data = Loader<MapStyle<TrainingText>>;

/// One rank's part of a run, but for its data.
struct Trainer {
    settings: Settings,
    text: Text,
    validation: Vec<Batch>,
    folder: RunFolder,
    strategy: Ddp,
    network: Network,
    optimizer: Optimizer,
    /// For samples; only rank 0's is used.
    rng: Rng,
    /// Optimizer steps made.
    step: u64,
    stop: Stop,
    stop_at: Option<u64>,
    timeline: Timeline,
    tracks: Tracks,
    progress: Progress,
    metrics: Option<Metrics>,
    /// Of rank 0, where there is a GPU.
    sampler: Option<Sampler>,
    /// Rows not written yet.
    rows: Vec<Row>,
    statistics: Statistics,
}

#[derive(Clone, Copy)]
struct Tracks {
    forward: Track,
    backward: Track,
    step: Track,
}

/// Trains as planned, until the steps are made or someone asks to stop.
///
/// # Errors
/// Whatever goes wrong; every rank fails.
pub fn run(plan: Plan, environment: Environment) -> Result<(), Failure> {
    let stop = Stop::listen().map_err(|error| Failure::Usage(format!("signals cannot be caught: {error}")))?;
    let (mut trainer, loader) = Trainer::set_up(plan, environment, stop)?;
    let (begin, first_step) = (Instant::now(), trainer.step);
    let finished = trainer.train(&loader)?;
    trainer.conclude(finished, first_step, begin.elapsed())
}

impl Trainer {
    fn set_up(plan: Plan, environment: Environment, stop: Stop) -> Result<(Trainer, Data), Failure> {
        let Plan { settings, text, resumed, run_dir, stop_after } = plan;
        let resumes = resumed.is_some();
        let rank = environment.rank;
        // Room for some dozen spans a step; what is too much is counted and dropped.
        let timeline = Timeline::new(rank, 1024 + settings.trace_steps.min(10_000) as usize * 128)?;
        timeline.set_recording(false);
        let tracks = Tracks {
            step: timeline.track("step"),
            forward: timeline.track("forward"),
            backward: timeline.track("backward"),
        };
        let options = StrategyOptions {
            // The model computes on the processor, so its weights and gradients are best there too.
            accelerator: Accelerator::Host,
            precision: match settings.precision.as_str() {
                "bf16-mixed" => Precision::Bf16Mixed,
                "f16-mixed" => Precision::F16Mixed,
                _ => Precision::F32True,
            },
            bucket_bytes: settings.bucket_kib << 10,
            first_bucket_bytes: settings.bucket_kib << 10,
            seed: settings.seed,
            timeline: timeline.clone(),
            ..StrategyOptions::default()
        };
        let mut strategy = Ddp::setup_environment(environment, options)?;

        // Rank 0 makes the folder and tells the others which, or why not.
        let folder = match resumed {
            Some(folder) => folder,
            None => {
                let made = (rank == 0).then(|| {
                    let made = RunFolder::create(run_dir.as_deref());
                    made.map(|folder| folder.path().to_owned()).map_err(|error| error.to_string())
                });
                let made: Result<PathBuf, String> =
                    strategy.broadcast_value(made.unwrap_or_else(|| Ok(PathBuf::new())), 0)?;
                RunFolder::told(made.map_err(Failure::Usage)?)
            }
        };

        let init = strategy.module_init_context(Init::Default);
        let network = Network::new(&init, settings.model(), settings.seed)?;
        let rule = AdamW::new(settings.lr).betas(0.9, 0.99).weight_decay(0.01);
        let rule = rule.without_decay(|parameter| parameter.name().ends_with("norm"));
        let (network, optimizer) = strategy.setup_module_and_optimizers(network, rule)?;

        let text_windows = TrainingText::new(text.train(settings.context));
        let batch_per_rank = settings.batch / strategy.world_size() as usize;
        let loader = strategy
            .process_dataloader(DataLoader::new(text_windows, batch_per_rank).shuffle(true).last(Last::Drop))?;
        let mut trainer = Trainer {
            validation: text.validation(settings.context),
            progress: Progress::new(0, settings.steps, false),
            rng: Rng::for_stream(settings.seed, u64::MAX),
            step: 0,
            stop_at: None,
            metrics: None,
            sampler: None,
            rows: Vec::new(),
            statistics: Statistics::default(),
            settings,
            text,
            folder,
            strategy,
            network,
            optimizer,
            stop,
            timeline,
            tracks,
        };
        if resumes {
            trainer.restore(&loader)?;
        }
        trainer.stop_at = stop_after.map(|steps| trainer.step.saturating_add(steps));
        if rank == 0 {
            trainer.introduce()?;
        }
        trainer.network.refresh()?;
        trainer.statistics = trainer.strategy.statistics();
        Ok((trainer, loader))
    }

    /// Rank 0's files and first words.
    fn introduce(&mut self) -> Result<(), Failure> {
        let config = self.folder.path().join("config.json");
        let json = serde_json::to_string_pretty(&self.settings).map_err(Failure::file(&config))?;
        std::fs::write(&config, json + "\n").map_err(Failure::file(&config))?;
        self.metrics = Some(Metrics::open(self.folder.path(), self.step)?);
        self.progress = Progress::new(self.step, self.settings.steps, true);
        self.sampler = match Sampler::start(&self.folder.gpus(), sampler::DEFAULT_PERIOD, self.timeline.clone()) {
            Ok(sampler) => Some(sampler),
            // A machine without a GPU has nothing to sample, and its user knows.
            Err(_) if matches!(self.strategy.root_device(), Device::Host) => None,
            Err(error) => {
                self.progress.say(&format!("no samples of the GPUs: {error}"));
                None
            }
        };
        let begins = if self.step == 0 { String::new() } else { format!(", from step {}", self.step) };
        self.progress.say(&format!(
            "{} parameters, {} bytes of text, {} ranks, batches of {} x {} bytes, {} steps{begins}; files in {}",
            report::thousands(self.settings.model().parameter_elems() as f64),
            report::thousands(self.text.len_bytes() as f64),
            self.strategy.world_size(),
            self.settings.batch,
            self.settings.context,
            self.settings.steps,
            self.folder.path().display(),
        ));
        Ok(())
    }

    /// Makes steps. Returns whether all were made; if not, someone asked to stop.
    fn train(&mut self, loader: &Data) -> Result<bool, Failure> {
        let trace_from = self.step + STEPS_BEFORE_TRACE;
        let trace = trace_from..trace_from + self.settings.trace_steps;
        loop {
            let epoch = loader.state().epoch;
            loader.dataset().set_epoch(epoch);
            for batch in loader.epoch(epoch) {
                self.timeline.set_recording(trace.contains(&self.step));
                let mut row = self.make_step(batch, epoch)?;
                let asked = self.stop.is_asked() || self.stop_at == Some(self.step);
                let begin = Instant::now();
                let stops = self.strategy.reduce_boolean_decision(asked, false)?;
                row.add_wait(milliseconds(begin.elapsed()));
                self.timeline.set_recording(false);

                let finished = self.step == self.settings.steps;
                let evaluates = finished || self.step.is_multiple_of(self.settings.eval_every);
                if evaluates {
                    row.val_loss = Some(self.evaluate()?);
                }
                let saves = stops || finished || self.step.is_multiple_of(self.settings.checkpoint_every);
                self.rows.push(row);
                // Before a checkpoint too: a run that goes on from it has no other chance to tell of the steps before.
                if saves || evaluates || self.step.is_multiple_of(FLUSH_EVERY) {
                    self.flush()?;
                }
                if saves {
                    self.save(loader)?;
                }
                if stops || finished {
                    return Ok(finished);
                }
            }
        }
    }

    /// One optimizer step.
    fn make_step(&mut self, batch: Batch, epoch: u64) -> Result<Row, Failure> {
        let begin = Instant::now();
        let (timeline, number) = (self.timeline.clone(), self.step as u32 + 1);
        let step_span = timeline.open(self.tracks.step, "step", number, 0);
        let forward_span = timeline.open(self.tracks.forward, "forward", number, 0);
        let batch = self.strategy.batch_to_device(batch)?;
        let tape = self.network.gpt.forward(&batch)?;
        let batch_loss = f64::from(tape.loss()?);
        let forward = begin.elapsed();
        drop(forward_span);

        let loss = Loss::new(tape, &self.timeline, self.tracks.backward);
        self.strategy.backward(&loss, &mut self.network)?;
        let backward = begin.elapsed() - forward;

        self.optimizer.set_learning_rate(self.settings.learning_rate(self.step))?;
        let max_norm = self.settings.max_norm;
        let norm = self.strategy.clip_gradients_norm(
            &self.network,
            &mut self.optimizer,
            max_norm,
            NormType::L2,
            Nonfinite::SkipStep,
        )?;
        self.strategy.optimizer_step(&mut self.optimizer)?;
        // candle needs the new weights: here, and only here, the step waits.
        self.network.refresh()?;
        self.step += 1;

        let now = self.strategy.statistics();
        let before = std::mem::replace(&mut self.statistics, now);
        let step_time = begin.elapsed();
        timeline.counter("loss", step_span.start_ns(), batch_loss);
        drop(step_span);
        Ok(Row {
            step: self.step,
            epoch,
            loss: batch_loss,
            val_loss: None,
            lr: self.settings.learning_rate(self.step - 1),
            grad_norm: Some(norm.get(TEARDOWN)?).filter(|norm| norm.is_finite()),
            loss_scale: f64::from(loss.scale()),
            tokens_per_s: (self.settings.batch * self.settings.context) as f64 / step_time.as_secs_f64(),
            step_ms: milliseconds(step_time),
            forward_ms: milliseconds(forward),
            backward_ms: milliseconds(backward),
            comm_ms: (now.reduction_ns - before.reduction_ns) as f64 / 1e6,
            comm_wait_ms: (now.exposed_ns - before.exposed_ns) as f64 / 1e6,
        })
    }

    /// Loss of the validation text, its windows divided among the ranks.
    fn evaluate(&mut self) -> Result<f64, Failure> {
        let mut sum_and_count = [0.0_f64; 2];
        let (rank, world_size) = (self.strategy.rank() as usize, self.strategy.world_size() as usize);
        for window in self.validation.iter().skip(rank).step_by(world_size) {
            sum_and_count[0] += f64::from(self.network.gpt.evaluate(window)?);
            sum_and_count[1] += 1.0;
        }
        self.strategy.all_reduce(&mut sum_and_count, None, Some(ReduceOp::Sum))?;
        let loss = sum_and_count[0] / sum_and_count[1];
        if self.strategy.rank() == 0 {
            let (prompt, rng) = (self.prompt(), &mut self.rng);
            let temperature = self.settings.temperature;
            let text = sample(&self.network.gpt, || rng.uniform(), &prompt, GLIMPSE_BYTES, temperature)?;
            let line = printable(&text).replace('\n', " / ");
            self.progress.say(&format!("step {}: validation loss {loss:.3}  {line}", self.step));
        }
        Ok(loss)
    }

    /// Averages the losses of the rows that are waiting over the ranks, and writes the rows.
    fn flush(&mut self) -> Result<(), Failure> {
        let mut losses: Vec<f64> = self.rows.iter().map(|row| row.loss).collect();
        self.strategy.all_reduce(&mut losses, None, Some(ReduceOp::Avg))?;
        for (row, loss) in self.rows.iter_mut().zip(losses) {
            row.loss = loss;
        }
        if let Some(metrics) = &mut self.metrics {
            metrics.write(&self.rows)?;
        }
        self.progress.update(&self.rows);
        self.rows.clear();
        Ok(())
    }

    fn save(&mut self, loader: &Data) -> Result<(), Failure> {
        let run = Saved::new(&self.settings, &self.text, self.step);
        let state = State::new()
            .module("model", &self.network)
            .optimizer("optimizer", &self.optimizer)
            .value("loader", &loader.state())
            .value("rng", &self.rng)
            .value("run", &run);
        Ok(self.strategy.save_checkpoint(&self.folder.checkpoint(), &state, None)?)
    }

    fn restore(&mut self, loader: &Data) -> Result<(), Failure> {
        let mut place: LoaderState = loader.state();
        let mut run = None::<Saved>;
        let mut state = StateMut::new()
            .module("model", &self.network)
            .optimizer("optimizer", &mut self.optimizer)
            .value("loader", &mut place)
            .value("rng", &mut self.rng)
            .value("run", &mut run);
        self.strategy.load_checkpoint(&self.folder.checkpoint(), Some(&mut state), true)?;
        drop(state);
        loader.resume(place)?;
        self.step = run.map_or(0, |run| run.step);
        Ok(())
    }

    fn prompt(&self) -> Vec<u8> {
        self.settings.prompt.as_ref().map_or_else(|| self.text.prompt().to_vec(), |prompt| prompt.as_bytes().to_vec())
    }

    /// The end of a run: pictures, timeline, text and a summary.
    fn conclude(mut self, finished: bool, first_step: u64, time: Duration) -> Result<(), Failure> {
        let rank = self.strategy.rank();
        let samples = self.sampler.take().map(Sampler::stop);
        for line in samples.iter().flatten() {
            self.progress.say(line);
        }
        if self.settings.trace_steps > 0 {
            self.timeline.write_file(&self.folder.timeline_of(rank))?;
        }
        self.strategy.barrier("timelines are written")?;
        if rank == 0 {
            if self.settings.trace_steps > 0 {
                self.merge_timelines()?;
            }
            metrics::loss_curve(self.folder.path())?.write(self.folder.path())?;
            self.progress.finish();
            self.summarize(finished, first_step, time, samples.is_some())?;
        }
        self.strategy.teardown(TEARDOWN)?;
        Ok(())
    }

    fn merge_timelines(&self) -> Result<(), Failure> {
        let parts: Vec<PathBuf> = (0..self.strategy.world_size()).map(|rank| self.folder.timeline_of(rank)).collect();
        let dropped = telemetry::merge(&parts, &self.folder.timeline())?;
        if dropped > 0 {
            self.progress.say(&format!("the timeline was full: {dropped} records are not in it"));
        }
        for part in parts {
            std::fs::remove_file(&part).map_err(Failure::file(&part))?;
        }
        Ok(())
    }

    fn summarize(&mut self, finished: bool, first_step: u64, time: Duration, sampled: bool) -> Result<(), Failure> {
        let rows = metrics::rows(self.folder.path())?;
        // The first steps of a start are slower; medians do not mind.
        let these: Vec<&Row> = rows.iter().filter(|row| row.step > first_step).collect();
        let median = |of: fn(&Row) -> f64| {
            let mut values: Vec<f64> = these.iter().map(|row| of(row)).collect();
            values.sort_by(f64::total_cmp);
            values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
        };
        let last = &rows[rows.len() - (rows.len() / 10).clamp(1, 50).min(rows.len())..];
        let loss = last.iter().map(|row| row.loss).sum::<f64>() / last.len() as f64;
        let validation = rows.iter().rev().find_map(|row| row.val_loss);
        let steps = (self.step - first_step).max(1);
        let sent_bytes = self.statistics.reduced_bytes / steps;
        let (step_ms, wait_ms) = (median(|row| row.step_ms), median(|row| row.comm_wait_ms));
        let folder = self.folder.path().display();
        let mut table = vec![
            ("steps", format!("{} of {} ({} in {})", self.step, self.settings.steps, steps, report::duration(time))),
            ("loss", format!("{loss:.3} nats per byte in training (mean of {} steps)", last.len())),
        ];
        if let Some(validation) = validation {
            table.push((
                "",
                format!("{validation:.3} on text it has not seen (256 guesses would give {:.3})", 256_f64.ln()),
            ));
        }
        table.extend([
            ("speed", format!("{} tokens (bytes of text) a second", report::thousands(median(|row| row.tokens_per_s)))),
            (
                "step",
                format!(
                    "{step_ms:.1} ms: forward {:.1}, backward {:.1}",
                    median(|row| row.forward_ms),
                    median(|row| row.backward_ms)
                ),
            ),
            (
                "communication",
                format!(
                    "{:.1} ms a step for {:.2} MB of gradients; the step waits {wait_ms:.2} ms for it ({:.1} %)",
                    median(|row| row.comm_ms),
                    sent_bytes as f64 / 1e6,
                    100.0 * wait_ms / step_ms
                ),
            ),
            ("files", format!("{folder}/metrics.csv, metrics.jsonl, loss.svg, loss.png, config.json")),
            ("", format!("{folder}/checkpoint.safetensors")),
        ]);
        if sampled {
            table.push(("", format!("{folder}/gpus.csv")));
        }
        if self.settings.trace_steps > 0 {
            table.push(("", format!("{folder}/timeline.json: open it in https://ui.perfetto.dev")));
        }
        let mut text = String::new();
        if finished && self.settings.sample_bytes > 0 {
            let (prompt, mut rng) = (self.prompt(), self.rng.clone());
            let bytes = self.settings.sample_bytes;
            let sampled = sample(&self.network.gpt, || rng.uniform(), &prompt, bytes, self.settings.temperature)?;
            let path = self.folder.path().join("sample.txt");
            std::fs::write(&path, &sampled).map_err(Failure::file(&path))?;
            text = format!("\n{}\n\n", printable(&sampled));
        }
        report::print(&(text + &report::table(&table)));
        if !finished {
            report::print(&format!("stopped; go on with --resume {folder}\n"));
        }
        Ok(())
    }
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
