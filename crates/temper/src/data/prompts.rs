//! Prompts to be answered: the lines of a .txt file, or the prompts of records of any kind.

use std::path::Path;

use super::records::{Posed, Prompt, transcript_turns};
use super::schema::{self, Row};
use super::{Error, Place, containers};
use crate::text::{self, Message, Processor, Variables};

/// A prompt and where it is.
#[derive(Debug, Clone, PartialEq)]
pub struct Asked {
    /// Where it is.
    pub place: Place,
    /// What it says.
    pub prompt: Prompt,
    /// What a chat template reads beside it.
    pub variables: Variables,
}

/// Reads all prompts of a file or folder.
///
/// # Errors
/// When it cannot be read, holds nothing, or a row has no prompt.
pub fn read(path: &Path) -> Result<Vec<Asked>, Error> {
    let mut prompts = Vec::new();
    containers::read(path, &mut |place, row| {
        match row.as_str().filter(|_| containers::is_document(&place.file)) {
            Some(text) => prompts.extend(lines(text, &place)),
            None => {
                let row = Row::new(&place, &row)?;
                let prompt = schema::prompt(&row)?;
                let variables = if prompt.is_templated() { row.variables()? } else { Variables::new() };
                prompts.push(Asked { prompt, variables, place });
            }
        }
        Ok(())
    })?;
    if prompts.is_empty() {
        return Err(Error::Empty { path: path.to_owned() });
    }
    Ok(prompts)
}

/// The lines of a text that say something.
fn lines<'a>(text: &'a str, place: &'a Place) -> impl Iterator<Item = Asked> + 'a {
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    lines.map(|(index, line)| Asked {
        place: Place { number: index + 1, ..place.clone() },
        prompt: Prompt::Question(line.trim_end().to_owned()),
        variables: Variables::new(),
    })
}

impl Asked {
    /// What is shown of it: its text, or the last message.
    pub fn text(&self) -> String {
        let last = |messages: &[Message]| messages.last().map(|message| message.content.clone());
        match &self.prompt {
            Prompt::Text(text) | Prompt::Instruction { text, .. } | Prompt::Question(text) => text.clone(),
            Prompt::Messages(messages) => last(messages).unwrap_or_default(),
            Prompt::Transcript(text) => last(&transcript_turns(text)).unwrap_or_else(|| text.clone()),
        }
    }

    /// Whether the model reads it as it is, and no chat template writes it.
    pub fn is_text(&self, processor: &Processor) -> bool {
        matches!(self.prompt.posed(processor.template.is_some()), Posed::Text(_))
    }

    /// Its tokens, those that training on its record shows.
    ///
    /// # Errors
    /// When it cannot be tokenised, or has messages and there is no template.
    pub fn tokens(&self, processor: &Processor) -> Result<Vec<u32>, text::Error> {
        match self.prompt.posed(processor.template.is_some()) {
            Posed::Messages(messages) => processor.chat(&messages, &self.variables),
            Posed::Text(text) => processor.prompt(&text),
        }
    }
}
