//! Why a checkpoint cannot be read or written.

use std::io;
use std::path::{Path, PathBuf};

/// Why a checkpoint cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system refused.
    #[error("cannot {action} `{}`: {source}", path.display())]
    Io {
        /// A verb: read, write, …
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The path holds no model that temper reads.
    #[error("`{}` is no checkpoint: expected {expected}, found {found}", path.display())]
    NotACheckpoint {
        /// What was given.
        path: PathBuf,
        /// What would be read.
        expected: &'static str,
        /// What is there.
        found: String,
        /// What to do about it.
        hint: Option<String>,
    },
    /// The folder holds no adapter that temper reads.
    #[error("`{}` is no adapter: it has no {missing}", path.display())]
    NotAnAdapter {
        /// What was given.
        path: PathBuf,
        /// The file that should be there.
        missing: &'static str,
        /// What to do about it.
        hint: String,
    },
    /// A JSON file does not parse.
    #[error("`{}` is not valid JSON: {source}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },
    /// A clone without its large files.
    #[error("`{}` is a pointer of Git LFS, not the file itself", path.display())]
    LfsPointer {
        /// The file.
        path: PathBuf,
    },
    /// A file's structure contradicts itself or its length.
    #[error("`{}` is damaged: {what}: expected {expected}, found {found}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// The part of the file.
        what: String,
        /// What the format allows there.
        expected: String,
        /// What is there.
        found: String,
    },
    /// A key of GGUF's metadata is missing or not as temper needs it.
    #[error("`{}`: metadata key `{key}`: expected {expected}, found {found}", path.display())]
    Metadata {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// What is accepted.
        expected: String,
        /// What the file holds.
        found: String,
    },
    /// A tensor is there, but not as temper needs it.
    #[error("`{}`: tensor `{tensor}`: expected {expected}, found {found}", path.display())]
    Tensor {
        /// The file that holds the tensor.
        path: PathBuf,
        /// Its name in that file.
        tensor: String,
        /// What is accepted.
        expected: String,
        /// What the file holds.
        found: String,
    },
    /// A tensor that the model needs is not in the checkpoint.
    #[error("`{}` has no tensor `{tensor}`", path.display())]
    MissingTensor {
        /// The checkpoint.
        path: PathBuf,
        /// The name that was asked for.
        tensor: String,
    },
    /// A name in a shard index would lead out of the folder.
    #[error("`{}`: shard name `{name}`: expected a plain file name inside the folder", path.display())]
    ShardName {
        /// The index.
        path: PathBuf,
        /// What it says, control characters escaped.
        name: String,
    },
    /// A folder cannot be written over.
    #[error("cannot save to `{}`: expected a path that does not exist yet, found {found}", path.display())]
    Exists {
        /// The path to be written.
        path: PathBuf,
        /// What is there.
        found: &'static str,
    },
    /// Only a file can be written over.
    #[error("cannot write `{}`: expected a file, or nothing yet, found something else", _0.display())]
    NoFile(PathBuf),
    /// The values given for saving do not have the stated shape.
    #[error("cannot save tensor `{tensor}`: expected {expected} values for shape {shape:?}, found {found}")]
    SavedShape {
        /// The tensor.
        tensor: String,
        /// Its shape.
        shape: Vec<usize>,
        /// The product of the shape, as a number or `too many`.
        expected: String,
        /// Values given.
        found: usize,
    },
    /// A value to be saved is not a number, or larger than the type holds.
    #[error("cannot save tensor `{tensor}`: {value:e} is not a finite number of type {save_type}")]
    SavedValue {
        /// The tensor.
        tensor: String,
        /// The first such value.
        value: f32,
        /// The type, as safetensors names it.
        save_type: &'static str,
    },
    /// Two tensors to be saved have the same name.
    #[error("cannot save two tensors of the name `{tensor}`")]
    SavedTwice {
        /// The name.
        tensor: String,
    },
}

impl Error {
    /// What the user can do about it, when there is something.
    pub fn hint(&self) -> Option<String> {
        match self {
            Error::NotACheckpoint { hint, .. } => hint.clone(),
            Error::NotAnAdapter { hint, .. } => Some(hint.clone()),
            Error::Io { source, .. } if source.kind() == io::ErrorKind::StorageFull => {
                Some("free some space and run the command again; nothing half-written was left".into())
            }
            Error::Io { action, path, source } if source.kind() == io::ErrorKind::NotFound => {
                let needed = if *action == "write" { path.parent()? } else { path };
                Some(format!("check that `{}` exists", needed.display()))
            }
            Error::Metadata { key, .. } if key == "split.count" => {
                Some("join the file's parts first: `llama-gguf-split --merge FIRST-PART WHOLE.gguf`".into())
            }
            Error::LfsPointer { .. } => {
                Some("fetch the clone's large files with `git lfs pull`, or download the file".into())
            }
            Error::Damaged { .. } | Error::Json { .. } => Some("download or copy the file again".into()),
            Error::SavedValue { value, save_type: "BF16", .. } if value.is_finite() => {
                Some("save as f32: rounded to bf16 it is infinite".into())
            }
            Error::SavedValue { value, .. } if value.is_finite() => {
                Some("save as f32, or as bf16, which reaches nearly as far".into())
            }
            Error::SavedValue { .. } => Some(
                "the training diverged: lower `--learning-rate`; earlier checkpoints are untouched".into(),
            ),
            Error::Exists { .. } => Some("name another folder or remove this one".into()),
            Error::NoFile(_) => Some("name a file; a folder, a device or a pipe cannot be replaced".into()),
            _ => None,
        }
    }

    /// An I/O error with its path; for `map_err`.
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
        let path = path.to_owned();
        move |source| Error::Io { action, path, source }
    }

    /// A structural error in `path`.
    pub(super) fn damaged(
        path: &Path,
        what: impl Into<String>,
        expected: impl Into<String>,
        found: impl Into<String>,
    ) -> Error {
        Error::Damaged {
            path: path.to_owned(),
            what: what.into(),
            expected: expected.into(),
            found: found.into(),
        }
    }

    /// An unusable tensor in `path`.
    pub(super) fn tensor(
        path: &Path,
        tensor: &str,
        expected: impl Into<String>,
        found: impl Into<String>,
    ) -> Error {
        Error::Tensor {
            path: path.to_owned(),
            tensor: printable(tensor),
            expected: expected.into(),
            found: found.into(),
        }
    }
}

/// A name from a file as it may be shown: control characters escaped, long ones cut.
pub(super) fn printable(name: &str) -> String {
    const LONGEST: usize = 120;
    let shown: String =
        name.chars().take(LONGEST).flat_map(|c| c.escape_debug().collect::<Vec<_>>()).collect();
    if name.chars().nth(LONGEST).is_some() { shown + "…" } else { shown }
}
