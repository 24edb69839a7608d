//! `temper report`: what runs came to, as one page, one picture, or data.

use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use serde_json::{Map, Value, json};
use temper::checkpoint::save::write_atomic;

use crate::args::{Report, ReportFormat};
use crate::output::{bytes, hinted, say};
use crate::report::picture::{Curve, PALETTE, Series};
use crate::report::plots::{PLOTS, Plot};
use crate::report::run::{self, Run};
use crate::report::{page, picture};

/// Reads the runs and writes the file.
pub fn run(options: &Report) -> Result<()> {
    let named = options.out.as_deref().and_then(ReportFormat::of_file);
    if let (Some(out), None, None) = (&options.out, named, options.format)
        && let Some(ending) = out.extension().and_then(|it| it.to_str())
        && ending.bytes().all(|byte| byte.is_ascii_alphabetic())
    {
        bail!(hinted(
            format!("`{}`: reports have no form `.{}`", out.display(), ending),
            "let it end in .html, .svg, .png, .csv or .json, or give `--format`"
        ));
    }
    let format = options.format.or(named).unwrap_or(ReportFormat::Html);
    if let (Some(out), Some(named)) = (&options.out, named.filter(|&named| named != format)) {
        bail!(hinted(
            format!("`--format {}` does not go into `{}`", format.name(), out.display()),
            format!("leave one of the two away: the ending asks for {}", named.name())
        ));
    }
    if format == ReportFormat::Html && options.plot.is_some() {
        bail!(hinted(
            "the page has every plot: `--plot` chooses nothing",
            "leave `--plot` out, or give a `--format` of svg, png, csv or json"
        ));
    }
    let runs = run::read(&options.runs)?;
    for (run, note) in runs.iter().flat_map(|run| run.notes.iter().map(move |note| (run, note))) {
        say("note", format!("{}: {note}", run.name));
    }
    let out = options.out.clone().unwrap_or_else(|| PathBuf::from("report").with_extension(format.name()));
    let drawn = options.plot.unwrap_or(&PLOTS[0]);
    if options.plot.is_some() || matches!(format, ReportFormat::Svg | ReportFormat::Png) {
        check_points(drawn, &runs)?;
    }
    let content = match format {
        ReportFormat::Html => page::html(&runs).into_bytes(),
        ReportFormat::Svg => picture::svg(&curve(drawn, &runs))?.into_bytes(),
        ReportFormat::Png => picture::png(&curve(drawn, &runs))?,
        ReportFormat::Csv => csv(options, &runs)?,
        ReportFormat::Json => format!("{:#}\n", json(options, &runs)).into_bytes(),
    };
    write(&out, &content)?;
    say("report", format!("`{}`, {}", out.display(), bytes(content.len() as u64)));
    Ok(())
}

fn write(out: &Path, content: &[u8]) -> Result<()> {
    write_atomic(out, |file| file.write_all(content))?;
    Ok(())
}

/// Refuses a plot of which no run has a point.
fn check_points(plot: &Plot, runs: &[Run]) -> Result<()> {
    let has = |plot: &Plot| {
        plot.lines.iter().any(|(column, _)| runs.iter().any(|run| !plot.points(run, column).is_empty()))
    };
    if has(plot) {
        return Ok(());
    }
    let others: Vec<&str> = PLOTS.iter().filter(|&plot| has(plot)).map(|plot| plot.name).collect();
    let hint = match &others[..] {
        [] => "wait for the first step".into(),
        others => format!("there are points of {}", others.join(", ")),
    };
    bail!(hinted(format!("no run has a point of `{}`", plot.name), hint));
}

/// A plot of as many runs as there are colours.
fn curve(plot: &Plot, runs: &[Run]) -> Curve {
    if runs.len() > PALETTE.len() {
        let most = PALETTE.len();
        say("note", format!("the first {most} of {} runs are drawn: no more can be told apart", runs.len()));
    }
    let series = |(colour, run): (usize, &Run)| {
        let line = move |(at, (column, word)): (usize, &(&str, &str))| Series {
            name: if word.is_empty() { run.name.clone() } else { format!("{}, {word}", run.name) },
            colour,
            dashed: at > 0,
            noisy: plot.is_noisy(column),
            points: plot.points(run, column),
        };
        plot.lines.iter().enumerate().map(line).filter(|series| !series.points.is_empty()).collect::<Vec<_>>()
    };
    Curve {
        title: plot.title.into(),
        x: "step".into(),
        y: plot.unit(runs.iter().map(Run::verb)).into(),
        series: runs.iter().take(PALETTE.len()).enumerate().flat_map(series).collect(),
    }
}

/// Whether a column of the metrics is asked for.
fn is_wanted(plot: Option<&Plot>, column: &str) -> bool {
    plot.is_none_or(|plot| plot.lines.iter().any(|(name, _)| *name == column))
}

/// Every point, one a line.
fn csv(options: &Report, runs: &[Run]) -> Result<Vec<u8>> {
    let mut writer = csv::Writer::from_writer(Vec::new());
    writer.write_record(["run", "step", "name", "value"])?;
    for run in runs {
        for column in run.metrics.columns().filter(|column| is_wanted(options.plot, &column.name)) {
            for (step, value) in &column.points {
                writer.write_record([&run.name, &step.to_string(), &column.name, &value.to_string()])?;
            }
        }
    }
    Ok(writer.into_inner().map_err(|error| io::Error::other(error.to_string()))?)
}

/// Every point, by run and column, with the run's manifest.
fn json(options: &Report, runs: &[Run]) -> Value {
    let run = |run: &Run| {
        let wanted = run.metrics.columns().filter(|column| is_wanted(options.plot, &column.name));
        let columns: Map<String, Value> =
            wanted.map(|column| (column.name.clone(), json!(column.points))).collect();
        json!({
            "name": run.name,
            "path": run.path,
            "finished": run.finished,
            "state": run.state(),
            "notes": run.notes,
            "columns": columns,
            "manifest": run.manifest,
        })
    };
    json!({ "runs": runs.iter().map(run).collect::<Vec<_>>() })
}
