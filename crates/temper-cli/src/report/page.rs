//! The report as a page: final numbers, curves, answers, settings, data.

use std::collections::BTreeMap;

use plotters::style::RGBColor;
use serde_json::{Map, Value, json};

use super::html::{Script, each, escaped, section};
use super::picture::PALETTE;
use super::plots::{PLOTS, Plot};
use super::run::{Run, Sample, counted};
use super::tables;
use super::thin::{Point, means, thinned};
use crate::output::{clipped, grouped};

/// The page's own script: the chart, and what switches it.
const SCRIPT: &str = concat!(include_str!("chart.js"), include_str!("curves.js"), "curves(pageData());\n");

/// Columns of pixels of all runs together, so that a page of many runs stays small; and the bounds for one.
const COLUMNS: usize = 10_000;
const COLUMNS_OF_ONE: (usize, usize) = (150, 1_000);

/// Prompts whose answers are shown, those of them that are unfolded, and answers of a run between its first and its last.
const PROMPTS: usize = 24;
const UNFOLDED: usize = 4;
const BETWEEN: usize = 6;

/// The whole file.
pub fn html(runs: &[Run]) -> String {
    let plots: Vec<&'static Plot> = PLOTS.iter().filter(|plot| plot.has_points(runs)).collect();
    let body = [
        summary(runs),
        section("Final numbers", &numbers(runs)),
        section("Curves", &curves(&plots, runs)),
        section("Answers", &answers(runs)),
        section("Settings", &settings(runs)),
        section("Data", &ledgers(runs)),
    ];
    let data = data(&plots, runs);
    let script = (!plots.is_empty()).then_some(Script { code: SCRIPT, data: &data });
    super::html::document("temper report", &body.concat(), script)
}

/// What there is, and what could not be read.
fn summary(runs: &[Run]) -> String {
    let of = |state: &str| match runs.iter().filter(|run| run.state() == state).count() {
        0 => None,
        all if all == runs.len() => Some(state.to_owned()),
        some => Some(format!("{some} {state}")),
    };
    let states: Vec<String> =
        ["finished", "stopped", "failed", "unfinished"].into_iter().filter_map(of).collect();
    let separator = if states.len() == 1 { "," } else { ":" };
    let count = format!("{}{separator} {}", counted(runs.len(), "run"), states.join(", "));
    let notes: Vec<(&Run, &String)> =
        runs.iter().flat_map(|run| run.notes.iter().map(move |note| (run, note))).collect();
    let notes = each(&notes, |(run, note)| format!("<li>{}: {}</li>\n", escaped(&run.name), escaped(note)));
    let notes = if notes.is_empty() { notes } else { format!("<ul class=\"notes\">\n{notes}</ul>\n") };
    format!("<p>{count}.</p>\n{notes}")
}

fn numbers(runs: &[Run]) -> String {
    format!(
        "<div class=\"wide\">{}</div>\n<p class=\"key\">Loss, accuracy and margin are means over the last 5% of \
         the steps; eval is the last evaluation.</p>\n",
        tables::numbers(runs).html()
    )
}

fn curves(plots: &[&'static Plot], runs: &[Run]) -> String {
    if plots.is_empty() {
        return "<p class=\"key\">No run has a point yet.</p>\n".into();
    }
    let figure = |plot: &&'static Plot| Figure {
        plot,
        unit: plot.unit(runs.iter().map(Run::verb)),
        drawn: (0..plot.lines.len()).filter(|&at| has(runs, plot.lines[at].0)).collect(),
    };
    charts(&plots.iter().map(figure).collect::<Vec<_>>())
}

/// A plot, the unit of its values, and which of its lines it has.
pub struct Figure {
    pub plot: &'static Plot,
    pub unit: &'static str,
    pub drawn: Vec<usize>,
}

/// The switches, and an empty chart for each plot.
pub fn charts(figures: &[Figure]) -> String {
    let figure = |Figure { plot, unit, drawn }: &Figure| {
        let (title, name) = (plot.title, plot.name);
        let unit =
            if unit.is_empty() { String::new() } else { format!(" <span class=\"key\">{unit}</span>") };
        let kinds = each(if drawn.len() > 1 { drawn } else { &[] }, |&at| {
            let style = if at == 0 { "solid" } else { "dashed" };
            format!("<span class=\"key\"><i class=\"{style}\"></i>{}</span>", plot.lines[at].1)
        });
        format!(
            "<figure id=\"plot-{name}\">\n<figcaption><span><b>{title}</b>{unit}</span>{kinds}</figcaption>\n\
             <div class=\"chart\"><svg role=\"img\" aria-label=\"{title}\"></svg>\
             <div class=\"tip\" hidden></div></div>\n</figure>\n"
        )
    };
    format!(
        "<div class=\"controls\">\n<div class=\"legend\" id=\"legend\"></div>\n\
         <p class=\"key\" id=\"legend-note\" role=\"status\"></p>\n<div class=\"switches\">\n\
         <label>over <select id=\"axis\"><option value=\"steps\">steps</option>\
         <option value=\"seconds\">training time</option><option value=\"tokens\">tokens</option></select></label>\n\
         <label><input type=\"checkbox\" id=\"log-x\">log x</label>\n\
         <label><input type=\"checkbox\" id=\"log-y\">log y</label>\n\
         <label>running mean <input type=\"range\" id=\"smoothing\" min=\"0\" max=\"10\" step=\"0.5\" value=\"3\">\
         <output id=\"smoothing-share\"></output></label>\n</div>\n</div>\n\
         <noscript><p>The curves are drawn by a script, which this browser does not run.</p></noscript>\n\
         <div class=\"charts\">\n{}</div>\n",
        each(figures, figure)
    )
}

fn has(runs: &[Run], column: &str) -> bool {
    runs.iter().any(|run| !run.metrics.points(column).is_empty())
}

/// What the script draws; `curves.js` says in what form.
fn data(plots: &[&'static Plot], runs: &[Run]) -> Value {
    let (least, most) = COLUMNS_OF_ONE;
    let columns = (COLUMNS / runs.len().max(1)).clamp(least, most);
    let drawn = |plot: &&'static Plot| {
        let lines = plot.lines.iter().filter(|(column, _)| has(runs, column)).collect();
        (*plot, lines)
    };
    let mut data = frame(plots.iter().map(drawn));
    data["runs"] = runs.iter().map(|run| run_data(plots, run, columns)).collect();
    data
}

/// The plots with their lines, without runs.
pub fn frame(
    plots: impl Iterator<Item = (&'static Plot, Vec<&'static (&'static str, &'static str)>)>,
) -> Value {
    let line = |plot: &Plot, (column, word): &(&str, &str)| {
        let noisy = plot.is_noisy(column);
        json!({ "column": column, "word": word, "noisy": noisy })
    };
    let plot_json = |(plot, lines): (&'static Plot, Vec<_>)| {
        let lines: Vec<Value> = lines.into_iter().map(|one| line(plot, one)).collect();
        json!({ "name": plot.name, "lines": lines })
    };
    let colour = |RGBColor(red, green, blue): RGBColor| format!("#{red:02x}{green:02x}{blue:02x}");
    json!({
        "colours": PALETTE.map(colour),
        "plots": plots.map(plot_json).collect::<Vec<_>>(),
        "runs": [],
    })
}

/// A run's curves, with at most so many columns of pixels.
pub fn run_data(plots: &[&Plot], run: &Run, columns: usize) -> Value {
    let mut series = Map::new();
    for plot in plots {
        for (column, _) in plot.lines {
            let points = plot.points(run, column);
            if points.is_empty() {
                continue;
            }
            let mut one = points_json(&thinned(&points, columns));
            if plot.is_noisy(column) && points.len() > 2 * columns {
                one["mean"] = points_json(&means(&points, columns));
            }
            series.insert((*column).to_owned(), one);
        }
    }
    // Where steps lie on the other axes, as finely as the curves are.
    let seconds: Vec<Point> = run.seconds();
    let tokens: BTreeMap<u64, f64> =
        run.metrics.points("num_tokens").iter().map(|&(step, tokens)| (step as u64, tokens)).collect();
    let every = seconds.len().div_ceil(2 * columns).max(1);
    let last = seconds.len().saturating_sub(1);
    let known: Vec<Point> = seconds
        .iter()
        .enumerate()
        .filter(|(at, _)| at % every == 0 || *at == last)
        .map(|(_, &point)| point)
        .collect();
    let tokens: Vec<Value> = known
        .iter()
        .filter_map(|(step, _)| tokens.get(&(*step as u64)).map(|&tokens| rounded(tokens)))
        .collect();
    json!({
        "name": run.name,
        "steps": known.iter().map(|point| rounded(point.0)).collect::<Vec<_>>(),
        "seconds": known.iter().map(|point| rounded(point.1)).collect::<Vec<_>>(),
        "tokens": if tokens.len() == known.len() { tokens } else { Vec::new() },
        "columns": series,
    })
}

fn points_json(points: &[Point]) -> Value {
    let list =
        |value: fn(&Point) -> f64| points.iter().map(|point| rounded(value(point))).collect::<Vec<_>>();
    json!({ "x": list(|point| point.0), "y": list(|point| point.1) })
}

/// A number with six digits that count, which is more than a screen shows, and whole ones as they are.
pub fn rounded(value: f64) -> Value {
    if value.fract() == 0.0 && value.abs() < 1e15 {
        return (value as i64).into();
    }
    let power = 5 - value.abs().log10().floor() as i32;
    let scale = 10f64.powi(power.abs());
    let rounded = if power >= 0 { (value * scale).round() / scale } else { (value / scale).round() * scale };
    if rounded.is_finite() { rounded.into() } else { value.into() }
}

/// The answers of every run to every prompt, side by side; the first prompts unfolded.
fn answers(runs: &[Run]) -> String {
    let mut prompts: Vec<&str> = Vec::new();
    for sample in runs.iter().flat_map(|run| &run.samples) {
        if !prompts.contains(&sample.prompt.as_str()) {
            prompts.push(&sample.prompt);
        }
    }
    let answered = |(at, prompt): (usize, &&str)| {
        let stages = each(runs, |run| stage(run, prompt));
        let open = if at < UNFOLDED { " open" } else { "" };
        let prompt = escaped(&clipped(prompt));
        format!(
            "<details class=\"prompt\"{open}>\n<summary>{prompt}</summary>\n\
             <div class=\"stages\">\n{stages}</div>\n</details>\n"
        )
    };
    let shown: String = prompts.iter().take(PROMPTS).enumerate().map(answered).collect();
    let note = match prompts.len().saturating_sub(PROMPTS) {
        0 => String::new(),
        left => format!(
            "<p class=\"key\">{} not shown; see samples.jsonl.</p>\n",
            counted(left, "further prompt")
        ),
    };
    shown + &note
}

/// A run's answers to a prompt: the first and the last, and in a fold some between.
fn stage(run: &Run, prompt: &str) -> String {
    let all: Vec<&Sample> = run.samples.iter().filter(|sample| sample.prompt == prompt).collect();
    let [first, between @ .., last] = &all[..] else { return answered(run, &list(&all)) };
    let every = between.len().div_ceil(BETWEEN).max(1);
    let some: Vec<&Sample> = between.iter().copied().step_by(every).collect();
    let fold = match (some.len(), between.len()) {
        (0, _) => String::new(),
        (shown, all) => {
            let of = if shown < all { format!("{shown} of {all}") } else { all.to_string() };
            format!("<details>\n<summary>{of} between</summary>\n{}</details>\n", list(&some))
        }
    };
    answered(run, &[list(&[first]), fold, list(&[last])].concat())
}

/// A run's name over its answers; nothing where it has none.
fn answered(run: &Run, answers: &str) -> String {
    if answers.is_empty() {
        return String::new();
    }
    format!("<div>\n<h4>{}</h4>\n{answers}</div>\n", escaped(&run.name))
}

fn list(samples: &[&Sample]) -> String {
    if samples.is_empty() {
        return String::new();
    }
    let answer = |sample: &&Sample| {
        format!(
            "<dt>step {}</dt><dd>{}</dd>\n",
            grouped(sample.step),
            escaped(&clipped(sample.answer.trim()))
        )
    };
    format!("<dl>\n{}</dl>\n", each(samples, answer))
}

/// What differs, and everything in folds.
fn settings(runs: &[Run]) -> String {
    let differences = tables::differences(runs);
    let compared = match (runs.len(), differences.is_empty()) {
        (1, _) => String::new(),
        (_, true) => "<p>All settings are equal.</p>\n".into(),
        (_, false) => format!("<p>What differs between the runs:</p>\n{}", by_run(runs, &differences)),
    };
    compared + &each(runs, all_settings)
}

fn all_settings(run: &Run) -> String {
    let settings = each(&tables::settings(run), |[key, value, origin]| {
        let class = if origin == "default" { " class=\"default\"" } else { "" };
        let [key, value, origin] = [key, value, origin].map(|text| escaped(text));
        format!("<tr{class}><td>{key}</td><td>{value}</td><td>{origin}</td></tr>\n")
    });
    let mut facts = vec![("directory".to_owned(), run.path.display().to_string())];
    if let Some(date) = run.manifest["date"].as_str() {
        facts.push(("begun".into(), date.into()));
    }
    facts.extend(tables::machine(run));
    facts.extend(tables::content(run));
    let facts = each(&facts, |(name, value)| {
        format!("<tr><td>{}</td><td>{}</td><td></td></tr>\n", escaped(name), escaped(value))
    });
    format!(
        "<details>\n<summary>{}: all settings</summary>\n<div class=\"scroll left\"><table>\n\
         <thead><tr><th>key</th><th>value</th><th>from</th></tr></thead>\n<tbody>\n{settings}{facts}</tbody>\n\
         </table></div>\n</details>\n",
        escaped(&run.name)
    )
}

fn ledgers(runs: &[Run]) -> String {
    each(&tables::ledgers(runs), |(title, rows)| format!("<h3>{title}</h3>\n{}", by_run(runs, rows)))
}

/// A table with a column for each run.
fn by_run(runs: &[Run], rows: &[(String, Vec<String>)]) -> String {
    let header = std::iter::once(String::new()).chain(runs.iter().map(|run| run.name.clone()));
    let row = |(name, values): &(String, Vec<String>)| {
        std::iter::once(name.clone()).chain(values.iter().cloned()).collect()
    };
    let table = super::html::Table { header: header.collect(), rows: rows.iter().map(row).collect() };
    format!("<div class=\"left\">{}</div>\n", table.html())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::rounded;

    #[test]
    fn numbers_are_written_short() {
        let values = [1.0, 0.123456789, -123456.789, 2.5e-7, 1234567.8, f64::MIN_POSITIVE];
        let expected = [json!(1), json!(0.123457), json!(-123457.0), json!(2.5e-7), json!(1234570.0)];
        assert_eq!(values.map(rounded)[..5], expected);
        assert!(rounded(f64::MIN_POSITIVE).as_f64().is_some_and(|value| value > 0.0));
    }
}
