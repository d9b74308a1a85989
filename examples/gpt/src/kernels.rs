//! The loops of [`crate::ops`], on slices.
//!
//! They are written so that the compiler can vectorise them: sums are kept in [`LANES`] independent lanes, inner loops
//! have fixed lengths. [`pulp::Arch::dispatch`] compiles each for the vector units it knows and picks one at run time. All
//! add in a fixed order: the same input gives the same bits on one kind of machine.

use pulp::{Arch, Simd, WithSimd};

/// Makes a function whose body is compiled once for each kind of vector unit and chosen at run time. (A closure given to
/// `pulp` would do, but for the compiler's freedom not to inline it, which leaves it without vectors.)
macro_rules! vectorized {
    ($(#[$attribute:meta])* pub fn $name:ident<'a>($($argument:ident: $type:ty),*) -> $result:ty $body:block) => {
        $(#[$attribute])*
        pub fn $name<'a>($($argument: $type),*) -> $result {
            struct Call<'a> {
                $($argument: $type),*
            }
            impl<'a> WithSimd for Call<'a> {
                type Output = $result;
                #[inline(always)]
                fn with_simd<S: Simd>(self, _: S) -> $result {
                    let Call { $($argument),* } = self;
                    $body
                }
            }
            Arch::new().dispatch(Call { $($argument),* })
        }
    };
}

/// Independent sums of the inner loops: one AVX-512 register, two of AVX2.
pub const LANES: usize = 16;
/// Columns of the attention scores computed together, so that several sums are in flight.
const COLUMNS: usize = 4 * LANES;
/// Added to the mean square, so that a row of zeros has a norm.
const RMS_EPSILON: f32 = 1e-5;

#[inline(always)]
fn dot(left: &[f32], right: &[f32]) -> f32 {
    let mut sums = [0.0_f32; LANES];
    let (left_blocks, left_rest) = left.as_chunks::<LANES>();
    let (right_blocks, right_rest) = right.as_chunks::<LANES>();
    for (a, b) in left_blocks.iter().zip(right_blocks) {
        for lane in 0..LANES {
            sums[lane] = a[lane].mul_add(b[lane], sums[lane]);
        }
    }
    let rest: f32 = left_rest.iter().zip(right_rest).map(|(a, b)| a * b).sum();
    sums.iter().sum::<f32>() + rest
}

#[inline(always)]
fn sum(values: &[f32]) -> f32 {
    let mut sums = [0.0_f32; LANES];
    let (blocks, rest) = values.as_chunks::<LANES>();
    for block in blocks {
        for lane in 0..LANES {
            sums[lane] += block[lane];
        }
    }
    sums.iter().sum::<f32>() + rest.iter().sum::<f32>()
}

#[inline(always)]
fn max(values: &[f32]) -> f32 {
    let mut maxima = [f32::NEG_INFINITY; LANES];
    let (blocks, rest) = values.as_chunks::<LANES>();
    for block in blocks {
        for lane in 0..LANES {
            maxima[lane] = if block[lane] > maxima[lane] { block[lane] } else { maxima[lane] };
        }
    }
    maxima.iter().chain(rest).copied().fold(f32::NEG_INFINITY, f32::max)
}

/// `e^x` for `x <= 0` within a few ulp, in operations that vectorise: 2^round(x log2 e) times a polynomial of the rest
/// (coefficients of Cephes' `expf`). Below -87, near the end of f32's normal range, it stays at e^-87.
#[inline(always)]
fn exp_nonpositive(x: f32) -> f32 {
    // 1.5 * 2^23: added to a small number it leaves the nearest integer in the lowest bits. A cast to i32 would saturate,
    // which no vector unit does.
    const ROUND: f32 = 12_582_912.0;
    let x = if x < -87.0 { -87.0 } else { x };
    let shifted = x.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = n.mul_add(2.121_944_4e-4, n.mul_add(-0.693_359_4, x));
    let p = 1.987_569_1e-4_f32
        .mul_add(r, 1.398_199_9e-3)
        .mul_add(r, 8.333_452e-3)
        .mul_add(r, 4.166_579_6e-2)
        .mul_add(r, 1.666_666_5e-1)
        .mul_add(r, 0.5);
    // The shift drops all but the integer: what is left is the exponent of 2^n.
    p.mul_add(r * r, r + 1.0) * f32::from_bits(shifted.to_bits().wrapping_add(127) << 23)
}

/// Turns scores into probabilities.
#[inline(always)]
fn softmax_in_place(row: &mut [f32]) {
    let max = max(row);
    for value in row.iter_mut() {
        *value = exp_nonpositive(*value - max);
    }
    let scale = 1.0 / sum(row);
    for value in row.iter_mut() {
        *value *= scale;
    }
}

// ---- RMS norm --------------------------------------------------------------------------------------------------------

#[inline(always)]
fn inverse_rms(row: &[f32]) -> f32 {
    1.0 / (dot(row, row) / row.len() as f32 + RMS_EPSILON).sqrt()
}

vectorized! {
    /// `x / rms(x) * weight` for each row of `x`: `[rows, width]`; `weight`: `[width]`.
    pub fn rms_norm<'a>(x: &'a [f32], weight: &'a [f32]) -> Vec<f32> {
        let mut y = vec![0.0; x.len()];
        for (x, y) in x.chunks_exact(weight.len()).zip(y.chunks_exact_mut(weight.len())) {
            let inverse_rms = inverse_rms(x);
            for ((y, x), weight) in y.iter_mut().zip(x).zip(weight) {
                *y = x * inverse_rms * weight;
            }
        }
        y
    }
}

vectorized! {
    /// Gradients of [`rms_norm`] with respect to `x` and `weight`.
    pub fn rms_norm_backward<'a>(x: &'a [f32], weight: &'a [f32], dy: &'a [f32]) -> (Vec<f32>, Vec<f32>) {
        let width = weight.len();
        let (mut dx, mut dweight) = (vec![0.0; x.len()], vec![0.0; width]);
        let rows = x.chunks_exact(width).zip(dy.chunks_exact(width)).zip(dx.chunks_exact_mut(width));
        for ((x, dy), dx) in rows {
            let inverse_rms = inverse_rms(x);
            for (((dx, dweight), (x, dy)), weight) in
                dx.iter_mut().zip(dweight.iter_mut()).zip(x.iter().zip(dy)).zip(weight)
            {
                *dweight += dy * x * inverse_rms;
                *dx = dy * weight;
            }
            let common = dot(dx, x) * inverse_rms * inverse_rms / width as f32;
            for (dx, x) in dx.iter_mut().zip(x) {
                *dx = inverse_rms * (*dx - x * common);
            }
        }
        (dx, dweight)
    }
}

// ---- activation ------------------------------------------------------------------------------------------------------

vectorized! {
    /// `max(x, 0)^2` of each element.
    pub fn relu_squared<'a>(x: &'a [f32]) -> Vec<f32> {
        let mut y = vec![0.0; x.len()];
        for (y, x) in y.iter_mut().zip(x) {
            *y = if *x > 0.0 { x * x } else { 0.0 };
        }
        y
    }
}

vectorized! {
    /// Gradient of [`relu_squared`].
    pub fn relu_squared_backward<'a>(x: &'a [f32], dy: &'a [f32]) -> Vec<f32> {
        let mut dx = vec![0.0; x.len()];
        for ((dx, x), dy) in dx.iter_mut().zip(x).zip(dy) {
            *dx = if *x > 0.0 { 2.0 * x * dy } else { 0.0 };
        }
        dx
    }
}

// ---- causal attention ------------------------------------------------------------------------------------------------

/// Sizes of causal self-attention. The operand holds query, key and value of each position side by side:
/// `[batch * context, 3 * width]`, `width = heads * head_width`, `head_width` a multiple of [`LANES`].
#[derive(Debug, Clone, Copy)]
pub struct AttentionShape {
    /// Positions of one sequence.
    pub context: usize,
    /// Elements of one position's result.
    pub width: usize,
    /// Heads that share `width`.
    pub heads: usize,
}

impl AttentionShape {
    fn head_width(self) -> usize {
        self.width / self.heads
    }

    fn scale(self) -> f32 {
        1.0 / (self.head_width() as f32).sqrt()
    }

    /// `context` rounded up, so that blocks of columns need no rest.
    fn columns(self) -> usize {
        self.context.next_multiple_of(COLUMNS)
    }
}

/// Copies rows `[context][head_width]` at stride `3 * width` into `[head_width][columns]`; columns past `context` keep 0.
#[inline(always)]
fn transpose(shape: AttentionShape, rows: &[f32], out: &mut [f32]) {
    let columns = shape.columns();
    for position in 0..shape.context {
        let row = &rows[position * 3 * shape.width..][..shape.head_width()];
        for (element, value) in row.iter().enumerate() {
            out[element * columns + position] = *value;
        }
    }
}

/// `N` elements from `at` on, as an array: one bounds check instead of one for each lane.
#[inline(always)]
fn array<const N: usize>(values: &[f32], at: usize) -> &[f32; N] {
    values[at..].first_chunk().expect("operands hold whole blocks")
}

/// `sums += factor * row`.
#[inline(always)]
fn accumulate<const N: usize>(sums: &mut [f32; N], factor: f32, row: &[f32; N]) {
    for lane in 0..N {
        sums[lane] = factor.mul_add(row[lane], sums[lane]);
    }
}

/// `out[j] = sum_d row[d] * transposed[d][j]` for the first `len` columns (and up to the end of their block).
#[inline(always)]
fn row_by_columns(row: &[f32], transposed: &[f32], columns: usize, len: usize, out: &mut [f32]) {
    for start in (0..len).step_by(COLUMNS) {
        let mut sums = [0.0_f32; COLUMNS];
        for (element, factor) in row.iter().enumerate() {
            accumulate(&mut sums, *factor, array(transposed, element * columns + start));
        }
        out[start..start + COLUMNS].copy_from_slice(&sums);
    }
}

/// `out = sum_j weights[j] * rows[j]`, rows at a stride of `3 * width`. Four sums are in flight at a time.
#[inline(always)]
fn weighted_rows(shape: AttentionShape, weights: &[f32], rows: &[f32], out: &mut [f32]) {
    let stride = 3 * shape.width;
    let (quads, rest) = weights.as_chunks::<4>();
    for (block, out) in out.as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
        let rows = &rows[block * LANES..];
        let (mut a, mut b, mut c, mut d) = ([0.0_f32; LANES], [0.0; LANES], [0.0; LANES], [0.0; LANES]);
        for (quad, weights) in quads.iter().enumerate() {
            let first = 4 * quad * stride;
            accumulate(&mut a, weights[0], array(rows, first));
            accumulate(&mut b, weights[1], array(rows, first + stride));
            accumulate(&mut c, weights[2], array(rows, first + 2 * stride));
            accumulate(&mut d, weights[3], array(rows, first + 3 * stride));
        }
        for (at, weight) in rest.iter().enumerate() {
            accumulate(&mut a, *weight, array(rows, (4 * quads.len() + at) * stride));
        }
        for lane in 0..LANES {
            out[lane] = (a[lane] + b[lane]) + (c[lane] + d[lane]);
        }
    }
}

#[inline(always)]
fn add_scaled(out: &mut [f32], factor: f32, row: &[f32]) {
    for (out, row) in out.as_chunks_mut::<LANES>().0.iter_mut().zip(row.as_chunks::<LANES>().0) {
        // In a copy: the compiler cannot tell that `out` and `row` are apart, and would go lane by lane.
        let mut sums = *out;
        accumulate(&mut sums, factor, row);
        *out = sums;
    }
}

vectorized! {
    /// Softmax(Q K^T / sqrt(head_width)) V with no position seeing a later one: `[batch * context, width]`.
    pub fn attention<'a>(shape: AttentionShape, qkv: &'a [f32]) -> Vec<f32> {
        let AttentionShape { context, width, heads } = shape;
        let (head_width, columns) = (shape.head_width(), shape.columns());
        let mut keys = vec![0.0_f32; head_width * columns];
        let mut scores = vec![0.0_f32; columns];
        let mut query = vec![0.0_f32; head_width];
        let mut out = vec![0.0; qkv.len() / 3];
        for (qkv, out) in qkv.chunks_exact(context * 3 * width).zip(out.chunks_exact_mut(context * width)) {
            for head in 0..heads {
                let first = head * head_width;
                transpose(shape, &qkv[width + first..], &mut keys);
                for position in 0..context {
                    let len = position + 1;
                    for (scaled, value) in query.iter_mut().zip(&qkv[position * 3 * width + first..]) {
                        *scaled = value * shape.scale();
                    }
                    row_by_columns(&query, &keys, columns, len, &mut scores);
                    softmax_in_place(&mut scores[..len]);
                    let out = &mut out[position * width + first..][..head_width];
                    weighted_rows(shape, &scores[..len], &qkv[2 * width + first..], out);
                }
            }
        }
        out
    }
}

vectorized! {
    /// Gradient of [`attention`] with respect to `qkv`. The probabilities are computed again: that is cheaper than writing
    /// `context^2` of them per head in the forward pass and reading them back.
    pub fn attention_backward<'a>(shape: AttentionShape, qkv: &'a [f32], dout: &'a [f32]) -> Vec<f32> {
        let AttentionShape { context, width, heads } = shape;
        let (head_width, columns) = (shape.head_width(), shape.columns());
        let mut keys = vec![0.0_f32; head_width * columns];
        let mut values = vec![0.0_f32; head_width * columns];
        let mut probabilities = vec![0.0_f32; columns];
        let mut gradients = vec![0.0_f32; columns];
        let mut query = vec![0.0_f32; head_width];
        let mut dqkv = vec![0.0; qkv.len()];
        let sequences = qkv
            .chunks_exact(context * 3 * width)
            .zip(dout.chunks_exact(context * width))
            .zip(dqkv.chunks_exact_mut(context * 3 * width));
        for ((qkv, dout), dqkv) in sequences {
            for head in 0..heads {
                let first = head * head_width;
                transpose(shape, &qkv[width + first..], &mut keys);
                transpose(shape, &qkv[2 * width + first..], &mut values);
                for position in 0..context {
                    let len = position + 1;
                    let row = position * 3 * width;
                    for (scaled, value) in query.iter_mut().zip(&qkv[row + first..]) {
                        *scaled = value * shape.scale();
                    }
                    row_by_columns(&query, &keys, columns, len, &mut probabilities);
                    softmax_in_place(&mut probabilities[..len]);

                    let dout = &dout[position * width + first..][..head_width];
                    row_by_columns(dout, &values, columns, len, &mut gradients);
                    let common = dot(&gradients[..len], &probabilities[..len]);
                    for (gradient, probability) in gradients[..len].iter_mut().zip(&probabilities) {
                        *gradient = probability * (*gradient - common);
                    }
                    for earlier in 0..len {
                        let row = earlier * 3 * width + first;
                        add_scaled(&mut dqkv[row + width..][..head_width], gradients[earlier], &query);
                        add_scaled(&mut dqkv[row + 2 * width..][..head_width], probabilities[earlier], dout);
                    }
                    let dquery = &mut dqkv[row + first..][..head_width];
                    weighted_rows(shape, &gradients[..len], &qkv[width + first..], dquery);
                    for value in dquery {
                        *value *= shape.scale();
                    }
                }
            }
        }
        dqkv
    }
}

// ---- cross entropy ---------------------------------------------------------------------------------------------------

vectorized! {
    /// Mean over the rows of `-log softmax(logits)[target]`, in nats. `logits`: `[rows, classes]`; targets below `classes`.
    pub fn cross_entropy<'a>(logits: &'a [f32], targets: &'a [u8]) -> f32 {
        let classes = logits.len() / targets.len();
        let mut scratch = vec![0.0_f32; classes];
        let mut total = 0.0_f64;
        for (row, target) in logits.chunks_exact(classes).zip(targets) {
            let max = max(row);
            for (value, logit) in scratch.iter_mut().zip(row) {
                *value = exp_nonpositive(*logit - max);
            }
            total += f64::from(sum(&scratch).ln() - (row[usize::from(*target)] - max));
        }
        (total / targets.len() as f64) as f32
    }
}

vectorized! {
    /// Gradient of [`cross_entropy`] times `dloss`.
    pub fn cross_entropy_backward<'a>(logits: &'a [f32], targets: &'a [u8], dloss: f32) -> Vec<f32> {
        let scale = dloss / targets.len() as f32;
        let mut dlogits = logits.to_vec();
        for (row, target) in dlogits.chunks_exact_mut(logits.len() / targets.len()).zip(targets) {
            softmax_in_place(row);
            row[usize::from(*target)] -= 1.0;
            for value in row {
                *value *= scale;
            }
        }
        dlogits
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exponential_is_exact_to_a_few_ulp() {
        let mut worst = 0.0_f64;
        for step in 0..=87_000 {
            let x = -(step as f32) / 1000.0;
            let expected = f64::from(x).exp();
            worst = worst.max(((f64::from(exp_nonpositive(x)) - expected) / expected).abs());
        }
        assert!(worst < 3.0 * f64::from(f32::EPSILON), "{worst}");
        assert_eq!(exp_nonpositive(0.0), 1.0);
        assert_eq!(exp_nonpositive(-1e30), exp_nonpositive(-87.0));
        assert!(exp_nonpositive(f32::NAN).is_nan());
    }
}
