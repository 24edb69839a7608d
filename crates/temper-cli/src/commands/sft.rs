//! `temper sft`.

use anyhow::Result;
use temper::data::Purpose;
use temper::train::Objective;

use super::train::{Act, Beginning, Task};
use crate::args::Sft;
use crate::config::Settings;

/// Fine-tunes on text, completions or conversations.
pub fn run(options: &Sft, settings: Settings, act: &Act<'_>) -> Result<()> {
    let task = Task {
        purpose: Purpose::Sft,
        objective: Objective::Sft,
        beginning: Beginning::Model(&options.model),
        reference: None,
        training: &options.training,
        truncation: options.rendering.length.truncation,
        train_on: options.rendering.train_on,
    };
    act(&task, settings)
}
