//! The report page: one HTML file that needs nothing beside itself, with the results, the curves, what each stage
//! answers, which tokens of a record are trained on, and the commands to go on with.

use std::io::{self, Write};
use std::ops::Range;

use anyhow::Result;
use plotters::prelude::*;
use plotters::style::Color;

/// Size of a curve's drawing; the page scales it to its own width.
const SIZE: (u32, u32) = (860, 300);

/// The most points drawn of a series.
const MOST: usize = 400;

/// Points from which on a series is drawn pale beneath its running mean.
const MANY: usize = 150;

/// Points up to which each is marked.
const FEW: usize = 24;

/// Lines that stand out from a light and from a dark page.
const PALETTE: [RGBColor; 8] = [
    RGBColor(59, 130, 246),
    RGBColor(234, 108, 22),
    RGBColor(22, 163, 94),
    RGBColor(168, 95, 240),
    RGBColor(225, 60, 110),
    RGBColor(14, 160, 180),
    RGBColor(180, 135, 20),
    RGBColor(120, 130, 150),
];

/// Axes and grid, likewise.
const AXIS: RGBColor = RGBColor(128, 134, 145);

const STYLE: &str = "\
:root { color-scheme: light dark; --page: #fff; --text: #1f2430; --faint: #667085; --line: #e1e5eb; --panel: #f6f7f9;
  --trained: #0b6b3a; --mark: #d9f4e3; }
@media (prefers-color-scheme: dark) {
  :root { --page: #15181e; --text: #e3e6ec; --faint: #98a1b0; --line: #303641; --panel: #1e222a;
    --trained: #7fe0a8; --mark: #173d29; } }
* { box-sizing: border-box; }
body { max-width: 900px; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; background: var(--page); color: var(--text);
  font: 16px/1.55 system-ui, sans-serif; }
h1 { margin: 0 0 .75rem; font-size: 1.9rem; line-height: 1.2; }
h2 { margin: 2.75rem 0 1rem; padding-bottom: .35rem; border-bottom: 1px solid var(--line); font-size: 1.25rem; }
p { margin: .4rem 0; }
.scroll { overflow-x: auto; }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .45rem .75rem; border-bottom: 1px solid var(--line); text-align: right; }
th { color: var(--faint); font-size: .85rem; font-weight: 600; }
th:first-child, td:first-child { padding-left: 0; text-align: left; }
th:last-child, td:last-child { padding-right: 0; }
figure { margin: 0 0 2rem; }
figcaption { display: flex; flex-wrap: wrap; gap: .1rem 1.1rem; align-items: baseline; margin-bottom: .4rem; }
figcaption b { margin-right: auto; }
.key { color: var(--faint); font-size: .875rem; }
.key i { display: inline-block; width: 1.1em; height: .2em; margin-right: .45em; border-radius: 1px;
  vertical-align: middle; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: currentColor; font-family: inherit; }
article { margin-bottom: 1rem; padding: .85rem 1.1rem; border: 1px solid var(--line); border-radius: 8px; }
h3 { margin: 0 0 .5rem; font-size: 1rem; white-space: pre-wrap; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .4rem 1.1rem; margin: 0; }
dt { color: var(--faint); font-size: .875rem; line-height: 1.75; }
dd { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
pre { margin: 0; padding: .9rem 1.1rem; overflow-x: auto; border-radius: 8px; background: var(--panel);
  font: .875rem/1.7 ui-monospace, monospace; }
.record { margin-top: .6rem; white-space: pre-wrap; overflow-wrap: anywhere; }
.record span { color: var(--faint); }
mark { background: var(--mark); color: var(--trained); text-decoration: underline; text-underline-offset: .35em; }
.record span, mark { box-shadow: inset 1px 0 var(--line); }
@media (max-width: 560px) { dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .5rem; } }
";

/// One line of a curve.
pub struct Series {
    /// Its name in the legend.
    pub name: String,
    /// Its points, from left to right; those that are not finite are left out.
    pub points: Vec<(f64, f64)>,
}

/// One drawing, with all its lines on the same axes.
pub struct Curve {
    /// What it shows.
    pub title: String,
    /// The horizontal axis.
    pub x: String,
    /// The vertical axis.
    pub y: String,
    /// The lines.
    pub series: Vec<Series>,
}

/// The table of results: the first column names its row.
pub struct Table {
    /// Names of the columns.
    pub header: Vec<String>,
    /// The rows' cells.
    pub rows: Vec<Vec<String>>,
}

impl Table {
    /// Writes it as text, the columns aligned.
    pub fn write(&self, out: &mut impl Write) -> io::Result<()> {
        if self.rows.is_empty() {
            return Ok(());
        }
        let rows: Vec<&Vec<String>> = std::iter::once(&self.header).chain(&self.rows).collect();
        let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
        for row in &rows {
            let cells = row.iter().enumerate();
            let cells = cells.map(|(column, cell)| format!("{cell:>width$}", width = width(column)));
            writeln!(out, "{}", cells.collect::<Vec<_>>().join("  "))?;
        }
        Ok(())
    }
}

/// What each stage answers to one prompt.
pub struct Answers {
    /// The prompt.
    pub prompt: String,
    /// Each stage's name and answer.
    pub by_stage: Vec<(String, String)>,
}

/// Everything that the page says; a part that is empty is left out.
pub struct Page {
    /// The heading.
    pub title: String,
    /// Paragraphs beneath it.
    pub summary: Vec<String>,
    /// The results.
    pub results: Table,
    /// The curves.
    pub curves: Vec<Curve>,
    /// Sample answers.
    pub answers: Vec<Answers>,
    /// A training record: each token's text and whether it is trained on.
    pub record: Vec<(String, bool)>,
    /// Commands to go on with.
    pub next: Vec<String>,
}

/// The whole file.
pub fn html(page: &Page) -> Result<String> {
    let curves = page.curves.iter().map(figure).collect::<Result<String>>()?;
    let title = escaped(&page.title);
    let summary = each(&page.summary, |paragraph| format!("<p>{}</p>\n", escaped(paragraph)));
    let sections = [
        section("Results", &table(&page.results)),
        section("Curves", &curves),
        section("Sample answers", &each(&page.answers, answers)),
        section("What is trained on", &record(&page.record)),
        section("Next", &commands(&page.next)),
    ]
    .concat();
    Ok(format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <title>{title}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n\
         <h1>{title}</h1>\n{summary}{sections}</body>\n</html>\n"
    ))
}

/// A part of the page, unless there is nothing in it.
fn section(title: &str, body: &str) -> String {
    if body.is_empty() {
        return String::new();
    }
    format!("<section>\n<h2>{title}</h2>\n{body}</section>\n")
}

fn table(table: &Table) -> String {
    if table.rows.is_empty() {
        return String::new();
    }
    let header = each(&table.header, |cell| format!("<th>{}</th>", escaped(cell)));
    let rows = each(&table.rows, |row| {
        format!("<tr>{}</tr>\n", each(row, |cell| format!("<td>{}</td>", escaped(cell))))
    });
    format!(
        "<div class=\"scroll\"><table>\n<thead><tr>{header}</tr></thead>\n<tbody>\n{rows}</tbody>\n</table></div>\n"
    )
}

fn answers(answers: &Answers) -> String {
    let stages = each(&answers.by_stage, |(stage, answer)| {
        format!("<dt>{}</dt><dd>{}</dd>\n", escaped(stage), escaped(answer))
    });
    format!("<article>\n<h3>{}</h3>\n<dl>\n{stages}</dl>\n</article>\n", escaped(&answers.prompt))
}

/// The record's tokens, each on its own; line ends are drawn, for they are tokens like any other.
fn record(tokens: &[(String, bool)]) -> String {
    if tokens.is_empty() {
        return String::new();
    }
    let tokens = each(tokens, |(text, trained)| {
        let tag = if *trained { "mark" } else { "span" };
        format!("<{tag}>{}</{tag}>", escaped(text).replace('\n', "↵\n"))
    });
    format!(
        "<p class=\"key\"><mark>underlined</mark> tokens are trained on; the others are only read.</p>\n\
         <pre class=\"record\">{tokens}</pre>\n"
    )
}

fn commands(commands: &[String]) -> String {
    if commands.is_empty() {
        return String::new();
    }
    format!("<pre><code>{}</code></pre>\n", each(commands, |command| escaped(command) + "\n"))
}

/// A curve beneath its title and legend.
fn figure(curve: &Curve) -> Result<String> {
    let lines: Vec<Line> = curve.series.iter().zip(PALETTE.into_iter().cycle()).map(Line::new).collect();
    let smoothed = lines.iter().any(|line| !line.mean.is_empty());
    let legend = each(&lines, |Line { name, colour: RGBColor(red, green, blue), .. }| {
        let swatch = format!("<i style=\"background: rgb({red}, {green}, {blue})\"></i>");
        format!("<span class=\"key\">{swatch}{}</span>\n", escaped(name))
    });
    let note = if smoothed { "<span class=\"key\">bold: running mean</span>\n" } else { "" };
    let caption = format!("<figcaption><b>{}</b>\n{legend}{note}</figcaption>\n", escaped(&curve.title));
    Ok(format!("<figure>\n{caption}{}</figure>\n", drawing(curve, &lines)?))
}

/// A series as it is drawn.
struct Line<'a> {
    name: &'a str,
    colour: RGBColor,
    points: Vec<(f64, f64)>,
    /// The running mean of a long series.
    mean: Vec<(f64, f64)>,
}

impl<'a> Line<'a> {
    fn new((series, colour): (&'a Series, RGBColor)) -> Self {
        let finite = |&(x, y): &(f64, f64)| x.is_finite() && y.is_finite();
        let points: Vec<_> = series.points.iter().copied().filter(finite).collect();
        let mean = if points.len() < MANY { Vec::new() } else { thinned(&running_mean(&points)) };
        Line { name: &series.name, colour, points: thinned(&points), mean }
    }
}

/// The axes and the lines, as SVG; a word where there is nothing to draw.
fn drawing(curve: &Curve, lines: &[Line]) -> Result<String> {
    let points = || lines.iter().flat_map(|line| &line.points);
    let (Some(x), Some(y)) =
        (padded(points().map(|point| point.0), 0.0), padded(points().map(|point| point.1), 0.06))
    else {
        return Ok("<p class=\"key\">no points</p>\n".into());
    };
    let (x_label, y_label) = (label(&x), label(&y));
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        let mut chart = ChartBuilder::on(&area)
            .margin(8)
            .margin_right(20)
            .x_label_area_size(44)
            .y_label_area_size(66)
            .build_cartesian_2d(x, y)?;
        chart
            .configure_mesh()
            .disable_x_mesh()
            .light_line_style(TRANSPARENT)
            .bold_line_style(AXIS.mix(0.3))
            .axis_style(AXIS)
            .label_style(("sans-serif", 13))
            .axis_desc_style(("sans-serif", 14))
            .x_desc(&curve.x)
            .y_desc(&curve.y)
            .x_label_formatter(&x_label)
            .y_label_formatter(&y_label)
            .x_labels(10)
            .y_labels(6)
            .draw()?;
        for Line { colour, points, mean, .. } in lines {
            let strength = if mean.is_empty() { 1.0 } else { 0.3 };
            let width = if mean.is_empty() { 2 } else { 1 };
            chart.draw_series(LineSeries::new(points.clone(), colour.mix(strength).stroke_width(width)))?;
            if points.len() <= FEW {
                chart.draw_series(points.iter().map(|&point| Circle::new(point, 3, colour.filled())))?;
            }
        }
        // The means go on top of every pale line.
        for Line { colour, mean, .. } in lines {
            chart.draw_series(LineSeries::new(mean.clone(), colour.stroke_width(2)))?;
        }
        area.present()?;
    }
    Ok(svg)
}

/// The range of the values with a share of it added at both ends, never an empty one; none without values.
fn padded(values: impl Iterator<Item = f64>, share: f64) -> Option<Range<f64>> {
    let (low, high) = values
        .map(|value| (value, value))
        .reduce(|(low, high), (value, _)| (low.min(value), high.max(value)))?;
    let padding =
        if high > low { (high - low) * share } else { 0.1 * if high == 0.0 { 1.0 } else { high.abs() } };
    Some(low - padding..high + padding)
}

/// A few hundred points with the outline of all: both ends, and the lowest and the highest of each span between.
fn thinned(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let [first, middle @ .., last] = points else { return points.to_vec() };
    if points.len() <= MOST {
        return points.to_vec();
    }
    let outline = middle.chunks(middle.len().div_ceil(MOST / 2 - 1)).flat_map(|span| {
        let (lowest, highest) = span.iter().fold((span[0], span[0]), |(lowest, highest), &point| {
            (
                if point.1 < lowest.1 { point } else { lowest },
                if point.1 > highest.1 { point } else { highest },
            )
        });
        if lowest.0 <= highest.0 { [lowest, highest] } else { [highest, lowest] }
    });
    std::iter::once(*first).chain(outline).chain([*last]).collect()
}

/// Each point's mean with its neighbours, as many on its left as on its right; none for those too near an end.
fn running_mean(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let reach = points.len() / 60;
    let window = 2 * reach + 1;
    let mean = |span: &[(f64, f64)]| {
        let sum: f64 = span.iter().map(|point| point.1).sum();
        (span[reach].0, sum / window as f64)
    };
    points.windows(window).map(mean).collect()
}

/// How the values of an axis are written: with as many digits as tell its marks apart.
fn label(range: &Range<f64>) -> impl Fn(&f64) -> String + use<> {
    let span = range.end - range.start;
    let decimals = (1.0 - span.log10().floor()).max(0.0) as usize;
    move |&value| match value {
        _ if value.abs() < span * 1e-6 => "0".into(),
        _ if decimals > 4 && value.abs() < 0.01 => format!("{value:.1e}"),
        _ => format!("{value:.decimals$}"),
    }
}

/// The items' HTML, one after another.
fn each<T>(items: &[T], html: impl Fn(&T) -> String) -> String {
    items.iter().map(html).collect()
}

/// Text as it stands in an element or an attribute.
fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            _ => escaped.push(character),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strings(texts: &[&str]) -> Vec<String> {
        texts.iter().map(|text| (*text).into()).collect()
    }

    fn pairs(texts: &[(&str, &str)]) -> Vec<(String, String)> {
        texts.iter().map(|&(first, second)| (first.into(), second.into())).collect()
    }

    fn series(name: &str, count: usize, value: impl Fn(f64) -> f64) -> Series {
        let points = (0..count).map(|step| (step as f64, value(step as f64))).collect();
        Series { name: name.into(), points }
    }

    fn curve(title: &str, y: &str, series: Vec<Series>) -> Curve {
        Curve { title: title.into(), x: "step".into(), y: y.into(), series }
    }

    fn page() -> Page {
        let noise = |step: f64| (step * 12.9898).sin() * 43758.547 % 1.0;
        Page {
            title: "From a base model to answers".into(),
            summary: strings(&[
                "A small model was trained on 1,200 conversations, then on 400 preferences, in 3 min 41 s.",
                "Held-out loss fell from 3.912 to 1.204; the chosen answer is now preferred in 87 % of the pairs.",
            ]),
            results: Table {
                header: strings(&["Stage", "Steps", "Held-out loss", "Preferred", "Time"]),
                rows: vec![
                    strings(&["base", "–", "3.912", "49 %", "–"]),
                    strings(&["sft", "3,000", "1.204", "58 %", "2 min 50 s"]),
                    strings(&["dpo", "20", "1.231", "87 %", "51 s"]),
                ],
            },
            curves: vec![
                curve(
                    "SFT loss",
                    "loss <nats>",
                    vec![
                        series("training", 3000, |step| {
                            1.2 + 2.7 * (-step / 400.0).exp() + 0.25 * noise(step)
                        }),
                        series("held out", 3000, |step| 1.3 + 2.6 * (-step / 450.0).exp()),
                    ],
                ),
                curve(
                    "DPO margin",
                    "reward",
                    vec![series("margin", 20, |step| 0.02 * step + 0.05 * noise(step))],
                ),
                curve(
                    "Learning rate",
                    "rate",
                    vec![series("sft rate", 120, |step| 2e-5 * (1.0 - step / 120.0))],
                ),
                curve(
                    "One point",
                    "loss",
                    vec![series("alone", 1, |_| 2.5), series("broken", 9, |_| f64::NAN)],
                ),
                curve("Nothing", "loss", vec![]),
            ],
            answers: vec![Answers {
                prompt: "Is 3 < 5 & 5 > 3?".into(),
                by_stage: pairs(&[
                    ("base", "3 < 5 & 5 > 3? 3 < 5 & 5 > 3? 3 < 5 &"),
                    ("sft", "Yes: three is less than five,\nand five is more than three."),
                    ("dpo", "Yes. <b>Both</b> say the same."),
                ]),
            }],
            record: [
                ("<|im_start|>", false),
                ("user", false),
                ("\n", false),
                ("What", false),
                (" is", false),
                (" 2+2?", false),
                ("<|im_end|>", false),
                ("\n", false),
                ("<|im_start|>", false),
                ("assistant", false),
                ("\n", false),
                ("It", true),
                (" is", true),
                (" four", true),
                (".", true),
                ("<|im_end|>", true),
                ("\n", true),
            ]
            .map(|(text, trained)| (text.into(), trained))
            .into(),
            next: strings(&["temper chat --model runs/dpo/final", "temper sft --help"]),
        }
    }

    #[test]
    fn text_is_escaped() {
        let html = html(&page()).unwrap();
        assert!(html.contains("Is 3 &lt; 5 &amp; 5 &gt; 3?"));
        assert!(html.contains("loss &lt;nats&gt;"), "the axes' names, too");
        assert!(html.contains("<mark>&lt;|im_end|&gt;</mark>"));
        assert!(!html.contains("<b>Both") && !html.contains("<|") && !html.contains("<nats>"));
        assert_eq!(escaped("\"it's\""), "&quot;it&#39;s&quot;");
    }

    #[test]
    fn the_page_is_whole_and_stands_alone() {
        let page = page();
        let html = html(&page).unwrap();
        for series in page.curves.iter().flat_map(|curve| &curve.series) {
            assert!(html.contains(&series.name), "{}", series.name);
        }
        assert_eq!(html.matches("<svg").count(), 4, "all but the curve without points");
        let foreign = html.replace("http://www.w3.org/", "");
        assert!(!foreign.contains("://") && !foreign.contains("<script") && !foreign.contains("@import"));
    }

    #[test]
    fn long_series_keep_their_ends_and_extremes() {
        let points: Vec<_> = (0..5000).map(|x| (x as f64, if x == 1234 { 9.0 } else { 0.0 })).collect();
        let thin = thinned(&points);
        assert!(thin.len() <= MOST, "{}", thin.len());
        assert_eq!((thin.first(), thin.last()), (points.first(), points.last()));
        assert!(thin.contains(&points[1234]));
        assert!(thin.is_sorted_by(|left, right| left.0 <= right.0));
        assert_eq!(thinned(&points[..MOST]), points[..MOST]);
    }

    #[test]
    fn means_lie_on_a_straight_line() {
        let straight: Vec<_> = (0..600).map(|x| (x as f64, x as f64)).collect();
        assert_eq!(running_mean(&straight), straight[10..590]);
    }

    #[test]
    fn labels_tell_marks_apart() {
        assert_eq!([0.0, 500.0].map(|value| label(&(0.0..2999.0))(&value)), ["0", "500"]);
        assert_eq!([-1e-17, 0.2].map(|value| label(&(-0.1..0.5))(&value)), ["0", "0.20"]);
        assert_eq!([5e-6, 2e-5].map(|value| label(&(0.0..2e-5))(&value)), ["5.0e-6", "2.0e-5"]);
    }
}
