//! The optimizer and the loss scale, and whole steps against the host's.

use annulus::device::cuda::View;
use annulus::ops::cuda::{
    GradientNorm, LossScale, Measure, OptimizerStep, Rule, Skip, StepCounts, StepTensor, StepWeights,
};
use annulus::ops::{
    self, AdamWOptions, GradScaler, NormSlots, Rounding, RoundingKey, SgdOptions, StepSignal, Weights, clip_coef,
    grad_norm,
};
use annulus::{DType, Error, NormType};

use crate::gpu::{Gpu, PATIENCE};
use crate::support::on_virtual_gpu;
use crate::tensors::{Random, Tensor};

const SEED: u64 = 0xfeed_0123_4567;
const ADAMW: AdamWOptions = AdamWOptions { lr: 1e-2, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.1 };

/// One parameter on the host.
pub struct Parameter {
    pub gradient: Tensor,
    pub master: Option<Tensor>,
    pub model: Option<Tensor>,
    pub states: Vec<Tensor>,
    pub decays: bool,
    pub first_index: u64,
}

fn f32s(tensor: &mut Tensor) -> &mut [f32] {
    match tensor {
        Tensor::F32(elements) => elements,
        _ => unreachable!(),
    }
}

impl Parameter {
    /// `kept`: dtype of the model copy, if any; and whether there is a master.
    pub fn new(len_elems: usize, gradient: DType, kept: (Option<DType>, bool), len_states: usize) -> Parameter {
        let mut random = Random(len_elems as u64);
        let weights = Tensor::from_fn(DType::F32, len_elems, |_| random.spread(1.0, 6.0));
        let values = weights.values();
        Parameter {
            gradient: Tensor::from_fn(gradient, len_elems, |_| random.spread(4.0, 20.0)),
            model: kept.0.map(|dtype| Tensor::from_fn(dtype, len_elems, |i| values[i])),
            master: kept.1.then_some(weights),
            states: (0..len_states).map(|_| Tensor::zeros(DType::F32, len_elems)).collect(),
            decays: len_elems % 2 == 1,
            first_index: 1001 * len_elems as u64,
        }
    }

    pub fn step(&mut self, rule: Rule, step: u64, signal: StepSignal) {
        let key = RoundingKey { seed: SEED, step };
        let rounding = Rounding::Stochastic { key, first_index: self.first_index };
        let weights = match (&mut self.master, &mut self.model) {
            (Some(master), model) => {
                Weights::Master { master: f32s(master), model: model.as_mut().map(Tensor::slice_mut) }
            }
            (None, Some(model)) => Weights::Model { model: model.slice_mut(), rounding },
            (None, None) => unreachable!(),
        };
        let decay = |weight_decay| if self.decays { weight_decay } else { 0.0 };
        let gradient = self.gradient.slice();
        match (rule, self.states.as_mut_slice()) {
            (Rule::AdamW(options), [m, v]) => {
                let options = AdamWOptions { weight_decay: decay(options.weight_decay), ..options };
                ops::adamw_step(&options, step, signal, weights, gradient, f32s(m), f32s(v)).unwrap();
            }
            (Rule::Sgd(options), states) => {
                let options = SgdOptions { weight_decay: decay(options.weight_decay), ..options };
                let velocity = states.first_mut().map(f32s).unwrap_or_default();
                ops::sgd_step(&options, signal, weights, gradient, velocity).unwrap();
            }
            (Rule::AdamW(_), _) => unreachable!(),
        }
    }

    pub fn place(&self, gpu: &Gpu, offset_elems: usize) -> StepTensor {
        let place = |tensor: &Tensor| gpu.place_at(tensor, offset_elems);
        StepTensor {
            gradient: place(&self.gradient),
            weights: match (&self.master, &self.model) {
                (Some(master), model) => {
                    StepWeights::Master { master: place(master), model: model.as_ref().map(place) }
                }
                (None, Some(model)) => StepWeights::Model(place(model)),
                (None, None) => unreachable!(),
            },
            states: self.states.iter().map(place).collect(),
            decays: self.decays,
            first_index: self.first_index,
        }
    }

    #[track_caller]
    pub fn compare(&self, gpu: &Gpu, tensor: &StepTensor, what: &str) {
        let weights: Vec<&View> = match &tensor.weights {
            StepWeights::Master { master, model } => [Some(master), model.as_ref()].into_iter().flatten().collect(),
            StepWeights::Model(model) => vec![model],
        };
        let expected = self.master.iter().chain(&self.model).chain(&self.states);
        for (view, expected) in weights.into_iter().chain(&tensor.states).zip(expected) {
            let len_elems = expected.len_elems();
            assert_eq!(gpu.read(view).bits(), expected.bits(), "{what}: {} of {len_elems}", expected.dtype());
        }
    }
}

const KEPT: [(Option<DType>, bool); 4] =
    [(None, true), (Some(DType::BF16), true), (Some(DType::F16), true), (Some(DType::BF16), false)];

/// Every kind of weights and gradients, several chunks, empty and odd ones.
fn parameters(len_states: usize) -> Vec<Parameter> {
    let lens = [32768 + 77, 0, 1, 302];
    let dtypes = [DType::F32, DType::BF16, DType::F16, DType::F32];
    (0..4).map(|i| Parameter::new(lens[i], dtypes[i], KEPT[i], len_states)).collect()
}

#[test]
fn steps_have_the_bits_of_the_host_and_follow_a_learning_rate() {
    on_virtual_gpu("step::steps_have_the_bits_of_the_host_and_follow_a_learning_rate", &[], || {
        let gpu = Gpu::new();
        let sgd = |momentum, nesterov| Rule::Sgd(SgdOptions { lr: 0.05, momentum, nesterov, weight_decay: 0.01 });
        for (mut rule, len_states) in [(Rule::AdamW(ADAMW), 2), (sgd(0.0, false), 0), (sgd(0.9, true), 1)] {
            let mut host = parameters(len_states);
            let tensors: Vec<_> = host.iter().enumerate().map(|(i, p)| p.place(&gpu, i)).collect();
            let mut device = OptimizerStep::new(&gpu.kernels, rule, &tensors, Some(SEED)).unwrap();
            for step in 1..=4 {
                device.step(&gpu.stream, None).unwrap();
                host.iter_mut().for_each(|parameter| parameter.step(rule, step, StepSignal::default()));
                // Behind the step in flight, which keeps the old one.
                device.set_learning_rate(&gpu.stream, 0.1 / step as f64).unwrap();
                rule = device.rule();
            }
            for (parameter, tensor) in host.iter().zip(&tensors) {
                parameter.compare(&gpu, tensor, &format!("{rule:?}"));
            }
            let counts = device.counts(&gpu.stream, PATIENCE).unwrap();
            assert_eq!(counts, StepCounts { steps: 4, skipped_steps: 0 });
        }
    });
}

#[test]
fn a_count_from_a_checkpoint_is_where_the_bias_correction_goes_on() {
    on_virtual_gpu("step::a_count_from_a_checkpoint_is_where_the_bias_correction_goes_on", &[], || {
        let gpu = Gpu::new();
        let mut host = Parameter::new(40, DType::F32, (None, true), 2);
        let tensor = host.place(&gpu, 0);
        let device = OptimizerStep::new(&gpu.kernels, Rule::AdamW(ADAMW), std::slice::from_ref(&tensor), None).unwrap();
        device.set_counts(&gpu.stream, StepCounts { steps: 1000, skipped_steps: 7 }).unwrap();
        device.step(&gpu.stream, None).unwrap();
        host.step(Rule::AdamW(ADAMW), 1001, StepSignal::default());
        host.compare(&gpu, &tensor, "step 1001");
        let counts = device.counts(&gpu.stream, PATIENCE).unwrap();
        assert_eq!(counts, StepCounts { steps: 1001, skipped_steps: 7 });
    });
}

/// What a strategy does after backward, on the host.
struct HostStep {
    parameters: Vec<Parameter>,
    scaler: GradScaler,
    slots: NormSlots,
    counts: StepCounts,
}

impl HostStep {
    fn step(&mut self, rule: Rule, max_norm: f64) -> f64 {
        let gradients: Vec<_> = self.parameters.iter().map(|parameter| parameter.gradient.slice()).collect();
        let norm = grad_norm(&gradients, NormType::L2, &mut self.slots).unwrap();
        let total_norm = norm.total_norm / f64::from(self.scaler.scale());
        let clip_coef = if norm.nonfinite { 1.0 } else { clip_coef(total_norm, max_norm) };
        let signal = StepSignal { clip_coef, grad_scale: self.scaler.scale(), found_inf: norm.nonfinite };
        if norm.nonfinite {
            self.counts.skipped_steps += 1;
        } else {
            self.counts.steps += 1;
        }
        let step = self.counts.steps;
        if !norm.nonfinite {
            self.parameters.iter_mut().for_each(|parameter| parameter.step(rule, step, signal));
        }
        self.scaler.update(norm.nonfinite);
        total_norm
    }
}

#[test]
fn whole_steps_have_the_bits_of_the_host_over_skips_growth_and_back_off() {
    on_virtual_gpu("step::whole_steps_have_the_bits_of_the_host_over_skips_growth_and_back_off", &[], || {
        let gpu = Gpu::new();
        let scaler = GradScaler::new(1024.0, 2.0, 0.5, 2).unwrap();
        let parameters = parameters(2);
        let lens: Vec<usize> = parameters.iter().map(|parameter| parameter.gradient.len_elems()).collect();
        let slots = NormSlots::new(&lens).unwrap();
        let mut host = HostStep { parameters, scaler, slots, counts: StepCounts::default() };
        let tensors: Vec<_> = host.parameters.iter().map(|parameter| parameter.place(&gpu, 1)).collect();
        let gradients: Vec<View> = tensors.iter().map(|tensor| tensor.gradient.clone()).collect();

        let rule = Rule::AdamW(ADAMW);
        let optimizer = OptimizerStep::new(&gpu.kernels, rule, &tensors, Some(SEED)).unwrap();
        let mut norm = GradientNorm::new(&gpu.kernels, &gradients).unwrap();
        let scale = LossScale::new(&gpu.kernels, &scaler).unwrap();
        let mut random = Random(5);
        for step in 0..7 {
            for (parameter, view) in host.parameters.iter_mut().zip(&gradients) {
                let (dtype, len_elems) = (parameter.gradient.dtype(), parameter.gradient.len_elems());
                let overflows = [1, 2].contains(&step) && len_elems == 302;
                let value = |i: usize| if overflows && i == 300 { f64::INFINITY } else { random.spread(900.0, 9.0) };
                parameter.gradient = Tensor::from_fn(dtype, len_elems, value);
                gpu.write(view, &parameter.gradient);
            }
            let grad_scale = Some(scale.scale());
            let max_norm = if step == 5 { f64::INFINITY } else { 1.5 };
            let how = Measure { norm_type: NormType::L2, max_norm, grad_scale, skip: Skip::Nonfinite };
            let ticket = norm.measure(&gpu.stream, &how).unwrap();
            optimizer.step(&gpu.stream, Some(norm.signal())).unwrap();
            scale.update(&gpu.stream, norm.signal()).unwrap();
            let expected = host.step(rule, max_norm);
            assert_eq!(ticket.wait(PATIENCE).unwrap().total_norm.to_bits(), expected.to_bits(), "step {step}");
            assert_eq!(scale.read(&gpu.stream, PATIENCE).unwrap(), host.scaler, "step {step}");
        }
        for (parameter, tensor) in host.parameters.iter().zip(&tensors) {
            parameter.compare(&gpu, tensor, "after seven steps");
        }
        assert_eq!(optimizer.counts(&gpu.stream, PATIENCE).unwrap(), host.counts);
        assert_eq!(host.counts, StepCounts { steps: 5, skipped_steps: 2 });
        let other = GradScaler::new(4.0, 3.0, 0.25, 5).unwrap();
        scale.set(&gpu.stream, &other).unwrap();
        assert_eq!(scale.read(&gpu.stream, PATIENCE).unwrap(), other);
    });
}

#[test]
fn what_cannot_be_stepped_is_refused() {
    on_virtual_gpu("step::what_cannot_be_stepped_is_refused", &[("ANNULUS_VGPU_DEVICES", "2")], || {
        let (gpu, other) = (Gpu::new(), Gpu::number(1));
        let good = |len_states| Parameter::new(40, DType::F32, (Some(DType::BF16), true), len_states).place(&gpu, 0);
        let make = |rule, tensor: &StepTensor| {
            OptimizerStep::new(&gpu.kernels, rule, std::slice::from_ref(tensor), None).map(drop)
        };
        let adamw = Rule::AdamW(ADAMW);
        let sgd = |momentum| Rule::Sgd(SgdOptions { momentum, ..SgdOptions::default() });
        make(adamw, &good(2)).unwrap();
        let invalid = |result: annulus::Result<()>, words: &str| {
            let error = result.unwrap_err();
            assert!(matches!(error, Error::InvalidArgument { .. }) && error.to_string().contains(words), "{error}");
        };
        invalid(make(Rule::AdamW(AdamWOptions { beta1: 1.0, ..ADAMW }), &good(2)), "beta1");
        invalid(make(adamw, &good(1)), "states");
        invalid(make(sgd(0.9), &good(0)), "states");
        invalid(make(sgd(0.0), &good(2)), "states");
        let short = |view: &View| view.slice(0, 39).unwrap();
        let tensor = StepTensor { gradient: short(&good(2).gradient), ..good(2) };
        assert!(matches!(make(adamw, &tensor), Err(Error::LengthMismatch { .. })));
        let doubles = gpu.place(&Tensor::zeros(DType::F64, 40));
        let tensor = StepTensor { gradient: doubles.clone(), ..good(2) };
        assert!(matches!(make(adamw, &tensor), Err(Error::Unsupported { dtype: DType::F64, .. })));
        let weights = StepWeights::Model(good(2).gradient);
        let tensor = StepTensor { weights, ..good(2) };
        assert!(matches!(make(adamw, &tensor), Err(Error::Unsupported { dtype: DType::F32, .. })));
        let tensor = good(2);
        let weights = StepWeights::Master { master: tensor.states[1].clone(), model: None };
        invalid(make(adamw, &StepTensor { weights, ..tensor }), "overlap");
        let far = Parameter::new(40, DType::F32, (None, true), 2).place(&other, 0);
        invalid(make(adamw, &far), "device 1");
        let tensor = StepTensor { first_index: u64::MAX - 10, ..good(2) };
        assert!(matches!(make(adamw, &tensor), Err(Error::SizeOverflow { .. })));
        let twice = [good(2), good(2)];
        let twice = [twice[0].clone(), StepTensor { states: twice[0].states.clone(), ..twice[1].clone() }];
        let result = OptimizerStep::new(&gpu.kernels, adamw, &twice, None).map(drop);
        invalid(result, "tensors 0 and 1, which overlap");

        let mut step = OptimizerStep::new(&gpu.kernels, sgd(0.0), &[good(0)], None).unwrap();
        invalid(step.set_rule(&gpu.stream, adamw), "rule");
        invalid(step.set_rule(&gpu.stream, sgd(0.5)), "momentum");
        invalid(step.set_learning_rate(&gpu.stream, f64::NAN), "lr");
        invalid(step.set_learning_rate(&other.stream, 0.5), "stream");
        assert_eq!(step.rule(), sgd(0.0), "nothing that was refused left a trace");
        let norm = GradientNorm::new(&other.kernels, &[]).unwrap();
        invalid(step.step(&gpu.stream, Some(norm.signal())), "device 1");
        invalid(step.step(&other.stream, None), "stream");
        let scale = LossScale::new(&gpu.kernels, &GradScaler::default()).unwrap();
        invalid(scale.update(&gpu.stream, norm.signal()), "device 1");
    });
}
