//! Post-training of decoder language models: read a checkpoint, make tokens of text, train with SFT
//! or DPO, generate, save. The library never prints and never reads the environment.
//!
//! The way of a token: [`data::records`] → [`data::render`] → [`data::order`] → [`data::forest`] →
//! [`model::decoder`] → [`temper_kernels::Device::head`] → [`objective`] → back through [`model::decoder`] →
//! [`optim`] → [`checkpoint::save`].

pub mod checkpoint;
pub mod data;
mod error;
pub mod generate;
mod hex;
pub mod model;
pub mod objective;
pub mod optim;
pub mod parallel;
pub mod score;
pub mod selftest;
pub mod system;
pub mod text;
pub mod train;

pub use error::{Error, Result};
pub use hex::hex;
