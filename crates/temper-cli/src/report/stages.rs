//! The page of a model's stages: one HTML file that needs nothing beside itself, with the results, the curves, what each
//! stage answers, which tokens of a record are trained on, and the commands to go on with.

use anyhow::Result;
use plotters::style::RGBColor;

use crate::report::html::{Table, document, each, escaped, section};
use crate::report::picture::{Curve, PALETTE, Series, svg_on_page};

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
    let summary = each(&page.summary, |paragraph| format!("<p>{}</p>\n", escaped(paragraph)));
    let body = [
        summary,
        section("Results", &page.results.html()),
        section("Curves", &curves),
        section("Sample answers", &each(&page.answers, answers)),
        section("What is trained on", &record(&page.record)),
        section("Next", &commands(&page.next)),
    ];
    Ok(document(&page.title, &body.concat(), None))
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
    let legend = each(&curve.series, |series| {
        let RGBColor(red, green, blue) = PALETTE[series.colour % PALETTE.len()];
        let swatch = format!("<i style=\"background: rgb({red}, {green}, {blue})\"></i>");
        format!("<span class=\"key\">{swatch}{}</span>\n", escaped(&series.name))
    });
    let smoothed = curve.series.iter().any(Series::has_mean);
    let note = if smoothed { "<span class=\"key\">bold: running mean</span>\n" } else { "" };
    let caption = format!("<figcaption><b>{}</b>\n{legend}{note}</figcaption>\n", escaped(&curve.title));
    let drawing = svg_on_page(curve)?.unwrap_or_else(|| "<p class=\"key\">no points</p>\n".into());
    Ok(format!("<figure>\n{caption}{drawing}</figure>\n"))
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
        Series { name: name.into(), colour: 0, dashed: false, noisy: true, points }
    }

    fn curve(title: &str, y: &str, mut series: Vec<Series>) -> Curve {
        series.iter_mut().enumerate().for_each(|(colour, series)| series.colour = colour);
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
}
