//! The folder of an adapter, as PEFT writes it.

use std::path::{Path, PathBuf};

use serde_json::Value;

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
/// When a file is missing or damaged.
pub fn open_adapter(path: &Path) -> Result<AdapterFiles, Error> {
    let file = path.join(CONFIG);
    if let Some(missing) = [CONFIG, TENSORS].into_iter().find(|name| !path.join(name).is_file()) {
        let hint = match missing {
            TENSORS if path.join("adapter_model.bin").exists() => {
                "adapter_model.bin is a pickle: let PEFT save it again with `safe_serialization=True`"
            }
            TENSORS => "copy the file that PEFT or temper wrote beside adapter_config.json",
            _ => "give the folder that PEFT or temper wrote: the `final` of a run with `--method lora`",
        };
        return Err(Error::NotAnAdapter { path: path.to_owned(), missing, hint });
    }
    let bytes = std::fs::read(&file).map_err(Error::io("read", &file))?;
    let config: Value =
        serde_json::from_slice(&bytes).map_err(|source| Error::Json { path: file.clone(), source })?;
    if !config.is_object() {
        return Err(Error::damaged(&file, "content", "an object", "something else"));
    }
    Ok(AdapterFiles { path: path.to_owned(), config, tensors: open_file(&path.join(TENSORS))? })
}

impl AdapterFiles {
    /// The chat template that was saved beside it.
    pub fn chat_template(&self) -> Option<String> {
        if let Ok(template) = std::fs::read_to_string(self.path.join("chat_template.jinja")) {
            return Some(template);
        }
        let config = std::fs::read(self.path.join("tokenizer_config.json")).ok()?;
        let config: Value = serde_json::from_slice(&config).ok()?;
        Some(config["chat_template"].as_str()?.to_owned())
    }

    /// SHA-256 over the configuration and the tensors, in hexadecimal.
    ///
    /// # Errors
    /// When a file cannot be read.
    pub fn content_hash(&self) -> Result<String, Error> {
        self.tensors.hash_with(&self.config)
    }
}
