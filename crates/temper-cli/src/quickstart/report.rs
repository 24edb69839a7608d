//! What the stages came to, as a page and in the terminal.

use std::io::Write;

use anyhow::Result;
use temper::data::Example;
use temper::text::Processor;

use super::page::{Answers, Curve, Page, Series, Table};
use super::{Outcome, World};
use crate::args::Quickstart;
use crate::output::{duration, grouped};

/// A share in percent.
fn percent(share: f64) -> String {
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

/// The page of a run.
pub fn page(outcome: &Outcome, world: &World, options: &Quickstart) -> Page {
    let answers = world.questions.iter().take(super::SAMPLES).enumerate().map(|(i, question)| Answers {
        prompt: format!("Human: {}", question.text),
        by_stage: outcome
            .stages
            .iter()
            .map(|stage| (stage.name.to_owned(), stage.samples[i].trim().to_owned()))
            .collect(),
    });
    let out = options.out.display();
    Page {
        title: "temper quickstart".into(),
        summary: vec![
            format!(
                "{} held-out questions: facts that no training text states. Always giving the commonest answer would be right in {}.",
                world.questions.len(),
                percent(outcome.majority)
            ),
            format!(
                "Held-out preferences: DPO prefers the friendly answer in {} with a mean margin of {:.3}; the control, trained on shuffled preferences, has a margin of {:.3}.",
                percent(outcome.of_dpo.accuracy),
                outcome.of_dpo.margin,
                outcome.of_control.margin
            ),
        ],
        results: table(outcome),
        curves: curves(outcome),
        answers: answers.collect(),
        record: pieces(&world.answered[0], &world.processor).unwrap_or_default(),
        next: vec![
            format!("temper chat --model {out}/dpo"),
            format!("temper inspect --model {out}/sft --data {out}/data/preferences.jsonl"),
            "temper dpo --model MODEL.gguf --data pairs.jsonl --out run".into(),
        ],
    }
}

fn table(outcome: &Outcome) -> Table {
    let rewards = [None, None, Some(outcome.of_dpo), Some(outcome.of_control)];
    let row = |(stage, rewards): (&super::Stage, Option<super::Preferred>)| {
        let or_dash = |text: Option<String>| text.unwrap_or_else(|| "–".into());
        vec![
            stage.name.to_owned(),
            percent(stage.measured.right),
            percent(stage.measured.friendly),
            or_dash(rewards.map(|rewards| percent(rewards.accuracy))),
            or_dash(rewards.map(|rewards| format!("{:.3}", rewards.margin))),
            grouped(stage.course.computed),
            grouped(stage.course.padded),
        ]
    };
    let header = [
        "stage",
        "answers right",
        "friendly",
        "preference accuracy",
        "margin",
        "tokens computed",
        "padded batch",
    ];
    Table {
        header: header.map(str::to_owned).to_vec(),
        rows: outcome.stages.iter().zip(rewards).map(row).collect(),
    }
}

/// Loss and accuracy of every stage by step.
fn curves(outcome: &Outcome) -> Vec<Curve> {
    let mut curves = Vec::new();
    for stage in &outcome.stages {
        let series = |name: &str, value: &dyn Fn(&temper::train::StepReport) -> f64| Series {
            name: name.to_owned(),
            points: stage.course.steps.iter().map(|report| (report.step as f64, value(report))).collect(),
        };
        let accuracy = |report: &temper::train::StepReport| {
            report
                .eval
                .preferences
                .map_or(report.eval.mean_token_accuracy, |preferences| preferences.accuracy)
        };
        for (what, series) in [
            ("loss", series("loss", &|report| report.eval.loss)),
            ("accuracy", series("accuracy", &accuracy)),
        ] {
            curves.push(Curve {
                title: format!("{}: {what}", stage.name),
                x: "step".into(),
                y: what.into(),
                series: vec![series],
            });
        }
    }
    curves
}

/// The page's tables as text.
pub fn print(out: &mut impl Write, page: &Page, seconds: f64) -> Result<()> {
    let rows: Vec<&Vec<String>> = std::iter::once(&page.results.header).chain(&page.results.rows).collect();
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    writeln!(out)?;
    for row in &rows {
        let cells: Vec<String> = row
            .iter()
            .enumerate()
            .map(|(column, cell)| format!("{cell:>width$}", width = width(column)))
            .collect();
        writeln!(out, "{}", cells.join("  "))?;
    }
    for line in &page.summary {
        writeln!(out, "\n{line}")?;
    }
    for answers in &page.answers {
        writeln!(out, "\n{}", answers.prompt)?;
        for (stage, answer) in &answers.by_stage {
            writeln!(out, "  {stage:>10}: {}", answer.escape_debug())?;
        }
    }
    writeln!(out, "\nThe page is report.html. Next:")?;
    for command in &page.next {
        writeln!(out, "  {command}")?;
    }
    writeln!(out, "\nDone in {}.", duration(seconds))?;
    out.flush()?;
    Ok(())
}
