//! Loading data for a verb.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::path::Path;

use anyhow::{Result, bail};
use temper::data::prompts::{self, Asked};
use temper::data::{Content, Dataset, Prompt, Purpose, Record, Renderer, Schema, TrainOn};
use temper::generate;

use super::model::Model;
use crate::output::{bytes, grouped, hinted, say, warn};

/// Loads data. `--train-on` is refused where there is nothing to choose.
pub fn open(path: &Path, renderer: &Renderer<'_>, purpose: Purpose) -> Result<Dataset> {
    let data = Dataset::load(path, renderer, purpose)?;
    let (holds, hint) = match (data.schema, purpose) {
        (Schema::Text, _) => ("documents, which have no answers", "every token of a document is trained"),
        (schema, Purpose::Preference) if schema.is_preference() => {
            ("preferences", "of preferences the two last answers are compared")
        }
        _ => return Ok(data),
    };
    match renderer.train_on {
        Some(on) if on != TrainOn::All || purpose == Purpose::Preference => bail!(hinted(
            format!("`{}` holds {holds}: `--train-on` has nothing to choose", path.display()),
            format!("leave `--train-on` out: {hint}")
        )),
        _ => Ok(data),
    }
}

/// A file that takes seconds to read.
const LARGE: u64 = 2 << 20;

/// Loads data and says what became of it.
pub fn load(path: &Path, renderer: &Renderer<'_>, purpose: Purpose, label: &str) -> Result<Dataset> {
    if let Some(size) = path.metadata().ok().map(|file| file.len()).filter(|&size| size > LARGE) {
        say(label, format!("reading {} of `{}` …", bytes(size), path.display()));
    }
    let data = open(path, renderer, purpose)?;
    say(label, format!("`{}`: {}", path.display(), data.schema));
    if path.is_dir() {
        say_files(path, &data, label == "data" && purpose != Purpose::Score);
    }
    if !data.unread_columns.is_empty() {
        say("", format!("columns not read: {}", data.unread_columns.join(", ")));
    }
    if purpose == Purpose::Sft && data.schema.is_preference() {
        say("", "of each pair, the prompt and the chosen answer are used");
    }
    let is_plain = |record: &Record| match &record.content {
        Content::Completion { prompt, .. } | Content::Preference { prompt, .. } => {
            matches!(prompt, Prompt::Text(_))
        }
        Content::Text(_) | Content::Conversation(_) => false,
    };
    if renderer.template.is_some() && data.records.iter().any(is_plain) {
        say(
            "",
            "a `prompt` that is text is read as it is; the chat template would write one in `instruction` or messages",
        );
    }
    say("", &data.ledger);
    Ok(data)
}

/// Of a folder, says which files were read and which not, and warns where one that is likely to be held back is trained on.
fn say_files(folder: &Path, data: &Dataset, trains: bool) {
    let mut read: BTreeMap<&OsStr, usize> = BTreeMap::new();
    for record in &data.records {
        *read.entry(record.place.file.file_name().unwrap_or_default()).or_default() += 1;
    }
    let counted = |(name, count): (&&OsStr, &usize)| format!("{} {}", name.display(), grouped(*count));
    say("", format!("records of its files: {}", read.iter().map(counted).collect::<Vec<_>>().join(", ")));
    let entries = folder.read_dir().into_iter().flatten().flatten().map(|entry| entry.file_name());
    let mut others: Vec<String> = entries
        .filter(|name| !read.contains_key(&**name) && !name.as_encoded_bytes().starts_with(b"."))
        .map(|name| name.display().to_string())
        .collect();
    others.sort();
    if !others.is_empty() {
        say("", format!("not read: {}", others.join(", ")));
    }
    let is_held = |name: &str| {
        let words = name.split(|letter: char| !letter.is_ascii_alphabetic());
        words.into_iter().any(|word| ["test", "valid", "validation", "eval", "dev"].contains(&word))
    };
    let held: Vec<_> =
        read.keys().map(|name| name.display().to_string()).filter(|name| is_held(name)).collect();
    if trains && read.len() > held.len() && !held.is_empty() {
        warn(format!("trained on as well, though it looks held back: {}", held.join(", ")));
    }
}

/// Each prompt's text and the tokens that this model reads, all short enough to be answered. Says how they are put.
pub fn prompts(path: &Path, model: &Model) -> Result<Vec<(String, Vec<u32>)>> {
    let asked = prompts::read(path)?;
    let texts = asked.iter().filter(|asked| asked.is_text(&model.processor)).count();
    let how = match asked.len() - texts {
        0 => "read as they are".to_owned(),
        _ if texts == 0 => "written by the chat template".to_owned(),
        some => {
            format!("{} read as they are, {} written by the chat template", grouped(texts), grouped(some))
        }
    };
    say("prompts", format!("{} of `{}`, {how}", grouped(asked.len()), path.display()));
    asked.iter().map(|asked| Ok((asked.text(), tokens(asked, model)?))).collect()
}

fn tokens(asked: &Asked, model: &Model) -> Result<Vec<u32>> {
    let tokens = asked.tokens(&model.processor).map_err(temper::Error::from);
    let checked = tokens.and_then(|tokens| {
        generate::check(&tokens, model.config.context)?;
        Ok(tokens)
    });
    checked.map_err(|error| {
        let hint = error.hint().unwrap_or_default();
        hinted(format!("{}: {error}", asked.place), hint)
    })
}
