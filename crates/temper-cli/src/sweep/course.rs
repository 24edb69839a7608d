//! What a run has come to, read from its metrics.jsonl.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use serde_json::Value;
use temper::train::directory;

/// Bytes at the end of the file that hold its last lines.
const TAIL: u64 = 1 << 13;

/// A run's metrics; none before its first step.
pub fn metrics(folder: &Path) -> Vec<Value> {
    directory::lines(&folder.join(directory::METRICS))
}

/// The last value of a metric from a step up to another.
pub fn value(lines: &[Value], metric: &str, from: u64, until: u64) -> Option<f64> {
    let within = |line: &&Value| line["step"].as_u64().is_some_and(|step| (from..=until).contains(&step));
    lines.iter().filter(within).filter_map(|line| line[metric].as_f64()).next_back()
}

/// The last step.
pub fn last_step(lines: &[Value]) -> u64 {
    lines.iter().filter_map(|line| line["step"].as_u64()).max().unwrap_or(0)
}

/// Seconds of steps.
pub fn seconds<'a>(lines: impl Iterator<Item = &'a Value>) -> f64 {
    lines.filter_map(|line| line["seconds"].as_f64()).fold(0.0, |sum, seconds| sum + seconds)
}

/// The last step's line, without reading the whole file.
pub fn last_line(folder: &Path) -> Option<Value> {
    let mut file = File::open(folder.join(directory::METRICS)).ok()?;
    let length = file.metadata().ok()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(TAIL))).ok()?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).ok()?;
    let lines = bytes.rsplit(|&byte| byte == b'\n').filter_map(|line| serde_json::from_slice(line).ok());
    lines.into_iter().find(|line: &Value| line["loss"].is_number())
}
