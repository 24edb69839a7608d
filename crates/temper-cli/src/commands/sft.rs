//! `temper sft`.

use temper::data::Purpose;
use temper::train::Objective;

use super::train::{Beginning, Task};
use crate::args::{ModelAndTemplate, Sft};

/// Fine-tunes on text, completions or conversations.
pub fn task(options: &Sft) -> Task<'_> {
    let ModelAndTemplate { model, chat_template } = &options.model;
    Task {
        purpose: Purpose::Sft,
        objective: Objective::Sft,
        beginning: Beginning::Model(model, chat_template.as_deref()),
        reference: None,
        training: &options.training,
        truncation: options.rendering.length.truncation,
        train_on: options.rendering.train_on,
    }
}
