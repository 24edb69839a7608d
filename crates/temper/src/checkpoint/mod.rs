//! Files of a model: Hugging Face folders and GGUF files, read and written.
//!
//! Both formats come out the same: tensors under Hugging Face's names and in its orientation, and a
//! `config.json`. Files come from strangers, so everything is checked before it is used; and tensors are
//! read with positioned reads, not mapped, so that a file cut short meanwhile is an error and no crash.

pub mod adapter;
mod error;
mod folder;
mod gguf;
mod gguf_config;
mod gguf_model;
mod rope_factors;
pub mod save;
mod tensors;

use std::io::ErrorKind;
use std::path::{Component, Path, PathBuf};

use serde_json::Value;
use temper_kernels::quants::{Blocks, StoredType};

pub use adapter::{AdapterFiles, open_adapter};
pub use error::Error;
pub use tensors::TensorSummary;
use tensors::Tensors;

/// An opened checkpoint. Weights stay in their files until they are read.
#[derive(Debug)]
pub struct Checkpoint {
    /// The folder or `.gguf` file.
    pub path: PathBuf,
    /// What the path is.
    pub format: Format,
    /// `config.json`, an object; a GGUF file's metadata is translated into the same keys.
    pub config: Value,
    /// `generation_config.json`, or what a GGUF file says about the ends of answers.
    pub generation_config: Option<Value>,
    /// What the tokenizer is made of.
    pub tokenizer: TokenizerFiles,
    tensors: Tensors,
}

/// The two kinds of checkpoints.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// A folder with `config.json` and safetensors files.
    HuggingFace,
    /// One GGUF file.
    Gguf {
        /// Of the container.
        version: u32,
    },
}

/// What a checkpoint brings for its tokenizer, unparsed.
#[derive(Debug)]
pub enum TokenizerFiles {
    /// The files of a Hugging Face folder.
    HuggingFace {
        /// `tokenizer.json`.
        tokenizer_json: Vec<u8>,
        /// `tokenizer_config.json`.
        tokenizer_config: Option<Value>,
        /// `chat_template.jinja`, else the template in `tokenizer_config.json`.
        chat_template: Option<String>,
    },
    /// The vocabulary inside a GGUF file.
    Gguf(GgufVocabulary),
    /// Nothing that temper reads.
    None,
}

/// A tokenizer as GGUF's `tokenizer.*` keys have it.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct GgufVocabulary {
    /// `tokenizer.ggml.model`: `gpt2` for byte-level BPE, `llama` for SentencePiece.
    pub model: String,
    /// Name of the splitting before BPE.
    pub pre: Option<String>,
    /// Texts, by id.
    pub tokens: Vec<String>,
    /// ggml's type numbers, by id (1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte);
    /// empty or as long as `tokens`.
    pub token_types: Vec<i32>,
    /// SentencePiece scores, by id; empty or as long as `tokens`.
    pub scores: Vec<f32>,
    /// BPE merges, the first ones first, each two texts with a space between.
    pub merges: Vec<String>,
    /// Begins a text.
    pub bos: Option<u32>,
    /// Ends a text.
    pub eos: Option<u32>,
    /// Ends a turn.
    pub eot: Option<u32>,
    /// Stands for what the vocabulary lacks.
    pub unknown: Option<u32>,
    /// Fills rows.
    pub padding: Option<u32>,
    /// Whether BOS is put before a text.
    pub add_bos: Option<bool>,
    /// Whether a space is put before a text (SentencePiece).
    pub add_space_prefix: Option<bool>,
    /// The chat template.
    pub chat_template: Option<String>,
}

const EXPECTED: &str = "a folder with `config.json` and safetensors files, or a `.gguf` file";

/// Whether a name ends as the files of models do.
fn is_file_name(path: &Path) -> bool {
    let endings = ["gguf", "safetensors", "json", "bin", "pt"];
    path.extension().is_some_and(|ending| endings.iter().any(|it| ending.eq_ignore_ascii_case(it)))
}

/// The error for a path that leads nowhere; `owner/name`, or `name`, is what hubs call a model.
fn not_there(path: &Path) -> Error {
    let components: Vec<Component<'_>> = path.components().collect();
    let hint = match components[..] {
        [Component::Normal(owner), Component::Normal(name)] if !Path::new(owner).exists() => format!(
            "temper downloads nothing: get a model of a hub first, `hf download {} --local-dir {}`",
            path.display(),
            name.display()
        ),
        [Component::Normal(name)] if !is_file_name(path) => format!(
            "check that `{0}` exists; temper downloads nothing: get a model of a hub first, `hf download {0} --local-dir {0}`",
            name.display()
        ),
        _ => format!("check that `{}` exists", path.display()),
    };
    Error::NotACheckpoint {
        path: path.to_owned(),
        expected: EXPECTED,
        found: "nothing".into(),
        hint: Some(hint),
    }
}

/// Opens a folder in Hugging Face layout or a `.gguf` file: reads everything but the weights, and checks
/// that the weights are where the file says.
///
/// # Errors
/// When files are missing, damaged or of a kind that temper does not read.
pub fn open(path: &Path) -> Result<Checkpoint, Error> {
    let kind = match std::fs::metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Err(not_there(path)),
        kind => kind.map_err(Error::io("open", path))?,
    };
    if kind.is_dir() {
        return folder::open(path);
    }
    if kind.is_file() && path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf")) {
        return gguf_model::open(path);
    }
    let inside = path.parent().filter(|parent| parent.join("config.json").is_file());
    Err(Error::NotACheckpoint {
        path: path.to_owned(),
        expected: EXPECTED,
        found: if kind.is_file() { "another file".into() } else { "neither folder nor file".into() },
        hint: inside.map(|parent| format!("give the folder, `--model {}`", parent.display())),
    })
}

/// Opens a `config.json`, or the folder that holds one, for its shape and the tokenizer beside it. There are no
/// tensors, even if weights lie there.
///
/// # Errors
/// When there is no configuration or a file is damaged.
pub fn open_config(path: &Path) -> Result<Checkpoint, Error> {
    if path.is_dir() {
        return folder::open_config(path, &path.join("config.json"));
    }
    folder::open_config(path.parent().unwrap_or(Path::new("")), path)
}

/// Opens a single safetensors file that is no model, such as an optimizer's state. There is no configuration.
///
/// # Errors
/// When the file is missing or damaged.
pub fn open_file(path: &Path) -> Result<Checkpoint, Error> {
    let (source, list) = folder::weight_file(path)?;
    let mut tensors = Tensors::default();
    tensors.add(source, list)?;
    Ok(Checkpoint {
        path: path.to_owned(),
        format: Format::HuggingFace,
        config: Value::Null,
        generation_config: None,
        tokenizer: TokenizerFiles::None,
        tensors,
    })
}

impl Checkpoint {
    /// Names and shapes of the tensors, in the order of the files; buffers that a model computes itself and a
    /// tied head's second copy are left out.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &[usize])> {
        self.tensors.iter().map(|tensor| (tensor.name.as_str(), tensor.shape.as_slice()))
    }

    /// How each tensor is stored.
    pub fn summary(&self) -> impl Iterator<Item = TensorSummary<'_>> {
        self.tensors.iter().map(|tensor| tensor.summary())
    }

    /// Bytes of all weight files.
    pub fn file_bytes(&self) -> u64 {
        self.tensors.file_bytes()
    }

    /// Whether there is a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.find(name).is_some()
    }

    /// The shape of a tensor, outermost dimension first.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.tensors.find(name).map(|tensor| tensor.shape.as_slice())
    }

    /// That there is a tensor of this name and shape.
    ///
    /// # Errors
    /// When there is none, or it has another.
    pub fn expect(&self, name: &str, shape: &[usize]) -> Result<(), Error> {
        let tensor = self.find(name)?;
        if tensor.shape == shape {
            return Ok(());
        }
        let [expected, found] = [shape, &tensor.shape].map(|shape| format!("shape {shape:?}"));
        Err(Error::tensor(&self.tensors.source(tensor).path, name, expected, found))
    }

    /// Reads a tensor, row-major, as f32. Any number of threads may read at once.
    ///
    /// # Errors
    /// When there is no such tensor or its file cannot be read.
    pub fn read(&self, name: &str) -> Result<Vec<f32>, Error> {
        self.tensors.read(self.find(name)?)
    }

    /// Calls `f` with the same values and where they begin, a piece at a time where they lie so in the file.
    ///
    /// # Errors
    /// As [`Checkpoint::read`].
    pub fn read_pieces(&self, name: &str, f: impl FnMut(usize, &[f32])) -> Result<(), Error> {
        self.tensors.read_pieces(self.find(name)?, f)
    }

    /// A matrix as it is stored, row by row, or its transpose; none when its rows do not lie so in the file.
    ///
    /// # Errors
    /// When there is no such tensor or its file cannot be read.
    pub fn blocks(&self, name: &str, transposed: bool) -> Result<Option<Blocks>, Error> {
        self.tensors.blocks(self.find(name)?, transposed)
    }

    /// How a matrix is stored, with its bytes, where [`Checkpoint::blocks`] would give it.
    pub fn stored_bytes(&self, name: &str, transposed: bool) -> Option<(StoredType, u64)> {
        let tensor = self.tensors.find(name).filter(|tensor| tensor.has_blocks(transposed))?;
        Some((tensor.stored, tensor.bytes as u64))
    }

    /// SHA-256 over the configuration and all tensors' names, shapes and stored bytes, in hexadecimal: equal
    /// for equal weights in equal form, wherever they lie. Reads every weight once.
    ///
    /// # Errors
    /// When a file cannot be read.
    pub fn content_hash(&self) -> Result<String, Error> {
        self.hash_with(&self.config)
    }

    fn hash_with(&self, config: &Value) -> Result<String, Error> {
        self.tensors.content_hash(config)
    }

    fn find(&self, name: &str) -> Result<&tensors::Tensor, Error> {
        self.tensors
            .find(name)
            .ok_or_else(|| Error::MissingTensor { path: self.path.clone(), tensor: name.to_owned() })
    }
}
