//! The list of operations that a device offers, and the small shapes they take.
//!
//! Conventions: an output written by `=` is named first; gradients of parameters are added (`+=`), so that micro-batches
//! accumulate, but those of dense layers and heads are written without `add`, which saves clearing them; gradients of
//! activations say which.

use std::borrow::Cow;
use std::fmt::Debug;
use std::ops::{Add, Range};

use crate::quants::Blocks;

/// A dense layer `out = x Wᵀ + b` with `x: [rows, inputs]`, `W: [outputs, inputs]`, `out: [rows, outputs]`.
#[derive(Debug, Clone, Copy)]
pub struct Linear {
    /// Rows of `x` and `out`.
    pub rows: usize,
    /// Columns of `x`.
    pub inputs: usize,
    /// Columns of `out`.
    pub outputs: usize,
}

/// A low-rank adapter of some columns of a dense layer.
#[derive(Debug, Clone, PartialEq)]
pub struct Part {
    /// The columns of `out` that it adds to.
    pub columns: Range<usize>,
    /// Its rows of `A`, as many as its rank.
    pub low: Range<usize>,
    /// Factor of the product.
    pub scale: f64,
}

/// Low-rank adapters of a dense layer (Hu et al. 2021, arXiv 2106.09685): each part has a `B: [columns, rank]`; one
/// `A: [R, inputs]` holds the rows of all, one part's below the other's.
#[derive(Debug, Clone, Copy)]
pub struct LowRank<'a> {
    /// The dense layer.
    pub dense: Linear,
    /// The adapters.
    pub parts: &'a [Part],
    /// Dropout of `x`, the same for all parts.
    pub dropout: Option<Dropout<'a>>,
}

impl LowRank<'_> {
    /// `R`, columns of `low`.
    pub fn low(&self) -> usize {
        self.parts.last().map_or(0, |part| part.low.end)
    }

    /// All adapted columns of `out`, with their place among the adapted ones.
    pub fn columns(&self) -> impl Iterator<Item = (usize, usize)> {
        self.parts
            .iter()
            .flat_map(|part| part.columns.clone())
            .enumerate()
            .map(|(place, column)| (column, place))
    }
}

/// Which norm.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormKind {
    /// `(x − mean) / sqrt(variance + ε) · gain + bias`.
    Layer,
    /// `x / sqrt(mean(x²) + ε) · gain` (Zhang & Sennrich 2019, arXiv 1910.07467).
    Rms,
    /// The same with `1 + gain` (Gemma).
    RmsFromOne,
}

impl NormKind {
    /// What the normed values are multiplied with.
    pub(crate) fn factors<T: Copy + From<u8> + Add<Output = T>>(self, gains: &[T]) -> Cow<'_, [T]> {
        match self {
            NormKind::Layer | NormKind::Rms => Cow::Borrowed(gains),
            NormKind::RmsFromOne => gains.iter().map(|&gain| T::from(1) + gain).collect(),
        }
    }
}

/// A norm over each of `rows` rows of `width` columns.
#[derive(Debug, Clone, Copy)]
pub struct Norm {
    /// Which norm.
    pub kind: NormKind,
    /// Added to the variance.
    pub epsilon: f64,
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub width: usize,
}

/// The heads inside a fused row `[q: heads·width | k: kv_heads·width | v: kv_heads·width]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heads {
    /// Query heads.
    pub query: usize,
    /// Key and value heads; query head `i` reads key head `i / (query / key)`.
    pub key: usize,
    /// Columns of a head.
    pub width: usize,
}

impl Heads {
    /// Columns of the attention's output.
    pub fn output(&self) -> usize {
        self.query * self.width
    }

    /// Columns of a fused row, `A`.
    pub fn fused(&self) -> usize {
        (self.query + 2 * self.key) * self.width
    }

    /// Column where the keys begin.
    pub fn keys(&self) -> usize {
        self.query * self.width
    }

    /// Column where the values begin.
    pub fn values(&self) -> usize {
        (self.query + self.key) * self.width
    }
}

/// A run of query rows and the keys they see: every row of `context` (the ancestors, root first), then of
/// their own run, which begins at key row `own`, the first `i + 1` for query `i`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    /// Query rows.
    pub rows: Range<usize>,
    /// Key rows seen whole, in the order of the path.
    pub context: Vec<Range<usize>>,
    /// Key row of the first query.
    pub own: usize,
}

impl Segment {
    /// Depth of the first query: the number of keys before its own run.
    pub fn depth(&self) -> usize {
        self.context.iter().map(ExactSizeIterator::len).sum()
    }
}

/// Dropout of one site: an element is kept with probability `1 − p` and then scaled by `1 / (1 − p)`.
///
/// Whether it is kept is a function of `key`, the row's path and the column alone, so that the mask does not
/// depend on how sequences are batched.
#[derive(Debug, Clone, Copy)]
pub struct Dropout<'a> {
    /// Probability of dropping, in `[0, 1)`.
    pub p: f64,
    /// Hash of seed, step, layer and site.
    pub key: u64,
    /// Hash of the tokens up to each row, `[T]`.
    pub paths: &'a [u64],
}

impl Dropout<'_> {
    /// The factor of an element: 0 or `1 / (1 − p)`.
    #[inline]
    pub fn factor(&self, row: usize, column: usize) -> f64 {
        let draw = crate::uniform(crate::mix(self.key, self.paths[row]), column as u64);
        if draw < self.p { 0.0 } else { 1.0 / (1.0 - self.p) }
    }
}

/// Attention over a forest of segments.
#[derive(Debug, Clone, Copy)]
pub struct Attention<'a> {
    /// The heads of a row.
    pub heads: Heads,
    /// The queries and what they see.
    pub segments: &'a [Segment],
    /// A query sees at most this many keys, itself included.
    pub window: Option<usize>,
    /// Dropout of the probabilities; column `head << 32 | depth of the key`.
    pub dropout: Option<Dropout<'a>>,
}

/// Columns of a buffer whose rows are `stride` apart.
#[derive(Debug)]
pub struct Columns<'a, B> {
    /// The buffer.
    pub buffer: &'a B,
    /// First column.
    pub start: usize,
    /// Distance of rows.
    pub stride: usize,
}

impl<'a, B> Columns<'a, B> {
    /// Queries, keys and values of a fused buffer `[T, A]`.
    pub fn fused(buffer: &'a B, heads: Heads) -> [Columns<'a, B>; 3] {
        let stride = heads.fused();
        [0, heads.keys(), heads.values()].map(|start| Columns { buffer, start, stride })
    }
}

/// The nonlinearity of the MLP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `silu(gate) · up` of a row `[gate: width | up: width]` (Shazeer 2020, arXiv 2002.05202).
    SwiGlu,
    /// `gelu_new(gate) · up` of such a row (likewise).
    GeGluTanh,
    /// `gelu_new`, the tanh form (Hendrycks & Gimpel 2016, arXiv 1606.08415).
    GeluTanh,
}

impl Activation {
    /// Columns that go in for each column that comes out.
    pub fn inputs(self) -> usize {
        match self {
            Activation::SwiGlu | Activation::GeGluTanh => 2,
            Activation::GeluTanh => 1,
        }
    }
}

/// A token whose log-probability is wanted at a row of the head's input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Target {
    /// Row of `hidden`. Targets are ordered by it; a row may have several.
    pub row: u32,
    /// The token that follows.
    pub token: u32,
}

/// The shapes of the head: `hidden: [rows, width]`, `weight: [vocabulary, width]`.
#[derive(Debug, Clone, Copy)]
pub struct Head {
    /// Rows of `hidden`.
    pub rows: usize,
    /// Columns of `hidden`.
    pub width: usize,
    /// Rows of `weight`.
    pub vocabulary: usize,
}

/// A loss `Σ coefficient · logp` over the targets of a head.
#[derive(Debug, Clone, Copy)]
pub struct Loss<'a> {
    /// The targets.
    pub targets: &'a [Target],
    /// Of each target.
    pub coefficients: &'a [f64],
    /// Of each row, as [`HeadOutput`] has it.
    pub log_sum_exp: &'a [f64],
}

/// What the head's forward pass puts aside for its backward.
#[derive(Debug)]
pub enum Aside<'a, B> {
    /// No backward follows.
    Nothing,
    /// For [`Device::head_backward`]: logits, as many as there is room for. The others are computed again.
    Logits(&'a mut B),
    /// For [`Device::head_backward_frozen`]: `[rows, width]`, `Σ p(token) · weight[token]` of each row.
    Mean(&'a mut B),
}

/// What the head's forward pass finds in its one walk over the vocabulary.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct HeadOutput {
    /// `log p(token)` of each target.
    pub logp: Vec<f64>,
    /// `log Σ exp(logit)` of each row.
    pub log_sum_exp: Vec<f64>,
    /// Entropy of each row's distribution, in nats.
    pub entropy: Vec<f64>,
    /// The likeliest token of each row.
    pub argmax: Vec<u32>,
}

/// One AdamW update (Loshchilov & Hutter 2017, arXiv 1711.05101, algorithm 2).
#[derive(Debug, Clone, Copy)]
pub struct AdamW {
    /// Step size of this update.
    pub learning_rate: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub epsilon: f64,
    /// Decoupled decay: the parameter shrinks by `learning_rate · weight_decay`.
    pub weight_decay: f64,
    /// Factor on the gradient, from clipping.
    pub scale: f64,
    /// Number of this update, from 1.
    pub step: u64,
    /// The first element to update, a multiple of [`BLOCK`]; as many are as there are moments.
    pub from: usize,
}

/// Elements of the pieces in which sums over a whole buffer are made, so that their order depends on nothing else.
pub const BLOCK: usize = 16 * 1024;

/// A place where buffers live and operations run.
pub trait Device: Sync {
    /// A flat array of reals.
    type Buffer: Debug + Send + Sync;
    /// A matrix of parameters, in the form that products take.
    type Weight: Debug + Send + Sync;
    /// A buffer put aside from the forward pass for the backward, in as few bytes as do no harm.
    type Kept: Debug + Send + Sync;

    /// Runs `f`, which does many operations on at most so many rows: where these are few, threads wait awake in
    /// between.
    fn awake<R: Send>(&self, _rows: usize, f: impl FnOnce() -> R + Send) -> R {
        f()
    }
    /// The results of `f(i)` for each `i` below `count`, in this order; threads of the device call `f` in any. `f` uses
    /// no operation of the device: inside [`Device::awake`] it could wait for the threads that wait for it.
    fn map<T: Send>(&self, count: usize, f: impl Fn(usize) -> T + Sync) -> Vec<T> {
        (0..count).map(f).collect()
    }
    /// A buffer of zeros.
    fn zeros(&self, len: usize) -> Self::Buffer;
    /// Number of elements.
    fn len(&self, buffer: &Self::Buffer) -> usize;
    /// A buffer with these values.
    fn upload(&self, values: Vec<f32>) -> Self::Buffer;
    /// A matrix of zeros. One that is `trained` keeps its values exactly, whatever products take.
    fn weight_zeros(&self, len: usize, trained: bool) -> Self::Weight;
    /// A matrix with these values, likewise.
    fn weight(&self, values: Vec<f32>, trained: bool) -> Self::Weight;
    /// A matrix that is not trained and stays in its blocks, part below part.
    fn quantised(&self, parts: Vec<Blocks>) -> Self::Weight;
    /// The values of a matrix as f32.
    fn weight_values<'a>(&self, weight: &'a Self::Weight) -> Cow<'a, [f32]>;
    /// Elements `range` of them.
    fn weight_values_in<'a>(&self, weight: &'a Self::Weight, range: Range<usize>) -> Cow<'a, [f32]>;
    /// Write values from element `at` on.
    fn write(&self, buffer: &mut Self::Buffer, at: usize, values: &[f64]);
    /// The values as f32.
    fn download<'a>(&self, buffer: &'a Self::Buffer) -> Cow<'a, [f32]>;
    /// `buffer[at + i] = values[i]`.
    fn set_values(&self, buffer: &mut Self::Buffer, at: usize, values: &[f32]);
    /// `buffer[at + i] += values[i]`.
    fn add_values(&self, buffer: &mut Self::Buffer, at: usize, values: &[f32]);
    /// The same as [`Device::set_values`] for a matrix that is not in blocks.
    fn set_weight_values(&self, weight: &mut Self::Weight, at: usize, values: &[f32]);
    /// Set every element to zero.
    fn clear(&self, buffer: &mut Self::Buffer);
    /// Room to put `len` elements aside.
    fn kept(&self, len: usize) -> Self::Kept;
    /// Puts the first `len` elements of `x` aside; `x` may be the buffer that was put aside before.
    fn keep(&self, kept: &mut Self::Kept, x: &mut Self::Buffer, len: usize);
    /// Brings them back, once.
    fn recall(&self, x: &mut Self::Buffer, kept: &mut Self::Kept, len: usize);
    /// `out[..len] = x[..len]`.
    fn copy(&self, out: &mut Self::Buffer, x: &Self::Buffer, len: usize);
    /// `out[to + i·out_stride ..][..width] = x[from + i·x_stride ..][..width]` for `rows` rows; moves the new
    /// keys and values into a cache.
    fn copy_columns(
        &self,
        out: (&mut Self::Buffer, usize, usize),
        x: (&Self::Buffer, usize, usize),
        rows: usize,
        width: usize,
    );

    /// `out[i] = table[indices[i]]` (`+=` when `add`): `out: [indices, width]`, `table: [vocabulary, width]`.
    fn embed(&self, out: &mut Self::Buffer, table: &Self::Weight, indices: &[u32], width: usize, add: bool);
    /// `out[i] = x[indices[i]]`: `out: [indices, width]`, `x: [rows, width]`.
    fn gather(&self, out: &mut Self::Buffer, x: &Self::Buffer, indices: &[u32], width: usize);
    /// `dx[indices[i]] += dout[i]`, of [`Device::embed`] and of [`Device::gather`], in their shapes.
    fn gather_backward(&self, dx: &mut Self::Buffer, dout: &Self::Buffer, indices: &[u32], width: usize);

    /// `out = x Wᵀ + b`: `out: [rows, outputs]`, `x: [rows, inputs]`, `weight: [outputs, inputs]`, `bias: [outputs]`.
    fn linear(
        &self,
        out: &mut Self::Buffer,
        x: &Self::Buffer,
        weight: &Self::Weight,
        bias: Option<&Self::Buffer>,
        shape: Linear,
    );
    /// `dx = dout W`, `dweight = doutᵀ x` (`+=` when `add`), `dbias += Σ dout` over the rows, each in the shape of what
    /// it is the gradient of; what is not wanted is not computed.
    fn linear_backward(
        &self,
        dx: Option<&mut Self::Buffer>,
        dweight: Option<&mut Self::Buffer>,
        dbias: Option<&mut Self::Buffer>,
        dout: &Self::Buffer,
        x: &Self::Buffer,
        weight: &Self::Weight,
        shape: Linear,
        add: bool,
    );

    /// What adapters add to a dense layer, `out[:, part] += scale · (d(x) Aᵀ)[:, part] Bᵀ` for each part, where `d` is
    /// dropout: `out: [rows, outputs]`, `x: [rows, inputs]`, `a: [R, inputs]`, each of `b: [columns, rank]`.
    /// `low: [rows, R]` receives `d(x) Aᵀ` for the backward.
    fn low_rank(
        &self,
        out: &mut Self::Buffer,
        low: &mut Self::Buffer,
        x: &Self::Buffer,
        a: &Self::Weight,
        b: &[Self::Weight],
        shape: LowRank<'_>,
    );
    /// `dlow = scale · dout[:, part] B` for each part, `[rows, R]`; then `db += scale · dout[:, part]ᵀ low`,
    /// `da += dlowᵀ d(x)` and `dx += d(dlow A)`, each in the shape of what it is the gradient of.
    fn low_rank_backward(
        &self,
        dx: Option<&mut Self::Buffer>,
        da: &mut Self::Buffer,
        db: &mut [&mut Self::Buffer],
        dlow: &mut Self::Buffer,
        dout: &Self::Buffer,
        x: &Self::Buffer,
        low: &Self::Buffer,
        a: &Self::Weight,
        b: &[Self::Weight],
        shape: LowRank<'_>,
    );
    /// `norms: [Σ columns]`, the norm of each adapted row of `W + scale · B A`, part after part: what DoRA divides by. Of a
    /// row of zeros, which has no direction, it is the smallest normal number.
    fn low_rank_norms(
        &self,
        norms: &mut Self::Buffer,
        weight: &Self::Weight,
        a: &Self::Weight,
        b: &[Self::Weight],
        shape: LowRank<'_>,
    );
    /// `out = out · magnitude / norms` in the adapted columns, then `+ bias` in all (Liu et al. 2024, arXiv 2402.09353,
    /// equation 5): `out: [rows, outputs]`, `magnitude` and `norms: [Σ columns]`, `bias: [outputs]`.
    fn magnitude(
        &self,
        out: &mut Self::Buffer,
        magnitude: &Self::Buffer,
        norms: &Self::Buffer,
        bias: Option<&Self::Buffer>,
        shape: LowRank<'_>,
    );
    /// `dmagnitude += Σ dout · y / norms` over the rows, where `y: [rows, outputs]` is what [`Device::magnitude`] took;
    /// then `dout = dout · magnitude / norms`. The norms count as constants, as in section 4.3 of the paper.
    fn magnitude_backward(
        &self,
        dout: &mut Self::Buffer,
        dmagnitude: &mut Self::Buffer,
        y: &Self::Buffer,
        magnitude: &Self::Buffer,
        norms: &Self::Buffer,
        shape: LowRank<'_>,
    );

    /// Norm of each row: `out` and `x: [rows, width]`, `gain` and `bias: [width]`.
    fn norm(
        &self,
        out: &mut Self::Buffer,
        x: &Self::Buffer,
        gain: &Self::Buffer,
        bias: Option<&Self::Buffer>,
        shape: Norm,
    );
    /// `dx += …`, `dgain += Σ dout · x̂`, `dbias += Σ dout` over the rows, where `x̂` is the row without gain and bias.
    /// Mean and variance are computed again: a row is in cache anyway.
    fn norm_backward(
        &self,
        dx: &mut Self::Buffer,
        dgain: Option<&mut Self::Buffer>,
        dbias: Option<&mut Self::Buffer>,
        dout: &Self::Buffer,
        x: &Self::Buffer,
        gain: &Self::Buffer,
        shape: Norm,
    );
    /// RMSNorm of every head of q and k of a fused buffer `[rows, A]`, in place (Qwen3, Gemma 3); `gains: [width]` of q's and of
    /// k's heads, and the norm's width is theirs.
    fn head_norm(&self, qkv: &mut Self::Buffer, gains: [&Self::Buffer; 2], heads: Heads, norm: Norm);
    /// Turns the gradient of the normed q and k into that of the raw ones, in place; `raw` is the fused
    /// buffer before [`Device::head_norm`].
    fn head_norm_backward(
        &self,
        dqkv: &mut Self::Buffer,
        dgains: [Option<&mut Self::Buffer>; 2],
        raw: &Self::Buffer,
        gains: [&Self::Buffer; 2],
        heads: Heads,
        norm: Norm,
    );

    /// Rotate the pairs `(i, i + width/2)` of every head of q and k of `[rows, A]` by the angles whose cosine
    /// and sine are in `cos`, `sin`: `[rows, width/2]`. The backward is the rotation by the opposite angle.
    fn rope(&self, qkv: &mut Self::Buffer, cos: &Self::Buffer, sin: &Self::Buffer, heads: Heads, rows: usize);
    /// The inverse rotation of the gradient, in place.
    fn rope_backward(
        &self,
        dqkv: &mut Self::Buffer,
        cos: &Self::Buffer,
        sin: &Self::Buffer,
        heads: Heads,
        rows: usize,
    );

    /// `softmax(QKᵀ/√d) V` over a forest. `out: [T, heads·width]`, `lse: [T, heads]` the log-sum-exp of the
    /// scores, which the backward uses. q, k, v may live in one fused buffer or in a cache.
    fn attention(
        &self,
        out: &mut Self::Buffer,
        lse: &mut Self::Buffer,
        qkv: [Columns<'_, Self::Buffer>; 3],
        shape: Attention<'_>,
    );
    /// `dqkv = …` for a fused buffer `[T, A]`, rows outside all segments untouched; `dout` is `[T, heads·width]` as
    /// `out`. Scores are computed again from `lse` (Dao et al. 2022, arXiv 2205.14135, algorithm 4); no `[T, T]` array
    /// exists.
    fn attention_backward(
        &self,
        dqkv: &mut Self::Buffer,
        dout: &Self::Buffer,
        qkv: &Self::Buffer,
        out: &Self::Buffer,
        lse: &Self::Buffer,
        shape: Attention<'_>,
    );

    /// `out: [rows, width]` from `x: [rows, width · kind.inputs()]`.
    fn activation(
        &self,
        kind: Activation,
        out: &mut Self::Buffer,
        x: &Self::Buffer,
        rows: usize,
        width: usize,
    );
    /// `dx = dout · kind′(x)`, `[rows, width · kind.inputs()]` as `x`.
    fn activation_backward(
        &self,
        kind: Activation,
        dx: &mut Self::Buffer,
        dout: &Self::Buffer,
        x: &Self::Buffer,
        rows: usize,
        width: usize,
    );

    /// `out = x + branch`, the residual stream, `len` elements.
    fn add(&self, out: &mut Self::Buffer, x: &Self::Buffer, branch: &Self::Buffer, len: usize);
    /// `x` times a factor in place, `len` elements; its own backward.
    fn scale(&self, x: &mut Self::Buffer, factor: f64, len: usize);
    /// Dropout of `x: [rows, width]` in place; its own backward.
    fn dropout(&self, x: &mut Self::Buffer, width: usize, dropout: Dropout<'_>);

    /// Log-probability of each target, and each row's entropy and likeliest token, in tiles of the vocabulary: all
    /// logits exist at once only where a backward wants them and there is room.
    fn head(
        &self,
        aside: Aside<'_, Self::Buffer>,
        hidden: &Self::Buffer,
        weight: &Self::Weight,
        targets: &[Target],
        shape: Head,
    ) -> HeadOutput;
    /// `dhidden = dlogits W`, `dweight = dlogitsᵀ hidden` (`+=` when `add`), where `dlogits` of a row is
    /// `Σ coefficient · (onehot(token) − p)` over its targets. `logits`, as the forward put them aside, are used up.
    fn head_backward(
        &self,
        dhidden: &mut Self::Buffer,
        dweight: &mut Self::Buffer,
        logits: &mut Self::Buffer,
        hidden: &Self::Buffer,
        weight: &Self::Weight,
        loss: Loss<'_>,
        shape: Head,
        add: bool,
    );
    /// `dhidden = Σ coefficient · (weight[token] − mean)`, the same of a head that is not trained;
    /// `mean: [rows, width]`.
    fn head_backward_frozen(
        &self,
        dhidden: &mut Self::Buffer,
        mean: &Self::Buffer,
        weight: &Self::Weight,
        loss: Loss<'_>,
        shape: Head,
    );

    /// `Σ x²` of each [`BLOCK`] of a range that begins at a multiple of it.
    fn sums_of_squares(&self, x: &Self::Buffer, range: Range<usize>) -> Vec<f64>;
    /// One AdamW update of a parameter and its moments.
    fn adamw(
        &self,
        parameter: &mut Self::Buffer,
        gradient: &Self::Buffer,
        moments: [&mut Self::Buffer; 2],
        update: AdamW,
    );
    /// The same of a matrix, and the form that products take, in one pass.
    fn adamw_weight(
        &self,
        parameter: &mut Self::Weight,
        gradient: &Self::Buffer,
        moments: [&mut Self::Buffer; 2],
        update: AdamW,
    );
}
