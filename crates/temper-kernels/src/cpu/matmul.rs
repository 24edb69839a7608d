//! The products of a dense layer: few rows as dot products, more as thin products, many from packed tiles. On each path
//! an element's order of summation depends on the inner dimension alone, not on threads or on the other rows.

use super::pack::{Element, Operand, Values, round, widen};
use super::product::{Output, Product, ViewMut};
use super::thin::{self, Place};
use super::tile::Kernel;
use super::weight::Weight;
use super::{Precision, math};

/// Up to this many rows a product waits for memory: dot products, which read the weight in four places. Between 8, which were
/// faster so on Zen 3, and 32, which were slower, nothing was measured.
const DOT_ROWS: usize = 12;
/// Up to this many rows packing the weight costs more than it saves: thin products take it where it lies.
pub const THIN_ROWS: usize = 64;

/// Rows and weights of a tile of dot products.
#[cfg(target_arch = "x86_64")]
const TILE_ROWS: usize = 3;
const TILE_WEIGHTS: usize = 4;

/// `out [rows, outputs] = x [rows, inputs] · wᵀ [inputs, outputs]`; `w` is rows of the weight from `first` on.
pub fn forward(
    out: &mut [f32],
    x: &[f32],
    weight: &Weight,
    first: usize,
    [rows, inputs, outputs]: [usize; 3],
) {
    if rows == 0 {
        return;
    }
    let (out, x) = (&mut out[..rows * outputs], &x[..rows * inputs]);
    if rows <= DOT_ROWS {
        return few_rows(out, x, weight, first, [inputs, outputs]);
    }
    weight.by_stripes(first..first + outputs, inputs, |stripe, values| {
        let of_rows = Operand::rows(Values::F32(x), inputs);
        let of_weight = Operand::rows(values, inputs);
        if rows > THIN_ROWS {
            let shape = [rows, stripe.len(), inputs];
            let product = Product { shape, a: of_rows, b: of_weight, alpha: 1.0, add: false };
            product.run(values.kernel(), Output { values: out, start: stripe.start, stride: outputs });
        } else {
            let shape = [stripe.len(), rows, inputs];
            let product = Product { shape, a: of_weight, b: of_rows, alpha: 1.0, add: false };
            thin::run(product, Place { values: out, start: stripe.start, strides: [1, outputs] });
        }
    });
}

/// `dx [rows, inputs] = dout [rows, outputs] · w [outputs, inputs]`, plus what `dx` held when `add`; `w` as above.
pub fn backward_input(
    dx: &mut [f32],
    dout: &[f32],
    weight: &Weight,
    first: usize,
    [rows, inputs, outputs]: [usize; 3],
    add: bool,
) {
    if rows == 0 {
        return;
    }
    let (dx, dout) = (&mut dx[..rows * inputs], &dout[..rows * outputs]);
    weight.by_stripes(first..first + outputs, inputs, |stripe, values| {
        let product = Product {
            shape: [rows, inputs, stripe.len()],
            a: Operand::rows(Values::F32(&dout[stripe.start..]), outputs),
            b: Operand::columns(values, inputs),
            alpha: 1.0,
            add: add || stripe.start > 0,
        };
        product.run(values.kernel(), Output::whole(dx, inputs));
    });
}

/// `dweight [outputs, inputs] = doutᵀ [outputs, rows] · x [rows, inputs]`, plus what `dweight` held when `add`.
pub fn backward_weight(
    dweight: &mut [f32],
    dout: &[f32],
    x: &[f32],
    kernel: Kernel,
    [rows, inputs, outputs]: [usize; 3],
    add: bool,
) {
    let product = Product {
        shape: [outputs, inputs, rows],
        a: Operand::columns(Values::F32(&dout[..rows * outputs]), outputs),
        b: Operand::columns(Values::F32(&x[..rows * inputs]), inputs),
        alpha: 1.0,
        add,
    };
    product.run(kernel, Output::whole(&mut dweight[..outputs * inputs], inputs));
}

/// A product of few rows as dot products, each weight read once for all rows.
fn few_rows(out: &mut [f32], x: &[f32], weight: &Weight, first: usize, [inputs, outputs]: [usize; 2]) {
    /// Tasks of a thread, so that none waits long for another, and weights of a task, which it reads in long pieces.
    const TASKS: usize = 4;
    const LEAST: usize = 32;
    const MOST: usize = 256;
    let rows = x.len() / inputs;
    assert_eq!(out.len(), rows * outputs);
    let rounded: Vec<f32>;
    let x = match weight.precision() {
        Precision::F32 => x,
        Precision::Bf16 => {
            rounded = x.iter().map(|&x| widen(round(x))).collect();
            &rounded
        }
    };
    let view = ViewMut::whole(out, outputs);
    let even = outputs / (TASKS * rayon::current_num_threads());
    let height = even.clamp(LEAST, MOST).next_multiple_of(TILE_WEIGHTS);
    weight.by_pieces(first..first + outputs, inputs, height, |piece, weight| {
        // SAFETY: the outputs of these weights are columns of `out`, and no other task's.
        unsafe {
            let (out, shape) = (view.block(0, piece.start), [rows, piece.len(), inputs]);
            (0..rows).for_each(|row| out.row(row, piece.len()).fill(0.0));
            match weight {
                Values::F32(weight) => f32::add_dots(out, x, weight, inputs, shape),
                Values::Bf16(weight) => u16::add_dots(out, x, weight, inputs, shape),
            }
        }
    });
}

/// `out [rows, count] = x [rows, inputs] · yᵀ` for `count` rows of `y` that are `stride` apart: dot products by this thread.
pub fn dots(out: Output<'_>, x: &[f32], y: &[f32], stride: usize, [rows, count, inputs]: [usize; 3]) {
    let (start, width) = (out.start, out.stride);
    let values = &mut out.values[..rows * width];
    assert!(start + count <= width);
    values.chunks_exact_mut(width).for_each(|out| out[start..start + count].fill(0.0));
    // SAFETY: there are as many rows, each with `count` columns from `start` on, and they are this call's own.
    unsafe {
        let out = ViewMut::whole(values, width).block(0, start);
        f32::add_dots(out, x, y, stride, [rows, count, inputs]);
    }
}

/// A stored weight and its dot products.
trait Stored: Element + Sync {
    /// Adds `[rows, weights]` dot products of `inputs` values to `out`; the weights are `stride` apart.
    ///
    /// # Safety
    /// `out` must be valid for as many rows and columns, and nobody else may use them meanwhile.
    unsafe fn add_dots(out: ViewMut, x: &[f32], weight: &[Self], stride: usize, shape: [usize; 3]);
}

macro_rules! stored {
    ($type:ty, $avx2:ident, $avx512:ident) => {
        impl Stored for $type {
            unsafe fn add_dots(out: ViewMut, x: &[f32], weight: &[$type], stride: usize, shape: [usize; 3]) {
                #[cfg(target_arch = "x86_64")]
                {
                    if is_x86_feature_detected!("avx512f") {
                        // SAFETY: the feature was just detected; the rest is the caller's promise.
                        return unsafe { $avx512::add_dots(out, x, weight, stride, shape) };
                    }
                    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                        // SAFETY: likewise.
                        return unsafe { $avx2::add_dots(out, x, weight, stride, shape) };
                    }
                }
                // SAFETY: the caller's promise.
                unsafe { portable_add_dots(out, x, weight, stride, shape) }
            }
        }
    };
}

stored!(f32, avx2, avx512);
stored!(u16, avx2_bf16, avx512_bf16);

/// # Safety
/// As for [`Stored::add_dots`].
unsafe fn portable_add_dots<W: Element>(
    out: ViewMut,
    x: &[f32],
    weight: &[W],
    stride: usize,
    [rows, weights, inputs]: [usize; 3],
) {
    let mut values = vec![0.0; inputs];
    for i in 0..weights {
        values.iter_mut().zip(&weight[i * stride..]).for_each(|(value, w)| *value = w.value());
        for row in 0..rows {
            // SAFETY: the caller's promise.
            unsafe { out.block(row, i).row(0, 1)[0] += math::dot(&x[row * inputs..][..inputs], &values) }
        }
    }
}

/// Dot products in tiles of [`TILE_ROWS`] rows and [`TILE_WEIGHTS`] weights: twelve sums, three rows and a weight fill
/// AVX2's sixteen registers, and a tile loads seven vectors for twelve products.
#[cfg(target_arch = "x86_64")]
macro_rules! dots {
    ($module:ident, $features:literal, $lanes:literal, $zero:ident, $load:ident, $fma:ident, $across:path,
     $stored:ty, $load_stored:path) => {
        mod $module {
            use std::arch::x86_64::*;

            use super::{Element, TILE_ROWS, TILE_WEIGHTS, ViewMut};

            /// # Safety
            /// As for [`Stored::add_dots`](super::Stored::add_dots).
            #[target_feature(enable = $features)]
            pub unsafe fn add_dots(
                out: ViewMut,
                x: &[f32],
                weight: &[$stored],
                stride: usize,
                [rows, weights, inputs]: [usize; 3],
            ) {
                let whole = inputs - inputs % $lanes;
                // Few rows wait for memory, which comes faster from four places at once than from one: 35 instead of 22 GB/s with
                // one row on two Zen 3 cores (a sum: 40 and 24). So a tile's weights are a quarter of all apart.
                let tiles = weights / TILE_WEIGHTS;
                let strides = [inputs, tiles * stride, tiles];
                let of_tiles = (0..tiles).map(|i| (i, TILE_WEIGHTS));
                for (i, many) in of_tiles.chain((tiles * TILE_WEIGHTS..weights).map(|i| (i, 1))) {
                    let w = &weight[i * stride..];
                    for row in (0..rows).step_by(TILE_ROWS) {
                        let x = &x[row * inputs..];
                        // SAFETY: the caller's promise, for these rows and weights.
                        unsafe {
                            let out = out.block(row, i);
                            match (TILE_ROWS.min(rows - row), many) {
                                (3, 4) => tile::<3, 4>(out, x, w, whole, strides),
                                (2, 4) => tile::<2, 4>(out, x, w, whole, strides),
                                (1, 4) => tile::<1, 4>(out, x, w, whole, strides),
                                (rows, _) => {
                                    for r in 0..rows {
                                        tile::<1, 1>(out.block(r, 0), &x[r * inputs..], w, whole, strides);
                                    }
                                }
                            }
                        }
                    }
                }
                if whole < inputs {
                    for row in 0..rows {
                        let x = &x[row * inputs..][whole..inputs];
                        // SAFETY: the caller's promise.
                        let out = unsafe { out.row(row, weights) };
                        for (i, out) in out.iter_mut().enumerate() {
                            let w = &weight[i * stride..][..inputs];
                            *out += x.iter().zip(&w[whole..]).map(|(x, w)| x * w.value()).sum::<f32>();
                        }
                    }
                }
            }

            /// `out[r][j] += x[r] · w[j]` for `R` rows and `W` weights of `len` values, which are whole vectors; the strides
            /// are the distances of rows of `x`, of weights and of their outputs. Not inlined: its addresses would not all stay in registers.
            ///
            /// # Safety
            /// `out` must be valid for `R` rows and these `W` columns, and nobody else may use them meanwhile.
            #[inline(never)]
            #[target_feature(enable = $features)]
            unsafe fn tile<const R: usize, const W: usize>(
                out: ViewMut,
                x: &[f32],
                w: &[$stored],
                len: usize,
                [x_stride, w_stride, out_stride]: [usize; 3],
            ) {
                assert!(x.len() >= (R - 1) * x_stride + len && w.len() >= (W - 1) * w_stride + len);
                let mut sums = [[$zero(); TILE_WEIGHTS]; R];
                for k in (0..len).step_by($lanes) {
                    let mut rows = [$zero(); R];
                    for r in 0..R {
                        // SAFETY: `k + lanes ≤ len`, and `x` reaches so far in the last of `R` rows.
                        rows[r] = unsafe { $load(x.as_ptr().add(r * x_stride + k)) };
                    }
                    for j in 0..W {
                        // SAFETY: as above for the last of `W` weights.
                        let weight = unsafe { $load_stored(w.as_ptr().add(j * w_stride + k)) };
                        for r in 0..R {
                            sums[r][j] = $fma(rows[r], weight, sums[r][j]);
                        }
                    }
                }
                for r in 0..R {
                    let dots = $across(sums[r]);
                    for j in 0..W {
                        // SAFETY: the caller's promise.
                        unsafe { out.block(r, j * out_stride).row(0, 1)[0] += dots[j] };
                    }
                }
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
dots!(
    avx2,
    "avx2,fma",
    8,
    _mm256_setzero_ps,
    _mm256_loadu_ps,
    _mm256_fmadd_ps,
    super::vectors::eight_across,
    f32,
    _mm256_loadu_ps
);
#[cfg(target_arch = "x86_64")]
dots!(
    avx2_bf16,
    "avx2,fma",
    8,
    _mm256_setzero_ps,
    _mm256_loadu_ps,
    _mm256_fmadd_ps,
    super::vectors::eight_across,
    u16,
    super::vectors::eight
);
#[cfg(target_arch = "x86_64")]
dots!(
    avx512,
    "avx512f",
    16,
    _mm512_setzero_ps,
    _mm512_loadu_ps,
    _mm512_fmadd_ps,
    super::vectors::sixteen_across,
    f32,
    _mm512_loadu_ps
);
#[cfg(target_arch = "x86_64")]
dots!(
    avx512_bf16,
    "avx512f",
    16,
    _mm512_setzero_ps,
    _mm512_loadu_ps,
    _mm512_fmadd_ps,
    super::vectors::sixteen_across,
    u16,
    super::vectors::sixteen
);

/// What the tiles need of vectors: bf16 as f32 (the bits, moved up) and sums across the lanes.
#[cfg(target_arch = "x86_64")]
mod vectors {
    use std::arch::x86_64::*;

    use super::TILE_WEIGHTS;

    /// # Safety
    /// `x` has eight elements.
    #[inline]
    #[target_feature(enable = "avx2")]
    pub unsafe fn eight(x: *const u16) -> __m256 {
        // SAFETY: the caller's promise.
        let bits = unsafe { _mm_loadu_si128(x.cast()) };
        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(bits)))
    }

    /// # Safety
    /// `x` has sixteen elements.
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub unsafe fn sixteen(x: *const u16) -> __m512 {
        // SAFETY: the caller's promise.
        let bits = unsafe { _mm256_loadu_si256(x.cast()) };
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(bits)))
    }

    /// The sum of each vector.
    #[inline]
    #[target_feature(enable = "avx2")]
    pub fn eight_across([a, b, c, d]: [__m256; TILE_WEIGHTS]) -> [f32; TILE_WEIGHTS] {
        let halves = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
        let sums = _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps::<1>(halves));
        let mut out = [0.0; TILE_WEIGHTS];
        // SAFETY: the array has four elements.
        unsafe { _mm_storeu_ps(out.as_mut_ptr(), sums) };
        out
    }

    /// The sum of each vector.
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub fn sixteen_across([a, b, c, d]: [__m512; TILE_WEIGHTS]) -> [f32; TILE_WEIGHTS] {
        eight_across([halves(a), halves(b), halves(c), halves(d)])
    }

    /// The lower half plus the upper.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn halves(x: __m512) -> __m256 {
        let upper = _mm512_shuffle_f32x4::<0b1110>(x, x);
        _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_castps512_ps256(upper))
    }
}
