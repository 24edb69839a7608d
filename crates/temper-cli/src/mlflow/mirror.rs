//! A run as MLflow has it: its settings as parameters, the numbers of metrics.jsonl as metrics.
//!
//! A point's time is the run's date and the seconds of its steps until then, so that a point that is sent again, because
//! an answer was lost, is the same point. A run that goes on computes the steps after its checkpoint again, with equal
//! numbers; what was sent of them stays.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use anyhow::{Context, Result};
use chrono::DateTime;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use temper::checkpoint::save::write_json;
use temper::train::directory::{MANIFEST, METRICS};

use super::address::Address;
use super::server::{Failure, Server};
use crate::output::say;

const STATE: &str = "mlflow.json";

/// MLflow's limits of a request, and the shortest limit of a parameter that its versions had.
const MOST_METRICS: usize = 1000;
const MOST_PARAMS: usize = 100;
const LONGEST_PARAM: usize = 500;

/// `mlflow.json`: the run on the server, and what it has.
#[derive(Debug, Serialize, Deserialize)]
pub struct State {
    uri: String,
    experiment: String,
    /// Empty while there is none.
    run: String,
    status: String,
    /// Whether it has the parameters. They never change there; what a later command has otherwise stays with the run.
    #[serde(default)]
    params: bool,
    sent: Sent,
}

/// The last step whose line was sent, and the last one whose evaluation was; none before the first.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
struct Sent {
    step: Option<u64>,
    eval_step: Option<u64>,
}

impl State {
    /// What the server at an address has of the run in a directory: nothing, if that went elsewhere or nowhere.
    pub fn read(out: &Path, address: &Address) -> State {
        let bytes = fs::read(out.join(STATE)).unwrap_or_default();
        let state = serde_json::from_slice(&bytes).ok();
        let state = state
            .filter(|state: &State| (&state.uri, &state.experiment) == (&address.uri, &address.experiment));
        state.unwrap_or_else(|| {
            let Address { uri, experiment } = address.clone();
            let (run, status, params) = (String::new(), String::new(), false);
            State { uri, experiment, run, status, params, sent: Sent::default() }
        })
    }

    /// Lines that are not sent; none when the server has everything, the status too.
    pub fn missing(&self, out: &Path, status: &str) -> Option<usize> {
        let bytes = fs::read(out.join(METRICS)).unwrap_or_default();
        let mut sent = self.sent;
        let lines = bytes.split(|&byte| byte == b'\n').filter_map(|line| serde_json::from_slice(line).ok());
        let count = lines.filter(|line| sent.advance(line).is_some()).count();
        (count > 0 || self.status != status).then_some(count)
    }
}

impl Sent {
    /// Counts a line as sent and gives its step, unless it was sent before.
    fn advance(&mut self, line: &Value) -> Option<u64> {
        let step = line["step"].as_u64()?;
        let last = if line.get("eval_loss").is_some() { &mut self.eval_step } else { &mut self.step };
        let is_new = Some(step) > *last;
        *last = Some(step).max(*last);
        is_new.then_some(step)
    }
}

/// How far metrics.jsonl is read.
#[derive(Clone, Copy, Default)]
struct ReadSoFar {
    offset: u64,
    /// Of all steps before.
    seconds: f64,
}

/// A run on its way to a server.
pub struct Mirror {
    server: Server,
    address: Address,
    out: PathBuf,
    manifest: Value,
    /// The run's date in milliseconds.
    begin: i64,
    state: State,
    /// Whether the server knows that this process goes on with it.
    begun: bool,
    read: ReadSoFar,
}

impl Mirror {
    /// Of the run in a directory.
    pub fn new(address: &Address, out: &Path) -> Result<Mirror> {
        let bytes = fs::read(out.join(MANIFEST)).with_context(|| format!("cannot read {MANIFEST}"))?;
        let manifest: Value = serde_json::from_slice(&bytes).context("manifest.json is damaged")?;
        let date = DateTime::parse_from_rfc3339(manifest["date"].as_str().unwrap_or_default());
        Ok(Mirror {
            server: Server::new(&address.uri),
            state: State::read(out, address),
            address: address.clone(),
            out: out.to_owned(),
            begin: date.context("manifest.json has no date")?.timestamp_millis(),
            manifest,
            begun: false,
            read: ReadSoFar::default(),
        })
    }

    /// Where it goes.
    pub fn uri(&self) -> &str {
        &self.address.uri
    }

    /// Sends every line that is there and not sent.
    pub fn catch_up(&mut self) -> Result<(), Failure> {
        if self.state.run.is_empty() {
            self.create()?;
        }
        if !self.begun {
            self.go_on()?;
            self.begun = true;
        }
        loop {
            let (metrics, read, sent) = self.batch()?;
            if read.offset == self.read.offset {
                return Ok(());
            }
            if !metrics.is_empty() {
                let batch = json!({ "run_id": self.state.run, "metrics": metrics });
                self.server.post("runs/log-batch", &batch)?;
                self.state.sent = sent;
                self.write()?;
            }
            self.read = read;
        }
    }

    /// Says how the run ended: when its last line was written.
    pub fn end(&mut self, status: &str) -> Result<(), Failure> {
        let written = fs::metadata(self.out.join(METRICS)).and_then(|data| data.modified()).ok();
        let written = written.and_then(|time| time.duration_since(UNIX_EPOCH).ok());
        let end = written.map_or(self.begin, |time| time.as_millis() as i64);
        self.update(&json!({ "run_id": self.state.run, "status": status, "end_time": end }))
    }

    fn update(&mut self, update: &Value) -> Result<(), Failure> {
        self.server.post("runs/update", update)?;
        self.state.status = update["status"].as_str().unwrap_or_default().to_owned();
        self.write()
    }

    fn create(&mut self) -> Result<(), Failure> {
        let experiment = self.server.experiment(&self.address.experiment)?;
        let folder = fs::canonicalize(&self.out).unwrap_or_else(|_| self.out.clone());
        let tag = |key: &str, value: &Value| json!({ "key": key, "value": value });
        self.state.run = self.server.create_run(&json!({
            "experiment_id": experiment,
            "run_name": folder.file_name().unwrap_or_default().to_string_lossy(),
            "start_time": self.begin,
            "tags": [
                tag("mlflow.source.name", &json!("temper")),
                tag("temper.version", &self.manifest["temper"]),
                tag("temper.verb", &self.manifest["verb"]),
            ],
        }))?;
        self.state.status = "RUNNING".into();
        say("mlflow", format!("{}/#/experiments/{experiment}/runs/{}", self.address.uri, self.state.run));
        self.write()
    }

    /// Says the parameters, once, and that the run goes on.
    fn go_on(&mut self) -> Result<(), Failure> {
        if !self.state.params {
            self.send_params()?;
            self.state.params = true;
            self.write()?;
        }
        match self.state.status.as_str() {
            "RUNNING" => Ok(()),
            _ => self.update(&json!({ "run_id": self.state.run, "status": "RUNNING" })),
        }
    }

    fn send_params(&self) -> Result<(), Failure> {
        let settings = self.manifest["settings"].as_object().into_iter().flatten();
        let params: Vec<Value> = settings
            .filter(|(_, setting)| !setting["value"].is_null())
            .map(|(key, setting)| json!({ "key": key, "value": param(&setting["value"]) }))
            .collect();
        for params in params.chunks(MOST_PARAMS) {
            self.server.post("runs/log-batch", &json!({ "run_id": self.state.run, "params": params }))?;
        }
        Ok(())
    }

    /// The next whole lines that fit into a request, without what was sent; and how far that is.
    fn batch(&self) -> Result<(Vec<Value>, ReadSoFar, Sent), Failure> {
        let failed = |error| Failure::here(format!("cannot read {METRICS}: {error}"));
        let mut file = File::open(self.out.join(METRICS)).map_err(failed)?;
        file.seek(SeekFrom::Start(self.read.offset)).map_err(failed)?;
        let (mut file, mut metrics, mut bytes) = (BufReader::new(file), Vec::new(), Vec::new());
        let (mut read, mut sent) = (self.read, self.state.sent);
        while file.read_until(b'\n', &mut bytes).map_err(failed)? > 0 && bytes.ends_with(b"\n") {
            let line: Value = serde_json::from_slice(&bytes).unwrap_or_default();
            let seconds = read.seconds + line["seconds"].as_f64().unwrap_or(0.0);
            let mut next = sent;
            if let Some(step) = next.advance(&line) {
                let points = points(&line, step, self.begin + (1e3 * seconds) as i64);
                if !metrics.is_empty() && metrics.len() + points.len() > MOST_METRICS {
                    break;
                }
                metrics.extend(points);
            }
            sent = next;
            read = ReadSoFar { offset: read.offset + bytes.len() as u64, seconds };
            bytes.clear();
        }
        Ok((metrics, read, sent))
    }

    fn write(&self) -> Result<(), Failure> {
        let path = self.out.join(STATE);
        write_json(&path, &json!(self.state)).map_err(|error| Failure::here(error.to_string()))
    }
}

/// The numbers of a line; what is null, for it was not finite or not known, has no point.
fn points(line: &Value, step: u64, timestamp: i64) -> Vec<Value> {
    let numbers =
        line.as_object().into_iter().flatten().filter(|(key, value)| *key != "step" && value.is_number());
    let point = |(key, value)| json!({ "key": key, "value": value, "timestamp": timestamp, "step": step });
    numbers.map(point).collect()
}

fn param(value: &Value) -> String {
    let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    text.chars().take(LONGEST_PARAM).collect()
}
