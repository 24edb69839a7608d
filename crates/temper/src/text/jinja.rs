//! Jinja as Transformers sets it up for chat templates, with bounds.

use std::fmt::Write as _;
use std::io;

use chrono::{DateTime, Utc};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, ValueKind, from_args};
use minijinja::{Environment, ErrorKind, State, Value};
use minijinja_contrib::pycompat::unknown_method_callback;

use super::Error;

/// The one template of an environment.
const NAME: &str = "chat_template";
/// The largest conversation that a template may write.
const OUTPUT_LIMIT: usize = 16 << 20;
/// Steps for one conversation. The engine counts 64 bytes made as a step too, so this bounds memory.
const FUEL: u64 = 1_000_000;
/// Steps that nearly all conversations do with.
const QUICK_FUEL: u64 = 4_000;
/// Stack for [`FUEL`]. A template can nest a list with every second step, and the engine drops, compares
/// and prints lists by recursion, with up to 500 bytes a level.
const STACK: usize = 512 << 20;
const RECURSION: usize = 100;
/// Marks the errors of `raise_exception`, whose text is the template's own.
const RAISED: &str = "raised by the template: ";

/// A compiled template that can do no harm: it reads no files, and its steps, memory, stack and output
/// are bounded.
pub(super) struct Sandbox(Environment<'static>);

impl Sandbox {
    pub(super) fn new(source: &str, now: DateTime<Utc>) -> Result<Self, Error> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(error)?);
        environment.set_fuel(Some(QUICK_FUEL));
        environment.set_recursion_limit(RECURSION);
        environment.set_unknown_method_callback(method);
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        // These print nested values at a cost that fuel does not see before it is spent.
        environment.remove_filter("pprint");
        environment.remove_global("debug");
        environment.add_filter("tojson", super::json::to_json);
        // As Jinja2 has them: nothing to iterate in `none`, and letters and keys make sequences too.
        environment.add_test("iterable", |value: &Value| !value.is_none() && value.try_iter().is_ok());
        environment.add_test("sequence", |value: &Value| {
            match value.kind() {
                ValueKind::Seq | ValueKind::String | ValueKind::Map => true,
                // Slices and ranges.
                ValueKind::Iterable => value.len().is_some(),
                _ => false,
            }
        });
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", move |format: &str| strftime(now, format));
        environment.add_template_owned(NAME, without_generation_tags(source)).map_err(error)?;
        Ok(Self(environment))
    }

    /// Runs the template, on a stack of its own if it takes long.
    pub(super) fn render(&self, variables: Value) -> Result<String, Error> {
        match run(&self.0, variables.clone()) {
            Err(Error::Endless { .. }) => {}
            result => return result,
        }
        let mut patient = self.0.clone();
        patient.set_fuel(Some(FUEL));
        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().stack_size(STACK);
            let run = thread.spawn_scoped(scope, || run(&patient, variables)).map_err(no_thread)?;
            run.join().unwrap_or_else(|_| Err(no_thread("the template's thread panicked")))
        })
    }
}

fn run(environment: &Environment<'_>, variables: Value) -> Result<String, Error> {
    let template = environment.get_template(NAME).map_err(error)?;
    let mut output = Output::default();
    let rendered = template.render_captured_to(variables, &mut output).map(|_| ());
    if output.full {
        return Err(Error::OutputTooLong { limit: OUTPUT_LIMIT });
    }
    rendered.map_err(error)?;
    Ok(String::from_utf8_lossy(&output.bytes).into_owned())
}

fn no_thread(reason: impl ToString) -> Error {
    Error::Template { line: None, reason: reason.to_string() }
}

/// Jinja's words in ours.
fn error(error: minijinja::Error) -> Error {
    let line = error.line();
    if error.kind() == ErrorKind::OutOfFuel {
        return Error::Endless { line };
    }
    let detail = error.detail().map_or_else(
        || error.kind().to_string(),
        |detail| {
            if error.kind() == ErrorKind::InvalidOperation {
                detail.to_owned()
            } else {
                format!("{}: {detail}", error.kind())
            }
        },
    );
    match detail.strip_prefix(RAISED) {
        Some(reason) => Error::Refused { line, reason: reason.to_owned() },
        None => Error::Template { line, reason: detail },
    }
}

/// Python's methods of strings: those that the engine's list lacks, and its list.
fn method(
    state: &mut State<'_, '_>,
    value: &Value,
    name: &str,
    arguments: &[Value],
) -> Result<Value, minijinja::Error> {
    let Some(text) = value.as_str() else { return unknown_method_callback(state, value, name, arguments) };
    let one = || from_args::<(&str,)>(arguments).map(|(argument,)| argument);
    let list = |parts: &[&str]| -> Value { parts.iter().copied().map(Value::from).collect() };
    Ok(match name {
        "removeprefix" => text.strip_prefix(one()?).unwrap_or(text).into(),
        "removesuffix" => text.strip_suffix(one()?).unwrap_or(text).into(),
        "partition" => {
            let by = separator(one()?)?;
            list(&text.split_once(by).map_or([text, "", ""], |(before, after)| [before, by, after]))
        }
        "rpartition" => {
            let by = separator(one()?)?;
            list(&text.rsplit_once(by).map_or(["", "", text], |(before, after)| [before, by, after]))
        }
        "rsplit" => {
            let (by, most, named): (Option<&str>, Option<i64>, Kwargs) = from_args(arguments)?;
            let by = by.or(named.get("sep")?).map(separator).transpose()?;
            let most = most.or(named.get("maxsplit")?).and_then(|most| usize::try_from(most).ok());
            named.assert_all_used()?;
            list(&rsplit(text, by, most.unwrap_or(usize::MAX)))
        }
        _ => return unknown_method_callback(state, value, name, arguments),
    })
}

/// What texts are cut by, which cannot be nothing.
fn separator(by: &str) -> Result<&str, minijinja::Error> {
    match by {
        "" => Err(minijinja::Error::new(ErrorKind::InvalidOperation, "empty separator")),
        _ => Ok(by),
    }
}

/// The parts of a text, cut at most so often, from its end; without a separator at white space.
fn rsplit<'a>(text: &'a str, separator: Option<&str>, most: usize) -> Vec<&'a str> {
    let (mut rest, mut parts) = (text, Vec::new());
    if separator.is_none() {
        rest = rest.trim_end();
    }
    while parts.len() < most {
        let cut = match separator {
            Some(separator) => rest.rsplit_once(separator),
            None => rest.rsplit_once(char::is_whitespace).map(|(before, word)| (before.trim_end(), word)),
        };
        let Some((before, part)) = cut else { break };
        parts.push(part);
        rest = before;
    }
    if separator.is_some() || !rest.is_empty() {
        parts.push(rest);
    }
    parts.reverse();
    parts
}

fn raise_exception(message: &str) -> Result<Value, minijinja::Error> {
    Err(minijinja::Error::new(ErrorKind::InvalidOperation, format!("{RAISED}{message}")))
}

fn strftime(now: DateTime<Utc>, format: &str) -> Result<String, minijinja::Error> {
    let mut text = String::new();
    write!(text, "{}", now.format(format)).map_err(|_| {
        minijinja::Error::new(ErrorKind::InvalidOperation, format!("`{format}` is no date format"))
    })?;
    Ok(text)
}

/// Makes `{% generation %}` … `{% endgeneration %}`, which only mark text, a block that is always taken.
/// The tags keep their place and their dashes, and so the white space around them.
fn without_generation_tags(source: &str) -> String {
    let mut kept = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let Some(length) = rest[start..].find("%}") else { break };
        let (before, tag) = rest[..start + length].split_at(start);
        kept.push_str(before);
        match tag.trim_matches(|letter: char| letter.is_whitespace() || "{%-+".contains(letter)) {
            "generation" => kept.push_str(&tag.replace("generation", "if true")),
            "endgeneration" => kept.push_str(&tag.replace("endgeneration", "endif")),
            _ => kept.push_str(tag),
        }
        rest = &rest[start + length..];
    }
    kept.push_str(rest);
    kept
}

/// Text written by a template, up to [`OUTPUT_LIMIT`].
#[derive(Default)]
struct Output {
    bytes: Vec<u8>,
    full: bool,
}

impl io::Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.bytes.len() + bytes.len() > OUTPUT_LIMIT {
            self.full = true;
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
