//! The model that a run begins with, and how it is written.

use std::path::Path;

use serde_json::{Value, json};
use temper_kernels::Device;

use crate::checkpoint::save::{
    ModelFiles, SaveType, SavedTensor, TokenizerToSave, write_adapter, write_model,
};
use crate::checkpoint::{self, Checkpoint};
use crate::model::files;
use crate::model::peft::PREFIX;
use crate::model::{Adapted, Config, Decoder, Source};
use crate::parallel::{Ranks, Strategy};
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

impl<'s> Start<'s> {
    /// Where its parameters come from; fresh ones are a function of the seed.
    ///
    /// # Errors
    /// When they do not make a model, or adapters do not fit theirs.
    pub fn source(&self, seed: u64) -> crate::Result<Source<'s>> {
        match *self {
            Start::Checkpoint(checkpoint) => Source::trained(checkpoint),
            Start::Fresh(config, _) => Ok(Source::fresh(config.clone(), seed)),
            Start::Adapted(base, adapted) => Source::adapted(base, adapted, seed),
        }
    }

    /// The model before the first step, or with what a checkpoint has of it.
    pub(super) fn decoder<D: Device>(
        &self,
        device: &D,
        saved: Option<&Path>,
        seed: u64,
        ranks: &Ranks,
    ) -> crate::Result<Decoder<D>> {
        match (*self, saved) {
            (_, None) => on_rank(device, self.source(seed)?, ranks),
            (Start::Adapted(base, adapted), Some(folder)) => {
                let saved = checkpoint::open_adapter(folder)?;
                let adapted = Adapted { adapter: Some(&saved), ..adapted };
                on_rank(device, Source::adapted(base, adapted, seed)?, ranks)
            }
            (_, Some(folder)) => on_rank(device, Source::trained(&checkpoint::open(folder)?)?, ranks),
        }
    }

    /// Those tensors of [`Start::write`] that lie in pieces on the ranks.
    pub(super) fn pieces<'a, D: Device>(
        &self,
        device: &'a D,
        decoder: &'a Decoder<D>,
    ) -> Vec<SavedTensor<'a>> {
        match (&decoder.pieces, self) {
            (None, _) => Vec::new(),
            (_, Start::Adapted(..)) => files::saved_weights(device, decoder, PREFIX, |spec| spec.trained),
            _ => files::saved_weights(device, decoder, "", |_| true),
        }
    }

    /// Writes the model, or the adapters alone.
    pub(super) fn write<D: Device>(
        &self,
        device: &D,
        decoder: &Decoder<D>,
        processor: &Processor,
        folder: &Path,
        save_type: SaveType,
    ) -> crate::Result<()> {
        let (config, generation_config) = match *self {
            Start::Adapted(base, Adapted { lora, .. }) => {
                // As it was given: a link may have the better name.
                let base = std::path::absolute(&base.path).unwrap_or_else(|_| base.path.clone());
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

/// What of a decoder a rank keeps.
pub(super) fn on_rank<D: Device>(device: &D, source: Source<'_>, ranks: &Ranks) -> crate::Result<Decoder<D>> {
    match ranks.strategy {
        Strategy::Ddp | Strategy::Zero1 => source.whole(device),
        Strategy::Fsdp => source.in_pieces(device, ranks),
    }
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
    let generation_config = processor.with_stops(generation_config.unwrap_or(&generated));
    let files = ModelFiles {
        config,
        generation_config: Some(&generation_config),
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
