//! What the stages came to, as a page and in the terminal.

use std::io::Write;
use std::path::Path;

use anyhow::Result;
use temper::data::Example;
use temper::text::Processor;
use temper::train::StepReport;

use super::stage::Course;
use crate::output::{duration, escaped};
use crate::report::picture::{Curve, Series};
use crate::report::stages::Page;

/// A share in percent.
pub fn percent(share: f64) -> String {
    format!("{:.1}%", 100.0 * share)
}

/// Text of each token of an example's first sequence, and whether it is trained.
pub fn pieces(example: &Example, processor: &Processor) -> Result<Vec<(String, bool)>> {
    let sequence = &example.sequences[0];
    let piece = |(at, &token): (usize, &u32)| {
        let trained = sequence.trained.iter().any(|span| span.contains(&at));
        Ok((processor.tokenizer.decode(&[token], false)?, trained))
    };
    sequence.tokens.iter().enumerate().map(piece).collect()
}

/// Loss and accuracy of every stage by step.
pub fn curves(stages: &[(&str, &Course)]) -> Vec<Curve> {
    let mut curves = Vec::new();
    for (stage, course) in stages {
        let series = |name: &str, value: &dyn Fn(&StepReport) -> f64| Series {
            name: name.to_owned(),
            colour: 0,
            dashed: false,
            noisy: true,
            points: course.steps.iter().map(|report| (report.step as f64, value(report))).collect(),
        };
        let accuracy = |report: &StepReport| {
            report
                .metrics
                .preferences
                .map_or(report.metrics.mean_token_accuracy, |preferences| preferences.accuracy)
        };
        let of_pairs = course.steps.iter().any(|report| report.metrics.preferences.is_some());
        let share = if of_pairs { "accuracy of pairs" } else { "accuracy of tokens" };
        for (what, series) in
            [("loss", series("loss", &|report| report.metrics.loss)), (share, series(share, &accuracy))]
        {
            curves.push(Curve {
                title: format!("{stage}: {what}"),
                x: "step".into(),
                y: what.into(),
                series: vec![series],
            });
        }
    }
    curves
}

/// The page's tables as text.
pub fn print(out: &mut impl Write, page: &Page, out_folder: &Path, seconds: f64) -> Result<()> {
    writeln!(out)?;
    page.results.write(out)?;
    for line in &page.summary {
        writeln!(out, "\n{line}")?;
    }
    for answers in &page.answers {
        writeln!(out, "\n{}", escaped(&answers.prompt))?;
        for (stage, answer) in &answers.by_stage {
            writeln!(out, "  {stage:>10}: {}", escaped(answer).replace('\n', &format!("\n{:14}", "")))?;
        }
    }
    let folder = out_folder.display();
    writeln!(out, "\nThe page with the curves is {folder}/report.html. Next:")?;
    for command in &page.next {
        writeln!(out, "  {command}")?;
    }
    writeln!(out, "\nDone in {}.", duration(seconds))?;
    out.flush()?;
    Ok(())
}
