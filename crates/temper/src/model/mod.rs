//! The decoder: its configuration, parameters, forward and backward.

pub mod activations;
mod block;
pub mod config;
pub mod decoder;
mod dense;
pub mod files;
mod keys;
pub mod layers;
pub mod lora;
pub mod merge;
mod patterns;
pub mod peft;
mod pieces;
pub mod rotary;
mod source;
pub mod spec;
pub mod weights;

pub use config::Config;
pub use decoder::Decoder;
pub use lora::Lora;
pub use patterns::Patterns;
pub use pieces::{Pieces, can_be_cut};
pub use source::{Adapted, Source};

/// Why a model cannot be built.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// config.json (or GGUF metadata) asks for something temper does not compute.
    #[error("config key `{key}`: expected {expected}, found {found}")]
    Config {
        /// The key in Hugging Face spelling.
        key: String,
        /// What temper accepts there.
        expected: String,
        /// What the file holds.
        found: String,
    },
    /// The file's tensors are not the model's.
    #[error("{}: tensors do not fit the configuration:{}", path.display(), listed(problems))]
    Tensors {
        /// The checkpoint.
        path: std::path::PathBuf,
        /// One line for each missing, unexpected or wrongly shaped tensor.
        problems: Vec<String>,
    },
    /// A module that an option names is not there.
    #[error("{option}: `{name}` is none of {known}")]
    Module {
        /// The option.
        option: &'static str,
        /// The name.
        name: String,
        /// What could be named.
        known: String,
        /// The option that takes it.
        other: Option<&'static str>,
    },
    /// Of layers that are one matrix here, an adapter holds some whole.
    #[error("the adapter has `{saved}` whole and `{other}` not: temper trains both or none")]
    Together {
        /// The one that it has.
        saved: String,
        /// One that it has not.
        other: String,
    },
    /// An adapter's rank does not fit a layer.
    #[error("rank {rank}: expected 1 to {} for `{module}` of shape {shape:?}", shape[0].min(shape[1]))]
    Rank {
        /// The rank.
        rank: usize,
        /// The layer.
        module: String,
        /// `[outputs, inputs]`.
        shape: [usize; 2],
    },
    /// adapter_config.json asks for something temper does not compute.
    #[error("`{}`: key `{key}`: expected {expected}, found {found}", path.display())]
    AdapterConfig {
        /// The file.
        path: std::path::PathBuf,
        /// The key.
        key: String,
        /// What temper accepts there.
        expected: String,
        /// What the file holds.
        found: String,
    },
    /// Parameters that cannot lie in pieces on several ranks.
    #[error("`--parallel fsdp` {reason}")]
    Pieces {
        /// What is in the way.
        reason: &'static str,
        /// What to do instead.
        hint: &'static str,
    },
}

/// The first lines of a list.
fn listed(lines: &[String]) -> String {
    const SHOWN: usize = 20;
    let shown: String = lines.iter().take(SHOWN).map(|line| format!("\n  {line}")).collect();
    match lines.len().saturating_sub(SHOWN) {
        0 => shown,
        more => format!("{shown}\n  and {more} more"),
    }
}

impl Error {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Error::Tensors { .. } => Some("weights and configuration are of different models, or a file is missing; an adapter fits the base it was trained on".into()),
            Error::Rank { .. } => Some("give a smaller `--lora-r`; 8 to 64 are usual".into()),
            Error::Pieces { hint, .. } => Some((*hint).into()),
            Error::Module { name, other: Some(other), .. } => Some(format!("give `{other} {name}`")),
            Error::Module { .. } => Some("separate names by commas; a full name picks one layer".into()),
            _ => None,
        }
    }
}
