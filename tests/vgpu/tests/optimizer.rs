//! `kernels/optimizer.cu` and `kernels/scaler.cu` against the host backend, bit for bit.

mod tensors;

use std::sync::LazyLock;

use annulus::abi::{
    AdamWRule, ChunkRef, ELEMENTWISE_THREADS, LossScaler, OptimizerArguments, OptimizerState, OptimizerTensor, SgdRule,
    StepSignal,
};
use annulus::ops::{self, AdamWOptions, GradScaler, Rounding, RoundingKey, SgdOptions, Weights};
use annulus::{DType, kernels};
use annulus_vgpu::{Module, Options, Report};
use bytemuck::Zeroable;
use tensors::{Device, Random, Tensor, fast};

static MODULE: LazyLock<Module> = LazyLock::new(|| Module::parse(kernels::OPTIMIZER).unwrap());

const ADAMW: AdamWOptions = AdamWOptions { lr: 1e-2, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.1 };
const SEED: u64 = 0xfeed_0123_4567;

#[derive(Debug, Clone, Copy)]
enum Rule {
    AdamW(AdamWOptions),
    Sgd(SgdOptions),
}

impl Rule {
    fn len_states(self) -> usize {
        match self {
            Rule::AdamW(_) => 2,
            Rule::Sgd(options) => usize::from(options.momentum != 0.0),
        }
    }

    fn kernel(self) -> &'static str {
        match self {
            Rule::AdamW(_) => "step_adamw",
            Rule::Sgd(_) => "step_sgd",
        }
    }

    fn place(self, device: &mut Device) -> u64 {
        match self {
            Rule::AdamW(AdamWOptions { lr, beta1, beta2, eps, weight_decay }) => {
                device.place(&[AdamWRule { lr, beta1, beta2, eps, weight_decay }])
            }
            Rule::Sgd(SgdOptions { lr, momentum, nesterov, weight_decay }) => {
                device.place(&[SgdRule { lr, momentum, weight_decay, nesterov: nesterov.into(), padding: 0 }])
            }
        }
    }
}

/// Which weights there are.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Kept {
    Master,
    MasterAndModel(DType),
    Model(DType),
    ModelStochastic(DType),
}

/// One parameter on the host, and what updates it there.
#[derive(Clone)]
struct Parameter {
    gradient: Tensor,
    master: Option<Tensor>,
    model: Option<Tensor>,
    states: Vec<Tensor>,
    decays: bool,
    first_index: u64,
    is_stochastic: bool,
}

fn f32s(tensor: &mut Tensor) -> &mut [f32] {
    match tensor {
        Tensor::F32(elements) => elements,
        _ => unreachable!(),
    }
}

impl Parameter {
    fn new(len_elems: usize, gradient_dtype: DType, kept: Kept, len_states: usize, seed: u64) -> Parameter {
        let mut random = Random(seed);
        let weights = Tensor::from_fn(DType::F32, len_elems, |_| random.spread(1.0, 6.0));
        let values = weights.values();
        let rounded = |dtype| Tensor::from_fn(dtype, len_elems, |i| values[i]);
        let (master, model) = match kept {
            Kept::Master => (Some(weights), None),
            Kept::MasterAndModel(dtype) => (Some(weights), Some(rounded(dtype))),
            Kept::Model(dtype) | Kept::ModelStochastic(dtype) => (None, Some(rounded(dtype))),
        };
        Parameter {
            gradient: Tensor::from_fn(gradient_dtype, len_elems, |_| random.spread(4.0, 20.0)),
            master,
            model,
            // Second moments are not negative; the velocity may be.
            states: (0..len_states)
                .map(|_| Tensor::from_fn(DType::F32, len_elems, |_| random.spread(0.1, 30.0).abs()))
                .collect(),
            decays: seed.is_multiple_of(2),
            first_index: seed * 1001,
            is_stochastic: matches!(kept, Kept::ModelStochastic(_)),
        }
    }

    fn step(&mut self, rule: Rule, step: u64, signal: ops::StepSignal) {
        let key = RoundingKey { seed: SEED, step };
        let rounding = match self.is_stochastic {
            true => Rounding::Stochastic { key, first_index: self.first_index },
            false => Rounding::Nearest,
        };
        let weights = match (&mut self.master, &mut self.model) {
            (Some(master), model) => {
                Weights::Master { master: f32s(master), model: model.as_mut().map(Tensor::slice_mut) }
            }
            (None, Some(model)) => Weights::Model { model: model.slice_mut(), rounding },
            (None, None) => unreachable!(),
        };
        let decay = |weight_decay| if self.decays { weight_decay } else { 0.0 };
        match (rule, self.states.as_mut_slice()) {
            (Rule::AdamW(options), [m, v]) => {
                let options = AdamWOptions { weight_decay: decay(options.weight_decay), ..options };
                ops::adamw_step(&options, step, signal, weights, self.gradient.slice(), f32s(m), f32s(v)).unwrap();
            }
            (Rule::Sgd(options), states) => {
                let options = SgdOptions { weight_decay: decay(options.weight_decay), ..options };
                let velocity = states.first_mut().map(f32s).unwrap_or_default();
                ops::sgd_step(&options, signal, weights, self.gradient.slice(), velocity).unwrap();
            }
            (Rule::AdamW(_), _) => unreachable!(),
        }
    }

    /// Everything that a step may write.
    fn results(&self) -> Vec<&Tensor> {
        self.master.iter().chain(&self.model).chain(&self.states).collect()
    }
}

/// Parameters on a virtual GPU.
struct Model {
    device: Device,
    arguments: OptimizerArguments,
    rule: Rule,
    tensors: Vec<OptimizerTensor>,
}

impl Model {
    /// `offsets_elems`: how far gradient, master, model and states lie behind 16 bytes.
    fn new(parameters: &[Parameter], rule: Rule, steps: u64, offsets_elems: [u64; 4]) -> Model {
        let mut device = Device::new();
        let mut tensors = Vec::new();
        for parameter in parameters {
            let mut place = |tensor: Option<&Tensor>, offset_elems: u64| {
                tensor.map_or(0, |tensor| device.tensor(tensor, offset_elems * tensor.dtype().size_bytes() as u64))
            };
            tensors.push(OptimizerTensor {
                gradient: place(Some(&parameter.gradient), offsets_elems[0]),
                master: place(parameter.master.as_ref(), offsets_elems[1]),
                model: place(parameter.model.as_ref(), offsets_elems[2]),
                states: [0, 1].map(|i| place(parameter.states.get(i), offsets_elems[3])),
                len_elems: parameter.gradient.len_elems() as u64,
                first_index: parameter.first_index,
                gradient_dtype: parameter.gradient.dtype() as u32,
                model_dtype: parameter.model.as_ref().map_or(0, |model| model.dtype() as u32),
                decays: parameter.decays.into(),
                padding: 0,
            });
        }
        let lens: Vec<usize> = parameters.iter().map(|parameter| parameter.gradient.len_elems()).collect();
        let arguments = OptimizerArguments {
            tensors: device.place(&tensors),
            range: device.all_chunks(&lens),
            rule: rule.place(&mut device),
            state: device.place(&[OptimizerState { steps, ..OptimizerState::zeroed() }]),
            signal: 0,
            rounding_seed: SEED,
            is_stochastic: parameters.iter().any(|parameter| parameter.is_stochastic).into(),
            padding: 0,
        };
        Model { device, arguments, rule, tensors }
    }

    fn set_signal(&mut self, signal: ops::StepSignal) {
        let ops::StepSignal { clip_coef, grad_scale, found_inf } = signal;
        let signal = StepSignal { clip_coef, grad_scale, found_inf: found_inf.into(), ..StepSignal::zeroed() };
        self.arguments.signal = self.device.place(&[signal]);
    }

    #[track_caller]
    fn step(&mut self, blocks: u32, options: &Options) -> Report {
        self.device
            .run(&MODULE, self.rule.kernel(), blocks, ELEMENTWISE_THREADS, &self.arguments, options)
            .unwrap_or_else(|fault| panic!("{fault}"))
    }

    fn state(&self) -> OptimizerState {
        self.device.read(self.arguments.state)
    }

    #[track_caller]
    fn compare(&self, parameters: &[Parameter], what: &str) {
        for (number, (tensor, parameter)) in self.tensors.iter().zip(parameters).enumerate() {
            let addresses = [tensor.master, tensor.model, tensor.states[0], tensor.states[1]];
            let addresses = addresses.into_iter().filter(|address| *address != 0);
            for (address, expected) in addresses.zip(parameter.results()) {
                let actual = self.device.read_tensor(address, expected.dtype(), expected.len_elems());
                assert_eq!(actual.bits(), expected.bits(), "{what}, parameter {number}, {}", expected.dtype());
            }
        }
    }
}

#[track_caller]
fn check(
    parameters: &[Parameter],
    rule: Rule,
    steps: std::ops::Range<u64>,
    signal: Option<ops::StepSignal>,
    offsets_elems: [u64; 4],
    options: &Options,
) -> Report {
    let mut parameters = parameters.to_vec();
    let mut model = Model::new(&parameters, rule, steps.start, offsets_elems);
    if let Some(signal) = signal {
        model.set_signal(signal);
    }
    let mut report = Report::default();
    for step in steps.clone() {
        for parameter in &mut parameters {
            parameter.step(rule, step + 1, signal.unwrap_or_default());
        }
        report = model.step(2, options);
        model.compare(&parameters, &format!("{rule:?}, step {}, offsets {offsets_elems:?}", step + 1));
    }
    assert_eq!(model.state(), OptimizerState { steps: steps.end, ..OptimizerState::zeroed() });
    report
}

const KEPT: [Kept; 7] = [
    Kept::Master,
    Kept::MasterAndModel(DType::BF16),
    Kept::MasterAndModel(DType::F16),
    Kept::Model(DType::BF16),
    Kept::Model(DType::F16),
    Kept::ModelStochastic(DType::BF16),
    Kept::ModelStochastic(DType::F16),
];

fn rules() -> [Rule; 4] {
    let sgd = |momentum, nesterov, weight_decay| Rule::Sgd(SgdOptions { lr: 0.05, momentum, nesterov, weight_decay });
    [Rule::AdamW(ADAMW), sgd(0.0, false, 0.01), sgd(0.9, false, 0.0), sgd(0.9, true, 0.01)]
}

#[test]
fn every_rule_kind_of_weights_and_gradient_dtype_has_the_bits_of_the_host() {
    let signal = ops::StepSignal { clip_coef: 0.3, grad_scale: 1024.0, found_inf: false };
    for rule in rules() {
        for kept in KEPT {
            for gradient_dtype in [DType::F32, DType::F16, DType::BF16] {
                let parameters =
                    [300, 0, 2101].map(|len| Parameter::new(len, gradient_dtype, kept, rule.len_states(), len as u64));
                check(&parameters, rule, 0..2, Some(signal), [0; 4], &fast());
            }
        }
    }
}

#[test]
fn every_length_and_alignment_touches_its_own_elements_only() {
    let rule = Rule::AdamW(ADAMW);
    for len_elems in [0, 1, 3, 4, 5, 31, 1025] {
        let kept = Kept::MasterAndModel(DType::BF16);
        check(&[Parameter::new(len_elems, DType::BF16, kept, 2, 3)], rule, 0..1, None, [0; 4], &Options::default());
    }
    for offsets in [[1, 1, 1, 1], [3, 3, 3, 3], [0, 1, 2, 3], [5, 1, 1, 1], [0, 0, 1, 0], [0, 0, 0, 2]] {
        for kept in [Kept::MasterAndModel(DType::F16), Kept::ModelStochastic(DType::BF16)] {
            let parameter = Parameter::new(4 * 1024 + 77, DType::F32, kept, 2, 5);
            check(&[parameter], rule, 0..1, None, offsets, &fast());
            check(&[Parameter::new(3, DType::F32, kept, 2, 5)], rule, 0..1, None, offsets, &Options::default());
        }
    }
}

/// Parameters of which only the elements behind `first_elem` exist in memory.
#[test]
fn elements_beyond_the_31st_bit_are_stepped_at_their_own_addresses() {
    for first_elem in [1u64 << 31, 1 << 32, (1 << 32) + (1 << 31)] {
        for rule in rules() {
            for kept in [Kept::MasterAndModel(DType::BF16), Kept::ModelStochastic(DType::F16)] {
                let mut parameter = Parameter::new(700, DType::BF16, kept, rule.len_states(), 3);
                let mut model = Model::new(std::slice::from_ref(&parameter), rule, 0, [0; 4]);
                // What lies before is never reached, so its address may wrap.
                let begin = |address: u64, dtype: DType| match address {
                    0 => 0,
                    address => address.wrapping_sub(first_elem * dtype.size_bytes() as u64),
                };
                let near = model.tensors[0];
                let tensor = OptimizerTensor {
                    gradient: begin(near.gradient, DType::BF16),
                    master: begin(near.master, DType::F32),
                    model: begin(near.model, DType::F16), // as long as BF16
                    states: near.states.map(|state| begin(state, DType::F32)),
                    len_elems: first_elem + 700,
                    ..near
                };
                model.arguments.tensors = model.device.place(&[tensor]);
                let chunk = ChunkRef { tensor: 0, index: (first_elem / 32768) as u32 };
                model.arguments.range.chunks = model.device.place(&[chunk]);
                model.step(1, &fast());
                parameter.first_index += first_elem;
                parameter.step(rule, 1, ops::StepSignal::default());
                model.compare(&[parameter], &format!("{rule:?}, {kept:?}, behind {first_elem} elements"));
            }
        }
    }
}

#[test]
fn the_bias_correction_follows_the_device_s_count() {
    let parameters = [Parameter::new(40, DType::F32, Kept::Master, 2, 1)];
    for first in [0, 9, 999, 1_000_000_007, u64::from(u32::MAX)] {
        check(&parameters, Rule::AdamW(ADAMW), first..first + 3, None, [0; 4], &fast());
    }
}

#[test]
fn a_skipped_step_changes_nothing_but_its_count() {
    let parameters = [Parameter::new(500, DType::F32, Kept::MasterAndModel(DType::BF16), 2, 1)];
    let mut model = Model::new(&parameters, Rule::AdamW(ADAMW), 4, [0; 4]);
    model.set_signal(ops::StepSignal { clip_coef: 1.0, grad_scale: 8.0, found_inf: true });
    let report = model.step(3, &Options::default());
    model.compare(&parameters, "skipped");
    assert_eq!(model.state(), OptimizerState { steps: 4, skipped_steps: 1, ..OptimizerState::zeroed() });
    assert!(report.stored_bytes == 8, "{report:?}");
}

#[test]
fn hard_gradients_are_what_ieee_makes_of_them() {
    let hard = [0.0, -0.0, f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 1e-45, -1e-38, 3e38, -3e38, 1.0];
    for rule in rules() {
        for kept in [Kept::MasterAndModel(DType::BF16), Kept::Model(DType::F16), Kept::ModelStochastic(DType::BF16)] {
            let mut parameter = Parameter::new(50, DType::F32, kept, rule.len_states(), 1);
            parameter.gradient = Tensor::from_fn(DType::F32, 50, |i| hard[i % 10]);
            for state in &mut parameter.states {
                f32s(state)[20..30].fill(0.0);
                f32s(state)[30..40].fill(1e-44);
            }
            check(&[parameter], rule, 0..2, None, [0; 4], &fast());
        }
    }
}

#[test]
fn the_grid_does_not_change_the_bits_and_blocks_race_for_nothing() {
    let kept = Kept::ModelStochastic(DType::F16);
    let mut parameters =
        [Parameter::new(32768 + 1030, DType::BF16, kept, 2, 2), Parameter::new(70, DType::F32, kept, 2, 3)];
    let mut models = [1, 2, 3].map(|blocks| (blocks, Model::new(&parameters, Rule::AdamW(ADAMW), 0, [2; 4])));
    parameters.iter_mut().for_each(|parameter| parameter.step(Rule::AdamW(ADAMW), 1, ops::StepSignal::default()));
    for (blocks, model) in &mut models {
        let options =
            if *blocks == 2 { Options { budget_instructions: 1 << 40, ..Options::default() } } else { fast() };
        model.step(*blocks, &options);
        model.compare(&parameters, &format!("{blocks} blocks"));
    }
}

#[test]
fn every_byte_moves_once_in_few_instructions() {
    let len_elems = 32768;
    for (kept, gradient, loaded, stored, most) in [
        (Kept::Master, DType::F32, 16, 12, 30.0),
        (Kept::MasterAndModel(DType::BF16), DType::BF16, 14, 14, 38.0),
        (Kept::Model(DType::BF16), DType::BF16, 12, 10, 38.0),
    ] {
        let parameter = Parameter::new(len_elems, gradient, kept, 2, 1);
        let report = check(&[parameter], Rule::AdamW(ADAMW), 0..1, None, [0; 4], &fast());
        let per_element = report.instructions as f64 / len_elems as f64;
        println!("AdamW, {kept:?}, {gradient} gradients: {per_element:.2} instructions an element, {report:?}");
        // The tables' entries, read by each thread.
        let bookkeeping_bytes = 512 * 160;
        assert!(report.loaded_bytes <= loaded * len_elems as u64 + bookkeeping_bytes, "{report:?}");
        assert!(report.stored_bytes <= stored * len_elems as u64 + 16, "{report:?}");
        assert!(per_element <= most, "{per_element}");
    }
}

// ---- the loss scale ------------------------------------------------------------------------------------------------

fn scaler_of(scaler: &GradScaler, growth_factor: f32, backoff_factor: f32, growth_interval: u32) -> LossScaler {
    LossScaler {
        scale: scaler.scale(),
        growth_factor,
        backoff_factor,
        growth_interval,
        good_steps: scaler.good_steps(),
        enabled: scaler.is_enabled().into(),
    }
}

#[test]
fn the_loss_scale_moves_as_on_the_host() {
    let module = Module::parse(kernels::SCALER).unwrap();
    let mut random = Random(3);
    for (initial, growth, backoff, interval) in
        [(65536.0f32, 2.0f32, 0.5f32, 3), (4e37, 1.7, 0.3, 1), (2e-38, 2.0, 0.5, 2), (8.5e37, 1.5, 0.25, 4)]
    {
        let mut host = GradScaler::new(initial, growth, backoff, interval).unwrap();
        let mut device = Device::new();
        let address = device.place(&[scaler_of(&host, growth, backoff, interval)]);
        for _ in 0..40 {
            let found_inf = random.bits().is_multiple_of(4);
            let signal = device.place(&[StepSignal { found_inf: found_inf.into(), ..StepSignal::zeroed() }]);
            host.update(found_inf);
            device.run(&module, "update_scaler", 1, 32, &[address, signal], &Options::default()).unwrap();
            let actual: LossScaler = device.read(address);
            assert_eq!(actual, scaler_of(&host, growth, backoff, interval));
        }
    }
}

#[test]
fn a_disabled_scaler_never_moves() {
    let module = Module::parse(kernels::SCALER).unwrap();
    let scaler = LossScaler {
        scale: 1.0,
        growth_factor: 2.0,
        backoff_factor: 0.5,
        growth_interval: 1,
        good_steps: 0,
        enabled: 0,
    };
    for found_inf in [0, 1] {
        let mut device = Device::new();
        let address = device.place(&[scaler]);
        let signal = device.place(&[StepSignal { found_inf, ..StepSignal::zeroed() }]);
        device.run(&module, "update_scaler", 1, 32, &[address, signal], &Options::default()).unwrap();
        assert_eq!(device.read::<LossScaler>(address), scaler);
    }
}
