//! `temper inspect`.

use std::io::Write;
use std::path::Path;

use anstyle::{AnsiColor, Effects, Style};
use anyhow::{Context, Result};
use chrono::Utc;
use temper::checkpoint::{self, Checkpoint, Format, TensorSummary, TokenizerFiles};
use temper::data::{Kind, Piece, Purpose, Renderer, records};
use temper::model::files::Quantise;
use temper::model::{Config, Source};
use temper::text::{ChatTemplate, Processor};

use super::data;
use super::model::{Model, dimensions, max_length, template_source};
use crate::args::{Inspect, ModelAndTemplate};
use crate::output::{bytes, escaped, grouped};

const CONTEXT: Style = Style::new().effects(Effects::DIMMED);
const TRAINED: Style = AnsiColor::Green.on_default().bold();
const CUT: Style = AnsiColor::Red.on_default().strikethrough();

/// Shows a model, or a model's view of data.
pub fn run(options: &Inspect) -> Result<()> {
    let mut out = anstream::stdout().lock();
    match &options.data {
        Some(data) => show_data(options, data, &mut out)?,
        None => show_model(options, &mut out)?,
    }
    Ok(out.flush()?)
}

fn show_model(options: &Inspect, out: &mut impl Write) -> Result<()> {
    let checkpoint = checkpoint::open(&options.model.model)?;
    let config =
        Config::from_json(&checkpoint.config).with_context(|| format!("`{}`", checkpoint.path.display()))?;
    let format = match checkpoint.format {
        Format::HuggingFace => "Hugging Face folder".to_owned(),
        Format::Gguf { version } => format!("GGUF file, version {version}"),
    };
    writeln!(out, "{}: {format}", checkpoint.path.display())?;
    writeln!(out, "{}, {} on disk", dimensions(&config), bytes(checkpoint.file_bytes()))?;
    let Config { width, heads, kv_heads, head_width, mlp_width, vocabulary, .. } = config;
    let layers = config.layers.len();
    writeln!(
        out,
        "{layers} layers of width {width}; {heads} heads of {head_width}, {kv_heads} for keys and values"
    )?;
    let windows: Vec<usize> = config.layers.iter().filter_map(|layer| layer.window).collect();
    if let Some(window) = windows.first() {
        writeln!(out, "{} of {layers} layers see the last {window} tokens alone", windows.len())?;
    }
    let without = config.layers.iter().filter(|layer| layer.rotary.is_none()).count();
    if without > 0 && !config.is_gpt2() {
        writeln!(out, "{without} of {layers} layers are without rotary positions")?;
    }
    let tied = if config.tied { "the embedding" } else { "its own weights" };
    writeln!(out, "inner width {mlp_width}; {vocabulary} embeddings; the head has {tied}\n")?;
    write_tensors(&checkpoint, options.tensors, out)?;
    writeln!(out)?;
    if let TokenizerFiles::None = checkpoint.tokenizer {
        writeln!(out, "no tokenizer")?;
    } else {
        let template = options.model.chat_template.as_deref().map(template_source).transpose()?;
        let processor = Processor::open(&checkpoint, vocabulary, template.as_deref(), Utc::now());
        write_processor(&processor?, out)?;
    }
    out.flush()?;
    // Last, because tensors that do not make a model are an error; those above show why.
    Source::frozen(&checkpoint, Quantise::None)?;
    Ok(())
}

/// Tensors that differ only in the number of their layer.
struct Alike<'a> {
    name: String,
    count: usize,
    bytes: usize,
    example: TensorSummary<'a>,
}

fn write_tensors(checkpoint: &Checkpoint, every: bool, out: &mut impl Write) -> Result<()> {
    let mut list: Vec<Alike<'_>> = Vec::new();
    for tensor in checkpoint.summary() {
        let name = if every { tensor.name.to_owned() } else { without_layer(tensor.name) };
        let same = |alike: &&mut Alike<'_>| {
            alike.name == name && alike.example.shape == tensor.shape && alike.example.stored == tensor.stored
        };
        match list.iter_mut().find(same) {
            Some(alike) => (alike.count, alike.bytes) = (alike.count + 1, alike.bytes + tensor.bytes),
            None => list.push(Alike { name, count: 1, bytes: tensor.bytes, example: tensor }),
        }
    }
    let width = list.iter().map(|alike| alike.name.len()).max().unwrap_or(0);
    for Alike { name, count, bytes: size, example } in list {
        let shape = example.shape.iter().map(ToString::to_string).collect::<Vec<_>>().join("×");
        let (name, size) = (escaped(&name), bytes(size as u64));
        writeln!(out, "{count:>4} × {name:width$}  {:5}  {shape:>14}  {size:>9}", example.stored)?;
    }
    Ok(())
}

/// A tensor's name with `*` for its layer.
fn without_layer(name: &str) -> String {
    let part = |part| if str::parse::<usize>(part).is_ok() { "*" } else { part };
    name.split('.').map(part).collect::<Vec<_>>().join(".")
}

fn write_processor(processor: &Processor, out: &mut impl Write) -> Result<()> {
    let tokenizer = &processor.tokenizer;
    writeln!(out, "tokenizer of {} tokens", grouped(tokenizer.vocabulary_size()))?;
    for (key, token) in tokenizer.special() {
        writeln!(out, "  {key} {}", escaped(token))?;
    }
    let bos = if tokenizer.adds_bos() { "begins" } else { "does not begin" };
    writeln!(out, "  a text {bos} with bos_token")?;
    let stop: Vec<String> =
        processor.stop.iter().map(|&id| tokenizer.token(id).unwrap_or_else(|| id.to_string())).collect();
    writeln!(out, "answers end at {}", escaped(&stop.join(" ")))?;
    match &processor.template {
        Some(template) => writeln!(out, "chat template of {} characters", template.source().chars().count())?,
        None => writeln!(out, "no chat template")?,
    }
    if let Some(problem) = processor.template.as_ref().and_then(ChatTemplate::problem) {
        writeln!(out, "  which cannot be used: {}", escaped(&problem.to_string()))?;
    }
    Ok(())
}

fn show_data(options: &Inspect, path: &Path, out: &mut impl Write) -> Result<()> {
    let ModelAndTemplate { model, chat_template } = &options.model;
    let model = Model::open(model, chat_template.as_deref(), None, Utc::now())?;
    let length = max_length(options.max_length, &model.config)?;
    let renderer = Renderer {
        train_on: options.rendering.train_on,
        ..Renderer::new(&model.processor, length, options.rendering.length.truncation)
    };
    let records = records::read(path)?;
    let purpose = if records.schema.is_preference() { Purpose::Preference } else { Purpose::Sft };
    writeln!(out, "{}: {}", path.display(), records.schema)?;
    let unread = records.unread_columns(renderer.template);
    if !unread.is_empty() {
        writeln!(out, "columns not read: {}", unread.join(", "))?;
    }
    writeln!(
        out,
        "{CONTEXT}context{CONTEXT:#}  {TRAINED}⟦trained⟧{TRAINED:#}  {CUT}~cut~{CUT:#}  a|b: two tokens"
    )?;
    for record in records.records.iter().take(options.rows) {
        let sequences = renderer.inspect(record, purpose)?;
        for (index, pieces) in sequences.iter().enumerate() {
            let side = match (purpose, index) {
                (Purpose::Preference, 0) => ", chosen",
                (Purpose::Preference, _) => ", rejected",
                _ => "",
            };
            writeln!(out, "\n{}{side}: {} tokens", record.place, pieces.len())?;
            write_pieces(pieces, out)?;
        }
    }
    // Last, because it fails when nothing is left to train; the tokens above show why.
    Ok(write!(out, "\n{}", data::open(path, &renderer, purpose)?.ledger)?)
}

/// Writes tokens: runs of a kind in its marks and colour, a line for each line of the text.
fn write_pieces(pieces: &[Piece], out: &mut impl Write) -> Result<()> {
    let mut line_ended = false;
    for run in pieces.chunk_by(|a, b| a.kind == b.kind) {
        let (style, open, close) = match run[0].kind {
            Kind::Context => (CONTEXT, "", ""),
            Kind::Trained => (TRAINED, "⟦", "⟧"),
            Kind::Cut => (CUT, "~", "~"),
        };
        let texts: Vec<&str> = run.iter().map(|piece| piece.text.as_str()).collect();
        let lines = texts.join("|").replace("\\n|", "\\n\n");
        let new_line = if line_ended { "\n" } else { "" };
        write!(out, "{new_line}{style}{open}{lines}{close}{style:#}")?;
        line_ended = lines.ends_with("\\n");
    }
    Ok(writeln!(out)?)
}
