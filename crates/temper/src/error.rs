//! The library's error: one variant a module, each module with its own typed reasons.

/// What can go wrong in temper, by the module that noticed it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A checkpoint could not be read or written.
    #[error(transparent)]
    Checkpoint(#[from] crate::checkpoint::Error),
    /// A tokenizer or a chat template failed.
    #[error(transparent)]
    Text(#[from] crate::text::Error),
    /// A data file could not be read.
    #[error(transparent)]
    Data(#[from] crate::data::Error),
    /// A model's configuration or weights cannot be used.
    #[error(transparent)]
    Model(#[from] crate::model::Error),
    /// Nothing can be generated.
    #[error(transparent)]
    Generate(#[from] crate::generate::Error),
    /// Training stopped.
    #[error(transparent)]
    Train(#[from] crate::train::Error),
    /// Ranks cannot train together.
    #[error(transparent)]
    Parallel(#[from] crate::parallel::Error),
}

impl Error {
    /// What the user can do about it, when there is something.
    pub fn hint(&self) -> Option<String> {
        match self {
            Error::Checkpoint(error) => error.hint(),
            Error::Text(error) => error.hint(),
            Error::Data(error) => error.hint(),
            Error::Model(error) => error.hint(),
            Error::Generate(error) => error.hint(),
            Error::Train(error) => error.hint(),
            Error::Parallel(error) => error.hint(),
        }
    }
}

/// The library's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;
