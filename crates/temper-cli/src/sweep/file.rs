//! The file of a sweep, read and checked key by key, with the line of whatever is wrong.

use std::fmt::Display;
use std::path::{Path, PathBuf};

use anyhow::Result;
use toml::Spanned;
use toml::de::{DeArray, DeTable, DeValue};

use super::space::{Axis, Space, Values};
use crate::config::{Key, nearest, scalar};
use crate::output::hinted;

/// What the file says.
#[derive(Debug)]
pub struct Sweep {
    /// The file.
    pub file: PathBuf,
    /// The verb of all runs.
    pub verb: String,
    /// Folder of the sweep.
    pub out: PathBuf,
    /// The key of metrics.jsonl that decides.
    pub metric: String,
    /// Which end of it is good, if the file says so.
    pub goal: Option<Goal>,
    /// Options of all runs.
    pub base: Vec<Key>,
    /// What varies.
    pub space: Space,
    /// When worse runs are stopped.
    pub halving: Option<Halving>,
}

impl Sweep {
    /// What is wrong with the whole of it, and what to do.
    pub fn wrong(&self, message: impl Display, hint: &str) -> anyhow::Error {
        hinted(format!("`{}`: {message}", self.file.display()), hint)
    }

    /// What is wrong with a key.
    pub fn wrong_at(&self, key: &Key, message: impl Display, hint: &str) -> anyhow::Error {
        let message = format!("`{}` line {}: {message}", self.file.display(), key.line);
        hinted(message, hint)
    }
}

/// Which values of a metric are good.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Goal {
    /// Low ones.
    Min,
    /// High ones.
    Max,
}

/// Successive halving.
#[derive(Debug, Clone, Copy)]
pub struct Halving {
    /// Share of a run's steps until the first cut.
    pub first: f64,
    /// Share of the runs that go on after a cut.
    pub keep: f64,
}

impl Halving {
    /// The cuts of so many runs: the share of its steps that each run has made, and how many go on.
    pub fn cuts(self, runs: usize) -> Vec<(f64, usize)> {
        let mut cuts = Vec::new();
        let (mut share, mut alive) = (self.first, runs);
        while share < 1.0 {
            let kept = (alive as f64 * self.keep).ceil() as usize;
            if kept < alive {
                cuts.push((share, kept));
            }
            (share, alive) = (share / self.keep, kept);
        }
        cuts
    }
}

const KEYS: [&str; 10] =
    ["verb", "out", "metric", "goal", "samples", "seed", "base", "space", "runs", "halving"];

type Table<'a> = DeTable<'a>;
type Value<'a> = Spanned<DeValue<'a>>;

/// Reads a file.
///
/// # Errors
/// With the line of what is wrong, and what to write instead.
pub fn read(file: &Path) -> Result<Sweep> {
    let text = std::fs::read_to_string(file).map_err(|error| {
        hinted(
            format!("cannot read `{}`: {error}", file.display()),
            "`temper sweep --help` shows what the file looks like",
        )
    })?;
    let table = DeTable::parse(&text).map_err(|error| {
        hinted(
            format!("`{}` is not TOML: {}", file.display(), error.to_string().trim_end()),
            "`temper sweep --help` shows what the file looks like",
        )
    })?;
    Reader { file, text: &text }.sweep(table.get_ref())
}

/// The text, for the lines of what stands in it.
struct Reader<'a> {
    file: &'a Path,
    text: &'a str,
}

impl Reader<'_> {
    fn sweep(&self, table: &Table<'_>) -> Result<Sweep> {
        self.known(table, &KEYS, "a sweep")?;
        let verb = self.word(table, "verb")?.ok_or_else(|| self.missing("verb", "verb = \"sft\""))?;
        if !["sft", "dpo", "pretrain"].contains(&verb.as_str()) {
            return Err(self.wrong(
                &table["verb"],
                format!("there is no training verb `{verb}`"),
                "expected sft, dpo or pretrain",
            ));
        }
        let goal = match self.word(table, "goal")?.as_deref() {
            None => None,
            Some("min") => Some(Goal::Min),
            Some("max") => Some(Goal::Max),
            Some(other) => {
                let message = format!("there is no goal `{other}`");
                return Err(self.wrong(&table["goal"], message, "expected \"min\" or \"max\""));
            }
        };
        Ok(Sweep {
            file: self.file.to_owned(),
            verb,
            out: self
                .word(table, "out")?
                .ok_or_else(|| {
                    self.missing("out", "out = \"sweeps/lr\", above [base]: a folder for all the runs")
                })?
                .into(),
            metric: self.word(table, "metric")?.unwrap_or_else(|| "eval_loss".into()),
            goal,
            base: table.get("base").map(|base| self.keys(base, "base")).transpose()?.unwrap_or_default(),
            space: self.space(table)?,
            halving: table.get("halving").map(|halving| self.halving(halving)).transpose()?,
        })
    }

    fn space(&self, table: &Table<'_>) -> Result<Space> {
        let samples = self.whole(table, "samples")?;
        let seed = self.whole(table, "seed")?;
        if let (None, Some(seed)) = (samples, table.get("seed")) {
            return Err(self.wrong(
                seed,
                "`seed` without `samples`",
                "give `samples = 20` to draw points of the space",
            ));
        }
        match (table.get("space"), table.get("runs")) {
            (Some(_), Some(runs)) => {
                Err(self.wrong(runs, "both [space] and [[runs]]", "give one of the two"))
            }
            (None, None) => Err(self.missing("space", "[space] with lists of values, or tables [[runs]]")),
            (None, Some(runs)) => {
                if let Some(samples) = table.get("samples") {
                    return Err(self.wrong(
                        samples,
                        "`samples` of a list of runs",
                        "points are drawn of a [space]",
                    ));
                }
                let DeValue::Array(runs) = runs.get_ref() else {
                    return Err(self.wrong(
                        runs,
                        "`runs` is no list",
                        "write one table [[runs]] for each run",
                    ));
                };
                let runs = runs.iter().map(|run| self.keys(run, "runs"));
                Ok(Space::List(runs.collect::<Result<_>>()?))
            }
            (Some(space), None) => {
                let axes = self.axes(space, samples.is_some())?;
                Ok(match samples {
                    Some(samples) => Space::Random { axes, samples, seed: seed.unwrap_or(0) },
                    None => Space::Grid(axes),
                })
            }
        }
    }

    fn axes(&self, space: &Value<'_>, drawn: bool) -> Result<Vec<Axis>> {
        let axes = in_order(self.table(space, "space")?).into_iter().map(|(name, value)| {
            let values = match value.get_ref() {
                DeValue::Array(values) => Values::List(self.list(name, values, value)?),
                DeValue::Table(range) if drawn => self.range(name, range, value)?,
                DeValue::Table(_) => {
                    let hint = "give `samples = 20` above [base] to draw from it, or a list of values";
                    return Err(self.wrong(
                        value,
                        format!("`{name}` is a range, and the space a grid"),
                        hint,
                    ));
                }
                _ => {
                    let hint = format!("write it in [base], or as a list: {name} = […]");
                    return Err(self.wrong(value, format!("`{name}` does not vary"), &hint));
                }
            };
            Ok(Axis { name: name.to_owned(), line: self.line(value), values })
        });
        let axes: Vec<Axis> = axes.collect::<Result<_>>()?;
        if axes.is_empty() {
            return Err(self.wrong(space, "the space is empty", "as learning_rate = [1e-5, 2e-5]"));
        }
        Ok(axes)
    }

    fn list(&self, name: &str, values: &DeArray<'_>, at: &Value<'_>) -> Result<Vec<String>> {
        if values.is_empty() {
            let message = format!("the list of `{name}` is empty");
            return Err(self.wrong(at, message, "give at least one value"));
        }
        let value = |value: &Value<'_>| {
            scalar(value.get_ref())
                .map_err(|what| self.wrong(value, format!("`{name}`: {what}"), "as [1e-5, 2e-5]"))
        };
        values.iter().map(value).collect()
    }

    fn range(&self, name: &str, range: &Table<'_>, at: &Value<'_>) -> Result<Values> {
        let hint =
            "{ log = [1e-6, 1e-4] }, { uniform = [0, 0.1] } or { whole = [4, 64] }, the lower end first";
        let wrong = || self.wrong(at, format!("`{name}`: expected the kind and the ends of a range"), hint);
        let (Some((kind, DeValue::Array(ends))), 1) =
            (range.iter().next().map(|(kind, ends)| (kind.get_ref(), ends.get_ref())), range.len())
        else {
            return Err(wrong());
        };
        let ends: Vec<f64> = ends.iter().filter_map(|end| scalar(end.get_ref()).ok()?.parse().ok()).collect();
        match (kind.as_ref(), &ends[..]) {
            ("log", &[low, high]) if 0.0 < low && low < high && high.is_finite() => {
                Ok(Values::Log(low, high))
            }
            ("uniform", &[low, high]) if low < high && (high - low).is_finite() => {
                Ok(Values::Uniform(low, high))
            }
            ("whole", &[low, high])
                if 0.0 <= low && low < high && high < 1e15 && low.fract() + high.fract() == 0.0 =>
            {
                Ok(Values::Whole(low as u64, high as u64))
            }
            _ => Err(wrong()),
        }
    }

    fn halving(&self, value: &Value<'_>) -> Result<Halving> {
        let table = self.table(value, "halving")?;
        self.known(table, &["first", "keep"], "[halving]")?;
        let share = |name: &str, default: f64| match table.get(name) {
            None => Ok(default),
            Some(value) => scalar(value.get_ref())
                .ok()
                .and_then(|text| text.parse().ok())
                .filter(|share| 0.0 < *share && *share < 1.0)
                .ok_or_else(|| {
                    self.wrong(value, format!("`{name}` is no share"), "a number between 0 and 1")
                }),
        };
        Ok(Halving { first: share("first", 0.25)?, keep: share("keep", 0.5)? })
    }

    /// A table of options.
    fn keys(&self, value: &Value<'_>, name: &str) -> Result<Vec<Key>> {
        let keys = in_order(self.table(value, name)?).into_iter().map(|(name, value)| {
            let text = scalar(value.get_ref()).map_err(|what| {
                self.wrong(value, format!("key `{name}`: {what}"), "lists of values stand in [space]")
            })?;
            Ok(Key { name: name.to_owned(), value: text, line: self.line(value) })
        });
        keys.collect()
    }

    fn table<'t, 's>(&self, value: &'t Value<'s>, name: &str) -> Result<&'t Table<'s>> {
        match value.get_ref() {
            DeValue::Table(table) => Ok(table),
            _ => Err(self.wrong(
                value,
                format!("`{name}` is no table"),
                &format!("write [{name}] on a line of its own"),
            )),
        }
    }

    fn word(&self, table: &Table<'_>, name: &str) -> Result<Option<String>> {
        let Some(value) = table.get(name) else { return Ok(None) };
        match value.get_ref() {
            DeValue::String(text) => Ok(Some(text.to_string())),
            _ => Err(self.wrong(value, format!("`{name}` is no text"), &format!("{name} = \"…\""))),
        }
    }

    fn whole<T: std::str::FromStr>(&self, table: &Table<'_>, name: &str) -> Result<Option<T>> {
        let Some(value) = table.get(name) else { return Ok(None) };
        match scalar(value.get_ref()).ok().and_then(|text| text.parse().ok()) {
            Some(number) => Ok(Some(number)),
            None => Err(self.wrong(value, format!("`{name}` is no whole number"), &format!("{name} = 20"))),
        }
    }

    /// That a table has no other keys.
    fn known(&self, table: &Table<'_>, keys: &[&str], what: &str) -> Result<()> {
        let Some((name, value)) = table.iter().find(|(name, _)| !keys.contains(&name.get_ref().as_ref()))
        else {
            return Ok(());
        };
        let hint = match nearest(keys.iter().copied(), name.get_ref()) {
            Some(nearest) => format!("the nearest is `{nearest}`"),
            None => format!("it reads {}; options of the runs stand in [base]", keys.join(", ")),
        };
        Err(self.wrong(value, format!("{what} reads no key `{}`", name.get_ref()), &hint))
    }

    fn line<T>(&self, at: &Spanned<T>) -> usize {
        1 + self.text[..at.span().start].matches('\n').count()
    }

    fn wrong<T>(&self, at: &Spanned<T>, message: impl Into<String>, hint: &str) -> anyhow::Error {
        let message = format!("`{}` line {}: {}", self.file.display(), self.line(at), message.into());
        hinted(message, hint)
    }

    fn missing(&self, name: &str, example: &str) -> anyhow::Error {
        let message = format!("`{}` has no `{name}`", self.file.display());
        hinted(message, example)
    }
}

/// The keys of a table as they stand in the file.
fn in_order<'t, 's>(table: &'t Table<'s>) -> Vec<(&'t str, &'t Value<'s>)> {
    let mut keys: Vec<_> = table.iter().map(|(name, value)| (name.get_ref().as_ref(), value)).collect();
    keys.sort_by_key(|(_, value)| value.span().start);
    keys
}
