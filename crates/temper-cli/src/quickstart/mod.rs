//! `temper quickstart`: every stage of post-training in minutes, with what each one changed.
//!
//! [`small`] does it on a world of its own and a model from nothing; [`real`] on a model that the user has.

mod measure;
mod real;
mod report;
mod small;
mod stage;
mod vocabulary;
mod world;

use std::io::Write;
use std::path::Path;

use anstyle::{AnsiColor, Style};
use anyhow::{Result, bail};
use serde_json::Value;
use temper::checkpoint::save::{SaveType, create_folder, write_atomic};
use temper::data::Example;
use temper::model::Decoder;
use temper::text::Processor;
use temper::train::write_weights;
use temper_kernels::{Cpu, Precision};

use crate::args::{Parallelism, Quickstart};
use crate::output::{hinted, is_quiet, results, say};
use crate::ranks::{Together, cores};
use crate::report::stages::{self, Page};

const TRAINED: Style = AnsiColor::Green.on_default().bold();
const CONTEXT: Style = Style::new().dimmed();

/// Runs the whole story, on every rank when a launcher started several: they train together, and the first measures,
/// writes and tells.
pub fn run(options: &Quickstart) -> Result<()> {
    let together = Together::begin(&Parallelism::default())?;
    let result = tell(options, &together);
    together.end(result)
}

fn tell(options: &Quickstart, together: &Together) -> Result<()> {
    let threads = options.threads.or(together.threads).unwrap_or_else(cores);
    let device = Cpu::new(threads, Precision::F32)?;
    let ranks = &together.ranks;
    let story = |out: &Path| {
        device.install(|| match &options.model {
            Some(model) => real::story(options, out, model, &device, ranks),
            None => small::story(options, out, &device, ranks),
        })
    };
    if ranks.is_first() {
        check_empty(&options.out)?;
        return story(&options.out);
    }
    // The same data, read back from files of its own.
    story(tempfile::tempdir()?.path())
}

fn check_empty(out: &Path) -> Result<()> {
    if out.read_dir().is_ok_and(|mut entries| entries.next().is_some()) {
        bail!(hinted(
            format!("`{}` is not empty", out.display()),
            "remove it, or give another `--out`: a quickstart that was interrupted does not go on"
        ));
    }
    Ok(())
}

/// Makes a folder of the story's data.
fn create(folder: &Path) -> Result<()> {
    std::fs::create_dir_all(folder).map_err(|error| {
        let message = format!("cannot create `{}`: {error}", folder.display());
        hinted(message, "give another `--out`")
    })
}

/// One record with its mask: trained tokens in brackets, and in green where there are colours.
fn show_record(example: &Example, processor: &Processor) -> Result<()> {
    if is_quiet() {
        return Ok(());
    }
    let mut line = String::new();
    for (text, trained) in report::pieces(example, processor)? {
        let text = text.escape_debug();
        line += &if trained {
            format!("{TRAINED}[{text}]{TRAINED:#}")
        } else {
            format!("{CONTEXT}{text}{CONTEXT:#}")
        };
    }
    writeln!(anstream::stdout(), "a record, [trained] tokens in brackets: {line}")?;
    Ok(())
}

/// Saves a stage's model as a folder.
fn save(
    device: &Cpu,
    decoder: &Decoder<Cpu>,
    processor: &Processor,
    config: &Value,
    generation_config: Option<&Value>,
    folder: &Path,
) -> Result<()> {
    let config = decoder.config.to_json(config);
    create_folder(folder, |folder| {
        write_weights(device, decoder, processor, generation_config, &config, folder, SaveType::F32)
    })?;
    say("saved", format!("`{}`", folder.display()));
    Ok(())
}

/// Writes the page and shows in the terminal what it says.
fn publish(page: &Page, options: &Quickstart, seconds: f64) -> Result<()> {
    write_atomic(&options.out.join("report.html"), |file| {
        file.write_all(stages::html(page).map_err(std::io::Error::other)?.as_bytes())
    })?;
    report::print(&mut results(), page, &options.out, seconds)
}
