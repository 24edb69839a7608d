//! What a sweep shows while it runs: a bar for each run in progress on a terminal, plain lines elsewhere.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::course;
use super::runs::Planned;
use crate::output::{duration, grouped, say};
use crate::progress::has_bars;

/// How often a run's metrics are read.
const READ: Duration = Duration::from_millis(300);
/// Plain lines of a run come no closer together.
const BETWEEN_LINES: Duration = Duration::from_secs(10);

/// All runs of a sweep, as they are shown.
#[derive(Debug)]
pub struct Board {
    /// None where there is no terminal.
    bars: Option<MultiProgress>,
    /// Number of each run, from 1, by its name.
    numbers: HashMap<String, usize>,
}

impl Board {
    /// A board for these runs.
    pub fn new(runs: &[Planned]) -> Board {
        let numbers = runs.iter().enumerate().map(|(index, run)| (run.name.clone(), index + 1));
        Board {
            bars: has_bars().then(|| MultiProgress::with_draw_target(ProgressDrawTarget::stderr())),
            numbers: numbers.collect(),
        }
    }

    /// A run begins.
    pub fn begin<'a>(&'a self, run: &'a Planned, stop_after: Option<u64>) -> Line<'a> {
        let style = ProgressStyle::with_template("{prefix:>10}  {bar:16} {pos}/{len}  {wide_msg}");
        let bar = self.bars.as_ref().map(|bars| {
            let bar = bars.add(ProgressBar::new(run.steps().unwrap_or(0)).with_prefix(self.label(run)));
            let bar = if let Ok(style) = style { bar.with_style(style) } else { bar };
            bar.with_message(run.name.clone())
        });
        let now = Instant::now();
        let first = course::last_line(&run.folder).and_then(|line| line["step"].as_u64()).unwrap_or(0);
        let line =
            Line { board: self, run, stop_after, bar, begun: now, first, last: Mutex::new((now, now)) };
        let end = stop_after.or(run.steps());
        if line.bar.is_none() && end != Some(first) {
            let begins =
                if first > 0 { format!("goes on after step {}", grouped(first)) } else { "begins".into() };
            let until = stop_after.map_or_else(String::new, |step| format!(", until step {}", grouped(step)));
            line.say(&format!("{begins}{until}"));
        }
        line
    }

    /// Says something of a run.
    pub fn say(&self, run: &Planned, text: &str) {
        let write = || say(&self.label(run), format!("{}  {text}", run.name));
        match &self.bars {
            Some(bars) => bars.suspend(write),
            None => write(),
        }
    }

    fn label(&self, run: &Planned) -> String {
        format!("{}/{}", self.numbers.get(&run.name).unwrap_or(&0), self.numbers.len())
    }
}

/// A run in progress.
#[derive(Debug)]
pub struct Line<'a> {
    board: &'a Board,
    run: &'a Planned,
    stop_after: Option<u64>,
    bar: Option<ProgressBar>,
    begun: Instant,
    first: u64,
    /// When the metrics were read, and a plain line was written.
    last: Mutex<(Instant, Instant)>,
}

impl Line<'_> {
    /// Says something of this run.
    pub fn say(&self, text: &str) {
        self.board.say(self.run, text);
    }

    /// Shows how far the run is, now and then.
    pub fn look(&self) {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if last.0.elapsed() < READ {
            return;
        }
        last.0 = Instant::now();
        let Some(line) = course::last_line(&self.run.folder) else { return };
        let step = line["step"].as_u64().unwrap_or(0);
        let steps = self.run.steps().unwrap_or_else(|| self.steps(step, line["epoch"].as_f64()));
        let done = step.saturating_sub(self.first);
        let left = self.stop_after.unwrap_or(steps).saturating_sub(step) as f64;
        let left = left * self.begun.elapsed().as_secs_f64() / done.max(1) as f64;
        let left = if done > 0 { format!("  {} left", duration(left)) } else { String::new() };
        let loss = line["loss"].as_f64().unwrap_or(f64::NAN);
        match &self.bar {
            Some(bar) => {
                bar.set_length(steps);
                bar.set_position(step);
                bar.set_message(format!("loss {loss:.4}{left}  {}", self.run.name));
            }
            None if last.1.elapsed() >= BETWEEN_LINES => {
                last.1 = Instant::now();
                self.say(&format!("step {}/{}  loss {loss:.4}{left}", grouped(step), grouped(steps)));
            }
            None => {}
        }
    }

    /// Steps of a run whose length is in epochs, from a step and how many epochs are done after it.
    fn steps(&self, step: u64, epoch: Option<f64>) -> u64 {
        let epochs = self.run.training().optimisation.epochs;
        let an_epoch = epoch.map_or(0.0, |epoch| (step as f64 / epoch).round());
        (epochs * an_epoch).ceil() as u64
    }
}

impl Drop for Line<'_> {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
