//! Attention over a forest in tiles: scores of at most [`QUERIES`] × [`KEYS`] exist at a time, hidden keys are
//! not computed, and the softmax is taken online (Milakov & Gimelshein 2018, arXiv 1805.02867; Dao et al. 2022,
//! arXiv 2205.14135).
//!
//! The forward splits into independent (query tile, key head) tasks. In the backward a task owns one key head
//! of one tree, because every query of the tree adds to the tree's keys: the order of those additions is the
//! order of the segments, whatever the threads do.

use std::ops::Range;

use rayon::prelude::*;

use super::pack::{Operand, Values};
use super::product::Product;
use super::rows;
use super::tile::Kernel;
use crate::device::{Attention, Columns, Heads, Segment};

const QUERIES: usize = 64;
const KEYS: usize = 256;

/// A matrix inside a larger buffer: consecutive columns, rows `stride` apart.
#[derive(Clone, Copy)]
struct View {
    data: *const f32,
    stride: usize,
}

/// The same, written by exactly one task.
#[derive(Clone, Copy)]
struct ViewMut {
    data: *mut f32,
    stride: usize,
}

// SAFETY: a view is only an address; each use below states why its access is exclusive or read-only.
unsafe impl Send for ViewMut {}
// SAFETY: as above.
unsafe impl Sync for ViewMut {}

impl View {
    /// Row `row`, column `column` of a buffer whose rows are `stride` long. The slice index checks the bounds
    /// of the `rows` × `columns` block that is about to be used.
    fn new(buffer: &[f32], stride: usize, [row, rows]: [usize; 2], [column, columns]: [usize; 2]) -> View {
        let start = row * stride + column;
        let len = (rows - 1) * stride + columns;
        View { data: buffer[start..start + len].as_ptr(), stride }
    }
}

impl ViewMut {
    fn whole(buffer: &mut [f32], stride: usize) -> ViewMut {
        ViewMut { data: buffer.as_mut_ptr(), stride }
    }

    /// # Safety
    /// The block must lie inside the buffer.
    unsafe fn block(self, row: usize, column: usize) -> ViewMut {
        // SAFETY: the caller's promise.
        ViewMut { data: unsafe { self.data.add(row * self.stride + column) }, stride: self.stride }
    }

    /// # Safety
    /// `row` must lie inside the buffer with `len` columns, and nobody else may use them meanwhile.
    unsafe fn row<'a>(self, row: usize, len: usize) -> &'a mut [f32] {
        // SAFETY: the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(row * self.stride), len) }
    }
}

/// `c [m, n] = alpha a [m, k] · b [k, n]`, plus `c` when `add`; the strides of `a` and `b` are (row, column).
///
/// # Safety
/// The three blocks must be valid for these sizes, and `c` exclusive.
unsafe fn multiply(
    [m, k, n]: [usize; 3],
    alpha: f32,
    a: (*const f32, [usize; 2]),
    b: (*const f32, [usize; 2]),
    add: bool,
    c: ViewMut,
) {
    if m == 1 && a.1[1] == 1 {
        // SAFETY: the caller's promise.
        return unsafe { multiply_row([k, n], alpha, a.0, b, add, c.data) };
    }
    let operand = |(data, strides): (*const f32, [usize; 2]), [lanes, ks]: [usize; 2], lane: usize| {
        let (across, along) = (strides[lane], strides[1 - lane]);
        let len = (lanes - 1) * across + (ks - 1) * along + 1;
        // SAFETY: the caller's promise: this is the extent of the block.
        let values = Values::F32(unsafe { std::slice::from_raw_parts(data, len) });
        Operand { values, across, along }
    };
    let (a, b) = (operand(a, [m, k], 0), operand(b, [n, k], 1));
    let product = Product { shape: [m, n, k], a, b, alpha, add };
    // SAFETY: the caller's promise.
    unsafe { product.run_alone(Kernel::f32(), c.data, c.stride) }
}

/// [`multiply`] for one row of `a`, as in decoding, where a packed product would cost more than it computes.
///
/// # Safety
/// As for [`multiply`]; `a` and `c` are contiguous, and so is `b` along one of its sides.
unsafe fn multiply_row(
    [k, n]: [usize; 2],
    alpha: f32,
    a: *const f32,
    (b, [row, column]): (*const f32, [usize; 2]),
    add: bool,
    c: *mut f32,
) {
    // SAFETY: the caller's promise.
    let (a, c) = unsafe { (std::slice::from_raw_parts(a, k), std::slice::from_raw_parts_mut(c, n)) };
    if !add {
        c.fill(0.0);
    }
    if row == 1 {
        for (j, c) in c.iter_mut().enumerate() {
            // SAFETY: column `j` of `b` has `k` contiguous elements.
            let b = unsafe { std::slice::from_raw_parts(b.add(j * column), k) };
            *c += alpha * rows::inner(a, b);
        }
    } else {
        debug_assert_eq!(column, 1);
        for (i, a) in a.iter().enumerate() {
            // SAFETY: row `i` of `b` has `n` contiguous elements.
            let b = unsafe { std::slice::from_raw_parts(b.add(i * row), n) };
            rows::add_scaled(c, alpha * a, b);
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
    tasks.into_par_iter().with_max_len(1).for_each(|(segment, tile, kv)| {
        let group = heads.query / heads.key;
        for head in kv * group..(kv + 1) * group {
            forward_tile(out, lse, &qkv, &shape, segment, &tile, head);
        }
    });
}

/// One head of one query tile. Writes rows `tile` of `segment`, columns of `head`: no other task does.
fn forward_tile(
    out: ViewMut,
    lse: ViewMut,
    [q, k, v]: &[Columns<'_, Vec<f32>>; 3],
    shape: &Attention<'_>,
    segment: &Segment,
    tile: &Range<usize>,
    head: usize,
) {
    let Heads { query, key, width } = shape.heads;
    let kv = head / (query / key);
    let scale = 1.0 / (width as f32).sqrt();
    let (first_row, n) = (segment.rows.start + tile.start, tile.len());
    let first_position = segment.depth() + tile.start;
    let queries = View::new(q.buffer, q.stride, [first_row, n], [q.start + head * width, width]);
    let mut scores = vec![0.0f32; n * KEYS];
    let mut total = vec![0.0f32; n * width]; // Σ e^(s − max) v
    let mut max = vec![f32::NEG_INFINITY; n];
    let mut sum = vec![0.0f32; n];
    for keys in key_tiles(segment, tile, shape.window) {
        let m = keys.rows.len();
        let k = View::new(k.buffer, k.stride, [keys.rows.start, m], [k.start + kv * width, width]);
        let v = View::new(v.buffer, v.stride, [keys.rows.start, m], [v.start + kv * width, width]);
        let s = ViewMut { data: scores.as_mut_ptr(), stride: m };
        // SAFETY: views were bounds-checked; `scores` holds n × m and is this task's own.
        unsafe {
            multiply(
                [n, width, m],
                scale,
                (queries.data, [queries.stride, 1]),
                (k.data, [1, k.stride]),
                false,
                s,
            )
        };
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
        let total = ViewMut { data: total.as_mut_ptr(), stride: width };
        // SAFETY: as above; `total` holds n × width.
        unsafe {
            multiply([n, m, width], 1.0, (scores.as_ptr(), [m, 1]), (v.data, [v.stride, 1]), true, total)
        };
    }
    for i in 0..n {
        // SAFETY: `forward` sized both buffers for every segment; rows and head belong to this task alone.
        let (out, lse) = unsafe {
            (out.block(0, head * width).row(first_row + i, width), lse.block(0, head).row(first_row + i, 1))
        };
        for (out, total) in out.iter_mut().zip(&total[i * width..]) {
            *out = total / sum[i];
        }
        lse[0] = max[i] + sum[i].ln();
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
        let group = heads.query / heads.key;
        let mut scratch = Scratch { p: vec![0.0; QUERIES * KEYS], dp: vec![0.0; QUERIES * KEYS] };
        for segment in tree {
            for tile in query_tiles(segment) {
                for head in kv * group..(kv + 1) * group {
                    backward_tile(dqkv, &saved, &shape, segment, &tile, head, &mut scratch);
                }
            }
        }
    });
}

/// What the forward left, and the gradient that comes in.
struct Saved<'a> {
    dout: &'a [f32],
    qkv: &'a [f32],
    out: &'a [f32],
    lse: &'a [f32],
}

/// Probabilities and their gradients of a tile, `[QUERIES, KEYS]` each.
struct Scratch {
    p: Vec<f32>,
    dp: Vec<f32>,
}

/// One head of one query tile. Adds to the query's columns and to the keys' and values' columns of its key
/// head, for rows of this tree: the task that owns (tree, key head) is the only one to touch them.
fn backward_tile(
    dqkv: ViewMut,
    saved: &Saved<'_>,
    shape: &Attention<'_>,
    segment: &Segment,
    tile: &Range<usize>,
    head: usize,
    scratch: &mut Scratch,
) {
    let heads = shape.heads;
    let (width, stride) = (heads.width, heads.fused());
    let kv = head / (heads.query / heads.key);
    let (k_column, v_column) = (heads.keys() + kv * width, heads.values() + kv * width);
    let scale = 1.0 / (width as f32).sqrt();
    let (first_row, n) = (segment.rows.start + tile.start, tile.len());
    let first_position = segment.depth() + tile.start;
    let q = View::new(saved.qkv, stride, [first_row, n], [head * width, width]);
    let dout = View::new(saved.dout, heads.output(), [first_row, n], [head * width, width]);
    let at = |i: usize| ((first_row + i) * heads.query + head) * width;
    let d: Vec<f32> =
        (0..n).map(|i| rows::inner(&saved.dout[at(i)..][..width], &saved.out[at(i)..][..width])).collect();
    for keys in key_tiles(segment, tile, shape.window) {
        let m = keys.rows.len();
        let k = View::new(saved.qkv, stride, [keys.rows.start, m], [k_column, width]);
        let v = View::new(saved.qkv, stride, [keys.rows.start, m], [v_column, width]);
        let (p, dp) = (&mut scratch.p[..n * m], &mut scratch.dp[..n * m]);
        let (p_view, dp_view) =
            (ViewMut { data: p.as_mut_ptr(), stride: m }, ViewMut { data: dp.as_mut_ptr(), stride: m });
        // SAFETY: the views were bounds-checked and only read; p and dp hold n × m and are this task's own.
        unsafe {
            multiply([n, width, m], scale, (q.data, [stride, 1]), (k.data, [1, stride]), false, p_view);
            multiply(
                [n, width, m],
                1.0,
                (dout.data, [dout.stride, 1]),
                (v.data, [1, stride]),
                false,
                dp_view,
            );
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
            rows::softmax_backward(dp, p, d[i], scale);
            drop_row(shape, p, first_row + i, head, depth);
        }
        // SAFETY: rows of this tree and columns of this key head and query head lie inside dqkv, and this task
        // is the only one that writes them.
        unsafe {
            let dq = dqkv.block(first_row, head * width);
            let (dk, dv) = (dqkv.block(keys.rows.start, k_column), dqkv.block(keys.rows.start, v_column));
            multiply([m, n, width], 1.0, (p.as_ptr(), [1, m]), (dout.data, [dout.stride, 1]), true, dv);
            multiply([m, n, width], 1.0, (dp.as_ptr(), [1, m]), (q.data, [stride, 1]), true, dk);
            multiply([n, m, width], 1.0, (dp.as_ptr(), [m, 1]), (k.data, [stride, 1]), true, dq);
        }
    }
}
