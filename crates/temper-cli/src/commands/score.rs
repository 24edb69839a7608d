//! `temper score`.

use std::io::Write;
use std::path::Path;

use anyhow::{Result, bail};
use serde_json::{Value, json};
use temper::data::{Dataset, Place, Purpose, Renderer, Sequence, Truncation};
use temper::generate::NON_FINITE;
use temper::model::Decoder;
use temper::score::{self, Score};
use temper_kernels::Cpu;

use super::data;
use super::model::Model;
use crate::args;
use crate::output::{hinted, results};
use crate::progress::Counter;

/// Scores every completion of the data.
pub fn run(options: &args::Score) -> Result<()> {
    let cpu = options.compute.device()?;
    cpu.install(|| {
        let adapters = options.adapter.open()?;
        let model = options.model.open(adapters.as_ref())?;
        let data = load(&options.data, &model, options.truncation)?;
        let decoder = model.decoder(&cpu, adapters.as_ref(), options.adapter.quantize)?;
        let scored = Scored::new(&cpu, &decoder, data, options.microbatch_tokens)?;
        if options.json { scored.write_json() } else { scored.write_table() }
    })
}

/// Loads data of which nothing may be cut.
pub fn load(path: &Path, model: &Model, truncation: Truncation) -> Result<Dataset> {
    let renderer = Renderer::new(&model.processor, model.config.context, truncation);
    data::load(path, &renderer, Purpose::Score, "data")
}

/// Data and the scores of its sequences.
pub struct Scored {
    data: Dataset,
    scores: Vec<Vec<Score>>,
}

/// The names of a record's sides: chosen and rejected, or the completion.
const PAIR: [&str; 2] = ["chosen", "rejected"];
const COMPLETION: [&str; 1] = ["completion"];

impl Scored {
    /// Scores all of the data, in forests of at most `budget` rows.
    ///
    /// # Errors
    /// When a log-probability is no number.
    pub fn new(cpu: &Cpu, decoder: &Decoder<Cpu>, data: Dataset, budget: usize) -> Result<Scored> {
        let groups: Vec<&[Sequence]> = data.examples.iter().map(|example| &example.sequences[..]).collect();
        let total = groups.len() as u64;
        let mut counter = Counter::new("score", total);
        let scores = score::score(cpu, decoder, &groups, budget, |done| {
            counter.show(done as u64, total, &[]);
            true
        });
        counter.finish();
        let scored = Scored { data, scores };
        let finite = |scores: &Vec<Score>| scores.iter().all(|score| score.logp.is_finite());
        if let Some(example) = scored.scores.iter().position(|scores| !finite(scores)) {
            let message = format!("{}: its log-probability is not a finite number", scored.place(example));
            bail!(hinted(message, NON_FINITE));
        }
        Ok(scored)
    }

    fn sides(&self) -> &'static [&'static str] {
        if self.data.schema.is_preference() { &PAIR } else { &COMPLETION }
    }

    /// A score for each side; a conversation of several sequences is one completion.
    fn by_side(&self, scores: &[Score]) -> Vec<Score> {
        if self.data.schema.is_preference() { scores.to_vec() } else { vec![sum(scores)] }
    }

    fn place(&self, example: usize) -> &Place {
        &self.data.records[self.data.examples[example].record].place
    }

    /// The number of an example's record in its file, from 0.
    fn row(&self, example: usize) -> usize {
        self.data.records[self.data.examples[example].record].row
    }

    /// Whether the data is a folder whose rows need the name of their file.
    fn has_several_files(&self) -> bool {
        (1..self.scores.len()).any(|example| self.place(example).file != self.place(0).file)
    }

    fn write_json(&self) -> Result<()> {
        let mut out = results();
        let several = self.has_several_files();
        for (example, scores) in self.scores.iter().enumerate() {
            let mut line = json!({ "row": self.row(example) });
            if several {
                line["file"] = json!(self.place(example).file.display().to_string());
            }
            let scores = self.by_side(scores);
            for (side, score) in self.sides().iter().zip(&scores) {
                line[format!("logps/{side}")] = json!(score.logp);
            }
            for (side, score) in self.sides().iter().zip(&scores) {
                line[format!("tokens/{side}")] = json!(score.tokens);
            }
            writeln!(out, "{line}")?;
        }
        writeln!(out, "{}", self.summary())?;
        Ok(out.flush()?)
    }

    fn write_table(&self) -> Result<()> {
        let mut out = results();
        write!(out, "{:>8}", "row")?;
        for side in self.sides() {
            write!(out, "  {:>16}  {:>15}", format!("logps/{side}"), format!("tokens/{side}"))?;
        }
        let several = self.has_several_files();
        writeln!(out)?;
        for (example, scores) in self.scores.iter().enumerate() {
            write!(out, "{:>8}", self.row(example))?;
            for score in self.by_side(scores) {
                write!(out, "  {:>16.4}  {:>15}", score.logp, score.tokens)?;
            }
            if several {
                write!(out, "  {}", self.place(example).file.display())?;
            }
            writeln!(out)?;
        }
        writeln!(out)?;
        for (key, value) in self.summary().as_object().into_iter().flatten().skip(1) {
            writeln!(out, "{key}: {value}")?;
        }
        Ok(out.flush()?)
    }

    /// What the scores come to: `summary` first, then counts and means.
    pub fn summary(&self) -> Value {
        let all: Vec<Vec<Score>> = self.scores.iter().map(|scores| self.by_side(scores)).collect();
        let mut summary = json!({ "summary": true, "records": all.len() });
        if self.data.schema.is_preference() {
            let preferred = all.iter().filter(|pair| pair[0].logp > pair[1].logp).count();
            summary["preference_accuracy"] = json!(preferred as f64 / all.len() as f64);
        }
        for (index, side) in self.sides().iter().enumerate() {
            let total = sum(all.iter().map(|sides| &sides[index]));
            let tokens = total.tokens as f64;
            summary[format!("tokens/{side}")] = json!(total.tokens);
            summary[format!("mean_logp/{side}")] = json!(total.logp / all.len() as f64);
            summary[format!("perplexity/{side}")] = json!((-total.logp / tokens).exp());
            summary[format!("mean_token_accuracy/{side}")] = json!(total.likeliest as f64 / tokens);
            summary[format!("entropy/{side}")] = json!(total.entropy / tokens);
        }
        summary
    }
}

fn sum<'a>(scores: impl IntoIterator<Item = &'a Score>) -> Score {
    scores.into_iter().fold(Score::default(), |sum, score| Score {
        logp: sum.logp + score.logp,
        tokens: sum.tokens + score.tokens,
        likeliest: sum.likeliest + score.likeliest,
        entropy: sum.entropy + score.entropy,
    })
}
