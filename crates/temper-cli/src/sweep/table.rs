//! What a sweep found: a table in three forms, and the best run's configuration.

use std::io::Write;
use std::path::PathBuf;

use anyhow::Result;
use temper::checkpoint::save::write_atomic;

use super::course;
use super::file::Sweep;
use super::metric::Standing;
use super::runs::Planned;
use super::schedule::Fate;
use super::share;
use crate::output::{duration, results, shell_word};

/// A run's line.
#[derive(Debug)]
pub struct Row<'a> {
    /// The run.
    pub run: &'a Planned,
    /// What became of it.
    pub fate: &'a Fate,
    /// Its last value of the metric, and the loss there.
    pub standing: Standing,
    step: u64,
    seconds: f64,
    note: String,
}

/// All runs: the finished, then those that were stopped, then the rest; the best first.
pub fn rows<'a>(sweep: &Sweep, runs: &'a [Planned], fates: &'a [Fate]) -> Vec<Row<'a>> {
    let mut rows: Vec<Row<'_>> = runs.iter().zip(fates).map(|(run, fate)| row(sweep, run, fate)).collect();
    let group = |row: &Row<'_>| match row.fate {
        Fate::Finished => 0,
        Fate::Stopped(..) => 1,
        Fate::Failed(_) | Fate::Unfinished => 2,
    };
    rows.sort_by(|a, b| group(a).cmp(&group(b)).then(sweep.better(a.standing, b.standing)));
    rows
}

fn row<'a>(sweep: &Sweep, run: &'a Planned, fate: &'a Fate) -> Row<'a> {
    let lines = course::metrics(&run.folder);
    let shared = share::shared(run);
    let until = shared.as_ref().map_or(0, |(_, until)| *until);
    let own = lines.iter().filter(|line| line["step"].as_u64().is_some_and(|step| step > until));
    let note = match fate {
        Fate::Finished => String::new(),
        Fate::Stopped(step, why) => format!("stopped after step {step}: {why}"),
        Fate::Failed(words) => Fate::failed(words),
        Fate::Unfinished => "not finished".into(),
    };
    let shares = shared.map(|(with, until)| format!("steps 1 to {until} are those of {with}"));
    Row {
        run,
        fate,
        // A run that failed was not what it was before its first step.
        standing: Standing::of(sweep, &lines, u64::from(matches!(fate, Fate::Failed(_))), u64::MAX),
        step: course::last_step(&lines),
        seconds: course::seconds(own),
        note: [shares, Some(note)]
            .into_iter()
            .flatten()
            .filter(|text| !text.is_empty())
            .collect::<Vec<_>>()
            .join("; "),
    }
}

impl Row<'_> {
    /// Steps, and of how many when it has not made them all.
    fn steps(&self) -> String {
        match self.run.steps() {
            Some(steps) if steps != self.step => format!("{}/{steps}", self.step),
            _ => self.step.to_string(),
        }
    }

    fn shown(&self) -> String {
        self.standing.value.map_or_else(
            || "–".into(),
            |value| match value.abs() {
                // Small ones would all look equal.
                small if small > 0.0 && small < 0.01 => format!("{value:.3e}"),
                _ => format!("{value:.4}"),
            },
        )
    }
}

/// The first row, if it is a finished run with a value.
pub fn best<'a, 'b>(rows: &'b [Row<'a>]) -> Option<&'b Row<'a>> {
    rows.first().filter(|row| *row.fate == Fate::Finished && row.standing.value.is_some())
}

/// Of finished runs with the best one's value, what made this one the best; nothing where there is no other.
pub fn decided(sweep: &Sweep, rows: &[Row<'_>]) -> String {
    let value = |row: &Row<'_>| row.standing.value.filter(|_| *row.fate == Fate::Finished);
    let best = best(rows).and_then(value);
    let equal: Vec<&Row<'_>> = rows.iter().filter(|row| best.is_some() && value(row) == best).collect();
    match &equal[..] {
        [] | [_] => String::new(),
        [first, second, ..] => {
            let by = if first.standing == second.standing { "the first" } else { "by its loss" };
            format!(", of {} with this {} {by}", equal.len(), sweep.metric)
        }
    }
}

/// Writes the table to stdout.
pub fn print(sweep: &Sweep, rows: &[Row<'_>]) -> Result<()> {
    let width = sweep.metric.len().max(10);
    let mut out = results();
    writeln!(out, "  {:>width$}  {:>9}  {:>7}  run", sweep.metric, "steps", "time")?;
    for row in rows {
        let mark = if best(rows).is_some_and(|best| best.run.name == row.run.name) { "*" } else { " " };
        let note = if row.note.is_empty() { String::new() } else { format!("   {}", row.note) };
        let (value, steps, time) = (row.shown(), row.steps(), duration(row.seconds));
        writeln!(out, "{mark} {value:>width$}  {steps:>9}  {time:>7}  {}{note}", row.run.name)?;
    }
    Ok(out.flush()?)
}

/// Writes table.md, table.csv and, when there is a best run, best.toml; says which.
pub fn write(sweep: &Sweep, rows: &[Row<'_>]) -> Result<Vec<PathBuf>> {
    let mut files = vec![("table.md", markdown(sweep, rows)), ("table.csv", csv(sweep, rows)?)];
    if let Some(best) = best(rows) {
        let comment = format!(
            "# The best of {}: {} {} after {} steps.\n# temper {} --config {}\n",
            rows.len(),
            sweep.metric,
            best.shown(),
            best.step,
            sweep.verb,
            shell_word(sweep.out.join("best.toml").display())
        );
        files.push(("best.toml", best.run.text(sweep, &sweep.out.join("best"), &comment)));
    }
    let write = |(name, text): &(&str, String)| {
        let path = sweep.out.join(name);
        write_atomic(&path, |file| file.write_all(text.as_bytes()))?;
        Ok(path)
    };
    files.iter().map(write).collect()
}

/// The options that vary, in the order of the first runs that have them.
fn columns<'a>(rows: &'a [Row<'_>]) -> Vec<&'a str> {
    let mut columns: Vec<&str> = Vec::new();
    for key in rows.iter().flat_map(|row| &row.run.own) {
        if !columns.contains(&key.name.as_str()) {
            columns.push(&key.name);
        }
    }
    columns
}

fn markdown(sweep: &Sweep, rows: &[Row<'_>]) -> String {
    let columns = columns(rows);
    let line = |cells: Vec<String>| {
        let cells = cells.iter().map(|cell| format!(" {} |", cell.replace('|', "\\|").replace('\n', " ")));
        format!("|{}\n", cells.collect::<String>())
    };
    let header = columns.iter().copied().chain([&sweep.metric[..], "steps", "time", "note"]);
    let mut text = line(header.clone().map(str::to_owned).collect());
    text += &line(header.map(|_| "---".to_owned()).collect());
    for row in rows {
        let own = columns.iter().map(|column| row.run.value(column).to_owned());
        let best = best(rows).is_some_and(|best| best.run.name == row.run.name);
        let value = if best { format!("**{}**", row.shown()) } else { row.shown() };
        text += &line(own.chain([value, row.steps(), duration(row.seconds), row.note.clone()]).collect());
    }
    text
}

fn csv(sweep: &Sweep, rows: &[Row<'_>]) -> Result<String> {
    let columns = columns(rows);
    let mut writer = csv::Writer::from_writer(Vec::new());
    let header = ["run", "state"].into_iter().chain(columns.iter().copied());
    writer.write_record(header.chain([&sweep.metric[..], "steps", "seconds", "note"]))?;
    for row in rows {
        let state = match row.fate {
            Fate::Finished => "finished",
            Fate::Stopped(..) => "stopped",
            Fate::Failed(_) => "failed",
            Fate::Unfinished => "unfinished",
        };
        let own = columns.iter().map(|column| row.run.value(column));
        let value = row.standing.value.map_or_else(String::new, |value| value.to_string());
        let (step, seconds) = (row.step.to_string(), format!("{:.3}", row.seconds));
        let cells = [&row.run.name, state].into_iter().chain(own);
        writer.write_record(cells.chain([&value[..], &step, &seconds, &row.note]))?;
    }
    Ok(String::from_utf8(writer.into_inner()?)?)
}
