//! The decoder: its configuration, parameters, forward and backward.

pub mod config;
pub mod decoder;
pub mod weights;

pub use config::Config;
pub use decoder::Decoder;

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
    #[error("{}: tensors do not fit the configuration:{problems}", path.display())]
    Tensors {
        /// The checkpoint.
        path: std::path::PathBuf,
        /// One line for each missing, unexpected or wrongly shaped tensor.
        problems: String,
    },
}

impl Error {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        None
    }
}
