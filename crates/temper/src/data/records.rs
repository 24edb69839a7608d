//! Records: what the files hold, each with its place.

use std::collections::{BTreeSet, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::Path;
use std::sync::Arc;

use serde_json::Value;

use super::ledger::{Dropped, Reason};
use super::schema::{self, ASSISTANT, HUMAN, Row, Schema};
use super::{Error, Place, containers};
use crate::text::{ChatTemplate, Message, Role, Variables};

/// A record larger than this is worth a word: it is often a mistake, such as a file without line ends.
const LARGE: usize = 1 << 20;

/// One record.
#[derive(Debug, Clone, PartialEq)]
pub struct Record {
    /// Where it is.
    pub place: Place,
    /// Its number among the records of its file, from 0; what is left out counts too, but no header and no blank line.
    pub row: usize,
    /// What it says.
    pub content: Content,
    /// What a chat template reads beside it: `tools`, and what `chat_template_kwargs` has.
    pub variables: Variables,
    /// Whether its answer is marked as a bad one (`label` or `kto_tag` is false), which is not to be imitated.
    pub bad: bool,
}

/// What a record says.
#[derive(Debug, Clone, PartialEq, Hash)]
pub enum Content {
    /// A document.
    Text(String),
    /// A prompt and what is to follow.
    Completion {
        /// What is given.
        prompt: Prompt,
        /// What is to be learnt.
        completion: Answer,
    },
    /// A conversation.
    Conversation(Vec<Message>),
    /// A prompt with a better and a worse answer.
    Preference {
        /// What is given.
        prompt: Prompt,
        /// The better answer.
        chosen: Answer,
        /// The worse answer.
        rejected: Answer,
    },
}

impl Content {
    /// Whether a chat template writes it, where there is one.
    fn is_templated(&self) -> bool {
        match self {
            Content::Text(_) => false,
            Content::Conversation(_) => true,
            Content::Completion { prompt, .. } | Content::Preference { prompt, .. } => prompt.is_templated(),
        }
    }
}

/// What is given.
#[derive(Debug, Clone, PartialEq, Hash)]
pub enum Prompt {
    /// Text as it is.
    Text(String),
    /// Messages, which need a chat template.
    Messages(Vec<Message>),
    /// What a system message, if any, and a user say: messages if there is a chat template, else text with an empty line
    /// after each.
    Instruction {
        /// What stands before it.
        system: Option<String>,
        /// What the user says.
        text: String,
    },
    /// What a user says with nothing to follow: a message if there is a chat template, else text as it is.
    Question(String),
    /// Turns `\n\nHuman: … \n\nAssistant:`: messages if there is a chat template, else text.
    Transcript(String),
}

/// A prompt as it is put to a model.
pub(super) enum Posed {
    /// By the chat template.
    Messages(Vec<Message>),
    /// As text.
    Text(String),
}

impl Prompt {
    /// Whether a chat template writes it, where there is one.
    pub(super) fn is_templated(&self) -> bool {
        !matches!(self, Prompt::Text(_))
    }

    fn len(&self) -> usize {
        match self {
            Prompt::Text(text) | Prompt::Question(text) | Prompt::Transcript(text) => text.len(),
            Prompt::Instruction { system, text } => system.as_ref().map_or(0, String::len) + text.len(),
            Prompt::Messages(messages) => length(messages),
        }
    }

    /// As it is put to a model, in training as when it is to be answered, with or without a chat template.
    pub(super) fn posed(&self, templated: bool) -> Posed {
        match self {
            Prompt::Messages(messages) => Posed::Messages(messages.clone()),
            Prompt::Question(text) if templated => Posed::Messages(vec![Message::new(Role::User, text)]),
            Prompt::Transcript(text) if templated => Posed::Messages(transcript_turns(text)),
            Prompt::Instruction { system, text } if templated => {
                let system = system.as_ref().map(|system| Message::new(Role::System, system));
                Posed::Messages(system.into_iter().chain([Message::new(Role::User, text)]).collect())
            }
            Prompt::Instruction { system, text } => {
                Posed::Text(system.iter().chain([text]).map(|part| format!("{part}\n\n")).collect())
            }
            Prompt::Text(text) | Prompt::Question(text) | Prompt::Transcript(text) => {
                Posed::Text(text.clone())
            }
        }
    }
}

/// What follows a prompt.
#[derive(Debug, Clone, PartialEq, Hash)]
pub enum Answer {
    /// Text.
    Text(String),
    /// Messages, after a prompt of messages.
    Messages(Vec<Message>),
}

impl Answer {
    fn is_empty(&self) -> bool {
        match self {
            Answer::Text(text) => text.trim().is_empty(),
            Answer::Messages(messages) => messages.iter().all(is_blank),
        }
    }

    fn len(&self) -> usize {
        match self {
            Answer::Text(text) => text.len(),
            Answer::Messages(messages) => length(messages),
        }
    }
}

/// The turns of a transcript, their contents trimmed. The first turn's blank line may be missing, and what stands
/// before the first turn is a system message. An open last turn of the assistant, which asks for an answer, is
/// none.
pub fn transcript_turns(transcript: &str) -> Vec<Message> {
    let mut turns = Vec::new();
    let transcript = format!("\n\n{}", transcript.trim_start());
    let mut rest = &transcript[..];
    let next = |text: &str| {
        let human = text.find(HUMAN).map(|start| (start, HUMAN.len(), Role::User));
        let assistant = text.find(ASSISTANT).map(|start| (start, ASSISTANT.len(), Role::Assistant));
        human.into_iter().chain(assistant).min_by_key(|&(start, ..)| start)
    };
    let before = transcript[..next(rest).map_or(0, |(start, ..)| start)].trim();
    if !before.is_empty() {
        turns.push(Message::new(Role::System, before));
    }
    while let Some((start, marker, role)) = next(rest) {
        rest = &rest[start + marker..];
        let end = next(rest).map_or(rest.len(), |(start, ..)| start);
        turns.push(Message::new(role, rest[..end].trim()));
    }
    if turns.last().is_some_and(|turn| turn.role == Role::Assistant && turn.content.is_empty()) {
        turns.pop();
    }
    turns
}

/// All records of a file or folder.
#[derive(Debug)]
pub struct Records {
    /// The records, in the order of files and lines.
    pub records: Vec<Record>,
    /// What kind they are.
    pub schema: Schema,
    /// Columns that the schema does not read.
    pub ignored_columns: Vec<String>,
    /// Records left out, by reason.
    pub dropped: Dropped,
    /// Records equal to an earlier one.
    pub duplicates: usize,
    /// Pairs whose two answers are equal.
    pub equal_answers: usize,
    /// Records of more than a mebibyte.
    pub large: usize,
}

impl Records {
    /// Columns that neither the schema nor the chat template reads.
    pub fn unread_columns(&self, template: Option<&ChatTemplate>) -> Vec<String> {
        let is_read = |column: &str| match (column, template) {
            (schema::TOOLS, Some(template)) => template.source().contains(schema::TOOLS),
            (schema::VARIABLES, Some(_)) => true,
            _ => false,
        };
        self.ignored_columns.iter().filter(|column| !is_read(column)).cloned().collect()
    }
}

/// Reads all records of a file or folder. The first one decides the schema of all.
///
/// # Errors
/// When a file cannot be read, a row is broken or of another schema, or there is none.
pub fn read(path: &Path) -> Result<Records, Error> {
    let mut reader = Reader::default();
    containers::read(path, &mut |place, row| reader.take(place, &row))?;
    let Some(schema) = reader.schema else {
        return Err(Error::Empty { path: path.to_owned() });
    };
    Ok(Records {
        records: reader.records,
        schema,
        ignored_columns: reader.ignored.into_iter().collect(),
        dropped: reader.dropped,
        duplicates: reader.duplicates,
        equal_answers: reader.equal_answers,
        large: reader.large,
    })
}

#[derive(Default)]
struct Reader {
    schema: Option<Schema>,
    /// The file of the last row, and the row's number there.
    last: Option<(Arc<Path>, usize)>,
    records: Vec<Record>,
    ignored: BTreeSet<String>,
    dropped: Dropped,
    seen: HashSet<u64>,
    duplicates: usize,
    equal_answers: usize,
    large: usize,
}

impl Reader {
    fn take(&mut self, place: Place, row: &Value) -> Result<(), Error> {
        let number = match &self.last {
            Some((file, number)) if *file == place.file => number + 1,
            _ => 0,
        };
        self.last = Some((Arc::clone(&place.file), number));
        let row = Row::new(&place, row)?;
        let schema = match self.schema {
            Some(schema) => schema,
            None => *self.schema.insert(Schema::recognise(&row)?),
        };
        for column in row.columns() {
            if !schema.reads(column, &row) && !self.ignored.contains(column) {
                self.ignored.insert(column.to_owned());
            }
        }
        match schema.content(&row)? {
            Ok(content) => {
                let variables = if content.is_templated() { row.variables()? } else { Variables::new() };
                let bad = row.judgement(schema).is_some_and(|(_, good)| !good);
                self.keep(Record { place: place.clone(), row: number, content, variables, bad });
            }
            Err(reason) => self.dropped.add(reason, &place),
        }
        Ok(())
    }

    fn keep(&mut self, record: Record) {
        let (answer_is_empty, size) = match &record.content {
            Content::Text(text) => (false, text.len()),
            Content::Conversation(messages) => (says_nothing(messages), length(messages)),
            Content::Completion { prompt, completion } => {
                (completion.is_empty(), prompt.len() + completion.len())
            }
            Content::Preference { prompt, chosen, rejected } => {
                self.equal_answers += usize::from(chosen == rejected);
                (chosen.is_empty() || rejected.is_empty(), prompt.len() + chosen.len() + rejected.len())
            }
        };
        if answer_is_empty {
            return self.dropped.add(Reason::EmptyAnswer, &record.place);
        }
        let mut hasher = DefaultHasher::new();
        record.content.hash(&mut hasher);
        record.variables.hash(&mut hasher);
        self.duplicates += usize::from(!self.seen.insert(hasher.finish()));
        self.large += usize::from(size > LARGE);
        self.records.push(record);
    }
}

/// Whether a message says nothing, be it in what templates print beside its content. What else it has is about it: its
/// language, its weight.
fn is_blank(message: &Message) -> bool {
    const SPOKEN: [&str; 5] = ["tool_calls", "function_call", "reasoning_content", "reasoning", "thinking"];
    let says = |value: &Value| match value {
        Value::String(text) => !text.trim().is_empty(),
        Value::Array(items) => !items.is_empty(),
        Value::Object(fields) => !fields.is_empty(),
        _ => false,
    };
    message.content.trim().is_empty() && !SPOKEN.iter().any(|name| message.extra.get(*name).is_some_and(says))
}

/// Whether there are answers, and all are blank.
fn says_nothing(messages: &[Message]) -> bool {
    let mut answers = messages.iter().filter(|message| message.role == Role::Assistant).peekable();
    answers.peek().is_some() && answers.all(is_blank)
}

fn length(messages: &[Message]) -> usize {
    messages.iter().map(|message| message.content.len()).sum()
}
