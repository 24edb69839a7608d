//! Records to sequences of tokens. Which tokens are trained is decided here, once, from the renderer's
//! own spans: what the chat template writes after its generation prompt, never marker strings found in it.

use std::ops::Range;

use super::ledger::Reason;
use super::records::{Answer, Content, Posed, Prompt, Record};
use super::{Error, Place, Purpose};
use crate::text::{self, ChatTemplate, Message, Processor, Role, Tokenizer};

/// What to do with a sequence longer than allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Truncation {
    /// Keep the beginning, cut the end.
    KeepStart,
    /// Keep the end, cut the beginning (but not the token that begins every text).
    KeepEnd,
    /// Leave the record out.
    Drop,
    /// Stop and name the record.
    Error,
}

/// Which tokens are trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TrainOn {
    /// The completion; of a conversation the last answer.
    Completion,
    /// Every answer of the assistant.
    Assistant,
    /// Every token that has one before it.
    All,
}

/// Makes tokens of records.
#[derive(Clone, Copy)]
pub struct Renderer<'text> {
    /// The model's tokenizer.
    pub tokenizer: &'text Tokenizer,
    /// The chat template, if there is one.
    pub template: Option<&'text ChatTemplate>,
    /// The longest sequence.
    pub max_length: usize,
    /// What to do with longer ones.
    pub truncation: Truncation,
    /// Which tokens are trained; without, the answers of conversations and the completions of the rest.
    pub train_on: Option<TrainOn>,
}

/// Tokens, and which of them are targets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sequence {
    /// The tokens.
    pub tokens: Vec<u32>,
    /// The targets: ascending, disjoint, not empty. The first token is never one.
    pub trained: Vec<Range<usize>>,
    /// Tokens before the first answer.
    pub prompt: usize,
}

impl Sequence {
    /// How many tokens are targets.
    pub fn targets(&self) -> usize {
        self.trained.iter().map(ExactSizeIterator::len).sum()
    }

    /// Adds tokens that are or are not targets. The first token of all has none before it to predict it.
    fn push(&mut self, tokens: &[u32], trained: bool) {
        let start = self.tokens.len().max(1);
        self.tokens.extend_from_slice(tokens);
        let end = self.tokens.len();
        if !trained && self.trained.is_empty() {
            self.prompt = end;
        }
        if !trained || start >= end {
            return;
        }
        match self.trained.last_mut() {
            Some(last) if last.end == start => last.end = end,
            _ => self.trained.push(start..end),
        }
    }

    /// The sequence with a range of tokens cut out.
    fn without(&self, cut: &Range<usize>) -> Self {
        let moved = |at: usize| if at < cut.end { at.min(cut.start) } else { at - cut.len() };
        let tokens = [&self.tokens[..cut.start], &self.tokens[cut.end..]].concat();
        let spans = self.trained.iter().map(|span| moved(span.start).max(1)..moved(span.end));
        let trained = spans.filter(|span| !span.is_empty()).collect();
        Self { tokens, trained, prompt: moved(self.prompt) }
    }
}

/// What a record is to training: one sequence; chosen and rejected of a preference; or a sequence for
/// each answer, where the template shows earlier answers otherwise than it showed them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Example {
    /// The index of the record.
    pub record: usize,
    /// Its sequences.
    pub sequences: Vec<Sequence>,
}

/// What is to be done with a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// It is only seen.
    Context,
    /// It is a target.
    Trained,
    /// It is left out.
    Cut,
}

/// A token to show to a person.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// Its text, control characters escaped.
    pub text: String,
    /// What is to be done with it.
    pub kind: Kind,
}

/// A record's sequences before truncation.
#[derive(Debug, Default)]
pub(super) struct Draft {
    pub(super) sequences: Vec<Sequence>,
    /// Whether they are the two sides of a preference.
    pub(super) pair: bool,
    pub(super) joint_differs: usize,
    pub(super) unanswered: bool,
}

/// A sequence, and the tokens that were cut out of it.
#[derive(Debug)]
pub(super) struct Fitted {
    pub(super) sequence: Sequence,
    pub(super) cut: Range<usize>,
}

impl Fitted {
    /// What is done with a token of the uncut sequence.
    fn kind(&self, at: usize) -> Kind {
        if self.cut.contains(&at) || self.sequence.trained.is_empty() {
            return Kind::Cut;
        }
        let at = if at < self.cut.start { at } else { at - self.cut.len() };
        let trained = self.sequence.trained.iter().any(|span| span.contains(&at));
        if trained { Kind::Trained } else { Kind::Context }
    }
}

impl<'text> Renderer<'text> {
    /// With what a model reads, and the tokens trained that its records' kind says.
    pub fn new(processor: &'text Processor, max_length: usize, truncation: Truncation) -> Renderer<'text> {
        let Processor { tokenizer, template, .. } = processor;
        Renderer { tokenizer, template: template.as_ref(), max_length, truncation, train_on: None }
    }

    /// The tokens of a record one by one, a list for each sequence.
    ///
    /// # Errors
    /// When it cannot be tokenised, needs a chat template that is missing or refuses it, or is longer than allowed where that is
    /// an error.
    pub fn inspect(&self, record: &Record, purpose: Purpose) -> Result<Vec<Vec<Piece>>, Error> {
        let draft = self.draft(record, purpose)?;
        let fitted = self.fit(&draft, record, purpose)?;
        let mut shown = Vec::with_capacity(draft.sequences.len());
        for (index, sequence) in draft.sequences.iter().enumerate() {
            let mut pieces = Vec::with_capacity(sequence.tokens.len());
            for (at, &token) in sequence.tokens.iter().enumerate() {
                let text = self.tokenizer.decode(&[token], false);
                let text = escaped(&text.map_err(|source| at_place(&record.place, source))?);
                let kind = fitted.as_ref().map_or(Kind::Cut, |fitted| fitted[index].kind(at));
                pieces.push(Piece { text, kind });
            }
            shown.push(pieces);
        }
        Ok(shown)
    }

    /// The sequences of a record in full length.
    pub(super) fn draft(&self, record: &Record, purpose: Purpose) -> Result<Draft, Error> {
        let on = self.train_on;
        match &record.content {
            Content::Text(text) => self.text("", text, TrainOn::All, &record.place),
            Content::Conversation(messages) => {
                self.conversation(messages, 0, on.unwrap_or(TrainOn::Assistant), record)
            }
            Content::Completion { prompt, completion } => {
                self.completion(prompt, completion, on.unwrap_or(TrainOn::Completion), record)
            }
            Content::Preference { prompt, chosen, .. } if purpose == Purpose::Sft => {
                self.completion(prompt, chosen, on.unwrap_or(TrainOn::Completion), record)
            }
            Content::Preference { prompt, chosen, rejected } => {
                let chosen = self.completion(prompt, chosen, TrainOn::Completion, record)?;
                let rejected = self.completion(prompt, rejected, TrainOn::Completion, record)?;
                pair(chosen, rejected, &record.place)
            }
        }
    }

    fn completion(
        &self,
        prompt: &Prompt,
        answer: &Answer,
        on: TrainOn,
        record: &Record,
    ) -> Result<Draft, Error> {
        let place = &record.place;
        let mut messages = match (prompt.posed(self.template.is_some()), answer) {
            (Posed::Messages(messages), _) => messages,
            (Posed::Text(prompt), Answer::Text(answer)) => return self.text(&prompt, answer, on, place),
            (Posed::Text(_), Answer::Messages(_)) => return Err(Error::NoTemplate { place: place.clone() }),
        };
        let first_answer = if on == TrainOn::Completion { messages.len() } else { 0 };
        match answer {
            Answer::Messages(answers) => messages.extend_from_slice(answers),
            Answer::Text(text) => {
                let text = if matches!(prompt, Prompt::Transcript(_)) { text.trim() } else { text };
                messages.push(Message::new(Role::Assistant, text));
            }
        }
        let on = if on == TrainOn::Completion { TrainOn::Assistant } else { on };
        self.conversation(&messages, first_answer, on, record)
    }

    /// Plain text: a prompt, and what is to follow it with the token that ends a text.
    fn text(&self, prompt: &str, answer: &str, on: TrainOn, place: &Place) -> Result<Draft, Error> {
        let end = self.tokenizer.eos().ok_or(Error::NoEndOfText)?;
        let pieces = [(prompt, on == TrainOn::All), (answer, true)];
        let (mut sequence, joint_differs) =
            self.tokens(&pieces, self.tokenizer.begin()).map_err(|source| at_place(place, source))?;
        if sequence.tokens.last() != Some(&end) {
            sequence.push(&[end], true);
        }
        let joint_differs = usize::from(joint_differs);
        Ok(Draft { sequences: vec![sequence], joint_differs, ..Draft::default() })
    }

    /// A conversation, whose answers from `first_answer` on may be trained.
    fn conversation(
        &self,
        messages: &[Message],
        first_answer: usize,
        on: TrainOn,
        record: &Record,
    ) -> Result<Draft, Error> {
        let Record { place, variables, .. } = record;
        let template = self.template.ok_or_else(|| Error::NoTemplate { place: place.clone() })?;
        let texts = match on {
            TrainOn::All => {
                let whole = template.render(messages, variables, false);
                vec![vec![(whole.map_err(|source| at_place(place, source))?, true)]]
            }
            TrainOn::Assistant | TrainOn::Completion => {
                let is_answer = |&index: &usize| messages[index].role == Role::Assistant;
                let mut answers: Vec<usize> = (first_answer..messages.len()).filter(is_answer).collect();
                if on == TrainOn::Completion {
                    answers.drain(..answers.len().saturating_sub(1));
                }
                answers.retain(|&index| messages[index].is_trained());
                spans(template, messages, &answers, record)?
            }
        };
        let last_role = messages.last().map(|message| message.role);
        let unanswered = on != TrainOn::All && !texts.is_empty() && last_role != Some(Role::Assistant);
        let mut draft = Draft { unanswered, ..Draft::default() };
        for pieces in &texts {
            let pieces: Vec<(&str, bool)> =
                pieces.iter().map(|(text, trained)| (text.as_str(), *trained)).collect();
            let (sequence, joint_differs) =
                self.tokens(&pieces, None).map_err(|source| at_place(place, source))?;
            draft.joint_differs += usize::from(joint_differs);
            draft.sequences.push(sequence);
        }
        Ok(draft)
    }

    /// Tokens of pieces of text, each trained or not, after `begin`, which a template writes itself, and whether the text in one would be other tokens.
    fn tokens(&self, pieces: &[(&str, bool)], begin: Option<u32>) -> Result<(Sequence, bool), text::Error> {
        let (texts, trained): (Vec<&str>, Vec<bool>) =
            pieces.iter().copied().filter(|(text, _)| !text.is_empty()).unzip();
        let (encoded, joint_differs) = self.tokenizer.encode_pieces(&texts)?;
        let mut sequence = Sequence { tokens: Vec::new(), trained: Vec::new(), prompt: 0 };
        let first = encoded.first().and_then(|tokens| tokens.first());
        if let Some(begin) = begin.filter(|begin| first != Some(begin)) {
            sequence.push(&[begin], false);
        }
        for (tokens, trained) in encoded.iter().zip(trained) {
            sequence.push(tokens, trained);
        }
        Ok((sequence, joint_differs))
    }

    /// Truncates a record's sequences, or says why it is left out. One of them has a target, of a pair
    /// both.
    pub(super) fn fit(
        &self,
        draft: &Draft,
        record: &Record,
        purpose: Purpose,
    ) -> Result<Result<Vec<Fitted>, Reason>, Error> {
        if record.bad && purpose == Purpose::Sft {
            return Ok(Err(Reason::BadAnswer));
        }
        let excess = |sequence: &Sequence| sequence.tokens.len().saturating_sub(self.max_length);
        let largest = draft.sequences.iter().map(excess).max().unwrap_or(0);
        if largest > 0 && self.truncation == Truncation::Error {
            let (tokens, limit) = (self.max_length + largest, self.max_length);
            return Err(Error::OverLong { place: record.place.clone(), tokens, limit });
        }
        if largest > 0 && self.truncation == Truncation::Drop {
            return Ok(Err(Reason::TooLong));
        }
        let mut fitted = Vec::with_capacity(draft.sequences.len());
        for sequence in &draft.sequences {
            let cut = if self.truncation == Truncation::KeepEnd {
                // The two sides of a pair keep the same prompt.
                let excess = if draft.pair { largest } else { excess(sequence) };
                let start =
                    usize::from(excess > 0 && sequence.tokens.first() == self.tokenizer.begin().as_ref());
                if draft.pair && start + excess > sequence.prompt {
                    return Ok(Err(Reason::NoRoom));
                }
                start..sequence.tokens.len().min(start + excess)
            } else {
                sequence.tokens.len() - excess(sequence)..sequence.tokens.len()
            };
            fitted.push(Fitted { sequence: sequence.without(&cut), cut });
        }
        let of_use = |fitted: &Fitted| !fitted.sequence.trained.is_empty();
        let usable = if draft.pair { fitted.iter().all(of_use) } else { fitted.iter().any(of_use) };
        if !usable || fitted.is_empty() {
            return Ok(Err(Reason::NoTarget));
        }
        Ok(Ok(fitted))
    }
}

/// The draft of a preference. A side without an answer has no sequence; then neither has the pair.
fn pair(mut chosen: Draft, mut rejected: Draft, place: &Place) -> Result<Draft, Error> {
    if chosen.sequences.len() > 1 || rejected.sequences.len() > 1 {
        return Err(Error::RewrittenPair { place: place.clone() });
    }
    let complete = chosen.sequences.len() == rejected.sequences.len();
    chosen.sequences.append(&mut rejected.sequences);
    if !complete {
        chosen.sequences.clear();
    }
    Ok(Draft {
        sequences: chosen.sequences,
        pair: true,
        joint_differs: chosen.joint_differs + rejected.joint_differs,
        unanswered: chosen.unanswered || rejected.unanswered,
    })
}

/// The text of a conversation in pieces, each with whether it is trained. An answer reaches from the
/// generation prompt through all that the template writes for it. Where the template shows an earlier
/// answer otherwise than it showed it when it was given, each answer has a text of its own.
fn spans(
    template: &ChatTemplate,
    messages: &[Message],
    answers: &[usize],
    Record { place, variables, .. }: &Record,
) -> Result<Vec<Vec<(String, bool)>>, Error> {
    let render = |messages: &[Message], prompt| {
        template.render(messages, variables, prompt).map_err(|source| at_place(place, source))
    };
    let mut turns = Vec::with_capacity(answers.len());
    for &index in answers {
        let before = render(&messages[..index], true)?;
        let through = render(&messages[..=index], false)?;
        let Some(answer) = through.strip_prefix(&before) else {
            return Err(Error::NotAPrefix { place: place.clone(), message: index });
        };
        turns.push((before, answer.to_owned()));
    }
    let mut whole = Vec::new();
    let mut written = String::new();
    for (before, answer) in &turns {
        let Some(context) = before.strip_prefix(&written) else {
            let alone = |(before, answer)| vec![(before, false), (answer, true)];
            return Ok(turns.into_iter().map(alone).collect());
        };
        whole.push((context.to_owned(), false));
        whole.push((answer.clone(), true));
        written = [before.as_str(), answer].concat();
    }
    Ok(if whole.is_empty() { Vec::new() } else { vec![whole] })
}

fn at_place(place: &Place, source: text::Error) -> Error {
    Error::Text { place: place.clone(), source }
}

/// Text with its control characters escaped, so that it cannot steer a terminal.
fn escaped(text: &str) -> String {
    let visible = |letter: char| {
        if letter.is_control() { letter.escape_default().collect() } else { letter.to_string() }
    };
    text.chars().map(visible).collect()
}
