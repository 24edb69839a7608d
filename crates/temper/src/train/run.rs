//! A run: from a model and data to `final/`, through checkpoints, so that it can be killed at any moment and
//! started again.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::{Value, json};
use temper_kernels::Device;

use super::directory::{Directory, Found, checkpoint_folder, final_folder, write_done};
use super::logs::Logs;
use super::reference::{Cache, Reference, ReferencePass};
use super::samples::{Sample, Samples, ask};
use super::{Error, EvalReport, Objective, StepReport, Trainer, TrainerSettings};
use crate::checkpoint::save::{
    ModelFiles, SaveType, SavedTensor, TokenizerToSave, create_folder, write_adapter, write_json,
    write_model, write_safetensors,
};
use crate::checkpoint::{self, AdapterFiles, Checkpoint};
use crate::data::{Example, Forest};
use crate::model::files::{self, Quantise};
use crate::model::lora::PREFIX;
use crate::model::spec::Spec;
use crate::model::weights::Weights;
use crate::model::{Config, Decoder, Lora, Source};
use crate::objective::Pair;
use crate::optim::Moments;
use crate::parallel::{Ranks, Strategy, split};
use crate::text::Processor;

/// The model that a run begins with.
#[derive(Debug, Clone, Copy)]
pub enum Start<'a> {
    /// Weights of a checkpoint.
    Checkpoint(&'a Checkpoint),
    /// Fresh weights of this shape, with its `config.json`.
    Fresh(&'a Config, &'a Value),
    /// Frozen weights of a checkpoint, and adapters that are trained instead.
    Adapted(&'a Checkpoint, Adapted<'a>),
}

/// Adapters on a frozen model.
#[derive(Debug, Clone, Copy)]
pub struct Adapted<'a> {
    /// Their shape.
    pub lora: &'a Lora,
    /// Those to begin with; else they begin at nothing.
    pub adapter: Option<&'a AdapterFiles>,
    /// How the frozen weights are kept.
    pub quantise: Quantise,
}

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
    Evaluated(u64, &'a EvalReport),
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
    let found = found_by_first(ranks, found);
    if found == Found::Finished {
        return Ok(Outcome::AlreadyFinished(final_folder(run.out)));
    }
    if let Found::Interrupted(step @ 1..) = found
        && run.halts_after(step)
    {
        return Ok(Outcome::Stopped(step));
    }
    let resumed = match found {
        Found::Interrupted(step) => step,
        Found::New | Found::Finished => 0,
    };
    let checkpoint = (resumed > 0).then(|| checkpoint_folder(run.out, resumed));
    let decoder = |folder: Option<&Path>| run.start.decoder(device, folder, run.settings.plan.seed, ranks);
    let (mut references, mut start) = (References::default(), None);
    if run.objective != Objective::Sft {
        // The reference is what the run began with, wherever it goes on.
        let policy = start.insert(decoder(None)?);
        references = references_of(device, policy, run, show)?;
    }
    if run.stops() {
        return Ok(Outcome::Stopped(resumed));
    }
    let decoder = match start.filter(|_| checkpoint.is_none()) {
        Some(start) => start,
        None => decoder(checkpoint.as_deref())?,
    };
    let mut trainer = Trainer::new(device, decoder, run.objective, run.settings, run.examples, ranks);
    if let Some(folder) = &checkpoint {
        load_state(device, &mut trainer, ranks, folder)?;
        show(Event::Resumed(trainer.steps_done));
    }
    let directory = directory.as_ref();
    let mut logs = match directory {
        Some(directory) => Logs::open(directory, trainer.steps_done, run.samples.is_some(), show)?,
        None => Logs::nowhere(),
    };
    if trainer.steps_done == 0 {
        evaluate(&mut trainer, run, &references, run.stop, &mut logs, show)?;
        if run.stops() {
            return Ok(Outcome::Stopped(0));
        }
        ask(device, &mut trainer.decoder, run, 0, &mut logs, show)?;
    }
    let mut saved = resumed;
    // Later evaluations are finished: a run that goes on after a step does not make its evaluation again.
    let to_its_end = AtomicBool::new(false);
    for records in run.settings.plan.steps(trainer.steps_done..run.steps) {
        let step = trainer.step(run.examples, &records, &references.train, run.stop)?;
        let Some(report) = step else {
            if saved < trainer.steps_done {
                save_checkpoint(device, &trainer, run, directory)?;
                show(Event::Saved(&checkpoint_folder(run.out, trainer.steps_done)));
            }
            return Ok(Outcome::Stopped(trainer.steps_done));
        };
        logs.add_metrics(&step_line(&report), show)?;
        show(Event::Step(&report));
        let due = |every: u64| every > 0 && report.step.is_multiple_of(every) && report.step < run.steps;
        let halts = run.halts_after(report.step);
        if due(run.eval_steps) || halts {
            evaluate(&mut trainer, run, &references, &to_its_end, &mut logs, show)?;
        }
        if due(run.samples.map_or(0, |samples| samples.steps)) {
            ask(device, &mut trainer.decoder, run, report.step, &mut logs, show)?;
        }
        let stops = halts || report.step < run.steps && run.stops();
        if due(run.save_steps) || stops {
            save_checkpoint(device, &trainer, run, directory)?;
            show(Event::Saved(&checkpoint_folder(run.out, report.step)));
            saved = report.step;
        }
        if stops {
            return Ok(Outcome::Stopped(report.step));
        }
    }
    evaluate(&mut trainer, run, &references, &to_its_end, &mut logs, show)?;
    ask(device, &mut trainer.decoder, run, run.steps, &mut logs, show)?;
    let folder = final_folder(run.out);
    let written = match directory {
        Some(_) => create_folder(&folder, |folder| -> crate::Result<()> {
            run.start.write(device, &trainer.decoder, run.processor, folder, run.save_type)?;
            write_done(folder)
        }),
        None => {
            send(run.start.pieces(device, &trainer.decoder));
            Ok(())
        }
    };
    // A run that cannot write its end, for want of room or because a number does not fit the type, has not lost its steps.
    // Ranks that wait for one another's pieces end with the first.
    let last = ranks.strategy == Strategy::Ddp && written.is_err() && saved < run.steps;
    if last && save_checkpoint(device, &trainer, run, directory).is_ok() {
        show(Event::Saved(&checkpoint_folder(run.out, run.steps)));
    }
    written?;
    show(Event::Saved(&folder));
    Ok(Outcome::Finished(folder))
}

impl Run<'_> {
    /// Whether a step before the end is one to stop after.
    fn halts_after(&self, step: u64) -> bool {
        step < self.steps && self.stop_after.is_some_and(|last| last <= step)
    }

    /// Whether any rank was asked to stop; from then on all were.
    fn stops(&self) -> bool {
        let asked = self.stop.load(Ordering::Relaxed);
        let any = self.ranks.gather(vec![asked.into()]).concat().contains(&1);
        // Added, not stored: it may have been set here since it was read.
        self.stop.fetch_or(any, Ordering::Relaxed);
        any
    }
}

/// What the first rank found in the run directory.
fn found_by_first(ranks: &Ranks, found: Option<Found>) -> Found {
    let number = match found {
        Some(Found::Finished) => -1.0,
        Some(Found::Interrupted(step)) => step as f64,
        Some(Found::New) | None => 0.0,
    };
    match ranks.gather_numbers(&[number])[0][..] {
        [-1.0] => Found::Finished,
        [step] if step > 0.0 => Found::Interrupted(step as u64),
        _ => Found::New,
    }
}

/// What of a decoder a rank keeps.
fn on_rank<D: Device>(device: &D, source: Source<'_>, ranks: &Ranks) -> crate::Result<Decoder<D>> {
    match ranks.strategy {
        Strategy::Ddp | Strategy::Zero1 => source.whole(device),
        Strategy::Fsdp => source.in_pieces(device, ranks),
    }
}

impl Start<'_> {
    /// The model before the first step, or with what a checkpoint has of it.
    fn decoder<D: Device>(
        &self,
        device: &D,
        saved: Option<&Path>,
        seed: u64,
        ranks: &Ranks,
    ) -> crate::Result<Decoder<D>> {
        match (*self, saved) {
            (Start::Adapted(base, Adapted { lora, adapter, quantise }), saved) => {
                let saved = saved.map(checkpoint::open_adapter).transpose()?;
                let tensors = saved.as_ref().or(adapter).map(|files| &files.tensors);
                on_rank(device, Source::adapted(base, lora, tensors, quantise, seed)?, ranks)
            }
            (_, Some(folder)) => {
                on_rank(device, Source::checkpoint(&checkpoint::open(folder)?, true)?, ranks)
            }
            (Start::Checkpoint(checkpoint), None) => {
                on_rank(device, Source::checkpoint(checkpoint, true)?, ranks)
            }
            (Start::Fresh(config, _), None) => on_rank(device, Source::fresh(config.clone(), seed), ranks),
        }
    }

    /// Those tensors of [`Start::write`] that lie in pieces on the ranks.
    fn pieces<'a, D: Device>(&self, device: &'a D, decoder: &'a Decoder<D>) -> Vec<SavedTensor<'a>> {
        match (&decoder.pieces, self) {
            (None, _) => Vec::new(),
            (_, Start::Adapted(..)) => files::saved_weights(device, decoder, PREFIX, |spec| spec.trained),
            _ => files::saved_weights(device, decoder, "", |_| true),
        }
    }

    /// Writes the model, or the adapters alone.
    fn write<D: Device>(
        &self,
        device: &D,
        decoder: &Decoder<D>,
        processor: &Processor,
        folder: &Path,
        save_type: SaveType,
    ) -> crate::Result<()> {
        let (config, generation_config) = match *self {
            Start::Adapted(base, Adapted { lora, .. }) => {
                let base = std::fs::canonicalize(&base.path).unwrap_or_else(|_| base.path.clone());
                let config = lora.to_peft(&decoder.config, &decoder.specs, &base.to_string_lossy());
                let tensors = files::saved_weights(device, decoder, PREFIX, |spec| spec.trained);
                let tokenizer_json = processor.tokenizer.to_json()?;
                let tokenizer_config = tokenizer_config(processor);
                let tokenizer = TokenizerToSave { json: &tokenizer_json, config: &tokenizer_config };
                write_adapter(folder, &config, tokenizer, &tensors, save_type)?;
                return Ok(());
            }
            Start::Checkpoint(checkpoint) => (&checkpoint.config, checkpoint.generation_config.as_ref()),
            Start::Fresh(_, json) => (json, None),
        };
        let config = decoder.config.to_json(config);
        write_weights(device, decoder, processor, generation_config, &config, folder, save_type)
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
    policy: &mut Decoder<D>,
    run: &Run<'_>,
    show: &mut dyn FnMut(Event<'_>),
) -> crate::Result<References> {
    let of = |checkpoint| on_rank(device, Source::checkpoint(checkpoint, false)?, &run.ranks);
    let mut other = run.reference.map(of).transpose()?;
    let decoder = other.as_mut().unwrap_or(policy);
    // Fresh adapters change nothing: the reference need not compute them.
    decoder.adapters_on = matches!(run.start, Start::Adapted(_, Adapted { adapter: Some(_), .. }));
    decoder.gather_ends(device);
    // Each record with the shard of the step that uses it first: an epoch uses each once.
    let shards = |records: &[usize], examples: &[Example]| {
        split(records, run.ranks.shards, |record| Forest::new(&examples[record].sequences).rows())
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

fn evaluate<D: Device>(
    trainer: &mut Trainer<'_, D>,
    run: &Run<'_>,
    references: &References,
    stop: &AtomicBool,
    logs: &mut Logs,
    show: &mut dyn FnMut(Event<'_>),
) -> crate::Result<()> {
    if let Some(examples) = run.eval_examples
        && let Some(report) = trainer.evaluate(examples, &references.eval, stop)
    {
        let epoch = run.settings.plan.epoch(trainer.steps_done);
        logs.add_metrics(&eval_line(trainer.steps_done, epoch, &report), show)?;
        show(Event::Evaluated(trainer.steps_done, &report));
    }
    Ok(())
}

/// Writes a model folder that `transformers` loads.
///
/// # Errors
/// When the system refuses.
pub fn write_weights<D: Device>(
    device: &D,
    decoder: &Decoder<D>,
    processor: &Processor,
    generation_config: Option<&Value>,
    config: &Value,
    folder: &Path,
    save_type: SaveType,
) -> crate::Result<()> {
    let tensors = files::saved_weights(device, decoder, "", |_| true);
    let generated = json!({ "bos_token_id": decoder.config.bos, "eos_token_id": decoder.config.eos });
    let files = ModelFiles {
        config,
        generation_config: Some(generation_config.unwrap_or(&generated)),
        tokenizer: TokenizerToSave {
            json: &processor.tokenizer.to_json()?,
            config: &tokenizer_config(processor),
        },
    };
    write_model(folder, files, &tensors, save_type)?;
    Ok(())
}

/// `tokenizer_config.json` with the chat template inside.
fn tokenizer_config(processor: &Processor) -> Value {
    let mut config = processor.tokenizer.tokenizer_config();
    if let (Some(template), Some(config)) = (&processor.template, config.as_object_mut()) {
        config.insert("chat_template".into(), template.source().into());
    }
    config
}

/// Writes a checkpoint, whole; ranks that have no directory send their pieces.
fn save_checkpoint<D: Device>(
    device: &D,
    trainer: &Trainer<'_, D>,
    run: &Run<'_>,
    directory: Option<&Directory>,
) -> crate::Result<()> {
    let Moments { first, second } = &trainer.moments;
    let moments = [(first, "first."), (second, "second.")];
    let moments =
        moments.map(|(moments, prefix)| saved_moments(device, trainer, &run.ranks, moments, prefix));
    let moments = moments.into_iter().flatten().collect::<Vec<_>>();
    let Some(directory) = directory else {
        send(run.start.pieces(device, &trainer.decoder));
        if run.ranks.strategy != Strategy::Ddp {
            send(moments);
        }
        return Ok(());
    };
    create_folder(&checkpoint_folder(run.out, trainer.steps_done), |folder| -> crate::Result<()> {
        run.start.write(device, &trainer.decoder, run.processor, folder, SaveType::F32)?;
        write_safetensors(&folder.join("moments.safetensors"), &moments, SaveType::F32)?;
        let state = json!({ "step": trainer.steps_done, "num_tokens": trainer.num_tokens });
        write_json(&folder.join("state.json"), &state)?;
        write_done(folder)
    })?;
    directory.remove_old(run.keep)?;
    Ok(())
}

/// Asks for tensors that the first rank writes, in its order.
fn send(tensors: Vec<SavedTensor<'_>>) {
    tensors.iter().for_each(|tensor| (tensor.values)().for_each(drop));
}

fn saved_moments<'a, D: Device>(
    device: &'a D,
    trainer: &'a Trainer<'_, D>,
    ranks: &'a Ranks,
    moments: &'a Weights<Option<D::Buffer>>,
    prefix: &str,
) -> Vec<SavedTensor<'a>> {
    let all = trainer.decoder.specs.iter().into_iter().zip(moments.iter());
    let of_one = |(spec, moment): (&'a Spec, &'a Option<D::Buffer>)| {
        let moment = moment.as_ref()?;
        Some(files::saved(spec, prefix, move |range| match ranks.strategy {
            Strategy::Ddp => files::elements(device.download(moment), range),
            Strategy::Zero1 | Strategy::Fsdp => {
                ranks.on_first(&device.download(moment), spec.len(), range).into()
            }
        }))
    };
    all.filter_map(of_one).flatten().collect()
}

/// Moments and counters of a checkpoint.
fn load_state<D: Device>(
    device: &D,
    trainer: &mut Trainer<'_, D>,
    ranks: &Ranks,
    folder: &Path,
) -> crate::Result<()> {
    let damaged = |message: String| Error::Run {
        path: folder.to_owned(),
        message,
        hint: Some("remove this checkpoint to go on from the one before".into()),
    };
    let state = std::fs::read(folder.join("state.json"))
        .map_err(|error| damaged(format!("cannot read state.json: {error}")))?;
    let state: Value =
        serde_json::from_slice(&state).map_err(|error| damaged(format!("state.json is damaged: {error}")))?;
    let number = |key: &str| state[key].as_u64().ok_or_else(|| damaged(format!("state.json has no `{key}`")));
    (trainer.steps_done, trainer.num_tokens) = (number("step")?, number("num_tokens")?);
    let moments = checkpoint::open_file(&folder.join("moments.safetensors"))?;
    let read = |prefix: &str| {
        let moment = |spec: &Spec| -> crate::Result<Option<D::Buffer>> {
            let values = spec.trained.then(|| files::values(&moments, prefix, spec)).transpose()?;
            let own = |mut values: Vec<f32>| values.drain(ranks.updated(spec.len())).collect();
            Ok(values.map(|values| device.upload(own(values))))
        };
        files::try_map_each(&trainer.decoder.specs, moment, moment, (|| None, || None))
    };
    trainer.moments = Moments { first: read("first.")?, second: read("second.")? };
    Ok(())
}

/// A step as a line of metrics.jsonl, with TRL's names.
pub fn step_line(report: &StepReport) -> Value {
    let mut line = json!({ "step": report.step, "epoch": report.epoch, "loss": report.eval.loss, "grad_norm": report.grad_norm, "learning_rate": report.learning_rate });
    add(&mut line, "", &report.eval);
    line["num_tokens"] = report.num_tokens.into();
    line["seconds"] = report.seconds.into();
    line["tokens_per_second"] = (report.step_tokens as f64 / report.seconds).into();
    line["computed_tokens"] = report.computed_tokens.into();
    line["peak_rss_bytes"] = report.peak_bytes.into();
    line
}

/// An evaluation as a line of metrics.jsonl.
pub fn eval_line(step: u64, epoch: f64, report: &EvalReport) -> Value {
    let mut line = json!({ "step": step, "epoch": epoch, "eval_loss": report.loss });
    add(&mut line, "eval_", report);
    line
}

fn add(line: &mut Value, prefix: &str, report: &EvalReport) {
    let mut set = |name: &str, value: f64| line[format!("{prefix}{name}")] = value.into();
    set("mean_token_accuracy", report.mean_token_accuracy);
    set("entropy", report.entropy);
    if let Some(preferences) = &report.preferences {
        set("rewards/chosen", preferences.rewards.chosen);
        set("rewards/rejected", preferences.rewards.rejected);
        set("rewards/accuracies", preferences.accuracy);
        set("rewards/margins", preferences.margin);
        set("logps/chosen", preferences.logps.chosen);
        set("logps/rejected", preferences.logps.rejected);
    }
}
