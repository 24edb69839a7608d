//! What rows mean, recognised from the fields of the first one.

use std::fmt;

use serde_json::Value;

use super::ledger::Reason;
use super::records::{Answer, Content, Prompt};
use super::{Error, Place};
use crate::text::{Message, Role, Variables};

/// What begins a turn of a transcript.
pub(super) const ASSISTANT: &str = "\n\nAssistant:";
pub(super) const HUMAN: &str = "\n\nHuman:";
/// Columns that are for chat templates.
pub(super) const TOOLS: &str = "tools";
pub(super) const VARIABLES: &str = "chat_template_kwargs";
/// The column of a system message, beside messages and instructions.
const SYSTEM: &str = "system";
/// Columns that say whether an answer is good, as TRL's and LLaMA-Factory's data for KTO have them.
const LABEL: &str = "label";
const KTO_TAG: &str = "kto_tag";

/// The kinds of records.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Schema {
    /// `text`: documents.
    Text,
    /// `prompt` and `completion`.
    Completion,
    /// `messages`: conversations.
    Messages,
    /// `conversations`: conversations as ShareGPT has them.
    Conversations,
    /// `instruction`, `input` and `output`, as Alpaca has them.
    Instruction,
    /// `prompt`, `chosen` and `rejected`.
    Preference,
    /// `instruction`, `input`, `chosen` and `rejected`, as LLaMA-Factory has them beside Alpaca's.
    InstructionPreference,
    /// `conversations`, and after them one message each in `chosen` and `rejected`, as LLaMA-Factory has them.
    ConversationPreference,
    /// `chosen` and `rejected`, two conversations with the same beginning.
    ImplicitPreference,
    /// `chosen` and `rejected`, two transcripts with the same beginning.
    Transcripts,
}

impl fmt::Display for Schema {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Schema::Text => "documents: `text`",
            Schema::Completion => "completions: `prompt`, `completion`",
            Schema::Messages => "conversations: `messages`",
            Schema::Conversations => "conversations: `conversations`",
            Schema::Instruction => "instructions: `instruction`, `input`, `output`",
            Schema::Preference => "preferences: `prompt`, `chosen`, `rejected`",
            Schema::InstructionPreference => "preferences: `instruction`, `input`, `chosen`, `rejected`",
            Schema::ConversationPreference => "preferences: `conversations`, messages `chosen`, `rejected`",
            Schema::ImplicitPreference => "preferences: conversations `chosen`, `rejected`",
            Schema::Transcripts => "preferences: transcripts `chosen`, `rejected`",
        })
    }
}

impl Schema {
    /// The schemas as a hint names them.
    pub(super) const KNOWN: &'static str = "known are `text`; `prompt` + `completion`; `messages`; \
        `conversations`; `instruction` + `input` + `output`; `prompt` + `chosen` + `rejected`; \
        `instruction` + `input` + `chosen` + `rejected`; `conversations` + `chosen` + `rejected`; `chosen` + `rejected`";

    pub(super) fn recognise(row: &Row<'_>) -> Result<Self, Error> {
        // Tables that were joined have the columns of all, empty where they have nothing.
        let filled = |field: &str| row.get(field).is_some_and(|value| value != "");
        let there = |field: &str| row.get(field).is_some();
        Self::of(row, filled).or_else(|| Self::of(row, there)).ok_or_else(|| {
            let found = row.columns().map(str::to_owned).collect();
            Error::UnknownSchema { place: row.place.clone(), found }
        })
    }

    fn of(row: &Row<'_>, has: impl Fn(&str) -> bool) -> Option<Self> {
        Some(if has("chosen") && has("rejected") {
            Self::of_preference(row)
        } else if has("prompt") && has("completion") {
            Schema::Completion
        } else if has("messages") {
            Schema::Messages
        } else if has("conversations") {
            Schema::Conversations
        } else if has("instruction") && has("output") {
            Schema::Instruction
        } else if has("text") {
            Schema::Text
        } else {
            return None;
        })
    }

    fn of_preference(row: &Row<'_>) -> Self {
        let messages = row.get("chosen").and_then(Value::as_array);
        // Answers alone begin with the assistant, whole conversations with somebody else.
        let first = messages.and_then(|messages| messages.first());
        let speaker = first.and_then(|first| first.get("role").or_else(|| first.get("from")));
        let are_whole = speaker.is_some_and(|speaker| speaker != "assistant" && speaker != "gpt");
        let chosen = row.get("chosen").and_then(Value::as_str);
        let is_transcript = chosen.is_some_and(|chosen| chosen.contains(ASSISTANT));
        let begins = |prompt: &str| {
            ["chosen", "rejected"].iter().all(|side| {
                row.get(side).and_then(Value::as_str).is_some_and(|text| text.starts_with(prompt))
            })
        };
        match row.get("prompt") {
            // Beside whole conversations or transcripts a prompt only repeats how they begin.
            Some(Value::String(_)) if are_whole => Schema::ImplicitPreference,
            Some(Value::String(prompt)) if is_transcript && begins(prompt) => Schema::Transcripts,
            Some(_) => Schema::Preference,
            None if messages.is_some() && !are_whole && row.get("conversations").is_some() => {
                Schema::ConversationPreference
            }
            None if messages.is_some() => Schema::ImplicitPreference,
            None if is_transcript => Schema::Transcripts,
            None if row.get("conversations").is_some() => Schema::ConversationPreference,
            None if row.get("instruction").is_some() => Schema::InstructionPreference,
            None => Schema::Transcripts,
        }
    }

    /// Whether the schema reads a column of a row.
    pub(super) fn reads(self, column: &str, row: &Row<'_>) -> bool {
        let of_messages = |column| row.get(column).is_some_and(|value| !value.is_string());
        let columns: &[&str] = match self {
            Schema::Text => &["text"],
            Schema::Completion if of_messages("completion") => &["prompt", "completion", SYSTEM],
            Schema::Preference if of_messages("chosen") => &["prompt", "chosen", "rejected", SYSTEM],
            Schema::Completion => &["prompt", "completion"],
            Schema::Messages => &["messages", SYSTEM],
            Schema::Conversations => &["conversations", SYSTEM],
            Schema::Instruction => &["instruction", "input", "output", SYSTEM],
            Schema::InstructionPreference => &["instruction", "input", "chosen", "rejected", SYSTEM],
            Schema::ConversationPreference => &["conversations", "chosen", "rejected", SYSTEM],
            Schema::Preference => &["prompt", "chosen", "rejected"],
            Schema::ImplicitPreference => &["chosen", "rejected", SYSTEM],
            Schema::Transcripts => &["chosen", "rejected"],
        };
        columns.contains(&column) || row.judgement(self).is_some_and(|(judgement, _)| judgement == column)
    }

    /// Whether the records are preferences.
    pub fn is_preference(self) -> bool {
        use Schema::{Completion, Conversations, Instruction, Messages, Text};
        !matches!(self, Text | Completion | Messages | Conversations | Instruction)
    }

    /// What a row says, or why it is of no use.
    pub(super) fn content(self, row: &Row<'_>) -> Result<Result<Content, Reason>, Error> {
        // Answers alone and whole conversations may be mixed beside prompts.
        let is_mixed =
            matches!(self, Schema::Preference | Schema::ImplicitPreference) && row.get("prompt").is_some();
        let schema = if is_mixed { Self::of_preference(row) } else { self };
        let row = &Fields { row, schema: self };
        Ok(Ok(match schema {
            Schema::Text => Content::Text(row.string("text")?.to_owned()),
            Schema::Completion => {
                let mut prompt = row.prompt_before("completion")?;
                let mut completion = row.answer("completion", &prompt)?;
                if let (Prompt::Messages(prompt), Answer::Messages(answer)) = (&mut prompt, &mut completion)
                    && let Err(reason) = without_prompt(prompt, &mut [answer])
                {
                    return Ok(Err(reason));
                }
                Content::Completion { prompt, completion }
            }
            Schema::Messages => Content::Conversation(row.conversation("messages")?),
            Schema::Conversations => Content::Conversation(row.conversation("conversations")?),
            Schema::Instruction => {
                let prompt = row.instruction()?;
                let completion = row.answer("output", &prompt)?;
                Content::Completion { prompt, completion }
            }
            Schema::Preference => return row.preference(row.prompt_before("chosen")?),
            Schema::InstructionPreference => return row.preference(row.instruction()?),
            Schema::ConversationPreference => {
                return row.preference(Prompt::Messages(row.conversation("conversations")?));
            }
            Schema::ImplicitPreference => {
                return Ok(split_conversations(row.conversation("chosen")?, row.conversation("rejected")?));
            }
            Schema::Transcripts => return row.transcripts(),
        }))
    }
}

/// The prompt of a row: what stands alone as `prompt`, a document whole, of a record what is before its last answer.
/// Beside an answer in text it is text, as in training.
pub(super) fn prompt(row: &Row<'_>) -> Result<Prompt, Error> {
    let none =
        || Error::NoPrompt { place: row.place.clone(), found: row.columns().map(str::to_owned).collect() };
    let answer = row.get("completion").or_else(|| row.get("chosen"));
    if row.get("prompt").is_some() && !answer.is_some_and(Value::is_array) {
        return Ok(match (Fields { row, schema: Schema::Completion }).prompt("prompt")? {
            Prompt::Text(text) if answer.is_none() => Prompt::Question(text),
            prompt => prompt,
        });
    }
    let schema = Schema::recognise(row).map_err(|_| none())?;
    match schema.content(row)?.map_err(|_| none())? {
        Content::Text(text) => Ok(Prompt::Question(text)),
        Content::Completion { prompt, .. } | Content::Preference { prompt, .. } => Ok(prompt),
        Content::Conversation(mut messages) => {
            messages.pop_if(|last| last.role == Role::Assistant);
            Ok(Prompt::Messages(messages))
        }
    }
}

/// The messages both conversations begin with are the prompt; what is left must be one answer each.
fn split_conversations(mut chosen: Vec<Message>, mut rejected: Vec<Message>) -> Result<Content, Reason> {
    let (Some(better), Some(worse)) = (chosen.pop(), rejected.pop()) else {
        return Err(Reason::NoAnswer);
    };
    if better.role != Role::Assistant || worse.role != Role::Assistant {
        return Err(Reason::NoAnswer);
    }
    if chosen != rejected {
        return Err(Reason::PromptsDiffer);
    }
    if chosen.is_empty() {
        return Err(Reason::NoPrompt);
    }
    Ok(Content::Preference {
        prompt: Prompt::Messages(chosen),
        chosen: Answer::Messages(vec![better]),
        rejected: Answer::Messages(vec![worse]),
    })
}

/// How many messages of an answer repeat a prompt, whose system messages it may lack or add.
fn repeated(prompt: &[Message], answer: &[Message]) -> usize {
    let is_turn = |message: &&Message| message.role != Role::System;
    let mut turns = prompt.iter().filter(is_turn).peekable();
    let mut count = 0;
    while let Some(turn) = turns.peek() {
        let Some(said) = answer.get(count) else { return 0 };
        if is_turn(&said) {
            if (said.role, &said.content) != (turn.role, &turn.content) {
                return 0;
            }
            turns.next();
        }
        count += 1;
    }
    if count < answer.len() && prompt.iter().any(|message| is_turn(&message)) { count } else { 0 }
}

/// Takes out of answers what they repeat of the prompt; the prompt then has the system messages that it lacked.
///
/// # Errors
/// When system messages contradict each other.
fn without_prompt(prompt: &mut Vec<Message>, answers: &mut [&mut Vec<Message>]) -> Result<(), Reason> {
    let systems = |messages: &[Message]| -> Vec<String> {
        let systems = messages.iter().filter(|message| message.role == Role::System);
        systems.map(|message| message.content.clone()).collect()
    };
    for answer in answers {
        let before: Vec<Message> = answer.drain(..repeated(prompt, answer)).collect();
        let (known, own) = (systems(prompt), systems(&before));
        if !known.is_empty() && !own.is_empty() && known != own {
            return Err(Reason::PromptsDiffer);
        }
        if known.is_empty() && !own.is_empty() {
            *prompt = before;
        }
    }
    Ok(())
}

/// A row that is an object, or a string that stands for a document.
pub(super) struct Row<'row> {
    pub(super) place: &'row Place,
    value: &'row Value,
}

impl<'row> Row<'row> {
    pub(super) fn new(place: &'row Place, value: &'row Value) -> Result<Self, Error> {
        match value {
            Value::Object(_) | Value::String(_) => Ok(Self { place, value }),
            _ => Err(Error::Syntax {
                place: place.clone(),
                column: None,
                reason: format!("expected an object or a string, found {}", type_name(value)),
            }),
        }
    }

    fn get(&self, field: &str) -> Option<&'row Value> {
        match self.value {
            Value::String(_) if field == "text" => Some(self.value),
            _ => self.value.get(field).filter(|value| !value.is_null()),
        }
    }

    /// The column that says whether the only answer is a good one, and what it says. Beside other things than a prompt and
    /// its completion, a `label` may be about anything.
    pub(super) fn judgement(&self, schema: Schema) -> Option<(&'static str, bool)> {
        let columns: &[&str] = match schema {
            Schema::Completion => &[LABEL, KTO_TAG],
            Schema::Messages | Schema::Conversations | Schema::Instruction => &[KTO_TAG],
            _ => &[],
        };
        columns.iter().find_map(|&column| Some((column, truth(self.get(column)?)?)))
    }

    /// What a chat template reads beside messages. Tables have `tools` as text.
    pub(super) fn variables(&self) -> Result<Variables, Error> {
        let wrong = |field: &str, expected, found: &Value| Error::WrongType {
            place: self.place.clone(),
            field: field.to_owned(),
            expected,
            found: type_name(found).to_owned(),
        };
        let parsed = |field: &str| match self.get(field) {
            Some(Value::String(text)) if text.trim().is_empty() => None,
            Some(Value::String(text)) => serde_json::from_str(text).ok().or_else(|| self.get(field).cloned()),
            value => value.cloned(),
        };
        let mut variables = match parsed(VARIABLES) {
            None => Variables::new(),
            Some(Value::Object(variables)) => variables,
            Some(other) => return Err(wrong(VARIABLES, "an object", &other)),
        };
        match parsed(TOOLS) {
            None => {}
            Some(Value::Array(tools)) if tools.is_empty() => {}
            Some(Value::Array(tools)) => _ = variables.insert(TOOLS.to_owned(), tools.into()),
            Some(other) => return Err(wrong(TOOLS, "a list of tools", &other)),
        }
        Ok(variables)
    }

    /// Names of what it has. Null stands for nothing: data sets that were joined have the columns of all of them.
    pub(super) fn columns(&self) -> impl Iterator<Item = &'row str> {
        let fields = self.value.as_object().into_iter().flatten().filter(|(_, value)| !value.is_null());
        fields.map(|(name, _)| name.as_str()).chain(self.value.is_string().then_some("text"))
    }
}

/// Access to the fields of a row whose schema is known.
struct Fields<'row> {
    row: &'row Row<'row>,
    schema: Schema,
}

impl<'row> Fields<'row> {
    fn required(&self, field: &str) -> Result<&'row Value, Error> {
        self.row.get(field).ok_or_else(|| Error::MissingField {
            place: self.row.place.clone(),
            field: field.to_owned(),
            schema: self.schema,
            found: self.row.columns().map(str::to_owned).collect(),
        })
    }

    fn wrong(&self, field: impl Into<String>, expected: &'static str, found: &Value) -> Error {
        let (place, found) = (self.row.place.clone(), type_name(found).to_owned());
        Error::WrongType { place, field: field.into(), expected, found }
    }

    fn string(&self, field: &str) -> Result<&'row str, Error> {
        let value = self.required(field)?;
        value.as_str().ok_or_else(|| self.wrong(field, "a string", value))
    }

    fn prompt(&self, field: &str) -> Result<Prompt, Error> {
        match self.required(field)? {
            Value::String(text) => Ok(Prompt::Text(text.clone())),
            Value::Array(_) => Ok(Prompt::Messages(self.conversation(field)?)),
            other => Err(self.wrong(field, "a string or messages", other)),
        }
    }

    /// The prompt of a record with an answer: as text before messages it is what the user says.
    fn prompt_before(&self, answer: &str) -> Result<Prompt, Error> {
        match self.prompt("prompt")? {
            Prompt::Text(text) if self.row.get(answer).is_some_and(Value::is_array) => {
                Ok(Prompt::Messages(self.under_system(vec![Message::new(Role::User, text)])?))
            }
            prompt => Ok(prompt),
        }
    }

    /// Text after text, messages after messages.
    fn answer(&self, field: &str, prompt: &Prompt) -> Result<Answer, Error> {
        match (prompt, self.required(field)?) {
            (Prompt::Messages(_), Value::Array(_)) => Ok(Answer::Messages(self.messages(field)?)),
            (Prompt::Messages(_), Value::String(text)) if text.is_empty() => Ok(Answer::Messages(Vec::new())),
            (Prompt::Messages(_), one @ Value::Object(_)) => {
                Ok(Answer::Messages(vec![self.message(field, one)?]))
            }
            (Prompt::Messages(_), other) => Err(self.wrong(field, "messages, as the prompt is", other)),
            (_, Value::String(text)) => Ok(Answer::Text(text.clone())),
            (_, other) => Err(self.wrong(field, "a string, as the prompt is", other)),
        }
    }

    /// The prompt with its two answers.
    fn preference(&self, mut prompt: Prompt) -> Result<Result<Content, Reason>, Error> {
        let mut chosen = self.answer("chosen", &prompt)?;
        let mut rejected = self.answer("rejected", &prompt)?;
        if let (Prompt::Messages(prompt), Answer::Messages(better), Answer::Messages(worse)) =
            (&mut prompt, &mut chosen, &mut rejected)
            && let Err(reason) = without_prompt(prompt, &mut [better, worse])
        {
            return Ok(Err(reason));
        }
        Ok(Ok(Content::Preference { prompt, chosen, rejected }))
    }

    fn instruction(&self) -> Result<Prompt, Error> {
        let mut text = self.string("instruction")?.to_owned();
        if let Some(input) = self.some_string("input")? {
            text.push_str("\n\n");
            text.push_str(input);
        }
        Ok(Prompt::Instruction { system: self.some_string(SYSTEM)?.map(str::to_owned), text })
    }

    /// A string that need not be there, and is as good as not there when it is empty.
    fn some_string(&self, field: &str) -> Result<Option<&'row str>, Error> {
        match self.row.get(field) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text.as_str()).filter(|text| !text.is_empty())),
            Some(other) => Err(self.wrong(field, "a string", other)),
        }
    }

    fn conversation(&self, field: &str) -> Result<Vec<Message>, Error> {
        self.under_system(self.messages(field)?)
    }

    /// Messages under the system message beside them, unless they have one.
    fn under_system(&self, mut messages: Vec<Message>) -> Result<Vec<Message>, Error> {
        if let Some(system) = self.some_string(SYSTEM)?
            && messages.first().is_none_or(|first| first.role != Role::System)
        {
            messages.insert(0, Message::new(Role::System, system));
        }
        Ok(messages)
    }

    fn messages(&self, field: &str) -> Result<Vec<Message>, Error> {
        let value = self.required(field)?;
        // A cell of a table that was made JSON lines is still text.
        let parsed = value.as_str().map(serde_json::from_str);
        let messages = match (&parsed, value) {
            (Some(Ok(Value::Array(messages))), _) | (_, Value::Array(messages)) => messages,
            // An empty cell.
            (Some(_), text) if text == "" => return Ok(Vec::new()),
            (Some(_), text) if text.as_str().is_some_and(|text| text.trim_start().starts_with('[')) => {
                return Err(Error::NotJson { place: self.row.place.clone(), field: field.to_owned() });
            }
            _ => return Err(self.wrong(field, "a list of messages", value)),
        };
        messages
            .iter()
            .enumerate()
            .map(|(index, message)| self.message(&format!("{field}[{index}]"), message))
            .collect()
    }

    fn message(&self, path: &str, message: &Value) -> Result<Message, Error> {
        let object = message.as_object().ok_or_else(|| self.wrong(path, "a message", message))?;
        let sharegpt = object.get("from").is_some_and(|from| !from.is_null());
        let (role_key, content_key) = if sharegpt { ("from", "value") } else { ("role", "content") };
        let field = |key: &str| format!("{path}.{key}");
        let missing = &Value::Null;
        let role = object.get(role_key).unwrap_or(missing);
        let name = role.as_str().ok_or_else(|| self.wrong(field(role_key), "a string", role))?;
        let role = named(name).ok_or_else(|| Error::UnknownRole {
            place: self.row.place.clone(),
            field: field(role_key),
            role: name.to_owned(),
        })?;
        let content = object.get(content_key).unwrap_or(missing);
        let wrong = |expected| self.wrong(field(content_key), expected, content);
        let content = match content {
            Value::String(content) => content.clone(),
            // A call of a tool says nothing else.
            Value::Null if object.get("tool_calls").is_some_and(Value::is_array) => String::new(),
            Value::Array(parts) => {
                let text: Option<String> = parts.iter().map(text_part).collect();
                text.ok_or_else(|| wrong("a string, or parts that are all text"))?
            }
            _ => return Err(wrong("a string")),
        };
        let others =
            object.iter().filter(|(key, value)| *key != role_key && *key != content_key && !value.is_null());
        let extra = others.map(|(key, value)| (key.clone(), value.clone())).collect();
        Ok(Message { role, content, extra })
    }

    /// A transcript is its prompt, through the last `Assistant:`, and the answer after it.
    fn transcripts(&self) -> Result<Result<Content, Reason>, Error> {
        let (chosen_prompt, chosen) = self.transcript("chosen")?;
        let (rejected_prompt, rejected) = self.transcript("rejected")?;
        if chosen.contains(HUMAN) || rejected.contains(HUMAN) {
            return Ok(Err(Reason::NoAnswer));
        }
        if chosen_prompt != rejected_prompt {
            return Ok(Err(Reason::PromptsDiffer));
        }
        Ok(Ok(Content::Preference {
            prompt: Prompt::Transcript(chosen_prompt.to_owned()),
            chosen: Answer::Text(chosen.to_owned()),
            rejected: Answer::Text(rejected.to_owned()),
        }))
    }

    fn transcript(&self, field: &str) -> Result<(&'row str, &'row str), Error> {
        let text = self.string(field)?;
        let Some(start) = text.rfind(ASSISTANT) else {
            return Err(Error::NotATranscript { place: self.row.place.clone(), field: field.to_owned() });
        };
        Ok(text.split_at(start + ASSISTANT.len()))
    }
}

/// The text of a part of a message, unless it is an image or the like.
fn text_part(part: &Value) -> Option<&str> {
    let is_text = part.get("type").is_none_or(|kind| kind == "text");
    part.get("text").filter(|_| is_text).and_then(Value::as_str)
}

/// The role of a name, also of ShareGPT's.
fn named(name: &str) -> Option<Role> {
    Role::from_name(match name {
        "human" => "user",
        "gpt" => "assistant",
        _ => name,
    })
}

/// A truth value; tables have it as text.
fn truth(value: &Value) -> Option<bool> {
    match value {
        Value::String(text) if text.eq_ignore_ascii_case("true") => Some(true),
        Value::String(text) if text.eq_ignore_ascii_case("false") => Some(false),
        other => other.as_bool(),
    }
}

fn type_name(value: &Value) -> &'static str {
    match value {
        Value::Null => "nothing",
        Value::Bool(_) => "a truth value",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}
