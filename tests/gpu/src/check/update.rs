//! What changes weights: optimizers, the gradients that they are given, and the loss scale.

use annulus::device::cuda::Buffer;
use annulus::ops::cuda::{
    Contribution, Contributions, GradientNorm, LossScale, Measure, OptimizerStep, Rule, Skip, StepCounts, StepTensor,
    StepWeights,
};
use annulus::ops::{
    AdamWOptions, GradScaler, Rounding, RoundingKey, Saturate, SgdOptions, StepSignal, Weights, adamw_step, cast,
    sgd_step,
};
use annulus::{DType, NormType};

use super::{lengths, limit, shifts};
use crate::Result;
use crate::part::Scale;
use crate::record::{Tally, check};
use crate::site::{PATIENCE, Placed, Site};
use crate::tensor::{SINGLES, Tensor, Values};

const HALVES: [DType; 2] = [DType::F16, DType::BF16];
const SEED: u64 = 0x5eed;
const FIRST_INDEX: u64 = 11;

/// Compares all.
///
/// # Errors
/// What keeps the device from being used.
pub fn run(scale: Scale) -> Result<()> {
    let site = Site::open()?;
    let adamw = Rule::AdamW(AdamWOptions { lr: 1e-2, weight_decay: 0.1, ..AdamWOptions::default() });
    let momentum = SgdOptions { lr: 1e-2, momentum: 0.9, nesterov: false, weight_decay: 0.1 };
    let rules = [
        ("AdamW", adamw),
        ("SGD", Rule::Sgd(SgdOptions { momentum: 0.0, ..momentum })),
        ("SGD with momentum", Rule::Sgd(momentum)),
        ("SGD with Nesterov's momentum", Rule::Sgd(SgdOptions { nesterov: true, ..momentum })),
    ];
    for (name, rule) in rules {
        check(name, limit(scale), |tally| steps(&site, scale, rule, tally));
    }
    check("gradients staged and accumulated", limit(scale), |tally| contributions(&site, scale, tally));
    check("the loss scale", limit(scale), |tally| loss_scale(&site, tally));
    check("what the host sets between steps", limit(scale), |tally| settings(&site, tally));
    Ok(())
}

/// Where the weights of a step are.
#[derive(Debug, Clone, Copy)]
enum Kind {
    Master(Option<DType>),
    Model(DType, bool),
}

impl Kind {
    fn all() -> impl Iterator<Item = Kind> {
        let masters = [None, Some(DType::F16), Some(DType::BF16)].map(Kind::Master);
        let models = HALVES.iter().flat_map(|dtype| [false, true].map(|stochastic| Kind::Model(*dtype, stochastic)));
        masters.into_iter().chain(models)
    }

    fn is_stochastic(self) -> bool {
        matches!(self, Kind::Model(_, true))
    }
}

/// One tensor's part in a step, on the host.
struct Replica {
    gradient: Tensor,
    weights: Tensor,
    copy: Option<Tensor>,
    states: Vec<Tensor>,
}

impl Replica {
    fn new(kind: Kind, gradient: DType, len_elems: usize, len_states: usize) -> Result<Replica> {
        let values = Tensor::of(DType::F32, len_elems, Values::Ordinary, 2);
        let (weights, copy) = match kind {
            Kind::Master(copy) => (values, copy.map(|dtype| Tensor::zeros(dtype, len_elems))),
            Kind::Model(dtype, _) => {
                let mut model = Tensor::zeros(dtype, len_elems);
                cast(values.slice(), model.slice_mut(), Saturate::No)?;
                (model, None)
            }
        };
        Ok(Replica {
            gradient: Tensor::of(gradient, len_elems, Values::Ordinary, 1),
            weights,
            copy,
            states: (0..len_states).map(|_| Tensor::zeros(DType::F32, len_elems)).collect(),
        })
    }

    fn step(&mut self, kind: Kind, rule: &Rule, step: u64, signal: StepSignal) -> Result<()> {
        let Replica { gradient, weights, copy, states } = self;
        let weights = match kind {
            Kind::Master(_) => {
                Weights::Master { master: weights.elements_mut::<f32>(), model: copy.as_mut().map(Tensor::slice_mut) }
            }
            Kind::Model(_, is_stochastic) => {
                let key = RoundingKey { seed: SEED, step };
                let stochastic = Rounding::Stochastic { key, first_index: FIRST_INDEX };
                let rounding = if is_stochastic { stochastic } else { Rounding::Nearest };
                Weights::Model { model: weights.slice_mut(), rounding }
            }
        };
        let mut states = states.iter_mut().map(Tensor::elements_mut::<f32>);
        let (first, second) = (states.next().unwrap_or_default(), states.next().unwrap_or_default());
        match rule {
            Rule::AdamW(options) => adamw_step(options, step, signal, weights, gradient.slice(), first, second)?,
            Rule::Sgd(options) => sgd_step(options, signal, weights, gradient.slice(), first)?,
        }
        Ok(())
    }
}

fn steps(site: &Site, scale: Scale, rule: Rule, tally: &mut Tally) -> Result<()> {
    for gradient in SINGLES {
        for kind in Kind::all() {
            for len_elems in lengths(scale).iter().filter(|len| **len <= 300_000) {
                for shift in shifts(scale, gradient).filter(|shift| *shift < 2 || *len_elems < 10_000) {
                    if !tally.has_time() {
                        return Ok(());
                    }
                    three_steps(site, rule, kind, gradient, *len_elems, shift).map_err(|error| {
                        format!("{kind:?}, {gradient} gradient, {len_elems} elements, shift {shift}: {error}")
                    })?;
                    tally.agreed();
                }
            }
        }
    }
    Ok(())
}

/// A clipped step, one without clipping, and one that is skipped because of a NaN.
fn three_steps(site: &Site, rule: Rule, kind: Kind, gradient: DType, len_elems: usize, shift: usize) -> Result<()> {
    let len_states = match rule {
        Rule::AdamW(_) => 2,
        Rule::Sgd(options) => usize::from(options.momentum != 0.0),
    };
    let mut host = Replica::new(kind, gradient, len_elems, len_states)?;
    let place = |tensor: &Tensor| site.place(tensor, shift);
    let [device_gradient, weights] = [place(&host.gradient)?, place(&host.weights)?];
    let copy = host.copy.as_ref().map(place).transpose()?;
    let states: Vec<Placed> = host.states.iter().map(place).collect::<Result<_>>()?;
    let tensor = StepTensor {
        gradient: device_gradient.view.clone(),
        weights: match kind {
            Kind::Master(_) => {
                StepWeights::Master { master: weights.view.clone(), model: copy.as_ref().map(|copy| copy.view.clone()) }
            }
            Kind::Model(..) => StepWeights::Model(weights.view.clone()),
        },
        states: states.iter().map(|state| state.view.clone()).collect(),
        decays: true,
        first_index: FIRST_INDEX,
    };
    let step = OptimizerStep::new(&site.kernels, rule, &[tensor], kind.is_stochastic().then_some(SEED))?;
    let bad = site.place(&Tensor::of(gradient, 3, Values::With(1, f64::NAN), 1), 0)?;
    let mut norm = GradientNorm::new(&site.kernels, std::slice::from_ref(&device_gradient.view))?;
    let mut bad_norm = GradientNorm::new(&site.kernels, std::slice::from_ref(&bad.view))?;
    let mut made = 0;
    for (norm, max_norm) in [(&mut norm, 0.1), (&mut bad_norm, 0.1), (&mut GradientNorm::new(&site.kernels, &[])?, 1e9)]
    {
        let how = Measure { norm_type: NormType::L2, max_norm, grad_scale: None, skip: Skip::Nonfinite };
        let report = norm.measure(&site.stream, &how)?.wait(PATIENCE)?;
        step.step(&site.stream, Some(norm.signal()))?;
        made += u64::from(!report.found_inf);
        let signal = StepSignal { clip_coef: report.clip_coef, grad_scale: 1.0, found_inf: report.found_inf };
        host.step(kind, &rule, made.max(1), signal)?;
    }
    let counts = step.counts(&site.stream, PATIENCE)?;
    if (counts.steps, counts.skipped_steps) != (2, 1) {
        return Err(format!("{counts:?} instead of 2 steps and 1 skipped").into());
    }
    let named = [("weights", &weights, &host.weights)].into_iter();
    let named = named.chain(copy.iter().zip(&host.copy).map(|(copy, host)| ("copy", copy, host)));
    for (name, placed, expected) in
        named.chain(states.iter().zip(&host.states).map(|(state, host)| ("state", state, host)))
    {
        if let Some(difference) = site.fetch(placed)?.difference(expected) {
            return Err(format!("{name}: {difference}").into());
        }
    }
    Ok(())
}

fn contributions(site: &Site, scale: Scale, tally: &mut Tally) -> Result<()> {
    const FACTOR: f32 = 0.3;
    for (src, dst) in SINGLES.iter().flat_map(|src| SINGLES.iter().map(move |dst| (*src, *dst))) {
        for len_elems in lengths(scale) {
            for shift in shifts(scale, src).filter(|shift| *shift < 2 || *len_elems < 10_000) {
                if !tally.has_time() {
                    return Ok(());
                }
                let tensor = Tensor::of(src, *len_elems, Values::Ordinary, 3);
                let source = site.place(&tensor, shift)?;
                let target = site.place(&Tensor::of(dst, *len_elems, Values::Wide, 4), shift / 2)?;
                let list = Contributions::new(&site.kernels, &[(source.view.clone(), target.view.clone())])?;
                list.launch(&site.stream, Contribution::Replace, FACTOR)?;
                list.launch(&site.stream, Contribution::Add, FACTOR)?;
                let mut expected = Tensor::zeros(dst, *len_elems);
                contribute(&tensor, &mut expected, FACTOR, false)?;
                contribute(&tensor, &mut expected, FACTOR, true)?;
                if let Some(difference) = site.fetch(&target)?.difference(&expected) {
                    return Err(format!("{src} to {dst}, {len_elems} elements, shift {shift}: {difference}").into());
                }
                tally.agreed();
            }
        }
    }
    Ok(())
}

/// `dst = src * factor`, or `dst += src * factor`: in f32, each operation rounded, the result once more.
fn contribute(src: &Tensor, dst: &mut Tensor, factor: f32, adds: bool) -> Result<()> {
    let widened = |tensor: &Tensor| {
        let mut wide = Tensor::zeros(DType::F32, tensor.len_elems());
        cast(tensor.slice(), wide.slice_mut(), Saturate::No).map(|()| wide)
    };
    let (mut sum, old) = (widened(src)?, widened(dst)?);
    for (x, old) in sum.elements_mut::<f32>().iter_mut().zip(old.elements::<f32>()) {
        *x *= factor;
        if adds {
            *x += old;
        }
    }
    Ok(cast(sum.slice(), dst.slice_mut(), Saturate::No)?)
}

/// Grows, backs off, and stops at the ends of the range, as the host's does.
fn loss_scale(site: &Site, tally: &mut Tally) -> Result<()> {
    for initial in [65536.0, 8e37, 1e-37] {
        let mut host = GradScaler::new(initial, 2.0, 0.5, 3)?;
        let device = LossScale::new(&site.kernels, &host)?;
        let gradients = [Buffer::filled(&site.device, &[1.0f32])?, Buffer::filled(&site.device, &[f32::INFINITY])?];
        for step in 0..24 {
            let is_bad = step % 7 > 4 || initial < 1.0 && step > 10;
            let mut norm = GradientNorm::new(&site.kernels, &[gradients[usize::from(is_bad)].view()])?;
            let (norm_type, grad_scale) = (NormType::L2, Some(device.scale()));
            let how = Measure { norm_type, max_norm: 1.0, grad_scale, skip: Skip::Nonfinite };
            norm.measure(&site.stream, &how)?;
            device.update(&site.stream, norm.signal())?;
            host.update(is_bad);
            let now = device.read(&site.stream, PATIENCE)?;
            if (now.scale().to_bits(), now.good_steps()) != (host.scale().to_bits(), host.good_steps()) {
                return Err(format!("after {step} steps from {initial}: {now:?}, on the host {host:?}").into());
            }
            tally.agreed();
        }
    }
    Ok(())
}

/// Learning rates, counts and a loss scale, each in the order of the stream.
fn settings(site: &Site, tally: &mut Tally) -> Result<()> {
    const LEN_ELEMS: usize = 259;
    let kind = Kind::Master(None);
    let mut options = AdamWOptions { lr: 1e-2, weight_decay: 0.1, ..AdamWOptions::default() };
    let mut host = Replica::new(kind, DType::F32, LEN_ELEMS, 2)?;
    let place = |tensor: &Tensor| site.place(tensor, 0);
    let [gradient, weights] = [place(&host.gradient)?, place(&host.weights)?];
    let states: Vec<Placed> = host.states.iter().map(place).collect::<Result<_>>()?;
    let tensor = StepTensor {
        gradient: gradient.view.clone(),
        weights: StepWeights::Master { master: weights.view.clone(), model: None },
        states: states.iter().map(|state| state.view.clone()).collect(),
        decays: true,
        first_index: 0,
    };
    let mut device = OptimizerStep::new(&site.kernels, Rule::AdamW(options), &[tensor], None)?;
    let signal = StepSignal { clip_coef: 1.0, grad_scale: 1.0, found_inf: false };
    // As if 7 steps of 9 had been made before.
    device.set_counts(&site.stream, StepCounts { steps: 7, skipped_steps: 2 })?;
    for (step, lr) in (8..).zip([1e-2, 0.0, 3e-4, 0.5]) {
        device.set_learning_rate(&site.stream, lr)?;
        device.step(&site.stream, None)?;
        options.lr = lr;
        host.step(kind, &Rule::AdamW(options), step, signal)?;
        if let Some(difference) = site.fetch(&weights)?.difference(&host.weights) {
            return Err(format!("weights at a learning rate of {lr}: {difference}").into());
        }
        tally.agreed();
    }
    let counts = device.counts(&site.stream, PATIENCE)?;
    if (counts.steps, counts.skipped_steps) != (11, 2) {
        return Err(format!("{counts:?} instead of 11 steps and 2 skipped").into());
    }
    let loss_scale = LossScale::new(&site.kernels, &GradScaler::default())?;
    let other = GradScaler::new(8.0, 4.0, 0.25, 5)?;
    loss_scale.set(&site.stream, &other)?;
    let now = loss_scale.read(&site.stream, PATIENCE)?;
    if format!("{now:?}") != format!("{other:?}") {
        return Err(format!("the loss scale is {now:?}, not {other:?}").into());
    }
    tally.agreed();
    Ok(())
}
