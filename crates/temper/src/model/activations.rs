//! The buffers of the decoder's forward and backward, allocated once for the largest micro-batch. Shapes are named as in
//! the decoder.

use temper_kernels::{Activation, Device};

use super::Config;
use super::config::Family;
use super::spec::Spec;
use super::weights::{Block, Dense, Weights};

/// Logits that a head keeps for its backward, at most: 256 MiB of them. The others it computes again: four
/// products of their size instead of three.
pub const LOGITS: usize = 64 << 20;

/// What the backward of a layer needs.
#[derive(Debug)]
pub(super) struct Saved<B, K> {
    /// q, k before their norms, `[T, A]`; only where heads are normed.
    pub(super) raw: Option<B>,
    /// q, k, v after norms and rotation, `[T, A]`, put aside.
    pub(super) qkv: K,
    /// Output of attention, `[T, D]`, put aside.
    pub(super) attended: K,
    /// Log-sum-exp of its scores, `[T, H]`.
    pub(super) lse: B,
    /// Residual stream before the layer, `[T, C]`, exchanged: exact, whatever products round.
    pub(super) stream: B,
    /// Residual stream between attention and MLP, `[T, C]`, likewise.
    pub(super) middle: B,
    /// What attention and the MLP made, `[T, C]`, exchanged; only where it is normed.
    pub(super) branches: Option<[B; 2]>,
    /// Input of the nonlinearity, `[T, 2F]` or `[T, F]`, put aside: about half of all that is kept.
    pub(super) up: K,
    /// What the adapters' A made, `[T, R]`.
    pub(super) low: Low<B>,
}

/// Rows of low rank, one buffer for each dense layer of a block; no columns where there are no adapters.
#[derive(Debug)]
pub(super) struct Low<B> {
    pub(super) qkv: B,
    pub(super) output: B,
    pub(super) up: B,
    pub(super) down: B,
}

impl<B> Low<B> {
    /// For any of these blocks: not all need have the same adapters.
    fn new(blocks: &[Block<Spec>], buffer: impl Fn(usize) -> B) -> Low<B> {
        let columns = |dense: &Dense<Spec>| dense.adapter.as_ref().map_or(0, |adapter| adapter.a.shape[0]);
        let widest = |dense: fn(&Block<Spec>) -> &Dense<Spec>| {
            buffer(blocks.iter().map(|block| columns(dense(block))).max().unwrap_or(0))
        };
        Low {
            qkv: widest(|block| &block.qkv),
            output: widest(|block| &block.output),
            up: widest(|block| &block.up),
            down: widest(|block| &block.down),
        }
    }
}

/// Buffers of a forward pass, allocated once for the largest micro-batch.
#[derive(Debug)]
pub struct Activations<B, K> {
    /// Whether a backward will follow.
    pub(super) training: bool,
    /// One a layer; a single one without backward.
    pub(super) saved: Vec<Saved<B, K>>,
    /// Residual stream before a layer, `[T, C]`, and after the last, `[R, C]`.
    pub(super) stream: B,
    /// Residual stream between attention and MLP, `[T, C]`.
    pub(super) middle: B,
    /// q, k, v, `[T, A]`.
    pub(super) qkv: B,
    /// Output of attention, `[T, D]`.
    pub(super) attended: B,
    /// Input of the nonlinearity, `[T, 2F]` or `[T, F]`.
    pub(super) up: B,
    /// Normed rows, `[T, C]`.
    pub(super) normed: B,
    /// What a branch adds, `[T, C]`.
    pub(super) branch: B,
    /// Output of the nonlinearity, `[T, F]`.
    pub(super) inner: B,
    /// Residual stream and output of attention at target rows of the last layer, `[R, C]` and `[R, D]`.
    pub(super) target_stream: B,
    pub(super) target_attended: B,
    /// What the head takes, `[R, C]`.
    pub(super) hidden: B,
    /// Logits of a trained head, put aside.
    pub(super) logits: B,
    /// The mean of the head's rows by probability, `[R, C]`; no columns where the head is trained.
    pub(super) mean: B,
    /// Cosine and sine of the angles of each row, `[T, head_width / 2]`, of each rotary embedding.
    pub(super) angles: Vec<[B; 2]>,
}

/// The same on a device.
pub type ActivationsOn<D> = Activations<<D as Device>::Buffer, <D as Device>::Kept>;

/// Gradients of activations, buffers of a backward pass.
#[derive(Debug)]
pub struct Gradients<B> {
    /// Of the residual stream, `[T, C]`.
    pub(super) stream: B,
    /// Of a branch and of normed rows, `[T, C]`.
    pub(super) branch: B,
    pub(super) normed: B,
    /// Of the nonlinearity's output and input.
    pub(super) inner: B,
    pub(super) up: B,
    /// Of attention's output and of q, k, v.
    pub(super) attended: B,
    pub(super) qkv: B,
    /// Of the rows the head saw, `[R, C]`.
    pub(super) hidden: B,
    /// Of the stream and of attention's output at target rows of the last layer.
    pub(super) target_stream: B,
    pub(super) target_attended: B,
    /// Of what the adapters' A made, `[T, R]` of the widest.
    pub(super) low: B,
    /// A dense layer's output again, where DoRA's magnitudes need it, of the widest.
    pub(super) again: B,
}

impl<B, K> Activations<B, K> {
    /// Buffers for so many rows, and what is put aside, made by their length; the backward of `training` needs more of them.
    pub fn new(
        c: &Config,
        specs: &Weights<Spec>,
        rows: usize,
        training: bool,
        make: impl Fn(usize) -> B,
        keep: impl Fn(usize) -> K,
    ) -> Activations<B, K> {
        let (buffer, kept) = (|columns| make(rows * columns), |columns| keep(rows * columns));
        let logits = if training && specs.head().trained { LOGITS.min(rows * c.vocabulary) } else { 0 };
        let (together, aside) = if training { (1, 1) } else { (c.layers.len().max(1), 0) };
        let (attended, up) = (c.heads * c.head_width, c.mlp_width * nonlinearity(c).inputs());
        let saved = |blocks: &[Block<Spec>]| Saved {
            raw: c.qk_norm.then(|| buffer(c.qkv_width())),
            qkv: kept(aside * c.qkv_width()),
            attended: kept(aside * attended),
            lse: buffer(c.heads),
            stream: buffer(aside * c.width),
            middle: buffer(aside * c.width),
            branches: (c.family == Family::Gemma3).then(|| [(); 2].map(|()| buffer(aside * c.width))),
            up: kept(aside * up),
            low: Low::new(blocks, &buffer),
        };
        Activations {
            training,
            saved: specs.blocks.chunks(together).map(saved).collect(),
            stream: buffer(c.width),
            middle: buffer(c.width),
            qkv: buffer(c.qkv_width()),
            attended: buffer(attended),
            up: buffer(up),
            normed: buffer(c.width),
            branch: buffer(c.width),
            inner: buffer(c.mlp_width),
            target_stream: buffer(c.width),
            target_attended: buffer(attended),
            hidden: buffer(c.width),
            logits: make(logits),
            mean: buffer(if training && !specs.head().trained { c.width } else { 0 }),
            angles: c.rotaries().iter().map(|_| [(); 2].map(|()| buffer(c.head_width / 2))).collect(),
        }
    }
}

impl<B> Gradients<B> {
    /// Buffers for so many rows, made by their length.
    pub fn new(c: &Config, specs: &Weights<Spec>, rows: usize, make: impl Fn(usize) -> B) -> Gradients<B> {
        let buffer = |columns| make(rows * columns);
        let dense = || specs.blocks.iter().flat_map(|b| [&b.qkv, &b.output, &b.up, &b.down]);
        let low = dense().filter_map(|dense| Some(dense.adapter.as_ref()?.a.shape[0])).max();
        let scaled =
            |dense: &Dense<Spec>| dense.adapter.as_ref()?.magnitude.as_ref().map(|_| dense.weight.shape[0]);
        let again = dense().filter_map(scaled).max();
        Gradients {
            stream: buffer(c.width),
            branch: buffer(c.width),
            normed: buffer(c.width),
            inner: buffer(c.mlp_width),
            up: buffer(c.mlp_width * nonlinearity(c).inputs()),
            attended: buffer(c.heads * c.head_width),
            qkv: buffer(c.qkv_width()),
            hidden: buffer(c.width),
            target_stream: buffer(c.width),
            target_attended: buffer(c.heads * c.head_width),
            low: buffer(low.unwrap_or(0)),
            again: buffer(again.unwrap_or(0)),
        }
    }
}

/// The nonlinearity of a family's MLP.
pub(super) fn nonlinearity(config: &Config) -> Activation {
    match config.family {
        Family::Gpt2 => Activation::GeluTanh,
        Family::Gemma3 => Activation::GeGluTanh,
        _ => Activation::SwiGlu,
    }
}
