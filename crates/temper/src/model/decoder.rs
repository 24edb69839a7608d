//! The decoder, forward and backward, for every family.
//!
//! Shapes: `T` rows of a micro-batch, `R` target rows, `C` width, `A` columns of fused q, k, v, `H` heads,
//! `D` columns of all heads, `F` MLP width. The backward keeps, of each layer, what a product made or a
//! softmax needs; norms and nonlinearities are computed again: they are one pass over rows already in cache.
//!
//! With adapters the model's own weights are frozen: nothing is computed for their gradients, and the backward ends at
//! the first layer in which something is trained.

use temper_kernels::{Aside, Device, Dropout, Head, HeadOutput, Heads, Linear, Loss, Norm, NormKind, mix};

use super::activations::{Activations, ActivationsOn, Gradients, nonlinearity};
use super::block::{Backward, Pass, first_trained, norm_backward, norm_forward};
use super::config::Family;
use super::pieces::{Blocks, Pieces};
use super::rotary::Rotary;
use super::spec::{Spec, specs};
use super::weights::{Parameters, Weights};
use super::{Config, Lora, config};
use crate::data::Forest;

/// A decoder on a device.
#[derive(Debug)]
pub struct Decoder<D: Device> {
    /// Its shape.
    pub config: Config,
    /// Its parameters.
    pub weights: Parameters<D>,
    /// What they are called, and which are trained.
    pub specs: Weights<Spec>,
    /// The adapters among them.
    pub lora: Option<Lora>,
    /// Whether the adapters count; without them the model is its base.
    pub adapters_on: bool,
    /// The parameters, when they lie in pieces on several ranks; `weights` then has both ends while they are needed.
    pub pieces: Option<Pieces<D>>,
    /// How far one position turns each pair of a head, `[head_width / 2]`, for each of [`Config::rotaries`].
    pub(super) frequencies: Vec<(Rotary, Vec<f64>)>,
}

/// Where a backward pass leaves the gradients of what is trained.
pub struct ParameterGradients<'a, B> {
    /// Of each parameter.
    pub sums: &'a mut Weights<Option<B>>,
    /// Whether those of dense layers and of the head are added to the sums or written there; all others are added.
    pub add: bool,
    /// Told each unit of [`Weights::unit_mut`] when nothing will be added to it any more, the last block first.
    pub ready: &'a mut dyn FnMut(usize, &mut Weights<Option<B>>),
}

/// Dropout of a step: probabilities and the key of the step's masks.
#[derive(Debug, Clone, Copy, Default)]
pub struct StepDropout {
    /// Probabilities.
    pub p: config::Dropout,
    /// Probability at the input of adapters.
    pub adapter: f64,
    /// Hash of seed and step.
    pub key: u64,
}

/// Where dropout happens; part of a mask's key.
#[derive(Debug, Clone, Copy)]
pub(super) enum Site {
    Embedding,
    Attention,
    AttentionBranch,
    MlpBranch,
    Qkv,
    Output,
    Up,
    Down,
}

impl StepDropout {
    /// Of a site in a layer, for rows with these paths.
    pub(super) fn at<'a>(&self, layer: usize, site: Site, paths: &'a [u64]) -> Option<Dropout<'a>> {
        let p = match site {
            Site::Embedding => self.p.embedding,
            Site::Attention => self.p.attention,
            Site::AttentionBranch | Site::MlpBranch => self.p.residual,
            Site::Qkv | Site::Output | Site::Up | Site::Down => self.adapter,
        };
        (p > 0.0).then(|| Dropout { p, key: mix(mix(self.key, layer as u64), site as u64), paths })
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
        let of = |rotary: Rotary| (rotary, rotary.frequencies(config.head_width));
        let frequencies = config.rotaries().into_iter().map(of).collect();
        let specs = specs(&config);
        Decoder { config, weights, specs, lora: None, adapters_on: true, pieces: None, frequencies }
    }

    /// A decoder with these parameters, some of them adapters.
    pub fn adapted(
        device: &D,
        config: &Config,
        lora: &Lora,
        specs: Weights<Spec>,
        weights: Parameters<D>,
    ) -> Decoder<D> {
        let lora = lora.clone();
        let new = Decoder::new(lora.config(config), weights);
        let mut decoder = Decoder { specs, lora: Some(lora), ..new };
        decoder.refresh_norms(device);
        decoder
    }

    pub(super) fn heads(&self) -> Heads {
        Heads { query: self.config.heads, key: self.config.kv_heads, width: self.config.head_width }
    }

    /// A norm of as many rows, or heads, of this width.
    pub(super) fn norm_shape(&self, rows: usize, width: usize) -> Norm {
        let kind = match self.config.family {
            Family::Gpt2 => NormKind::Layer,
            Family::Gemma3 => NormKind::RmsFromOne,
            _ => NormKind::Rms,
        };
        Norm { kind, epsilon: self.config.norm_epsilon, rows, width }
    }

    /// The dense layers of a block, in the order of the forward pass.
    pub(super) fn dense_shapes(&self, rows: usize) -> [Linear; 4] {
        let c = &self.config;
        let linear = |inputs, outputs| Linear { rows, inputs, outputs };
        [
            linear(c.width, c.qkv_width()),
            linear(c.heads * c.head_width, c.width),
            linear(c.width, c.mlp_width * nonlinearity(c).inputs()),
            linear(c.mlp_width, c.width),
        ]
    }

    /// Buffers for micro-batches of up to `rows` rows; with `training`, those the backward needs.
    pub fn activations(&self, device: &D, rows: usize, training: bool) -> ActivationsOn<D> {
        let (buffer, kept) = (|len| device.zeros(len), |len| device.kept(len));
        Activations::new(&self.config, &self.specs, rows, training, buffer, kept)
    }

    /// Buffers of the backward for micro-batches of up to `rows` rows.
    pub fn gradients(&self, device: &D, rows: usize) -> Gradients<D::Buffer> {
        Gradients::new(&self.config, &self.specs, rows, |len| device.zeros(len))
    }

    /// Zeros for every trained parameter: gradients to add to.
    pub fn zeros(&self, device: &D) -> Weights<Option<D::Buffer>> {
        self.specs.map(|spec| spec.trained.then(|| device.zeros(spec.len())))
    }

    /// A cache of `rows` keys and values.
    pub fn cache(&self, device: &D, rows: usize) -> Cache<D::Buffer> {
        let columns = 2 * self.config.kv_heads * self.config.head_width;
        Cache { layers: self.config.layers.iter().map(|_| device.zeros(rows * columns)).collect() }
    }

    /// From tokens to the normed rows that the head takes, `a.hidden: [R, C]`. With a cache, new keys and
    /// values go to it and the segments' key rows count in it.
    pub fn forward(
        &self,
        device: &D,
        forest: &Forest,
        dropout: StepDropout,
        mut cache: Option<&mut Cache<D::Buffer>>,
        a: &mut ActivationsOn<D>,
    ) {
        let (c, pass) = (&self.config, Pass::new(forest, dropout));
        self.write_angles(device, forest, a);
        device.embed(&mut a.stream, &self.weights.embedding, &forest.tokens, c.width, false);
        if c.embedding_scale != 1.0 {
            device.scale(&mut a.stream, c.embedding_scale, forest.rows() * c.width);
        }
        if let Some(positions) = &self.weights.positions {
            device.embed(&mut a.stream, positions, &forest.positions, c.width, true);
        }
        if let Some(dropout) = dropout.at(0, Site::Embedding, &forest.paths) {
            device.dropout(&mut a.stream, c.width, dropout);
        }
        let mut blocks = Blocks::new(self, device, 0..c.layers.len());
        while let Some((layer, w)) = blocks.next() {
            let keys = cache.as_deref_mut().map(|cache| &mut cache.layers[layer]);
            self.block(device, layer, &w, &pass, keys, a);
        }
        let shape = self.norm_shape(forest.target_rows.len(), c.width);
        norm_forward(device, &mut a.hidden, &a.stream, &self.weights.norm, shape); // [R, C]
    }

    /// The gradient of `Σ coefficient · logp` over the forest's targets, after a forward pass that kept its activations and
    /// [`Decoder::head_before_backward`], which gave `log_sum_exp`.
    pub fn backward(
        &self,
        device: &D,
        forest: &Forest,
        dropout: StepDropout,
        coefficients: &[f64],
        log_sum_exp: &[f64],
        a: &mut ActivationsOn<D>,
        g: &mut Gradients<D::Buffer>,
        ParameterGradients { sums: dw, add, ready }: ParameterGradients<'_, D::Buffer>,
    ) {
        let c = &self.config;
        let backward = Backward { pass: Pass::new(forest, dropout), first: first_trained(dw), add };

        let (head, shape) = (self.weights.head(), self.head_shape(forest));
        let loss = Loss { targets: &forest.targets, coefficients, log_sum_exp };
        match dw.head_mut() {
            Some(dhead) => {
                let logits = &mut a.logits;
                device.head_backward(&mut g.hidden, dhead, logits, &a.hidden, head, loss, shape, add);
            }
            None => device.head_backward_frozen(&mut g.hidden, &a.mean, head, loss, shape),
        }
        let norm = self.norm_shape(forest.target_rows.len(), c.width);
        device.clear(&mut g.stream);
        norm_backward(device, &self.weights.norm, &mut dw.norm, &mut g.stream, &g.hidden, &a.stream, norm);
        let mut blocks = Blocks::new(self, device, (0..c.layers.len()).rev());
        while let Some((layer, w)) = blocks.next() {
            let dblock = &mut dw.blocks[layer];
            let goes_on = self.block_backward(device, layer, &w, &backward, a, g, dblock);
            ready(layer, dw);
            if !goes_on {
                return ready(c.layers.len(), dw);
            }
        }
        if let Some(dropout) = dropout.at(0, Site::Embedding, &forest.paths) {
            device.dropout(&mut g.stream, c.width, dropout);
        }
        if let Some(Some(dpositions)) = &mut dw.positions {
            device.gather_backward(dpositions, &g.stream, &forest.positions, c.width);
        }
        if let Some(dembedding) = &mut dw.embedding {
            if c.embedding_scale != 1.0 {
                device.scale(&mut g.stream, c.embedding_scale, forest.rows() * c.width);
            }
            device.gather_backward(dembedding, &g.stream, &forest.tokens, c.width);
        }
        ready(c.layers.len(), dw);
    }

    /// Log-probabilities of the forest's targets after [`Decoder::forward`].
    pub fn head(&self, device: &D, forest: &Forest, a: &ActivationsOn<D>) -> HeadOutput {
        let shape = self.head_shape(forest);
        device.head(Aside::Nothing, &a.hidden, self.weights.head(), &forest.targets, shape)
    }

    /// The same, and puts aside what [`Decoder::backward`] takes of the head.
    pub fn head_before_backward(&self, device: &D, forest: &Forest, a: &mut ActivationsOn<D>) -> HeadOutput {
        let trained = self.specs.head().trained;
        let aside = if trained { Aside::Logits(&mut a.logits) } else { Aside::Mean(&mut a.mean) };
        device.head(aside, &a.hidden, self.weights.head(), &forest.targets, self.head_shape(forest))
    }

    /// The logits of every target row, `[R, V]`, after [`Decoder::forward`]: for sampling. `out` may be longer.
    pub fn logits(&self, device: &D, out: &mut D::Buffer, forest: &Forest, a: &ActivationsOn<D>) {
        let Head { rows, width, vocabulary } = self.head_shape(forest);
        let shape = Linear { rows, inputs: width, outputs: vocabulary };
        device.linear(out, &a.hidden, self.weights.head(), None, shape);
    }

    fn head_shape(&self, forest: &Forest) -> Head {
        Head { rows: forest.target_rows.len(), width: self.config.width, vocabulary: self.config.vocabulary }
    }

    /// Which of the rotary embeddings a layer has.
    pub(super) fn rotary(&self, layer: usize) -> Option<usize> {
        let rotary = self.config.layers[layer].rotary?;
        self.frequencies.iter().position(|(known, _)| *known == rotary)
    }

    /// Writes the angles of every row's position.
    fn write_angles(&self, device: &D, forest: &Forest, a: &mut ActivationsOn<D>) {
        for ((_, frequencies), [cos, sin]) in self.frequencies.iter().zip(&mut a.angles) {
            let of_row = |&position: &u32| frequencies.iter().map(move |f| f64::from(position) * f);
            let angles = forest.positions.iter().flat_map(of_row);
            let (sines, cosines): (Vec<f64>, Vec<f64>) = angles.map(f64::sin_cos).unzip();
            device.write(cos, 0, &cosines);
            device.write(sin, 0, &sines);
        }
    }
}
