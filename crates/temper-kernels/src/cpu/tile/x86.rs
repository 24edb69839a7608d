//! The vectors and tiles of AVX2, AVX-512 and AVX512-BF16.

use std::arch::x86_64::*;

use super::{Kernel, Thin, ThinTile, Tile, Units, Vector, thin_tile, tile};

macro_rules! vector {
    ($name:ident, $register:ident, $lanes:literal, $splat:ident, $load:ident, $store:ident, $multiply:ident,
     $add:ident, $multiply_add:ident) => {
        struct $name;

        // SAFETY: the functions below call it only behind their `target_feature`.
        unsafe impl Vector for $name {
            type Register = $register;
            const LANES: usize = $lanes;

            #[inline(always)]
            unsafe fn splat(x: f32) -> $register {
                // SAFETY: the trait's, here and below.
                unsafe { $splat(x) }
            }
            #[inline(always)]
            unsafe fn broadcast(unit: *const f32) -> $register {
                // SAFETY: as above.
                unsafe { $splat(*unit) }
            }
            #[inline(always)]
            unsafe fn load(x: *const f32) -> $register {
                // SAFETY: as above.
                unsafe { $load(x) }
            }
            #[inline(always)]
            unsafe fn store(x: *mut f32, register: $register) {
                // SAFETY: as above.
                unsafe { $store(x, register) }
            }
            #[inline(always)]
            unsafe fn prefetch(x: *const f32) {
                // SAFETY: any address may be prefetched.
                unsafe { _mm_prefetch::<_MM_HINT_T0>(x.cast()) }
            }
            #[inline(always)]
            unsafe fn multiply(a: $register, b: $register) -> $register {
                // SAFETY: as above.
                unsafe { $multiply(a, b) }
            }
            #[inline(always)]
            unsafe fn add(a: $register, b: $register) -> $register {
                // SAFETY: as above.
                unsafe { $add(a, b) }
            }
            #[inline(always)]
            unsafe fn multiply_add(a: $register, b: $register, sum: $register) -> $register {
                // SAFETY: as above.
                unsafe { $multiply_add(a, b, sum) }
            }
        }
    };
}

vector!(
    Avx2,
    __m256,
    8,
    _mm256_set1_ps,
    _mm256_loadu_ps,
    _mm256_storeu_ps,
    _mm256_mul_ps,
    _mm256_add_ps,
    _mm256_fmadd_ps
);
vector!(
    Avx512,
    __m512,
    16,
    _mm512_set1_ps,
    _mm512_loadu_ps,
    _mm512_storeu_ps,
    _mm512_mul_ps,
    _mm512_add_ps,
    _mm512_fmadd_ps
);
vector!(
    Avx512Bf16,
    __m512,
    16,
    _mm512_set1_ps,
    _mm512_loadu_ps,
    _mm512_storeu_ps,
    _mm512_mul_ps,
    _mm512_add_ps,
    multiply_add_pairs
);

/// Two products a lane: the bits of `a` and `b` are pairs of bf16.
#[inline(always)]
unsafe fn multiply_add_pairs(a: __m512, b: __m512, sum: __m512) -> __m512 {
    // SAFETY: the caller's promise; the types have the same size and any bits are valid.
    unsafe {
        let (a, b) = (std::mem::transmute::<__m512, __m512bh>(a), std::mem::transmute::<__m512, __m512bh>(b));
        _mm512_dpbf16_ps(sum, a, b)
    }
}

/// Twelve sums, two vectors of `b` and a broadcast in sixteen registers.
pub const AVX2: Kernel =
    Kernel { rows: 6, columns: 16, depth: 1, block: 320, units: Units::Exact, name: "avx2+fma", run: avx2 };
/// Twenty-eight sums, two vectors of `b` and a broadcast in thirty-two registers.
pub const AVX512: Kernel =
    Kernel { rows: 14, columns: 32, depth: 1, block: 320, units: Units::Exact, name: "avx512", run: avx512 };
/// The same with two bf16 products a lane and instruction.
pub const AVX512_BF16: Kernel = Kernel {
    rows: 14,
    columns: 32,
    depth: 1,
    block: 320,
    units: Units::Pairs,
    name: "avx512bf16",
    run: avx512_bf16,
};

/// Twelve sums, as above; and eight, which are as many as hide a multiply-add's latency.
pub const THIN_AVX2: Thin = Thin { rows: 6, run: thin_avx2 };
pub const THIN_AVX512: Thin = Thin { rows: 8, run: thin_avx512 };

/// Whether Intel made this processor: its pairs of bf16 take one port of two, half the rate of f32 multiply-adds
/// (measured on a Xeon of the fifth generation: 175 of 344 GFLOP/s).
pub fn intel() -> bool {
    let vendor = __cpuid(0);
    [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes).concat() == b"GenuineIntel"
}

#[target_feature(enable = "avx2,fma")]
unsafe fn avx2(t: Tile) {
    // SAFETY: the caller's promise.
    unsafe { tile::<Avx2, 6, 2>(t) }
}

#[target_feature(enable = "avx512f")]
unsafe fn avx512(t: Tile) {
    // SAFETY: the caller's promise.
    unsafe { tile::<Avx512, 14, 2>(t) }
}

#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn avx512_bf16(t: Tile) {
    // SAFETY: the caller's promise.
    unsafe { tile::<Avx512Bf16, 14, 2>(t) }
}

#[target_feature(enable = "avx2,fma")]
unsafe fn thin_avx2(t: ThinTile) {
    // SAFETY: the caller's promise.
    unsafe { thin_tile::<Avx2, 6, 2>(t) }
}

#[target_feature(enable = "avx512f")]
unsafe fn thin_avx512(t: ThinTile) {
    // SAFETY: the caller's promise.
    unsafe { thin_tile::<Avx512, 8, 1>(t) }
}
