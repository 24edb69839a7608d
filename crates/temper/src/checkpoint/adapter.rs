//! The folder of an adapter, as PEFT writes it.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::folder::{self, TOKENIZER_CONFIG};
use super::{Checkpoint, Error, open_file};

/// PEFT's configuration inside the folder.
pub const CONFIG: &str = "adapter_config.json";
/// PEFT's tensors inside the folder.
pub const TENSORS: &str = "adapter_model.safetensors";

/// An opened adapter.
#[derive(Debug)]
pub struct AdapterFiles {
    /// The folder.
    pub path: PathBuf,
    /// `adapter_config.json`, an object.
    pub config: Value,
    /// `adapter_model.safetensors`.
    pub tensors: Checkpoint,
}

/// Opens an adapter's folder.
///
/// # Errors
/// When a file is missing or damaged, or a value is no finite number.
pub fn open_adapter(path: &Path) -> Result<AdapterFiles, Error> {
    std::fs::metadata(path).map_err(Error::io("open", path))?;
    let file = path.join(CONFIG);
    if let Some(missing) = [CONFIG, TENSORS].into_iter().find(|name| !path.join(name).is_file()) {
        let of_run = path.join("final");
        let hint = match missing {
            TENSORS if path.join("adapter_model.bin").exists() => {
                "adapter_model.bin is a pickle: let PEFT save it again with `safe_serialization=True`".into()
            }
            TENSORS => "copy the file that PEFT or temper wrote beside adapter_config.json".into(),
            _ if of_run.join(CONFIG).is_file() => {
                format!("this is a run; its adapter is `{}`", of_run.display())
            }
            _ if path.join("config.json").is_file() => "this is a whole model: give it as `--model`".into(),
            _ => {
                "give the folder that PEFT or temper wrote: the `final` of a run with `--method lora`".into()
            }
        };
        return Err(Error::NotAnAdapter { path: path.to_owned(), missing, hint });
    }
    let config = folder::json(&file)?.unwrap_or_default();
    if !config.is_object() {
        return Err(Error::damaged(&file, "content", "an object", "something else"));
    }
    let tensors = open_file(&path.join(TENSORS))?;
    for (name, _) in tensors.tensors() {
        if let Some(value) = tensors.read(name)?.iter().find(|value| !value.is_finite()) {
            let what = format!("tensor `{name}`");
            return Err(Error::damaged(&path.join(TENSORS), what, "finite numbers", value.to_string()));
        }
    }
    Ok(AdapterFiles { path: path.to_owned(), config, tensors })
}

impl AdapterFiles {
    /// The chat template that was saved beside it.
    ///
    /// # Errors
    /// When a file that may have it cannot be read.
    pub fn chat_template(&self) -> Result<Option<String>, Error> {
        let tokenizer_config = folder::json(&self.path.join(TOKENIZER_CONFIG))?;
        folder::chat_template(&self.path, tokenizer_config.as_ref())
    }

    /// SHA-256 over the configuration and the tensors, in hexadecimal.
    ///
    /// # Errors
    /// When a file cannot be read.
    pub fn content_hash(&self) -> Result<String, Error> {
        self.tensors.hash_with(&self.config)
    }
}
