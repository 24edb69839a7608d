//! Commands, data and files that the tests share.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::{Value, json};
use tempfile::TempDir;

/// A file or folder of `fixtures/`.
pub fn fixture(name: &str) -> String {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures");
    fixtures.join(name).canonicalize().unwrap().display().to_string()
}

/// A folder of its own for a test.
pub struct Place(TempDir);

impl Place {
    pub fn new() -> Place {
        Place(tempfile::tempdir().unwrap())
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// A file with this text.
    pub fn file(&self, name: &str, text: &str) -> String {
        fs::write(self.path(name), text).unwrap();
        self.path(name).display().to_string()
    }

    /// A file with a JSON object a line.
    pub fn jsonl(&self, name: &str, rows: impl IntoIterator<Item = Value>) -> String {
        self.file(name, &rows.into_iter().map(|row| format!("{row}\n")).collect::<String>())
    }

    pub fn chats(&self) -> String {
        self.jsonl(
            "chats.jsonl",
            (0..12).map(|i| json!({ "messages": turns(i, &format!("It is {}.", i + 1)) })),
        )
    }

    pub fn pairs(&self) -> String {
        let pair = |i| json!({ "chosen": turns(i, &format!("It is {}.", i + 1)), "rejected": turns(i, "No idea at all.") });
        self.jsonl("pairs.jsonl", (0..12).map(pair))
    }

    pub fn documents(&self) -> String {
        let text = |i| format!("Document {i} says that the sky is blue and the grass is green.");
        self.jsonl("documents.jsonl", (0..12).map(|i| json!({ "text": text(i) })))
    }

    /// The command `temper`, with a cache of its own.
    pub fn temper<'a>(&self, arguments: impl IntoIterator<Item = &'a str>) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_temper"));
        command.args(arguments).env("XDG_CACHE_HOME", self.path("cache")).current_dir(self.0.path());
        command
    }

    /// Runs words separated by spaces, and then `more`.
    pub fn run(&self, words: &str, more: &[&str]) -> Ran {
        Ran(self.temper(words.split_whitespace().chain(more.iter().copied())).output().unwrap())
    }
}

fn turns(i: usize, answer: &str) -> Value {
    json!([
        { "role": "user", "content": format!("What comes after {i}?") },
        { "role": "assistant", "content": answer },
    ])
}

/// What a command did.
#[derive(Debug)]
pub struct Ran(pub Output);

impl Ran {
    pub fn code(&self) -> Option<i32> {
        self.0.status.code()
    }

    pub fn stdout(&self) -> String {
        String::from_utf8(self.0.stdout.clone()).unwrap()
    }

    pub fn stderr(&self) -> String {
        String::from_utf8(self.0.stderr.clone()).unwrap()
    }

    /// That it succeeded.
    pub fn good(self) -> Ran {
        assert_eq!(self.code(), Some(0), "{}", self.stderr());
        self
    }

    /// That it failed with this code and said these words, and did not panic.
    pub fn failed(self, code: i32, words: &[&str]) -> Ran {
        let stderr = self.stderr();
        assert_eq!(self.code(), Some(code), "{stderr}");
        assert!(!stderr.contains("panicked"), "{stderr}");
        for word in words {
            assert!(stderr.contains(word), "`{word}` is not in:\n{stderr}");
        }
        self
    }
}

/// The manifest of a run.
pub fn manifest(run: &Path) -> Value {
    serde_json::from_slice(&fs::read(run.join("manifest.json")).unwrap()).unwrap()
}

/// The objects of a file with one a line.
pub fn lines(path: &Path) -> Vec<Value> {
    parsed(&fs::read_to_string(path).unwrap())
}

/// The objects of a text with one a line.
pub fn parsed(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Names and contents of all files below a folder.
pub fn contents(folder: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(contents(&path));
        } else {
            found.push((path.clone(), fs::read(&path).unwrap()));
        }
    }
    found.sort();
    found
}
