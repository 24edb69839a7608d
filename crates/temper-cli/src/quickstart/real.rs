//! SFT and DPO on a chat model that the user has: who it is, and a short and polite manner.

use std::path::Path;
use std::time::Instant;

use anyhow::Result;
use chrono::Utc;
use temper::data::order::Order;
use temper::data::{Dataset, Example, Purpose, Renderer, Truncation};
use temper::generate::Sampling;
use temper::model::{Decoder, Source};
use temper::objective::Dpo;
use temper::parallel::Ranks;
use temper::text::{Message, Processor, Role, Variables};
use temper::train::Objective;
use temper_kernels::Cpu;

use super::measure::{Preferred, answers, logps, preferred};
use super::report::{curves, percent, pieces};
use super::stage::{Course, Recipe, train};
use super::{create, publish, save, show_record};
use crate::args::Quickstart;
use crate::commands::model::{Model, max_length};
use crate::output::{duration, grouped, hinted, say};
use crate::report::html::Table;
use crate::report::stages::{Answers, Page};

const WHO_AM_I: &str = include_str!("../../../../examples/who-am-i.jsonl");
const SHORT_AND_POLITE: &str = include_str!("../../../../examples/short-and-polite.jsonl");

/// None of the training records asks one of these.
const ABOUT_ITSELF: [&str; 6] = [
    "Who are you?",
    "What is your name?",
    "Who made you?",
    "Are you a human being?",
    "Hello, my name is Kate. What is your name?",
    "What can you do for me?",
];
const EVERYDAY: [&str; 6] = [
    "Why is the sky blue?",
    "How long should I boil an egg?",
    "What is the capital of Italy?",
    "How do I remove a coffee stain from a shirt?",
    "How many legs does a spider have?",
    "What can I do to sleep better?",
];
/// Longest answer in tokens.
const ANSWER: usize = 96;
/// Room for every record and every answer.
const SHORTEST_CONTEXT: usize = 256;
/// The last pairs are held out.
const HELD_OUT: usize = 20;
const BETA: f64 = 0.1;

/// How many chats, pairs and held-out pairs are used; all of them, but for `--smoke`.
const SMOKE: [usize; 3] = [8, 8, 4];

/// A stage and what it came to.
struct Stage {
    name: &'static str,
    /// Of the questions about itself, then of the everyday ones.
    answers: Vec<String>,
    course: Course,
    of_held_out: Option<Preferred>,
}

/// Runs the whole story.
pub fn story(options: &Quickstart, out: &Path, path: &Path, device: &Cpu, ranks: &Ranks) -> Result<()> {
    let start = Instant::now();
    let (model, length) = chat_model(path)?;
    let Model { checkpoint, processor, .. } = &model;
    let records = Records::load(processor, length, &out.join("data"), options.smoke)?;
    let Records { chats, pairs, held_out } = &records;
    show_record(&chats[0], processor)?;

    let sft = Recipe {
        objective: Objective::Sft,
        batch: 8,
        epochs: 3,
        order: (Order::Shuffled, options.seed),
        learning_rate: 1e-4,
    };
    let dpo = Recipe {
        objective: Objective::Dpo(Dpo { beta: BETA, label_smoothing: 0.0 }),
        epochs: 1,
        learning_rate: 2e-5,
        ..sft
    };
    let asked = Asked { device, ranks, processor, longest: if options.smoke { 8 } else { ANSWER } };
    let save = |name: &str, decoder: &Decoder<Cpu>| {
        if !ranks.is_first() {
            return Ok(());
        }
        let generation_config = checkpoint.generation_config.as_ref();
        save(device, decoder, processor, &checkpoint.config, generation_config, &out.join(name))
    };

    let decoder = Source::trained(checkpoint)?.whole(device)?;
    let (answers, course) = (asked.answers(&decoder)?, Course::default());
    let before = Stage { name: "before", answers, course, of_held_out: None };

    let (decoder, course) = train((device, ranks), decoder, sft, chats, &[], "sft")?;
    let sft = Stage { name: "sft", answers: asked.answers(&decoder)?, course, of_held_out: None };
    save("sft", &decoder)?;

    say("reference", format!("log-probabilities of {} pairs", pairs.len() + held_out.len()));
    let reference = logps(device, &decoder, pairs);
    let reference_held_out = logps(device, &decoder, held_out);
    let (decoder, course) = train((device, ranks), decoder, dpo, pairs, &reference, "dpo")?;
    let of_held_out = preferred(&logps(device, &decoder, held_out), &reference_held_out, BETA);
    let answers = asked.answers(&decoder)?;
    let dpo = Stage { name: "dpo", answers, course, of_held_out: Some(of_held_out) };
    save("dpo", &decoder)?;

    if !ranks.is_first() {
        return Ok(());
    }
    let title = format!("temper quickstart on {}", path.file_name().unwrap_or_default().display());
    let page = page(title, out, &records, processor, &[before, sft, dpo], of_held_out)?;
    publish(&page, options, start.elapsed().as_secs_f64())
}

/// The model, and the most tokens of a record; refuses one that was not trained to chat.
fn chat_model(path: &Path) -> Result<(Model, usize)> {
    let model = Model::open(path, None, None, Utc::now())?;
    model.introduce(path);
    if model.processor.chat_template().is_err() {
        let message = format!("`{}` has no chat template that can be used", path.display());
        return Err(hinted(message, "give a model that was trained to chat"));
    }
    let length = max_length(None, &model.config)?;
    if length < SHORTEST_CONTEXT {
        let message = format!("the context of `{}` is {length}", path.display());
        let hint = format!("give a model with a context of {SHORTEST_CONTEXT} or more");
        return Err(hinted(message, hint));
    }
    Ok((model, length))
}

/// What is trained on, and the pairs that are not.
struct Records {
    chats: Vec<Example>,
    pairs: Vec<Example>,
    held_out: Vec<Example>,
}

impl Records {
    /// Writes the built-in records to `folder`, so that they can be looked at, and loads them from there.
    fn load(processor: &Processor, max_length: usize, folder: &Path, smoke: bool) -> Result<Records> {
        create(folder)?;
        let load = |name: &str, text: &str, purpose| -> Result<Vec<Example>> {
            std::fs::write(folder.join(name), text)?;
            let renderer = Renderer::new(processor, max_length, Truncation::KeepStart);
            let loaded = Dataset::load(&folder.join(name), &renderer, purpose)?;
            Ok(loaded.examples)
        };
        let mut chats = load("who-am-i.jsonl", WHO_AM_I, Purpose::Sft)?;
        let mut pairs = load("short-and-polite.jsonl", SHORT_AND_POLITE, Purpose::Preference)?;
        let mut held_out = pairs.split_off(pairs.len() - HELD_OUT);
        if smoke {
            for (examples, few) in [&mut chats, &mut pairs, &mut held_out].into_iter().zip(SMOKE) {
                examples.truncate(few);
            }
        }
        say(
            "data",
            format!(
                "{} chats about who it is, {} preferences for short and polite answers and {} held out; all in `{}`",
                chats.len(),
                pairs.len(),
                held_out.len(),
                folder.display()
            ),
        );
        Ok(Records { chats, pairs, held_out })
    }
}

/// The page that tells the story.
fn page(
    title: String,
    out: &Path,
    Records { chats, pairs, held_out }: &Records,
    processor: &Processor,
    stages: &[Stage; 3],
    of_held_out: Preferred,
) -> Result<Page> {
    let out = out.display();
    Ok(Page {
        title,
        summary: vec![
            format!(
                "SFT on {} chats teaches the model who it is: `answers to its name` counts the answers to {} questions about itself that say Temper. None of the questions below is in the training data.",
                chats.len(),
                ABOUT_ITSELF.len()
            ),
            format!(
                "DPO on {} pairs teaches it to be short and polite. On {} held-out pairs it prefers the short and polite answer in {} with a mean margin of {:.3}.",
                pairs.len(),
                held_out.len(),
                percent(of_held_out.accuracy),
                of_held_out.margin
            ),
        ],
        curves: curves(&[&stages[1], &stages[2]].map(|stage| (stage.name, &stage.course))),
        record: pieces(&chats[0], processor)?,
        next: vec![
            format!("temper chat --model {out}/dpo"),
            format!("temper inspect --model {out}/sft --data {out}/data/short-and-polite.jsonl"),
            format!("temper dpo --model {out}/sft --data PAIRS.jsonl --out run"),
        ],
        answers: side_by_side(stages),
        results: table(stages),
    })
}

/// Who answers.
struct Asked<'a> {
    device: &'a Cpu,
    ranks: &'a Ranks,
    processor: &'a Processor,
    longest: usize,
}

impl Asked<'_> {
    /// The likeliest answers to all questions; the first is shown at once. Only the first rank asks.
    fn answers(&self, decoder: &Decoder<Cpu>) -> Result<Vec<String>> {
        if !self.ranks.is_first() {
            return Ok(Vec::new());
        }
        let start = Instant::now();
        let questions = ABOUT_ITSELF.iter().chain(&EVERYDAY);
        let prompts = questions
            .map(|question| self.processor.chat(&[Message::new(Role::User, *question)], &Variables::new()))
            .collect::<Result<Vec<_>, _>>()?;
        let answers =
            answers(self.device, decoder, self.processor, &prompts, self.longest, Sampling::GREEDY)?;
        let seconds = start.elapsed().as_secs_f64();
        say(
            "asked",
            format!(
                "{}\n{}\n({} answers in {})",
                ABOUT_ITSELF[0],
                answers[0].trim(),
                answers.len(),
                duration(seconds)
            ),
        );
        Ok(answers)
    }
}

fn table(stages: &[Stage]) -> Table {
    let header = [
        "stage",
        "answers to its name",
        "words an answer",
        "preference accuracy",
        "margin",
        "tokens computed",
        "padded batch",
    ];
    let row = |stage: &Stage| {
        let (about_itself, everyday) = stage.answers.split_at(ABOUT_ITSELF.len());
        let named = about_itself.iter().filter(|answer| answer.contains("Temper")).count();
        let words: usize = everyday.iter().map(|answer| answer.split_whitespace().count()).sum();
        let of_pairs =
            |show: &dyn Fn(Preferred) -> String| stage.of_held_out.map_or_else(|| "–".into(), show);
        vec![
            stage.name.to_owned(),
            format!("{named}/{}", about_itself.len()),
            format!("{:.1}", words as f64 / everyday.len() as f64),
            of_pairs(&|held_out| percent(held_out.accuracy)),
            of_pairs(&|held_out| format!("{:.3}", held_out.margin)),
            grouped(stage.course.computed),
            grouped(stage.course.padded),
        ]
    };
    Table { header: header.map(str::to_owned).to_vec(), rows: stages.iter().map(row).collect() }
}

/// Every question with what each stage answers.
fn side_by_side(stages: &[Stage]) -> Vec<Answers> {
    let questions = ABOUT_ITSELF.iter().chain(&EVERYDAY).enumerate();
    let answers = |(i, question): (usize, &&str)| Answers {
        prompt: (*question).to_owned(),
        by_stage: stages
            .iter()
            .map(|stage| (stage.name.to_owned(), stage.answers[i].trim().to_owned()))
            .collect(),
    };
    questions.map(answers).collect()
}
