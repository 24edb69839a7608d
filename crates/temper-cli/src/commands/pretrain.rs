//! `temper pretrain`.

use anyhow::Result;
use temper::data::{Purpose, Truncation};
use temper::train::Objective;

use super::train::{Beginning, Task};
use crate::args::Pretrain;

/// Trains on documents.
pub fn task(options: &Pretrain) -> Result<Task<'_>> {
    let beginning = match (&options.model, &options.config_model) {
        (Some(model), _) => Beginning::Model(model, None),
        (None, Some(config)) => Beginning::Config(config),
        (None, None) => anyhow::bail!("expected `--model` or `--config-model`"),
    };
    Ok(Task {
        purpose: Purpose::Pretrain,
        objective: Objective::Sft,
        beginning,
        reference: None,
        training: &options.training,
        // Documents are cut into blocks: none is ever too long.
        truncation: Truncation::KeepStart,
        train_on: None,
    })
}
