//! A stage: training with progress, and the curves of its steps.

use std::sync::atomic::AtomicBool;
use std::time::Instant;

use temper::data::Example;
use temper::data::order::{Order, Plan};
use temper::model::{Decoder, config};
use temper::objective::Pair;
use temper::optim::{Adam, Schedule, Scheduler};
use temper::parallel::Ranks;
use temper::train::{Objective, StepReport, Trainer, TrainerSettings};
use temper_kernels::Cpu;

use crate::output::duration;
use crate::progress::Counter;

/// What distinguishes a stage.
#[derive(Debug, Clone, Copy)]
pub struct Recipe {
    /// What is minimised.
    pub objective: Objective,
    /// Examples of a step.
    pub batch: usize,
    /// Passes over the examples.
    pub epochs: u64,
    /// Their order, with its seed.
    pub order: (Order, u64),
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

/// Trains as the recipe says.
pub fn train(
    (device, ranks): (&Cpu, &Ranks),
    decoder: Decoder<Cpu>,
    recipe: Recipe,
    examples: &[Example],
    reference: &[Pair],
    name: &'static str,
) -> anyhow::Result<(Decoder<Cpu>, Course)> {
    let start = Instant::now();
    let (order, seed) = recipe.order;
    let plan = Plan { records: examples.len(), batch: recipe.batch, order, seed };
    let steps = recipe.epochs * plan.steps_per_epoch();
    let settings = TrainerSettings {
        schedule: Schedule {
            scheduler: Scheduler::Cosine,
            learning_rate: recipe.learning_rate,
            warmup: steps.div_ceil(20),
            steps,
        },
        adam: Adam {
            beta1: 0.9,
            beta2: 0.99,
            epsilon: 1e-8,
            weight_decay: 0.01,
            max_grad_norm: 1.0,
            lora_plus: 1.0,
        },
        plan,
        microbatch_tokens: 4096,
        dropout: config::Dropout::default(),
    };
    let mut trainer = Trainer::new(device, decoder, recipe.objective, settings, examples, ranks);
    let mut course = Course::default();
    let mut progress = Counter::new(name, steps);
    for records in plan.steps(0..steps) {
        let step = trainer.step(examples, &records, reference, &AtomicBool::new(false))?;
        let Some(report) = step else { break };
        let sequences = || records.iter().flat_map(|&record| &examples[record].sequences);
        let longest = sequences().map(|sequence| sequence.tokens.len()).max().unwrap_or(0);
        course.computed += report.computed_tokens;
        course.padded += (longest * sequences().count()) as u64;
        course.steps.push(report);
        let left = start.elapsed().as_secs_f64() / report.step as f64 * (steps - report.step) as f64;
        let speed = report.step_tokens as f64 / report.seconds;
        let loss = format!("loss {:.4}", report.metrics.loss);
        let more = [loss, format!("{} left", duration(left)), format!("{speed:.0} tok/s")];
        progress.show(report.step, steps, &more);
    }
    progress.finish();
    Ok((trainer.decoder, course))
}
