//! Training on several processes: who they are, what each of them computes and keeps, and how they add up.
//!
//! A process is a *rank*. The records of a step are cut into *shards*; a rank computes the gradients of some shards,
//! and the ranks add them in the order of one binary tree over all shards. So the number of shards decides the bits of
//! a step, and the number of ranks does not: as many shards as ranks are the fastest, a fixed number gives the same
//! bits on 1, 2 or 4 ranks.

mod exchange;
mod link;
mod ranks;
mod shards;

pub use exchange::Exchange;
pub use link::{Alone, Link, Ticket};
pub use ranks::{Ranks, Strategy, check_same, gather_text};
pub use shards::{add_as_tree, deal};

/// Why ranks cannot train together.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// Shards cannot be dealt out evenly.
    #[error("{shards} shards on {ranks} ranks: every rank must have 1, 2, 4, 8 … of them")]
    Shards {
        /// Shards of a step.
        shards: usize,
        /// Ranks.
        ranks: usize,
    },
    /// A rank was started with something else than the first.
    #[error("rank {rank} differs from rank 0 in {what}: {there} there, {here} on rank 0")]
    Differs {
        /// The rank.
        rank: usize,
        /// The name of what differs.
        what: String,
        /// Its value there.
        there: String,
        /// Its value on rank 0.
        here: String,
    },
}

impl Error {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Error::Shards { ranks, .. } => {
                format!("give `--shards` {ranks} times a power of two, or start another number of ranks")
            }
            Error::Differs { .. } => "start every rank with the same program, command and files".into(),
        })
    }
}
