//! Row by row: norms, rotary positions, nonlinearities, the optimizer. Each is one pass over memory.

use multiversion::multiversion;

use super::math::{dot, each, exp, sigmoid, sum, tanh};
use super::pack::{round, widen};
use crate::device::{Activation, AdamW, Heads, NormKind};

/// Mean (0 for RMS) and `1 / sqrt(variance + ε)`.
#[inline(always)]
fn moments(kind: NormKind, epsilon: f32, x: &[f32]) -> (f32, f32) {
    let n = x.len() as f32;
    let mean = match kind {
        NormKind::Layer => sum(x, |x| x) / n,
        NormKind::Rms | NormKind::RmsFromOne => 0.0,
    };
    let variance = sum(x, |x| (x - mean) * (x - mean)) / n;
    (mean, 1.0 / (variance + epsilon).sqrt())
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+fma", "x86_64+avx2+fma"))]
pub fn norm(kind: NormKind, epsilon: f32, out: &mut [f32], x: &[f32], gain: &[f32], bias: Option<&[f32]>) {
    let width = gain.len();
    for (out, x) in out.chunks_exact_mut(width).zip(x.chunks_exact(width)) {
        let (mean, rstd) = moments(kind, epsilon, x);
        for i in 0..width {
            out[i] = (x[i] - mean) * rstd * gain[i];
        }
        if let Some(bias) = bias {
            for i in 0..width {
                out[i] += bias[i];
            }
        }
    }
}

/// Adds into `dx`, `dgain` and `dbias` for the rows given.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+fma", "x86_64+avx2+fma"))]
pub fn norm_backward(
    kind: NormKind,
    epsilon: f32,
    dx: &mut [f32],
    dgain: &mut [f32],
    dbias: Option<&mut [f32]>,
    dout: &[f32],
    x: &[f32],
    gain: &[f32],
) {
    let width = gain.len();
    let (mut y, mut dy) = (vec![0.0; width], vec![0.0; width]);
    if let Some(dbias) = dbias {
        for dout in dout.chunks_exact(width) {
            for i in 0..width {
                dbias[i] += dout[i];
            }
        }
    }
    for ((dx, x), dout) in dx.chunks_exact_mut(width).zip(x.chunks_exact(width)).zip(dout.chunks_exact(width))
    {
        let (mean, rstd) = moments(kind, epsilon, x);
        for i in 0..width {
            y[i] = (x[i] - mean) * rstd;
            dy[i] = dout[i] * gain[i];
            dgain[i] += dout[i] * y[i];
        }
        let mean_dy = if kind == NormKind::Layer { sum(&dy, |x| x) / width as f32 } else { 0.0 };
        let mean_dy_y = dot(&dy, &y) / width as f32;
        for i in 0..width {
            dx[i] += rstd * (dy[i] - mean_dy - y[i] * mean_dy_y);
        }
    }
}

/// RMSNorm of the q and k heads of fused rows, in place.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+fma", "x86_64+avx2+fma"))]
pub fn head_norm(qkv: &mut [f32], gains: [&[f32]; 2], heads: Heads, epsilon: f32) {
    for row in qkv.chunks_exact_mut(heads.fused()) {
        for (head, x) in row.chunks_exact_mut(heads.width).take(heads.query + heads.key).enumerate() {
            let gain = gains[usize::from(head >= heads.query)];
            let (_, rstd) = moments(NormKind::Rms, epsilon, x);
            for (x, gain) in x.iter_mut().zip(gain) {
                *x *= rstd * gain;
            }
        }
    }
}

/// In place on `dqkv`; adds into the gains' gradients.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+fma", "x86_64+avx2+fma"))]
pub fn head_norm_backward(
    dqkv: &mut [f32],
    dgains: [&mut [f32]; 2],
    raw: &[f32],
    gains: [&[f32]; 2],
    heads: Heads,
    epsilon: f32,
) {
    let width = heads.width;
    let (mut y, mut dy) = (vec![0.0; width], vec![0.0; width]);
    let [dgain_q, dgain_k] = dgains;
    for (drow, row) in dqkv.chunks_exact_mut(heads.fused()).zip(raw.chunks_exact(heads.fused())) {
        let rows = drow.chunks_exact_mut(width).zip(row.chunks_exact(width)).take(heads.query + heads.key);
        for (head, (dx, x)) in rows.enumerate() {
            let (gain, dgain) =
                if head < heads.query { (gains[0], &mut *dgain_q) } else { (gains[1], &mut *dgain_k) };
            let (_, rstd) = moments(NormKind::Rms, epsilon, x);
            for i in 0..width {
                y[i] = x[i] * rstd;
                dy[i] = dx[i] * gain[i];
                dgain[i] += dx[i] * y[i];
            }
            let mean_dy_y = dot(&dy, &y) / width as f32;
            for i in 0..width {
                dx[i] = rstd * (dy[i] - y[i] * mean_dy_y);
            }
        }
    }
}

/// Rotation of q and k by angles in `cos`, `sin`; `direction` −1 turns back.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+fma", "x86_64+avx2+fma"))]
pub fn rotate(qkv: &mut [f32], cos: &[f32], sin: &[f32], heads: Heads, direction: f32) {
    let half = heads.width / 2;
    for ((row, cos), sin) in
        qkv.chunks_exact_mut(heads.fused()).zip(cos.chunks_exact(half)).zip(sin.chunks_exact(half))
    {
        for head in row.chunks_exact_mut(heads.width).take(heads.query + heads.key) {
            let (a, b) = head.split_at_mut(half);
            for i in 0..half {
                let (c, s) = (cos[i], direction * sin[i]);
                (a[i], b[i]) = (a[i] * c - b[i] * s, b[i] * c + a[i] * s);
            }
        }
    }
}

/// GELU in its tanh form, and its derivative.
#[inline(always)]
fn gelu(x: f32) -> [f32; 2] {
    const SCALE: f32 = 0.797_884_6; // sqrt(2/π)
    const CUBE: f32 = 0.044715;
    let t = tanh(SCALE * (x + CUBE * x * x * x));
    let inner = SCALE * (1.0 + 3.0 * CUBE * x * x);
    [0.5 * x * (1.0 + t), 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * inner]
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+fma", "x86_64+avx2+fma"))]
pub fn activation(kind: Activation, out: &mut [f32], x: &[f32], width: usize) {
    for (out, x) in out.chunks_exact_mut(width).zip(x.chunks_exact(width * kind.inputs())) {
        match kind {
            Activation::SwiGlu => {
                let (gate, up) = x.split_at(width);
                for i in 0..width {
                    out[i] = gate[i] * sigmoid(gate[i]) * up[i];
                }
            }
            Activation::GeGluTanh => {
                let (gate, up) = x.split_at(width);
                for i in 0..width {
                    out[i] = gelu(gate[i])[0] * up[i];
                }
            }
            Activation::GeluTanh => {
                for i in 0..width {
                    out[i] = gelu(x[i])[0];
                }
            }
        }
    }
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+fma", "x86_64+avx2+fma"))]
pub fn activation_backward(kind: Activation, dx: &mut [f32], dout: &[f32], x: &[f32], width: usize) {
    let inputs = width * kind.inputs();
    for ((dx, dout), x) in
        dx.chunks_exact_mut(inputs).zip(dout.chunks_exact(width)).zip(x.chunks_exact(inputs))
    {
        match kind {
            Activation::SwiGlu => {
                let ((gate, up), (dgate, dup)) = (x.split_at(width), dx.split_at_mut(width));
                for i in 0..width {
                    let s = sigmoid(gate[i]);
                    dgate[i] = dout[i] * up[i] * s * (1.0 + gate[i] * (1.0 - s));
                    dup[i] = dout[i] * gate[i] * s;
                }
            }
            Activation::GeGluTanh => {
                let ((gate, up), (dgate, dup)) = (x.split_at(width), dx.split_at_mut(width));
                for i in 0..width {
                    let [value, slope] = gelu(gate[i]);
                    dgate[i] = dout[i] * up[i] * slope;
                    dup[i] = dout[i] * value;
                }
            }
            Activation::GeluTanh => {
                for i in 0..width {
                    dx[i] = dout[i] * gelu(x[i])[1];
                }
            }
        }
    }
}

/// `Σ x²` in f64.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+fma", "x86_64+avx2+fma"))]
pub fn sum_of_squares(x: &[f32]) -> f64 {
    let mut lanes = [0f64; 16];
    for chunk in x.chunks(16) {
        for (lane, &x) in lanes.iter_mut().zip(chunk) {
            *lane += f64::from(x) * f64::from(x);
        }
    }
    lanes.iter().sum()
}

/// `x` times a factor.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+fma", "x86_64+avx2+fma"))]
pub fn scale(x: &mut [f32], factor: f32) {
    for x in x {
        *x *= factor;
    }
}

/// `out = x + y`.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+fma", "x86_64+avx2+fma"))]
pub fn add(out: &mut [f32], x: &[f32], y: &[f32]) {
    for ((out, x), y) in out.iter_mut().zip(x).zip(y) {
        *out = x + y;
    }
}

/// `out += x`.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+fma", "x86_64+avx2+fma"))]
pub fn add_to(out: &mut [f32], x: &[f32]) {
    for (out, x) in out.iter_mut().zip(x) {
        *out += x;
    }
}

/// The nearest bf16 of each value.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+fma", "x86_64+avx2+fma"))]
pub fn round_each(out: &mut [u16], x: &[f32]) {
    for (out, &x) in out.iter_mut().zip(x) {
        *out = round(x);
    }
}

/// The values of these bf16.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+fma", "x86_64+avx2+fma"))]
pub fn widen_each(out: &mut [f32], x: &[u16]) {
    for (out, &x) in out.iter_mut().zip(x) {
        *out = widen(x);
    }
}

/// `out = out · factors + bias`, column by column of each row.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+fma", "x86_64+avx2+fma"))]
pub fn scale_columns(out: &mut [f32], factors: &[f32], bias: Option<&[f32]>) {
    for out in out.chunks_exact_mut(factors.len()) {
        out.iter_mut().zip(factors).for_each(|(out, factor)| *out *= factor);
        if let Some(bias) = bias {
            out.iter_mut().zip(bias).for_each(|(out, bias)| *out += bias);
        }
    }
}

/// `sums += Σ dout · y` of each column, where `y` is what was scaled; then `dout = dout · factors`.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+fma", "x86_64+avx2+fma"))]
pub fn scale_columns_backward(dout: &mut [f32], sums: &mut [f32], y: &[f32], factors: &[f32]) {
    for (dout, y) in dout.chunks_exact_mut(factors.len()).zip(y.chunks_exact(factors.len())) {
        for (((dout, y), sum), factor) in dout.iter_mut().zip(y).zip(&mut *sums).zip(factors) {
            *sum += *dout * y;
            *dout *= factor;
        }
    }
}

/// The update of one block (Loshchilov & Hutter 2017, arXiv 1711.05101): the first moment's correction is folded into the
/// step size, the second's into the root, to which ε is added after it, as in PyTorch.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+fma", "x86_64+avx2+fma"))]
pub fn adamw(p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32], update: AdamW) {
    let step = update.step as i32;
    let (beta1, beta2) = (update.beta1 as f32, update.beta2 as f32);
    let (rest1, rest2) = ((1.0 - update.beta1) as f32, (1.0 - update.beta2) as f32);
    let rate = (update.learning_rate / (1.0 - update.beta1.powi(step))) as f32;
    let root = (1.0 / (1.0 - update.beta2.powi(step)).sqrt()) as f32;
    let keep = (1.0 - update.learning_rate * update.weight_decay) as f32;
    let (epsilon, scale) = (update.epsilon as f32, update.scale as f32);
    for i in 0..p.len() {
        let g = g[i] * scale;
        m[i] = beta1 * m[i] + rest1 * g;
        v[i] = beta2 * v[i] + rest2 * g * g;
        p[i] = p[i] * keep - rate * m[i] / (v[i].sqrt() * root + epsilon);
    }
}

/// The update of one block that [`cut`] has cut, which begins with element `first`.
pub fn adamw_halves(
    [upper, lower]: [&mut [u16]; 2],
    g: &[f32],
    [m, v]: [&mut [f32]; 2],
    first: usize,
    update: AdamW,
) {
    /// Values that stay in the first-level cache, with all that belongs to them.
    const PIECE: usize = 1024;
    let mut whole = [0.0; PIECE];
    let halves = upper.chunks_mut(PIECE).zip(lower.chunks_mut(PIECE));
    let pieces = halves.zip(g.chunks(PIECE)).zip(m.chunks_mut(PIECE).zip(v.chunks_mut(PIECE)));
    for (i, (((upper, lower), g), (m, v))) in pieces.enumerate() {
        let (p, first) = (&mut whole[..g.len()], first + i * PIECE);
        join(p, [upper, lower], first);
        adamw(p, g, m, v, update);
        cut([upper, lower], p, first);
    }
}

/// Cuts values into a bf16 and sixteen more bits, from which [`join`] makes them again; `x[0]` is element `first` of its
/// matrix.
///
/// Rounding to the nearest would swallow updates smaller than half a step of bf16, or, where many values lie exactly
/// between two (weights that were quantised once), take each for a whole step. So a fixed fraction of a step is added
/// before the bits are cut: another one for each element, equally distributed, the multiples of the golden ratio. A
/// value that is a bf16 stays as it is, and on average a matrix moves by what its values move.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+fma", "x86_64+avx2+fma"))]
pub fn cut([upper, lower]: [&mut [u16]; 2], x: &[f32], first: usize) {
    for (i, ((upper, lower), &x)) in upper.iter_mut().zip(lower).zip(x).enumerate() {
        // The bits of other NaNs could end as those of a number.
        let x = if x.is_nan() { f32::NAN } else { x };
        let bits = x.to_bits().wrapping_add(fraction(first, i));
        (*upper, *lower) = ((bits >> 16) as u16, bits as u16);
    }
}

/// Makes values of their halves.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+fma", "x86_64+avx2+fma"))]
pub fn join(out: &mut [f32], [upper, lower]: [&[u16]; 2], first: usize) {
    for (i, ((out, &upper), &lower)) in out.iter_mut().zip(upper).zip(lower).enumerate() {
        let bits = u32::from(upper) << 16 | u32::from(lower);
        *out = f32::from_bits(bits.wrapping_sub(fraction(first, i)));
    }
}

/// What is added to the bits of element `first + i` of a matrix: less than a step of bf16.
#[inline(always)]
fn fraction(first: usize, i: usize) -> u32 {
    const GOLDEN: u32 = 0x9e37_79b9; // 2³² · 0.618…
    (first as u32).wrapping_add(i as u32).wrapping_mul(GOLDEN) >> 16
}

/// One step of an online softmax: `x = e^(scale (x − max))` in place, where `max` is the largest of `x` and of `before`.
/// Returns `max` and `Σ x`.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+fma", "x86_64+avx2+fma"))]
pub fn softmax(x: &mut [f32], scale: f32, before: f32) -> (f32, f32) {
    let max = before.max(super::math::max(x));
    let shift = scale * max;
    each(x, |x| exp(x.mul_add(scale, -shift)));
    (max, sum(x, |x| x))
}

/// The largest value.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+fma", "x86_64+avx2+fma"))]
pub fn max(x: &[f32]) -> f32 {
    super::math::max(x)
}

/// `Σ e^(x − shift)` and `Σ e^(x − shift) (x − shift)`.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+fma", "x86_64+avx2+fma"))]
pub fn exp_moments(x: &[f32], shift: f32) -> (f64, f64) {
    let (mut sum, mut weighted) = (0.0, 0.0);
    let mut powers = [0.0; 256];
    // f32 partial sums of a short block lose nothing that matters; blocks add up in f64.
    for block in x.chunks(powers.len()) {
        let powers = &mut powers[..block.len()];
        for (power, x) in powers.iter_mut().zip(block) {
            *power = exp(x - shift);
        }
        sum += f64::from(super::math::sum(powers, |x| x));
        powers.iter_mut().zip(block).for_each(|(power, x)| *power *= x - shift);
        weighted += f64::from(super::math::sum(powers, |x| x));
    }
    (sum, weighted)
}

/// `x = e^(scale x − shift)`.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+fma", "x86_64+avx2+fma"))]
pub fn exp_each(x: &mut [f32], scale: f32, shift: f32) {
    each(x, |x| exp(x.mul_add(scale, -shift)));
}

/// `x = factor · e^(x − shift)`.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+fma", "x86_64+avx2+fma"))]
pub fn exp_scaled(x: &mut [f32], shift: f32, factor: f32) {
    for x in x.iter_mut() {
        *x = factor * exp(*x - shift);
    }
}

/// `ds = p (dp − d) scale`, in place on `dp`.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+fma", "x86_64+avx2+fma"))]
pub fn softmax_backward(dp: &mut [f32], p: &[f32], d: f32, scale: f32) {
    for (dp, p) in dp.iter_mut().zip(p) {
        *dp = p * (*dp - d) * scale;
    }
}

/// `x · y`.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+fma", "x86_64+avx2+fma"))]
pub fn inner(x: &[f32], y: &[f32]) -> f32 {
    dot(x, y)
}

/// `out += Σ factors[i] x_i`, rows `x_i` of `x` being `stride` apart.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+fma", "x86_64+avx2+fma"))]
pub fn add_weighted(out: &mut [f32], factors: &[f32], x: &[f32], stride: usize) {
    /// Sums at a time.
    const LANES: usize = 64;
    for (part, out) in out.chunks_mut(LANES).enumerate() {
        let mut sums = [0.0; LANES];
        sums[..out.len()].copy_from_slice(out);
        for (i, &factor) in factors.iter().enumerate() {
            let x = &x[i * stride + part * LANES..][..out.len()];
            // The same twice: sums stay in registers only where the compiler knows how many there are.
            if let Ok(x) = <&[f32; LANES]>::try_from(x) {
                sums.iter_mut().zip(x).for_each(|(sum, x)| *sum = x.mul_add(factor, *sum));
            } else {
                sums.iter_mut().zip(x).for_each(|(sum, x)| *sum = x.mul_add(factor, *sum));
            }
        }
        out.copy_from_slice(&sums[..out.len()]);
    }
}

/// `Σ x`, read in four places at once: one alone does not fill the memory's queues.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+fma", "x86_64+avx2+fma"))]
pub fn read(x: &[f32]) -> f32 {
    const LANES: usize = 16;
    let (front, back) = x.split_at(x.len() / 2);
    let ((a, b), (c, d)) = (front.split_at(front.len() / 2), back.split_at(back.len() / 2));
    let mut sums = [0.0; LANES];
    let quarters = a.chunks_exact(LANES).zip(b.chunks_exact(LANES));
    for ((a, b), (c, d)) in quarters.zip(c.chunks_exact(LANES).zip(d.chunks_exact(LANES))) {
        for i in 0..LANES {
            sums[i] += (a[i] + b[i]) + (c[i] + d[i]);
        }
    }
    sums.iter().sum()
}
