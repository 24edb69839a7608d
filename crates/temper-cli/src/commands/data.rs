//! Loading data for a verb.

use std::path::Path;

use anyhow::{Result, bail};
use temper::data::prompts::{self, Asked};
use temper::data::{Dataset, Purpose, Renderer, Schema, TrainOn};
use temper::generate;

use super::model::Model;
use crate::output::{Hinted, bytes, say};

/// Loads data. `--train-on` is refused where there is nothing to choose.
pub fn open(path: &Path, renderer: &Renderer<'_>, purpose: Purpose) -> Result<Dataset> {
    let data = Dataset::load(path, renderer, purpose).map_err(temper::Error::from)?;
    let (holds, hint) = match (data.schema, purpose) {
        (Schema::Text, _) => ("documents, which have no answers", "every token of a document is trained"),
        (schema, Purpose::Preference) if schema.is_preference() => {
            ("preferences", "of preferences the two last answers are compared")
        }
        _ => return Ok(data),
    };
    match renderer.train_on {
        Some(on) if on != TrainOn::All || purpose == Purpose::Preference => bail!(Hinted {
            message: format!("`{}` holds {holds}: `--train-on` has nothing to choose", path.display()),
            hint: format!("leave `--train-on` out: {hint}"),
        }),
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
    if !data.ignored_columns.is_empty() {
        say("", format!("columns not read: {}", data.ignored_columns.join(", ")));
    }
    if purpose == Purpose::Sft && data.schema.is_preference() {
        say("", "of each pair, the prompt and the chosen answer are used");
    }
    say("", &data.ledger);
    Ok(data)
}

/// Each prompt's text and the tokens that this model reads, all short enough to be answered.
pub fn prompts(path: &Path, model: &Model) -> Result<Vec<(String, Vec<u32>)>> {
    let asked = prompts::read(path).map_err(temper::Error::from)?;
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
        Hinted { message: format!("{}: {error}", asked.place), hint }.into()
    })
}
