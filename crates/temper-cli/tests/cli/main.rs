//! The binary as people use it: real commands on tiny models and data.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod browser;
mod compare;
mod lora;
mod mlflow;
mod mpi;
mod quickstart;
mod report;
mod results;
mod resume;
mod support;
mod sweep;
mod tensorboard;
mod training;
mod usage;
mod watch;
