//! The verbs.

mod adapter;
mod bench;
mod chat;
mod compare;
mod data;
mod dpo;
mod generate;
mod inspect;
mod manifest;
mod merge;
pub mod model;
mod plan;
mod pretrain;
mod report;
mod score;
mod selftest;
mod sft;
pub mod train;

use anyhow::Result;

use crate::args::{Trains, Verb};
use crate::config::Settings;
use crate::ranks;

/// Runs a verb.
pub fn run(verb: Verb, settings: Settings) -> Result<()> {
    if !matches!(verb, Verb::Trains(_) | Verb::Quickstart(_)) {
        ranks::check_alone(&settings.verb)?;
    }
    match verb {
        Verb::Trains(verb) => train::run(&task(&verb)?, settings),
        Verb::Plan { verb, cluster } => plan::run(&task(&verb)?, settings, &cluster),
        Verb::Score(options) => score::run(&options),
        Verb::Compare(options) => compare::run(&options),
        Verb::Generate(options) => generate::run(&options),
        Verb::Chat(options) => chat::run(&options),
        Verb::Merge(options) => merge::run(&options),
        Verb::Inspect(options) => inspect::run(&options),
        Verb::Selftest(options) => selftest::run(&options),
        Verb::Report(options) => report::run(&options),
        Verb::Watch(options) => crate::watch::run(&options),
        Verb::Bench(options) => bench::run(&options),
        Verb::Sweep(options) => crate::sweep::run(&options),
        Verb::Quickstart(options) => crate::quickstart::run(&options),
    }
}

/// What a verb that trains is to do.
fn task(verb: &Trains) -> Result<train::Task<'_>> {
    Ok(match verb {
        Trains::Sft(options) => sft::task(options),
        Trains::Dpo(options) => dpo::task(options),
        Trains::Pretrain(options) => pretrain::task(options)?,
    })
}
