//! Answers to the same prompts while a model learns: `samples.jsonl` beside the metrics. They are read off the model
//! in training, by the likeliest token, and change nothing of it.

use std::cell::Cell;

use serde_json::{Value, json};
use temper_kernels::Device;

use super::logs::Logs;
use super::{Event, Run};
use crate::generate::{self, Options, Reply, Sampling};
use crate::model::activations::Activations;
use crate::model::spec::Spec;
use crate::model::weights::Weights;
use crate::model::{Config, Decoder};

/// Prompts that are answered at a time.
const TOGETHER: usize = 8;

/// What is asked.
#[derive(Debug, Clone, Copy)]
pub struct Samples<'a> {
    /// Each prompt's text, for showing, and its tokens.
    pub prompts: &'a [(String, Vec<u32>)],
    /// Ask every so many steps; 0 for before the first and after the last only.
    pub steps: u64,
    /// The most tokens of an answer.
    pub max_new_tokens: usize,
}

/// What was answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sample {
    /// The prompt's text.
    pub prompt: String,
    /// The answer's.
    pub answer: String,
    /// Its number of tokens.
    pub tokens: usize,
}

/// A sample as a line of samples.jsonl.
pub fn sample_line(step: u64, sample: &Sample) -> Value {
    json!({ "step": step, "prompt": sample.prompt, "answer": sample.answer, "tokens": sample.tokens })
}

/// Asks, if the run wants it, and keeps what is answered. Every rank computes all answers: where parameters lie in pieces it
/// must, elsewhere it would only wait. False when the run was asked to stop meanwhile, and nothing was kept.
pub(super) fn ask<D: Device>(
    device: &D,
    decoder: &mut Decoder<D>,
    run: &Run<'_>,
    step: u64,
    logs: &mut Logs,
    show: &mut dyn FnMut(Event<'_>),
) -> crate::Result<bool> {
    let Some(samples) = run.samples else { return Ok(true) };
    decoder.gather_ends(device);
    let answers = answers(device, decoder, run, &samples);
    decoder.release_ends(device);
    let Some(answers) = answers? else { return Ok(false) };
    let lines: Vec<Value> = answers.iter().map(|sample| sample_line(step, sample)).collect();
    logs.add_samples(&lines, show)?;
    show(Event::Sampled(step, &answers));
    Ok(true)
}

fn answers<D: Device>(
    device: &D,
    decoder: &Decoder<D>,
    run: &Run<'_>,
    samples: &Samples<'_>,
) -> crate::Result<Option<Vec<Sample>>> {
    let processor = run.processor;
    let options = Options {
        max_new_tokens: samples.max_new_tokens,
        sampling: Sampling::GREEDY,
        stop: processor.stop.clone(),
    };
    let tokens: Vec<Vec<u32>> = samples.prompts.iter().map(|(_, tokens)| tokens.clone()).collect();
    let batches = generate::answers(device, decoder, processor, &tokens, &options, TOGETHER);
    let mut replies = Vec::with_capacity(tokens.len());
    for batch in batches {
        replies.extend(batch?);
        if run.stops() {
            return Ok(None);
        }
    }
    let sample = |((prompt, _), Reply { text, tokens }): (&(String, _), Reply)| Sample {
        prompt: prompt.clone(),
        answer: text,
        tokens,
    };
    Ok(Some(samples.prompts.iter().zip(replies).map(sample).collect()))
}

/// The bytes that asking takes for as long as it lasts, at most: keys and values, activations, logits.
pub fn sampling_bytes(config: &Config, specs: &Weights<Spec>, samples: &Samples<'_>) -> u64 {
    let columns = Cell::new(0);
    let count = |more: usize| columns.set(columns.get() + more);
    let _ = Activations::new(config, specs, 1, false, count, count);
    let cached = 2 * config.layers.len() * config.kv_heads * config.head_width;
    let numbers = |prompts: &[(String, Vec<u32>)]| {
        let rows: usize = prompts.iter().map(|(_, tokens)| tokens.len()).sum();
        let made = prompts.len() * samples.max_new_tokens.min(config.context);
        rows * columns.get() + (rows + made) * cached + prompts.len() * config.vocabulary
    };
    4 * samples.prompts.chunks(TOGETHER).map(numbers).max().unwrap_or(0) as u64
}
