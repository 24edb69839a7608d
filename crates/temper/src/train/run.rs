//! A run: from a model and data to `final/`, through checkpoints, so that it can be killed at any moment and
//! started again.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::Value;
use temper_kernels::Device;

use super::directory::{
    Directory, Ended, Found, Logged, check_done, checkpoint_folder, final_folder, write_done,
};
use super::logs::{Logs, eval_line, step_line};
use super::reference::{Cache, Reference, ReferencePass};
use super::samples::{self, Sample, Samples};
use super::start::{Start, on_rank};
use super::{Metrics, Objective, StepReport, Trainer, TrainerSettings, state};
use crate::checkpoint::save::{SaveType, create_folder};
use crate::checkpoint::{self, Checkpoint};
use crate::data::{Example, forest};
use crate::model::files::Quantise;
use crate::model::{Adapted, Decoder, Source};
use crate::objective::Pair;
use crate::parallel::{Ranks, Strategy, deal};
use crate::text::Processor;

/// All that a run needs.
pub struct Run<'a> {
    /// The run directory.
    pub out: &'a Path,
    /// `manifest.json`; its `run` object holds what decides the numbers.
    pub manifest: Value,
    /// The model to begin with.
    pub start: Start<'a>,
    /// Tokenizer and template, saved beside the weights.
    pub processor: &'a Processor,
    /// What is minimised.
    pub objective: Objective,
    /// How.
    pub settings: TrainerSettings,
    /// Training examples.
    pub examples: &'a [Example],
    /// Held-out examples.
    pub eval_examples: Option<&'a [Example]>,
    /// The reference of DPO, when it is not the start.
    pub reference: Option<&'a Checkpoint>,
    /// Where the reference's log-probabilities are kept.
    pub cache: Option<Cache>,
    /// The processes that train together.
    pub ranks: Ranks,
    /// What the model is asked now and then.
    pub samples: Option<Samples<'a>>,
    /// Steps of the run.
    pub steps: u64,
    /// Evaluate, save and stop after this step, if the run is longer.
    pub stop_after: Option<u64>,
    /// Evaluate every so many steps; 0 for the beginning and the end only.
    pub eval_steps: u64,
    /// Save every so many steps; 0 for the end only.
    pub save_steps: u64,
    /// Checkpoints kept.
    pub keep: usize,
    /// Number format of `final/`.
    pub save_type: SaveType,
    /// Set by whoever wants the run to stop: the step in progress is given up between two of its micro-batches, and what
    /// was done before is saved.
    pub stop: &'a AtomicBool,
}

/// What happens during a run, for showing.
pub enum Event<'a> {
    /// Training goes on after this step.
    Resumed(u64),
    /// Pairs of the reference computed, of how many.
    Reference(usize, usize),
    /// A step is done.
    Step(&'a StepReport),
    /// An evaluation after this step.
    Evaluated(u64, &'a Metrics),
    /// What was answered after this step.
    Sampled(u64, &'a [Sample]),
    /// TensorBoard's file cannot be written, and is no more; the run goes on.
    LostTensorBoard(&'a std::io::Error),
    /// The reference's log-probabilities cannot be kept for the next run; this one goes on.
    LostCache(&'a checkpoint::Error),
    /// A checkpoint or the final model was saved.
    Saved(&'a Path),
}

/// How a run ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It trained to the end; the final model.
    Finished(PathBuf),
    /// It had been finished before; nothing was changed.
    AlreadyFinished(PathBuf),
    /// It was asked to stop, or told to beforehand, and goes on after this step when it is started again.
    Stopped(u64),
}

/// Runs to the end, or until it is to stop. Every event goes to `show`.
///
/// # Errors
/// When the directory belongs to another run, files cannot be read or written, or a number is not finite.
pub fn run<D: Device>(device: &D, run: &Run<'_>, show: &mut dyn FnMut(Event<'_>)) -> crate::Result<Outcome> {
    let ranks = &run.ranks;
    let directory = ranks.is_first().then(|| Directory::open(run.out)).transpose()?;
    let found = directory.as_ref().map(|directory| directory.begin(&run.manifest)).transpose()?;
    let (done, logged) = match found_by_first(ranks, found) {
        Found::Finished => return Ok(Outcome::AlreadyFinished(final_folder(run.out))),
        Found::Interrupted(step, logged) => (step, logged),
        Found::New => (0, Logged::default()),
    };
    let note = |ended: Option<&Ended>| directory.iter().for_each(|directory| directory.note_end(ended));
    note(None);
    let outcome = train(device, run, directory.as_ref(), (done, logged), show);
    match &outcome {
        Ok(Outcome::Stopped(step)) => note(Some(&Ended::Stopped(*step))),
        Err(error) => note(Some(&Ended::Failed(error.to_string()))),
        Ok(_) => {}
    }
    outcome
}

/// Trains on after a step, of which the logs have this.
fn train<D: Device>(
    device: &D,
    run: &Run<'_>,
    directory: Option<&Directory>,
    (done, logged): (u64, Logged),
    show: &mut dyn FnMut(Event<'_>),
) -> crate::Result<Outcome> {
    let ranks = &run.ranks;
    if done > 0 && run.halts_after(done) && (logged.evaluated || run.eval_examples.is_none()) {
        return Ok(Outcome::Stopped(done));
    }
    let decoder = |folder: Option<&Path>| run.start.decoder(device, folder, run.settings.plan.seed, ranks);
    // The reference is what the run began with, wherever it goes on.
    let (references, initial) = match run.objective {
        Objective::Sft => (References::default(), None),
        Objective::Dpo(_) => match run.reference {
            Some(other) => {
                let source = Source::frozen(other, Quantise::None)?;
                (references_of(device, &mut on_rank(device, source, ranks)?, run, show)?, None)
            }
            None => {
                let mut initial = decoder(None)?;
                (references_of(device, &mut initial, run, show)?, Some(initial))
            }
        },
    };
    if run.stops() {
        return Ok(Outcome::Stopped(done));
    }
    let checkpoint = (done > 0).then(|| checkpoint_folder(run.out, done));
    if let Some(folder) = &checkpoint {
        check_done(folder).map_err(|message| state::damaged(folder, message))?;
    }
    let decoder = match initial {
        Some(initial) if checkpoint.is_none() => initial,
        other => {
            drop(other);
            decoder(checkpoint.as_deref()).map_err(|error| match &checkpoint {
                Some(folder) => state::damaged(folder, error.to_string()).into(),
                None => error,
            })?
        }
    };
    let mut trainer = Trainer::new(device, decoder, run.objective, run.settings, run.examples, ranks);
    if let Some(folder) = &checkpoint {
        state::load(device, &mut trainer, ranks, run.out, folder)?;
        show(Event::Resumed(done));
    }
    let logs = match directory {
        Some(directory) => Logs::open(directory, done, run.samples.is_some(), show)?,
        None => Logs::nowhere(),
    };
    let mut training =
        Training { device, run, directory, trainer, references, logs, logged, saved: done, show };
    if !training.after_step()? {
        return Ok(Outcome::Stopped(done));
    }
    for records in run.settings.plan.steps(done..run.steps) {
        if !training.step(&records)? {
            return Ok(Outcome::Stopped(training.trainer.steps_done));
        }
    }
    training.finish()
}

/// A run in progress.
struct Training<'a, 'show, D: Device> {
    device: &'a D,
    run: &'a Run<'a>,
    /// The first rank's.
    directory: Option<&'a Directory>,
    trainer: Trainer<'a, D>,
    references: References,
    logs: Logs,
    /// What they have of the newest step.
    logged: Logged,
    /// The step of the newest checkpoint.
    saved: u64,
    show: &'a mut (dyn FnMut(Event<'_>) + 'show),
}

impl<D: Device> Training<'_, '_, D> {
    /// One step, and what is due after it. False when the run is to stop, and all that is done is saved.
    fn step(&mut self, records: &[usize]) -> crate::Result<bool> {
        let run = self.run;
        let report = self.trainer.step(run.examples, records, &self.references.train, run.stop)?;
        let Some(report) = report else {
            if self.saved < self.trainer.steps_done {
                self.save()?;
            }
            return Ok(false);
        };
        self.logs.add_metrics(&step_line(&report), self.show)?;
        (self.show)(Event::Step(&report));
        self.logged = Logged::default();
        self.after_step()
    }

    /// What is due after the newest step, or before the first, and is not done yet: a run that was stopped meanwhile makes it
    /// up. False when the run is to stop, and all that is done is saved.
    fn after_step(&mut self) -> crate::Result<bool> {
        let (run, step) = (self.run, self.trainer.steps_done);
        let (last, halts) = (step == run.steps, run.halts_after(step));
        let due = |every: u64| every > 0 && step.is_multiple_of(every);
        let at_ends = |every: u64| step == 0 || last || due(every);
        let evaluates = !self.logged.evaluated && (halts || at_ends(run.eval_steps));
        let asks = !self.logged.sampled && at_ends(run.samples.map_or(0, |samples| samples.steps));
        let complete = (!evaluates || self.evaluate()?) && (!asks || self.ask()?);
        let stops = !complete || halts || !last && run.stops();
        if self.saved < step && (stops || due(run.save_steps) && !last) {
            self.save()?;
        }
        Ok(!stops)
    }

    /// Writes what came of it.
    fn finish(mut self) -> crate::Result<Outcome> {
        let Training { device, run, trainer, .. } = &self;
        let folder = final_folder(run.out);
        let written = match self.directory {
            Some(_) => create_folder(&folder, |folder| -> crate::Result<()> {
                run.start.write(*device, &trainer.decoder, run.processor, folder, run.save_type)?;
                write_done(folder)
            }),
            None => {
                state::send(run.start.pieces(*device, &trainer.decoder));
                Ok(())
            }
        };
        // A run that cannot write its end, for want of room or because a number does not fit the type, has not lost its steps.
        // Ranks that wait for one another's pieces end with the first.
        if written.is_err() && run.ranks.strategy == Strategy::Ddp && self.saved < run.steps {
            // The first error is the one to tell.
            let _ = self.save();
        }
        written?;
        (self.show)(Event::Saved(&folder));
        Ok(Outcome::Finished(folder))
    }

    /// Evaluates, if there is something held out. False when the run was asked to stop meanwhile.
    fn evaluate(&mut self) -> crate::Result<bool> {
        let run = self.run;
        let Some(examples) = run.eval_examples else { return Ok(true) };
        let Some(report) = self.trainer.evaluate(examples, &self.references.eval, run.stop) else {
            return Ok(false);
        };
        let step = self.trainer.steps_done;
        let line = eval_line(step, run.settings.plan.epoch(step), &report);
        self.logs.add_metrics(&line, self.show)?;
        (self.show)(Event::Evaluated(step, &report));
        Ok(true)
    }

    /// Asks the model, if it is to be asked. False when the run was asked to stop meanwhile.
    fn ask(&mut self) -> crate::Result<bool> {
        let step = self.trainer.steps_done;
        samples::ask(self.device, &mut self.trainer.decoder, self.run, step, &mut self.logs, self.show)
    }

    /// Saves a checkpoint.
    fn save(&mut self) -> crate::Result<()> {
        state::save(self.device, &self.trainer, self.run, self.directory)?;
        self.saved = self.trainer.steps_done;
        (self.show)(Event::Saved(&checkpoint_folder(self.run.out, self.saved)));
        Ok(())
    }
}

impl Run<'_> {
    /// Whether a step before the end is one to stop after.
    fn halts_after(&self, step: u64) -> bool {
        step < self.steps && self.stop_after.is_some_and(|last| last <= step)
    }

    /// Whether any rank was asked to stop; from then on all were.
    pub(super) fn stops(&self) -> bool {
        let asked = self.stop.load(Ordering::Relaxed);
        let any = self.ranks.gather(vec![asked.into()]).concat().contains(&1);
        // Added, not stored: it may have been set here since it was read.
        self.stop.fetch_or(any, Ordering::Relaxed);
        any
    }
}

/// What the first rank found in the run directory.
fn found_by_first(ranks: &Ranks, found: Option<Found>) -> Found {
    let flag = |on: bool| f64::from(u8::from(on));
    let numbers = match found {
        Some(Found::Finished) => [-1.0; 3],
        Some(Found::Interrupted(step, logged)) => [step as f64, flag(logged.evaluated), flag(logged.sampled)],
        Some(Found::New) | None => [0.0; 3],
    };
    match ranks.numbers_of_first(&numbers)[..] {
        [-1.0, ..] => Found::Finished,
        [step, evaluated, sampled] if step > 0.0 => {
            let [evaluated, sampled] = [evaluated, sampled].map(|flag| flag != 0.0);
            Found::Interrupted(step as u64, Logged { evaluated, sampled })
        }
        _ => Found::New,
    }
}

/// Reference log-probabilities by example; empty for SFT.
#[derive(Default)]
struct References {
    train: Vec<Pair>,
    eval: Vec<Pair>,
}

/// Exactly the records that the planned steps use, and the evaluation's.
fn references_of<D: Device>(
    device: &D,
    decoder: &mut Decoder<D>,
    run: &Run<'_>,
    show: &mut dyn FnMut(Event<'_>),
) -> crate::Result<References> {
    // Fresh adapters change nothing: the reference need not compute them.
    decoder.adapters_on = matches!(run.start, Start::Adapted(_, Adapted { adapter: Some(_), .. }));
    decoder.gather_ends(device);
    // Each record with the shard of the step that uses it first: an epoch uses each once.
    let shards = |records: &[usize], examples: &[Example]| {
        deal(records, run.ranks.shards, |record| forest::rows(&examples[record].sequences))
    };
    let plan = &run.settings.plan;
    let first = plan.steps(0..run.steps.min(plan.steps_per_epoch()));
    let first: Vec<Vec<usize>> = first.flat_map(|step| shards(&step, run.examples)).collect();
    let (cache, ranks) = (run.cache.as_ref(), &run.ranks);
    let mut of = |examples: &[Example], groups: &[Vec<usize>], budget: usize| {
        let pass = ReferencePass { device, decoder, examples, groups, budget, cache, ranks };
        let Reference { pairs, kept } = pass.run(|done, total| {
            show(Event::Reference(done, total));
            !run.stop.load(Ordering::Relaxed)
        });
        if let Err(error) = kept {
            show(Event::LostCache(&error));
        }
        pairs
    };
    let train = of(run.examples, &first, run.settings.microbatch_tokens);
    let eval = match run.eval_examples {
        Some(examples) => {
            let every: Vec<usize> = (0..examples.len()).collect();
            of(examples, &shards(&every, examples), run.settings.microbatch_rows(run.examples))
        }
        None => Vec::new(),
    };
    decoder.release_ends(device);
    decoder.adapters_on = true;
    Ok(References { train, eval })
}
