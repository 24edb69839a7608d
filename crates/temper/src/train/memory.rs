//! The memory of a training run, before any of it is allocated.

use std::cell::Cell;

use crate::data::Example;
use crate::model::Config;
use crate::model::decoder::{Activations, Gradients};
use crate::model::weights::{Parameter, Spec, specs};

use super::TrainerSettings;
use super::step::rows_needed;

/// Bytes by purpose, of numbers of four bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    /// Rows of the largest micro-batch.
    pub rows: usize,
    /// The parameters.
    pub parameters: u64,
    /// The matrices among them.
    pub matrices: u64,
    /// Their gradients.
    pub gradients: u64,
    /// AdamW's two moments.
    pub moments: u64,
    /// What the forward keeps for the backward.
    pub activations: u64,
    /// Gradients of the activations.
    pub backward: u64,
}

/// What a [`super::Trainer`] with these settings allocates: the same constructors count here and allocate there.
pub fn memory(config: &Config, settings: &TrainerSettings, examples: &[Example]) -> Memory {
    let rows = rows_needed(examples, settings.plan.batch, settings.microbatch_tokens);
    let specs = specs(config);
    let bytes = |spec: &Spec| 4 * spec.len() as u64;
    let matrix = |parameter| match parameter {
        Parameter::Matrix(spec) => bytes(spec),
        Parameter::Vector(_) => 0,
    };
    let parameters = specs.iter().into_iter().map(bytes).sum();
    let columns = Cell::new(0);
    let count = |more: usize| columns.set(columns.get() + more);
    let counted = || 4 * (rows * columns.take()) as u64;
    let _ = Activations::new(config, true, count);
    let activations = counted();
    let _ = Gradients::new(config, count);
    let backward = counted();
    Memory {
        rows,
        parameters,
        matrices: specs.parameters().into_iter().map(matrix).sum(),
        gradients: parameters,
        moments: 2 * parameters,
        activations,
        backward,
    }
}
