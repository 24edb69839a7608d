//! The runs of a sweep: their names, folders and configurations, all checked before the first one starts; and
//! which of them have steps in common.

use std::collections::{HashMap, HashSet};
use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::error::ErrorKind;
use serde_json::Value;
use temper::checkpoint::save::write_atomic;
use temper::optim::Schedule;
use temper::train::directory;
use toml::de::{DeTable, DeValue};

use super::file::Sweep;
use super::metric;
use super::space::Space;
use crate::args::{Scope, Training, Trains, Verb};
use crate::commands::train;
use crate::config::{Key, flag, parse_keys};
use crate::output::{hinted, shell_word};

/// Options that the sweep itself gives.
const OURS: [(&str, &str); 5] = [
    ("out", "`out` stands above [base]; each run has a folder of its own there"),
    ("config", "write its keys into [base]"),
    ("stop_after", "[halving] stops runs early"),
    ("quiet", "what a run says goes into its log"),
    ("json", "what a run does stands in its metrics.jsonl"),
];

/// Longest name of a run, in bytes; systems allow 255 for a file.
const NAME: usize = 150;

/// A run of a sweep.
#[derive(Debug)]
pub struct Planned {
    /// What is its own, as a name for files.
    pub name: String,
    /// What is its own.
    pub own: Vec<Key>,
    /// All its options, but for `out`.
    pub keys: Vec<Key>,
    /// The same, parsed.
    pub verb: Trains,
    /// Its run directory.
    pub folder: PathBuf,
}

impl Planned {
    /// What every verb that trains reads.
    pub fn training(&self) -> &Training {
        self.verb.training()
    }

    /// Its configuration, beside its folder.
    pub fn config(&self) -> PathBuf {
        beside(&self.folder, "toml")
    }

    /// What it says while it trains, beside its folder.
    pub fn log(&self) -> PathBuf {
        beside(&self.folder, "log")
    }

    /// Its manifest, once it has begun.
    pub fn manifest(&self) -> Option<Value> {
        directory::manifest(&self.folder)
    }

    /// Whether it has come to its end.
    pub fn is_finished(&self) -> bool {
        directory::is_finished(&self.folder)
    }

    /// Removes the checkpoints of a finished run at which only the sweep made it stop.
    pub fn remove_stops(&self) -> io::Result<()> {
        let every = self.training().saving.save_steps;
        let checkpoints = directory::checkpoints(&self.folder).into_iter();
        checkpoints
            .filter(|(step, _)| every == 0 || !step.is_multiple_of(every))
            .try_for_each(|(_, path)| directory::remove_checkpoint(&path))
    }

    /// Its steps, where its options say it.
    pub fn steps(&self) -> Option<u64> {
        self.training().optimisation.max_steps
    }

    /// An option's value as it was written; nothing where it was not.
    pub fn value(&self, name: &str) -> &str {
        self.keys.iter().find(|key| key.name == name).map_or("", |key| &key.value)
    }

    /// Its configuration with a run directory, below a comment.
    pub fn text(&self, sweep: &Sweep, folder: &Path, comment: &str) -> String {
        let keys = self.keys.iter().cloned().chain([out(folder)]);
        let lines = keys.map(|key| format!("{} = {}\n", key.name, literal(&key.value)));
        format!(
            "# {} of `temper sweep {}`\n{comment}{}",
            self.name,
            sweep.file.display(),
            lines.collect::<String>()
        )
    }

    /// Writes its configuration.
    pub fn write(&self, sweep: &Sweep) -> Result<()> {
        let comment = format!("# temper {} --config FILE\n", sweep.verb);
        let text = self.text(sweep, &self.folder, &comment);
        write_atomic(&self.config(), |file| file.write_all(text.as_bytes()))?;
        Ok(())
    }

    /// The command that trains it alone.
    pub fn command(&self, sweep: &Sweep) -> String {
        let keys = self.keys.iter().cloned().chain([out(&self.folder)]);
        let options = keys.map(|key| format!(" {} {}", flag(&key.name), shell_word(&key.value)));
        format!("temper {}{}", sweep.verb, options.collect::<String>())
    }

    /// Steps at the beginning of two runs that differ in nothing but their number of steps, at which they are in
    /// the same state.
    pub fn in_common(&self, longer: &Planned) -> u64 {
        let schedule = |run: &Planned| Some(train::schedule(&run.training().optimisation, run.steps()?));
        let (Some(own), Some(other)) = (schedule(self), schedule(longer)) else { return 0 };
        let equal = |step: &u64| rate(&own, *step) == rate(&other, *step);
        (1..=own.steps.min(other.steps)).take_while(equal).count() as u64
    }
}

/// The bits of a step's learning rate.
fn rate(schedule: &Schedule, step: u64) -> u64 {
    schedule.at(step).to_bits()
}

/// `NAME.toml` beside the folder `NAME`, whose name may have dots of its own.
fn beside(folder: &Path, extension: &str) -> PathBuf {
    let mut path = OsString::from(folder);
    path.push(format!(".{extension}"));
    path.into()
}

/// All runs of a sweep.
///
/// # Errors
/// When an option of any is wrong, two are the same, or the metric is one that they do not write.
pub fn plan(sweep: &Sweep) -> Result<Vec<Planned>> {
    let points = sweep.space.points();
    if let Space::Random { samples, .. } = sweep.space
        && points.len() < samples
    {
        let message = format!("{samples} samples of a space with {} different points", points.len());
        return Err(sweep.wrong(message, "leave `samples` away to take them all, or widen the space"));
    }
    if points.is_empty() {
        return Err(sweep.wrong("no run", "`samples` must be at least 1, and [[runs]] a table for each run"));
    }
    let mut runs: Vec<Planned> = Vec::new();
    let mut seen: HashMap<String, String> = HashMap::new();
    let mut names: HashSet<String> = HashSet::new();
    for own in points {
        let plain = name_of(&own);
        let numbered = (2..).map(|i| format!("{plain}-{i}"));
        let mut candidates = std::iter::once(plain.clone()).chain(numbered);
        let name = candidates.find(|name| names.insert(name.clone())).unwrap_or(plain);
        let (run, settings) = planned(sweep, name, own)?;
        if let Some(other) = seen.insert(settings, run.name.clone()) {
            let message = format!("`{other}` and `{}` are the same run", run.name);
            return Err(sweep.wrong(message, "leave one of them away"));
        }
        runs.push(run);
    }
    metric::check(sweep, &runs)?;
    if sweep.halving.is_some() && runs.iter().any(|run| run.steps().is_none()) {
        let hint = "give `max_steps` in [base]: the cuts are shares of it";
        return Err(sweep.wrong("[halving] of runs whose number of steps is not given", hint));
    }
    runs.iter().try_for_each(|run| check_earlier(sweep, run))?;
    Ok(runs)
}

/// That the files which a run reads are there, before another run has trained for hours.
pub fn check_files(sweep: &Sweep, run: &Planned) -> Result<()> {
    let names = [
        "model",
        "config_model",
        "adapter",
        "reference",
        "data",
        "eval_data",
        "sample_prompts",
        "chat_template",
    ];
    let is_file = |key: &Key| names.contains(&&*key.name) && !matches!(&*key.value, "" | "chatml");
    let missing = run.keys.iter().find(|key| is_file(key) && !Path::new(&key.value).exists());
    match missing {
        None => Ok(()),
        Some(key) => {
            let message = format!("`{}` of run `{}` does not exist: `{}`", key.name, run.name, key.value);
            Err(sweep.wrong_at(key, message, "paths begin where the command is given"))
        }
    }
}

/// A run, and all its settings as a text.
fn planned(sweep: &Sweep, name: String, own: Vec<Key>) -> Result<(Planned, String)> {
    let given = |key: &Key| own.iter().any(|other| other.name == key.name);
    let inherited = sweep.base.iter().filter(|key| !given(key));
    let keys: Vec<Key> = inherited.chain(&own).cloned().collect();
    for (ours, hint) in OURS {
        if let Some(key) = keys.iter().find(|key| key.name == ours) {
            return Err(sweep.wrong_at(key, format!("`{ours}` is the sweep's own"), hint));
        }
    }
    if let Some(key) = own.iter().find(|key| Scope::of(&key.name).is_free()) {
        let message = format!("`{}` changes no number of a run", key.name);
        return Err(sweep.wrong_at(key, message, "write it in [base]"));
    }
    let folder = sweep.out.join("runs").join(&name);
    let with_out = [&keys[..], &[out(&folder)]].concat();
    let (cli, settings) =
        parse_keys(&sweep.verb, &sweep.file, with_out).map_err(|error| refused(sweep, &name, &error))?;
    let Verb::Trains(verb) = cli.verb else {
        return Err(sweep.wrong(format!("`{}` does not train", sweep.verb), "expected sft, dpo or pretrain"));
    };
    let deciding = settings.list.iter().filter(|setting| setting.key != "out");
    let deciding = deciding.map(|setting| format!("{}={}", setting.key, setting.json()));
    let settings = deciding.collect::<Vec<_>>().join("\n");
    Ok((Planned { name, own, keys, verb, folder }, settings))
}

fn out(folder: &Path) -> Key {
    Key { name: "out".into(), value: folder.display().to_string(), line: 0 }
}

/// The first paragraph of what the parser says, without the verb's usage.
fn refused(sweep: &Sweep, run: &str, error: &clap::Error) -> anyhow::Error {
    let text = error.to_string();
    let text = text.split("\n\n").next().unwrap_or_default().trim_start_matches("error: ").trim();
    let file = format!("`{}`", sweep.file.display());
    let hint = match error.kind() {
        ErrorKind::MissingRequiredArgument if !text.contains(&file) => {
            "write them in [base], as model = \"…\"".into()
        }
        _ => format!("`temper {} --help` lists the options", sweep.verb),
    };
    let message = if text.contains(&file) { text.to_owned() } else { format!("{file}: run `{run}`: {text}") };
    hinted(message, hint)
}

/// `learning_rate=2e-5,max_steps=50`, safe as the name of a file.
fn name_of(own: &[Key]) -> String {
    let safe = |letter: char| letter.is_ascii_alphanumeric() || "._+-=,".contains(letter);
    let word = |key: &Key| {
        let last = Path::new(&key.value).file_name().map(|name| name.to_string_lossy());
        format!("{}={}", key.name, last.as_deref().unwrap_or(&key.value))
    };
    let name = own.iter().map(word).collect::<Vec<_>>().join(",");
    let mut name: String = name.chars().map(|letter| if safe(letter) { letter } else { '-' }).collect();
    name.truncate(NAME);
    if name.is_empty() { "base".into() } else { name }
}

/// That a run of this name that is there already is this one.
fn check_earlier(sweep: &Sweep, run: &Planned) -> Result<()> {
    let path = run.config();
    let Ok(text) = fs::read_to_string(&path) else { return Ok(()) };
    let deciding = |text: &str| {
        let lines = text.lines().filter(|line| !line.starts_with('#'));
        let key = |line: &str| line.split(" =").next().unwrap_or_default().to_owned();
        let lines = lines.filter(|line| !Scope::of(&key(line)).is_free());
        let mut lines: Vec<String> = lines.map(str::to_owned).collect();
        lines.sort();
        lines
    };
    let (then, now) = (deciding(&text), deciding(&run.text(sweep, &run.folder, "")));
    if then == now || !run.folder.exists() {
        return Ok(());
    }
    let only = |some: &[String], others: &[String]| {
        let only = some.iter().filter(|line| !others.contains(line)).cloned().collect::<Vec<_>>();
        if only.is_empty() { "nothing".to_owned() } else { only.join(", ") }
    };
    let message = format!(
        "`{}` was begun with other options: {} there, {} now",
        run.folder.display(),
        only(&then, &now),
        only(&now, &then)
    );
    Err(sweep.wrong(message, "give another `out` for a new sweep, or remove that run"))
}

/// A value as TOML has it.
fn literal(value: &str) -> String {
    let bare = format!("x = {value}");
    let number = DeTable::parse(&bare).is_ok_and(|table| {
        matches!(
            table.get_ref().get("x").map(|value| value.get_ref()),
            Some(DeValue::Integer(_) | DeValue::Float(_) | DeValue::Boolean(_))
        ) && table.get_ref().len() == 1
    });
    if number { value.to_owned() } else { toml::Value::String(value.to_owned()).to_string() }
}
