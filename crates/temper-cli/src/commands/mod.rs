//! The verbs.

mod chat;
mod data;
mod dpo;
mod generate;
mod inspect;
mod manifest;
pub mod model;
mod pretrain;
mod score;
mod selftest;
mod sft;
mod train;

use anyhow::Result;

use crate::args::Verb;
use crate::config::Settings;

/// Runs a verb.
pub fn run(verb: Verb, settings: Settings) -> Result<()> {
    match verb {
        Verb::Sft(options) => sft::run(&options, settings),
        Verb::Dpo(options) => dpo::run(&options, settings),
        Verb::Pretrain(options) => pretrain::run(&options, settings),
        Verb::Score(options) => score::run(&options),
        Verb::Generate(options) => generate::run(&options),
        Verb::Chat(options) => chat::run(&options),
        Verb::Inspect(options) => inspect::run(&options),
        Verb::Selftest(options) => selftest::run(&options),
        Verb::Quickstart(options) => crate::quickstart::run(&options),
    }
}
