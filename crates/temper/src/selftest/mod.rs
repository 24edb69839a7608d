//! Checks a user can run: gradients against finite differences, forests against single sequences, the identity
//! behind DPO, attention against stored values, adapters that change nothing against none. The test suite runs the same.

mod adapters;
mod attention;
mod dpo_identity;
mod forest;
mod gradients;
mod stored;
mod tiny;

use temper_kernels::{mix, uniform};

pub use adapters::adapters;
pub use attention::attention;
pub use dpo_identity::dpo_identity;
pub use forest::forest;
pub use gradients::gradients;

/// One checked quantity.
#[derive(Debug, Clone)]
pub struct Check {
    /// What was compared.
    pub name: String,
    /// The worst error found.
    pub error: f64,
    /// The error allowed.
    pub bound: f64,
}

impl Check {
    fn new(name: impl Into<String>, error: f64, bound: f64) -> Check {
        Check { name: name.into(), error, bound }
    }

    /// Whether the error is within its bound; not a number is not.
    pub fn passed(&self) -> bool {
        self.error <= self.bound
    }
}

/// Values in (−1, 1), a function of a name.
fn values(name: &str, len: usize) -> Vec<f64> {
    let key = name.bytes().fold(11, |key, byte| mix(key, byte.into()));
    (0..len).map(|i| 2.0 * uniform(key, i as u64) - 1.0).collect()
}

/// `max |a − b| / max |b|`.
fn relative(a: &[f64], b: &[f64]) -> f64 {
    let largest = b.iter().fold(f64::MIN_POSITIVE, |max, b| max.max(b.abs()));
    if a.len() != b.len() {
        return f64::INFINITY;
    }
    worst(a.iter().zip(b).map(|(a, b)| (a - b).abs() / largest))
}

/// The largest of some errors; what is not a number is larger than any.
fn worst(errors: impl IntoIterator<Item = f64>) -> f64 {
    errors.into_iter().max_by(f64::total_cmp).unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_that_is_not_a_number_passes_no_check() {
        let nan = f64::NAN;
        for found in [[nan, 0.0], [0.0, nan], [nan, nan]] {
            assert!(!Check::new("", relative(&found, &[0.0, 1.0]), 1.0).passed(), "{found:?}");
        }
        assert!(Check::new("", relative(&[0.5, 1.0], &[0.0, 1.0]), 0.5).passed());
    }
}
