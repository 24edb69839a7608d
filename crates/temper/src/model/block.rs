//! A layer of the decoder, attention and MLP, forward and backward; shapes are named as in [`super::decoder`].
//!
//! Past its attention the last layer goes on with the target rows alone: nobody looks at the others. `P` is the number of
//! rows there, `T` in all layers but the last, which has `R`.

use std::mem::swap;

use temper_kernels::{Attention, Columns, Device, Dropout, Linear, Norm};

use super::Decoder;
use super::activations::{ActivationsOn, Gradients, nonlinearity};
use super::decoder::{Site, StepDropout};
use super::dense::{Room, Through};
use super::weights::{self, Block, BlockOn, Dense, Weights};
use crate::data::Forest;

/// What all layers of a pass share.
pub(super) struct Pass<'a> {
    forest: &'a Forest,
    dropout: StepDropout,
    target_paths: Vec<u64>,
}

impl<'a> Pass<'a> {
    pub(super) fn new(forest: &'a Forest, dropout: StepDropout) -> Pass<'a> {
        Pass { forest, dropout, target_paths: forest.target_paths() }
    }
}

/// A pass backwards.
pub(super) struct Backward<'a> {
    pub(super) pass: Pass<'a>,
    /// The first part with a gradient: nothing is computed before it.
    pub(super) first: Option<(usize, Part)>,
    /// Whether gradients of dense layers are added or written.
    pub(super) add: bool,
}

/// Rows that go through a part of a layer.
#[derive(Clone, Copy)]
struct Rows<'a> {
    layer: usize,
    count: usize,
    dropout: StepDropout,
    /// Hashes of the tokens up to each, for dropout.
    paths: &'a [u64],
    norm: Norm,
    /// The dense layers of a block, in the order of the forward pass.
    dense: [Linear; 4],
}

impl<'a> Rows<'a> {
    fn dropout(&self, site: Site) -> Option<Dropout<'a>> {
        self.dropout.at(self.layer, site, self.paths)
    }

    /// Through a dense layer, whose adapters have their dropout at `site`.
    fn through(&self, shape: Linear, site: Site) -> Through<'a> {
        Through { shape, dropout: self.dropout(site) }
    }
}

/// Where in a layer parameters are, in the order of the forward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Part {
    AttentionNorm,
    Qkv,
    Output,
    OutputNorm,
    MlpNorm,
    Up,
    Down,
    DownNorm,
}

impl<D: Device> Decoder<D> {
    /// Rows of a layer's attention, and past it.
    fn rows<'a>(&self, pass: &'a Pass<'_>, layer: usize) -> [Rows<'a>; 2] {
        let rows = |count, paths| Rows {
            layer,
            count,
            dropout: pass.dropout,
            paths,
            norm: self.norm_shape(count, self.config.width),
            dense: self.dense_shapes(count),
        };
        let all = rows(pass.forest.rows(), &pass.forest.paths[..]);
        let last = layer + 1 == self.config.layers.len();
        [all, if last { rows(pass.forest.target_rows.len(), &pass.target_paths) } else { all }]
    }

    /// Moves the stream through one layer. With a `cache`, its keys and values go there.
    pub(super) fn block(
        &self,
        device: &D,
        layer: usize,
        w: &BlockOn<D>,
        pass: &Pass<'_>,
        cache: Option<&mut D::Buffer>,
        a: &mut ActivationsOn<D>,
    ) {
        let (c, forest) = (&self.config, pass.forest);
        let [all, past] = self.rows(pass, layer);
        let slots = a.saved.len();
        let s = &mut a.saved[layer % slots];
        let Rows { count: t, norm, dense: [qkv, ..], .. } = all;

        // Attention.
        norm_forward(device, &mut a.normed, &a.stream, &w.attention_norm, norm); // [T, C]
        let through = all.through(qkv, Site::Qkv);
        self.apply(device, &w.qkv, &mut a.qkv, &a.normed, &mut s.low.qkv, through); // [T, A]
        if let (Some([q, k]), Some(raw)) = (&w.head_norms, &mut s.raw) {
            device.copy(raw, &a.qkv, t * c.qkv_width());
            device.head_norm(&mut a.qkv, [q, k], self.heads(), self.norm_shape(t, c.head_width));
        }
        if let Some(which) = self.rotary(layer) {
            let [cos, sin] = &a.angles[which];
            device.rope(&mut a.qkv, cos, sin, self.heads(), t);
        }
        let attention = self.attention(forest, all);
        match cache {
            None => {
                device.attention(&mut a.attended, &mut s.lse, Columns::fused(&a.qkv, self.heads()), attention)
            }
            Some(cache) => {
                let out = [&mut a.attended, &mut s.lse];
                self.attend_cached(device, out, cache, &a.qkv, attention);
            }
        } // [T, D]
        if a.training {
            device.keep(&mut s.qkv, &mut a.qkv, t * qkv.outputs);
        }

        // Its output, added to the stream.
        let last = layer + 1 == c.layers.len();
        let Rows { count: p, norm, dense: [_, output, up, down], .. } = past;
        if last {
            device.gather(&mut a.target_attended, &a.attended, &forest.target_rows, output.inputs);
            device.gather(&mut a.target_stream, &a.stream, &forest.target_rows, c.width);
        }
        let (attended, stream) =
            if last { (&a.target_attended, &a.target_stream) } else { (&a.attended, &a.stream) };
        let through = past.through(output, Site::Output);
        self.apply(device, &w.output, &mut a.branch, attended, &mut s.low.output, through); // [P, C]
        if let (Some(own), Some([made, _])) = (&w.output_norm, &mut s.branches) {
            norm_branch(device, own, [&mut a.branch, &mut a.normed], a.training.then_some(made), norm); // [P, C]
        }
        if let Some(dropout) = past.dropout(Site::AttentionBranch) {
            device.dropout(&mut a.branch, c.width, dropout);
        }
        device.add(&mut a.middle, stream, &a.branch, p * c.width); // [P, C]
        if a.training {
            device.keep(&mut s.attended, &mut a.attended, all.count * output.inputs);
            swap(&mut s.stream, &mut a.stream);
        }

        // MLP.
        norm_forward(device, &mut a.normed, &a.middle, &w.mlp_norm, norm); // [P, C]
        let kind = nonlinearity(c);
        self.apply(device, &w.up, &mut a.up, &a.normed, &mut s.low.up, past.through(up, Site::Up)); // [P, 2F]
        device.activation(kind, &mut a.inner, &a.up, p, c.mlp_width); // [P, F]
        let through = past.through(down, Site::Down);
        self.apply(device, &w.down, &mut a.branch, &a.inner, &mut s.low.down, through); // [P, C]
        if let (Some(own), Some([_, made])) = (&w.down_norm, &mut s.branches) {
            norm_branch(device, own, [&mut a.branch, &mut a.normed], a.training.then_some(made), norm); // [P, C]
        }
        if let Some(dropout) = past.dropout(Site::MlpBranch) {
            device.dropout(&mut a.branch, c.width, dropout);
        }
        device.add(&mut a.stream, &a.middle, &a.branch, p * c.width); // [P, C]
        if a.training {
            device.keep(&mut s.up, &mut a.up, p * up.outputs);
            swap(&mut s.middle, &mut a.middle);
        }
    }

    /// The backward of one block: `g.stream` becomes the gradient of its input, from `[P, C]` to `[T, C]`. False when
    /// nothing before it is trained.
    pub(super) fn block_backward(
        &self,
        device: &D,
        layer: usize,
        w: &BlockOn<D>,
        Backward { pass, first, add }: &Backward<'_>,
        a: &mut ActivationsOn<D>,
        g: &mut Gradients<D::Buffer>,
        dw: &mut Block<Option<D::Buffer>>,
    ) -> bool {
        let (c, forest) = (&self.config, pass.forest);
        let [all, past] = self.rows(pass, layer);
        let s = &mut a.saved[layer];

        let last = layer + 1 == c.layers.len();
        let Rows { count: p, norm, dense: [_, output, up, down], .. } = past;
        let before = |part| *first < Some((layer, part));

        // MLP.
        device.copy(&mut g.branch, &g.stream, p * c.width); // [P, C]
        if let Some(dropout) = past.dropout(Site::MlpBranch) {
            device.dropout(&mut g.branch, c.width, dropout);
        }
        if let (Some(own), Some(gradient), Some([_, made])) = (&w.down_norm, &mut dw.down_norm, &s.branches) {
            norm_branch_backward(device, own, gradient, [&mut g.branch, &mut g.normed], made, norm); // [P, C]
        }
        if !before(Part::DownNorm) {
            return false;
        }
        let kind = nonlinearity(c);
        device.recall(&mut a.up, &mut s.up, p * up.outputs); // [P, 2F]
        device.activation(kind, &mut a.inner, &a.up, p, c.mlp_width); // [P, F]
        let dx = before(Part::Down).then_some(&mut g.inner);
        let room = Room { low: &mut s.low.down, dlow: &mut g.low, again: &mut g.again };
        let through = past.through(down, Site::Down);
        let (dout, x) = (&mut g.branch, &a.inner);
        self.apply_backward(device, &w.down, &mut dw.down, dx, dout, x, through, room, *add); // [P, F]
        if !before(Part::Down) {
            return false;
        }
        device.activation_backward(kind, &mut g.up, &g.inner, &a.up, p, c.mlp_width); // [P, 2F]
        swap(&mut s.middle, &mut a.middle);
        norm_forward(device, &mut a.normed, &a.middle, &w.mlp_norm, norm); // [P, C]
        let dx = before(Part::Up).then_some(&mut g.normed);
        let room = Room { low: &mut s.low.up, dlow: &mut g.low, again: &mut g.again };
        let through = past.through(up, Site::Up);
        self.apply_backward(device, &w.up, &mut dw.up, dx, &mut g.up, &a.normed, through, room, *add); // [P, C]
        if !before(Part::Up) {
            return false;
        }
        norm_backward(device, &w.mlp_norm, &mut dw.mlp_norm, &mut g.stream, &g.normed, &a.middle, norm); // [P, C]
        if !before(Part::MlpNorm) {
            return false;
        }

        // Attention's output.
        device.copy(&mut g.branch, &g.stream, p * c.width); // [P, C]
        if let Some(dropout) = past.dropout(Site::AttentionBranch) {
            device.dropout(&mut g.branch, c.width, dropout);
        }
        if let (Some(own), Some(gradient), Some([made, _])) =
            (&w.output_norm, &mut dw.output_norm, &s.branches)
        {
            norm_branch_backward(device, own, gradient, [&mut g.branch, &mut g.normed], made, norm); // [P, C]
        }
        if !before(Part::OutputNorm) {
            return false;
        }
        device.recall(&mut a.attended, &mut s.attended, all.count * output.inputs); // [T, D]
        if last {
            device.gather(&mut a.target_attended, &a.attended, &forest.target_rows, output.inputs);
        }
        let attended = if last { &a.target_attended } else { &a.attended };
        let dattended = if last { &mut g.target_attended } else { &mut g.attended };
        let dx = before(Part::Output).then_some(dattended);
        let room = Room { low: &mut s.low.output, dlow: &mut g.low, again: &mut g.again };
        let through = past.through(output, Site::Output);
        let dout = &mut g.branch;
        self.apply_backward(device, &w.output, &mut dw.output, dx, dout, attended, through, room, *add); // [P, D]
        if !before(Part::Output) {
            return false;
        }
        if last {
            device.clear(&mut g.attended);
            device.gather_backward(&mut g.attended, &g.target_attended, &forest.target_rows, output.inputs); // [T, D]
            swap(&mut g.stream, &mut g.target_stream);
            device.clear(&mut g.stream);
            device.gather_backward(&mut g.stream, &g.target_stream, &forest.target_rows, c.width); // [T, C]
        }

        // Attention.
        let Rows { count: t, norm, dense: [qkv, ..], .. } = all;
        let attention = self.attention(forest, all);
        device.recall(&mut a.qkv, &mut s.qkv, t * qkv.outputs);
        device.attention_backward(&mut g.qkv, &g.attended, &a.qkv, &a.attended, &s.lse, attention); // [T, A]
        if let Some(which) = self.rotary(layer) {
            let [cos, sin] = &a.angles[which];
            device.rope_backward(&mut g.qkv, cos, sin, self.heads(), t);
        }
        if let (Some([q, k]), Some(raw)) = (&w.head_norms, &s.raw) {
            let dgains = match &mut dw.head_norms {
                Some(dgains) => dgains.each_mut().map(Option::as_mut),
                None => [None, None],
            };
            let norm = self.norm_shape(t, c.head_width);
            device.head_norm_backward(&mut g.qkv, dgains, raw, [q, k], self.heads(), norm);
        }
        swap(&mut s.stream, &mut a.stream);
        norm_forward(device, &mut a.normed, &a.stream, &w.attention_norm, norm); // [T, C]
        let dx = before(Part::Qkv).then_some(&mut g.normed);
        let room = Room { low: &mut s.low.qkv, dlow: &mut g.low, again: &mut g.again };
        let through = all.through(qkv, Site::Qkv);
        self.apply_backward(device, &w.qkv, &mut dw.qkv, dx, &mut g.qkv, &a.normed, through, room, *add); // [T, C]
        if !before(Part::Qkv) {
            return false;
        }
        let (w, dw) = (&w.attention_norm, &mut dw.attention_norm);
        norm_backward(device, w, dw, &mut g.stream, &g.normed, &a.stream, norm); // [T, C]
        before(Part::AttentionNorm)
    }

    fn attention<'a>(&self, forest: &'a Forest, rows: Rows<'a>) -> Attention<'a> {
        Attention {
            heads: self.heads(),
            segments: &forest.segments,
            window: self.config.layers[rows.layer].window,
            dropout: rows.dropout(Site::Attention),
        }
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
}

/// A norm of each row.
pub(super) fn norm_forward<D: Device>(
    device: &D,
    out: &mut D::Buffer,
    x: &D::Buffer,
    norm: &weights::Norm<D::Buffer>,
    shape: Norm,
) {
    device.norm(out, x, &norm.gain, norm.bias.as_ref(), shape);
}

/// The backward of a norm: `dx += …`, and the gradients of what is trained.
pub(super) fn norm_backward<D: Device>(
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

/// The norm of what a branch made, in place, by way of another buffer; what it made is kept for the backward.
fn norm_branch<D: Device>(
    device: &D,
    norm: &weights::Norm<D::Buffer>,
    [branch, other]: [&mut D::Buffer; 2],
    made: Option<&mut D::Buffer>,
    shape: Norm,
) {
    swap(branch, other);
    norm_forward(device, branch, other, norm, shape);
    if let Some(made) = made {
        swap(made, other);
    }
}

/// Its backward, in place likewise.
fn norm_branch_backward<D: Device>(
    device: &D,
    norm: &weights::Norm<D::Buffer>,
    gradient: &mut weights::Norm<Option<D::Buffer>>,
    [branch, other]: [&mut D::Buffer; 2],
    made: &D::Buffer,
    shape: Norm,
) {
    device.clear(other);
    norm_backward(device, norm, gradient, other, branch, made, shape);
    swap(branch, other);
}

/// The first part, with its layer, that has a gradient; none when that is before all blocks.
pub(super) fn first_trained<B>(dw: &Weights<Option<B>>) -> Option<(usize, Part)> {
    if dw.embedding.is_some() || matches!(dw.positions, Some(Some(_))) {
        return None;
    }
    let norm = |norm: &weights::Norm<Option<B>>| norm.gain.is_some();
    let dense = |dense: &Dense<Option<B>>| dense.weight.is_some() || dense.adapter.is_some();
    let part = |block: &Block<Option<B>>| {
        let heads = block.head_norms.iter().flatten().any(Option::is_some);
        let trained = [
            (Part::AttentionNorm, norm(&block.attention_norm)),
            (Part::Qkv, dense(&block.qkv) || heads),
            (Part::Output, dense(&block.output)),
            (Part::OutputNorm, block.output_norm.as_ref().is_some_and(norm)),
            (Part::MlpNorm, norm(&block.mlp_norm)),
            (Part::Up, dense(&block.up)),
            (Part::Down, dense(&block.down)),
            (Part::DownNorm, block.down_norm.as_ref().is_some_and(norm)),
        ];
        trained.into_iter().find(|(_, trained)| *trained).map(|(part, _)| part)
    };
    let mut blocks = dw.blocks.iter().enumerate();
    let first = blocks.find_map(|(layer, block)| Some((layer, part(block)?)));
    Some(first.unwrap_or((dw.blocks.len(), Part::AttentionNorm)))
}
