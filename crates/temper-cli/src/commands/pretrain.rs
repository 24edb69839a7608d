//! `temper pretrain`.

use anyhow::Result;
use temper::data::{Purpose, Truncation};
use temper::train::Objective;

use super::train::{Act, Beginning, Task};
use crate::args::{ModelAndTemplate, Pretrain};
use crate::config::Settings;

/// Trains on documents.
pub fn run(options: &Pretrain, settings: Settings, act: &Act<'_>) -> Result<()> {
    let model = options.model.clone().map(|model| ModelAndTemplate { model, chat_template: None });
    let beginning = match (&model, &options.config_model) {
        (Some(model), _) => Beginning::Model(model),
        (None, Some(config)) => Beginning::Config(config),
        (None, None) => anyhow::bail!("expected `--model` or `--config-model`"),
    };
    let task = Task {
        purpose: Purpose::Pretrain,
        objective: Objective::Sft,
        beginning,
        reference: None,
        training: &options.training,
        // Documents are cut into blocks: none is ever too long.
        truncation: Truncation::KeepStart,
        train_on: None,
    };
    act(&task, settings)
}
