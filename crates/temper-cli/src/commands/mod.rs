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
        Verb::Trains(verb) => trains(&verb, settings, &train::run),
        Verb::Plan { verb, cluster } => {
            trains(&verb, settings, &|task, settings| plan::run(task, settings, &cluster))
        }
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

fn trains(verb: &Trains, settings: Settings, act: &train::Act<'_>) -> Result<()> {
    match verb {
        Trains::Sft(options) => sft::run(options, settings, act),
        Trains::Dpo(options) => dpo::run(options, settings, act),
        Trains::Pretrain(options) => pretrain::run(options, settings, act),
    }
}
