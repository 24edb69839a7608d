//! Small checkpoints made in memory, for tests that need one with a particular flaw.

#![allow(dead_code, reason = "each test file uses a part")]

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use temper::checkpoint::{self, Checkpoint, Error};

/// A committed model.
pub fn fixture(name: &str) -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../fixtures")).join(name)
}

/// A GGUF metadata value.
#[derive(Clone)]
pub enum Field {
    U32(u32),
    F32(f32),
    Text(&'static str),
    Texts(Vec<String>),
}

/// A GGUF file in the making: metadata, and tensors as name, dimensions in ggml's order, type, bytes.
#[derive(Clone, Default)]
pub struct Gguf {
    pub fields: Vec<(String, Field)>,
    pub tensors: Vec<(String, Vec<u64>, u32, Vec<u8>)>,
}

impl Gguf {
    /// One layer; width 8, 2 query heads and 1 key head of width 4, MLP 8, vocabulary 6.
    pub fn tiny(architecture: &'static str) -> Gguf {
        let mut gguf = Gguf::default();
        gguf.field("general.architecture", Field::Text(architecture));
        for (key, value) in [
            ("context_length", 16),
            ("embedding_length", 8),
            ("feed_forward_length", 8),
            ("block_count", 1),
            ("attention.head_count", 2),
        ] {
            gguf.field(&format!("{architecture}.{key}"), Field::U32(value));
        }
        if architecture != "gpt2" {
            gguf.field(&format!("{architecture}.attention.head_count_kv"), Field::U32(1));
        }
        gguf.f32("token_embd.weight", &[8, 6]);
        gguf
    }

    pub fn field(&mut self, key: &str, field: Field) {
        self.fields.push((key.to_owned(), field));
    }

    /// Adds an F32 tensor with the values 0, 1, 2, …
    pub fn f32(&mut self, name: &str, dimensions: &[u64]) {
        let count: u64 = dimensions.iter().product();
        let bytes = (0..count).flat_map(|value| (value as f32).to_le_bytes()).collect();
        self.tensors.push((name.to_owned(), dimensions.to_vec(), 0, bytes));
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = b"GGUF\x03\0\0\0".to_vec();
        bytes.extend((self.tensors.len() as u64).to_le_bytes());
        bytes.extend((self.fields.len() as u64).to_le_bytes());
        for (key, field) in &self.fields {
            text(&mut bytes, key);
            match field {
                Field::U32(value) => {
                    bytes.extend(4u32.to_le_bytes());
                    bytes.extend(value.to_le_bytes());
                }
                Field::F32(value) => {
                    bytes.extend(6u32.to_le_bytes());
                    bytes.extend(value.to_le_bytes());
                }
                Field::Text(value) => {
                    bytes.extend(8u32.to_le_bytes());
                    text(&mut bytes, value);
                }
                Field::Texts(values) => {
                    bytes.extend(9u32.to_le_bytes());
                    bytes.extend(8u32.to_le_bytes());
                    bytes.extend((values.len() as u64).to_le_bytes());
                    values.iter().for_each(|value| text(&mut bytes, value));
                }
            }
        }
        let mut offset = 0u64;
        for (name, dimensions, kind, data) in &self.tensors {
            text(&mut bytes, name);
            bytes.extend((dimensions.len() as u32).to_le_bytes());
            dimensions.iter().for_each(|size| bytes.extend(size.to_le_bytes()));
            bytes.extend(kind.to_le_bytes());
            bytes.extend(offset.to_le_bytes());
            offset = (offset + data.len() as u64).next_multiple_of(32);
        }
        for (_, _, _, data) in &self.tensors {
            bytes.resize(bytes.len().next_multiple_of(32), 0);
            bytes.extend(data);
        }
        bytes
    }

    /// Writes the file and opens it.
    pub fn open(&self) -> Result<Checkpoint, Error> {
        open_gguf(&self.bytes())
    }
}

fn text(bytes: &mut Vec<u8>, text: &str) {
    bytes.extend((text.len() as u64).to_le_bytes());
    bytes.extend(text.as_bytes());
}

/// Opens `bytes` as a GGUF file, which stays readable though its folder is gone.
pub fn open_gguf(bytes: &[u8]) -> Result<Checkpoint, Error> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    std::fs::write(&path, bytes).unwrap();
    checkpoint::open(&path)
}

/// A safetensors file with this header and so many bytes after it.
pub fn safetensors(header: &Value, bytes: usize) -> Vec<u8> {
    let header = header.to_string();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    file.extend((0..bytes).map(|byte| byte as u8));
    file
}

/// A config that temper accepts.
pub fn llama_config() -> Value {
    json!({
        "model_type": "llama",
        "vocab_size": 6,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 16,
    })
}

/// A folder with [`llama_config`] and these files.
pub fn folder(files: &[(&str, &[u8])]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), "config.json", llama_config().to_string().as_bytes());
    for (name, bytes) in files {
        write(folder.path(), name, bytes);
    }
    folder
}

fn write(folder: &Path, name: &str, bytes: &[u8]) {
    std::fs::write(folder.join(name), bytes).unwrap();
}

/// The message and hint of a checkpoint that must not open.
pub fn refusal(result: Result<Checkpoint, Error>) -> String {
    match result {
        Ok(checkpoint) => panic!("{} opens", checkpoint.path.display()),
        Err(error) => format!("{error}; hint: {}", error.hint().unwrap_or_default()),
    }
}
