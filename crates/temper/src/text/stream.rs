//! Decoding one token at a time: only whole characters leave.

use super::{Error, Tokenizer};

/// Tokens kept as context, at least: decoders may drop a space at the start of what they are given.
const CONTEXT: usize = 4;
/// Bytes of the longest character.
const LONGEST: usize = 4;

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
    ///
    /// # Errors
    /// When the tokenizer cannot decode.
    pub fn push(&mut self, token: u32) -> Result<String, Error> {
        if self.skip_special && self.tokenizer.is_special(token) {
            return Ok(String::new());
        }
        self.tokens.push(token);
        let whole = self.text(0)?;
        if whole.ends_with(char::REPLACEMENT_CHARACTER) {
            return Ok(String::new());
        }
        let fresh = self.fresh(&whole)?;
        self.done = self.tokens.len();
        self.forget(&whole)?;
        Ok(fresh)
    }

    /// The rest, with broken characters replaced.
    ///
    /// # Errors
    /// When the tokenizer cannot decode.
    pub fn finish(self) -> Result<String, Error> {
        self.fresh(&self.text(0)?)
    }

    /// The text of the tokens from `start` on.
    fn text(&self, start: usize) -> Result<String, Error> {
        self.tokenizer.decode(&self.tokens[start..], self.skip_special)
    }

    /// What `whole`, the text of all tokens, has beyond what was written. Where single bytes are tokens, one that is
    /// broken breaks its neighbours too, written ones among them; then the new tokens stand for themselves.
    fn fresh(&self, whole: &str) -> Result<String, Error> {
        let written = self.tokenizer.decode(&self.tokens[..self.done], self.skip_special)?;
        whole.strip_prefix(&written).map_or_else(|| self.text(self.done), |fresh| Ok(fresh.to_owned()))
    }

    /// Drops tokens from the start, all written, where that cuts no character of several tokens. What is kept has text:
    /// behind tokens without any the next would be the first one to the decoder.
    fn forget(&mut self, whole: &str) -> Result<(), Error> {
        for kept in CONTEXT..CONTEXT + LONGEST {
            let Some(start) = self.tokens.len().checked_sub(kept) else { break };
            let text = self.text(start)?;
            if !text.is_empty() && whole.ends_with(&text) {
                self.tokens.drain(..start);
                self.done -= start;
                break;
            }
        }
        Ok(())
    }
}
