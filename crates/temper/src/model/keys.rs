//! Reading a JSON object key by key, so that a key nobody read is an error and never ignored.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::path::Path;

use serde_json::{Map, Value};

use super::Error;

/// No dimension of a model may exceed this; the products of any two then fit in a `usize`.
pub(super) const LARGEST: u64 = 1 << 24;

/// An object of a configuration and which of its keys have been read. `null` counts as absent.
pub(super) struct Keys<'a> {
    object: &'a Map<String, Value>,
    /// Named in messages, where it is not the model's own.
    file: Option<&'a Path>,
    /// Put before keys in messages, as `rope_parameters.`.
    prefix: &'a str,
    read: RefCell<BTreeSet<String>>,
}

impl<'a> Keys<'a> {
    /// Keys of `config.json`, or of an object in it.
    pub fn new(object: &'a Map<String, Value>, prefix: &'a str) -> Keys<'a> {
        Keys { object, file: None, prefix, read: RefCell::default() }
    }

    /// Keys of `adapter_config.json`.
    pub fn of_adapter(object: &'a Map<String, Value>, file: &'a Path) -> Keys<'a> {
        Keys { object, file: Some(file), prefix: "", read: RefCell::default() }
    }

    /// Whether the key is there, be it `null`; does not count as reading it.
    pub fn has(&self, key: &str) -> bool {
        self.object.contains_key(key)
    }

    /// The value, unless it is absent or `null`.
    pub fn value(&self, key: &str) -> Option<&'a Value> {
        self.read.borrow_mut().insert(key.to_owned());
        self.object.get(key).filter(|value| !value.is_null())
    }

    /// The error for what stands at `key`.
    pub fn wrong(&self, key: &str, expected: impl Into<String>) -> Error {
        let found = match self.object.get(key) {
            None => "nothing".into(),
            Some(value) => describe(value),
        };
        let (key, expected) = (format!("{}{key}", self.prefix), expected.into());
        match self.file {
            None => Error::Config { key, expected, found },
            Some(path) => Error::AdapterConfig { path: path.to_owned(), key, expected, found },
        }
    }

    /// A dimension: from 1 to 2^24.
    pub fn size(&self, key: &str) -> Result<Option<usize>, Error> {
        let Some(value) = self.value(key) else {
            return Ok(None);
        };
        match value.as_u64() {
            Some(size @ 1..=LARGEST) => Ok(Some(size as usize)),
            _ => Err(self.wrong(key, format!("an integer from 1 to {LARGEST}"))),
        }
    }

    /// A dimension that has no default.
    pub fn required_size(&self, key: &str) -> Result<usize, Error> {
        self.size(key)?.ok_or_else(|| self.wrong(key, format!("an integer from 1 to {LARGEST}")))
    }

    /// A finite number.
    pub fn number(&self, key: &str, default: f64) -> Result<f64, Error> {
        match self.value(key).map(Value::as_f64) {
            None => Ok(default),
            Some(Some(number)) if number.is_finite() => Ok(number),
            Some(_) => Err(self.wrong(key, "a number")),
        }
    }

    /// A finite number above 0.
    pub fn positive(&self, key: &str) -> Result<Option<f64>, Error> {
        match self.value(key).map(Value::as_f64) {
            None => Ok(None),
            Some(Some(number)) if number > 0.0 && number.is_finite() => Ok(Some(number)),
            Some(_) => Err(self.wrong(key, "a number above 0")),
        }
    }

    /// A finite number above 0 that has no default.
    pub fn required_positive(&self, key: &str) -> Result<f64, Error> {
        self.positive(key)?.ok_or_else(|| self.wrong(key, "a number above 0"))
    }

    /// A number from 0 to below 1.
    pub fn probability(&self, key: &str, default: f64) -> Result<f64, Error> {
        match self.value(key).map(Value::as_f64) {
            None => Ok(default),
            Some(Some(number)) if (0.0..1.0).contains(&number) => Ok(number),
            Some(_) => Err(self.wrong(key, "a number from 0 to below 1")),
        }
    }

    /// `true` or `false`.
    pub fn boolean(&self, key: &str, default: bool) -> Result<bool, Error> {
        match self.value(key) {
            None => Ok(default),
            Some(Value::Bool(value)) => Ok(*value),
            Some(_) => Err(self.wrong(key, "`true` or `false`")),
        }
    }

    /// A string.
    pub fn string(&self, key: &str) -> Result<Option<&'a str>, Error> {
        match self.value(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(self.wrong(key, "a string")),
        }
    }

    /// A list of strings; empty without one.
    pub fn strings(&self, key: &str) -> Result<Vec<&'a str>, Error> {
        let Some(value) = self.value(key) else { return Ok(Vec::new()) };
        let list = value.as_array().and_then(|list| list.iter().map(Value::as_str).collect());
        list.ok_or_else(|| self.wrong(key, "a list of strings"))
    }

    /// An object.
    pub fn object(&self, key: &str) -> Result<Option<&'a Map<String, Value>>, Error> {
        match self.value(key) {
            None => Ok(None),
            Some(Value::Object(object)) => Ok(Some(object)),
            Some(_) => Err(self.wrong(key, "an object")),
        }
    }

    /// Token ids: none, one, or a list.
    pub fn tokens(&self, key: &str) -> Result<Vec<u32>, Error> {
        let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
        let ids = match self.value(key) {
            None => Some(Vec::new()),
            Some(Value::Array(ids)) => ids.iter().map(id).collect(),
            Some(one) => id(one).map(|id| vec![id]),
        };
        ids.ok_or_else(|| self.wrong(key, "a token id or a list of token ids"))
    }

    /// Accepts only these values; an absent key or `null` too.
    pub fn only(&self, key: &str, accepted: &[Value]) -> Result<(), Error> {
        match self.value(key) {
            Some(value) if !accepted.contains(value) => {
                let accepted: Vec<String> = accepted.iter().map(describe).collect();
                let none = "nothing: temper does not compute it";
                Err(self.wrong(key, if accepted.is_empty() { none.into() } else { accepted.join(" or ") }))
            }
            _ => Ok(()),
        }
    }

    /// Refuses the first key that nobody has read and that `harmless` does not excuse, with its value.
    pub fn finish(&self, harmless: impl Fn(&str, &Value) -> bool) -> Result<(), Error> {
        let read = self.read.borrow();
        // A key set to `null` asks for nothing.
        let unknown = |(key, value): &(&String, &Value)| {
            !value.is_null() && !read.contains(key.as_str()) && !harmless(key, value)
        };
        match self.object.iter().find(unknown) {
            Some((key, _)) => Err(self.wrong(key, "no such key, because temper does not know it")),
            None => Ok(()),
        }
    }
}

/// A value as a message shows it: short, control characters escaped by JSON.
fn describe(value: &Value) -> String {
    const LONGEST: usize = 60;
    let text = value.to_string();
    match text.char_indices().nth(LONGEST) {
        Some((cut, _)) => format!("`{}…`", &text[..cut]),
        None => format!("`{text}`"),
    }
}
