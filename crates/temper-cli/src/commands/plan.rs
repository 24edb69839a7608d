//! `temper plan`: what a training run would need, before anything is allocated.

use std::io::Write;

use anyhow::Result;
use serde_json::{Value, json};
use temper::model::files::{Quantise, frozen_bytes};
use temper::parallel::Ranks;
use temper::train::{Memory, memory, sampling_bytes};
use temper_kernels::Precision;

use super::train::{self, Prepared, Task};
use crate::config::Settings;
use crate::output::{bytes, grouped, results, say, warn};

/// Says the bytes of a run by purpose.
pub fn run(task: &Task<'_>, settings: Settings) -> Result<()> {
    task.training.output.begin();
    let cpu = task.training.compute.device()?;
    let prepared = train::prepare(&cpu, task, settings, &Ranks::alone())?;
    let Prepared { model, adapting, specs, data, trainer, .. } = &prepared;
    let config =
        adapting.as_ref().map_or(model.config.clone(), |adapting| adapting.lora.config(&model.config));
    let bf16 = cpu.precision() == Precision::Bf16;
    let memory = memory(&config, specs, trainer, &data.examples, bf16.then_some(2));
    let Memory { rows, trained, trained_matrices, gradients, moments, activations, backward } = memory;
    let quantise = adapting.as_ref().map_or(Quantise::None, |adapting| adapting.quantise);
    let frozen = frozen_bytes(&model.checkpoint, specs, quantise, if bf16 { 2 } else { 4 });
    let samples = prepared.samples(&task.training.samples);
    let answers = samples.map_or(0, |samples| sampling_bytes(&config, specs, &samples));
    let now = resident("VmRSS:", "/proc/self/status").unwrap_or(0);
    let lines = [
        ("frozen", "frozen parameters".to_owned(), frozen),
        ("trained", "trained parameters, f32".to_owned(), trained),
        ("copies", "their copies in bf16".to_owned(), if bf16 { trained_matrices / 2 } else { 0 }),
        ("gradients", "gradients, f32".to_owned(), gradients),
        ("moments", "moments of AdamW, f32".to_owned(), moments),
        ("activations", format!("activations of {} tokens", grouped(rows)), activations),
        ("backward", "their gradients, f32".to_owned(), backward),
        ("samples", "answers to prompts, f32".to_owned(), answers),
        ("program", "program, tokenizer and data".to_owned(), now),
    ];
    let total: u64 = lines.iter().map(|(.., bytes)| bytes).sum();
    let mut out = results();
    if task.training.output.json {
        let sizes = lines.iter().map(|(key, _, size)| (format!("{key}_bytes"), json!(size)));
        let together = ("together_bytes".to_owned(), json!(total));
        writeln!(out, "{}", Value::Object(sizes.chain([together]).collect()))?;
    } else {
        for (_, purpose, size) in lines.iter().filter(|(.., size)| *size > 0) {
            writeln!(out, "{purpose:<36} {:>10}", bytes(*size))?;
        }
        writeln!(out, "{:<36} {:>10}", "together", bytes(total))?;
    }
    out.flush()?;
    match resident("MemAvailable:", "/proc/meminfo") {
        Some(free) if free < total => {
            warn(format!("this machine has {} free; a smaller --microbatch-tokens needs less", bytes(free)));
        }
        Some(free) => say("memory", format!("this machine has {} free", bytes(free))),
        None => {}
    }
    Ok(())
}

/// A line in kB of a file of the system.
fn resident(key: &str, file: &str) -> Option<u64> {
    let text = std::fs::read_to_string(file).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(key))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}
