//! Runs that differ in nothing but their number of steps are in the same state for as long as their learning
//! rates are the same: the longest is trained, and the others begin where they leave its way.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use temper::checkpoint::save::{create_folder, write_atomic, write_json};
use temper::train::directory::{self, checkpoint_folder, checkpoints};

use super::runs::Planned;

/// Runs of one kind and different lengths.
#[derive(Debug)]
pub struct Family {
    /// The longest run, by its number.
    pub longest: usize,
    /// The others that begin on its way, each with the step where it leaves it; the earliest first.
    pub others: Vec<(usize, u64)>,
}

/// Runs by families, in the order of the first run of each; most families are a single run.
#[derive(Debug, Default)]
pub struct Kinship {
    /// All runs.
    pub families: Vec<Family>,
    /// Runs that have less than half of their steps in common with a longer one, and are trained whole; each with
    /// the longer one and the steps in common.
    pub apart: Vec<(usize, usize, u64)>,
}

impl Kinship {
    /// Every run by itself.
    pub fn none(runs: &[Planned]) -> Kinship {
        let single = |longest| Family { longest, others: Vec::new() };
        Kinship { families: (0..runs.len()).map(single).collect(), apart: Vec::new() }
    }

    /// Who shares with whom.
    pub fn of(runs: &[Planned]) -> Kinship {
        let kinds: Vec<_> = runs.iter().map(kind).collect();
        let mut kinship = Kinship::default();
        for first in 0..runs.len() {
            if kinds[..first].contains(&kinds[first]) {
                continue;
            }
            let alike = (first..runs.len()).filter(|&index| kinds[index] == kinds[first]);
            let longest = alike.clone().max_by_key(|&index| runs[index].steps()).unwrap_or(first);
            let mut others = Vec::new();
            for index in alike.filter(|&index| index != longest) {
                let common = runs[index].in_common(&runs[longest]);
                if 2 * common >= runs[index].steps().unwrap_or(u64::MAX) {
                    others.push((index, common));
                } else {
                    kinship.apart.push((index, longest, common));
                    kinship.families.push(Family { longest: index, others: Vec::new() });
                }
            }
            others.sort_by_key(|&(_, common)| common);
            kinship.families.push(Family { longest, others });
        }
        kinship.families.sort_by_key(Family::first);
        kinship
    }
}

impl Family {
    /// The step where a run leaves the longest one's way, if it begins on it.
    pub fn step_of(&self, run: usize) -> Option<u64> {
        self.others.iter().find(|other| other.0 == run).map(|other| other.1)
    }

    fn first(&self) -> usize {
        self.others.iter().map(|other| other.0).fold(self.longest, usize::min)
    }
}

/// What a run's own options say but for its length.
fn kind(run: &Planned) -> Vec<(&str, &str)> {
    let length = if run.steps().is_some() { "max_steps" } else { "epochs" };
    let own = run.own.iter().filter(|key| key.name != length);
    let mut kind: Vec<_> = own.map(|key| (key.name.as_str(), key.value.as_str())).collect();
    kind.sort_unstable();
    kind
}

/// Begins a run in the state that a longer one has after `step`, if that one's checkpoint of it is there. What
/// stands in its folder is what it would have written itself.
pub fn begin(run: &Planned, longer: &Planned, step: u64) -> Result<bool> {
    let state = checkpoint_folder(&longer.folder, step);
    if run.folder.exists() || !checkpoints(&longer.folder).contains(&(step, state.clone())) {
        return Ok(false);
    }
    let filled = create_folder(&run.folder, |folder| -> Result<()> {
        link_files(&state, &checkpoint_folder(folder, step))?;
        copy_lines(run, longer, step, folder)?;
        Ok(write_json(&folder.join(directory::MANIFEST), &manifest(run, longer, step)?)?)
    });
    filled.with_context(|| format!("cannot begin with the state `{}`", state.display()))?;
    Ok(true)
}

/// The same files under another name: a checkpoint is never changed, only removed.
fn link_files(from: &Path, to: &Path) -> std::io::Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        fs::hard_link(entry.path(), &target).or_else(|_| fs::copy(entry.path(), &target).map(|_| ()))?;
    }
    Ok(())
}

/// The longer run's metrics up to a step, with the evaluations that this run makes; and its answers.
fn copy_lines(run: &Planned, longer: &Planned, step: u64, folder: &Path) -> Result<()> {
    let every = run.training().evaluation.eval_steps;
    let last = run.steps().unwrap_or(0);
    // What stands at the end, the run itself will write.
    let early = |line: &Value| line["step"].as_u64().filter(|at| *at <= step && *at < last);
    let evaluated =
        |line: &Value| early(line).is_some_and(|at| at == 0 || every > 0 && at.is_multiple_of(every));
    let trained =
        |line: &Value| line["loss"].is_number() && line["step"].as_u64().is_some_and(|at| at <= step);
    write_lines(longer, folder, directory::METRICS, |line| trained(line) || evaluated(line))?;
    write_lines(longer, folder, directory::SAMPLES, |line| early(line).is_some())
}

/// Some lines of a file of the longer run, if it has the file.
fn write_lines(longer: &Planned, folder: &Path, name: &str, keep: impl Fn(&Value) -> bool) -> Result<()> {
    let lines = directory::lines(&longer.folder.join(name));
    if !lines.is_empty() {
        write_atomic(&folder.join(name), |file| {
            lines.iter().filter(|line| keep(line)).try_for_each(|line| writeln!(file, "{line}"))
        })?;
    }
    Ok(())
}

/// The longer run's manifest with this run's number of steps; the run compares it with its own before it goes on.
fn manifest(run: &Planned, longer: &Planned, step: u64) -> Result<Value> {
    let mut manifest = longer.manifest().context("its manifest cannot be read")?;
    manifest["run"]["max_steps"] = json!(run.steps());
    manifest["steps"] = json!(run.steps());
    manifest["settings"]["max_steps"]["value"] = json!(run.steps());
    manifest["settings"]["out"]["value"] = json!(run.folder.display().to_string());
    manifest["settings"]["stop_after"]["value"] = Value::Null;
    manifest["shared"] = json!({ "with": longer.name, "until": step });
    Ok(manifest)
}

/// Which run this one shares its beginning with, and until which step.
pub fn shared(run: &Planned) -> Option<(String, u64)> {
    let shared = &run.manifest()?["shared"];
    Some((shared["with"].as_str()?.to_owned(), shared["until"].as_u64()?))
}
