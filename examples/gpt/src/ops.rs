//! The operations of the model that candle would put together from many passes over memory, as one pass each.
//!
//! Each is a candle custom operation with a backward pass: candle stays the autograd. All are f32, on contiguous tensors
//! in host memory, on one thread.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, CustomOp2, Error, Layout, Result, Shape, Storage, Tensor};

use crate::kernels::{self, AttentionShape};

/// Runs `f` on the elements of a contiguous f32 tensor in host memory.
pub fn with_elements<R>(tensor: &Tensor, f: impl FnOnce(&[f32]) -> R) -> Result<R> {
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cpu(storage) => Ok(f(operand(storage, layout, "with_elements")?)),
        _ => Err(Error::Msg("the tensor is not in host memory".to_owned())),
    }
}

fn operand<'a>(storage: &'a CpuStorage, layout: &Layout, op: &'static str) -> Result<&'a [f32]> {
    let Some((start, end)) = layout.contiguous_offsets() else {
        return Err(Error::RequiresContiguous { op });
    };
    Ok(&storage.as_slice::<f32>()?[start..end])
}

/// `x / rms(x) * weight`. `x`: `[rows, width]`, `weight`: `[width]`.
pub fn rms_norm(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    x.apply_op2(weight, RmsNorm)
}

struct RmsNorm;

impl CustomOp2 for RmsNorm {
    fn name(&self) -> &'static str {
        "rms-norm"
    }

    fn cpu_fwd(&self, s1: &CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<(CpuStorage, Shape)> {
        let y = kernels::rms_norm(operand(s1, l1, self.name())?, operand(s2, l2, self.name())?);
        Ok((CpuStorage::F32(y), l1.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, weight: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let dy = dy.contiguous()?;
        let (dx, dweight) = with_elements(x, |x| {
            with_elements(weight, |weight| with_elements(&dy, |dy| kernels::rms_norm_backward(x, weight, dy)))
        })???;
        Ok((
            Some(Tensor::from_vec(dx, x.shape(), x.device())?),
            Some(Tensor::from_vec(dweight, weight.shape(), x.device())?),
        ))
    }
}

/// `max(x, 0)^2` (Primer, So et al. 2021): as good as GELU in a small transformer, and one multiplication.
pub fn relu_squared(x: &Tensor) -> Result<Tensor> {
    x.apply_op1(ReluSquared)
}

struct ReluSquared;

impl CustomOp1 for ReluSquared {
    fn name(&self) -> &'static str {
        "relu-squared"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(kernels::relu_squared(operand(storage, layout, self.name())?)), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let dy = dy.contiguous()?;
        let dx = with_elements(x, |x| with_elements(&dy, |dy| kernels::relu_squared_backward(x, dy)))??;
        Ok(Some(Tensor::from_vec(dx, x.shape(), x.device())?))
    }
}

/// Causal self-attention over `heads` heads. `qkv`: `[batch * context, 3 * width]`, query, key and value side by side;
/// result `[batch * context, width]`.
pub fn attention(qkv: &Tensor, context: usize, heads: usize) -> Result<Tensor> {
    let (rows, columns) = qkv.dims2()?;
    let width = columns / 3;
    if context == 0 || heads == 0 || !rows.is_multiple_of(context) || width * 3 != columns {
        return Err(Error::Msg(format!("attention: {:?} does not hold sequences of {context} positions", qkv.dims())));
    }
    if !width.is_multiple_of(heads * kernels::LANES) {
        return Err(Error::Msg(format!(
            "attention: width {width} over {heads} heads is not a multiple of {} per head",
            kernels::LANES
        )));
    }
    qkv.apply_op1(Attention(AttentionShape { context, width, heads }))
}

struct Attention(AttentionShape);

impl CustomOp1 for Attention {
    fn name(&self) -> &'static str {
        "causal-attention"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let out = kernels::attention(self.0, operand(storage, layout, self.name())?);
        let rows = out.len() / self.0.width;
        Ok((CpuStorage::F32(out), (rows, self.0.width).into()))
    }

    fn bwd(&self, qkv: &Tensor, _out: &Tensor, dout: &Tensor) -> Result<Option<Tensor>> {
        let dout = dout.contiguous()?;
        let dqkv =
            with_elements(qkv, |qkv| with_elements(&dout, |dout| kernels::attention_backward(self.0, qkv, dout)))??;
        Ok(Some(Tensor::from_vec(dqkv, qkv.shape(), qkv.device())?))
    }
}

/// Mean cross entropy in nats of `logits`: `[rows, classes]` against `targets`: `[rows]`. Result: a scalar.
pub fn cross_entropy(logits: &Tensor, targets: &Arc<[u8]>) -> Result<Tensor> {
    let (rows, classes) = logits.dims2()?;
    if rows == 0 || rows != targets.len() {
        return Err(Error::Msg(format!("cross entropy: {rows} rows but {} targets", targets.len())));
    }
    if let Some(target) = targets.iter().find(|target| usize::from(**target) >= classes) {
        return Err(Error::Msg(format!("cross entropy: target {target} of {classes} classes")));
    }
    logits.apply_op1(CrossEntropy(Arc::clone(targets)))
}

struct CrossEntropy(Arc<[u8]>);

impl CustomOp1 for CrossEntropy {
    fn name(&self) -> &'static str {
        "cross-entropy"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let loss = kernels::cross_entropy(operand(storage, layout, self.name())?, &self.0);
        Ok((CpuStorage::F32(vec![loss]), ().into()))
    }

    fn bwd(&self, logits: &Tensor, _loss: &Tensor, dloss: &Tensor) -> Result<Option<Tensor>> {
        let dloss = dloss.to_scalar::<f32>()?;
        let dlogits = with_elements(logits, |logits| kernels::cross_entropy_backward(logits, &self.0, dloss))?;
        Ok(Some(Tensor::from_vec(dlogits, logits.shape(), logits.device())?))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{D, DType, Device, Var};

    use super::*;

    fn random(rng: &mut fastrand::Rng, shape: impl Into<Shape>) -> Var {
        let shape = shape.into();
        let values: Vec<f32> = (0..shape.elem_count()).map(|_| rng.f32() * 2.0 - 1.0).collect();
        Var::from_tensor(&Tensor::from_vec(values, shape, &Device::Cpu).unwrap()).unwrap()
    }

    /// Compares value and gradients of the fused operation with those of the same thing in candle's own operations.
    fn compare(vars: &[&Var], fused: Tensor, composed: Tensor) {
        let close = |what: &str, a: &Tensor, b: &Tensor| {
            assert_eq!(a.dims(), b.dims(), "{what}");
            let difference = (a - b).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap();
            let difference = difference.to_scalar::<f32>().unwrap();
            assert!(difference <= 2e-5, "{what}: differs by {difference}");
        };
        close("value", &fused, &composed);
        // A weight per element, so that no gradient hides in a sum.
        let weights = random(&mut fastrand::Rng::with_seed(9), fused.shape().clone());
        let loss = |out: &Tensor| (out * weights.as_tensor()).unwrap().sum_all().unwrap().backward().unwrap();
        let (ours, theirs) = (loss(&fused), loss(&composed));
        for (index, var) in vars.iter().enumerate() {
            close(&format!("gradient {index}"), ours.get(var).unwrap(), theirs.get(var).unwrap());
        }
    }

    #[test]
    fn rms_norm_equals_candle() {
        let mut rng = fastrand::Rng::with_seed(1);
        for (rows, width) in [(1, 16), (5, 48), (3, 37)] {
            let (x, weight) = (random(&mut rng, (rows, width)), random(&mut rng, width));
            let mean_square = x.sqr().unwrap().mean_keepdim(D::Minus1).unwrap();
            let rms = (mean_square + 1e-5).unwrap().sqrt().unwrap();
            let composed = x.broadcast_div(&rms).unwrap().broadcast_mul(&weight).unwrap();
            compare(&[&x, &weight], rms_norm(&x, &weight).unwrap(), composed);
        }
    }

    #[test]
    fn relu_squared_equals_candle() {
        let x = random(&mut fastrand::Rng::with_seed(2), (7, 33));
        compare(&[&x], relu_squared(&x).unwrap(), x.relu().unwrap().sqr().unwrap());
    }

    #[test]
    fn attention_equals_candle() {
        let mut rng = fastrand::Rng::with_seed(3);
        for (batch, context, heads, head_width) in [(1, 1, 1, 16), (2, 5, 2, 16), (2, 70, 3, 32), (1, 130, 1, 48)] {
            let width = heads * head_width;
            let qkv = random(&mut rng, (batch * context, 3 * width));
            let part = |index: usize| {
                let part = qkv.reshape((batch, context, 3, heads, head_width)).unwrap();
                part.narrow(2, index, 1).unwrap().squeeze(2).unwrap().transpose(1, 2).unwrap().contiguous().unwrap()
            };
            let scores = part(0).matmul(&part(1).t().unwrap()).unwrap();
            let scores = (scores / (head_width as f64).sqrt()).unwrap();
            let mask: Vec<f32> = (0..context * context)
                .map(|at| if at % context > at / context { f32::NEG_INFINITY } else { 0.0 })
                .collect();
            let mask = Tensor::from_vec(mask, (context, context), &Device::Cpu).unwrap();
            let scores = scores.broadcast_add(&mask).unwrap();
            let exp = scores.broadcast_sub(&scores.max_keepdim(D::Minus1).unwrap().detach()).unwrap().exp().unwrap();
            let probabilities = exp.broadcast_div(&exp.sum_keepdim(D::Minus1).unwrap()).unwrap();
            let out = probabilities.matmul(&part(2)).unwrap().transpose(1, 2).unwrap().contiguous().unwrap();
            let composed = out.reshape((batch * context, width)).unwrap();
            compare(&[&qkv], attention(&qkv, context, heads).unwrap(), composed);
        }
    }

    #[test]
    fn cross_entropy_equals_candle() {
        let logits = random(&mut fastrand::Rng::with_seed(4), (6, 256));
        let logits = Var::from_tensor(&(logits.as_tensor() * 20.0).unwrap()).unwrap();
        let targets: Arc<[u8]> = vec![0, 255, 17, 3, 3, 128].into();
        let indices: Vec<u32> = targets.iter().map(|target| u32::from(*target)).collect();
        let indices = Tensor::from_vec(indices, (6, 1), &Device::Cpu).unwrap();
        let exp_sum = logits.exp().unwrap().sum_keepdim(D::Minus1).unwrap().log().unwrap();
        let log_probabilities = logits.broadcast_sub(&exp_sum).unwrap();
        let composed = log_probabilities.gather(&indices, 1).unwrap().mean_all().unwrap().neg().unwrap();
        compare(&[&logits], cross_entropy(&logits, &targets).unwrap(), composed);
    }

    #[test]
    fn operands_that_do_not_fit_are_refused() {
        let x = Tensor::zeros((4, 48), DType::F32, &Device::Cpu).unwrap();
        assert!(attention(&x, 3, 1).unwrap_err().to_string().contains("3 positions"));
        assert!(attention(&x, 4, 2).unwrap_err().to_string().contains("multiple of 16"));
        assert!(cross_entropy(&x, &vec![1_u8; 3].into()).unwrap_err().to_string().contains("3 targets"));
        assert!(cross_entropy(&x, &vec![48_u8; 4].into()).unwrap_err().to_string().contains("target 48"));
        assert!(relu_squared(&x.t().unwrap()).is_err(), "not contiguous");
    }
}
