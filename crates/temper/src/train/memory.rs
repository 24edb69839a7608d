//! The memory of a training run, before any of it is allocated.

use std::cell::Cell;

use temper_kernels::Workspace;

use crate::data::{Example, forest};
use crate::model::Config;
use crate::model::activations::{Activations, Gradients, LOGITS};
use crate::model::spec::{Role, Spec};
use crate::model::weights::Weights;

use super::TrainerSettings;
use super::gradients::sets_of_gradients;
use crate::parallel::Ranks;

/// Bytes by purpose, of numbers of four bytes. The parameters that are not trained are the device's affair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    /// Rows of the largest micro-batch.
    pub rows: usize,
    /// The parameters that are trained.
    pub trained: u64,
    /// Their gradients.
    pub gradients: u64,
    /// AdamW's two moments.
    pub moments: u64,
    /// What the forward keeps for the backward.
    pub activations: u64,
    /// Gradients of the activations.
    pub backward: u64,
}

/// What a [`super::Trainer`] with these settings allocates, once it has met all records, also those `held_out`: the same
/// constructors count here and allocate there. `kept_bytes` is what the device takes for a number that is put aside; none when it exchanges buffers.
pub fn memory(
    config: &Config,
    specs: &Weights<Spec>,
    settings: &TrainerSettings,
    examples: &[Example],
    held_out: &[Example],
    kept_bytes: Option<u64>,
    ranks: &Ranks,
) -> Memory {
    let longest = held_out.iter().map(|example| forest::rows(&example.sequences)).max().unwrap_or(0);
    let rows = settings.microbatch_rows(examples).max(longest);
    let trained = specs.iter().filter(|spec| spec.trained).map(|spec| 4 * spec.len() as u64).sum();
    let buffers = Cell::new(0);
    let count = |more: usize| buffers.set(buffers.get() + more);
    let counted = || 4 * buffers.take() as u64;
    let aside = Cell::new(0);
    let keep = |more: usize| aside.set(aside.get() + more);
    let _ = Activations::new(config, specs, rows, true, count, keep);
    // Where buffers are exchanged, one of the layers' is never written, and takes no memory.
    let (each, kept) = match kept_bytes {
        Some(each) => (each, aside.get()),
        None => (4, aside.get() - aside.get() / config.layers.len()),
    };
    let activations = counted() + each * kept as u64;
    let _ = Gradients::new(config, specs, rows, count);
    let backward = counted();
    Memory {
        rows,
        trained,
        gradients: trained * sets_of_gradients(ranks) as u64,
        moments: 2 * trained,
        activations,
        backward,
    }
}

/// The shapes of the operations on so many rows, for what the device takes beside these buffers: whether it decodes
/// weights that are `quantised`, and drops out what adapters see.
pub fn workspace(
    config: &Config,
    specs: &Weights<Spec>,
    rows: usize,
    quantised: bool,
    dropout: bool,
) -> Workspace {
    let dense = specs.iter().filter(|spec| spec.role == Role::Linear);
    Workspace {
        rows,
        dense: dense.map(|spec| [spec.shape[0], spec.columns()]).collect(),
        head: [config.vocabulary, config.width],
        logits_kept: specs.head().trained && rows * config.vocabulary <= LOGITS,
        keys: config.kv_heads * config.head_width,
        quantised,
        dropout,
    }
}
