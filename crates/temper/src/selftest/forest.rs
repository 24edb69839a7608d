//! Sequences in a forest against each alone, micro-batches against the whole step.

use temper_kernels::{Cpu, Device, Plain};

use super::{Check, relative, tiny};
use crate::data::Forest;
use crate::model::config::{self, Config};
use crate::model::decoder::StepDropout;

/// A forest of sequences against each sequence alone, and a step split into micro-batches against the whole, in
/// value and in gradient: f64 to rounding, f32 to its own.
pub fn forest(cpu: &Cpu) -> Vec<Check> {
    let mut checks = Vec::new();
    for (name, config) in tiny::configs() {
        checks.extend(forest_on(&Plain, name, &config, "f64", 1e-12));
        checks.extend(forest_on(cpu, name, &config, "f32", 2e-5));
    }
    checks
}

fn forest_on<D: Device>(device: &D, name: &str, config: &Config, precision: &str, bound: f64) -> Vec<Check> {
    let decoder = tiny::decoder(device, config);
    let sequences = tiny::sequences(config.vocabulary);
    let dropout = StepDropout {
        p: config::Dropout { embedding: 0.1, attention: 0.1, residual: 0.1 },
        adapter: 0.0,
        key: 23,
    };
    // Batches as ranges of sequences; gradients add up over them.
    let run = |batches: &[std::ops::Range<usize>]| {
        let (mut losses, mut sum) = (0.0, Vec::<f64>::new());
        for range in batches {
            let forest = Forest::new(&sequences[range.clone()]);
            let (loss, gradients) = tiny::loss_and_gradient(
                device,
                &decoder,
                &forest,
                dropout,
                &tiny::coefficients(&forest, range.start),
            );
            losses += loss;
            let flat: Vec<f64> = gradients
                .iter()
                .flatten()
                .flat_map(|g| device.download(g).iter().map(|&x| f64::from(x)).collect::<Vec<_>>())
                .collect();
            sum = if sum.is_empty() { flat } else { sum.iter().zip(&flat).map(|(a, b)| a + b).collect() };
        }
        (losses, sum)
    };
    // Downloads are f32: a difference of one rounding is the floor of the f64 check.
    let bound_gradient = bound.max(1e-6);
    let (loss, gradient) = run(&[0..1, 1..2, 2..3, 3..4]);
    let mut checks = Vec::new();
    for (what, batches) in [("one forest", &[0..4][..]), ("two micro-batches", &[0..2, 2..4])] {
        let (batched_loss, batched_gradient) = run(batches);
        checks.push(Check::new(
            format!("{name}, {precision}: {what} ≡ one by one, value"),
            (batched_loss - loss).abs() / loss.abs(),
            bound,
        ));
        checks.push(Check::new(
            format!("{name}, {precision}: {what} ≡ one by one, gradient"),
            relative(&batched_gradient, &gradient),
            bound_gradient,
        ));
    }
    checks
}
