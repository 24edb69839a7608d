//! `temper dpo`.

use anyhow::Result;
use temper::data::Purpose;
use temper::objective;
use temper::train::Objective;

use super::train::{Act, Beginning, Task};
use crate::args::{Dpo, LossType};
use crate::config::Settings;

/// Learns from preferences.
pub fn run(options: &Dpo, settings: Settings, act: &Act<'_>) -> Result<()> {
    let preference = &options.preference;
    let LossType::Sigmoid = preference.loss_type;
    let loss = objective::Dpo { beta: preference.beta, label_smoothing: preference.label_smoothing };
    let task = Task {
        purpose: Purpose::Preference,
        objective: Objective::Dpo(loss),
        beginning: Beginning::Model(&options.model),
        reference: preference.reference.as_deref(),
        training: &options.training,
        truncation: options.length.truncation,
        train_on: None,
    };
    act(&task, settings)
}
