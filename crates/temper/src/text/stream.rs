//! Decoding one token at a time: only whole characters leave.

use super::{Error, Tokenizer};

/// Tokens kept as context: decoders may drop a space at the start of what they are given.
const CONTEXT: usize = 4;

/// Turns tokens into text as they come. A character whose bytes are spread over several tokens appears
/// with its last token.
pub struct DecodeStream<'tokenizer> {
    tokenizer: &'tokenizer Tokenizer,
    skip_special: bool,
    /// The last tokens; those before `done` have been written.
    tokens: Vec<u32>,
    done: usize,
}

impl<'tokenizer> DecodeStream<'tokenizer> {
    pub(super) fn new(tokenizer: &'tokenizer Tokenizer, skip_special: bool) -> Self {
        Self { tokenizer, skip_special, tokens: Vec::new(), done: 0 }
    }

    /// Takes a token, gives the text that is now complete.
    pub fn push(&mut self, token: u32) -> Result<String, Error> {
        self.tokens.push(token);
        let fresh = self.fresh()?;
        if fresh.ends_with(char::REPLACEMENT_CHARACTER) {
            return Ok(String::new());
        }
        self.tokens.drain(..self.done.saturating_sub(CONTEXT));
        self.done = self.tokens.len();
        Ok(fresh)
    }

    /// The rest, with broken characters replaced.
    pub fn finish(self) -> Result<String, Error> {
        self.fresh()
    }

    fn fresh(&self) -> Result<String, Error> {
        let written = self.tokenizer.decode(&self.tokens[..self.done], self.skip_special)?;
        let whole = self.tokenizer.decode(&self.tokens, self.skip_special)?;
        Ok(whole.strip_prefix(&written).unwrap_or_default().to_owned())
    }
}
