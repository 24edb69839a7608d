//! `temper compare`.

use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::Result;
use chrono::Utc;
use serde_json::{Value, json};
use temper::checkpoint::save::write_atomic;
use temper::generate::{self, Reply};
use temper::model::files::Quantise;
use temper_kernels::Cpu;

use super::adapter::{self, Adapters};
use super::data;
use super::generate::{how, shown};
use super::model::Model;
use super::score::{self, Scored};
use crate::args::Compare;
use crate::output::{hinted, results, say};
use crate::progress::Counter;
use crate::report::html::Table;
use crate::report::stages::{self, Answers, Page};
use temper::data::Dataset;

/// Prompts that are answered at a time.
const TOGETHER: usize = 8;

/// Asks every model, and scores it.
pub fn run(options: &Compare) -> Result<()> {
    if let Some(path) = &options.html {
        check_writable(path)?;
    }
    let cpu = options.compute.device()?;
    let compared = cpu.install(|| {
        // All are opened first, so that what is wrong is said before anything is computed.
        let mut opened: Vec<Opened> =
            options.models.iter().map(|name| open(options, name)).collect::<Result<_>>()?;
        check_same_records(&opened)?;
        equal_limits(&mut opened);
        opened.into_iter().map(|opened| opened.ask(&cpu, options)).collect::<Result<_>>()
    })?;
    let comparison = Comparison(compared);
    if options.json {
        comparison.write_json()?;
    } else {
        comparison.write_text()?;
    }
    if let Some(path) = &options.html {
        let html = stages::html(&comparison.page())?;
        write_atomic(path, |file| file.write_all(html.as_bytes()))?;
        say("page", format!("`{}`", path.display()));
    }
    Ok(())
}

/// Said before the answers are made and not after.
fn check_writable(path: &Path) -> Result<()> {
    let folder = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let cannot = match (path.exists() && !path.is_file(), tempfile::tempfile_in(folder)) {
        (true, _) => "it is there and is no file".to_owned(),
        (false, Ok(_)) => return Ok(()),
        (false, Err(error)) => error.to_string(),
    };
    let hint = "give another `--html`";
    Err(hinted(format!("cannot write `{}`: {cannot}", path.display()), hint))
}

/// Answers of different lengths are no comparison: where models have their own limits, the smallest counts.
fn equal_limits(opened: &mut [Opened]) {
    let smallest = opened.iter().map(|of| of.how.max_new_tokens).min().unwrap_or(0);
    opened.iter_mut().for_each(|of| of.how.max_new_tokens = smallest);
}

/// Means over different records are no comparison.
fn check_same_records(opened: &[Opened]) -> Result<()> {
    let records = |of: &Opened| -> Vec<usize> {
        of.data.iter().flat_map(|data| &data.examples).map(|example| example.record).collect()
    };
    for pair in opened.windows(2) {
        let [first, second] = [&pair[0], &pair[1]].map(|of| (&of.name, records(of)));
        if first.1 != second.1 {
            let side = |(name, records): (&String, Vec<usize>)| format!("{} in `{name}`", records.len());
            let message = format!("{}, {}: not the same records have room", side(first), side(second));
            let hint = "give records that every model's context has room for";
            return Err(hinted(message, hint));
        }
    }
    Ok(())
}

/// A model without its weights in memory, and what it is asked.
struct Opened {
    name: String,
    model: Model,
    adapters: Option<Adapters>,
    prompts: Vec<String>,
    tokens: Vec<Vec<u32>>,
    data: Option<Dataset>,
    how: generate::Options,
}

/// What one model said.
struct Compared {
    name: String,
    prompts: Vec<String>,
    answers: Vec<Reply>,
    /// What its scores come to, with data.
    summary: Value,
}

fn open(options: &Compare, name: &str) -> Result<Opened> {
    let (path, adapter) = model_and_adapter(name);
    let adapters = adapter.map(|path| adapter::open(&path)).transpose()?;
    let model = Model::open(&path, options.chat_template.as_deref(), adapters.as_ref(), Utc::now())?;
    model.introduce(&path);
    let (prompts, tokens) = data::prompts(&options.prompts, &model)?.into_iter().unzip();
    let data = options.data.as_deref().map(|path| score::load(path, &model, options.truncation));
    let (data, how) = (data.transpose()?, how(&options.sampling, &model)?);
    Ok(Opened { name: name.to_owned(), model, adapters, prompts, tokens, data, how })
}

impl Opened {
    /// Loads the weights, and lets them go when it has answered.
    fn ask(self, cpu: &Cpu, options: &Compare) -> Result<Compared> {
        let Opened { name, model, adapters, prompts, tokens, data, how } = self;
        say("asked", format!("`{name}`"));
        let decoder = model.decoder(cpu, adapters.as_ref(), Quantise::None)?;
        let total = prompts.len() as u64;
        let mut counter = Counter::new("answers", total);
        let mut answers = Vec::with_capacity(prompts.len());
        for replies in generate::answers(cpu, &decoder, &model.processor, &tokens, &how, TOGETHER) {
            answers.extend(replies?);
            counter.show(answers.len() as u64, total, &[]);
        }
        counter.finish();
        let summary =
            data.map(|data| Scored::new(cpu, &decoder, data, options.microbatch_tokens)).transpose()?;
        let summary = summary.map(|scored| scored.summary());
        Ok(Compared { name, prompts, answers, summary: summary.unwrap_or_default() })
    }
}

/// `MODEL+ADAPTER`, unless there is a model of that very name.
fn model_and_adapter(name: &str) -> (PathBuf, Option<PathBuf>) {
    match name.rsplit_once('+') {
        Some((model, adapter)) if !adapter.is_empty() && !Path::new(name).exists() => {
            (model.into(), Some(adapter.into()))
        }
        _ => (name.into(), None),
    }
}

/// All models beside each other.
struct Comparison(Vec<Compared>);

impl Comparison {
    /// The models' names without the folders that all are in.
    fn names(&self) -> impl Iterator<Item = String> {
        let first = self.0.first().map_or("", |first| &first.name);
        let folders = first.match_indices('/').map(|(at, _)| &first[..at + 1]);
        let shared = |folder: &&str| self.0.len() > 1 && self.0.iter().all(|of| of.name.starts_with(folder));
        let shared = folders.take_while(shared).last().map_or(0, str::len);
        self.0.iter().map(move |of| of.name[shared..].to_owned())
    }

    /// Each prompt with the answers by model; models agree on the prompts.
    fn answers(&self) -> Vec<Answers> {
        let prompts = self.0.first().map_or(&[][..], |first| &first.prompts);
        let answer = |index: usize| self.0.iter().map(move |of| of.answers[index].text.clone());
        let answers = |(index, prompt): (usize, &String)| Answers {
            prompt: prompt.clone(),
            by_stage: self.names().zip(answer(index)).collect(),
        };
        prompts.iter().enumerate().map(answers).collect()
    }

    /// A row for each kind of score, a column for each model.
    fn scores(&self) -> Table {
        let header = [String::new()].into_iter().chain(self.names()).collect();
        let keys = self.0.first().and_then(|first| first.summary.as_object()).into_iter().flatten().skip(1);
        let cell = |value: &Value| match value.as_f64() {
            Some(number) if value.is_f64() => format!("{number:.4}"),
            _ => value.to_string(),
        };
        let row = |key: &String| {
            let cells = self.0.iter().map(|of| cell(&of.summary[key]));
            [key.clone()].into_iter().chain(cells).collect()
        };
        Table { header, rows: keys.map(|(key, _)| row(key)).collect() }
    }

    fn page(&self) -> Page {
        let names: Vec<&str> = self.0.iter().map(|of| &of.name[..]).collect();
        Page {
            title: "The same prompts, answered side by side".into(),
            summary: vec![names.join(", ")],
            results: self.scores(),
            curves: Vec::new(),
            answers: self.answers(),
            record: Vec::new(),
            next: Vec::new(),
        }
    }

    fn write_text(&self) -> Result<()> {
        let mut out = results();
        for Answers { prompt, by_stage } in self.answers() {
            writeln!(out, "{}", shown(&prompt))?;
            for (name, answer) in by_stage {
                writeln!(out, "  {name}\n    {}", shown(answer.trim_end()).replace('\n', "\n    "))?;
            }
            writeln!(out)?;
        }
        self.scores().write(&mut out)?;
        Ok(out.flush()?)
    }

    fn write_json(&self) -> Result<()> {
        let mut out = results();
        for index in 0..self.answers().len() {
            for Compared { name, prompts, answers, .. } in &self.0 {
                let Reply { text: answer, tokens } = &answers[index];
                let line =
                    json!({ "prompt": prompts[index], "model": name, "answer": answer, "tokens": tokens });
                writeln!(out, "{line}")?;
            }
        }
        for Compared { name, summary, .. } in self.0.iter().filter(|of| !of.summary.is_null()) {
            let mut line = json!({ "summary": true, "model": name });
            for (key, value) in summary.as_object().into_iter().flatten() {
                line[key] = value.clone();
            }
            writeln!(out, "{line}")?;
        }
        Ok(out.flush()?)
    }
}
