//! What the machine could do at best, measured: the yardstick of `temper bench`.

use std::hint::black_box;
use std::time::{Duration, Instant};

use rayon::prelude::*;

use super::pack::Line;
use super::tile::{Kernel, Tile};
use super::{Cpu, Precision, rows};

/// Units of a panel that stays in the first-level cache.
const UNITS: usize = 256;
/// Tiles of a measurement.
const TILES: usize = 20_000;
/// How long one figure is measured.
const MEASURE: Duration = Duration::from_millis(500);
/// Values read in a measurement: more than any cache holds.
const VALUES: usize = 64 << 20;

impl Cpu {
    /// Floating-point operations a second of every thread at once, on tiles whose operands never leave the first-level
    /// cache; the fastest run.
    pub fn peak_flops(&self, precision: Precision) -> f64 {
        let kernel = Kernel::of(precision);
        let flops = 2 * kernel.rows * kernel.columns * UNITS * kernel.units.values() * TILES * self.threads();
        let tiles = |_| {
            let lines = |values: usize| vec![Line::ZERO; values.div_ceil(Line::LEN)];
            let (mut a, mut b, mut c) = (
                lines(kernel.rows * UNITS),
                lines(kernel.columns * UNITS),
                lines(kernel.rows * kernel.columns),
            );
            let [a, b, c] = [&mut a, &mut b, &mut c].map(|lines| Line::floats_mut(lines));
            for _ in 0..TILES {
                let tile = Tile {
                    units: UNITS,
                    a: a.as_ptr(),
                    b: b.as_ptr(),
                    next: (b.as_ptr(), 0),
                    c: black_box(&mut *c).as_mut_ptr(),
                    stride: kernel.columns,
                    alpha: 1.0,
                    add: true,
                };
                // SAFETY: the panels and the result have the sizes of a tile and are this closure's own.
                unsafe { kernel.run(tile) };
            }
        };
        flops as f64 / self.fastest(|| (0..self.threads()).into_par_iter().with_max_len(1).for_each(tiles))
    }

    /// Bytes a second that every thread together reads from memory; the fastest run.
    pub fn read_bandwidth(&self) -> f64 {
        let values = vec![1.0f32; VALUES];
        let read = || {
            values.par_chunks(1 << 18).for_each(|part| _ = black_box(rows::read(part)));
        };
        (4 * VALUES) as f64 / self.fastest(read)
    }

    /// Seconds of the fastest run within [`MEASURE`]: a processor takes its time to reach its clock.
    fn fastest(&self, work: impl Fn() + Sync + Send) -> f64 {
        let (begin, mut fastest) = (Instant::now(), Duration::MAX);
        while begin.elapsed() < MEASURE {
            let start = Instant::now();
            self.install(&work);
            fastest = fastest.min(start.elapsed());
        }
        fastest.as_secs_f64()
    }
}
