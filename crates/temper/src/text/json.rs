//! The filter `tojson` of chat templates: `json.dumps(value, ensure_ascii=False, …)` of Python, which
//! Transformers puts in the place of Jinja's own.

use std::fmt::Write as _;

use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Error, ErrorKind, State, Value};

/// Python's own limit is near a thousand; the bound keeps a template from overflowing the stack.
const DEPTH: usize = 100;

struct Style {
    ascii: bool,
    sort_keys: bool,
    /// Spaces a level; without, all is on one line.
    indent: Option<usize>,
    item: String,
    key: String,
}

pub(super) fn to_json(state: &State, value: &Value, options: Kwargs) -> Result<String, Error> {
    let indent = options.get::<Option<usize>>("indent")?;
    let (item, key) = match options.get::<Option<Vec<String>>>("separators")?.as_deref() {
        Some([item, key]) => (item.clone(), key.clone()),
        Some(_) => return Err(refused("`separators` are two strings")),
        None => (if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned()),
    };
    let style = Style {
        ascii: options.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
        sort_keys: options.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
        indent,
        item,
        key,
    };
    options.assert_all_used()?;
    let mut writer = Writer { state, style, text: String::new() };
    writer.value(value, 0)?;
    Ok(writer.text)
}

struct Writer<'state, 'scope, 'env> {
    state: &'state State<'scope, 'env>,
    style: Style,
    text: String,
}

impl Writer<'_, '_, '_> {
    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        if depth > DEPTH {
            return Err(refused("a value is nested too deep for JSON"));
        }
        self.state.consume_fuel(1 + self.text.len() as u64 / 64 / 16)?;
        match value.kind() {
            ValueKind::None => self.text.push_str("null"),
            ValueKind::Bool => self.text.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number if value.is_integer() => self.text.push_str(&value.to_string()),
            ValueKind::Number => self.text.push_str(&python_float(f64::try_from(value.clone())?)),
            ValueKind::String => self.string(value.as_str().unwrap_or_default())?,
            ValueKind::Seq | ValueKind::Iterable => {
                let items = value.try_iter()?.map(|item| (None, item)).collect();
                self.container(['[', ']'], items, depth)?;
            }
            ValueKind::Map => {
                let mut items = Vec::new();
                for key in value.try_iter()? {
                    let item = value.get_item(&key)?;
                    items.push((Some(key.to_string()), item));
                }
                if self.style.sort_keys {
                    items.sort_by(|(left, _), (right, _)| left.cmp(right));
                }
                self.container(['{', '}'], items, depth)?;
            }
            kind => return Err(refused(format!("{kind} cannot be written as JSON"))),
        }
        Ok(())
    }

    fn container(
        &mut self,
        [open, close]: [char; 2],
        items: Vec<(Option<String>, Value)>,
        depth: usize,
    ) -> Result<(), Error> {
        self.text.push(open);
        let empty = items.is_empty();
        for (index, (key, item)) in items.into_iter().enumerate() {
            if index > 0 {
                self.text.push_str(&self.style.item);
            }
            self.line(depth + 1);
            if let Some(key) = key {
                self.string(&key)?;
                self.text.push_str(&self.style.key);
            }
            self.value(&item, depth + 1)?;
        }
        if !empty {
            self.line(depth);
        }
        self.text.push(close);
        Ok(())
    }

    fn line(&mut self, depth: usize) {
        if let Some(indent) = self.style.indent {
            self.text.push('\n');
            self.text.extend(std::iter::repeat_n(' ', indent.min(64) * depth));
        }
    }

    fn string(&mut self, string: &str) -> Result<(), Error> {
        let quoted = serde_json::to_string(string).map_err(|error| refused(error.to_string()))?;
        if !self.style.ascii {
            self.text.push_str(&quoted);
            return Ok(());
        }
        for letter in quoted.chars() {
            if letter.is_ascii() {
                self.text.push(letter);
                continue;
            }
            for unit in letter.encode_utf16(&mut [0; 2]) {
                let _ = write!(self.text, "\\u{unit:04x}");
            }
        }
        Ok(())
    }
}

/// `repr` of a float: as Rust's, but the exponent has a sign and two digits.
fn python_float(number: f64) -> String {
    if number.is_nan() {
        return "NaN".into();
    }
    if number.is_infinite() {
        return if number > 0.0 { "Infinity" } else { "-Infinity" }.into();
    }
    let text = format!("{number:?}");
    match text.split_once('e') {
        Some((digits, exponent)) => {
            let (sign, size) = exponent.strip_prefix('-').map_or(('+', exponent), |size| ('-', size));
            format!("{digits}e{sign}{size:0>2}")
        }
        None => text,
    }
}

fn refused(reason: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, reason.into())
}
