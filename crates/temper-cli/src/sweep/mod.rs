//! `temper sweep`: many runs of one verb, and which of them is best.
//!
//! ```text
//! runs/NAME.toml           the configuration of a run
//! runs/NAME.log            what it said
//! runs/NAME/               its run directory
//! table.md, table.csv      all runs, the best first
//! best.toml                the best run's configuration
//! .lock                    held while a process works here
//! ```
//!
//! The state of a sweep is the state of its run directories and nothing else, so that it goes on after any end.

mod board;
mod child;
mod course;
mod file;
mod metric;
mod runs;
mod schedule;
mod share;
mod space;
mod table;

use std::collections::HashMap;
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result};
use temper::train::directory;

use crate::args;
use crate::interrupt::{self, Stopped};
use crate::output::{grouped, hinted, results, say, shell_word, warn};
use crate::ranks::cores;
use board::Board;
use child::Nursery;
use file::Sweep;
use runs::Planned;
use schedule::{Fate, Schedule};
use share::Kinship;
use table::Row;

/// Trains, compares, and says which run is best.
pub fn run(options: &args::Sweep) -> Result<()> {
    let sweep = file::read(&options.file)?;
    let runs = runs::plan(&sweep)?;
    let kinship = if sweep.halving.is_some() { Kinship::none(&runs) } else { Kinship::of(&runs) };
    if options.dry_run {
        return list(&sweep, &runs, &kinship);
    }
    runs.iter().try_for_each(|run| runs::check_files(&sweep, run))?;
    let _lock = lock(&sweep.out)?;
    let stop = interrupt::listen()?;
    let jobs = options.jobs.min(runs.len());
    let board = Board::new(&runs);
    let nursery = Nursery { sweep: &sweep, threads: threads(&runs, jobs), board: &board, stop };
    introduce(&sweep, &runs, &kinship, &nursery, jobs);
    let schedule = Schedule { runs: &runs, nursery, jobs };
    let fates = match sweep.halving {
        Some(halving) => schedule.halving(halving),
        None => schedule.families(&kinship.families),
    };
    if interrupt::has_come() {
        let done = runs.iter().filter(|run| run.is_finished()).count();
        return Err(Stopped::with(done, runs.len()).into());
    }
    conclude(&sweep, &runs, &fates)
}

/// One sweep at a time works in a folder, which has nothing else.
fn lock(out: &Path) -> Result<File> {
    let is_used = out.read_dir().is_ok_and(|mut entries| entries.next().is_some());
    if is_used && !out.join("runs").is_dir() {
        return Err(hinted(
            format!("`{}` is there and is no folder of a sweep", out.display()),
            "give another `out`",
        ));
    }
    std::fs::create_dir_all(out.join("runs"))
        .with_context(|| format!("cannot make the folder `{}`", out.display()))?;
    let lock = File::create(out.join(".lock"))
        .with_context(|| format!("cannot make the lock file in `{}`", out.display()))?;
    lock.try_lock().map_err(|_| {
        hinted(format!("another sweep works in `{}`", out.display()), "wait for it, or give another `out`")
    })?;
    Ok(lock)
}

/// Threads of each run: those of [base], or all cores, shared out.
fn threads(runs: &[Planned], jobs: usize) -> usize {
    let given = runs.first().and_then(|run| run.training().compute.threads);
    (given.unwrap_or_else(cores) / jobs).max(1)
}

/// Every run and its command, for `--dry-run`.
fn list(sweep: &Sweep, runs: &[Planned], kinship: &Kinship) -> Result<()> {
    let mut out = results();
    for (index, run) in runs.iter().enumerate() {
        let family =
            kinship.families.iter().find_map(|family| Some((family.longest, family.step_of(index)?)));
        let shared = family.map_or_else(String::new, |(longest, step)| {
            format!(": steps 1 to {step} are those of {}", runs[longest].name)
        });
        writeln!(out, "# {}{shared}\n{}", run.name, run.command(sweep))?;
    }
    out.flush()?;
    say_kinship(runs, kinship);
    Ok(())
}

fn introduce(sweep: &Sweep, runs: &[Planned], kinship: &Kinship, nursery: &Nursery<'_>, jobs: usize) {
    say("temper", format!("{} sweep", env!("CARGO_PKG_VERSION")));
    let done = runs.iter().filter(|run| run.is_finished()).count();
    let at_a_time = match jobs {
        1 => "one after the other".into(),
        jobs => format!("{jobs} at a time, with --threads {} each", nursery.threads),
    };
    let before = if done > 0 { format!("; {} were done before", grouped(done)) } else { String::new() };
    say("runs", format!("{} of {}, {at_a_time}{before}", grouped(runs.len()), sweep.verb));
    say_kinship(runs, kinship);
    if let Some(halving) = sweep.halving {
        let cut = |(share, kept): (f64, usize)| format!("{kept} after {:.0}%", 100.0 * share);
        let cuts: Vec<String> = halving.cuts(runs.len()).into_iter().map(cut).collect();
        let what = match cuts.is_empty() {
            true => format!("stops none of {} runs: `keep` and `first` leave nothing to cut", runs.len()),
            false => format!("of {} runs go on {} of their steps", runs.len(), cuts.join(", ")),
        };
        say("halving", what);
    }
}

/// Says how many steps are shared, and which runs of different lengths share none.
fn say_kinship(runs: &[Planned], kinship: &Kinship) {
    let others = || kinship.families.iter().flat_map(|family| &family.others);
    if others().count() > 0 {
        let steps = grouped(others().map(|(_, common)| common).sum::<u64>());
        let (count, length) = (grouped(others().count()), "that differ from them only in `max_steps`");
        say("shared", format!("{count} runs take {steps} steps from longer ones {length}"));
    }
    let Some(&(index, longer, common)) = kinship.apart.first() else { return };
    let [run, longer] = [index, longer].map(|index| &runs[index]);
    let why = match (run.steps(), longer.steps()) {
        (Some(_), Some(_)) => format!("the learning rates differ after step {}", grouped(common)),
        _ => "their steps are not given as `max_steps`".to_owned(),
    };
    let count = kinship.apart.len();
    let (run, longer) = (&run.name, &longer.name);
    say(
        "not shared",
        format!(
            "{count} runs differ from longer ones only in length and are trained whole: of `{run}` and `{longer}` {why}"
        ),
    );
}

/// The table, the best configuration, the report, and the runs that failed.
fn conclude(sweep: &Sweep, runs: &[Planned], fates: &[Fate]) -> Result<()> {
    warn_of_changes(runs);
    warn_of_measures(sweep, runs);
    let rows = table::rows(sweep, runs, fates);
    table::print(sweep, &rows)?;
    let files = table::write(sweep, &rows)?;
    let files: Vec<String> = files.iter().map(|path| format!("`{}`", path.display())).collect();
    say("written", files.join(", "));
    report(sweep, &rows)?;
    if let Some(best) = table::best(&rows) {
        say("best", format!("{}{}", best.run.name, table::decided(sweep, &rows)));
        let file = sweep.out.join("best.toml");
        say("next", format!("temper {} --config {}", sweep.verb, shell_word(file.display())));
    }
    let failed = runs.iter().zip(fates).filter_map(|(run, fate)| match fate {
        Fate::Failed(words) => Some(format!("\n`{}`: {words}", run.log().display())),
        _ => None,
    });
    let failed: Vec<String> = failed.collect();
    if failed.is_empty() {
        return Ok(());
    }
    Err(hinted(
        format!("{} of {} runs failed:{}", failed.len(), runs.len(), failed.concat()),
        "the same command tries them again",
    ))
}

/// Options that decide which tokens are read and trained of a file.
const OF_TOKENS: [&str; 4] = ["max_length", "truncation", "train_on", "chat_template"];

/// Warns where runs that were done before have read another content of a file than later ones. Of data the tokens are known
/// alone, so that only runs which make them alike can be compared.
fn warn_of_changes(runs: &[Planned]) {
    for option in ["model", "adapter", "reference", "data", "eval_data"] {
        let mut seen: HashMap<Vec<&str>, (String, &str)> = HashMap::new();
        for run in runs {
            let Some(content) = run.manifest().and_then(|it| Some(it["run"][option].as_str()?.to_owned()))
            else {
                continue;
            };
            let path = run.value(option);
            let key = [option, "model"].into_iter().chain(OF_TOKENS).map(|name| run.value(name)).collect();
            let (first, other) = seen.entry(key).or_insert_with(|| (content.clone(), &run.name));
            if *first != content {
                let runs = format!("`{other}` and `{}`", run.name);
                warn(format!("{runs} are not comparable: `{path}` was changed between them"));
                break;
            }
        }
    }
}

/// Warns where the loss that decides is another measure from run to run.
fn warn_of_measures(sweep: &Sweep, runs: &[Planned]) {
    if !["loss", "eval_loss"].contains(&sweep.metric.as_str()) {
        return;
    }
    let differs = |option: &&str| runs.iter().any(|run| run.value(option) != runs[0].value(option));
    let of_loss = ["eval_data", "beta", "label_smoothing"].into_iter().chain(OF_TOKENS);
    let options: Vec<String> = of_loss.filter(differs).map(|option| format!("`{option}`")).collect();
    if !options.is_empty() {
        let instead = match &*sweep.verb {
            "dpo" => "; `eval_rewards/accuracies`, with goal = \"max\", depends on fewer options",
            _ => "",
        };
        let (metric, options) = (&sweep.metric, options.join(", "));
        warn(format!(
            "runs that differ in {options} have losses of different tokens or scales: the least `{metric}` need not be the best{instead}"
        ));
    }
}

/// A report over all runs that have begun, the best first, by the verb for it.
fn report(sweep: &Sweep, rows: &[Row<'_>]) -> Result<()> {
    let page = sweep.out.join("report.html");
    let folders = rows.iter().map(|row| &row.run.folder);
    let begun: Vec<_> = folders.filter(|folder| folder.join(directory::METRICS).exists()).collect();
    if begun.is_empty() {
        return Ok(());
    }
    let mut command = Command::new(std::env::current_exe().context("cannot find this program's own file")?);
    command.arg("report").args(begun).arg("--out").arg(&page);
    let status = command.stdin(Stdio::null()).stdout(Stdio::null()).status();
    if !status.context("cannot start `temper report`")?.success() {
        warn(format!("`temper report` did not write `{}`", page.display()));
    }
    Ok(())
}
