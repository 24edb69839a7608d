//! The innermost loop of a product: a tile of the result held in registers while `k` runs, once per instruction set.
//!
//! A *unit* is 32 bits of a packed panel: one f32, or two neighbouring bf16 along `k`. Only the multiply-add knows
//! which, so that the loop, the packing and the loads are the same for both.

use std::sync::OnceLock;

use super::Precision;
use super::pack::Layout;

/// The vector operations that a tile needs.
///
/// # Safety
/// Implementors' methods may be called only where their instruction set is present, with pointers valid for
/// [`Vector::LANES`] values.
unsafe trait Vector {
    /// Sums, or units.
    type Register: Copy;
    /// Values in a register.
    const LANES: usize;

    unsafe fn splat(x: f32) -> Self::Register;
    unsafe fn broadcast(unit: *const f32) -> Self::Register;
    unsafe fn load(x: *const f32) -> Self::Register;
    unsafe fn store(x: *mut f32, register: Self::Register);
    unsafe fn prefetch(x: *const f32);
    unsafe fn multiply(a: Self::Register, b: Self::Register) -> Self::Register;
    unsafe fn add(a: Self::Register, b: Self::Register) -> Self::Register;
    /// `sum + a b` of units.
    unsafe fn multiply_add(a: Self::Register, b: Self::Register, sum: Self::Register) -> Self::Register;
}

/// One tile's operands: packed panels of `units` units, and where the result goes.
#[derive(Clone, Copy)]
pub struct Tile {
    /// Units along `k`, a multiple of the kernel's depth.
    pub units: usize,
    /// `[units / depth, rows, depth]`.
    pub a: *const f32,
    /// `[units, columns]`, 64-byte aligned for speed.
    pub b: *const f32,
    /// What the next tiles will read of `b`: lines of 64 bytes to fetch meanwhile.
    pub next: (*const f32, usize),
    /// The result, rows `stride` apart.
    pub c: *mut f32,
    /// Distance of the result's rows.
    pub stride: usize,
    /// Factor of the product.
    pub alpha: f32,
    /// Add to the result instead of writing it.
    pub add: bool,
}

/// A tile of `R` rows and `N` vectors of columns.
///
/// # Safety
/// As for [`Vector`]; the panels hold `units` units of every row and column, and the result's block is exclusive.
#[inline(always)]
#[expect(clippy::needless_range_loop, reason = "rows and vectors are numbers of registers")]
unsafe fn tile<V: Vector, const R: usize, const N: usize>(t: Tile) {
    // SAFETY: the caller's promise; every access stays inside the panels and the block. Prefetching any address is
    // allowed.
    unsafe {
        for line in 0..t.next.1 {
            V::prefetch(t.next.0.wrapping_add(16 * line));
        }
        for r in 0..R {
            V::prefetch(t.c.add(r * t.stride));
            V::prefetch(t.c.add(r * t.stride + N * V::LANES - 1));
        }
        let mut sums = [[V::splat(0.0); N]; R];
        for k in 0..t.units {
            let mut b = [V::splat(0.0); N];
            for n in 0..N {
                b[n] = V::load(t.b.add((k * N + n) * V::LANES));
            }
            for r in 0..R {
                let a = V::broadcast(t.a.add(k * R + r));
                for n in 0..N {
                    sums[r][n] = V::multiply_add(a, b[n], sums[r][n]);
                }
            }
        }
        let alpha = V::splat(t.alpha);
        for r in 0..R {
            for n in 0..N {
                let c = t.c.add(r * t.stride + n * V::LANES);
                let product = V::multiply(alpha, sums[r][n]);
                V::store(c, if t.add { V::add(V::load(c), product) } else { product });
            }
        }
    }
}

/// A thin tile's operands: rows that are taken where they lie, and a packed panel.
#[derive(Clone, Copy)]
pub struct ThinTile {
    /// Rows that count, at least one.
    pub rows: usize,
    /// What is summed over.
    pub k: usize,
    /// The first row's first element.
    pub a: *const f32,
    /// Distance of rows, and of elements along `k`.
    pub strides: [usize; 2],
    /// Elements that lie so far ahead are fetched meanwhile; 0: none.
    pub ahead: usize,
    /// `[k, COLUMNS]`, 64-byte aligned for speed.
    pub b: *const f32,
    /// The result, which is added to, rows `stride` apart.
    pub c: *mut f32,
    /// Distance of the result's rows.
    pub stride: usize,
}

impl ThinTile {
    /// Its columns.
    pub const COLUMNS: usize = 16;
}

/// A thin tile of at most `R` rows and of `N` vectors, which are [`ThinTile::COLUMNS`].
///
/// # Safety
/// As for [`Vector`]; `a` and `b` are valid for the rows that count and `k` steps, and the result's block is exclusive.
#[inline(always)]
#[expect(clippy::needless_range_loop, reason = "rows and vectors are numbers of registers")]
unsafe fn thin_tile<V: Vector, const R: usize, const N: usize>(t: ThinTile) {
    // SAFETY: the caller's promise; rows that do not count are the last that does. Prefetching any address is allowed.
    unsafe {
        let rows: [*const f32; R] = std::array::from_fn(|r| t.a.add(r.min(t.rows - 1) * t.strides[0]));
        let mut sums = [[V::splat(0.0); N]; R];
        for k in 0..t.k {
            let at = k * t.strides[1];
            let mut b = [V::splat(0.0); N];
            for n in 0..N {
                b[n] = V::load(t.b.add((k * N + n) * V::LANES));
            }
            if t.ahead > 0 {
                V::prefetch(rows[0].wrapping_add(at + t.ahead));
            }
            for r in 0..R {
                let a = V::broadcast(rows[r].add(at));
                for n in 0..N {
                    sums[r][n] = V::multiply_add(a, b[n], sums[r][n]);
                }
            }
        }
        for r in 0..R.min(t.rows) {
            for n in 0..N {
                let c = t.c.add(r * t.stride + n * V::LANES);
                V::store(c, V::add(V::load(c), sums[r][n]));
            }
        }
    }
}

/// How a panel's units are made of values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Units {
    /// A unit is a value.
    Exact,
    /// A unit is a value rounded to bf16: what hardware without bf16 products does instead.
    Rounded,
    /// A unit is two values as bf16, the earlier in the low half.
    Pairs,
}

impl Units {
    /// Values along `k` in a unit.
    pub fn values(self) -> usize {
        if self == Units::Pairs { 2 } else { 1 }
    }
}

/// A tile's size and code.
#[derive(Clone, Copy)]
pub struct Kernel {
    /// Rows of a tile.
    pub rows: usize,
    /// Columns of a tile.
    pub columns: usize,
    /// Units along `k` that are multiplied at once: panels hold a multiple of them, and in panels of `a` those of a row
    /// lie side by side.
    pub depth: usize,
    /// Units of `k` that are summed before the result is touched: a panel of `b` then fits the first-level cache beside
    /// the tile, or, where results cost more to fetch than panels, the second.
    pub block: usize,
    /// What the panels hold.
    pub units: Units,
    /// Instruction set, in words.
    pub name: &'static str,
    run: unsafe fn(Tile),
}

impl Kernel {
    /// # Safety
    /// The panels hold `units` units of every row and column, and the result's block is exclusive.
    pub unsafe fn run(&self, tile: Tile) {
        // SAFETY: `f32` and `bf16` chose a function whose instruction set is present; the rest is the caller's promise.
        unsafe { (self.run)(tile) }
    }

    /// Units that a panel holds for `k` values.
    pub fn units_of(&self, k: usize) -> usize {
        k.div_ceil(self.units.values()).next_multiple_of(self.depth)
    }

    /// How panels of `units` units of `a` lie.
    pub fn rows_layout(&self, units: usize) -> Layout {
        Layout { width: self.rows, depth: self.depth, panel: self.rows * units, units: self.units }
    }

    /// How those of `b` lie.
    pub fn columns_layout(&self, units: usize) -> Layout {
        Layout { width: self.columns, depth: 1, panel: self.columns * units, units: self.units }
    }

    /// The kernel of this machine for products of this precision.
    pub fn of(precision: Precision) -> Kernel {
        match precision {
            Precision::F32 => Kernel::f32(),
            Precision::Bf16 => Kernel::bf16(),
        }
    }

    /// The kernel of this machine for exact f32 products.
    pub fn f32() -> Kernel {
        static KERNEL: OnceLock<Kernel> = OnceLock::new();
        *KERNEL.get_or_init(|| {
            #[cfg(target_arch = "x86_64")]
            {
                if is_x86_feature_detected!("avx512f") {
                    return Kernel { name: "avx512", ..x86::AVX512 };
                }
                if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                    return x86::AVX2;
                }
            }
            PORTABLE
        })
    }

    /// The kernel of this machine for products of values rounded to bf16, summed in f32.
    pub fn bf16() -> Kernel {
        static KERNEL: OnceLock<Kernel> = OnceLock::new();
        *KERNEL.get_or_init(|| {
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            if amx::allowed() {
                return amx::AMX;
            }
            #[cfg(target_arch = "x86_64")]
            if is_x86_feature_detected!("avx512bf16") && is_x86_feature_detected!("avx512f") && !x86::intel()
            {
                return x86::AVX512_BF16;
            }
            Kernel { units: Units::Rounded, ..Kernel::f32() }
        })
    }
}

/// The code of a thin tile.
#[derive(Clone, Copy)]
pub struct Thin {
    /// Rows of a tile.
    pub rows: usize,
    run: unsafe fn(ThinTile),
}

impl Thin {
    /// That of any machine.
    pub const PORTABLE: Thin = Thin {
        rows: 4,
        run: |t| {
            // SAFETY: `Thin::run`'s promise.
            unsafe { thin_tile::<Portable, 4, 2>(t) }
        },
    };

    /// That of this machine.
    pub fn new() -> Thin {
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx512f") {
                return x86::THIN_AVX512;
            }
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                return x86::THIN_AVX2;
            }
        }
        Thin::PORTABLE
    }

    /// # Safety
    /// `a` and `b` are valid for the rows that count and `k` steps, and the result's block is exclusive.
    pub unsafe fn run(&self, tile: ThinTile) {
        // SAFETY: `new` chose a function whose instruction set is present; the rest is the caller's promise.
        unsafe { (self.run)(tile) }
    }
}

const PORTABLE: Kernel = Kernel {
    rows: 4,
    columns: 16,
    depth: 1,
    block: 320,
    units: Units::Exact,
    name: if cfg!(target_arch = "aarch64") { "neon" } else { "portable (slower)" },
    run: |t| {
        // SAFETY: `Kernel::run`'s promise.
        unsafe { tile::<Portable, 4, 2>(t) }
    },
};

/// Eight lanes in plain Rust.
struct Portable;

// SAFETY: needs no instruction set.
unsafe impl Vector for Portable {
    type Register = [f32; 8];
    const LANES: usize = 8;

    #[inline(always)]
    unsafe fn splat(x: f32) -> [f32; 8] {
        [x; 8]
    }
    #[inline(always)]
    unsafe fn broadcast(unit: *const f32) -> [f32; 8] {
        // SAFETY: the trait's.
        [unsafe { *unit }; 8]
    }
    #[inline(always)]
    unsafe fn load(x: *const f32) -> [f32; 8] {
        // SAFETY: the trait's.
        unsafe { x.cast::<[f32; 8]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(x: *mut f32, register: [f32; 8]) {
        // SAFETY: the trait's.
        unsafe { x.cast::<[f32; 8]>().write_unaligned(register) }
    }
    #[inline(always)]
    unsafe fn prefetch(_: *const f32) {}
    #[inline(always)]
    unsafe fn multiply(a: [f32; 8], b: [f32; 8]) -> [f32; 8] {
        std::array::from_fn(|i| a[i] * b[i])
    }
    #[inline(always)]
    unsafe fn add(a: [f32; 8], b: [f32; 8]) -> [f32; 8] {
        std::array::from_fn(|i| a[i] + b[i])
    }
    #[inline(always)]
    unsafe fn multiply_add(a: [f32; 8], b: [f32; 8], sum: [f32; 8]) -> [f32; 8] {
        std::array::from_fn(|i| a[i] * b[i] + sum[i])
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
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
            let (a, b) =
                (std::mem::transmute::<__m512, __m512bh>(a), std::mem::transmute::<__m512, __m512bh>(b));
            _mm512_dpbf16_ps(sum, a, b)
        }
    }

    /// Twelve sums, two vectors of `b` and a broadcast in sixteen registers.
    pub const AVX2: Kernel = Kernel {
        rows: 6,
        columns: 16,
        depth: 1,
        block: 320,
        units: Units::Exact,
        name: "avx2+fma",
        run: avx2,
    };
    /// Twenty-eight sums, two vectors of `b` and a broadcast in thirty-two registers.
    pub const AVX512: Kernel = Kernel {
        rows: 14,
        columns: 32,
        depth: 1,
        block: 320,
        units: Units::Exact,
        name: "avx512",
        run: avx512,
    };
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
}

/// Intel's matrix registers (AMX): eight tiles of 16 rows of 64 bytes, and an instruction that multiplies two of them.
/// Written as text for the assembler, because the compiler's own names for these instructions are not stable.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod amx {
    use std::arch::asm;
    use std::arch::x86_64::*;
    use std::cell::Cell;

    use super::{Kernel, Tile, Units};

    /// Four tiles of sums; two of `a` and two of `b` feed them, so that a loaded tile is used twice.
    pub const AMX: Kernel =
        Kernel { rows: 32, columns: 32, depth: 16, block: 512, units: Units::Pairs, name: "amx", run };

    /// Whether the processor has it and the system lets this process use it, which one asks for once.
    pub fn allowed() -> bool {
        const ARCH_REQ_XCOMP_PERM: i64 = 0x1023;
        const XFEATURE_XTILEDATA: i64 = 18;
        const AMX_BF16: u32 = 1 << 22;
        const AMX_TILE: u32 = 1 << 24;
        let features = if __cpuid(0).eax >= 7 { __cpuid_count(7, 0).edx } else { 0 };
        features & AMX_BF16 != 0
            && features & AMX_TILE != 0
            && is_x86_feature_detected!("avx512f")
            // SAFETY: asks for a permission and touches no memory.
            && unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) } == 0
    }

    /// What a thread tells its processor before the first tile: every register is 16 rows of 64 bytes.
    #[repr(C, align(64))]
    struct Configuration {
        palette: u8,
        start_row: u8,
        reserved: [u8; 14],
        bytes: [u16; 16],
        rows: [u8; 16],
    }

    thread_local! {
        static CONFIGURED: Cell<bool> = const { Cell::new(false) };
    }

    fn configure() {
        if CONFIGURED.replace(true) {
            return;
        }
        let mut configuration =
            Configuration { palette: 1, start_row: 0, reserved: [0; 14], bytes: [0; 16], rows: [0; 16] };
        configuration.bytes[..8].fill(64);
        configuration.rows[..8].fill(16);
        // SAFETY: 64 bytes are read; `allowed` was asked before.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const configuration, options(nostack, readonly)) }
    }

    unsafe fn run(t: Tile) {
        // SAFETY: the caller's promise.
        unsafe {
            if t.alpha == 1.0 {
                sums(t);
            } else {
                scaled(t);
            }
        }
    }

    /// `c = a b`, plus `c` when `add`, without `alpha`. The result's lines are fetched, to be written, while the sums are
    /// formed, and `a`, read once for each panel of `b`, passes by the first-level cache: 1.13 times as fast together as
    /// plain loads that also fetch the next panel of `b`.
    unsafe fn sums(t: Tile) {
        configure();
        // SAFETY: the caller's promise: `units / 16` blocks of `a` are 2 × 16 rows of 64 bytes, those of `b` 16 rows of
        // twice 64 bytes; `c` has 32 rows of 32 values. Prefetching any address is allowed.
        unsafe {
            for row in 0..AMX.rows {
                _mm_prefetch::<_MM_HINT_ET0>(t.c.wrapping_add(row * t.stride).cast());
                _mm_prefetch::<_MM_HINT_ET0>(t.c.wrapping_add(row * t.stride + 16).cast());
            }
            asm!(
                "test {add}, {add}",
                "jz 2f",
                "tileloadd tmm0, [{c} + 1*{stride}]",
                "tileloadd tmm1, [{c} + 1*{stride} + 64]",
                "tileloadd tmm2, [{lower} + 1*{stride}]",
                "tileloadd tmm3, [{lower} + 1*{stride} + 64]",
                "jmp 3f",
                "2:",
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "3:",
                "test {blocks}, {blocks}",
                "jz 5f",
                "4:",
                "tileloaddt1 tmm4, [{a} + 1*{a_stride}]",
                "tileloadd tmm6, [{b} + 1*{b_stride}]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm7, [{b} + 1*{b_stride} + 64]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tileloaddt1 tmm5, [{a} + 1*{a_stride} + 1024]",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "add {a}, 2048",
                "add {b}, 2048",
                "dec {blocks}",
                "jnz 4b",
                "5:",
                "tilestored [{c} + 1*{stride}], tmm0",
                "tilestored [{c} + 1*{stride} + 64], tmm1",
                "tilestored [{lower} + 1*{stride}], tmm2",
                "tilestored [{lower} + 1*{stride} + 64], tmm3",
                add = in(reg) usize::from(t.add),
                blocks = inout(reg) t.units / AMX.depth => _,
                a = inout(reg) t.a => _,
                b = inout(reg) t.b => _,
                c = in(reg) t.c,
                lower = in(reg) t.c.wrapping_add(16 * t.stride),
                stride = in(reg) 4 * t.stride,
                a_stride = in(reg) 64usize,
                b_stride = in(reg) 128usize,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    }

    /// `c = alpha a b`, plus `c` when `add`, by way of a tile of its own.
    #[target_feature(enable = "avx512f")]
    unsafe fn scaled(t: Tile) {
        #[repr(align(64))]
        struct Sums([f32; 1024]);
        let mut products = Sums([0.0; 1024]);
        // SAFETY: the tile is 32 × 32; the rest is the caller's promise.
        unsafe {
            sums(Tile { c: products.0.as_mut_ptr(), stride: AMX.columns, add: false, ..t });
            for (row, products) in products.0.chunks_exact(AMX.columns).enumerate() {
                let c = std::slice::from_raw_parts_mut(t.c.add(row * t.stride), AMX.columns);
                for (c, product) in c.iter_mut().zip(products) {
                    *c = if t.add { *c + t.alpha * product } else { t.alpha * product };
                }
            }
        }
    }
}

/// Machines with pairs of bf16, in plain Rust, so that packing and tiles of pairs are tested everywhere.
#[cfg(test)]
pub mod emulated {
    use super::{Kernel, Portable, Tile, Units, Vector, tile};
    use crate::cpu::pack::widen;

    struct PortablePairs;

    // SAFETY: needs no instruction set.
    unsafe impl Vector for PortablePairs {
        type Register = [f32; 8];
        const LANES: usize = 8;

        unsafe fn splat(x: f32) -> [f32; 8] {
            [x; 8]
        }
        unsafe fn broadcast(unit: *const f32) -> [f32; 8] {
            // SAFETY: the trait's, here and below.
            unsafe { Portable::broadcast(unit) }
        }
        unsafe fn load(x: *const f32) -> [f32; 8] {
            // SAFETY: as above.
            unsafe { Portable::load(x) }
        }
        unsafe fn store(x: *mut f32, register: [f32; 8]) {
            // SAFETY: as above.
            unsafe { Portable::store(x, register) }
        }
        unsafe fn prefetch(_: *const f32) {}
        unsafe fn multiply(a: [f32; 8], b: [f32; 8]) -> [f32; 8] {
            std::array::from_fn(|i| a[i] * b[i])
        }
        unsafe fn add(a: [f32; 8], b: [f32; 8]) -> [f32; 8] {
            std::array::from_fn(|i| a[i] + b[i])
        }
        unsafe fn multiply_add(a: [f32; 8], b: [f32; 8], sum: [f32; 8]) -> [f32; 8] {
            let [high, low] =
                [|x: f32| widen((x.to_bits() >> 16) as u16), |x: f32| widen(x.to_bits() as u16)];
            std::array::from_fn(|i| high(a[i]).mul_add(high(b[i]), low(a[i]).mul_add(low(b[i]), sum[i])))
        }
    }

    unsafe fn run(t: Tile) {
        // SAFETY: the caller's promise.
        unsafe { tile::<PortablePairs, 14, 4>(t) }
    }

    /// The shape of the AVX-512 kernel.
    pub const PAIRS: Kernel = Kernel {
        rows: 14,
        columns: 32,
        depth: 1,
        block: 320,
        units: Units::Pairs,
        name: "emulated pairs",
        run,
    };

    unsafe fn run_blocks(t: Tile) {
        let Kernel { rows, columns, depth, .. } = BLOCKS;
        for row in 0..rows {
            for column in 0..columns {
                let mut sum = 0.0;
                for unit in 0..t.units {
                    // SAFETY: the caller's promise.
                    let (a, b) = unsafe {
                        (
                            *t.a.add((unit / depth * rows + row) * depth + unit % depth),
                            *t.b.add(unit * columns + column),
                        )
                    };
                    for half in [0, 16] {
                        let value = |unit: f32| widen((unit.to_bits() >> half) as u16);
                        sum = value(a).mul_add(value(b), sum);
                    }
                }
                // SAFETY: the caller's promise.
                let c = unsafe { &mut *t.c.add(row * t.stride + column) };
                *c = if t.add { *c + t.alpha * sum } else { t.alpha * sum };
            }
        }
    }

    /// The shape of the AMX kernel.
    pub const BLOCKS: Kernel = Kernel {
        rows: 32,
        columns: 32,
        depth: 16,
        block: 512,
        units: Units::Pairs,
        name: "emulated blocks",
        run: run_blocks,
    };
}
