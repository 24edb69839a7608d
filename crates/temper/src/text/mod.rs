//! Text to tokens and back: the tokenizer and the chat template.
//!
//! [`Tokenizer`] reads a `tokenizer.json` or a GGUF vocabulary; [`ChatTemplate`] writes conversations as
//! the model knows them. Both are files from strangers: whatever they hold, the answer is an [`Error`].

mod error;
mod gguf;
mod jinja;
mod json;
mod processor;
mod stream;
mod template;
mod tokenizer;

pub use error::Error;
pub use processor::Processor;
pub use stream::DecodeStream;
pub use template::{ChatTemplate, Message, Role, Variables};
pub use tokenizer::Tokenizer;
