//! What a decoder looks like, from `config.json` and back.
//!
//! Defaults are those of Transformers' configuration classes. Every key is read, known to be harmless, or
//! refused: a key that is overlooked would give a model that computes something else.

use serde_json::{Map, Value, json};

use super::Error;
use super::keys::Keys;
use super::layers::{self, Layer};
use super::rotary::Rotary;

/// The model families temper knows; they share one decoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// GPT-2: LayerNorm, learned positions, biases everywhere, GELU.
    Gpt2,
    /// Llama 2 and 3, SmolLM2.
    Llama,
    /// Llama with a sliding window.
    Mistral,
    /// Llama with biases on q, k and v.
    Qwen2,
    /// Llama with norms on q and k.
    Qwen3,
    /// Llama with layers that do not know positions, every fourth in the published ones.
    SmolLm3,
    /// Gemma 3 without its eyes: norms around both branches, GELU gates, windows in most layers.
    Gemma3,
}

/// Dropout probabilities. A run has its own: those of a checkpoint's config are read and not used.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Dropout {
    /// On the sum of embeddings.
    pub embedding: f64,
    /// On attention probabilities.
    pub attention: f64,
    /// On each branch before it is added to the residual stream.
    pub residual: f64,
}

/// A decoder's dimensions and choices. All sizes are at least 1 and checked to fit together.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// The family, which decides the names of tensors.
    pub family: Family,
    /// Rows of the embedding.
    pub vocabulary: usize,
    /// Width of the residual stream.
    pub width: usize,
    /// The blocks.
    pub layers: Vec<Layer>,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of one head; even when positions are rotary.
    pub head_width: usize,
    /// Inner width of the MLP.
    pub mlp_width: usize,
    /// Longest sequence the model was made for.
    pub context: usize,
    /// Added to the variance in norms.
    pub norm_epsilon: f64,
    /// What embeddings of tokens are multiplied with.
    pub embedding_scale: f64,
    /// Biases on q, k, v.
    pub qkv_bias: bool,
    /// Bias on the attention's output projection.
    pub output_bias: bool,
    /// Biases in the MLP.
    pub mlp_bias: bool,
    /// RMSNorm on each head of q and k (Qwen3, Gemma 3).
    pub qk_norm: bool,
    /// The head's weight is the embedding.
    pub tied: bool,
    /// Standard deviation of fresh matrices.
    pub initializer_range: f64,
    /// Dropout of the checkpoint.
    pub dropout: Dropout,
    /// Token that begins a text.
    pub bos: Option<u32>,
    /// Tokens that end an answer.
    pub eos: Vec<u32>,
}

/// Keys that say nothing about what a causal model computes when it is trained or scored: history, other
/// tasks' settings, and defaults of text generation from the time before `generation_config.json`.
const HARMLESS: &[&str] = &[
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_name_or_path",
    "_num_labels",
    "architectures",
    "bad_words_ids",
    "begin_suppress_tokens",
    "cache_implementation",
    "decoder_start_token_id",
    "diversity_penalty",
    "do_sample",
    "dtype",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty",
    "finetuning_task",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "gradient_checkpointing",
    "id2label",
    "is_decoder",
    "is_llama_config",
    "label2id",
    "length_penalty",
    "max_length",
    "max_sequence_length",
    "min_length",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "output_attentions",
    "output_hidden_states",
    "output_past",
    "output_scores",
    "pad_token_id",
    "prefix",
    "pretraining_tp",
    "problem_type",
    "remove_invalid_values",
    "repetition_penalty",
    "return_dict",
    "return_dict_in_generate",
    "sep_token_id",
    "suppress_tokens",
    "task_specific_params",
    "temperature",
    "tf_legacy_loss",
    "tokenizer_class",
    "top_k",
    "top_p",
    "torch_dtype",
    "torchscript",
    "transformers.js_config",
    "transformers_version",
    "typical_p",
    "unk_token_id",
    "unsloth_fixed",
    "unsloth_version",
    "use_bfloat16",
    "use_cache",
];

/// Whether `key` may be overlooked in any family's config.
fn is_harmless(key: &str) -> bool {
    HARMLESS.contains(&key) || key.starts_with("summary_")
}

impl Family {
    /// `model_type` and `architectures` of Transformers.
    fn names(self) -> (&'static str, &'static str) {
        match self {
            Family::Gpt2 => ("gpt2", "GPT2LMHeadModel"),
            Family::Llama => ("llama", "LlamaForCausalLM"),
            Family::Mistral => ("mistral", "MistralForCausalLM"),
            Family::Qwen2 => ("qwen2", "Qwen2ForCausalLM"),
            Family::Qwen3 => ("qwen3", "Qwen3ForCausalLM"),
            Family::SmolLm3 => ("smollm3", "SmolLM3ForCausalLM"),
            Family::Gemma3 => ("gemma3_text", "Gemma3ForCausalLM"),
        }
    }
}

impl Config {
    /// Reads Hugging Face's `config.json`.
    ///
    /// # Errors
    /// Names the key that is missing, impossible, unknown, or asks for something temper does not compute.
    pub fn from_json(json: &Value) -> Result<Config, Error> {
        let Some(object) = json.as_object() else {
            let (key, found) = ("config.json".into(), "another JSON value".into());
            return Err(Error::Config { key, expected: "an object".into(), found });
        };
        let keys = Keys::new(object, "");
        use Family::{Gemma3, Gpt2, Llama, Mistral, Qwen2, Qwen3, SmolLm3};
        let families = [Gpt2, Llama, Mistral, Qwen2, Qwen3, SmolLm3, Gemma3];
        let model_type = keys.string("model_type")?;
        let Some(family) = families.into_iter().find(|family| Some(family.names().0) == model_type) else {
            let names: Vec<String> = families.map(|family| format!("`{}`", family.names().0)).into();
            return Err(keys.wrong("model_type", format!("one of {}", names.join(", "))));
        };
        common(&keys)?;
        let config = if family == Family::Gpt2 { gpt2(&keys)? } else { llama(&keys, family)? };
        keys.finish(|key, _| is_harmless(key))?;
        config.check(&keys)?;
        Ok(config)
    }

    /// The `config.json` to save: `original` with the forms that Transformers 5 writes, for f32 weights.
    pub fn to_json(&self, original: &Value) -> Value {
        let mut saved = original.as_object().cloned().unwrap_or_default();
        for old in ["torch_dtype", "rope_theta", "rope_scaling", "rope_local_base_freq"] {
            saved.shift_remove(old);
        }
        let (model_type, architecture) = self.family.names();
        saved.insert("model_type".into(), model_type.into());
        saved.insert("architectures".into(), json!([architecture]));
        saved.insert("dtype".into(), "float32".into());
        saved.insert("tie_word_embeddings".into(), self.tied.into());
        if let Some(rope) = self.rope_parameters() {
            saved.insert("rope_parameters".into(), rope);
        }
        saved.into()
    }

    /// One object, or one for each kind of layer.
    fn rope_parameters(&self) -> Option<Value> {
        if self.family != Family::Gemma3 {
            return self.layers.iter().find_map(|layer| layer.rotary).map(Rotary::to_json);
        }
        let of_layer = |layer: &Layer| Some((layer.kind().to_owned(), layer.rotary?.to_json()));
        Some(self.layers.iter().filter_map(of_layer).collect::<Map<_, _>>().into())
    }

    /// Checks that the dimensions fit together and that the parameters can be counted.
    fn check(&self, keys: &Keys) -> Result<(), Error> {
        let heads_key = if self.is_gpt2() { "n_head" } else { "num_attention_heads" };
        if !self.heads.is_multiple_of(self.kv_heads) {
            let expected = format!("a divisor of the {} heads", self.heads);
            return Err(keys.wrong("num_key_value_heads", expected));
        }
        if !self.is_gpt2() && !self.head_width.is_multiple_of(2) {
            let found = self.head_width.to_string();
            return Err(Error::Config { key: "head_dim".into(), expected: "an even number".into(), found });
        }
        // Each factor is at most 2^24, so u128 holds every product and the sum.
        let [vocabulary, width, layers, mlp, context, qkv, attention] = [
            self.vocabulary,
            self.width,
            self.layers.len(),
            self.mlp_width,
            self.context,
            self.heads + 2 * self.kv_heads,
            self.heads * self.head_width,
        ]
        .map(|size| size as u128);
        let qkv = qkv * self.head_width as u128;
        // Generous: biases and norms count as 16 vectors of the widest kind.
        let vectors = 16 * (width + mlp + qkv);
        let layer = width * (qkv + attention + 3 * mlp) + vectors;
        let parameters = width * (2 * vocabulary + context) + layers * layer + vectors;
        if parameters > isize::MAX as u128 / 16 {
            let expected = "dimensions whose parameters fit in memory";
            let (key, found) = (heads_key.into(), format!("{parameters} parameters"));
            return Err(Error::Config { key, expected: expected.into(), found });
        }
        Ok(())
    }
}

/// Keys of any family that may only have one value.
fn common(keys: &Keys) -> Result<(), Error> {
    let (no, none) = (&[json!(false)], json!({}));
    keys.only("quantization_config", &[])?;
    keys.only("is_encoder_decoder", no)?;
    keys.only("add_cross_attention", no)?;
    keys.only("cross_attention_hidden_size", &[])?;
    keys.only("tie_encoder_decoder", no)?;
    keys.only("pruned_heads", &[none])?;
    keys.only("chunk_size_feed_forward", &[json!(0)])
}

/// GPT-2's keys.
fn gpt2(keys: &Keys) -> Result<Config, Error> {
    keys.only("activation_function", &[json!("gelu_new"), json!("gelu_pytorch_tanh")])?;
    keys.only("scale_attn_weights", &[json!(true)])?;
    keys.only("scale_attn_by_inverse_layer_idx", &[json!(false)])?;
    keys.only("reorder_and_upcast_attn", &[json!(false)])?;
    // Left by the very first checkpoints: the activation's old name, and no special tokens.
    keys.only("afn", &[json!("gelu"), json!("gelu_new")])?;
    keys.only("predict_special_tokens", &[json!(true), json!(false)])?;
    keys.only("n_special", &[json!(0)])?;
    let (width, heads) = (keys.required_size("n_embd")?, keys.required_size("n_head")?);
    if !width.is_multiple_of(heads) {
        return Err(keys.wrong("n_head", format!("a divisor of `n_embd`, {width}")));
    }
    let context = keys.required_size("n_positions")?;
    keys.only("n_ctx", &[json!(context)])?;
    Ok(Config {
        family: Family::Gpt2,
        vocabulary: keys.required_size("vocab_size")?,
        width,
        layers: vec![Layer { window: None, rotary: None }; layers::count(keys, "n_layer")?],
        heads,
        kv_heads: heads,
        head_width: width / heads,
        mlp_width: keys.size("n_inner")?.unwrap_or(4 * width),
        context,
        norm_epsilon: keys.positive("layer_norm_epsilon")?.unwrap_or(1e-5),
        embedding_scale: 1.0,
        qkv_bias: true,
        output_bias: true,
        mlp_bias: true,
        qk_norm: false,
        tied: keys.boolean("tie_word_embeddings", true)?,
        initializer_range: keys.positive("initializer_range")?.unwrap_or(0.02),
        dropout: Dropout {
            embedding: keys.probability("embd_pdrop", 0.1)?,
            attention: keys.probability("attn_pdrop", 0.1)?,
            residual: keys.probability("resid_pdrop", 0.1)?,
        },
        bos: bos(keys)?,
        eos: keys.tokens("eos_token_id")?,
    })
}

/// The keys of Llama and its kin.
fn llama(keys: &Keys, family: Family) -> Result<Config, Error> {
    keys.only("rope_interleaved", &[json!(false)])?;
    keys.only("use_mrope", &[json!(false)])?;
    keys.only("partial_rotary_factor", &[json!(1), json!(1.0)])?;
    let attention_bias = match family {
        Family::Llama | Family::Qwen3 | Family::SmolLm3 | Family::Gemma3 => {
            keys.boolean("attention_bias", false)?
        }
        _ => keys.only("attention_bias", &[json!(family == Family::Qwen2)]).map(|()| false)?,
    };
    let mlp_bias = match family {
        Family::Llama | Family::SmolLm3 => keys.boolean("mlp_bias", false)?,
        _ => keys.only("mlp_bias", &[json!(false)]).map(|()| false)?,
    };
    let (width, heads) = (keys.required_size("hidden_size")?, keys.required_size("num_attention_heads")?);
    let head_width = head_width(keys, family, width, heads)?;
    if family == Family::Gemma3 {
        only_gemma3(keys, head_width)?;
    } else {
        keys.only("hidden_act", &[json!("silu")])?;
    }
    Ok(Config {
        family,
        vocabulary: keys.required_size("vocab_size")?,
        width,
        layers: layers::read(keys, family)?,
        heads,
        kv_heads: kv_heads(keys, family, heads)?,
        head_width,
        mlp_width: keys.required_size("intermediate_size")?,
        context: keys.required_size("max_position_embeddings")?,
        norm_epsilon: keys.positive("rms_norm_eps")?.unwrap_or(1e-6),
        embedding_scale: if family == Family::Gemma3 { (width as f64).sqrt() } else { 1.0 },
        qkv_bias: attention_bias || family == Family::Qwen2,
        output_bias: attention_bias,
        mlp_bias,
        qk_norm: matches!(family, Family::Qwen3 | Family::Gemma3),
        tied: keys.boolean("tie_word_embeddings", matches!(family, Family::SmolLm3 | Family::Gemma3))?,
        initializer_range: keys.positive("initializer_range")?.unwrap_or(0.02),
        dropout: Dropout { attention: keys.probability("attention_dropout", 0.0)?, ..Dropout::default() },
        bos: bos(keys)?,
        eos: keys.tokens("eos_token_id")?,
    })
}

/// Keys of Gemma 3 that may only have one value.
fn only_gemma3(keys: &Keys, head_width: usize) -> Result<(), Error> {
    keys.only("hidden_activation", &[json!("gelu_pytorch_tanh")])?;
    keys.only("attn_logit_softcapping", &[])?;
    keys.only("final_logit_softcapping", &[])?;
    keys.only("use_bidirectional_attention", &[json!(false)])?;
    if keys.number("query_pre_attn_scalar", 256.0)? != head_width as f64 {
        return Err(keys.wrong("query_pre_attn_scalar", format!("`{head_width}`, the width of a head")));
    }
    Ok(())
}

fn bos(keys: &Keys) -> Result<Option<u32>, Error> {
    match keys.tokens("bos_token_id")?.as_slice() {
        [] => Ok(None),
        &[token] => Ok(Some(token)),
        _ => Err(keys.wrong("bos_token_id", "one token id")),
    }
}

/// `null` means as many as query heads. A missing key has a default in Transformers that depends on the
/// version for all but Llama, so it is refused there.
fn kv_heads(keys: &Keys, family: Family, heads: usize) -> Result<usize, Error> {
    let key = "num_key_value_heads";
    if family != Family::Llama && !keys.has(key) {
        return keys.required_size(key);
    }
    Ok(keys.size(key)?.unwrap_or(heads))
}

fn head_width(keys: &Keys, family: Family, width: usize, heads: usize) -> Result<usize, Error> {
    let given = keys.size("head_dim")?;
    match given {
        Some(head_width) => Ok(head_width),
        None if family == Family::Qwen3 && !keys.has("head_dim") => Ok(128),
        None if family == Family::Gemma3 && !keys.has("head_dim") => Ok(256),
        None if width.is_multiple_of(heads) => Ok(width / heads),
        None => Err(keys.wrong("num_attention_heads", format!("a divisor of `hidden_size`, {width}"))),
    }
}

impl Config {
    /// GPT-2 has layers and names of its own; all others are kin of Llama.
    pub fn is_gpt2(&self) -> bool {
        self.family == Family::Gpt2
    }

    /// The rotary embeddings of its layers, each once.
    pub fn rotaries(&self) -> Vec<Rotary> {
        let mut all = Vec::new();
        for rotary in self.layers.iter().filter_map(|layer| layer.rotary) {
            if !all.contains(&rotary) {
                all.push(rotary);
            }
        }
        all
    }

    /// Columns of the fused q, k, v projection: `(heads + 2 kv_heads) * head_width`.
    pub fn qkv_width(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_width
    }
}
