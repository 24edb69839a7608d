//! A run directory as a report sees it. Once it is known to be a run, reading never fails: what is missing,
//! damaged or gone is left out, and a note says so.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use serde_json::Value;
use temper::train::directory::{self, Ended};

use super::metrics::Metrics;
use crate::output::{grouped, hinted, say};
use crate::ranks::cores;

/// Letters of a name, at most.
const NAME: usize = 36;

/// A run.
#[derive(Debug, Default)]
pub struct Run {
    /// The directory's name, with as much of its path as tells it from the others.
    pub name: String,
    pub path: PathBuf,
    /// `manifest.json`; null without.
    pub manifest: Value,
    pub metrics: Metrics,
    /// Answers given on the way.
    pub samples: Vec<Sample>,
    /// Whether the final model is there.
    pub finished: bool,
    /// How it ended without.
    pub ended: Option<Ended>,
    /// What could not be read.
    pub notes: Vec<String>,
}

/// An answer to a prompt after a step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sample {
    pub step: u64,
    pub prompt: String,
    pub answer: String,
}

/// Reads the runs in these directories, each once. Files beside them are left out: `runs/*` has logs too.
pub fn read(paths: &[PathBuf]) -> Result<Vec<Run>> {
    let mut seen = BTreeSet::new();
    let mut places = Vec::new();
    let (files, folders): (Vec<&PathBuf>, Vec<&PathBuf>) = paths.iter().partition(|path| path.is_file());
    for path in if folders.is_empty() { &files } else { &folders } {
        for run in find(path)? {
            let place = run.canonicalize().unwrap_or(run);
            if seen.insert(place.clone()) {
                places.push(place);
            }
        }
    }
    if !folders.is_empty() && !files.is_empty() {
        let names: Vec<String> = files.iter().map(|file| file.display().to_string()).collect();
        say("", format!("left out, as files are no runs: {}", names.join(", ")));
    }
    // Reading is parsing, so that runs share the cores.
    let mut runs: Vec<Run> = Vec::new();
    for group in places.chunks(cores()) {
        std::thread::scope(|scope| {
            let readers: Vec<_> = group.iter().map(|place| scope.spawn(|| Run::read(place))).collect();
            runs.extend(readers.into_iter().map(|reader| reader.join().unwrap_or_default()));
        });
    }
    for (run, name) in runs.iter_mut().zip(names(&places)) {
        run.name = name;
    }
    Ok(runs)
}

/// The run that a directory is, or the runs in it.
fn find(path: &Path) -> Result<Vec<PathBuf>> {
    let is_run =
        |path: &Path| path.join(directory::MANIFEST).exists() || path.join(directory::METRICS).exists();
    if is_run(path) {
        return Ok(vec![path.to_owned()]);
    }
    let below = fs::read_dir(path).into_iter().flatten().flatten().map(|entry| entry.path());
    let mut runs: Vec<PathBuf> = below.filter(|path| is_run(path)).collect();
    if !runs.is_empty() {
        runs.sort_by_cached_key(|path| natural(path));
        return Ok(runs);
    }
    let shown = path.display();
    let place = path.canonicalize().unwrap_or_default();
    let hint = match place.parent().filter(|parent| is_run(parent)) {
        Some(parent) => format!("give the run that it belongs to: `{}`", parent.display()),
        None => "a run is the directory that was given to `--out` of sft, dpo or pretrain".into(),
    };
    let message = match path.exists() {
        true => format!("`{shown}` is no run: it has neither manifest.json nor metrics.jsonl"),
        false => format!("`{shown}` does not exist"),
    };
    bail!(hinted(message, hint))
}

impl Run {
    /// Reads what is there.
    fn read(path: &Path) -> Run {
        let mut run = Run { path: path.to_owned(), ..Run::default() };
        run.finished = directory::is_finished(path);
        run.ended = directory::ended(path).filter(|_| !run.finished);
        run.note_failure();
        if let Some(bytes) = run.file(directory::MANIFEST, "its settings are not known") {
            match serde_json::from_slice(&bytes) {
                Ok(manifest) => run.manifest = manifest,
                Err(error) => run.notes.push(format!("manifest.json is damaged: {error}")),
            }
        }
        if let Some(bytes) = run.file(directory::METRICS, "no step is done yet, or it was removed") {
            let consumed = run.metrics.extend(&bytes);
            run.note_metrics(consumed < bytes.len());
        }
        if path.join(directory::SAMPLES).exists()
            && let Some(bytes) = run.file(directory::SAMPLES, "it was removed")
        {
            run.read_samples(&bytes);
        }
        run
    }

    /// A file's bytes; a note where it cannot be read.
    fn file(&mut self, name: &str, without: &str) -> Option<Vec<u8>> {
        match fs::read(self.path.join(name)) {
            Ok(bytes) => return Some(bytes),
            Err(error) if error.kind() == ErrorKind::NotFound => {
                self.notes.push(format!("there is no {name}: {without}"));
            }
            Err(error) => self.notes.push(format!("{name} cannot be read: {error}")),
        }
        None
    }

    /// Notes why it failed.
    pub fn note_failure(&mut self) {
        if let Some(Ended::Failed(why)) = &self.ended {
            self.notes.push(format!("failed: {why}"));
        }
    }

    /// How far it came, in a word. A run that goes on, and one that was killed, look alike.
    pub fn state(&self) -> &'static str {
        match &self.ended {
            _ if self.finished => "finished",
            Some(Ended::Failed(_)) => "failed",
            Some(Ended::Stopped(_)) => "stopped",
            None => "unfinished",
        }
    }

    /// Notes what of the metrics could not be read.
    pub fn note_metrics(&mut self, half_a_line: bool) {
        let Metrics { damaged, not_finite, .. } = self.metrics;
        if damaged > 0 {
            self.notes.push(format!("metrics.jsonl: {} damaged, left out", counted(damaged, "line")));
        }
        if half_a_line {
            self.notes.push("metrics.jsonl: half a last line left out".into());
        }
        if not_finite > 0 {
            let values = counted(not_finite, "value");
            self.notes.push(format!("metrics.jsonl: {values} not finite, left out"));
        }
    }

    /// Takes the answers from lines.
    pub fn read_samples(&mut self, bytes: &[u8]) {
        let mut damaged = 0;
        for line in bytes.split(|&byte| byte == b'\n').filter(|line| !line.trim_ascii().is_empty()) {
            let line: Value = serde_json::from_slice(line).unwrap_or_default();
            match (line["step"].as_u64(), line["prompt"].as_str(), line["answer"].as_str()) {
                (Some(step), Some(prompt), Some(answer)) => {
                    self.samples.push(Sample { step, prompt: prompt.to_owned(), answer: answer.to_owned() })
                }
                _ => damaged += 1,
            }
        }
        if damaged > 0 {
            self.notes.push(format!("samples.jsonl: {} damaged, left out", counted(damaged, "line")));
        }
    }

    /// The verb that trained it; empty when that is not known.
    pub fn verb(&self) -> &str {
        self.manifest["verb"].as_str().unwrap_or_default()
    }

    /// The last step done.
    pub fn steps(&self) -> u64 {
        let last = |name| self.metrics.points(name).last().map_or(0.0, |point| point.0);
        last("loss").max(last("eval_loss")) as u64
    }

    /// The steps that were asked for, where the manifest says them.
    pub fn planned(&self) -> Option<u64> {
        let asked = || self.manifest["settings"]["max_steps"]["value"].as_u64();
        self.manifest["steps"].as_u64().or_else(asked)
    }

    /// Seconds of training up to each step.
    pub fn seconds(&self) -> Vec<(f64, f64)> {
        let add = |sum: &mut f64, &(step, seconds): &(f64, f64)| {
            *sum += seconds;
            Some((step, *sum))
        };
        self.metrics.points("seconds").iter().scan(0.0, add).collect()
    }
}

/// A key by which `run-2` comes before `run-10`: letters and the numbers behind them, and for equal ones the path itself.
pub fn natural(path: &Path) -> (Vec<(String, u64)>, PathBuf) {
    let text = path.to_string_lossy();
    let is_digit = |letter: char| letter.is_ascii_digit();
    let mut parts = Vec::new();
    let mut rest = &text[..];
    while !rest.is_empty() {
        let (letters, tail) = rest.split_at(rest.find(is_digit).unwrap_or(rest.len()));
        let (digits, tail) = tail.split_at(tail.find(|letter| !is_digit(letter)).unwrap_or(tail.len()));
        parts.push((
            letters.to_owned(),
            digits.parse().unwrap_or(if digits.is_empty() { 0 } else { u64::MAX }),
        ));
        rest = tail;
    }
    (parts, path.to_owned())
}

/// A number and its word.
pub fn counted(count: usize, word: &str) -> String {
    format!("{} {word}{}", grouped(count as u64), if count == 1 { "" } else { "s" })
}

/// A name for each path: its last parts, as many as it takes to differ from all others.
pub fn names(paths: &[PathBuf]) -> Vec<String> {
    let last = |path: &Path, parts: usize| {
        let all: Vec<_> = path.components().map(|part| part.as_os_str().to_string_lossy()).collect();
        all[all.len().saturating_sub(parts)..].join("/").replace("//", "/")
    };
    let mut parts = vec![1; paths.len()];
    // Paths differ, so that this ends when whole paths are compared at the latest.
    loop {
        let names: Vec<String> = paths.iter().zip(&parts).map(|(path, &parts)| last(path, parts)).collect();
        let mut by_name: BTreeMap<String, Vec<usize>> = BTreeMap::new();
        for (at, name) in names.iter().enumerate() {
            by_name.entry(shortened(name)).or_default().push(at);
        }
        let alike: Vec<usize> = by_name.into_values().filter(|alike| alike.len() > 1).flatten().collect();
        let longer: Vec<usize> =
            alike.iter().copied().filter(|&at| parts[at] < paths[at].components().count()).collect();
        if longer.is_empty() {
            let number = |at: usize| alike.contains(&at).then(|| format!("{}: ", at + 1));
            let name = |(at, name): (usize, &String)| number(at).unwrap_or_default() + &shortened(name);
            return names.iter().enumerate().map(name).collect();
        }
        longer.into_iter().for_each(|at| parts[at] += 1);
    }
}

/// A name without its middle when it is long.
fn shortened(name: &str) -> String {
    let letters: Vec<char> = name.chars().collect();
    if letters.len() <= NAME {
        return name.to_owned();
    }
    let half = (NAME - 1) / 2;
    let part = |letters: &[char]| letters.iter().collect::<String>();
    format!("{}…{}", part(&letters[..half]), part(&letters[letters.len() - half..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(paths: &[&str]) -> Vec<String> {
        names(&paths.iter().map(PathBuf::from).collect::<Vec<_>>())
    }

    #[test]
    fn names_are_short_and_differ() {
        assert_eq!(named(&["/runs/a", "/runs/b"]), ["a", "b"]);
        assert_eq!(named(&["/x/a", "/y/a", "/y/b"]), ["x/a", "y/a", "b"]);
        assert_eq!(named(&["/a", "/b/a"]), ["/a", "b/a"]);
        let long = "x".repeat(80);
        let [first, second] = [format!("/{long}1{long}"), format!("/{long}2{long}")];
        let names = named(&[&first, &second]);
        assert!(
            names[0] != names[1] && names.iter().all(|name| name.chars().count() < NAME + 5),
            "{names:?}"
        );
    }

    #[test]
    fn runs_are_in_the_order_of_their_numbers() {
        let mut paths = ["r/10", "r/9", "r/9b", "r", "r/a", "r/9/x"].map(Path::new);
        paths.sort_by_cached_key(|path| natural(path));
        assert_eq!(paths, ["r", "r/9", "r/9/x", "r/9b", "r/10", "r/a"].map(Path::new));
    }

    #[test]
    fn a_run_that_is_gone_has_no_points_and_says_so() {
        let run = Run::read(Path::new("/nowhere/at/all"));
        assert_eq!((run.steps(), run.planned(), run.finished), (0, None, false));
        assert_eq!(run.metrics.columns().count(), 0);
        assert!(run.notes.iter().any(|note| note.contains(directory::METRICS)), "{:?}", run.notes);
    }
}
