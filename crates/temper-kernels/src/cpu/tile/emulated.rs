//! Machines with pairs of bf16, in plain Rust, so that packing and tiles of pairs are tested everywhere.

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
        let [high, low] = [|x: f32| widen((x.to_bits() >> 16) as u16), |x: f32| widen(x.to_bits() as u16)];
        std::array::from_fn(|i| high(a[i]).mul_add(high(b[i]), low(a[i]).mul_add(low(b[i]), sum[i])))
    }
}

unsafe fn run(t: Tile) {
    // SAFETY: the caller's promise.
    unsafe { tile::<PortablePairs, 14, 4>(t) }
}

/// The shape of the AVX-512 kernel.
pub const PAIRS: Kernel =
    Kernel { rows: 14, columns: 32, depth: 1, block: 320, units: Units::Pairs, name: "emulated pairs", run };

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
