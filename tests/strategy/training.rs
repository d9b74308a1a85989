//! Whole runs: N ranks on shards of a batch follow one rank on the whole batch.

use annulus::NormType;
use annulus::strategy::{AdamW, DataLoader, Nonfinite, Precision, Strategy, StrategyOptions};

use crate::model::{Loss, Mlp, TIMEOUT, bits, ddp, options, samples, times};

fn steps() -> usize {
    times(300, 6)
}

const BATCH: usize = 12;

/// Losses of all steps and the weights at the end, of a run on `world_size` ranks that share batches of [`BATCH`].
fn run(world_size: u32, options: StrategyOptions) -> (Vec<f64>, Vec<f32>) {
    let data = samples(96);
    let mut ranks = ddp(world_size, options, |strategy| {
        let mut strategy: Box<dyn Strategy> = Box::new(strategy);
        let mut model = Mlp::set_up(&mut strategy);
        let mut optimizer = strategy.setup_optimizer(&model, AdamW::new(2e-3).into()).unwrap();
        let batch_size = BATCH / world_size as usize;
        let loader = DataLoader::new(data.clone(), batch_size).shuffle(true).seed(21);
        let loader = strategy.process_dataloader(loader).unwrap();
        let mut losses = Vec::new();
        'run: for epoch in 0.. {
            for batch in loader.epoch(epoch) {
                let mut loss = model.loss(&batch);
                strategy.all_reduce(&mut loss, None, None).unwrap();
                losses.push(loss);
                strategy.backward(&Loss::of(&batch), &mut model).unwrap();
                strategy.clip_gradients_norm(&model, &mut optimizer, 0.4, NormType::L2, Nonfinite::ErrorNow).unwrap();
                strategy.optimizer_step(&mut optimizer).unwrap();
                if losses.len() == steps() {
                    break 'run;
                }
            }
        }
        let weights = model.weights();
        strategy.teardown(TIMEOUT).unwrap();
        (losses, weights)
    });
    for (losses, weights) in &ranks {
        assert_eq!(bits(weights), bits(&ranks[0].1), "all ranks have the same weights");
        assert_eq!(losses, &ranks[0].0);
    }
    ranks.swap_remove(0)
}

#[test]
fn several_ranks_follow_one_rank_on_the_whole_batch() {
    let (losses, weights) = run(1, options());
    let last = losses[losses.len() - 1];
    assert!(last < times(5, 10) as f64 * 0.1 * losses[0], "it learns: {} to {last}", losses[0]);
    for world_size in [2, 3, 4] {
        let (theirs, their_weights) = run(world_size, options());
        // Rounding of the sum order alone: 300 steps, each within a few units in the last place of f32.
        for (step, (a, b)) in losses.iter().zip(&theirs).enumerate() {
            assert!((a - b).abs() <= 2e-4 * a.abs(), "{world_size} ranks, step {step}: {a} and {b}");
        }
        for (a, b) in weights.iter().zip(&their_weights) {
            assert!((a - b).abs() <= 1e-3, "{world_size} ranks: weights {a} and {b}");
        }
    }
}

#[test]
fn a_run_repeats_itself_bit_for_bit() {
    for precision in [Precision::F32True, Precision::Bf16Mixed] {
        let options = StrategyOptions { precision, ..options() };
        let (losses, weights) = run(3, options.clone());
        let (again, weights_again) = run(3, options);
        assert_eq!(losses, again);
        assert_eq!(bits(&weights), bits(&weights_again));
    }
}
