//! A small world, a tiny model, and every stage of post-training on it, in about a minute.
//!
//! Pretraining on notes about the world, SFT on questions and answers in two manners, DPO for the friendly manner,
//! and a control: the same DPO on shuffled preferences, which must learn nothing.

use std::path::Path;
use std::time::Instant;

use anyhow::{Result, bail};
use serde_json::{Value, json};
use temper::data::order::Order;
use temper::data::{Dataset, Example, Purpose, Renderer, Truncation};
use temper::generate::Sampling;
use temper::model::{Decoder, Source};
use temper::objective::{Dpo, Pair};
use temper::parallel::Ranks;
use temper::text::Processor;
use temper::train::Objective;
use temper_kernels::Cpu;

use super::measure::{ANSWER, Measured, Preferred, answers, logps, majority, measure, preferred, prompts};
use super::report::{curves, percent, pieces};
use super::stage::{Course, Recipe, train};
use super::world::{CLOSING, Dice, Question, Split, note};
use super::{create, publish, save, show_record, vocabulary};
use crate::args::Quickstart;
use crate::output::{duration, grouped, say};
use crate::report::html::Table;
use crate::report::stages::{Answers, Page};

/// Context of the model, in tokens.
const CONTEXT_LENGTH: usize = 96;
/// Questions whose answers are shown after each stage.
const SAMPLES: usize = 6;

const BETA: f64 = 0.5;

/// The data are drawn at random already.
const ONE_PASS: Recipe = Recipe {
    objective: Objective::Sft,
    batch: 32,
    epochs: 1,
    order: (Order::Sequential, 0),
    learning_rate: 0.0,
};
const PRETRAIN: Recipe = Recipe { objective: Objective::Sft, learning_rate: 4e-3, ..ONE_PASS };
const FINE_TUNE: Recipe = Recipe { objective: Objective::Sft, learning_rate: 3e-3, ..ONE_PASS };
const PREFER: Recipe = Recipe {
    objective: Objective::Dpo(Dpo { beta: BETA, label_smoothing: 0.0 }),
    learning_rate: 1.4e-4,
    ..ONE_PASS
};

/// How much of everything.
#[derive(Debug, Clone, Copy)]
struct Size {
    notes: usize,
    questions: usize,
    pairs: usize,
    held_out: usize,
}

const FULL: Size = Size { notes: 12_000, questions: 64_000, pairs: 1_600, held_out: 300 };
const SMOKE: Size = Size { notes: 200, questions: 200, pairs: 64, held_out: 20 };

/// Everything the stages learn from and are asked.
struct World {
    processor: Processor,
    notes: Vec<Example>,
    answered: Vec<Example>,
    preferences: Vec<Example>,
    /// The preferences, some of them the wrong way round.
    shuffled: Vec<Example>,
    /// Which of them.
    wrong: Vec<bool>,
    questions: Vec<Question>,
    held_out: Vec<Example>,
}

/// Runs the whole story.
pub fn story(options: &Quickstart, out: &Path, device: &Cpu, ranks: &Ranks) -> Result<()> {
    let start = Instant::now();
    let size = if options.smoke { SMOKE } else { FULL };
    let world = build(&out.join("data"), options.seed, size)?;
    let bench = Bench { device, ranks, world: &world, seed: options.seed };
    let (config, json) = vocabulary::small_gpt2(&world.processor.tokenizer, CONTEXT_LENGTH)?;
    say(
        "model",
        format!("GPT-2 with {} layers of width {}, from nothing", config.layers.len(), config.width),
    );
    say(
        "data",
        format!(
            "{} notes, {} questions, {} preferences; {} held-out questions",
            size.notes,
            size.questions,
            size.pairs,
            world.questions.len()
        ),
    );
    show_record(&world.answered[0], &world.processor)?;

    let fresh = Source::fresh(config, options.seed).whole(device)?;
    let pretrained = bench.stage("pretrained", fresh, PRETRAIN, &world.notes, &[])?;
    let sft = bench.stage("sft", copy(&pretrained.decoder), FINE_TUNE, &world.answered, &[])?;
    let reference = logps(device, &sft.decoder, &world.preferences);
    let dpo = bench.stage("dpo", copy(&sft.decoder), PREFER, &world.preferences, &reference)?;
    let mut shuffled_reference = reference.clone();
    for (pair, _) in shuffled_reference.iter_mut().zip(&world.wrong).filter(|(_, wrong)| **wrong) {
        std::mem::swap(&mut pair.chosen, &mut pair.rejected);
    }
    let control = bench.stage("control", copy(&sft.decoder), PREFER, &world.shuffled, &shuffled_reference)?;

    if !ranks.is_first() {
        return Ok(());
    }
    let held_out = logps(device, &sft.decoder, &world.held_out);
    let [of_dpo, of_control] = [&dpo, &control]
        .map(|stage| preferred(&logps(device, &stage.decoder, &world.held_out), &held_out, BETA));
    for (name, stage) in [("pretrained", &pretrained), ("sft", &sft), ("dpo", &dpo)] {
        save(device, &stage.decoder, &world.processor, &json, None, &out.join(name))?;
    }
    let outcome = Outcome {
        stages: [pretrained, sft, dpo, control],
        of_dpo,
        of_control,
        majority: majority(&world.questions),
    };
    let page = page(&outcome, &world, options);
    publish(&page, options, start.elapsed().as_secs_f64())?;
    let missed = outcome.missed();
    if !missed.is_empty() && !options.smoke {
        bail!("the numbers did not move as they should: {}", missed.join("; "));
    }
    Ok(())
}

/// A stage and what it came to.
struct Stage {
    name: &'static str,
    decoder: Decoder<Cpu>,
    course: Course,
    measured: Measured,
    samples: Vec<String>,
}

/// All stages and what they came to.
struct Outcome {
    /// Pretrained, SFT, DPO, control.
    stages: [Stage; 4],
    of_dpo: Preferred,
    of_control: Preferred,
    majority: f64,
}

impl Outcome {
    /// What a full run must show and this one did not.
    fn missed(&self) -> Vec<String> {
        let [pretrained, sft, dpo, _] = self.stages.each_ref().map(|stage| stage.measured);
        let goals = [
            ("answer accuracy before SFT under 10%", pretrained.right < 0.10),
            ("answer accuracy after SFT at least 80%", sft.right >= 0.80),
            ("answer accuracy after DPO within 3 points of SFT's", (dpo.right - sft.right).abs() <= 0.03),
            ("preferred manner at least 40 points more often", dpo.friendly - sft.friendly >= 0.40),
            ("held-out preference accuracy at least 90%", self.of_dpo.accuracy >= 0.90),
            (
                "the control's margin under 10% of DPO's",
                self.of_control.margin.abs() < 0.10 * self.of_dpo.margin,
            ),
        ];
        goals.iter().filter(|(_, reached)| !reached).map(|(goal, _)| (*goal).to_owned()).collect()
    }
}

fn copy(decoder: &Decoder<Cpu>) -> Decoder<Cpu> {
    Decoder::new(decoder.config.clone(), decoder.weights.clone())
}

/// Where stages run.
struct Bench<'a> {
    device: &'a Cpu,
    ranks: &'a Ranks,
    world: &'a World,
    seed: u64,
}

impl Bench<'_> {
    /// Trains a stage with progress, measures it, and asks it the sample questions.
    fn stage(
        &self,
        name: &'static str,
        decoder: Decoder<Cpu>,
        recipe: Recipe,
        examples: &[Example],
        reference: &[Pair],
    ) -> Result<Stage> {
        let start = Instant::now();
        let among = (self.device, self.ranks);
        let (decoder, course) = train(among, decoder, recipe, examples, reference, name)?;
        if !self.ranks.is_first() {
            return Ok(Stage { name, decoder, course, measured: Measured::default(), samples: Vec::new() });
        }
        let World { processor, questions, .. } = self.world;
        let measured = measure(self.device, &decoder, processor, questions, self.seed)?;
        let shown = prompts(processor, &questions[..SAMPLES.min(questions.len())])?;
        let samples = answers(self.device, &decoder, processor, &shown, ANSWER, Sampling::GREEDY)?;
        say(
            name,
            format!(
                "held-out answers right {:.1}%, friendly {:.1}%, in {}",
                100.0 * measured.right,
                100.0 * measured.friendly,
                duration(start.elapsed().as_secs_f64())
            ),
        );
        say("asked", format!("{}\n{}", questions[0].text, samples[0].trim()));
        Ok(Stage { name, decoder, course, measured, samples })
    }
}

/// What the page says.
fn page(outcome: &Outcome, world: &World, options: &Quickstart) -> Page {
    let answers = world.questions.iter().take(SAMPLES).enumerate().map(|(i, question)| Answers {
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
                "Held-out preferences: DPO prefers the friendly answer, the one that ends with “{}”, in {} with a mean margin of {:.3}.",
                CLOSING,
                percent(outcome.of_dpo.accuracy),
                outcome.of_dpo.margin,
            ),
            format!(
                "The control is the same DPO on pairs of which a random half is the wrong way round: there is nothing to learn, and its margin stays at {:.3}. Its accuracy counts ever so small margins, so that it says nothing there.",
                outcome.of_control.margin
            ),
            "Tokens computed are those of forests, which have a shared prompt once; a padded batch is what the same steps take with every sequence as long as the longest.".into(),
        ],
        results: table(outcome),
        curves: curves(&outcome.stages.each_ref().map(|stage| (stage.name, &stage.course))),
        answers: answers.collect(),
        record: pieces(&world.answered[0], &world.processor).unwrap_or_default(),
        next: vec![
            format!("temper chat --model {out}/dpo"),
            format!("temper inspect --model {out}/sft --data {out}/data/preferences.jsonl"),
            "temper quickstart --model MODEL.gguf --out real".into(),
        ],
    }
}

fn table(outcome: &Outcome) -> Table {
    let rewards = [None, None, Some(outcome.of_dpo), Some(outcome.of_control)];
    let row = |(stage, rewards): (&Stage, Option<Preferred>)| {
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

/// Draws the world, learns its tokenizer, and renders the data through the same files a user would give.
fn build(folder: &Path, seed: u64, size: Size) -> Result<World> {
    let dice = |purpose: &[u8; 8], index: usize| Dice::new(seed, purpose, index as u64);
    let draw = |purpose: &[u8; 8], count: usize, split| -> Vec<Question> {
        (0..count).map(|i| Question::draw(&mut dice(purpose, i), split)).collect()
    };
    let notes: Vec<String> = (0..size.notes).map(|i| note(&mut dice(b"   notes", i))).collect();
    let asked = draw(b"     sft", size.questions, Split::Train);
    let compared = draw(b"     dpo", size.pairs, Split::Train);
    let mut questions = vec![Question::greeting("Kate")];
    questions.extend(draw(b"heldouts", size.held_out, Split::HeldOut));
    let mut words: Vec<String> = notes.iter().take(3000).cloned().collect();
    words.extend(
        asked.iter().take(2000).map(|question| format!("{}{}", question.prompt(), question.friendly)),
    );
    let processor = vocabulary::learn(&words)?;
    create(folder)?;
    let load = |name: &str, purpose, lines: Vec<Value>| load(&folder.join(name), purpose, lines, &processor);
    let pair = |question: &Question| json!({ "prompt": question.prompt(), "chosen": question.friendly, "rejected": question.plain });
    let answer = |(i, question): (usize, &Question)| json!({ "prompt": question.prompt(), "completion": if i % 3 == 0 { &question.friendly } else { &question.plain } });
    let preferences = load("preferences.jsonl", Purpose::Preference, compared.iter().map(pair).collect())?;
    // The control's labels say nothing: a random half of the pairs is the wrong way round.
    let mut wrong: Vec<bool> = (0..preferences.len()).map(|i| i % 2 == 0).collect();
    dice(b" control", 0).shuffle(&mut wrong);
    let mut shuffled = preferences.clone();
    shuffled
        .iter_mut()
        .zip(&wrong)
        .filter(|(_, wrong)| **wrong)
        .for_each(|(example, _)| example.sequences.reverse());
    Ok(World {
        notes: load("notes.jsonl", Purpose::Sft, notes.iter().map(|note| json!({ "text": note })).collect())?,
        answered: load("questions.jsonl", Purpose::Sft, asked.iter().enumerate().map(answer).collect())?,
        held_out: load("held-out.jsonl", Purpose::Preference, questions.iter().map(pair).collect())?,
        preferences,
        shuffled,
        wrong,
        questions,
        processor,
    })
}

fn load(path: &Path, purpose: Purpose, lines: Vec<Value>, processor: &Processor) -> Result<Vec<Example>> {
    let mut text = String::new();
    for line in lines {
        text += &format!("{line}\n");
    }
    std::fs::write(path, text)?;
    let renderer = Renderer::new(processor, CONTEXT_LENGTH, Truncation::Error);
    Ok(Dataset::load(path, &renderer, purpose)?.examples)
}
