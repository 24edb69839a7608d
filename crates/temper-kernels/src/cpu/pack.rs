//! Operands of products as they lie in memory, and their packed form.

use std::ops::Range;

use super::rows::widen_each;
use super::tile::{Kernel, Units};

/// A line of cache, the alignment of packed panels.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub struct Line([f32; Line::LEN]);

impl Line {
    /// Values in it.
    pub const LEN: usize = 16;
    /// Zeros.
    pub const ZERO: Line = Line([0.0; Line::LEN]);

    /// The values of lines that follow one another.
    pub fn floats(lines: &[Line]) -> &[f32] {
        // SAFETY: a line is exactly `LEN` values without padding.
        unsafe { std::slice::from_raw_parts(lines.as_ptr().cast(), lines.len() * Line::LEN) }
    }

    /// The same, to change.
    pub fn floats_mut(lines: &mut [Line]) -> &mut [f32] {
        // SAFETY: a line is exactly `LEN` values without padding.
        unsafe { std::slice::from_raw_parts_mut(lines.as_mut_ptr().cast(), lines.len() * Line::LEN) }
    }
}

/// Values in memory.
#[derive(Debug, Clone, Copy)]
pub enum Values<'a> {
    /// As f32.
    F32(&'a [f32]),
    /// As the upper halves of f32.
    Bf16(&'a [u16]),
}

impl<'a> Values<'a> {
    /// How many.
    pub fn len(self) -> usize {
        match self {
            Values::F32(values) => values.len(),
            Values::Bf16(values) => values.len(),
        }
    }

    /// Bytes of one.
    pub fn size(self) -> usize {
        match self {
            Values::F32(_) => size_of::<f32>(),
            Values::Bf16(_) => size_of::<u16>(),
        }
    }

    /// Where value `i` lies, or would.
    pub fn address(self, i: usize) -> *const u8 {
        match self {
            Values::F32(values) => values.as_ptr().wrapping_add(i).cast(),
            Values::Bf16(values) => values.as_ptr().wrapping_add(i).cast(),
        }
    }

    /// Some of them.
    pub fn slice(self, range: Range<usize>) -> Values<'a> {
        match self {
            Values::F32(values) => Values::F32(&values[range]),
            Values::Bf16(values) => Values::Bf16(&values[range]),
        }
    }

    /// The values as f32.
    pub fn widened(self) -> Vec<f32> {
        match self {
            Values::F32(values) => values.to_vec(),
            Values::Bf16(values) => {
                let mut out = vec![0.0; values.len()];
                widen_each(&mut out, values);
                out
            }
        }
    }

    /// The kernel of products with weights stored like this.
    pub fn kernel(self) -> Kernel {
        match self {
            Values::F32(_) => Kernel::f32(),
            Values::Bf16(_) => Kernel::bf16(),
        }
    }
}

/// One side of a product: a row of `a` or a column of `b` is a lane, and lanes run along `k`.
#[derive(Debug, Clone, Copy)]
pub struct Operand<'a> {
    /// Where it lies.
    pub values: Values<'a>,
    /// Distance of neighbouring lanes; 1 when `along` is not.
    pub across: usize,
    /// Distance along `k`; 1 when `across` is not.
    pub along: usize,
}

impl<'a> Operand<'a> {
    /// Lanes are rows of `width`.
    pub fn rows(values: Values<'a>, width: usize) -> Operand<'a> {
        Operand { values, across: width, along: 1 }
    }

    /// Lanes are columns of rows of `width`.
    pub fn columns(values: Values<'a>, width: usize) -> Operand<'a> {
        Operand { values, across: 1, along: width }
    }
}

/// The nearest bf16, ties to even; not-a-number stays one.
#[inline(always)]
pub fn round(x: f32) -> u16 {
    let bits = x.to_bits();
    // Only the largest bits of a not-a-number wrap around.
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    (if x.is_nan() { bits >> 16 | 0x40 } else { rounded }) as u16
}

/// The value of a bf16.
#[inline(always)]
pub fn widen(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// A stored value, either way.
pub trait Element: Copy {
    const ZERO: Self;
    fn value(self) -> f32;
    fn bf16(self) -> u16;
}

impl Element for f32 {
    const ZERO: f32 = 0.0;
    #[inline(always)]
    fn value(self) -> f32 {
        self
    }
    #[inline(always)]
    fn bf16(self) -> u16 {
        round(self)
    }
}

impl Element for u16 {
    const ZERO: u16 = 0;
    #[inline(always)]
    fn value(self) -> f32 {
        widen(self)
    }
    #[inline(always)]
    fn bf16(self) -> u16 {
        self
    }
}

/// How panels are laid out: `[units / depth, width, depth]`.
#[derive(Debug, Clone, Copy)]
pub struct Layout {
    /// Lanes of a panel.
    pub width: usize,
    /// Units of a lane that lie side by side.
    pub depth: usize,
    /// Values from one panel to the next.
    pub panel: usize,
    /// What the panels hold.
    pub units: Units,
}

/// Writes panels of consecutive lanes and `ks` of an operand. Lanes that a last panel lacks are zeros, and so are units
/// beyond `ks` up to a multiple of `multiple`.
pub fn pack(
    out: &mut [f32],
    layout: Layout,
    multiple: usize,
    operand: Operand<'_>,
    lanes: Range<usize>,
    ks: Range<usize>,
) {
    if ks.is_empty() {
        return;
    }
    let Operand { values, across, along } = operand;
    let Layout { width, panel, units, .. } = layout;
    let first = lanes.start * across + ks.start * along;
    let size = [lanes.len(), ks.len()];
    let edge = lanes.len() / width * panel;
    if !lanes.len().is_multiple_of(width) {
        out[edge..edge + panel].fill(0.0);
    }
    let used = ks.len().div_ceil(units.values());
    if !used.is_multiple_of(multiple) {
        let rest = used / multiple * multiple * width..used.next_multiple_of(multiple) * width;
        out.chunks_mut(panel).for_each(|panel| panel[rest.clone()].fill(0.0));
    }
    let strides = [across, along];
    match (values, units) {
        (Values::F32(x), Units::Exact) => run::<f32, Exact>(out, layout, &x[first..], strides, size),
        (Values::F32(x), Units::Rounded) => run::<f32, Rounded>(out, layout, &x[first..], strides, size),
        #[cfg(target_arch = "x86_64")]
        (Values::F32(x), Units::Pairs) if converted::detected() => {
            // SAFETY: the instructions were just detected.
            unsafe { converted::run(out, layout, &x[first..], strides, size) }
        }
        (Values::F32(x), Units::Pairs) => run::<f32, Pairs>(out, layout, &x[first..], strides, size),
        (Values::Bf16(x), Units::Pairs) => run::<u16, Pairs>(out, layout, &x[first..], strides, size),
        // Stored bf16 needs no rounding.
        (Values::Bf16(x), _) => run::<u16, Exact>(out, layout, &x[first..], strides, size),
    }
}

/// How a unit is made of neighbours along `k`.
trait Unit<E: Element> {
    /// Values in a unit; `y` is used when it is 2.
    const VALUES: usize;
    fn make(x: E, y: E) -> f32;

    /// Units of the values of two rows.
    #[inline(always)]
    fn join(out: &mut [f32], first: &[E], second: &[E]) {
        for ((out, &x), &y) in out.iter_mut().zip(first).zip(second) {
            *out = Self::make(x, y);
        }
    }

    /// Units of neighbours in a row. The partner of a last, odd value is zero.
    #[inline(always)]
    fn chain(out: &mut [f32], x: &[E]) {
        for (out, x) in out.iter_mut().zip(x.chunks(Self::VALUES)) {
            *out = Self::make(x[0], if x.len() == Self::VALUES { x[Self::VALUES - 1] } else { E::ZERO });
        }
    }
}

struct Exact;
struct Rounded;
struct Pairs;

impl<E: Element> Unit<E> for Exact {
    const VALUES: usize = 1;
    #[inline(always)]
    fn make(x: E, _: E) -> f32 {
        x.value()
    }
}

impl<E: Element> Unit<E> for Rounded {
    const VALUES: usize = 1;
    #[inline(always)]
    fn make(x: E, _: E) -> f32 {
        widen(x.bf16())
    }
}

impl<E: Element> Unit<E> for Pairs {
    const VALUES: usize = 2;
    #[inline(always)]
    fn make(x: E, y: E) -> f32 {
        f32::from_bits(u32::from(x.bf16()) | u32::from(y.bf16()) << 16)
    }
}

/// Pairs made by the instruction for it, which takes the smallest numbers (below 1.2e-38) as zeros.
#[cfg(target_arch = "x86_64")]
mod converted {
    use std::arch::x86_64::*;
    use std::mem::transmute;

    use super::{Layout, Pairs, Unit, lanes, transpose_avx2};

    pub fn detected() -> bool {
        is_x86_feature_detected!("avx512bf16")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
    }

    #[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    pub fn run(out: &mut [f32], layout: Layout, x: &[f32], strides: [usize; 2], size: [usize; 2]) {
        lanes::<f32, Converted>(out, layout, x, strides, size, |block| transpose_avx2(block));
    }

    struct Converted;

    impl Unit<f32> for Converted {
        const VALUES: usize = 2;

        #[inline(always)]
        fn make(x: f32, y: f32) -> f32 {
            Pairs::make(x, y)
        }

        #[inline(always)]
        fn join(out: &mut [f32], first: &[f32], second: &[f32]) {
            let whole = out.len().min(first.len()).min(second.len()) / 16 * 16;
            for i in (0..whole).step_by(16) {
                let (out, first, second) = (&mut out[i..], &first[i..], &second[i..]);
                // SAFETY: `run` has the instructions, and each of the three sixteen values.
                unsafe { join(out.as_mut_ptr(), first.as_ptr(), second.as_ptr()) }
            }
            Pairs::join(&mut out[whole..], &first[whole..], &second[whole..]);
        }

        #[inline(always)]
        fn chain(out: &mut [f32], x: &[f32]) {
            let whole = out.len().min(x.len() / 2) / 16 * 16;
            for i in (0..whole).step_by(16) {
                // SAFETY: `run` has the instructions; sixteen units and twice as many values are left.
                unsafe { chain(out[i..].as_mut_ptr(), x[2 * i..].as_ptr()) }
            }
            Pairs::chain(&mut out[whole..], &x[2 * whole..]);
        }
    }

    /// Sixteen units of two rows.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bf16")]
    unsafe fn join(out: *mut f32, first: *const f32, second: *const f32) {
        // SAFETY: the caller's promise; any bits are valid.
        unsafe {
            let first = transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(_mm512_loadu_ps(first)));
            let second = transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(_mm512_loadu_ps(second)));
            let high = _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(second));
            _mm512_storeu_si512(out.cast(), _mm512_or_si512(_mm512_cvtepu16_epi32(first), high));
        }
    }

    /// Sixteen units of 32 neighbours.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bf16")]
    unsafe fn chain(out: *mut f32, x: *const f32) {
        // SAFETY: as above.
        unsafe {
            let (low, high) = (_mm512_loadu_ps(x), _mm512_loadu_ps(x.add(16)));
            let units = transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low));
            _mm512_storeu_si512(out.cast(), units);
        }
    }
}

fn run<E: Element, U: Unit<E>>(
    out: &mut [f32],
    layout: Layout,
    x: &[E],
    strides: [usize; 2],
    size: [usize; 2],
) {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx2,fma")]
        fn avx2<E: Element, U: Unit<E>>(
            out: &mut [f32],
            layout: Layout,
            x: &[E],
            strides: [usize; 2],
            size: [usize; 2],
        ) {
            lanes::<E, U>(out, layout, x, strides, size, |block| transpose_avx2(block));
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            // SAFETY: the features were just detected.
            return unsafe { avx2::<E, U>(out, layout, x, strides, size) };
        }
    }
    lanes::<E, U>(out, layout, x, strides, size, transpose);
}

/// Begins to fetch an element, which need not exist. Short pieces of rows that lie far apart are nothing that a processor
/// foresees: on Zen 3 packing takes mostly a third to a half less time. To the second-level cache, because such rows often
/// share their few places of the first.
#[inline(always)]
fn fetch<E>(x: &[E], at: usize) {
    // SAFETY: any address may be fetched.
    #[cfg(target_arch = "x86_64")]
    unsafe {
        use std::arch::x86_64::*;
        _mm_prefetch::<_MM_HINT_T1>(x.as_ptr().wrapping_add(at).cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (x, at);
}

/// The four ways: lanes lie along `k` or side by side, in memory and in the panels.
#[inline(always)]
fn lanes<E: Element, U: Unit<E>>(
    out: &mut [f32],
    Layout { width, depth, panel, .. }: Layout,
    x: &[E],
    [across, along]: [usize; 2],
    size: [usize; 2],
    transpose: impl Fn([[f32; 8]; 8]) -> [[f32; 8]; 8],
) {
    match (across, depth) {
        (1, 1) => copy_lanes::<E, U>(out, [width, panel], x, along, size),
        (_, 1) => turn_lanes::<E, U>(out, [width, panel], x, across, size, transpose),
        (1, _) => turn_blocks::<E, U>(out, [width, panel, depth], x, along, size, transpose),
        (_, _) => copy_blocks::<E, U>(out, [width, panel, depth], x, across, size),
    }
}

/// Lanes lie along `k`, in memory and in blocks of `depth` units.
#[inline(always)]
fn copy_blocks<E: Element, U: Unit<E>>(
    out: &mut [f32],
    [width, panel, depth]: [usize; 3],
    x: &[E],
    across: usize,
    [lanes, ks]: [usize; 2],
) {
    for lane in 0..lanes {
        let out = &mut out[lane / width * panel + lane % width * depth..];
        for (block, x) in x[lane * across..][..ks].chunks(depth * U::VALUES).enumerate() {
            U::chain(&mut out[block * width * depth..][..depth], x);
        }
    }
}

/// Lanes lie side by side in memory and along `k` in blocks of `depth` units, a multiple of eight: eight units of eight
/// lanes are turned in registers.
#[inline(always)]
fn turn_blocks<E: Element, U: Unit<E>>(
    out: &mut [f32],
    [width, panel, depth]: [usize; 3],
    x: &[E],
    along: usize,
    [lanes, ks]: [usize; 2],
    transpose: impl Fn([[f32; 8]; 8]) -> [[f32; 8]; 8],
) {
    /// Lanes read at a time: rows may lie so that few lines of each fit the cache.
    const LANES: usize = 256;
    let whole = [lanes / 8 * 8, ks / (8 * U::VALUES) * 8];
    let at = |lane: usize, unit: usize| {
        lane / width * panel + unit / depth * width * depth + lane % width * depth + unit % depth
    };
    let mut rows = [[0.0; LANES]; 8];
    for unit in (0..whole[1]).step_by(8) {
        for first in (0..whole[0]).step_by(LANES) {
            let many = LANES.min(whole[0] - first);
            for (i, out) in rows.iter_mut().enumerate() {
                let row = |k: usize| &x[k * along + first..][..many];
                let k = (unit + i) * U::VALUES;
                U::join(out, row(k), row(k + U::VALUES - 1));
            }
            for lane in (0..many).step_by(8) {
                let block = std::array::from_fn(|i| std::array::from_fn(|j| rows[i][lane + j]));
                let out = &mut out[at(first + lane, unit)..][..7 * depth + 8];
                for (i, turned) in transpose(block).iter().enumerate() {
                    out[i * depth..][..8].copy_from_slice(turned);
                }
            }
        }
    }
    // The lanes and units that fill no block of eight, value by value.
    for unit in 0..ks.div_ceil(U::VALUES) {
        let k = unit * U::VALUES;
        for lane in if unit < whole[1] { whole[0] } else { 0 }..lanes {
            let x = |k: usize| x[k * along + lane];
            let next = if U::VALUES == 2 && k + 1 < ks { x(k + 1) } else { E::ZERO };
            out[at(lane, unit)] = U::make(x(k), next);
        }
    }
}

/// Lanes lie side by side: each step along `k` is a row to share out to the panels.
#[inline(always)]
fn copy_lanes<E: Element, U: Unit<E>>(
    out: &mut [f32],
    [width, panel]: [usize; 2],
    x: &[E],
    along: usize,
    [lanes, ks]: [usize; 2],
) {
    let whole = lanes / width;
    match width {
        6 => copy_rows::<E, U, 6>(out, panel, x, along, [whole, ks]),
        14 => copy_rows::<E, U, 14>(out, panel, x, along, [whole, ks]),
        16 => copy_rows::<E, U, 16>(out, panel, x, along, [whole, ks]),
        32 => copy_rows::<E, U, 32>(out, panel, x, along, [whole, ks]),
        _ => (0..whole).for_each(|i| {
            by_value::<E, U>(&mut out[i * panel..], width, &x[i * width..], [1, along], width, 0..ks);
        }),
    }
    if lanes > whole * width {
        let (out, x) = (&mut out[whole * panel..], &x[whole * width..]);
        by_value::<E, U>(out, width, x, [1, along], lanes - whole * width, 0..ks);
    }
}

/// Any lanes and steps of a panel, value by value.
#[inline(always)]
fn by_value<E: Element, U: Unit<E>>(
    out: &mut [f32],
    width: usize,
    x: &[E],
    [across, along]: [usize; 2],
    lanes: usize,
    ks: Range<usize>,
) {
    for k in ks.clone().step_by(U::VALUES) {
        for lane in 0..lanes {
            let x = |k: usize| x[lane * across + k * along];
            // The partner of a last, odd value is zero.
            let next = if U::VALUES == 2 && k + 1 < ks.end { x(k + 1) } else { E::ZERO };
            out[k / U::VALUES * width + lane] = U::make(x(k), next);
        }
    }
}

/// Whole panels, whose width the compiler knows. Rows are read from end to end: a panel at a time would touch a line of
/// cache for every few values.
#[inline(always)]
fn copy_rows<E: Element, U: Unit<E>, const W: usize>(
    out: &mut [f32],
    panel: usize,
    x: &[E],
    along: usize,
    [panels, ks]: [usize; 2],
) {
    /// Rows that are fetched meanwhile.
    const AHEAD: usize = 8;
    let zeros = [E::ZERO; W];
    for unit in 0..ks.div_ceil(U::VALUES) {
        let k = unit * U::VALUES;
        for i in 0..panels {
            let row = &x[k * along + i * W..][..W];
            fetch(x, (k + AHEAD) * along + i * W);
            let paired = U::VALUES == 2 && k + 1 < ks;
            let next = if paired { &x[(k + 1) * along + i * W..][..W] } else { &zeros };
            U::join(&mut out[i * panel + unit * W..][..W], row, next);
        }
    }
}

/// A lane lies along `k`: blocks of eight units of eight lanes are turned in registers.
#[inline(always)]
fn turn_lanes<E: Element, U: Unit<E>>(
    out: &mut [f32],
    [width, panel]: [usize; 2],
    x: &[E],
    across: usize,
    [lanes, ks]: [usize; 2],
    transpose: impl Fn([[f32; 8]; 8]) -> [[f32; 8]; 8],
) {
    for (i, first) in (0..lanes).step_by(width).enumerate() {
        let (out, x) = (&mut out[i * panel..], &x[first * across..]);
        turn_panel::<E, U>(out, width, x, across, [width.min(lanes - first), ks], &transpose);
    }
}

#[inline(always)]
fn turn_panel<E: Element, U: Unit<E>>(
    out: &mut [f32],
    width: usize,
    x: &[E],
    across: usize,
    [lanes, ks]: [usize; 2],
    transpose: impl Fn([[f32; 8]; 8]) -> [[f32; 8]; 8],
) {
    let whole = ks / (8 * U::VALUES) * 8; // units
    for first in (0..lanes).step_by(8) {
        let (here, columns) = ((lanes - first).min(8), (width - first).min(8));
        let (x, out) = (&x[first * across..], &mut out[first..]);
        match (here, columns) {
            (8, 8) => turn_whole::<E, U, 8>(out, width, x, across, whole, &transpose),
            (6, 6) => turn_whole::<E, U, 6>(out, width, x, across, whole, &transpose),
            _ => by_value::<E, U>(out, width, x, [across, 1], here, 0..whole * U::VALUES),
        }
        by_value::<E, U>(out, width, x, [across, 1], here, whole * U::VALUES..ks);
    }
}

/// Blocks of eight units of `N` lanes, a number that the compiler knows: they stay in registers.
#[inline(always)]
fn turn_whole<E: Element, U: Unit<E>, const N: usize>(
    out: &mut [f32],
    width: usize,
    x: &[E],
    across: usize,
    units: usize,
    transpose: impl Fn([[f32; 8]; 8]) -> [[f32; 8]; 8],
) {
    for unit in (0..units).step_by(8) {
        let mut block = [[0.0; 8]; 8];
        for (lane, block) in block.iter_mut().take(N).enumerate() {
            let at = lane * across + unit * U::VALUES;
            fetch(x, at + width * across);
            U::chain(block, &x[at..][..8 * U::VALUES]);
        }
        let block = transpose(block);
        for i in 0..8 {
            out[(unit + i) * width..][..N].copy_from_slice(&block[i][..N]);
        }
    }
}

fn transpose(x: [[f32; 8]; 8]) -> [[f32; 8]; 8] {
    std::array::from_fn(|i| std::array::from_fn(|j| x[j][i]))
}

/// The same in 24 shuffles.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn transpose_avx2(x: [[f32; 8]; 8]) -> [[f32; 8]; 8] {
    use std::arch::x86_64::*;
    // SAFETY: eight rows of eight f32 are eight vectors; any bits are valid.
    let x: [__m256; 8] = unsafe { std::mem::transmute(x) };
    let pairs = |a, b| [_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b)];
    let fours = |a, b| {
        let (a, b) = (_mm256_castps_pd(a), _mm256_castps_pd(b));
        [_mm256_unpacklo_pd(a, b), _mm256_unpackhi_pd(a, b)].map(|x| _mm256_castpd_ps(x))
    };
    let [p, q, r, s] = [0, 2, 4, 6].map(|i| pairs(x[i], x[i + 1]));
    let top = [fours(p[0], q[0]), fours(p[1], q[1])];
    let bottom = [fours(r[0], s[0]), fours(r[1], s[1])];
    let halves = |i: usize| (top[i / 2][i % 2], bottom[i / 2][i % 2]);
    let low: [__m256; 4] = [0, 1, 2, 3].map(|i| _mm256_permute2f128_ps::<0x20>(halves(i).0, halves(i).1));
    let high: [__m256; 4] = [0, 1, 2, 3].map(|i| _mm256_permute2f128_ps::<0x31>(halves(i).0, halves(i).1));
    // SAFETY: as above.
    unsafe { std::mem::transmute([low, high]) }
}
