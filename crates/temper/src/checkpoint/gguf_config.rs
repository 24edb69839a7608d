//! GGUF metadata, translated: the model's keys into those of `config.json`, the tokenizer's into a
//! [`GgufVocabulary`].

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Value as Json, json};

use super::error::printable;
use super::gguf::{Entry, Value};
use super::rope_factors;
use super::{Error, GgufVocabulary};

/// No dimension of a model may exceed this; products of two then fit in 64 bits.
const LARGEST: u64 = 1 << 24;

/// The architectures whose names and keys temper knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Architecture {
    /// Also Mistral.
    Llama,
    Qwen2,
    Qwen3,
    SmolLm3,
    Gemma3,
    Gpt2,
}

impl Architecture {
    /// Takes `general.architecture`.
    pub fn take(keys: &mut Keys) -> Result<Architecture, Error> {
        use Architecture::{Gemma3, Gpt2, Llama, Qwen2, Qwen3, SmolLm3};
        let all = [Llama, Qwen2, Qwen3, SmolLm3, Gemma3, Gpt2];
        let key = "general.architecture";
        let Some(name) = keys.string(key)? else {
            return Err(keys.missing(key, "a string"));
        };
        all.into_iter().find(|architecture| architecture.name() == name).ok_or_else(|| {
            let names = all.map(|architecture| format!("`{}`", architecture.name()));
            keys.wrong(key, &format!("one of {}", names.join(", ")), &Value::String(name))
        })
    }

    /// As GGUF spells it.
    pub fn name(self) -> &'static str {
        match self {
            Architecture::Llama => "llama",
            Architecture::Qwen2 => "qwen2",
            Architecture::Qwen3 => "qwen3",
            Architecture::SmolLm3 => "smollm3",
            Architecture::Gemma3 => "gemma3",
            Architecture::Gpt2 => "gpt2",
        }
    }
}

/// Metadata that is taken key by key, so that what is left over was not understood.
pub(super) struct Keys<'a> {
    path: &'a Path,
    values: BTreeMap<String, Value>,
}

impl<'a> Keys<'a> {
    pub fn new(path: &'a Path, values: BTreeMap<String, Value>) -> Keys<'a> {
        Keys { path, values }
    }

    fn wrong(&self, key: &str, expected: &str, found: &Value) -> Error {
        self.error(key, expected, found.describe())
    }

    fn missing(&self, key: &str, expected: &str) -> Error {
        self.error(key, expected, "no such key".into())
    }

    fn error(&self, key: &str, expected: &str, found: String) -> Error {
        Error::Metadata { path: self.path.to_owned(), key: printable(key), expected: expected.into(), found }
    }

    fn integer(&mut self, key: &str) -> Result<Option<u64>, Error> {
        match self.values.remove(key) {
            None => Ok(None),
            Some(Value::Integer(number)) if u64::try_from(number).is_ok() => Ok(Some(number as u64)),
            Some(other) => Err(self.wrong(key, "an integer of at least 0", &other)),
        }
    }

    /// A dimension.
    fn size(&mut self, key: &str) -> Result<Option<u64>, Error> {
        match self.integer(key)? {
            Some(size) if !(1..=LARGEST).contains(&size) => {
                Err(self.error(key, &format!("an integer from 1 to {LARGEST}"), format!("`{size}`")))
            }
            size => Ok(size),
        }
    }

    fn required_size(&mut self, key: &str) -> Result<u64, Error> {
        self.size(key)?.ok_or_else(|| self.missing(key, "a positive integer"))
    }

    /// The id of one of `count` tokens.
    fn token(&mut self, key: &str, count: usize) -> Result<Option<u32>, Error> {
        match self.values.remove(key) {
            // -1 is llama.cpp's way to say that there is none, also in the 32 bits without sign of these keys.
            None | Some(Value::Integer(-1 | 0xffff_ffff)) => Ok(None),
            Some(Value::Integer(id)) if (0..count as i128).contains(&id) => Ok(Some(id as u32)),
            Some(other) => Err(self.wrong(key, &format!("the id of one of {count} tokens"), &other)),
        }
    }

    fn float(&mut self, key: &str) -> Result<Option<f64>, Error> {
        match self.values.remove(key) {
            None => Ok(None),
            Some(Value::Float(number)) if number.is_finite() => Ok(Some(number)),
            Some(other) => Err(self.wrong(key, "a finite number", &other)),
        }
    }

    fn boolean(&mut self, key: &str) -> Result<Option<bool>, Error> {
        match self.values.remove(key) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(value)),
            Some(other) => Err(self.wrong(key, "true or false", &other)),
        }
    }

    fn string(&mut self, key: &str) -> Result<Option<String>, Error> {
        match self.values.remove(key) {
            None => Ok(None),
            Some(Value::String(value)) => Ok(Some(value)),
            Some(other) => Err(self.wrong(key, "a string", &other)),
        }
    }

    /// An array whose elements all pass `element`; empty when there is none.
    fn array<T>(
        &mut self,
        key: &str,
        expected: &str,
        element: impl Fn(Value) -> Result<T, Value>,
    ) -> Result<Vec<T>, Error> {
        let values = match self.values.remove(key) {
            None => return Ok(Vec::new()),
            Some(Value::Array(values)) => values,
            Some(other) => return Err(self.wrong(key, expected, &other)),
        };
        let values: Result<_, Value> = values.into_iter().map(element).collect();
        values.map_err(|found| self.error(key, expected, format!("{} in it", found.describe())))
    }

    fn strings(&mut self, key: &str) -> Result<Vec<String>, Error> {
        self.array(key, "an array of strings", |value| match value {
            Value::String(text) => Ok(text),
            other => Err(other),
        })
    }

    /// Takes a key that may only have one value, or be absent.
    fn only(&mut self, key: &str, accepted: &[Value]) -> Result<(), Error> {
        match self.values.remove(key) {
            Some(found) if !accepted.contains(&found) => {
                Err(self.wrong(key, &accepted[0].describe(), &found))
            }
            _ => Ok(()),
        }
    }

    /// Refuses what is left of the architecture's own keys.
    fn finish(&self, architecture: &str) -> Result<(), Error> {
        let own = |key: &&String| key.split('.').next() == Some(architecture);
        match self.values.iter().find(|(key, _)| own(key)) {
            Some((key, value)) => Err(self.wrong(key, "no such key, because temper does not know it", value)),
            None => Ok(()),
        }
    }
}

/// `config.json`, an object with all keys but the tokens and the tying of the head. `factors` are Llama 3's.
pub(super) fn config(
    keys: &mut Keys,
    architecture: Architecture,
    entries: &[Entry],
    factors: Option<&[f32]>,
) -> Result<Json, Error> {
    let name = architecture.name();
    // What llama.cpp has merged says 0.
    keys.only("split.count", &[1, 0].map(Value::Integer))?;
    keys.only(&format!("{name}.attention.causal"), &[Value::Bool(true)])?;
    keys.only(&format!("{name}.expert_count"), &[Value::Integer(0)])?;
    let Some(embedding) = entries.iter().find(|entry| entry.name == "token_embd.weight") else {
        return Err(Error::MissingTensor { path: keys.path.to_owned(), tensor: "token_embd.weight".into() });
    };
    // The key counts tokens; the embedding may have rows beyond them.
    keys.integer(&format!("{name}.vocab_size"))?;
    let vocabulary = embedding.shape[0];
    let config = match architecture {
        Architecture::Gpt2 => gpt2(keys, vocabulary)?,
        _ => llama(keys, architecture, vocabulary, entries, factors)?,
    };
    keys.finish(name)?;
    Ok(config)
}

fn gpt2(keys: &mut Keys, vocabulary: usize) -> Result<Json, Error> {
    Ok(json!({
        "model_type": "gpt2",
        "vocab_size": vocabulary,
        "n_positions": keys.required_size("gpt2.context_length")?,
        "n_embd": keys.required_size("gpt2.embedding_length")?,
        "n_layer": keys.required_size("gpt2.block_count")?,
        "n_head": keys.required_size("gpt2.attention.head_count")?,
        "n_inner": keys.required_size("gpt2.feed_forward_length")?,
        "layer_norm_epsilon": keys.float("gpt2.attention.layer_norm_epsilon")?.unwrap_or(1e-5),
        "activation_function": "gelu_new",
    }))
}

fn llama(
    keys: &mut Keys,
    architecture: Architecture,
    vocabulary: usize,
    entries: &[Entry],
    factors: Option<&[f32]>,
) -> Result<Json, Error> {
    let name = architecture.name();
    let key = |rest: &str| format!("{name}.{rest}");
    let width = keys.required_size(&key("embedding_length"))?;
    let heads = keys.required_size(&key("attention.head_count"))?;
    let head_width = keys.size(&key("attention.key_length"))?.unwrap_or(width / heads);
    // Values as wide as keys, all of a head rotated.
    keys.only(&key("attention.value_length"), &[Value::Integer(head_width.into())])?;
    keys.only(&key("rope.dimension_count"), &[Value::Integer(head_width.into())])?;
    // Says how the file was made, not how to read it.
    keys.string(&key("tensor_data_layout"))?;
    let mut config = json!({
        "model_type": name,
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": keys.required_size(&key("feed_forward_length"))?,
        "num_hidden_layers": keys.required_size(&key("block_count"))?,
        "num_attention_heads": heads,
        "num_key_value_heads": keys.size(&key("attention.head_count_kv"))?.unwrap_or(heads),
        "head_dim": head_width,
        "hidden_act": "silu",
        "max_position_embeddings": keys.required_size(&key("context_length"))?,
        "rms_norm_eps": keys.float(&key("attention.layer_norm_rms_epsilon"))?.unwrap_or(1e-6),
        "rope_parameters": rope(keys, name, head_width, factors)?,
    });
    let has = |tensor: &str| entries.iter().any(|entry| entry.name == tensor);
    match architecture {
        Architecture::Llama | Architecture::SmolLm3 => {
            config["attention_bias"] = has("blk.0.attn_output.bias").into();
            config["mlp_bias"] = has("blk.0.ffn_down.bias").into();
            if architecture == Architecture::SmolLm3 {
                // The file does not say it.
                config["no_rope_layer_interval"] = 4.into();
            } else if let Some(window) = keys.integer(&key("attention.sliding_window"))? {
                config["model_type"] = "mistral".into();
                config["sliding_window"] = window.into();
            }
        }
        Architecture::Qwen3 => config["attention_bias"] = has("blk.0.attn_output.bias").into(),
        Architecture::Gemma3 => gemma3(keys, &mut config)?,
        Architecture::Qwen2 | Architecture::Gpt2 => {}
    }
    Ok(config)
}

/// What Gemma 3's file says otherwise, and what it leaves to llama.cpp's code.
fn gemma3(keys: &mut Keys, config: &mut Json) -> Result<(), Error> {
    // The largest of them divides scores by the root of another number than a head's width.
    if config["num_hidden_layers"] == 62 {
        return Err(keys.error("gemma3.block_count", "fewer layers, as in Gemma 3 up to 12B", "`62`".into()));
    }
    let window = keys.size("gemma3.attention.sliding_window")?;
    let pattern = keys.size("gemma3.attention.sliding_window_pattern")?;
    let pattern = pattern.unwrap_or(if window.is_some() { 6 } else { 1 });
    let local_theta = keys.float("gemma3.rope.freq_base_swa")?.unwrap_or(10_000.0);
    config["model_type"] = "gemma3_text".into();
    config["sliding_window"] = window.into();
    config["sliding_window_pattern"] = pattern.into();
    config["rope_parameters"] = json!({
        "full_attention": config["rope_parameters"],
        "sliding_attention": { "rope_type": "default", "rope_theta": local_theta },
    });
    config["query_pre_attn_scalar"] = config["head_dim"].clone();
    config["hidden_activation"] = "gelu_pytorch_tanh".into();
    config.as_object_mut().and_then(|config| config.shift_remove("hidden_act"));
    Ok(())
}

/// The new form of `config.json`: `{ rope_theta, rope_type, … }`.
fn rope(keys: &mut Keys, name: &str, head_width: u64, factors: Option<&[f32]>) -> Result<Json, Error> {
    let key = |rest: &str| format!("{name}.rope.{rest}");
    let theta = keys.float(&key("freq_base"))?.unwrap_or(10_000.0);
    let kind = keys.string(&key("scaling.type"))?;
    let factor = keys.float(&key("scaling.factor"))?.filter(|&factor| factor != 0.0);
    // Only scalings that are refused below use these two.
    keys.integer(&key("scaling.original_context_length"))?;
    keys.boolean(&key("scaling.finetuned"))?;
    // llama.cpp takes a factor without a type for a linear one.
    let factor = match kind.as_deref() {
        None => factor,
        Some("none") => None,
        Some("linear") => match factor {
            None => return Err(keys.missing(&key("scaling.factor"), "the factor of the scaling")),
            factor => factor,
        },
        Some(other) => {
            let found = Value::String(other.to_owned());
            return Err(keys.wrong(&key("scaling.type"), "`none` or `linear`", &found));
        }
    };
    let mut rope = match (factor, factors) {
        (None, None) => json!({ "rope_type": "default" }),
        (Some(factor), None) => json!({ "rope_type": "linear", "factor": factor }),
        (None, Some(factors)) => llama3(keys.path, head_width, theta, factors)?,
        (Some(_), Some(_)) => {
            let expected = "no such tensor beside `rope.scaling.factor`";
            return Err(Error::tensor(keys.path, "rope_freqs.weight", expected, "both"));
        }
    };
    rope["rope_theta"] = theta.into();
    Ok(rope)
}

/// Llama 3's scaling, from its factors.
fn llama3(path: &Path, head_width: u64, theta: f64, factors: &[f32]) -> Result<Json, Error> {
    let wrong = |expected: &str, found: String| Error::tensor(path, "rope_freqs.weight", expected, found);
    let count = head_width / 2;
    if factors.len() as u64 != count {
        return Err(wrong(&format!("{count} factors"), factors.len().to_string()));
    }
    rope_factors::recover(factors, theta)
        .ok_or_else(|| wrong("the factors of Llama 3's formula", "others".into()))
}

/// The tokenizer, or none when the file has none. Its tokens must have rows in the embedding.
pub(super) fn vocabulary(keys: &mut Keys, config: &Json) -> Result<Option<GgufVocabulary>, Error> {
    let model = keys.string("tokenizer.ggml.model")?;
    let Some(model) = model.filter(|model| !matches!(model.as_str(), "none" | "no_vocab")) else {
        return Ok(None);
    };
    let tokens = keys.strings("tokenizer.ggml.tokens")?;
    let (count, rows) = (tokens.len(), config["vocab_size"].as_u64().unwrap_or(0));
    if count == 0 || count as u64 > rows {
        let expected = format!("1 to {rows} tokens, as the embedding has rows");
        return Err(keys.error("tokenizer.ggml.tokens", &expected, count.to_string()));
    }
    let token_types =
        keys.array("tokenizer.ggml.token_type", "an array of type numbers", |value| match value {
            Value::Integer(number) => i32::try_from(number).map_err(|_| value),
            other => Err(other),
        })?;
    let scores = keys.array("tokenizer.ggml.scores", "an array of numbers", |value| match value {
        Value::Float(number) => Ok(number as f32),
        other => Err(other),
    })?;
    for (key, length) in [("token_type", token_types.len()), ("scores", scores.len())] {
        if length != 0 && length != count {
            let expected = format!("one value for each of {count} tokens");
            return Err(keys.error(&format!("tokenizer.ggml.{key}"), &expected, format!("{length} values")));
        }
    }
    Ok(Some(GgufVocabulary {
        model,
        pre: keys.string("tokenizer.ggml.pre")?,
        tokens,
        token_types,
        scores,
        merges: keys.strings("tokenizer.ggml.merges")?,
        bos: keys.token("tokenizer.ggml.bos_token_id", count)?,
        eos: keys.token("tokenizer.ggml.eos_token_id", count)?,
        eot: keys.token("tokenizer.ggml.eot_token_id", count)?,
        unknown: keys.token("tokenizer.ggml.unknown_token_id", count)?,
        padding: keys.token("tokenizer.ggml.padding_token_id", count)?,
        add_bos: keys.boolean("tokenizer.ggml.add_bos_token")?,
        add_space_prefix: keys.boolean("tokenizer.ggml.add_space_prefix")?,
        chat_template: keys.string("tokenizer.chat_template")?,
    }))
}

impl GgufVocabulary {
    /// Puts the special tokens into `config`; gives the generation config, in which the end of a turn also
    /// ends an answer.
    pub(super) fn describe_ends(&self, config: &mut Json) -> Json {
        config["bos_token_id"] = self.bos.into();
        config["eos_token_id"] = self.eos.into();
        config["pad_token_id"] = self.padding.into();
        let mut ends: Vec<u32> = self.eos.into_iter().chain(self.eot).collect();
        ends.dedup();
        json!({ "bos_token_id": self.bos, "eos_token_id": ends, "pad_token_id": self.padding })
    }
}
