//! The fast device: f32, SIMD chosen at run time, one rayon pool.
//!
//! Sums are made in pieces whose size does not depend on the number of threads, and added in order, so that any number of
//! threads gives the same bits. Only work that adds nothing across pieces is cut by their number.

mod attention;
mod crew;
mod head;
mod low_rank;
mod math;
mod matmul;
mod pack;
mod pages;
mod peak;
mod product;
mod rows;
mod thin;
mod tile;
mod weight;
mod workspace;

use std::borrow::Cow;
use std::ops::Range;

use rayon::prelude::*;

use crate::device::*;
use crate::quants::Blocks;
pub use rows::max;
use tile::Kernel;
pub use weight::Weight;
pub use workspace::Workspace;

/// Rows that one task takes at most.
const ROWS: usize = 64;

/// Calls `f(range of rows, their values)` for pieces of a mutable buffer, in parallel.
fn by_rows(out: &mut [f32], stride: usize, rows: usize, f: impl Fn(Range<usize>, &mut [f32]) + Sync) {
    let each = rows.div_ceil(rayon::current_num_threads()).clamp(1, ROWS);
    crew::for_each_chunk(&mut out[..rows * stride], each * stride, |i, out| {
        let start = i * each;
        f(start..start + out.len() / stride, out);
    });
}

/// `out += partial` in the order of the partials.
fn add_in_order(out: &mut [f32], partials: impl IntoIterator<Item = impl AsRef<[f32]>>) {
    for partial in partials {
        rows::add_to(out, partial.as_ref());
    }
}

/// What the operands of products are rounded to. Sums, and everything else, are f32; so are the activations of adapters
/// and of an attention tile of one query, which are read where they lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Precision {
    /// Not at all.
    F32,
    /// To bf16. Without hardware for it no faster than f32; weights that are not trained are half as large.
    Bf16,
}

/// What DoRA multiplies the outputs of a layer by: 1 where they have no adapter.
fn dora_factors(magnitude: &[f32], norms: &[f32], shape: LowRank<'_>) -> Vec<f32> {
    let mut factors = vec![1.0; shape.dense.outputs];
    shape.columns().for_each(|(column, place)| factors[column] = magnitude[place] / norms[place]);
    factors
}

/// What the backward will need: the buffer itself, or in bf16 the rounded values.
#[derive(Debug)]
pub enum Kept {
    /// Exchanged, not copied.
    F32(Vec<f32>),
    /// The upper halves of the rounded values.
    Bf16(Vec<u16>),
}

/// The fast device. Cheap to make; the pool lives as long as it.
#[derive(Debug)]
pub struct Cpu {
    pool: rayon::ThreadPool,
    precision: Precision,
}

impl Cpu {
    /// A device with this many threads, at least one.
    ///
    /// # Errors
    /// When the operating system refuses the threads.
    pub fn new(threads: usize, precision: Precision) -> Result<Cpu, rayon::ThreadPoolBuildError> {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads.max(1))
            .thread_name(|i| format!("temper-{i}"))
            .build()?;
        Ok(Cpu { pool, precision })
    }

    /// Runs `f` inside the pool: operations called there need not enter it one by one.
    pub fn install<R: Send>(&self, f: impl FnOnce() -> R + Send) -> R {
        self.pool.install(f)
    }

    /// Threads of the pool.
    pub fn threads(&self) -> usize {
        self.pool.current_num_threads()
    }

    /// What the operands of products are rounded to.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// The instruction set that products of this precision take on this machine.
    pub fn instruction_set(precision: Precision) -> &'static str {
        Kernel::of(precision).name
    }

    /// Whether this machine multiplies bf16 faster than f32.
    pub fn has_bf16() -> bool {
        Kernel::bf16().units == tile::Units::Pairs
    }
}

impl Device for Cpu {
    type Buffer = Vec<f32>;
    type Weight = Weight;
    type Kept = Kept;

    fn zeros(&self, len: usize) -> Vec<f32> {
        pages::zeros(len)
    }

    fn awake<R: Send>(&self, rows: usize, f: impl FnOnce() -> R + Send) -> R {
        self.pool.install(|| if rows <= matmul::THIN_ROWS { crew::lead(f) } else { f() })
    }

    fn map<T: Send>(&self, count: usize, f: impl Fn(usize) -> T + Sync) -> Vec<T> {
        let mut results: Vec<Option<T>> = (0..count).map(|_| None).collect();
        self.pool.install(|| crew::for_each_chunk(&mut results, 1, |i, result| result[0] = Some(f(i))));
        results.into_iter().flatten().collect()
    }

    fn len(&self, buffer: &Vec<f32>) -> usize {
        buffer.len()
    }

    fn upload(&self, values: Vec<f32>) -> Vec<f32> {
        values
    }

    fn weight_zeros(&self, len: usize, trained: bool) -> Weight {
        match self.precision {
            Precision::F32 => Weight::F32(pages::zeros(len)),
            Precision::Bf16 => {
                Weight::Bf16 { upper: pages::zeros(len), lower: trained.then(|| pages::zeros(len)) }
            }
        }
    }

    fn weight(&self, values: Vec<f32>, trained: bool) -> Weight {
        if self.precision == Precision::F32 {
            return Weight::F32(values);
        }
        let mut weight = self.weight_zeros(values.len(), trained);
        self.set_weight_values(&mut weight, 0, &values);
        weight
    }

    fn quantised(&self, parts: Vec<Blocks>) -> Weight {
        Weight::Quantised { parts, precision: self.precision }
    }

    fn weight_values<'a>(&self, weight: &'a Weight) -> Cow<'a, [f32]> {
        self.weight_values_in(weight, 0..weight.len())
    }

    fn weight_values_in<'a>(&self, weight: &'a Weight, range: Range<usize>) -> Cow<'a, [f32]> {
        self.pool.install(|| weight.values(range))
    }

    fn write(&self, buffer: &mut Vec<f32>, at: usize, values: &[f64]) {
        buffer[at..at + values.len()].iter_mut().zip(values).for_each(|(out, &value)| *out = value as f32);
    }

    fn download<'a>(&self, buffer: &'a Vec<f32>) -> Cow<'a, [f32]> {
        Cow::Borrowed(buffer)
    }

    fn set_values(&self, buffer: &mut Vec<f32>, at: usize, values: &[f32]) {
        let out = &mut buffer[at..at + values.len()];
        let pieces = out.par_chunks_mut(BLOCK).zip(values.par_chunks(BLOCK));
        self.pool.install(|| pieces.for_each(|(out, values)| out.copy_from_slice(values)));
    }

    fn add_values(&self, buffer: &mut Vec<f32>, at: usize, values: &[f32]) {
        let out = &mut buffer[at..at + values.len()];
        let pieces = out.par_chunks_mut(BLOCK).zip(values.par_chunks(BLOCK));
        self.pool.install(|| pieces.for_each(|(out, values)| rows::add_to(out, values)));
    }

    fn set_weight_values(&self, weight: &mut Weight, at: usize, values: &[f32]) {
        let span = at..at + values.len();
        match weight {
            Weight::F32(all) => self.set_values(all, at, values),
            Weight::Bf16 { upper, lower: Some(lower) } => self.pool.install(|| {
                let halves = upper[span.clone()].par_chunks_mut(BLOCK).zip(lower[span].par_chunks_mut(BLOCK));
                let pieces = halves.zip(values.par_chunks(BLOCK)).enumerate();
                pieces.for_each(|(i, ((upper, lower), x))| rows::cut([upper, lower], x, at + i * BLOCK));
            }),
            // Nothing will be added to it: the nearest is best.
            Weight::Bf16 { upper, lower: None } => self.pool.install(|| {
                let pieces = upper[span].par_chunks_mut(BLOCK).zip(values.par_chunks(BLOCK));
                pieces.for_each(|(upper, x)| rows::round_each(upper, x));
            }),
            Weight::Quantised { .. } => unreachable!("blocks have no single values"),
        }
    }

    fn clear(&self, buffer: &mut Vec<f32>) {
        self.pool.install(|| buffer.par_chunks_mut(BLOCK).for_each(|block| block.fill(0.0)));
    }

    fn kept(&self, len: usize) -> Kept {
        match self.precision {
            Precision::F32 => Kept::F32(vec![0.0; len]),
            Precision::Bf16 => Kept::Bf16(vec![0; len]),
        }
    }

    fn keep(&self, kept: &mut Kept, x: &mut Vec<f32>, len: usize) {
        match kept {
            Kept::F32(kept) => std::mem::swap(kept, x),
            Kept::Bf16(kept) => self.pool.install(|| {
                let pieces = kept[..len].par_chunks_mut(BLOCK).zip(x[..len].par_chunks(BLOCK));
                pieces.for_each(|(kept, x)| rows::round_each(kept, x));
            }),
        }
    }

    fn recall(&self, x: &mut Vec<f32>, kept: &mut Kept, len: usize) {
        match kept {
            Kept::F32(kept) => std::mem::swap(kept, x),
            Kept::Bf16(kept) => self.pool.install(|| {
                let pieces = x[..len].par_chunks_mut(BLOCK).zip(kept[..len].par_chunks(BLOCK));
                pieces.for_each(|(x, kept)| rows::widen_each(x, kept));
            }),
        }
    }

    fn copy(&self, out: &mut Vec<f32>, x: &Vec<f32>, len: usize) {
        self.set_values(out, 0, &x[..len]);
    }

    fn copy_columns(
        &self,
        out: (&mut Vec<f32>, usize, usize),
        x: (&Vec<f32>, usize, usize),
        rows: usize,
        width: usize,
    ) {
        let ((out, to, out_stride), (x, from, x_stride)) = (out, x);
        for i in 0..rows {
            out[to + i * out_stride..][..width].copy_from_slice(&x[from + i * x_stride..][..width]);
        }
    }

    fn embed(&self, out: &mut Vec<f32>, table: &Weight, indices: &[u32], width: usize, add: bool) {
        for (out, &index) in out.chunks_exact_mut(width).zip(indices) {
            if !add {
                out.fill(0.0);
            }
            table.add_row(index as usize, out);
        }
    }

    fn gather(&self, out: &mut Vec<f32>, x: &Vec<f32>, indices: &[u32], width: usize) {
        for (out, &index) in out.chunks_exact_mut(width).zip(indices) {
            out.copy_from_slice(&x[index as usize * width..][..width]);
        }
    }

    fn gather_backward(&self, dx: &mut Vec<f32>, dout: &Vec<f32>, indices: &[u32], width: usize) {
        for (dout, &index) in dout.chunks_exact(width).zip(indices) {
            dx[index as usize * width..][..width].iter_mut().zip(dout).for_each(|(dx, d)| *dx += d);
        }
    }

    fn linear(
        &self,
        out: &mut Vec<f32>,
        x: &Vec<f32>,
        weight: &Weight,
        bias: Option<&Vec<f32>>,
        shape: Linear,
    ) {
        let Linear { rows, inputs, outputs } = shape;
        self.pool.install(|| {
            matmul::forward(out, x, weight, 0, [rows, inputs, outputs]);
            if let Some(bias) = bias {
                by_rows(out, outputs, rows, |_, out| {
                    out.chunks_exact_mut(outputs).for_each(|out| rows::add_to(out, bias));
                });
            }
        });
    }

    fn linear_backward(
        &self,
        dx: Option<&mut Vec<f32>>,
        dweight: Option<&mut Vec<f32>>,
        dbias: Option<&mut Vec<f32>>,
        dout: &Vec<f32>,
        x: &Vec<f32>,
        weight: &Weight,
        Linear { rows, inputs, outputs }: Linear,
        add: bool,
    ) {
        self.pool.install(|| {
            let shape = [rows, inputs, outputs];
            if let Some(dx) = dx {
                matmul::backward_input(dx, dout, weight, 0, shape, false);
            }
            if let Some(dweight) = dweight {
                matmul::backward_weight(dweight, dout, x, weight.kernel(), shape, add);
            }
            if let Some(dbias) = dbias {
                let partials: Vec<Vec<f32>> = dout[..rows * outputs]
                    .par_chunks(ROWS * outputs)
                    .map(|dout| {
                        let mut partial = vec![0.0; outputs];
                        add_in_order(&mut partial, dout.chunks_exact(outputs));
                        partial
                    })
                    .collect();
                add_in_order(dbias, partials);
            }
        });
    }

    fn low_rank(
        &self,
        out: &mut Vec<f32>,
        low: &mut Vec<f32>,
        x: &Vec<f32>,
        a: &Weight,
        b: &[Weight],
        shape: LowRank<'_>,
    ) {
        let x = self.dropped(x, shape);
        self.pool.install(|| low_rank::forward(out, low, &x, a, b, shape));
    }

    fn low_rank_backward(
        &self,
        dx: Option<&mut Vec<f32>>,
        da: &mut Vec<f32>,
        db: &mut [&mut Vec<f32>],
        dlow: &mut Vec<f32>,
        dout: &Vec<f32>,
        x: &Vec<f32>,
        low: &Vec<f32>,
        a: &Weight,
        b: &[Weight],
        shape: LowRank<'_>,
    ) {
        let x = self.dropped(x, shape);
        let mut run = |dx: Option<&mut [f32]>, db: &mut [&mut Vec<f32>], dlow: &mut [f32]| {
            self.pool.install(|| low_rank::backward(dx, da, db, dlow, dout, &x, low, a, b, shape));
        };
        match (dx, shape.dropout) {
            (Some(dx), Some(dropout)) => {
                let Linear { rows, inputs, .. } = shape.dense;
                let mut through = vec![0.0; rows * inputs];
                run(Some(&mut through), db, dlow);
                self.dropout(&mut through, inputs, dropout);
                self.add_values(dx, 0, &through);
            }
            (dx, _) => run(dx.map(Vec::as_mut_slice), db, dlow),
        }
    }

    fn low_rank_norms(
        &self,
        norms: &mut Vec<f32>,
        weight: &Weight,
        a: &Weight,
        b: &[Weight],
        shape: LowRank<'_>,
    ) {
        self.pool.install(|| low_rank::norms(norms, weight, a, b, shape));
    }

    fn magnitude(
        &self,
        out: &mut Vec<f32>,
        magnitude: &Vec<f32>,
        norms: &Vec<f32>,
        bias: Option<&Vec<f32>>,
        shape: LowRank<'_>,
    ) {
        let Linear { rows, outputs, .. } = shape.dense;
        let factors = dora_factors(magnitude, norms, shape);
        self.pool.install(|| {
            by_rows(out, outputs, rows, |_, out| {
                rows::scale_columns(out, &factors, bias.map(Vec::as_slice));
            });
        });
    }

    fn magnitude_backward(
        &self,
        dout: &mut Vec<f32>,
        dmagnitude: &mut Vec<f32>,
        y: &Vec<f32>,
        magnitude: &Vec<f32>,
        norms: &Vec<f32>,
        shape: LowRank<'_>,
    ) {
        let Linear { rows, outputs, .. } = shape.dense;
        let factors = dora_factors(magnitude, norms, shape);
        let partials: Vec<Vec<f32>> = self.pool.install(|| {
            let pieces = dout[..rows * outputs].par_chunks_mut(ROWS * outputs);
            let of_piece = |(dout, y): (&mut [f32], &[f32])| {
                let mut sums = vec![0.0; outputs];
                rows::scale_columns_backward(dout, &mut sums, y, &factors);
                sums
            };
            pieces.zip(y[..rows * outputs].par_chunks(ROWS * outputs)).map(of_piece).collect()
        });
        let mut sums = vec![0.0; outputs];
        add_in_order(&mut sums, partials);
        shape.columns().for_each(|(column, place)| dmagnitude[place] += sums[column] / norms[place]);
    }

    fn norm(&self, out: &mut Vec<f32>, x: &Vec<f32>, gain: &Vec<f32>, bias: Option<&Vec<f32>>, shape: Norm) {
        let (width, gain) = (shape.width, shape.kind.factors(gain));
        self.pool.install(|| {
            by_rows(out, width, shape.rows, |rows, out| {
                rows::norm(
                    shape.kind,
                    shape.epsilon as f32,
                    out,
                    &x[rows.start * width..rows.end * width],
                    &gain,
                    bias.map(Vec::as_slice),
                );
            });
        });
    }

    fn norm_backward(
        &self,
        dx: &mut Vec<f32>,
        dgain: Option<&mut Vec<f32>>,
        dbias: Option<&mut Vec<f32>>,
        dout: &Vec<f32>,
        x: &Vec<f32>,
        gain: &Vec<f32>,
        shape: Norm,
    ) {
        let (width, gain) = (shape.width, shape.kind.factors(gain));
        let biased = dbias.is_some();
        let partials: Vec<[Vec<f32>; 2]> = self.pool.install(|| {
            let chunk = ROWS * width;
            let all = dx[..shape.rows * width]
                .par_chunks_mut(chunk)
                .zip(dout[..shape.rows * width].par_chunks(chunk))
                .zip(x[..shape.rows * width].par_chunks(chunk));
            all.map(|((dx, dout), x)| {
                let (mut dgain, mut dbias) = (vec![0.0; width], vec![0.0; width]);
                let bias = biased.then_some(&mut dbias[..]);
                rows::norm_backward(shape.kind, shape.epsilon as f32, dx, &mut dgain, bias, dout, x, &gain);
                [dgain, dbias]
            })
            .collect()
        });
        let (dgains, dbiases): (Vec<_>, Vec<_>) =
            partials.into_iter().map(|[dgain, dbias]| (dgain, dbias)).unzip();
        if let Some(dgain) = dgain {
            add_in_order(dgain, dgains);
        }
        if let Some(dbias) = dbias {
            add_in_order(dbias, dbiases);
        }
    }

    fn head_norm(&self, qkv: &mut Vec<f32>, gains: [&Vec<f32>; 2], heads: Heads, norm: Norm) {
        let gains = gains.map(|gain| norm.kind.factors(gain));
        let (gains, epsilon) = (gains.each_ref().map(|gain| &**gain), norm.epsilon as f32);
        self.pool.install(|| {
            by_rows(qkv, heads.fused(), norm.rows, |_, qkv| rows::head_norm(qkv, gains, heads, epsilon))
        });
    }

    fn head_norm_backward(
        &self,
        dqkv: &mut Vec<f32>,
        dgains: [Option<&mut Vec<f32>>; 2],
        raw: &Vec<f32>,
        gains: [&Vec<f32>; 2],
        heads: Heads,
        norm: Norm,
    ) {
        let gains = gains.map(|gain| norm.kind.factors(gain));
        let (gains, epsilon) = (gains.each_ref().map(|gain| &**gain), norm.epsilon as f32);
        let (stride, rows) = (heads.fused(), norm.rows);
        let partials: Vec<[Vec<f32>; 2]> = self.pool.install(|| {
            let pieces = dqkv[..rows * stride]
                .par_chunks_mut(ROWS * stride)
                .zip(raw[..rows * stride].par_chunks(ROWS * stride));
            pieces
                .map(|(dqkv, raw)| {
                    let [mut q, mut k] = [vec![0.0; heads.width], vec![0.0; heads.width]];
                    rows::head_norm_backward(dqkv, [&mut q, &mut k], raw, gains, heads, epsilon);
                    [q, k]
                })
                .collect()
        });
        for (which, dgain) in dgains.into_iter().enumerate() {
            if let Some(dgain) = dgain {
                add_in_order(dgain, partials.iter().map(|partial| &partial[which]));
            }
        }
    }

    fn rope(&self, qkv: &mut Vec<f32>, cos: &Vec<f32>, sin: &Vec<f32>, heads: Heads, rows: usize) {
        self.rotate(qkv, cos, sin, heads, rows, 1.0);
    }

    fn rope_backward(&self, dqkv: &mut Vec<f32>, cos: &Vec<f32>, sin: &Vec<f32>, heads: Heads, rows: usize) {
        self.rotate(dqkv, cos, sin, heads, rows, -1.0);
    }

    fn attention(
        &self,
        out: &mut Vec<f32>,
        lse: &mut Vec<f32>,
        qkv: [Columns<'_, Vec<f32>>; 3],
        shape: Attention<'_>,
    ) {
        let kernel = Kernel::of(self.precision);
        self.pool.install(|| attention::forward(out, lse, qkv, shape, kernel));
    }

    fn attention_backward(
        &self,
        dqkv: &mut Vec<f32>,
        dout: &Vec<f32>,
        qkv: &Vec<f32>,
        out: &Vec<f32>,
        lse: &Vec<f32>,
        shape: Attention<'_>,
    ) {
        let kernel = Kernel::of(self.precision);
        self.pool.install(|| attention::backward(dqkv, dout, qkv, out, lse, shape, kernel));
    }

    fn activation(&self, kind: Activation, out: &mut Vec<f32>, x: &Vec<f32>, rows: usize, width: usize) {
        let inputs = width * kind.inputs();
        self.pool.install(|| {
            by_rows(out, width, rows, |rows, out| {
                rows::activation(kind, out, &x[rows.start * inputs..rows.end * inputs], width)
            })
        });
    }

    fn activation_backward(
        &self,
        kind: Activation,
        dx: &mut Vec<f32>,
        dout: &Vec<f32>,
        x: &Vec<f32>,
        rows: usize,
        width: usize,
    ) {
        let inputs = width * kind.inputs();
        self.pool.install(|| {
            by_rows(dx, inputs, rows, |rows, dx| {
                let (dout, x) =
                    (&dout[rows.start * width..rows.end * width], &x[rows.start * inputs..rows.end * inputs]);
                rows::activation_backward(kind, dx, dout, x, width);
            });
        });
    }

    fn add(&self, out: &mut Vec<f32>, x: &Vec<f32>, branch: &Vec<f32>, len: usize) {
        self.pool.install(|| {
            let pieces = out[..len]
                .par_chunks_mut(BLOCK)
                .zip(x[..len].par_chunks(BLOCK))
                .zip(branch[..len].par_chunks(BLOCK));
            pieces.for_each(|((out, x), branch)| rows::add(out, x, branch));
        });
    }

    fn scale(&self, x: &mut Vec<f32>, factor: f64, len: usize) {
        let pieces = x[..len].par_chunks_mut(BLOCK);
        self.pool.install(|| pieces.for_each(|x| rows::scale(x, factor as f32)));
    }

    fn dropout(&self, x: &mut Vec<f32>, width: usize, dropout: Dropout<'_>) {
        self.pool.install(|| {
            by_rows(x, width, dropout.paths.len(), |rows, x| {
                for (row, x) in rows.zip(x.chunks_exact_mut(width)) {
                    for (column, x) in x.iter_mut().enumerate() {
                        *x *= dropout.factor(row, column) as f32;
                    }
                }
            });
        });
    }

    fn head(
        &self,
        aside: Aside<'_, Vec<f32>>,
        hidden: &Vec<f32>,
        weight: &Weight,
        targets: &[Target],
        shape: Head,
    ) -> HeadOutput {
        self.pool.install(|| head::forward(aside, hidden, weight, targets, shape))
    }

    fn head_backward(
        &self,
        dhidden: &mut Vec<f32>,
        dweight: &mut Vec<f32>,
        logits: &mut Vec<f32>,
        hidden: &Vec<f32>,
        weight: &Weight,
        loss: Loss<'_>,
        shape: Head,
        add: bool,
    ) {
        self.pool.install(|| head::backward(dhidden, dweight, logits, hidden, weight, loss, shape, add));
    }

    fn head_backward_frozen(
        &self,
        dhidden: &mut Vec<f32>,
        mean: &Vec<f32>,
        weight: &Weight,
        loss: Loss<'_>,
        shape: Head,
    ) {
        head::backward_frozen(dhidden, mean, weight, loss, shape);
    }

    fn sums_of_squares(&self, x: &Vec<f32>, range: Range<usize>) -> Vec<f64> {
        self.pool.install(|| x[range].par_chunks(BLOCK).map(rows::sum_of_squares).collect())
    }

    fn adamw(
        &self,
        parameter: &mut Vec<f32>,
        gradient: &Vec<f32>,
        [m, v]: [&mut Vec<f32>; 2],
        update: AdamW,
    ) {
        self.pool.install(|| {
            let span = update.from..update.from + m.len();
            let moments = m.par_chunks_mut(BLOCK).zip(v.par_chunks_mut(BLOCK));
            let values = parameter[span.clone()].par_chunks_mut(BLOCK).zip(gradient[span].par_chunks(BLOCK));
            values.zip(moments).for_each(|((p, g), (m, v))| rows::adamw(p, g, m, v, update));
        });
    }

    fn adamw_weight(
        &self,
        parameter: &mut Weight,
        gradient: &Vec<f32>,
        [m, v]: [&mut Vec<f32>; 2],
        update: AdamW,
    ) {
        match parameter {
            Weight::F32(values) => self.adamw(values, gradient, [m, v], update),
            Weight::Bf16 { upper, lower: Some(lower) } => self.pool.install(|| {
                let (from, span) = (update.from, update.from..update.from + m.len());
                let moments = m.par_chunks_mut(BLOCK).zip(v.par_chunks_mut(BLOCK));
                let halves = upper[span.clone()].par_chunks_mut(BLOCK);
                let halves = halves.zip(lower[span.clone()].par_chunks_mut(BLOCK));
                let pieces = halves.zip(gradient[span].par_chunks(BLOCK)).zip(moments).enumerate();
                pieces.for_each(|(i, (((upper, lower), g), (m, v)))| {
                    rows::adamw_halves([upper, lower], g, [m, v], from + i * BLOCK, update);
                });
            }),
            Weight::Bf16 { lower: None, .. } | Weight::Quantised { .. } => {
                unreachable!("a frozen matrix has no gradient")
            }
        }
    }
}

impl Cpu {
    /// `x` after the dropout of adapters; itself without.
    fn dropped<'a>(&self, x: &'a [f32], shape: LowRank<'_>) -> Cow<'a, [f32]> {
        let Some(dropout) = shape.dropout else { return Cow::Borrowed(x) };
        let Linear { rows, inputs, .. } = shape.dense;
        let mut x = x[..rows * inputs].to_vec();
        self.dropout(&mut x, inputs, dropout);
        Cow::Owned(x)
    }

    fn rotate(&self, qkv: &mut [f32], cos: &[f32], sin: &[f32], heads: Heads, rows: usize, direction: f32) {
        let half = heads.width / 2;
        self.pool.install(|| {
            by_rows(qkv, heads.fused(), rows, |rows, qkv| {
                let angles = rows.start * half..rows.end * half;
                rows::rotate(qkv, &cos[angles.clone()], &sin[angles], heads, direction);
            });
        });
    }
}
