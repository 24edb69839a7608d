//! Drawing a token from logits, a function of the seed, the answer and the position.

use temper_kernels::{mix, uniform};

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
    let likeliest =
        || (0..logits.len()).fold(0, |best, i| if logits[i] > logits[best] { i } else { best }) as u32;
    if sampling.temperature <= 0.0 {
        return likeliest();
    }
    let mut order: Vec<u32> = (0..logits.len() as u32).collect();
    let descending = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
    let max = f64::from(logits[likeliest() as usize]);
    let weight = |&i: &u32| ((f64::from(logits[i as usize]) - max) / sampling.temperature).exp();
    if sampling.top_k > 0 && sampling.top_k < order.len() {
        order.select_nth_unstable_by(sampling.top_k - 1, descending);
        order.truncate(sampling.top_k);
        order.sort_unstable_by(descending);
    }
    let total: f64 = order.iter().map(weight).sum();
    if sampling.top_p < 1.0 {
        // All that are rarer than this would not make up for what top-p leaves out: few are left to sort.
        let least = (1.0 - sampling.top_p) * total / order.len() as f64;
        order.retain(|i| weight(i) >= least);
        order.sort_unstable_by(descending);
    }
    let weights: Vec<f64> = order.iter().map(weight).collect();
    let mut kept = 0.0;
    let mut nucleus = 0;
    while nucleus < weights.len() && (nucleus == 0 || kept < sampling.top_p * total) {
        kept += weights[nucleus];
        nucleus += 1;
    }
    let mut draw =
        uniform(mix(mix(sampling.seed, u64::from_be_bytes(*b"  sample")), answer), position) * kept;
    for (&token, weight) in order[..nucleus].iter().zip(&weights) {
        draw -= weight;
        if draw < 0.0 {
            return token;
        }
    }
    likeliest()
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
