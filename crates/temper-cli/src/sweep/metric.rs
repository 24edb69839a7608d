//! The metric that decides: whether the runs write it, and which end of it is good.

use std::cmp::Ordering;

use anyhow::Result;
use serde_json::Value;
use temper::objective::Pair;
use temper::train::{Metrics, Preferences, StepReport, eval_line, step_line};

use super::course;
use super::file::{Goal, Sweep};
use super::runs::Planned;

/// That the runs write the metric, and that its good end is known.
///
/// # Errors
/// With what can be asked for.
pub fn check(sweep: &Sweep, runs: &[Planned]) -> Result<()> {
    let metric = sweep.metric.as_str();
    let known = names(sweep.verb == "dpo");
    if !known.iter().any(|name| name == metric) {
        let hint = format!("`temper {}` writes {}", sweep.verb, known.join(", "));
        return Err(sweep.wrong(format!("no run writes the metric `{metric}`"), &hint));
    }
    let blind = |run: &&Planned| run.training().evaluation.eval_data.is_none();
    if let (true, Some(run)) = (metric.starts_with("eval_"), runs.iter().find(blind)) {
        let message = format!("no `eval_data` for the metric `{metric}` in run `{}`", run.name);
        return Err(
            sweep.wrong(message, "give eval_data = \"held-out.jsonl\" in [base], or metric = \"loss\"")
        );
    }
    if sweep.goal.is_none() && !["loss", "eval_loss"].contains(&metric) {
        let message = format!("the metric `{metric}` without a goal");
        return Err(sweep.wrong(message, "give goal = \"max\" or \"min\", above [base]"));
    }
    Ok(())
}

/// Names of what a run writes into metrics.jsonl.
fn names(preferences: bool) -> Vec<String> {
    let pair = Pair { chosen: 0.0, rejected: 0.0 };
    let preferences =
        preferences.then_some(Preferences { rewards: pair, accuracy: 0.0, margin: 0.0, logps: pair });
    let metrics = Metrics { loss: 0.0, mean_token_accuracy: 0.0, entropy: 0.0, preferences };
    let step = StepReport {
        step: 0,
        epoch: 0.0,
        metrics,
        grad_norm: 0.0,
        learning_rate: 0.0,
        num_tokens: 0,
        computed_tokens: 0,
        step_tokens: 0,
        seconds: 0.0,
        peak_bytes: None,
    };
    let lines = [eval_line(0, 0.0, &metrics), step_line(&step)];
    let names = lines.iter().filter_map(|line| line.as_object()).flat_map(|line| line.keys().cloned());
    names.filter(|name| !["step", "epoch"].contains(&name.as_str())).collect()
}

/// How good a run is: by the metric, and where that is equal by the loss.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Standing {
    /// The metric.
    pub value: Option<f64>,
    /// The evaluation's loss, or without one the step's.
    loss: Option<f64>,
}

impl Standing {
    /// That of a run's metrics from a step up to another.
    pub fn of(sweep: &Sweep, lines: &[Value], from: u64, until: u64) -> Standing {
        let value = |metric| course::value(lines, metric, from, until);
        Standing { value: value(&sweep.metric), loss: value("eval_loss").or_else(|| value("loss")) }
    }
}

impl Sweep {
    /// Whether one run is better than another; what is no number is worst.
    pub fn better(&self, one: Standing, other: Standing) -> Ordering {
        let least = |value: Option<f64>| value.filter(|value| !value.is_nan()).unwrap_or(f64::INFINITY);
        let worth = |standing: Standing| match self.goal {
            Some(Goal::Max) => least(standing.value.map(|value| -value)),
            _ => least(standing.value),
        };
        let by_loss = || least(one.loss).total_cmp(&least(other.loss));
        worth(one).total_cmp(&worth(other)).then_with(by_loss)
    }
}
