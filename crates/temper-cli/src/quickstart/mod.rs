//! `temper quickstart`: a small world, a tiny model, and every stage of post-training on it, in about a minute.
//!
//! Pretraining on notes about the world, SFT on questions and answers in two manners, DPO for the friendly manner,
//! and a control: the same DPO on shuffled preferences, which must learn nothing.

mod measure;
mod page;
mod report;
mod stage;
mod vocabulary;
mod world;

use std::io::Write;
use std::path::Path;
use std::time::Instant;

use anstyle::{AnsiColor, Style};
use anyhow::{Result, bail};
use serde_json::{Value, json};
use temper::checkpoint::save::{SaveType, create_folder, write_atomic};
use temper::data::{Dataset, Example, Purpose, Renderer, Truncation};
use temper::generate::Sampling;
use temper::model::Decoder;
use temper::objective::{Dpo, Pair};
use temper::text::Processor;
use temper::train::{Objective, write_weights};
use temper_kernels::Cpu;

use crate::args::Quickstart;
use crate::output::{Hinted, duration, results, say};
use measure::{BETA, Measured, Preferred, answers, logps, majority, measure, preferred};
use stage::{Course, Recipe, train};
use world::{Dice, Question, Split, note};

const TRAINED: Style = AnsiColor::Green.on_default().bold();
const CONTEXT: Style = Style::new().dimmed();

/// Context of the model, in tokens.
const CONTEXT_LENGTH: usize = 96;
/// Questions whose answers are shown after each stage.
const SAMPLES: usize = 6;

const PRETRAIN: Recipe = Recipe { objective: Objective::Sft, batch: 32, learning_rate: 4e-3 };
const FINE_TUNE: Recipe = Recipe { objective: Objective::Sft, batch: 32, learning_rate: 3e-3 };
const PREFER: Recipe = Recipe {
    objective: Objective::Dpo(Dpo { beta: BETA, label_smoothing: 0.0 }),
    batch: 32,
    learning_rate: 1.5e-4,
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
    shuffled: Vec<Example>,
    questions: Vec<Question>,
    held_out: Vec<Example>,
}

/// Runs the whole story.
pub fn run(options: &Quickstart) -> Result<()> {
    let threads =
        options.threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from));
    let device = Cpu::new(threads)?;
    device.install(|| story(options, &device))
}

fn story(options: &Quickstart, device: &Cpu) -> Result<()> {
    let start = Instant::now();
    if options.out.read_dir().is_ok_and(|mut entries| entries.next().is_some()) {
        bail!(Hinted {
            message: format!("`{}` is not empty", options.out.display()),
            hint: "give another `--out`".into()
        });
    }
    let size = if options.smoke { SMOKE } else { FULL };
    let world = build(&options.out.join("data"), options.seed, size)?;
    let bench = Bench { device, world: &world, options };
    let (config, json) = vocabulary::small_gpt2(&world.processor.tokenizer, CONTEXT_LENGTH)?;
    say("model", format!("GPT-2 with {} layers of width {}, from nothing", config.layers, config.width));
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
    bench.show_record(&world.answered[0])?;

    let fresh = Decoder::initialise(device, config, options.seed);
    let pretrained = bench.stage("pretrained", fresh, PRETRAIN, &world.notes, &[])?;
    let sft = bench.stage("sft", copy(&pretrained.decoder), FINE_TUNE, &world.answered, &[])?;
    let reference = logps(device, &sft.decoder, &world.preferences);
    let dpo = bench.stage("dpo", copy(&sft.decoder), PREFER, &world.preferences, &reference)?;
    let swapped: Vec<Pair> =
        world
            .shuffled
            .iter()
            .zip(&world.preferences)
            .zip(&reference)
            .map(|((shuffled, original), &pair)| {
                if shuffled == original {
                    pair
                } else {
                    Pair { chosen: pair.rejected, rejected: pair.chosen }
                }
            })
            .collect();
    let control = bench.stage("control", copy(&sft.decoder), PREFER, &world.shuffled, &swapped)?;

    let held_out = logps(device, &sft.decoder, &world.held_out);
    let [of_dpo, of_control] =
        [&dpo, &control].map(|stage| preferred(&logps(device, &stage.decoder, &world.held_out), &held_out));
    for (name, stage) in [("pretrained", &pretrained), ("sft", &sft), ("dpo", &dpo)] {
        bench.save(name, &stage.decoder, &json)?;
    }
    let outcome = Outcome {
        stages: [pretrained, sft, dpo, control],
        of_dpo,
        of_control,
        majority: majority(&world.questions),
    };
    let page = report::page(&outcome, &world, options);
    write_atomic(&options.out.join("report.html"), |file| {
        file.write_all(page::html(&page).map_err(std::io::Error::other)?.as_bytes())
    })
    .map_err(temper::Error::from)?;
    report::print(&mut results(), &page, start.elapsed().as_secs_f64())?;
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
    world: &'a World,
    options: &'a Quickstart,
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
        let steps = examples.len().div_ceil(recipe.batch) as u64;
        let (decoder, course) = train(self.device, decoder, recipe, examples, reference, &mut |report| {
            if report.step.is_multiple_of(steps.div_ceil(8)) {
                let left = start.elapsed().as_secs_f64() / report.step as f64 * (steps - report.step) as f64;
                say(
                    name,
                    format!(
                        "step {}/{steps}  loss {:.4}  {:.0} tokens/s  {} left",
                        report.step,
                        report.eval.loss,
                        report.step_tokens as f64 / report.seconds,
                        duration(left)
                    ),
                );
            }
        })?;
        let World { processor, questions, .. } = self.world;
        let measured = measure(self.device, &decoder, processor, questions, self.options.seed)?;
        let samples = answers(
            self.device,
            &decoder,
            processor,
            &questions[..SAMPLES.min(questions.len())],
            Sampling::GREEDY,
        )?;
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

    fn save(&self, name: &str, decoder: &Decoder<Cpu>, config: &Value) -> Result<()> {
        let config = decoder.config.to_json(config);
        create_folder(&self.options.out.join(name), |folder| {
            write_weights(self.device, decoder, &self.world.processor, None, &config, folder, SaveType::F32)
        })?;
        Ok(())
    }

    /// One record with its mask: trained tokens in green and brackets, context dim.
    fn show_record(&self, example: &Example) -> Result<()> {
        let pieces = report::pieces(example, &self.world.processor)?;
        let mut line = String::new();
        for (text, trained) in pieces {
            let style = if trained { TRAINED } else { CONTEXT };
            let text = text.escape_debug();
            line += &if trained {
                format!("{style}[{text}]{style:#}")
            } else {
                format!("{style}{text}{style:#}")
            };
        }
        writeln!(anstream::stdout(), "a record, [trained] tokens in green: {line}")?;
        Ok(())
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
    std::fs::create_dir_all(folder)?;
    let load = |name: &str, purpose, lines: Vec<Value>| load(&folder.join(name), purpose, lines, &processor);
    let pair = |question: &Question| json!({ "prompt": question.prompt(), "chosen": question.friendly, "rejected": question.curt });
    let answer = |(i, question): (usize, &Question)| json!({ "prompt": question.prompt(), "completion": if i % 2 == 0 { &question.friendly } else { &question.curt } });
    let preferences = load("preferences.jsonl", Purpose::Preference, compared.iter().map(pair).collect())?;
    // The control's labels say nothing: a random half of the pairs is the wrong way round.
    let mut wrong: Vec<bool> = (0..preferences.len()).map(|i| i % 2 == 0).collect();
    dice(b" control", 0).shuffle(&mut wrong);
    let mut shuffled = preferences.clone();
    shuffled
        .iter_mut()
        .zip(wrong)
        .filter(|(_, wrong)| *wrong)
        .for_each(|(example, _)| example.sequences.reverse());
    Ok(World {
        notes: load("notes.jsonl", Purpose::Sft, notes.iter().map(|note| json!({ "text": note })).collect())?,
        answered: load("questions.jsonl", Purpose::Sft, asked.iter().enumerate().map(answer).collect())?,
        held_out: load("held-out.jsonl", Purpose::Preference, questions.iter().map(pair).collect())?,
        preferences,
        shuffled,
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
    let renderer = Renderer {
        tokenizer: &processor.tokenizer,
        template: None,
        max_length: CONTEXT_LENGTH,
        truncation: Truncation::Error,
        train_on: None,
    };
    Ok(Dataset::load(path, &renderer, purpose).map_err(temper::Error::from)?.examples)
}
