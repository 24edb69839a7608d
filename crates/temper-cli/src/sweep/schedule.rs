//! Who runs when: family by family, or all runs up to a cut, again and again, with fewer of them after each.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use super::child::{Ended, Nursery};
use super::course;
use super::file::Halving;
use super::metric::Standing;
use super::runs::Planned;
use super::share::{self, Family};
use crate::output::grouped;

/// What became of a run.
#[derive(Debug, Clone, PartialEq)]
pub enum Fate {
    /// It came to its end.
    Finished,
    /// It was stopped after this step, and why.
    Stopped(u64, String),
    /// It failed, with these last words.
    Failed(String),
    /// The sweep was asked to stop before it came to its end.
    Unfinished,
}

impl Fate {
    /// What of a failed run's last words has room in a line.
    pub fn failed(words: &str) -> String {
        const LETTERS: usize = 100;
        let line = words.lines().next().unwrap_or_default();
        match line.char_indices().nth(LETTERS) {
            Some((end, _)) => format!("failed: {}…", &line[..end]),
            None => format!("failed: {line}"),
        }
    }
}

impl From<Ended> for Fate {
    fn from(ended: Ended) -> Fate {
        match ended {
            Ended::Well => Fate::Finished,
            Ended::Failed(words) => Fate::Failed(words),
            Ended::Interrupted => Fate::Unfinished,
        }
    }
}

/// Trains runs, so many at a time.
pub struct Schedule<'a> {
    pub runs: &'a [Planned],
    pub nursery: Nursery<'a>,
    pub jobs: usize,
}

impl Schedule<'_> {
    /// Every run to its end; those of a family one after the other.
    pub fn families(&self, families: &[Family]) -> Vec<Fate> {
        let fates = self.at_once(families, |family| self.family(family));
        let mut all = vec![Fate::Unfinished; self.runs.len()];
        for (index, fate) in fates.into_iter().flatten() {
            all[index] = fate;
        }
        all
    }

    fn family(&self, family: &Family) -> Vec<(usize, Fate)> {
        let longest = &self.runs[family.longest];
        let mut fates = Vec::new();
        for &(index, common) in &family.others {
            let run = &self.runs[index];
            let fate = self.follow(run, longest, common).unwrap_or_else(|| self.finish(run));
            fates.push((index, fate));
        }
        fates.push((family.longest, self.finish(longest)));
        fates
    }

    /// Brings the longer run to the step where a shorter one leaves its way, and lets that one begin there. None
    /// where this is not possible and the shorter one has to go the whole way itself; else what stands against it.
    fn follow(&self, run: &Planned, longer: &Planned, common: u64) -> Option<Fate> {
        if run.folder.exists() || longer.is_finished() {
            return None;
        }
        match self.nursery.train(longer, Some(common)) {
            Ended::Well => {}
            Ended::Failed(_) => return None,
            Ended::Interrupted => return Some(Fate::Unfinished),
        }
        match share::begin(run, longer, common) {
            Ok(true) => {
                let until = grouped(common);
                self.nursery.board.say(run, &format!("begins at step {until} of `{}`", longer.name));
                None
            }
            Ok(false) => None,
            Err(error) => Some(Fate::Failed(format!("{error:#}"))),
        }
    }

    /// A run to its end, which may be behind it.
    fn finish(&self, run: &Planned) -> Fate {
        if !run.is_finished() {
            let fate = Fate::from(self.nursery.train(run, None));
            self.say(run, &fate);
            if fate != Fate::Finished {
                return fate;
            }
        }
        match run.remove_stops() {
            Ok(()) => Fate::Finished,
            Err(error) => Fate::Failed(format!("cannot remove its checkpoints: {error}")),
        }
    }

    /// Successive halving: at every cut the better runs go on.
    pub fn halving(&self, halving: Halving) -> Vec<Fate> {
        let mut fates = vec![Fate::Finished; self.runs.len()];
        let mut alive: Vec<usize> = (0..self.runs.len()).collect();
        for (share, kept) in halving.cuts(self.runs.len()) {
            let reached = self.at_once(&alive, |&index| self.reach(&self.runs[index], share));
            for (&index, ended) in alive.iter().zip(reached) {
                fates[index] = ended.into();
            }
            alive.retain(|&index| fates[index] == Fate::Finished);
            if self.nursery.interrupted() {
                return vec![Fate::Unfinished; self.runs.len()];
            }
            for (index, why) in self.cut(&mut alive, kept, share) {
                let run = &self.runs[index];
                if !run.is_finished() {
                    fates[index] = Fate::Stopped(at(run, share), why);
                    self.say(run, &fates[index]);
                }
            }
        }
        for (&index, fate) in alive.iter().zip(self.at_once(&alive, |&index| self.finish(&self.runs[index])))
        {
            fates[index] = fate;
        }
        fates
    }

    /// A run up to a cut, which may be behind it.
    fn reach(&self, run: &Planned, share: f64) -> Ended {
        let cut = at(run, share);
        let passed = course::value(&course::metrics(&run.folder), &self.nursery.sweep.metric, cut, cut);
        if run.is_finished() || passed.is_some() {
            return Ended::Well;
        }
        let ended = self.nursery.train(run, Some(cut));
        if let Ended::Failed(_) = ended {
            self.say(run, &ended.clone().into());
        }
        ended
    }

    /// Takes the worse runs out of those alive, and says why.
    fn cut(&self, alive: &mut Vec<usize>, kept: usize, share: f64) -> Vec<(usize, String)> {
        let sweep = self.nursery.sweep;
        let standing = |index: usize| {
            let run = &self.runs[index];
            Standing::of(sweep, &course::metrics(&run.folder), 0, at(run, share))
        };
        let mut ranked: Vec<(usize, Standing)> =
            alive.iter().map(|&index| (index, standing(index))).collect();
        ranked.sort_by(|a, b| sweep.better(a.1, b.1));
        let kept = kept.min(ranked.len());
        alive.retain(|index| ranked[..kept].iter().any(|(other, _)| other == index));
        let why = |(place, &(index, standing)): (usize, &(usize, Standing))| {
            let tied = match kept.checked_sub(1).map(|last| ranked[last].1) {
                Some(last) if last == standing => ", by its place in the list",
                Some(last) if last.value.is_some() && last.value == standing.value => ", by its loss",
                _ => "",
            };
            (index, format!("{} of {} there{tied}, {kept} went on", ordinal(place + 1), ranked.len()))
        };
        ranked.iter().enumerate().skip(kept).map(why).collect()
    }

    /// One line about what became of a run.
    fn say(&self, run: &Planned, fate: &Fate) {
        let metric = &self.nursery.sweep.metric;
        let lines = course::metrics(&run.folder);
        let value = course::value(&lines, metric, 0, u64::MAX);
        let value = value.map_or_else(String::new, |value| format!("{metric} {value:.4}"));
        let text = match fate {
            Fate::Finished => format!("{value}  after {} steps", grouped(course::last_step(&lines))),
            Fate::Stopped(step, why) => format!("{value}  stopped after step {}: {why}", grouped(*step)),
            Fate::Failed(words) => Fate::failed(words),
            Fate::Unfinished => return,
        };
        self.nursery.board.say(run, &text);
    }

    /// Does something for all of a list, `jobs` at a time, begun in its order.
    fn at_once<I: Sync, T: Send>(&self, items: &[I], act: impl Fn(&I) -> T + Sync) -> Vec<T> {
        let next = AtomicUsize::new(0);
        let done = Mutex::new(Vec::new());
        let work = || {
            loop {
                let index = next.fetch_add(1, Ordering::Relaxed);
                let Some(item) = items.get(index) else { break };
                let result = act(item);
                done.lock().unwrap_or_else(PoisonError::into_inner).push((index, result));
            }
        };
        std::thread::scope(|scope| {
            for _ in 0..self.jobs.min(items.len()) {
                scope.spawn(work);
            }
        });
        let mut done = done.into_inner().unwrap_or_else(PoisonError::into_inner);
        done.sort_by_key(|&(index, _)| index);
        done.into_iter().map(|(_, result)| result).collect()
    }
}

/// The step of a cut.
fn at(run: &Planned, share: f64) -> u64 {
    // 7 % of 100 steps are 7, though 0.07 · 100 is a little more.
    (share * run.steps().unwrap_or(0) as f64 - 1e-9).ceil() as u64
}

/// `1st`, `2nd`, `3rd`, `4th`.
fn ordinal(number: usize) -> String {
    let ending = match (number % 10, number % 100) {
        (_, 11..=13) => "th",
        (1, _) => "st",
        (2, _) => "nd",
        (3, _) => "rd",
        _ => "th",
    };
    format!("{number}{ending}")
}
