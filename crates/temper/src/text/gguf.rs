//! The tokenizer that a GGUF file describes: byte-level BPE by a vocabulary, merges and the name of a pre-tokenizer, or
//! SentencePiece's by a vocabulary and its scores.

use tokenizers::decoders::byte_fallback::ByteFallback;
use tokenizers::decoders::fuse::Fuse;
use tokenizers::decoders::sequence::Sequence as Decoders;
use tokenizers::decoders::strip::Strip;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::normalizers::utils::Sequence as Normalizers;
use tokenizers::normalizers::{NFC, Prepend, Replace};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, SplitDelimiterBehavior};

use super::Error;
use crate::checkpoint::GgufVocabulary;

/// `tokenizer.ggml.model` of SentencePiece's BPE.
const SENTENCEPIECE: &str = "llama";

/// How SentencePiece writes a space.
pub(super) const SPACE: &str = "▁";

/// `token_type` of text.
const NORMAL: i32 = 1;
/// `token_type` of the token for what the vocabulary lacks.
const UNKNOWN: i32 = 2;
/// `token_type` of tokens such as `<|im_end|>`, which are no text.
const CONTROL: i32 = 3;
/// `token_type` of tokens added to the vocabulary as whole words.
const USER_DEFINED: i32 = 4;

const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Whether texts begin with BOS: as the file says, or as models of its kind do.
pub(super) fn adds_bos(vocabulary: &GgufVocabulary) -> bool {
    let kind = || vocabulary.model == SENTENCEPIECE || keeps_whole_words(pre(vocabulary));
    vocabulary.add_bos.unwrap_or_else(kind)
}

pub(super) fn pipeline(vocabulary: &GgufVocabulary) -> Result<tokenizers::Tokenizer, Error> {
    let mut tokenizer = match vocabulary.model.as_str() {
        "gpt2" => byte_level(vocabulary)?,
        SENTENCEPIECE => sentencepiece(vocabulary)?,
        other => {
            return Err(Error::GgufTokenizer {
                key: "tokenizer.ggml.model",
                found: format!("`{other}`"),
                expected: "`gpt2` (byte-level BPE) or `llama` (SentencePiece)",
            });
        }
    };
    add_whole_tokens(vocabulary, &mut tokenizer)?;
    Ok(tokenizer)
}

fn byte_level(vocabulary: &GgufVocabulary) -> Result<tokenizers::Tokenizer, Error> {
    let pre = pre(vocabulary);
    let pre_tokenizer = pre_tokenizer(pre)?;
    let model = BPE::builder().vocab_and_merges(ids(vocabulary)?, merges(vocabulary)?);
    let model = model.ignore_merges(keeps_whole_words(pre)).build().map_err(broken)?;
    let mut tokenizer = tokenizers::Tokenizer::new(model);
    if pre == "qwen2" {
        tokenizer.with_normalizer(Some(NFC)).map_err(broken)?;
    }
    tokenizer.with_pre_tokenizer(Some(pre_tokenizer));
    tokenizer.with_decoder(Some(ByteLevel::default()));
    Ok(tokenizer)
}

/// Two pieces join where a piece of the vocabulary begins with the one and ends with the other, those of the highest score
/// first; what no piece has is written in bytes (Kudo & Richardson 2018, arXiv 1808.06226; as Transformers converts it).
fn sentencepiece(vocabulary: &GgufVocabulary) -> Result<tokenizers::Tokenizer, Error> {
    if vocabulary.scores.len() != vocabulary.tokens.len() {
        return Err(invalid("SentencePiece without a score for each token"));
    }
    let ids = ids(vocabulary)?;
    let merges = merges_by_score(vocabulary, &ids);
    let mut model = BPE::builder().vocab_and_merges(ids, merges).byte_fallback(true).fuse_unk(true);
    let is_unknown = |id: &usize| vocabulary.token_types.get(*id) == Some(&UNKNOWN);
    let unknown = vocabulary.unknown.map(|id| id as usize);
    let unknown = unknown.or_else(|| (0..vocabulary.tokens.len()).find(is_unknown));
    if let Some(token) = unknown.and_then(|id| vocabulary.tokens.get(id)) {
        model = model.unk_token(token.clone());
    }
    let mut tokenizer = tokenizers::Tokenizer::new(model.build().map_err(broken)?);
    let prefix = vocabulary.add_space_prefix.unwrap_or(true);
    let spaces = Replace::new(" ", SPACE).map_err(broken)?;
    let before = prefix.then(|| Prepend::new(SPACE.to_owned()).into());
    tokenizer
        .with_normalizer(Some(Normalizers::new(before.into_iter().chain([spaces.into()]).collect())))
        .map_err(broken)?;
    let spaces = Replace::new(SPACE, " ").map_err(broken)?;
    let mut decoders = vec![spaces.into(), ByteFallback::new().into(), Fuse::new().into()];
    if prefix {
        decoders.push(Strip::new(' ', 1, 0).into());
    }
    tokenizer.with_decoder(Some(Decoders::new(decoders)));
    Ok(tokenizer)
}

/// All ways to join two pieces to a third, the best score first.
fn merges_by_score(vocabulary: &GgufVocabulary, ids: &Vocab) -> Vec<(String, String)> {
    let types = &vocabulary.token_types;
    let is_text = |id: &usize| types.get(*id).is_none_or(|kind| [NORMAL, USER_DEFINED].contains(kind));
    let mut found = Vec::new();
    for id in (0..vocabulary.tokens.len()).filter(is_text) {
        let token = &vocabulary.tokens[id];
        for (at, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(at);
            if let (Some(&l), Some(&r)) = (ids.get(left), ids.get(right)) {
                found.push((vocabulary.scores[id], l, r, left, right));
            }
        }
    }
    found.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2))));
    found.into_iter().map(|(.., left, right)| (left.to_owned(), right.to_owned())).collect()
}

/// The name of the pre-tokenizer, empty where there is none.
fn pre(vocabulary: &GgufVocabulary) -> &str {
    vocabulary.pre.as_deref().unwrap_or_default()
}

/// Whether a word of the vocabulary is one token even where no merges lead to it: made for tiktoken, which looks there
/// first.
fn keeps_whole_words(pre: &str) -> bool {
    matches!(pre, "llama-bpe" | "llama3" | "llama-v3" | "tekken")
}

/// The pre-tokenizers as the models' own `tokenizer.json` have them; names that mean the same as in llama.cpp.
fn pre_tokenizer(name: &str) -> Result<PreTokenizerWrapper, Error> {
    let bytes = ByteLevel::new(false, false, true);
    let split = |pattern: &str| -> Result<PreTokenizerWrapper, Error> {
        let pattern = SplitPattern::Regex(pattern.to_owned());
        let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false).map_err(broken)?;
        Ok(Sequence::new(vec![split.into(), bytes.use_regex(false).into()]).into())
    };
    match name {
        "gpt-2" => Ok(bytes.into()),
        "smollm" => Ok(Sequence::new(vec![Digits::new(true).into(), bytes.into()]).into()),
        "llama-bpe" | "llama3" | "llama-v3" | "smaug-bpe" => split(LLAMA3),
        "qwen2" | "deepseek-r1-qwen" => split(QWEN2),
        "tekken" => split(TEKKEN),
        _ => Err(Error::GgufTokenizer {
            key: "tokenizer.ggml.pre",
            found: if name.is_empty() { "nothing".into() } else { format!("`{name}`") },
            expected: "`gpt-2`, `smollm`, `llama-bpe`, `smaug-bpe`, `qwen2`, `deepseek-r1-qwen` or `tekken`",
        }),
    }
}

fn ids(vocabulary: &GgufVocabulary) -> Result<Vocab, Error> {
    let mut ids = Vocab::with_capacity(vocabulary.tokens.len());
    for (id, token) in vocabulary.tokens.iter().enumerate() {
        let id = u32::try_from(id).map_err(|_| invalid("more tokens than ids"))?;
        if ids.insert(token.clone(), id).is_some() {
            return Err(invalid(format!("token `{}` occurs twice", token.escape_debug())));
        }
    }
    Ok(ids)
}

fn merges(vocabulary: &GgufVocabulary) -> Result<Vec<(String, String)>, Error> {
    let mut merges = Vec::with_capacity(vocabulary.merges.len());
    for (index, merge) in vocabulary.merges.iter().enumerate() {
        let Some((left, right)) = merge.split_once(' ') else {
            return Err(invalid(format!("merge {index} has no space between its two tokens")));
        };
        merges.push((left.to_owned(), right.to_owned()));
    }
    Ok(merges)
}

fn add_whole_tokens(vocabulary: &GgufVocabulary, tokenizer: &mut tokenizers::Tokenizer) -> Result<(), Error> {
    let types = &vocabulary.token_types;
    if !types.is_empty() && types.len() != vocabulary.tokens.len() {
        let reason = format!("{} tokens but {} token types", vocabulary.tokens.len(), types.len());
        return Err(invalid(reason));
    }
    let whole = vocabulary.tokens.iter().zip(types).filter_map(|(token, &kind)| {
        let special = kind == CONTROL || kind == UNKNOWN;
        (special || kind == USER_DEFINED).then(|| AddedToken::from(token.clone(), special).normalized(false))
    });
    tokenizer.add_tokens(whole.collect::<Vec<_>>()).map_err(broken)?;
    Ok(())
}

fn invalid(reason: impl Into<String>) -> Error {
    Error::GgufVocabulary { reason: reason.into() }
}

fn broken(error: tokenizers::Error) -> Error {
    invalid(error.to_string())
}

#[cfg(test)]
mod tests {
    use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer};

    use super::pre_tokenizer;

    /// The pieces are those of the models' own patterns, found with Python's `regex` and, for `smollm`, `tokenizers`.
    #[test]
    fn texts_are_split_as_the_models_split_them() {
        let text = "I'M fooBar,  of 2024:\n/";
        for (name, pieces) in [
            ("gpt-2", "I|'|M| fooBar|,| | of| 2024|:|\n|/"),
            ("smollm", "I|'|M| fooBar|,| | of| |2|0|2|4|:|\n|/"),
            ("llama-bpe", "I|'M| fooBar|,| | of| |202|4|:\n|/"),
            ("qwen2", "I|'M| fooBar|,| | of| |2|0|2|4|:\n|/"),
            ("tekken", "I|'M| foo|Bar|,| | of| |2|0|2|4|:\n/"),
        ] {
            let mut split = PreTokenizedString::from(text);
            pre_tokenizer(name).unwrap().pre_tokenize(&mut split).unwrap();
            let offsets = split.get_splits(OffsetReferential::Original, OffsetType::Byte);
            let found: Vec<&str> =
                offsets.into_iter().map(|(_, (start, end), _)| &text[start..end]).collect();
            assert_eq!(found.join("|"), pieces, "{name}");
        }
    }
}
