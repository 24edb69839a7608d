//! The tables of a report: final numbers, settings and where they differ, what became of the data.

use serde_json::Value;
use temper::train::directory::is_hash;

use super::html::Table;
use super::run::Run;
use crate::output::{bytes, duration, grouped};

/// The share of a run's steps that its last numbers are the mean of.
const LAST: f64 = 0.05;

/// One line for each run; columns in which no run has anything are left out.
pub fn numbers(runs: &[Run]) -> Table {
    type Cell = fn(&Run) -> Option<String>;
    let columns: [(&str, Cell); 14] = [
        ("run", |run| Some(run.name.clone())),
        ("by", by),
        ("state", |run| Some(run.state().into())),
        ("steps", |run| Some(steps(run))),
        ("loss", |run| last_mean(run, "loss")),
        ("eval loss", |run| last(run, "eval_loss")),
        ("best eval loss", best_evaluation),
        ("accuracy", |run| last_mean(run, "rewards/accuracies")),
        ("eval accuracy", |run| last(run, "eval_rewards/accuracies")),
        ("margin", |run| last_mean(run, "rewards/margins")),
        ("tokens", |run| Some(grouped(run.metrics.points("num_tokens").last()?.1 as u64))),
        ("time", |run| Some(duration(run.seconds().last()?.1))),
        ("tokens/s", tokens_per_second),
        ("peak memory", peak_memory),
    ];
    let all: Vec<(&str, Vec<Option<String>>)> =
        columns.map(|(name, cell)| (name, runs.iter().map(cell).collect())).into();
    let some: Vec<_> = all.iter().filter(|(_, cells)| cells.iter().any(Option::is_some)).collect();
    let cell = |at: usize, cells: &Vec<Option<String>>| cells[at].clone().unwrap_or_else(|| "–".into());
    Table {
        header: some.iter().map(|(name, _)| (*name).to_owned()).collect(),
        rows: (0..runs.len()).map(|at| some.iter().map(|(_, cells)| cell(at, cells)).collect()).collect(),
    }
}

fn by(run: &Run) -> Option<String> {
    let lora = run.manifest["settings"]["method"]["value"] == "lora";
    let verb = Some(run.verb()).filter(|verb| !verb.is_empty())?;
    Some(format!("{verb}{}", if lora { ", LoRA" } else { "" }))
}

fn steps(run: &Run) -> String {
    match run.planned() {
        Some(planned) => format!("{} of {}", grouped(run.steps()), grouped(planned)),
        None => grouped(run.steps()),
    }
}

fn last(run: &Run, name: &str) -> Option<String> {
    Some(number(run.metrics.points(name).last()?.1))
}

/// The mean of the last values.
fn last_mean(run: &Run, name: &str) -> Option<String> {
    let points = run.metrics.points(name);
    let count = ((points.len() as f64 * LAST) as usize).max(1);
    let tail = &points[points.len().checked_sub(count)?..];
    Some(number(tail.iter().map(|point| point.1).sum::<f64>() / count as f64))
}

/// The lowest evaluation loss, and when it was.
fn best_evaluation(run: &Run) -> Option<String> {
    let points = run.metrics.points("eval_loss");
    let (step, loss) = points.iter().min_by(|left, right| left.1.total_cmp(&right.1))?;
    (points.len() > 1).then(|| format!("{} at {}", number(*loss), grouped(*step as u64)))
}

fn tokens_per_second(run: &Run) -> Option<String> {
    let tokens = run.metrics.points("num_tokens").last()?.1;
    let seconds = run.seconds().last()?.1;
    (seconds > 0.0).then(|| grouped((tokens / seconds) as u64))
}

fn peak_memory(run: &Run) -> Option<String> {
    let peak = run.metrics.points("peak_rss_bytes").iter().map(|point| point.1).reduce(f64::max)?;
    Some(bytes(peak as u64))
}

/// A number with four digits that count.
fn number(value: f64) -> String {
    if value == 0.0 {
        return "0".into();
    }
    let digits = (3.0 - value.abs().max(1e-3).log10().floor()).clamp(0.0, 6.0) as usize;
    format!("{value:.digits$}")
}

/// A setting's name and its value in each run.
type Row = (String, Vec<String>);

/// What differs between runs; the directories themselves do not count.
pub fn differences(runs: &[Run]) -> Vec<Row> {
    let settings = rows(runs, |run| {
        let settings = object(&run.manifest["settings"]).filter(|(key, _)| *key != "out");
        settings.map(|(key, setting)| (key.to_owned(), shown(&setting["value"]))).collect()
    });
    let rest = rows(runs, |run| [content(run), machine(run)].concat());
    let differs = |(_, values): &Row| values.iter().any(|value| *value != values[0]);
    settings.into_iter().chain(rest).filter(differs).collect()
}

/// Key, value and origin of every setting.
pub fn settings(run: &Run) -> Vec<[String; 3]> {
    let row = |(key, setting): (&str, &Value)| {
        let origin = setting["origin"].as_str().unwrap_or_default();
        [key.to_owned(), shown(&setting["value"]), origin.to_owned()]
    };
    object(&run.manifest["settings"]).map(row).collect()
}

/// Hashes of what a run read, which stand in the manifest beside the settings.
pub fn content(run: &Run) -> Vec<(String, String)> {
    let settings = &run.manifest["settings"];
    let is_content = |(key, value): &(&str, &Value)| *key != "verb" && settings[*key]["value"] != **value;
    let content = object(&run.manifest["run"]).filter(is_content);
    let name = |key: &str, value: &Value| match settings.get(key) {
        Some(_) if is_hash(value) => format!("content of {key}"),
        _ => key.to_owned(),
    };
    content.map(|(key, value)| (name(key, value), shown(value))).collect()
}

/// What computed it.
pub fn machine(run: &Run) -> Vec<(String, String)> {
    let version = ("temper".to_owned(), shown(&run.manifest["temper"]));
    let hardware = object(&run.manifest["hardware"]).filter(|(key, _)| *key != "threads");
    let rest = hardware.map(|(key, value)| (key.replace('_', " "), shown(value)));
    std::iter::once(version).filter(|(_, version)| version != "–").chain(rest).collect()
}

/// The ledgers of the data, by the name of the data.
pub fn ledgers(runs: &[Run]) -> Vec<(&'static str, Vec<Row>)> {
    let ledger = |of: &str| {
        rows(runs, |run| {
            let mut lines = Vec::new();
            flatten("", &run.manifest["ledger"][of], &mut lines);
            lines
        })
    };
    [("Training data", "data"), ("Evaluation data", "eval_data")]
        .map(|(title, of)| (title, ledger(of)))
        .into_iter()
        .filter(|(_, rows)| !rows.is_empty())
        .collect()
}

/// The numbers of nested objects, each under the words that lead to it.
fn flatten(words: &str, value: &Value, lines: &mut Vec<(String, String)>) {
    match value {
        Value::Object(entries) => {
            for (key, value) in entries {
                flatten(&format!("{words} {key}"), value, lines);
            }
        }
        Value::Null => {}
        _ => lines.push((words.trim().to_owned(), value.as_u64().map_or_else(|| shown(value), grouped))),
    }
}

/// The pairs of all runs as rows: one for each key, in the order in which keys come first.
fn rows(runs: &[Run], pairs: impl Fn(&Run) -> Vec<(String, String)>) -> Vec<Row> {
    let mut rows: Vec<Row> = Vec::new();
    for (at, run) in runs.iter().enumerate() {
        for (key, value) in pairs(run) {
            let found = rows.iter().position(|(other, _)| *other == key);
            let row = found.unwrap_or_else(|| {
                rows.push((key, vec!["–".into(); runs.len()]));
                rows.len() - 1
            });
            rows[row].1[at] = value;
        }
    }
    rows
}

fn object(value: &Value) -> impl Iterator<Item = (&str, &Value)> {
    value.as_object().into_iter().flatten().map(|(key, value)| (key.as_str(), value))
}

/// A value as text; hashes without most of their digits.
fn shown(value: &Value) -> String {
    match value {
        Value::Null => "–".into(),
        Value::String(text) if is_hash(value) => format!("{}…", &text[..12]),
        Value::String(text) => text.clone(),
        _ => value.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::number;

    #[test]
    fn numbers_have_four_digits_that_count() {
        assert_eq!(
            [1.23456, 12.3456, -0.012345, 0.0, 12345.6].map(number),
            ["1.235", "12.35", "-0.01235", "0", "12346"]
        );
    }
}
