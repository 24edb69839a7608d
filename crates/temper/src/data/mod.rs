//! From files to sequences of tokens with their trained spans, and to batches.

use std::ops::Range;

pub mod forest;
pub mod order;

pub use forest::Forest;

/// Tokens and which of them are targets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sequence {
    /// The tokens.
    pub tokens: Vec<u32>,
    /// Spans of trained tokens: ascending, disjoint, none empty, none with token 0, which nothing predicts.
    pub trained: Vec<Range<usize>>,
    /// Tokens of the prompt.
    pub prompt: usize,
}

/// Why data cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum Error {}

impl Error {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        None
    }
}
