//! The tokenizer of the quickstart's world: byte-level BPE, trained on its texts.

use anyhow::anyhow;
use chrono::DateTime;
use serde_json::{Value, json};
use temper::model::Config;
use temper::text::{ChatTemplate, Processor, Tokenizer};
use tokenizers::models::bpe::{BPE, BpeTrainerBuilder};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, NormalizerWrapper, PostProcessorWrapper, TokenizerBuilder};

/// Ends every text.
const END: &str = "<|endoftext|>";
/// Writes conversations as the transcripts that the model learns.
const TEMPLATE: &str = "\
{% for message in messages %}\
{% if message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] + eos_token }}\
{% else %}{{ 'Human: ' + message['content'] + '\\n\\n' }}{% endif %}\
{% endfor %}\
{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}";

/// Trains a tokenizer on texts. Every word of the world becomes one token; what is not in the world is
/// spelled in bytes, so that a chat can say anything.
pub fn learn(texts: &[String]) -> anyhow::Result<Processor> {
    let fail = |error: tokenizers::Error| anyhow!("the tokenizer cannot be trained: {error}");
    let mut trainer = BpeTrainerBuilder::new()
        .show_progress(false)
        .vocab_size(4096)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .special_tokens(vec![AddedToken::from(END, true)])
        .build();
    let byte_level = ByteLevel::default().add_prefix_space(false);
    let mut bpe =
        TokenizerBuilder::<BPE, NormalizerWrapper, ByteLevel, PostProcessorWrapper, ByteLevel>::new()
            .with_model(BPE::default())
            .with_pre_tokenizer(Some(byte_level))
            .with_decoder(Some(byte_level))
            .build()
            .map_err(fail)?;
    let json = bpe.train(&mut trainer, texts.iter()).and_then(|bpe| bpe.to_string(false)).map_err(fail)?;
    let config = json!({ "eos_token": END, "bos_token": END, "add_bos_token": false });
    let tokenizer = Tokenizer::from_json(json.as_bytes(), Some(&config))?;
    let template = ChatTemplate::new(TEMPLATE, &tokenizer, DateTime::UNIX_EPOCH)?;
    let stop = tokenizer.eos().into_iter().collect();
    Ok(Processor { tokenizer, template: Some(template), stop })
}

/// A small GPT-2 for this tokenizer, and its `config.json`.
pub fn small_gpt2(tokenizer: &Tokenizer, context: usize) -> anyhow::Result<(Config, Value)> {
    let json = json!({
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": tokenizer.vocabulary_size(),
        "n_positions": context,
        "n_embd": 64,
        "n_layer": 3,
        "n_head": 4,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "bos_token_id": tokenizer.eos(),
        "eos_token_id": tokenizer.eos(),
    });
    Ok((Config::from_json(&json)?, json))
}
