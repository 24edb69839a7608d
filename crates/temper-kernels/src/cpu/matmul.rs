//! Products through gemmkit, on one path: an element's order of summation depends on the inner dimension
//! alone, not on threads or on the number of rows.

use std::sync::Once;

use gemmkit::{MatMut, MatRef, Parallelism, tuning};
use multiversion::multiversion;
use rayon::prelude::*;

use super::math;

/// Up to this many rows a product is bound by reading the weight, and packing it would cost more than the
/// product: decoding takes [`few_rows`].
const FEW: usize = 4;

/// Overrides the `GEMMKIT_*` environment and turns off the special paths for small shapes, whose order of
/// summation differs.
pub fn configure() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        tuning::set_gemv_threshold(0);
        tuning::set_small_k_threshold(0);
        tuning::set_small_mn_dim(0);
        // Always pack: walking down a column of a gradient is what makes an unpacked weight product slow
        // (94 → 140 GFLOP/s at 1024 × 3072 × 576 on two Zen 3 cores).
        tuning::set_lhs_pack_threshold(0);
        tuning::set_rhs_pack_threshold(0);
        tuning::set_kc(512);
        tuning::set_kc_min(tuning::KC_MIN_DEFAULT);
        tuning::set_deep_kc_bytes(tuning::DEEP_KC_BYTES_DEFAULT);
        tuning::set_k_stream_max(tuning::K_STREAM_MAX_DEFAULT);
    });
}

/// `c = a b + beta c` with every thread of the current pool.
pub fn product(c: MatMut<'_, f32>, a: MatRef<'_, f32>, b: MatRef<'_, f32>, beta: f32) {
    gemmkit::gemm(1.0, a, b, beta, c, Parallelism::Rayon(rayon::current_num_threads()));
}

/// `out [rows, outputs] = x [rows, inputs] · wᵀ [inputs, outputs]`, plus what `out` held when `add`.
pub fn forward(out: &mut [f32], x: &[f32], weight: &[f32], [rows, inputs, outputs]: [usize; 3], add: bool) {
    let (out, x) = (&mut out[..rows * outputs], &x[..rows * inputs]);
    if rows <= FEW {
        return few_rows(out, x, &weight[..outputs * inputs], inputs, add);
    }
    product(
        MatMut::from_row_major(out, rows, outputs),
        MatRef::from_row_major(x, rows, inputs),
        MatRef::new(weight, inputs, outputs, 1, inputs as isize),
        if add { 1.0 } else { 0.0 },
    );
}

/// `dx [rows, inputs] = dout [rows, outputs] · w [outputs, inputs]`, plus what `dx` held when `add`.
pub fn backward_input(
    dx: &mut [f32],
    dout: &[f32],
    weight: &[f32],
    [rows, inputs, outputs]: [usize; 3],
    add: bool,
) {
    product(
        MatMut::from_row_major(&mut dx[..rows * inputs], rows, inputs),
        MatRef::from_row_major(&dout[..rows * outputs], rows, outputs),
        MatRef::from_row_major(&weight[..outputs * inputs], outputs, inputs),
        if add { 1.0 } else { 0.0 },
    );
}

/// `dweight [outputs, inputs] += doutᵀ [outputs, rows] · x [rows, inputs]`.
pub fn backward_weight(dweight: &mut [f32], dout: &[f32], x: &[f32], [rows, inputs, outputs]: [usize; 3]) {
    product(
        MatMut::from_row_major(&mut dweight[..outputs * inputs], outputs, inputs),
        MatRef::new(&dout[..rows * outputs], outputs, rows, 1, outputs as isize),
        MatRef::from_row_major(&x[..rows * inputs], rows, inputs),
        1.0,
    );
}

/// A product of few rows as dot products, each weight read once for all rows.
fn few_rows(out: &mut [f32], x: &[f32], weight: &[f32], inputs: usize, add: bool) {
    const OUTPUTS: usize = 64;
    let outputs = weight.len() / inputs;
    let columns: Vec<Vec<f32>> =
        weight.par_chunks(OUTPUTS * inputs).map(|weight| dots(x, weight, inputs)).collect();
    for (chunk, column) in columns.iter().enumerate() {
        let rows = x.len() / inputs;
        let width = column.len() / rows;
        for (row, values) in column.chunks_exact(width).enumerate() {
            let out = &mut out[row * outputs + chunk * OUTPUTS..][..width];
            for (out, value) in out.iter_mut().zip(values) {
                *out = if add { *out + value } else { *value };
            }
        }
    }
}

/// `[rows, weights]` dot products.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl+fma", "x86_64+avx2+fma"))]
fn dots(x: &[f32], weight: &[f32], inputs: usize) -> Vec<f32> {
    let weights = weight.len() / inputs;
    let mut out = vec![0.0; x.len() / inputs * weights];
    for (i, w) in weight.chunks_exact(inputs).enumerate() {
        for (row, x) in x.chunks_exact(inputs).enumerate() {
            out[row * weights + i] = math::dot(x, w);
        }
    }
    out
}
