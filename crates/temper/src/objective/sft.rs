//! Supervised fine-tuning: the mean negative log-probability of the trained tokens of an optimizer step.

/// `L = −Σ log p(token) / trained` and `dL/dlogp = −1 / trained`, for some of the step's targets.
///
/// `trained` counts the targets of the whole step, so that the losses and gradients of micro-batches add up to
/// the step's, however it is split.
pub fn sft(logps: &[f64], trained: usize) -> (f64, f64) {
    (-logps.iter().sum::<f64>() / trained as f64, -1.0 / trained as f64)
}

#[cfg(test)]
mod tests {
    use super::sft;

    #[test]
    fn micro_batches_add_up() {
        let logps = [-1.0, -2.0, -4.5];
        let whole = sft(&logps, 3).0;
        assert_eq!(whole, 2.5);
        assert_eq!(sft(&logps[..1], 3).0 + sft(&logps[1..], 3).0, whole);
        assert_eq!(sft(&logps, 3).1, -1.0 / 3.0);
    }
}
