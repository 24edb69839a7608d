//! The command `temper`.

mod args;
mod commands;
mod config;
mod output;
mod progress;
mod quickstart;

use std::process::ExitCode;

fn main() -> ExitCode {
    let (cli, settings) = match config::parse(std::env::args_os().collect()) {
        Ok(parsed) => parsed,
        Err(usage) => usage.exit(),
    };
    match commands::run(cli.verb, settings) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => output::failure(&error),
    }
}
