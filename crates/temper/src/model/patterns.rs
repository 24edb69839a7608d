//! Values that PEFT gives to modules by patterns of their names.

use regex::Regex;
use serde_json::{Map, Value};

use super::Error;
use super::keys::Keys;

/// PEFT's `rank_pattern` or `alpha_pattern`: of the patterns that fit a module's name, the first counts. A pattern is a
/// regular expression for the whole name, or for what follows a dot in it.
#[derive(Debug, Clone)]
pub struct Patterns<T>(Vec<(String, Regex, T)>);

impl<T> Default for Patterns<T> {
    fn default() -> Patterns<T> {
        Patterns(Vec::new())
    }
}

impl<T: Copy> Patterns<T> {
    /// Reads the object at `key`, its values by `value`; `expected` says what they are.
    pub(super) fn read(
        keys: &Keys<'_>,
        key: &str,
        expected: &str,
        value: impl Fn(&Value) -> Option<T>,
    ) -> Result<Patterns<T>, Error> {
        let none = Map::new();
        let entries = keys.object(key)?.unwrap_or(&none).iter().map(|(pattern, found)| {
            let regex = Regex::new(&format!(r"^(?:.*\.)?(?:{pattern})$"));
            let regex = regex.map_err(|_| "regular expressions without look-around and back-references")?;
            Ok((pattern.clone(), regex, value(found).ok_or(expected)?))
        });
        let entries: Result<Vec<_>, &str> = entries.collect();
        entries.map(Patterns).map_err(|expected| keys.wrong(key, expected))
    }

    /// As PEFT writes them.
    pub(super) fn to_json(&self, value: impl Fn(T) -> Value) -> Value {
        self.0.iter().map(|(pattern, _, found)| (pattern.clone(), value(*found))).collect()
    }

    /// The value for a module, if a pattern fits its name.
    pub fn of(&self, module: &str) -> Option<T> {
        self.0.iter().find(|(_, regex, _)| regex.is_match(module)).map(|(_, _, value)| *value)
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}
