//! What a run writes line by line: metrics.jsonl, samples.jsonl, and both again for TensorBoard.

use serde_json::Value;

use super::Event;
use super::directory::{Directory, Log};
use super::tensorboard::EventFile;

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
        let metrics = directory.log("metrics.jsonl", step)?;
        let samples = samples || directory.path().join("samples.jsonl").exists();
        let samples = samples.then(|| directory.log("samples.jsonl", step)).transpose()?;
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
            metrics.add(line)?;
        }
        self.mirror(line, EventFile::add_metrics, show);
        Ok(())
    }

    /// Adds a line of samples.
    pub fn add_sample(&mut self, line: &Value, show: &mut dyn FnMut(Event<'_>)) -> Result<(), super::Error> {
        if let Some(samples) = &mut self.samples {
            samples.add(line)?;
        }
        self.mirror(line, EventFile::add_sample, show);
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
