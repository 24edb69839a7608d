//! Folders in Hugging Face layout: `config.json`, safetensors files, tokenizer files.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path};
use std::string::FromUtf8Error;

use safetensors::tensor::{Metadata, TensorInfo};
use serde_json::{Map, Value};
use temper_kernels::quants::StoredType;

use super::adapter;
use super::error::printable;
use super::tensors::{Layout, Source, Tensor, Tensors, check_no_pointer};
use super::{Checkpoint, EXPECTED, Error, Format, TokenizerFiles};

/// The safetensors format's own limit for its header.
const LARGEST_HEADER: u64 = 100_000_000;
const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
pub(super) const TOKENIZER_CONFIG: &str = "tokenizer_config.json";

/// Opens a folder.
pub(super) fn open(path: &Path) -> Result<Checkpoint, Error> {
    let config_path = path.join("config.json");
    let config = json(&config_path)?.ok_or_else(|| without_config(path))?;
    if !config.is_object() {
        return Err(Error::damaged(&config_path, "configuration", "an object", "another JSON value"));
    }
    let mut files = weight_files(path)?;
    let gpt2 = config["model_type"] == "gpt2";
    let (prefix, embedding) = if gpt2 { ("transformer.", "wte") } else { ("model.", "embed_tokens") };
    add_prefix(&mut files, prefix);
    let mut tensors = Tensors::default();
    for (source, found) in files {
        tensors.add(source, found)?;
    }
    // GPT-2 is tied unless its config says otherwise; the others only when theirs does.
    if config["tie_word_embeddings"].as_bool().unwrap_or(gpt2) {
        drop_tied_head(&mut tensors, &format!("{prefix}{embedding}.weight"))?;
    }
    Ok(Checkpoint {
        path: path.to_owned(),
        format: Format::HuggingFace,
        generation_config: json(&path.join("generation_config.json"))?,
        tokenizer: tokenizer(path)?,
        config,
        tensors,
    })
}

/// Opens a folder's tokenizer and the configuration `config`, without weights.
pub(super) fn open_config(folder: &Path, config: &Path) -> Result<Checkpoint, Error> {
    let expected = "an object of a model's dimensions";
    let found = match json(config)? {
        Some(config) if config.is_object() => config,
        Some(_) => return Err(Error::damaged(config, "configuration", expected, "another JSON value")),
        None => return Err(Error::damaged(config, "configuration", expected, "no file")),
    };
    Ok(Checkpoint {
        path: folder.to_owned(),
        format: Format::HuggingFace,
        generation_config: json(&folder.join("generation_config.json"))?,
        tokenizer: tokenizer(folder)?,
        config: found,
        tensors: Tensors::default(),
    })
}

/// The error for a folder that is no checkpoint, with a look at what it might be.
fn without_config(path: &Path) -> Error {
    let names = || {
        let entries = std::fs::read_dir(path).into_iter().flatten().flatten();
        entries.map(|entry| entry.file_name().to_string_lossy().into_owned())
    };
    let of_run = path.join("final");
    let hint = if let Some(name) = names().find(|name| name.ends_with(".gguf")) {
        Some(format!("give the GGUF file itself, `{}`", path.join(name).display()))
    } else if names().any(|name| name == adapter::CONFIG) {
        let adapter = path.display();
        Some(format!("this is an adapter; give its base model here, and `--adapter {adapter}`"))
    } else if of_run.join("config.json").is_file() {
        Some(format!("this is a run; its model is `{}`", of_run.display()))
    } else if of_run.join(adapter::CONFIG).is_file() {
        let adapter = of_run.display();
        Some(format!("this is a run of an adapter; give the base model here, and `--adapter {adapter}`"))
    } else {
        None
    };
    Error::NotACheckpoint {
        path: path.to_owned(),
        expected: EXPECTED,
        found: "a folder without `config.json`".into(),
        hint,
    }
}

/// Gives the names of a bare decoder (as GPT-2's on the Hub) the prefix that they have in a whole model.
fn add_prefix(files: &mut [(Source, Vec<Tensor>)], prefix: &str) {
    let bare = !files.iter().any(|(_, found)| found.iter().any(|tensor| tensor.name.starts_with(prefix)));
    let tensors = files.iter_mut().flat_map(|(_, found)| found);
    for tensor in tensors.filter(|tensor| bare && tensor.name != "lm_head.weight") {
        tensor.name.insert_str(0, prefix);
    }
}

/// Takes out the head of a tied model, which must repeat the embedding, or stands for it where a file has it alone.
fn drop_tied_head(tensors: &mut Tensors, embedding: &str) -> Result<(), Error> {
    const HEAD: &str = "lm_head.weight";
    let Some(head) = tensors.find(HEAD) else {
        return Ok(());
    };
    if tensors.find(embedding).is_none() {
        tensors.rename(HEAD, embedding);
        return Ok(());
    }
    if !tensors.is_copy(HEAD, embedding)? {
        let expected = format!("a copy of `{embedding}`, because the config ties them");
        return Err(Error::tensor(&tensors.source(head).path, HEAD, expected, "other values"));
    }
    tensors.remove(HEAD);
    Ok(())
}

/// Every file of weights with the tensors in it.
fn weight_files(path: &Path) -> Result<Vec<(Source, Vec<Tensor>)>, Error> {
    if path.join(WEIGHTS).is_file() {
        return Ok(vec![weight_file(&path.join(WEIGHTS))?]);
    }
    let index_path = path.join(INDEX);
    let Some(index) = json(&index_path)? else {
        let pickled = path.join("pytorch_model.bin").exists();
        let pickled = pickled || path.join("pytorch_model.bin.index.json").exists();
        return Err(Error::NotACheckpoint {
            path: path.to_owned(),
            expected: "`model.safetensors` or `model.safetensors.index.json`",
            found: if pickled { "pickled weights, which can run code".into() } else { "neither".into() },
            hint: pickled.then(|| {
                "convert them where you trust them: load with Transformers, then \
                 `model.save_pretrained(folder, safe_serialization=True)`"
                    .into()
            }),
        });
    };
    sharded(path, &index_path, &index)
}

/// The files that an index names. Each must hold the tensors that the index promises.
fn sharded(path: &Path, index_path: &Path, index: &Value) -> Result<Vec<(Source, Vec<Tensor>)>, Error> {
    let Some(map) = index["weight_map"].as_object() else {
        let found = "none";
        return Err(Error::damaged(index_path, "`weight_map`", "an object of tensor and file names", found));
    };
    let mut shards: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for (tensor, file) in map {
        let name = file.as_str().filter(|name| is_plain(name)).ok_or_else(|| Error::ShardName {
            path: index_path.to_owned(),
            name: printable(file.as_str().unwrap_or(&file.to_string())),
        })?;
        shards.entry(name).or_default().insert(tensor);
    }
    let mut files = Vec::new();
    for (name, promised) in shards {
        let (source, found) = weight_file(&path.join(name))?;
        let names: BTreeSet<&str> = found.iter().map(|tensor| tensor.name.as_str()).collect();
        if let Some(absent) = promised.difference(&names).find(|name| !is_buffer(name)) {
            let expected = format!("it in `{}`, where the index places it", printable(name));
            return Err(Error::tensor(index_path, absent, expected, "none there"));
        }
        files.push((source, found));
    }
    Ok(files)
}

/// Whether `name` is one plain component, so that it stays inside its folder on any system.
fn is_plain(name: &str) -> bool {
    let mut components = Path::new(name).components();
    matches!((components.next(), components.next()), (Some(Component::Normal(_)), None))
        && !name.contains(['/', '\\', '\0'])
}

/// Opens one safetensors file and checks its header against its length.
pub(super) fn weight_file(path: &Path) -> Result<(Source, Vec<Tensor>), Error> {
    let source = Source::open(path)?;
    if source.length < 8 {
        let found = format!("{} bytes", source.length);
        return Err(Error::damaged(path, "length", "at least 8 bytes", found));
    }
    let mut length = [0; 8];
    source.read_at(0, &mut length)?;
    let length = u64::from_le_bytes(length);
    let most = LARGEST_HEADER.min(source.length - 8);
    if length > most {
        let expected = format!("at most {most} in a file of {} bytes", source.length);
        return Err(Error::damaged(path, "header length", expected, length.to_string()));
    }
    let mut header = vec![0; length as usize];
    source.read_at(8, &mut header)?;
    // Parsing checks that offsets ascend without gap or overlap and agree with shapes and types.
    let header: Metadata = serde_json::from_slice(&header)
        .map_err(|error| Error::damaged(path, "header", "a valid safetensors header", error.to_string()))?;
    let start = 8 + length;
    if start.checked_add(header.data_len() as u64) != Some(source.length) {
        let expected = format!("{start} bytes and {} of tensors, as the header says", header.data_len());
        return Err(Error::damaged(path, "length", expected, format!("{} bytes", source.length)));
    }
    let mut tensors = Vec::new();
    for name in header.offset_keys().into_iter().filter(|name| !is_buffer(name)) {
        if let Some(info) = header.info(&name) {
            tensors.push(tensor(path, name, info, start)?);
        }
    }
    Ok((source, tensors))
}

fn tensor(path: &Path, name: String, info: &TensorInfo, start: u64) -> Result<Tensor, Error> {
    let Some(stored) = stored_type(info.dtype) else {
        return Err(Error::tensor(path, &name, "F64, F32, F16 or BF16", format!("{:?}", info.dtype)));
    };
    let (begin, end) = info.data_offsets;
    Ok(Tensor {
        name,
        shape: info.shape.clone(),
        stored,
        layout: Layout::Same,
        file: 0,
        offset: start + begin as u64,
        bytes: end - begin,
    })
}

/// Whether `name` is a buffer that old checkpoints carry and that models compute themselves: GPT-2's causal
/// mask and its fill value, and rotary frequencies.
fn is_buffer(name: &str) -> bool {
    [".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq"].iter().any(|buffer| name.ends_with(buffer))
}

/// The tokenizer's files.
fn tokenizer(path: &Path) -> Result<TokenizerFiles, Error> {
    let Some(tokenizer_json) = bytes(&path.join("tokenizer.json"))? else {
        return Ok(TokenizerFiles::None);
    };
    let tokenizer_config = tokenizer_config(path)?;
    let chat_template = chat_template(path, tokenizer_config.as_ref())?;
    Ok(TokenizerFiles::HuggingFace { tokenizer_json, tokenizer_config, chat_template })
}

/// The tokenizer's configuration. Older folders name special tokens in a file of its own, which yields to it.
fn tokenizer_config(path: &Path) -> Result<Option<Value>, Error> {
    let (config, older) = (json(&path.join(TOKENIZER_CONFIG))?, json(&path.join("special_tokens_map.json"))?);
    let Some(Value::Object(older)) = older else { return Ok(config) };
    let mut config = config.unwrap_or_else(|| Value::Object(Map::new()));
    if let Some(config) = config.as_object_mut() {
        for (key, value) in older {
            let named = config.entry(key).or_insert(Value::Null);
            if named.is_null() {
                *named = value;
            }
        }
    }
    Ok(Some(config))
}

/// The chat template of a folder: a file of its own, or a part of the tokenizer's configuration.
pub(super) fn chat_template(path: &Path, tokenizer_config: Option<&Value>) -> Result<Option<String>, Error> {
    let file = path.join("chat_template.jinja");
    let Some(bytes) = bytes(&file)? else {
        return Ok(tokenizer_config.and_then(|config| template(&config["chat_template"])));
    };
    let wrong = |error: FromUtf8Error| {
        Error::damaged(&file, "chat template", "UTF-8", error.utf8_error().to_string())
    };
    String::from_utf8(bytes).map(Some).map_err(wrong)
}

/// The template in `tokenizer_config.json`: a string, or the one called `default` in a list.
fn template(value: &Value) -> Option<String> {
    let named = |entry: &&Value| entry["name"] == "default";
    let chosen = match value {
        Value::Array(templates) => &templates.iter().find(named)?["template"],
        other => other,
    };
    chosen.as_str().map(str::to_owned)
}

/// The content of a regular file; none when there is no such file.
fn bytes(path: &Path) -> Result<Option<Vec<u8>>, Error> {
    match std::fs::metadata(path) {
        Ok(kind) if kind.is_file() => {
            let bytes = std::fs::read(path).map_err(Error::io("read", path))?;
            check_no_pointer(path, &bytes)?;
            Ok(Some(bytes))
        }
        Ok(_) => Err(Error::damaged(path, "kind", "a regular file", "another kind")),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::io("read", path)(error)),
    }
}

/// A file's content as JSON; none when there is no such file.
pub(super) fn json(path: &Path) -> Result<Option<Value>, Error> {
    let Some(bytes) = bytes(path)? else {
        return Ok(None);
    };
    serde_json::from_slice(&bytes).map(Some).map_err(|source| Error::Json { path: path.to_owned(), source })
}

/// The format of a safetensors type, or none when temper does not read it.
fn stored_type(dtype: safetensors::Dtype) -> Option<StoredType> {
    Some(match dtype {
        safetensors::Dtype::F64 => StoredType::F64,
        safetensors::Dtype::F32 => StoredType::F32,
        safetensors::Dtype::F16 => StoredType::F16,
        safetensors::Dtype::BF16 => StoredType::BF16,
        _ => return None,
    })
}
