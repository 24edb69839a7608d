//! Losses as pure functions of log-probabilities. They know neither the model nor the data.

mod dpo;
mod sft;

pub use dpo::{Dpo, DpoLoss, Pair, log_sigmoid, sigmoid};
pub use sft::sft;
