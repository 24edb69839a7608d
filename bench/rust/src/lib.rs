//! What both Rust peers share: their command line, the job with its tokens, the weights, and the line they print.

use std::collections::HashMap;
use std::path::PathBuf;

use safetensors::SafeTensors;
use serde_json::{Value, json};

/// Width, layers and heads of GPT-2 124M.
pub const WIDTH: usize = 768;
pub const LAYERS: usize = 12;
pub const HEADS: usize = 12;

/// Tokens of every step and how they are trained.
pub struct Job {
    pub workload: String,
    pub learning_rate: f64,
    /// Steps of rows of equally many tokens.
    pub steps: Vec<Vec<Vec<u32>>>,
    weights: PathBuf,
}

/// A tensor of the checkpoint.
pub struct Weight {
    pub shape: Vec<usize>,
    pub values: Vec<f32>,
}

impl Job {
    /// Reads `MODEL_FOLDER JOB.json` from the command line.
    pub fn from_command_line() -> Self {
        let arguments: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
        let [model, job] = arguments.as_slice() else {
            panic!("give two arguments: the folder of the model and the file of the job");
        };
        let text = std::fs::read_to_string(job).expect("the job can be read");
        let value: Value = serde_json::from_str(&text).expect("the job is JSON");
        Self {
            workload: value["workload"].as_str().expect("`workload` is text").into(),
            learning_rate: value["learning_rate"].as_f64().expect("`learning_rate` is a number"),
            steps: serde_json::from_value(value["steps"].clone()).expect("`steps` holds rows of tokens"),
            weights: model.join("model.safetensors"),
        }
    }

    /// Every tensor of the model, by its name in the file.
    pub fn weights(&self) -> HashMap<String, Weight> {
        let bytes = std::fs::read(&self.weights).expect("model.safetensors can be read");
        let file = SafeTensors::deserialize(&bytes).expect("model.safetensors is whole");
        let read = |data: &[u8]| data.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
        file.iter()
            .map(|(name, view)| {
                (name.to_owned(), Weight { shape: view.shape().to_vec(), values: read(view.data()) })
            })
            .collect()
    }

    /// Prints the one line that the harness reads.
    pub fn report(&self, peer: &str, version: &str, steps: &[(f64, f64)]) {
        let steps: Vec<Value> =
            steps.iter().map(|(seconds, loss)| json!({"seconds": seconds, "loss": loss})).collect();
        let tokens = self.steps[0].iter().map(Vec::len).sum::<usize>();
        println!(
            "{}",
            json!({
                "workload": self.workload,
                "peer": peer,
                "dtype": "f32",
                "steps": steps,
                "tokens": tokens,
                "peak_rss_bytes": peak_rss_bytes(),
                "versions": {peer: version},
            })
        );
    }
}

/// Inputs and targets of a step: every token but the last of a row predicts the one after it.
pub fn shifted(rows: &[Vec<u32>]) -> (Vec<u32>, Vec<u32>) {
    let inputs = rows.iter().flat_map(|row| &row[..row.len() - 1]).copied().collect();
    let targets = rows.iter().flat_map(|row| &row[1..]).copied().collect();
    (inputs, targets)
}

/// The most memory this process ever held, as Linux counts it.
fn peak_rss_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let kib = status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}
