//! Opening a model for a verb, and the device it runs on.

use std::path::Path;

use anyhow::{Context, Result};
use chrono::{DateTime, Utc};
use temper::checkpoint::{self, AdapterFiles, Checkpoint};
use temper::model::files::Quantise;
use temper::model::{Config, Decoder, Source};
use temper::text::{ChatTemplate, Processor};
use temper_kernels::{Cpu, Precision};

use super::adapter::Adapters;
use crate::args::{Compute, ModelAndTemplate};
use crate::output::{bytes, grouped, hinted, say, warn};
use crate::ranks::cores;

/// A model without its weights in memory.
pub struct Model {
    pub checkpoint: Checkpoint,
    pub config: Config,
    pub processor: Processor,
}

impl Model {
    /// Opens a model, with the template of an adapter where the adapter has one; templates see `now` as the date.
    /// `template` replaces both, as `--chat-template` has it.
    pub fn open(
        path: &Path,
        template: Option<&str>,
        adapters: Option<&Adapters>,
        now: DateTime<Utc>,
    ) -> Result<Model> {
        let template = match template.map(template_source).transpose()? {
            None => match adapters.and_then(|adapters| adapters.files.as_ref()) {
                Some(adapter) => adapter.chat_template()?,
                None => None,
            },
            asked => asked,
        };
        let checkpoint = checkpoint::open(path)?;
        if let Some(files) = adapters.and_then(|adapters| adapters.files.as_ref()) {
            warn_of_other_base(files, path);
        }
        Model::of(checkpoint, template.as_deref(), now)
    }

    /// A model of an opened checkpoint; `template` replaces its own.
    pub fn of(checkpoint: Checkpoint, template: Option<&str>, now: DateTime<Utc>) -> Result<Model> {
        let place = || format!("`{}`", checkpoint.path.display());
        let config = Config::from_json(&checkpoint.config).with_context(place)?;
        let processor = Processor::open(&checkpoint, config.vocabulary, template, now);
        let processor = processor.with_context(place)?;
        Ok(Model { processor, checkpoint, config })
    }

    /// Reads the weights, to be used and not trained.
    pub fn decoder(
        &self,
        cpu: &Cpu,
        adapters: Option<&Adapters>,
        quantise: Quantise,
    ) -> temper::Result<Decoder<Cpu>> {
        let source = match adapters {
            None => Source::frozen(&self.checkpoint, quantise)?,
            Some(adapters) => Source::adapted(&self.checkpoint, adapters.adapted(quantise), 0)?,
        };
        source.whole(cpu)
    }

    /// Says what it is.
    pub fn introduce(&self, path: &Path) {
        let stored = match self.checkpoint.file_bytes() {
            0 => "fresh weights".to_owned(),
            size => format!("{} on disk", bytes(size)),
        };
        say("model", format!("`{}`: {}, {stored}", path.display(), dimensions(&self.config)));
        let template = &self.processor.template;
        let kind = if template.is_some() { "a chat template" } else { "no chat template" };
        let tokens = grouped(self.processor.tokenizer.vocabulary_size());
        say("", format!("tokenizer of {tokens} tokens, {kind}"));
        if let Some(problem) = template.as_ref().and_then(ChatTemplate::problem) {
            warn(format!("messages cannot be used with this model: {problem}"));
        }
    }
}

/// An adapter of another model of the same shape would be silently wrong.
fn warn_of_other_base(adapter: &AdapterFiles, model: &Path) {
    let Some(base) = adapter.config["base_model_name_or_path"].as_str() else { return };
    if let (Ok(own), Ok(here)) = (Path::new(base).canonicalize(), model.canonicalize())
        && own != here
    {
        let (adapter, model) = (adapter.path.display(), model.display());
        warn(format!("the adapter in `{adapter}` was trained on `{base}`, not on `{model}`"));
    }
}

/// A model's family and size in a few words.
pub fn dimensions(config: &Config) -> String {
    let specs = temper::model::spec::specs(config);
    let parameters: usize = specs.iter().map(|spec| spec.len()).sum();
    let (parameters, context) = (grouped(parameters), grouped(config.context));
    format!("{:?}, {parameters} parameters, context {context}", config.family).to_lowercase()
}

/// What `--chat-template` stands for: a built-in name stays, anything else is a file.
pub fn template_source(name_or_file: &str) -> Result<String> {
    if name_or_file == "chatml" {
        return Ok(name_or_file.to_owned());
    }
    std::fs::read_to_string(name_or_file)
        .with_context(|| format!("cannot read the template `{name_or_file}`"))
}

impl ModelAndTemplate {
    /// The model, said aloud.
    pub fn open(&self, adapters: Option<&Adapters>) -> Result<Model> {
        let model = Model::open(&self.model, self.chat_template.as_deref(), adapters, Utc::now())?;
        model.introduce(&self.model);
        Ok(model)
    }
}

impl Compute {
    /// The device, said aloud.
    pub fn device(&self) -> Result<Cpu> {
        self.device_with(self.threads())
    }

    /// The device with so many threads, said aloud.
    pub fn device_with(&self, threads: usize) -> Result<Cpu> {
        let cpu = Cpu::new(threads, self.dtype).context("cannot start the threads")?;
        let reason = match (self.dtype, Cpu::has_bf16()) {
            (Precision::F32, false) => "this processor has no bf16 products",
            (Precision::F32, true) => "this processor has bf16 products too",
            (Precision::Bf16, true) => "bf16 products, sums in f32",
            (Precision::Bf16, false) => "products of values rounded to bf16: no faster than f32 here",
        };
        let threads =
            if cpu.threads() == 1 { "1 thread".into() } else { format!("{} threads", cpu.threads()) };
        say("device", format!("{threads}, {} ({reason})", self.numerics()));
        Ok(cpu)
    }

    /// Threads: as asked, else as many as there are cores.
    pub fn threads(&self) -> usize {
        self.threads.unwrap_or_else(cores)
    }

    /// What decides the last bits of results: the number format and the instruction set.
    pub fn numerics(&self) -> String {
        let dtype = match self.dtype {
            Precision::F32 => "f32",
            Precision::Bf16 => "bf16",
        };
        format!("{dtype} {}", Cpu::instruction_set(self.dtype))
    }
}

/// The longest sequence: as asked, else the smaller of 1024 and the context.
pub fn max_length(asked: Option<usize>, config: &Config) -> Result<usize> {
    match asked {
        Some(length) if length > config.context => Err(hinted(
            format!("`--max-length {length}` is more than the model's context of {}", config.context),
            "give no more than the context",
        )),
        Some(length) => Ok(length),
        None => Ok(config.context.min(1024)),
    }
}
