//! What a run writes line by line: metrics.jsonl, samples.jsonl, and both again for TensorBoard.

use serde_json::{Value, json};

use super::directory::{Directory, Log, METRICS, SAMPLES};
use super::tensorboard::EventFile;
use super::{Event, Metrics, StepReport};

/// The open files. Those of lines must be written; losing TensorBoard's stops nothing, for it is made of them again
/// when the run goes on.
#[derive(Default)]
pub(super) struct Logs {
    metrics: Option<Log>,
    samples: Option<Log>,
    events: Option<EventFile>,
}

impl Logs {
    /// For a rank that writes nothing.
    pub fn nowhere() -> Logs {
        Logs::default()
    }

    /// Without what was written after `step`; `samples` says whether there will be more of them.
    pub fn open(
        directory: &Directory,
        step: u64,
        samples: bool,
        show: &mut dyn FnMut(Event<'_>),
    ) -> Result<Logs, super::Error> {
        let metrics = directory.log(METRICS, step)?;
        let samples = samples || directory.path().join(SAMPLES).exists();
        let samples = samples.then(|| directory.log(SAMPLES, step)).transpose()?;
        let lines = |log: &Log| log.lines();
        let events = EventFile::create(
            directory.path(),
            &metrics.lines(),
            &samples.as_ref().map(lines).unwrap_or_default(),
        );
        let events = events.map_err(|error| show(Event::LostTensorBoard(&error))).ok();
        Ok(Logs { metrics: Some(metrics), samples, events })
    }

    /// Adds a line of metrics.
    pub fn add_metrics(&mut self, line: &Value, show: &mut dyn FnMut(Event<'_>)) -> Result<(), super::Error> {
        if let Some(metrics) = &mut self.metrics {
            metrics.add(std::slice::from_ref(line))?;
        }
        self.mirror(line, EventFile::add_metrics, show);
        Ok(())
    }

    /// Adds the lines of samples of a step.
    pub fn add_samples(
        &mut self,
        lines: &[Value],
        show: &mut dyn FnMut(Event<'_>),
    ) -> Result<(), super::Error> {
        if let Some(samples) = &mut self.samples {
            samples.add(lines)?;
        }
        lines.iter().for_each(|line| self.mirror(line, EventFile::add_sample, show));
        Ok(())
    }

    fn mirror(
        &mut self,
        line: &Value,
        add: fn(&mut EventFile, &Value) -> std::io::Result<()>,
        show: &mut dyn FnMut(Event<'_>),
    ) {
        let Some(events) = &mut self.events else { return };
        if let Err(error) = add(events, line) {
            show(Event::LostTensorBoard(&error));
            self.events = None;
        }
    }
}

/// A step as a line of metrics.jsonl, with TRL's names.
pub fn step_line(report: &StepReport) -> Value {
    let mut line = json!({ "step": report.step, "epoch": report.epoch, "loss": report.metrics.loss, "grad_norm": report.grad_norm, "learning_rate": report.learning_rate });
    set_numbers(&mut line, "", &report.metrics);
    line["num_tokens"] = report.num_tokens.into();
    line["seconds"] = report.seconds.into();
    line["tokens_per_second"] = (report.step_tokens as f64 / report.seconds).into();
    line["computed_tokens"] = report.computed_tokens.into();
    line["peak_rss_bytes"] = report.peak_bytes.into();
    line
}

/// An evaluation as a line of metrics.jsonl.
pub fn eval_line(step: u64, epoch: f64, report: &Metrics) -> Value {
    let mut line = json!({ "step": step, "epoch": epoch, "eval_loss": report.loss });
    set_numbers(&mut line, "eval_", report);
    line
}

fn set_numbers(line: &mut Value, prefix: &str, report: &Metrics) {
    let mut set = |name: &str, value: f64| line[format!("{prefix}{name}")] = value.into();
    set("mean_token_accuracy", report.mean_token_accuracy);
    set("entropy", report.entropy);
    if let Some(preferences) = &report.preferences {
        set("rewards/chosen", preferences.rewards.chosen);
        set("rewards/rejected", preferences.rewards.rejected);
        set("rewards/accuracies", preferences.accuracy);
        set("rewards/margins", preferences.margin);
        set("logps/chosen", preferences.logps.chosen);
        set("logps/rejected", preferences.logps.rejected);
    }
}
