//! Matrices turned in memory.

/// `[rows, columns]` of `values`, a matrix `[columns, rows]`.
pub fn transpose(values: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    /// Rows and columns that are turned at a time, so that what is read and written stays in cache.
    const TILE: usize = 64;
    let mut out = vec![0.0; values.len()];
    for r0 in (0..rows).step_by(TILE) {
        for c0 in (0..columns).step_by(TILE) {
            for r in r0..rows.min(r0 + TILE) {
                for c in c0..columns.min(c0 + TILE) {
                    out[r * columns + c] = values[c * rows + r];
                }
            }
        }
    }
    out
}
