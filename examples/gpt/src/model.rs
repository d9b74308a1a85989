//! A small byte-level GPT in candle, cut at its layer borders.
//!
//! ```text
//! segment 0      bytes ─> embedding + position ─> x
//! segment 1..L   x + attention(norm(x)), then x + mlp(norm(x)) ─> x
//! segment L+1    norm, head ─> logits ─> loss
//! ```
//! candle's `backward` is one call that returns every gradient at the end. So that gradients become ready one after another,
//! the forward pass detaches what goes from one segment to the next (a [`Tape`] keeps both ends), and the backward pass
//! goes segment by segment from the loss: the gradient of a segment's input is the seed of the segment before it. The
//! gradients are those of one graph, bit for bit.

use std::sync::Arc;

use candle_core::{Device, Result, Tensor, Var, backprop::GradStore};

use crate::ops;

/// Every byte is a token: nothing has to be learnt or shipped to read a text.
pub const VOCABULARY: usize = 256;

/// Sizes of the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ModelConfig {
    /// Transformer blocks.
    pub layers: usize,
    /// Elements of one position.
    pub width: usize,
    /// Attention heads.
    pub heads: usize,
    /// Positions of one sequence.
    pub context: usize,
}

/// How a parameter begins.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Initial {
    /// All ones: the weights of a norm.
    One,
    /// All zeroes: what writes into the residual stream, so that every block begins as the identity.
    Zero,
    /// Normally distributed with this deviation.
    Normal(f64),
}

/// What there is to know of a parameter before it exists.
#[derive(Debug, Clone, PartialEq)]
pub struct ParameterSpec {
    /// Name in checkpoints.
    pub name: String,
    /// Dimensions, slowest first.
    pub shape: Vec<usize>,
    /// First values.
    pub initial: Initial,
    /// The segment that uses it.
    pub segment: usize,
}

impl ModelConfig {
    /// Every parameter, in the order of use.
    pub fn parameters(&self) -> Vec<ParameterSpec> {
        let (width, mut specs) = (self.width, Vec::new());
        let mut add = |segment: usize, name: String, shape: &[usize], initial: Initial| {
            specs.push(ParameterSpec { name, shape: shape.to_vec(), initial, segment });
        };
        let fan_in = |inputs: usize| Initial::Normal(1.0 / (inputs as f64).sqrt());
        add(0, "embedding.token".to_owned(), &[VOCABULARY, width], Initial::Normal(0.1));
        add(0, "embedding.position".to_owned(), &[self.context, width], Initial::Normal(0.02));
        for layer in 0..self.layers {
            let mut add = |name: &str, shape: &[usize], initial| {
                add(layer + 1, format!("layers.{layer}.{name}"), shape, initial);
            };
            add("attention.norm", &[width], Initial::One);
            add("attention.qkv", &[width, 3 * width], fan_in(width));
            add("attention.out", &[width, width], Initial::Zero);
            add("mlp.norm", &[width], Initial::One);
            add("mlp.up", &[width, 4 * width], fan_in(width));
            add("mlp.down", &[4 * width, width], Initial::Zero);
        }
        add(self.layers + 1, "head.norm".to_owned(), &[width], Initial::One);
        add(self.layers + 1, "head.out".to_owned(), &[width, VOCABULARY], Initial::Normal(0.02));
        specs
    }

    /// Elements of all parameters.
    pub fn parameter_elems(&self) -> usize {
        self.parameters().iter().map(|spec| spec.shape.iter().product::<usize>()).sum()
    }
}

/// Sequences of the same length, one after another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// What the model reads: `[sequences * length]` bytes.
    pub inputs: Vec<u8>,
    /// What comes after each of them.
    pub targets: Arc<[u8]>,
    /// Positions of one sequence.
    pub length: usize,
}

/// The weights as candle variables (f32), in the order of [`ModelConfig::parameters`].
pub struct Gpt {
    config: ModelConfig,
    weights: Vec<Var>,
    /// Index of the first weight of each segment, and the number of weights at the end.
    segments: Vec<usize>,
}

/// What a forward pass leaves for the backward pass.
pub struct Tape {
    /// Detached input of each segment but the first, which reads bytes.
    inputs: Vec<Var>,
    /// Output of each segment but the last, before it was detached.
    outputs: Vec<Tensor>,
    loss: Tensor,
}

impl Tape {
    /// Mean cross entropy of the batch in nats per byte.
    pub fn loss(&self) -> Result<f32> {
        self.loss.to_scalar()
    }
}

impl Gpt {
    /// A model with all weights zero, to be filled by [`Gpt::load`].
    pub fn new(config: ModelConfig) -> Result<Gpt> {
        let specs = config.parameters();
        let weights = specs
            .iter()
            .map(|spec| Var::zeros(spec.shape.as_slice(), candle_core::DType::F32, &Device::Cpu))
            .collect::<Result<Vec<_>>>()?;
        let segments = (0..=config.layers + 2).map(|segment| specs.partition_point(|spec| spec.segment < segment));
        Ok(Gpt { config, weights, segments: segments.collect() })
    }

    /// The sizes.
    pub fn config(&self) -> ModelConfig {
        self.config
    }

    /// Puts `elements` into weight `index`.
    pub fn load(&self, index: usize, elements: Vec<f32>) -> Result<()> {
        let weight = &self.weights[index];
        weight.set(&Tensor::from_vec(elements, weight.shape(), &Device::Cpu)?)
    }

    /// Number of segments.
    pub fn segments(&self) -> usize {
        self.config.layers + 2
    }

    /// One segment, from its input (none for the first) to its output.
    fn segment(&self, index: usize, input: Option<&Tensor>, inputs: &[u8], length: usize) -> Result<Tensor> {
        let weights = &self.weights[self.segments[index]..self.segments[index + 1]];
        match (input, weights) {
            (None, [token, position]) => {
                let ids: Vec<u32> = inputs.iter().map(|byte| u32::from(*byte)).collect();
                let sequences = inputs.len() / length;
                let tokens = token.index_select(&Tensor::from_vec(ids, inputs.len(), &Device::Cpu)?, 0)?;
                let tokens = tokens.reshape((sequences, length, self.config.width))?;
                // A narrow of everything would be a copy in candle's backward pass.
                let position = if length == self.config.context {
                    position.as_tensor().clone()
                } else {
                    position.narrow(0, 0, length)?
                };
                tokens.broadcast_add(&position)?.reshape((inputs.len(), self.config.width))
            }
            (Some(x), [attention_norm, qkv, out, mlp_norm, up, down]) => {
                let attended =
                    ops::attention(&ops::rms_norm(x, attention_norm)?.matmul(qkv)?, length, self.config.heads)?;
                let x = (x + attended.matmul(out)?)?;
                let hidden = ops::relu_squared(&ops::rms_norm(&x, mlp_norm)?.matmul(up)?)?;
                &x + hidden.matmul(down)?
            }
            (Some(x), [norm, out]) => ops::rms_norm(x, norm)?.matmul(out),
            _ => unreachable!("segment {index} has {} weights", weights.len()),
        }
    }

    /// Logits of every position in one graph: `[sequences * length, VOCABULARY]`. `length` may be below the context.
    pub fn logits(&self, inputs: &[u8], length: usize) -> Result<Tensor> {
        let mut x = self.segment(0, None, inputs, length)?;
        for index in 1..self.segments() {
            // Nobody goes back through this pass: detaching frees each segment's tensors as it ends.
            x = self.segment(index, Some(&x.detach()), inputs, length)?;
        }
        Ok(x)
    }

    /// Loss of a batch without a backward pass.
    pub fn evaluate(&self, batch: &Batch) -> Result<f32> {
        ops::cross_entropy(&self.logits(&batch.inputs, batch.length)?, &batch.targets)?.to_scalar()
    }

    /// The forward pass, detached at the borders.
    pub fn forward(&self, batch: &Batch) -> Result<Tape> {
        let mut inputs: Vec<Var> = Vec::with_capacity(self.segments());
        let mut outputs = Vec::with_capacity(self.segments());
        for index in 0..self.segments() {
            let input = inputs.last().map(Var::as_tensor);
            let output = self.segment(index, input, &batch.inputs, batch.length)?;
            if index + 1 == self.segments() {
                let loss = ops::cross_entropy(&output, &batch.targets)?;
                return Ok(Tape { inputs, outputs, loss });
            }
            inputs.push(Var::from_tensor(&output.detach())?);
            outputs.push(output);
        }
        unreachable!("the last segment returns")
    }

    /// The backward pass of `loss * loss_scale`, segment by segment. `ready(index, gradient)` is called for each weight as soon
    /// as its gradient is there, from the last weight to the first; `after(segment)` when a segment has given all its.
    ///
    /// # Errors
    /// Those of candle, and the first error of `ready`, which ends the pass.
    pub fn backward<E: From<candle_core::Error>>(
        &self,
        tape: Tape,
        loss_scale: f32,
        mut ready: impl FnMut(usize, &[f32]) -> std::result::Result<(), E>,
        mut after: impl FnMut(usize),
    ) -> std::result::Result<(), E> {
        let Tape { mut inputs, mut outputs, loss } = tape;
        // Times 1 would be one more node in the graph, and the same bits.
        let loss = if loss_scale == 1.0 { loss } else { loss.affine(f64::from(loss_scale), 0.0)? };
        let mut grads = loss.backward()?;
        drop(loss);
        for index in (0..self.segments()).rev() {
            for weight in (self.segments[index]..self.segments[index + 1]).rev() {
                let gradient = take(&mut grads, &self.weights[weight])?;
                ops::with_elements(&gradient, |elements| ready(weight, elements))??;
            }
            after(index);
            if let (Some(input), Some(output)) = (inputs.pop(), outputs.pop()) {
                // d(sum(output * seed)) / d(output) is the seed.
                let seed = take(&mut grads, &input)?;
                grads = (output * seed.detach())?.sum_all()?.backward()?;
            }
        }
        Ok(())
    }
}

fn take(grads: &mut GradStore, var: &Var) -> Result<Tensor> {
    let gradient = grads
        .remove(var)
        .ok_or_else(|| candle_core::Error::Msg(format!("a weight of shape {:?} has no gradient", var.dims())))?;
    gradient.contiguous()
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG: ModelConfig = ModelConfig { layers: 3, width: 32, heads: 2, context: 12 };

    fn model() -> Gpt {
        let model = Gpt::new(CONFIG).unwrap();
        let mut rng = fastrand::Rng::with_seed(5);
        for (index, weight) in model.weights.iter().enumerate() {
            let elements: Vec<f32> = (0..weight.elem_count()).map(|_| (rng.f32() - 0.5) * 0.6).collect();
            model.load(index, elements).unwrap();
        }
        model
    }

    fn batch(length: usize) -> Batch {
        let text: Vec<u8> = (0..2 * length + 1).map(|at| b"in the beginning was the word"[at * 7 % 29]).collect();
        Batch { inputs: text[..2 * length].to_vec(), targets: text[1..].into(), length }
    }

    /// One graph from the bytes to the loss, and candle's own backward.
    fn one_graph(model: &Gpt, batch: &Batch) -> (f32, Vec<Vec<f32>>) {
        let mut x = model.segment(0, None, &batch.inputs, batch.length).unwrap();
        for index in 1..model.segments() {
            x = model.segment(index, Some(&x), &batch.inputs, batch.length).unwrap();
        }
        let loss = ops::cross_entropy(&x, &batch.targets).unwrap();
        let grads = loss.backward().unwrap();
        let gradients = model
            .weights
            .iter()
            .map(|weight| grads.get(weight).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap());
        (loss.to_scalar().unwrap(), gradients.collect())
    }

    #[test]
    fn gradients_by_segments_are_those_of_one_graph_bit_for_bit() {
        let model = model();
        for length in [1, 7, CONFIG.context] {
            let batch = batch(length);
            let (loss, expected) = one_graph(&model, &batch);
            assert!(expected.iter().all(|gradient| gradient.iter().any(|value| *value != 0.0)));
            let tape = model.forward(&batch).unwrap();
            assert_eq!(tape.loss().unwrap().to_bits(), loss.to_bits());
            let mut order = Vec::new();
            let mut segments = Vec::new();
            model
                .backward::<candle_core::Error>(
                    tape,
                    1.0,
                    |index, gradient| {
                        let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
                        assert_eq!(bits(gradient), bits(&expected[index]), "weight {index}");
                        order.push(index);
                        Ok(())
                    },
                    |segment| segments.push(segment),
                )
                .unwrap();
            assert_eq!(order, (0..model.weights.len()).rev().collect::<Vec<_>>());
            assert_eq!(segments, [4, 3, 2, 1, 0]);
        }
    }

    #[test]
    fn a_power_of_two_scales_every_gradient_exactly() {
        let model = model();
        let batch = batch(CONFIG.context);
        let (_, expected) = one_graph(&model, &batch);
        let tape = model.forward(&batch).unwrap();
        model
            .backward::<candle_core::Error>(
                tape,
                1024.0,
                |index, gradient| {
                    let expected: Vec<f32> = expected[index].iter().map(|value| value * 1024.0).collect();
                    assert_eq!(gradient, expected);
                    Ok(())
                },
                |_| {},
            )
            .unwrap();
    }

    #[test]
    fn an_error_of_the_receiver_ends_the_pass() {
        let model = model();
        let tape = model.forward(&batch(3)).unwrap();
        let mut calls = 0;
        let result: std::result::Result<(), candle_core::Error> = model.backward(
            tape,
            1.0,
            |_, _| {
                calls += 1;
                if calls == 3 { Err(candle_core::Error::Msg("enough".to_owned())) } else { Ok(()) }
            },
            |_| {},
        );
        assert!(result.unwrap_err().to_string().contains("enough"));
        assert_eq!(calls, 3);
    }

    #[test]
    fn no_position_sees_a_later_one() {
        let model = model();
        let text = b"abcdefghijkl".to_vec();
        let mut changed = text.clone();
        changed[8] = b'!';
        let logits = |text: &[u8]| model.logits(text, 12).unwrap().to_vec2::<f32>().unwrap();
        let (a, b) = (logits(&text), logits(&changed));
        assert_eq!(a[..8], b[..8]);
        assert!((8..12).all(|position| a[position] != b[position]));
        // A prefix alone gives the same logits to rounding: the matrix products may be blocked differently.
        let prefix = model.logits(&text[..5], 5).unwrap().to_vec2::<f32>().unwrap();
        for (a, b) in a[..5].iter().flatten().zip(prefix.iter().flatten()) {
            assert!((a - b).abs() < 1e-4);
        }
    }

    #[test]
    fn parameter_count() {
        let (c, l, t) = (32, 3, 12);
        let expected = 256 * c + t * c + l * (12 * c * c + 2 * c) + c + 256 * c;
        assert_eq!(CONFIG.parameter_elems(), expected);
        assert_eq!(Gpt::new(CONFIG).unwrap().segments, [0, 2, 8, 14, 20, 22]);
    }
}
