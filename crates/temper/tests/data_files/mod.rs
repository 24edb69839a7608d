//! Small data files, and what is read from them.

#![allow(dead_code, clippy::unwrap_used, reason = "helpers of tests, of which each file uses a part")]

use std::fs;
use std::path::PathBuf;

use temper::data::records::read;
use temper::data::{Answer, Content, Error, Records};
use temper::text::{Message, Role};
use tempfile::TempDir;

/// Files of a test.
pub struct Files(pub TempDir);

impl Files {
    pub fn new() -> Self {
        Self(TempDir::new().unwrap())
    }

    pub fn write(&self, name: &str, contents: impl AsRef<[u8]>) -> PathBuf {
        let path = self.0.path().join(name);
        fs::write(&path, contents).unwrap();
        path
    }
}

pub fn jsonl(contents: &str) -> Result<Records, Error> {
    let files = Files::new();
    read(&files.write("data.jsonl", contents))
}

/// The contents of one line.
pub fn content(line: &str) -> Content {
    jsonl(line).unwrap().records.remove(0).content
}

pub fn message(line: &str) -> String {
    jsonl(line).unwrap_err().to_string().split_once("data.jsonl` ").unwrap().1.to_owned()
}

pub fn user(text: &str) -> Message {
    Message::new(Role::User, text)
}

pub fn assistant(text: &str) -> Message {
    Message::new(Role::Assistant, text)
}

pub fn text(text: &str) -> Answer {
    Answer::Text(text.into())
}

/// A table of one row.
pub fn table(fields: &[(&str, &str)]) -> Result<Records, Error> {
    let line = |cells: Vec<&str>| {
        let quoted = cells.iter().map(|cell| format!("\"{}\"", cell.replace('"', "\"\"")));
        quoted.collect::<Vec<_>>().join(",")
    };
    let (names, cells) = fields.iter().copied().unzip();
    let files = Files::new();
    read(&files.write("data.csv", format!("{}\n{}\n", line(names), line(cells))))
}
