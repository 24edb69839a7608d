//! The decoder, forward and backward, for every family.
//!
//! Shapes: `T` rows of a micro-batch, `R` target rows, `C` width, `A` columns of fused q, k, v, `H` heads,
//! `D` columns of all heads, `F` MLP width. The backward keeps, of each layer, what a product made or a
//! softmax needs; norms and nonlinearities are computed again: they are one pass over rows already in cache.

use temper_kernels::{
    Activation, Attention, Columns, Device, Dropout, Head, HeadOutput, Heads, Linear, Norm, NormKind, mix,
};

use super::config::{Positions, RopeScaling};
use super::weights::{self, Dense, Parameters, Weights};
use super::{Config, config};
use crate::data::Forest;

/// A decoder on a device.
#[derive(Debug)]
pub struct Decoder<D: Device> {
    /// Its shape.
    pub config: Config,
    /// Its parameters.
    pub weights: Weights<D::Buffer, D::Weight>,
    /// Angle of one position for each pair of a head, `[head_width / 2]`; empty for learned positions.
    frequencies: Vec<f64>,
}

/// Dropout of a step: probabilities and the key of the step's masks.
#[derive(Debug, Clone, Copy, Default)]
pub struct StepDropout {
    /// Probabilities.
    pub p: config::Dropout,
    /// Hash of seed and step.
    pub key: u64,
}

/// Where dropout happens; part of a mask's key.
#[derive(Debug, Clone, Copy)]
enum Site {
    Embedding,
    Attention,
    AttentionBranch,
    MlpBranch,
}

impl StepDropout {
    fn at<'a>(&self, layer: usize, site: Site, paths: &'a [u64]) -> Option<Dropout<'a>> {
        let p = match site {
            Site::Embedding => self.p.embedding,
            Site::Attention => self.p.attention,
            Site::AttentionBranch | Site::MlpBranch => self.p.residual,
        };
        (p > 0.0).then(|| Dropout { p, key: mix(mix(self.key, layer as u64), site as u64), paths })
    }
}

/// What the backward of a layer needs.
#[derive(Debug)]
struct Saved<B> {
    /// q, k before their norms, `[T, A]`; only where heads are normed.
    raw: Option<B>,
    /// q, k, v after norms and rotation, `[T, A]`.
    qkv: B,
    /// Output of attention, `[T, D]`.
    attended: B,
    /// Log-sum-exp of its scores, `[T, H]`.
    lse: B,
    /// Residual stream between attention and MLP, `[T, C]`.
    middle: B,
    /// Input of the nonlinearity, `[T, 2F]` or `[T, F]`.
    up: B,
}

/// Buffers of a forward pass, allocated once for the largest micro-batch.
#[derive(Debug)]
pub struct Activations<B> {
    /// Residual stream before each layer and after the last, `[T, C]`; two in turn without backward.
    streams: Vec<B>,
    /// One a layer; a single one without backward.
    saved: Vec<Saved<B>>,
    /// Normed rows, `[T, C]`.
    normed: B,
    /// What a branch adds, `[T, C]`.
    branch: B,
    /// Output of the nonlinearity, `[T, F]`.
    inner: B,
    /// The stream at target rows, `[R, C]`, before and after the last norm.
    chosen: B,
    hidden: B,
    /// Angles of each row, `[T, head_width / 2]`.
    cos: B,
    sin: B,
}

/// Gradients of activations, buffers of a backward pass.
#[derive(Debug)]
pub struct Gradients<B> {
    /// Of the residual stream, `[T, C]`.
    stream: B,
    /// Of a branch and of normed rows, `[T, C]`.
    branch: B,
    normed: B,
    /// Of the nonlinearity's output and input.
    inner: B,
    up: B,
    /// Of attention's output and of q, k, v.
    attended: B,
    qkv: B,
    /// Of the rows the head saw, `[R, C]`.
    hidden: B,
    chosen: B,
}

impl<B> Activations<B> {
    /// Buffers made by their number of columns; the backward of `training` needs more of them.
    pub fn new(c: &Config, training: bool, buffer: impl Fn(usize) -> B) -> Activations<B> {
        let layers = if training { c.layers } else { 1 };
        let saved = || Saved {
            raw: c.qk_norm.then(|| buffer(c.qkv_width())),
            qkv: buffer(c.qkv_width()),
            attended: buffer(c.heads * c.head_width),
            lse: buffer(c.heads),
            middle: buffer(c.width),
            up: buffer(c.mlp_width * nonlinearity(c).inputs()),
        };
        Activations {
            streams: (0..layers + 1).map(|_| buffer(c.width)).collect(),
            saved: (0..layers).map(|_| saved()).collect(),
            normed: buffer(c.width),
            branch: buffer(c.width),
            inner: buffer(c.mlp_width),
            chosen: buffer(c.width),
            hidden: buffer(c.width),
            cos: buffer(angles(c)),
            sin: buffer(angles(c)),
        }
    }
}

impl<B> Gradients<B> {
    /// Buffers made by their number of columns.
    pub fn new(c: &Config, buffer: impl Fn(usize) -> B) -> Gradients<B> {
        Gradients {
            stream: buffer(c.width),
            branch: buffer(c.width),
            normed: buffer(c.width),
            inner: buffer(c.mlp_width),
            up: buffer(c.mlp_width * nonlinearity(c).inputs()),
            attended: buffer(c.heads * c.head_width),
            qkv: buffer(c.qkv_width()),
            hidden: buffer(c.width),
            chosen: buffer(c.width),
        }
    }
}

/// The nonlinearity of a family's MLP.
fn nonlinearity(config: &Config) -> Activation {
    if config.is_gpt2() { Activation::GeluTanh } else { Activation::SwiGlu }
}

/// Angles of a position.
fn angles(config: &Config) -> usize {
    match config.positions {
        Positions::Rotary { .. } => config.head_width / 2,
        Positions::Learned => 0,
    }
}

/// Keys and values of every layer: `[rows, 2 · kv_heads · head_width]`, keys first.
#[derive(Debug)]
pub struct Cache<B> {
    layers: Vec<B>,
}

impl<D: Device> Decoder<D> {
    /// A decoder with these parameters.
    pub fn new(config: Config, weights: Parameters<D>) -> Decoder<D> {
        let frequencies = frequencies(&config);
        Decoder { config, weights, frequencies }
    }

    fn heads(&self) -> Heads {
        Heads { query: self.config.heads, key: self.config.kv_heads, width: self.config.head_width }
    }

    fn norm_shape(&self, rows: usize) -> Norm {
        let kind = if self.config.is_gpt2() { NormKind::Layer } else { NormKind::Rms };
        Norm { kind, epsilon: self.config.norm_epsilon, rows, width: self.config.width }
    }

    fn linear_shape(&self, rows: usize, [inputs, outputs]: [usize; 2]) -> Linear {
        Linear { rows, inputs, outputs }
    }

    /// Buffers for micro-batches of up to `rows` rows; with `training`, those the backward needs.
    pub fn activations(&self, device: &D, rows: usize, training: bool) -> Activations<D::Buffer> {
        Activations::new(&self.config, training, |columns| device.zeros(rows * columns))
    }

    /// Buffers of the backward for micro-batches of up to `rows` rows.
    pub fn gradients(&self, device: &D, rows: usize) -> Gradients<D::Buffer> {
        Gradients::new(&self.config, |columns| device.zeros(rows * columns))
    }

    /// A zero for every parameter: gradients to add to.
    pub fn zeros(&self, device: &D) -> Weights<D::Buffer> {
        weights::specs(&self.config).map(|spec| device.zeros(spec.len()))
    }

    /// A cache of `rows` keys and values.
    pub fn cache(&self, device: &D, rows: usize) -> Cache<D::Buffer> {
        let columns = 2 * self.config.kv_heads * self.config.head_width;
        Cache { layers: (0..self.config.layers).map(|_| device.zeros(rows * columns)).collect() }
    }

    /// From tokens to the normed rows that the head takes, `a.hidden: [R, C]`. With a cache, new keys and
    /// values go to it and the segments' key rows count in it.
    pub fn forward(
        &self,
        device: &D,
        forest: &Forest,
        dropout: StepDropout,
        mut cache: Option<&mut Cache<D::Buffer>>,
        a: &mut Activations<D::Buffer>,
    ) {
        let (t, c) = (forest.rows(), &self.config);
        let paths = &forest.paths[..];
        let norm = self.norm_shape(t);
        self.write_angles(device, forest, a);
        device.embed(&mut a.streams[0], &self.weights.embedding, &forest.tokens, c.width, false);
        if let Some(positions) = &self.weights.positions {
            device.embed(&mut a.streams[0], positions, &forest.positions, c.width, true);
        }
        if let Some(dropout) = dropout.at(0, Site::Embedding, paths) {
            device.dropout(&mut a.streams[0], c.width, dropout);
        }
        let (streams, slots) = (a.streams.len(), a.saved.len());
        for (layer, w) in self.weights.blocks.iter().enumerate() {
            let s = &mut a.saved[layer % slots];
            let (stream, next) = (layer % streams, (layer + 1) % streams);

            device.norm(
                &mut a.normed,
                &a.streams[stream],
                &w.attention_norm.gain,
                w.attention_norm.bias.as_ref(),
                norm,
            ); // [T, C]
            apply(device, &w.qkv, &mut s.qkv, &a.normed, self.linear_shape(t, [c.width, c.qkv_width()])); // [T, A]
            if let (Some([q, k]), Some(raw)) = (&w.head_norms, &mut s.raw) {
                device.copy(raw, &s.qkv, t * c.qkv_width());
                device.head_norm(&mut s.qkv, [q, k], self.heads(), t, c.norm_epsilon);
            }
            if !self.frequencies.is_empty() {
                device.rope(&mut s.qkv, &a.cos, &a.sin, self.heads(), t);
            }
            let attention = Attention {
                heads: self.heads(),
                segments: &forest.segments,
                window: c.sliding_window,
                dropout: dropout.at(layer, Site::Attention, paths),
            };
            match &mut cache {
                None => device.attention(
                    &mut s.attended,
                    &mut s.lse,
                    Columns::fused(&s.qkv, self.heads()),
                    attention,
                ),
                Some(cache) => self.attend_cached(device, &mut cache.layers[layer], s, attention),
            } // [T, D]
            apply(
                device,
                &w.output,
                &mut a.branch,
                &s.attended,
                self.linear_shape(t, [c.heads * c.head_width, c.width]),
            ); // [T, C]
            if let Some(dropout) = dropout.at(layer, Site::AttentionBranch, paths) {
                device.dropout(&mut a.branch, c.width, dropout);
            }
            device.add(&mut s.middle, &a.streams[stream], &a.branch, t * c.width);

            device.norm(&mut a.normed, &s.middle, &w.mlp_norm.gain, w.mlp_norm.bias.as_ref(), norm); // [T, C]
            let kind = nonlinearity(c);
            apply(
                device,
                &w.up,
                &mut s.up,
                &a.normed,
                self.linear_shape(t, [c.width, c.mlp_width * kind.inputs()]),
            ); // [T, 2F]
            device.activation(kind, &mut a.inner, &s.up, t, c.mlp_width); // [T, F]
            apply(device, &w.down, &mut a.branch, &a.inner, self.linear_shape(t, [c.mlp_width, c.width])); // [T, C]
            if let Some(dropout) = dropout.at(layer, Site::MlpBranch, paths) {
                device.dropout(&mut a.branch, c.width, dropout);
            }
            device.add(&mut a.streams[next], &s.middle, &a.branch, t * c.width);
        }
        device.gather(&mut a.chosen, &a.streams[c.layers % streams], &forest.target_rows, c.width); // [R, C]
        let (gain, bias) = (&self.weights.norm.gain, self.weights.norm.bias.as_ref());
        device.norm(&mut a.hidden, &a.chosen, gain, bias, self.norm_shape(forest.target_rows.len())); // [R, C]
    }

    /// Adds to `dw` the gradient of `Σ coefficient · logp` over the forest's targets, after a forward
    /// pass that kept its activations and whose head gave `log_sum_exp`.
    pub fn backward(
        &self,
        device: &D,
        forest: &Forest,
        dropout: StepDropout,
        coefficients: &[f64],
        log_sum_exp: &[f64],
        a: &mut Activations<D::Buffer>,
        g: &mut Gradients<D::Buffer>,
        dw: &mut Weights<D::Buffer>,
    ) {
        let (t, c) = (forest.rows(), &self.config);
        let paths = &forest.paths[..];
        let norm = self.norm_shape(t);
        let chosen_norm = self.norm_shape(forest.target_rows.len());

        device.head_backward(
            &mut g.hidden,
            dw.head_mut(),
            &a.hidden,
            self.weights.head(),
            &forest.targets,
            coefficients,
            log_sum_exp,
            self.head_shape(forest),
        );
        device.clear(&mut g.chosen);
        device.norm_backward(
            &mut g.chosen,
            &mut dw.norm.gain,
            dw.norm.bias.as_mut(),
            &g.hidden,
            &a.chosen,
            &self.weights.norm.gain,
            chosen_norm,
        );
        device.clear(&mut g.stream);
        device.gather_backward(&mut g.stream, &g.chosen, &forest.target_rows, c.width);
        for (layer, (w, dw)) in self.weights.blocks.iter().zip(&mut dw.blocks).enumerate().rev() {
            let s = &mut a.saved[layer];

            device.copy(&mut g.branch, &g.stream, t * c.width);
            if let Some(dropout) = dropout.at(layer, Site::MlpBranch, paths) {
                device.dropout(&mut g.branch, c.width, dropout);
            }
            let kind = nonlinearity(c);
            device.activation(kind, &mut a.inner, &s.up, t, c.mlp_width);
            apply_backward(
                device,
                &w.down,
                &mut dw.down,
                &mut g.inner,
                &g.branch,
                &a.inner,
                self.linear_shape(t, [c.mlp_width, c.width]),
            );
            device.activation_backward(kind, &mut g.up, &g.inner, &s.up, t, c.mlp_width);
            device.norm(&mut a.normed, &s.middle, &w.mlp_norm.gain, w.mlp_norm.bias.as_ref(), norm);
            apply_backward(
                device,
                &w.up,
                &mut dw.up,
                &mut g.normed,
                &g.up,
                &a.normed,
                self.linear_shape(t, [c.width, c.mlp_width * kind.inputs()]),
            );
            device.norm_backward(
                &mut g.stream,
                &mut dw.mlp_norm.gain,
                dw.mlp_norm.bias.as_mut(),
                &g.normed,
                &s.middle,
                &w.mlp_norm.gain,
                norm,
            );

            device.copy(&mut g.branch, &g.stream, t * c.width);
            if let Some(dropout) = dropout.at(layer, Site::AttentionBranch, paths) {
                device.dropout(&mut g.branch, c.width, dropout);
            }
            apply_backward(
                device,
                &w.output,
                &mut dw.output,
                &mut g.attended,
                &g.branch,
                &s.attended,
                self.linear_shape(t, [c.heads * c.head_width, c.width]),
            );
            let attention = Attention {
                heads: self.heads(),
                segments: &forest.segments,
                window: c.sliding_window,
                dropout: dropout.at(layer, Site::Attention, paths),
            };
            device.attention_backward(&mut g.qkv, &g.attended, &s.qkv, &s.attended, &s.lse, attention);
            if !self.frequencies.is_empty() {
                device.rope_backward(&mut g.qkv, &a.cos, &a.sin, self.heads(), t);
            }
            if let (Some([q, k]), Some([dq, dk]), Some(raw)) = (&w.head_norms, &mut dw.head_norms, &s.raw) {
                device.head_norm_backward(&mut g.qkv, [dq, dk], raw, [q, k], self.heads(), t, c.norm_epsilon);
            }
            let stream = &a.streams[layer];
            device.norm(&mut a.normed, stream, &w.attention_norm.gain, w.attention_norm.bias.as_ref(), norm);
            apply_backward(
                device,
                &w.qkv,
                &mut dw.qkv,
                &mut g.normed,
                &g.qkv,
                &a.normed,
                self.linear_shape(t, [c.width, c.qkv_width()]),
            );
            device.norm_backward(
                &mut g.stream,
                &mut dw.attention_norm.gain,
                dw.attention_norm.bias.as_mut(),
                &g.normed,
                stream,
                &w.attention_norm.gain,
                norm,
            );
        }
        if let Some(dropout) = dropout.at(0, Site::Embedding, paths) {
            device.dropout(&mut g.stream, c.width, dropout);
        }
        device.gather_backward(&mut dw.embedding, &g.stream, &forest.tokens, c.width);
        if let Some(dpositions) = &mut dw.positions {
            device.gather_backward(dpositions, &g.stream, &forest.positions, c.width);
        }
    }

    /// Log-probabilities of the forest's targets after [`Decoder::forward`].
    pub fn head(&self, device: &D, forest: &Forest, a: &Activations<D::Buffer>) -> HeadOutput {
        device.head(&a.hidden, self.weights.head(), &forest.targets, self.head_shape(forest))
    }

    /// The logits of every target row, `[R, V]`, after [`Decoder::forward`]: for sampling.
    pub fn logits(&self, device: &D, forest: &Forest, a: &Activations<D::Buffer>) -> Vec<f32> {
        let shape = self.linear_shape(forest.target_rows.len(), [self.config.width, self.config.vocabulary]);
        let mut out = device.zeros(shape.rows * shape.outputs);
        device.linear(&mut out, &a.hidden, self.weights.head(), None, shape);
        device.download(&out).into_owned()
    }

    fn head_shape(&self, forest: &Forest) -> Head {
        Head { rows: forest.target_rows.len(), width: self.config.width, vocabulary: self.config.vocabulary }
    }

    /// Angles of every row's position.
    fn write_angles(&self, device: &D, forest: &Forest, a: &mut Activations<D::Buffer>) {
        let angles = forest
            .positions
            .iter()
            .flat_map(|&position| self.frequencies.iter().map(move |f| f64::from(position) * f));
        let (sin, cos): (Vec<f64>, Vec<f64>) = angles.map(f64::sin_cos).unzip();
        device.write(&mut a.cos, 0, &cos);
        device.write(&mut a.sin, 0, &sin);
    }

    /// Moves the new keys and values into the cache and attends to it.
    fn attend_cached(
        &self,
        device: &D,
        cache: &mut D::Buffer,
        s: &mut Saved<D::Buffer>,
        attention: Attention<'_>,
    ) {
        let heads = self.heads();
        let (columns, stride) = (2 * heads.key * heads.width, heads.fused());
        for segment in attention.segments {
            let from = segment.rows.start * stride + heads.keys();
            device.copy_columns(
                (&mut *cache, segment.own * columns, columns),
                (&s.qkv, from, stride),
                segment.rows.len(),
                columns,
            );
        }
        let q = Columns { buffer: &s.qkv, start: 0, stride };
        let k = Columns { buffer: &*cache, start: 0, stride: columns };
        let v = Columns { buffer: &*cache, start: heads.key * heads.width, stride: columns };
        device.attention(&mut s.attended, &mut s.lse, [q, k, v], attention);
    }

    /// Reads the parameters of a checkpoint, to be `trained` or only to be used.
    ///
    /// # Errors
    /// When its configuration or its tensors do not make a model.
    pub fn load(
        device: &D,
        checkpoint: &crate::checkpoint::Checkpoint,
        trained: bool,
    ) -> crate::Result<Decoder<D>> {
        let config = Config::from_json(&checkpoint.config)?;
        let weights = weights::load(device, checkpoint, &config, trained)?;
        Ok(Decoder::new(config, weights))
    }

    /// A decoder with fresh parameters.
    pub fn initialise(device: &D, config: Config, seed: u64) -> Decoder<D> {
        let weights = weights::initialise(device, &config, seed);
        Decoder::new(config, weights)
    }
}

fn apply<D: Device>(
    device: &D,
    dense: &Dense<D::Buffer, D::Weight>,
    out: &mut D::Buffer,
    x: &D::Buffer,
    shape: Linear,
) {
    device.linear(out, x, &dense.weight, dense.bias.as_ref(), shape);
}

fn apply_backward<D: Device>(
    device: &D,
    dense: &Dense<D::Buffer, D::Weight>,
    gradient: &mut Dense<D::Buffer>,
    dx: &mut D::Buffer,
    dout: &D::Buffer,
    x: &D::Buffer,
    shape: Linear,
) {
    device.linear_backward(dx, &mut gradient.weight, gradient.bias.as_mut(), dout, x, &dense.weight, shape);
}

/// Angle a position turns each pair of a head: `theta^(−2i / head_width)`, scaled.
fn frequencies(config: &Config) -> Vec<f64> {
    let Positions::Rotary { theta, scaling } = config.positions else { return Vec::new() };
    let plain = (0..config.head_width / 2).map(|i| theta.powf(-2.0 * i as f64 / config.head_width as f64));
    plain
        .map(|frequency| match scaling {
            RopeScaling::None => frequency,
            RopeScaling::Linear { factor } => frequency / factor,
            RopeScaling::Llama3 {
                factor,
                low_frequency_factor: low,
                high_frequency_factor: high,
                original_context,
            } => {
                let turns = original_context as f64 * frequency / std::f64::consts::TAU;
                let smooth = ((turns - low) / (high - low)).clamp(0.0, 1.0);
                (1.0 - smooth) * frequency / factor + smooth * frequency
            }
        })
        .collect()
}
