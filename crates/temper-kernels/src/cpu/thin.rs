//! Thin products: a large matrix, taken where it lies, times one of few columns. Packing the large one, as [`Product::run`]
//! does, costs as much as the product: with 64 rows of SmolLM2 these take three quarters of its time,
//! with 32 a little more than half, and those of adapters of rank 16 0.4 to 1.

use std::ops::Range;

use super::crew;
use super::pack::{Layout, Line, Operand, Values, pack};
use super::product::{Product, ViewMut};
use super::rows::widen_each;
use super::tile::{Fetch, Thin, ThinTile, Units};

/// Lanes of a panel of the thin matrix.
const WIDTH: usize = ThinTile::COLUMNS;

/// Where a thin product goes: element `(i, j)` is `values[start + i · strides[0] + j · strides[1]]`.
pub struct Place<'a> {
    /// What holds it.
    pub values: &'a mut [f32],
    /// Its first element.
    pub start: usize,
    /// Distances of rows, and of columns; one of them is 1.
    pub strides: [usize; 2],
}

/// Computes a product whose `a` is large and whose `b` has few columns, which are rounded to bf16 where `a` is bf16; `a`'s rows
/// are then rows in memory. The order in which an element is summed depends on `k` and on how `a` lies.
pub fn run(kernel: Thin, product: Product<'_>, out: Place<'_>) {
    let Product { shape: [m, n, k], a, b, alpha, add } = product;
    if m * n == 0 {
        return;
    }
    let [down, across] = out.strides;
    assert!((down == 1 || across == 1) && out.start + (m - 1) * down + (n - 1) * across < out.values.len());
    assert!(k == 0 || (m - 1) * a.across + (k - 1) * a.along < a.values.len());
    let view = ViewMut::whole(&mut out.values[out.start..], down.max(across));
    let panels = n.div_ceil(WIDTH);
    let units = if let Values::Bf16(_) = a.values { Units::Rounded } else { Units::Exact };
    let mut packed = vec![Line::ZERO; panels * k];
    let packed = Line::floats_mut(&mut packed);
    let layout = Layout { width: WIDTH, depth: 1, panel: WIDTH * k, units };
    crew::for_each_chunk(packed, layout.panel.max(1), |panel, out| {
        pack(out, layout, 1, b, panel * WIDTH..n.min((panel + 1) * WIDTH), 0..k);
    });
    let packed = &*packed;

    // Rows in memory are read in long pieces, and those of a task fit the second-level cache. Rows that are columns there share
    // its lines: few steps of many rows.
    let (most_steps, most_rows, tasks_each) = if a.along == 1 { (576, 96, 6) } else { (64, 192, 2) };
    let block = k.div_ceil(k.div_ceil(most_steps).max(1)).max(1);
    let rows_each = (m / (tasks_each * rayon::current_num_threads())).clamp(1, most_rows);
    let rows_each = rows_each.next_multiple_of(kernel.rows);
    let put = |out: &mut f32, sum: f32| *out = if add { *out + alpha * sum } else { alpha * sum };
    crew::for_each(m.div_ceil(rows_each), |task| {
        let rows = task * rows_each..m.min((task + 1) * rows_each);
        let sums = sums(kernel, a, rows.clone(), packed, [panels, k, block]);
        let stride = panels * WIDTH;
        if across == 1 {
            for (row, sums) in rows.zip(sums.chunks_exact(stride)) {
                // SAFETY: a row of the result, as was asserted, and no other task's.
                let out = unsafe { view.row(row, n) };
                out.iter_mut().zip(sums).for_each(|(out, &sum)| put(out, sum));
            }
        } else {
            for column in 0..n {
                // SAFETY: a piece of a column that lies along itself, likewise.
                let out = unsafe { view.block(column, rows.start).row(0, rows.len()) };
                out.iter_mut()
                    .zip(sums[column..].iter().step_by(stride))
                    .for_each(|(out, &sum)| put(out, sum));
            }
        }
    });
}

/// Some rows of `a b`, `[rows, panels · WIDTH]`, summed in blocks of `k`.
fn sums(
    kernel: Thin,
    a: Operand<'_>,
    rows: Range<usize>,
    packed: &[f32],
    [panels, k, block]: [usize; 3],
) -> Vec<f32> {
    let stride = panels * WIDTH;
    let mut out = vec![0.0; rows.len() * stride];
    let mut widened = Vec::new();
    for start in (0..k).step_by(block) {
        let ks = start..k.min(start + block);
        for row in rows.clone().step_by(kernel.rows) {
            let height = kernel.rows.min(rows.end - row);
            let at = row * a.across + start * a.along;
            let (here, strides) = match a.values {
                Values::F32(x) => (&raw const x[at], [a.across, a.along]),
                Values::Bf16(x) => {
                    assert_eq!(a.along, 1);
                    widened.resize(kernel.rows * block, 0.0);
                    for (out, row) in widened.chunks_exact_mut(block).zip(0..height) {
                        widen_each(out, &x[at + row * a.across..][..ks.len()]);
                    }
                    (widened.as_ptr(), [block, 1])
                }
            };
            let next =
                if row + kernel.rows < rows.end { [row + kernel.rows, start] } else { [rows.start, ks.end] };
            let fetch = fetch(kernel, a, [row, start], next, ks.len());
            for panel in 0..panels {
                let tile = ThinTile {
                    rows: height,
                    k: ks.len(),
                    a: here,
                    strides,
                    fetch: if panel == 0 { fetch } else { Fetch::NONE },
                    b: &raw const packed[(panel * k + start) * WIDTH],
                    c: &raw mut out[(row - rows.start) * stride + panel * WIDTH],
                    stride,
                };
                // SAFETY: `run` asserted that these rows and steps lie inside `a`, or they are in `widened`; a panel holds `k`
                // steps, and `out` the tile.
                unsafe { kernel.run(tile) }
            }
        }
    }
    out
}

/// What a tile at `[row, step]` fetches of `a`: the whole next tile, or of columns, which it shares lines with, the next block.
fn fetch(kernel: Thin, a: Operand<'_>, [row, step]: [usize; 2], next: [usize; 2], steps: usize) -> Fetch {
    let size = if let Values::Bf16(_) = a.values { 2 } else { 4 };
    let address = |[row, step]: [usize; 2]| a.values.address(row * a.across + step * a.along);
    if a.along == 1 {
        let line = size_of::<Line>();
        let times = (steps * size).div_ceil(line);
        Fetch { from: address(next), lines: kernel.rows, apart: a.across * size, advance: line, times }
    } else {
        let (lines, apart) = (Fetch::STEPS, a.along * size);
        let times = steps.div_ceil(lines);
        Fetch { from: address([row, step + steps]), lines, apart, advance: lines * apart, times }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::pack::{round, widen};
    use crate::uniform;

    /// Edges everywhere, every way of lying and being stored, written and added either way, against obvious loops.
    #[test]
    fn agrees_with_loops() {
        let values = |key: u64, len: usize| -> Vec<f32> {
            (0..len as u64).map(|i| uniform(key, i) as f32 - 0.5).collect()
        };
        let rounded = |x: &[f32]| -> Vec<u16> { x.iter().map(|&x| round(x)).collect() };
        for [m, n, k] in
            [[1, 1, 1], [7, 16, 321], [500, 3, 130], [41, 48, 64], [12, 17, 700], [0, 4, 4], [4, 4, 0]]
        {
            let (a, b) = (values(1, m * k), values(2, k * n));
            let (a16, b16) = (rounded(&a), rounded(&b));
            let [a_rows, b16_columns] =
                [Operand::rows(Values::F32(&a), k), Operand::columns(Values::Bf16(&b16), n)];
            let [b_rows, b_columns] =
                [Operand::rows(Values::F32(&b), k), Operand::columns(Values::F32(&b), n)];
            for (a, b) in [
                (a_rows, b_rows),
                (a_rows, b16_columns),
                (Operand::columns(Values::F32(&a), m), b_columns),
                (Operand::rows(Values::Bf16(&a16), k), b_rows),
            ] {
                let value = |operand: Operand<'_>, lane: usize, step: usize| {
                    let i = lane * operand.across + step * operand.along;
                    match operand.values {
                        Values::F32(x) => x[i],
                        Values::Bf16(x) => widen(x[i]),
                    }
                };
                let all_bf16 = matches!(a.values, Values::Bf16(_));
                let seen = |j: usize, s: usize| match value(b, j, s) {
                    x if all_bf16 => widen(round(x)),
                    x => x,
                };
                for (kernel, turned, add) in
                    [(Thin::new(), false, true), (Thin::new(), true, false), (Thin::PORTABLE, true, true)]
                {
                    // Two before, and gaps between, stay as they are.
                    let strides = if turned { [1, m + 3] } else { [n + 3, 1] };
                    let before = values(3, 2 + (m + 3) * (n + 3));
                    let mut found = before.clone();
                    let product = Product { shape: [m, n, k], a, b, alpha: 0.5, add };
                    run(kernel, product, Place { values: &mut found, start: 2, strides });
                    let mut expected: Vec<f64> = before.iter().map(|&x| f64::from(x)).collect();
                    for i in 0..m {
                        for j in 0..n {
                            let terms = (0..k).map(|s| f64::from(value(a, i, s)) * f64::from(seen(j, s)));
                            let out = &mut expected[2 + i * strides[0] + j * strides[1]];
                            *out = 0.5 * terms.sum::<f64>() + if add { *out } else { 0.0 };
                        }
                    }
                    for (i, (&found, expected)) in found.iter().zip(expected).enumerate() {
                        let error = (f64::from(found) - expected).abs();
                        assert!(
                            error < 1e-5 * (1.0 + k as f64).sqrt(),
                            "{m}x{n}x{k} at {i}: {found} for {expected}"
                        );
                    }
                }
            }
        }
    }
}
