//! Attention as the textbook has it: dense, any mask. The oracle of the forest attention.

/// A real number type that the textbook runs in.
pub trait Real:
    Copy
    + PartialOrd
    + std::iter::Sum
    + std::ops::Add<Output = Self>
    + std::ops::Mul<Output = Self>
    + std::ops::Sub<Output = Self>
    + std::ops::Div<Output = Self>
{
    /// From f64, rounded.
    fn of(value: f64) -> Self;
    /// e to this power.
    fn exp(self) -> Self;
}

impl Real for f32 {
    fn of(value: f64) -> f32 {
        value as f32
    }
    fn exp(self) -> f32 {
        f32::exp(self)
    }
}

impl Real for f64 {
    fn of(value: f64) -> f64 {
        value
    }
    fn exp(self) -> f64 {
        f64::exp(self)
    }
}

/// Sizes of Q, K and V: `(batch, heads, tokens, width)`.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    /// Sequences, B.
    pub batch: usize,
    /// Heads, h.
    pub heads: usize,
    /// Tokens of a sequence, T.
    pub tokens: usize,
    /// Columns of a head, d.
    pub width: usize,
}

/// What a query may attend to. In both masks `true` is visible.
#[derive(Debug, Clone, Copy, Default)]
pub struct Masks<'a> {
    /// `(1, 1, T, T)`: query row, key column.
    pub attention: Option<&'a [bool]>,
    /// `(B, T)`: the keys that are no padding.
    pub padding: Option<&'a [bool]>,
}

/// `softmax(QKᵀ/√d + M) V` (Vaswani et al. 2017, arXiv 1706.03762, equation 1), `M` being 0 where a mask
/// shows a key and −∞ where it hides it. `dropout(b, h, query, key)` is the factor of each probability, 1 for
/// no dropout. Returns `(B, h, T, d)`.
///
/// A query that may attend to nothing gives zeros: the sum over an empty set.
///
/// # Panics
/// When a slice's length does not fit `shape`.
pub fn self_attention<R: Real>(
    [q, k, v]: [&[R]; 3],
    shape: Shape,
    masks: Masks<'_>,
    dropout: impl Fn(usize, usize, usize, usize) -> R,
) -> Vec<R> {
    let Shape { batch, heads, tokens, width } = shape;
    for x in [q, k, v] {
        assert_eq!(x.len(), batch * heads * tokens * width, "Q, K and V have B·h·T·d entries");
    }
    assert!(masks.attention.is_none_or(|mask| mask.len() == tokens * tokens), "the mask has T·T entries");
    assert!(
        masks.padding.is_none_or(|mask| mask.len() == batch * tokens),
        "the padding mask has B·T entries"
    );
    let scale = R::of(1.0 / (width as f64).sqrt());
    let row = |b: usize, h: usize, t: usize| {
        ((b * heads + h) * tokens + t) * width..((b * heads + h) * tokens + t + 1) * width
    };
    let mut out = vec![R::of(0.0); q.len()];
    for b in 0..batch {
        for h in 0..heads {
            for query in 0..tokens {
                let visible: Vec<usize> = (0..tokens)
                    .filter(|&key| masks.attention.is_none_or(|mask| mask[query * tokens + key]))
                    .filter(|&key| masks.padding.is_none_or(|mask| mask[b * tokens + key]))
                    .collect();
                let scores: Vec<R> = visible
                    .iter()
                    .map(|&key| {
                        scale * q[row(b, h, query)].iter().zip(&k[row(b, h, key)]).map(|(&q, &k)| q * k).sum()
                    })
                    .collect();
                let Some(max) = scores.iter().copied().reduce(|a, b| if b > a { b } else { a }) else {
                    continue;
                };
                let exps: Vec<R> = scores.iter().map(|&score| (score - max).exp()).collect();
                let sum: R = exps.iter().copied().sum();
                for (&key, &e) in visible.iter().zip(&exps) {
                    let probability = e / sum * dropout(b, h, query, key);
                    for (out, &v) in out[row(b, h, query)].iter_mut().zip(&v[row(b, h, key)]) {
                        *out = *out + probability * v;
                    }
                }
            }
        }
    }
    out
}
