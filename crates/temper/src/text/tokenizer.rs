//! The tokenizer: `tokenizers`' pipeline plus what `tokenizer_config.json` says beside it.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use tokenizers::AddedToken;
use tokenizers::processors::sequence::Sequence;
use tokenizers::processors::template::TemplateProcessing;

use super::gguf::{self, SPACE};
use super::{DecodeStream, Error};
use crate::checkpoint::GgufVocabulary;

/// Keys of `tokenizer_config.json` whose token a chat template can name.
const SPECIAL: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token"];

const BOS: &str = "bos_token";

/// Text to token ids and back.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// The special tokens by their configuration key, such as `bos_token`.
    special: BTreeMap<String, String>,
    adds_bos: bool,
    /// Whether a text begins as if a space stood before it, as SentencePiece has it.
    adds_space: bool,
    /// Embeddings of the model; a text must not have a token beyond them.
    embeddings: usize,
}

impl Tokenizer {
    /// Reads `tokenizer.json`, and `tokenizer_config.json` for the names of the special tokens.
    ///
    /// # Errors
    /// When it is damaged, or has steps that are not computed here.
    pub fn from_json(bytes: &[u8], tokenizer_config: Option<&Value>) -> Result<Self, Error> {
        let json: Value = serde_json::from_slice(bytes).map_err(|error| unreadable(error.into()))?;
        ["normalizer", "pre_tokenizer", "post_processor", "decoder"]
            .into_iter()
            .try_for_each(|part| check_steps(&json[part]))?;
        let mut inner = tokenizers::Tokenizer::from_bytes(bytes).map_err(unreadable)?;
        add_listed(&mut inner, tokenizer_config)?;
        let mut special = BTreeMap::new();
        for key in SPECIAL {
            if let Some(token) = tokenizer_config.and_then(|config| token_text(config.get(key)?)) {
                special.insert(key.to_owned(), token.to_owned());
            }
        }
        let add_bos = tokenizer_config.and_then(|config| config.get("add_bos_token")?.as_bool());
        Self::new(inner, special, add_bos.unwrap_or(false))
    }

    /// Builds the tokenizer that a GGUF file describes.
    ///
    /// # Errors
    /// When it is of a kind that is not implemented, or contradicts itself.
    pub fn from_gguf(vocabulary: &GgufVocabulary) -> Result<Self, Error> {
        let inner = super::gguf::pipeline(vocabulary)?;
        let names = [
            ("bos_token", vocabulary.bos),
            ("eos_token", vocabulary.eos),
            ("unk_token", vocabulary.unknown),
            ("pad_token", vocabulary.padding),
        ];
        let mut special = BTreeMap::new();
        for (key, id) in names {
            if let Some(token) = id.and_then(|id| inner.id_to_token(id)) {
                special.insert(key.to_owned(), token);
            }
        }
        Self::new(inner, special, gguf::adds_bos(vocabulary))
    }

    fn new(
        mut inner: tokenizers::Tokenizer,
        special: BTreeMap<String, String>,
        add_bos: bool,
    ) -> Result<Self, Error> {
        // Cutting and padding saved in the file would silently shorten every text.
        inner.with_truncation(None).map_err(unreadable)?;
        inner.with_padding(None);
        let mut tokenizer =
            Self { inner, special, adds_bos: false, adds_space: false, embeddings: usize::MAX };
        let first = tokenizer.encode("a")?.first().and_then(|&id| tokenizer.token(id));
        tokenizer.adds_space = first.is_some_and(|token| token.starts_with(SPACE));
        let inserted = tokenizer.first_inserted()?;
        if let Some(token) = inserted.and_then(|id| tokenizer.token(id)) {
            tokenizer.special.entry(BOS.to_owned()).or_insert(token);
        }
        let bos = tokenizer.bos();
        tokenizer.adds_bos = bos.is_some() && (add_bos || inserted == bos);
        if tokenizer.adds_bos && inserted != bos {
            tokenizer.insert_bos()?;
        }
        Ok(tokenizer)
    }

    /// The token that the post-processor puts before every text.
    fn first_inserted(&self) -> Result<Option<u32>, Error> {
        const TEXT: &str = "a";
        let with = self.inner.encode_fast(TEXT, true).map_err(unencodable)?;
        let first = with.get_ids().first().copied();
        Ok(first.filter(|first| self.encode(TEXT).is_ok_and(|without| without.first() != Some(first))))
    }

    /// Makes the post-processor put BOS before every text: Transformers asks it alone when the saved file is read.
    fn insert_bos(&mut self) -> Result<(), Error> {
        let (Some(token), Some(id)) = (self.special.get(BOS).cloned(), self.bos()) else { return Ok(()) };
        let pair = [&token, "$A", &token, "$B"].map(str::to_owned);
        let template = TemplateProcessing::builder()
            .try_single(pair[..2].to_vec())
            .and_then(|template| template.try_pair(pair.to_vec()))
            .map_err(|reason| unreadable(reason.into()))?
            .special_tokens(vec![(token, id)])
            .build()
            .map_err(|error| unreadable(error.into()))?;
        let before = self.inner.get_post_processor().cloned();
        let steps = before.into_iter().chain([template.into()]).collect();
        self.inner.with_post_processor(Some(Sequence::new(steps)));
        Ok(())
    }

    /// Names the token that ends a text by the id of the model's config, where the tokenizer's own leaves it open.
    pub fn complete_eos(&mut self, id: Option<u32>) {
        if let Some(token) = id.and_then(|id| self.token(id)) {
            self.special.entry("eos_token".to_owned()).or_insert(token);
        }
    }

    /// Token ids of a text. Special tokens written in the text are recognised, none is added.
    ///
    /// # Errors
    /// When the pipeline fails, or a token has no embedding.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, Error> {
        let ids = self.inner.encode_fast(text, false).map_err(unencodable)?.get_ids().to_vec();
        ids.iter().try_for_each(|&id| self.check_embedded(id))?;
        Ok(ids)
    }

    /// Token ids of each piece of a text, and whether those of the text in one are others. What begins as if after a space
    /// is parted from the whole text where its tokens allow it, and a piece must not get a space that nobody wrote.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_pieces(&self, pieces: &[&str]) -> Result<(Vec<Vec<u32>>, bool), Error> {
        let whole = pieces.concat();
        if let Some(parted) = self.part(&whole, pieces)? {
            return Ok((parted, false));
        }
        let mut apart = Vec::with_capacity(pieces.len());
        for (i, piece) in pieces.iter().enumerate() {
            apart.push(if i == 0 { self.encode(piece)? } else { self.encode_further(piece)? });
        }
        let differ = pieces.len() > 1 && !self.encode(&whole)?.iter().eq(apart.iter().flatten());
        Ok((apart, differ))
    }

    /// The tokens of a text shared out to its pieces, where the tokenizer adds spaces and no token is of two pieces.
    fn part(&self, whole: &str, pieces: &[&str]) -> Result<Option<Vec<Vec<u32>>>, Error> {
        if !self.adds_space || pieces.len() < 2 {
            return Ok(None);
        }
        let encoding = self.inner.encode(whole, false).map_err(unencodable)?;
        let mut tokens = encoding.get_ids().iter().zip(encoding.get_offsets()).peekable();
        let (mut parted, mut end) = (Vec::with_capacity(pieces.len()), 0);
        for piece in pieces {
            end += piece.len();
            let mut own = Vec::new();
            while let Some((&id, &(_, last))) = tokens.next_if(|(_, (first, _))| *first < end) {
                if last > end {
                    return Ok(None);
                }
                self.check_embedded(id)?;
                own.push(id);
            }
            parted.push(own);
        }
        Ok(tokens.next().is_none().then_some(parted))
    }

    /// Tokens of what goes on with a text.
    fn encode_further(&self, text: &str) -> Result<Vec<u32>, Error> {
        /// Takes the space, and no token joins it to what follows.
        const BEFORE: &str = "\n";
        if self.adds_space {
            let (before, both) = (self.encode(BEFORE)?, self.encode(&format!("{BEFORE}{text}"))?);
            if let Some(further) = both.strip_prefix(&before[..]) {
                return Ok(further.to_vec());
            }
        }
        self.encode(text)
    }

    /// The text of token ids, with or without its special tokens.
    ///
    /// # Errors
    /// When the pipeline fails.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String, Error> {
        self.inner.decode(ids, skip_special).map_err(undecodable)
    }

    /// A decoder that takes one token at a time.
    pub fn stream(&self, skip_special: bool) -> DecodeStream<'_> {
        DecodeStream::new(self, skip_special)
    }

    /// One more than the largest id of a token that has an embedding.
    pub fn vocabulary_size(&self) -> usize {
        size(&self.inner, true).min(self.embeddings)
    }

    /// Takes the number of a model's embeddings. Added tokens may be beyond them, as when a padding token came without
    /// resizing the model: a text that has one is an error then.
    ///
    /// # Errors
    /// When one is missing for a token that was not added, or that begins or ends texts.
    pub fn fit(&mut self, embeddings: usize) -> Result<(), Error> {
        let tokens = size(&self.inner, false);
        if tokens > embeddings {
            return Err(Error::TooManyTokens { tokenizer: tokens, model: embeddings });
        }
        self.embeddings = embeddings;
        self.begin().into_iter().chain(self.eos()).try_for_each(|id| self.check_embedded(id))
    }

    fn check_embedded(&self, id: u32) -> Result<(), Error> {
        if (id as usize) < self.embeddings {
            return Ok(());
        }
        Err(Error::NoEmbedding { token: self.token(id).unwrap_or_default(), id, model: self.embeddings })
    }

    /// The id of a token.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The token of an id, as the vocabulary writes it.
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// The first id that stands for another token in `other`, of the ids that both have.
    pub fn first_difference(&self, other: &Tokenizer) -> Option<u32> {
        let both = self.vocabulary_size().min(other.vocabulary_size()) as u32;
        (0..both).find(|&id| self.token(id) != other.token(id))
    }

    /// Whether the id is a token that text only holds as a whole, such as `<|im_end|>`.
    pub fn is_special(&self, id: u32) -> bool {
        self.inner
            .get_added_vocabulary()
            .get_added_tokens_decoder()
            .get(&id)
            .is_some_and(|token| token.special)
    }

    /// The token that begins a text.
    pub fn bos(&self) -> Option<u32> {
        self.id(self.special.get(BOS)?)
    }

    /// The token that ends a text.
    pub fn eos(&self) -> Option<u32> {
        self.id(self.special.get("eos_token")?)
    }

    /// What is put before a text that does not begin with it.
    pub fn begin(&self) -> Option<u32> {
        self.bos().filter(|_| self.adds_bos)
    }

    /// Whether a text is to begin with [`Tokenizer::bos`]: the post-processor puts it there, or the configuration asks for
    /// it. A conversation begins as its template has it.
    pub fn adds_bos(&self) -> bool {
        self.adds_bos
    }

    /// The special tokens by their configuration key, such as `bos_token`.
    pub fn special(&self) -> &BTreeMap<String, String> {
        &self.special
    }

    /// The contents of `tokenizer.json`.
    ///
    /// # Errors
    /// When it cannot be written as JSON.
    pub fn to_json(&self) -> Result<Vec<u8>, Error> {
        Ok(self.inner.to_string(true).map_err(unreadable)?.into_bytes())
    }

    /// The contents of `tokenizer_config.json`.
    pub fn tokenizer_config(&self) -> Value {
        let mut config = json!({
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": false,
            "add_bos_token": self.adds_bos,
        });
        for (key, token) in &self.special {
            config[key] = json!(token);
        }
        config
    }
}

/// One more than the largest token id, with or without added tokens.
fn size(tokenizer: &tokenizers::Tokenizer, added: bool) -> usize {
    tokenizer.get_vocab(added).values().max().map_or(0, |&largest| largest as usize + 1)
}

/// Adds the whole tokens that `tokenizer_config.json` lists by id and `tokenizer.json` lacks.
fn add_listed(inner: &mut tokenizers::Tokenizer, config: Option<&Value>) -> Result<(), Error> {
    const LIST: &str = "added_tokens_decoder";
    let listed = config.and_then(|config| config.get(LIST)?.as_object());
    let mut listed: Vec<(u32, &Value)> =
        listed.into_iter().flatten().filter_map(|(id, token)| Some((id.parse().ok()?, token))).collect();
    listed.sort_by_key(|(id, _)| *id);
    for (id, token) in listed {
        let Some(content) = token["content"].as_str() else { continue };
        let known = inner.get_added_vocabulary().get_added_tokens_decoder().values();
        if known.map(|token| token.content.as_str()).any(|known| known == content) {
            continue;
        }
        let flag = |key: &str, default: bool| token[key].as_bool().unwrap_or(default);
        let special = flag("special", false);
        let token = AddedToken::from(content, special)
            .single_word(flag("single_word", false))
            .lstrip(flag("lstrip", false))
            .rstrip(flag("rstrip", false))
            .normalized(flag("normalized", !special));
        inner.add_tokens([token]).map_err(unreadable)?;
        let place = inner.token_to_id(content);
        if place != Some(id) {
            let place = place.map_or("none".to_owned(), |id| id.to_string());
            let what = format!("`{LIST}` gives `{content}` the id {id}, the vocabulary {place}");
            return Err(unreadable(what.into()));
        }
    }
    Ok(())
}

/// A special token of `tokenizer_config.json`: a string, or an object with `content`.
fn token_text(value: &Value) -> Option<&str> {
    value.as_str().or_else(|| value.get("content")?.as_str())
}

/// Refuses the steps of a pipeline, however deep, at which `tokenizers` panics or allocates without a bound.
fn check_steps(step: &Value) -> Result<(), Error> {
    let refused = match step["type"].as_str() {
        Some("Precompiled") => {
            Some("a `Precompiled` normalizer, which no model family that is read here uses")
        }
        Some("FixedLength") if step["length"].as_u64() == Some(0) => Some("`FixedLength` of 0"),
        Some("Replace" | "Split") if step["pattern"]["String"] == "" || step["pattern"]["Regex"] == "" => {
            Some("an empty pattern")
        }
        _ => None,
    };
    if let Some(what) = refused {
        return Err(unreadable(what.into()));
    }
    match step {
        Value::Object(fields) => fields.values().try_for_each(check_steps),
        Value::Array(steps) => steps.iter().try_for_each(check_steps),
        _ => Ok(()),
    }
}

fn unreadable(error: tokenizers::Error) -> Error {
    Error::Tokenizer { reason: error.to_string() }
}

fn unencodable(error: tokenizers::Error) -> Error {
    Error::Encode { reason: error.to_string() }
}

fn undecodable(error: tokenizers::Error) -> Error {
    Error::Decode { reason: error.to_string() }
}
