//! The events of a run as JSON on stdout, one object a line.

use std::io::{self, Write};

use serde_json::{Value, json};
use temper::data::order::Plan;
use temper::train::{Event, Outcome, Run, eval_line, step_line};

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
        let (name, fields) = match event {
            Event::Resumed(step) => ("resumed", json!({ "step": step })),
            Event::Reference(done, total) => ("reference", json!({ "done": done, "total": total })),
            Event::Step(report) => ("step", step_line(report)),
            Event::Evaluated(step, report) => ("evaluated", eval_line(*step, self.plan.epoch(*step), report)),
            Event::Saved(path) => ("saved", json!({ "path": path.display().to_string() })),
        };
        self.add(name, &fields);
    }

    /// Writes how the run ended.
    pub fn end(&mut self, outcome: &Outcome) {
        let (name, fields) = match outcome {
            Outcome::Finished(folder) => {
                ("done", json!({ "path": folder.display().to_string(), "before": false }))
            }
            Outcome::AlreadyFinished(folder) => {
                ("done", json!({ "path": folder.display().to_string(), "before": true }))
            }
            Outcome::Stopped(step) => ("stopped", json!({ "step": step })),
        };
        self.add(name, &fields);
    }

    /// A reader that went away does not stop a training.
    fn add(&mut self, name: &str, fields: &Value) {
        let Some(out) = &mut self.out else { return };
        let mut line = json!({ "event": name });
        if let (Some(line), Some(fields)) = (line.as_object_mut(), fields.as_object()) {
            line.extend(fields.clone());
        }
        if let Err(error) = writeln!(out, "{line}") {
            warn(format!("cannot write to standard output: {error}; the run goes on without it"));
            self.out = None;
        }
    }
}
