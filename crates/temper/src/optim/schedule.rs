//! Learning-rate schedules with Transformers' formulas, but for `wsd`, which falls in a line. Step `k` (from 1) uses the
//! factor at `k − 1`, so that a warmup starts at 0.

/// The shape after the warmup.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scheduler {
    /// Stays at the learning rate.
    Constant,
    /// Falls to 0 in a line.
    Linear,
    /// Falls to 0 along half a cosine.
    Cosine,
    /// Warmup, stable, decay: stays, then falls to 0 in a line over the last tenth of the steps.
    Wsd,
}

/// A scheduler over a number of steps.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Schedule {
    /// The shape.
    pub scheduler: Scheduler,
    /// The highest learning rate.
    pub learning_rate: f64,
    /// Steps of the linear warmup.
    pub warmup: u64,
    /// Steps of the run.
    pub steps: u64,
}

impl Schedule {
    /// The learning rate of step `step`, from 1.
    pub fn at(&self, step: u64) -> f64 {
        let done = step.saturating_sub(1);
        if done < self.warmup {
            return self.learning_rate * done as f64 / self.warmup as f64;
        }
        let left = self.steps.saturating_sub(done) as f64;
        let falling = (self.steps.saturating_sub(self.warmup)).max(1) as f64;
        self.learning_rate
            * match self.scheduler {
                Scheduler::Constant => 1.0,
                Scheduler::Linear => left / falling,
                Scheduler::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * (1.0 - left / falling)).cos()),
                Scheduler::Wsd => (left / self.steps.div_ceil(10).max(1) as f64).min(1.0),
            }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Expected values: `transformers.get_*_schedule*` with 2 warmup steps of 10, at steps 0, 1, 2, 6, 9.
    #[test]
    fn the_factors_are_transformers() {
        let at = |scheduler| {
            let schedule = Schedule { scheduler, learning_rate: 1.0, warmup: 2, steps: 10 };
            [1, 2, 3, 7, 10].map(|step| schedule.at(step))
        };
        let close = |found: [f64; 5], expected: [f64; 5]| {
            found.iter().zip(expected).all(|(f, e)| (f - e).abs() < 1e-12)
        };
        assert!(close(at(Scheduler::Constant), [0.0, 0.5, 1.0, 1.0, 1.0]));
        assert!(close(at(Scheduler::Linear), [0.0, 0.5, 1.0, 0.5, 0.125]));
        assert!(close(at(Scheduler::Cosine), [0.0, 0.5, 1.0, 0.5, 0.038_060_233_744_356_6]));
    }

    #[test]
    fn wsd_falls_over_the_last_tenth() {
        let schedule = Schedule { scheduler: Scheduler::Wsd, learning_rate: 2.0, warmup: 4, steps: 100 };
        assert_eq!([1, 3, 5, 91, 96, 100].map(|step| schedule.at(step)), [0.0, 1.0, 2.0, 2.0, 1.0, 0.2]);
    }
}
