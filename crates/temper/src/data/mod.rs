//! From files to sequences of tokens with their trained spans, and to batches.

/// Why data cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum Error {}

impl Error {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        None
    }
}
