//! Attention over a forest in tiles: scores of at most [`QUERIES`] × [`KEYS`] exist at a time, hidden keys are
//! not computed, and the softmax is taken online (Milakov & Gimelshein 2018, arXiv 1805.02867; Dao et al. 2022,
//! arXiv 2205.14135).
//!
//! The forward splits into independent (query tile, key head) tasks. In the backward a task owns one key head
//! of one tree, because every query of the tree adds to the tree's keys: the order of those additions is the
//! order of the segments, whatever the threads do.

use std::cell::Cell;
use std::ops::Range;

use rayon::prelude::*;

use super::pack::{Operand, Values};
use super::product::{Panels, ViewMut, multiply_panels};
use super::rows;
use super::tile::Kernel;
use crate::device::{Attention, Columns, Heads, Segment};

const QUERIES: usize = 64;
const KEYS: usize = 256;

/// A matrix inside a larger buffer: consecutive columns, rows `stride` apart.
#[derive(Clone, Copy)]
struct View<'a> {
    data: &'a [f32],
    stride: usize,
}

impl<'a> View<'a> {
    /// The block of `rows` × `columns` from row `row` and column `column` on of a buffer whose rows are `stride` long.
    fn new(
        buffer: &'a [f32],
        stride: usize,
        [row, rows]: [usize; 2],
        [column, columns]: [usize; 2],
    ) -> View<'a> {
        let start = row * stride + column;
        View { data: &buffer[start..start + (rows - 1) * stride + columns], stride }
    }

    /// Its rows as lanes.
    fn rows(self) -> Operand<'a> {
        Operand::rows(Values::F32(self.data), self.stride)
    }

    /// Its columns as lanes.
    fn columns(self) -> Operand<'a> {
        Operand::columns(Values::F32(self.data), self.stride)
    }
}

/// `c [1, n] = alpha a [1, k] · b [k, n]`, plus `c` when `add`: one query, as in decoding, where packing would cost more
/// than it saves. Lanes of `b` lie either way round.
fn multiply_row(c: &mut [f32], alpha: f32, a: &[f32], b: Operand<'_>, add: bool) {
    let Values::F32(values) = b.values else { unreachable!("attention is f32") };
    if !add {
        c.fill(0.0);
    }
    if b.along == 1 {
        for (j, c) in c.iter_mut().enumerate() {
            *c += alpha * rows::inner(a, &values[j * b.across..][..a.len()]);
        }
    } else {
        for (i, a) in a.iter().enumerate() {
            rows::add_scaled(c, alpha * a, &values[i * b.along..][..c.len()]);
        }
    }
}

/// A run of at most [`KEYS`] keys that some query of a tile sees.
struct KeyTile {
    rows: Range<usize>,
    depth: usize,
}

impl KeyTile {
    /// The columns of this tile that the query at depth `position` sees.
    fn visible(&self, position: usize, window: Option<usize>) -> Range<usize> {
        let first = window.map_or(0, |window| (position + 1).saturating_sub(window));
        let end = (position + 1).saturating_sub(self.depth).min(self.rows.len());
        first.saturating_sub(self.depth).min(end)..end
    }
}

/// The keys that queries `tile` of a segment see, in order of depth.
fn key_tiles(segment: &Segment, tile: &Range<usize>, window: Option<usize>) -> Vec<KeyTile> {
    let mut tiles = Vec::new();
    let mut depth = 0;
    let own = segment.own..segment.own + tile.end;
    let first = window.map_or(0, |window| (segment.depth() + tile.start + 1).saturating_sub(window));
    for run in segment.context.iter().chain([&own]) {
        for start in run.clone().step_by(KEYS) {
            let rows = start..run.end.min(start + KEYS);
            let len = rows.len();
            if depth + len > first {
                tiles.push(KeyTile { rows, depth });
            }
            depth += len;
        }
    }
    tiles
}

/// Query tiles of a segment, relative to its first row.
fn query_tiles(segment: &Segment) -> impl Iterator<Item = Range<usize>> {
    let len = segment.rows.len();
    (0..len).step_by(QUERIES).map(move |start| start..len.min(start + QUERIES))
}

/// Multiplies the visible probabilities of one query with their dropout factors.
fn drop_row(shape: &Attention<'_>, p: &mut [f32], row: usize, head: usize, depth: usize) {
    if let Some(dropout) = shape.dropout {
        for (i, p) in p.iter_mut().enumerate() {
            *p *= dropout.factor(row, head << 32 | (depth + i)) as f32;
        }
    }
}

/// See [`crate::Device::attention`].
pub fn forward(out: &mut [f32], lse: &mut [f32], qkv: [Columns<'_, Vec<f32>>; 3], shape: Attention<'_>) {
    let heads = shape.heads;
    let rows = shape.segments.iter().map(|segment| segment.rows.end).max().unwrap_or(0);
    let out = ViewMut::whole(&mut out[..rows * heads.output()], heads.output());
    let lse = ViewMut::whole(&mut lse[..rows * heads.query], heads.query);
    let tasks: Vec<(&Segment, Range<usize>, usize)> = shape
        .segments
        .iter()
        .flat_map(|segment| query_tiles(segment).map(move |tile| (segment, tile)))
        .flat_map(|(segment, tile)| (0..heads.key).map(move |kv| (segment, tile.clone(), kv)))
        .collect();
    tasks
        .into_par_iter()
        .with_max_len(1)
        .for_each(|(segment, tile, kv)| forward_tile(out, lse, &qkv, &shape, segment, &tile, kv));
}

/// Buffers of a forward tile, kept by its thread: giving them back to the system at each tile costs more than the tile.
#[derive(Default)]
struct Forward {
    scores: Vec<f32>,
    /// One a query head.
    running: Vec<Running>,
    /// Queries as rows, one a query head.
    queries: Vec<Panels>,
    keys: Panels,
    values: Panels,
    probabilities: Panels,
}

thread_local! {
    static FORWARD: Cell<Forward> = Cell::default();
    static BACKWARD: Cell<Option<Scratch>> = const { Cell::new(None) };
}

/// The online softmax of one head of a query tile.
#[derive(Default)]
struct Running {
    /// The largest score of each query.
    max: Vec<f32>,
    /// `Σ e^(s − max)`.
    sum: Vec<f32>,
    /// `Σ e^(s − max) v`, `[queries, width]`.
    total: Vec<f32>,
}

/// One query tile of the query heads of one key head: its keys and values are packed once for all of them. Writes rows
/// `tile` of `segment`, columns of those heads: no other task does.
fn forward_tile(
    out: ViewMut,
    lse: ViewMut,
    [q, k, v]: &[Columns<'_, Vec<f32>>; 3],
    shape: &Attention<'_>,
    segment: &Segment,
    tile: &Range<usize>,
    kv: usize,
) {
    let kernel = Kernel::f32();
    let Heads { query, key, width } = shape.heads;
    let group = kv * (query / key)..(kv + 1) * (query / key);
    let scale = 1.0 / (width as f32).sqrt();
    let (first_row, n) = (segment.rows.start + tile.start, tile.len());
    let first_position = segment.depth() + tile.start;
    let queries = |head| View::new(q.buffer, q.stride, [first_row, n], [q.start + head * width, width]);
    let mut scratch = FORWARD.take();
    scratch.running.resize_with(group.len(), Running::default);
    scratch.queries.resize_with(group.len(), Panels::default);
    scratch.scores.resize(n * KEYS, 0.0);
    let Forward {
        scores,
        running,
        queries: q_panels,
        keys: k_panels,
        values: v_panels,
        probabilities: p_panels,
    } = &mut scratch;
    for running in running.iter_mut() {
        running.start(n, width);
    }
    if n > 1 {
        for (panels, head) in q_panels.iter_mut().zip(group.clone()) {
            panels.rows(kernel, queries(head).rows(), [n, width]);
        }
    }
    for keys in key_tiles(segment, tile, shape.window) {
        let m = keys.rows.len();
        let k = View::new(k.buffer, k.stride, [keys.rows.start, m], [k.start + kv * width, width]);
        let v = View::new(v.buffer, v.stride, [keys.rows.start, m], [v.start + kv * width, width]);
        if n > 1 {
            k_panels.columns(kernel, k.rows(), [m, width]);
            v_panels.columns(kernel, v.columns(), [width, m]);
        }
        for ((q_panels, head), Running { max, sum, total }) in
            q_panels.iter().zip(group.clone()).zip(running.iter_mut())
        {
            if n > 1 {
                // SAFETY: `scores` holds n × m and is this task's own.
                unsafe {
                    multiply_panels(kernel, [q_panels, k_panels], scale, false, ViewMut::whole(scores, m));
                }
            } else {
                multiply_row(&mut scores[..m], scale, &queries(head).data[..width], k.rows(), false);
            }
            for i in 0..n {
                let row = &mut scores[i * m..][..m];
                let seen = keys.visible(first_position + i, shape.window);
                row[..seen.start].fill(0.0);
                row[seen.end..].fill(0.0);
                if seen.is_empty() {
                    continue;
                }
                let depth = keys.depth + seen.start;
                let row = &mut row[seen];
                let new_max = max[i].max(rows::max(row));
                let keep = (max[i] - new_max).exp();
                sum[i] = sum[i] * keep + rows::exp_shifted(row, new_max);
                max[i] = new_max;
                total[i * width..][..width].iter_mut().for_each(|x| *x *= keep);
                drop_row(shape, row, first_row + i, head, depth);
            }
            if n > 1 {
                p_panels.rows(kernel, Operand::rows(Values::F32(&scores[..n * m]), m), [n, m]);
                // SAFETY: `total` holds n × width and is this task's own.
                unsafe {
                    multiply_panels(kernel, [p_panels, v_panels], 1.0, true, ViewMut::whole(total, width));
                }
            } else {
                multiply_row(total, 1.0, &scores[..m], v.columns(), true);
            }
        }
    }
    for (head, Running { max, sum, total }) in group.zip(&*running) {
        for i in 0..n {
            // SAFETY: `forward` sized both buffers for every segment; rows and head belong to this task alone.
            let (out, lse) = unsafe {
                (
                    out.block(0, head * width).row(first_row + i, width),
                    lse.block(0, head).row(first_row + i, 1),
                )
            };
            for (out, total) in out.iter_mut().zip(&total[i * width..]) {
                *out = total / sum[i];
            }
            lse[0] = max[i] + sum[i].ln();
        }
    }
    FORWARD.set(scratch);
}

impl Running {
    /// Nothing seen yet, by `n` queries.
    fn start(&mut self, n: usize, width: usize) {
        for (buffer, len, value) in [
            (&mut self.max, n, f32::NEG_INFINITY),
            (&mut self.sum, n, 0.0),
            (&mut self.total, n * width, 0.0),
        ] {
            buffer.clear();
            buffer.resize(len, value);
        }
    }
}

/// See [`crate::Device::attention_backward`].
pub fn backward(dqkv: &mut [f32], dout: &[f32], qkv: &[f32], out: &[f32], lse: &[f32], shape: Attention<'_>) {
    let heads = shape.heads;
    let stride = heads.fused();
    for segment in shape.segments {
        dqkv[segment.rows.start * stride..segment.rows.end * stride].fill(0.0);
    }
    // A segment without context is a root; its descendants follow it.
    let mut trees: Vec<Vec<&Segment>> = Vec::new();
    for segment in shape.segments {
        match trees.last_mut() {
            Some(tree) if !segment.context.is_empty() => tree.push(segment),
            _ => trees.push(vec![segment]),
        }
    }
    let rows = shape.segments.iter().map(|segment| segment.rows.end).max().unwrap_or(0);
    let dqkv = ViewMut::whole(&mut dqkv[..rows * stride], stride);
    let saved = Saved { dout, qkv, out, lse };
    let tasks: Vec<(&[&Segment], usize)> =
        trees.iter().flat_map(|tree| (0..heads.key).map(move |kv| (tree.as_slice(), kv))).collect();
    tasks.into_par_iter().with_max_len(1).for_each(|(tree, kv)| {
        let mut scratch = BACKWARD.take().unwrap_or_else(Scratch::new);
        for segment in tree {
            for tile in query_tiles(segment) {
                backward_tile(dqkv, &saved, &shape, segment, &tile, kv, &mut scratch);
            }
        }
        BACKWARD.set(Some(scratch));
    });
}

/// What the forward left, and the gradient that comes in.
struct Saved<'a> {
    dout: &'a [f32],
    qkv: &'a [f32],
    out: &'a [f32],
    lse: &'a [f32],
}

/// Probabilities and their gradients of a tile, `[QUERIES, KEYS]` each, and packed operands.
struct Scratch {
    p: Vec<f32>,
    dp: Vec<f32>,
    /// Keys and values as columns over the head's width, and keys as columns over the keys.
    keys: [Panels; 3],
    /// Queries and their gradients as rows over the head's width, and as columns over the queries; one set a head.
    queries: Vec<[Panels; 4]>,
    /// Probabilities, or their gradients, as rows.
    rows: Panels,
}

impl Scratch {
    fn new() -> Scratch {
        let zeros = || vec![0.0; QUERIES * KEYS];
        Scratch {
            p: zeros(),
            dp: zeros(),
            keys: Default::default(),
            queries: Vec::new(),
            rows: Panels::default(),
        }
    }
}

/// One query tile of the query heads of one key head. Adds to the queries' columns and to the keys' and values' columns
/// of the key head, for rows of this tree: the task that owns (tree, key head) is the only one to touch them.
fn backward_tile(
    dqkv: ViewMut,
    saved: &Saved<'_>,
    shape: &Attention<'_>,
    segment: &Segment,
    tile: &Range<usize>,
    kv: usize,
    scratch: &mut Scratch,
) {
    let kernel = Kernel::f32();
    let heads = shape.heads;
    let (width, stride) = (heads.width, heads.fused());
    let group = heads.query / heads.key;
    let (k_column, v_column) = (heads.keys() + kv * width, heads.values() + kv * width);
    let scale = 1.0 / (width as f32).sqrt();
    let (first_row, n) = (segment.rows.start + tile.start, tile.len());
    let first_position = segment.depth() + tile.start;
    let Scratch { p, dp, keys: [k_columns, v_columns, k_over_keys], queries, rows: p_rows } = scratch;
    queries.resize_with(group, Default::default);
    let mut d = Vec::new(); // Σ dout · out of each head and query
    for (in_group, [q_rows, dout_rows, q_columns, dout_columns]) in queries.iter_mut().enumerate() {
        let head = kv * group + in_group;
        let q = View::new(saved.qkv, stride, [first_row, n], [head * width, width]);
        let dout = View::new(saved.dout, heads.output(), [first_row, n], [head * width, width]);
        q_rows.rows(kernel, q.rows(), [n, width]);
        dout_rows.rows(kernel, dout.rows(), [n, width]);
        q_columns.columns(kernel, q.columns(), [width, n]);
        dout_columns.columns(kernel, dout.columns(), [width, n]);
        let at = |i: usize| ((first_row + i) * heads.query + head) * width;
        let inner = |i| rows::inner(&saved.dout[at(i)..][..width], &saved.out[at(i)..][..width]);
        d.extend((0..n).map(inner));
    }
    for keys in key_tiles(segment, tile, shape.window) {
        let m = keys.rows.len();
        let k = View::new(saved.qkv, stride, [keys.rows.start, m], [k_column, width]);
        let v = View::new(saved.qkv, stride, [keys.rows.start, m], [v_column, width]);
        k_columns.columns(kernel, k.rows(), [m, width]);
        v_columns.columns(kernel, v.rows(), [m, width]);
        k_over_keys.columns(kernel, k.columns(), [width, m]);
        for (in_group, [q_rows, dout_rows, q_columns, dout_columns]) in queries.iter().enumerate() {
            let head = kv * group + in_group;
            let (p, dp) = (&mut p[..n * m], &mut dp[..n * m]);
            // SAFETY: p and dp hold n × m and are this task's own.
            unsafe {
                multiply_panels(kernel, [q_rows, k_columns], scale, false, ViewMut::whole(p, m));
                multiply_panels(kernel, [dout_rows, v_columns], 1.0, false, ViewMut::whole(dp, m));
            }
            for i in 0..n {
                let (p, dp) = (&mut p[i * m..][..m], &mut dp[i * m..][..m]);
                let seen = keys.visible(first_position + i, shape.window);
                for x in [&mut *p, &mut *dp] {
                    x[..seen.start].fill(0.0);
                    x[seen.end..].fill(0.0);
                }
                let depth = keys.depth + seen.start;
                let (p, dp) = (&mut p[seen.clone()], &mut dp[seen]);
                rows::exp_scaled(p, saved.lse[(first_row + i) * heads.query + head], 1.0);
                drop_row(shape, dp, first_row + i, head, depth);
                rows::softmax_backward(dp, p, d[in_group * n + i], scale);
                drop_row(shape, p, first_row + i, head, depth);
            }
            // SAFETY: rows of this tree and columns of this key head and query head lie inside dqkv, and this
            // task is the only one that writes them.
            unsafe {
                let dq = dqkv.block(first_row, head * width);
                let dk = dqkv.block(keys.rows.start, k_column);
                let dv = dqkv.block(keys.rows.start, v_column);
                p_rows.rows(kernel, Operand::columns(Values::F32(p), m), [m, n]);
                multiply_panels(kernel, [p_rows, dout_columns], 1.0, true, dv);
                p_rows.rows(kernel, Operand::columns(Values::F32(dp), m), [m, n]);
                multiply_panels(kernel, [p_rows, q_columns], 1.0, true, dk);
                p_rows.rows(kernel, Operand::rows(Values::F32(dp), m), [n, m]);
                multiply_panels(kernel, [p_rows, k_over_keys], 1.0, true, dq);
            }
        }
    }
}
