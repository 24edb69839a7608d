//! The tokenizer that a GGUF file describes by a vocabulary, merges and the name of a pre-tokenizer.

use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::normalizers::NFC;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, SplitDelimiterBehavior};

use super::Error;
use crate::checkpoint::GgufVocabulary;

/// The pre-tokenizer of Llama 3, whose models have their habits even where the file does not say so.
pub(super) const LLAMA3_NAME: &str = "llama-bpe";

/// `token_type` of tokens such as `<|im_end|>`, which are no text.
const CONTROL: i32 = 3;
/// `token_type` of tokens added to the vocabulary as whole words.
const USER_DEFINED: i32 = 4;

const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

pub(super) fn pipeline(vocabulary: &GgufVocabulary) -> Result<tokenizers::Tokenizer, Error> {
    if vocabulary.model != "gpt2" {
        let (key, found) = ("tokenizer.ggml.model", vocabulary.model.clone());
        return Err(Error::GgufTokenizer { key, found, expected: "`gpt2` (byte-level BPE)" });
    }
    let pre = vocabulary.pre.as_deref().unwrap_or("none");
    let pre_tokenizer = pre_tokenizer(pre)?;
    let mut tokenizer = tokenizers::Tokenizer::new(byte_pairs(vocabulary, pre == LLAMA3_NAME)?);
    if pre == "qwen2" {
        tokenizer.with_normalizer(Some(NFC)).map_err(broken)?;
    }
    tokenizer.with_pre_tokenizer(Some(pre_tokenizer));
    tokenizer.with_decoder(Some(ByteLevel::default()));
    add_whole_tokens(vocabulary, &mut tokenizer)?;
    Ok(tokenizer)
}

/// The pre-tokenizers as the models' own `tokenizer.json` have them.
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
        LLAMA3_NAME => split(LLAMA3),
        "qwen2" => split(QWEN2),
        _ => Err(Error::GgufTokenizer {
            key: "tokenizer.ggml.pre",
            found: name.to_owned(),
            expected: "`gpt-2`, `smollm`, `llama-bpe` or `qwen2`",
        }),
    }
}

fn byte_pairs(vocabulary: &GgufVocabulary, ignore_merges: bool) -> Result<BPE, Error> {
    let mut ids = Vocab::with_capacity(vocabulary.tokens.len());
    for (id, token) in vocabulary.tokens.iter().enumerate() {
        let id = u32::try_from(id).map_err(|_| invalid("more tokens than ids"))?;
        if ids.insert(token.clone(), id).is_some() {
            return Err(invalid(format!("token `{}` occurs twice", token.escape_debug())));
        }
    }
    let mut merges = Vec::with_capacity(vocabulary.merges.len());
    for (index, merge) in vocabulary.merges.iter().enumerate() {
        let Some((left, right)) = merge.split_once(' ') else {
            return Err(invalid(format!("merge {index} has no space between its two tokens")));
        };
        merges.push((left.to_owned(), right.to_owned()));
    }
    BPE::builder().vocab_and_merges(ids, merges).ignore_merges(ignore_merges).build().map_err(broken)
}

fn add_whole_tokens(vocabulary: &GgufVocabulary, tokenizer: &mut tokenizers::Tokenizer) -> Result<(), Error> {
    let types = &vocabulary.token_types;
    if !types.is_empty() && types.len() != vocabulary.tokens.len() {
        let reason = format!("{} tokens but {} token types", vocabulary.tokens.len(), types.len());
        return Err(invalid(reason));
    }
    let whole = vocabulary.tokens.iter().zip(types).filter_map(|(token, &kind)| {
        let special = kind == CONTROL;
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
