//! `temper dpo`.

use temper::data::Purpose;
use temper::objective;
use temper::train::Objective;

use super::train::{Beginning, Task};
use crate::args::{Dpo, LossType, ModelAndTemplate};

/// Learns from preferences.
pub fn task(options: &Dpo) -> Task<'_> {
    let ModelAndTemplate { model, chat_template } = &options.model;
    let preference = &options.preference;
    let LossType::Sigmoid = preference.loss_type;
    let loss = objective::Dpo { beta: preference.beta, label_smoothing: preference.label_smoothing };
    Task {
        purpose: Purpose::Preference,
        objective: Objective::Dpo(loss),
        beginning: Beginning::Model(model, chat_template.as_deref()),
        reference: preference.reference.as_deref(),
        training: &options.training,
        truncation: options.length.truncation,
        train_on: None,
    }
}
