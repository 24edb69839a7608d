//! The run directory as a state machine:
//!
//! ```text
//! manifest.json            what was asked, of what, on what
//! metrics.jsonl            one object for each optimizer step and each evaluation
//! events.out.tfevents.*    the same for TensorBoard
//! samples.jsonl            one object for each prompt that was answered during the run
//! checkpoints/step-N/      a model or adapter folder, the moments, state.json, and DONE
//! ended.json               how it ended before its end, if it could say so
//! final/                   a model or adapter folder, and DONE
//! .lock                    held while a process works here
//! ```
//!
//! Folders appear whole, by rename; `DONE` is their last file, so that nothing else is ever taken for one, and has the sums of
//! the others.

use std::fs::{self, File, TryLockError};
use std::io::{self, ErrorKind, Read, Write};
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use super::Error;
use crate::checkpoint::save::{write_atomic, write_json};
use crate::hex;

/// Last file of a checkpoint and of `final/`.
const DONE: &str = "DONE";
/// What decides a run's numbers, and what became of its data.
pub const MANIFEST: &str = "manifest.json";
/// Steps and evaluations.
pub const METRICS: &str = "metrics.jsonl";
/// Answers to the run's prompts.
pub const SAMPLES: &str = "samples.jsonl";

/// How a run ended before its end: `{"stopped": STEP}` or `{"failed": "why"}`. There is none of a run that is finished,
/// goes on, or was killed.
pub const ENDED: &str = "ended.json";

/// How a run ended before its end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ended {
    /// It was asked to stop, and goes on after this step.
    Stopped(u64),
    /// It failed, and why: the error as the library has it, without the places of records.
    Failed(String),
}

/// The manifest of a run, where there is one that can be read.
pub fn manifest(run: &Path) -> Option<Value> {
    serde_json::from_slice(&fs::read(run.join(MANIFEST)).ok()?).ok()
}

/// Whether a value of a manifest is the hash of a content: 64 hexadecimal digits.
pub fn is_hash(value: &Value) -> bool {
    value.as_str().is_some_and(|text| text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit()))
}

/// How a run ended before its end, where it could say so.
pub fn ended(run: &Path) -> Option<Ended> {
    let ended: Value = serde_json::from_slice(&fs::read(run.join(ENDED)).ok()?).ok()?;
    let failed = || Some(Ended::Failed(ended["failed"].as_str()?.to_owned()));
    ended["stopped"].as_u64().map(Ended::Stopped).or_else(failed)
}

/// Says that a folder is whole, and what is in it: a line `SHA-256  name` for each file, as `sha256sum -c` reads them.
pub(super) fn write_done(folder: &Path) -> crate::Result<()> {
    let failed = |error: io::Error| Error::run(folder, format!("cannot be read again: {error}"), None);
    let name = |entry: io::Result<fs::DirEntry>| Ok(entry?.file_name().to_string_lossy().into_owned());
    let names = fs::read_dir(folder).and_then(|entries| entries.map(name).collect::<io::Result<Vec<_>>>());
    let mut names = names.map_err(failed)?;
    names.sort_unstable();
    let line = |name: &String| Ok(format!("{}  {name}\n", sha256(&folder.join(name))?));
    let lines: String = names.par_iter().map(line).collect::<io::Result<_>>().map_err(failed)?;
    Ok(write_atomic(&folder.join(DONE), |file| file.write_all(lines.as_bytes()))?)
}

/// What a folder has not as its `DONE` says; nothing of files that it does not name.
pub(super) fn check_done(folder: &Path) -> Result<(), String> {
    let done =
        fs::read_to_string(folder.join(DONE)).map_err(|error| format!("cannot read {DONE}: {error}"))?;
    let lines: Vec<(&str, &str)> = done.lines().filter_map(|line| line.split_once("  ")).collect();
    lines.par_iter().try_for_each(|(written, name)| match sha256(&folder.join(name)) {
        Ok(found) if found == *written => Ok(()),
        Ok(found) => Err(format!("{name} has changed: expected SHA-256 {written}, found {found}")),
        Err(error) => Err(format!("cannot read {name}: {error}")),
    })
}

fn sha256(path: &Path) -> io::Result<String> {
    /// Bytes that are read at a time.
    const CHUNK: usize = 1 << 18;
    let (mut file, mut hash, mut buffer) = (File::open(path)?, Sha256::new(), vec![0; CHUNK]);
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hex(&hash.finalize())),
            length => hash.update(&buffer[..length]),
        }
    }
}

/// Whether a run has come to its end.
pub fn is_finished(run: &Path) -> bool {
    final_folder(run).join(DONE).exists()
}

/// Finished checkpoints of a run, oldest first, with their steps.
pub fn checkpoints(run: &Path) -> Vec<(u64, PathBuf)> {
    let mut found = steps(run);
    found.retain(|(_, path)| path.join(DONE).exists());
    found.sort_unstable();
    found
}

/// Folders of checkpoints, be they finished or half removed.
fn steps(run: &Path) -> Vec<(u64, PathBuf)> {
    let entries = fs::read_dir(run.join("checkpoints")).into_iter().flatten().filter_map(Result::ok);
    let step = |path: &Path| path.file_name()?.to_str()?.strip_prefix("step-")?.parse().ok();
    entries.map(|entry| entry.path()).filter_map(|path| Some((step(&path)?, path))).collect()
}

/// Removes a checkpoint. `DONE` goes first, so that half a folder is never taken for one.
///
/// # Errors
/// When the system refuses.
pub fn remove_checkpoint(path: &Path) -> io::Result<()> {
    match fs::remove_file(path.join(DONE)) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
        _ => fs::remove_dir_all(path),
    }
}

/// Folder of the checkpoint of a step of a run.
pub fn checkpoint_folder(run: &Path, step: u64) -> PathBuf {
    run.join("checkpoints").join(format!("step-{step}"))
}

/// Folder of the finished model of a run.
pub fn final_folder(run: &Path) -> PathBuf {
    run.join("final")
}

/// A run directory, locked.
#[derive(Debug)]
pub struct Directory {
    path: PathBuf,
    _lock: File,
}

/// What a run directory holds when a run begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    /// Nothing yet.
    New,
    /// A run that was interrupted; the step of its last checkpoint, 0 for none, and what was logged after it.
    Interrupted(u64, Logged),
    /// A finished run.
    Finished,
}

/// What the logs have of a step beside the step itself.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Logged {
    /// An evaluation.
    pub evaluated: bool,
    /// Answers to the prompts.
    pub sampled: bool,
}

impl Directory {
    /// Opens or makes a run directory and takes its lock.
    ///
    /// # Errors
    /// When it cannot be made, holds something else, or another process works in it.
    pub fn open(path: &Path) -> Result<Directory, Error> {
        let failed = |message: String, hint: Option<&str>| Error::run(path, message, hint);
        fs::create_dir_all(path).map_err(|error| {
            failed(format!("cannot make the run directory: {error}"), Some("give another `--out`"))
        })?;
        let foreign = fs::read_dir(path)
            .map_err(|error| failed(format!("cannot read the run directory: {error}"), None))?
            .filter_map(Result::ok)
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .find(|name| !name.starts_with('.'));
        if let (Some(name), false) = (foreign, path.join(MANIFEST).exists()) {
            return Err(failed(
                format!("holds `{name}` and is no run of temper"),
                Some("give `--out` a new or an empty directory"),
            ));
        }
        let lock = File::create(path.join(".lock"))
            .map_err(|error| failed(format!("cannot make the lock file: {error}"), None))?;
        match lock.try_lock() {
            Ok(()) => Ok(Directory { path: path.to_owned(), _lock: lock }),
            Err(TryLockError::WouldBlock) => Err(failed(
                "another process trains in it".into(),
                Some("wait for it, or give another `--out`"),
            )),
            Err(TryLockError::Error(error)) => Err(failed(format!("cannot be locked: {error}"), None)),
        }
    }

    /// Compares the manifest there with this run's, and writes it when there is none. `manifest["run"]` decides
    /// the numbers and must be equal; the rest may differ, and is the newest command's from then on.
    ///
    /// # Errors
    /// Names every key that differs; or when the manifest cannot be read or written.
    pub fn begin(&self, manifest: &Value) -> Result<Found, Error> {
        let path = self.path.join(MANIFEST);
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == ErrorKind::NotFound => {
                write_json(&path, manifest)
                    .map_err(|error| self.failed(error.to_string(), error.hint().as_deref()))?;
                return Ok(Found::New);
            }
            Err(error) => return Err(self.failed(format!("cannot read {MANIFEST}: {error}"), None)),
        };
        let earlier: Value = serde_json::from_slice(&bytes)
            .map_err(|error| self.failed(format!("{MANIFEST} is damaged: {error}"), None))?;
        let empty = Map::new();
        let [then, now] = [&earlier, manifest].map(|manifest| manifest["run"].as_object().unwrap_or(&empty));
        let keys = then.keys().chain(now.keys().filter(|key| !then.contains_key(*key)));
        let show = |value: Option<&Value>| value.map_or_else(|| "nothing".to_owned(), Value::to_string);
        let differing: Vec<String> = keys
            .map(|key| (key, then.get(key), now.get(key)))
            .filter(|(_, then, now)| then != now)
            .map(|(key, then, now)| match then.is_some_and(is_hash) && now.is_some_and(is_hash) {
                true => format!("\n  {key}: another content"),
                false => format!("\n  {key}: {} there, {} now", show(then), show(now)),
            })
            .collect();
        if !differing.is_empty() {
            let hint = "give the same settings to go on with that run, or another `--out` for a new one";
            return Err(
                self.failed(format!("is a run with other settings:{}", differing.concat()), Some(hint))
            );
        }
        if is_finished(&self.path) {
            let hint = "remove `final`; the same command makes it again, from the last checkpoint";
            let folder = final_folder(&self.path);
            check_done(&folder).map_err(|message| Error::run(&folder, message, Some(hint)))?;
            return Ok(Found::Finished);
        }
        self.renew(&earlier, manifest)?;
        let step = checkpoints(&self.path).last().map_or(0, |&(step, _)| step);
        let has = |name: &str, key: &str| {
            let lines = lines(&self.path.join(name));
            step > 0 && lines.iter().any(|line| line["step"] == step && line.get(key).is_some())
        };
        let (evaluated, sampled) = (has(METRICS, "eval_loss"), has(SAMPLES, "answer"));
        Ok(Found::Interrupted(step, Logged { evaluated, sampled }))
    }

    /// Takes the newest command's settings into the manifest of a run that goes on.
    fn renew(&self, earlier: &Value, manifest: &Value) -> Result<(), Error> {
        let mut renewed = earlier.clone();
        for (key, value) in manifest.as_object().into_iter().flatten() {
            renewed[key] = value.clone();
        }
        if renewed == *earlier {
            return Ok(());
        }
        write_json(&self.path.join(MANIFEST), &renewed)
            .map_err(|error| self.failed(error.to_string(), error.hint().as_deref()))
    }

    /// Writes how the run ended, or removes what is there of an earlier end. The run itself needs none of it: what cannot be
    /// written is left away.
    pub(super) fn note_end(&self, ended: Option<&Ended>) {
        let path = self.path.join(ENDED);
        let how = match ended {
            None => return drop(fs::remove_file(path)),
            Some(Ended::Stopped(step)) => json!({ "stopped": step }),
            Some(Ended::Failed(why)) => json!({ "failed": why }),
        };
        drop(write_json(&path, &how));
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Removes all but the newest `keep` checkpoints, and what an interrupted removal left of others.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn remove_old(&self, keep: usize) -> Result<(), Error> {
        let mut old = checkpoints(&self.path);
        old.truncate(old.len().saturating_sub(keep.max(1)));
        let whole = |(_, path): &(u64, PathBuf)| path.join(DONE).exists();
        old.extend(steps(&self.path).into_iter().filter(|step| !whole(step)));
        for (_, path) in &old {
            remove_checkpoint(path)
                .map_err(|error| self.failed(format!("cannot remove `{}`: {error}", path.display()), None))?;
        }
        Ok(())
    }

    /// A file of lines without those of steps after `step` and without damaged ones, such as half a last line, open for
    /// appending. Before the first checkpoint there is nothing to keep.
    ///
    /// # Errors
    /// When it cannot be read or written.
    pub fn log(&self, name: &'static str, step: u64) -> Result<Log, Error> {
        let path = self.path.join(name);
        let failed = |error: std::io::Error| self.failed(format!("cannot write {name}: {error}"), None);
        let there = match fs::read(&path) {
            Ok(bytes) => Some(bytes),
            Err(error) if error.kind() == ErrorKind::NotFound => None,
            Err(error) => return Err(self.failed(format!("cannot read {name}: {error}"), None)),
        };
        if let Some(bytes) = there {
            // A line that a power cut left half written may be anything.
            let text = String::from_utf8_lossy(&bytes);
            let of_step = |line: &str| serde_json::from_str::<Value>(line).ok()?["step"].as_u64();
            let kept: Vec<&str> =
                text.lines().filter(|line| of_step(line).is_some_and(|at| step > 0 && at <= step)).collect();
            write_atomic(&path, |file| kept.iter().try_for_each(|line| writeln!(file, "{line}")))
                .map_err(|error| self.failed(error.to_string(), error.hint().as_deref()))?;
        }
        let file = File::options().append(true).create(true).open(&path).map_err(failed)?;
        Ok(Log { file, name, path: self.path.clone() })
    }

    fn failed(&self, message: String, hint: Option<&str>) -> Error {
        Error::run(&self.path, message, hint)
    }
}

/// An open file of lines.
#[derive(Debug)]
pub struct Log {
    file: File,
    name: &'static str,
    path: PathBuf,
}

impl Log {
    /// The lines that are there.
    pub fn lines(&self) -> Vec<Value> {
        lines(&self.path.join(self.name))
    }

    /// Adds lines, in one write: all or, at worst, a damaged one.
    ///
    /// # Errors
    /// When the system refuses, on a full disk for example.
    pub fn add(&mut self, lines: &[Value]) -> Result<(), Error> {
        let failed = |error: std::io::Error| {
            Error::run(&self.path, format!("cannot write {}: {error}", self.name), None)
        };
        let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
        self.file.write_all(text.as_bytes()).map_err(failed)
    }
}

/// The objects of a file with one a line; none when there is no such file, nor of damaged lines.
pub fn lines(path: &Path) -> Vec<Value> {
    let bytes = fs::read(path).unwrap_or_default();
    bytes.split(|&byte| byte == b'\n').filter_map(|line| serde_json::from_slice(line).ok()).collect()
}
