//! A run as a child process of this same program, watched through the files that it writes: what becomes of it
//! takes nothing else along.

use std::fs::{File, TryLockError};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::process::{Pid, Signal, kill_process};

use super::board::{Board, Line};
use super::file::Sweep;
use super::runs::Planned;
use crate::output::escaped;

/// How often a child is looked at.
const LOOK: Duration = Duration::from_millis(50);

/// What children get.
#[derive(Debug)]
pub struct Nursery<'a> {
    /// The sweep.
    pub sweep: &'a Sweep,
    /// Threads of each.
    pub threads: usize,
    /// Where their progress is shown.
    pub board: &'a Board,
    /// Whether this program was asked to stop.
    pub stop: &'a AtomicBool,
}

/// How a child ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ended {
    /// As it should.
    Well,
    /// With these last words.
    Failed(String),
    /// Because this program was asked to stop.
    Interrupted,
}

impl Nursery<'_> {
    /// Whether this program was asked to stop.
    pub fn interrupted(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// Trains a run to its end, or until it has stopped after a step.
    pub fn train(&self, run: &Planned, stop_after: Option<u64>) -> Ended {
        if self.interrupted() {
            return Ended::Interrupted;
        }
        let line = self.board.begin(run, stop_after);
        let ended = self.trained(run, stop_after, &line);
        ended.unwrap_or_else(|error| Ended::Failed(format!("{error:#}")))
    }

    fn trained(&self, run: &Planned, stop_after: Option<u64>, line: &Line<'_>) -> Result<Ended> {
        self.wait_for_another(run, line)?;
        if self.interrupted() {
            return Ok(Ended::Interrupted);
        }
        run.write(self.sweep)?;
        let said = length(run);
        let mut child = self.start(run, stop_after)?;
        let status = self.watch(&mut child, line)?;
        Ok(match status {
            status if status.success() => Ended::Well,
            _ if self.interrupted() => Ended::Interrupted,
            status => Ended::Failed(last_words(run, said, status)),
        })
    }

    /// A process of an earlier sweep that was killed may still train this run.
    fn wait_for_another(&self, run: &Planned, line: &Line<'_>) -> Result<()> {
        let Ok(lock) = File::open(run.folder.join(".lock")) else { return Ok(()) };
        let mut said = false;
        while !self.interrupted() {
            match lock.try_lock() {
                Ok(()) => return Ok(()),
                Err(TryLockError::Error(error)) => return Err(error).context("cannot look at its lock"),
                Err(TryLockError::WouldBlock) if said => line.look(),
                Err(TryLockError::WouldBlock) => {
                    line.say("another process still trains it; waiting for that");
                    said = true;
                }
            }
            std::thread::sleep(LOOK);
        }
        Ok(())
    }

    fn start(&self, run: &Planned, stop_after: Option<u64>) -> Result<Child> {
        let log = run.log();
        let log = File::options().append(true).create(true).open(&log);
        let log = log.with_context(|| format!("cannot write `{}`", run.log().display()))?;
        let program = std::env::current_exe().context("cannot find this program's own file")?;
        let mut command = Command::new(program);
        command.arg(&self.sweep.verb).arg("--config").arg(run.config());
        command.arg("--threads").arg(self.threads.to_string());
        if let Some(step) = stop_after {
            command.arg("--stop-after").arg(step.to_string());
        }
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        // A group of its own: of Ctrl-C only this program hears, and tells each child once.
        command.process_group(0).spawn().context("cannot start the run")
    }

    /// Waits for the end. Asked to stop, it asks the child, once.
    fn watch(&self, child: &mut Child, line: &Line<'_>) -> Result<ExitStatus> {
        let mut told = false;
        loop {
            if let Some(status) = child.try_wait()? {
                return Ok(status);
            }
            if self.interrupted() && !told {
                told = true;
                line.say("is asked to save what it has and to stop");
                // It may be gone by now.
                let _ = kill_process(Pid::from_child(child), Signal::TERM);
            }
            line.look();
            std::thread::sleep(LOOK);
        }
    }
}

/// Bytes of a run's log.
fn length(run: &Planned) -> u64 {
    run.log().metadata().map_or(0, |data| data.len())
}

/// The error at the end of a run's log, of what it said since the log had `said` bytes.
fn last_words(run: &Planned, said: u64, status: ExitStatus) -> String {
    let log = std::fs::read(run.log()).unwrap_or_default();
    let new = log.get(said as usize..).unwrap_or_default();
    let text = escaped(&String::from_utf8_lossy(new));
    let error = text.rfind("error: ").map(|at| text[at + "error: ".len()..].trim_end().to_owned());
    match (error, status.signal()) {
        (_, Some(signal)) => format!("ended by signal {signal}"),
        (Some(error), None) => error,
        (None, None) => text.lines().last().unwrap_or("it ended without a word").to_owned(),
    }
}
