//! Files of a model: Hugging Face folders and GGUF, read and written.

/// Why a checkpoint cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum Error {}

impl Error {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        None
    }
}
pub struct Checkpoint { pub path: std::path::PathBuf, pub config: serde_json::Value }
impl Checkpoint { 
 pub fn read(&self, _: &str) -> Result<Vec<f32>, Error> { Ok(vec![]) }
 pub fn contains(&self, _:&str)->bool{true}
 pub fn tensors(&self) -> impl Iterator<Item=(&str,&[usize])> { std::iter::empty() } }
