//! One optimizer step: records → forests → forward, objective, backward → update. And evaluation, which is the
//! same without the last two.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use temper_kernels::{Device, mix};

use super::Error;
use super::gradients::GradientSum;
use super::metrics::{Metrics, StepReport, Totals};
use crate::data::order::Plan;
use crate::data::{Example, Forest, Sequence, forest};
use crate::model::activations::{ActivationsOn, Gradients};
use crate::model::decoder::StepDropout;
use crate::model::weights::Parameter;
use crate::model::{Decoder, config};
use crate::objective::{Dpo, Pair, sft};
use crate::optim::{self, Adam, Moments, Schedule, Update};
use crate::parallel::{Ranks, Strategy, deal};
use crate::score;
use crate::system;

/// What is minimised.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Objective {
    /// Mean negative log-probability of the trained tokens.
    Sft,
    /// Preference of the chosen over the rejected; examples are pairs `[chosen, rejected]`.
    Dpo(Dpo),
}

/// The numbers that steer training.
#[derive(Debug, Clone, Copy)]
pub struct TrainerSettings {
    /// Learning rates.
    pub schedule: Schedule,
    /// The optimizer.
    pub adam: Adam,
    /// Records of each step.
    pub plan: Plan,
    /// Rows of a micro-batch, where no single record needs more.
    pub microbatch_tokens: usize,
    /// Dropout.
    pub dropout: config::Dropout,
}

impl TrainerSettings {
    /// Rows that a step's largest micro-batch can have: the budget, or a single record that exceeds it; but no more than
    /// the longest records of a step together. An evaluation's has no more either, but for a longer record.
    pub fn microbatch_rows(&self, examples: &[Example]) -> usize {
        let mut rows: Vec<usize> = examples.iter().map(|example| forest::rows(&example.sequences)).collect();
        rows.sort_unstable_by(|a, b| b.cmp(a));
        let step: usize = rows.iter().take(self.plan.batch).sum();
        self.microbatch_tokens.min(step).max(rows.first().copied().unwrap_or(1)).max(1)
    }
}

/// A model in training: parameters, gradients, moments and buffers, and the number of steps done.
#[derive(Debug)]
pub struct Trainer<'a, D: Device> {
    device: &'a D,
    /// The model.
    pub decoder: Decoder<D>,
    /// AdamW's moments.
    pub moments: Moments<D::Buffer>,
    /// Of the parameters, added over a step.
    gradients: GradientSum<D>,
    ranks: Ranks,
    /// Of the activations.
    backward: Gradients<D::Buffer>,
    activations: ActivationsOn<D>,
    /// Rows that these have room for.
    rows: usize,
    /// Rows of a step's largest micro-batch.
    microbatch_rows: usize,
    settings: TrainerSettings,
    objective: Objective,
    /// Optimizer steps done.
    pub steps_done: u64,
    /// Tokens of all sequences so far.
    pub num_tokens: u64,
}

impl<'a, D: Device> Trainer<'a, D> {
    /// Buffers for training on these examples; `step` then takes them.
    pub fn new(
        device: &'a D,
        decoder: Decoder<D>,
        objective: Objective,
        settings: TrainerSettings,
        examples: &[Example],
        ranks: &Ranks,
    ) -> Trainer<'a, D> {
        let rows = settings.microbatch_rows(examples);
        Trainer {
            device,
            moments: Moments::new(device, &decoder.specs, ranks),
            gradients: GradientSum::new(device, &decoder, ranks),
            backward: decoder.gradients(device, rows),
            activations: decoder.activations(device, rows, true),
            rows,
            microbatch_rows: rows,
            decoder,
            settings,
            objective,
            ranks: ranks.clone(),
            steps_done: 0,
            num_tokens: 0,
        }
    }

    /// One optimizer step over `records`, indices into `examples`. `reference` has a pair of log-probabilities
    /// for each example, for DPO. Nothing, and nothing has changed, when a rank's `stop` was set before all micro-batches
    /// were done.
    ///
    /// # Errors
    /// [`Error::NonFinite`], before any parameter has changed.
    pub fn step(
        &mut self,
        examples: &[Example],
        records: &[usize],
        reference: &[Pair],
        stop: &AtomicBool,
    ) -> Result<Option<StepReport>, Error> {
        let start = Instant::now();
        let step = self.steps_done + 1;
        let dropout = StepDropout {
            p: self.settings.dropout,
            adapter: self.decoder.lora.as_ref().map_or(0.0, |lora| lora.dropout),
            key: mix(mix(self.settings.plan.seed, u64::from_be_bytes(*b" dropout")), step),
        };
        self.gradients.begin_step(self.device);
        self.decoder.gather_ends(self.device);
        let totals = self.pass(examples, records, reference, Some(dropout), stop);
        self.decoder.release_ends(self.device);
        let Some(totals) = totals else { return Ok(None) };
        let squares = self.gradients.squares(self.device, &self.decoder.specs);
        let grad_norm = squares.iter().sum::<f64>().sqrt();
        self.check_finite(step, totals.loss, &squares, examples, records)?;
        let learning_rate = self.settings.schedule.at(step);
        self.update(Update { step, learning_rate, grad_norm });
        let step_tokens = records.iter().map(|&record| tokens(&examples[record]) as u64).sum();
        self.steps_done = step;
        self.num_tokens += step_tokens;
        Ok(Some(StepReport {
            step,
            epoch: self.settings.plan.epoch(step),
            metrics: totals.metrics(),
            grad_norm,
            learning_rate,
            num_tokens: self.num_tokens,
            computed_tokens: totals.rows,
            step_tokens,
            peak_bytes: self.peak_memory(),
            seconds: start.elapsed().as_secs_f64(),
        }))
    }

    /// New parameters, on all ranks.
    fn update(&mut self, update: Update) {
        let (device, ranks, decoder) = (self.device, &self.ranks, &mut self.decoder);
        let parameters = match &mut decoder.pieces {
            Some(pieces) => pieces.values.iter_mut().map(Parameter::Vector).collect(),
            None => decoder.weights.parameters_mut(),
        };
        optim::update(
            device,
            parameters,
            self.gradients.sums(),
            &mut self.moments,
            &decoder.specs,
            &self.settings.adam,
            update,
            ranks,
        );
        if ranks.strategy == Strategy::Zero1 {
            decoder.share_updated(device, ranks);
        }
        decoder.refresh_norms(device);
    }

    /// Peak resident memory of the process that has most.
    fn peak_memory(&self) -> Option<u64> {
        let own = system::peak_memory().map_or(0.0, |bytes| bytes as f64);
        let most = self.ranks.gather_numbers(&[own]).concat().into_iter().fold(0.0, f64::max);
        (most > 0.0).then_some(most as u64)
    }

    /// The loss and its companions on all of `examples`, without dropout and without learning. Nothing when a rank's `stop` was
    /// set meanwhile.
    pub fn evaluate(
        &mut self,
        examples: &[Example],
        reference: &[Pair],
        stop: &AtomicBool,
    ) -> Option<Metrics> {
        let records: Vec<usize> = (0..examples.len()).collect();
        self.decoder.gather_ends(self.device);
        let totals = self.pass(examples, &records, reference, None, stop);
        self.decoder.release_ends(self.device);
        totals.map(|totals| totals.metrics())
    }

    /// Forward over all micro-batches of `records`, those of other ranks there; with `training`, backward too. Nothing when
    /// a rank's `stop` was set.
    fn pass(
        &mut self,
        examples: &[Example],
        records: &[usize],
        reference: &[Pair],
        training: Option<StepDropout>,
        stop: &AtomicBool,
    ) -> Option<Totals> {
        // One owner of the denominators: the whole step's, whatever the micro-batches.
        let trained: usize = records.iter().map(|&record| targets(&examples[record])).sum();
        let shards = self.microbatches(examples, records, training.is_some());
        let mut sums = Vec::new();
        for (place, microbatches) in shards.iter().enumerate() {
            let last = place + 1 == shards.len();
            let mut totals = Totals::of(records.len());
            if training.is_some() {
                self.gradients.begin_shard(self.device);
            }
            for (i, microbatch) in microbatches.iter().enumerate() {
                let last = last && i + 1 == microbatches.len();
                // One that stops computes nothing more, but still does what ranks do together.
                let records = if stop.load(Ordering::Relaxed) { &[] } else { &microbatch[..] };
                self.microbatch(examples, records, trained, reference, training, last, &mut totals);
            }
            if training.is_some() && !last {
                self.gradients.end_shard(self.device, place);
            }
            sums.extend(totals.to_sums());
        }
        sums.push(f64::from(u8::from(stop.load(Ordering::Relaxed))));
        let mut totals = Totals::of(records.len());
        for of_rank in self.ranks.gather_numbers(&sums) {
            let (stopped, sums) = of_rank.split_last()?;
            if *stopped != 0.0 {
                // So that whoever looks next finds it here too.
                stop.store(true, Ordering::Relaxed);
                return None;
            }
            sums.as_chunks().0.iter().for_each(|&sums| totals.add(sums));
        }
        Some(totals)
    }

    /// The records of each micro-batch of each of this rank's shards.
    fn microbatches(&self, examples: &[Example], records: &[usize], training: bool) -> Vec<Vec<Vec<usize>>> {
        let rows = |record: usize| forest::rows(&examples[record].sequences);
        let shards = deal(records, self.ranks.shards, rows);
        // An evaluation makes do with the buffers of training.
        let budget = if training { self.settings.microbatch_tokens } else { self.microbatch_rows };
        let cut = |shard: &Vec<usize>| -> Vec<Vec<usize>> {
            let groups = shard.iter().map(|&record| &examples[record].sequences[..]);
            let ranges = forest::microbatches(groups, budget);
            ranges.into_iter().map(|range| shard[range].to_vec()).collect()
        };
        let of_rank =
            |rank| -> Vec<Vec<Vec<usize>>> { shards[self.ranks.shards_of(rank)].iter().map(cut).collect() };
        // What ranks do together they do as often: empty micro-batches are added where some have fewer.
        let needed = |shards: &[Vec<Vec<usize>>]| {
            let idle = usize::from(training && shards.last().is_some_and(Vec::is_empty));
            shards.iter().map(Vec::len).sum::<usize>() + idle
        };
        let mut own = of_rank(self.ranks.rank());
        let passes = match self.ranks.strategy {
            Strategy::Fsdp => (0..self.ranks.size()).map(|rank| needed(&of_rank(rank))).max().unwrap_or(0),
            Strategy::Ddp | Strategy::Zero1 => needed(&own),
        };
        let missing = passes - own.iter().map(Vec::len).sum::<usize>();
        own.last_mut().into_iter().for_each(|last| last.extend(vec![Vec::new(); missing]));
        own
    }

    /// Forward over one micro-batch; with `training`, backward too.
    fn microbatch(
        &mut self,
        examples: &[Example],
        records: &[usize],
        trained: usize,
        reference: &[Pair],
        training: Option<StepDropout>,
        last: bool,
        totals: &mut Totals,
    ) {
        let forest = Forest::new(records.iter().flat_map(|&record| &examples[record].sequences));
        self.make_room(forest.rows());
        totals.rows += forest.rows() as u64;
        let dropout = training.unwrap_or_default();
        self.decoder.forward(self.device, &forest, dropout, None, &mut self.activations);
        let (decoder, device, activations) = (&self.decoder, self.device, &mut self.activations);
        let output = match training {
            Some(_) => decoder.head_before_backward(device, &forest, activations),
            None => decoder.head(device, &forest, activations),
        };
        let scores = score::by_sequence(&forest, &output);
        let coefficients = match self.objective {
            Objective::Sft => {
                let (loss, coefficient) = sft(&output.logp, trained);
                totals.loss += loss;
                scores.iter().for_each(|score| totals.count_trained(score));
                vec![coefficient; output.logp.len()]
            }
            Objective::Dpo(dpo) => {
                let pairs = scores.chunks_exact(2).zip(records);
                let by_sequence: Vec<f64> = pairs
                    .flat_map(|(pair, &record)| totals.add_pair(&dpo, pair, reference[record]))
                    .collect();
                forest.owners.iter().map(|&owner| by_sequence[owner as usize]).collect()
            }
        };
        if training.is_some() {
            let Trainer { decoder, device, activations, backward, .. } = self;
            let lse = &output.log_sum_exp;
            self.gradients.add(device, last, |sums| {
                decoder.backward(device, &forest, dropout, &coefficients, lse, activations, backward, sums);
            });
        }
    }

    /// Grows the buffers if a micro-batch needs more rows than any before.
    fn make_room(&mut self, rows: usize) {
        if rows > self.rows {
            self.rows = rows;
            self.activations = self.decoder.activations(self.device, rows, true);
            self.backward = self.decoder.gradients(self.device, rows);
        }
    }

    fn check_finite(
        &self,
        step: u64,
        loss: f64,
        squares: &[f64],
        examples: &[Example],
        records: &[usize],
    ) -> Result<(), Error> {
        let what = match (loss.is_finite(), squares.iter().sum::<f64>().is_finite()) {
            (true, true) => return Ok(()),
            (false, _) => "the loss",
            (true, false) => "the gradient norm",
        };
        let trained = self.decoder.specs.iter().filter(|spec| spec.trained);
        let tensor = trained.zip(squares).find(|(_, squares)| !squares.is_finite());
        let tensor = tensor.map_or_else(|| "none".into(), |(spec, _)| spec.parts[0].0.clone());
        let records = records.iter().map(|&record| examples[record].record).collect();
        Err(Error::NonFinite { step, what, records, tensor })
    }
}

fn targets(example: &Example) -> usize {
    example.sequences.iter().map(Sequence::targets).sum()
}

fn tokens(example: &Example) -> usize {
    example.sequences.iter().map(|sequence| sequence.tokens.len()).sum()
}
