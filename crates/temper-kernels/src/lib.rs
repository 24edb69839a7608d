//! The operations of a decoder, forward and backward, for several devices.
//!
//! [`Device`] is a closed list of operations over flat buffers. [`Plain`] computes them in f64 with obvious
//! loops and is the oracle; [`Cpu`] computes them in f32 with SIMD and threads and is tested against it.
//! [`textbook::self_attention`] is the attention of the papers, dense and masked: it tests `Plain`'s forest
//! attention in turn.
//!
//! Shapes are written as `[rows, columns]`, row-major. `T` is the number of tokens of a micro-batch, `C` the
//! width of the residual stream, `A` the columns of the fused query, key and value projection.

pub mod cpu;
mod device;
pub mod plain;
pub mod quants;
mod random;
pub mod textbook;
mod transpose;

pub use cpu::{Cpu, Precision, Workspace, max};
pub use device::*;
pub use plain::Plain;
pub use random::{mix, uniform};
pub use transpose::transpose;
