//! A GGUF file as a checkpoint: names, rows and columns become Hugging Face's.

use std::path::Path;

use serde_json::Value as Json;
use temper_kernels::quants::StoredType;

use super::gguf::{Container, Entry};
use super::gguf_config::{self, Architecture, Keys};
use super::tensors::{Layout, Source, Tensor, Tensors};
use super::{Checkpoint, Error, Format, TokenizerFiles};

/// Names without `.weight` or `.bias`, GGUF's and Hugging Face's; `{}` is the layer.
const LLAMA_NAMES: &[(&str, &str)] = &[
    ("token_embd", "model.embed_tokens"),
    ("output_norm", "model.norm"),
    ("output", "lm_head"),
    ("blk.{}.attn_norm", "model.layers.{}.input_layernorm"),
    ("blk.{}.attn_q", "model.layers.{}.self_attn.q_proj"),
    ("blk.{}.attn_k", "model.layers.{}.self_attn.k_proj"),
    ("blk.{}.attn_v", "model.layers.{}.self_attn.v_proj"),
    ("blk.{}.attn_q_norm", "model.layers.{}.self_attn.q_norm"),
    ("blk.{}.attn_k_norm", "model.layers.{}.self_attn.k_norm"),
    ("blk.{}.attn_output", "model.layers.{}.self_attn.o_proj"),
    ("blk.{}.ffn_norm", "model.layers.{}.post_attention_layernorm"),
    ("blk.{}.ffn_gate", "model.layers.{}.mlp.gate_proj"),
    ("blk.{}.ffn_up", "model.layers.{}.mlp.up_proj"),
    ("blk.{}.ffn_down", "model.layers.{}.mlp.down_proj"),
];

/// What Gemma 3 calls otherwise.
const GEMMA3_NAMES: &[(&str, &str)] = &[
    ("blk.{}.post_attention_norm", "model.layers.{}.post_attention_layernorm"),
    ("blk.{}.ffn_norm", "model.layers.{}.pre_feedforward_layernorm"),
    ("blk.{}.post_ffw_norm", "model.layers.{}.post_feedforward_layernorm"),
];

/// As [`LLAMA_NAMES`], for GPT-2.
const GPT2_NAMES: &[(&str, &str)] = &[
    ("token_embd", "transformer.wte"),
    ("position_embd", "transformer.wpe"),
    ("output_norm", "transformer.ln_f"),
    ("output", "lm_head"),
    ("blk.{}.attn_norm", "transformer.h.{}.ln_1"),
    ("blk.{}.attn_qkv", "transformer.h.{}.attn.c_attn"),
    ("blk.{}.attn_output", "transformer.h.{}.attn.c_proj"),
    ("blk.{}.ffn_norm", "transformer.h.{}.ln_2"),
    ("blk.{}.ffn_up", "transformer.h.{}.mlp.c_fc"),
    ("blk.{}.ffn_down", "transformer.h.{}.mlp.c_proj"),
];

/// Llama 3's frequency factors, which become part of the config.
const ROPE_FACTORS: &str = "rope_freqs.weight";

/// Opens a GGUF file.
pub(super) fn open(path: &Path) -> Result<Checkpoint, Error> {
    let source = Source::open(path)?;
    let Container { version, metadata, tensors: mut entries } = Container::read(&source.file, path)?;
    let mut keys = Keys::new(path, metadata);
    let architecture = Architecture::take(&mut keys)?;
    let factors = take_factors(&source, &mut entries)?;
    let mut config = gguf_config::config(&mut keys, architecture, &entries, factors.as_deref())?;
    let vocabulary = gguf_config::vocabulary(&mut keys, &config)?;
    let heads = Heads::new(&config);
    let found = entries.into_iter().map(|entry| tensor(path, architecture, heads, entry));
    let mut tensors = Tensors::default();
    let found = found.collect::<Result<_, _>>()?;
    tensors.add(source, found)?;
    // Older converters wrote GPT-2's head twice.
    if architecture == Architecture::Gpt2 && tensors.is_copy("lm_head.weight", "transformer.wte.weight")? {
        tensors.remove("lm_head.weight");
    }
    config["tie_word_embeddings"] = tensors.find("lm_head.weight").is_none().into();
    let generation_config = vocabulary.as_ref().map(|vocabulary| vocabulary.describe_ends(&mut config));
    Ok(Checkpoint {
        path: path.to_owned(),
        format: Format::Gguf { version },
        config,
        generation_config,
        tokenizer: vocabulary.map_or(TokenizerFiles::None, TokenizerFiles::Gguf),
        tensors,
    })
}

/// Takes Llama 3's frequency factors out of the tensors.
fn take_factors(source: &Source, entries: &mut Vec<Entry>) -> Result<Option<Vec<f32>>, Error> {
    let Some(index) = entries.iter().position(|entry| entry.name == ROPE_FACTORS) else {
        return Ok(None);
    };
    let entry = entries.remove(index);
    if entry.stored != StoredType::F32 {
        return Err(Error::tensor(&source.path, ROPE_FACTORS, "F32", entry.stored.name()));
    }
    let mut bytes = vec![0; entry.bytes];
    source.read_at(entry.offset, &mut bytes)?;
    let mut factors = vec![0.0; entry.bytes / entry.stored.block_bytes()];
    entry.stored.decode(&bytes, &mut factors);
    Ok(Some(factors))
}

/// Heads among the rows of a projection.
#[derive(Clone, Copy)]
struct Heads {
    query: usize,
    key: usize,
}

impl Heads {
    /// GPT-2 has other keys, and no need of these numbers.
    fn new(config: &Json) -> Heads {
        let heads = |key| config[key].as_u64().unwrap_or(1) as usize;
        Heads { query: heads("num_attention_heads"), key: heads("num_key_value_heads") }
    }
}

/// A tensor under Hugging Face's name, with its shape and the way there.
fn tensor(path: &Path, architecture: Architecture, heads: Heads, entry: Entry) -> Result<Tensor, Error> {
    let names: &[_] = match architecture {
        Architecture::Gpt2 => &[GPT2_NAMES],
        Architecture::Gemma3 => &[GEMMA3_NAMES, LLAMA_NAMES],
        _ => &[LLAMA_NAMES],
    };
    let Some((kind, name)) = names.iter().find_map(|names| translate(names, &entry.name)) else {
        let expected = format!("a name of the architecture `{}`", architecture.name());
        return Err(Error::tensor(path, &entry.name, expected, "an unknown one"));
    };
    let mut shape = entry.shape;
    let matrix = shape.len() == 2;
    let layout = match (architecture, kind) {
        (Architecture::Llama | Architecture::SmolLm3, "blk.{}.attn_q") => {
            Layout::AlternatingHalves { heads: heads.query }
        }
        (Architecture::Llama | Architecture::SmolLm3, "blk.{}.attn_k") => {
            Layout::AlternatingHalves { heads: heads.key }
        }
        (Architecture::Gemma3, kind) if kind.ends_with("norm") => Layout::OneAdded,
        // GPT-2's Conv1D has its inputs in rows.
        (Architecture::Gpt2, kind) if matrix && kind.starts_with("blk.") => {
            shape.reverse();
            Layout::Transposed
        }
        _ => Layout::Same,
    };
    if let Layout::AlternatingHalves { heads } = layout
        && !shape.first().is_some_and(|rows| rows.is_multiple_of(2 * heads))
    {
        let expected = format!("rows in two halves of {heads} heads");
        return Err(Error::tensor(path, &entry.name, expected, format!("shape {shape:?}")));
    }
    Ok(Tensor {
        name,
        shape,
        stored: entry.stored,
        layout,
        file: 0,
        offset: entry.offset,
        bytes: entry.bytes,
    })
}

/// The table's GGUF name that `name` is an instance of, and Hugging Face's name for it.
fn translate(table: &'static [(&'static str, &'static str)], name: &str) -> Option<(&'static str, String)> {
    let (base, suffix) = name.rsplit_once('.').filter(|(_, suffix)| matches!(*suffix, "weight" | "bias"))?;
    let layer = base.strip_prefix("blk.").and_then(|rest| rest.split_once('.')).map(|(layer, _)| layer);
    let pattern = match layer {
        Some(layer) => base.replacen(layer_number(layer)?, "{}", 1),
        None => base.to_owned(),
    };
    let &(kind, theirs) = table.iter().find(|(ours, _)| *ours == pattern)?;
    Some((kind, format!("{}.{suffix}", theirs.replacen("{}", layer.unwrap_or_default(), 1))))
}

/// `layer` when it is a decimal number in its usual form.
fn layer_number(layer: &str) -> Option<&str> {
    let number: u32 = layer.parse().ok()?;
    (number.to_string() == layer).then_some(layer)
}
