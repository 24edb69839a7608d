//! What a page asks of runs: curves, answers, settings, the end of the log.

use std::io;

use serde_json::{Value, json};
use temper::train::directory;

use super::folder::{Watched, log, manifest, read_end, read_lines};
use crate::output::clipped;
use crate::output::escaped;
use crate::report::metrics::Metrics;
use crate::report::page::run_data;
use crate::report::plots::{PLOTS, Plot};
use crate::report::run::{Run, Sample};
use crate::report::tables;

/// Columns of pixels of a curve.
const COLUMNS: usize = 500;

/// Bytes at the end of samples and log, prompts, and answers to each.
const SAMPLES: u64 = 256 << 10;
const LOG: u64 = 6 << 10;
const PROMPTS: usize = 24;
const ANSWERS: usize = 4;

/// The points of some metrics, as a page draws them.
pub fn of(metrics: Metrics) -> Value {
    drawn(&Run { metrics, ..Run::default() })
}

fn drawn(run: &Run) -> Value {
    let plots: Vec<&Plot> = PLOTS.iter().collect();
    run_data(&plots, run, COLUMNS)
}

/// The curves up to where the run's metrics were read.
pub fn curves(run: &Watched) -> io::Result<Value> {
    let mut metrics = Metrics::default();
    let end = read_lines(&run.place.join(directory::METRICS), 0, run.read.end, &mut metrics)?;
    let mut read = Run { metrics, ..Run::default() };
    read.note_metrics(false);
    Ok(json!({ "file": run.read.key(), "end": end, "notes": read.notes, "run": drawn(&read) }))
}

/// The settings, the last answers, the end of the log.
pub fn about(run: &Watched) -> Value {
    let mut read = Run { manifest: manifest(&run.place), ended: run.ended(), ..Run::default() };
    read.note_failure();
    if let Some(bytes) = read_end(&run.place.join(directory::SAMPLES), SAMPLES) {
        let whole = bytes.iter().rposition(|&byte| byte == b'\n').map_or(0, |end| end + 1);
        read.read_samples(&bytes[..whole]);
    }
    let (said, log) = said(run);
    json!({
        "id": run.id,
        "folder": run.place.display().to_string(),
        "settings": tables::settings(&read),
        "answers": answers(&read.samples),
        "notes": read.notes,
        "said": said,
        "log": log,
    })
}

/// The last answers to each prompt, the newest first.
fn answers(samples: &[Sample]) -> Vec<Value> {
    let mut prompts: Vec<(&str, Vec<&Sample>)> = Vec::new();
    for sample in samples {
        match prompts.iter().position(|(prompt, _)| *prompt == sample.prompt) {
            Some(at) => prompts[at].1.push(sample),
            None if prompts.len() < PROMPTS => prompts.push((&sample.prompt, vec![sample])),
            None => {}
        }
    }
    let answer = |sample: &&Sample| json!({ "step": sample.step, "answer": clipped(sample.answer.trim()) });
    let prompt = |(prompt, answers): &(&str, Vec<&Sample>)| {
        let last: Vec<Value> = answers.iter().rev().take(ANSWERS).map(answer).collect();
        json!({ "prompt": clipped(prompt), "answers": last })
    };
    prompts.iter().map(prompt).collect()
}

/// The name of what a run said, and its end: the log that a sweep keeps, else the last lines of the metrics.
fn said(run: &Watched) -> (String, String) {
    let path = log(&run.place).unwrap_or_else(|| run.place.join(directory::METRICS));
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let bytes = read_end(&path, LOG).unwrap_or_default();
    (name, escaped(&String::from_utf8_lossy(&bytes)))
}

/// Where the settings of runs differ.
pub fn differences(runs: &[Watched]) -> Value {
    let read =
        |run: &Watched| Run { name: run.name.clone(), manifest: manifest(&run.place), ..Run::default() };
    let rows = tables::differences(&runs.iter().map(read).collect::<Vec<_>>());
    json!({ "runs": runs.iter().map(|run| &run.name).collect::<Vec<_>>(), "rows": rows })
}
