//! Why text cannot become tokens, or tokens text.

/// Why text cannot become tokens, or tokens text.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// There is no tokenizer beside the weights.
    #[error("`{}` holds no tokenizer: expected `tokenizer.json`", path.display())]
    NoTokenizer {
        /// The checkpoint.
        path: std::path::PathBuf,
    },
    /// A conversation needs a template.
    #[error("the model has no chat template")]
    NoTemplate,
    /// The tokenizer's file cannot be used.
    #[error("the tokenizer cannot be read: {reason}")]
    Tokenizer {
        /// What its reader says.
        reason: String,
    },
    /// A GGUF file's tokenizer is of a kind that is not implemented.
    #[error("the GGUF tokenizer has `{key}` = {found}, expected {expected}")]
    GgufTokenizer {
        /// The metadata key.
        key: &'static str,
        /// Its value.
        found: String,
        /// What is implemented.
        expected: &'static str,
    },
    /// A GGUF vocabulary contradicts itself.
    #[error("the GGUF vocabulary is broken: {reason}")]
    GgufVocabulary {
        /// What does not fit together.
        reason: String,
    },
    /// The tokenizer knows more tokens than the model has embeddings.
    #[error("the tokenizer has {tokenizer} tokens, the model has embeddings for {model}")]
    TooManyTokens {
        /// Tokens of the tokenizer.
        tokenizer: usize,
        /// Rows of the embedding.
        model: usize,
    },
    /// A text has an added token that the model knows nothing of.
    #[error("the token `{token}` has the id {id}, and the model has embeddings for {model}")]
    NoEmbedding {
        /// The token.
        token: String,
        /// Its id.
        id: u32,
        /// Rows of the embedding.
        model: usize,
    },
    /// The tokens that end an answer are no tokens.
    #[error("{file}: `eos_token_id`: expected a token id or a list of token ids, found {found}")]
    EndTokens {
        /// The file.
        file: &'static str,
        /// What it has.
        found: String,
    },
    /// A text cannot be tokenised.
    #[error("a text cannot be tokenised: {reason}")]
    Encode {
        /// What the tokenizer says.
        reason: String,
    },
    /// Tokens cannot be decoded.
    #[error("tokens cannot be decoded: {reason}")]
    Decode {
        /// What the tokenizer says.
        reason: String,
    },
    /// The chat template does not parse, or fails on a conversation.
    #[error("the chat template fails{}: {reason}", at_line(*line))]
    Template {
        /// The template's line, from 1.
        line: Option<usize>,
        /// What went wrong there.
        reason: String,
    },
    /// The chat template refuses a conversation by `raise_exception`.
    #[error("the chat template refuses the conversation{}: {reason}", at_line(*line))]
    Refused {
        /// The template's line, from 1.
        line: Option<usize>,
        /// The template's own message.
        reason: String,
    },
    /// The chat template computes too long.
    #[error("the chat template does not come to an end{}", at_line(*line))]
    Endless {
        /// The template's line, from 1.
        line: Option<usize>,
    },
    /// The chat template writes too much.
    #[error("the chat template writes more than {limit} bytes for one conversation")]
    OutputTooLong {
        /// The limit.
        limit: usize,
    },
    /// The chat template's markers are not tokens of this tokenizer.
    #[error("the chat template writes {}, which this tokenizer does not know as one token", quoted(markers))]
    UnknownMarkers {
        /// The markers.
        markers: Vec<String>,
    },
}

impl Error {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Error::Template { .. } => {
                "give another with `--chat-template chatml` or `--chat-template FILE`".into()
            }
            Error::NoTemplate => "give one with `--chat-template chatml` or `--chat-template FILE`".into(),
            Error::GgufTokenizer { .. } => {
                "use the model's folder in Hugging Face layout, with its `tokenizer.json`".into()
            }
            Error::NoTokenizer { .. } => "give a folder with the model's `tokenizer.json`, or a GGUF file that has its tokenizer inside".into(),
            Error::Tokenizer { .. } => "download or copy the model's `tokenizer.json` again".into(),
            Error::EndTokens { .. } => "correct the file, or take the key out of it".into(),
            Error::TooManyTokens { .. } => "the tokenizer belongs to another model".into(),
            Error::NoEmbedding { .. } => {
                "write texts without it, or let Transformers enlarge the model: `resize_token_embeddings`"
                    .into()
            }
            Error::UnknownMarkers { .. } => {
                "give a template that fits the tokenizer with `--chat-template FILE`".into()
            }
            _ => return None,
        })
    }
}

fn at_line(line: Option<usize>) -> String {
    line.map_or_else(String::new, |line| format!(" at line {line}"))
}

fn quoted(words: &[String]) -> String {
    words.iter().map(|word| format!("`{word}`")).collect::<Vec<_>>().join(", ")
}
