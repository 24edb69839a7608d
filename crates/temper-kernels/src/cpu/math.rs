//! Scalar building blocks that the compiler turns into vectors inside a multiversioned caller.

/// Partial sums kept apart, so that a reduction is one vector add a step. Fixed, so that results do not depend
/// on the instruction set's width.
pub const LANES: usize = 16;

/// `eˣ` with a relative error of about one rounding; 0 below −87, where it is about to be subnormal, and `e⁸⁸` above 88.
///
/// `x = n ln 2 + r`, the polynomial of Cephes' `expf` for `eʳ`, and `n` put into the exponent. Adding 1.5·2²³ rounds to an integer
/// and leaves it in the low bits.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0;
    let tiny = x < -87.0;
    let x = x.clamp(-87.0, 88.0);
    let shifted = x.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = n.mul_add(-0.693_359_4, x);
    let r = n.mul_add(2.121_944_4e-4, r);
    let p = r.mul_add(1.987_569_1e-4, 1.398_199_9e-3);
    let p = p.mul_add(r, 8.333_452e-3);
    let p = p.mul_add(r, 4.166_579_6e-2);
    let p = p.mul_add(r, 1.666_666_5e-1);
    let p = p.mul_add(r, 0.5);
    let p = (p * r).mul_add(r, r) + 1.0;
    let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(127 << 23));
    if tiny { 0.0 } else { p * power }
}

/// `1 / (1 + e⁻ˣ)`.
#[inline(always)]
pub fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// `tanh x = 1 − 2 / (e²ˣ + 1)`.
#[inline(always)]
pub fn tanh(x: f32) -> f32 {
    1.0 - 2.0 / (exp(2.0 * x) + 1.0)
}

/// Halves are joined until one value is left. The compiler must not see that, or it takes the lanes apart already in the
/// loop that filled them.
#[inline(always)]
fn reduce(lanes: [f32; LANES], join: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = std::hint::black_box(lanes);
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] = join(lanes[i], lanes[i + half]);
        }
        half /= 2;
    }
    lanes[0]
}

/// `x = f(x)`. Short rows, whose number of values is a multiple of [`LANES`], take no scalar steps.
#[inline(always)]
pub fn each(x: &mut [f32], f: impl Fn(f32) -> f32) {
    let mut chunks = x.chunks_exact_mut(LANES);
    for chunk in &mut chunks {
        for x in chunk {
            *x = f(*x);
        }
    }
    for x in chunks.into_remainder() {
        *x = f(*x);
    }
}

/// `Σ f(x)`.
#[inline(always)]
pub fn sum(x: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    let mut lanes = [0.0; LANES];
    let chunks = x.chunks_exact(LANES);
    for (lane, &x) in lanes.iter_mut().zip(chunks.remainder()) {
        *lane = f(x);
    }
    for chunk in chunks {
        for i in 0..LANES {
            lanes[i] += f(chunk[i]);
        }
    }
    reduce(lanes, |a, b| a + b)
}

/// `Σ a b`.
#[inline(always)]
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0; LANES];
    let (a, b) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    for ((lane, &a), &b) in lanes.iter_mut().zip(a.remainder()).zip(b.remainder()) {
        *lane = a * b;
    }
    for (a, b) in a.zip(b) {
        for i in 0..LANES {
            lanes[i] = a[i].mul_add(b[i], lanes[i]);
        }
    }
    reduce(lanes, |a, b| a + b)
}

/// The largest number, −∞ of none.
#[inline(always)]
pub fn max(x: &[f32]) -> f32 {
    let larger = |a, b| if b > a { b } else { a };
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let chunks = x.chunks_exact(LANES);
    for (lane, &x) in lanes.iter_mut().zip(chunks.remainder()) {
        *lane = larger(*lane, x);
    }
    for chunk in chunks {
        for i in 0..LANES {
            lanes[i] = larger(lanes[i], chunk[i]);
        }
    }
    reduce(lanes, larger)
}
