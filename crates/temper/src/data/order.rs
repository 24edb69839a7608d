//! Which records make which optimizer step: a function of the seed, the epoch and the step alone.

use std::ops::Range;

use temper_kernels::{mix, uniform};

/// The order of the records of an epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// A new permutation each epoch.
    Shuffled,
    /// As in the file.
    Sequential,
}

/// Steps over `records` records, `batch` a step. No step crosses an epoch: the last of an epoch may be short.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    /// Number of records.
    pub records: usize,
    /// Records of a step.
    pub batch: usize,
    /// Their order.
    pub order: Order,
    /// Seed of the permutations.
    pub seed: u64,
}

impl Plan {
    /// Optimizer steps of an epoch.
    pub fn steps_per_epoch(&self) -> u64 {
        self.records.div_ceil(self.batch) as u64
    }

    /// Epochs completed after `step` steps, as a fraction.
    pub fn epoch(&self, step: u64) -> f64 {
        step as f64 / self.steps_per_epoch() as f64
    }

    /// The records of steps `steps` (from 0), step by step. A permutation is drawn once an epoch.
    pub fn steps(self, steps: Range<u64>) -> impl Iterator<Item = Vec<usize>> {
        let mut current: Option<(u64, Vec<usize>)> = None;
        steps.map(move |step| {
            let (epoch, step) = (step / self.steps_per_epoch(), (step % self.steps_per_epoch()) as usize);
            let order = match current.take() {
                Some((drawn, order)) if drawn == epoch => order,
                _ => self.permutation(epoch),
            };
            let batch = order[step * self.batch..self.records.min((step + 1) * self.batch)].to_vec();
            current = Some((epoch, order));
            batch
        })
    }

    /// Fisher–Yates with counter-based draws.
    fn permutation(&self, epoch: u64) -> Vec<usize> {
        let mut order: Vec<usize> = (0..self.records).collect();
        if self.order == Order::Shuffled {
            let key = mix(mix(self.seed, u64::from_be_bytes(*b"  order ")), epoch);
            for i in (1..order.len()).rev() {
                order.swap(i, (uniform(key, i as u64) * (i + 1) as f64) as usize);
            }
        }
        order
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_record_comes_once_an_epoch() {
        let plan = Plan { records: 10, batch: 4, order: Order::Shuffled, seed: 7 };
        let steps: Vec<Vec<usize>> = plan.steps(0..6).collect();
        assert_eq!(steps.iter().map(Vec::len).collect::<Vec<_>>(), [4, 4, 2, 4, 4, 2]);
        for epoch in [&steps[..3], &steps[3..]] {
            let mut seen: Vec<usize> = epoch.concat();
            seen.sort_unstable();
            assert_eq!(seen, (0..10).collect::<Vec<_>>());
        }
        assert_ne!(steps[..3].concat(), steps[3..].concat());
        assert_eq!(plan.steps(4..5).next(), Some(steps[4].clone()), "a step does not depend on those before");
    }

    #[test]
    fn sequential_keeps_the_file() {
        let plan = Plan { records: 3, batch: 2, order: Order::Sequential, seed: 7 };
        assert_eq!(plan.steps(0..2).collect::<Vec<_>>(), [vec![0, 1], vec![2]]);
    }
}
