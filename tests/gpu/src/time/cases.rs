//! What is timed.

use annulus::device::cuda::{Buffer, Stream, View};
use annulus::ops::cuda::{
    CastList, ClipList, Contribution, Contributions, GradientNorm, Measure, OptimizerStep, Rule, Skip, StepTensor,
    StepWeights, StochasticCastList, UnscaleNorm,
};
use annulus::ops::{AdamWOptions, RoundingKey, Saturate, SgdOptions};
use annulus::{DType, NormType};

use super::model::{norm_of, tensors};
use crate::Result;
use crate::record::{Beside, Goal, OnH100, Who};
use crate::site::Site;

/// An operation over the tensors of a model.
pub struct Case {
    /// Its name; `pytorch.py` names its version the same.
    pub what: &'static str,
    /// The least that an element makes it read and write.
    pub bytes_per_elem: u64,
    goals: &'static [Wanted],
    /// Tensors of these lengths, and the work on them.
    pub prepare: fn(&Site, &[usize]) -> Result<Work>,
}

/// What a case should reach.
enum Wanted {
    /// So much of the copy's bandwidth.
    OfCopy(f64),
    /// So much of the time of PyTorch's version.
    OfPyTorch(f64),
    /// So much of the time of another case's version in PyTorch.
    OfPyTorchs(&'static str, f64),
    /// So much of another case's time.
    Of(&'static str, f64),
    /// So many microseconds on an H100, for [`H100_ELEMS`].
    OnH100(f64),
}
use Wanted::{Of, OfCopy, OfPyTorch, OfPyTorchs};

/// Elements of the goals in microseconds.
const H100_ELEMS: u64 = 1_536_000_000;

impl Case {
    /// What its timing should reach.
    pub fn goal(&self) -> Goal {
        let mut goal = Goal::default();
        for wanted in self.goals {
            let (who, what, times) = match *wanted {
                OfCopy(share) => {
                    goal.share = Some(share);
                    continue;
                }
                Wanted::OnH100(us) => {
                    goal.h100 = Some(OnH100 { us, bytes: self.bytes_per_elem * H100_ELEMS });
                    continue;
                }
                OfPyTorch(times) => (Who::PyTorch, self.what, times),
                OfPyTorchs(what, times) => (Who::PyTorch, what, times),
                Of(what, times) => (Who::Annulus, what, times),
            };
            goal.beside.push(Beside { who, what: what.to_owned(), times });
        }
        goal
    }
}

/// Enqueues an operation once.
pub type Work = Box<dyn FnMut(&Stream) -> Result<()>>;

fn work(run: impl FnMut(&Stream) -> Result<()> + 'static) -> Result<Work> {
    Ok(Box::new(run))
}

const fn case(
    what: &'static str,
    bytes_per_elem: u64,
    goals: &'static [Wanted],
    prepare: fn(&Site, &[usize]) -> Result<Work>,
) -> Case {
    Case { what, bytes_per_elem, goals, prepare }
}

const L2: &str = "L2 norm, bf16";
const NARROW: &str = "cast f32 to bf16";

/// All, each behind those that it is judged by.
pub const CASES: &[Case] = &[
    case(
        "norm and clip, nothing to clip, bf16",
        2,
        &[OfCopy(0.85), OfPyTorch(0.5), Wanted::OnH100(1150.0)],
        |site, lens| clip(site, DType::BF16, lens, f64::INFINITY, 1.0),
    ),
    case("norm and clip, clipping, bf16", 6, &[OfCopy(0.85), OfPyTorch(0.5), Wanted::OnH100(3600.0)], |site, lens| {
        clip(site, DType::BF16, lens, 1.0, 0.99)
    }),
    case("norm and clip, clipping, f32", 12, &[OfCopy(0.85), OfPyTorch(0.5)], |site, lens| {
        clip(site, DType::F32, lens, 1.0, 0.99)
    }),
    case(L2, 2, &[OfCopy(0.85), OfPyTorch(1.0)], |site, lens| norm(site, DType::BF16, lens, NormType::L2)),
    case("L1 norm, bf16", 2, &[Of(L2, 1.1), OfPyTorch(1.0)], |site, lens| norm(site, DType::BF16, lens, NormType::L1)),
    case("inf norm, bf16", 2, &[Of(L2, 1.1), OfPyTorch(1.0)], |site, lens| {
        norm(site, DType::BF16, lens, NormType::Inf)
    }),
    case("norm with p = 3, bf16", 2, &[Of(L2, 1.1)], |site, lens| norm(site, DType::BF16, lens, NormType::P(3.0))),
    case("L2 norm, f32", 4, &[OfCopy(0.85), OfPyTorch(1.0)], |site, lens| norm(site, DType::F32, lens, NormType::L2)),
    case(NARROW, 6, &[OfCopy(0.9), OfPyTorch(1.0)], |site, lens| cast(site, DType::F32, DType::BF16, lens)),
    case("cast bf16 to f32", 6, &[OfCopy(0.9), OfPyTorch(1.0)], |site, lens| cast(site, DType::BF16, DType::F32, lens)),
    case("stochastic cast f32 to bf16", 6, &[OfCopy(0.9), OfPyTorchs(NARROW, 1.0)], stochastic_cast),
    case("unscale, cast and norm, f32 to bf16", 6, &[OfCopy(0.9), OfPyTorch(1.0), OfPyTorchs(NARROW, 1.0)], unscale),
    case("accumulate bf16 into f32", 10, &[OfCopy(0.9), OfPyTorch(1.0)], accumulate),
    case("clip and AdamW, f32", 32, &[OfCopy(0.9), OfPyTorch(1.0)], |site, lens| {
        update(site, DType::F32, None, lens, ADAMW)
    }),
    case("clip and AdamW, bf16 with f32 master", 30, &[OfCopy(0.9), OfPyTorch(1.0)], |site, lens| {
        update(site, DType::BF16, Some(DType::BF16), lens, ADAMW)
    }),
    case("clip and SGD with momentum, f32", 24, &[OfCopy(0.9), OfPyTorch(1.0)], |site, lens| {
        update(site, DType::F32, None, lens, SGD)
    }),
];

const ADAMW: Rule = Rule::AdamW(AdamWOptions { lr: 1e-4, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01 });
const SGD: Rule = Rule::Sgd(SgdOptions { lr: 1e-4, momentum: 0.9, nesterov: false, weight_decay: 0.01 });

fn how(norm_type: NormType, max_norm: f64) -> Measure<'static> {
    Measure { norm_type, max_norm, grad_scale: None, skip: Skip::Nonfinite }
}

/// The bound begins at `bound` times the norm, and shrinks by `shrink`, so that every round clips.
fn clip(site: &Site, dtype: DType, lens: &[usize], bound: f64, shrink: f64) -> Result<Work> {
    let gradients = tensors(site, dtype, lens)?;
    let mut max_norm = bound * norm_of(site, &gradients)?;
    let mut norm = GradientNorm::new(&site.kernels, &gradients)?;
    let list = ClipList::new(&site.kernels, &gradients)?;
    work(move |stream| {
        max_norm *= shrink;
        norm.measure(stream, &how(NormType::L2, max_norm))?;
        Ok(list.scale(stream, norm.signal())?)
    })
}

fn norm(site: &Site, dtype: DType, lens: &[usize], norm_type: NormType) -> Result<Work> {
    let mut norm = GradientNorm::new(&site.kernels, &tensors(site, dtype, lens)?)?;
    work(move |stream| Ok(norm.measure(stream, &how(norm_type, f64::INFINITY)).map(drop)?))
}

fn pairs(site: &Site, src: DType, dst: DType, lens: &[usize]) -> Result<Vec<(View, View)>> {
    Ok(tensors(site, src, lens)?.into_iter().zip(tensors(site, dst, lens)?).collect())
}

fn cast(site: &Site, src: DType, dst: DType, lens: &[usize]) -> Result<Work> {
    let list = CastList::new(&site.kernels, &pairs(site, src, dst, lens)?)?;
    work(move |stream| Ok(list.cast(stream, Saturate::No)?))
}

fn stochastic_cast(site: &Site, lens: &[usize]) -> Result<Work> {
    let mut first_index = 0;
    let pairs = pairs(site, DType::F32, DType::BF16, lens)?.into_iter();
    let triples = pairs.map(|(src, dst)| {
        let triple = (src, dst, first_index);
        first_index += triple.0.len_elems() as u64;
        triple
    });
    let list = StochasticCastList::new(&site.kernels, &triples.collect::<Vec<_>>())?;
    work(move |stream| Ok(list.cast(stream, RoundingKey { seed: 1, step: 1 }, Saturate::No)?))
}

fn unscale(site: &Site, lens: &[usize]) -> Result<Work> {
    let mut norm = UnscaleNorm::new(&site.kernels, &pairs(site, DType::F32, DType::BF16, lens)?)?;
    let scale = Buffer::filled(&site.device, &[1024.0f32])?.view();
    work(move |stream| Ok(norm.measure(stream, &how(NormType::L2, f64::INFINITY), &scale).map(drop)?))
}

fn accumulate(site: &Site, lens: &[usize]) -> Result<Work> {
    let list = Contributions::new(&site.kernels, &pairs(site, DType::BF16, DType::F32, lens)?)?;
    work(move |stream| Ok(list.launch(stream, Contribution::Add, 0.25)?))
}

/// Norm and update: clipping costs nothing of its own.
fn update(site: &Site, gradient: DType, model: Option<DType>, lens: &[usize], rule: Rule) -> Result<Work> {
    let gradients = tensors(site, gradient, lens)?;
    let masters = tensors(site, DType::F32, lens)?;
    let models = model.map(|dtype| tensors(site, dtype, lens)).transpose()?;
    let zeroes = || -> Result<Vec<View>> {
        let whole = tensors(site, DType::F32, lens)?;
        whole.iter().try_for_each(|view| view.zero(&site.stream))?;
        Ok(whole)
    };
    let states: Vec<Vec<View>> =
        (0..if matches!(rule, Rule::AdamW(_)) { 2 } else { 1 }).map(|_| zeroes()).collect::<Result<_>>()?;
    let step_tensors: Vec<StepTensor> = (0..lens.len())
        .map(|i| StepTensor {
            gradient: gradients[i].clone(),
            weights: StepWeights::Master {
                master: masters[i].clone(),
                model: models.as_ref().map(|models| models[i].clone()),
            },
            states: states.iter().map(|state| state[i].clone()).collect(),
            decays: true,
            first_index: 0,
        })
        .collect();
    let step = OptimizerStep::new(&site.kernels, rule, &step_tensors, None)?;
    let mut norm = GradientNorm::new(&site.kernels, &gradients)?;
    work(move |stream| {
        norm.measure(stream, &how(NormType::L2, 1.0))?;
        Ok(step.step(stream, Some(norm.signal()))?)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_a_case_is_judged_by_is_timed() {
        let is_in_script = |what: &str| crate::pytorch::SCRIPT.contains(&format!("    \"{what}\": ("));
        for (index, case) in CASES.iter().enumerate() {
            let goal = case.goal();
            assert!(goal.share.is_some() || !goal.beside.is_empty(), "{}", case.what);
            for Beside { who, what, times } in &goal.beside {
                let is_timed = match who {
                    Who::PyTorch => is_in_script(what),
                    Who::Annulus => CASES[..index].iter().any(|before| before.what == what),
                };
                assert!(is_timed && (0.1..2.0).contains(times), "{} beside {what}", case.what);
            }
            let has_own_peer = goal.beside.iter().any(|beside| beside.who == Who::PyTorch && beside.what == case.what);
            assert_eq!(is_in_script(case.what), has_own_peer, "{} in pytorch.py", case.what);
        }
    }

    /// What the project promises of one card, case by case.
    #[test]
    fn every_promise_about_a_card_is_the_goal_of_a_case() {
        let goal_of = |what: &str| CASES.iter().find(|case| case.what == what).map(Case::goal).unwrap();
        let most = |what: &str, who: Who, other: &str| {
            let of = goal_of(what).beside.into_iter().find(|beside| beside.who == who && beside.what == other);
            of.map(|beside| beside.times)
        };
        for (what, us, bytes) in [
            ("norm and clip, nothing to clip, bf16", 1150.0, 3_072_000_000),
            ("norm and clip, clipping, bf16", 3600.0, 9_216_000_000),
        ] {
            let goal = goal_of(what);
            let h100 = goal.h100.unwrap();
            assert_eq!((goal.share, h100.us, h100.bytes), (Some(0.85), us, bytes));
            assert_eq!(most(what, Who::PyTorch, what), Some(0.5), "twice as fast");
        }
        for what in ["L1 norm, bf16", "inf norm, bf16", "norm with p = 3, bf16"] {
            assert_eq!((goal_of(what).share, most(what, Who::Annulus, L2)), (None, Some(1.1)), "{what}");
        }
        for what in
            ["cast f32 to bf16", "cast bf16 to f32", "clip and AdamW, f32", "clip and AdamW, bf16 with f32 master"]
        {
            assert_eq!((goal_of(what).share, most(what, Who::PyTorch, what)), (Some(0.9), Some(1.0)), "{what}");
        }
        let fused = "unscale, cast and norm, f32 to bf16";
        assert_eq!((goal_of(fused).share, most(fused, Who::PyTorch, NARROW)), (Some(0.9), Some(1.0)));
    }
}
