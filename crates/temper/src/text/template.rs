//! The chat template: conversations as the model was trained to see them.

use std::borrow::Cow;
use std::fmt;
use std::hash::{Hash, Hasher};

use chrono::{DateTime, Utc};
use minijinja::value::Serde;
use minijinja::{Value, context};
use serde::Serialize;
use serde_json::Map;

use super::jinja::Sandbox;
use super::{Error, Tokenizer};

/// The conversation format of ChatML, which needs the tokens `<|im_start|>` and `<|im_end|>`.
const CHATML: &str = "\
{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

/// Who says a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Instructions for the whole conversation.
    System,
    /// The human.
    User,
    /// The model.
    Assistant,
    /// The result of a tool.
    Tool,
}

impl Role {
    /// The role of this name, as in `messages`.
    pub fn from_name(name: &str) -> Option<Self> {
        Some(match name {
            "system" => Role::System,
            "user" => Role::User,
            "assistant" => Role::Assistant,
            "tool" => Role::Tool,
            _ => return None,
        })
    }
}

impl fmt::Display for Role {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Role::System => "system",
            Role::User => "user",
            Role::Assistant => "assistant",
            Role::Tool => "tool",
        })
    }
}

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Message {
    /// Who says it.
    pub role: Role,
    /// What is said.
    pub content: String,
    /// What else the template may read, such as `name`, `reasoning_content` or `tool_calls`.
    #[serde(flatten)]
    pub extra: Map<String, serde_json::Value>,
}

impl Hash for Message {
    fn hash<H: Hasher>(&self, state: &mut H) {
        (self.role, &self.content).hash(state);
        for (key, value) in &self.extra {
            (key, value.to_string()).hash(state);
        }
    }
}

impl Message {
    /// Whether an answer is to be learnt: not where OpenAI's `weight` is 0, or Axolotl's `train` or `training` false.
    pub fn is_trained(&self) -> bool {
        use serde_json::Value::{Bool, Number, String};
        let says_no = |value: &serde_json::Value| match value {
            Bool(says) => !says,
            Number(number) => number.as_f64() == Some(0.0),
            String(text) => text == "0" || text.eq_ignore_ascii_case("false"),
            _ => false,
        };
        !["weight", "train", "training"].iter().filter_map(|key| self.extra.get(*key)).any(says_no)
    }

    /// A message without extra fields.
    pub fn new(role: Role, content: impl Into<String>) -> Self {
        Self { role, content: content.into(), extra: Map::new() }
    }
}

/// What a template may read beside the messages, such as `tools`.
pub type Variables = Map<String, serde_json::Value>;

/// A chat template, run in a sandbox: no files, a bounded number of steps, a bounded output.
pub struct ChatTemplate {
    /// Or why it cannot be used.
    sandbox: Result<Sandbox, Error>,
    source: String,
    special: Value,
}

impl ChatTemplate {
    /// Compiles a Jinja template. It sees the special tokens of the tokenizer, and always the same `now`.
    ///
    /// # Errors
    /// When it does not compile.
    pub fn new(source: &str, tokenizer: &Tokenizer, now: DateTime<Utc>) -> Result<Self, Error> {
        let special = Value::from(Serde(tokenizer.special()));
        Ok(Self { sandbox: Ok(Sandbox::new(source, now)?), source: source.to_owned(), special })
    }

    /// A template that is kept, for saving, and fails with this error wherever it is used.
    pub fn broken(source: &str, error: Error) -> Self {
        Self { sandbox: Err(error), source: source.to_owned(), special: Value::UNDEFINED }
    }

    /// Why it cannot be used, if so.
    pub fn problem(&self) -> Option<&Error> {
        self.sandbox.as_ref().err()
    }

    /// The source of a built-in template.
    pub fn built_in(name: &str) -> Option<&'static str> {
        (name == "chatml").then_some(CHATML)
    }

    /// The template as it was given, for saving.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// That markers such as `<|im_start|>` are tokens of the tokenizer. Meant for a template given by the
    /// user: some models' own templates write such markers as plain text.
    ///
    /// # Errors
    /// When some are not, which it names.
    pub fn check_markers(&self, tokenizer: &Tokenizer) -> Result<(), Error> {
        let mut unknown = Vec::new();
        for marker in markers(&self.source) {
            if tokenizer.encode(marker)?.len() != 1 && !unknown.iter().any(|known| known == marker) {
                unknown.push(marker.to_owned());
            }
        }
        if unknown.is_empty() { Ok(()) } else { Err(Error::UnknownMarkers { markers: unknown }) }
    }

    /// Writes a conversation; with `add_generation_prompt` up to where the next answer begins.
    ///
    /// # Errors
    /// When the template refuses the conversation, does not end, or writes too much.
    pub fn render(
        &self,
        messages: &[Message],
        variables: &Variables,
        add_generation_prompt: bool,
    ) -> Result<String, Error> {
        let messages: Vec<Cow<'_, Message>> = messages.iter().map(with_reasoning).collect();
        let nothing = context! { tools => Value::from(()), documents => Value::from(()) };
        let given = Value::from(Serde(variables));
        self.sandbox.as_ref().map_err(Error::clone)?.render(context! {
            messages => Value::from(Serde(messages)),
            add_generation_prompt,
            ..context! { ..given, ..self.special.clone(), ..nothing }
        })
    }

    /// The special token that the template writes after an answer, when it writes one.
    ///
    /// # Errors
    /// When the template refuses a plain conversation.
    pub fn end_of_turn(&self, tokenizer: &Tokenizer) -> Result<Option<u32>, Error> {
        const ANSWER: &str = "temper";
        let turns = [(Role::System, "rules"), (Role::User, "question"), (Role::Assistant, ANSWER)];
        let turns = turns.map(|(role, text)| Message::new(role, text));
        // Some templates refuse a system message, others a conversation without one.
        let render = |turns| self.render(turns, &Variables::new(), false);
        let rendered = render(&turns[1..]).or_else(|refused| render(&turns).map_err(|_| refused))?;
        let tail = rendered.rsplit_once(ANSWER).map_or("", |(_, tail)| tail);
        Ok(tokenizer.encode(tail)?.into_iter().find(|&token| tokenizer.is_special(token)))
    }
}

/// A message whose reasoning goes by the names that templates read, as Transformers 5.24 has it: most read
/// `reasoning_content`, gpt-oss's `thinking`.
fn with_reasoning(message: &Message) -> Cow<'_, Message> {
    let named =
        ["reasoning_content", "thinking", "reasoning"].into_iter().filter_map(|name| message.extra.get(name));
    let Some(reasoning) = named.into_iter().find(|reasoning| !reasoning.is_null()) else {
        return Cow::Borrowed(message);
    };
    let (mut message, reasoning) = (message.clone(), reasoning.clone());
    message.extra.entry("thinking").or_insert(reasoning.clone());
    message.extra.insert("reasoning_content".into(), reasoning);
    Cow::Owned(message)
}

/// The words `<|…|>` of a template's source.
fn markers(source: &str) -> impl Iterator<Item = &str> {
    source.match_indices("<|").filter_map(|(start, _)| {
        let name = &source[start + 2..];
        let end = name.find(|letter: char| !letter.is_alphanumeric() && letter != '_' && letter != '-')?;
        (end > 0 && name[end..].starts_with("|>")).then(|| &source[start..start + 2 + end + 2])
    })
}

impl fmt::Debug for ChatTemplate {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("ChatTemplate")
            .field("source", &Cow::from(&self.source))
            .finish_non_exhaustive()
    }
}
