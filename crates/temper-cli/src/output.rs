//! What people read: messages on stderr, results on stdout.

use std::borrow::Cow;
use std::fmt::Display;
use std::io::{self, BufWriter, Write};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use anstyle::{AnsiColor, Style};
use indicatif::ProgressBar;
pub use temper::data::grouped;

use crate::args::Output;
use crate::interrupt::Stopped;

const LABEL: Style = Style::new().bold();
const WRONG: Style = AnsiColor::Red.on_default().bold();
const HINT: Style = AnsiColor::Cyan.on_default().bold();

/// Whether only errors and warnings are said; the process has one stderr.
static QUIET: AtomicBool = AtomicBool::new(false);

/// The bar at the bottom of the terminal, if there is one: messages of any thread go above it.
static BAR: Mutex<Option<ProgressBar>> = Mutex::new(None);

/// Width of the labels.
const WIDTH: usize = 10;

/// An error of the command line itself, with what to do about it.
#[derive(Debug)]
struct Hinted {
    /// What is wrong.
    message: String,
    /// What to do; empty where nothing is known.
    hint: String,
}

impl Display for Hinted {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(&self.message)
    }
}

impl std::error::Error for Hinted {}

/// An error of the command line itself, with what to do about it.
pub fn hinted(message: impl Into<String>, hint: impl Into<String>) -> anyhow::Error {
    Hinted { message: message.into(), hint: hint.into() }.into()
}

/// Where results go, byte by byte as they are.
pub fn results() -> impl Write {
    BufWriter::new(Results(io::stdout()))
}

/// Standard output, with errors that say so.
struct Results(io::Stdout);

impl Write for Results {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes).map_err(Self::failed)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush().map_err(Self::failed)
    }
}

impl Results {
    fn failed(error: io::Error) -> io::Error {
        io::Error::new(error.kind(), format!("cannot write to standard output: {error}"))
    }
}

impl Output {
    /// From now on, says as much as is wanted.
    pub fn begin(&self) {
        QUIET.fetch_or(self.quiet, Ordering::Relaxed);
    }
}

/// From now on, says nothing but errors and warnings: another process does.
#[cfg(feature = "mpi")]
pub fn be_quiet() {
    QUIET.store(true, Ordering::Relaxed);
}

/// Whether only errors and warnings are said.
pub fn is_quiet() -> bool {
    QUIET.load(Ordering::Relaxed)
}

/// Writes a message with a label, unless there is quiet; further lines are indented.
pub fn say(label: &str, text: impl Display) {
    if !is_quiet() {
        write_message(label, text);
    }
}

/// Writes a warning, always.
pub fn warn(text: impl Display) {
    write_message("warning", text);
}

/// From now on, messages go above this bar, or simply to stderr.
pub fn set_bar(bar: Option<ProgressBar>) {
    *BAR.lock().unwrap_or_else(PoisonError::into_inner) = bar;
}

fn write_message(label: &str, text: impl Display) {
    // A closed stderr is no reason to stop.
    let write = || drop(writeln!(anstream::stderr(), "{}", labelled(label, text)));
    let bar = BAR.lock().unwrap_or_else(PoisonError::into_inner).clone();
    match bar {
        Some(bar) => bar.suspend(write),
        None => write(),
    }
}

/// A label and a text, as [`say`] writes them.
pub fn labelled(label: &str, text: impl Display) -> String {
    let text = escaped(text.to_string().trim_end());
    let text = text.replace('\n', &format!("\n{:WIDTH$}  ", ""));
    format!("{LABEL}{label:>WIDTH$}{LABEL:#}  {text}")
}

/// Writes an error with its causes and its hint. A closed pipe is none, nor is a run that was asked to stop.
pub fn failure(error: &anyhow::Error) -> ExitCode {
    let closed = |cause: &(dyn std::error::Error + 'static)| {
        cause.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
    };
    if error.chain().any(closed) {
        return ExitCode::SUCCESS;
    }
    if let Some(stopped) = error.downcast_ref::<Stopped>() {
        say("stopped", stopped);
        return ExitCode::from(stopped.code());
    }
    let mut text = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    let mut stderr = anstream::stderr();
    let _ = writeln!(stderr, "{WRONG}error{WRONG:#}: {}", escaped(&text));
    let own = || error.downcast_ref::<Hinted>().map(|error| error.hint.clone());
    if let Some(hint) = of_library(error).flatten().or_else(own).filter(|hint| !hint.is_empty()) {
        let _ = writeln!(stderr, "{HINT}hint{HINT:#}: {}", escaped(&hint));
    }
    ExitCode::FAILURE
}

/// The hint of an error of the library, if it has one, whichever module's it is; none of other errors.
pub fn of_library(error: &anyhow::Error) -> Option<Option<String>> {
    macro_rules! first {
        ($($kind:ty),*) => { None$(.or_else(|| error.downcast_ref().map(<$kind>::hint)))* };
    }
    first!(
        temper::Error,
        temper::checkpoint::Error,
        temper::text::Error,
        temper::data::Error,
        temper::model::Error,
        temper::generate::Error,
        temper::train::Error,
        temper::parallel::Error
    )
}

/// Text whose control characters cannot steer a terminal; ends of lines and tabs stay.
pub fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            '\n' | '\t' => out.push(letter),
            _ if letter.is_control() => out.extend(letter.escape_default()),
            _ => out.push(letter),
        }
    }
    out
}

/// A word as a shell reads it back.
pub fn shell_word(word: impl Display) -> String {
    let word = word.to_string();
    let plain = |c: char| c.is_alphanumeric() || "_-./+=:,@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word;
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// Text of a page, not too long.
pub fn clipped(text: &str) -> Cow<'_, str> {
    const LETTERS: usize = 1500;
    match text.char_indices().nth(LETTERS) {
        Some((end, _)) => (text[..end].to_owned() + "…").into(),
        None => text.into(),
    }
}

/// Bytes as people say them.
pub fn bytes(bytes: u64) -> String {
    match bytes as f64 {
        small if small < 1e6 => format!("{:.1} kB", small / 1e3),
        medium if medium < 1e9 => format!("{:.1} MB", medium / 1e6),
        large => format!("{:.2} GB", large / 1e9),
    }
}

/// Seconds as people say them.
pub fn duration(seconds: f64) -> String {
    let whole = seconds.round() as u64;
    match whole {
        0..60 => format!("{whole}s"),
        60..3600 => format!("{}m{:02}s", whole / 60, whole % 60),
        _ => format!("{}h{:02}m", whole / 3600, whole % 3600 / 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_module_has_its_hints() {
        let of_module = temper::text::Error::NoTemplate;
        let hint = of_module.hint();
        assert!(hint.is_some());
        assert_eq!(of_library(&of_module.into()), Some(hint.clone()));
        assert_eq!(of_library(&temper::Error::from(temper::text::Error::NoTemplate).into()), Some(hint));
        assert_eq!(of_library(&anyhow::anyhow!("of another kind")), None);
    }
}
