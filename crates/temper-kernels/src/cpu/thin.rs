//! Thin products: a large matrix, taken where it lies, times one of few columns. Packing the large one, as
//! [`super::product`] does, would cost as much as the product: with 800 rows and 16 columns these take 0.4 to 0.7 of the time for the widest layers of
//! SmolLM2, and the same for its narrowest.

use super::crew;
use super::pack::{Layout, Line, Operand, pack};
use super::tile::{Thin, ThinTile, Units};

/// Lanes of a panel of the thin matrix.
const WIDTH: usize = ThinTile::COLUMNS;

/// A matrix `[rows, columns]`.
pub struct ThinMatrix {
    values: Vec<f32>,
    columns: usize,
}

impl ThinMatrix {
    /// Its rows, in order.
    pub fn rows(&self) -> impl Iterator<Item = &[f32]> {
        let stride = self.columns.max(1).next_multiple_of(WIDTH);
        self.values.chunks_exact(stride).map(|row| &row[..self.columns])
    }
}

/// `a b` for `a [m, k]`, of which element `(i, s)` is `a[i · across + s · along]`, and `b [k, n]`, lanes along the columns.
/// The order in which an element is summed depends on `k` and on which of the two distances is 1.
pub fn product(
    kernel: Thin,
    a: &[f32],
    [across, along]: [usize; 2],
    b: Operand<'_>,
    [m, n, k]: [usize; 3],
) -> ThinMatrix {
    let (panels, panel) = (n.div_ceil(WIDTH), WIDTH * k);
    let stride = panels * WIDTH;
    let mut out = ThinMatrix { values: vec![0.0; m * stride], columns: n };
    if m * n * k == 0 {
        return out;
    }
    assert!((m - 1) * across + (k - 1) * along < a.len());
    let mut packed = vec![Line::ZERO; panels * k];
    let packed = Line::floats_mut(&mut packed);
    pack(packed, Layout { width: WIDTH, depth: 1, panel, units: Units::Exact }, 1, b, 0..n, 0..k);
    let packed = &*packed;

    // Rows of a task, and steps that are summed before the result is touched. A row that is read along itself needs
    // little else in cache. Rows that are columns of what lies there share its lines: some steps of many rows, and the next
    // steps are fetched meanwhile, because the processor does not foresee them.
    let (group, block, ahead) =
        if along == 1 { (kernel.rows, 320, 0) } else { (32 * kernel.rows, 64, 64 * along) };
    crew::for_each_chunk(&mut out.values, group * stride, |i, out| {
        let rows = out.len() / stride;
        for start in (0..k).step_by(block) {
            for row in (0..rows).step_by(kernel.rows) {
                for p in 0..panels {
                    let tile = ThinTile {
                        rows: kernel.rows.min(rows - row),
                        k: block.min(k - start),
                        a: &raw const a[(i * group + row) * across + start * along],
                        strides: [across, along],
                        ahead: if p == 0 { ahead } else { 0 },
                        b: &raw const packed[p * panel + start * WIDTH],
                        c: &raw mut out[row * stride + p * WIDTH],
                        stride,
                    };
                    // SAFETY: these rows and steps lie inside `a`, as was asserted, the panel holds `k` steps, and the tile of
                    // the result is inside this task's rows.
                    unsafe { kernel.run(tile) }
                }
            }
        }
    });
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::pack::{Values, round, widen};
    use crate::uniform;

    /// Edges everywhere, both ways of lying, stored as f32 and as bf16, against obvious loops.
    #[test]
    fn agrees_with_loops() {
        let values = |key: u64, len: usize| -> Vec<f32> {
            (0..len as u64).map(|i| uniform(key, i) as f32 - 0.5).collect()
        };
        for [m, n, k] in
            [[1, 1, 1], [7, 16, 321], [500, 3, 130], [41, 48, 64], [12, 17, 700], [0, 4, 4], [4, 4, 0]]
        {
            let (a, b) = (values(1, m * k), values(2, k * n));
            let b16: Vec<u16> = b.iter().map(|&x| round(x)).collect();
            for along in [true, false] {
                let strides = if along { [k, 1] } else { [1, m] };
                for (kernel, stored) in [
                    (Thin::new(), Values::F32(&b)),
                    (Thin::new(), Values::Bf16(&b16)),
                    (Thin::PORTABLE, Values::F32(&b)),
                ] {
                    let seen = |i: usize| match stored {
                        Values::F32(b) => b[i],
                        Values::Bf16(b) => widen(b[i]),
                    };
                    let out = product(kernel, &a, strides, Operand::columns(stored, n), [m, n, k]);
                    let rows: Vec<&[f32]> = out.rows().collect();
                    assert_eq!(rows.len(), m);
                    for (i, row) in rows.iter().enumerate() {
                        assert_eq!(row.len(), n);
                        for (j, &found) in row.iter().enumerate() {
                            let terms = (0..k).map(|s| {
                                f64::from(a[i * strides[0] + s * strides[1]]) * f64::from(seen(s * n + j))
                            });
                            let expected: f64 = terms.sum();
                            assert!(
                                (f64::from(found) - expected).abs() < 1e-5 * (1.0 + k as f64).sqrt(),
                                "{m}x{n}x{k} along {along}, ({i}, {j}): {found} for {expected}"
                            );
                        }
                    }
                }
            }
        }
    }
}
