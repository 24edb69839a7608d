//! From files to sequences of tokens with their trained spans, and to batches.
//!
//! `containers` gives rows, `cells` unfolds messages that stand in their text, [`schema`] knows what they mean,
//! [`records`] keeps them, [`render`] makes tokens of them, [`ledger`] counts what became of everything, [`Dataset`] is the
//! whole way; [`order`] says which records make a step, [`forest`] makes a batch of them. [`prompts`] are to be answered,
//! not learnt.

mod cells;
mod containers;
mod dataset;
mod error;
pub mod forest;
pub mod ledger;
pub mod order;
pub mod prompts;
pub mod records;
pub mod render;
pub mod schema;

pub use dataset::{Dataset, Purpose};
pub use error::{Error, Place, Unit};
pub use forest::Forest;
pub use ledger::{Ledger, Reason, grouped};
pub use records::{Answer, Content, Prompt, Record, Records};
pub use render::{Example, Kind, Piece, Renderer, Sequence, TrainOn, Truncation};
pub use schema::Schema;
