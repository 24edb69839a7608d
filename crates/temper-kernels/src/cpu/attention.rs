//! Attention over a forest in tiles: scores of at most [`QUERIES`] × [`KEYS`] exist at a time, tiles that are hidden
//! whole are not computed, and the softmax is taken online (Milakov & Gimelshein 2018, arXiv 1805.02867; Dao et al.
//! 2022, arXiv 2205.14135). In other tiles a hidden value counts as 0 · v: one that is no number spreads over its tile.
//!
//! The forward splits into independent (query tile, key head) tasks. In the backward every query of a tree adds to the
//! tree's keys: a task takes one key head of a tree, or a part of its queries with sums of its own for the keys, which are
//! added in order. How a tree is parted, and so the order of additions, depends on the tree and its heads alone.

use std::cell::Cell;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use rayon::prelude::*;

use super::math::LANES;
use super::pack::{Operand, Values};
use super::product::{Output, Panels, ViewMut, multiply_panels};
use super::tile::Kernel;
use super::{crew, matmul, rows};
use crate::device::{Attention, Columns, Heads, Segment};

const QUERIES: usize = 64;
const KEYS: usize = 256;
/// Tasks of a long tree's backward at least: few key heads alone would leave threads idle.
const TASKS: usize = 12;
/// Query tiles of such a task at least.
const TASK_TILES: usize = 4;

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

/// A run of at most [`KEYS`] keys of which some query of a tile sees the first.
struct KeyTile {
    rows: Range<usize>,
    /// How many of them are seen.
    len: usize,
    depth: usize,
}

impl KeyTile {
    /// The columns of this tile that the query at depth `position` sees.
    fn visible(&self, position: usize, window: Option<usize>) -> Range<usize> {
        let first = window.map_or(0, |window| (position + 1).saturating_sub(window));
        let end = (position + 1).saturating_sub(self.depth).min(self.len);
        first.saturating_sub(self.depth).min(end)..end
    }

    /// Distance of the rows of scores: whole vectors.
    fn stride(&self) -> usize {
        self.len.next_multiple_of(LANES)
    }
}

/// The keys that queries `tile` of a segment see, in order of depth.
fn key_tiles(segment: &Segment, tile: &Range<usize>, window: Option<usize>) -> Vec<KeyTile> {
    let mut tiles = Vec::new();
    let mut depth = 0;
    let own = segment.own..segment.own + segment.rows.len();
    let first = window.map_or(0, |window| (segment.depth() + tile.start + 1).saturating_sub(window));
    let context = segment.context.iter().map(|run| (run.clone(), run.end));
    for (run, end) in context.chain([(own.clone(), own.start + tile.end)]) {
        for start in (run.start..end).step_by(KEYS) {
            let rows = start..run.end.min(start + KEYS);
            let len = end.min(rows.end) - start;
            if depth + len > first {
                tiles.push(KeyTile { rows, len, depth });
            }
            depth += len;
        }
    }
    tiles
}

/// Keys and values of every tile, packed once for all queries that see them.
#[derive(Default)]
struct KeyPanels {
    /// Which tile begins and ends at these rows.
    tiles: HashMap<Range<usize>, usize>,
    /// Of each tile and key head.
    panels: Vec<[Panels; 3]>,
    heads: usize,
}

/// The last ones, kept because their memory comes from the system at a price.
static KEY_PANELS: Mutex<Option<KeyPanels>> = Mutex::new(None);

impl KeyPanels {
    /// Calls `pack(panels, rows, key head)` for every tile that these segments see.
    fn pack<'a>(
        segments: impl Iterator<Item = &'a Segment>,
        shape: &Attention<'_>,
        pack: impl Fn(&mut [Panels; 3], &Range<usize>, usize) + Sync,
    ) -> KeyPanels {
        let kept = KEY_PANELS.lock().unwrap_or_else(PoisonError::into_inner).take();
        let KeyPanels { mut tiles, mut panels, .. } = kept.unwrap_or_default();
        let heads = shape.heads.key;
        tiles.clear();
        let mut rows = Vec::new();
        for segment in segments {
            for tile in key_tiles(segment, &(0..segment.rows.len()), shape.window) {
                tiles.entry(tile.rows.clone()).or_insert_with(|| {
                    rows.push(tile.rows);
                    rows.len() - 1
                });
            }
        }
        if panels.len() < rows.len() * heads {
            panels.resize_with(rows.len() * heads, Default::default);
        }
        panels[..rows.len() * heads]
            .par_iter_mut()
            .enumerate()
            .for_each(|(i, panels)| pack(panels, &rows[i / heads], i % heads));
        KeyPanels { tiles, panels, heads }
    }

    fn of(&self, tile: &KeyTile, kv: usize) -> &[Panels; 3] {
        &self.panels[self.tiles[&tile.rows] * self.heads + kv]
    }

    fn keep(self) {
        *KEY_PANELS.lock().unwrap_or_else(PoisonError::into_inner) = Some(self);
    }
}

/// What the backward's tasks sum beside the result, kept as [`KEY_PANELS`] are.
static KEY_SUMS: Mutex<Vec<f32>> = Mutex::new(Vec::new());

/// Gives what is not `seen` of a row of scores `hidden`, or zeros beyond the vectors that hold what is seen; returns
/// these.
fn hide<'a>(row: &'a mut [f32], seen: &Range<usize>, hidden: f32) -> &'a mut [f32] {
    if seen.is_empty() {
        row.fill(0.0);
        return &mut [];
    }
    let whole = seen.start / LANES * LANES..seen.end.next_multiple_of(LANES);
    row[..whole.start].fill(0.0);
    row[whole.start..seen.start].fill(hidden);
    row[seen.end..whole.end].fill(hidden);
    row[whole.end..].fill(0.0);
    &mut row[whole]
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
pub fn forward(
    out: &mut [f32],
    lse: &mut [f32],
    qkv: [Columns<'_, Vec<f32>>; 3],
    shape: Attention<'_>,
    kernel: Kernel,
) {
    let heads = shape.heads;
    check_queries(shape.segments);
    let rows = shape.segments.last().map_or(0, |segment| segment.rows.end);
    let out = ViewMut::whole(&mut out[..rows * heads.output()], heads.output());
    let lse = ViewMut::whole(&mut lse[..rows * heads.query], heads.query);
    let tasks: Vec<(&Segment, Range<usize>, usize)> = shape
        .segments
        .iter()
        .flat_map(|segment| query_tiles(segment).map(move |tile| (segment, tile)))
        .flat_map(|(segment, tile)| (0..heads.key).map(move |kv| (segment, tile.clone(), kv)))
        .collect();
    let [_, k, v] = &qkv;
    let width = heads.width;
    // A query alone, as in decoding, reads keys where they lie.
    let several = shape.segments.iter().filter(|segment| segment.rows.len() > 1);
    let keys = KeyPanels::pack(several, &shape, |[keys, values, _], rows, kv| {
        let at = |x: &Columns<'_, Vec<f32>>| x.start + kv * width;
        let (first, m) = (rows.start, rows.len());
        keys.columns(kernel, View::new(k.buffer, k.stride, [first, m], [at(k), width]).rows(), [m, width]);
        values.columns(
            kernel,
            View::new(v.buffer, v.stride, [first, m], [at(v), width]).columns(),
            [width, m],
        );
    });
    crew::for_each(tasks.len(), |i| {
        let (segment, tile, kv) = &tasks[i];
        forward_tile(out, lse, &qkv, &keys, &shape, kernel, segment, tile, *kv);
    });
    keys.keep();
}

/// That no two segments share a query: tasks write their rows at the same time.
fn check_queries(segments: &[Segment]) {
    let ordered = segments.iter().all(|segment| segment.rows.start <= segment.rows.end)
        && segments.windows(2).all(|two| two[0].rows.end <= two[1].rows.start);
    assert!(ordered, "segments must follow one another");
}

/// Buffers of a forward tile, kept by its thread: giving them back to the system at each tile costs more than the tile.
#[derive(Default)]
struct Forward {
    scores: Vec<f32>,
    /// One a query head.
    running: Vec<Running>,
    /// Queries as rows, one a query head.
    queries: Vec<Panels>,
    probabilities: Panels,
}

thread_local! {
    static FORWARD: Cell<Forward> = Cell::default();
    static BACKWARD: Cell<Option<Scratch>> = const { Cell::new(None) };
}

/// The online softmax of one head of a query tile.
#[derive(Default)]
struct Running {
    /// The largest score of each query, before it is scaled.
    max: Vec<f32>,
    /// `Σ e^(s − max)`.
    sum: Vec<f32>,
    /// `Σ e^(s − max) v`, `[queries, width]`.
    total: Vec<f32>,
}

/// One query tile of the query heads of one key head. Writes rows `tile` of `segment`, columns of those heads: no other
/// task does.
fn forward_tile(
    out: ViewMut,
    lse: ViewMut,
    [q, k, v]: &[Columns<'_, Vec<f32>>; 3],
    key_panels: &KeyPanels,
    shape: &Attention<'_>,
    kernel: Kernel,
    segment: &Segment,
    tile: &Range<usize>,
    kv: usize,
) {
    let Heads { query, key, width } = shape.heads;
    let group = kv * (query / key)..(kv + 1) * (query / key);
    let scale = 1.0 / (width as f32).sqrt();
    let (first_row, n) = (segment.rows.start + tile.start, tile.len());
    let first_position = segment.depth() + tile.start;
    let queries = |head| View::new(q.buffer, q.stride, [first_row, n], [q.start + head * width, width]);
    let mut scratch = FORWARD.take();
    scratch.running.resize_with(group.len(), Running::default);
    scratch.queries.resize_with(group.len(), Panels::default);
    scratch.scores.resize(n.max(group.len()) * KEYS, 0.0);
    let Forward { scores, running, queries: q_panels, probabilities: p_panels } = &mut scratch;
    for running in running.iter_mut() {
        running.start(n, width);
    }
    if n > 1 {
        for (panels, head) in q_panels.iter_mut().zip(group.clone()) {
            panels.rows(kernel, queries(head).rows(), [n, width]);
        }
    }
    for keys in key_tiles(segment, tile, shape.window) {
        let (m, stride) = (keys.len, keys.stride());
        let packed = (n > 1).then(|| key_panels.of(&keys, kv));
        let k = View::new(k.buffer, k.stride, [keys.rows.start, m], [k.start + kv * width, width]);
        let v = View::new(v.buffer, v.stride, [keys.rows.start, m], [v.start + kv * width, width]);
        if n == 1 {
            // Its heads lie side by side, and read each key once for all.
            let columns = [q.start + group.start * width, group.len() * width];
            let q = View::new(q.buffer, q.stride, [first_row, 1], columns);
            let out = Output { values: scores, start: 0, stride };
            matmul::dots(out, q.data, k.data, k.stride, [group.len(), m, width]);
        }
        for ((q_panels, head), Running { max, sum, total }) in
            q_panels.iter().zip(group.clone()).zip(running.iter_mut())
        {
            let first = if n == 1 { head - group.start } else { 0 };
            let scores = &mut scores[first * stride..];
            if let Some([k_panels, _, _]) = packed {
                // SAFETY: `scores` holds n rows of at least m and is this task's own.
                unsafe {
                    multiply_panels(kernel, [q_panels, k_panels], m, false, ViewMut::whole(scores, stride));
                }
            }
            for i in 0..n {
                let row = &mut scores[i * stride..][..stride];
                let seen = keys.visible(first_position + i, shape.window);
                let vectors = hide(row, &seen, f32::NEG_INFINITY);
                if seen.is_empty() {
                    continue;
                }
                let before = max[i];
                let (new_max, added) = rows::softmax(vectors, scale, before);
                if new_max > before {
                    let keep = (scale * (before - new_max)).exp();
                    sum[i] *= keep;
                    total[i * width..][..width].iter_mut().for_each(|x| *x *= keep);
                    max[i] = new_max;
                }
                sum[i] += added;
                let depth = keys.depth + seen.start;
                drop_row(shape, &mut row[seen], first_row + i, head, depth);
            }
            if let Some([_, v_panels, _]) = packed {
                p_panels.rows(kernel, Operand::rows(Values::F32(&scores[..n * stride]), stride), [n, m]);
                // SAFETY: `total` holds n × width and is this task's own.
                unsafe {
                    multiply_panels(kernel, [p_panels, v_panels], width, true, ViewMut::whole(total, width));
                }
            } else {
                rows::add_weighted(total, &scores[..m], v.data, v.stride);
            }
        }
    }
    for (head, Running { max, sum, total }) in group.zip(&*running) {
        for i in 0..n {
            // SAFETY: `forward` sized both buffers for every segment, whose rows it found to be disjoint; these rows and this
            // head belong to this task alone.
            let (out, lse) = unsafe {
                (
                    out.block(0, head * width).row(first_row + i, width),
                    lse.block(0, head).row(first_row + i, 1),
                )
            };
            for (out, total) in out.iter_mut().zip(&total[i * width..]) {
                *out = total / sum[i];
            }
            lse[0] = scale * max[i] + sum[i].ln();
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
pub fn backward(
    dqkv: &mut [f32],
    dout: &[f32],
    qkv: &[f32],
    out: &[f32],
    lse: &[f32],
    shape: Attention<'_>,
    kernel: Kernel,
) {
    let heads = shape.heads;
    let stride = heads.fused();
    check_queries(shape.segments);
    for segment in shape.segments {
        dqkv[segment.rows.start * stride..segment.rows.end * stride].fill(0.0);
    }
    let trees = trees(shape.segments, heads);
    let saved = Saved { dout, qkv, out, lse };
    let width = heads.width;
    let key_panels = KeyPanels::pack(shape.segments.iter(), &shape, |[keys, values, over_keys], rows, kv| {
        let (first, m) = (rows.start, rows.len());
        let view = |column| View::new(qkv, stride, [first, m], [column + kv * width, width]);
        let (k, v) = (view(heads.keys()), view(heads.values()));
        keys.columns(kernel, k.rows(), [m, width]);
        values.columns(kernel, v.rows(), [m, width]);
        over_keys.columns(kernel, k.columns(), [width, m]);
    });
    let mut key_sums = std::mem::take(&mut *KEY_SUMS.lock().unwrap_or_else(PoisonError::into_inner));
    let beside: usize = trees.iter().map(|tree| tree.sums(heads)).sum();
    if key_sums.len() < beside {
        key_sums.resize(beside, 0.0);
    }
    let mut tasks = Vec::new();
    let mut free = &mut key_sums[..];
    for tree in &trees {
        for (kv, part) in (0..heads.key).flat_map(|kv| (0..tree.parts).map(move |part| (kv, part))) {
            let sums;
            (sums, free) = free.split_at_mut(if part == 0 { 0 } else { tree.rows.len() * 2 * width });
            tasks.push((tree, kv, part, sums));
        }
    }
    let rows = trees.iter().map(|tree| tree.rows.end).max().unwrap_or(0);
    let view = ViewMut::whole(&mut dqkv[..rows * stride], stride);
    tasks.into_par_iter().with_max_len(1).for_each(|(tree, kv, part, sums)| {
        let mut scratch = BACKWARD.take().unwrap_or_else(Scratch::new);
        sums.fill(0.0);
        // SAFETY: a key head's columns lie inside dqkv, and those of values behind those of keys.
        let [dk, dv] = unsafe {
            if part == 0 {
                [heads.keys(), heads.values()].map(|column| view.block(tree.rows.start, column + kv * width))
            } else {
                [0, width].map(|column| ViewMut::whole(sums, 2 * width).block(0, column))
            }
        };
        let gradients = ([view, dk, dv], tree.rows.start);
        for (segment, tile) in tree.query_tiles().skip(part).step_by(tree.parts) {
            backward_tile(gradients, &saved, &key_panels, &shape, kernel, segment, &tile, kv, &mut scratch);
        }
        BACKWARD.set(Some(scratch));
    });
    let mut joined = &key_sums[..];
    for tree in trees.iter().filter(|tree| tree.parts > 1) {
        let sums;
        (sums, joined) = joined.split_at(tree.sums(heads));
        tree.join(&mut dqkv[tree.rows.start * stride..tree.rows.end * stride], sums, heads);
    }
    key_panels.keep();
    *KEY_SUMS.lock().unwrap_or_else(PoisonError::into_inner) = key_sums;
}

/// A root and its descendants, which follow it.
struct Tree<'a> {
    segments: &'a [Segment],
    rows: Range<usize>,
    /// Into how many tasks a key head's queries are parted.
    parts: usize,
}

/// The trees of a forest. A segment without context is a root.
fn trees(segments: &[Segment], heads: Heads) -> Vec<Tree<'_>> {
    let whole = segments.chunk_by(|_, next| !next.context.is_empty());
    let tree = whole.map(|segments| {
        let rows = segments[0].rows.start..segments.iter().map(|segment| segment.rows.end).max().unwrap_or(0);
        for segment in segments {
            // Keys outside would be another task's, or nobody's.
            let own = segment.own..segment.own + segment.rows.len();
            let mut keys = segment.context.iter().chain([&own]);
            assert!(
                keys.all(|keys| rows.start <= keys.start && keys.end <= rows.end),
                "keys of another tree"
            );
        }
        let tiles: usize = segments.iter().map(|segment| query_tiles(segment).count()).sum();
        let parts = (tiles / TASK_TILES).clamp(1, TASKS.div_ceil(heads.key));
        Tree { segments, rows, parts }
    });
    tree.collect()
}

impl Tree<'_> {
    fn query_tiles(&self) -> impl Iterator<Item = (&Segment, Range<usize>)> {
        self.segments.iter().flat_map(|segment| query_tiles(segment).map(move |tile| (segment, tile)))
    }

    /// Length of what its tasks sum beside the result: of each key head and part but the first, `[rows, 2 · width]`.
    fn sums(&self, heads: Heads) -> usize {
        heads.key * (self.parts - 1) * self.rows.len() * 2 * heads.width
    }

    /// Adds what its tasks summed beside to its rows of the result.
    fn join(&self, dqkv: &mut [f32], sums: &[f32], heads: Heads) {
        let (stride, width) = (heads.fused(), heads.width);
        dqkv.par_chunks_mut(QUERIES * stride).enumerate().for_each(|(i, rows)| {
            for (task, sums) in sums.chunks_exact(self.rows.len() * 2 * width).enumerate() {
                let kv = task / (self.parts - 1);
                let sums = sums[i * QUERIES * 2 * width..].chunks_exact(2 * width);
                for (row, sums) in rows.chunks_exact_mut(stride).zip(sums) {
                    rows::add_to(&mut row[heads.keys() + kv * width..][..width], &sums[..width]);
                    rows::add_to(&mut row[heads.values() + kv * width..][..width], &sums[width..]);
                }
            }
        });
    }
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
    /// Queries and their gradients as rows over the head's width, and as columns over the queries; one set a head.
    queries: Vec<[Panels; 4]>,
    /// Probabilities, or their gradients, as rows.
    rows: Panels,
}

impl Scratch {
    fn new() -> Scratch {
        let zeros = || vec![0.0; QUERIES * KEYS];
        Scratch { p: zeros(), dp: zeros(), queries: Vec::new(), rows: Panels::default() }
    }
}

/// One query tile of the query heads of one key head. Adds to the queries' columns, which are this tile's alone, and to the
/// gradients of the key head's keys and values, which are the task's alone and begin with row `first_key`.
fn backward_tile(
    ([dqkv, dk, dv], first_key): ([ViewMut; 3], usize),
    saved: &Saved<'_>,
    key_panels: &KeyPanels,
    shape: &Attention<'_>,
    kernel: Kernel,
    segment: &Segment,
    tile: &Range<usize>,
    kv: usize,
    scratch: &mut Scratch,
) {
    let heads = shape.heads;
    let (width, fused) = (heads.width, heads.fused());
    let group = heads.query / heads.key;
    let scale = 1.0 / (width as f32).sqrt();
    let (first_row, n) = (segment.rows.start + tile.start, tile.len());
    let first_position = segment.depth() + tile.start;
    let Scratch { p, dp, queries, rows: p_rows } = scratch;
    queries.resize_with(group, Default::default);
    let mut d = Vec::new(); // Σ dout · out of each head and query
    for (in_group, [q_rows, dout_rows, q_columns, dout_columns]) in queries.iter_mut().enumerate() {
        let head = kv * group + in_group;
        let q = View::new(saved.qkv, fused, [first_row, n], [head * width, width]);
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
        let (m, stride) = (keys.len, keys.stride());
        let [k_columns, v_columns, k_over_keys] = key_panels.of(&keys, kv);
        for (in_group, [q_rows, dout_rows, q_columns, dout_columns]) in queries.iter().enumerate() {
            let head = kv * group + in_group;
            let (p, dp) = (&mut p[..n * stride], &mut dp[..n * stride]);
            // SAFETY: p and dp hold n rows of at least m and are this task's own.
            unsafe {
                multiply_panels(kernel, [q_rows, k_columns], m, false, ViewMut::whole(p, stride));
                multiply_panels(kernel, [dout_rows, v_columns], m, false, ViewMut::whole(dp, stride));
            }
            for i in 0..n {
                let (p, dp) = (&mut p[i * stride..][..stride], &mut dp[i * stride..][..stride]);
                let seen = keys.visible(first_position + i, shape.window);
                let depth = keys.depth + seen.start;
                drop_row(shape, &mut dp[seen.clone()], first_row + i, head, depth);
                let (whole_p, whole_dp) = (hide(p, &seen, f32::NEG_INFINITY), hide(dp, &seen, 0.0));
                rows::exp_each(whole_p, scale, saved.lse[(first_row + i) * heads.query + head]);
                rows::softmax_backward(whole_dp, whole_p, d[in_group * n + i], scale);
                drop_row(shape, &mut p[seen], first_row + i, head, depth);
            }
            // SAFETY: keys are rows of this tree, as `trees` checks, which dk and dv have room for; these queries' rows and
            // columns lie inside dqkv, and no other segment has them. This task is the only one that writes them.
            unsafe {
                let dq = dqkv.block(first_row, head * width);
                let [dk, dv] = [dk, dv].map(|view| view.block(keys.rows.start - first_key, 0));
                p_rows.rows(kernel, Operand::columns(Values::F32(p), stride), [m, n]);
                multiply_panels(kernel, [p_rows, dout_columns], width, true, dv);
                p_rows.rows(kernel, Operand::columns(Values::F32(dp), stride), [m, n]);
                multiply_panels(kernel, [p_rows, q_columns], width, true, dk);
                p_rows.rows(kernel, Operand::rows(Values::F32(dp), stride), [n, m]);
                multiply_panels(kernel, [p_rows, k_over_keys], width, true, dq);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Cpu, Device, Precision};

    /// What the views of tasks rely on is checked, not believed.
    #[test]
    fn segments_that_share_rows_or_see_another_tree_are_refused() {
        let segment = |rows: Range<usize>, context: &[Range<usize>]| Segment {
            own: rows.start,
            rows,
            context: context.to_vec(),
        };
        let heads = Heads { query: 1, key: 1, width: 2 };
        let cpu = Cpu::new(2, Precision::F32).unwrap();
        let refused = |segments: &[Segment], backward: bool| {
            let shape = Attention { heads, segments, window: None, dropout: None };
            let qkv = vec![0.5; 8 * heads.fused()];
            let (mut out, mut lse, mut dqkv) = (vec![0.0; 16], vec![0.0; 8], vec![0.0; 8 * heads.fused()]);
            let run = std::panic::AssertUnwindSafe(|| match backward {
                false => cpu.attention(&mut out, &mut lse, Columns::fused(&qkv, heads), shape),
                true => cpu.attention_backward(
                    &mut dqkv,
                    &vec![0.0; 16],
                    &qkv,
                    &vec![0.0; 16],
                    &vec![0.0; 8],
                    shape,
                ),
            });
            std::panic::catch_unwind(run).is_err()
        };
        for backward in [false, true] {
            assert!(!refused(&[segment(0..2, &[]), segment(2..4, &[0..2]), segment(4..5, &[])], backward));
            assert!(refused(&[segment(0..4, &[]), segment(0..4, &[])], backward));
            assert!(refused(&[segment(2..4, &[]), segment(0..2, &[])], backward));
        }
        assert!(refused(&[segment(0..2, &[]), segment(2..4, &[]), segment(4..5, &[0..2])], true));
        assert!(refused(&[segment(0..2, &[]), segment(2..4, &[0..9])], true));
    }
}
