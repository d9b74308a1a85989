//! An update rule that is not of this library: it trains, adds the same on every rank, and its state is in checkpoints.

use std::path::Path;

use annulus::ops::{Slice, Weights};
use annulus::strategy::{
    Accelerator, Init, Module, Nonfinite, Optimizer, Parameter, Piece, State, StateMut, Strategy, StrategyOptions,
    UpdateRule,
};
use annulus::{DType, Error, NormType, Result};

use crate::model::{Loss, Mlp, Sample, bits, options, run_in, samples};

/// The sign of a velocity: Signum (Bernstein et al. 2018).
#[derive(Debug)]
struct Signum {
    learning_rate: f64,
    momentum: f32,
}

impl UpdateRule for Signum {
    fn name(&self) -> &'static str {
        "signum"
    }

    fn learning_rate(&self) -> f64 {
        self.learning_rate
    }

    fn state_names(&self) -> &'static [&'static str] {
        &["velocity"]
    }

    fn check(&self, learning_rate: f64) -> Result<()> {
        let value = format!("{learning_rate}");
        let wrong = Error::InvalidArgument { argument: "learning_rate", value, accepted: "it must be positive" };
        if learning_rate > 0.0 { Ok(()) } else { Err(wrong) }
    }

    fn update(&self, piece: Piece<'_>) -> Result<()> {
        let (Weights::Master { master, model: None }, Slice::F32(gradient)) = (piece.weights, piece.gradient) else {
            return Err(Error::Unsupported { op: "signum".into(), dtype: DType::BF16 });
        };
        for ((weight, velocity), gradient) in master.iter_mut().zip(piece.state).zip(gradient) {
            *velocity = self.momentum * *velocity + piece.signal.factor() * gradient;
            *weight -= piece.learning_rate as f32 * velocity.signum();
        }
        Ok(())
    }
}

const RULE: Signum = Signum { learning_rate: 0.02, momentum: 0.9 };
const LIMIT: f64 = 0.5;

/// What a rank has of a run.
struct Run {
    model: Mlp,
    optimizer: Optimizer,
    /// The same, by the book: weights and velocities.
    expected: (Vec<f32>, Vec<f32>),
}

impl Run {
    fn new(strategy: &mut Box<dyn Strategy>) -> Run {
        let init = strategy.module_init_context(Init::Default);
        let model = Mlp::new(&init, 4 + u64::from(strategy.rank())).unwrap();
        let (model, optimizer) = strategy.setup_module_and_optimizers(model, RULE).unwrap();
        let weights = model.weights();
        Run { expected: (weights.clone(), vec![0.0; weights.len()]), model, optimizer }
    }

    /// A step on this rank's share of `data`, and the same on the gradients that all ranks have together.
    fn step(&mut self, strategy: &mut Box<dyn Strategy>, data: &[Sample]) {
        let len = data.len() / strategy.world_size() as usize;
        let share = &data[strategy.rank() as usize * len..][..len];
        strategy.backward(&Loss::of(share), &mut self.model).unwrap();
        let mut handles: Vec<Parameter> = Vec::new();
        self.model.parameters(&mut |parameter| handles.push(parameter.clone()));
        let mut gradients = Vec::new();
        for parameter in &handles {
            let mut gradient = vec![f32::NAN; parameter.len_elems()];
            strategy.read_gradient(parameter, &mut gradient).unwrap();
            gradients.extend(gradient);
        }
        let handle =
            strategy.clip_gradients_norm(&self.model, &mut self.optimizer, LIMIT, NormType::L2, Nonfinite::SkipStep);
        strategy.optimizer_step(&mut self.optimizer).unwrap();
        let factor = annulus::reference::clip_coef(handle.unwrap().get(crate::model::TIMEOUT).unwrap(), LIMIT);
        let (weights, velocities) = &mut self.expected;
        for ((weight, velocity), gradient) in weights.iter_mut().zip(velocities).zip(gradients) {
            *velocity = RULE.momentum * *velocity + factor * gradient;
            *weight -= RULE.learning_rate as f32 * velocity.signum();
        }
        assert_eq!(bits(&self.model.weights()), bits(weights));
    }

    fn velocities(&self, strategy: &mut Box<dyn Strategy>) -> Vec<u32> {
        let state = strategy.get_optimizer_state(&self.optimizer).unwrap();
        let mut all = Vec::new();
        for (name, tensor) in &state.tensors {
            assert!(name.starts_with("velocity."), "{name}");
            all.extend(bits(tensor.as_slice().unwrap()));
        }
        all
    }
}

/// Saves `run`, and loads it into a run that began elsewhere.
fn restored(strategy: &mut Box<dyn Strategy>, run: &Run, path: &Path) -> Run {
    let state = State::new().module("model", &run.model).optimizer("optimizer", &run.optimizer);
    strategy.save_checkpoint(path, &state, None).unwrap();
    let mut other = Run::new(strategy);
    other.optimizer.set_learning_rate(0.5).unwrap();
    let mut state = StateMut::new().module("model", &other.model).optimizer("optimizer", &mut other.optimizer);
    strategy.load_checkpoint(path, Some(&mut state), true).unwrap();
    drop(state);
    other.expected.clone_from(&run.expected);
    other
}

#[test]
fn a_rule_of_ones_own_trains_and_is_in_checkpoints() {
    let (data, folder) = (samples(24), tempfile::tempdir().unwrap());
    // On a device it is refused: there is no kernel of it.
    let options = StrategyOptions { accelerator: Accelerator::Host, ..options() };
    for world in [None, Some(1), Some(2)] {
        let path = folder.path().join(format!("{world:?}"));
        let all = run_in(world, &options, |strategy| {
            let mut run = Run::new(strategy);
            let before = run.model.loss(&data);
            (0..30).for_each(|_| run.step(strategy, &data));
            let mut other = restored(strategy, &run, &path);
            assert_eq!(other.velocities(strategy), run.velocities(strategy));
            assert_eq!((other.optimizer.steps().unwrap(), other.optimizer.learning_rate()), (30, RULE.learning_rate));
            for _ in 0..10 {
                run.step(strategy, &data);
                other.step(strategy, &data);
            }
            assert_eq!(bits(&other.model.weights()), bits(&run.model.weights()));
            let after = run.model.loss(&data);
            assert!(after < 0.5 * before, "the loss went from {before} to {after}");
            assert!(run.velocities(strategy).iter().any(|velocity| *velocity != 0));
            bits(&run.model.weights())
        });
        assert!(all.iter().all(|weights| *weights == all[0]), "every rank has the same");
    }
}
