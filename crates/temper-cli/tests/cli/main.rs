//! The binary as people use it: real commands on tiny models and data.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod lora;
mod quickstart;
mod report;
mod results;
mod resume;
mod support;
mod training;
mod usage;
