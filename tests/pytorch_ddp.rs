//! `Ddp` beside PyTorch's `DistributedDataParallel` over Gloo: the same small network, the same shards, 100 clipped steps
//! of AdamW. `tests/pytorch/ddp.py` has the bounds.
//!
//! The initial and the final weights are annulus checkpoints, which the script reads as plain safetensors. Skipped, with
//! the reason on standard error, where `python3` has no torch.
#![cfg(not(loom))]

use std::io::Write;
use std::process::Command;

use annulus::NormType;
use annulus::strategy::{AdamW, Ddp, Init, Nonfinite, State, Strategy};
use serde_json::json;

// Tests of the strategy use more of it.
#[allow(dead_code)]
#[path = "strategy/model.rs"]
mod model;
use model::{Loss, Mlp, Sample, TIMEOUT};

const RANKS: u32 = 2;
const STEPS: usize = 100;
const BATCH: usize = 12;
const SAMPLES: usize = 400;
/// Small enough that the first steps are clipped and the last are not.
const MAX_NORM: f64 = 0.9;
const LEARNING_RATE: f64 = 1e-2;
const WEIGHT_DECAY: f64 = 0.1;

/// The samples of one rank in one step: both programs go by this rule.
fn shard(samples: &[Sample], rank: u32, step: usize) -> Vec<Sample> {
    let first = (step * RANKS as usize + rank as usize) * BATCH;
    (0..BATCH).map(|i| samples[(first + i) % SAMPLES].clone()).collect()
}

/// Trains one rank; returns its loss before each step and the total norm of each.
fn train(mut strategy: Ddp, samples: &[Sample], folder: &std::path::Path) -> Vec<(f64, f64)> {
    let init = strategy.module_init_context(Init::Default);
    let model = Mlp::new(&init, 100 + u64::from(strategy.rank())).unwrap();
    let optimizer = AdamW::new(LEARNING_RATE).weight_decay(WEIGHT_DECAY);
    let (mut model, mut optimizer) = strategy.setup_module_and_optimizers(model, optimizer).unwrap();
    let save = |strategy: &mut Ddp, model: &Mlp, name: &str| {
        let state = State::new().module("model", model);
        strategy.save_checkpoint(&folder.join(name), &state, None).unwrap();
    };
    save(&mut strategy, &model, "initial.safetensors");
    let mut history = Vec::new();
    for step in 0..STEPS {
        let batch = shard(samples, strategy.rank(), step);
        let loss = model.loss(&batch);
        strategy.backward(&Loss::of(&batch), &mut model).unwrap();
        let norm = strategy
            .clip_gradients_norm(&model, &mut optimizer, MAX_NORM, NormType::L2, Nonfinite::ErrorNow)
            .unwrap()
            .get(TIMEOUT)
            .unwrap();
        strategy.optimizer_step(&mut optimizer).unwrap();
        history.push((loss, norm));
    }
    save(&mut strategy, &model, "final.safetensors");
    strategy.teardown(TIMEOUT).unwrap();
    history
}

#[test]
fn ddp_agrees_with_pytorch() {
    let probe = "import torch.distributed as d; assert d.is_gloo_available()";
    let missing = match Command::new("python3").args(["-c", probe]).output() {
        Ok(output) if output.status.success() => None,
        Ok(output) => Some(String::from_utf8_lossy(&output.stderr).lines().last().unwrap_or("?").to_owned()),
        Err(error) => Some(format!("python3: {error}")),
    };
    if let Some(reason) = missing {
        // Written past the capture of test output, so that a skipped comparison is seen.
        let _ = writeln!(std::io::stderr(), "skipped the comparison of Ddp with PyTorch: {reason}");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let samples = model::samples(SAMPLES);
    let histories = model::ddp(RANKS, model::options(), |strategy| train(strategy, &samples, folder.path()));
    let norms: Vec<f64> = histories[0].iter().map(|(_, norm)| *norm).collect();
    assert!(histories.iter().all(|history| history.iter().map(|(_, norm)| norm).eq(&norms)), "one norm on every rank");
    let clipped = norms.iter().filter(|norm| **norm > MAX_NORM).count();
    assert!((5..STEPS - 5).contains(&clipped), "both kinds of steps: {clipped} of {STEPS} clipped");

    let run = json!({
        "ranks": RANKS, "steps": STEPS, "batch": BATCH,
        "max_norm": MAX_NORM, "lr": LEARNING_RATE, "weight_decay": WEIGHT_DECAY,
        "inputs": samples.iter().map(|sample| &sample.input).collect::<Vec<_>>(),
        "targets": samples.iter().map(|sample| &sample.target).collect::<Vec<_>>(),
        "losses": histories.iter().map(|h| h.iter().map(|(loss, _)| loss).collect()).collect::<Vec<Vec<_>>>(),
        "norms": norms,
    });
    std::fs::write(folder.path().join("run.json"), run.to_string()).unwrap();
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/pytorch/ddp.py");
    let compared = Command::new("python3").arg(script).arg(folder.path()).output().unwrap();
    let (told, failed) = (String::from_utf8_lossy(&compared.stdout), String::from_utf8_lossy(&compared.stderr));
    println!("{told}");
    assert!(compared.status.success(), "{told}{failed}");
}
