//! Thin products: a large matrix, taken where it lies, times one of few columns. Packing the large one, as [`Product::run`]
//! does, costs as much as the product. With a weight of SmolLM2 and 64 columns, which are rows of activations, these take
//! three quarters of its time, with 32 a little more than half, and those of adapters of rank 16 0.4 to 1.

use std::cell::Cell;
use std::ops::Range;

use super::crew;
use super::pack::{Layout, Line, Operand, Values, pack};
use super::product::{Product, ViewMut};
use super::rows::widen_each;
use super::tile::{Fetch, Thin, ThinTile, Units};

/// Lanes of a panel of the thin matrix.
const WIDTH: usize = ThinTile::COLUMNS;

thread_local! {
    /// The panels of the last product of this thread, kept so that they need not be allocated and zeroed again.
    static PANELS: Cell<Vec<Line>> = const { Cell::new(Vec::new()) };
}

/// Where a thin product goes: element `(i, j)` is `values[start + i · strides[0] + j · strides[1]]`. So its rows can be
/// columns of what holds it.
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
pub fn run(product: Product<'_>, out: Place<'_>) {
    run_with(Thin::of_machine(), product, out);
}

fn run_with(kernel: Thin, product: Product<'_>, out: Place<'_>) {
    let Product { shape: [m, n, k], a, b, alpha, add } = product;
    if m * n == 0 {
        return;
    }
    let units = if let Values::Bf16(_) = a.values { Units::Rounded } else { Units::Exact };
    assert!(units == Units::Exact || a.along == 1);
    assert!(k == 0 || (m - 1) * a.across + (k - 1) * a.along < a.values.len());
    // Rows, or columns, lie in memory one behind the other: tasks write different values.
    let [down, across] = out.strides;
    assert!((across == 1 && n <= down) || (down == 1 && m <= across));
    assert!(out.start + (m - 1) * down + (n - 1) * across < out.values.len());
    let view = ViewMut::whole(&mut out.values[out.start..], down.max(across));

    let panels = n.div_ceil(WIDTH);
    let layout = Layout { width: WIDTH, depth: 1, panel: WIDTH * k, units };
    let mut lines = PANELS.take();
    lines.resize(lines.len().max(panels * k), Line::ZERO);
    let packed = Line::floats_mut(&mut lines[..panels * k]);
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
        let sums = sum_rows(kernel, a, rows.clone(), packed, [panels, k, block]);
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
    PANELS.set(lines);
}

/// Some rows of `a b`, `[rows, panels · WIDTH]`, summed in blocks of `k`.
fn sum_rows(
    kernel: Thin,
    a: Operand<'_>,
    rows: Range<usize>,
    packed: &[f32],
    [panels, k, block]: [usize; 3],
) -> Vec<f32> {
    let stride = panels * WIDTH;
    let mut sums = vec![0.0; rows.len() * stride];
    let mut wide = Vec::new();
    for start in (0..k).step_by(block) {
        let steps = block.min(k - start);
        for row in rows.clone().step_by(kernel.rows) {
            let height = kernel.rows.min(rows.end - row);
            let at = row * a.across + start * a.along;
            let (here, a_strides) = match a.values {
                Values::F32(x) => (x[at..].as_ptr(), [a.across, a.along]),
                Values::Bf16(x) => {
                    wide.resize(kernel.rows * block, 0.0);
                    for (i, wide) in wide.chunks_exact_mut(block).take(height).enumerate() {
                        widen_each(wide, &x[at + i * a.across..][..steps]);
                    }
                    (wide.as_ptr(), [block, 1])
                }
            };
            let next = if a.along == 1 && row + kernel.rows < rows.end {
                Some([row + kernel.rows, start])
            } else if start + block < k {
                Some([if a.along == 1 { rows.start } else { row }, start + block])
            } else {
                None
            };
            let ahead = next.map_or(Fetch::NONE, |at| fetch(kernel, a, at, block.min(k - at[1])));
            for panel in 0..panels {
                let tile = ThinTile {
                    rows: height,
                    k: steps,
                    a: here,
                    a_strides,
                    fetch: if panel == 0 { ahead } else { Fetch::NONE },
                    b: packed[(panel * k + start) * WIDTH..][..steps * WIDTH].as_ptr(),
                    c: sums[(row - rows.start) * stride + panel * WIDTH..][..(height - 1) * stride + WIDTH]
                        .as_mut_ptr(),
                    stride,
                };
                // SAFETY: `run_with` asserted that these rows and steps lie inside `a`, or they are in `wide`; the slices show the
                // rest.
                unsafe { kernel.run(tile) }
            }
        }
    }
    sums
}

/// What a tile fetches ahead: the next tile of rows, or the next steps of the columns that it shares lines with.
fn fetch(kernel: Thin, a: Operand<'_>, [row, step]: [usize; 2], steps: usize) -> Fetch {
    let from = a.values.address(row * a.across + step * a.along);
    let size = a.values.size();
    if a.along == 1 {
        let line = size_of::<Line>();
        let times = (steps * size).div_ceil(line);
        Fetch { from, lines: kernel.rows, apart: a.across * size, advance: line, times }
    } else {
        let (lines, apart) = (Fetch::STEPS, a.along * size);
        Fetch { from, lines, apart, advance: lines * apart, times: steps.div_ceil(lines) }
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
                for (kernel, turned, add) in [
                    (Thin::of_machine(), false, true),
                    (Thin::of_machine(), true, false),
                    (Thin::PORTABLE, true, true),
                ] {
                    // Two before, and gaps between, stay as they are.
                    let strides = if turned { [1, m + 3] } else { [n + 3, 1] };
                    let before = values(3, 2 + (m + 3) * (n + 3));
                    let mut found = before.clone();
                    let product = Product { shape: [m, n, k], a, b, alpha: 0.5, add };
                    run_with(kernel, product, Place { values: &mut found, start: 2, strides });
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
