//! What a strategy costs beside the work it schedules: a whole step of many small tensors, and a checkpoint.
//!
//! ```text
//! cargo bench --bench strategy                         about a minute; ANNULUS_BENCH_DIR says where checkpoints go
//! cargo bench --bench strategy -- step                 the steps alone
//! ```
//! *step*: backward, clip by norm, AdamW over 148 tensors of 1,024 elements in 5 buckets, whose arithmetic is microseconds;
//! what remains is the time of the strategy itself: queueing, events, meetings. One rank, and two ranks as threads.
//!
//! *checkpoint*: 64 MiB of weights and moments saved (written, synchronised to the disk, renamed) and loaded, beside the
//! same bytes through `write` and `fsync` alone, and beside their checksum alone.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use annulus::strategy::{
    AdamW, Ddp, GradSink, Init, Module, Nonfinite, Optimizer, Parameter, SingleDevice, State, StateMut, Strategy,
    StrategyOptions,
};
use annulus::world::{Environment, launch};
use annulus::{NormType, Result};
use criterion::{Criterion, Throughput};

const STEP_TENSORS: usize = 148;
const STEP_ELEMS: usize = 1_024;
const STEP_BUCKETS: usize = 5;
/// Bytes of a checkpoint: weights and two moments.
const CHECKPOINT_BYTES: usize = 64 << 20;
const TIMEOUT: Duration = Duration::from_secs(60);

struct Layers(Vec<Parameter>);

impl Module for Layers {
    fn parameters(&self, visit: &mut dyn FnMut(&Parameter)) {
        self.0.iter().for_each(visit);
    }
}

/// A module of `count` tensors of `len_elems`, and its optimizer.
fn layers<S: Strategy>(strategy: &mut S, count: usize, len_elems: usize) -> Result<(Layers, Optimizer)> {
    let init = strategy.module_init_context(Init::Default);
    let parameters = (0..count).map(|i| init.parameter(&format!("layer{i}"), &[len_elems], |w| w.fill(0.5)));
    let layers = Layers(parameters.collect::<Result<_>>()?);
    strategy.setup_module_and_optimizers(layers, AdamW::new(1e-3))
}

/// Runs `iterations` steps on every rank; rank 0 says how many.
fn steps<S: Strategy>(
    strategy: &mut S,
    (model, optimizer): (&mut Layers, &mut Optimizer),
    iterations: u64,
) -> Result<(u64, Duration)> {
    let iterations = strategy.broadcast_value(iterations, 0)?;
    let gradient = [0.01_f32; STEP_ELEMS];
    let loss = |model: &mut Layers, sink: &mut GradSink<'_>| {
        model.0.iter().rev().try_for_each(|parameter| sink.write(parameter, &gradient))
    };
    let start = Instant::now();
    for _ in 0..iterations {
        strategy.backward(&loss, model)?;
        strategy.clip_gradients_norm(model, optimizer, 1.0, NormType::L2, Nonfinite::SkipStep)?;
        strategy.optimizer_step(optimizer)?;
    }
    strategy.synchronize()?;
    Ok((iterations, start.elapsed()))
}

fn step_options() -> StrategyOptions {
    let bytes = STEP_TENSORS * STEP_ELEMS * size_of::<f32>() / STEP_BUCKETS;
    StrategyOptions { bucket_bytes: bytes, first_bucket_bytes: bytes, ..StrategyOptions::default() }
}

/// Rank 0 runs criterion, the others do as many steps as it does.
fn bench_step(environment: Environment) -> Result<()> {
    let name = format!("step/{} ranks", environment.world_size);
    let mut strategy = Ddp::setup_environment(environment, step_options())?;
    let (mut model, mut optimizer) = layers(&mut strategy, STEP_TENSORS, STEP_ELEMS)?;
    let rank = strategy.rank();
    let mut run = |iterations| steps(&mut strategy, (&mut model, &mut optimizer), iterations);
    if rank > 0 {
        while run(0)?.0 > 0 {}
        return strategy.teardown(TIMEOUT);
    }
    let mut failure = None;
    criterion().bench_function(&name, |bencher| {
        bencher.iter_custom(|iterations| match failure.is_none().then(|| run(iterations)) {
            Some(Ok((_, time))) => time,
            Some(Err(error)) => {
                failure = Some(error);
                Duration::from_nanos(iterations)
            }
            None => Duration::from_nanos(iterations),
        });
    });
    if let Some(error) = failure {
        return Err(error);
    }
    run(0)?; // no more
    strategy.teardown(TIMEOUT)
}

/// The same bytes, written and synchronised with nothing else.
fn plain_write(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let mut file = File::create(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

fn bench_checkpoint(criterion: &mut Criterion, folder: &Path) -> Result<()> {
    let mut strategy = SingleDevice::setup_environment(Environment::single(), StrategyOptions::default())?;
    let tensors = 16;
    let len_elems = CHECKPOINT_BYTES / 3 / size_of::<f32>() / tensors;
    let (model, mut optimizer) = layers(&mut strategy, tensors, len_elems)?;
    let path = folder.join("bench.safetensors");
    let bytes = vec![0x5a_u8; CHECKPOINT_BYTES];
    let mut group = criterion.benchmark_group("checkpoint");
    group.throughput(Throughput::Bytes(CHECKPOINT_BYTES as u64)).sample_size(10);
    let mut failure = None;
    group.bench_function("save", |bencher| {
        bencher.iter(|| {
            let state = State::new().module("model", &model).optimizer("optimizer", &optimizer);
            failure = strategy.save_checkpoint(&path, &state, None).err().or_else(|| failure.take());
        });
    });
    group.bench_function("write and fsync", |bencher| {
        let plain = folder.join("bench.plain");
        bencher.iter(|| plain_write(&plain, &bytes).expect("the folder takes a file"));
        let _ = std::fs::remove_file(&plain);
    });
    group.bench_function("load", |bencher| {
        bencher.iter(|| {
            let mut state = StateMut::new().module("model", &model).optimizer("optimizer", &mut optimizer);
            failure = strategy.load_checkpoint(&path, Some(&mut state), true).err().or_else(|| failure.take());
        });
    });
    group.bench_function("checksum", |bencher| bencher.iter(|| crc32fast::hash(std::hint::black_box(&bytes))));
    group.finish();
    failure.map_or(Ok(()), Err)
}

fn criterion() -> Criterion {
    Criterion::default().measurement_time(Duration::from_secs(3)).configure_from_args()
}

fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    for world_size in [1, 2] {
        launch::threads(world_size, bench_step)?.into_iter().collect::<Result<()>>()?;
    }
    let parent = std::env::var_os("ANNULUS_BENCH_DIR").map_or_else(std::env::temp_dir, PathBuf::from);
    let folder = tempfile::tempdir_in(parent)?;
    let mut criterion = criterion();
    bench_checkpoint(&mut criterion, folder.path())?;
    criterion.final_summary();
    Ok(())
}
