//! Products of any size from tiles: operands are packed into panels, blocks of `k` follow one another.
//!
//! Goto & van de Geijn 2008, "Anatomy of high-performance matrix multiplication". The order in which an element is summed
//! depends on `k` alone: not on threads, nor on the other rows and columns.

use std::cell::Cell;
use std::ops::Range;

use super::crew;
use super::pack::{Layout, Line, Operand, pack};
use super::tile::{Kernel, Tile};

/// Rows of `a` that a task keeps in its second-level cache.
const TASK_ROWS: usize = 256;
/// Columns of `b` that a task takes.
const TASK_COLUMNS: usize = 256;
/// Rows, and columns, whose panels exist at a time: they bound the memory of a product.
const STRIPE: usize = 4096;
/// Up to so many units along `k` a task's panels of `b` fit the second-level cache all together.
const SHORT: usize = 64;
/// Multiply-adds below which waking other threads costs more than it saves.
const SERIAL: usize = 200_000;

/// `c [m, n] = alpha a [m, k] · b [k, n]`, plus what `c` held when `add`.
#[derive(Clone, Copy)]
pub struct Product<'a> {
    /// Rows of `c`, columns of `c`, and what is summed over.
    pub shape: [usize; 3],
    /// Lanes are rows.
    pub a: Operand<'a>,
    /// Lanes are columns.
    pub b: Operand<'a>,
    /// Factor of the product.
    pub alpha: f32,
    /// Add to `c` instead of writing it.
    pub add: bool,
}

/// Where a product goes: columns from `start` on of rows of `stride` values.
pub struct Output<'a> {
    /// The rows.
    pub values: &'a mut [f32],
    /// First column.
    pub start: usize,
    /// Columns of a row.
    pub stride: usize,
}

impl<'a> Output<'a> {
    /// Rows that the product fills.
    pub fn whole(values: &'a mut [f32], columns: usize) -> Output<'a> {
        Output { values, start: 0, stride: columns }
    }
}

/// A matrix inside a larger buffer, rows `stride` apart, of which each task writes its own block.
#[derive(Clone, Copy)]
pub struct ViewMut {
    /// Its first element.
    pub data: *mut f32,
    /// Distance of its rows.
    pub stride: usize,
}

// SAFETY: a view is only an address; each use states why its access is exclusive.
unsafe impl Send for ViewMut {}
// SAFETY: as above.
unsafe impl Sync for ViewMut {}

impl ViewMut {
    /// A buffer whose rows are `stride` long.
    pub fn whole(buffer: &mut [f32], stride: usize) -> ViewMut {
        ViewMut { data: buffer.as_mut_ptr(), stride }
    }

    /// # Safety
    /// The block must lie inside the buffer.
    pub unsafe fn block(self, row: usize, column: usize) -> ViewMut {
        // SAFETY: the caller's promise.
        ViewMut { data: unsafe { self.data.add(row * self.stride + column) }, stride: self.stride }
    }

    /// # Safety
    /// `row` must lie inside the buffer with `len` columns, and nobody else may use them meanwhile.
    pub unsafe fn row<'a>(self, row: usize, len: usize) -> &'a mut [f32] {
        // SAFETY: the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(row * self.stride), len) }
    }
}

thread_local! {
    /// Packed panels of the last product of this thread, kept so that they need not be allocated and zeroed again.
    static PANELS: Cell<Vec<Line>> = const { Cell::new(Vec::new()) };
}

impl Product<'_> {
    /// Computes it with every thread of the current pool.
    pub fn run(self, kernel: Kernel, c: Output<'_>) {
        let [m, n, k] = self.shape;
        assert!(c.start + n <= c.stride && c.values.len() >= m * c.stride);
        // SAFETY: `start` lies inside the first row.
        let c = unsafe { ViewMut::whole(c.values, c.stride).block(0, c.start) };
        let parallel = m * n * k > SERIAL;
        let block = block(kernel, k);
        let units = block / kernel.units.values();
        // Panels of `b` first: they are whole lines and stay aligned.
        let [b_lines, a_lines] = panel_lines(kernel, self.shape);
        let lines = b_lines + a_lines;
        let mut panels = PANELS.take();
        if panels.len() < lines {
            panels.resize(lines, Line::ZERO);
        }
        let (b, a) = Line::floats_mut(&mut panels[..lines]).split_at_mut(b_lines * Line::LEN);
        let stripes = |lanes: usize, width: usize| {
            (0..lanes).step_by(STRIPE / width * width).map(move |i| i..lanes.min(i + STRIPE / width * width))
        };
        for start in (0..k.max(1)).step_by(block) {
            let ks = start..k.min(start + block);
            let add = self.add || start > 0;
            for columns in stripes(n, kernel.columns) {
                let layout = kernel.columns_layout(units);
                pack_panels(b, kernel, layout, self.b, columns.clone(), ks.clone(), parallel);
                for rows in stripes(m, kernel.rows) {
                    let layout = kernel.rows_layout(units);
                    pack_panels(a, kernel, layout, self.a, rows.clone(), ks.clone(), parallel);
                    let packed = Packed { units: kernel.units_of(ks.len()), a, b, strides: [units; 2] };
                    // SAFETY: the stripe lies inside the m × n that `c` has room for.
                    let c = unsafe { c.block(rows.start, columns.start) };
                    let size = [rows.len(), columns.len()];
                    let task = |rows: Range<usize>, columns: Range<usize>| {
                        // SAFETY: tasks have disjoint rows or columns, all inside the stripe.
                        unsafe { multiply(kernel, packed, size, rows, columns, self.alpha, add, c) }
                    };
                    share_out(size, kernel, parallel, task);
                }
            }
        }
        PANELS.set(panels);
    }
}

/// Values of `k` that are packed at a time: equal shares of all.
fn block(kernel: Kernel, k: usize) -> usize {
    let per_unit = kernel.units.values();
    let blocks = k.div_ceil(kernel.block * per_unit).max(1);
    let least = per_unit * kernel.depth;
    k.div_ceil(blocks).next_multiple_of(least).max(least)
}

/// Lines that the packed operands `b` and `a` of a product `m`, `n`, `k` fill.
pub fn panel_lines(kernel: Kernel, [m, n, k]: [usize; 3]) -> [usize; 2] {
    let units = block(kernel, k) / kernel.units.values();
    let of = |lanes: usize, width: usize| lanes.min(STRIPE).div_ceil(width) * width * units;
    [of(n, kernel.columns) / Line::LEN, of(m, kernel.rows).div_ceil(Line::LEN)]
}

/// Calls `task(panels of a, panels of b)` for pieces of a result of this size.
fn share_out(
    [m, n]: [usize; 2],
    kernel: Kernel,
    parallel: bool,
    task: impl Fn(Range<usize>, Range<usize>) + Sync,
) {
    let (a_panels, b_panels) = (m.div_ceil(kernel.rows), n.div_ceil(kernel.columns));
    // Equal pieces: a remainder of one panel would cost as much to fetch as a whole piece.
    let rows = a_panels.div_ceil(a_panels.div_ceil(TASK_ROWS / kernel.rows).max(1)).max(1);
    // As many for each thread, so that none waits for another's last.
    let (down, threads) = (a_panels.div_ceil(rows), rayon::current_num_threads());
    let least = b_panels.div_ceil(TASK_COLUMNS / kernel.columns).max(1);
    let even = (least..least + threads).find(|across| (down * across).is_multiple_of(threads));
    let columns = b_panels.div_ceil(even.unwrap_or(least)).max(1);
    let across = b_panels.div_ceil(columns);
    let piece = |i: usize| {
        let (row, column) = (i / across * rows, i % across * columns);
        task(row..a_panels.min(row + rows), column..b_panels.min(column + columns));
    };
    let pieces = down * across;
    if parallel {
        crew::for_each(pieces, piece);
    } else {
        (0..pieces).for_each(piece);
    }
}

/// The panels of one block of `k`, panels of `a` and of `b` `strides` units long of which the first `units` count.
#[derive(Clone, Copy)]
struct Packed<'a> {
    units: usize,
    strides: [usize; 2],
    a: &'a [f32],
    b: &'a [f32],
}

/// One packed operand of a product that runs on one thread, to be used more than once.
#[derive(Default)]
pub struct Panels {
    lines: Vec<Line>,
    lanes: usize,
    units: usize,
}

impl Panels {
    /// The rows of a product: `lanes` lanes of `k` values.
    pub fn rows(&mut self, kernel: Kernel, operand: Operand<'_>, [lanes, k]: [usize; 2]) {
        self.pack(kernel, kernel.rows_layout(kernel.units_of(k)), operand, [lanes, k]);
    }

    /// Its columns.
    pub fn columns(&mut self, kernel: Kernel, operand: Operand<'_>, [lanes, k]: [usize; 2]) {
        self.pack(kernel, kernel.columns_layout(kernel.units_of(k)), operand, [lanes, k]);
    }

    fn pack(&mut self, kernel: Kernel, layout: Layout, operand: Operand<'_>, [lanes, k]: [usize; 2]) {
        (self.lanes, self.units) = (lanes, kernel.units_of(k));
        let values = lanes.div_ceil(layout.width) * layout.panel;
        self.lines.resize(values.div_ceil(Line::LEN), Line::ZERO);
        let out = Line::floats_mut(&mut self.lines);
        pack_panels(out, kernel, layout, operand, 0..lanes, 0..k, false);
    }

    fn floats(&self) -> &[f32] {
        Line::floats(&self.lines)
    }
}

/// `c = a b`, plus `c` when `add`, from packed rows and the first `n` packed columns. Where one side holds more of `k`,
/// the rest does not count.
///
/// # Safety
/// `c` must be valid for as many rows as the panels hold and `n` columns, and nobody else may use them meanwhile.
pub unsafe fn multiply_panels(kernel: Kernel, [a, b]: [&Panels; 2], n: usize, add: bool, c: ViewMut) {
    assert!(n <= b.lanes);
    let (units, strides) = (a.units.min(b.units), [a.units, b.units]);
    let packed = Packed { units, strides, a: a.floats(), b: b.floats() };
    let (rows, columns) = (0..a.lanes.div_ceil(kernel.rows), 0..n.div_ceil(kernel.columns));
    // SAFETY: the caller's promise.
    unsafe {
        multiply(kernel, packed, [a.lanes, n], rows, columns, 1.0, add, c);
    }
}

/// Packs every panel of some lanes of an operand.
fn pack_panels(
    out: &mut [f32],
    kernel: Kernel,
    layout: Layout,
    operand: Operand<'_>,
    lanes: Range<usize>,
    ks: Range<usize>,
    parallel: bool,
) {
    /// Panels that a task packs.
    const GROUP: usize = 8;
    let Layout { width, panel, .. } = layout;
    let group = |i: usize, out: &mut [f32]| {
        let first = lanes.start + i * GROUP * width;
        let here = first..lanes.end.min(first + GROUP * width);
        pack(out, layout, kernel.depth, operand, here, ks.clone());
    };
    let out = &mut out[..lanes.len().div_ceil(width) * panel];
    if parallel {
        crew::for_each_chunk(out, GROUP * panel, group);
    } else {
        out.chunks_mut(GROUP * panel).enumerate().for_each(|(i, out)| group(i, out));
    }
}

/// The tiles of some panels of `a` and `b`.
///
/// # Safety
/// The block of `c` that belongs to these panels is inside m × n and exclusive.
unsafe fn multiply(
    kernel: Kernel,
    packed: Packed<'_>,
    [m, n]: [usize; 2],
    rows: Range<usize>,
    columns: Range<usize>,
    alpha: f32,
    add: bool,
    c: ViewMut,
) {
    let (a_len, b_len) = (kernel.rows * packed.strides[0], kernel.columns * packed.strides[1]);
    // While a panel of `b` is used for every panel of `a`, the next one is fetched, a share each time.
    let share = (b_len / Line::LEN).div_ceil(rows.len().max(1));
    let tile = |i: usize, j: usize| {
        let (row, column) = (i * kernel.rows, j * kernel.columns);
        let size = [(m - row).min(kernel.rows), (n - column).min(kernel.columns)];
        let (a, b) = (&packed.a[i * a_len..][..a_len], &packed.b[j * b_len..][..b_len]);
        let next = (b.as_ptr().wrapping_add(b_len + (i - rows.start) * share * Line::LEN), share);
        // SAFETY: panels hold at least `units` units; the block lies inside the result and is the caller's to give.
        unsafe {
            let block = c.block(row, column);
            let tile = Tile {
                units: packed.units,
                a: a.as_ptr(),
                b: b.as_ptr(),
                next,
                c: block.data,
                stride: block.stride,
                alpha,
                add,
            };
            if size == [kernel.rows, kernel.columns] {
                kernel.run(tile);
            } else {
                run_at_edge(kernel, tile, block, size);
            }
        }
    };
    if packed.units <= SHORT {
        // Then most of the time goes to the result, whose rows are best written from end to end.
        rows.clone().for_each(|i| columns.clone().for_each(|j| tile(i, j)));
    } else {
        columns.for_each(|j| rows.clone().for_each(|i| tile(i, j)));
    }
}

/// A tile of which only `height × width` is inside the result, by way of a whole one.
///
/// # Safety
/// As for [`Kernel::run`]; the block is valid for `height` rows of `width`.
unsafe fn run_at_edge(kernel: Kernel, tile: Tile, block: ViewMut, [height, width]: [usize; 2]) {
    let mut whole = [Line::ZERO; 64];
    let whole = Line::floats_mut(&mut whole);
    assert!(whole.len() >= kernel.rows * kernel.columns);
    // SAFETY: the caller's promise.
    let out = |row| unsafe { block.row(row, width) };
    if tile.add {
        for (row, whole) in whole.chunks_exact_mut(kernel.columns).take(height).enumerate() {
            whole[..width].copy_from_slice(out(row));
        }
    }
    // SAFETY: `whole` has room for a tile; the rest is the caller's promise.
    unsafe { kernel.run(Tile { c: whole.as_mut_ptr(), stride: kernel.columns, ..tile }) }
    for (row, whole) in whole.chunks_exact(kernel.columns).take(height).enumerate() {
        out(row).copy_from_slice(&whole[..width]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::pack::{Values, round, widen};
    use crate::cpu::tile::{Units, emulated};
    use crate::uniform;

    /// Every layout and kernel, at sizes that leave edges everywhere, against obvious loops.
    #[test]
    fn every_kernel_agrees_with_loops() {
        let mut rounded = Kernel::f32();
        rounded.units = Units::Rounded;
        for (kernel, exact) in [
            (Kernel::f32(), true),
            (rounded, false),
            (Kernel::bf16(), false),
            (emulated::PAIRS, false),
            (emulated::BLOCKS, false),
        ] {
            for [m, n, k] in [
                [1, 1, 1],
                [15, 33, 7],
                [29, 70, 645],
                [150, 520, 17],
                [7, 16, 1300],
                [40, 70, 1300],
                [4200, 5, 3],
                [5, 4300, 3],
                [40, 40, 0],
            ] {
                let values = |key: u64, len: usize| -> Vec<f32> {
                    (0..len as u64).map(|i| uniform(key, i) as f32 - 0.5).collect()
                };
                let (a, b, c) = (values(1, m * k), values(2, k * n), values(3, m * n));
                let b16: Vec<u16> = b.iter().map(|&x| round(x)).collect();
                let seen = |x: f32| f64::from(if exact { x } else { widen(round(x)) });
                // A kernel may take a factor of 1 another way.
                for (a_along, b_along, stored, alpha) in [
                    (true, true, false, 0.5),
                    (true, true, false, 1.0),
                    (true, false, true, 0.5),
                    (true, false, true, 1.0),
                    (false, false, false, 0.5),
                    (false, true, true, 0.5),
                    (false, true, true, 1.0),
                ] {
                    let b_values = if stored && !exact { Values::Bf16(&b16) } else { Values::F32(&b) };
                    let layout = |values, along, k: usize, lanes: usize| {
                        if along { Operand::rows(values, k) } else { Operand::columns(values, lanes) }
                    };
                    let (a_at, b_at) = (
                        |i: usize, p: usize| a[if a_along { i * k + p } else { p * m + i }],
                        |j: usize, p: usize| b[if b_along { j * k + p } else { p * n + j }],
                    );
                    let product = Product {
                        shape: [m, n, k],
                        a: layout(Values::F32(&a), a_along, k, m),
                        b: layout(b_values, b_along, k, n),
                        alpha,
                        add: stored,
                    };
                    // Three columns before and two behind stay as they are.
                    let stride = n + 5;
                    let mut found = vec![7.0; m * stride];
                    for (found, c) in found.chunks_mut(stride).zip(c.chunks(n)) {
                        found[3..3 + n].copy_from_slice(c);
                    }
                    product.run(kernel, Output { values: &mut found, start: 3, stride });
                    assert!(found.chunks(stride).all(|row| row[..3] == [7.0; 3] && row[3 + n..] == [7.0; 2]));
                    for i in 0..m {
                        for j in 0..n {
                            let sum: f64 = (0..k).map(|p| seen(a_at(i, p)) * seen(b_at(j, p))).sum();
                            let expected =
                                f64::from(alpha) * sum + if stored { f64::from(c[i * n + j]) } else { 0.0 };
                            let error = (expected - f64::from(found[i * stride + 3 + j])).abs();
                            assert!(error < 1e-5, "{} {m}x{n}x{k} [{i}, {j}]: {error}", kernel.name);
                        }
                    }
                }
            }
        }
    }
}
