//! The events of a run as JSON on stdout, one object a line.

use std::io::{self, Write};
use std::path::Path;

use serde_json::{Value, json};
use temper::data::order::Plan;
use temper::train::{Event, Outcome, Run, eval_line, sample_line, step_line};

use crate::output::warn;

/// Writes the events of a run.
pub struct Events {
    /// None once it cannot be written.
    out: Option<io::Stdout>,
    plan: Plan,
}

impl Events {
    /// Writes events if they are wanted.
    pub fn new(wanted: bool, run: &Run<'_>) -> Events {
        Events { out: wanted.then(io::stdout), plan: run.settings.plan }
    }

    /// Writes an event.
    pub fn write(&mut self, event: &Event<'_>) {
        if self.out.is_none() {
            return;
        }
        match *event {
            Event::Resumed(step) => self.add("resumed", json!({ "step": step })),
            Event::Reference(done, total) => self.add("reference", json!({ "done": done, "total": total })),
            Event::Step(report) => self.add("step", step_line(report)),
            Event::Evaluated(step, report) => {
                self.add("evaluated", eval_line(step, self.plan.epoch(step), report));
            }
            Event::Sampled(step, samples) => {
                samples.iter().for_each(|sample| self.add("sampled", sample_line(step, sample)));
            }
            Event::LostTensorBoard(_) | Event::LostCache(_) => {}
            Event::Saved(path) => self.add("saved", json!({ "path": path.display().to_string() })),
        }
    }

    /// Writes how the run ended.
    pub fn end(&mut self, outcome: &Outcome) {
        let done = |folder: &Path, before| json!({ "path": folder.display().to_string(), "before": before });
        match outcome {
            Outcome::Finished(folder) => self.add("done", done(folder, false)),
            Outcome::AlreadyFinished(folder) => self.add("done", done(folder, true)),
            Outcome::Stopped(step) => self.add("stopped", json!({ "step": step })),
        }
    }

    /// A reader that went away does not stop a training.
    fn add(&mut self, name: &str, fields: Value) {
        let Some(out) = &mut self.out else { return };
        let mut line = json!({ "event": name });
        if let (Value::Object(line), Value::Object(fields)) = (&mut line, fields) {
            line.extend(fields);
        }
        if let Err(error) = writeln!(out, "{line}") {
            warn(format!("cannot write to standard output: {error}; the run goes on without it"));
            self.out = None;
        }
    }
}
