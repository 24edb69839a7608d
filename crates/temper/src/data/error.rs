//! Why data cannot be used, and where it is.

use std::ffi::OsStr;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::Schema;
use super::ledger::{Dropped, Reason};
use crate::text;

/// What a file is counted in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// Lines of text.
    Line,
    /// Items of a JSON array.
    Item,
    /// Rows of a table.
    Row,
}

/// Where a record is: `data.jsonl` line 17. All count from 1.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The file.
    pub file: Arc<Path>,
    /// What `number` counts.
    pub unit: Unit,
    /// Which one.
    pub number: usize,
}

impl fmt::Display for Place {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let unit = match self.unit {
            Unit::Line => "line",
            Unit::Item => "item",
            Unit::Row => "row",
        };
        write!(formatter, "`{}` {unit} {}", self.file.display(), self.number)
    }
}

/// Why data cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file or folder cannot be read.
    #[error("cannot read `{}`: {source}", path.display())]
    Read {
        /// The file or folder.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// A file's name does not say how to read it.
    #[error("`{}` is of no known kind", path.display())]
    UnknownKind {
        /// The file.
        path: PathBuf,
    },
    /// A file or folder holds no record.
    #[error("`{}` holds no records", path.display())]
    Empty {
        /// The file or folder.
        path: PathBuf,
    },
    /// A compressed file expands to far more than text does.
    #[error("`{}` expands to more than {limit}", path.display())]
    Expansion {
        /// The file.
        path: PathBuf,
        /// The bound it broke.
        limit: &'static str,
    },
    /// A line or item is too long.
    #[error("{place} is longer than {limit} bytes")]
    TooLong {
        /// Where.
        place: Place,
        /// The limit.
        limit: u64,
    },
    /// A line is not UTF-8.
    #[error("{place} column {column}: the text is not UTF-8")]
    NotUtf8 {
        /// Where.
        place: Place,
        /// The first broken byte, from 1.
        column: usize,
    },
    /// The file breaks the rules of its kind.
    #[error("{place}{}: {reason}", column.map_or_else(String::new, |column| format!(" column {column}")))]
    Syntax {
        /// Where.
        place: Place,
        /// The column, from 1.
        column: Option<usize>,
        /// What its reader says.
        reason: String,
    },
    /// The first record's fields are those of no known schema.
    #[error("{place}: no schema has the fields {}", quoted(found))]
    UnknownSchema {
        /// Where.
        place: Place,
        /// Its fields.
        found: Vec<String>,
    },
    /// A row says nothing that could be answered.
    #[error("{place}: expected a prompt, found the fields {}", quoted(found))]
    NoPrompt {
        /// Where.
        place: Place,
        /// Its fields.
        found: Vec<String>,
    },
    /// A record lacks a field of the schema.
    #[error("{place}: expected the field `{field}` ({schema}), found {}", quoted(found))]
    MissingField {
        /// Where.
        place: Place,
        /// The field.
        field: String,
        /// The schema, recognised from the first record.
        schema: Schema,
        /// The record's fields.
        found: Vec<String>,
    },
    /// A field has the wrong type or form.
    #[error("{place}: expected {expected} in `{field}`, found {found}")]
    WrongType {
        /// Where.
        place: Place,
        /// The field, as a path such as `messages[2].content`.
        field: String,
        /// What the schema has there.
        expected: &'static str,
        /// What the record has there.
        found: String,
    },
    /// A table has messages as Python prints them, or as other text that is no JSON.
    #[error(
        "{place}: expected messages in `{field}`, found a list that is no JSON, perhaps in Python's notation"
    )]
    NotJson {
        /// Where.
        place: Place,
        /// The field.
        field: String,
    },
    /// An answer without a prompt is neither a conversation nor a transcript.
    #[error(
        "{place}: expected messages, or turns `\\n\\nHuman: … \\n\\nAssistant: …`, in `{field}`, or a `prompt` beside it, found a string without `\\n\\nAssistant:`"
    )]
    NotATranscript {
        /// Where.
        place: Place,
        /// The field.
        field: String,
    },
    /// A message's role is unknown.
    #[error("{place}: unknown role `{}` in `{field}`", role.escape_debug())]
    UnknownRole {
        /// Where.
        place: Place,
        /// The field, as a path.
        field: String,
        /// The role.
        role: String,
    },
    /// The data's schema does not serve the purpose.
    #[error("expected {expected}, but `{}` has {found}", path.display())]
    WrongSchema {
        /// The file or folder.
        path: PathBuf,
        /// What the data must be.
        expected: &'static str,
        /// What it is.
        found: Schema,
    },
    /// Messages need a chat template.
    #[error("{place}: messages need a chat template, and the model has none")]
    NoTemplate {
        /// Where.
        place: Place,
    },
    /// Plain text ends with a token that the tokenizer does not name.
    #[error("the tokenizer names no end-of-text token, which plain text must end with")]
    NoEndOfText,
    /// A record cannot be rendered or tokenised.
    #[error("{place}: {source}")]
    Text {
        /// Where.
        place: Place,
        /// What went wrong.
        source: text::Error,
    },
    /// The template writes an answer after something else than what it asks for it with.
    #[error(
        "{place}: the chat template's text before answer {message} with its generation prompt \
         is not the beginning of its text with the answer"
    )]
    NotAPrefix {
        /// Where.
        place: Place,
        /// The index of the message.
        message: usize,
    },
    /// A pair has several answers a side, and no one sequence shows them as serving would.
    #[error("{place}: the chat template rewrites earlier answers, so a side with several is no one sequence")]
    RewrittenPair {
        /// Where.
        place: Place,
    },
    /// A record is longer than allowed.
    #[error("{place}: {tokens} tokens, more than the allowed {limit}")]
    OverLong {
        /// Where.
        place: Place,
        /// The record's longest sequence.
        tokens: usize,
        /// The limit.
        limit: usize,
    },
    /// No record has a token to train.
    #[error("`{}` has nothing to train{}", path.display(), because(dropped))]
    NothingToTrain {
        /// The file or folder.
        path: PathBuf,
        /// Why the records were left out.
        dropped: Dropped,
    },
}

impl Error {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Error::Read { path, source }
                if source.kind() == io::ErrorKind::NotFound && path.as_os_str() == "-" =>
            {
                "data is read from files: write it to one first".into()
            }
            Error::Read { path, source } if source.kind() == io::ErrorKind::NotFound => {
                format!("check that `{}` exists", path.display())
            }
            Error::UnknownKind { path }
                if path.extension().is_some_and(|it| it == "arrow" || it == "json") =>
            {
                "make a file of another kind of it, as with Python's `datasets.load_from_disk(FOLDER).to_parquet(\"data.parquet\")`, of each split".into()
            }
            Error::UnknownKind { .. } => {
                "known are .jsonl (.ndjson), .json, .parquet, .csv and .txt, all but .parquet also with .gz or .zst".into()
            }
            Error::Empty { path } if path.is_file() => "give a file with a record a line".into(),
            Error::NothingToTrain { dropped, .. } if dropped.count(Reason::NoTarget) > 0 => {
                "an answer must follow the prompt, and `--max-length` must leave room for it; `temper inspect` shows both"
                    .into()
            }
            Error::Empty { .. } => {
                "a folder is read without its subfolders, and only its .jsonl, .json, .parquet, .csv and .txt files"
                    .into()
            }
            Error::Syntax { place, .. } => match place.file.extension().and_then(OsStr::to_str) {
                Some("json") => "a .json file is an array of records, or has one record a line".into(),
                Some("jsonl" | "ndjson") => "a .jsonl file has one JSON object a line".into(),
                Some("csv") => "every row has as many fields as the first; one with a comma, a quote or a line break stands in quotes".into(),
                _ => "download or copy the file again".into(),
            },
            Error::NotUtf8 { .. } => "save the file as UTF-8".into(),
            Error::MissingField { schema, .. } => {
                format!("the first record says what all are ({schema}); keep records of other forms in a file of their own")
            }
            Error::WrongSchema { .. } => "`temper sft` learns from all kinds; `temper dpo` needs two answers to a prompt, `temper pretrain` documents".into(),
            Error::TooLong { .. } => "split the document".into(),
            Error::NoPrompt { .. } => {
                "give a .txt file with a prompt a line, or records with `prompt` or `messages`".into()
            }
            Error::UnknownSchema { found, .. } if matches!(&found[..], [one] if one.contains([';', '\t'])) => {
                "a .csv file has commas between its columns".into()
            }
            Error::UnknownSchema { .. } => format!(
                "{}; rename other columns, as with `jq -c '{{instruction: .question, output: .answer}}'`",
                Schema::KNOWN
            ),
            Error::UnknownRole { .. } => {
                "known are system, user (human), assistant (gpt) and tool".into()
            }
            Error::NoTemplate { .. } => "give a template with `--chat-template chatml` or `--chat-template FILE`".into(),
            Error::NoEndOfText => "name a token of the vocabulary as `eos_token` in tokenizer_config.json, or by `eos_token_id` in config.json (of a GGUF file: `tokenizer.ggml.eos_token_id`)".into(),
            Error::NotAPrefix { .. } => {
                "what would be trained is not what serving shows; where the template asks for a thought that the answer lacks, \
                 `\"chat_template_kwargs\": {\"enable_thinking\": false}` in the record may help, else another `--chat-template FILE`"
                    .into()
            }
            Error::RewrittenPair { .. } => {
                "what would be trained is not what serving shows; give another template with `--chat-template FILE`"
                    .into()
            }
            Error::OverLong { .. } => {
                "`--truncation drop` leaves such records out; training can cut them too, and has `--max-length`, up to the model's context".into()
            }
            Error::Text { source, .. } => return source.hint(),
            Error::NotJson { .. } => {
                "write the lists themselves as JSON lines, before a table makes text of them: pandas' `frame.to_json(\"data.jsonl\", orient=\"records\", lines=True)`".into()
            }
            Error::NotATranscript { .. } => {
                "call the column of what is answered `instruction`, which a chat template writes as a user's message, with `system` before it; or `prompt`, which is trained as it is".into()
            }
            // The message says it all.
            Error::Read { .. }
            | Error::Expansion { .. }
            | Error::WrongType { .. }
            | Error::NothingToTrain { .. } => return None,
        })
    }
}

fn quoted(fields: &[String]) -> String {
    match fields {
        [] => "nothing".into(),
        _ => fields.iter().map(|field| format!("`{}`", field.escape_debug())).collect::<Vec<_>>().join(", "),
    }
}

fn because(dropped: &Dropped) -> String {
    let reasons = dropped.iter().map(|(reason, count, first)| format!("{count} {reason} (first: {first})"));
    match reasons.collect::<Vec<_>>().join(", ") {
        none if none.is_empty() => none,
        reasons => format!(": {reasons}"),
    }
}
