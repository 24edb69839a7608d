//! The decoder: its configuration, parameters, forward and backward.

pub mod config;

pub use config::Config;

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
}

impl Error {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        None
    }
}
