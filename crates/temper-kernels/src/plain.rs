//! Every operation in f64 with obvious loops: the oracle, never the fast path.

use std::borrow::Cow;
use std::ops::Range;

use crate::device::*;
use crate::quants::Blocks;

/// The f64 device. A buffer is a `Vec<f64>`, so that tests can look at and move single numbers.
#[derive(Debug, Clone, Copy, Default)]
pub struct Plain;

/// Mean (0 for RMS) and `1 / sqrt(variance + ε)` of a row.
fn moments(kind: NormKind, epsilon: f64, x: &[f64]) -> (f64, f64) {
    let n = x.len() as f64;
    let mean = match kind {
        NormKind::Layer => x.iter().sum::<f64>() / n,
        NormKind::Rms | NormKind::RmsFromOne => 0.0,
    };
    let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n;
    (mean, 1.0 / (variance + epsilon).sqrt())
}

/// The gradient through the normalisation of one row: given `dy = dout · gain` and the normed row `y`.
fn norm_row_backward(kind: NormKind, dx: &mut [f64], dy: &[f64], y: &[f64], rstd: f64) {
    let n = dy.len() as f64;
    let mean_dy = if kind == NormKind::Layer { dy.iter().sum::<f64>() / n } else { 0.0 };
    let mean_dy_y = dy.iter().zip(y).map(|(dy, y)| dy * y).sum::<f64>() / n;
    for ((dx, dy), y) in dx.iter_mut().zip(dy).zip(y) {
        *dx += rstd * (dy - mean_dy - y * mean_dy_y);
    }
}

fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}

fn silu_derivative(x: f64) -> f64 {
    let s = 1.0 / (1.0 + (-x).exp());
    s * (1.0 + x * (1.0 - s))
}

const GELU_SCALE: f64 = 0.797_884_560_802_865_4; // sqrt(2/π)

fn gelu(x: f64) -> f64 {
    0.5 * x * (1.0 + (GELU_SCALE * (x + 0.044715 * x.powi(3))).tanh())
}

fn gelu_derivative(x: f64) -> f64 {
    let t = (GELU_SCALE * (x + 0.044715 * x.powi(3))).tanh();
    0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * GELU_SCALE * (1.0 + 3.0 * 0.044715 * x * x)
}

fn rotate(qkv: &mut [f64], cos: &[f64], sin: &[f64], heads: Heads, rows: usize, direction: f64) {
    let half = heads.width / 2;
    for t in 0..rows {
        for head in 0..heads.query + heads.key {
            let x = &mut qkv[t * heads.fused() + head * heads.width..][..heads.width];
            for i in 0..half {
                let (c, s) = (cos[t * half + i], direction * sin[t * half + i]);
                (x[i], x[i + half]) = (x[i] * c - x[i + half] * s, x[i + half] * c + x[i] * s);
            }
        }
    }
}

/// The keys that query `i` of a segment sees, as (row, depth), in the order of the path.
fn visible(segment: &Segment, i: usize, window: Option<usize>) -> Vec<(usize, usize)> {
    let position = segment.depth() + i;
    let rows = segment.context.iter().cloned().flatten().chain(segment.own..segment.own + i + 1);
    rows.enumerate()
        .map(|(depth, row)| (row, depth))
        .filter(|&(_, depth)| window.is_none_or(|w| depth + w > position))
        .collect()
}

/// The factor of dropout for a probability.
fn attention_factor(shape: &Attention<'_>, row: usize, head: usize, depth: usize) -> f64 {
    shape.dropout.map_or(1.0, |dropout| dropout.factor(row, head << 32 | depth))
}

/// `x` after dropout.
fn dropped(x: &[f64], width: usize, dropout: Option<Dropout<'_>>) -> Vec<f64> {
    let mut x = x.to_vec();
    if let Some(dropout) = dropout {
        Plain.dropout(&mut x, width, dropout);
    }
    x
}

fn logits(hidden: &[f64], weight: &[f64], width: usize) -> Vec<f64> {
    weight.chunks_exact(width).map(|w| w.iter().zip(hidden).map(|(w, h)| w * h).sum()).collect()
}

impl Device for Plain {
    type Buffer = Vec<f64>;
    type Weight = Vec<f64>;
    type Kept = Vec<f64>;

    fn zeros(&self, len: usize) -> Vec<f64> {
        vec![0.0; len]
    }

    fn len(&self, buffer: &Vec<f64>) -> usize {
        buffer.len()
    }

    fn upload(&self, values: Vec<f32>) -> Vec<f64> {
        values.into_iter().map(f64::from).collect()
    }

    fn weight_zeros(&self, len: usize, _trained: bool) -> Vec<f64> {
        vec![0.0; len]
    }

    fn weight(&self, values: Vec<f32>, _trained: bool) -> Vec<f64> {
        self.upload(values)
    }

    fn quantised(&self, parts: Vec<Blocks>) -> Vec<f64> {
        parts.iter().flat_map(|part| self.upload(part.values())).collect()
    }

    fn weight_values<'a>(&self, weight: &'a Vec<f64>) -> Cow<'a, [f32]> {
        self.download(weight)
    }

    fn weight_values_in<'a>(&self, weight: &'a Vec<f64>, range: Range<usize>) -> Cow<'a, [f32]> {
        weight[range].iter().map(|&x| x as f32).collect()
    }

    fn write(&self, buffer: &mut Vec<f64>, at: usize, values: &[f64]) {
        buffer[at..at + values.len()].copy_from_slice(values);
    }

    fn set_values(&self, buffer: &mut Vec<f64>, at: usize, values: &[f32]) {
        buffer[at..at + values.len()].iter_mut().zip(values).for_each(|(out, &x)| *out = f64::from(x));
    }

    fn add_values(&self, buffer: &mut Vec<f64>, at: usize, values: &[f32]) {
        buffer[at..at + values.len()].iter_mut().zip(values).for_each(|(out, &x)| *out += f64::from(x));
    }

    fn set_weight_values(&self, weight: &mut Vec<f64>, at: usize, values: &[f32]) {
        self.set_values(weight, at, values);
    }

    fn download<'a>(&self, buffer: &'a Vec<f64>) -> Cow<'a, [f32]> {
        buffer.iter().map(|&x| x as f32).collect()
    }

    fn clear(&self, buffer: &mut Vec<f64>) {
        buffer.fill(0.0);
    }

    fn kept(&self, len: usize) -> Vec<f64> {
        vec![0.0; len]
    }

    fn keep(&self, kept: &mut Vec<f64>, x: &mut Vec<f64>, _len: usize) {
        std::mem::swap(kept, x);
    }

    fn recall(&self, x: &mut Vec<f64>, kept: &mut Vec<f64>, _len: usize) {
        std::mem::swap(kept, x);
    }

    fn copy(&self, out: &mut Vec<f64>, x: &Vec<f64>, len: usize) {
        out[..len].copy_from_slice(&x[..len]);
    }

    fn copy_columns(
        &self,
        out: (&mut Vec<f64>, usize, usize),
        x: (&Vec<f64>, usize, usize),
        rows: usize,
        width: usize,
    ) {
        let ((out, to, out_stride), (x, from, x_stride)) = (out, x);
        for i in 0..rows {
            out[to + i * out_stride..][..width].copy_from_slice(&x[from + i * x_stride..][..width]);
        }
    }

    fn embed(&self, out: &mut Vec<f64>, table: &Vec<f64>, indices: &[u32], width: usize, add: bool) {
        for (out, &index) in out.chunks_exact_mut(width).zip(indices) {
            for (out, x) in out.iter_mut().zip(&table[index as usize * width..]) {
                *out = if add { *out + x } else { *x };
            }
        }
    }

    fn gather(&self, out: &mut Vec<f64>, x: &Vec<f64>, indices: &[u32], width: usize) {
        self.embed(out, x, indices, width, false);
    }

    fn gather_backward(&self, dx: &mut Vec<f64>, dout: &Vec<f64>, indices: &[u32], width: usize) {
        for (dout, &index) in dout.chunks_exact(width).zip(indices) {
            for (dx, d) in dx[index as usize * width..].iter_mut().zip(dout) {
                *dx += d;
            }
        }
    }

    fn linear(
        &self,
        out: &mut Vec<f64>,
        x: &Vec<f64>,
        weight: &Vec<f64>,
        bias: Option<&Vec<f64>>,
        shape: Linear,
    ) {
        for row in 0..shape.rows {
            let x = &x[row * shape.inputs..][..shape.inputs];
            for o in 0..shape.outputs {
                let w = &weight[o * shape.inputs..][..shape.inputs];
                let product: f64 = x.iter().zip(w).map(|(x, w)| x * w).sum();
                out[row * shape.outputs + o] = product + bias.map_or(0.0, |bias| bias[o]);
            }
        }
    }

    fn linear_backward(
        &self,
        mut dx: Option<&mut Vec<f64>>,
        mut dweight: Option<&mut Vec<f64>>,
        mut dbias: Option<&mut Vec<f64>>,
        dout: &Vec<f64>,
        x: &Vec<f64>,
        weight: &Vec<f64>,
        Linear { rows, inputs, outputs }: Linear,
        add: bool,
    ) {
        if let Some(dx) = &mut dx {
            dx[..rows * inputs].fill(0.0);
        }
        if let Some(dweight) = dweight.as_mut().filter(|_| !add) {
            dweight.fill(0.0);
        }
        for row in 0..rows {
            for o in 0..outputs {
                let d = dout[row * outputs + o];
                for i in 0..inputs {
                    if let Some(dx) = &mut dx {
                        dx[row * inputs + i] += d * weight[o * inputs + i];
                    }
                    if let Some(dweight) = &mut dweight {
                        dweight[o * inputs + i] += d * x[row * inputs + i];
                    }
                }
                if let Some(dbias) = &mut dbias {
                    dbias[o] += d;
                }
            }
        }
    }

    fn low_rank(
        &self,
        out: &mut Vec<f64>,
        low: &mut Vec<f64>,
        x: &Vec<f64>,
        a: &Vec<f64>,
        b: &[Vec<f64>],
        shape: LowRank<'_>,
    ) {
        let Linear { rows, inputs, outputs } = shape.dense;
        let x = dropped(x, inputs, shape.dropout);
        self.linear(low, &x, a, None, Linear { rows, inputs, outputs: shape.low() });
        for row in 0..rows {
            for (part, b) in shape.parts.iter().zip(b) {
                let low = &low[row * shape.low()..][part.low.clone()];
                for (column, b) in part.columns.clone().zip(b.chunks_exact(low.len())) {
                    out[row * outputs + column] +=
                        part.scale * low.iter().zip(b).map(|(u, b)| u * b).sum::<f64>();
                }
            }
        }
    }

    fn low_rank_backward(
        &self,
        dx: Option<&mut Vec<f64>>,
        da: &mut Vec<f64>,
        db: &mut [&mut Vec<f64>],
        dlow: &mut Vec<f64>,
        dout: &Vec<f64>,
        x: &Vec<f64>,
        low: &Vec<f64>,
        a: &Vec<f64>,
        b: &[Vec<f64>],
        shape: LowRank<'_>,
    ) {
        let Linear { rows, inputs, outputs } = shape.dense;
        dlow[..rows * shape.low()].fill(0.0);
        for row in 0..rows {
            for ((part, b), db) in shape.parts.iter().zip(b).zip(&mut *db) {
                let rank = part.low.len();
                for (o, column) in part.columns.clone().enumerate() {
                    let d = part.scale * dout[row * outputs + column];
                    for i in 0..rank {
                        let at = row * shape.low() + part.low.start + i;
                        dlow[at] += d * b[o * rank + i];
                        db[o * rank + i] += d * low[at];
                    }
                }
            }
        }
        let mut dropped_dx = vec![0.0; rows * inputs];
        let (x, linear) = (dropped(x, inputs, shape.dropout), Linear { rows, inputs, outputs: shape.low() });
        self.linear_backward(Some(&mut dropped_dx), Some(da), None, dlow, &x, a, linear, true);
        if let Some(dx) = dx {
            let through = dropped(&dropped_dx, inputs, shape.dropout);
            dx.iter_mut().zip(through).for_each(|(dx, d)| *dx += d);
        }
    }

    fn low_rank_norms(
        &self,
        norms: &mut Vec<f64>,
        weight: &Vec<f64>,
        a: &Vec<f64>,
        b: &[Vec<f64>],
        shape: LowRank<'_>,
    ) {
        let Linear { inputs, .. } = shape.dense;
        let mut norms = norms.iter_mut();
        for (part, b) in shape.parts.iter().zip(b) {
            let rows = part.columns.clone().zip(b.chunks_exact(part.low.len()));
            for ((column, b), norm) in rows.zip(&mut norms) {
                let value = |i: usize| {
                    let update: f64 = part.low.clone().zip(b).map(|(r, b)| b * a[r * inputs + i]).sum();
                    weight[column * inputs + i] + part.scale * update
                };
                *norm = (0..inputs).map(|i| value(i).powi(2)).sum::<f64>().sqrt().max(f64::MIN_POSITIVE);
            }
        }
    }

    fn magnitude(
        &self,
        out: &mut Vec<f64>,
        magnitude: &Vec<f64>,
        norms: &Vec<f64>,
        bias: Option<&Vec<f64>>,
        shape: LowRank<'_>,
    ) {
        let Linear { rows, outputs, .. } = shape.dense;
        for out in out.chunks_exact_mut(outputs).take(rows) {
            for (column, place) in shape.columns() {
                out[column] *= magnitude[place] / norms[place];
            }
            if let Some(bias) = bias {
                out.iter_mut().zip(bias).for_each(|(out, bias)| *out += bias);
            }
        }
    }

    fn magnitude_backward(
        &self,
        dout: &mut Vec<f64>,
        dmagnitude: &mut Vec<f64>,
        y: &Vec<f64>,
        magnitude: &Vec<f64>,
        norms: &Vec<f64>,
        shape: LowRank<'_>,
    ) {
        let Linear { rows, outputs, .. } = shape.dense;
        for (dout, y) in dout.chunks_exact_mut(outputs).zip(y.chunks_exact(outputs)).take(rows) {
            for (column, place) in shape.columns() {
                dmagnitude[place] += dout[column] * y[column] / norms[place];
                dout[column] *= magnitude[place] / norms[place];
            }
        }
    }

    fn norm(&self, out: &mut Vec<f64>, x: &Vec<f64>, gain: &Vec<f64>, bias: Option<&Vec<f64>>, shape: Norm) {
        let gain = shape.kind.factors(gain);
        for (out, x) in out.chunks_exact_mut(shape.width).zip(x.chunks_exact(shape.width)).take(shape.rows) {
            let (mean, rstd) = moments(shape.kind, shape.epsilon, x);
            for i in 0..shape.width {
                out[i] = (x[i] - mean) * rstd * gain[i] + bias.map_or(0.0, |bias| bias[i]);
            }
        }
    }

    fn norm_backward(
        &self,
        dx: &mut Vec<f64>,
        mut dgain: Option<&mut Vec<f64>>,
        mut dbias: Option<&mut Vec<f64>>,
        dout: &Vec<f64>,
        x: &Vec<f64>,
        gain: &Vec<f64>,
        shape: Norm,
    ) {
        let (width, gain) = (shape.width, shape.kind.factors(gain));
        for row in 0..shape.rows {
            let (x, dout) = (&x[row * width..][..width], &dout[row * width..][..width]);
            let (mean, rstd) = moments(shape.kind, shape.epsilon, x);
            let y: Vec<f64> = x.iter().map(|x| (x - mean) * rstd).collect();
            let dy: Vec<f64> = dout.iter().zip(&*gain).map(|(d, g)| d * g).collect();
            for i in 0..width {
                if let Some(dgain) = &mut dgain {
                    dgain[i] += dout[i] * y[i];
                }
                if let Some(dbias) = &mut dbias {
                    dbias[i] += dout[i];
                }
            }
            norm_row_backward(shape.kind, &mut dx[row * width..][..width], &dy, &y, rstd);
        }
    }

    fn head_norm(&self, qkv: &mut Vec<f64>, gains: [&Vec<f64>; 2], heads: Heads, norm: Norm) {
        let gains = gains.map(|gain| norm.kind.factors(gain));
        for t in 0..norm.rows {
            for head in 0..heads.query + heads.key {
                let x = &mut qkv[t * heads.fused() + head * heads.width..][..heads.width];
                let gain = &gains[usize::from(head >= heads.query)];
                let (_, rstd) = moments(norm.kind, norm.epsilon, x);
                for (x, g) in x.iter_mut().zip(&**gain) {
                    *x *= rstd * g;
                }
            }
        }
    }

    fn head_norm_backward(
        &self,
        dqkv: &mut Vec<f64>,
        mut dgains: [Option<&mut Vec<f64>>; 2],
        raw: &Vec<f64>,
        gains: [&Vec<f64>; 2],
        heads: Heads,
        norm: Norm,
    ) {
        let gains = gains.map(|gain| norm.kind.factors(gain));
        for t in 0..norm.rows {
            for head in 0..heads.query + heads.key {
                let at = t * heads.fused() + head * heads.width;
                let which = usize::from(head >= heads.query);
                let (x, dx) = (&raw[at..][..heads.width], &mut dqkv[at..][..heads.width]);
                let (_, rstd) = moments(norm.kind, norm.epsilon, x);
                let y: Vec<f64> = x.iter().map(|x| x * rstd).collect();
                let dy: Vec<f64> = dx.iter().zip(&*gains[which]).map(|(d, g)| d * g).collect();
                if let Some(dgain) = &mut dgains[which] {
                    dgain.iter_mut().enumerate().for_each(|(i, dgain)| *dgain += dx[i] * y[i]);
                }
                dx.fill(0.0);
                norm_row_backward(norm.kind, dx, &dy, &y, rstd);
            }
        }
    }

    fn rope(&self, qkv: &mut Vec<f64>, cos: &Vec<f64>, sin: &Vec<f64>, heads: Heads, rows: usize) {
        rotate(qkv, cos, sin, heads, rows, 1.0);
    }

    fn rope_backward(&self, dqkv: &mut Vec<f64>, cos: &Vec<f64>, sin: &Vec<f64>, heads: Heads, rows: usize) {
        rotate(dqkv, cos, sin, heads, rows, -1.0);
    }

    fn attention(
        &self,
        out: &mut Vec<f64>,
        lse: &mut Vec<f64>,
        qkv: [Columns<'_, Vec<f64>>; 3],
        shape: Attention<'_>,
    ) {
        let [q, k, v] = qkv;
        let Heads { query: heads, key: kv_heads, width } = shape.heads;
        let scale = 1.0 / (width as f64).sqrt();
        let slice = |x: &Columns<'_, Vec<f64>>, row: usize, head: usize| -> Vec<f64> {
            x.buffer[row * x.stride + x.start + head * width..][..width].to_vec()
        };
        for segment in shape.segments {
            for (i, row) in segment.rows.clone().enumerate() {
                let keys = visible(segment, i, shape.window);
                for head in 0..heads {
                    let kv_head = head / (heads / kv_heads);
                    let q = slice(&q, row, head);
                    let scores: Vec<f64> = keys
                        .iter()
                        .map(|&(key, _)| {
                            scale * q.iter().zip(slice(&k, key, kv_head)).map(|(q, k)| q * k).sum::<f64>()
                        })
                        .collect();
                    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                    let sum: f64 = scores.iter().map(|s| (s - max).exp()).sum();
                    lse[row * heads + head] = max + sum.ln();
                    let out = &mut out[(row * heads + head) * width..][..width];
                    out.fill(0.0);
                    for (&(key, depth), score) in keys.iter().zip(&scores) {
                        let p = (score - max).exp() / sum * attention_factor(&shape, row, head, depth);
                        for (out, v) in out.iter_mut().zip(slice(&v, key, kv_head)) {
                            *out += p * v;
                        }
                    }
                }
            }
        }
    }

    fn attention_backward(
        &self,
        dqkv: &mut Vec<f64>,
        dout: &Vec<f64>,
        qkv: &Vec<f64>,
        out: &Vec<f64>,
        lse: &Vec<f64>,
        shape: Attention<'_>,
    ) {
        let Heads { query: heads, key: kv_heads, width } = shape.heads;
        let stride = shape.heads.fused();
        let scale = 1.0 / (width as f64).sqrt();
        for segment in shape.segments {
            dqkv[segment.rows.start * stride..segment.rows.end * stride].fill(0.0);
        }
        for segment in shape.segments {
            for (i, row) in segment.rows.clone().enumerate() {
                for head in 0..heads {
                    let kv_head = head / (heads / kv_heads);
                    let q = row * stride + head * width;
                    let o = (row * heads + head) * width;
                    let d: f64 = (0..width).map(|c| dout[o + c] * out[o + c]).sum();
                    for (key, depth) in visible(segment, i, shape.window) {
                        let k = key * stride + shape.heads.keys() + kv_head * width;
                        let v = key * stride + shape.heads.values() + kv_head * width;
                        let score: f64 = scale * (0..width).map(|c| qkv[q + c] * qkv[k + c]).sum::<f64>();
                        let p = (score - lse[row * heads + head]).exp();
                        let factor = attention_factor(&shape, row, head, depth);
                        let dp: f64 = factor * (0..width).map(|c| dout[o + c] * qkv[v + c]).sum::<f64>();
                        let ds = p * (dp - d) * scale;
                        for c in 0..width {
                            dqkv[q + c] += ds * qkv[k + c];
                            dqkv[k + c] += ds * qkv[q + c];
                            dqkv[v + c] += p * factor * dout[o + c];
                        }
                    }
                }
            }
        }
    }

    fn activation(&self, kind: Activation, out: &mut Vec<f64>, x: &Vec<f64>, rows: usize, width: usize) {
        for row in 0..rows {
            for i in 0..width {
                let (gate, up) = (row * 2 * width + i, row * 2 * width + width + i);
                out[row * width + i] = match kind {
                    Activation::SwiGlu => silu(x[gate]) * x[up],
                    Activation::GeGluTanh => gelu(x[gate]) * x[up],
                    Activation::GeluTanh => gelu(x[row * width + i]),
                };
            }
        }
    }

    fn activation_backward(
        &self,
        kind: Activation,
        dx: &mut Vec<f64>,
        dout: &Vec<f64>,
        x: &Vec<f64>,
        rows: usize,
        width: usize,
    ) {
        for row in 0..rows {
            for i in 0..width {
                let d = dout[row * width + i];
                let (gate, up) = (row * 2 * width + i, row * 2 * width + width + i);
                match kind {
                    Activation::SwiGlu => {
                        dx[gate] = d * x[up] * silu_derivative(x[gate]);
                        dx[up] = d * silu(x[gate]);
                    }
                    Activation::GeGluTanh => {
                        dx[gate] = d * x[up] * gelu_derivative(x[gate]);
                        dx[up] = d * gelu(x[gate]);
                    }
                    Activation::GeluTanh => dx[row * width + i] = d * gelu_derivative(x[row * width + i]),
                }
            }
        }
    }

    fn add(&self, out: &mut Vec<f64>, x: &Vec<f64>, branch: &Vec<f64>, len: usize) {
        for i in 0..len {
            out[i] = x[i] + branch[i];
        }
    }

    fn scale(&self, x: &mut Vec<f64>, factor: f64, len: usize) {
        x[..len].iter_mut().for_each(|x| *x *= factor);
    }

    fn dropout(&self, x: &mut Vec<f64>, width: usize, dropout: Dropout<'_>) {
        for (row, x) in x.chunks_exact_mut(width).take(dropout.paths.len()).enumerate() {
            for (column, x) in x.iter_mut().enumerate() {
                *x *= dropout.factor(row, column);
            }
        }
    }

    fn head(
        &self,
        mut aside: Aside<'_, Vec<f64>>,
        hidden: &Vec<f64>,
        weight: &Vec<f64>,
        targets: &[Target],
        shape: Head,
    ) -> HeadOutput {
        let mut output = HeadOutput::default();
        let mut targets = targets.iter().peekable();
        for (row, hidden) in hidden.chunks_exact(shape.width).take(shape.rows).enumerate() {
            let logits = logits(hidden, &weight[..shape.vocabulary * shape.width], shape.width);
            let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let lse = max + logits.iter().map(|z| (z - max).exp()).sum::<f64>().ln();
            while let Some(target) = targets.next_if(|target| target.row as usize == row) {
                output.logp.push(logits[target.token as usize] - lse);
            }
            if let Aside::Mean(mean) = &mut aside {
                let mean = &mut mean[row * shape.width..][..shape.width];
                mean.fill(0.0);
                for (z, weight) in logits.iter().zip(weight.chunks_exact(shape.width)) {
                    mean.iter_mut().zip(weight).for_each(|(mean, w)| *mean += (z - lse).exp() * w);
                }
            }
            output.log_sum_exp.push(lse);
            output.entropy.push(lse - logits.iter().map(|z| (z - lse).exp() * z).sum::<f64>());
            output.argmax.push(logits.iter().position(|&z| z == max).unwrap_or(0) as u32);
        }
        output
    }

    fn head_backward(
        &self,
        dhidden: &mut Vec<f64>,
        dweight: &mut Vec<f64>,
        _: &mut Vec<f64>, // logits are computed again
        hidden: &Vec<f64>,
        weight: &Vec<f64>,
        Loss { targets, coefficients, log_sum_exp }: Loss<'_>,
        shape: Head,
        add: bool,
    ) {
        let width = shape.width;
        dhidden[..shape.rows * width].fill(0.0);
        if !add {
            dweight.fill(0.0);
        }
        for row in 0..shape.rows {
            let h = &hidden[row * width..][..width];
            let mut dlogits: Vec<f64> = logits(h, &weight[..shape.vocabulary * width], width);
            let here = || targets.iter().zip(coefficients).filter(|(target, _)| target.row as usize == row);
            let total: f64 = here().map(|(_, c)| c).sum();
            dlogits.iter_mut().for_each(|z| *z = -total * (*z - log_sum_exp[row]).exp());
            here().for_each(|(target, c)| dlogits[target.token as usize] += c);
            for (token, d) in dlogits.into_iter().enumerate() {
                for i in 0..width {
                    dhidden[row * width + i] += d * weight[token * width + i];
                    dweight[token * width + i] += d * h[i];
                }
            }
        }
    }

    fn head_backward_frozen(
        &self,
        dhidden: &mut Vec<f64>,
        mean: &Vec<f64>,
        weight: &Vec<f64>,
        Loss { targets, coefficients, .. }: Loss<'_>,
        Head { rows, width, .. }: Head,
    ) {
        dhidden[..rows * width].fill(0.0);
        for (target, c) in targets.iter().zip(coefficients) {
            let (row, token) = (target.row as usize * width, target.token as usize * width);
            for i in 0..width {
                dhidden[row + i] += c * (weight[token + i] - mean[row + i]);
            }
        }
    }

    fn sums_of_squares(&self, x: &Vec<f64>, range: Range<usize>) -> Vec<f64> {
        x[range].chunks(BLOCK).map(|block| block.iter().map(|x| x * x).sum()).collect()
    }

    fn adamw(
        &self,
        parameter: &mut Vec<f64>,
        gradient: &Vec<f64>,
        [m, v]: [&mut Vec<f64>; 2],
        update: AdamW,
    ) {
        let AdamW { learning_rate, beta1, beta2, epsilon, weight_decay, scale, step, from } = update;
        let correction1 = 1.0 - beta1.powi(step as i32);
        let correction2 = 1.0 - beta2.powi(step as i32);
        for (i, (m, v)) in m.iter_mut().zip(v).enumerate() {
            let i = from + i;
            let g = gradient[i] * scale;
            *m = beta1 * *m + (1.0 - beta1) * g;
            *v = beta2 * *v + (1.0 - beta2) * g * g;
            parameter[i] -= learning_rate * weight_decay * parameter[i];
            parameter[i] -= learning_rate * (*m / correction1) / ((*v / correction2).sqrt() + epsilon);
        }
    }
    fn adamw_weight(
        &self,
        parameter: &mut Vec<f64>,
        gradient: &Vec<f64>,
        moments: [&mut Vec<f64>; 2],
        update: AdamW,
    ) {
        self.adamw(parameter, gradient, moments, update);
    }
}
