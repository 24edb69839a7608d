//! The command `temper`.

mod args;
mod commands;
mod config;
mod events;
mod interrupt;
mod mlflow;
mod output;
mod progress;
mod quickstart;
mod ranks;
mod report;
mod sweep;
mod watch;

use std::process::ExitCode;

/// The signal of a file that outgrows its limit (`ulimit -f`).
const FILE_SIZE_EXCEEDED: i32 = 25;

fn main() -> ExitCode {
    // Caught, so that the write fails with a message instead of the process.
    let _ = signal_hook::flag::register(FILE_SIZE_EXCEEDED, Default::default());
    let (cli, settings) = match config::parse(std::env::args_os().collect()) {
        Ok(parsed) => parsed,
        Err(usage) => usage.exit(),
    };
    match commands::run(cli.verb, settings) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => output::failure(&error),
    }
}
