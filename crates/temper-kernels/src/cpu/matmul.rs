//! Products: few rows as dot products, many through gemmkit. On either path an element's order of summation
//! depends on the inner dimension alone, not on threads or on the other rows.

use std::sync::Once;

use gemmkit::{MatMut, MatRef, Parallelism, tuning};
use rayon::prelude::*;

use super::math;

/// Up to this many rows packing the weight costs more than it saves: decoding takes [`few_rows`] (32 prompts at once:
/// 134 → 214 tokens/s on two Zen 3 cores, together with attention's own path for a row).
const FEW: usize = 64;

/// Rows and weights of a tile of dot products.
#[cfg(target_arch = "x86_64")]
const TILE_ROWS: usize = 3;
#[cfg(target_arch = "x86_64")]
const TILE_WEIGHTS: usize = 4;

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
fn dots(x: &[f32], weight: &[f32], inputs: usize) -> Vec<f32> {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: the feature was just detected.
            return unsafe { avx512::dots(x, weight, inputs) };
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            // SAFETY: the features were just detected.
            return unsafe { avx2::dots(x, weight, inputs) };
        }
    }
    let weights = weight.len() / inputs;
    let mut out = vec![0.0; x.len() / inputs * weights];
    for (i, w) in weight.chunks_exact(inputs).enumerate() {
        for (row, x) in x.chunks_exact(inputs).enumerate() {
            out[row * weights + i] = math::dot(x, w);
        }
    }
    out
}

/// Dot products in tiles of [`TILE_ROWS`] rows and [`TILE_WEIGHTS`] weights: twelve sums, three rows and a weight fill
/// AVX2's sixteen registers, and a tile loads seven vectors for twelve products.
#[cfg(target_arch = "x86_64")]
macro_rules! dots {
    ($module:ident, $features:literal, $lanes:literal, $zero:ident, $load:ident, $fma:ident, $store:ident) => {
        mod $module {
            use std::arch::x86_64::*;

            use super::{TILE_ROWS, TILE_WEIGHTS};

            /// `[rows, weights]` dot products.
            #[target_feature(enable = $features)]
            pub fn dots(x: &[f32], weight: &[f32], inputs: usize) -> Vec<f32> {
                let (rows, weights) = (x.len() / inputs, weight.len() / inputs);
                let mut out = vec![0.0; rows * weights];
                for i in (0..weights).step_by(TILE_WEIGHTS) {
                    let w = &weight[i * inputs..(i + TILE_WEIGHTS).min(weights) * inputs];
                    for row in (0..rows).step_by(TILE_ROWS) {
                        let x = &x[row * inputs..(row + TILE_ROWS).min(rows) * inputs];
                        let out = &mut out[row * weights + i..];
                        match (x.len() / inputs, w.len() / inputs) {
                            (3, 4) => tile::<3, 4>(out, weights, x, w, inputs),
                            (2, 4) => tile::<2, 4>(out, weights, x, w, inputs),
                            (1, 4) => tile::<1, 4>(out, weights, x, w, inputs),
                            (rows, weights_here) => {
                                for r in 0..rows {
                                    for j in 0..weights_here {
                                        let (x, w) = (&x[r * inputs..], &w[j * inputs..]);
                                        tile::<1, 1>(&mut out[r * weights + j..], weights, x, w, inputs);
                                    }
                                }
                            }
                        }
                    }
                }
                out
            }

            /// `out[r · stride + j] = x[r] · w[j]` for `R` rows and `W` weights.
            #[target_feature(enable = $features)]
            fn tile<const R: usize, const W: usize>(
                out: &mut [f32],
                stride: usize,
                x: &[f32],
                w: &[f32],
                inputs: usize,
            ) {
                assert!(x.len() >= R * inputs && w.len() >= W * inputs);
                let whole = inputs - inputs % $lanes;
                let mut sums = [[$zero(); W]; R];
                for k in (0..whole).step_by($lanes) {
                    let mut rows = [$zero(); R];
                    for r in 0..R {
                        // SAFETY: `k + lanes ≤ inputs`, and `x` has `R · inputs` elements.
                        rows[r] = unsafe { $load(x.as_ptr().add(r * inputs + k)) };
                    }
                    for j in 0..W {
                        // SAFETY: as above; `w` has `W · inputs` elements.
                        let weight = unsafe { $load(w.as_ptr().add(j * inputs + k)) };
                        for r in 0..R {
                            sums[r][j] = $fma(rows[r], weight, sums[r][j]);
                        }
                    }
                }
                for r in 0..R {
                    for j in 0..W {
                        let mut lanes = [0.0f32; $lanes];
                        // SAFETY: the array has as many elements as the vector.
                        unsafe { $store(lanes.as_mut_ptr(), sums[r][j]) };
                        let mut half = $lanes / 2;
                        while half > 0 {
                            for i in 0..half {
                                lanes[i] += lanes[i + half];
                            }
                            half /= 2;
                        }
                        let (x, w) = (&x[r * inputs..][whole..inputs], &w[j * inputs..][whole..inputs]);
                        let rest: f32 = x.iter().zip(w).map(|(x, w)| x * w).sum();
                        out[r * stride + j] = lanes[0] + rest;
                    }
                }
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
dots!(avx2, "avx2,fma", 8, _mm256_setzero_ps, _mm256_loadu_ps, _mm256_fmadd_ps, _mm256_storeu_ps);
#[cfg(target_arch = "x86_64")]
dots!(avx512, "avx512f", 16, _mm512_setzero_ps, _mm512_loadu_ps, _mm512_fmadd_ps, _mm512_storeu_ps);
