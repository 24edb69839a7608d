//! The binary as people use it: real commands on tiny models and data.

mod results;
mod resume;
mod support;
mod training;
mod usage;
