//! What a step or an evaluation found: sums while it goes on, over micro-batches and ranks, and the means at its end.

use crate::objective::{Dpo, Pair};
use crate::score::Score;

/// Means over the pairs of a step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Preferences {
    /// `β (logp − reference logp)`.
    pub rewards: Pair,
    /// Share of pairs whose chosen answer has the higher reward; a tie does not count.
    pub accuracy: f64,
    /// Chosen minus rejected reward.
    pub margin: f64,
    /// Log-probabilities.
    pub logps: Pair,
}

/// What the forward passes of a step or an evaluation found.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Metrics {
    /// The loss.
    pub loss: f64,
    /// Share of trained tokens (of chosen answers) that were the likeliest.
    pub mean_token_accuracy: f64,
    /// Mean entropy where trained tokens (of both answers) were predicted, in nats.
    pub entropy: f64,
    /// For DPO.
    pub preferences: Option<Preferences>,
}

/// What a step did.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepReport {
    /// Number of the step, from 1.
    pub step: u64,
    /// Epochs done, as a fraction.
    pub epoch: f64,
    /// What the forward passes found, before the update.
    pub metrics: Metrics,
    /// Norm of all gradients before clipping.
    pub grad_norm: f64,
    /// Learning rate of the update.
    pub learning_rate: f64,
    /// Tokens of all sequences since the run began, shared prompts counted for each.
    pub num_tokens: u64,
    /// Rows that the forests of this step really had.
    pub computed_tokens: u64,
    /// Tokens of this step's sequences.
    pub step_tokens: u64,
    /// Wall time of the step.
    pub seconds: f64,
    /// Peak resident memory so far, of the process that has most.
    pub peak_bytes: Option<u64>,
}

/// Sums while a step or an evaluation goes on.
#[derive(Debug, Default)]
pub(super) struct Totals {
    /// Records of the whole step or evaluation, the denominator of DPO.
    records: usize,
    pub loss: f64,
    /// Trained tokens, and how many were the likeliest; of pairs those of the chosen.
    tokens: usize,
    likeliest: usize,
    /// Trained tokens of both answers, and their entropy.
    predicted: usize,
    entropy: f64,
    pairs: usize,
    rewards: [f64; 2],
    logps: [f64; 2],
    accurate: usize,
    pub rows: u64,
}

/// Numbers of a [`Totals`] that are sums.
const SUMS: usize = 12;

impl Totals {
    /// Of a step or an evaluation of so many records.
    pub fn of(records: usize) -> Totals {
        Totals { records, ..Totals::default() }
    }

    /// What is added up, for the way to other ranks; counts are below 2⁵³.
    pub fn to_sums(&self) -> [f64; SUMS] {
        let ([rewards0, rewards1], [logps0, logps1]) = (self.rewards, self.logps);
        let counts = [self.tokens, self.likeliest, self.predicted, self.pairs, self.accurate];
        let [tokens, likeliest, predicted, pairs, accurate] = counts.map(|count| count as f64);
        let (loss, entropy, rows) = (self.loss, self.entropy, self.rows as f64);
        [
            loss, entropy, rewards0, rewards1, logps0, logps1, tokens, likeliest, predicted, pairs, accurate,
            rows,
        ]
    }

    /// Adds another's.
    pub fn add(&mut self, sums: [f64; SUMS]) {
        let mine = self.to_sums();
        let added: [f64; SUMS] = std::array::from_fn(|i| mine[i] + sums[i]);
        let [loss, entropy, rewards0, rewards1, logps0, logps1, counts @ ..] = added;
        let [tokens, likeliest, predicted, pairs, accurate, rows] = counts.map(|count| count as usize);
        let (rewards, logps, rows) = ([rewards0, rewards1], [logps0, logps1], rows as u64);
        let records = self.records;
        *self = Totals {
            records,
            loss,
            tokens,
            likeliest,
            predicted,
            entropy,
            pairs,
            rewards,
            logps,
            accurate,
            rows,
        };
    }

    pub fn metrics(&self) -> Metrics {
        let share = |sum: f64, of: usize| sum / of.max(1) as f64;
        let mean = |[chosen, rejected]: [f64; 2]| Pair {
            chosen: chosen / self.pairs as f64,
            rejected: rejected / self.pairs as f64,
        };
        let preferences = || Preferences {
            rewards: mean(self.rewards),
            accuracy: self.accurate as f64 / self.pairs as f64,
            margin: (self.rewards[0] - self.rewards[1]) / self.pairs as f64,
            logps: mean(self.logps),
        };
        Metrics {
            loss: self.loss,
            mean_token_accuracy: share(self.likeliest as f64, self.tokens),
            entropy: share(self.entropy, self.predicted),
            preferences: (self.pairs > 0).then(preferences),
        }
    }

    /// Adds the loss of a pair; returns the coefficients of its two sequences.
    pub fn add_pair(&mut self, dpo: &Dpo, scores: &[Score], reference: Pair) -> [f64; 2] {
        let (chosen, rejected) = (scores[0].logp, scores[1].logp);
        let pair = dpo.loss(Pair { chosen, rejected }, reference);
        let share = 1.0 / self.records as f64;
        self.loss += pair.loss * share;
        self.pairs += 1;
        self.accurate += usize::from(pair.rewards.chosen > pair.rewards.rejected);
        for (sums, [of_chosen, of_rejected]) in [
            (&mut self.rewards, [pair.rewards.chosen, pair.rewards.rejected]),
            (&mut self.logps, [chosen, rejected]),
        ] {
            sums[0] += of_chosen;
            sums[1] += of_rejected;
        }
        self.count_trained(&scores[0]);
        // TRL has the entropy of both answers, and the accuracy of one.
        self.predicted += scores[1].tokens;
        self.entropy += scores[1].entropy;
        [pair.coefficient * share, -pair.coefficient * share]
    }

    pub fn count_trained(&mut self, score: &Score) {
        self.tokens += score.tokens;
        self.likeliest += score.likeliest;
        self.predicted += score.tokens;
        self.entropy += score.entropy;
    }
}
