//! Writing: a folder that Transformers loads, and files that are whole or not there.
//!
//! Everything is written beside its place under a temporary name, brought to the disk, and renamed. When
//! that fails, a full disk included, the temporary is removed and what was there before stays.

use std::borrow::Cow;
use std::fs::{File, Permissions};
use std::io::{self, BufWriter, Write};
use std::iter;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use serde_json::{Map, Value, json};

use super::{Error, adapter};

/// How many values are converted at a time.
const CHUNK: usize = 1 << 16;

/// The number format of saved weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SaveType {
    /// As they were trained.
    F32,
    /// Rounded to half precision; a value beyond its range is an error.
    F16,
    /// Rounded to bfloat16.
    BF16,
}

impl SaveType {
    /// As safetensors has it.
    fn name(self) -> &'static str {
        match self {
            SaveType::F32 => "F32",
            SaveType::F16 => "F16",
            SaveType::BF16 => "BF16",
        }
    }

    /// As the key `dtype` of `config.json` has it.
    fn config_name(self) -> &'static str {
        match self {
            SaveType::F32 => "float32",
            SaveType::F16 => "float16",
            SaveType::BF16 => "bfloat16",
        }
    }

    /// Whether a value is a finite number of this type.
    fn holds(self, value: f32) -> bool {
        match self {
            SaveType::F32 => value.is_finite(),
            SaveType::F16 => f16::from_f32(value).is_finite(),
            SaveType::BF16 => bf16::from_f32(value).is_finite(),
        }
    }

    fn bytes(self) -> usize {
        match self {
            SaveType::F32 => 4,
            SaveType::F16 | SaveType::BF16 => 2,
        }
    }
}

/// A tensor to save. Its values are asked for when its turn comes, and dropped piece by piece, so that no second
/// copy of a model is held.
pub struct SavedTensor<'a> {
    /// Hugging Face's name.
    pub name: String,
    /// Outermost dimension first.
    pub shape: Vec<usize>,
    /// Gives the values, row-major.
    pub values: Box<dyn Fn() -> ValuePieces<'a> + 'a>,
}

/// The values of a tensor, some at a time.
pub type ValuePieces<'a> = Box<dyn Iterator<Item = Cow<'a, [f32]>> + 'a>;

impl<'a> SavedTensor<'a> {
    /// A tensor whose values lie in memory as they are saved.
    pub fn borrowed(name: impl Into<String>, shape: &[usize], values: &'a [f32]) -> SavedTensor<'a> {
        let values = || Box::new(iter::once(Cow::Borrowed(values))) as ValuePieces<'a>;
        SavedTensor { name: name.into(), shape: shape.to_vec(), values: Box::new(values) }
    }
}

/// All of a model but its weights.
#[derive(Debug, Clone, Copy)]
pub struct ModelFiles<'a> {
    /// `config.json`; its `dtype` is replaced by the saved one.
    pub config: &'a Value,
    /// `generation_config.json`.
    pub generation_config: Option<&'a Value>,
    /// The tokenizer.
    pub tokenizer: TokenizerToSave<'a>,
}

/// A tokenizer's files.
#[derive(Debug, Clone, Copy)]
pub struct TokenizerToSave<'a> {
    /// `tokenizer.json`.
    pub json: &'a [u8],
    /// `tokenizer_config.json`, with the chat template inside.
    pub config: &'a Value,
}

/// Writes a model's files into a folder that is there; for the closure of [`create_folder`].
///
/// # Errors
/// When shapes and values disagree or the system refuses; `folder` may then hold some of the files.
pub fn write_model(
    folder: &Path,
    files: ModelFiles,
    tensors: &[SavedTensor],
    save_type: SaveType,
) -> Result<(), Error> {
    let mut config = files.config.clone();
    if let Some(config) = config.as_object_mut() {
        config.insert("dtype".into(), save_type.config_name().into());
    }
    write_json(&folder.join("config.json"), &config)?;
    if let Some(generation_config) = files.generation_config {
        write_json(&folder.join("generation_config.json"), generation_config)?;
    }
    write_tokenizer(folder, files.tokenizer)?;
    write_safetensors(&folder.join("model.safetensors"), tensors, save_type)
}

/// Writes an adapter as PEFT does, into a folder that is there; the tokenizer too, as trainers do.
///
/// # Errors
/// As [`write_model`].
pub fn write_adapter(
    folder: &Path,
    config: &Value,
    tokenizer: TokenizerToSave<'_>,
    tensors: &[SavedTensor],
    save_type: SaveType,
) -> Result<(), Error> {
    write_json(&folder.join(adapter::CONFIG), config)?;
    write_tokenizer(folder, tokenizer)?;
    write_safetensors(&folder.join(adapter::TENSORS), tensors, save_type)
}

fn write_tokenizer(folder: &Path, tokenizer: TokenizerToSave<'_>) -> Result<(), Error> {
    write_atomic(&folder.join("tokenizer.json"), |file| file.write_all(tokenizer.json))?;
    write_json(&folder.join("tokenizer_config.json"), tokenizer.config)
}

/// Writes a JSON file, whole or not at all.
///
/// # Errors
/// When the system refuses.
pub fn write_json(path: &Path, value: &Value) -> Result<(), Error> {
    write_atomic(path, |file| {
        serde_json::to_writer_pretty(&mut *file, value)?;
        file.write_all(b"\n")
    })
}

/// Writes one safetensors file, whole or not at all.
///
/// # Errors
/// When shapes and values disagree, a value is not a finite number of the type, or the system refuses.
pub fn write_safetensors(path: &Path, tensors: &[SavedTensor], save_type: SaveType) -> Result<(), Error> {
    let header = header(tensors, save_type)?;
    // The closure below can only fail with I/O errors.
    let mut wrong = None;
    let written = write_atomic(path, |file| {
        file.write_all(&header)?;
        for tensor in tensors {
            let mut found = 0;
            for values in (tensor.values)() {
                found += values.len();
                if let Some(&value) = values.iter().find(|&&value| !save_type.holds(value)) {
                    let tensor = tensor.name.clone();
                    wrong = Some(Error::SavedValue { tensor, value, save_type: save_type.name() });
                    return Err(io::ErrorKind::InvalidInput.into());
                }
                write_values(file, &values, save_type)?;
            }
            if Some(found) != count(&tensor.shape) {
                wrong = Some(wrong_shape(tensor, found));
                return Err(io::ErrorKind::InvalidInput.into());
            }
        }
        Ok(())
    });
    wrong.map_or(written, Err)
}

/// The header with its length before it, padded with spaces so that the values after it are aligned.
fn header(tensors: &[SavedTensor], save_type: SaveType) -> Result<Vec<u8>, Error> {
    let mut entries = Map::new();
    // Transformers wants to know that the layout of the weights is PyTorch's.
    entries.insert("__metadata__".into(), json!({ "format": "pt" }));
    let mut end = 0usize;
    for tensor in tensors {
        let bytes = count(&tensor.shape).and_then(|count| count.checked_mul(save_type.bytes()));
        let Some(next) = bytes.and_then(|bytes| bytes.checked_add(end)) else {
            return Err(wrong_shape(tensor, (tensor.values)().map(|values| values.len()).sum()));
        };
        let entry = json!({ "dtype": save_type.name(), "shape": tensor.shape, "data_offsets": [end, next] });
        if entries.insert(tensor.name.clone(), entry).is_some() {
            return Err(Error::SavedTwice { tensor: tensor.name.clone() });
        }
        end = next;
    }
    let mut text = Value::Object(entries).to_string().into_bytes();
    text.resize(text.len().next_multiple_of(8), b' ');
    let mut header = (text.len() as u64).to_le_bytes().to_vec();
    header.append(&mut text);
    Ok(header)
}

fn count(shape: &[usize]) -> Option<usize> {
    shape.iter().copied().try_fold(1, usize::checked_mul)
}

fn wrong_shape(tensor: &SavedTensor, found: usize) -> Error {
    let expected = count(&tensor.shape).map_or("too many".into(), |count| count.to_string());
    Error::SavedShape { tensor: tensor.name.clone(), shape: tensor.shape.clone(), expected, found }
}

fn write_values(file: &mut dyn Write, values: &[f32], save_type: SaveType) -> io::Result<()> {
    let mut bytes = Vec::with_capacity(CHUNK.min(values.len()) * save_type.bytes());
    for values in values.chunks(CHUNK) {
        bytes.clear();
        match save_type {
            SaveType::F32 => bytes.extend(values.iter().flat_map(|value| value.to_le_bytes())),
            SaveType::F16 => {
                bytes.extend(values.iter().flat_map(|&value| f16::from_f32(value).to_le_bytes()))
            }
            SaveType::BF16 => {
                bytes.extend(values.iter().flat_map(|&value| bf16::from_f32(value).to_le_bytes()));
            }
        }
        file.write_all(&bytes)?;
    }
    Ok(())
}

/// Writes a file, whole or not at all; a file that was there is replaced, through links.
///
/// # Errors
/// When something other than a file is at `path`, the system refuses, or `fill` fails; nothing has changed then.
pub fn write_atomic(path: &Path, fill: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<(), Error> {
    let failed = |error| Error::io("write", path)(error);
    let target = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    if target.exists() && !target.is_file() {
        return Err(Error::NoFile(path.to_owned()));
    }
    let (parent, prefix) = place(&target)?;
    let mut temporary = tempfile::Builder::new();
    temporary.prefix(&prefix).suffix(".partial").permissions(Permissions::from_mode(0o666));
    // Removes itself when it is dropped before it is persisted.
    let file = temporary.tempfile_in(parent).map_err(failed)?;
    let mut buffer = BufWriter::with_capacity(1 << 20, file.as_file());
    fill(&mut buffer).map_err(failed)?;
    buffer.into_inner().map_err(|error| failed(error.into_error()))?.sync_all().map_err(failed)?;
    file.persist(&target).map_err(|error| failed(error.error))?;
    sync_folder(parent)
}

/// Makes the new folder `path` with what `fill` writes into the temporary folder that it is given, whole or
/// not at all. What a killed process left of an earlier try is removed.
///
/// # Errors
/// When something other than an empty folder is at `path`, the system refuses, or `fill` fails; nothing has
/// changed then.
pub fn create_folder<E: From<Error>>(
    path: &Path,
    fill: impl FnOnce(&Path) -> Result<(), E>,
) -> Result<(), E> {
    let failed = |error| Error::io("write", path)(error);
    let found = match std::fs::read_dir(path).map(|mut entries| entries.next().is_some()) {
        Ok(true) => Some("a folder that is not empty"),
        Err(_) if path.exists() => Some("something that is no folder"),
        _ => None,
    };
    if let Some(found) = found {
        return Err(Error::Exists { path: path.to_owned(), found }.into());
    }
    let (parent, prefix) = place(path)?;
    let is_new = !parent.exists();
    std::fs::create_dir_all(parent).map_err(Error::io("create", parent))?;
    remove_leftovers(parent, &prefix);
    let mut temporary = tempfile::Builder::new();
    temporary.prefix(&prefix).suffix(".partial").permissions(Permissions::from_mode(0o777));
    let folder = temporary.tempdir_in(parent).map_err(failed)?;
    if let Err(error) = fill(folder.path()) {
        drop(folder);
        if is_new {
            // Empty again, but for what others put there meanwhile.
            let _ = std::fs::remove_dir(parent);
        }
        return Err(error);
    }
    sync_folder(folder.path())?;
    std::fs::rename(folder.path(), path).map_err(failed)?;
    // It has another name now; there is nothing left to remove.
    let _: PathBuf = folder.keep();
    Ok(sync_folder(parent)?)
}

/// Where a temporary for `path` belongs, and how its name begins.
fn place(path: &Path) -> Result<(&Path, String), Error> {
    let name =
        path.file_name().ok_or_else(|| Error::io("write", path)(io::ErrorKind::InvalidInput.into()))?;
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    Ok((parent.unwrap_or(Path::new(".")), format!(".{}.", name.to_string_lossy())))
}

/// Best effort: what cannot be removed is only in the way of disk space.
fn remove_leftovers(parent: &Path, prefix: &str) {
    for entry in std::fs::read_dir(parent).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        let random = name.strip_prefix(prefix).and_then(|rest| rest.strip_suffix(".partial"));
        // A dot would make it one of another name, which begins as this does.
        if random.is_some_and(|random| !random.contains('.')) {
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
}

/// Brings a folder's entries to the disk.
fn sync_folder(path: &Path) -> Result<(), Error> {
    File::open(path).and_then(|folder| folder.sync_all()).map_err(Error::io("write", path))
}
