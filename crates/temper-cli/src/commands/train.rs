//! What the verbs that train have in common: opening, saying what will be done, running, saying what was done.

use std::path::{Path, PathBuf};

use anyhow::Result;
use chrono::{DateTime, Utc};
use serde_json::{Map, Value, json};
use temper::checkpoint::{self, AdapterFiles, Checkpoint};
use temper::data::order::Plan;
use temper::data::{Dataset, Purpose, Renderer, TrainOn, Truncation};
use temper::model::config::Dropout;
use temper::model::files::Quantise;
use temper::model::spec::Spec;
use temper::model::weights::Weights;
use temper::model::{Config, Source, can_be_cut};
use temper::optim::{Adam, Schedule};
use temper::parallel::{Ranks, Strategy};
use temper::text::Processor;
use temper::train::{self, Objective, Outcome, Run, Samples, Start, TrainerSettings, reference};
use temper_kernels::Cpu;

use super::adapter::{self, Adapters};
use super::model::{Model, max_length};
use super::{data, manifest};
use crate::args::{Optimisation, Sampled, Training, quantise_name};
use crate::config::Settings;
use crate::events::Events;
use crate::interrupt::{self, Stopped};
use crate::mlflow::Tracking;
use crate::output::{grouped, hinted, say, shell_word, warn};
use crate::progress::Progress;
use crate::ranks::{self, Together};

/// The model a run begins with.
pub enum Beginning<'a> {
    /// A model's weights, with the chat template that replaces its own.
    Model(&'a Path, Option<&'a str>),
    /// Fresh weights of the shape in a configuration.
    Config(&'a Path),
}

/// One verb's training.
pub struct Task<'a> {
    pub purpose: Purpose,
    pub objective: Objective,
    pub beginning: Beginning<'a>,
    /// The reference of DPO, when it is not the model itself.
    pub reference: Option<&'a Path>,
    pub training: &'a Training,
    pub truncation: Truncation,
    pub train_on: Option<TrainOn>,
}

/// Trains, from the beginning or from where the run directory stands.
pub fn run(task: &Task<'_>, settings: Settings) -> Result<()> {
    task.training.output.begin();
    let together = Together::begin(&task.training.parallelism)?;
    say("temper", format!("{} {}", env!("CARGO_PKG_VERSION"), settings.verb));
    let result = run_among(&together, task, settings);
    together.end(result)
}

fn run_among(together: &Together, task: &Task<'_>, settings: Settings) -> Result<()> {
    let compute = &task.training.compute;
    let share = together.threads.filter(|_| compute.threads.is_none());
    let cpu = compute.device_with(share.unwrap_or(compute.threads()))?;
    cpu.install(|| run_on(&cpu, task, settings, &together.ranks))
}

/// What a run needs before its first byte is allocated.
pub struct Prepared {
    pub model: Model,
    pub adapters: Option<Adapters>,
    pub specs: Weights<Spec>,
    pub data: Dataset,
    pub held_out: Option<Dataset>,
    prompts: Option<Vec<(String, Vec<u32>)>>,
    reference: Option<Checkpoint>,
    pub trainer: TrainerSettings,
    settings: Settings,
    date: DateTime<Utc>,
}

/// Opens and checks everything, and says what it found.
pub fn prepare(cpu: &Cpu, task: &Task<'_>, mut settings: Settings, ranks: &Ranks) -> Result<Prepared> {
    let training = task.training;
    let date = manifest::date(&training.files.out, ranks);
    let adapters = training.lora.adapters(&mut settings)?;
    let quantise = training.lora.quantise();
    let model = open(task, adapters.as_ref(), date)?;
    // What does not fit is refused before a run directory is made.
    let specs = start(task, &model, adapters.as_ref()).source(training.optimisation.seed)?.into_specs();
    if let Some(adapters) = &adapters {
        adapter::introduce(adapters, &specs, quantise);
    }
    let length = max_length(training.max_length, &model.config)?;
    settings.resolve("max_length", length);
    settings.resolve("threads", cpu.threads());
    if let (Strategy::Fsdp, Some(adapters)) = (ranks.strategy, &adapters) {
        can_be_cut(&adapters.lora, quantise)?;
    }
    let renderer =
        Renderer { train_on: task.train_on, ..Renderer::new(&model.processor, length, task.truncation) };
    let data = data::load(&training.files.data, &renderer, task.purpose, "data")?;
    let held_out = training.evaluation.eval_data.as_deref();
    let held_out = held_out.map(|path| data::load(path, &renderer, task.purpose, "eval data")).transpose()?;
    let reference = task.reference.map(open_reference).transpose()?;
    if let Some(reference) = &reference {
        check_reference(reference, &model.processor, length, date)?;
    }
    let prompts = training.samples.sample_prompts.as_deref();
    let prompts = prompts.map(|path| data::prompts(path, &model)).transpose()?;
    let trainer = trainer_settings(training, data.examples.len())?;
    if ranks.is_first() {
        say_plan(&trainer, training, &data);
    }
    Ok(Prepared { model, adapters, specs, data, held_out, prompts, reference, trainer, settings, date })
}

impl Prepared {
    /// What the model is asked during the run.
    pub fn samples<'a>(&'a self, options: &Sampled) -> Option<Samples<'a>> {
        let prompts = self.prompts.as_deref()?;
        let &Sampled { sample_steps: steps, sample_max_new_tokens: max_new_tokens, .. } = options;
        Some(Samples { prompts, steps, max_new_tokens })
    }
}

fn run_on(cpu: &Cpu, task: &Task<'_>, settings: Settings, ranks: &Ranks) -> Result<()> {
    let training = task.training;
    let prepared = prepare(cpu, task, settings, ranks)?;
    let Prepared { model, adapters, data, held_out, reference, trainer, settings, date, .. } = &prepared;
    let hashes = Hashes::new(model, adapters.as_ref(), reference.as_ref())?;
    let cache = (task.purpose == Purpose::Preference).then(|| cache(&hashes, task)).flatten();
    let content = hashes.content(data, held_out.as_ref(), &training.compute.numerics());
    settings.say();
    let mut manifest = manifest::manifest(settings, content, *date, cpu, ranks);
    ranks::check_same(ranks, &manifest, &json!(prepared.prompts))?;
    manifest["steps"] = trainer.schedule.steps.into();
    manifest["ledger"] = manifest::ledger(data, held_out.as_ref());
    let run = Run {
        out: &training.files.out,
        manifest,
        start: start(task, model, adapters.as_ref()),
        processor: &model.processor,
        objective: task.objective,
        settings: *trainer,
        examples: &data.examples,
        eval_examples: held_out.as_ref().map(|data| &data.examples[..]),
        reference: reference.as_ref(),
        cache,
        ranks: ranks.clone(),
        samples: prepared.samples(&training.samples),
        steps: trainer.schedule.steps,
        stop_after: training.saving.stop_after,
        eval_steps: training.evaluation.eval_steps,
        save_steps: training.saving.save_steps,
        keep: training.saving.keep,
        save_type: training.saving.save_dtype,
        stop: interrupt::listen()?,
    };
    let json = training.output.json;
    let (mut progress, mut events) =
        (Progress::new(&run, !json), Events::new(json && ranks.is_first(), &run));
    let address = training.output.log_to.as_ref().filter(|_| ranks.is_first());
    let mut tracking = Tracking::new(address, run.out);
    let outcome = train::run(cpu, &run, &mut |event| {
        events.write(&event);
        tracking.see(&event);
        progress.show(event);
    });
    drop(progress);
    tracking.end(&outcome);
    let outcome = outcome.map_err(|error| with_places(error, data))?;
    events.end(&outcome);
    if let Outcome::AlreadyFinished(_) = outcome
        && ranks.is_first()
        && let Some(options) = manifest::without_effect(settings, run.out).filter(|it| !it.is_empty())
    {
        let options = options.join(", ");
        warn(format!(
            "the run was finished before, with another {options}: give another `--out` for a new one"
        ));
    }
    say_outcome(&outcome, model, adapters.as_ref().map(|_| training.lora.quantise()))
}

/// The model that a run begins with.
fn start<'a>(task: &Task<'_>, model: &'a Model, adapters: Option<&'a Adapters>) -> Start<'a> {
    match (adapters, &task.beginning) {
        (Some(adapters), _) => {
            Start::Adapted(&model.checkpoint, adapters.adapted(task.training.lora.quantise()))
        }
        (None, Beginning::Model(..)) => Start::Checkpoint(&model.checkpoint),
        (None, Beginning::Config(_)) => Start::Fresh(&model.config, &model.checkpoint.config),
    }
}

/// Another model than the one before the first step.
fn open_reference(path: &Path) -> Result<Checkpoint> {
    if path.join("adapter_config.json").exists() {
        let message = format!("the reference `{}` is an adapter, expected a whole model", path.display());
        return Err(hinted(message, "make one of it with `temper merge`"));
    }
    Ok(checkpoint::open(path)?)
}

/// That the reference reads the same tokens, as many of them at a time.
fn check_reference(
    reference: &Checkpoint,
    policy: &Processor,
    length: usize,
    date: DateTime<Utc>,
) -> Result<()> {
    let unfit = |why: String, hint: &str| {
        hinted(format!("`{}` cannot be the reference: {why}", reference.path.display()), hint)
    };
    if let Err(error) = Source::frozen(reference, Quantise::None) {
        return Err(unfit(error.to_string(), &error.hint().unwrap_or_default()));
    }
    let config = Config::from_json(&reference.config)?;
    let tokens = policy.tokenizer.vocabulary_size();
    let own = Processor::open(reference, config.vocabulary, None, date).ok();
    let differs = if config.vocabulary < tokens {
        format!("its embedding has {} tokens, the model's tokenizer {tokens}", config.vocabulary)
    } else if config.context < length {
        format!("its context is {}, the longest sequence {length}", config.context)
    } else if let Some(token) = own.and_then(|own| policy.tokenizer.first_difference(&own.tokenizer)) {
        format!("token {token} of its tokenizer is another one")
    } else {
        return Ok(());
    };
    Err(unfit(differs, "the reference is the model before training, or one with the same tokenizer"))
}

/// An error about numbers, with the places of the records that it is about.
fn with_places(error: temper::Error, data: &Dataset) -> anyhow::Error {
    let temper::Error::Train(train::Error::NonFinite { records, .. }) = &error else { return error.into() };
    let places: Vec<String> = records.iter().map(|&record| data.records[record].place.to_string()).collect();
    hinted(format!("{error}; records: {}", places.join(", ")), error.hint().unwrap_or_default())
}

/// Opens the model and says what it is.
fn open(task: &Task<'_>, adapters: Option<&Adapters>, date: DateTime<Utc>) -> Result<Model> {
    let (model, path) = match task.beginning {
        Beginning::Model(path, template) => (Model::open(path, template, adapters, date)?, path),
        Beginning::Config(path) if adapters.is_some() => {
            return Err(hinted(
                format!("`--method lora` on the fresh weights of `{}`", path.display()),
                "adapters need a trained model: give `--model`, or train all weights",
            ));
        }
        Beginning::Config(path) => {
            let checkpoint = checkpoint::open_config(path)?;
            (Model::of(checkpoint, None, date)?, path)
        }
    };
    model.introduce(path);
    Ok(model)
}

fn trainer_settings(training: &Training, records: usize) -> Result<TrainerSettings> {
    let options = &training.optimisation;
    let plan = Plan { records, batch: options.batch_size, order: options.order, seed: options.seed };
    let whole = (options.epochs * plan.steps_per_epoch() as f64).ceil() as u64;
    let steps = options.max_steps.unwrap_or(whole);
    if steps == 0 {
        return Err(hinted("the run has no step", "raise `--epochs`"));
    }
    Ok(TrainerSettings {
        schedule: schedule(options, steps),
        adam: Adam {
            beta1: options.adam_beta1,
            beta2: options.adam_beta2,
            epsilon: options.adam_epsilon,
            weight_decay: options.weight_decay,
            max_grad_norm: options.max_grad_norm,
            lora_plus: training.lora.lora_plus_ratio.unwrap_or(1.0),
        },
        plan,
        microbatch_tokens: options.microbatch_tokens,
        dropout: options.dropout.map_or_else(Dropout::default, |p| Dropout {
            embedding: p,
            attention: p,
            residual: p,
        }),
    })
}

/// The learning rates of a run of so many steps.
pub fn schedule(options: &Optimisation, steps: u64) -> Schedule {
    let warmup = match options.warmup_ratio {
        Some(ratio) => (ratio * steps as f64).ceil() as u64,
        None => options.warmup_steps,
    };
    Schedule { scheduler: options.lr_scheduler, learning_rate: options.learning_rate, warmup, steps }
}

fn say_plan(trainer: &TrainerSettings, training: &Training, data: &Dataset) {
    let Schedule { steps, warmup, .. } = trainer.schedule;
    let tokens: usize = data.examples.iter().flat_map(|e| &e.sequences).map(|s| s.tokens.len()).sum();
    if warmup >= steps {
        warn(format!(
            "the learning rate only rises: the warmup of {} steps is as long as the run or longer",
            grouped(warmup)
        ));
    }
    if let Some(after) = training.saving.stop_after.filter(|&after| after >= steps) {
        let steps = grouped(steps);
        warn(format!("`--stop-after {after}` has no effect: the run ends after {steps} steps"));
    }
    say(
        "steps",
        format!(
            "{} of {} records, {} an epoch, warmup over {}; {} tokens an epoch",
            grouped(steps),
            training.optimisation.batch_size.min(trainer.plan.records),
            grouped(trainer.plan.steps_per_epoch()),
            grouped(warmup),
            grouped(tokens),
        ),
    );
}

/// Hashes of what a run reads.
struct Hashes {
    model: String,
    adapter: Option<String>,
    reference: Option<String>,
    text: String,
}

impl Hashes {
    fn new(
        model: &Model,
        adapters: Option<&Adapters>,
        reference: Option<&Checkpoint>,
    ) -> temper::Result<Hashes> {
        let adapter = adapters.and_then(|adapters| adapters.files.as_ref());
        Ok(Hashes {
            model: model.checkpoint.content_hash()?,
            adapter: adapter.map(AdapterFiles::content_hash).transpose()?,
            reference: reference.map(Checkpoint::content_hash).transpose()?,
            text: model.processor.content_hash()?,
        })
    }

    /// As the manifest has them.
    fn content(&self, data: &Dataset, held_out: Option<&Dataset>, numerics: &str) -> Map<String, Value> {
        let hashes = [
            ("model", Some(self.model.clone())),
            ("adapter", self.adapter.clone()),
            ("reference", self.reference.clone()),
            ("tokenizer_and_template", Some(self.text.clone())),
            ("data", Some(data.content_hash())),
            ("eval_data", held_out.map(Dataset::content_hash)),
            ("numerics", Some(numerics.to_owned())),
        ];
        hashes.into_iter().filter_map(|(key, hash)| Some((key.to_owned(), json!(hash?)))).collect()
    }
}

/// Where the reference's log-probabilities are kept: in `$XDG_CACHE_HOME`, else `~/.cache`; nowhere without.
fn cache(hashes: &Hashes, task: &Task<'_>) -> Option<reference::Cache> {
    let folder = |key| std::env::var_os(key).filter(|value| !value.is_empty()).map(PathBuf::from);
    let user = folder("XDG_CACHE_HOME").or_else(|| Some(folder("HOME")?.join(".cache")))?;
    let numerics = task.training.compute.numerics();
    let key = match (&hashes.reference, &hashes.adapter) {
        (Some(reference), _) => reference::cache_key(reference, &numerics),
        // Fresh adapters change nothing; a quantised base does.
        (None, adapter) => {
            let weights = format!("{}{}", hashes.model, adapter.as_deref().unwrap_or_default());
            let kept = match task.training.lora.quantise() {
                Quantise::None => String::new(),
                kept => format!(" {}", quantise_name(kept)),
            };
            reference::cache_key(&weights, &format!("{numerics}{kept}"))
        }
    };
    Some(reference::Cache { folder: user.join("temper"), key })
}

/// Says where the result is and what can be done with it.
fn say_outcome(outcome: &Outcome, model: &Model, quantise: Option<Quantise>) -> Result<()> {
    let adapter = quantise.is_some();
    let what = if adapter { "adapter" } else { "model" };
    let folder = match outcome {
        Outcome::Finished(folder) => {
            say("done", format!("the {what} is in `{}`", folder.display()));
            folder.display()
        }
        Outcome::AlreadyFinished(folder) => {
            say("done", format!("before: the {what} is in `{}`; nothing was changed", folder.display()));
            folder.display()
        }
        &Outcome::Stopped(step) if interrupt::has_come() => return Err(Stopped::after(step).into()),
        Outcome::Stopped(step) => {
            let next = "the same command without `--stop-after` goes on";
            say("stopped", format!("after step {}, as asked; {next}", grouped(*step)));
            return Ok(());
        }
    };
    let chats = model.processor.chat_template().is_ok();
    let (verb, rest) = if chats { ("chat", "") } else { ("generate", " --prompt 'Once'") };
    let base = model.checkpoint.path.display();
    let folder = shell_word(folder);
    let models = match adapter {
        true => {
            let kept = quantise.filter(|quantise| matches!(quantise, Quantise::Nf4 | Quantise::Int8));
            let kept = kept.map(|kept| format!(" --quantize {}", quantise_name(kept))).unwrap_or_default();
            format!("{} --adapter {folder}{kept}", shell_word(base))
        }
        false => folder,
    };
    say("next", format!("temper {verb} --model {models}{rest}"));
    Ok(())
}
