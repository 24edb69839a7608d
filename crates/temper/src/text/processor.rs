//! A model's way with text: its tokenizer, its chat template and what ends its answers.

use chrono::{DateTime, Utc};
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::{ChatTemplate, Error, Message, Tokenizer, Variables};
use crate::checkpoint::{Checkpoint, TokenizerFiles};
use crate::hex;

/// Tokenizer, chat template and stop tokens of a model.
pub struct Processor {
    /// The tokenizer.
    pub tokenizer: Tokenizer,
    /// The chat template, when the model or the user has one.
    pub template: Option<ChatTemplate>,
    /// Tokens that end an answer: every EOS of the configurations, GGUF's end-of-turn token, and the token that
    /// the template writes after an answer.
    pub stop: Vec<u32>,
}

impl Processor {
    /// The processor of a checkpoint whose embedding has `vocabulary` rows. `template` replaces the model's own:
    /// the name of a built-in one or a Jinja source. `now` is what templates see as the date.
    ///
    /// # Errors
    /// When the checkpoint has no tokenizer that temper reads, or tokenizer, given template and model do not fit.
    pub fn open(
        checkpoint: &Checkpoint,
        vocabulary: usize,
        template: Option<&str>,
        now: DateTime<Utc>,
    ) -> Result<Processor, Error> {
        let ends = |file: &'static str, json: &Value| {
            let found = &json["eos_token_id"];
            token_ids(found).ok_or_else(|| Error::EndTokens { file, found: found.to_string() })
        };
        let mut stop = ends("config.json", &checkpoint.config)?;
        if let Some(config) = &checkpoint.generation_config {
            stop.extend(ends("generation_config.json", config)?);
        }
        let (mut tokenizer, own) = match &checkpoint.tokenizer {
            TokenizerFiles::HuggingFace { tokenizer_json, tokenizer_config, chat_template } => {
                (Tokenizer::from_json(tokenizer_json, tokenizer_config.as_ref())?, chat_template.as_deref())
            }
            TokenizerFiles::Gguf(vocabulary) => {
                stop.extend(vocabulary.eot);
                (Tokenizer::from_gguf(vocabulary)?, vocabulary.chat_template.as_deref())
            }
            TokenizerFiles::None => return Err(Error::NoTokenizer { path: checkpoint.path.clone() }),
        };
        tokenizer.complete_eos(stop.first().copied());
        tokenizer.fit(vocabulary)?;
        stop.extend(tokenizer.eos());
        let fitting = |source: &str| -> Result<(ChatTemplate, Option<u32>), Error> {
            let template = ChatTemplate::new(source, &tokenizer, now)?;
            let end = match template.end_of_turn(&tokenizer) {
                // It may take other conversations than of nothing but text.
                Err(Error::Refused { .. }) => None,
                end => end?,
            };
            // Markers may be plain text, but then an answer must end in some other special token.
            if end.is_none() {
                template.check_markers(&tokenizer)?;
            }
            Ok((template, end))
        };
        let template = match (template, own) {
            (Some(given), _) => Some(fitting(ChatTemplate::built_in(given).unwrap_or(given))?),
            // What needs no template shall not fail with the model's own.
            (None, Some(own)) => {
                Some(fitting(own).unwrap_or_else(|error| (ChatTemplate::broken(own, error), None)))
            }
            (None, None) => None,
        };
        let (template, end) = template.unzip();
        stop.extend(end.flatten());
        stop.sort_unstable();
        stop.dedup();
        Ok(Processor { tokenizer, template, stop })
    }

    /// The chat template.
    ///
    /// # Errors
    /// When there is none, or the model's own cannot be used.
    pub fn chat_template(&self) -> Result<&ChatTemplate, Error> {
        let template = self.template.as_ref().ok_or(Error::NoTemplate)?;
        template.problem().map_or(Ok(template), |problem| Err(problem.clone()))
    }

    /// SHA-256 over what makes tokens of text: the tokenizer, its special tokens and the template.
    ///
    /// # Errors
    /// When the tokenizer cannot be written.
    pub fn content_hash(&self) -> Result<String, Error> {
        let mut hash = Sha256::new();
        hash.update(self.tokenizer.to_json()?);
        hash.update(self.tokenizer.tokenizer_config().to_string());
        hash.update(self.template.as_ref().map_or("", ChatTemplate::source));
        Ok(hex(&hash.finalize()))
    }

    /// A `generation_config.json` by which Transformers ends answers where they end here, also at an end of turn that a
    /// chat template brought along.
    pub fn with_stops(&self, given: &Value) -> Value {
        let mut ends = token_ids(&given["eos_token_id"]).unwrap_or_default();
        let known = ends.len();
        ends.extend(self.stop.iter().filter(|token| !ends.contains(token)).collect::<Vec<_>>());
        let mut completed = given.clone();
        if ends.is_empty() {
            completed["eos_token_id"] = Value::Null;
        } else if ends.len() > known {
            completed["eos_token_id"] = ends.into();
        }
        completed
    }

    /// Tokens of a prompt: BOS if the tokenizer adds it, then the text.
    ///
    /// # Errors
    /// When the text cannot be tokenised.
    pub fn prompt(&self, text: &str) -> Result<Vec<u32>, Error> {
        let begin = self.tokenizer.begin();
        let mut tokens = self.tokenizer.encode(text)?;
        if begin.is_some() && tokens.first() != begin.as_ref() {
            tokens.splice(0..0, begin);
        }
        Ok(tokens)
    }

    /// Tokens of a conversation up to where the next answer begins. Only the template writes BOS here.
    ///
    /// # Errors
    /// When there is no template or it fails.
    pub fn chat(&self, messages: &[Message], variables: &Variables) -> Result<Vec<u32>, Error> {
        let template = self.chat_template()?;
        self.tokenizer.encode(&template.render(messages, variables, true)?)
    }
}

/// No id, one, or a list of ids.
fn token_ids(value: &Value) -> Option<Vec<u32>> {
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match value {
        Value::Null => Some(Vec::new()),
        Value::Array(ids) => ids.iter().map(id).collect(),
        one => Some(vec![id(one)?]),
    }
}
