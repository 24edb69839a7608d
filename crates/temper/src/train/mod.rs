//! Training: steps over a plan of records, and the run directory around them.

pub mod directory;
pub mod forecast;
mod gradients;
mod logs;
mod memory;
mod metrics;
pub mod reference;
mod run;
mod samples;
mod start;
mod state;
mod step;
mod tensorboard;

pub use logs::{eval_line, step_line};
pub use memory::{Memory, memory, workspace};
pub use metrics::{Metrics, Preferences, StepReport};
pub use run::{Event, Outcome, Run, run};
pub use samples::{Sample, Samples, sample_line, sampling_bytes};
pub use start::{Start, write_weights};
pub use step::{Objective, Trainer, TrainerSettings};

use std::path::{Path, PathBuf};

/// Why a run stopped or could not start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A loss or gradient is not a number, or infinite.
    #[error("step {step}: {what} is not finite; first tensor with a gradient that is not finite: {tensor}")]
    NonFinite {
        /// The optimizer step.
        step: u64,
        /// `the loss` or `the gradient norm`.
        what: &'static str,
        /// The step's records, by their number among those of the data set.
        records: Vec<usize>,
        /// Its name, or `none`.
        tensor: String,
    },
    /// A run directory cannot be used.
    #[error("{}: {message}", path.display())]
    Run {
        /// The directory.
        path: PathBuf,
        /// What is wrong.
        message: String,
        /// What to do.
        hint: Option<String>,
    },
}

impl Error {
    fn run(path: &Path, message: impl Into<String>, hint: Option<&str>) -> Error {
        Error::Run { path: path.to_owned(), message: message.into(), hint: hint.map(str::to_owned) }
    }

    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Error::NonFinite { .. } => Some("no checkpoint was changed; look at the records of this step with `temper inspect`, or lower `--learning-rate`".into()),
            Error::Run { hint, .. } => hint.clone(),
        }
    }
}
