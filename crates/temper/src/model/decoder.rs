//! The decoder, forward and backward, for every family.
//!
//! Shapes: `T` rows of a micro-batch, `R` target rows, `C` width, `A` columns of fused q, k, v, `H` heads,
//! `D` columns of all heads, `F` MLP width. The backward keeps, of each layer, what a product made or a
//! softmax needs; norms and nonlinearities are computed again: they are one pass over rows already in cache.
//!
//! Past its attention the last layer goes on with the target rows alone: nobody looks at the others.
//!
//! With adapters the model's own weights are frozen: nothing is computed for their gradients, and the backward ends at
//! the first layer in which something is trained.

use std::mem::swap;

use temper_kernels::{
    Aside, Attention, Columns, Device, Dropout, Head, HeadOutput, Heads, Linear, LowRank, Norm, NormKind, mix,
};

use super::activations::{Activations, ActivationsOn, Gradients, nonlinearity};
use super::config::{Positions, RopeScaling};
use super::pieces::{Blocks, Pieces};
use super::spec::{Spec, specs};
use super::weights::{self, Adapter, AdapterOn, Block, BlockOn, Dense, DenseOn, Parameters, Weights};
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
    /// Angle of one position for each pair of a head, `[head_width / 2]`; empty for learned positions.
    frequencies: Vec<f64>,
}

/// Told a unit of the gradients when nothing will be added to it any more.
pub type Ready<'a, B> = dyn FnMut(usize, &mut Weights<Option<B>>) + 'a;

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
enum Site {
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
    fn at<'a>(&self, layer: usize, site: Site, paths: &'a [u64]) -> Option<Dropout<'a>> {
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
        let (frequencies, specs) = (frequencies(&config), specs(&config));
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

    fn heads(&self) -> Heads {
        Heads { query: self.config.heads, key: self.config.kv_heads, width: self.config.head_width }
    }

    /// Rows of this number, of which the dropout of a layer has these paths.
    fn rows<'a>(&self, count: usize, paths: &'a [u64]) -> Rows<'a> {
        Rows { count, paths, norm: self.norm_shape(count), dense: self.dense_shapes(count) }
    }

    fn norm_shape(&self, rows: usize) -> Norm {
        let kind = if self.config.is_gpt2() { NormKind::Layer } else { NormKind::Rms };
        Norm { kind, epsilon: self.config.norm_epsilon, rows, width: self.config.width }
    }

    /// The dense layers of a block, in the order of the forward pass.
    fn dense_shapes(&self, rows: usize) -> [Linear; 4] {
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
        a: &mut ActivationsOn<D>,
    ) {
        let (t, c) = (forest.rows(), &self.config);
        let (all, target_paths) = (self.rows(t, &forest.paths), forest.target_paths());
        let targets = self.rows(forest.target_rows.len(), &target_paths);
        self.write_angles(device, forest, a);
        device.embed(&mut a.stream, &self.weights.embedding, &forest.tokens, c.width, false);
        if let Some(positions) = &self.weights.positions {
            device.embed(&mut a.stream, positions, &forest.positions, c.width, true);
        }
        if let Some(dropout) = dropout.at(0, Site::Embedding, all.paths) {
            device.dropout(&mut a.stream, c.width, dropout);
        }
        let slots = a.saved.len();
        let mut blocks = Blocks::new(self, device, 0..c.layers);
        while let Some((layer, w)) = blocks.next() {
            let s = &mut a.saved[layer % slots];
            let (Rows { norm, dense: [qkv, ..], .. }, at) = (all, |site| dropout.at(layer, site, all.paths));

            let (gain, bias) = (&w.attention_norm.gain, w.attention_norm.bias.as_ref());
            device.norm(&mut a.normed, &a.stream, gain, bias, norm); // [T, C]
            self.apply(device, &w.qkv, &mut a.qkv, &a.normed, &mut s.low.qkv, qkv, at(Site::Qkv)); // [T, A]
            if let (Some([q, k]), Some(raw)) = (&w.head_norms, &mut s.raw) {
                device.copy(raw, &a.qkv, t * c.qkv_width());
                device.head_norm(&mut a.qkv, [q, k], self.heads(), t, c.norm_epsilon);
            }
            if !self.frequencies.is_empty() {
                device.rope(&mut a.qkv, &a.cos, &a.sin, self.heads(), t);
            }
            let attention = Attention {
                heads: self.heads(),
                segments: &forest.segments,
                window: c.sliding_window,
                dropout: at(Site::Attention),
            };
            match &mut cache {
                None => device.attention(
                    &mut a.attended,
                    &mut s.lse,
                    Columns::fused(&a.qkv, self.heads()),
                    attention,
                ),
                Some(cache) => {
                    let out = [&mut a.attended, &mut s.lse];
                    self.attend_cached(device, out, &mut cache.layers[layer], &a.qkv, attention);
                }
            } // [T, D]
            if a.training {
                device.keep(&mut s.qkv, &mut a.qkv, t * qkv.outputs);
            }

            let last = layer + 1 == c.layers;
            let Rows { count: t, paths, norm, dense: [_, output, up, down] } =
                if last { targets } else { all };
            let at = |site| dropout.at(layer, site, paths);
            if last {
                device.gather(&mut a.target_attended, &a.attended, &forest.target_rows, output.inputs);
                device.gather(&mut a.target_stream, &a.stream, &forest.target_rows, c.width);
            }
            let (attended, stream) =
                if last { (&a.target_attended, &a.target_stream) } else { (&a.attended, &a.stream) };
            self.apply(
                device,
                &w.output,
                &mut a.branch,
                attended,
                &mut s.low.output,
                output,
                at(Site::Output),
            ); // [T, C]
            if let Some(dropout) = at(Site::AttentionBranch) {
                device.dropout(&mut a.branch, c.width, dropout);
            }
            device.add(&mut a.middle, stream, &a.branch, t * c.width); // [T, C]
            if a.training {
                device.keep(&mut s.attended, &mut a.attended, all.count * output.inputs);
                swap(&mut s.stream, &mut a.stream);
            }

            device.norm(&mut a.normed, &a.middle, &w.mlp_norm.gain, w.mlp_norm.bias.as_ref(), norm); // [T, C]
            let kind = nonlinearity(c);
            self.apply(device, &w.up, &mut a.up, &a.normed, &mut s.low.up, up, at(Site::Up)); // [T, 2F]
            device.activation(kind, &mut a.inner, &a.up, t, c.mlp_width); // [T, F]
            self.apply(device, &w.down, &mut a.branch, &a.inner, &mut s.low.down, down, at(Site::Down)); // [T, C]
            if let Some(dropout) = at(Site::MlpBranch) {
                device.dropout(&mut a.branch, c.width, dropout);
            }
            device.add(&mut a.stream, &a.middle, &a.branch, t * c.width); // [T, C]
            if a.training {
                device.keep(&mut s.up, &mut a.up, t * up.outputs);
                swap(&mut s.middle, &mut a.middle);
            }
        }
        let (gain, bias) = (&self.weights.norm.gain, self.weights.norm.bias.as_ref());
        device.norm(&mut a.hidden, &a.stream, gain, bias, targets.norm); // [R, C]
    }

    /// Adds to `dw` the gradient of `Σ coefficient · logp` over the forest's targets, after a forward
    /// pass that kept its activations and [`Decoder::head_before_backward`], which gave `log_sum_exp`. Without `add`, the
    /// gradients of dense layers and of the head are written. `ready` is told each unit of
    /// [`Weights::unit_mut`] whose gradients have all been added, the last block's first.
    pub fn backward(
        &self,
        device: &D,
        forest: &Forest,
        dropout: StepDropout,
        coefficients: &[f64],
        log_sum_exp: &[f64],
        a: &mut ActivationsOn<D>,
        g: &mut Gradients<D::Buffer>,
        dw: &mut Weights<Option<D::Buffer>>,
        add: bool,
        ready: &mut Ready<'_, D::Buffer>,
    ) {
        let (c, paths) = (&self.config, &forest.paths[..]);
        let first = first_trained(dw);

        let (head, targets, shape) = (self.weights.head(), &forest.targets, self.head_shape(forest));
        match dw.head_mut() {
            Some(dhead) => device.head_backward(
                &mut g.hidden,
                dhead,
                &mut a.logits,
                &a.hidden,
                head,
                targets,
                coefficients,
                log_sum_exp,
                shape,
                add,
            ),
            None => device.head_backward_frozen(&mut g.hidden, &a.mean, head, targets, coefficients, shape),
        }
        let norm = self.norm_shape(forest.target_rows.len());
        device.clear(&mut g.stream);
        norm_backward(device, &self.weights.norm, &mut dw.norm, &mut g.stream, &g.hidden, &a.stream, norm);
        let mut blocks = Blocks::new(self, device, (0..c.layers).rev());
        while let Some((layer, w)) = blocks.next() {
            let goes_on = self.block_backward(
                device,
                layer,
                &w,
                forest,
                dropout,
                first,
                a,
                g,
                &mut dw.blocks[layer],
                add,
            );
            ready(layer, dw);
            if !goes_on {
                return ready(c.layers, dw);
            }
        }
        if let Some(dropout) = dropout.at(0, Site::Embedding, paths) {
            device.dropout(&mut g.stream, c.width, dropout);
        }
        if let Some(dembedding) = &mut dw.embedding {
            device.gather_backward(dembedding, &g.stream, &forest.tokens, c.width);
        }
        if let Some(Some(dpositions)) = &mut dw.positions {
            device.gather_backward(dpositions, &g.stream, &forest.positions, c.width);
        }
        ready(c.layers, dw);
    }

    /// The backward of one block: `g.stream` becomes the gradient of its input. False when nothing before it is trained.
    fn block_backward(
        &self,
        device: &D,
        layer: usize,
        w: &BlockOn<D>,
        forest: &Forest,
        dropout: StepDropout,
        first: Option<(usize, Place)>,
        a: &mut ActivationsOn<D>,
        g: &mut Gradients<D::Buffer>,
        dw: &mut Block<Option<D::Buffer>>,
        add: bool,
    ) -> bool {
        let c = &self.config;
        let (all, target_paths) = (self.rows(forest.rows(), &forest.paths), forest.target_paths());
        let targets = self.rows(forest.target_rows.len(), &target_paths);
        let s = &mut a.saved[layer];

        let last = layer + 1 == c.layers;
        let Rows { count: t, paths, norm, dense: [_, output, up, down] } = if last { targets } else { all };
        let at = |site| dropout.at(layer, site, paths);
        let before = |place| first < Some((layer, place));

        device.copy(&mut g.branch, &g.stream, t * c.width);
        if let Some(dropout) = at(Site::MlpBranch) {
            device.dropout(&mut g.branch, c.width, dropout);
        }
        let kind = nonlinearity(c);
        device.recall(&mut a.up, &mut s.up, t * up.outputs);
        device.activation(kind, &mut a.inner, &a.up, t, c.mlp_width);
        let dx = before(Place::Down).then_some(&mut g.inner);
        let room = Room { low: &mut s.low.down, dlow: &mut g.low, again: &mut g.again };
        let dropped = at(Site::Down);
        self.apply_backward(
            device,
            &w.down,
            &mut dw.down,
            dx,
            &mut g.branch,
            &a.inner,
            down,
            dropped,
            add,
            room,
        );
        if !before(Place::Down) {
            return false;
        }
        device.activation_backward(kind, &mut g.up, &g.inner, &a.up, t, c.mlp_width);
        swap(&mut s.middle, &mut a.middle);
        device.norm(&mut a.normed, &a.middle, &w.mlp_norm.gain, w.mlp_norm.bias.as_ref(), norm);
        let dx = before(Place::Up).then_some(&mut g.normed);
        let room = Room { low: &mut s.low.up, dlow: &mut g.low, again: &mut g.again };
        let dropped = at(Site::Up);
        self.apply_backward(device, &w.up, &mut dw.up, dx, &mut g.up, &a.normed, up, dropped, add, room);
        if !before(Place::Up) {
            return false;
        }
        norm_backward(device, &w.mlp_norm, &mut dw.mlp_norm, &mut g.stream, &g.normed, &a.middle, norm);
        if !before(Place::MlpNorm) {
            return false;
        }

        device.copy(&mut g.branch, &g.stream, t * c.width);
        if let Some(dropout) = at(Site::AttentionBranch) {
            device.dropout(&mut g.branch, c.width, dropout);
        }
        device.recall(&mut a.attended, &mut s.attended, all.count * output.inputs);
        if last {
            device.gather(&mut a.target_attended, &a.attended, &forest.target_rows, output.inputs);
        }
        let attended = if last { &a.target_attended } else { &a.attended };
        let dattended = if last { &mut g.target_attended } else { &mut g.attended };
        let dx = before(Place::Output).then_some(dattended);
        let room = Room { low: &mut s.low.output, dlow: &mut g.low, again: &mut g.again };
        let dropped = at(Site::Output);
        self.apply_backward(
            device,
            &w.output,
            &mut dw.output,
            dx,
            &mut g.branch,
            attended,
            output,
            dropped,
            add,
            room,
        );
        if !before(Place::Output) {
            return false;
        }
        if last {
            device.clear(&mut g.attended);
            device.gather_backward(&mut g.attended, &g.target_attended, &forest.target_rows, output.inputs);
            swap(&mut g.stream, &mut g.target_stream);
            device.clear(&mut g.stream);
            device.gather_backward(&mut g.stream, &g.target_stream, &forest.target_rows, c.width);
        }

        let Rows { count: t, norm, dense: [qkv, ..], .. } = all;
        let at = |site| dropout.at(layer, site, all.paths);
        let attention = Attention {
            heads: self.heads(),
            segments: &forest.segments,
            window: c.sliding_window,
            dropout: at(Site::Attention),
        };
        device.recall(&mut a.qkv, &mut s.qkv, t * qkv.outputs);
        device.attention_backward(&mut g.qkv, &g.attended, &a.qkv, &a.attended, &s.lse, attention);
        if !self.frequencies.is_empty() {
            device.rope_backward(&mut g.qkv, &a.cos, &a.sin, self.heads(), t);
        }
        if let (Some([q, k]), Some(raw)) = (&w.head_norms, &s.raw) {
            let dgains = match &mut dw.head_norms {
                Some([Some(dq), Some(dk)]) => Some([dq, dk]),
                _ => None,
            };
            device.head_norm_backward(&mut g.qkv, dgains, raw, [q, k], self.heads(), t, c.norm_epsilon);
        }
        swap(&mut s.stream, &mut a.stream);
        device.norm(&mut a.normed, &a.stream, &w.attention_norm.gain, w.attention_norm.bias.as_ref(), norm);
        let dx = before(Place::Qkv).then_some(&mut g.normed);
        let room = Room { low: &mut s.low.qkv, dlow: &mut g.low, again: &mut g.again };
        let dropped = at(Site::Qkv);
        self.apply_backward(device, &w.qkv, &mut dw.qkv, dx, &mut g.qkv, &a.normed, qkv, dropped, add, room);
        if !before(Place::Qkv) {
            return false;
        }
        norm_backward(
            device,
            &w.attention_norm,
            &mut dw.attention_norm,
            &mut g.stream,
            &g.normed,
            &a.stream,
            norm,
        );
        before(Place::AttentionNorm)
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

    /// The logits of every target row, `[R, V]`, after [`Decoder::forward`]: for sampling.
    pub fn logits(&self, device: &D, forest: &Forest, a: &ActivationsOn<D>) -> Vec<f32> {
        let Head { rows, width, vocabulary } = self.head_shape(forest);
        let shape = Linear { rows, inputs: width, outputs: vocabulary };
        let mut out = device.zeros(shape.rows * shape.outputs);
        device.linear(&mut out, &a.hidden, self.weights.head(), None, shape);
        device.download(&out).into_owned()
    }

    fn head_shape(&self, forest: &Forest) -> Head {
        Head { rows: forest.target_rows.len(), width: self.config.width, vocabulary: self.config.vocabulary }
    }

    /// Angles of every row's position.
    fn write_angles(&self, device: &D, forest: &Forest, a: &mut ActivationsOn<D>) {
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
        [out, lse]: [&mut D::Buffer; 2],
        cache: &mut D::Buffer,
        qkv: &D::Buffer,
        attention: Attention<'_>,
    ) {
        let heads = self.heads();
        let (columns, stride) = (2 * heads.key * heads.width, heads.fused());
        for segment in attention.segments {
            let from = segment.rows.start * stride + heads.keys();
            device.copy_columns(
                (&mut *cache, segment.own * columns, columns),
                (qkv, from, stride),
                segment.rows.len(),
                columns,
            );
        }
        let q = Columns { buffer: qkv, start: 0, stride };
        let k = Columns { buffer: &*cache, start: 0, stride: columns };
        let v = Columns { buffer: &*cache, start: heads.key * heads.width, stride: columns };
        device.attention(out, lse, [q, k, v], attention);
    }

    /// `out = x Wᵀ + b`, with the layer's adapters.
    fn apply(
        &self,
        device: &D,
        dense: &DenseOn<D>,
        out: &mut D::Buffer,
        x: &D::Buffer,
        low: &mut D::Buffer,
        shape: Linear,
        dropout: Option<Dropout<'_>>,
    ) {
        let bias = dense.bias.as_ref();
        let Some((adapter, shape)) = self.adapter(dense, shape, dropout) else {
            return device.linear(out, x, &dense.weight, bias, shape);
        };
        let bias_first = bias.filter(|_| adapter.magnitude.is_none());
        device.linear(out, x, &dense.weight, bias_first, shape.dense);
        device.low_rank(out, low, x, &adapter.a, &adapter.b, shape);
        if let Some([magnitude, norms]) = &adapter.magnitude {
            device.magnitude(out, magnitude, norms, bias, shape);
        }
    }

    /// `dx = …` where it is wanted, and the gradients of what is trained; `dout` may be scaled on the way.
    fn apply_backward(
        &self,
        device: &D,
        dense: &DenseOn<D>,
        gradient: &mut Dense<Option<D::Buffer>>,
        mut dx: Option<&mut D::Buffer>,
        dout: &mut D::Buffer,
        x: &D::Buffer,
        shape: Linear,
        dropout: Option<Dropout<'_>>,
        add: bool,
        room: Room<'_, D::Buffer>,
    ) {
        let Room { low, dlow, again } = room;
        let mut adapted = self.adapter(dense, shape, dropout).zip(gradient.adapter.as_mut());
        if let Some(((adapter, shape), dadapter)) = &mut adapted
            && let (Some([magnitude, norms]), Some([Some(dmagnitude), _])) =
                (&adapter.magnitude, &mut dadapter.magnitude)
        {
            // Keeping these outputs of every layer would nearly double the activations.
            device.linear(again, x, &dense.weight, None, shape.dense);
            device.low_rank(again, low, x, &adapter.a, &adapter.b, *shape);
            device.magnitude_backward(dout, dmagnitude, again, magnitude, norms, *shape);
        }
        let (dweight, dbias) = (gradient.weight.as_mut(), gradient.bias.as_mut().and_then(Option::as_mut));
        device.linear_backward(dx.as_deref_mut(), dweight, dbias, dout, x, &dense.weight, shape, add);
        if let Some(((adapter, shape), Adapter { a: Some(da), b: db, .. })) = adapted {
            let mut db: Vec<&mut D::Buffer> = db.iter_mut().flatten().collect();
            device.low_rank_backward(dx, da, &mut db, dlow, dout, x, low, &adapter.a, &adapter.b, shape);
        }
    }

    /// A dense layer's adapters, when they count, and their shape.
    fn adapter<'a>(
        &self,
        dense: &'a DenseOn<D>,
        shape: Linear,
        dropout: Option<Dropout<'a>>,
    ) -> Option<(&'a AdapterOn<D>, LowRank<'a>)> {
        let (lora, adapter) = (self.lora.as_ref().filter(|_| self.adapters_on)?, dense.adapter.as_ref()?);
        let parts = &adapter.parts;
        let shape = LowRank { dense: shape, parts, rank: lora.rank, scale: lora.scale(), dropout };
        Some((adapter, shape))
    }

    /// Computes again the norms that DoRA divides by, after adapters have changed.
    pub fn refresh_norms(&mut self, device: &D) {
        let Some(lora) = &self.lora else { return };
        let shapes = self.dense_shapes(0);
        for block in &mut self.weights.blocks {
            for (dense, shape) in block.dense_mut().into_iter().zip(shapes) {
                if let Some(Adapter { parts, a, b, magnitude: Some([_, norms]) }) = &mut dense.adapter {
                    let (rank, scale) = (lora.rank, lora.scale());
                    let shape = LowRank { dense: shape, parts, rank, scale, dropout: None };
                    device.low_rank_norms(norms, &dense.weight, a, b, shape);
                }
            }
        }
    }

    /// Makes fresh DoRA change nothing.
    pub fn magnitudes_from_norms(&mut self, device: &D) {
        for block in &mut self.weights.blocks {
            for dense in block.dense_mut() {
                if let Some(Adapter { magnitude: Some([magnitude, norms]), .. }) = &mut dense.adapter {
                    device.copy(magnitude, norms, device.len(norms));
                }
            }
        }
    }
}

/// Rows that go through a part of a block.
#[derive(Clone, Copy)]
struct Rows<'a> {
    count: usize,
    /// Hashes of the tokens up to each, for dropout.
    paths: &'a [u64],
    norm: Norm,
    /// The dense layers of a block, in the order of the forward pass.
    dense: [Linear; 4],
}

/// Buffers that the backward of a layer's adapters needs.
struct Room<'a, B> {
    /// What A made in the forward pass.
    low: &'a mut B,
    /// Its gradient.
    dlow: &'a mut B,
    /// The layer's output again.
    again: &'a mut B,
}

fn norm_backward<D: Device>(
    device: &D,
    norm: &weights::Norm<D::Buffer>,
    gradient: &mut weights::Norm<Option<D::Buffer>>,
    dx: &mut D::Buffer,
    dout: &D::Buffer,
    x: &D::Buffer,
    shape: Norm,
) {
    let (dgain, dbias) = (gradient.gain.as_mut(), gradient.bias.as_mut().and_then(Option::as_mut));
    device.norm_backward(dx, dgain, dbias, dout, x, &norm.gain, shape);
}

/// Where in a block parameters are, in the order of the forward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Place {
    AttentionNorm,
    Qkv,
    Output,
    MlpNorm,
    Up,
    Down,
}

/// The first place, with its layer, that has a gradient; none when that is before all blocks.
fn first_trained<B>(dw: &Weights<Option<B>>) -> Option<(usize, Place)> {
    if dw.embedding.is_some() || matches!(dw.positions, Some(Some(_))) {
        return None;
    }
    let norm = |norm: &weights::Norm<Option<B>>| norm.gain.is_some();
    let dense = |dense: &Dense<Option<B>>| dense.weight.is_some() || dense.adapter.is_some();
    let place = |block: &Block<Option<B>>| {
        let heads = matches!(block.head_norms, Some([Some(_), _]));
        let trained = [
            (Place::AttentionNorm, norm(&block.attention_norm)),
            (Place::Qkv, dense(&block.qkv) || heads),
            (Place::Output, dense(&block.output)),
            (Place::MlpNorm, norm(&block.mlp_norm)),
            (Place::Up, dense(&block.up)),
            (Place::Down, dense(&block.down)),
        ];
        trained.into_iter().find(|(_, trained)| *trained).map(|(place, _)| place)
    };
    let mut blocks = dw.blocks.iter().enumerate();
    let first = blocks.find_map(|(layer, block)| Some((layer, place(block)?)));
    Some(first.unwrap_or((dw.blocks.len(), Place::AttentionNorm)))
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
