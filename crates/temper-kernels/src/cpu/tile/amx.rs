//! Intel's matrix registers (AMX): eight tiles of 16 rows of 64 bytes, and an instruction that multiplies two of them.
//! Written as text for the assembler, because the compiler's own names for these instructions are not stable.

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
