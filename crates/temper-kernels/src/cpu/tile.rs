//! The innermost loop of a product: a tile of the result held in registers while `k` runs, once per instruction set.
//!
//! A *unit* is 32 bits of a packed panel: one f32, or two neighbouring bf16 along `k`. Only the multiply-add knows
//! which, so that the loop, the packing and the loads are the same for both.

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod amx;
#[cfg(test)]
pub mod emulated;
#[cfg(target_arch = "x86_64")]
mod x86;

use std::sync::OnceLock;

use super::Precision;
use super::pack::{Layout, Line};

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
    /// Distance of `a`'s rows, and of its elements along `k`.
    pub a_strides: [usize; 2],
    /// What is fetched meanwhile.
    pub fetch: Fetch,
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

/// Lines of memory that a thin tile fetches ahead, because the processor does not foresee that they will be read: at step
/// `i · STEPS` of `k`, for `i < times`, those at `from + i · advance + j · apart` bytes for `j < lines`.
#[derive(Clone, Copy)]
pub struct Fetch {
    /// The first line.
    pub from: *const u8,
    /// Lines at a time.
    pub lines: usize,
    /// Their distance.
    pub apart: usize,
    /// Distance from one time to the next.
    pub advance: usize,
    /// How many times.
    pub times: usize,
}

impl Fetch {
    /// Steps of `k` from one time to the next: a row in f32 has gone through a line.
    pub const STEPS: usize = Line::LEN;
    /// Nothing.
    pub const NONE: Fetch = Fetch { from: std::ptr::null(), lines: 0, apart: 0, advance: 0, times: 0 };
}

/// A thin tile of at most `R` rows and of `N` vectors, which are [`ThinTile::COLUMNS`].
///
/// # Safety
/// As for [`Vector`] and [`Thin::run`].
#[inline(always)]
#[expect(clippy::needless_range_loop, reason = "rows and vectors are numbers of registers")]
unsafe fn thin_tile<V: Vector, const R: usize, const N: usize>(t: ThinTile) {
    // SAFETY: the caller's promise; rows that do not count are the last that does. Prefetching any address is allowed.
    unsafe {
        let rows: [*const f32; R] = std::array::from_fn(|r| t.a.add(r.min(t.rows - 1) * t.a_strides[0]));
        let mut sums = [[V::splat(0.0); N]; R];
        let fetch = t.fetch;
        for (time, start) in (0..t.k).step_by(Fetch::STEPS).enumerate() {
            if time < fetch.times {
                for line in 0..fetch.lines {
                    let at = time * fetch.advance + line * fetch.apart;
                    V::prefetch(fetch.from.wrapping_add(at).cast());
                }
            }
            for k in start..t.k.min(start + Fetch::STEPS) {
                let at = k * t.a_strides[1];
                let mut b = [V::splat(0.0); N];
                for n in 0..N {
                    b[n] = V::load(t.b.add((k * N + n) * V::LANES));
                }
                for r in 0..R {
                    let a = V::broadcast(rows[r].add(at));
                    for n in 0..N {
                        sums[r][n] = V::multiply_add(a, b[n], sums[r][n]);
                    }
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
                    return x86::AVX512;
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
    pub fn of_machine() -> Thin {
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
    /// At least one row counts; `a` is valid for these rows and `k` steps, `b` for `k · COLUMNS` values, and `c` for these rows of
    /// `COLUMNS`, which nobody else uses meanwhile.
    pub unsafe fn run(&self, tile: ThinTile) {
        // SAFETY: `of_machine` chose a function whose instruction set is present; the rest is the caller's promise.
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
