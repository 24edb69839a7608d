//! `temper merge`.

use std::path::Path;

use anyhow::{Context, Result};
use chrono::Utc;
use temper::checkpoint::save::create_folder;
use temper::data::{Forest, Sequence};
use temper::model::decoder::StepDropout;
use temper::model::files::Quantise;
use temper::model::merge::merge;
use temper::model::{Decoder, Source};
use temper::train::write_weights;
use temper_kernels::{Cpu, Device, Precision};

use super::adapter;
use super::model::Model;
use crate::args::{Merge, quantise_name};
use crate::output::{grouped, hinted, say};
use crate::ranks::cores;

/// What both models read, to see whether they are the same.
const PROMPTS: [&str; 4] = [
    "The library opens at nine in the morning and closes at six.",
    "To bake bread one needs flour, water, salt and a little patience.",
    "def area(width, height):\n    return width * height\n",
    "Question: How many legs do three spiders have?\nAnswer:",
];

/// Writes the merged model, and says how far it is from base and adapter.
pub fn run(options: &Merge) -> Result<()> {
    let threads = options.threads.unwrap_or_else(cores);
    let cpu = Cpu::new(threads, Precision::F32).context("cannot start the threads")?;
    cpu.install(|| run_on(&cpu, options))
}

fn run_on(cpu: &Cpu, options: &Merge) -> Result<()> {
    let adapters = adapter::open(&options.adapter)?;
    let model = Model::open(&options.model, None, Some(&adapters), Utc::now())?;
    model.introduce(&options.model);
    let forest = forest(&model)?;
    let decoder = model.decoder(cpu, Some(&adapters), Quantise::None)?;
    let apart = logits(cpu, &decoder, &forest);
    if apart.iter().any(|z| !z.is_finite()) {
        let message = "the model with its adapters: expected finite logits, found others";
        return Err(hinted(message, "a value of the model or of an adapter is damaged, or much too large"));
    }
    write(cpu, &model, merge(cpu, decoder), options)?;
    let written = temper::checkpoint::open(&options.out)?;
    let together = logits(cpu, &Source::frozen(&written, Quantise::None)?.whole(cpu)?, &forest);
    say("done", format!("the model is in `{}`", options.out.display()));
    let name = format!("{:?}", options.dtype).to_lowercase();
    compare("compared", &format!("merged in {name} against base and adapter"), &together, &apart);
    if matches!(options.quantize, Quantise::Nf4 | Quantise::Int8) {
        let trained = logits(cpu, &model.decoder(cpu, Some(&adapters), options.quantize)?, &forest);
        let name = quantise_name(options.quantize);
        compare(
            "",
            &format!("merged against adapter on the {name} base it was trained on"),
            &together,
            &trained,
        );
    }
    Ok(())
}

/// Every token of the prompts.
fn forest(model: &Model) -> Result<Forest> {
    let mut sequences = Vec::new();
    for prompt in PROMPTS {
        let mut tokens = model.processor.prompt(prompt)?;
        tokens.truncate(model.config.context);
        sequences.push(Sequence { trained: vec![1..tokens.len()], prompt: 1, tokens });
    }
    Ok(Forest::new(&sequences))
}

fn logits(cpu: &Cpu, decoder: &Decoder<Cpu>, forest: &Forest) -> Vec<f32> {
    let mut activations = decoder.activations(cpu, forest.rows(), false);
    decoder.forward(cpu, forest, StepDropout::default(), None, &mut activations);
    let mut logits = cpu.zeros(forest.target_rows.len() * decoder.config.vocabulary);
    decoder.logits(cpu, &mut logits, forest, &activations);
    logits
}

fn write(cpu: &Cpu, model: &Model, decoder: Decoder<Cpu>, options: &Merge) -> Result<()> {
    let config = decoder.config.to_json(&model.checkpoint.config);
    let generation_config = model.checkpoint.generation_config.as_ref();
    create_folder(&options.out, |folder: &Path| -> temper::Result<()> {
        let processor = &model.processor;
        write_weights(cpu, &decoder, processor, generation_config, &config, folder, options.dtype)
    })?;
    Ok(())
}

/// Says how far logits are apart.
fn compare(label: &str, what: &str, found: &[f32], expected: &[f32]) {
    let largest = expected.iter().fold(0f32, |max, z| max.max(z.abs()));
    // A total order: what is not a number is the largest.
    let apart = found.iter().zip(expected).map(|(a, b)| (a - b).abs()).max_by(f32::total_cmp).unwrap_or(0.0);
    let count = grouped(expected.len());
    say(label, format!("{what}: logits differ by at most {apart:.2e} of {largest:.1} ({count} logits)"));
}
