//! A stage: one pass over its examples, with progress and the curves of its steps.

use temper::data::Example;
use temper::data::order::{Order, Plan};
use temper::model::{Decoder, config};
use temper::objective::Pair;
use temper::optim::{Adam, Schedule, Scheduler};
use temper::train::{Objective, StepReport, Trainer, TrainerSettings};
use temper_kernels::Cpu;

/// What distinguishes a stage.
#[derive(Debug, Clone, Copy)]
pub struct Recipe {
    /// What is minimised.
    pub objective: Objective,
    /// Examples of a step.
    pub batch: usize,
    /// The highest learning rate.
    pub learning_rate: f64,
}

/// What a stage did.
#[derive(Debug, Default)]
pub struct Course {
    /// Its steps.
    pub steps: Vec<StepReport>,
    /// Rows that the forests had.
    pub computed: u64,
    /// Rows that batches padded to their longest sequence would have had.
    pub padded: u64,
}

/// Trains one epoch.
pub fn train(
    device: &Cpu,
    decoder: Decoder<Cpu>,
    recipe: Recipe,
    examples: &[Example],
    reference: &[Pair],
    show: &mut dyn FnMut(&StepReport),
) -> anyhow::Result<(Decoder<Cpu>, Course)> {
    let plan = Plan { records: examples.len(), batch: recipe.batch, order: Order::Sequential, seed: 0 };
    let steps = plan.steps_per_epoch();
    let settings = TrainerSettings {
        schedule: Schedule {
            scheduler: Scheduler::Cosine,
            learning_rate: recipe.learning_rate,
            warmup: steps.div_ceil(20),
            steps,
        },
        adam: Adam { beta1: 0.9, beta2: 0.99, epsilon: 1e-8, weight_decay: 0.01, max_grad_norm: 1.0 },
        plan,
        microbatch_tokens: 4096,
        dropout: config::Dropout::default(),
    };
    let mut trainer = Trainer::new(device, decoder, recipe.objective, settings, examples);
    let mut course = Course::default();
    for records in plan.steps(0..steps) {
        let report = trainer.step(examples, &records, reference)?;
        let sequences = || records.iter().flat_map(|&record| &examples[record].sequences);
        let longest = sequences().map(|sequence| sequence.tokens.len()).max().unwrap_or(0);
        course.computed += report.computed_tokens;
        course.padded += (longest * sequences().count()) as u64;
        course.steps.push(report);
        show(&report);
    }
    Ok((trainer.decoder, course))
}
