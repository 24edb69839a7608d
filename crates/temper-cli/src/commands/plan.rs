//! `temper plan`: what a training run would need, before anything is allocated.

use std::io::Write;

use anyhow::Result;
use serde_json::{Value, json};
use temper::data::Forest;
use temper::model::can_be_cut;
use temper::model::files::{block_bytes, frozen_bytes};
use temper::parallel::Strategy;
use temper::system;
use temper::train::forecast::{self, Forecast, Work};
use temper::train::{Memory, memory, sampling_bytes, workspace};
use temper_kernels::{Cpu, Precision};

use super::train::{self, Prepared, Task};
use crate::args::Cluster;
use crate::config::Settings;
use crate::output::{bytes, grouped, hinted, results, say, warn};
use crate::ranks;

/// Says the bytes of a run by purpose.
pub fn run(task: &Task<'_>, settings: Settings, cluster: &Cluster) -> Result<()> {
    task.training.output.begin();
    if task.training.parallelism.parallel.is_some() {
        let hint = "leave it away; `--ranks N` shows each way";
        return Err(hinted("`--parallel` has no effect in a plan", hint));
    }
    if let Some(option) = cluster.unused() {
        let hint = "add `--ranks N`, or leave it away";
        return Err(hinted(format!("`{option}` has no effect without `--ranks`"), hint));
    }
    let cpu = task.training.compute.device()?;
    let alone = ranks::alone(&task.training.parallelism)?;
    let prepared = train::prepare(&cpu, task, settings, &alone)?;
    let Prepared { model, adapters, specs, data, trainer, .. } = &prepared;
    let config =
        adapters.as_ref().map_or(model.config.clone(), |adapters| adapters.lora.config(&model.config));
    let bf16 = cpu.precision() == Precision::Bf16;
    let held_out = prepared.held_out.as_ref().map_or(&[][..], |held_out| &held_out.examples);
    let memory = memory(&config, specs, trainer, &data.examples, held_out, bf16.then_some(2), &alone);
    let Memory { rows, trained, gradients, moments, activations, backward } = memory;
    let quantise = task.training.lora.quantise();
    let frozen = frozen_bytes(&model.checkpoint, specs, quantise, if bf16 { 2 } else { 4 });
    let quantised = specs.iter().any(|spec| block_bytes(&model.checkpoint, specs, quantise, spec).is_some());
    let dropout = adapters.as_ref().is_some_and(|adapters| adapters.lora.dropout > 0.0);
    let workspace = cpu.workspace_bytes(&workspace(&config, specs, rows, quantised, dropout));
    let samples = prepared.samples(&task.training.samples);
    let answers = samples.map_or(0, |samples| sampling_bytes(&config, specs, &samples));
    let now = system::resident_memory().unwrap_or(0);
    let lines = [
        ("frozen", "frozen parameters".to_owned(), frozen),
        ("trained", "trained parameters, f32".to_owned(), trained),
        ("gradients", "gradients, f32".to_owned(), gradients),
        ("moments", "moments of AdamW, f32".to_owned(), moments),
        ("activations", format!("activations of {} tokens", grouped(rows)), activations),
        ("backward", "their gradients, f32".to_owned(), backward),
        ("workspace", "what operations take for themselves".to_owned(), workspace),
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
    if let Some(ranks) = cluster.ranks {
        let work = work(&cpu, &prepared, cluster.step_seconds);
        let wires = forecast::Cluster {
            ranks,
            bandwidth: cluster.bandwidth() * 1e9 / 8.0,
            latency: cluster.latency() * 1e-6,
        };
        let forecasts = forecast::forecast(specs, &memory, frozen, wires, work);
        let cut = adapters.as_ref().is_none_or(|adapters| can_be_cut(&adapters.lora, quantise).is_ok());
        let possible = |forecast: &Forecast| forecast.strategy != Strategy::Fsdp || cut;
        let forecasts: Vec<Forecast> = forecasts.into_iter().filter(possible).collect();
        let beside = now + workspace;
        write_forecasts(&mut out, cluster, ranks, work, &forecasts, beside, task.training.output.json)?;
    }
    out.flush()?;
    match system::available_memory() {
        Some(free) if free < total => {
            warn(format!("this machine has {} free; a smaller --microbatch-tokens needs less", bytes(free)));
        }
        Some(free) => say("memory", format!("this machine has {} free", bytes(free))),
        None => {}
    }
    Ok(())
}

/// The share of this machine's peak at which a step runs, where it was not measured.
const SHARE_OF_PEAK: f64 = 0.6;

/// A step of one process on this machine, on average.
fn work(cpu: &Cpu, prepared: &Prepared, measured: Option<f64>) -> Work {
    let Prepared { specs, data, trainer, .. } = prepared;
    let forests = data.examples.iter().map(|example| Forest::new(&example.sequences));
    let (rows, targets) = forests
        .fold((0, 0), |(rows, targets), forest| (rows + forest.rows(), targets + forest.target_rows.len()));
    let steps = trainer.plan.steps_per_epoch() as f64;
    let (rows, targets) = (rows as f64 / steps, targets as f64 / steps);
    let estimate = || {
        say("peak", "measuring products in cache …");
        forecast::operations(specs, rows, targets) / (SHARE_OF_PEAK * cpu.peak_flops(cpu.precision()))
    };
    Work { seconds: measured.unwrap_or_else(estimate), rows, microbatch: trainer.microbatch_tokens }
}

fn write_forecasts(
    out: &mut impl Write,
    cluster: &Cluster,
    ranks: usize,
    work: Work,
    forecasts: &[Forecast],
    beside: u64,
    json: bool,
) -> Result<()> {
    let name = |strategy| match strategy {
        Strategy::Ddp => "ddp",
        Strategy::Zero1 => "zero1",
        Strategy::Fsdp => "fsdp",
    };
    if !json {
        let (bandwidth, latency) = (cluster.bandwidth(), cluster.latency());
        writeln!(
            out,
            "\n{ranks} processes, {bandwidth} Gbit/s, {latency} µs a message; one alone takes {:.2} s a step\n\
             {:<8} {:>14} {:>12} {:>10} {:>14}",
            work.seconds, "parallel", "sent a step", "memory each", "step", "against one",
        )?;
    }
    for forecast in forecasts {
        let (name, memory) = (name(forecast.strategy), forecast.memory as u64 + beside);
        if json {
            let line = json!({
                "parallel": name, "ranks": ranks, "sent_bytes": forecast.sent as u64,
                "memory_bytes": memory, "step_seconds": forecast.seconds, "alone_seconds": work.seconds,
            });
            writeln!(out, "{line}")?;
            continue;
        }
        writeln!(
            out,
            "{name:<8} {:>14} {:>12} {:>10} {:>14}",
            bytes(forecast.sent as u64),
            bytes(memory),
            format!("{:.2} s", forecast.seconds),
            format!("{:.2} ×", work.seconds / forecast.seconds),
        )?;
    }
    Ok(())
}
