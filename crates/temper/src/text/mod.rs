//! Text to tokens: tokenizer and chat template.

/// Why text cannot become tokens.
#[derive(Debug, thiserror::Error)]
pub enum Error {}

impl Error {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        None
    }
}
