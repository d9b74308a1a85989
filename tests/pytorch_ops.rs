//! Clipping, AdamW and SGD beside PyTorch's, on the same numbers: `tests/pytorch/ops.py` has the bounds.
//!
//! Skipped, with the reason on standard error, where `python3` has no torch.

use std::collections::HashMap;
use std::io::Write;
use std::process::Command;

use annulus::ops::{
    AdamWOptions, NormSlots, SgdOptions, Slice, SliceMut, StepSignal, Weights, adamw_step, cast, clip_coef, grad_norm,
    scale_in_place, sgd_step,
};
use annulus::{DType, NormType, reference};
use half::{bf16, f16};
use safetensors::tensor::{Dtype, TensorView};

const STEPS: usize = 100;
const MAX_NORM: f64 = 1.0;
/// One of each kind: longer than a chunk, a matrix, odd, a scalar.
const SHAPES: [&[usize]; 4] = [&[100_003], &[129, 77], &[13], &[]];
/// Shorter, because a hundred gradients of each are kept.
const TRAINED_SHAPES: [&[usize]; 3] = [&[33, 65], &[4099], &[]];

fn uniforms(seed: u32, len: usize) -> Vec<f32> {
    (0..len)
        .map(|index| {
            let word = reference::philox4x32_10([index as u32, 0, 0, 0], [seed, 0])[0];
            (word >> 8) as f32 / 8_388_608.0 - 1.0
        })
        .collect()
}

/// What becomes the file: owned bytes by name.
#[derive(Default)]
struct File {
    tensors: HashMap<String, (Dtype, Vec<usize>, Vec<u8>)>,
    metadata: HashMap<String, String>,
}

impl File {
    fn add<T: bytemuck::Pod>(&mut self, name: String, dtype: Dtype, shape: &[usize], elements: &[T]) {
        assert_eq!(shape.iter().product::<usize>(), elements.len());
        self.tensors.insert(name, (dtype, shape.to_vec(), bytemuck::cast_slice(elements).to_vec()));
    }

    fn add_f32(&mut self, name: String, shape: &[usize], elements: &[f32]) {
        self.add(name, Dtype::F32, shape, elements);
    }

    fn write(self, path: &std::path::Path) {
        let views = self.tensors.iter().map(|(name, (dtype, shape, bytes))| {
            (name.as_str(), TensorView::new(*dtype, shape.clone(), bytes).expect("shape and bytes agree"))
        });
        safetensors::serialize_to_file(views, Some(self.metadata), path).expect("the temporary folder is writable");
    }
}

fn elements(shape: &[usize]) -> usize {
    shape.iter().product()
}

fn add_clipping(file: &mut File) {
    let gradients: Vec<Vec<f32>> =
        SHAPES.iter().enumerate().map(|(seed, shape)| uniforms(seed as u32, elements(shape))).collect();
    let lens: Vec<usize> = gradients.iter().map(Vec::len).collect();
    let mut slots = NormSlots::new(&lens).unwrap();
    for dtype in [DType::F32, DType::BF16, DType::F16] {
        let mut halves: Vec<Vec<f16>> = lens.iter().map(|len| vec![f16::ZERO; *len]).collect();
        let mut bfloats: Vec<Vec<bf16>> = lens.iter().map(|len| vec![bf16::ZERO; *len]).collect();
        for (tensor, gradient) in gradients.iter().enumerate() {
            cast(Slice::F32(gradient), SliceMut::F16(&mut halves[tensor]), Default::default()).unwrap();
            cast(Slice::F32(gradient), SliceMut::BF16(&mut bfloats[tensor]), Default::default()).unwrap();
            let name = format!("gradient.{dtype}.{tensor}");
            match dtype {
                DType::F16 => file.add(name, Dtype::F16, SHAPES[tensor], &halves[tensor]),
                DType::BF16 => file.add(name, Dtype::BF16, SHAPES[tensor], &bfloats[tensor]),
                _ => file.add_f32(name, SHAPES[tensor], gradient),
            }
        }
        let slices: Vec<Slice<'_>> = (0..lens.len())
            .map(|tensor| match dtype {
                DType::F16 => Slice::F16(&halves[tensor]),
                DType::BF16 => Slice::BF16(&bfloats[tensor]),
                _ => Slice::F32(&gradients[tensor]),
            })
            .collect();
        let norm_types = [
            ("1.0", NormType::L1),
            ("2.0", NormType::L2),
            ("3.0", NormType::P(3.0)),
            ("3.5", NormType::P(3.5)),
            ("inf", NormType::Inf),
        ];
        for (name, norm_type) in norm_types {
            let total_norm = grad_norm(&slices, norm_type, &mut slots).unwrap().total_norm;
            file.add(format!("norm.{dtype}.{name}"), Dtype::F64, &[1], &[total_norm]);
            if dtype == DType::F32 {
                for (tensor, gradient) in gradients.iter().enumerate() {
                    let mut clipped = gradient.clone();
                    scale_in_place(SliceMut::F32(&mut clipped), clip_coef(total_norm, MAX_NORM));
                    file.add_f32(format!("clipped.{dtype}.{name}.{tensor}"), SHAPES[tensor], &clipped);
                }
            }
        }
    }
    file.metadata.insert("max_norm".to_owned(), MAX_NORM.to_string());
}

/// Initial weights and a hundred gradients, whose size varies so that some steps are clipped and some are not.
struct Training {
    initial: Vec<Vec<f32>>,
    gradients: Vec<Vec<Vec<f32>>>,
}

fn add_training(file: &mut File) -> Training {
    let lens = TRAINED_SHAPES.map(elements);
    let initial: Vec<Vec<f32>> = lens.iter().enumerate().map(|(i, len)| uniforms(50 + i as u32, *len)).collect();
    let gradients: Vec<Vec<Vec<f32>>> = (0..STEPS)
        .map(|step| {
            let size = 0.1 * 0.03f32.powf(step as f32 / STEPS as f32);
            let gradient = |i: usize| uniforms((100 + 10 * step + i) as u32, lens[i]);
            (0..lens.len()).map(|i| gradient(i).into_iter().map(|x| x * size).collect()).collect()
        })
        .collect();
    for (i, shape) in TRAINED_SHAPES.iter().enumerate() {
        file.add_f32(format!("initial.{i}"), shape, &initial[i]);
        let all: Vec<f32> = gradients.iter().flat_map(|step| step[i].iter().copied()).collect();
        file.add_f32(format!("step.{i}"), &[&[STEPS], *shape].concat(), &all);
    }
    file.metadata.insert("steps".to_owned(), STEPS.to_string());
    Training { initial, gradients }
}

impl Training {
    /// Calls `update(step, signal, tensor, gradient)` for each tensor of each step, with the clip coefficient folded in.
    fn run(&self, mut update: impl FnMut(u64, StepSignal, usize, &[f32])) {
        let lens: Vec<usize> = self.initial.iter().map(Vec::len).collect();
        let mut slots = NormSlots::new(&lens).unwrap();
        let mut clipped_steps = 0;
        for (step, gradients) in self.gradients.iter().enumerate() {
            let slices: Vec<Slice<'_>> = gradients.iter().map(|gradient| Slice::F32(gradient)).collect();
            let norm = grad_norm(&slices, NormType::L2, &mut slots).unwrap();
            let signal = StepSignal { clip_coef: clip_coef(norm.total_norm, MAX_NORM), ..StepSignal::default() };
            clipped_steps += usize::from(signal.clip_coef < 1.0);
            for (tensor, gradient) in gradients.iter().enumerate() {
                update(step as u64 + 1, signal, tensor, gradient);
            }
        }
        assert!((10..STEPS - 10).contains(&clipped_steps), "both kinds of steps: {clipped_steps} clipped");
    }
}

fn add_adamw(file: &mut File, training: &Training) {
    let options = AdamWOptions { lr: 1e-2, weight_decay: 0.1, ..AdamWOptions::default() };
    file.metadata.insert("adamw".to_owned(), serde_json::to_string(&options).unwrap());
    let mut weights = training.initial.clone();
    let mut exp_avg: Vec<Vec<f32>> = weights.iter().map(|w| vec![0.0; w.len()]).collect();
    let mut exp_avg_sq = exp_avg.clone();
    training.run(|step, signal, i, gradient| {
        let master = Weights::Master { master: &mut weights[i], model: None };
        adamw_step(&options, step, signal, master, Slice::F32(gradient), &mut exp_avg[i], &mut exp_avg_sq[i]).unwrap();
    });
    for (i, shape) in TRAINED_SHAPES.iter().enumerate() {
        file.add_f32(format!("adamw.weights.{i}"), shape, &weights[i]);
        file.add_f32(format!("adamw.exp_avg.{i}"), shape, &exp_avg[i]);
        file.add_f32(format!("adamw.exp_avg_sq.{i}"), shape, &exp_avg_sq[i]);
    }
}

fn add_sgd(file: &mut File, training: &Training, name: &str, nesterov: bool) {
    let options = SgdOptions { lr: 1e-2, momentum: 0.9, nesterov, weight_decay: 0.1 };
    file.metadata.insert(name.to_owned(), serde_json::to_string(&options).unwrap());
    let mut weights = training.initial.clone();
    let mut velocity: Vec<Vec<f32>> = weights.iter().map(|w| vec![0.0; w.len()]).collect();
    training.run(|_, signal, i, gradient| {
        let master = Weights::Master { master: &mut weights[i], model: None };
        sgd_step(&options, signal, master, Slice::F32(gradient), &mut velocity[i]).unwrap();
    });
    for (i, shape) in TRAINED_SHAPES.iter().enumerate() {
        file.add_f32(format!("{name}.weights.{i}"), shape, &weights[i]);
        file.add_f32(format!("{name}.velocity.{i}"), shape, &velocity[i]);
    }
}

#[test]
fn clipping_and_optimizers_agree_with_pytorch() {
    let found = Command::new("python3").args(["-c", "import torch"]).output();
    let reason = match &found {
        Ok(output) if output.status.success() => None,
        Ok(output) => Some(String::from_utf8_lossy(&output.stderr).lines().last().unwrap_or("?").to_owned()),
        Err(error) => Some(format!("python3: {error}")),
    };
    if let Some(reason) = reason {
        // Written past the capture of test output, so that a skipped comparison is seen.
        let _ = writeln!(std::io::stderr(), "skipped the comparison with PyTorch: {reason}");
        return;
    }
    let mut file = File::default();
    add_clipping(&mut file);
    let training = add_training(&mut file);
    add_adamw(&mut file, &training);
    add_sgd(&mut file, &training, "sgd", false);
    add_sgd(&mut file, &training, "nesterov", true);

    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ops.safetensors");
    file.write(&path);
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/pytorch/ops.py");
    let output = Command::new("python3").arg(script).arg(&path).output().unwrap();
    println!("{}", String::from_utf8_lossy(&output.stdout));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
