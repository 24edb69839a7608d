//! `temper generate`.

use std::io::{IsTerminal, Read, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;
use temper::generate::{self, Answer, Options, Reply, Sampling};
use temper::model::Decoder;
use temper::text::{Message, Processor, Role, Variables};
use temper_kernels::Cpu;

use super::model::Model;
use crate::args::{Generate, SamplingOptions};
use crate::config::flag;
use crate::output::{escaped, hinted, results, say, warn};

/// The longest answer where neither an option nor the model says it.
const LONGEST: usize = 256;

/// Samples drawn at a time.
const TOGETHER: usize = 64;

/// Continues a prompt.
pub fn run(options: &Generate) -> Result<()> {
    let cpu = options.compute.device()?;
    cpu.install(|| {
        let adapters = options.adapter.open()?;
        let model = options.model.open(adapters.as_ref())?;
        let prompt = prompt(options, &model.processor)?;
        let decoder = model.decoder(&cpu, adapters.as_ref(), options.adapter.quantize)?;
        let stop = &AtomicBool::new(false);
        let writer = Writer { cpu: &cpu, decoder: &decoder, processor: &model.processor, stop };
        let how = how(&options.sampling, &model)?;
        if options.samples > 1 && how.sampling.temperature == 0.0 {
            bail!(hinted(
                format!("the likeliest token is taken: {} samples would be the same", options.samples),
                "give `--temperature 1`"
            ));
        }
        if options.samples == 1 {
            let read = prompt.len();
            let streamed = writer.stream(prompt, &how)?;
            say("speed", streamed.speed(read, how.max_new_tokens));
            return Ok(());
        }
        writer.samples(prompt, options.samples, &how)
    })
}

fn prompt(options: &Generate, processor: &Processor) -> Result<Vec<u32>> {
    let mut text = options.prompt.clone();
    if text == "-" {
        text.clear();
        std::io::stdin()
            .read_to_string(&mut text)
            .context("cannot read the prompt as UTF-8 from standard input")?;
        // `echo` ends its line, and few prompts mean to.
        let line = text.strip_suffix('\n').map(|line| line.strip_suffix('\r').unwrap_or(line)).map(str::len);
        text.truncate(line.unwrap_or(text.len()));
    }
    let tokens = if options.chat {
        let system = options.system.iter().map(|text| Message::new(Role::System, text));
        processor.chat(&system.chain([Message::new(Role::User, text)]).collect::<Vec<_>>(), &Variables::new())
    } else {
        processor.prompt(&text)
    };
    Ok(tokens?)
}

/// Settings of a generation_config.json that change answers and are not computed here, with the values that ask for
/// nothing; so do null, false and empty lists.
const NOT_COMPUTED: [(&str, f64); 23] = [
    ("repetition_penalty", 1.0),
    ("encoder_repetition_penalty", 1.0),
    ("no_repeat_ngram_size", 0.0),
    ("encoder_no_repeat_ngram_size", 0.0),
    ("num_beams", 1.0),
    ("diversity_penalty", 0.0),
    ("penalty_alpha", 0.0),
    ("guidance_scale", 1.0),
    ("typical_p", 1.0),
    ("min_p", 0.0),
    ("epsilon_cutoff", 0.0),
    ("eta_cutoff", 0.0),
    ("min_length", 0.0),
    ("min_new_tokens", 0.0),
    ("suppress_tokens", 0.0),
    ("begin_suppress_tokens", 0.0),
    ("bad_words_ids", 0.0),
    ("sequence_bias", 0.0),
    ("exponential_decay_length_penalty", 0.0),
    ("stop_strings", 0.0),
    ("forced_bos_token_id", 0.0),
    ("forced_eos_token_id", 0.0),
    ("watermarking_config", 0.0),
];

fn warn_of_not_computed(config: &Value) {
    let asks = |value: &Value, nothing: f64| match value {
        Value::Null | Value::Bool(false) => false,
        Value::Array(list) => !list.is_empty(),
        value => value.as_f64() != Some(nothing),
    };
    let asked = NOT_COMPUTED.iter().filter(|(key, nothing)| asks(&config[*key], *nothing));
    let asked: Vec<String> = asked.map(|(key, _)| format!("{key} {}", config[*key])).collect();
    if !asked.is_empty() {
        warn(format!("generation_config.json asks for {}, which temper does not compute", asked.join(", ")));
    }
}

/// How answers are drawn: each setting by its option, else by the model's generation_config.json. Where neither asks for
/// drawing it is the likeliest token.
pub fn how(options: &SamplingOptions, model: &Model) -> Result<Options> {
    model.checkpoint.generation_config.iter().for_each(warn_of_not_computed);
    let given = options.temperature.is_some() || options.top_k.is_some() || options.top_p.is_some();
    let draws = |config: &Value| config["do_sample"] == Value::Bool(true);
    let config = model.checkpoint.generation_config.as_ref();
    let own = config.filter(|config| given || draws(config));
    let setting = |option: Option<f64>, key: &str, most: f64, default: f64| match (option, own) {
        (Some(given), _) => Ok(given),
        (None, Some(config)) => own_setting(&config[key], key, most, default),
        (None, None) => Ok(default),
    };
    let sampling = if given || own.is_some() {
        // Transformers' own default where a model is to draw.
        let top_k = if own.is_some_and(draws) { 50.0 } else { 0.0 };
        Sampling {
            temperature: setting(options.temperature, "temperature", f64::MAX, 1.0)?,
            top_k: setting(options.top_k.map(|k| k as f64), "top_k", f64::MAX, top_k)? as usize,
            top_p: setting(options.top_p, "top_p", 1.0, 1.0)?,
            seed: options.seed.unwrap_or(42),
        }
    } else {
        Sampling::GREEDY
    };
    let drawing = [options.top_k.is_some(), options.top_p.is_some(), options.seed.is_some()];
    if sampling.temperature == 0.0 && drawing.contains(&true) {
        bail!(hinted(
            "the likeliest token is taken: `--top-k`, `--top-p` and `--seed` change nothing",
            "leave them out, or give `--temperature 1`"
        ));
    }
    let max_new_tokens = match (options.max_new_tokens, &config.unwrap_or(&Value::Null)["max_new_tokens"]) {
        (Some(given), _) => given,
        (None, Value::Null) => LONGEST,
        (None, most) => match most.as_u64() {
            None | Some(0) => bail!(wrong_setting("max_new_tokens", "a whole number from 1", most)),
            Some(most) => most as usize,
        },
    };
    Ok(Options { max_new_tokens, sampling, stop: model.processor.stop.clone() })
}

/// A number of generation_config.json from 0 to `most`.
fn own_setting(value: &Value, key: &str, most: f64, default: f64) -> Result<f64> {
    match value.as_f64() {
        _ if value.is_null() => Ok(default),
        Some(number) if (0.0..=most).contains(&number) => Ok(number),
        _ => {
            let range = if most == f64::MAX { String::new() } else { format!(" to {most}") };
            bail!(wrong_setting(key, &format!("a number from 0{range}"), value))
        }
    }
}

fn wrong_setting(key: &str, expected: &str, found: &Value) -> anyhow::Error {
    let message = format!("generation_config.json: `{key}`: expected {expected}, found {found}");
    hinted(message, format!("give {} yourself, or correct the file", flag(key)))
}

/// Generates and writes to standard output. On a terminal, control characters of the model are escaped.
pub struct Writer<'a> {
    pub cpu: &'a Cpu,
    pub decoder: &'a Decoder<Cpu>,
    pub processor: &'a Processor,
    /// Ends an answer when it becomes true.
    pub stop: &'a AtomicBool,
}

impl Writer<'_> {
    /// One answer, written as it comes.
    pub fn stream(&self, prompt: Vec<u32>, how: &Options) -> Result<Streamed> {
        let (start, mut reading) = (Instant::now(), None);
        let mut out = results();
        let mut text = String::new();
        let mut stream = self.processor.tokenizer.stream(true);
        let mut failed: Option<anyhow::Error> = None;
        let mut take = |piece: &str| -> Result<()> {
            text.push_str(piece);
            out.write_all(shown(piece).as_bytes())?;
            Ok(out.flush()?)
        };
        let mut on_token = |_, token| {
            reading.get_or_insert_with(|| start.elapsed());
            let pushed = stream.push(token).map_err(anyhow::Error::from);
            let taken = pushed.and_then(|piece| take(&piece));
            failed = taken.err();
            failed.is_none() && !self.stop.load(Ordering::Relaxed)
        };
        let answers = generate::generate(self.cpu, self.decoder, &[prompt], how, &mut on_token)?;
        let took = start.elapsed();
        if let Some(error) = failed {
            return Err(error);
        }
        take(&stream.finish()?)?;
        writeln!(out)?;
        out.flush()?;
        drop(out);
        let Answer { tokens, stopped_by } = answers.into_iter().next().unwrap_or_default();
        let reading = reading.unwrap_or(took);
        let (written, cut) = (tokens.len(), stopped_by.is_none());
        Ok(Streamed { text, written, cut, reading, writing: took - reading })
    }

    /// Several answers, each under a line with its number.
    fn samples(&self, prompt: Vec<u32>, count: usize, how: &Options) -> Result<()> {
        let mut out = results();
        let (start, mut written, mut number) = (Instant::now(), 0, 0);
        let prompts = vec![prompt; count.min(TOGETHER)];
        while number < count {
            let prompts = &prompts[..prompts.len().min(count - number)];
            let replies = generate::replies(number, self.cpu, self.decoder, self.processor, prompts, how);
            for Reply { text, tokens } in replies? {
                number += 1;
                written += tokens;
                writeln!(out, "--- sample {number}\n{}", shown(&text))?;
            }
            out.flush()?;
        }
        let took = start.elapsed();
        let (seconds, rate) = (took.as_secs_f64(), per_second(written, took));
        say(
            "speed",
            format!("{written} tokens written in {seconds:.2} s, {rate:.1} tok/s, with reading the prompt"),
        );
        Ok(())
    }
}

/// An answer that has been written.
pub struct Streamed {
    pub text: String,
    /// Its tokens.
    written: usize,
    /// Whether it did not end by itself.
    cut: bool,
    /// Until its first token.
    reading: Duration,
    /// After its first token.
    writing: Duration,
}

impl Streamed {
    /// How fast the prompt's tokens were read and the answer written, and whether it was cut.
    fn speed(&self, read: usize, most: usize) -> String {
        let mut speed = format!(
            "{read} tokens read in {:.2} s, {:.0} tok/s",
            self.reading.as_secs_f64(),
            per_second(read, self.reading)
        );
        if self.written > 1 {
            let (took, rate) = (self.writing.as_secs_f64(), per_second(self.written - 1, self.writing));
            speed.push_str(&format!("; {} written in {took:.2} s, {rate:.1} tok/s", self.written));
        }
        if self.cut && self.written == most {
            speed.push_str(&format!("; cut at {most}, see `--max-new-tokens`"));
        } else if self.cut {
            speed.push_str("; cut at the model's context");
        }
        speed
    }
}

fn per_second(tokens: usize, took: Duration) -> f64 {
    tokens as f64 / took.as_secs_f64().max(1e-9)
}

/// A model's text as it is written: as it is into files and pipes, escaped on a terminal.
pub fn shown(text: &str) -> String {
    if std::io::stdout().is_terminal() { escaped(text) } else { text.to_owned() }
}
