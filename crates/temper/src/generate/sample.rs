//! Drawing a token from logits, a function of the seed, the answer and the position.

use std::cmp::Ordering;

use temper_kernels::{max, mix, uniform};

/// How a token is drawn. The filters apply in the order of Transformers: temperature, top-k, top-p.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// Divides the logits; 0 takes the likeliest token.
    pub temperature: f64,
    /// Keep this many of the likeliest; 0 keeps all.
    pub top_k: usize,
    /// Keep the fewest likeliest whose probabilities reach this; 1 keeps all.
    pub top_p: f64,
    /// The seed.
    pub seed: u64,
}

impl Sampling {
    /// Always the likeliest token.
    pub const GREEDY: Sampling = Sampling { temperature: 0.0, top_k: 0, top_p: 1.0, seed: 0 };
}

/// The token at `position` of answer `answer`. The first of equals wins.
pub fn choose(logits: &[f32], sampling: &Sampling, answer: u64, position: u64) -> u32 {
    let likeliest = likeliest(logits);
    if sampling.temperature <= 0.0 {
        return likeliest;
    }
    let all = 0..logits.len() as u32;
    let tokens =
        if (1..logits.len()).contains(&sampling.top_k) { top(logits, sampling.top_k) } else { all.collect() };
    let largest = f64::from(logits[likeliest as usize]);
    let weight = |token: u32| ((f64::from(logits[token as usize]) - largest) / sampling.temperature).exp();
    let mut weighted: Vec<(u32, f64)> = tokens.into_iter().map(|token| (token, weight(token))).collect();
    let total: f64 = weighted.iter().map(|(_, weight)| weight).sum();
    if sampling.top_p < 1.0 {
        // All that are rarer than this would not make up for what top-p leaves out: few are left to sort.
        let least = (1.0 - sampling.top_p) * total / weighted.len() as f64;
        weighted.retain(|&(_, weight)| weight >= least);
        weighted.sort_unstable_by(|(a, _), (b, _)| descending(logits, *a, *b));
    }
    let (mut kept, mut sum) = (0, 0.0);
    while kept < weighted.len() && (kept == 0 || sum < sampling.top_p * total) {
        sum += weighted[kept].1;
        kept += 1;
    }
    let mut draw = uniform(mix(mix(sampling.seed, u64::from_be_bytes(*b"  sample")), answer), position) * sum;
    for &(token, weight) in &weighted[..kept] {
        draw -= weight;
        if draw < 0.0 {
            return token;
        }
    }
    likeliest
}

/// The likeliest first, of equals (also 0 and −0) the first.
fn descending(logits: &[f32], a: u32, b: u32) -> Ordering {
    let logit = |token: u32| logits[token as usize] + 0.0;
    logit(b).total_cmp(&logit(a)).then(a.cmp(&b))
}

/// The likeliest token.
fn likeliest(logits: &[f32]) -> u32 {
    let max = max(logits);
    logits.iter().position(|&logit| logit == max).unwrap_or(0) as u32
}

/// The likeliest `k` tokens, in order.
fn top(logits: &[f32], k: usize) -> Vec<u32> {
    let order = |a: &u32, b: &u32| descending(logits, *a, *b);
    let mut tokens = Vec::with_capacity(2 * k);
    let mut least = f32::NEG_INFINITY;
    for (token, &logit) in (0..).zip(logits) {
        if logit > least || tokens.len() < k {
            tokens.push(token);
        }
        if tokens.len() == 2 * k {
            tokens.select_nth_unstable_by(k - 1, order);
            tokens.truncate(k);
            least = logits[tokens[k - 1] as usize];
        }
    }
    tokens.sort_unstable_by(order);
    tokens.truncate(k);
    tokens
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOGITS: [f32; 4] = [1.0, 3.0, 2.0, 3.0];

    #[test]
    fn greedy_takes_the_first_of_the_likeliest() {
        assert_eq!(choose(&LOGITS, &Sampling::GREEDY, 0, 0), 1);
    }

    #[test]
    fn the_top_are_the_first_of_all_in_order() {
        for n in 1..120u64 {
            let logits: Vec<f32> = (0..n).map(|i| (8.0 * uniform(n, i) - 4.0).trunc() as f32).collect();
            let mut all: Vec<u32> = (0..n as u32).collect();
            all.sort_by(|&a, &b| logits[b as usize].partial_cmp(&logits[a as usize]).unwrap());
            assert_eq!(likeliest(&logits), all[0]);
            for k in 1..=n as usize {
                assert_eq!(top(&logits, k), all[..k], "{k} of {logits:?}");
            }
        }
    }

    #[test]
    fn filters_keep_what_they_say() {
        let drawn = |sampling: Sampling| {
            let mut tokens: Vec<u32> = (0..500).map(|i| choose(&LOGITS, &sampling, 0, i)).collect();
            tokens.sort_unstable();
            tokens.dedup();
            tokens
        };
        let free = Sampling { temperature: 1.0, top_k: 0, top_p: 1.0, seed: 4 };
        assert_eq!(drawn(free), [0, 1, 2, 3]);
        assert_eq!(drawn(Sampling { top_k: 2, ..free }), [1, 3]);
        assert_eq!(drawn(Sampling { top_p: 0.5, ..free }), [1, 3]);
        assert_eq!(drawn(Sampling { top_p: 0.3, ..free }), [1]);
        assert_eq!(drawn(Sampling { top_p: 0.0, ..free }), [1]);
        assert_eq!(drawn(Sampling { top_k: 3, top_p: 0.8, ..free }), [1, 3]);
    }

    #[test]
    fn frequencies_follow_the_softmax() {
        let sampling = Sampling { temperature: 2.0, top_k: 0, top_p: 1.0, seed: 9 };
        let n = 20_000;
        let ones = (0..n).filter(|&i| choose(&LOGITS, &sampling, 3, i) == 1).count() as f64 / n as f64;
        let expected = (1.5f64).exp() / LOGITS.iter().map(|&z| (f64::from(z) / 2.0).exp()).sum::<f64>();
        assert!((ones - expected).abs() < 0.015, "{ones} {expected}");
    }
}
